//! The settings' filters in the kernel's terms.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use globset::{Glob, GlobSet, GlobSetBuilder};
use memleak_probes::kernel::KernelFilter;

use crate::config::KernelSettings;
use crate::kernel::gfp::GfpFlags;
use crate::kernel::statistics::Cache;
use crate::output::text::visible;
use crate::{Error, Result};

pub(super) fn globs(patterns: &[String]) -> Result<GlobSet> {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        set.add(Glob::new(pattern).map_err(|e| Error::config(format!("{pattern:?} is not a valid glob: {e}")))?);
    }
    set.build().map_err(|e| Error::config(e.to_string()))
}

/// The settings' filters in the kernel's terms.
pub(super) fn filter(k: &KernelSettings, flags: &GfpFlags) -> Result<KernelFilter> {
    let mut gfp = 0;
    for name in &k.gfp {
        gfp |= flags.bits(name).ok_or_else(|| {
            let known = flags.known();
            let hint = match crate::config::nearest(name, known.iter().copied()) {
                Some(near) => format!("did you mean {near}?"),
                None if known.is_empty() => {
                    "this kernel names none; mount tracefs (mount -t tracefs tracefs /sys/kernel/tracing), or give a \
                     number such as 0x400000"
                        .to_owned()
                }
                None => format!("there are {}", known.join(", ")),
            };
            Error::config(format!("kernel.gfp: this kernel has no allocation flag {name:?}; {hint}"))
        })?;
    }
    let cgroup = k.cgroup.as_ref().map(|path| cgroup_id(path)).transpose()?;
    Ok(KernelFilter { pids: k.pids.clone(), cgroup, gfp, min_size: k.min_size.0, by_cache: !k.caches.is_empty() })
}

/// What there is to say of patterns that no cache matches now. A module that is loaded later may bring one.
pub(super) fn unknown_caches(patterns: &[String], known: &BTreeMap<String, Cache>) -> Vec<String> {
    let is_known = |pattern: &String| {
        Glob::new(pattern).is_ok_and(|glob| known.keys().any(|name| glob.compile_matcher().is_match(name)))
    };
    let say = |pattern: &String| {
        let hint = match crate::config::nearest(pattern, known.keys().map(String::as_str)) {
            Some(near) => format!("did you mean {near}?"),
            None => "caches of the same kind may be merged under one name, see /proc/slabinfo".to_owned(),
        };
        format!("kernel.caches: no slab cache is called {} now; {hint}", visible(pattern))
    };
    patterns.iter().filter(|p| !is_known(p)).map(say).collect()
}

/// Id of a cgroup, which is its folder's inode, and how deep it lies.
pub(super) fn cgroup_id(path: &str) -> Result<(u64, u32)> {
    let folder = Path::new("/sys/fs/cgroup").join(path);
    let meta = std::fs::metadata(&folder)
        .map_err(|e| Error::io(format!("failed to find the cgroup {} (kernel.cgroup)", folder.display()), e))?;
    if !folder.join("cgroup.controllers").exists() {
        let what = format!("{} is not a cgroup of version 2, which alone the kernel tells apart", folder.display());
        return Err(Error::config(format!("kernel.cgroup: {what}: name one, or filter by kernel.pids")));
    }
    Ok((meta.ino(), path.split('/').count() as u32))
}
