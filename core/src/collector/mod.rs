//! The collector: watched processes in, snapshots out.
//!
//! Owns the kernel side ([`Tracker`]) and knows which processes are watched, which probe sets were attached to which
//! of their files, and what the numbers in the maps mean. It decides nothing about leaks. [`Collector::poll`] follows
//! the lives of processes, [`Collector::snapshot`] reads the totals.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use memleak_probes::{ErrorKind as ProbeErrorKind, Prices, ProcessEvent, Tracker};

use crate::config::{Backend, BudgetSettings, Config, Placement, Stacks};
use crate::governor::Governor;
use crate::live;
use crate::maps::Maps;
use crate::plugin::{self, Plugin};
use crate::process::{self, ProcDir, ProcessStat};
use crate::python::{Interpreter, Unread};
use crate::recording::Location;
use crate::snapshot::{Process, Site, SiteKey};
use crate::symbolize::{self, Symbolizer};
use crate::target::Matcher;
use crate::unwind::cache::Cache;
use crate::unwind::{TableState, Unwinder};
use crate::watchdog::Watchdog;
use crate::{Error, ErrorKind, Result};

mod attach;
mod children;
mod cohorts;
mod coverage;
mod end;
mod kernel;
mod kernel_budget;
mod launch;
mod notice;
mod read;
mod scans;
mod sites;
mod userspace;
mod windows;

pub use attach::{PluginState, PluginStatus};
use cohorts::Generations;
pub use end::{End, Ended};
use kernel::Kernel;
pub use kernel::KernelEvent;
use launch::Launched;
pub use notice::Notice;
use sites::KnownSite;
use userspace::Userspace;

/// How often it is looked whether unwind tables are ready that a process waits for.
const TICK: Duration = Duration::from_millis(10);

/// Instance number of the kernel, when it is watched.
const KERNEL_INSTANCE: u32 = 1;

/// By then a program has mapped the libraries that it was linked to, seconds.
const STARTED_BY_S: f64 = 1.0;

/// How often it is looked whether a process may exit that waits for a scan.
const EXIT_TICK: Duration = Duration::from_millis(5);

/// Sites of a process instance that has ended are read once more and then forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Running,
    /// Has ended; the next snapshot is its last.
    Ended,
}

/// What a collector is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To watch its targets for as long as they live.
    Watch,
    /// To show every event: without a budget.
    Trace,
    /// To account for a launched command and all of its descendants from their first instruction to their end.
    Run,
}

/// A watched process instance.
struct Watched {
    process: Arc<Process>,
    life: Life,
    /// Number of the target that it meets, from 0.
    target: usize,
    /// Its forked children are watched too: it descends from a launched command.
    followed: bool,
    status: Vec<PluginStatus>,
    /// People have been told that it is watched.
    announced: bool,
    /// Its unwind tables are being made, and nothing is attached before.
    waits: bool,
    since_s: f64,
    usage: process::Usage,
    growth: coverage::Growth,
    governor: Governor,
    /// When the last window was opened, CLOCK_MONOTONIC.
    window_opened_ns: u64,
    /// How it ended, and what was outstanding when it called exit().
    ended: Ended,
}

