//! A bounded series of samples per allocation site.
//!
//! The engine pushes every snapshot in; rules and reports read trends out. Memory is bounded: a site keeps at
//! most `samples` points and all sites together about `points`; when a series is full, every second point of
//! its older half is dropped, so that the whole run stays covered, coarser the older it is.

use std::collections::HashMap;
use std::sync::Arc;

use crate::recording::SnapshotInfo;
use crate::snapshot::{ProcessSample, Site, SiteKey, SiteSample, Snapshot, Totals};

/// Fewest points a series keeps however many sites there are.
const MIN_SAMPLES: usize = 32;
/// Most sites of ended processes that are kept for the report.
const MAX_ENDED_SITES: usize = 2_000;

/// Totals of a site, a process or a run at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// Seconds since the collector started.
    pub time_s: f64,
    /// Totals at that time.
    pub totals: Totals,
}

/// Samples in order of time, thinned when full.
#[derive(Clone, Debug, Default)]
pub struct Series {
    samples: Vec<Sample>,
    /// Of all samples so far, thinned ones included.
    lowest: u64,
    rise: u64,
}

impl Series {
    /// Appends a sample; `cap` (at least 2) bounds the length.
    pub fn push(&mut self, sample: Sample, cap: usize) {
        let bytes = sample.totals.outstanding_bytes();
        self.lowest = if self.samples.is_empty() { bytes } else { self.lowest.min(bytes) };
        self.rise = self.rise.max(bytes - self.lowest);
        if self.samples.len() >= cap.max(2) {
            self.thin();
        }
        if self.samples.len() == self.samples.capacity() {
            // Room for as many as every series may have at once: with many sites, moving them to larger and larger pieces
            // of memory would leave as much again unused. Then by halves, never beyond what it may hold.
            let more = if self.samples.is_empty() { MIN_SAMPLES } else { self.samples.len() / 2 };
            self.samples.reserve_exact(more.min(cap.max(2).saturating_sub(self.samples.len())).max(1));
        }
        self.samples.push(sample);
    }

    /// Samples, oldest first.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// The largest rise of the outstanding bytes from one sample to a later one, those that have been thinned out
    /// included.
    pub fn rise(&self) -> u64 {
        self.rise
    }

    /// Drops every second sample of the older half; the first sample stays.
    fn thin(&mut self) {
        let half = self.samples.len() / 2;
        let mut index = 0;
        self.samples.retain(|_| {
            let keep = index >= half || index % 2 == 0;
            index += 1;
            keep
        });
    }
}

/// What is known of one site over the whole run.
#[derive(Clone, Debug)]
pub struct SiteHistory {
    /// Its samples; the first is from the snapshot that saw the site first.
    pub series: Series,
    /// Its newest state.
    pub latest: SiteSample,
    /// When its process ended, seconds since the collector started; `None` while it runs.
    pub ended_s: Option<f64>,
}

impl SiteHistory {
    /// The site.
    pub fn site(&self) -> &Arc<Site> {
        &self.latest.site
    }

    /// Age of the oldest block that may still be outstanding, in seconds at time `now_s`: the age of the start of
    /// the oldest cohort with a survivor, so an upper bound. 0 when nothing is outstanding.
    pub fn oldest_age_s(&self, now_s: f64) -> f64 {
        self.latest.cohorts.iter().find(|c| c.outstanding_count > 0).map_or(0.0, |c| (now_s - c.start_s).max(0.0))
    }
}

/// Bounds of a [`History`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Most points of one series.
    pub samples: usize,
    /// Most points of all site series together (40 bytes each).
    pub points: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds { samples: 500, points: 300_000 }
    }
}

impl Bounds {
    /// Most samples of a site while there are so many sites.
    pub(crate) fn cap(&self, sites: usize) -> usize {
        (self.points / sites.max(1)).clamp(MIN_SAMPLES, self.samples.max(MIN_SAMPLES))
    }
}

/// The sites of a history, each in a place of its own for as long as it is known.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sites {
    places: Vec<Option<Known>>,
    free: Vec<u32>,
    by_key: HashMap<SiteKey, u32>,
    /// How many belong to processes that have ended.
    ended: usize,
}

/// A site with its key, which would otherwise be two steps away.
#[derive(Clone, Debug)]
struct Known {
    key: SiteKey,
    history: Box<SiteHistory>,
}

impl Sites {
    /// How many places there are, free ones included.
    pub(crate) fn places(&self) -> usize {
        self.places.len()
    }

