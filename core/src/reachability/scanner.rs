//! A series of scans of a live process.
//!
//! Runs in whatever thread calls it and takes its time: everything long is paced, so that it uses no more than a share of a
//! core and of the memory's bandwidth, and it can be told to stop. It writes nothing to the process, and stops it only if
//! that was asked for: once, for a moment, after the other scans; see [`super::stop`].

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::coded::{self, Coded};
use super::mark::{Learned, Marked, Scan};
use super::memory::{Memory, Pagemap, ProcessMemory, Range, Ranges, Within};
use super::roots::{of_kernel, of_register};
use super::verdict::{Limits, Series, SiteVerdict};
use super::{Block, Index, books, kernel, plan, stop};
use crate::error::{Error, ErrorKind, Result};
use crate::maps::Maps;
use crate::process::ProcDir;

/// Bytes read at once: what has just been read should still be in the core's own cache.
const CHUNK: usize = 256 << 10;
/// Pause between two scans, so that pointers on their way from one place to another have arrived.
const BETWEEN: Duration = Duration::from_millis(300);
/// Shortest pause for pacing: shorter ones are saved up.
const SHORTEST_PAUSE: Duration = Duration::from_millis(2);
/// Longest time in a pause without a look whether to go on at all.
const LOOK: Duration = Duration::from_millis(20);
const PAGE: u64 = 4096;
/// CPU time for the search for keys of coded pointers. Sites with most lost bytes come first.
const KEY_SEARCH: Duration = Duration::from_secs(2);

/// How a scan is done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// How many scans, and when a loss is definite.
    pub limits: Limits,
    /// Age from which on a block is judged: what is younger may still be on its way to its owner.
    pub min_age: Duration,
    /// Share of one core that a scan may use, above 0 to 1.
    pub core_share: f64,
    /// Bytes of the process's memory that may be read per second.
    pub bandwidth: f64,
    /// With more outstanding blocks than this only those of suspected sites are judged.
    pub max_blocks: usize,
    /// Most bytes of memory that are read in a scan; a larger process is refused.
    pub max_bytes: u64,
    /// Stop the process at the end, for at most this long: for registers, and memory that stands still.
    pub stop: Option<Duration>,
    /// The process stands still already: one scan is enough, and registers may be looked at.
    pub still: bool,
    /// Frees may have been missed: look into the allocator's books.
    pub unseen_frees: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            limits: Limits::default(),
            min_age: Duration::from_secs(1),
            core_share: 0.5,
            bandwidth: (1_u64 << 30) as f64,
            max_blocks: 16 << 20,
            max_bytes: 64 << 30,
            stop: None,
            still: false,
            unseen_frees: false,
        }
    }
}

/// What became of a stop that was asked for.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Stopped {
    /// The process stood still.
    Done {
        /// For so long, seconds.
        for_s: f64,
        /// Bytes that were copied meanwhile.
        copied_bytes: u64,
        /// Not everything could be copied in that time; the rest was read while the process ran.
        cut_short: bool,
        /// Threads whose registers were read.
        threads: usize,
    },
    /// It was not stopped.
    Refused {
        /// Why.
        reason: String,
    },
}

/// What a series of scans has cost.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Cost {
    /// Scans made.
    pub scans: u32,
    /// Bytes read, over all scans.
    pub read_bytes: u64,
    /// Bytes that had gone meanwhile, or could not be read, over all scans.
    pub unread_bytes: u64,
    /// CPU time used, seconds.
    pub cpu_s: f64,
    /// Of that: for reading memory, looking it up, and the walks.
    pub memory_cpu_s: f64,
    /// From the first scan's begin to the last one's end, seconds.
    pub wall_s: f64,
    /// Pages that were read although they were swapped out.
    pub swapped_pages: u64,
    /// What became of the stop; `None` when none was asked for, or nothing was left to find out.
    pub stop: Option<Stopped>,
    /// Only blocks of suspected sites were judged, because there are so many; the others count as roots.
    pub suspects_only: bool,
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
    /// Blocks that are not what the table says any more, ascending.
    pub gone: Vec<u32>,
    coded: Coded,
    in_requests: u64,
    hidden_bytes: u64,
    /// Nothing could move during the last scan.
    still: bool,
}

