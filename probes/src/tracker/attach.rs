//! Attaching probe sets to the files of a process, for good or for a window.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use libbpf_rs::skel::OpenSkel;
use libbpf_rs::{Link, MapCore, MapFlags, ProgramMut, UprobeMultiOpts, UprobeOpts};

use super::{FileId, Tracker, open};
use crate::elf::{self, Symbols};
use crate::features::Backend;
use crate::operand::Operand;
use crate::placement::{self, Placement};
use crate::skeleton::userspace_alloc::{UserspaceAllocProgs, UserspaceAllocSkel};
use crate::spec::{Attached, FunctionSpec, Library, ProbeSetSpec, Returns, Role, SetKind, Size, needs};
use crate::sweep::{self, Attachment};
use crate::types::{
    MAX_DOMAINS, MAX_PROBE_SET, bytes_of, memleak_function, memleak_function_flags as flags, memleak_role,
};
use crate::{Error, ErrorKind, Result, usdt};

/// The probes of one probe set in one file.
pub(super) struct Plan {
    /// Keeps the file reachable, whatever becomes of its name.
    file: File,
    name: String,
    /// The probe set, and its domain.
    set: String,
    domain: String,
    probes: Vec<Probe>,
    /// Empty while detached.
    pub(super) links: Vec<Link>,
}

impl Plan {
    /// The file as the kernel is told to find it.
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

/// A probe about to be attached.
pub(super) struct Probe {
    /// File offset of the function.
    function: u64,
    /// File offset of the probed instruction.
    offset: u64,
    index: u32,
    returns: bool,
    symbol: String,
    /// File offset of the counter that tells the program that somebody listens.
    semaphore: Option<u64>,
}

impl Tracker {
    /// Attaches to the dynamic linker's hook for debuggers in `linker`, so that loads are told as
    /// [`crate::ProcessEvent::Load`].
    ///
    /// # Errors
    /// When the file has no such hook or the kernel refuses; without it, loads are noticed later.
    pub fn attach_loader(&mut self, instance: u32, linker: &Library) -> Result<()> {
        // Exported for debuggers by glibc and musl.
        self.attach_hook(instance, linker, &["_dl_debug_state", "__dl_debug_state"], |p| &p.process_load)
    }

    /// Attaches to exit() in `libc`: the process then stops (SIGSTOP) when it calls it, before its exit handlers run,
    /// and that is told as [`crate::ProcessEvent::Exiting`].
    ///
    /// # Errors
    /// When the file does not define exit() or the kernel refuses.
    pub fn attach_exit(&mut self, instance: u32, libc: &Library) -> Result<()> {
        self.attach_hook(instance, libc, &["exit"], |p| &p.process_exiting)
    }

    /// Attaches a program to the first of `names` that a file defines, once per process and file.
    fn attach_hook(
        &mut self,
        instance: u32,
        library: &Library,
        names: &'static [&'static str],
        program: impl for<'a> Fn(&'a UserspaceAllocProgs<'static>) -> &'a ProgramMut<'static>,
    ) -> Result<()> {
        let Some(pid) = self.targets.get(&instance).map(|t| t.pid) else { return Ok(()) };
        let key = (file_id(&library.path)?, names[0]);
        if self.targets.get(&instance).is_some_and(|t| t.hooks.contains_key(&key)) {
            return Ok(());
        }
        let symbols = elf::read_symbols(&library.path, library.debug.as_deref(), names)?;
        let function = names
            .iter()
            .find_map(|name| symbols.functions.get(*name)?.first())
            .ok_or_else(|| Error::new(ErrorKind::Elf, format!("{} does not define {}", library.name, names[0])))?;
        let opts = UprobeOpts::default();
        let link = program(&self.skel.progs)
            .attach_uprobe_with_opts(pid.cast_signed(), &library.path, offset(function.offset)?, opts)
            .map_err(|e| Error::bpf(format!("attach to {}", library.name), &e))?;
        if let Some(target) = self.targets.get_mut(&instance) {
            target.hooks.insert(key, link);
        }
        Ok(())
    }

    /// Which of a probe set's functions `library` defines.
    ///
    /// # Errors
    /// When the file cannot be read as ELF.
    pub fn symbols(&mut self, set: &ProbeSetSpec, library: &Library) -> Result<&Symbols> {
        let id = file_id(&library.path)?;
        if let std::collections::hash_map::Entry::Vacant(e) = self.symbols.entry((id, set.number)) {
            let names = set.names();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            e.insert(elf::read_symbols(&library.path, library.debug.as_deref(), &names)?);
        }
        Ok(&self.symbols[&(id, set.number)])
    }

