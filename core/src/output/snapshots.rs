//! A snapshot as one line of JSON, for `--json`. The fields are documented in `docs/json.md`.

use memleak_probes::Prices;
use serde::Serialize;

use crate::coverage::Coverage;
use crate::governor::StopReason;
use crate::history::{History, SiteHistory};
use crate::kernel::{KernelSample, KernelSummary, Origin};
use crate::labels::Labels;
use crate::output::reach::ReachView;
use crate::selfstats::OwnCost;
use crate::snapshot::{
    Cohort, FirstThread, Losses, Mode, ProcessSample, Sampling, SiteSample, Snapshot, StandardErrors, Totals,
};
use crate::symbolize::Frame;

/// The line.
#[derive(Debug, Serialize)]
pub struct SnapshotLine<'a> {
    r#type: &'static str,
    number: u64,
    time: String,
    time_s: f64,
    processes: Vec<ProcessLine<'a>>,
    own: OwnLine,
    calibration: Option<CalibrationLine>,
    totals: TotalsLine,
    /// Number of sites, also of those that are not listed.
    sites_total: usize,
    sites: Vec<SiteLine<'a>>,
    /// How traced allocations compare with the kernel's own statistics; `None` when it is not watched.
    kernel: Option<&'a KernelSummary>,
}

#[derive(Debug, Serialize)]
struct ProcessLine<'a> {
    pid: u32,
    comm: &'a str,
    exe: &'a str,
    labels: &'a Labels,
    alive: bool,
    mode: Mode,
    sampling: Option<Sampling>,
    hits: u64,
    unmatched_frees: u64,
    rss_bytes: Option<u64>,
    rss_anon_bytes: Option<u64>,
    coverage: Option<Coverage>,
    cpu_s: Option<f64>,
    overhead_s: f64,
    budget: Option<f64>,
    windows: u64,
    windows_discarded: u64,
    open_s: f64,
    complete_stacks: Option<f64>,
    hard_stops: u64,
    stopped: Option<StopReason>,
    losses: Losses,
}

/// What the collector costs.
#[derive(Debug, Serialize)]
struct OwnLine {
    cpu_s: Option<f64>,
    rss_bytes: Option<u64>,
    map_bytes: Option<u64>,
    snapshot_cpu_s: f64,
}

/// What hits cost here.
#[derive(Debug, Serialize)]
struct CalibrationLine {
    hit_ns: f64,
    trap_ns: f64,
    cool_ns: f64,
    cold_ns: f64,
    stepped_ns: f64,
}

impl From<Prices> for CalibrationLine {
    fn from(prices: Prices) -> Self {
        let Prices { hit_ns, trap_ns, cool_ns, cold_ns, stepped_ns } = prices;
        CalibrationLine { hit_ns, trap_ns, cool_ns, cold_ns, stepped_ns }
    }
}

#[derive(Debug, Serialize)]
struct TotalsLine {
    #[serde(flatten)]
    totals: Totals,
    outstanding_bytes: u64,
    outstanding_count: u64,
    #[serde(flatten)]
    stderr: StandardErrors,
}

#[derive(Debug, Serialize)]
struct SiteLine<'a> {
    id: String,
    pid: u32,
    probe_set: &'a str,
    function: &'a str,
    #[serde(flatten)]
    totals: TotalsLine,
    oldest_age_s: f64,
    cohorts: &'a [Cohort],
    frames: &'a [Frame],
    truncated: Option<&'a str>,
    first_thread: Option<&'a FirstThread>,
    reachability: Option<ReachView>,
    kernel: Option<KernelLine<'a>>,
}

/// What is known of a site of the kernel.
#[derive(Debug, Serialize)]
pub(crate) struct KernelLine<'a> {
    #[serde(flatten)]
    origin: &'a Origin,
    slack_bytes: u64,
    unseen_frees: u64,
    unverifiable: Option<&'a str>,
    cache_growth_bytes: Option<i64>,
    reclaimable: bool,
}

