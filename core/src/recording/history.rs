//! The history of a recorded run, made in one pass over the totals.
//!
//! The same as pushing every snapshot into a [`History`], without making the snapshots: details are read for the last
//! snapshot of each site only.

use std::collections::{BTreeMap, HashMap};

use super::cursor::Cursor;
use super::{Filter, Reader};
use crate::Result;
use crate::history::{Bounds, History, Sample, Series, SiteHistory};
use crate::snapshot::{ProcessSample, Totals};

impl Reader {
    /// The history of the snapshots that a filter takes, as the running collector would have it after the last of
    /// them. `progress` is told after each snapshot.
    ///
    /// # Errors
    /// The recording is damaged.
    pub fn history(&self, bounds: Bounds, filter: &Filter, progress: &mut dyn FnMut()) -> Result<History> {
        let range = self.range(filter);
        let Some(newest) = range.clone().last().map(|place| self.contents()[place]) else {
            return Ok(History::new(bounds));
        };
        let taken: Vec<bool> =
            (0..=self.max_number()).map(|id| self.numbered(id).is_some_and(|s| filter.takes(s))).collect();
        let whole = filter.pids.is_empty() && filter.probe_sets.is_empty();
        let mut series: Vec<Series> = vec![Series::default(); taken.len()];
        let mut last_place: Vec<usize> = vec![usize::MAX; taken.len()];
        let mut totals = Series::default();
        let mut processes: HashMap<u32, ProcessSample> = HashMap::new();
        let mut ended: HashMap<u32, f64> = HashMap::new();
        let mut cursor = Cursor::new(self, range.start)?;
        for place in range.clone() {
            cursor.read(self, place, false)?;
            let info = &self.contents()[place];
            let present = cursor.totals.present();
            let count = if whole { present.len() } else { present.iter().filter(|id| taken[**id as usize]).count() };
            let cap = bounds.cap(count);
            let mut sum = Totals::default();
            for id in present.iter().filter(|id| taken[**id as usize]) {
                let sample = Sample { time_s: info.time_s, totals: cursor.totals.totals(*id) };
                if !whole {
                    sum.add(&sample.totals);
                }
                series[*id as usize].push(sample, cap);
                last_place[*id as usize] = place;
            }
            let sum = if whole { info.totals } else { sum };
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
        for (id, place) in (0..).zip(&last_place).filter(|(_, place)| **place != usize::MAX) {
            ends.entry(*place).or_default().push(id);
        }
        let mut sites = Vec::new();
        let mut at = Cursor::new(self, range.start)?;
        for (place, ids) in ends {
            at.seek(self, place);
            at.read(self, place, true)?;
            for id in ids {
                let Some(site) = self.numbered(id) else { continue };
                sites.push(SiteHistory {
                    series: std::mem::take(&mut series[id as usize]),
                    latest: at.sample(self, site, id, self.contents()[place].time_s)?,
                    ended_s: ended.get(&site.key.instance).copied(),
                });
            }
        }
        let processes = processes.into_values().collect();
        Ok(History::from_parts(bounds, sites, totals, processes, &newest, range.len() as u64))
    }
}
