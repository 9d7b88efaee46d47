//! Sites of the kernel: what is known of a stack when its first allocation has been seen, and the names in it.

use std::sync::Arc;

use globset::GlobSet;
use memleak_probes::StackEnd;
use memleak_probes::kernel::KernelOrigin;

use super::{Kernel, Known};
use crate::collector::cohorts::SiteCohorts;
use crate::kernel::statistics::kmalloc_cache;
use crate::kernel::{COMM, Origin};
use crate::snapshot::{FirstThread, Site, SiteKey};
use crate::symbolize::{Frame, ModuleName, NormalizedFrame, site_id};
use crate::{Error, ErrorKind, Result};

/// Where functions return to while somebody probes their returns. Up to Linux 5.14 stacks end there.
const RETURN_PROBES: [&str; 3] = ["kretprobe_trampoline", "__kretprobe_trampoline", "arch_rethook_trampoline"];

impl Kernel {
    /// Takes what is known of a new site out of the kernel, and names it.
    pub(super) fn new_site(&mut self, raw: memleak_probes::SiteKey, key: SiteKey) -> Result<Known> {
        let Some(tracker) = &self.tracker else { return Err(Error::new(ErrorKind::Kernel, "tracing is stopped")) };
        let (stack, origin) = tracker.take_origin(raw)?;
        let end = stack.as_ref().map(|s| s.end);
        let (mut addresses, function) = match stack {
            Some(stack) => (stack.addresses, tracker.function_name(stack.name)),
            None => (Vec::new(), ""),
        };
        addresses.drain(..self.leading(&addresses, key.probe_set));
        let origin = self.origin(function, origin.unwrap_or_default());
        let first_thread = FirstThread { tid: origin.first_tid, name: origin.first_comm.clone() };
        let first_thread = Some(first_thread).filter(|t| !t.name.is_empty());
        let truncated = match end {
            Some(StackEnd::Complete) => None,
            Some(StackEnd::Cut) => Some("the limit of frames was reached (collector.max_frames)"),
            Some(_) => Some("the stack could not be read"),
            None => Some("there was no room for the stack (kernel.max_sites)"),
        };
        let frames: Vec<Frame> = addresses.iter().map(|a| self.frame(*a)).collect();
        let normalized: Vec<NormalizedFrame> = frames.iter().map(normalize).collect();
        let probe_set: Arc<str> = self.probe_set_name(key.probe_set).unwrap_or("?").into();
        let what = format!("{function} {} {}", origin.cache.as_deref().unwrap_or_default(), origin.object_bytes);
        let id = site_id(COMM, &probe_set, &what, &normalized);
        let of_module = |f: &Frame| f.module.as_deref().is_some_and(|m| self.modules.is_match(m));
        let shown = (self.caches.is_empty() || origin.cache.as_deref().is_some_and(|c| self.caches.is_match(c)))
            && (self.modules.is_empty() || frames.iter().any(of_module));
        let site = Arc::new(Site {
            key,
            id,
            process: Arc::clone(&self.process),
            probe_set,
            function: function.into(),
            addresses,
            truncated: truncated.map(Arc::from),
            first_thread,
            frames: std::sync::OnceLock::new(),
        });
        // Of modules at once: later another one may lie there. The names of the rest stay what they are.
        if frames.iter().any(|f| f.module.as_deref() != Some(crate::kallsyms::KERNEL)) {
            let _ = site.frames.set(frames);
        }
        let complete = end == Some(StackEnd::Complete);
        Ok(Known { site, origin: Arc::new(origin), cohorts: SiteCohorts::default(), shown, complete })
    }

    /// How many frames at the top belong to the tracer, to the allocator or to functions that only pass on what it gives.
    fn leading(&self, addresses: &[u64], probe_set: u32) -> usize {
        let wrappers = self.plugins.iter().find(|p| p.spec.number == probe_set).and_then(|p| p.kernel.as_ref());
        let is_leading = |address: &u64, globs: &GlobSet| {
            self.symbols.find(address.saturating_sub(1)).is_some_and(|place| globs.is_match(place.function))
        };
        // Where the kernel does not list BPF programs (net.core.bpf_jit_kallsyms), ours have no name. They lie above what
        // ran them.
        let is_tracer = |a: &u64| is_leading(a, &self.tracer);
        let is_unknown = |a: &u64| self.symbols.find(a.saturating_sub(1)).is_none();
        let top = addresses.iter().take_while(|a| is_unknown(a) || is_tracer(a)).count();
        let tracer = addresses[..top].iter().rposition(is_tracer).map_or(0, |at| at + 1);
        let rest = &addresses[tracer..];
        let passing = rest.iter().take_while(|a| wrappers.is_some_and(|w| is_leading(a, &w.wrappers))).count();
        // A stack of nothing else is better than none.
        if tracer + passing < addresses.len() { tracer + passing } else { 0 }
    }

    fn origin(&self, function: &str, raw: KernelOrigin) -> Origin {
        let has = |flag: &str| self.flags.bits(flag).is_some_and(|bits| raw.gfp & bits != 0);
        let by_size = || {
            let cache = kmalloc_cache(raw.object_bytes, has("__GFP_ACCOUNT"), has("__GFP_RECLAIMABLE"));
            cache.filter(|_| function.contains("kmalloc"))
        };
        Origin {
            cache: Some(raw.cache).filter(|c| !c.is_empty()).or_else(by_size),
            object_bytes: raw.object_bytes,
            gfp: self.flags.describe(raw.gfp),
            first_pid: raw.pid,
            first_tid: raw.tid,
            first_comm: raw.comm,
            cgroup: raw.cgroup,
            order: raw.order,
            migrate_type: raw.migrate_type,
        }
    }

    /// Fills the frames of a site, unless that has been done.
    pub(in crate::collector) fn symbolize(&self, site: &Site) {
        site.frames.get_or_init(|| site.addresses.iter().map(|a| self.frame(*a)).collect());
    }

    fn frame(&self, address: u64) -> Frame {
        let frame = Frame { address, offset: address, ..Frame::default() };
        // The call is before the return address, maybe as the last instruction of the function. Nobody calls a trampoline:
        // it is put in place of a return address.
        let trampoline = self.symbols.find(address).filter(|p| p.offset == 0 && RETURN_PROBES.contains(&p.function));
        let place = match trampoline {
            Some(place) => Some((place, 0)),
            None => self.symbols.find(address.saturating_sub(1)).map(|place| (place, place.offset + 1)),
        };
        match place {
            Some((place, offset)) => Frame {
                function: Some(place.function.to_owned()),
                module: Some(place.module.to_owned()),
                offset,
                ..frame
            },
            None => {
                let why = self.symbols.missing().unwrap_or("the kernel lists no function at the address");
                Frame { reason: Some(why.to_owned()), ..frame }
            }
        }
    }
}

/// The same after the next boot, whose addresses differ.
fn normalize(frame: &Frame) -> NormalizedFrame {
    match (&frame.function, &frame.module) {
        (Some(function), Some(module)) => NormalizedFrame {
            module: ModuleName::Generated(format!("{module}:{function}").into()),
            offset: frame.offset,
        },
        _ => NormalizedFrame { module: ModuleName::Unmapped, offset: frame.address & 0xfff },
    }
}