/// See the module.
pub struct Collector {
    tracker: Userspace,
    /// The kernel, when it is a target.
    kernel: Option<Kernel>,
    plugins: Vec<Plugin>,
    matcher: Matcher,
    /// Nothing can be added any more once all of these have ended: only pids and commands were asked for.
    closed_set: bool,
    watched: HashMap<u32, Watched>,
    /// Pid and start of every process that is watched or has been refused.
    known: HashSet<(u32, u64)>,
    /// Behind the tracker, which is thus dropped first: it helps while there are probes. There are none without processes, and
    /// the kernel's need it only with a budget.
    watchdog: Option<Watchdog>,
    /// Behind the tracker, too: whoever is let go on at the end is not stopped once more.
    launched: Vec<Launched>,
    /// Forked by watched processes and not watched, as far as they may have breakpoints.
    children: Vec<children::Child>,
    /// When children may be released again, seconds.
    next_release_s: f64,
    symbolizer: Symbolizer,
    sites: HashMap<SiteKey, KnownSite>,
    /// Instances with new stacks that ended in code of which nothing is known.
    unclear: HashSet<u32>,
    /// Where the stacks of new sites lie, until a recording takes them; `None` without a recording.
    locations: Option<HashMap<SiteKey, Vec<Location>>>,
    generations: Generations,
    libraries: attach::Libraries,
    /// Without it stacks are walked by frame pointers.
    unwinder: Option<Unwinder>,
    /// Python interpreters of processes; or why their frames are not read.
    pythons: HashMap<u32, std::result::Result<Interpreter, Unread>>,
    /// The setting `python_frames`.
    reads_python: bool,
    notices: Vec<Notice>,
    scans: scans::Scans,
    /// What tracing may cost, by target.
    budgets: Vec<BudgetSettings>,
    /// CPU seconds per second that tracing all targets may cost.
    total_budget: f64,
    /// When mappings may be looked at again, seconds.
    next_look_s: f64,
    purpose: Purpose,
    /// How processes have ended, until somebody asks.
    ended: HashMap<u32, Ended>,
    command_ended: bool,
    command_status: Option<std::process::ExitStatus>,
    next_instance: u32,
    snapshots: u64,
    started: Instant,
    started_ns: u64,
    /// When the sites were last read.
    last_read: Instant,
}