impl<'a> KernelLine<'a> {
    pub(crate) fn new(sample: &'a KernelSample, totals: &Totals) -> Self {
        KernelLine {
            origin: &sample.origin,
            slack_bytes: sample.slack_bytes(totals.outstanding_count(), totals.outstanding_bytes()),
            unseen_frees: sample.unseen_frees,
            unverifiable: sample.unverifiable.as_deref(),
            cache_growth_bytes: sample.cache_growth_bytes,
            reclaimable: sample.reclaimable,
        }
    }
}

impl TotalsLine {
    fn new(totals: Totals, stderr: StandardErrors) -> Self {
        TotalsLine {
            outstanding_bytes: totals.outstanding_bytes(),
            outstanding_count: totals.outstanding_count(),
            totals,
            stderr,
        }
    }
}

impl<'a> SnapshotLine<'a> {
    /// The line for a snapshot that `history` has taken in, with the first `sites` sites. Frames that have not been
    /// symbolized are empty. What the collector costs and what hits cost is not known of a recording.
    pub fn new(snapshot: &'a Snapshot, history: &History, sites: usize, own: OwnCost, prices: Option<Prices>) -> Self {
        let age =
            |s: &SiteSample| history.site(s.site.key).map_or(0.0, |h: &SiteHistory| h.oldest_age_s(snapshot.time_s));
        SnapshotLine {
            r#type: "snapshot",
            number: snapshot.number,
            time: crate::units::format_time_utc(snapshot.wall_s),
            time_s: snapshot.time_s,
            processes: snapshot.processes.iter().map(process).collect(),
            own: OwnLine {
                cpu_s: own.cpu_s,
                rss_bytes: own.rss_bytes,
                map_bytes: own.map_bytes,
                snapshot_cpu_s: snapshot.collect_cpu_s,
            },
            calibration: prices.map(CalibrationLine::from),
            totals: TotalsLine::new(snapshot.totals(), snapshot.stderr()),
            sites_total: snapshot.sites.len(),
            // Of several instances the newest: the others' books are closed.
            kernel: snapshot.processes.iter().rev().find_map(|p| p.kernel.as_deref()),
            sites: (snapshot.sites.iter().take(sites))
                .map(|s| SiteLine {
                    id: format!("{:016x}", s.site.id),
                    pid: s.site.process.pid,
                    probe_set: &s.site.probe_set,
                    function: &s.site.function,
                    totals: TotalsLine::new(s.totals, s.stderr),
                    oldest_age_s: age(s),
                    cohorts: &s.cohorts,
                    frames: s.site.frames(),
                    truncated: s.site.truncated.as_deref(),
                    first_thread: s.site.first_thread.as_ref(),
                    reachability: s.reachability.as_deref().map(ReachView::from),
                    kernel: s.kernel.as_deref().map(|k| KernelLine::new(k, &s.totals)),
                })
                .collect(),
        }
    }
}

fn process(p: &ProcessSample) -> ProcessLine<'_> {
    ProcessLine {
        pid: p.process.pid,
        comm: &p.process.comm,
        exe: &p.process.exe,
        labels: &p.process.labels,
        alive: p.alive,
        mode: p.mode,
        sampling: p.sampling,
        hits: p.hits,
        unmatched_frees: p.unmatched_frees,
        rss_bytes: p.rss_bytes,
        rss_anon_bytes: p.rss_anon_bytes,
        coverage: p.coverage,
        cpu_s: p.cpu_s,
        overhead_s: p.overhead_s,
        budget: p.budget,
        windows: p.windows,
        windows_discarded: p.windows_discarded,
        open_s: p.open_s,
        complete_stacks: p.stacks.complete_share(),
        hard_stops: p.hard_stops,
        stopped: p.stopped,
        losses: p.losses,
    }
}
