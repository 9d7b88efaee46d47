//! Scans for reachability: when, of whom, and what becomes of their results.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::{Collector, Life, Notice};
use crate::config::ReachabilitySettings;
use crate::error::Result;
use crate::reachability::Limits;
use crate::reachability::plan::Plan;
use crate::reachability::scanner::Options;
use crate::reachability::service::{Outcome, Service, Step, Subject, Way};
use crate::snapshot::{Process, ReachStep, ReachWay, Site, SiteKey, SiteReach};

/// How long a process may have to wait with its exit for a scan.
const EXIT_WAITS: Duration = Duration::from_secs(60);
/// What reading a process takes at least, bytes per second of CPU time: for the plan of a scan. See docs/reachability.md.
const PLANNED_SPEED: f64 = 0.8e9;
/// Scans that take longer by plan are announced, seconds.
const ANNOUNCED_S: f64 = 10.0;

/// What the collector keeps about scans.
pub(super) struct Scans {
    settings: ReachabilitySettings,
    service: Service,
    /// Instances that wait with their exit for a scan, with their process ids, and since when.
    exits: HashMap<u32, (u32, f64)>,
    sites: HashMap<SiteKey, Arc<SiteReach>>,
    /// When the last scan of an instance ended, seconds on the collector's clock.
    ended_s: HashMap<u32, f64>,
}

impl Scans {
    pub(super) fn new(settings: ReachabilitySettings) -> Self {
        Scans {
            settings,
            service: Service::default(),
            exits: HashMap::new(),
            sites: HashMap::new(),
            ended_s: HashMap::new(),
        }
    }

    /// What is known of a site.
    pub(super) fn of(&self, key: SiteKey) -> Option<Arc<SiteReach>> {
        self.sites.get(&key).map(Arc::clone)
    }

    /// Forgets an instance; the process id when it waits with its exit and must be let go on.
    pub(super) fn forget(&mut self, instance: u32) -> Option<u32> {
        self.service.forget(instance);
        self.sites.retain(|key, _| key.instance != instance);
        self.ended_s.remove(&instance);
        self.exits.remove(&instance).map(|(pid, _)| pid)
    }

    /// Whether a scan of an instance is under way.
    pub(super) fn is_running(&self, instance: u32) -> bool {
        self.service.is_running(instance)
    }

    /// Whether a process waits with its exit.
    pub(super) fn is_exiting(&self, instance: u32) -> bool {
        self.exits.contains_key(&instance)
    }
}

