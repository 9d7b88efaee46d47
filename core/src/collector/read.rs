//! Snapshots: the totals of all sites and what the processes use, read from the kernel side; then what has ended is forgotten.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use memleak_probes::{Counters, SiteTotals, Tracker};

use super::{Collector, Life, Notice, Purpose, clock_ns};
use crate::Result;
use crate::process;
use crate::snapshot::{
    Losses, Mode, ProcessSample, Sampling, SiteKey, SiteSample, Snapshot, StackCounts, StandardErrors, Totals,
};

/// Most sites of a process that are symbolized when it ends, largest first: nobody can do it later.
const NAMED_AT_END: usize = 200;

impl Collector {
    /// Reads everything that is outstanding now.
    ///
    /// # Errors
    /// When the maps cannot be read.
    pub fn snapshot(&mut self) -> Result<Snapshot> {
        let cpu_before = thread_cpu_s();
        self.take_scans()?;
        self.check_refutations()?;
        let read = Instant::now();
        let mut raw = self.tracker.loaded().map_or_else(|| Ok(Vec::new()), Tracker::read_sites)?;
        let time_s = self.now_s();
        let wall_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        // A site's process may have been forgotten between two reads.
        raw.retain(|(key, _)| self.watched.contains_key(&key.instance));
        let mut sites = Vec::with_capacity(raw.len());
        for (key, totals) in &raw {
            let key = SiteKey { instance: key.instance, probe_set: key.probe_set, stack: key.stack };
            self.site(key)?;
            if let Some(known) = self.sites.get_mut(&key) {
                let age_ns = totals.last_allocation_ns.saturating_sub(self.started_ns);
                sites.push(SiteSample {
                    site: Arc::clone(&known.site),
                    totals: to_totals(totals),
                    stderr: StandardErrors { bytes: totals.bytes_variance.sqrt(), count: totals.count_variance.sqrt() },
                    // To the millisecond: finer says nothing, and would be the larger part of a recording.
                    last_allocation_s: (age_ns / 1_000_000) as f64 / 1e3,
                    cohorts: known.cohorts.read(&self.generations, totals, time_s),
                    lifetimes: totals.lifetimes,
                    reachability: self.scans.of(key),
                    kernel: None,
                });
            }
        }
        let next_generation = self.generations.is_due(time_s);
        let kernel = (self.kernel.as_mut())
            .map(|k| k.read(&self.generations, next_generation, time_s, self.started_ns, &mut sites))
            .transpose()?;
        if next_generation {
            for (key, totals) in &raw {
                let key = SiteKey { instance: key.instance, probe_set: key.probe_set, stack: key.stack };
                if let Some(known) = self.sites.get_mut(&key) {
                    known.cohorts.close_generation(&self.generations, totals);
                }
            }
            self.generations.advance(time_s);
            if let Some(tracker) = self.tracker.loaded_mut() {
                tracker.next_cohort();
            }
        }
        sites.sort_by_key(|s| (std::cmp::Reverse(s.totals.outstanding_bytes()), s.site.key));
        self.read_usage();
        self.account_growth(&sites, time_s)?;
        let mut processes = self.process_samples()?;
        for process in &mut processes {
            process.stacks = self.stacks_of(process.process.instance, &sites);
        }
        processes.splice(0..0, kernel.into_iter().flatten());
        processes.sort_by_key(|p| p.process.instance);
        for instance in std::mem::take(&mut self.unclear) {
            if self.watched.get(&instance).is_some_and(|w| w.life == Life::Running) {
                self.attach_to(instance);
            }
        }
        self.forget_ended(&sites)?;
        self.last_read = read;
        self.snapshots += 1;
        let collect_cpu_s = thread_cpu_s() - cpu_before;
        Ok(Snapshot { number: self.snapshots, time_s, wall_s, processes, sites, collect_cpu_s })
    }

    /// How many recorded allocations of a process have a stack that reaches the outermost frame.
    fn stacks_of(&self, instance: u32, sites: &[SiteSample]) -> StackCounts {
        let mut counts = StackCounts { by_tables: self.unwinder.is_some(), ..StackCounts::default() };
        for sample in sites.iter().filter(|s| s.site.key.instance == instance) {
            counts.taken += sample.totals.allocated_count;
            if self.sites.get(&sample.site.key).is_some_and(|known| known.complete) {
                counts.complete += sample.totals.allocated_count;
            }
        }
        counts
    }

    /// Reads what the processes use now.
    fn read_usage(&mut self) {
        for watched in self.watched.values_mut().filter(|w| w.life == Life::Running) {
            if let Ok(usage) = process::usage(watched.process.pid, watched.process.start_ticks) {
                watched.usage = usage;
            }
        }
    }

