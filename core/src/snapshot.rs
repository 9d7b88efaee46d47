//! What is outstanding at one instant.
//!
//! A [`Snapshot`] is made once per interval by the collector and never changes afterwards. It knows
//! allocation sites by [`SiteKey`] (what the kernel side counts by) and carries plain totals; names, trends
//! and verdicts are made from it by later stages. Nothing here talks to the kernel.

use std::sync::{Arc, OnceLock};

use serde::Serialize;

use crate::coverage::Coverage;
use crate::governor::StopReason;
use crate::kernel::{KernelSample, KernelSummary};
use crate::labels::Labels;
use crate::output::report::heading;
use crate::reachability::roots::Root;
use crate::reachability::{SiteVerdict, Verdict};
use crate::symbolize::Frame;

/// What the kernel side counts by: one process instance, one probe set, one call stack.
///
/// Unique within one run of the collector. [`Site::id`] is the identity that survives restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SiteKey {
    /// Number of the watched process instance; 0 is the kernel. A pid that is reused gets a new instance.
    pub instance: u32,
    /// Number of the probe set within this run.
    pub probe_set: u32,
    /// Hash of the call stack's return addresses and the allocator function.
    pub stack: u64,
}

/// One watched process, from its start (or exec) to its exit (or next exec).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Process {
    /// Number of this instance within the run; starts at 1.
    pub instance: u32,
    /// Process id as the collector sees it.
    pub pid: u32,
    /// Start time in clock ticks after boot (`/proc/PID/stat` field 22): with `pid` it names the process.
    pub start_ticks: u64,
    /// Short name (`/proc/PID/comm`). Hostile text.
    pub comm: String,
    /// Path of the executable as the process sees it. Hostile text.
    pub exe: String,
    /// Command line, arguments joined by spaces. Hostile text.
    pub cmdline: String,
    /// Container, pod and systemd unit that it was in when it was found.
    pub labels: Labels,
}

/// An allocation site: process instance + probe set + call stack. Shared by all snapshots of a run.
#[derive(Debug)]
pub struct Site {
    /// Key within this run.
    pub key: SiteKey,
    /// Stable identity: hash of executable, probe set, allocator function and normalised frames (build id or
    /// path, and file offset), so that it is the same after a restart with other addresses.
    pub id: u64,
    /// The process it belongs to.
    pub process: Arc<Process>,
    /// Name of the probe set, for example `glibc`.
    pub probe_set: Arc<str>,
    /// The allocator function that was called, for example `calloc`.
    pub function: Arc<str>,
    /// Return addresses, innermost (the allocator's caller) first.
    pub addresses: Vec<u64>,
    /// Why the stack ends early; `None` when nothing says that it does.
    pub truncated: Option<Arc<str>>,
    /// The thread that allocated there first; other threads may have done so since. `None` when it is not known.
    pub first_thread: Option<FirstThread>,
    /// Symbolized frames, innermost first; filled on first use, see [`crate::symbolize`].
    pub frames: OnceLock<Vec<Frame>>,
}

impl Site {
    /// Symbolized frames; empty until the symbolizer has filled them.
    pub fn frames(&self) -> &[Frame] {
        self.frames.get().map_or(&[], Vec::as_slice)
    }
}

/// The thread that was the first to allocate at a site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FirstThread {
    /// Its id as the collector sees it; 0 when it cannot be seen from the collector's pid namespace.
    pub tid: u32,
    /// Its name at that time. Hostile text.
    pub name: String,
}

/// Running totals of one site since the collector attached. All counters only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Bytes allocated.
    pub allocated_bytes: u64,
    /// Blocks allocated.
    pub allocated_count: u64,
    /// Bytes freed, implicit frees included.
    pub freed_bytes: u64,
    /// Blocks freed, implicit frees included.
    pub freed_count: u64,
}

impl Totals {
    /// Bytes allocated and not freed yet.
    pub fn outstanding_bytes(&self) -> u64 {
        self.allocated_bytes.saturating_sub(self.freed_bytes)
    }

    /// Blocks allocated and not freed yet.
    pub fn outstanding_count(&self) -> u64 {
        self.allocated_count.saturating_sub(self.freed_count)
    }

    /// Adds another site's totals.
    pub fn add(&mut self, other: &Totals) {
        self.allocated_bytes = self.allocated_bytes.saturating_add(other.allocated_bytes);
        self.allocated_count = self.allocated_count.saturating_add(other.allocated_count);
        self.freed_bytes = self.freed_bytes.saturating_add(other.freed_bytes);
        self.freed_count = self.freed_count.saturating_add(other.freed_count);
    }
}