    /// The site in a place.
    pub(crate) fn at(&self, place: u32) -> Option<(SiteKey, &SiteHistory)> {
        self.places.get(place as usize)?.as_ref().map(|k| (k.key, &*k.history))
    }

    fn get(&self, key: SiteKey) -> Option<&SiteHistory> {
        self.by_key.get(&key).and_then(|place| self.at(*place)).map(|(_, history)| history)
    }

    fn get_mut(&mut self, key: SiteKey) -> Option<&mut SiteHistory> {
        let place = *self.by_key.get(&key)?;
        self.places.get_mut(place as usize)?.as_mut().map(|k| &mut *k.history)
    }

    fn insert(&mut self, history: SiteHistory) {
        let key = history.site().key;
        self.remove(key);
        self.ended += usize::from(history.ended_s.is_some());
        let known = Some(Known { key, history: Box::new(history) });
        match self.free.pop() {
            Some(place) => {
                self.places[place as usize] = known;
                self.by_key.insert(key, place);
            }
            None => {
                self.by_key.insert(key, self.places.len() as u32);
                self.places.push(known);
            }
        }
    }

    fn remove(&mut self, key: SiteKey) {
        let Some(place) = self.by_key.remove(&key) else { return };
        let was = self.places[place as usize].take();
        self.ended -= usize::from(was.is_some_and(|k| k.history.ended_s.is_some()));
        self.free.push(place);
    }

    /// Every site with its place, in the order of the places.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, SiteKey, &SiteHistory)> {
        (0..).zip(&self.places).filter_map(|(place, known)| known.as_ref().map(|k| (place, k.key, &*k.history)))
    }

    /// Marks the sites of a process that has ended.
    fn end(&mut self, instance: u32, time_s: f64) {
        for known in self.places.iter_mut().flatten().filter(|k| k.key.instance == instance) {
            self.ended += usize::from(known.history.ended_s.is_none());
            known.history.ended_s.get_or_insert(time_s);
        }
    }

    /// Keeps only the largest sites of ended processes.
    fn drop_ended(&mut self) {
        if self.ended <= MAX_ENDED_SITES {
            return;
        }
        let mut ended: Vec<_> = (self.iter())
            .filter(|(_, _, h)| h.ended_s.is_some())
            .map(|(_, key, h)| (h.latest.totals.outstanding_bytes(), key))
            .collect();
        ended.sort_unstable_by(|a, b| b.cmp(a));
        for (_, key) in &ended[MAX_ENDED_SITES..] {
            self.remove(*key);
        }
    }
}

/// All series of a run.
#[derive(Clone, Debug, Default)]
pub struct History {
    bounds: Bounds,
    /// Shared, so that rules can hold it while they look at sites; copied only if it is still held at a push.
    sites: Arc<Sites>,
    totals: Series,
    processes: HashMap<u32, ProcessSample>,
    snapshots: u64,
    time_s: f64,
    wall_s: f64,
}

impl History {
    /// An empty history.
    pub fn new(bounds: Bounds) -> Self {
        History { bounds, ..History::default() }
    }

    /// A history whose parts were made elsewhere, as [`History::push`] would have made them.
    pub(crate) fn from_parts(
        bounds: Bounds,
        sites: Vec<SiteHistory>,
        totals: Series,
        processes: Vec<ProcessSample>,
        newest: &SnapshotInfo,
        snapshots: u64,
    ) -> History {
        let mut known = Sites::default();
        sites.into_iter().for_each(|h| known.insert(h));
        known.drop_ended();
        History {
            bounds,
            sites: Arc::new(known),
            totals,
            processes: processes.into_iter().map(|p| (p.process.instance, p)).collect(),
            snapshots,
            time_s: newest.time_s,
            wall_s: newest.wall_s,
        }
    }

    /// Takes a snapshot in. Sites whose process the snapshot says has ended are kept, marked as ended.
    pub fn push(&mut self, snapshot: &Snapshot) {
        let Snapshot { number: _, time_s, wall_s, processes, sites, collect_cpu_s: _ } = snapshot;
        let mut taking = self.take((*time_s, *wall_s), snapshot.totals(), sites.len());
        for sample in sites {
            match taking.known(sample.site.key, sample.totals) {
                Some(latest) => latest.assign(sample),
                None => taking.insert(sample.clone()),
            }
        }
        taking.end(processes.iter().cloned());
    }

