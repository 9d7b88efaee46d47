//! The loaded kernel side: watched processes, attached probe sets, and what they counted.
//!
//! Owns the BPF object and every link. A [`Tracker`] that is dropped, or whose process dies however it dies, leaves
//! nothing behind: all links are file descriptors.

use std::collections::HashMap;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{Link, MapCore, MapFlags, ProgramMut, UprobeMultiOpts, UprobeOpts};

use crate::elf::{self, Symbols};
use crate::events::{Event, ProcessEvent, Rings};
use crate::features::{Backend, Features};
use crate::placement::{self, Needs, Placement};
use crate::reader::{self, Block, Counters, SiteKey, SiteTotals, Stack};
use crate::skeleton::userspace_alloc::{OpenUserspaceAllocSkel, UserspaceAllocSkel, UserspaceAllocSkelBuilder};
use crate::types::{
    CODE_RANGES, MAX_DOMAINS, MAX_FRAMES, MAX_TARGETS, bytes_of, memleak_function, memleak_function_flags as flags,
    memleak_range, memleak_role, memleak_target,
};
use crate::{Error, ErrorKind, Result, calibration};

/// Size of the ring buffer of a trace, bytes.
const TRACE_RING_BYTES: u32 = 32 << 20;

/// Bounds and behaviour of the kernel side.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How to attach; `None` takes the best that works.
    pub backend: Option<Backend>,
    /// Most outstanding allocations.
    pub max_outstanding: u32,
    /// Most sites, and most stacks.
    pub max_sites: u32,
    /// Most threads with a call under way.
    pub max_threads: u32,
    /// Most frames of a stack, 1 to [`MAX_FRAMES`].
    pub max_frames: u32,
    /// Smaller allocations are not recorded, bytes.
    pub min_size: u64,
    /// Emit every allocation and free, see [`Tracker::next_event`].
    pub trace_events: bool,
    /// Probe the first instruction of each function, whatever it costs: to compare.
    pub at_entry: bool,
}

/// What a function does with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Hands one out.
    Alloc,
    /// Takes one back and hands one out.
    Realloc,
    /// Takes one back.
    Free,
}

/// Where a block's size comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// Argument `arg` (from 0), times argument `times`.
    Argument {
        /// The argument with the size or the number of elements.
        arg: u8,
        /// The argument it is multiplied by.
        times: Option<u8>,
    },
    /// Always this many bytes.
    Constant(u64),
}

/// How a function hands a block out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Returns {
    /// It returns its address, or `failed`.
    Value {
        /// The return value of a failed call: 0 for NULL, `u64::MAX` for MAP_FAILED.
        failed: u64,
    },
    /// It returns `ok` and stores the address where argument `arg` points.
    Pointer {
        /// The argument with the pointer.
        arg: u8,
        /// The return value of a call that worked (an int).
        ok: i32,
    },
}

/// One function of a probe set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionSpec {
    /// Symbol name.
    pub symbol: String,
    /// What it does.
    pub role: Role,
    /// Size of the block that it hands out; for a range, of what it takes back.
    pub size: Size,
    /// The argument with the block that it takes back.
    pub block_arg: Option<u8>,
    /// How it hands a block out.
    pub returns: Returns,
    /// The block is an address range that may be taken back in parts.
    pub range: bool,
    /// The set attaches without it.
    pub optional: bool,
}

/// A probe set, resolved from its manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeSetSpec {
    /// Number within the run, part of every site's key.
    pub number: u32,
    /// Name, for messages.
    pub name: String,
    /// Group of probe sets in which nested calls count once.
    pub domain: String,
    /// Its functions.
    pub functions: Vec<FunctionSpec>,
}

/// A file that a process has mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Library {
    /// How we can open it (`/proc/PID/map_files/...` or `/proc/PID/root/...`).
    pub path: PathBuf,
    /// Its name for people.
    pub name: String,
}

/// What became of one function of a probe set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Symbol name.
    pub symbol: String,
    /// Where the probe is; `Err` says why there is none.
    pub placement: Result<Placement, String>,
}

/// Identity of a mapped file.
type FileId = (u64, u64);