/// Standard errors of what is outstanding; zero where nothing is estimated from a sample.
///
/// Those of several sites add up by their squares: what a thread samples at one site does not depend on the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StandardErrors {
    /// Of the outstanding bytes.
    #[serde(rename = "outstanding_bytes_stderr")]
    pub bytes: f64,
    /// Of the number of outstanding blocks.
    #[serde(rename = "outstanding_count_stderr")]
    pub count: f64,
}

impl StandardErrors {
    /// Adds another site's.
    pub fn add(&mut self, other: &StandardErrors) {
        self.bytes = self.bytes.hypot(other.bytes);
        self.count = self.count.hypot(other.count);
    }
}

/// Blocks of one site that were born in the same period, and what is left of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cohort {
    /// Start of the period, seconds since the collector started.
    pub start_s: f64,
    /// End of the period, seconds since the collector started; the current cohort ends at the snapshot's time.
    pub end_s: f64,
    /// Bytes allocated in the period.
    pub born_bytes: u64,
    /// Blocks allocated in the period.
    pub born_count: u64,
    /// Bytes of them still outstanding.
    pub outstanding_bytes: u64,
    /// Blocks of them still outstanding.
    pub outstanding_count: u64,
}

/// Number of lifetime classes: class 0 is below 1 us, class n is from 2^(n-1) to 2^n us; the last is open-ended.
pub const LIFETIME_CLASSES: usize = 32;

/// One site in one snapshot.
#[derive(Clone, Debug)]
pub struct SiteSample {
    /// The site.
    pub site: Arc<Site>,
    /// Totals at the snapshot's time.
    pub totals: Totals,
    /// How far the outstanding bytes and blocks may be off, with sampling.
    pub stderr: StandardErrors,
    /// Time of the newest allocation, seconds since the collector started.
    pub last_allocation_s: f64,
    /// Cohorts by birth, oldest first; adjacent periods, the last one ends now.
    pub cohorts: Vec<Cohort>,
    /// How long freed blocks lived: number of frees per class, see [`LIFETIME_CLASSES`].
    pub lifetimes: [u64; LIFETIME_CLASSES],
    /// Whether the process can still reach its blocks; `None` before the process has been scanned.
    pub reachability: Option<Arc<SiteReach>>,
    /// What is known of a site of the kernel beside its totals; `None` for those of processes.
    pub kernel: Option<Arc<KernelSample>>,
}

impl SiteSample {
    /// The same as `*self = from.clone()`, in the memory that is there already.
    pub(crate) fn assign(&mut self, from: &SiteSample) {
        let SiteSample { site, totals, stderr, last_allocation_s, cohorts, lifetimes, reachability, kernel } = from;
        if !Arc::ptr_eq(&self.site, site) {
            self.site = Arc::clone(site);
        }
        (self.totals, self.stderr, self.last_allocation_s) = (*totals, *stderr, *last_allocation_s);
        self.cohorts.clone_from(cohorts);
        self.lifetimes = *lifetimes;
        self.reachability.clone_from(reachability);
        self.kernel.clone_from(kernel);
    }
}

/// What the last series of scans says of a site.
#[derive(Clone, Debug, Default)]
pub struct SiteReach {
    /// In one word.
    pub verdict: Verdict,
    /// In numbers.
    pub counts: SiteVerdict,
    /// When the series ended, seconds since the collector started.
    pub time_s: f64,
    /// How an example of the reachable blocks is reached; `None` when none is.
    pub way: Option<ReachWay>,
}

/// The way from a root to a block, outermost first; the block itself is left out.
#[derive(Clone, Debug)]
pub struct ReachWay {
    /// Where it begins.
    pub root: Root,
    /// What lies between.
    pub steps: Vec<ReachStep>,
}

/// One step of a [`ReachWay`].
#[derive(Clone, Debug)]
pub enum ReachStep {
    /// So many blocks of a site, each referring to the next.
    Blocks(Arc<Site>, usize),
    /// So many blocks that are not shown.
    Skipped(usize),
}

