//! Scans for reachability: when, of whom, and what becomes of their results.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::{Collector, Life, Notice};
use crate::config::ReachabilitySettings;
use crate::error::Result;
use crate::reachability::scanner::Options;
use crate::reachability::service::{Outcome, Service, Step, Subject, Way};
use crate::snapshot::{ReachStep, ReachWay, Site, SiteKey, SiteReach};

/// Of what was allocated in a window nobody knows the frees: it must be older to be judged.
const MIN_AGE_WINDOWS: Duration = Duration::from_secs(10);
const MIN_AGE_EXACT: Duration = Duration::from_secs(1);

/// What the collector keeps about scans.
pub(super) struct Scans {
    settings: ReachabilitySettings,
    service: Service,
    sites: HashMap<SiteKey, Arc<SiteReach>>,
    /// When the last scan of an instance ended, seconds on the collector's clock.
    ended_s: HashMap<u32, f64>,
}

impl Scans {
    pub(super) fn new(settings: ReachabilitySettings) -> Self {
        Scans { settings, service: Service::default(), sites: HashMap::new(), ended_s: HashMap::new() }
    }

    /// What is known of a site.
    pub(super) fn of(&self, key: SiteKey) -> Option<Arc<SiteReach>> {
        self.sites.get(&key).map(Arc::clone)
    }

    /// Forgets an instance.
    pub(super) fn forget(&mut self, instance: u32) {
        self.service.forget(instance);
        self.sites.retain(|key, _| key.instance != instance);
        self.ended_s.remove(&instance);
    }
}

impl Collector {
    /// Scans the processes of sites that a rule suspects, if that is wanted and the last scan was long enough ago.
    ///
    /// # Errors
    /// A scan cannot be started.
    pub fn scan_suspects<'a>(&mut self, sites: impl Iterator<Item = &'a Site>) -> Result<()> {
        if !self.scans.settings.automatic {
            return Ok(());
        }
        let now_s = self.now_s();
        let every_s = self.scans.settings.every.as_secs_f64();
        for site in sites {
            let instance = site.key.instance;
            let due = self.scans.ended_s.get(&instance).is_none_or(|ended_s| now_s - ended_s >= every_s);
            if due {
                self.scan_memory(instance)?;
            }
        }
        Ok(())
    }

    /// Starts a scan of every watched process, unless one is under way.
    ///
    /// # Errors
    /// A scan cannot be started.
    pub fn scan_all(&mut self) -> Result<()> {
        let running = self.watched.iter().filter(|(_, w)| w.life == Life::Running).map(|(i, _)| *i);
        for instance in running.collect::<Vec<_>>() {
            self.scan_memory(instance)?;
        }
        Ok(())
    }

    /// Whether a scan is under way.
    pub fn is_scanning(&self) -> bool {
        self.scans.service.is_busy()
    }

    fn scan_memory(&mut self, instance: u32) -> Result<()> {
        let Some(watched) = self.watched.get(&instance).filter(|w| w.life == Life::Running) else { return Ok(()) };
        if self.scans.service.is_running(instance) {
            return Ok(());
        }
        let s = &self.scans.settings;
        let exact = watched.governor.is_exact();
        let options = Options {
            limits: s.limits,
            min_age: if exact { MIN_AGE_EXACT } else { MIN_AGE_WINDOWS },
            core_share: s.core_share,
            max_bytes: s.max_memory.0,
        };
        let subject = Subject { instance, pid: watched.process.pid, start_ticks: watched.process.start_ticks };
        self.scans.service.start(subject, self.tracker.block_reader()?, options)
    }

    /// Takes in what scans have found since the last call.
    pub(super) fn take_scans(&mut self) -> Result<()> {
        let now_s = self.now_s();
        for (instance, outcome) in self.scans.service.take_finished() {
            self.scans.ended_s.insert(instance, now_s);
            let Some(process) = self.watched.get(&instance).map(|w| Arc::clone(&w.process)) else { continue };
            match outcome {
                Ok(Outcome { sites, cost }) => {
                    for (key, counts, way) in sites {
                        let way = way.map(|way| self.name_way(way)).transpose()?;
                        let verdict = counts.verdict(&self.scans.settings.limits);
                        self.scans.sites.insert(key, Arc::new(SiteReach { verdict, counts, time_s: now_s, way }));
                    }
                    self.notices.push(Notice::Scanned { process, cost });
                }
                Err(e) => self.notices.push(Notice::NotScanned { process, reason: format!("{e:#}") }),
            }
        }
        Ok(())
    }

    fn name_way(&mut self, way: Way) -> Result<ReachWay> {
        let mut steps = Vec::with_capacity(way.steps.len());
        for step in way.steps {
            steps.push(match step {
                Step::Blocks(key, count) => {
                    let site = self.site(key)?;
                    self.symbolizer.symbolize(&site);
                    ReachStep::Blocks(site, count)
                }
                Step::Skipped(count) => ReachStep::Skipped(count),
            });
        }
        Ok(ReachWay { root: way.root, steps })
    }

    /// Counts the blocks that were called lost and have been freed since.
    pub(super) fn check_refutations(&mut self) -> Result<()> {
        if self.scans.ended_s.is_empty() {
            return Ok(());
        }
        let reader = self.tracker.block_reader()?;
        let limits = self.scans.settings.limits;
        let known = &mut self.scans.sites;
        let running = self.watched.iter().filter(|(_, w)| w.life == Life::Running).map(|(i, _)| *i);
        for instance in running.collect::<Vec<_>>() {
            self.scans.service.check_ledger(instance, &reader, &mut |key, called, refuted| {
                let Some(reach) = known.get_mut(&key) else { return };
                if reach.counts.refuted != refuted {
                    let mut counts = reach.counts;
                    (counts.called_lost, counts.refuted) = (called, refuted);
                    let verdict = counts.verdict(&limits);
                    *reach = Arc::new(SiteReach { verdict, counts, ..(**reach).clone() });
                }
            });
        }
        Ok(())
    }
}