/// A watched process.
struct Target {
    pid: u32,
    slot: u32,
    stop_on_load: bool,
    /// The hooks of dynamic linkers, by file.
    hooks: HashMap<FileId, Link>,
    /// What is to be attached, by file and probe set.
    plans: HashMap<(FileId, u32), Plan>,
    /// Probes are attached; else they wait for a window.
    attached: bool,
    window: u32,
    record_until_ns: u64,
    code: [memleak_range; CODE_RANGES],
}

/// The probes of one probe set in one file.
struct Plan {
    /// Keeps the file reachable, whatever becomes of its name.
    file: File,
    name: String,
    probes: Vec<Probe>,
    /// Empty while detached.
    links: Vec<Link>,
}

impl Plan {
    /// The file as the kernel is told to find it.
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

/// The loaded kernel side.
pub struct Tracker {
    skel: UserspaceAllocSkel<'static>,
    settings: Settings,
    backend: Backend,
    rings: Rings,
    targets: HashMap<u32, Target>,
    free_slots: Vec<u32>,
    names: Vec<String>,
    domains: Vec<String>,
    next_function: u32,
    /// Functions that were set up before, by file, probe set and symbol: their index and whether they return.
    functions: HashMap<(FileId, u32, String, u64), u32>,
    symbols: HashMap<(FileId, u32), Symbols>,
    cohort: u32,
    cost_per_hit_ns: f64,
}

impl Tracker {
    /// Finds the way to attach and loads the programs; nothing is attached to any process yet.
    ///
    /// # Errors
    /// Missing privilege, missing kernel feature, or a refused program; the message names the fix where there is one.
    pub fn load(settings: Settings) -> Result<Tracker> {
        let backend = Features::choose(settings.backend)?;
        let mut open = open(&settings, backend)?;
        let progs = &mut open.progs;
        progs.alloc_session.set_autoload(backend == Backend::Session);
        progs.alloc_multi_enter.set_autoload(backend == Backend::Multi);
        progs.alloc_multi_return.set_autoload(backend == Backend::Multi);
        progs.alloc_perf_enter.set_autoload(backend == Backend::Perf);
        progs.alloc_perf_return.set_autoload(backend == Backend::Perf);
        let mut skel = open.load().map_err(|e| Error::bpf("load the BPF programs", &e))?;
        let events: Option<&dyn MapCore> = settings.trace_events.then_some(&skel.maps.events);
        let rings = Rings::new(&skel.maps.process_events, events)?;
        let attach = |prog: &mut ProgramMut<'_>, name: &str| {
            prog.attach().map_err(|e| Error::bpf(format!("attach to tracepoint {name}"), &e))
        };
        skel.links.process_exec = Some(attach(&mut skel.progs.process_exec, "sched_process_exec")?);
        skel.links.process_exit = Some(attach(&mut skel.progs.process_exit, "sched_process_exit")?);
        skel.links.process_fork = Some(attach(&mut skel.progs.process_fork, "sched_process_fork")?);
        let mut tracker = Tracker {
            skel,
            settings,
            backend,
            rings,
            targets: HashMap::new(),
            free_slots: (0..u32::try_from(MAX_TARGETS).unwrap_or(u32::MAX)).rev().collect(),
            names: Vec::new(),
            domains: Vec::new(),
            next_function: 0,
            functions: HashMap::new(),
            symbols: HashMap::new(),
            cohort: 0,
            cost_per_hit_ns: 0.0,
        };
        tracker.cost_per_hit_ns = calibration::measure(&mut tracker)?;
        tracker.rings.discard()?;
        Ok(tracker)
    }

    /// Nanoseconds that one hit of a well-placed probe (an entry or a return) costs the target, as measured when the
    /// programs were loaded.
    pub fn cost_per_hit_ns(&self) -> f64 {
        self.cost_per_hit_ns
    }

    /// How uprobes are attached.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Name of an allocator function by the number in a [`Stack`] or an [`Event`]; empty when there is none.
    pub fn function_name(&self, number: u32) -> &str {
        self.names.get(number as usize).map_or("", String::as_str)
    }

    /// Announces a child that we have forked and that has not called exec yet: it is stopped (SIGSTOP) after every exec
    /// until [`Tracker::launch_done`], so that probes can be attached before its first instruction.
    ///
    /// # Errors
    /// When the map refuses.
    pub fn launch(&mut self, pid: u32) -> Result<()> {
        (self.skel.maps.launched)
            .update(&pid.to_ne_bytes(), &1_u32.to_ne_bytes(), MapFlags::ANY)
            .map_err(|e| Error::bpf(format!("announce process {pid}"), &e))
    }