impl Scanned {
    /// What is to be said of each site.
    ///
    /// # Errors
    /// It was told to stop.
    pub fn verdicts(&self, tempo: &mut Tempo<'_>) -> Result<HashMap<u32, SiteVerdict>> {
        let mut sites = self.series.verdicts(&self.index, &self.marked, &self.gone);
        let mut lost = self.lost_addresses(&sites);
        lost.sort_by_key(|(site, _)| std::cmp::Reverse(sites[site].lost_bytes()));
        let until = thread_cpu() + KEY_SEARCH;
        for (site, addresses) in lost {
            tempo.go_on()?;
            let give_up = || (tempo.is_over)() || thread_cpu() >= until;
            let Some(verdict) = sites.get_mut(&site) else { continue };
            if self.coded.key(&addresses, &give_up).is_some() {
                for lost in [std::mem::take(&mut verdict.lost), std::mem::take(&mut verdict.indirectly_lost)] {
                    verdict.disguised.blocks += lost.blocks;
                    verdict.disguised.bytes += lost.bytes;
                }
            }
        }
        for verdict in sites.values_mut() {
            verdict.in_requests = self.in_requests;
            verdict.device_bytes = self.hidden_bytes;
            verdict.still = self.still;
        }
        Ok(sites)
    }

    /// Of each site with lost blocks the addresses of some, spread evenly.
    fn lost_addresses(&self, sites: &HashMap<u32, SiteVerdict>) -> Vec<(u32, Vec<u64>)> {
        let mut chosen: HashMap<u32, (u64, Vec<u64>)> = HashMap::new();
        for (number, block) in (0_u32..).zip(self.index.blocks()) {
            if self.series.is_lost(number, block, &self.marked, &self.gone) {
                let (seen, addresses) = chosen.entry(block.site).or_default();
                let of = sites.get(&block.site).map_or(0, SiteVerdict::lost_blocks);
                if seen.is_multiple_of(of.div_ceil(coded::TRIED as u64).max(1)) {
                    addresses.push(block.address);
                }
                *seen += 1;
            }
        }
        chosen.into_iter().map(|(site, (_, addresses))| (site, addresses)).collect()
    }
}

/// One series under way.
struct Work<'a> {
    dir: &'a ProcDir,
    options: &'a Options,
    tempo: Tempo<'a>,
    cost: Cost,
    coded: Coded,
    in_requests: u64,
    /// Memory that may hold pointers and was not read in the last scan: of devices, and what cannot be read.
    hidden_bytes: u64,
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
    mut blocks: impl FnMut(&mut Tempo<'_>) -> Result<Vec<Block>>,
    is_over: &dyn Fn() -> bool,
) -> Result<Scanned> {
    let mut series = Series::new().with_unseen_frees(options.unseen_frees);
    let tempo = Tempo::new(options, is_over);
    let mut work =
        Work { dir, options, tempo, cost: Cost::default(), coded: Coded::default(), in_requests: 0, hidden_bytes: 0 };
    let (began, cpu) = (Instant::now(), thread_cpu());
    // The only one of a process that stands still.
    let mut still = options.still;
    loop {
        let judged_until = clock(libc::CLOCK_MONOTONIC).saturating_sub(options.min_age);
        let mut limits = options.limits;
        if options.still {
            (limits.scans, limits.most_scans) = (1, 1);
        }
        let index = Index::new(blocks(&mut work.tempo)?);
        work.tempo.go_on()?;
        let maps = Maps::read(dir)?;
        // The last of several is the one with a stop.
        let stop = options.stop.filter(|_| series.scans() > 0 && !series.wants_more(&limits));
        let stop = stop.or(options.still.then_some(STILL_CAP));
        let (marked, stood_still) = work.scan_once(&maps, &index, learned, &limits, stop)?;
        still |= stood_still;
        learned.clone_from(&marked.learned);
        series.push(&index, &marked, judged_until.as_nanos() as u64);
        // A stop is the last that is done; it is done if there is something that it may find.
        let more = stop.is_none() && (series.wants_more(&limits) || (options.stop.is_some() && series.unreached() > 0));
        if !more {
            let gone = work.gone(&index, &marked, &series);
            work.tempo.go_on()?;
            work.cost.wall_s = began.elapsed().as_secs_f64();
            work.cost.cpu_s = (thread_cpu() - cpu).as_secs_f64();
            let Work { cost, mut coded, in_requests, hidden_bytes, .. } = work;
            coded.close();
            let scanned = Scanned { index, marked, series, maps, cost, gone, coded, in_requests, hidden_bytes, still };
            return Ok(scanned);
        }
        drop((index, marked));
        work.tempo.rest(BETWEEN)?;
    }
}

