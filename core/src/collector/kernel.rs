//! The kernel as a target: its probe sets attached, its totals read, its sites named.
//!
//! It is one "process" with the pid 0 in everything that shows processes. Its sites are told apart by call stack and by
//! slab cache.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use globset::GlobSet;
use memleak_probes::kernel::{
    InnerCode, KernelDomain, KernelSetStatus, KernelSettings as ProbeSettings, KernelTracker, MAX_INNER,
};
use memleak_probes::{Attached, Counters, Event, EventKind, placement::Placement};

use self::filter::{filter, globs, unknown_caches};
use super::cohorts::{Generations, SiteCohorts};
use super::kernel_budget::{Purse, Verdict};
use super::read::{to_losses, to_totals};
use super::{Notice, PluginState, PluginStatus};
use crate::config::{Config, KernelBackend};
use crate::governor::StopReason;
use crate::kallsyms::Kallsyms;
use crate::kernel::gfp::GfpFlags;
use crate::kernel::judge::{Earlier, claims, judge};
use crate::kernel::statistics::{Statistics, is_reclaimable};
use crate::kernel::{COMM, KernelSample, KernelSummary, Origin, SetState};
use crate::plugin::Plugin;
use crate::snapshot::{
    Losses, Mode, Process, ProcessSample, Sampling, Site, SiteKey, SiteSample, StackCounts, StandardErrors,
};
use crate::{Error, Result};

mod filter;
mod sites;

/// Frames of the tracer itself, on top of a stack whose caller the probe did not know.
const TRACER: [&str; 9] = [
    "bpf_*",
    "__bpf_*",
    "___bpf_*",
    "__traceiter_*",
    "trace_call_bpf*",
    "perf_trace_*",
    "kprobe_*",
    "ftrace_*",
    "__x64_sys_bpf*",
];

/// What is recorded first when recording everything exceeds the budget: on average one allocation in so many bytes.
const FIRST_SAMPLE: u64 = 16 << 10;
/// When that is still too much, so many times fewer ...
const COARSER: u64 = 16;
/// ... down to this.
const COARSEST: u64 = 4 << 20;
/// When not even that is within the budget, nothing is traced for so long, seconds.
const COOL_DOWN_S: f64 = 60.0;

/// Loading programs takes its time: with the window of a process open, it waits for so long, seconds.
const PATIENCE_S: f64 = 2.0;
/// How often it is looked for modules that have come or gone, seconds.
const MODULES_EVERY_S: f64 = 1.0;

/// How far back the growth of caches is compared with that of their sites, and in which steps, seconds.
const PAST_S: f64 = 60.0;
/// See [`PAST_S`].
const PAST_STEP_S: f64 = 10.0;

/// The kernel while it is watched.
pub(super) struct Kernel {
    /// `None` while tracing is stopped.
    tracker: Option<KernelTracker>,
    status: Vec<KernelSetStatus>,
    process: Arc<Process>,
    plugins: Vec<Plugin>,
    symbols: Kallsyms,
    tracer: GlobSet,
    flags: GfpFlags,
    caches: GlobSet,
    modules: GlobSet,
    sites: HashMap<SiteKey, Known>,
    at_start: Statistics,
    /// What was claimed and counted up to a minute ago, by time, oldest first.
    past: VecDeque<(f64, Earlier)>,
    now: Statistics,
    /// Whether the kernel gives objects of a cache back when memory is short.
    reclaimable: HashMap<String, bool>,
    settings: ProbeSettings,
    purse: Purse,
    /// The finer samples that were given up because of their cost.
    finer: Vec<u64>,
    /// What there was to say last of books that were closed since the last snapshot.
    closed: Vec<ProcessSample>,
    /// What the last snapshot said of the kernel as a whole.
    summary: Arc<KernelSummary>,
    /// Why allocations may be counted by two probe sets.
    counted_twice: Option<String>,
    /// Filters that let nothing through, as far as can be told.
    unknown_caches: Vec<String>,
    next_modules_s: f64,
    /// Nothing is attached until then, because the budget could not be kept.
    stopped_until_s: Option<f64>,
    cpu_at_start_s: f64,
}

