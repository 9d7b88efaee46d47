//! What the kernel says a process has used, read from outside: CPU time, waiting time, memory.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// CPU time that a process has used so far, in seconds: user and system, all its threads, those that have ended included.
///
/// This is the process CPU clock of the kernel, which counts nanoseconds; `/proc/PID/stat` counts clock ticks.
///
/// # Errors
/// There is no such process, or its clock may not be read.
pub fn cpu_s(pid: u32) -> Result<f64> {
    let mut clock: libc::clockid_t = 0;
    // SAFETY: `clock` is valid for the kernel to write; the pid is a plain number.
    let result = unsafe { libc::clock_getcpuclockid(libc::pid_t::try_from(pid)?, &raw mut clock) };
    if result != 0 {
        return Err(std::io::Error::from_raw_os_error(result))
            .with_context(|| format!("failed to find the CPU clock of process {pid}"));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec for the kernel to write.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(std::io::Error::last_os_error())
            .with_context(|| format!("failed to read the CPU clock of process {pid}"));
    }
    Ok(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

/// Time that the threads of a process have been ready to run while a CPU was not given to them, in seconds.
///
/// It says how much others disturbed a measurement. Zero where the kernel does not count it; threads that have ended
/// are not in it.
pub fn waited_s(pid: u32) -> f64 {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0.0 };
    threads
        .flatten()
        .filter_map(|thread| waited_ns(&fs::read_to_string(thread.path().join("schedstat")).ok()?))
        .sum::<u64>() as f64
        / 1e9
}

/// The second number of `/proc/PID/schedstat`: CPU time, waiting time, slices.
fn waited_ns(text: &str) -> Option<u64> {
    text.split_whitespace().nth(1)?.parse().ok()
}

/// Resident memory of a process in bytes; `None` when it has ended.
pub fn rss_bytes(pid: u32) -> Option<u64> {
    status_bytes(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?, "VmRSS:")
}

/// The most that [`rss_bytes`] has been.
pub fn peak_rss_bytes(pid: u32) -> Option<u64> {
    status_bytes(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?, "VmHWM:")
}

fn status_bytes(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// Kernel memory of the BPF maps that a process holds, in bytes: what `bpftool map show` calls `memlock`.
///
/// `None` when the process has ended or may not be looked into.
pub fn bpf_map_bytes(pid: u32) -> Option<u64> {
    let mut maps = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).ok()?.flatten() {
        // A descriptor that was closed in the meantime is no map any more.
        if let Some((id, bytes)) = read_map(&entry.path()) {
            // Several descriptors may stand for one map.
            maps.insert(id, bytes);
        }
    }
    Some(maps.values().sum())
}

fn read_map(fdinfo: &Path) -> Option<(u32, u64)> {
    parse_map(&fs::read_to_string(fdinfo).ok()?)
}

/// Id and memory of the map that a `fdinfo` file describes; `None` when it is not that of a map.
fn parse_map(fdinfo: &str) -> Option<(u32, u64)> {
    let field = |name: &str| fdinfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Some((field("map_id")?.trim().parse().ok()?, field("memlock")?.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Everything about cost is a difference of two readings of this clock.
    #[test]
    fn cpu_clock_counts_work_and_not_sleep() {
        let pid = std::process::id();
        let start = cpu_s(pid).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(300));
        let slept = cpu_s(pid).unwrap();
        let mut n = 1_u64;
        while cpu_s(pid).unwrap() < slept + 0.05 {
            n = std::hint::black_box(n.wrapping_mul(3));
        }
        assert!(slept - start < 0.25, "{} s of CPU time in a sleep", slept - start);
    }

    // A process that is gone must be an error, never zero cost.
    #[test]
    fn no_process_has_no_clock() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert!(cpu_s(child.id()).is_err());
    }

    // Programs are descriptors with memory too, and are not maps.
    #[test]
    fn only_maps_are_counted_as_maps() {
        let map =
            "pos:\t0\nflags:\t02000002\nmap_type:\t1\nmax_entries:\t10\nmemlock:\t4096\nmap_id:\t17\nfrozen:\t0\n";
        assert_eq!(parse_map(map), Some((17, 4096)));
        assert_eq!(parse_map("prog_type:\t2\nmemlock:\t8192\nprog_id:\t3\n"), None);
        assert_eq!(parse_map("pos:\t0\nflags:\t0\n"), None);
    }

    // The kernel says kB and means KiB.
    #[test]
    fn memory_is_read_in_bytes() {
        assert_eq!(status_bytes("VmHWM:\t  300 kB\nVmRSS:\t    256 kB\n", "VmRSS:"), Some(256 * 1024));
        assert_eq!(status_bytes("Name:\tx\n", "VmRSS:"), None);
        assert_eq!(waited_ns("100 2894666 1\n"), Some(2_894_666));
    }
}