    /// Ends what [`Tracker::launch`] began.
    pub fn launch_done(&mut self, pid: u32) {
        // It may never have been there; nothing depends on it.
        let _ = self.skel.maps.launched.delete(&pid.to_ne_bytes());
    }

    /// Watches a process under a new instance number (unique in the run, not 0). With `stop_on_load` the process stops
    /// itself (SIGSTOP) each time its dynamic linker has mapped something.
    ///
    /// # Errors
    /// When [`MAX_TARGETS`] processes are watched already.
    pub fn add_target(&mut self, pid: u32, instance: u32, stop_on_load: bool) -> Result<()> {
        let slot = self.free_slots.pop().ok_or_else(|| {
            Error::new(
                ErrorKind::Limit,
                format!("failed to watch process {pid}: {MAX_TARGETS} processes are watched already"),
            )
        })?;
        reader::reset_counters(&self.skel.maps.counters, slot)?;
        let target = Target {
            pid,
            slot,
            stop_on_load,
            hooks: HashMap::new(),
            plans: HashMap::new(),
            attached: true,
            window: 0,
            record_until_ns: 0,
            code: [memleak_range::default(); CODE_RANGES],
        };
        self.targets.insert(instance, target);
        self.write_target(instance)
    }

    /// Changes whether the process stops on loads, see [`Tracker::add_target`].
    ///
    /// # Errors
    /// When the map refuses.
    pub fn set_stop_on_load(&mut self, instance: u32, stop_on_load: bool) -> Result<()> {
        if let Some(target) = self.targets.get_mut(&instance) {
            target.stop_on_load = stop_on_load;
        }
        self.write_target(instance)
    }

    /// Tells where the process has code: `mappings` are its executable mappings (start, end), by address. Call stacks
    /// are cut off where they leave it.
    ///
    /// # Errors
    /// When the map refuses.
    pub fn set_code(&mut self, instance: u32, mappings: &[(u64, u64)]) -> Result<()> {
        let code = code_ranges(mappings);
        match self.targets.get_mut(&instance) {
            Some(target) if target.code.map(|r| (r.start, r.end)) != code.map(|r| (r.start, r.end)) => {
                target.code = code
            }
            _ => return Ok(()),
        }
        self.write_target(instance)
    }

    fn write_target(&mut self, instance: u32) -> Result<()> {
        let Some(target) = self.targets.get(&instance) else { return Ok(()) };
        let value = memleak_target {
            instance,
            slot: target.slot,
            stop_on_load: target.stop_on_load.into(),
            window: target.window,
            record_until_ns: target.record_until_ns,
            code: target.code,
        };
        (self.skel.maps.targets)
            .update(&target.pid.to_ne_bytes(), bytes_of(&value), MapFlags::ANY)
            .map_err(|e| Error::bpf(format!("watch process {}", target.pid), &e))
    }