    /// Attaches a probe set to a library of a watched process; returns what became of each function. Does nothing and
    /// returns an empty list when that has been done before.
    ///
    /// # Errors
    /// When a function that is not optional is missing, or the kernel refuses: then nothing of the set is attached.
    pub fn attach(&mut self, instance: u32, set: &ProbeSetSpec, library: &Library) -> Result<Vec<Attached>> {
        let id = file_id(&library.path)?;
        if self.targets.get(&instance).is_some_and(|t| t.plans.contains_key(&(id, set.number))) {
            return Ok(Vec::new());
        }
        if set.kind == SetKind::Tracepoints {
            return self.attach_tracepoints(instance, id, set, library);
        }
        let symbols = self.symbols(set, library)?.clone();
        if symbols.stripped {
            return Err(Error::new(
                ErrorKind::Elf,
                format!("{} is stripped: it has no symbols to find functions by", library.name),
            ));
        }
        if symbols.go && set.functions.iter().any(FunctionSpec::is_return_probed) {
            // The Go runtime moves stacks and would meet a return address that is not its own.
            let why = "is a Go program: a return probe on its own functions would crash it";
            return Err(Error::new(
                ErrorKind::Elf,
                format!("{} {why}; what it calls in C libraries can be watched", library.name),
            ));
        }
        let mut report = Vec::new();
        let mut probes: Vec<Probe> = Vec::new();
        for spec in functions_under_prefixes(set, &symbols, library)? {
            let found = symbols.functions.get(&spec.symbol).map_or(&[][..], Vec::as_slice);
            if found.is_empty() {
                report.push(Attached { symbol: spec.symbol, placement: Err("not in this library".into()) });
                continue;
            }
            for function in found {
                // Two names of one function: the first one in the manifest counts.
                let same = probes.iter().find(|p| p.function == function.offset);
                let taken = same.map(|first| format!("another name of {}", first.symbol));
                if let Some(why) = taken.or_else(|| self.counted_elsewhere(instance, id, set, function.offset)) {
                    report.push(Attached { symbol: spec.symbol.clone(), placement: Err(why) });
                    continue;
                }
                let best = || placement::place(&function.code, needs(&spec));
                let placement = if self.settings.at_entry { placement::entry(&function.code) } else { best() };
                let at = function.offset + placement.offset;
                let register = |n| Ok(Operand::Register(placement.register(n)));
                let index = self.function_index(id, set, &spec, placement, at, register)?;
                let (returns, symbol) = (spec.is_return_probed(), spec.symbol.clone());
                probes.push(Probe { function: function.offset, offset: at, index, returns, symbol, semaphore: None });
                report.push(Attached { symbol: spec.symbol.clone(), placement: Ok(placement) });
            }
        }
        self.keep(instance, (id, set.number), set, library, probes)?;
        Ok(report)
    }

    /// Why a function needs no probe: another set of the domain has one on it. Two would count each call twice.
    fn counted_elsewhere(&self, instance: u32, id: FileId, set: &ProbeSetSpec, function: u64) -> Option<String> {
        let plans = &self.targets.get(&instance)?.plans;
        let other = plans.iter().find(|((file, _), plan)| {
            *file == id && plan.domain == set.domain && plan.probes.iter().any(|p| p.function == function)
        });
        other.map(|(_, plan)| format!("probed by {} already", plan.set))
    }

    /// [`Tracker::attach`] for static tracepoints.
    fn attach_tracepoints(
        &mut self,
        instance: u32,
        id: FileId,
        set: &ProbeSetSpec,
        library: &Library,
    ) -> Result<Vec<Attached>> {
        let wrong = |what: String| Error::new(ErrorKind::Elf, format!("{}: {what}", library.name));
        let all = usdt::read_tracepoints(&library.path)?;
        let mut report = Vec::new();
        let mut probes: Vec<Probe> = Vec::new();
        for spec in &set.functions {
            let symbol = &spec.symbol;
            let mut missing = true;
            for tracepoint in all.iter().filter(|t| t.name == *symbol) {
                missing = false;
                let argument = |n: u8| match tracepoint.arguments.get(usize::from(n)) {
                    Some(Ok(operand)) => Ok(*operand),
                    Some(Err(why)) => Err(wrong(format!("tracepoint {symbol}: {why}"))),
                    None => Err(wrong(format!("tracepoint {symbol} has no argument {n}"))),
                };
                let at = tracepoint.placement();
                let index = self.function_index(id, set, spec, at, tracepoint.offset, argument)?;
                let (function, semaphore) = (tracepoint.offset, tracepoint.semaphore);
                let symbol = symbol.clone();
                probes.push(Probe { function, offset: function, index, returns: false, symbol, semaphore });
                report.push(Attached { symbol: spec.symbol.clone(), placement: Ok(at) });
            }
            if missing && !spec.optional {
                return Err(wrong(format!("it has no tracepoint {symbol}")));
            }
            if missing {
                report.push(Attached { symbol: symbol.clone(), placement: Err("not in this library".into()) });
            }
        }
        self.keep(instance, (id, set.number), set, library, probes)?;
        Ok(report)
    }