impl Collector {
    /// Scans the processes of sites that a rule suspects, if that is wanted and the last scan was long enough ago.
    ///
    /// # Errors
    /// A scan cannot be started.
    pub fn scan_suspects<'a>(&mut self, sites: impl Iterator<Item = &'a Site>) -> Result<()> {
        if self.scans.settings.automatic { self.scan_asked(sites) } else { Ok(()) }
    }

    /// Scans the processes of sites for which a rule has asked for it, if the last scan was long enough ago.
    ///
    /// # Errors
    /// A scan cannot be started.
    pub fn scan_asked<'a>(&mut self, sites: impl Iterator<Item = &'a Site>) -> Result<()> {
        let now_s = self.now_s();
        let every_s = self.scans.settings.every.as_secs_f64();
        let mut suspects: HashMap<u32, Vec<SiteKey>> = HashMap::new();
        for site in sites {
            suspects.entry(site.key.instance).or_default().push(site.key);
        }
        for (instance, suspects) in suspects {
            if self.scans.ended_s.get(&instance).is_none_or(|ended_s| now_s - ended_s >= every_s) {
                self.scan_memory(instance, suspects)?;
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
            self.scan_memory(instance, Vec::new())?;
        }
        Ok(())
    }

    /// Whether a scan is under way.
    pub fn is_scanning(&self) -> bool {
        self.scans.service.is_busy()
    }

    fn scan_memory(&mut self, instance: u32, suspects: Vec<SiteKey>) -> Result<()> {
        let Some(watched) = self.watched.get(&instance).filter(|w| w.life == Life::Running) else { return Ok(()) };
        if self.scans.service.is_running(instance) {
            return Ok(());
        }
        let s = &self.scans.settings;
        let exact = watched.governor.is_exact();
        let options = s.options(exact);
        let subject = self.subject(instance, &watched.process, suspects);
        // The resident set is about what is read, and known already.
        let plan = Plan::of(watched.usage.rss_bytes, PLANNED_SPEED, &options);
        if plan.about_s >= ANNOUNCED_S {
            let Plan { bytes, scans, about_s, .. } = plan;
            self.notices.push(Notice::Scanning { process: Arc::clone(&watched.process), bytes, scans, about_s });
        }
        self.scans.service.start(subject, self.tracker.get()?.block_reader()?, options)
    }

    /// Scans a process that has called exit() and is stopped, so that what was lost then is known: afterwards its memory is
    /// gone. True when it must wait for that.
    pub(super) fn scan_exiting(&mut self, instance: u32) -> Result<bool> {
        if !self.scans.settings.at_exit || self.scans.service.is_running(instance) {
            return Ok(false);
        }
        let Some(watched) = self.watched.get(&instance) else { return Ok(false) };
        let s = &self.scans.settings;
        let options = Options {
            // One block is enough where nothing can have moved.
            limits: Limits { min_lost: 1, ..s.limits },
            min_age: Duration::ZERO,
            core_share: 1.0,
            bandwidth: f64::INFINITY,
            stop: None,
            still: true,
            ..s.options(watched.governor.is_exact())
        };
        let pid = watched.process.pid;
        let subject = self.subject(instance, &watched.process, Vec::new());
        self.scans.service.start(subject, self.tracker.get()?.block_reader()?, options)?;
        self.scans.exits.insert(instance, (pid, self.now_s()));
        Ok(true)
    }

    /// Whether any process waits with its exit.
    pub(super) fn exit_waits(&self) -> bool {
        !self.scans.exits.is_empty()
    }

    /// Lets processes whose scan has ended exit, also when its results cannot be taken in.
    pub(super) fn end_exit_scans(&mut self) -> Result<()> {
        if self.scans.exits.is_empty() {
            return Ok(());
        }
        let now_s = self.now_s();
        for (instance, (_, since_s)) in &self.scans.exits {
            if now_s - since_s > EXIT_WAITS.as_secs_f64() {
                self.scans.service.cancel(*instance);
            }
        }
        let taken = self.take_scans();
        let running: HashSet<u32> =
            self.scans.exits.keys().copied().filter(|i| self.scans.service.is_running(*i)).collect();
        let over: Vec<u32> =
            self.scans.exits.iter().filter(|(i, _)| !running.contains(*i)).map(|(_, (pid, _))| *pid).collect();
        self.scans.exits.retain(|instance, _| running.contains(instance));
        over.into_iter().for_each(|pid| self.go_on(pid));
        taken
    }

    fn subject(&self, instance: u32, process: &Process, suspects: Vec<SiteKey>) -> Subject {
        Subject {
            instance,
            pid: process.pid,
            start_ticks: process.start_ticks,
            glibc: self.plugins.iter().filter(|p| p.spec.name == "glibc").map(|p| p.spec.number).collect(),
            suspects,
        }
    }

    /// Takes in what scans have found since the last call.
    pub(super) fn take_scans(&mut self) -> Result<()> {
        let now_s = self.now_s();
        for (instance, outcome) in self.scans.service.take_finished() {
            self.scans.ended_s.insert(instance, now_s);
            let Some(process) = self.watched.get(&instance).map(|w| Arc::clone(&w.process)) else { continue };
            match outcome {
                Ok(Outcome { sites, cost, limits }) => {
                    for (key, counts, way) in sites {
                        let way = way.map(|way| self.name_way(way)).transpose()?;
                        let verdict = counts.verdict(&limits);
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
        let reader = self.tracker.get()?.block_reader()?;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// When the books of a process are started anew while it waits, nobody else remembers that it is stopped.
    #[test]
    fn who_waits_with_its_exit_is_told_when_forgotten() {
        let mut scans = Scans::new(ReachabilitySettings::default());
        scans.exits.insert(7, (4711, 0.0));
        assert!(scans.is_exiting(7) && !scans.is_exiting(8));
        assert_eq!((scans.forget(8), scans.forget(7), scans.forget(7)), (None, Some(4711), None));
    }
}
