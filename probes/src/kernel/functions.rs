//! Functions of the kernel that are probed, by fentry and fexit or by kprobes.

use libbpf_rs::skel::OpenSkel;
use libbpf_rs::{Link, MapCore, MapFlags};
use std::os::fd::AsFd;

use super::layout::{FunctionLayout, Layouts, NONE};
use super::{KernelBackend, KernelFunction, KernelRole, KernelSetSpec, KernelSettings, open};
use crate::skeleton::kernel_alloc::{KernelAllocSkel, OpenKernelAllocSkel};
use crate::types::{
    bytes_of, memleak_kernel_function, memleak_kernel_limits as limits, memleak_kernel_role as role_kind,
};

/// Where in a function a probe may find itself: at its first byte, behind a breakpoint there, and both behind `endbr64`.
const PLACES: [u64; 4] = [0, 1, 4, 5];

/// What functions are called, by number.
#[derive(Debug, Default)]
pub(super) struct Names(Vec<String>);

impl Names {
    /// The name; `None` for numbers of tracepoints.
    pub(super) fn get(&self, number: u32) -> Option<&str> {
        self.0.get(number.checked_sub(limits::KERNEL_FIRST_FUNCTION.0)? as usize).map(String::as_str)
    }

    fn number(&mut self, name: &str) -> u32 {
        let at = self.0.iter().position(|n| n == name).unwrap_or_else(|| {
            self.0.push(name.to_owned());
            self.0.len() - 1
        });
        limits::KERNEL_FIRST_FUNCTION.0 + at as u32
    }
}

/// A function that this kernel has.
struct Found {
    symbol: String,
    address: u64,
    allocates: bool,
    function: memleak_kernel_function,
}

/// Attaches to functions of one set.
pub(super) struct Attacher<'a> {
    pub(super) settings: &'a KernelSettings,
    pub(super) layouts: &'a Layouts,
    pub(super) skel: &'a KernelAllocSkel<'static>,
    pub(super) names: &'a mut Names,
    /// Where among the copies the programs for kprobes are, once they are loaded.
    pub(super) kprobes: &'a mut Option<usize>,
    /// Copies of the programs: they live as long as the tracker.
    pub(super) copies: &'a mut Vec<KernelAllocSkel<'static>>,
}

