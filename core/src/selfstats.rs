//! What the collector itself costs.

/// CPU time and memory of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct OwnCost {
    /// CPU time so far, user and system, all threads, in seconds; `None` when the kernel does not say.
    pub cpu_s: Option<f64>,
    /// Resident memory in bytes; `None` when /proc cannot be read. BPF maps are not part of it.
    pub rss_bytes: Option<u64>,
    /// Kernel memory of our BPF maps, as the kernel counts it, in bytes; `None` when it does not say.
    pub map_bytes: Option<u64>,
}

/// Reads it.
pub fn own_cost() -> OwnCost {
    let usage = crate::process::ProcessStat::read(std::process::id()).ok();
    OwnCost { cpu_s: own_cpu_s(), rss_bytes: usage.map(|u| u.rss_bytes), map_bytes: map_bytes() }
}

/// The sum over the maps behind our descriptors; a map that is open twice counts once.
fn map_bytes() -> Option<u64> {
    let mut maps = std::collections::HashMap::new();
    for entry in std::fs::read_dir("/proc/self/fdinfo").ok()?.flatten() {
        // A descriptor may have been closed since it was listed.
        let Ok(text) = std::fs::read_to_string(entry.path()) else { continue };
        maps.extend(map_in(&text));
    }
    (!maps.is_empty()).then(|| maps.values().sum())
}

/// Id and bytes of the BPF map that the text of a `/proc/self/fdinfo` file is about; `None` when it is about something
/// else (Source: bpf_map_show_fdinfo in kernel/bpf/syscall.c).
fn map_in(fdinfo: &str) -> Option<(u64, u64)> {
    let field = |name: &str| fdinfo.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    field("map_type:").and(Some((field("map_id:")?, field("memlock:")?)))
}

/// Finer than the clock ticks of /proc.
fn own_cpu_s() -> Option<f64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec for the kernel to write.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    (result == 0).then(|| time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Programs and links have descriptors too, with fields of the same names.
    #[test]
    fn only_maps_count_as_map_memory() {
        let map = "pos:\t0\nflags:\t02000002\nmap_type:\t1\nkey_size:\t16\nmemlock:\t4096\nmap_id:\t7\nfrozen:\t0\n";
        assert_eq!(map_in(map), Some((7, 4096)));
        assert_eq!(map_in("prog_type:\t2\nmemlock:\t4096\nprog_id:\t9\n"), None);
        assert_eq!(map_in("pos:\t0\n"), None);
    }

    /// A collector that cannot see its own cost cannot promise to be cheap.
    #[test]
    fn own_cost_grows_with_work() {
        let before = own_cost();
        let mut n = 1_u64;
        for i in 0..20_000_000_u64 {
            n = std::hint::black_box(n.wrapping_mul(i | 1));
        }
        let after = own_cost();
        assert!(after.cpu_s.unwrap() > before.cpu_s.unwrap(), "{n}");
        assert!(after.rss_bytes.unwrap() > 1 << 20);
    }
}