    /// Attaches to the dynamic linker's hook for debuggers in `linker`, so that loads are told as
    /// [`ProcessEvent::Load`].
    ///
    /// # Errors
    /// When the file has no such hook or the kernel refuses; without it, loads are noticed later.
    pub fn attach_loader(&mut self, instance: u32, linker: &Library) -> Result<()> {
        // Exported for debuggers by glibc and musl.
        const HOOKS: [&str; 2] = ["_dl_debug_state", "__dl_debug_state"];
        let Some(pid) = self.targets.get(&instance).map(|t| t.pid) else { return Ok(()) };
        let id = file_id(&linker.path)?;
        if self.targets.get(&instance).is_some_and(|t| t.hooks.contains_key(&id)) {
            return Ok(());
        }
        let symbols = elf::read_symbols(&linker.path, &HOOKS)?;
        let function = HOOKS.iter().find_map(|name| symbols.functions.get(*name)?.first()).ok_or_else(|| {
            Error::new(ErrorKind::Elf, format!("{} has no hook for debuggers ({})", linker.name, HOOKS[0]))
        })?;
        let opts = UprobeOpts::default();
        let link = (self.skel.progs.process_load)
            .attach_uprobe_with_opts(pid.cast_signed(), &linker.path, offset(function.offset)?, opts)
            .map_err(|e| Error::bpf(format!("attach to {}", linker.name), &e))?;
        if let Some(target) = self.targets.get_mut(&instance) {
            target.hooks.insert(id, link);
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
            let names: Vec<&str> = set.functions.iter().map(|f| f.symbol.as_str()).collect();
            e.insert(elf::read_symbols(&library.path, &names)?);
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
        let symbols = self.symbols(set, library)?.clone();
        if symbols.stripped {
            return Err(Error::new(
                ErrorKind::Elf,
                format!("{} is stripped: it has no symbols to find functions by", library.name),
            ));
        }
        if symbols.go && set.functions.iter().any(|f| f.role != Role::Free) {
            // The Go runtime moves stacks and would meet a return address that is not its own.
            let why = "is a Go program: a return probe on its own functions would crash it";
            return Err(Error::new(
                ErrorKind::Elf,
                format!("{} {why}; what it calls in C libraries can be watched", library.name),
            ));
        }
        let mut report = Vec::new();
        let mut probes: Vec<Probe> = Vec::new();
        for spec in &set.functions {
            let found = symbols.functions.get(&spec.symbol).map_or(&[][..], Vec::as_slice);
            if found.is_empty() {
                if !spec.optional {
                    return Err(Error::new(
                        ErrorKind::Elf,
                        format!("{} has no function {}", library.name, spec.symbol),
                    ));
                }
                report.push(Attached { symbol: spec.symbol.clone(), placement: Err("not in this library".into()) });
                continue;
            }
            for function in found {
                let best = || placement::place(&function.code, needs(spec));
                let placement = if self.settings.at_entry { Placement::ENTRY } else { best() };
                let at = function.offset + placement.offset;
                // Two names of one function: the first one in the manifest counts.
                if let Some(first) = probes.iter().find(|p| p.function == function.offset) {
                    let same = format!("another name of {}", first.symbol);
                    report.push(Attached { symbol: spec.symbol.clone(), placement: Err(same) });
                    continue;
                }
                let index = self.function_index(id, set, spec, placement)?;
                let (returns, symbol) = (spec.role != Role::Free, spec.symbol.clone());
                probes.push(Probe { function: function.offset, offset: at, index, returns, symbol });
                report.push(Attached { symbol: spec.symbol.clone(), placement: Ok(placement) });
            }
        }
        self.keep(instance, (id, set.number), library, probes)?;
        Ok(report)
    }

    /// Remembers the probes of a probe set in a file, and attaches them unless windows have not been opened yet.
    fn keep(&mut self, instance: u32, key: (FileId, u32), library: &Library, probes: Vec<Probe>) -> Result<()> {
        let file = File::open(&library.path)
            .map_err(|e| Error::new(ErrorKind::Target, format!("failed to open {}: {e}", library.name)))?;
        let mut plan = Plan { file, name: library.name.clone(), probes, links: Vec::new() };
        let Some((pid, attached)) = self.targets.get(&instance).map(|t| (t.pid, t.attached)) else {
            return Err(Error::new(ErrorKind::Target, "the process has ended"));
        };
        if attached {
            plan.links = self.attach_probes(pid.cast_signed(), &plan)?;
        }
        if let Some(target) = self.targets.get_mut(&instance) {
            target.plans.insert(key, plan);
        }
        Ok(())
    }

    /// Detaches all probes of a process but goes on to follow it; see [`Tracker::open_window`].
    pub fn close_window(&mut self, instance: u32) {
        // Probes go one by one: no allocation may be recorded whose free is not seen any more.
        if let Some(target) = self.targets.get_mut(&instance) {
            target.record_until_ns = 1;
        }
        if let Err(e) = self.write_target(instance) {
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
        self.write_target(instance)?;
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

    /// Attaches a probe set at the entry of functions whose file offsets are known, in the set's order.
    pub(crate) fn attach_at(
        &mut self,
        instance: u32,
        set: &ProbeSetSpec,
        library: &Library,
        at: &[usize],
    ) -> Result<()> {
        let id = file_id(&library.path)?;
        let mut probes = Vec::new();
        for (spec, offset) in set.functions.iter().zip(at) {
            let index = self.function_index(id, set, spec, Placement::ENTRY)?;
            let symbol = spec.symbol.clone();
            let (function, returns) = (*offset as u64, spec.role != Role::Free);
            probes.push(Probe { function, offset: function, index, returns, symbol });
        }
        self.keep(instance, (id, set.number), library, probes)
    }

    /// Index of a function in the kernel's table; it serves every process that maps the same file.
    fn function_index(&mut self, id: FileId, set: &ProbeSetSpec, spec: &FunctionSpec, at: Placement) -> Result<u32> {
        let key = (id, set.number, spec.symbol.clone(), at.sp_offset);
        if let Some(index) = self.functions.get(&key) {
            return Ok(*index);
        }
        let domain = self.domain(&set.domain)?;
        let name = self.name(&spec.symbol);
        let argument = |n: Option<u8>| n.map_or(-1, u8::cast_signed);
        let (size_arg, times_arg, size_const) = match spec.size {
            Size::Argument { arg, times } => (Some(arg), times, 0),
            Size::Constant(bytes) => (None, None, bytes),
        };
        let (out_arg, expect) = match spec.returns {
            Returns::Value { failed } => (None, failed),
            Returns::Pointer { arg, ok } => (Some(arg), u64::from(ok.cast_unsigned())),
        };
        let role = match spec.role {
            Role::Alloc => memleak_role::ROLE_ALLOC,
            Role::Realloc => memleak_role::ROLE_REALLOC,
            Role::Free => memleak_role::ROLE_FREE,
        };
        let function = memleak_function {
            probe_set: set.number,
            name,
            role: role.0 as u8,
            domain,
            flags: if spec.range { flags::FUNCTION_RANGE.0 as u8 } else { 0 },
            size_arg: argument(size_arg),
            times_arg: argument(times_arg),
            block_arg: argument(spec.block_arg),
            out_arg: argument(out_arg),
            pad: 0,
            size_const,
            expect,
            sp_offset: at.sp_offset,
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

    /// Attaches all probes of one library, the way the backend does it.
    fn attach_probes(&self, pid: i32, plan: &Plan) -> Result<Vec<Link>> {
        let failed = |e: &libbpf_rs::Error| Error::bpf(format!("attach to {} in process {pid}", plan.name), e);
        let (path, probes) = (plan.path(), &plan.probes);
        let progs = &self.skel.progs;
        let multi = |prog: &ProgramMut<'_>, probes: &[&Probe], retprobe, session| -> Result<Link> {
            let opts = UprobeMultiOpts {
                offsets: probes.iter().map(|p| offset(p.offset)).collect::<Result<_>>()?,
                cookies: probes.iter().map(|p| p.index.into()).collect(),
                retprobe,
                session,
                ..UprobeMultiOpts::default()
            };
            prog.attach_uprobe_multi_with_opts(pid, &path, "", opts).map_err(|e| failed(&e))
        };
        let perf = |prog: &ProgramMut<'_>, probe: &Probe, retprobe, cookie| -> Result<Link> {
            let opts = UprobeOpts { retprobe, cookie, ..UprobeOpts::default() };
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
            (&mut theirs.counters, ours.counters.as_fd()),
            (&mut theirs.process_events, ours.process_events.as_fd()),
            (&mut theirs.events, ours.events.as_fd()),
            (&mut theirs.bss, ours.bss.as_fd()),
        ] {
            map.reuse_fd(fd).map_err(|e| Error::bpf(what, &e))?;
        }
        open.load().map_err(|e| Error::bpf(what, &e))
    }

    /// Detaches from a process; its totals stay readable until [`Tracker::forget`].
    pub fn detach(&mut self, instance: u32) {
        if let Some(target) = self.targets.get_mut(&instance) {
            // A process that has ended is out of the map already, and its pid may be watched as another instance.
            let mine = self.skel.maps.targets.lookup(&target.pid.to_ne_bytes(), MapFlags::ANY).ok().flatten();
            if mine.is_some_and(|v| v.starts_with(&instance.to_ne_bytes())) {
                let _ = self.skel.maps.targets.delete(&target.pid.to_ne_bytes());
            }
            // Only now: probes go one by one, and an allocation whose free is not seen must not be recorded.
            target.hooks.clear();
            target.plans.clear();
        }
    }

    /// Removes all that is known of an instance. Costs time in the order of all outstanding allocations.
    ///
    /// # Errors
    /// When the maps cannot be read.
    pub fn forget(&mut self, instance: u32) -> Result<()> {
        self.detach(instance);
        if let Some(target) = self.targets.remove(&instance) {
            self.free_slots.push(target.slot);
        }
        let maps = &self.skel.maps;
        reader::forget(&maps.blocks, &maps.sites, &maps.stacks, instance)
    }

    /// Outstanding allocations of a process, by address. Costs time in the order of all outstanding allocations.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn read_blocks(&self, instance: u32) -> Result<Vec<Block>> {
        reader::read_blocks(&self.skel.maps.blocks, instance)
    }

    /// Takes blocks off the books of a process whose probes are detached ([`Tracker::close_window`]): as freed, or, if
    /// they have not `ended`, as if they had never been allocated.
    ///
    /// # Errors
    /// When the maps cannot be changed.
    pub fn remove_blocks(&mut self, instance: u32, blocks: &[Block], ended: bool) -> Result<()> {
        let maps = &self.skel.maps;
        reader::remove_blocks(&maps.blocks, &maps.sites, instance, blocks, ended, self.cohort)
    }

    /// Totals of every site.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn read_sites(&self) -> Result<Vec<(SiteKey, SiteTotals)>> {
        reader::read_sites(&self.skel.maps.sites)
    }

    /// The call stack of a site; `None` when there was no room for it.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn read_stack(&self, key: SiteKey) -> Result<Option<Stack>> {
        reader::read_stack(&self.skel.maps.stacks, key)
    }

