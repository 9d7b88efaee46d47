//! One snapshot as rules see it: sites, processes and the statistics computed for them so far.
//!
//! A view is made once per snapshot and shared by all rules, so that a statistic that several rules ask for is
//! computed once. Most sites are never looked at closely: a view holds what decides about that ([`Glance`]) side by side,
//! and everything else stays in the history until a rule asks for it. Lua holds only places in the history's table, and
//! these end with the snapshot: a rule that keeps a site gets an error the next time it looks at it, never another
//! site's numbers.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;

use super::needs::Needs;
use crate::history::{History, Sample, Series, SiteHistory, Sites};
use crate::snapshot::{Mode, ProcessSample, Site, SiteKey};
use crate::stats;

/// Most points of a process's own series; the older half is thinned when it is full.
const MAX_PROCESS_POINTS: usize = 256;

/// A statistic over part of a series, as the key under which it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stat {
    Slope,
    CountSlope,
    RisingFraction,
    Rises,
    TrendConfidence,
    LevelOff,
    LargestDrop,
    Noise,
    Max,
    Min,
}

/// Samples `start..end` of a series.
pub(super) type Range = (u32, u32);

/// Statistics of one series that were asked for; a handful, so a scan beats a hash map.
type Known = RefCell<Vec<(Stat, Range, f64)>>;

/// A series with the statistics that were asked for.
#[derive(Clone, Copy)]
pub(super) struct SeriesView<'a> {
    /// Samples, oldest first.
    pub(super) samples: &'a [Sample],
    known: &'a Known,
}

impl<'a> SeriesView<'a> {
    /// The samples of a range.
    pub(super) fn range(&self, (start, end): Range) -> &'a [Sample] {
        self.samples.get(start as usize..end as usize).unwrap_or_default()
    }

    /// A statistic over a range, computed at most once per snapshot.
    pub(super) fn stat(&self, stat: Stat, range: Range) -> f64 {
        let known = self.known.borrow().iter().find(|(s, r, _)| (*s, *r) == (stat, range)).map(|&(_, _, v)| v);
        known.unwrap_or_else(|| {
            let value = self.compute(stat, range);
            self.known.borrow_mut().push((stat, range, value));
            value
        })
    }

    fn compute(&self, stat: Stat, range: Range) -> f64 {
        let samples = self.range(range);
        let values = || samples.iter().map(bytes);
        let mut kept = [(0.0, 0.0); stats::MAX_POINTS];
        let points = |kept| stats::subsample(samples.len(), |i| (samples[i].time_s, bytes(&samples[i])), kept);
        match stat {
            Stat::Slope => stats::theil_sen_slope(points(&mut kept)),
            Stat::CountSlope => {
                let count = |i: usize| (samples[i].time_s, samples[i].totals.outstanding_count() as f64);
                stats::theil_sen_slope(stats::subsample(samples.len(), count, &mut kept))
            }
            Stat::RisingFraction => stats::rising_fraction(values()),
            Stat::Rises => stats::rises(values()) as f64,
            Stat::TrendConfidence => {
                let mut kept = [0.0; stats::MAX_POINTS];
                stats::trend_confidence(stats::subsample(samples.len(), |i| bytes(&samples[i]), &mut kept))
            }
            Stat::LevelOff => stats::level_off(points(&mut kept)),
            Stat::Noise => stats::noise(points(&mut kept), self.stat(Stat::Slope, range)),
            Stat::LargestDrop => stats::largest_drop(values()),
            Stat::Max => values().reduce(f64::max).unwrap_or(0.0),
            Stat::Min => values().reduce(f64::min).unwrap_or(0.0),
        }
    }
}

fn bytes(sample: &Sample) -> f64 {
    sample.totals.outstanding_bytes() as f64
}

/// What decides whether a rule looks at a site, for every site of a process that runs.
pub(super) struct Glance {
    pub(super) place: u32,
    pub(super) key: SiteKey,
    pub(super) outstanding_bytes: u64,
    pub(super) has_blocks: bool,
    pub(super) rise: u64,
    pub(super) scanned: bool,
    pub(super) kernel: bool,
    pub(super) windows: bool,
}

