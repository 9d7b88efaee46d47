//! What the collector itself costs.

/// CPU time and memory of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct OwnCost {
    /// CPU time so far, user and system, all threads, in seconds; `None` when the kernel does not say.
    pub cpu_s: Option<f64>,
    /// Resident memory in bytes; `None` when /proc cannot be read. BPF maps are not part of it.
    pub rss_bytes: Option<u64>,
}

/// Reads it.
pub fn own_cost() -> OwnCost {
    let usage = crate::process::ProcessStat::read(std::process::id()).ok();
    OwnCost { cpu_s: own_cpu_s(), rss_bytes: usage.map(|u| u.rss_bytes) }
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