    /// Remembers the probes of a probe set in a file, and attaches them unless windows have not been opened yet.
    fn keep(
        &mut self,
        instance: u32,
        key: (FileId, u32),
        set: &ProbeSetSpec,
        library: &Library,
        probes: Vec<Probe>,
    ) -> Result<()> {
        let file = File::open(&library.path)
            .map_err(|e| Error::new(ErrorKind::Target, format!("failed to open {}: {e}", library.name)))?;
        let (name, set, domain) = (library.name.clone(), set.name.clone(), set.domain.clone());
        let mut plan = Plan { file, name, set, domain, probes, links: Vec::new() };
        let Some((pid, attached)) = self.targets.get(&instance).map(|t| (t.pid, t.attached)) else {
            return Err(Error::new(ErrorKind::Target, "the process has ended"));
        };
        if let Some(witness) = &self.witness {
            self.for_each_attachment(pid, &plan, |attachment| {
                witness.attaching(attachment);
                Ok(())
            })?;
        }
        if attached {
            plan.links = self.attach_probes(pid.cast_signed(), &plan)?;
        }
        if let Some(target) = self.targets.get_mut(&instance) {
            target.plans.insert(key, plan);
        }
        Ok(())
    }

    /// Shows the probes of a plan to `visit`, in portions. Perf events are none of them.
    fn for_each_attachment(
        &self,
        pid: u32,
        plan: &Plan,
        mut visit: impl FnMut(&Attachment<'_>) -> Result<()>,
    ) -> Result<()> {
        let (program, session) = match self.backend {
            Backend::Session => (self.skel.progs.alloc_session.as_fd(), true),
            Backend::Multi => (self.skel.progs.alloc_multi_enter.as_fd(), false),
            Backend::Perf | Backend::PerfPlain => return Ok(()),
        };
        let offsets: Vec<u64> = plan.probes.iter().map(|p| p.offset).collect();
        let mut portions = offsets.chunks(sweep::MAX_PLACES);
        portions.try_for_each(|offsets| visit(&Attachment { pid, program, session, file: plan.file.as_fd(), offsets }))
    }

    /// Detaches all probes of a process but goes on to follow it; see [`Tracker::open_window`].
    pub fn close_window(&mut self, instance: u32) {
        // Probes go one by one: no allocation may be recorded whose free is not seen any more.
        if let Some(target) = self.targets.get_mut(&instance) {
            target.record_until_ns = 1;
        }
        if let Err(e) = self.update_target(instance) {
            tracing::debug!(instance, "recording goes on while probes are detached: {e}");
        }
        if let Some(target) = self.targets.get_mut(&instance) {
            target.attached = false;
            target.plans.values_mut().for_each(|plan| plan.links.clear());
        }
    }

    /// Attaches all probes of a process again. Allocations made after `record_until_ns` (CLOCK_MONOTONIC; 0 is never)
    /// are not recorded; frees always are.
    ///
    /// # Errors
    /// When the kernel refuses: then nothing is attached.
    pub fn open_window(&mut self, instance: u32, record_until_ns: u64) -> Result<()> {
        let Some(target) = self.targets.get_mut(&instance) else { return Ok(()) };
        target.window = target.window.wrapping_add(1);
        target.record_until_ns = record_until_ns;
        target.attached = true;
        let pid = target.pid.cast_signed();
        let mut plans = std::mem::take(&mut target.plans);
        self.update_target(instance)?;
        let mut result = Ok(());
        for plan in plans.values_mut() {
            match self.attach_probes(pid, plan) {
                Ok(links) => plan.links = links,
                Err(e) => result = Err(e),
            }
        }
        if let Some(target) = self.targets.get_mut(&instance) {
            target.plans = plans;
        }
        if result.is_err() {
            self.close_window(instance);
        }
        result
    }

    /// Attaches a probe set at the entry of functions whose file offsets are known, in the set's order, and of which is
    /// known whether the kernel emulates their first instruction.
    pub(crate) fn attach_at(
        &mut self,
        instance: u32,
        set: &ProbeSetSpec,
        library: &Library,
        at: &[(usize, bool)],
    ) -> Result<()> {
        let id = file_id(&library.path)?;
        let mut probes = Vec::new();
        for (spec, &(offset, emulated)) in set.functions.iter().zip(at) {
            let register = |n| Ok(Operand::Register(Placement::ENTRY.register(n)));
            let placement = Placement { emulated, ..Placement::ENTRY };
            let index = self.function_index(id, set, spec, placement, offset as u64, register)?;
            let symbol = spec.symbol.clone();
            let (function, returns) = (offset as u64, spec.is_return_probed());
            probes.push(Probe { function, offset: function, index, returns, symbol, semaphore: None });
        }
        self.keep(instance, (id, set.number), set, library, probes)
    }

    /// Index of a function in the kernel's table; it serves every process that maps the same file.
    /// `offset` is that of the probe in the file, `locate` says where an argument is there.
    fn function_index(
        &mut self,
        id: FileId,
        set: &ProbeSetSpec,
        spec: &FunctionSpec,
        at: Placement,
        offset: u64,
        locate: impl Fn(u8) -> Result<Operand>,
    ) -> Result<u32> {
        let key = (id, set.number, spec.symbol.clone(), offset);
        if let Some(index) = self.functions.get(&key) {
            return Ok(*index);
        }
        if set.number > MAX_PROBE_SET {
            let message = format!("failed to add probe set {}: there can be no more than {MAX_PROBE_SET}", set.name);
            return Err(Error::new(ErrorKind::Limit, message));
        }
        let domain = self.domain(&set.domain)?;
        let name = self.name(&spec.symbol);
        let argument = |n: Option<u8>| n.map_or(Ok(Operand::None), &locate);
        let (size, times) = match spec.size {
            Size::Argument { arg, times } => (argument(Some(arg))?, argument(times)?),
            Size::Constant(bytes) => (Operand::Constant(bytes), Operand::None),
        };
        let (out, expect, mut function_flags) = match spec.returns {
            Returns::Value { failed } => (None, failed, flags(0)),
            Returns::Pointer { arg, ok } => (Some(arg), u64::from(ok.cast_unsigned()), flags(0)),
            Returns::InPlace => (None, 0, flags::FUNCTION_IN_PLACE),
            Returns::AtEntry { .. } => (None, 0, flags::FUNCTION_AT_ENTRY),
        };
        let role = match spec.role {
            Role::Alloc => memleak_role::ROLE_ALLOC,
            Role::Realloc => memleak_role::ROLE_REALLOC,
            Role::Free => memleak_role::ROLE_FREE,
        };
        if spec.range {
            function_flags.0 |= flags::FUNCTION_RANGE.0;
        }
        if set.kind == SetKind::Tracepoints {
            function_flags.0 |= flags::FUNCTION_INSIDE.0;
        }
        // What tells of samples must not be sampled again.
        if set.functions.iter().any(|f| f.range) || matches!(spec.returns, Returns::AtEntry { .. }) {
            function_flags.0 |= flags::FUNCTION_UNSAMPLED.0;
        }
        if !at.emulated {
            function_flags.0 |= flags::FUNCTION_STEPPED.0;
        }
        let function = memleak_function {
            probe_set: set.number,
            name,
            role: role.0 as u8,
            domain,
            flags: function_flags.0 as u8,
            pad: [0; 5],
            size: size.encode(),
            times: times.encode(),
            block: argument(spec.block())?.encode(),
            out: argument(out)?.encode(),
            expect,
            sp_offset: at.sp_offset,
            followed: 0,
            nests: 0,
        };
        let index = self.next_function;
        (self.skel.maps.functions)
            .update(&index.to_ne_bytes(), bytes_of(&function), MapFlags::ANY)
            .map_err(|e| Error::bpf(format!("describe function {} (too many probed functions?)", spec.symbol), &e))?;
        self.next_function += 1;
        self.functions.insert(key, index);
        Ok(index)
    }

    fn domain(&mut self, name: &str) -> Result<u8> {
        let at = match self.domains.iter().position(|d| d == name) {
            Some(at) => at,
            None if self.domains.len() >= MAX_DOMAINS => {
                let known = self.domains.join(", ");
                let message = format!("failed to add domain {name}: there are {MAX_DOMAINS} already ({known})");
                return Err(Error::new(ErrorKind::Limit, message));
            }
            None => {
                self.domains.push(name.to_owned());
                self.domains.len() - 1
            }
        };
        Ok(at as u8)
    }

    fn name(&mut self, symbol: &str) -> u32 {
        let at = self.names.iter().position(|n| n == symbol).unwrap_or_else(|| {
            self.names.push(symbol.to_owned());
            self.names.len() - 1
        });
        at as u32
    }

    /// Takes the breakpoints out of the children that a process has forked. They inherit them and pay for each hit although
    /// nobody counts it, because the kernel looks for processes in which no probe is wanted only when one is detached: so
    /// one more, which does nothing, is attached to the process itself and detached again. Perf events need no help: the
    /// kernel removes their breakpoints from a child at the first hit. Does nothing while no probe is attached.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn release_children(&self, instance: u32) -> Result<()> {
        let Some(target) = self.targets.get(&instance).filter(|t| t.attached) else { return Ok(()) };
        for plan in target.plans.values().filter(|p| !p.links.is_empty()) {
            self.for_each_attachment(target.pid, plan, |attachment| {
                let why = |e| format!("failed to release the children of process {}: {e}", target.pid);
                attachment.sweep().map_err(|e| Error::new(ErrorKind::Kernel, why(e)))
            })?;
        }
        Ok(())
    }