/// An allocation or free of a trace.
pub struct KernelEvent {
    /// What happened.
    pub event: Event,
    /// Where its block was allocated, with frames.
    pub site: Arc<Site>,
    /// What is known of that.
    pub origin: Arc<Origin>,
    /// The function or tracepoint that tells of it; of an implicit free, the one that told of the allocation.
    pub function: String,
}

/// A site and what is needed to read it.
struct Known {
    site: Arc<Site>,
    origin: Arc<Origin>,
    cohorts: SiteCohorts,
    /// It passes the filters.
    shown: bool,
    complete: bool,
}

impl Kernel {
    /// Attaches what the settings want; `None` when the kernel is no target.
    ///
    /// # Errors
    /// A filter that this kernel does not know, a missing privilege or feature, or nothing can be attached.
    pub(super) fn start(
        config: &Config,
        plugins: &[Plugin],
        instance: u32,
        trace_events: bool,
    ) -> Result<Option<Kernel>> {
        let k = &config.kernel;
        if !k.enabled {
            return Ok(None);
        }
        let plugins: Vec<Plugin> = plugins.iter().filter(|p| p.kernel.is_some()).cloned().collect();
        if plugins.is_empty() {
            return Err(Error::config(
                "every probe set of the kernel is switched off ([plugins.NAME] enabled = false)",
            ));
        }
        // Other memory comes from no cache: all of it would be left out.
        let has_caches = |p: &Plugin| p.kernel.as_ref().is_some_and(|s| s.spec.domain == KernelDomain::Slab);
        let plugins: Vec<Plugin> = plugins.into_iter().filter(|p| k.caches.is_empty() || has_caches(p)).collect();
        if plugins.is_empty() {
            return Err(Error::config("kernel.caches: no probe set for slab caches is switched on (kernel-slab)"));
        }
        let flags = GfpFlags::read();
        let mut symbols = Kallsyms::read();
        let (inner, counted_twice) = inner(&plugins, &symbols);
        let settings = ProbeSettings {
            backend: match k.backend {
                KernelBackend::Auto => None,
                KernelBackend::Tracepoint => Some(memleak_probes::kernel::KernelBackend::Tracepoint),
                KernelBackend::Fentry => Some(memleak_probes::kernel::KernelBackend::Fentry),
                KernelBackend::Kprobe => Some(memleak_probes::kernel::KernelBackend::Kprobe),
            },
            symbols: symbols.addresses(functions(&plugins)),
            sets: plugins.iter().filter_map(|p| Some(p.kernel.as_ref()?.spec.clone())).collect(),
            max_outstanding: k.max_outstanding,
            max_sites: k.max_sites,
            max_frames: config.collector.max_frames,
            // A trace is asked for in order to see everything.
            sample_bytes: if trace_events { 0 } else { k.sample_bytes.0 },
            filter: filter(k, &flags)?,
            inner,
            movable_pages: k.movable_pages,
            cohort: 0,
            trace_events,
        };
        if let Some(why) = symbols.missing().filter(|_| !k.modules.is_empty()) {
            return Err(Error::config(format!("kernel.modules: no site can be told to belong to a module: {why}")));
        }
        let at_start = Statistics::read();
        let unknown_caches = at_start.caches.as_ref().map_or_else(Vec::new, |known| unknown_caches(&k.caches, known));
        let tracker = KernelTracker::start(&settings)?;
        // Stacks begin in our own programs.
        symbols.reread();
        Ok(Some(Kernel {
            status: tracker.status().to_vec(),
            tracker: Some(tracker),
            process: Arc::new(Process { instance, comm: COMM.into(), ..Process::default() }),
            plugins,
            symbols,
            tracer: globs(&TRACER.map(str::to_owned))?,
            flags,
            caches: globs(&k.caches)?,
            modules: globs(&k.modules)?,
            sites: HashMap::new(),
            now: Statistics::default(),
            at_start,
            past: VecDeque::new(),
            reclaimable: HashMap::new(),
            settings,
            purse: Purse::new(k.budget.filter(|_| !trace_events)),
            finer: Vec::new(),
            closed: Vec::new(),
            summary: Arc::default(),
            counted_twice,
            unknown_caches,
            next_modules_s: 0.0,
            stopped_until_s: None,
            cpu_at_start_s: machine_cpu_s(),
        }))
    }