    /// Counters of a watched process; zero when it is not known.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn read_counters(&self, instance: u32) -> Result<Counters> {
        match self.targets.get(&instance) {
            Some(target) => reader::read_counters(&self.skel.maps.counters, target.slot),
            None => Ok(Counters::default()),
        }
    }

    /// Birth generation of allocations made now; the first is 0.
    pub fn cohort(&self) -> u32 {
        self.cohort
    }

    /// Begins the next birth generation. To be called right after [`Tracker::read_sites`], at least once read per
    /// generation, or survivors of old generations cannot be told apart.
    pub fn next_cohort(&mut self) {
        self.cohort = self.cohort.wrapping_add(1);
        if let Some(bss) = self.skel.maps.bss_data.as_deref_mut() {
            bss.cohort_now = self.cohort;
        }
    }

    /// Waits for events, at most `timeout`; a signal ends the wait early.
    ///
    /// # Errors
    /// When polling fails.
    pub fn poll(&self, timeout: Duration) -> Result<()> {
        self.rings.poll(timeout)
    }

    /// The next event of a process's life that [`Tracker::poll`] has brought.
    pub fn next_process_event(&self) -> Option<ProcessEvent> {
        self.rings.next_process_event()
    }

    /// The next allocation or free that [`Tracker::poll`] has brought; only with [`Settings::trace_events`].
    pub fn next_event(&self) -> Option<Event> {
        self.rings.next_event()
    }
}