/// One site in the current snapshot.
#[derive(Clone, Copy)]
pub(super) struct SiteView<'a> {
    pub(super) history: &'a SiteHistory,
    pub(super) series: SeriesView<'a>,
    key: SiteKey,
    view: &'a View,
}

impl<'a> SiteView<'a> {
    /// The site itself.
    pub(super) fn site(&self) -> &'a Arc<Site> {
        self.history.site()
    }

    /// Its process; `None` when the history does not know it.
    pub(super) fn process(&self) -> Option<&'a ProcessView> {
        self.view.process(self.key.instance)
    }
}

/// What became of a site's blocks of whole cohorts that are at least `min_age_s` and at most `max_age_s` old.
pub(super) fn survival(history: &SiteHistory, now_s: f64, min_age_s: f64, max_age_s: f64) -> Survival {
    let mut sum = Survival::default();
    for cohort in &history.latest.cohorts {
        if now_s - cohort.end_s < min_age_s || now_s - cohort.start_s > max_age_s || cohort.born_count == 0 {
            continue;
        }
        sum.born_count += cohort.born_count;
        sum.outstanding_count += cohort.outstanding_count;
        sum.outstanding_bytes += cohort.outstanding_bytes;
        sum.cohorts += 1;
        sum.cohorts_with_survivors += u64::from(cohort.outstanding_count > 0);
    }
    sum
}

/// Blocks of several cohorts together; all zero when no cohort is old enough.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Survival {
    pub(super) born_count: u64,
    pub(super) outstanding_count: u64,
    pub(super) outstanding_bytes: u64,
    /// Cohorts with births.
    pub(super) cohorts: u64,
    /// Those of which a block is still outstanding.
    pub(super) cohorts_with_survivors: u64,
}

impl Survival {
    /// Share of the blocks that are still outstanding; 0 when none was born.
    pub(super) fn share(&self) -> f64 {
        if self.born_count == 0 { 0.0 } else { self.outstanding_count as f64 / self.born_count as f64 }
    }
}

/// One process in the current snapshot.
pub(super) struct ProcessView {
    pub(super) sample: ProcessSample,
    track: Track,
}

impl ProcessView {
    /// Frees per second of blocks that are older than the attach, over the last `seconds`.
    pub(super) fn unmatched_rate(&self, seconds: f64) -> f64 {
        stats::rate(tail(&self.track.unmatched, seconds))
    }

    /// Theil-Sen slope of the resident set over the last `seconds`, bytes per second; `None` when it is not known.
    pub(super) fn rss_slope(&self, seconds: f64) -> Option<f64> {
        slope(tail(&self.track.rss, seconds))
    }

    /// The same of the anonymous part of it, which is what leaks grow.
    pub(super) fn rss_anon_slope(&self, seconds: f64) -> Option<f64> {
        slope(tail(&self.track.anon, seconds))
    }
}

fn slope(points: &[(f64, f64)]) -> Option<f64> {
    (points.len() >= 2).then(|| stats::theil_sen_slope(points))
}

/// The points of the last `seconds` before the newest.
fn tail(points: &[(f64, f64)], seconds: f64) -> &[(f64, f64)] {
    let Some(newest) = points.last() else { return points };
    let start = points.partition_point(|p| p.0 < newest.0 - seconds - TIME_SLACK_S);
    &points[start..]
}

/// Snapshots are not exactly one interval apart; a window takes the sample that lies this much before its start too.
pub(super) const TIME_SLACK_S: f64 = 0.1;

/// What the history does not keep of a process over time.
#[derive(Clone, Default)]
struct Track {
    unmatched: Vec<(f64, f64)>,
    rss: Vec<(f64, f64)>,
    anon: Vec<(f64, f64)>,
}

/// Appends a point and keeps the number of points bounded.
fn push_bounded(points: &mut Vec<(f64, f64)>, point: (f64, f64)) {
    if points.len() >= MAX_PROCESS_POINTS {
        let mut index = 0;
        points.retain(|_| {
            let keep = index >= MAX_PROCESS_POINTS / 2 || index % 2 == 0;
            index += 1;
            keep
        });
    }
    points.push(point);
}

