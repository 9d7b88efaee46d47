//! The kernel's own statistics: `/proc/slabinfo` and `/proc/meminfo`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;

use crate::{Error, Result};

/// Both are some ten thousand bytes.
const MAX_BYTES: u64 = 4 << 20;

/// A slab cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cache {
    /// Objects in use.
    pub active: u64,
    /// Bytes of an object.
    pub object_bytes: u64,
}

/// What the kernel says of its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Caches by name; `None` when they cannot be read.
    pub caches: Option<BTreeMap<String, Cache>>,
    /// Bytes by the names of /proc/meminfo.
    pub memory: BTreeMap<String, u64>,
}

impl Statistics {
    /// Reads them; what cannot be read is left out.
    pub fn read() -> Self {
        let caches = read("/proc/slabinfo").map(|text| parse_slabinfo(&text));
        if let Err(e) = &caches {
            tracing::debug!("no statistics of caches: {e:#}");
        }
        let memory = read("/proc/meminfo").map(|text| parse_meminfo(&text)).unwrap_or_default();
        Statistics { caches: caches.ok(), memory }
    }

    /// Memory that the kernel has taken for itself, bytes.
    pub fn kernel_bytes(&self) -> u64 {
        ["Slab", "VmallocUsed", "Percpu", "KernelStack"].iter().filter_map(|name| self.memory.get(*name)).sum()
    }

    /// What a line of /proc/meminfo has grown by since then.
    pub fn growth(&self, since: &Statistics, name: &str) -> Option<i64> {
        Some(self.memory.get(name)?.cast_signed() - since.memory.get(name)?.cast_signed())
    }
}

fn read(path: &str) -> Result<String> {
    let failed = |e| Error::io(format!("failed to read {path}"), e);
    let mut text = Vec::new();
    File::open(path).map_err(failed)?.take(MAX_BYTES).read_to_end(&mut text).map_err(failed)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Caches that are known to be given back where the kernel does not say.
const RECLAIMABLE: [&str; 6] =
    ["dentry", "buffer_head", "radix_tree_node", "inode_cache", "proc_inode_cache", "shmem_inode_cache"];

/// Whether the kernel gives objects of a cache back when memory is short.
pub fn is_reclaimable(cache: &str) -> bool {
    // The name is from the kernel; a folder that it does not name is another one.
    let plain = !cache.contains('/') && cache != "." && cache != "..";
    let said = std::fs::read_to_string(format!("/sys/kernel/slab/{cache}/reclaim_account")).ok().filter(|_| plain);
    said.map_or_else(|| RECLAIMABLE.contains(&cache) || cache.ends_with("_inode_cache"), |text| text.trim() == "1")
}

/// Name under which caches of kmalloc that differ only in a random number are one.
pub fn cache_name(name: &str) -> String {
    match name.strip_prefix("kmalloc-rnd-").and_then(|rest| rest.split_once('-')) {
        Some((_, size)) => format!("kmalloc-{size}"),
        None => name.to_owned(),
    }
}

/// `# name <active_objs> <num_objs> <objsize> ...`, one cache per line.
fn parse_slabinfo(text: &str) -> BTreeMap<String, Cache> {
    let mut caches: BTreeMap<String, Cache> = BTreeMap::new();
    for line in text.lines().filter(|l| !l.starts_with('#') && !l.starts_with("slabinfo")) {
        let mut fields = line.split_ascii_whitespace();
        let Some(name) = fields.next() else { continue };
        let mut number = || fields.next().and_then(|f| f.parse::<u64>().ok());
        let (Some(active), Some(_), Some(object_bytes)) = (number(), number(), number()) else { continue };
        let cache = caches.entry(cache_name(name)).or_default();
        cache.active += active;
        cache.object_bytes = object_bytes;
    }
    caches
}

/// `Name:   1234 kB`.
fn parse_meminfo(text: &str) -> BTreeMap<String, u64> {
    let line = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        let kib = rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?;
        Some((name.to_owned(), kib.saturating_mul(1024)))
    };
    text.lines().filter_map(line).collect()
}

/// The cache that kmalloc takes blocks of these bytes from, as long as nothing tells otherwise; `None` for blocks that are
/// whole pages. `account` and `reclaimable`: the flags __GFP_ACCOUNT and __GFP_RECLAIMABLE were given.
pub fn kmalloc_cache(object_bytes: u64, account: bool, reclaimable: bool) -> Option<String> {
    if object_bytes == 0 || object_bytes > 8192 {
        return None;
    }
    let kind = match (reclaimable, account) {
        (true, _) => "rcl-",
        (false, true) => "cg-",
        (false, false) => "",
    };
    Some(match object_bytes {
        n if n >= 1024 && n % 1024 == 0 => format!("kmalloc-{kind}{}k", n / 1024),
        n => format!("kmalloc-{kind}{n}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The cross-check stands on these numbers.
    #[test]
    fn slabinfo_and_meminfo_are_read() {
        let text = "slabinfo - version: 2.1\n# name            <active_objs> <num_objs> <objsize> <objperslab>\n\
                    kmalloc-rnd-01-64    100    128     64   64    1 : tunables    0    0    0 : slabdata\n\
                    kmalloc-rnd-02-64     10     64     64   64    1 : tunables    0    0    0 : slabdata\n\
                    dentry             5000   5040    192   21    1 : tunables    0    0    0 : slabdata\nbroken line\n";
        let caches = parse_slabinfo(text);
        assert_eq!(caches["kmalloc-64"], Cache { active: 110, object_bytes: 64 });
        assert_eq!(caches["dentry"], Cache { active: 5000, object_bytes: 192 });
        assert_eq!(caches.len(), 2);
        assert_eq!(parse_meminfo("Slab:   12 kB\nHugePages_Total:  0\n")["Slab"], 12 << 10);
    }

    /// A tracepoint tells the size of the object and not the name of its cache.
    #[test]
    fn kmalloc_caches_are_named_by_size_and_flags() {
        assert_eq!(kmalloc_cache(96, false, false).as_deref(), Some("kmalloc-96"));
        assert_eq!(kmalloc_cache(2048, true, false).as_deref(), Some("kmalloc-cg-2k"));
        assert_eq!(kmalloc_cache(64, true, true).as_deref(), Some("kmalloc-rcl-64"));
        assert_eq!(kmalloc_cache(16384, false, false), None);
    }
}