    /// Begins to take a snapshot of so many sites in, site by site.
    pub(crate) fn take(&mut self, (time_s, wall_s): (f64, f64), totals: Totals, count: usize) -> Taking<'_> {
        self.snapshots += 1;
        (self.time_s, self.wall_s) = (time_s, wall_s);
        self.totals.push(Sample { time_s, totals }, self.bounds.samples);
        let cap = self.bounds.cap(count);
        Taking { sites: Arc::make_mut(&mut self.sites), processes: &mut self.processes, time_s, cap }
    }

    /// One site.
    pub fn site(&self, key: SiteKey) -> Option<&SiteHistory> {
        self.sites.get(key)
    }

    /// All sites, in no order.
    pub fn sites(&self) -> impl Iterator<Item = &SiteHistory> {
        self.sites.iter().map(|(_, _, history)| history)
    }

    /// Sites of processes that still run, in no order.
    pub fn live_sites(&self) -> impl Iterator<Item = &SiteHistory> {
        self.sites().filter(|h| h.ended_s.is_none())
    }

    /// The sites as they are now, to be looked at until the next push.
    pub(crate) fn shared_sites(&self) -> Arc<Sites> {
        Arc::clone(&self.sites)
    }

    /// Totals over all sites of each snapshot.
    pub fn totals(&self) -> &Series {
        &self.totals
    }

    /// The newest state of every process seen, in no order.
    pub fn processes(&self) -> impl Iterator<Item = &ProcessSample> {
        self.processes.values()
    }

    /// The newest state of one process.
    pub fn process(&self, instance: u32) -> Option<&ProcessSample> {
        self.processes.get(&instance)
    }

    /// Number of snapshots taken in.
    pub fn snapshots(&self) -> u64 {
        self.snapshots
    }

    /// Time of the newest snapshot, seconds since the collector started.
    pub fn time_s(&self) -> f64 {
        self.time_s
    }

    /// Wall-clock time of the newest snapshot, seconds since 1970.
    pub fn wall_s(&self) -> f64 {
        self.wall_s
    }
}

/// A snapshot on its way into a history.
pub(crate) struct Taking<'a> {
    sites: &'a mut Sites,
    processes: &'a mut HashMap<u32, ProcessSample>,
    time_s: f64,
    cap: usize,
}

impl Taking<'_> {
    /// Appends to the series of a known site; its newest state, which the caller brings up to date. `None` when the site
    /// is new.
    pub(crate) fn known(&mut self, key: SiteKey, totals: Totals) -> Option<&mut SiteSample> {
        let known = self.sites.get_mut(key)?;
        known.series.push(Sample { time_s: self.time_s, totals }, self.cap);
        Some(&mut known.latest)
    }

    /// Takes a new site in.
    pub(crate) fn insert(&mut self, latest: SiteSample) {
        let mut series = Series::default();
        series.push(Sample { time_s: self.time_s, totals: latest.totals }, self.cap);
        self.sites.insert(SiteHistory { series, latest, ended_s: None });
    }

    /// Takes the processes in, after the sites.
    pub(crate) fn end(self, processes: impl Iterator<Item = ProcessSample>) {
        for p in processes {
            if !p.alive {
                self.sites.end(p.process.instance, self.time_s);
            }
            self.processes.insert(p.process.instance, p);
        }
        self.sites.drop_ended();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A rise counts from the lowest sample before it, also when that has been thinned out.
    #[test]
    fn the_largest_rise_is_remembered() {
        let mut s = Series::default();
        let push = |s: &mut Series, bytes| {
            let totals = Totals { allocated_bytes: bytes, ..Totals::default() };
            s.push(Sample { time_s: 0.0, totals }, 2);
        };
        let rises: Vec<u64> = [500, 300, 700, 100, 450]
            .into_iter()
            .map(|bytes| {
                push(&mut s, bytes);
                s.rise()
            })
            .collect();
        assert_eq!(rises, [0, 0, 400, 400, 400]);
        push(&mut s, 501);
        assert_eq!(s.rise(), 401);
    }

    /// Thinning must keep the first and the newest samples in order, or trends over the whole run are lost.
    #[test]
    fn a_full_series_keeps_both_ends_in_order() {
        let mut s = Series::default();
        for i in 0..1_000 {
            s.push(Sample { time_s: f64::from(i), ..Sample::default() }, 50);
        }
        let times: Vec<f64> = s.samples().iter().map(|s| s.time_s).collect();
        assert!(times.len() <= 50, "{}", times.len());
        assert_eq!(times[0], 0.0);
        assert_eq!(times[times.len() - 1], 999.0);
        assert!(times.windows(2).all(|w| w[0] < w[1]));
    }
}
