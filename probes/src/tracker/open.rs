//! Opens the BPF object and writes the settings into it.

use std::mem::MaybeUninit;
use std::os::unix::fs::MetadataExt;

use libbpf_rs::skel::SkelBuilder;

use super::{Settings, TRACE_RING_BYTES};
use crate::features::Backend;
use crate::sampler::MAX_SAMPLE_BYTES;
use crate::skeleton::userspace_alloc::{OpenUserspaceAllocSkel, UserspaceAllocSkelBuilder};
use crate::types::MAX_FRAMES;
use crate::{Error, ErrorKind, Result};

/// Opens the object and writes the settings into it.
pub(super) fn open(settings: &Settings, backend: Backend) -> Result<OpenUserspaceAllocSkel<'static>> {
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
    open.maps.python_stacks.set_max_entries(stacks).map_err(|e| bound(&e))?;
    open.maps.python_threads.set_max_entries(settings.max_threads).map_err(|e| bound(&e))?;
    if settings.trace_events {
        open.maps.events.set_max_entries(TRACE_RING_BYTES).map_err(|e| bound(&e))?;
    }
    let rodata = (open.maps.rodata_data.as_deref_mut())
        .ok_or_else(|| Error::new(ErrorKind::Kernel, format!("failed to {what}: no settings section")))?;
    rodata.max_frames = settings.max_frames.clamp(1, MAX_FRAMES as u32);
    rodata.min_size = settings.min_size;
    rodata.sample_bytes = settings.sample_bytes.min(MAX_SAMPLE_BYTES);
    rodata.trace_events = settings.trace_events;
    rodata.hash_seed = seed();
    (rodata.pidns_dev, rodata.pidns_ino) = pid_namespace();
    if backend == Backend::PerfPlain {
        // The main copy only follows processes; see `copy_for`.
        rodata.fixed_function = 0;
    }
    Ok(open)
}

/// Device and inode of our pid namespace; zeros when it is the kernel's first one.
pub(crate) fn pid_namespace() -> (u64, u64) {
    /// Inode of the first pid namespace, see PROC_PID_INIT_INO in proc_ns.h.
    const FIRST: u64 = 0xEFFF_FFFC;
    match std::fs::metadata("/proc/self/ns/pid") {
        Ok(meta) if meta.ino() != FIRST => (meta.dev(), meta.ino()),
        _ => (0, 0),
    }
}

/// A random number; not secret enough for keys, enough to keep targets from guessing.
pub(crate) fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