impl SiteReach {
    /// The verdict with its evidence, in one sentence.
    pub fn describe(&self) -> String {
        let c = &self.counts;
        let mut text = match self.verdict {
            Verdict::Definite => "definitely lost".to_owned(),
            Verdict::Possible => "possibly lost".to_owned(),
            Verdict::Reachable => "still reachable".to_owned(),
            Verdict::Unknown => "not known whether reachable".to_owned(),
        };
        if let Some((fraction, low, high)) = c.lost_fraction() {
            text.push_str(&format!(
                ": {} of {} judged blocks are lost ({:.0} %, 95 % interval {:.0} to {:.0} %)",
                c.lost_blocks(),
                c.lost_blocks() + c.reachable.blocks,
                100.0 * fraction,
                100.0 * low,
                100.0 * high
            ));
        }
        let others = [
            (c.indirectly_lost.blocks, "of them only with other lost blocks"),
            (c.possible.blocks, "referenced in unusual ways, or perhaps freed unseen"),
            (c.disguised.blocks, "referenced by tagged or coded pointers only"),
            (c.young.blocks, "too young to be judged"),
            (c.gone.blocks, "free or reused, by the allocator's own books"),
            (c.refuted, "were freed after they had been called lost"),
        ];
        for (count, what) in others.iter().filter(|(count, _)| *count > 0) {
            text.push_str(&format!(", {count} {what}"));
        }
        if c.lost_blocks() > 0 && c.in_requests > 0 {
            text.push_str(&format!(", up to {} may be held by the kernel in requests under way", c.in_requests));
        }
        if c.lost_blocks() > 0 && c.device_bytes > 0 {
            text.push_str(", the process has memory that is not read (of a device, or that cannot be read)");
        }
        let scans = if c.scans == 1 { "scan" } else { "scans" };
        text.push_str(&format!("; {} {scans}{}", c.scans, if c.still { ", the process standing still" } else { "" }));
        text
    }
}

impl ReachWay {
    /// As text, with functions for sites: `global table (server) > dict_expand x3 > this`.
    pub fn describe(&self) -> String {
        let mut text = self.root.to_string();
        for step in &self.steps {
            match step {
                ReachStep::Blocks(site, count) => {
                    let frames = site.frames();
                    let head = heading(frames).and_then(|at| frames.get(at)?.function.as_deref());
                    text.push_str(" > ");
                    text.push_str(head.unwrap_or(&site.function));
                    if *count > 1 {
                        text.push_str(&format!(" x{count}"));
                    }
                }
                ReachStep::Skipped(count) => text.push_str(&format!(" > ({count} more)")),
            }
        }
        text
    }
}

/// What was lost or could not be known. Every field is a count of events; all zero means exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Losses {
    /// Allocations not recorded because the table of outstanding allocations was full.
    pub outstanding_full: u64,
    /// Allocations not recorded because the table of sites was full.
    pub sites_full: u64,
    /// Sites without a stored stack because the table of stacks was full.
    pub stacks_full: u64,
    /// Stacks of which not even one frame could be read.
    pub stacks_failed: u64,
    /// Calls not followed because the table of threads was full.
    pub threads_full: u64,
    /// Calls that were entered and never seen to return (`longjmp`, a killed thread, an exception).
    pub missed_returns: u64,
    /// Blocks whose free was not seen: their address was handed out again.
    pub implicit_frees: u64,
    /// Calls that unmapped or resized part of a recorded range in a way that cannot be followed.
    pub partial_ranges: u64,
    /// Returned pointers that could not be read from the process's memory.
    pub pointers_unreadable: u64,
    /// Events for user space that did not fit its ring buffer.
    pub events_dropped: u64,
    /// Calls of the kernel that it kept from our programs, because the same program was running on that CPU.
    pub missed_events: u64,
    /// Call stacks whose Python functions, or those functions whose names, were not kept: a table was full, or the process
    /// has too many threads.
    pub python_lost: u64,
}

impl Losses {
    /// Name and count of every kind, in the order of the fields.
    pub fn entries(&self) -> [(&'static str, u64); 12] {
        [
            ("outstanding_full", self.outstanding_full),
            ("sites_full", self.sites_full),
            ("stacks_full", self.stacks_full),
            ("stacks_failed", self.stacks_failed),
            ("threads_full", self.threads_full),
            ("missed_returns", self.missed_returns),
            ("implicit_frees", self.implicit_frees),
            ("partial_ranges", self.partial_ranges),
            ("pointers_unreadable", self.pointers_unreadable),
            ("events_dropped", self.events_dropped),
            ("missed_events", self.missed_events),
            ("python_lost", self.python_lost),
        ]
    }

    /// Sum over all kinds.
    pub fn total(&self) -> u64 {
        self.entries().iter().map(|(_, n)| n).sum()
    }

    /// Adds another process's losses.
    pub fn add(&mut self, other: &Losses) {
        self.outstanding_full += other.outstanding_full;
        self.sites_full += other.sites_full;
        self.stacks_full += other.stacks_full;
        self.stacks_failed += other.stacks_failed;
        self.threads_full += other.threads_full;
        self.missed_returns += other.missed_returns;
        self.implicit_frees += other.implicit_frees;
        self.partial_ranges += other.partial_ranges;
        self.pointers_unreadable += other.pointers_unreadable;
        self.events_dropped += other.events_dropped;
        self.missed_events += other.missed_events;
        self.python_lost += other.python_lost;
    }
}

/// How far the call stacks of recorded allocations reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StackCounts {
    /// Recorded allocations.
    pub taken: u64,
    /// Those of them whose stack reaches the outermost frame, where the program or the thread starts.
    pub complete: u64,
    /// False: stacks are walked by frame pointers, and nothing says whether they are complete.
    pub by_tables: bool,
}

