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
}

impl Series {
    /// Appends a sample; `cap` (at least 2) bounds the length.
    pub fn push(&mut self, sample: Sample, cap: usize) {
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

impl From<Vec<Sample>> for Series {
    fn from(samples: Vec<Sample>) -> Self {
        Series { samples }
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

/// What a snapshot says of one site.
pub(crate) struct News {
    pub(crate) key: SiteKey,
    pub(crate) totals: Totals,
    pub(crate) what: What,
}

/// How much of it is new.
#[expect(clippy::large_enum_variant, reason = "made one at a time and taken apart at once")]
pub(crate) enum What {
    /// All of it, or more than can be said here.
    All(SiteSample),
    /// Time has gone on; the last cohort with it, when it is still open.
    Time { is_last_open: bool },
}

/// All series of a run.
#[derive(Clone, Debug, Default)]
pub struct History {
    bounds: Bounds,
    /// Shared, so that rules can hold a site while they look at it; copied only if one is still held at a push.
    sites: HashMap<SiteKey, Arc<SiteHistory>>,
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
        let mut history = History {
            bounds,
            sites: sites.into_iter().map(|h| (h.site().key, Arc::new(h))).collect(),
            totals,
            processes: processes.into_iter().map(|p| (p.process.instance, p)).collect(),
            snapshots,
            time_s: newest.time_s,
            wall_s: newest.wall_s,
        };
        history.drop_ended();
        history
    }

    /// Takes a snapshot in. Sites whose process the snapshot says has ended are kept, marked as ended.
    pub fn push(&mut self, snapshot: &Snapshot) {
        let Snapshot { number: _, time_s, wall_s, processes, sites, collect_cpu_s: _ } = snapshot;
        let news = sites.iter().map(|s| News { key: s.site.key, totals: s.totals, what: What::All(s.clone()) });
        self.take((*time_s, *wall_s), snapshot.totals(), processes.iter().cloned(), sites.len(), news);
    }

    /// Takes a snapshot in of which only the changes are known; `count` is the number of its sites.
    pub(crate) fn take(
        &mut self,
        (time_s, wall_s): (f64, f64),
        totals: Totals,
        processes: impl Iterator<Item = ProcessSample>,
        count: usize,
        news: impl Iterator<Item = News>,
    ) {
        self.snapshots += 1;
        (self.time_s, self.wall_s) = (time_s, wall_s);
        self.totals.push(Sample { time_s, totals }, self.bounds.samples);
        let cap = self.bounds.cap(count);
        for News { key, totals, what } in news {
            let sample = Sample { time_s, totals };
            let Some(known) = self.sites.get_mut(&key) else {
                if let What::All(latest) = what {
                    let mut series = Series::default();
                    series.push(sample, cap);
                    self.sites.insert(key, Arc::new(SiteHistory { series, latest, ended_s: None }));
                }
                continue;
            };
            let known = Arc::make_mut(known);
            known.series.push(sample, cap);
            match what {
                What::All(latest) => known.latest = latest,
                What::Time { is_last_open: true } => {
                    if let Some(cohort) = known.latest.cohorts.last_mut() {
                        cohort.end_s = time_s;
                    }
                }
                What::Time { is_last_open: false } => {}
            }
        }
        for p in processes {
            if !p.alive {
                for h in self.sites.values_mut().filter(|h| h.site().key.instance == p.process.instance) {
                    Arc::make_mut(h).ended_s.get_or_insert(time_s);
                }
            }
            self.processes.insert(p.process.instance, p);
        }
        self.drop_ended();
    }

    /// Keeps only the largest sites of ended processes.
    fn drop_ended(&mut self) {
        let mut ended: Vec<_> = (self.sites.iter())
            .filter(|(_, h)| h.ended_s.is_some())
            .map(|(k, h)| (h.latest.totals.outstanding_bytes(), *k))
            .collect();
        if ended.len() <= MAX_ENDED_SITES {
            return;
        }
        ended.sort_unstable_by(|a, b| b.cmp(a));
        for (_, key) in &ended[MAX_ENDED_SITES..] {
            self.sites.remove(key);
        }
    }

    /// One site.
    pub fn site(&self, key: SiteKey) -> Option<&SiteHistory> {
        self.sites.get(&key).map(Arc::as_ref)
    }

    /// All sites, in no order.
    pub fn sites(&self) -> impl Iterator<Item = &SiteHistory> {
        self.sites.values().map(Arc::as_ref)
    }

    /// Sites of processes that still run, in no order: what rules look at.
    pub fn live_sites(&self) -> impl Iterator<Item = &Arc<SiteHistory>> {
        self.sites.values().filter(|h| h.ended_s.is_none())
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

#[cfg(test)]
mod tests {
    use super::*;

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
