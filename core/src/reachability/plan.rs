//! Whether a process can be scanned, what that would take, and why not: for `memleak doctor`, and for errors.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::mark::{Learned, Scan};
use super::memory::{Memory, Pagemap, ProcessMemory, Range, Ranges};
use super::scanner::{self, Options};
use super::{Block, Index, runtime, stop};
use crate::error::{Error, ErrorKind, Result};
use crate::maps::Maps;
use crate::process::ProcDir;

/// Memory that is read to see how fast that is, bytes.
const SAMPLE: u64 = 32 << 20;
/// Bytes read at once.
const CHUNK: u64 = 256 << 10;
/// Longest time for it.
const PATIENCE: Duration = Duration::from_millis(500);
/// Distance of the blocks that the sample is looked up in, bytes: about as in a full heap of small blocks.
const BLOCK_EVERY: u64 = 128;
/// `CAP_SYS_PTRACE` in a mask of capabilities (include/uapi/linux/capability.h).
const CAP_SYS_PTRACE: u64 = 1 << 19;

/// What a series of scans of a process takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Memory that is read in each scan.
    pub bytes: u64,
    /// Scans of a series, at least.
    pub scans: u32,
    /// How fast a sample of it was read and looked up, bytes per second of CPU time.
    pub bytes_per_s: f64,
    /// CPU time of the series, seconds.
    pub cpu_s: f64,
    /// How long the series takes at the share of a core that is allowed, seconds.
    pub about_s: f64,
    /// Writable memory of devices, which is not read.
    pub device_bytes: u64,
    /// Why the process could not be stopped for a moment, if that were asked for.
    pub no_stop: Option<String>,
}

/// Plans a series of scans; reads a little of the process's memory, and does nothing else to it.
///
/// # Errors
/// Why it cannot be scanned.
pub fn plan(dir: &ProcDir, options: &Options) -> Result<Plan> {
    let pid = dir.pid();
    if let Some(runtime) = runtime::moving_collector(dir) {
        return Err(runtime::refused(pid, runtime));
    }
    let maps = Maps::read(dir)?;
    let ranges = Ranges::of(&maps);
    let present = ranges.present(&mut Pagemap::open(pid));
    let bytes = present.iter().map(|r| r.end - r.start).sum();
    if bytes > options.max_bytes {
        return Err(scanner::too_large(pid, bytes, options.max_bytes));
    }
    let bytes_per_s = speed(dir, &present)?;
    Ok(Plan {
        device_bytes: ranges.device_bytes,
        no_stop: stop::tracer_of(pid).map(|tracer| format!("process {tracer} is debugging it")),
        ..Plan::of(bytes, bytes_per_s, options)
    })
}

impl Plan {
    /// For so much memory, read at such a speed.
    pub fn of(bytes: u64, bytes_per_s: f64, options: &Options) -> Plan {
        let scans = options.limits.scans;
        let all = f64::from(scans) * bytes as f64;
        // Of a process without memory there is no speed either.
        let cpu_s = if bytes == 0 { 0.0 } else { all / bytes_per_s };
        let about_s = (cpu_s / options.core_share).max(all / options.bandwidth);
        Plan { bytes, scans, bytes_per_s, cpu_s, about_s, device_bytes: 0, no_stop: None }
    }
}

/// Reads and looks up a sample, spread over all of the memory.
fn speed(dir: &ProcDir, present: &[Range]) -> Result<f64> {
    let total: u64 = present.iter().map(|r| r.end - r.start).sum();
    let chunks =
        present.iter().flat_map(|r| (r.start..r.end).step_by(CHUNK as usize).map(|at| (at, (r.end - at).min(CHUNK))));
    let chosen = (total / SAMPLE).max(1) as usize;
    let chunks: Vec<(u64, u64)> = chunks.step_by(chosen).collect();
    let places = chunks.iter().flat_map(|&(at, length)| (at..at + length).step_by(BLOCK_EVERY as usize));
    let blocks = places.map(|address| Block { address, size: BLOCK_EVERY / 2, ..Block::default() });
    let index = Index::new(blocks.collect());
    let learned = Learned::default();
    let mut scan = Scan::new(&index, &learned);
    let mut memory = ProcessMemory::new(dir.pid());
    let mut buffer = vec![0; CHUNK as usize];
    let began = Instant::now();
    let cpu = scanner::thread_cpu();
    let mut read = 0;
    for (at, length) in chunks {
        let got = memory.read(at, &mut buffer[..length as usize]);
        scan.visit(at, &buffer[..got]);
        read += got;
        if began.elapsed() > PATIENCE {
            break;
        }
    }
    let cpu_s = (scanner::thread_cpu() - cpu).as_secs_f64();
    if read == 0 && total > 0 {
        return Err(unreadable(dir));
    }
    Ok(read as f64 / cpu_s.max(1e-9))
}

/// Why nothing of a process's memory could be read.
pub(super) fn unreadable(dir: &ProcDir) -> Error {
    why_unreadable(dir, Path::new("/proc/sys/kernel/yama/ptrace_scope"))
}