impl StackCounts {
    /// Share of complete stacks, 0 to 1; `None` when that is not known, or no stack was taken.
    pub fn complete_share(&self) -> Option<f64> {
        (self.by_tables && self.taken > 0).then(|| self.complete as f64 / self.taken as f64)
    }

    /// Adds another process's.
    pub fn add(&mut self, other: &StackCounts) {
        self.taken += other.taken;
        self.complete += other.complete;
        self.by_tables |= other.by_tables;
    }
}

/// How the numbers of a process were obtained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Every call is traced.
    #[default]
    Exact,
    /// Every call is seen, a sample of the allocations is recorded; numbers are estimates with a standard error.
    Sampled,
    /// Numbers come from windows; frees between them are not seen.
    Estimated,
}

/// What is known of a process whose allocations are sampled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sampling {
    /// Mean bytes between two samples.
    pub mean_bytes: u64,
    /// Bytes allocated while probes were attached, recorded or not: counted, not estimated.
    pub allocated_bytes: u64,
    /// Blocks allocated while probes were attached, recorded or not: counted, not estimated.
    pub allocated_count: u64,
}

/// What a snapshot says of one process as a whole.
#[derive(Clone, Debug, Default)]
pub struct ProcessSample {
    /// The process.
    pub process: Arc<Process>,
    /// False once it has exited or called exec; its last sites stay in the snapshot that says so.
    pub alive: bool,
    /// How its numbers were obtained.
    pub mode: Mode,
    /// With `collector.sample_bytes`.
    pub sampling: Option<Sampling>,
    /// Traced calls (entries and returns) since attach.
    pub hits: u64,
    /// Frees of blocks that are not in the table: allocated before the attach, or lost. 0 with sampling, where most blocks
    /// are not in the table.
    pub unmatched_frees: u64,
    /// What was lost.
    pub losses: Losses,
    /// How far its call stacks reach.
    pub stacks: StackCounts,
    /// Resident set size in bytes (`/proc/PID/statm`); `None` when it cannot be read.
    pub rss_bytes: Option<u64>,
    /// The part of it that is no file's (`RssAnon`), which is what leaks grow; `None` when it cannot be read.
    pub rss_anon_bytes: Option<u64>,
    /// How much of its growth the sites explain; `None` when that cannot be read.
    pub coverage: Option<Coverage>,
    /// CPU time used by the process so far, seconds; `None` when it cannot be read.
    pub cpu_s: Option<f64>,
    /// Estimated CPU time that tracing has cost the process so far, seconds (hits x calibrated cost per hit).
    pub overhead_s: f64,
    /// CPU seconds per second that tracing may cost the process now; `None` without a budget.
    pub budget: Option<f64>,
    /// Windows opened so far; 0 while everything has always been traced.
    pub windows: u64,
    /// How many of them do not count, because the process did not run or made too many calls.
    pub windows_discarded: u64,
    /// Time for which windows were open, seconds.
    pub open_s: f64,
    /// Longest window that it may get, seconds; `None` without a budget.
    pub window_s: Option<f64>,
    /// Hard stops so far: tracing took too much, or could not be kept within its bounds.
    pub hard_stops: u64,
    /// Why nothing is attached now; `None` unless a hard stop is being sat out.
    pub stopped: Option<StopReason>,
    /// How what was followed compares with what the kernel says of itself; `None` for processes.
    pub kernel: Option<Arc<KernelSummary>>,
}

/// Everything that is outstanding at one instant.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Number of the snapshot; the first is 1.
    pub number: u64,
    /// Monotonic time in seconds since the collector started.
    pub time_s: f64,
    /// Wall-clock time in seconds since 1970.
    pub wall_s: f64,
    /// Watched processes, by instance.
    pub processes: Vec<ProcessSample>,
    /// Every site that has been seen, largest outstanding bytes first.
    pub sites: Vec<SiteSample>,
    /// CPU time that reading this snapshot has cost the collector, seconds.
    pub collect_cpu_s: f64,
}

impl Snapshot {
    /// Totals over all sites.
    pub fn totals(&self) -> Totals {
        let mut sum = Totals::default();
        for s in &self.sites {
            sum.add(&s.totals);
        }
        sum
    }

    /// Standard errors of the totals.
    pub fn stderr(&self) -> StandardErrors {
        let mut sum = StandardErrors::default();
        for s in &self.sites {
            sum.add(&s.stderr);
        }
        sum
    }

    /// Losses over all processes.
    pub fn losses(&self) -> Losses {
        let mut sum = Losses::default();
        for p in &self.processes {
            sum.add(&p.losses);
        }
        sum
    }
}