/// How long the registers of a process that stands still may take: nobody waits for it.
const STILL_CAP: Duration = Duration::from_secs(1);

impl Work<'_> {
    /// One scan; the flag is true when nothing could move during it.
    fn scan_once(
        &mut self,
        maps: &Maps,
        index: &Index,
        learned: &Learned,
        limits: &Limits,
        stop: Option<Duration>,
    ) -> Result<(Marked, bool)> {
        let pid = self.dir.pid();
        let mut pagemap = Pagemap::open(pid);
        let ranges = Ranges::of(maps);
        let present = ranges.present(&mut pagemap);
        let total = present.iter().map(|r| r.end - r.start).sum();
        if total > self.options.max_bytes {
            return Err(too_large(pid, total, self.options.max_bytes));
        }
        let held = kernel::held(self.dir, maps, self.tempo.is_over);
        (self.in_requests, self.hidden_bytes) = (held.in_requests, ranges.device_bytes);
        let mut coded = std::mem::take(&mut self.coded);
        let mut scan = Scan::new(index, learned);
        // The first scan says what may be coded, and the last one where it is. Those that are neither need not look.
        if self.cost.scans == 0 || self.cost.scans + 1 >= limits.scans {
            coded.begin(self.options.still);
            scan = scan.with_coded(&mut coded);
        }
        if self.options.unseen_frees {
            scan = scan.with_free_lists();
        }
        let taken = stop.and_then(|cap| {
            let most = if self.options.still { 0 } else { stop::MAX_COPY };
            match stop::take(pid, &present, most, cap) {
                Ok(taken) => Some(taken),
                // That registers of a process that stands still cannot be read is no news.
                Err(_) if self.options.still => None,
                Err(e) => {
                    self.cost.stop = Some(Stopped::Refused { reason: format!("{e:#}") });
                    None
                }
            }
        });
        let stood_still = taken.as_ref().is_some_and(|t| !t.cut_short);
        let present = match &taken {
            Some(taken) => without_dead_stack(present, maps, taken, pid),
            None => present,
        };
        let cpu = thread_cpu();
        // What has a name comes first, so that the way to a block begins there if it can.
        let (mut memory, registers): (Box<dyn Memory>, _) = match taken {
            None => (Box::new(ProcessMemory::new(pid)), Vec::new()),
            Some(taken) => {
                if !self.options.still {
                    self.cost.stop = Some(Stopped::Done {
                        for_s: taken.stopped.as_secs_f64(),
                        copied_bytes: taken.memory.bytes_copied(),
                        cut_short: taken.cut_short,
                        threads: taken.registers.len(),
                    });
                }
                (Box::new(taken.memory), taken.registers)
            }
        };
        self.read(&mut scan, &present, memory.as_mut(), &mut pagemap)?;
        held.words.iter().enumerate().for_each(|(n, word)| scan.visit_register(of_kernel(n), *word));
        for (tid, values) in &registers {
            values.iter().for_each(|value| scan.visit_register(of_register(*tid), *value));
        }
        let tempo = &mut self.tempo;
        let marked = scan.finish(&mut Within::new(memory, present), &mut || tempo.go_on())?;
        self.coded = coded;
        self.cost.swapped_pages += pagemap.swapped;
        self.cost.scans += 1;
        self.cost.memory_cpu_s += (thread_cpu() - cpu).as_secs_f64();
        Ok((marked, stood_still))
    }

    /// Shows a scan everything.
    fn read(
        &mut self,
        scan: &mut Scan<'_>,
        present: &[Range],
        memory: &mut dyn Memory,
        pagemap: &mut Pagemap,
    ) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        let (mut read, mut unread) = (0, 0);
        for &Range { start, end } in present {
            let mut at = start;
            while at < end {
                self.tempo.go_on()?;
                let want = ((end - at) as usize).min(CHUNK);
                let got = memory.read(at, &mut buffer[..want]);
                scan.visit(at, &buffer[..got]);
                read += got as u64;
                self.tempo.count(got);
                // A page that has gone meanwhile, or cannot be read, is passed over.
                let next = if got > 0 { at + got as u64 } else { ((at / PAGE + 1) * PAGE).min(end) };
                if got == 0 {
                    unread += next - at;
                    let mut is_there = false;
                    pagemap.present(Range { start: at, end: next }, &mut |_| is_there = true);
                    // It may have come back just now. If not, it may hold anything.
                    if is_there && memory.read(at, &mut buffer[..(next - at) as usize]) == 0 {
                        self.hidden_bytes = self.hidden_bytes.saturating_add(next - at);
                    }
                }
                at = next;
            }
        }
        self.cost.read_bytes += read;
        self.cost.unread_bytes += unread;
        if read == 0 && unread > 0 { Err(plan::unreadable(self.dir)) } else { Ok(()) }
    }

    /// Of the lost blocks those that are free or another's by now, ascending.
    fn gone(&self, index: &Index, marked: &Marked, series: &Series) -> Vec<u32> {
        if !self.options.unseen_frees {
            return Vec::new();
        }
        let mut memory = ProcessMemory::new(self.dir.pid());
        let lost = (0_u32..).zip(index.blocks()).filter(|(n, b)| series.is_lost(*n, b, marked, &[]));
        books::gone(lost, &marked.linked, &mut memory, self.tempo.is_over)
    }
}

