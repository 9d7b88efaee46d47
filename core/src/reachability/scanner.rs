//! A series of scans of a live process.
//!
//! Runs in whatever thread calls it and takes its time: the reading is paced, so that it uses no more than a share of a
//! core, and it can be told to stop. It writes nothing to the process, and stops it only if that was asked for: once, for
//! a moment, after the other scans; see [`super::stop`].

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

/// Bytes read at once.
const CHUNK: usize = 1 << 20;
/// Pause between two scans, so that pointers on their way from one place to another have arrived.
const BETWEEN: Duration = Duration::from_millis(300);
/// Shortest pause for pacing: shorter ones are saved up.
const SHORTEST_PAUSE: Duration = Duration::from_millis(2);
/// CPU time for the search for keys of coded pointers. Sites with most lost bytes come first.
const KEY_SEARCH: Duration = Duration::from_secs(2);

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
    /// Bytes that could not be read, or had gone meanwhile, over all scans.
    pub unread_bytes: u64,
    /// CPU time used, seconds.
    pub cpu_s: f64,
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
    device_bytes: u64,
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
            verdict.device_bytes = self.device_bytes;
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
    is_over: &'a dyn Fn() -> bool,
    cost: Cost,
    coded: Coded,
    in_requests: u64,
    device_bytes: u64,
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
    let mut work =
        Work { dir, options, is_over, cost: Cost::default(), coded: Coded::default(), in_requests: 0, device_bytes: 0 };
    let began = Instant::now();
    // The only one of a process that stands still.
    let mut still = options.still;
    loop {
        let judged_until = clock(libc::CLOCK_MONOTONIC).saturating_sub(options.min_age);
        let mut limits = options.limits;
        if options.still {
            (limits.scans, limits.most_scans) = (1, 1);
        }
        let index = Index::new(blocks()?);
        let maps = Maps::read(dir)?;
        // The last of several is the one with a stop.
        let stop = options.stop.filter(|_| series.scans() > 0 && !series.wants_more(&limits));
        let stop = stop.or(options.still.then_some(STILL_CAP));
        let (marked, stood_still) = work.scan_once(&maps, &index, learned, stop)?;
        still |= stood_still;
        learned.clone_from(&marked.learned);
        series.push(&index, &marked, judged_until.as_nanos() as u64);
        // A stop is the last that is done; it is done if there is something that it may find.
        let more = stop.is_none() && (series.wants_more(&limits) || (options.stop.is_some() && series.unreached() > 0));
        if !more {
            work.cost.wall_s = began.elapsed().as_secs_f64();
            let gone = work.gone(&index, &marked, &series);
            stop_if(is_over)?;
            let Work { cost, mut coded, in_requests, device_bytes, .. } = work;
            coded.close();
            let scanned = Scanned { index, marked, series, maps, cost, gone, coded, in_requests, device_bytes, still };
            return Ok(scanned);
        }
        drop((index, marked));
        let next = Instant::now() + BETWEEN;
        while Instant::now() < next {
            stop_if(is_over)?;
            std::thread::sleep(Duration::from_millis(20));
        }
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
        stop: Option<Duration>,
    ) -> Result<(Marked, bool)> {
        let cpu = thread_cpu();
        let pid = self.dir.pid();
        let mut pagemap = Pagemap::open(pid);
        let ranges = Ranges::of(maps);
        let present = ranges.present(&mut pagemap);
        let total = present.iter().map(|r| r.end - r.start).sum();
        if total > self.options.max_bytes {
            return Err(too_large(pid, total, self.options.max_bytes));
        }
        let held = kernel::held(self.dir, maps, self.is_over);
        (self.in_requests, self.device_bytes) = (held.in_requests, ranges.device_bytes);
        self.coded.begin(self.options.still);
        let mut coded = std::mem::take(&mut self.coded);
        let mut scan = Scan::new(index, learned).with_coded(&mut coded);
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
        let give_back = |scan: &mut Scan<'_>| {
            held.words.iter().enumerate().for_each(|(n, word)| scan.visit_register(of_kernel(n), *word));
        };
        let tempo = || Tempo::new(self.options.core_share, self.is_over);
        // What has a name comes first, so that the way to a block begins there if it can.
        let marked = match taken {
            None => {
                let mut memory = ProcessMemory::new(pid);
                self.read(&mut scan, &present, &mut memory)?;
                give_back(&mut scan);
                scan.finish(&mut Within::new(Paced(memory, tempo()), present))
            }
            Some(mut taken) => {
                if !self.options.still {
                    self.cost.stop = Some(Stopped::Done {
                        for_s: taken.stopped.as_secs_f64(),
                        copied_bytes: taken.memory.bytes_copied(),
                        cut_short: taken.cut_short,
                        threads: taken.registers.len(),
                    });
                }
                self.read(&mut scan, &present, &mut taken.memory)?;
                give_back(&mut scan);
                for (tid, values) in &taken.registers {
                    values.iter().for_each(|value| scan.visit_register(of_register(*tid), *value));
                }
                scan.finish(&mut Within::new(Paced(taken.memory, tempo()), present))
            }
        };
        stop_if(self.is_over)?;
        self.coded = coded;
        self.cost.swapped_pages += pagemap.swapped;
        self.cost.scans += 1;
        self.cost.cpu_s += (thread_cpu() - cpu).as_secs_f64();
        Ok((marked, stood_still))
    }

    /// Shows a scan everything.
    fn read(&mut self, scan: &mut Scan<'_>, present: &[Range], memory: &mut dyn Memory) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        let mut tempo = Tempo::new(self.options.core_share, self.is_over);
        let (mut read, mut unread) = (0, 0);
        for &Range { start, end } in present {
            let mut at = start;
            while at < end {
                tempo.go_on()?;
                let want = ((end - at) as usize).min(CHUNK);
                let got = memory.read(at, &mut buffer[..want]);
                scan.visit(at, &buffer[..got]);
                read += got as u64;
                // A page that has gone meanwhile, or cannot be read, is passed over.
                let next = if got > 0 { at + got as u64 } else { (at / 4096 + 1) * 4096 };
                if got == 0 {
                    unread += next.min(end) - at;
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
        books::gone(lost, &marked.linked, &mut memory, self.is_over)
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

/// Keeps long work within a share of a core, and ends it when it is told to.
pub struct Tempo<'a> {
    share: f64,
    since: Duration,
    is_over: &'a dyn Fn() -> bool,
}

impl<'a> Tempo<'a> {
    /// Work that begins now.
    pub fn new(share: f64, is_over: &'a dyn Fn() -> bool) -> Self {
        Tempo { share, since: thread_cpu(), is_over }
    }

    /// To be called between pieces of the work: rests if it has to.
    ///
    /// # Errors
    /// The work is to be given up.
    pub fn go_on(&mut self) -> Result<()> {
        stop_if(self.is_over)?;
        let used = thread_cpu().saturating_sub(self.since);
        let pause = used.mul_f64(1.0 / self.share - 1.0);
        if pause >= SHORTEST_PAUSE {
            std::thread::sleep(pause);
            self.since = thread_cpu();
        }
        Ok(())
    }
}

/// Memory that is read at a [`Tempo`]: when that says that it is over, nothing is there any more.
struct Paced<'a, M>(M, Tempo<'a>);

impl<M: Memory> Memory for Paced<'_, M> {
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> usize {
        if self.1.go_on().is_ok() { self.0.read(address, buffer) } else { 0 }
    }

    fn behind_gap(&self, address: u64) -> u64 {
        if (self.1.is_over)() { u64::MAX } else { self.0.behind_gap(address) }
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