/// The processes of a run over time.
#[derive(Default)]
pub(super) struct Processes {
    tracks: HashMap<u32, Track>,
    recorded_s: Option<f64>,
}

impl Processes {
    /// Takes the newest snapshot in; a second call for the same snapshot changes nothing.
    fn record(&mut self, history: &History) {
        if self.recorded_s.is_some_and(|t| t >= history.time_s()) {
            return;
        }
        self.recorded_s = Some(history.time_s());
        self.tracks.retain(|instance, _| history.process(*instance).is_some_and(|p| p.alive));
        for process in history.processes().filter(|p| p.alive) {
            let track = self.tracks.entry(process.process.instance).or_default();
            push_bounded(&mut track.unmatched, (history.time_s(), process.unmatched_frees as f64));
            if let Some(rss) = process.rss_bytes {
                push_bounded(&mut track.rss, (history.time_s(), rss as f64));
            }
            if let Some(anon) = process.rss_anon_bytes {
                push_bounded(&mut track.anon, (history.time_s(), anon as f64));
            }
        }
    }
}

/// Everything that rules may look at in one snapshot.
pub(super) struct View {
    pub(super) time_s: f64,
    pub(super) snapshots: u64,
    /// Sites of processes that run, in no order.
    pub(super) glances: Vec<Glance>,
    sites: Arc<Sites>,
    /// By place.
    known: Vec<OnceCell<Box<Known>>>,
    by_size: OnceCell<Vec<u32>>,
    totals: Series,
    known_totals: Known,
    /// By instance.
    pub(super) processes: Vec<ProcessView>,
}

impl View {
    fn new(history: &History, tracks: &Processes) -> View {
        let process = |sample: &ProcessSample| {
            let track = tracks.tracks.get(&sample.process.instance).cloned().unwrap_or_default();
            ProcessView { sample: sample.clone(), track }
        };
        let mut processes: Vec<_> = history.processes().filter(|p| p.alive).map(process).collect();
        processes.sort_unstable_by_key(|p| p.sample.process.instance);
        let sites = history.shared_sites();
        let mut view = View {
            time_s: history.time_s(),
            snapshots: history.snapshots(),
            glances: Vec::with_capacity(sites.places()),
            known: vec![OnceCell::new(); sites.places()],
            by_size: OnceCell::new(),
            totals: history.totals().clone(),
            known_totals: Known::default(),
            sites: Arc::clone(&sites),
            processes,
        };
        for (place, key, h) in sites.iter().filter(|(_, _, h)| h.ended_s.is_none()) {
            let glance = Glance {
                place,
                key,
                outstanding_bytes: h.latest.totals.outstanding_bytes(),
                has_blocks: h.latest.totals.outstanding_count() > 0,
                rise: h.series.rise(),
                scanned: h.latest.reachability.is_some(),
                kernel: h.latest.kernel.is_some(),
                windows: view.process(key.instance).is_some_and(|p| p.sample.mode == Mode::Estimated),
            };
            view.glances.push(glance);
        }
        view
    }

    /// One site by its place.
    pub(super) fn site(&self, place: u32) -> Option<SiteView<'_>> {
        let (key, history) = self.sites.at(place)?;
        let known = self.known.get(place as usize)?.get_or_init(Box::default);
        let series = SeriesView { samples: history.series.samples(), known };
        Some(SiteView { history, series, key, view: self })
    }

    /// A process that runs.
    pub(super) fn process(&self, instance: u32) -> Option<&ProcessView> {
        let found = self.processes.binary_search_by_key(&instance, |p| p.sample.process.instance);
        found.ok().map(|at| &self.processes[at])
    }

    /// Totals over all sites.
    pub(super) fn totals(&self) -> SeriesView<'_> {
        SeriesView { samples: self.totals.samples(), known: &self.known_totals }
    }

    /// Places of all sites, those with the largest outstanding bytes first.
    pub(super) fn by_size(&self) -> &[u32] {
        self.by_size.get_or_init(|| places(self.glances.iter().collect()))
    }

    /// Places of the sites that have what a rule needs, those with the largest outstanding bytes first.
    pub(super) fn sites_with(&self, needs: &Needs) -> Vec<u32> {
        let history = |g: &Glance| self.sites.at(g.place).map(|(_, h)| h);
        let met = |g: &&Glance| needs.met(g, || history(g), self.time_s);
        places(self.glances.iter().filter(met).collect())
    }
}