/// What is left over from calls that have returned holds on to nothing.
fn without_dead_stack(present: Vec<Range>, maps: &Maps, taken: &stop::Taken, pid: u32) -> Vec<Range> {
    let Some(stack) = maps.iter().find(|m| m.name().as_deref() == Some("[stack]")) else { return present };
    let dead = taken.dead_stack(pid, Range { start: stack.start, end: stack.end });
    let alive = |range: Range| {
        let below = Range { start: range.start, end: range.end.min(dead.start) };
        let above = Range { start: range.start.max(dead.end), end: range.end };
        let apart = dead.start == dead.end || range.end <= dead.start || range.start >= dead.end;
        let parts = if apart { vec![range] } else { vec![below, above] };
        parts.into_iter().filter(|r| r.start < r.end)
    };
    present.into_iter().flat_map(alive).collect()
}

pub(super) fn too_large(pid: u32, total: u64, most: u64) -> Error {
    Error::config(format!(
        "failed to scan process {pid}: it has {} of writable memory, the limit is {} (reachability.max_memory)",
        crate::units::format_bytes(total),
        crate::units::format_bytes(most)
    ))
}

fn stop_if(is_over: &dyn Fn() -> bool) -> Result<()> {
    if is_over() { Err(Error::new(ErrorKind::Target, "the scan was stopped")) } else { Ok(()) }
}

/// Keeps long work within a share of a core and of the memory's bandwidth, and ends it when it is told to.
pub struct Tempo<'a> {
    share: f64,
    bandwidth: f64,
    /// When the work went on last, on the clock, and in CPU time of this thread.
    since: (Instant, Duration),
    /// Bytes read since then.
    read: usize,
    is_over: &'a dyn Fn() -> bool,
}

impl<'a> Tempo<'a> {
    /// Work that begins now.
    pub fn new(options: &Options, is_over: &'a dyn Fn() -> bool) -> Self {
        Tempo {
            share: options.core_share,
            bandwidth: options.bandwidth,
            since: (Instant::now(), thread_cpu()),
            read: 0,
            is_over,
        }
    }

    /// So many bytes have been read.
    fn count(&mut self, bytes: usize) {
        self.read += bytes;
    }

    /// To be called between pieces of the work: rests if it has to.
    ///
    /// # Errors
    /// The work is to be given up.
    pub fn go_on(&mut self) -> Result<()> {
        stop_if(self.is_over)?;
        let used = thread_cpu().saturating_sub(self.since.1);
        let due = (used.as_secs_f64() / self.share).max(self.read as f64 / self.bandwidth);
        let pause = Duration::try_from_secs_f64(due).unwrap_or(Duration::MAX).saturating_sub(self.since.0.elapsed());
        if pause >= SHORTEST_PAUSE { self.rest(pause) } else { Ok(()) }
    }

    /// Does nothing for a while.
    fn rest(&mut self, pause: Duration) -> Result<()> {
        let began = Instant::now();
        while let Some(left) = pause.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) {
            std::thread::sleep(left.min(LOOK));
            stop_if(self.is_over)?;
        }
        (self.since, self.read) = ((Instant::now(), thread_cpu()), 0);
        Ok(())
    }
}

/// CPU time that this thread has used.
pub(super) fn thread_cpu() -> Duration {
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