    /// Attaches all probes of one library, the way the backend does it.
    fn attach_probes(&self, pid: i32, plan: &Plan) -> Result<Vec<Link>> {
        let failed = |e: &libbpf_rs::Error| Error::bpf(format!("attach to {} in process {pid}", plan.name), e);
        let (path, probes) = (plan.path(), &plan.probes);
        if probes.is_empty() {
            return Ok(Vec::new());
        }
        let progs = &self.skel.progs;
        let multi = |prog: &ProgramMut<'_>, probes: &[&Probe], retprobe, session| -> Result<Link> {
            let opts = UprobeMultiOpts {
                offsets: probes.iter().map(|p| offset(p.offset)).collect::<Result<_>>()?,
                cookies: probes.iter().map(|p| p.index.into()).collect(),
                ref_ctr_offsets: semaphores(probes)?,
                retprobe,
                session,
                ..UprobeMultiOpts::default()
            };
            prog.attach_uprobe_multi_with_opts(pid, &path, "", opts).map_err(|e| failed(&e))
        };
        let perf = |prog: &ProgramMut<'_>, probe: &Probe, retprobe, cookie| -> Result<Link> {
            let ref_ctr_offset = probe.semaphore.map_or(Ok(0), offset)?;
            let opts = UprobeOpts { retprobe, cookie, ref_ctr_offset, ..UprobeOpts::default() };
            prog.attach_uprobe_with_opts(pid, &path, offset(probe.offset)?, opts).map_err(|e| failed(&e))
        };
        // Where probes appear one by one, frees come first and returns before entries: a free or a return whose
        // other half was not seen is harmless, an allocation whose free is missed is not.
        let mut all: Vec<&Probe> = probes.iter().collect();
        all.sort_by_key(|p| p.returns);
        let returning: Vec<&Probe> = all.iter().copied().filter(|p| p.returns).collect();
        let mut links = Vec::new();
        match self.backend {
            Backend::Session => links.push(multi(&progs.alloc_session, &all, false, true)?),
            Backend::Multi => {
                if !returning.is_empty() {
                    links.push(multi(&progs.alloc_multi_return, &returning, true, false)?);
                }
                links.push(multi(&progs.alloc_multi_enter, &all, false, false)?);
            }
            Backend::Perf => {
                for probe in &all {
                    if probe.returns {
                        links.push(perf(&progs.alloc_perf_return, probe, true, probe.index.into())?);
                    }
                    links.push(perf(&progs.alloc_perf_enter, probe, false, probe.index.into())?);
                }
            }
            Backend::PerfPlain => {
                for probe in &all {
                    let copy = self.copy_for(probe.index)?;
                    if probe.returns {
                        links.push(perf(&copy.progs.alloc_perf_return, probe, true, 0)?);
                    }
                    links.push(perf(&copy.progs.alloc_perf_enter, probe, false, 0)?);
                    // The links keep the programs alive.
                }
            }
        }
        Ok(links)
    }

    /// A copy of the perf-event programs for one function, for kernels without attach cookies; it shares our maps.
    fn copy_for(&self, index: u32) -> Result<UserspaceAllocSkel<'static>> {
        let what = "load a copy of the BPF programs";
        let mut open = open(&self.settings, Backend::PerfPlain)?;
        if let Some(rodata) = open.maps.rodata_data.as_deref_mut() {
            rodata.fixed_function = index;
        }
        let progs = &mut open.progs;
        for prog in [
            &mut progs.alloc_session,
            &mut progs.alloc_multi_enter,
            &mut progs.alloc_multi_return,
            &mut progs.process_exec,
            &mut progs.process_exit,
            &mut progs.process_fork,
            &mut progs.process_fork_stop,
            &mut progs.process_exiting,
            &mut progs.process_load,
        ] {
            prog.set_autoload(false);
        }
        let (theirs, ours) = (&mut open.maps, &self.skel.maps);
        for (map, fd) in [
            (&mut theirs.targets, ours.targets.as_fd()),
            (&mut theirs.launched, ours.launched.as_fd()),
            (&mut theirs.functions, ours.functions.as_fd()),
            (&mut theirs.blocks, ours.blocks.as_fd()),
            (&mut theirs.sites, ours.sites.as_fd()),
            (&mut theirs.stacks, ours.stacks.as_fd()),
            (&mut theirs.threads, ours.threads.as_fd()),
            (&mut theirs.unwind_maps, ours.unwind_maps.as_fd()),
            (&mut theirs.unwind_pages, ours.unwind_pages.as_fd()),
            (&mut theirs.unwind_memos, ours.unwind_memos.as_fd()),
            (&mut theirs.python_targets, ours.python_targets.as_fd()),
            (&mut theirs.python_threads, ours.python_threads.as_fd()),
            (&mut theirs.python_stacks, ours.python_stacks.as_fd()),
            (&mut theirs.python_codes, ours.python_codes.as_fd()),
            (&mut theirs.counters, ours.counters.as_fd()),
            (&mut theirs.process_events, ours.process_events.as_fd()),
            (&mut theirs.events, ours.events.as_fd()),
            (&mut theirs.bss, ours.bss.as_fd()),
        ] {
            map.reuse_fd(fd).map_err(|e| Error::bpf(what, &e))?;
        }
        open.load().map_err(|e| Error::bpf(what, &e))
    }
}