/// A probe about to be attached.
struct Probe {
    /// File offset of the function.
    function: u64,
    /// File offset of the probed instruction.
    offset: u64,
    index: u32,
    returns: bool,
    symbol: String,
}

/// Opens the object and writes the settings into it.
fn open(settings: &Settings, backend: Backend) -> Result<OpenUserspaceAllocSkel<'static>> {
    let what = "open the BPF programs";
    // The skeleton borrows its storage. One small box per loaded object, for the life of the program.
    let storage = Box::leak(Box::new(MaybeUninit::uninit()));
    let mut open = UserspaceAllocSkelBuilder::default().open(storage).map_err(|e| Error::bpf(what, &e))?;
    let bound = |e: &libbpf_rs::Error| Error::bpf("set the size of a BPF map", e);
    open.maps.blocks.set_max_entries(settings.max_outstanding).map_err(|e| bound(&e))?;
    open.maps.sites.set_max_entries(settings.max_sites).map_err(|e| bound(&e))?;
    // Traces keep stacks of frees as well.
    let stacks = settings.max_sites.saturating_mul(if settings.trace_events { 4 } else { 1 });
    open.maps.stacks.set_max_entries(stacks).map_err(|e| bound(&e))?;
    open.maps.threads.set_max_entries(settings.max_threads).map_err(|e| bound(&e))?;
    if settings.trace_events {
        open.maps.events.set_max_entries(TRACE_RING_BYTES).map_err(|e| bound(&e))?;
    }
    let rodata = (open.maps.rodata_data.as_deref_mut())
        .ok_or_else(|| Error::new(ErrorKind::Kernel, format!("failed to {what}: no settings section")))?;
    rodata.max_frames = settings.max_frames.clamp(1, MAX_FRAMES as u32);
    rodata.min_size = settings.min_size;
    rodata.trace_events = settings.trace_events;
    rodata.hash_seed = seed();
    (rodata.pidns_dev, rodata.pidns_ino) = pid_namespace();
    if backend == Backend::PerfPlain {
        // The main copy only follows processes; see `copy_for`.
        rodata.fixed_function = 0;
    }
    Ok(open)
}