fn why_unreadable(dir: &ProcDir, scope: &Path) -> Error {
    let pid = dir.pid();
    if dir.stat().map_or(true, |s| !s.is_running()) {
        return Error::new(ErrorKind::Target, format!("failed to scan process {pid}: it has ended"));
    }
    let why = denied(&Facts {
        has_capability: own_capabilities() & CAP_SYS_PTRACE != 0,
        scope: std::fs::read_to_string(scope).ok().and_then(|s| s.trim().parse().ok()),
        same_user: std::fs::metadata(format!("/proc/{pid}/task"))
            // SAFETY: takes nothing, returns a number.
            .is_ok_and(|m| m.uid() == unsafe { libc::geteuid() }),
        same_user_namespace: namespace(&format!("/proc/{pid}/ns/user")) == namespace("/proc/self/ns/user"),
    });
    Error::new(ErrorKind::Permission, format!("failed to scan process {pid}: its memory cannot be read: {why}"))
}

/// What decides whether memory may be read.
struct Facts {
    has_capability: bool,
    scope: Option<u32>,
    /// The process's files in /proc belong to us: they belong to root when it is not dumpable.
    same_user: bool,
    same_user_namespace: bool,
}

fn denied(facts: &Facts) -> &'static str {
    match facts {
        Facts { scope: Some(3..), .. } => {
            "kernel.yama.ptrace_scope is 3, which forbids it to everybody until the next boot; 2 would do"
        }
        Facts { has_capability: false, same_user_namespace: false, .. } => {
            "it is in another user namespace (a container); run memleak as root of the host, with CAP_SYS_PTRACE"
        }
        Facts { has_capability: false, same_user: false, .. } => {
            "it belongs to another user, or has made itself unreadable (PR_SET_DUMPABLE); this needs CAP_SYS_PTRACE"
        }
        Facts { has_capability: false, scope: Some(1 | 2), .. } => {
            "kernel.yama.ptrace_scope does not allow it; this needs CAP_SYS_PTRACE (sysctl kernel.yama.ptrace_scope=0 would \
             do without)"
        }
        Facts { has_capability: false, .. } => "this needs CAP_SYS_PTRACE",
        _ => {
            "memleak has CAP_SYS_PTRACE, so a security module (SELinux, AppArmor, a container's profile) or another user \
             namespace forbids it"
        }
    }
}

fn namespace(path: &str) -> Option<std::path::PathBuf> {
    std::fs::read_link(path).ok()
}

/// The effective capabilities of this thread.
fn own_capabilities() -> u64 {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    mask.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    // A plan says what a scan then reads, within what a running process changes meanwhile.
    #[test]
    fn a_plan_is_made_of_a_live_process() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let dir = ProcDir::open(child.id()).unwrap();
        let is_asleep = || {
            let call = std::fs::read_to_string(format!("/proc/{}/syscall", child.id())).unwrap_or_default();
            call.starts_with(&format!("{} ", libc::SYS_clock_nanosleep))
        };
        while !is_asleep() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let plan = plan(&dir, &Options::default()).unwrap();
        assert!(plan.bytes > 4096 && plan.bytes < 64 << 20, "{plan:?}");
        assert!(plan.bytes_per_s > 1e6 && plan.cpu_s > 0.0 && plan.about_s > plan.cpu_s, "{plan:?}");
        assert_eq!((plan.scans, &plan.no_stop), (3, &None));
        let small = Options { max_bytes: 4096, ..Options::default() };
        assert!(super::plan(&dir, &small).unwrap_err().to_string().contains("reachability.max_memory"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(super::plan(&dir, &Options::default()).is_err());
    }

    // The largest process that is scanned by default: hours are told beforehand, not found out.
    #[test]
    fn large_processes_are_planned_by_what_limits_them() {
        const GIB: f64 = (1_u64 << 30) as f64;
        let plan = |core_share, bandwidth| {
            Plan::of(64 << 30, 1.5 * GIB, &Options { core_share, bandwidth, ..Options::default() })
        };
        let by_core = plan(0.5, 4.0 * GIB);
        assert_eq!((by_core.scans, by_core.bytes, by_core.cpu_s, by_core.about_s), (3, 64 << 30, 128.0, 256.0));
        let by_bandwidth = plan(1.0, 0.25 * GIB);
        assert_eq!((by_bandwidth.cpu_s, by_bandwidth.about_s), (128.0, 768.0));
        assert_eq!(Plan::of(0, 0.0, &Options::default()).about_s, 0.0);
    }

    // The same of a live process, on a system where nobody may debug anything.
    #[test]
    fn yama_is_named() {
        let dir = ProcDir::open(std::process::id()).unwrap();
        let scope = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(scope.path(), "3\n").unwrap();
        let error = why_unreadable(&dir, scope.path());
        assert_eq!(error.kind(), ErrorKind::Permission);
        assert!(error.to_string().contains("kernel.yama.ptrace_scope is 3"), "{error}");
        std::fs::write(scope.path(), "no number").unwrap();
        assert!(!why_unreadable(&dir, scope.path()).to_string().contains("is 3"));
    }

    // Each obstacle has another remedy.
    #[test]
    fn every_obstacle_is_named() {
        let facts = |has_capability, scope, same_user, same_user_namespace| {
            denied(&Facts { has_capability, scope, same_user, same_user_namespace })
        };
        assert!(facts(true, Some(3), true, true).contains("ptrace_scope is 3"));
        assert!(facts(false, Some(0), false, false).contains("user namespace"));
        assert!(facts(false, Some(1), false, true).contains("another user"));
        assert!(facts(false, Some(1), true, true).contains("ptrace_scope does not allow"));
        assert!(facts(false, None, true, true).contains("CAP_SYS_PTRACE"));
        assert!(facts(true, Some(1), true, true).contains("security module"));
    }
}