impl Attacher<'_> {
    /// Attaches to those of a set's functions for which `wanted` holds; the names of what was attached to.
    pub(super) fn attach(
        &mut self,
        set: &KernelSetSpec,
        wanted: impl Fn(&KernelFunction) -> bool,
        backend: KernelBackend,
        links: &mut Vec<Link>,
    ) -> Result<Vec<String>, String> {
        let mut found = Vec::new();
        for function in set.functions.iter().filter(|f| wanted(f)) {
            match self.find(set, function) {
                Ok(f) => {
                    if f.allocates {
                        self.settings.filter.check(&f.symbol, true, f.function.gfp != NONE)?;
                    }
                    found.push(f);
                }
                Err(_) if function.optional => {}
                Err(why) => return Err(why),
            }
        }
        if found.is_empty() {
            return Err("this kernel has none of its functions".into());
        }
        // First what frees, so that nothing is recorded whose free is not seen.
        found.sort_by_key(|f| f.allocates);
        let mut new = Vec::new();
        for f in &found {
            let attached = match backend {
                KernelBackend::Kprobe => self.kprobe(f, &mut new),
                _ => self.trampoline(f, &mut new),
            };
            attached.map_err(|e| format!("{}: {e}", f.symbol))?;
        }
        links.append(&mut new);
        Ok(found.into_iter().map(|f| f.symbol).collect())
    }

    /// The first of a function's names that this kernel has.
    fn find(&mut self, set: &KernelSetSpec, function: &KernelFunction) -> Result<Found, String> {
        let names = || function.symbols.join(" or ");
        let known = |symbol: &&String| self.settings.symbols.iter().find(|(name, _)| name == *symbol);
        let Some((symbol, address)) = function.symbols.iter().find_map(|s| known(&s)) else {
            return Err(format!("this kernel has no function {}", names()));
        };
        let FunctionLayout { block, size, cache, gfp, count, role } = self.layouts.function(symbol, function.role)?;
        let role = match role {
            KernelRole::Alloc => role_kind::KERNEL_ROLE_ALLOC,
            KernelRole::Free => role_kind::KERNEL_ROLE_FREE,
            KernelRole::FreeBulk => role_kind::KERNEL_ROLE_FREE_BULK,
            KernelRole::FreeRcu => role_kind::KERNEL_ROLE_FREE_AT,
        };
        let function = memleak_kernel_function {
            probe_set: set.number,
            name: self.names.number(symbol),
            role: role.0 as u8,
            domain: set.domain as u8,
            block,
            size,
            cache,
            gfp,
            count,
            pad: 0,
        };
        let allocates = role == role_kind::KERNEL_ROLE_ALLOC;
        Ok(Found { symbol: symbol.clone(), address: *address, allocates, function })
    }

    fn kprobe(&mut self, f: &Found, links: &mut Vec<Link>) -> Result<(), String> {
        for place in PLACES {
            let key = (f.address + place).to_ne_bytes();
            let map = &self.skel.maps.kernel_functions;
            map.update(&key, bytes_of(&f.function), MapFlags::ANY).map_err(|e| format!("no room for it: {e:#}"))?;
        }
        let at = match *self.kprobes {
            Some(at) => at,
            None => {
                let copy = self.copy(&["kp_enter", "kp_free", "kp_return"], |_| Ok(()))?;
                self.copies.push(copy);
                *self.kprobes.insert(self.copies.len() - 1)
            }
        };
        let progs = &self.copies.get(at).ok_or("the programs are gone")?.progs;
        let failed = |e: libbpf_rs::Error| format!("failed to attach a kprobe: {e:#}");
        if f.allocates {
            links.push(progs.kp_return.attach_kprobe(true, &f.symbol).map_err(failed)?);
            links.push(progs.kp_enter.attach_kprobe(false, &f.symbol).map_err(failed)?);
        } else {
            links.push(progs.kp_free.attach_kprobe(false, &f.symbol).map_err(failed)?);
        }
        Ok(())
    }

    /// Loads a copy of the programs for one function, and attaches it.
    fn trampoline(&mut self, f: &Found, links: &mut Vec<Link>) -> Result<(), String> {
        let wanted = if f.allocates { "fn_return" } else { "fn_enter" };
        let copy = self.copy(&[wanted], |open| {
            let rodata = open.maps.rodata_data.as_deref_mut().ok_or("no settings section")?;
            rodata.this_function = f.function;
            for mut prog in open.open_object_mut().progs_mut().filter(|p| p.name() == wanted) {
                prog.set_attach_target(0, Some(f.symbol.clone())).map_err(|e| format!("no target: {e:#}"))?;
            }
            Ok(())
        })?;
        let prog = if f.allocates { &copy.progs.fn_return } else { &copy.progs.fn_enter };
        links.push(prog.attach_trace().map_err(|e| format!("failed to attach by fentry: {e:#}"))?);
        self.copies.push(copy);
        Ok(())
    }

    /// Loads a copy of some programs; it shares our maps.
    fn copy(
        &self,
        wanted: &[&str],
        prepare: impl FnOnce(&mut OpenKernelAllocSkel<'static>) -> Result<(), String>,
    ) -> Result<KernelAllocSkel<'static>, String> {
        let mut open = open(self.settings).map_err(|e| e.to_string())?;
        for mut prog in open.open_object_mut().progs_mut() {
            let load = wanted.iter().any(|name| prog.name() == *name);
            prog.set_autoload(load);
        }
        prepare(&mut open)?;
        let (theirs, ours) = (&mut open.maps, &self.skel.maps);
        for (map, fd) in [
            (&mut theirs.blocks, ours.blocks.as_fd()),
            (&mut theirs.sites, ours.sites.as_fd()),
            (&mut theirs.stacks, ours.stacks.as_fd()),
            (&mut theirs.origins, ours.origins.as_fd()),
            (&mut theirs.counters, ours.counters.as_fd()),
            (&mut theirs.kernel_cpus, ours.kernel_cpus.as_fd()),
            (&mut theirs.kernel_functions, ours.kernel_functions.as_fd()),
            (&mut theirs.kernel_pending, ours.kernel_pending.as_fd()),
            (&mut theirs.events, ours.events.as_fd()),
            (&mut theirs.bss, ours.bss.as_fd()),
        ] {
            map.reuse_fd(fd).map_err(|e| format!("failed to share a map: {e:#}"))?;
        }
        open.load().map_err(|e| format!("failed to load {}: {e:#}", wanted.join(", ")))
    }
}