/// Joins mappings until there are few enough: those with the smallest gaps between them first.
fn code_ranges(mappings: &[(u64, u64)]) -> [memleak_range; CODE_RANGES] {
    let mut ranges: Vec<(u64, u64)> = mappings.to_vec();
    while ranges.len() > CODE_RANGES {
        let gap = |at: &usize| ranges[at + 1].0.saturating_sub(ranges[*at].1);
        let Some(at) = (0..ranges.len() - 1).min_by_key(gap) else { break };
        ranges[at].1 = ranges[at + 1].1;
        ranges.remove(at + 1);
    }
    let mut out = [memleak_range::default(); CODE_RANGES];
    for (range, (start, end)) in out.iter_mut().zip(ranges) {
        *range = memleak_range { start, end };
    }
    out
}

/// Device and inode of our pid namespace; zeros when it is the kernel's first one.
fn pid_namespace() -> (u64, u64) {
    /// Inode of the first pid namespace, see PROC_PID_INIT_INO in proc_ns.h.
    const FIRST: u64 = 0xEFFF_FFFC;
    match std::fs::metadata("/proc/self/ns/pid") {
        Ok(meta) if meta.ino() != FIRST => (meta.dev(), meta.ino()),
        _ => (0, 0),
    }
}

/// A random number; not secret enough for keys, enough to keep targets from guessing.
fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

/// What a function's probe must find intact.
fn needs(spec: &FunctionSpec) -> Needs {
    let (size, times) = match spec.size {
        Size::Argument { arg, times } => (Some(arg), times),
        Size::Constant(_) => (None, None),
    };
    let out = match spec.returns {
        Returns::Pointer { arg, .. } => Some(arg),
        Returns::Value { .. } => None,
    };
    let arguments = [size, times, spec.block_arg, out].into_iter().flatten().fold(0, |mask, n| mask | 1 << n);
    Needs { arguments, returns: spec.role != Role::Free }
}

fn file_id(path: &Path) -> Result<FileId> {
    let meta = std::fs::metadata(path)
        .map_err(|e| Error::new(ErrorKind::Target, format!("failed to open {}: {e}", path.display())))?;
    Ok((meta.dev(), meta.ino()))
}

fn offset(offset: u64) -> Result<usize> {
    usize::try_from(offset).map_err(|e| Error::new(ErrorKind::Elf, format!("file offset {offset}: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The program's own code and its libraries lie far apart; joining across that gap would let heap addresses pass.
    #[test]
    fn code_is_joined_across_the_smallest_gaps() {
        let mappings =
            [(0x1000, 0x2000), (0x7000, 0x8000), (0x9000, 0xa000), (0x9_0000, 0xa_0000), (0xf_0000, 0xf_1000)];
        let ranges = code_ranges(&mappings).map(|r| (r.start, r.end));
        assert_eq!(ranges, [(0x1000, 0x2000), (0x7000, 0xa000), (0x9_0000, 0xa_0000), (0xf_0000, 0xf_1000)]);
        assert_eq!(code_ranges(&mappings[..1]).map(|r| r.end), [0x2000, 0, 0, 0]);
        assert_eq!(code_ranges(&[]).map(|r| r.end), [0; 4]);
    }
}
