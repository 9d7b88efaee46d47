//! A series of scans of a live process.
//!
//! Runs in whatever thread calls it and takes its time: the reading is paced, so that it uses no more than a share of a
//! core, and it can be told to stop. It never stops the process and writes nothing to it.

use std::time::{Duration, Instant};

use super::mark::{Learned, Marked, Scan};
use super::memory::{Memory, Pagemap, ProcessMemory, Range, ranges};
use super::verdict::{Limits, Series};
use super::{Block, Index};
use crate::error::{Error, ErrorKind, Result};
use crate::maps::Maps;
use crate::process::ProcDir;

/// Bytes read at once.
const CHUNK: usize = 1 << 20;
/// Pause between two scans, so that pointers on their way from one place to another have arrived.
const BETWEEN: Duration = Duration::from_millis(300);
/// Shortest pause for pacing: shorter ones are saved up.
const SHORTEST_PAUSE: Duration = Duration::from_millis(2);

/// How a scan is done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// How many scans, and when a loss is definite.
    pub limits: Limits,
    /// Age from which on a block is judged: what is younger may still be on its way to its owner.
    pub min_age: Duration,
    /// Share of one core that reading may use, above 0 to 1.
    pub core_share: f64,
    /// Most bytes of memory that are read in a scan; a larger process is refused.
    pub max_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options { limits: Limits::default(), min_age: Duration::from_secs(1), core_share: 0.5, max_bytes: 64 << 30 }
    }
}

/// What a series of scans has cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Cost {
    /// Scans made.
    pub scans: u32,
    /// Bytes read, over all scans.
    pub read_bytes: u64,
    /// CPU time used, seconds.
    pub cpu_s: f64,
    /// From the first scan's begin to the last one's end, seconds.
    pub wall_s: f64,
    /// Pages that were read although they were swapped out.
    pub swapped_pages: u64,
}

/// A finished series.
#[derive(Debug)]
pub struct Scanned {
    /// Blocks of the last scan.
    pub index: Index,
    /// Their reachability in it.
    pub marked: Marked,
    /// What all scans together say.
    pub series: Series,
    /// The process's mappings at the last scan.
    pub maps: Maps,
    /// What it took.
    pub cost: Cost,
}

/// Scans a process until the series is long enough.
///
/// `blocks` is called before each scan for the blocks that are outstanding then. `learned` is what earlier series have
/// learned about its sites, and is added to. `is_over` is asked often; when it says so the series is given up.
///
/// # Errors
/// Kind [`ErrorKind::Target`] when the process has ended, [`ErrorKind::Permission`] when its memory may not be read,
/// [`ErrorKind::Config`] when it is larger than `options.max_bytes`, and those of `blocks`.
pub fn scan(
    dir: &ProcDir,
    options: &Options,
    learned: &mut Learned,
    mut blocks: impl FnMut() -> Result<Vec<Block>>,
    is_over: &dyn Fn() -> bool,
) -> Result<Scanned> {
    let mut series = Series::new();
    let mut cost = Cost::default();
    let began = Instant::now();
    loop {
        let cpu = thread_cpu();
        let judged_until = clock(libc::CLOCK_MONOTONIC).saturating_sub(options.min_age);
        let index = Index::new(blocks()?);
        let maps = Maps::read(dir)?;
        let marked = scan_once(dir, &maps, &index, learned, options, &mut cost, is_over)?;
        learned.clone_from(&marked.learned);
        series.push(&index, &marked, judged_until.as_nanos() as u64);
        cost.scans += 1;
        cost.cpu_s += (thread_cpu() - cpu).as_secs_f64();
        if !series.wants_more(&options.limits) {
            cost.wall_s = began.elapsed().as_secs_f64();
            return Ok(Scanned { index, marked, series, maps, cost });
        }
        let next = Instant::now() + BETWEEN;
        while Instant::now() < next {
            stop_if(is_over)?;
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn scan_once(
    dir: &ProcDir,
    maps: &Maps,
    index: &Index,
    learned: &Learned,
    options: &Options,
    cost: &mut Cost,
    is_over: &dyn Fn() -> bool,
) -> Result<Marked> {
    let mut memory = ProcessMemory::new(dir.pid());
    let mut pagemap = Pagemap::open(dir.pid());
    let mut present = Vec::new();
    let mut total = 0;
    let (named, others) = ranges(maps);
    for range in named.into_iter().chain(others) {
        pagemap.present(range, &mut |run| {
            total += run.end - run.start;
            present.push(run);
        });
    }
    if total > options.max_bytes {
        let what = format!(
            "failed to scan process {}: it has {} of writable memory, the limit is {} (reachability.max_memory)",
            dir.pid(),
            crate::units::format_bytes(total),
            crate::units::format_bytes(options.max_bytes)
        );
        return Err(Error::config(what));
    }
    let mut scan = Scan::new(index, learned);
    let mut buffer = vec![0; CHUNK];
    let mut pace = Pace::new(options.core_share);
    let mut read = 0;
    for Range { start, end } in present {
        let mut at = start;
        while at < end {
            stop_if(is_over)?;
            let want = ((end - at) as usize).min(CHUNK);
            let got = memory.read(at, &mut buffer[..want]);
            scan.visit(at, &buffer[..got]);
            read += got as u64;
            // A page that has gone meanwhile, or cannot be read, is passed over.
            at += if got == want { want as u64 } else { (got as u64 / 4096 + 1) * 4096 };
            pace.rest();
        }
    }
    if read == 0 && total > 0 {
        return Err(unreadable(dir));
    }
    cost.read_bytes += read;
    cost.swapped_pages += pagemap.swapped;
    Ok(scan.finish(&mut memory))
}

/// Why nothing could be read.
fn unreadable(dir: &ProcDir) -> Error {
    if dir.stat().map_or(true, |s| !s.is_running()) {
        return Error::new(ErrorKind::Target, format!("failed to scan process {}: it has ended", dir.pid()));
    }
    let text = format!(
        "failed to scan process {}: its memory cannot be read; this needs CAP_SYS_PTRACE, and kernel.yama.ptrace_scope \
         below 3",
        dir.pid()
    );
    Error::new(ErrorKind::Permission, text)
}

fn stop_if(is_over: &dyn Fn() -> bool) -> Result<()> {
    if is_over() { Err(Error::new(ErrorKind::Target, "the scan was stopped")) } else { Ok(()) }
}

/// Rests often enough to stay within a share of a core.
struct Pace {
    share: f64,
    since: Duration,
}

impl Pace {
    fn new(share: f64) -> Self {
        Pace { share, since: thread_cpu() }
    }

    fn rest(&mut self) {
        let used = thread_cpu().saturating_sub(self.since);
        let pause = used.mul_f64(1.0 / self.share - 1.0);
        if pause >= SHORTEST_PAUSE {
            std::thread::sleep(pause);
            self.since = thread_cpu();
        }
    }
}

/// CPU time that this thread has used.
fn thread_cpu() -> Duration {
    clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn clock(id: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable over the call.
    unsafe { libc::clock_gettime(id, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests;
