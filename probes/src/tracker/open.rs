//! Opens the BPF object and writes the settings into it.

use std::mem::MaybeUninit;
use std::os::unix::fs::MetadataExt;

use libbpf_rs::skel::{OpenSkel, SkelBuilder};

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
    if would_panic() {
        for mut map in open.open_object_mut().maps_mut() {
            let flags = map.map_flags() & !libbpf_sys::BPF_F_NO_PREALLOC;
            map.set_map_flags(flags).map_err(|e| bound(&e))?;
        }
    }
    let rodata = (open.maps.rodata_data.as_deref_mut())
        .ok_or_else(|| Error::new(ErrorKind::Kernel, format!("failed to {what}: no settings section")))?;
    rodata.max_frames = settings.max_frames.clamp(1, MAX_FRAMES as u32);
    rodata.min_size = settings.min_size;
    rodata.sample_bytes = settings.sample_bytes.min(MAX_SAMPLE_BYTES);
    rodata.trace_events = settings.trace_events;
    rodata.can_hold_preemption = crate::features::can_hold_preemption();
    rodata.hash_seed = seed();
    (rodata.pidns_dev, rodata.pidns_ino) = pid_namespace();
    if backend == Backend::PerfPlain {
        // The main copy only follows processes; see `copy_for`.
        rodata.fixed_function = 0;
    }
    Ok(open)
}

/// Up to Linux 6.0 the kernel warns, once, of tracing programs with tables that grow; in user context, where ours run, they
/// do no harm. A machine that panics at every warning gets tables of full size instead.
fn would_panic() -> bool {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap_or_default();
    read("panic_on_warn").trim() != "0" && warns_of_growing_tables(&read("osrelease"))
}

/// Kernels by their release, such as `5.10.0-32-amd64`; one that cannot be read counts as old.
fn warns_of_growing_tables(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) < (6, 1)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The wrong answer takes a machine down.
    #[test]
    fn kernels_that_warn_of_growing_tables_are_known() {
        for old in ["5.10.0-32-cloud-amd64", "6.0.19", "4.18.0-553.el8", "", "custom"] {
            assert!(warns_of_growing_tables(old), "{old}");
        }
        for new in ["6.1.0-18-amd64", "6.18.44", "7.2-rc1", "10.0"] {
            assert!(!warns_of_growing_tables(new), "{new}");
        }
    }
}
