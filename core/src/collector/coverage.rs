//! Reads what [`crate::coverage`] divides up: resident memory, mappings, and which of them hold traced blocks.
//!
//! Mappings are looked at only where sites leave something to explain, and only as often as half a percent of one core
//! pays for: the table of blocks has to be gone through, which is the one thing that snapshots never do.

use std::collections::HashMap;

use super::read::thread_cpu_s;
use super::{Collector, Life};
use crate::Result;
use crate::coverage::{Baseline, Coverage, Region, untraced_bytes};
use crate::governor::Governor;
use crate::maps::{Backing, Maps};
use crate::process::{ProcDir, Usage};
use crate::snapshot::{Process, SiteSample};

/// Part of our time that looks at mappings may take.
const LOOK_SHARE: f64 = 0.005;
/// The domain of probe sets that count memory, see `plugins/README.md`.
const MEMORY: &str = "memory";

/// The books of one process's growth.
#[derive(Clone, Debug, Default)]
pub(super) struct Growth {
    since_s: f64,
    before: Baseline,
    untraced_bytes: u64,
    /// `None` until the first snapshot, or when the kernel does not tell anonymous memory apart.
    newest: Option<Coverage>,
}

impl Growth {
    /// Begins at `now_s`; right after probes were attached.
    pub(super) fn begin(process: &Process, usage: Usage, now_s: f64) -> Self {
        let regions = regions(process).unwrap_or_default();
        let before = Baseline {
            resident_bytes: usage.anon_bytes.unwrap_or(0),
            heap_bytes: regions.iter().filter(|r| r.heap).map(|r| r.end - r.start).sum(),
            regions: regions.iter().map(|r| (r.start, r.end)).collect(),
        };
        Growth { since_s: now_s, before, ..Growth::default() }
    }

    pub(super) fn newest(&self) -> Option<Coverage> {
        self.newest
    }

    fn update(&mut self, resident_bytes: u64, outstanding_bytes: Option<u64>) -> Coverage {
        let coverage =
            Coverage::new(self.since_s, &self.before, resident_bytes, outstanding_bytes, self.untraced_bytes);
        self.newest = Some(coverage);
        coverage
    }
}

/// A process's private writable mappings without a file, stacks left out, by address; `None` when it has ended.
fn regions(process: &Process) -> Option<Vec<Region>> {
    let dir = ProcDir::open_same(process.pid, process.start_ticks).ok()?;
    let maps = Maps::read(&dir).ok()?;
    let region = |m: &crate::maps::Mapping| {
        let heap = match &m.backing {
            Backing::Anonymous => false,
            Backing::Special(name) if &**name == "[heap]" => true,
            // Programs may name their mappings.
            Backing::Special(name) if name.starts_with("[anon:") => false,
            _ => return None,
        };
        (m.perms.write && !m.perms.shared).then(|| Region::new(m.start, m.end, heap))
    };
    Some(maps.iter().filter_map(region).collect())
}

impl Collector {
    /// Brings the account of every process's growth up to date with a snapshot's sites.
    ///
    /// # Errors
    /// When the map of blocks cannot be read.
    pub(super) fn account_growth(&mut self, sites: &[SiteSample], now_s: f64) -> Result<()> {
        let memory: Vec<u32> = self.plugins.iter().filter(|p| p.spec.domain == MEMORY).map(|p| p.spec.number).collect();
        let mut outstanding: HashMap<u32, u64> = HashMap::new();
        for sample in sites.iter().filter(|s| memory.contains(&s.site.key.probe_set)) {
            *outstanding.entry(sample.site.key.instance).or_default() += sample.totals.outstanding_bytes();
        }
        let known = |governor: &Governor, instance: u32| {
            governor.is_exact().then(|| outstanding.get(&instance).copied().unwrap_or(0))
        };
        let mut unexplained = Vec::new();
        for (instance, watched) in self.watched.iter_mut().filter(|(_, w)| w.life == Life::Running) {
            let Some(resident_bytes) = watched.usage.anon_bytes else { continue };
            if watched.growth.update(resident_bytes, known(&watched.governor, *instance)).has_rest() {
                unexplained.push(*instance);
            }
        }
        if unexplained.is_empty() || now_s < self.next_look_s {
            return Ok(());
        }
        let before_s = thread_cpu_s();
        self.look_at_mappings(&unexplained)?;
        self.next_look_s = now_s + (thread_cpu_s() - before_s) / LOOK_SHARE;
        for instance in unexplained {
            let Some(watched) = self.watched.get_mut(&instance) else { continue };
            if let Some(resident_bytes) = watched.usage.anon_bytes {
                watched.growth.update(resident_bytes, known(&watched.governor, instance));
            }
        }
        Ok(())
    }

    /// Finds out how much of these processes' new mappings holds no traced block.
    fn look_at_mappings(&mut self, instances: &[u32]) -> Result<()> {
        let mut all: HashMap<u32, Vec<Region>> = HashMap::new();
        for instance in instances {
            let regions = self.watched.get(instance).and_then(|w| regions(&w.process));
            all.extend(regions.map(|regions| (*instance, regions)));
        }
        self.tracker.get()?.for_each_block(|instance, block| {
            let Some(regions) = all.get_mut(&instance) else { return };
            let at = regions.partition_point(|r| r.end <= block.address);
            if let Some(region) = regions.get_mut(at).filter(|r| r.start <= block.address) {
                region.add_block(block.size);
            }
        })?;
        for (instance, regions) in all {
            if let Some(watched) = self.watched.get_mut(&instance) {
                watched.growth.untraced_bytes = untraced_bytes(&regions, &watched.growth.before.regions);
            }
        }
        Ok(())
    }
}