/// In an order that does not change from run to run, as that of the history's sites may.
fn places(mut glances: Vec<&Glance>) -> Vec<u32> {
    glances.sort_unstable_by_key(|g| (std::cmp::Reverse(g.outstanding_bytes), g.key));
    glances.into_iter().map(|g| g.place).collect()
}

/// Holds the current snapshot's view while rules run; shared by all Lua states.
#[derive(Default)]
pub(super) struct Context {
    view: RefCell<Option<View>>,
    epoch: Cell<u64>,
    processes: RefCell<Processes>,
    ending: Option<Ending>,
}

/// How the processes of a look at their ends came to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// By themselves: exit handlers had their chance.
    Exit,
    /// By a signal.
    Signal,
    /// They have not: the run ends before them.
    Running,
}

impl Ending {
    /// Its name in rules: `site.process.ended`.
    pub fn as_str(self) -> &'static str {
        match self {
            Ending::Exit => "exit",
            Ending::Signal => "signal",
            Ending::Running => "running",
        }
    }
}

impl Context {
    /// A context for a look at ends of processes.
    pub(super) fn of_ending(ending: Ending) -> Context {
        Context { ending: Some(ending), ..Context::default() }
    }

    /// How the processes came to their end; `None` at an ordinary snapshot.
    pub(super) fn ending(&self) -> Option<Ending> {
        self.ending
    }

    /// Makes the history's newest state the current view until the guard is dropped.
    pub(super) fn enter(&self, history: &History) -> Entered<'_> {
        let mut processes = self.processes.borrow_mut();
        processes.record(history);
        self.epoch.set(self.epoch.get() + 1);
        self.view.replace(Some(View::new(history, &processes)));
        Entered { context: self }
    }

    /// Number of the current view: handles of another view are stale.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch.get()
    }

    /// Whether it cannot be known what became of a site's blocks.
    pub(super) fn is_unverifiable(&self, place: u32) -> bool {
        let look = |view: &View| Some(view.site(place)?.history.latest.kernel.as_ref()?.unverifiable.is_some());
        self.with(self.epoch(), look).flatten().unwrap_or(false)
    }

    /// A site of the current view.
    pub(super) fn site(&self, place: u32) -> Option<Arc<Site>> {
        self.with(self.epoch(), |view| view.site(place).map(|s| Arc::clone(s.site()))).flatten()
    }

    /// Looks at the view of `epoch`; `None` when that snapshot is over.
    pub(super) fn with<R>(&self, epoch: u64, look: impl FnOnce(&View) -> R) -> Option<R> {
        if epoch != self.epoch.get() {
            return None;
        }
        self.view.borrow().as_ref().map(look)
    }
}

/// Ends the current view when dropped, so that the history owns its sites alone again.
pub(super) struct Entered<'a> {
    context: &'a Context,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.context.view.replace(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A window of 20 s over samples about 1 s apart must hold 21 of them although clocks jitter.
    #[test]
    fn a_window_tolerates_jitter() {
        let points: Vec<_> = (0..60).map(|i| (f64::from(i) + if i % 2 == 0 { 0.004 } else { -0.004 }, 0.0)).collect();
        assert_eq!(tail(&points, 20.0).len(), 21);
    }

    /// The series of a process stays bounded and keeps its first point.
    #[test]
    fn process_points_are_bounded() {
        let mut points = Vec::new();
        for i in 0..10_000 {
            push_bounded(&mut points, (f64::from(i), 0.0));
        }
        assert!(points.len() <= MAX_PROCESS_POINTS);
        assert_eq!((points[0].0, points[points.len() - 1].0), (0.0, 9_999.0));
    }
}
