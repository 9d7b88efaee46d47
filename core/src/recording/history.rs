//! The history of a recorded run, made in one pass over the totals.
//!
//! The same as pushing every snapshot into a [`History`], without making the snapshots: samples of a site are appended
//! once its totals change, all those that are the same at a time, and details are read for the last snapshot of each site
//! only.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::cursor::Cursor;
use super::{Filter, Reader, SnapshotInfo};
use crate::Result;
use crate::history::{Bounds, History, Sample, Series, SiteHistory};
use crate::snapshot::{ProcessSample, Site, Totals};

/// A site whose series may lag behind.
#[derive(Clone, Default)]
struct Lagging {
    series: Series,
    /// Its totals in the snapshots that are not in the series yet.
    totals: Totals,
    /// Number of snapshots after which they begin; `None` while no snapshot has the site.
    since: Option<usize>,
    /// Number of snapshots up to the last one with the site; 0 without any.
    last: usize,
}

impl Lagging {
    /// Appends what is the same in all snapshots before the last of `passed`; `caps` are the bounds of their series.
    fn catch_up(&mut self, passed: &[SnapshotInfo], caps: &[usize]) {
        let Some(since) = self.since else { return };
        for (info, cap) in passed[since..].iter().zip(&caps[since..]) {
            self.series.push(Sample { time_s: info.time_s, totals: self.totals }, *cap);
        }
        self.since = Some(passed.len());
        self.last = passed.len();
    }
}

impl Reader {
    /// Every site with the time of the first snapshot that has it, seconds since the collector started, the first ones
    /// first.
    ///
    /// # Errors
    /// The recording is damaged.
    pub fn first_seen(&self) -> Result<Vec<(&Arc<Site>, f64)>> {
        let mut is_seen = vec![false; self.max_number() as usize + 1];
        let mut seen = Vec::new();
        let mut cursor = Cursor::new(self, 0)?;
        for (place, info) in self.contents().iter().enumerate() {
            cursor.read(self, place, false)?;
            let new = cursor.totals.changes.iter().filter(|c| !std::mem::replace(&mut is_seen[c.id as usize], true));
            seen.extend(new.filter_map(|c| self.numbered(c.id)).map(|site| (site, info.time_s)));
        }
        Ok(seen)
    }

    /// The history of the snapshots that a filter takes, as the running collector would have it after the last of
    /// them. `progress` is told after each snapshot.
    ///
    /// # Errors
    /// The recording is damaged.
    pub fn history(&self, bounds: Bounds, filter: &Filter, progress: &mut dyn FnMut()) -> Result<History> {
        let range = self.range(filter);
        let snapshots = &self.contents()[range.clone()];
        let Some(newest) = snapshots.last() else { return Ok(History::new(bounds)) };
        let taken: Vec<bool> =
            (0..=self.max_number()).map(|id| self.numbered(id).is_some_and(|s| filter.takes(s))).collect();
        let whole = filter.pids.is_empty() && filter.probe_sets.is_empty();
        let mut lagging: Vec<Lagging> = vec![Lagging::default(); taken.len()];
        let mut caps: Vec<usize> = Vec::with_capacity(snapshots.len());
        let mut totals = Series::default();
        let mut processes: HashMap<u32, ProcessSample> = HashMap::new();
        let mut ended: HashMap<u32, f64> = HashMap::new();
        let mut cursor = Cursor::new(self, range.start)?;
        for (passed, info) in snapshots.iter().enumerate() {
            let before = &snapshots[..passed];
            let changed: Vec<u32> = if passed == 0 || info.keyframe {
                // It says everything anew, and nothing of what it no longer has.
                for id in cursor.totals.present() {
                    lagging[*id as usize].catch_up(before, &caps);
                    lagging[*id as usize].since = None;
                }
                cursor.read(self, range.start + passed, false)?;
                cursor.totals.present().to_vec()
            } else {
                cursor.read(self, range.start + passed, false)?;
                for id in &cursor.totals.gone {
                    lagging[*id as usize].catch_up(before, &caps);
                    lagging[*id as usize].since = None;
                }
                cursor.totals.changes.iter().map(|c| c.id).collect()
            };
            for id in changed.into_iter().filter(|id| taken[*id as usize]) {
                let site = &mut lagging[id as usize];
                site.catch_up(before, &caps);
                (site.since, site.totals) = (Some(passed), cursor.totals.totals(id));
            }
            let mut count = cursor.totals.present().len();
            let mut sum = info.totals;
            if !whole {
                (count, sum) = (0, Totals::default());
                for id in cursor.totals.present().iter().filter(|id| taken[**id as usize]) {
                    count += 1;
                    sum.add(&cursor.totals.totals(*id));
                }
            }
            caps.push(bounds.cap(count));
            totals.push(Sample { time_s: info.time_s, totals: sum }, bounds.samples);
            for process in self.process_samples(&cursor, filter)? {
                if !process.alive {
                    ended.entry(process.process.instance).or_insert(info.time_s);
                }
                processes.insert(process.process.instance, process);
            }
            progress();
        }
        // Sites by the last snapshot that has them.
        let mut ends: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
        for (id, site) in (0..).zip(&mut lagging) {
            site.catch_up(snapshots, &caps);
            if let Some(last) = site.last.checked_sub(1) {
                ends.entry(range.start + last).or_default().push(id);
            }
        }
        let mut sites = Vec::new();
        let mut at = Cursor::new(self, range.start)?;
        for (place, ids) in ends {
            at.seek(self, place);
            at.read(self, place, true)?;
            for id in ids {
                let Some(site) = self.numbered(id) else { continue };
                sites.push(SiteHistory {
                    series: std::mem::take(&mut lagging[id as usize].series),
                    latest: at.sample(self, site, id, self.contents()[place].time_s)?,
                    ended_s: ended.get(&site.key.instance).copied(),
                });
            }
        }
        let processes = processes.into_values().collect();
        Ok(History::from_parts(bounds, sites, totals, processes, newest, range.len() as u64))
    }
}