    fn process_samples(&self) -> Result<Vec<ProcessSample>> {
        let mut samples = Vec::with_capacity(self.watched.len());
        let Some(tracker) = self.tracker.loaded() else { return Ok(samples) };
        let sample_bytes = tracker.sample_bytes();
        for (instance, watched) in &self.watched {
            let counters = tracker.read_counters(*instance)?;
            let alive = watched.life == Life::Running;
            let budget = watched.governor.settings();
            samples.push(ProcessSample {
                process: Arc::clone(&watched.process),
                stacks: StackCounts::default(),
                alive,
                mode: match (watched.governor.is_exact(), sample_bytes) {
                    (true, 0) => Mode::Exact,
                    (true, _) => Mode::Sampled,
                    (false, _) => Mode::Estimated,
                },
                sampling: (sample_bytes > 0).then_some(Sampling {
                    mean_bytes: sample_bytes,
                    allocated_bytes: counters.allocated_bytes,
                    allocated_count: counters.allocated_count,
                }),
                budget: Some(watched.governor.budget()).filter(|b| b.is_finite()),
                windows: watched.governor.windows().0,
                windows_discarded: watched.governor.windows().1,
                open_s: watched.governor.open_s(),
                window_s: budget.share.map(|_| budget.max_window.as_secs_f64()),
                hard_stops: watched.governor.stops(),
                kernel: None,
                stopped: watched.governor.stopped(),
                hits: counters.hits,
                unmatched_frees: counters.unmatched_frees,
                losses: Losses {
                    // Between windows frees are not seen, and this is how that comes out: nothing is lost by it.
                    implicit_frees: if watched.governor.is_exact() { counters.implicit_frees } else { 0 },
                    ..to_losses(&counters)
                },
                rss_bytes: alive.then_some(watched.usage.rss_bytes),
                rss_anon_bytes: watched.usage.anon_bytes.filter(|_| alive),
                coverage: watched.growth.newest(),
                cpu_s: Some(watched.usage.cpu_s),
                overhead_s: watched.governor.spent_s(),
            });
        }
        samples.sort_by_key(|p| p.process.instance);
        Ok(samples)
    }

    /// Drops what is known of processes that have ended: this snapshot was their last. Their largest sites are named
    /// before, for the report.
    fn forget_ended(&mut self, sites: &[SiteSample]) -> Result<()> {
        let ended: Vec<u32> = self.watched.iter().filter(|(_, w)| w.life == Life::Ended).map(|(i, _)| *i).collect();
        for instance in ended {
            let before = self.watched.get(&instance).and_then(|w| w.ended.before_handlers.as_ref());
            let was_held = |s: &SiteSample| before.is_some_and(|b| b.contains_key(&s.site.key));
            let theirs = sites.iter().filter(|s| s.site.key.instance == instance);
            let theirs = theirs.filter(|s| s.totals.outstanding_bytes() > 0 || was_held(s));
            let named = if self.purpose == Purpose::Run { usize::MAX } else { NAMED_AT_END };
            for sample in theirs.take(named) {
                self.symbolizer.symbolize(&sample.site);
            }
            self.symbolizer.purge(instance);
            if let Some(unwinder) = &mut self.unwinder {
                unwinder.forget(instance);
            }
            self.pythons.remove(&instance);
            if self.scans.is_running(instance)
                && let Some(watched) = self.watched.get(&instance)
            {
                let reason =
                    "the scan was given up: it has ended, or is watched in another way from here on".to_owned();
                self.notices.push(Notice::NotScanned { process: Arc::clone(&watched.process), reason });
            }
            // Its books were started anew while it waited with its exit.
            if let Some(pid) = self.scans.forget(instance) {
                self.go_on(pid);
            }
            self.tracker.get_mut()?.forget(instance)?;
            if let Some(watched) = self.watched.remove(&instance)
                && self.purpose == Purpose::Run
            {
                self.ended.insert(instance, watched.ended);
            }
            self.sites.retain(|key, _| key.instance != instance);
        }
        Ok(())
    }
}

pub(super) fn to_totals(totals: &SiteTotals) -> Totals {
    Totals {
        allocated_bytes: totals.allocated_bytes,
        allocated_count: totals.allocated_count,
        freed_bytes: totals.freed_bytes,
        freed_count: totals.freed_count,
    }
}

/// What was not recorded, as far as the programs have counted it.
pub(super) fn to_losses(counters: &Counters) -> Losses {
    Losses {
        outstanding_full: counters.outstanding_full,
        sites_full: counters.sites_full,
        stacks_full: counters.stacks_full,
        stacks_failed: counters.stacks_failed,
        threads_full: counters.threads_full,
        missed_returns: counters.missed_returns,
        implicit_frees: counters.implicit_frees,
        partial_ranges: counters.partial_ranges,
        pointers_unreadable: counters.pointers_unreadable,
        events_dropped: counters.events_dropped,
        missed_events: 0,
        python_lost: counters.python_lost,
    }
}

/// CPU time of this thread in seconds.
pub(super) fn thread_cpu_s() -> f64 {
    clock_ns(libc::CLOCK_THREAD_CPUTIME_ID) as f64 / 1e9
}