impl Collector {
    /// Loads the kernel side and starts watching what the settings name; launched commands run when this returns.
    ///
    /// # Errors
    /// Wrong settings or manifests, a missing privilege or kernel feature, a pid that does not exist, or a command
    /// that cannot be started.
    pub fn start(config: &Config, purpose: Purpose) -> Result<Collector> {
        let trace_events = purpose == Purpose::Trace;
        let (kernel_plugins, plugins): (Vec<Plugin>, Vec<Plugin>) =
            plugin::load(&config.plugins)?.into_iter().filter(|p| p.enabled).partition(|p| p.kernel.is_some());
        if plugins.is_empty() && !config.targets.is_empty() {
            return Err(Error::config("every probe set is switched off ([plugins.NAME] enabled = false)"));
        }
        let mut matcher = Matcher::new(&config.targets)?;
        matcher.check_pids()?;
        let c = &config.collector;
        // Before anything is loaded: the helper must not hold what it is to see closed.
        let budgets: Vec<BudgetSettings> = (config.targets.iter())
            .map(|target| c.budget.of(target))
            // A trace is asked for in order to see everything.
            .map(|budget| BudgetSettings { share: budget.share.filter(|_| !trace_events), ..budget })
            .collect();
        let of_kernel = config.kernel.enabled && config.kernel.budget.is_some();
        let watchdog = (of_kernel || !config.targets.is_empty()).then(Watchdog::start).transpose()?;
        let mut unwinder = match c.stacks {
            Stacks::Auto => Unwinder::start(c.unwind_cache.folder().map(Cache::new))?,
            Stacks::FramePointers => None,
        };
        if let Some(unwinder) = &mut unwinder {
            prepare_tables(unwinder, &mut matcher)?;
        }
        let settings = memleak_probes::Settings {
            backend: match c.backend {
                Backend::Auto => None,
                Backend::Session => Some(memleak_probes::Backend::Session),
                Backend::Multi => Some(memleak_probes::Backend::Multi),
                Backend::Perf => Some(memleak_probes::Backend::Perf),
                Backend::PerfPlain => Some(memleak_probes::Backend::PerfPlain),
            },
            max_outstanding: c.max_outstanding,
            max_sites: c.max_sites,
            max_threads: c.max_threads,
            max_frames: c.max_frames,
            min_size: c.min_size.0,
            // A trace shows every call.
            sample_bytes: if trace_events { 0 } else { c.sample_bytes.0 },
            trace_events,
            at_entry: c.placement == Placement::Entry,
            stop_children: purpose == Purpose::Run,
        };
        // Targets stay what they are: nothing that needs it can come later.
        let mut tracker = Userspace::load(!config.targets.is_empty() || !config.kernel.enabled, settings)?;
        if let (Some(tracker), Some(watchdog)) = (tracker.loaded_mut(), &watchdog) {
            tracker.set_witness(watchdog.witness());
        }
        let mut collector = Collector {
            watchdog,
            tracker,
            plugins,
            matcher,
            kernel: Kernel::start(config, &kernel_plugins, KERNEL_INSTANCE, trace_events)?,
            closed_set: !config.kernel.enabled && !config.targets.iter().any(|t| t.pid.is_empty() && t.searches()),
            watched: HashMap::new(),
            known: HashSet::new(),
            launched: Vec::new(),
            children: Vec::new(),
            next_release_s: 0.0,
            symbolizer: Symbolizer::with_limits(symbolize::Limits {
                worker: Some(symbolize::worker::OWN_PROGRAM.into()),
                debuginfod: symbolize::debuginfod::Settings::from_environment(),
                ..symbolize::Limits::default()
            }),
            sites: HashMap::new(),
            unclear: HashSet::new(),
            locations: config.recording.path.is_some().then(HashMap::new),
            generations: Generations::new(config.interval.as_secs_f64()),
            libraries: attach::Libraries::default(),
            unwinder,
            pythons: HashMap::new(),
            reads_python: c.python_frames,
            notices: Vec::new(),
            scans: scans::Scans::new(config.reachability.clone()),
            budgets,
            total_budget: c.budget.total * std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64),
            next_look_s: 0.0,
            purpose,
            ended: HashMap::new(),
            command_ended: false,
            command_status: None,
            next_instance: if config.kernel.enabled { KERNEL_INSTANCE + 1 } else { 1 },
            snapshots: 0,
            started: Instant::now(),
            started_ns: monotonic_ns(),
            last_read: Instant::now(),
        };
        for (number, target) in config.targets.iter().enumerate().filter(|(_, t)| !t.command.is_empty()) {
            collector.launch(&target.command, number)?;
        }
        if let Some(kernel) = &collector.kernel {
            let process = Arc::clone(kernel.process());
            collector.notices.push(Notice::Watching(Arc::clone(&process), kernel.statuses()));
            let gaps = collector.kernel_gaps();
            collector
                .notices
                .extend(gaps.into_iter().map(|what| Notice::Limited { process: Arc::clone(&process), what }));
        }
        collector.scan()?;
        // Those that are found meanwhile are none of this: there may always be more of them.
        let end_s = collector.now_s() + attach::WAIT_FOR_TABLES_S;
        while collector.is_waiting() && collector.now_s() < end_s {
            collector.poll(TICK)?;
        }
        Ok(collector)
    }

    /// How uprobes are attached; without processes to watch, how the kernel's probe sets are.
    pub fn backend(&self) -> String {
        match (self.tracker.loaded(), &self.kernel) {
            (Some(tracker), _) => tracker.backend().to_string(),
            (None, Some(kernel)) => kernel.backends(),
            (None, None) => String::new(),
        }
    }

    /// The kernel side of processes, for `trace` and `doctor`; `None` when only the kernel is watched.
    pub fn tracker(&self) -> Option<&Tracker> {
        self.tracker.loaded()
    }

    /// What hits cost a watched process.
    pub fn prices(&self) -> Prices {
        self.tracker.loaded().map(Tracker::prices).unwrap_or_default()
    }

    /// Name and unwind table of every mapped file of a process, and how many pieces of its code had no room; empty when
    /// stacks are walked by frame pointers.
    pub fn unwind_tables(&self, instance: u32) -> (Vec<(String, TableState)>, usize) {
        self.unwinder.as_ref().map_or((Vec::new(), 0), |unwinder| unwinder.tables_of(instance))
    }

    /// Name of every file whose code a process has mapped, and where its functions' names come from.
    pub fn symbol_sources(&mut self, instance: u32) -> Vec<(String, String)> {
        self.symbolizer.sources(instance)
    }

    /// Version of the Python interpreter of a process, or why its frames are not read; `None` when it has none.
    pub fn python(&self, instance: u32) -> Option<std::result::Result<&str, &str>> {
        self.pythons.get(&instance).map(|p| p.as_ref().map(|p| p.version.as_str()).map_err(|e| e.why.as_str()))
    }

    /// Fills the site's frames, unless that has been done.
    pub fn symbolize(&mut self, site: &Site) {
        match &self.kernel {
            Some(kernel) if kernel.process().instance == site.key.instance => kernel.symbolize(site),
            _ => self.symbolizer.symbolize(site),
        }
    }

    /// Where the return addresses of a site lie; once per site, and only with a recording.
    pub fn take_locations(&mut self, key: SiteKey) -> Vec<Location> {
        self.locations.as_mut().and_then(|known| known.remove(&key)).unwrap_or_default()
    }

    /// The next event of a trace of the kernel that passes the filters.
    ///
    /// # Errors
    /// What is known of its site cannot be read.
    pub fn next_kernel_event(&mut self) -> Result<Option<KernelEvent>> {
        self.kernel.as_mut().map_or(Ok(None), Kernel::next_event)
    }

    /// Name of a probe set by its number.
    fn probe_set_name(&self, number: u32) -> &str {
        self.plugins.iter().find(|p| p.spec.number == number).map_or("?", |p| p.spec.name.as_str())
    }

    /// What of the kernel's memory cannot be followed, or has no name, and why; empty when the kernel is no target.
    pub fn kernel_gaps(&self) -> Vec<String> {
        let Some(kernel) = &self.kernel else { return Vec::new() };
        let spots = kernel.blind_spots().into_iter();
        let spots = spots.map(|(set, why)| {
            format!(
                "{set}: frees by RCU and of many blocks at a time are not seen, such sites are unverifiable ({why})"
            )
        });
        spots.chain(kernel.missing_names()).collect()
    }

    /// The kernel's probe sets, with what became of each; empty when it is no target.
    pub fn kernel_statuses(&self) -> Vec<PluginStatus> {
        self.kernel.as_ref().map(Kernel::statuses).unwrap_or_default()
    }

    /// What people should know of since the last call.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// True when every process has ended and none can come any more.
    pub fn is_finished(&self) -> bool {
        self.closed_set && self.watched.values().all(|w| w.life == Life::Ended) && self.launched.is_empty()
    }

    /// Checks that something is watched, for a run that names its processes by pid and nothing else; waits a moment for
    /// programs that have just been started.
    ///
    /// # Errors
    /// Every process that was named has ended, or no probe set could be attached to any of them: with the reasons.
    pub fn require_attached(&mut self) -> Result<()> {
        if !self.closed_set || !self.launched.is_empty() || self.next_instance == 1 {
            return Ok(());
        }
        let end_s = self.now_s() + STARTED_BY_S;
        loop {
            let why: Vec<Option<String>> =
                self.statuses().map(|(process, statuses)| live::why_not_attached(process, statuses)).collect();
            if why.iter().any(Option::is_none) {
                return Ok(());
            }
            let reasons: Vec<String> = why.into_iter().flatten().collect();
            let ended = self.is_finished();
            if ended || self.now_s() >= end_s {
                let gone = self.watched.values().map(|w| format!("process {} has ended", w.process.pid));
                let what = if ended { gone.collect::<Vec<_>>().join(", ") } else { reasons.join("; ") };
                return Err(Error::new(ErrorKind::Target, format!("nothing to watch: {what}")));
            }
            self.poll(Duration::from_millis(20))?;
            self.scan()?;
        }
    }

    /// Processes watched now, with what became of each probe set.
    pub fn statuses(&self) -> impl Iterator<Item = (&Arc<Process>, &[PluginStatus])> {
        self.watched.values().filter(|w| w.life == Life::Running).map(|w| (&w.process, w.status.as_slice()))
    }

    /// Seconds since the collector started.
    pub fn now_s(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Waits for events of processes, at most `timeout`, and follows them.
    ///
    /// # Errors
    /// When the kernel side cannot be read.
    pub fn poll(&mut self, timeout: Duration) -> Result<()> {
        let timeout = if self.is_waiting() { timeout.min(TICK) } else { timeout };
        // Nobody tells us that a scan is over.
        let timeout = if self.exit_waits() { timeout.min(EXIT_TICK) } else { timeout };
        let timeout = timeout.min(self.until_governed());
        match (self.tracker.loaded_mut(), &self.kernel) {
            (Some(tracker), _) => tracker.poll(timeout)?,
            (None, Some(kernel)) => kernel.poll(timeout)?,
            (None, None) => std::thread::sleep(timeout),
        }
        self.end_exit_scans()?;
        // First the windows: they are short.
        let closed = self.govern()?;
        let (now_s, hurried) = (self.now_s(), self.has_open_window());
        if let Some(kernel) = &mut self.kernel {
            self.notices.extend(kernel.follow(now_s, hurried, &mut self.next_instance)?);
        }
        self.guard(closed);
        if let (Some(unwinder), Some(tracker)) = (&mut self.unwinder, self.tracker.loaded_mut()) {
            unwinder.apply(tracker);
        }
        self.attach_to_waiting();
        while let Some(event) = self.tracker.loaded_mut().and_then(|t| t.next_process_event()) {
            match event {
                ProcessEvent::Exit { pid, instance, status } => {
                    self.end_with(instance, End::of_status(status));
                    self.descendant_ended(pid);
                }
                ProcessEvent::Exec { pid, instance } => {
                    self.forget_child(pid);
                    let followed = instance.and_then(|i| self.followed_target(i));
                    if let Some(instance) = instance {
                        self.end_with(instance, End::Exec);
                    }
                    self.started_program(pid, followed, true);
                }
                ProcessEvent::Fork { instance, child, shares_memory, .. } => {
                    let followed = self.followed_target(instance);
                    self.descends(child, followed);
                    if !shares_memory {
                        self.started_program(child, followed, false);
                        self.note_child(instance, child);
                    }
                }
                ProcessEvent::Exiting { pid, instance } => self.exiting(pid, instance),
                ProcessEvent::Load { instance, .. } => self.loaded(instance),
            }
        }
        self.release_children();
        self.reap();
        Ok(())
    }

    /// Looks for processes that the settings name and that are not watched yet, and for watched ones that have gone.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn scan(&mut self) -> Result<()> {
        for (process, target) in self.matcher.scan(&self.known)? {
            self.watch(process.pid, target, false, false);
        }
        // Events of exits can be lost when their ring buffer is full.
        let gone: Vec<u32> = (self.watched.iter())
            .filter(|(_, w)| w.life == Life::Running && !process::is_alive(w.process.pid, w.process.start_ticks))
            .map(|(i, _)| *i)
            .collect();
        for instance in gone {
            self.end(instance);
        }
        // Its libraries may have been mapped before the dynamic linker's hook was in place.
        let now_s = self.now_s();
        let quiet = self.watched.iter().filter(|(_, w)| w.life == Life::Running && !w.announced && !w.waits);
        let quiet: Vec<(u32, bool)> = quiet.map(|(i, w)| (*i, now_s - w.since_s > STARTED_BY_S)).collect();
        for (instance, late) in quiet {
            self.attach_to(instance);
            self.announce(instance, late);
        }
        Ok(())
    }

    /// The target of an instance whose children are watched too.
    fn followed_target(&self, instance: u32) -> Option<usize> {
        self.watched.get(&instance).filter(|w| w.followed).map(|w| w.target)
    }

    /// A process runs a new program, or is a new child; `followed` is the target that it belongs to by descent.
    fn started_program(&mut self, pid: u32, followed: Option<usize>, by_exec: bool) {
        let launched = self.launched.iter().find(|l| l.pid == pid).map(|l| l.target);
        if let Some(target) = launched.or(followed) {
            self.watch(pid, target, true, by_exec && self.is_held(pid));
        } else if let Ok(stat) = ProcessStat::read(pid)
            && let Some(target) = self.matcher.matches(&stat)
        {
            self.watch(pid, target, false, false);
        }
        if self.is_held(pid) {
            self.go_on(pid);
        }
    }

    /// Starts watching a process that meets a target. One that is `starting` has been stopped after exec, and stops when
    /// its libraries have been mapped.
    fn watch(&mut self, pid: u32, target: usize, followed: bool, starting: bool) {
        let fail = |reason: String| Notice::Failed { pid, reason };
        let stat = match ProcessStat::read(pid) {
            Ok(stat) => stat,
            // It ended meanwhile: nothing to say about most of what a machine starts.
            Err(e) => return tracing::debug!(pid, "not watched: {e:#}"),
        };
        if self
            .watched
            .values()
            .any(|w| w.life == Life::Running && w.process.pid == pid && w.process.start_ticks == stat.start_ticks)
        {
            return;
        }
        let instance = self.next_instance;
        if let Err(e) = self.tracker.get_mut().and_then(|t| Ok(t.add_target(pid, instance, starting)?)) {
            self.known.insert((pid, stat.start_ticks));
            self.notices.push(fail(e.to_string()));
            return;
        }
        self.next_instance += 1;
        self.known.insert((pid, stat.start_ticks));
        let process = Arc::new(stat.to_process(instance));
        let Some(budget) = self.budgets.get(target).copied() else { return };
        if let Err(e) = self.symbolizer.observe(&process) {
            tracing::debug!(pid, "mappings not read: {e:#}");
        }
        self.watched.insert(
            instance,
            Watched {
                process: Arc::clone(&process),
                life: Life::Running,
                target,
                followed,
                status: Vec::new(),
                announced: false,
                waits: false,
                since_s: self.now_s(),
                usage: process::Usage { rss_bytes: stat.rss_bytes, anon_bytes: None, cpu_s: stat.cpu_s },
                growth: coverage::Growth::default(),
                governor: Governor::new(budget, u64::from(instance)),
                window_opened_ns: 0,
                ended: Ended::default(),
            },
        );
        self.attach_to(instance);
        // A program that is just starting may have mapped more before the first pass got to its dynamic linker, whose
        // loads are noticed only from then on.
        self.attach_to(instance);
        let Ok(usage) = process::usage(pid, stat.start_ticks) else { return self.end(instance) };
        let now_s = self.now_s();
        if let Some(watched) = self.watched.get_mut(&instance) {
            watched.usage = usage;
            watched.growth = coverage::Growth::begin(&process, usage, now_s);
        }
        self.announce(instance, false);
    }

    /// Tells people that a process is watched, once: as soon as something is attached, or when that was to be expected
    /// by now (`late`). A program that has just been started has not mapped its libraries yet.
    fn announce(&mut self, instance: u32, late: bool) {
        let Some(watched) = self.watched.get_mut(&instance) else { return };
        let attached = watched.status.iter().any(|s| matches!(s.state, PluginState::Attached { .. }));
        if watched.life == Life::Running && !watched.announced && (attached || late) {
            watched.announced = true;
            self.notices.push(Notice::Watching(Arc::clone(&watched.process), watched.status.clone()));
        }
    }

    /// Ends the watch of an instance in a way that is known.
    fn end_with(&mut self, instance: u32, how: End) {
        if let Some(watched) = self.watched.get_mut(&instance) {
            watched.ended.how = how;
        }
        self.end(instance);
    }

    /// Ends the watch of an instance; its last totals are read by the next snapshot.
    fn end(&mut self, instance: u32) {
        let Some(watched) = self.watched.get_mut(&instance) else { return };
        if watched.life == Life::Ended {
            return;
        }
        watched.life = Life::Ended;
        self.known.remove(&(watched.process.pid, watched.process.start_ticks));
        if let Some(tracker) = self.tracker.loaded_mut() {
            tracker.detach(instance);
        }
        self.notices.push(Notice::Ended(Arc::clone(&watched.process)));
    }
}

/// Has unwind tables made while the programs are being loaded: for those who are there already.
fn prepare_tables(unwinder: &mut Unwinder, matcher: &mut Matcher) -> Result<()> {
    for (process, _) in matcher.scan(&HashSet::new())? {
        let dir = ProcDir::open_same(process.pid, process.start_ticks);
        if let Ok((maps, dir)) = dir.and_then(|dir| Ok((Maps::read(&dir)?, dir))) {
            unwinder.prepare(&maps, &dir);
        }
    }
    Ok(())
}

/// CLOCK_MONOTONIC in nanoseconds, the kernel side's clock.
fn monotonic_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC)
}

fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec for the kernel to write.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return 0;
    }
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}

impl From<memleak_probes::Error> for Error {
    fn from(error: memleak_probes::Error) -> Self {
        let kind = match error.kind() {
            ProbeErrorKind::Permission => ErrorKind::Permission,
            ProbeErrorKind::Target => ErrorKind::Target,
            _ => ErrorKind::Kernel,
        };
        Error::new(kind, error.to_string())
    }
}