    /// What stands for the kernel among the processes.
    pub(super) fn process(&self) -> &Arc<Process> {
        &self.process
    }

    /// Name of one of its probe sets.
    pub(super) fn probe_set_name(&self, number: u32) -> Option<&str> {
        self.plugins.iter().find(|p| p.spec.number == number).map(|p| p.spec.name.as_str())
    }

    /// The ways in which its probe sets are attached.
    pub(super) fn backends(&self) -> String {
        let mut ways: Vec<_> = self.status.iter().filter_map(|s| Some(s.state.as_ref().ok()?.0)).collect();
        ways.sort_unstable();
        ways.dedup();
        ways.iter().map(|way| way.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// What became of each probe set.
    pub(super) fn statuses(&self) -> Vec<PluginStatus> {
        self.status.iter().map(|status| self.status(status)).collect()
    }

    /// Which frees cannot be followed, by probe set, and why.
    pub(super) fn blind_spots(&self) -> Vec<(String, String)> {
        let name = |s: &KernelSetStatus| self.probe_set_name(s.number).unwrap_or("?").to_owned();
        self.status.iter().filter_map(|s| Some((name(s), s.blind.clone()?))).collect()
    }

    /// Whether it is traced within a budget, which must be looked after.
    pub(super) fn is_budgeted(&self) -> bool {
        self.tracker.is_some() && self.purse.budget().is_some()
    }

    /// Why functions or allocation flags have no names, allocations count twice, or a filter matches nothing, and what to
    /// do.
    pub(super) fn missing_names(&self) -> Vec<String> {
        let symbols = self.symbols.missing().map(str::to_owned);
        let flags = self.flags.known().is_empty().then(|| {
            "allocation flags have no names: mount tracefs (mount -t tracefs tracefs /sys/kernel/tracing)".to_owned()
        });
        symbols.into_iter().chain(flags).chain(self.counted_twice.clone()).chain(self.unknown_caches.clone()).collect()
    }

    fn status(&self, status: &KernelSetStatus) -> PluginStatus {
        let state = match &status.state {
            Ok((backend, points)) => PluginState::Attached {
                file: format!("the kernel, by {backend}"),
                functions: (points.iter())
                    .map(|point| Attached { symbol: point.clone(), placement: Ok(Placement::ENTRY) })
                    .collect(),
            },
            Err(reason) => PluginState::Failed { file: "the kernel".into(), reason: reason.clone() },
        };
        PluginStatus { probe_set: self.probe_set_name(status.number).unwrap_or("?").into(), state }
    }

    /// Notices modules that have come or gone, and keeps the budget: what there is to tell of that. While a window of a
    /// process is open (`hurried`), what takes long is put off.
    ///
    /// # Errors
    /// The programs' counters cannot be read.
    pub(super) fn follow(&mut self, now_s: f64, hurried: bool, next_instance: &mut u32) -> Result<Option<Notice>> {
        if !hurried && now_s >= self.next_modules_s {
            self.next_modules_s = now_s + MODULES_EVERY_S;
            if self.symbols.refresh() {
                tracing::debug!("modules have come or gone; names read again");
            }
        }
        if let Some(until_s) = self.stopped_until_s {
            let until_s = if hurried { until_s + PATIENCE_S } else { until_s };
            if now_s < until_s || !self.load_again(now_s) {
                return Ok(None);
            }
        }
        let Some(tracker) = &self.tracker else { return Ok(None) };
        match self.purse.tick(now_s, tracker)? {
            Verdict::Within => Ok(None),
            Verdict::Above if hurried && !self.purse.is_deep_in_debt() => Ok(None),
            Verdict::Above if self.settings.sample_bytes < COARSEST => {
                self.finer.push(self.settings.sample_bytes);
                self.purse.step_down();
                let mean_bytes = match self.settings.sample_bytes {
                    0 => FIRST_SAMPLE,
                    n => (n * COARSER).min(COARSEST),
                };
                self.sample(mean_bytes, true, now_s, next_instance)
            }
            // Loading takes long, and this has waited for minutes.
            Verdict::Ample if hurried => Ok(None),
            Verdict::Ample => match self.finer.pop() {
                Some(mean_bytes) => {
                    self.purse.step_up();
                    self.sample(mean_bytes, false, now_s, next_instance)
                }
                None => Ok(None),
            },
            Verdict::Above => {
                self.close_books(next_instance)?;
                self.tracker = None;
                self.purse.note_stop();
                self.stopped_until_s = Some(now_s + COOL_DOWN_S);
                let (process, why) = (Arc::clone(&self.process), StopReason::Slowdown);
                Ok(Some(Notice::Stopped { process, why, cool_down_s: COOL_DOWN_S }))
            }
        }
    }

    /// Records from now on one allocation in so many bytes, or all (0).
    fn sample(
        &mut self,
        mean_bytes: u64,
        too_costly: bool,
        now_s: f64,
        next_instance: &mut u32,
    ) -> Result<Option<Notice>> {
        // They were kept with the sample so far.
        self.close_books(next_instance)?;
        self.settings.sample_bytes = mean_bytes;
        let process = Arc::clone(&self.process);
        Ok(self.load_again(now_s).then_some(Notice::Sampled { process, mean_bytes, too_costly }))
    }

    /// Loads and attaches the programs again, for what is outstanding to be counted from now on; true when that went well.
    /// When it did not, which ends nothing else, it is tried again after a cool-down.
    fn load_again(&mut self, now_s: f64) -> bool {
        // One at a time: the tables are large.
        self.tracker = None;
        self.at_start = Statistics::read();
        self.past.clear();
        match KernelTracker::start(&self.settings) {
            Ok(tracker) => {
                self.status = tracker.status().to_vec();
                self.tracker = Some(tracker);
                self.symbols.reread();
                self.stopped_until_s = None;
                self.purse.start_anew(now_s);
                true
            }
            Err(e) => {
                tracing::warn!("the kernel is not traced now; tried again in {COOL_DOWN_S} s: {e}");
                self.stopped_until_s = Some(now_s + COOL_DOWN_S);
                false
            }
        }
    }

    /// Numbers from before and after a change cannot be compared: the kernel becomes another instance.
    fn close_books(&mut self, next_instance: &mut u32) -> Result<()> {
        let last = self.process_sample(StackCounts::default())?;
        self.closed.push(ProcessSample { alive: false, kernel: Some(Arc::clone(&self.summary)), ..last });
        self.purse.close_books();
        self.cpu_at_start_s = machine_cpu_s();
        self.process = Arc::new(Process { instance: *next_instance, ..Process::clone(&self.process) });
        *next_instance += 1;
        self.sites.clear();
        // What is outstanding is counted anew from here on.
        self.at_start = Statistics::read();
        self.past.clear();
        Ok(())
    }

    /// Waits for events of a trace, at most `timeout`.
    ///
    /// # Errors
    /// When polling fails.
    pub(super) fn poll(&self, timeout: Duration) -> Result<()> {
        match &self.tracker {
            Some(tracker) => Ok(tracker.poll(timeout)?),
            None => {
                std::thread::sleep(timeout);
                Ok(())
            }
        }
    }

    /// The next event of a trace that passes the filters.
    ///
    /// # Errors
    /// What is known of its site cannot be read.
    pub(super) fn next_event(&mut self) -> Result<Option<KernelEvent>> {
        while let Some(event) = self.tracker.as_ref().and_then(KernelTracker::next_event) {
            let raw = event.site;
            let key = SiteKey { instance: self.process.instance, probe_set: raw.probe_set, stack: raw.stack };
            self.know(raw, key)?;
            let function = match event.kind {
                EventKind::ImplicitFree => None,
                EventKind::Alloc | EventKind::Free => {
                    self.tracker.as_ref().map(|t| t.function_name(event.name).to_owned())
                }
            };
            if let Some(known) = self.sites.get(&key).filter(|known| known.shown) {
                self.symbolize(&known.site);
                return Ok(Some(KernelEvent {
                    function: function.unwrap_or_else(|| known.site.function.to_string()),
                    site: Arc::clone(&known.site),
                    origin: Arc::clone(&known.origin),
                    event,
                }));
            }
        }
        Ok(None)
    }

    /// Makes a site known that is not.
    fn know(&mut self, raw: memleak_probes::SiteKey, key: SiteKey) -> Result<()> {
        if !self.sites.contains_key(&key) {
            let known = self.new_site(raw, key)?;
            self.sites.insert(key, known);
        }
        Ok(())
    }

    /// Reads the totals of all sites into a snapshot. With `next_generation` the birth generation changes.
    pub(super) fn read(
        &mut self,
        generations: &Generations,
        next_generation: bool,
        time_s: f64,
        started_ns: u64,
        sites: &mut Vec<SiteSample>,
    ) -> Result<Vec<ProcessSample>> {
        // New sites may lie in new modules.
        self.symbols.refresh();
        self.now = Statistics::read();
        let first = sites.len();
        let raw = self.tracker.as_ref().map_or_else(|| Ok(Vec::new()), KernelTracker::read_sites)?;
        let mut stacks = StackCounts { by_tables: true, ..StackCounts::default() };
        // A site is made before its first allocation is known to have succeeded.
        for (raw_key, totals) in raw.iter().filter(|(_, totals)| totals.allocated_count > 0) {
            let key = SiteKey { instance: self.process.instance, probe_set: raw_key.probe_set, stack: raw_key.stack };
            self.know(*raw_key, key)?;
            let Some(known) = self.sites.get_mut(&key) else { continue };
            let cohorts = known.cohorts.read(generations, totals, time_s);
            if next_generation {
                known.cohorts.close_generation(generations, totals);
            }
            stacks.taken += totals.allocated_count;
            stacks.complete += if known.complete { totals.allocated_count } else { 0 };
            if !known.shown {
                continue;
            }
            let age_ns = totals.last_allocation_ns.saturating_sub(started_ns);
            sites.push(SiteSample {
                site: Arc::clone(&known.site),
                totals: to_totals(totals),
                stderr: StandardErrors { bytes: totals.bytes_variance.sqrt(), count: totals.count_variance.sqrt() },
                last_allocation_s: (age_ns / 1_000_000) as f64 / 1e3,
                cohorts,
                lifetimes: totals.lifetimes,
                reachability: None,
                kernel: Some(Arc::new(KernelSample {
                    origin: Arc::clone(&known.origin),
                    unseen_frees: totals.unseen_frees,
                    ..KernelSample::default()
                })),
            });
        }
        if next_generation {
            self.settings.cohort = self.settings.cohort.wrapping_add(1);
            if let Some(tracker) = &mut self.tracker {
                tracker.next_cohort();
            }
        }
        let mut sample = self.process_sample(stacks)?;
        let blind = self.status.iter().any(|s| s.blind.is_some()) || sample.losses.partial_ranges > 0;
        let known = &mut self.reclaimable;
        let mut reclaimable = |cache: &str| match known.get(cache) {
            Some(known) => *known,
            None => *known.entry(cache.to_owned()).or_insert(is_reclaimable(cache)),
        };
        let new = sites.get_mut(first..).unwrap_or_default();
        if self.past.back().is_none_or(|(at_s, _)| time_s >= at_s + PAST_STEP_S) {
            self.past.push_back((time_s, Earlier { claims: claims(new), statistics: self.now.clone() }));
        }
        while self.past.len() > 1 && self.past.front().is_some_and(|(at_s, _)| *at_s < time_s - PAST_S) {
            self.past.pop_front();
        }
        let recently = self.past.front().map(|(_, earlier)| earlier);
        let mut summary = judge(new, &self.at_start, recently, &self.now, blind, &mut reclaimable);
        summary.probe_sets = self.status.iter().map(|s| self.set_state(s)).collect();
        summary.missed_events = sample.losses.missed_events;
        self.summary = Arc::new(summary);
        sample.kernel = Some(Arc::clone(&self.summary));
        let mut samples = std::mem::take(&mut self.closed);
        samples.push(sample);
        Ok(samples)
    }

    /// Events that the kernel kept from the programs.
    fn missed_events(&self) -> u64 {
        self.tracker.as_ref().and_then(|t| t.run_stats().ok()).map_or(0, |s| s.misses)
    }

    fn set_state(&self, status: &KernelSetStatus) -> SetState {
        SetState {
            name: self.probe_set_name(status.number).unwrap_or("?").to_owned(),
            backend: status.state.as_ref().ok().map(|(backend, _)| backend.to_string()),
            failed: status.state.as_ref().err().cloned(),
            blind: status.blind.clone(),
        }
    }

    fn process_sample(&self, stacks: StackCounts) -> Result<ProcessSample> {
        let counters = self.tracker.as_ref().map_or_else(|| Ok(Counters::default()), KernelTracker::read_counters)?;
        let sample_bytes = self.settings.sample_bytes;
        Ok(ProcessSample {
            process: Arc::clone(&self.process),
            alive: true,
            mode: if sample_bytes == 0 { Mode::Exact } else { Mode::Sampled },
            sampling: (sample_bytes > 0).then_some(Sampling {
                mean_bytes: sample_bytes,
                allocated_bytes: counters.allocated_bytes,
                allocated_count: counters.allocated_count,
            }),
            hits: counters.hits,
            unmatched_frees: counters.unmatched_frees,
            losses: Losses { missed_events: self.missed_events(), ..to_losses(&counters) },
            stacks,
            rss_bytes: Some(self.now.kernel_bytes()),
            cpu_s: Some(machine_cpu_s() - self.cpu_at_start_s),
            overhead_s: self.purse.spent_s(),
            budget: self.purse.budget(),
            stopped: self.stopped_until_s.map(|_| StopReason::Slowdown),
            hard_stops: self.purse.stops(),
            ..ProcessSample::default()
        })
    }
}

/// Names of all functions that any set may probe.
fn functions(plugins: &[Plugin]) -> impl Iterator<Item = &String> {
    plugins.iter().filter_map(|p| p.kernel.as_ref()).flat_map(|k| k.spec.functions.iter().flat_map(|f| &f.symbols))
}

/// Code whose allocations belong to other probe sets; and why some may be counted twice, if not all of it is known.
fn inner(plugins: &[Plugin], symbols: &Kallsyms) -> (Vec<InnerCode>, Option<String>) {
    let mut code = Vec::new();
    let mut left_out = 0;
    for plugin in plugins {
        let Some(kernel) = plugin.kernel.as_ref().filter(|k| !k.inner.is_empty()) else { continue };
        let room = MAX_INNER.saturating_sub(code.len());
        let (ranges, more) = symbols.ranges(&kernel.inner, room);
        left_out += more;
        code.extend(ranges.into_iter().map(|(start, end)| InnerCode { start, end, probe_set: plugin.spec.number }));
    }
    let is_any = plugins.iter().filter_map(|p| p.kernel.as_ref()).any(|k| !k.inner.is_empty());
    let why = match symbols.missing() {
        Some(_) if is_any => Some("without the kernel's symbols it cannot be told by whom they are taken".to_owned()),
        None if left_out > 0 => Some(format!("{left_out} functions of inner have no room, at most {MAX_INNER} have")),
        _ => None,
    };
    let why = why.map(|why| {
        format!("memory that one probe set takes from another, such as pages of slab caches, may count in both: {why}")
    });
    (code, why)
}

/// CPU time that the machine has used since it was started, seconds.
fn machine_cpu_s() -> f64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let Some(line) = text.lines().next() else { return 0.0 };
    let ticks: Vec<f64> = line.split_ascii_whitespace().skip(1).filter_map(|f| f.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guest time is part of user time.
    let busy: f64 = ticks.iter().enumerate().filter(|(i, _)| matches!(i, 0..=2 | 5 | 6)).map(|(_, t)| t).sum();
    // SAFETY: no pointers are passed.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    busy / per_second.max(1) as f64
}