/// The counters of tracepoints, as a list as long as that of the probes; empty when there are none.
fn semaphores(probes: &[&Probe]) -> Result<Vec<usize>> {
    if probes.iter().all(|p| p.semaphore.is_none()) {
        return Ok(Vec::new());
    }
    probes.iter().map(|p| p.semaphore.map_or(Ok(0), offset)).collect()
}

/// The set's functions as they are named in a file: under each prefix under which all that are not optional are there.
///
/// # Errors
/// When there is no such prefix.
fn functions_under_prefixes(set: &ProbeSetSpec, symbols: &Symbols, library: &Library) -> Result<Vec<FunctionSpec>> {
    let under = |prefix: &str| -> Vec<FunctionSpec> {
        let named = |f: &FunctionSpec| FunctionSpec { symbol: format!("{prefix}{}", f.symbol), ..f.clone() };
        set.functions.iter().map(named).collect()
    };
    let all: Vec<Vec<FunctionSpec>> = set.prefixes.iter().map(|p| under(p)).collect();
    let missing = |f: &&FunctionSpec| !f.optional && !symbols.functions.contains_key(&f.symbol);
    if all.iter().all(|functions| functions.iter().any(|f| missing(&f))) {
        let first = all.first().and_then(|functions| functions.iter().find(missing));
        let what = first.map_or_else(|| "of the set".to_owned(), |f| f.symbol.clone());
        return Err(Error::new(ErrorKind::Elf, format!("{} has no function {what}", library.name)));
    }
    Ok(all.into_iter().filter(|functions| !functions.iter().any(|f| missing(&f))).flatten().collect())
}

fn file_id(path: &Path) -> Result<FileId> {
    let meta = std::fs::metadata(path)
        .map_err(|e| Error::new(ErrorKind::Target, format!("failed to open {}: {e}", path.display())))?;
    Ok((meta.dev(), meta.ino()))
}

fn offset(offset: u64) -> Result<usize> {
    usize::try_from(offset).map_err(|e| Error::new(ErrorKind::Elf, format!("file offset {offset}: {e}")))
}
