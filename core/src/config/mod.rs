//! Settings: what the file may say, the defaults, and the checks.
//!
//! [`Config::load`] reads a file and lays `--set` over it; the command line adds its flags the same way
//! ([`Config::resolve`]), so that everything is checked once and by the same rules. Relative paths stay relative to
//! the working directory. The environment is not read.

mod decode;
mod kernel;
mod read;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cache_folder::CacheFolder;
use crate::error::{Error, Result};
use crate::finding::Severity;
use crate::units::Bytes;

pub use decode::{MAX_PID, parse_cgroup, parse_container, parse_glob, split_command};
pub use kernel::{KernelBackend, KernelSettings};
pub use read::nearest;
pub use tree::Override;

/// All settings of a run, resolved: file, then `--set`, then flags.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Time between snapshots.
    pub interval: Duration,
    /// How long to run; `None` is until stopped or until the last target has ended.
    pub duration: Option<Duration>,
    /// What to watch.
    pub targets: Vec<TargetSpec>,
    /// Collector settings.
    pub collector: CollectorSettings,
    /// The kernel as a target.
    pub kernel: KernelSettings,
    /// Bounds of the history.
    pub history: crate::history::Bounds,
    /// Probe sets.
    pub plugins: PluginSettings,
    /// Rules.
    pub rules: RuleSettings,
    /// Alerts.
    pub alerts: AlertSettings,
    /// The HTML report.
    pub report: ReportSettings,
    /// The recording.
    pub recording: RecordingSettings,
    /// Folder with templates that win over the embedded ones; `None` uses the embedded ones.
    pub templates_dir: Option<PathBuf>,
    /// The live view.
    pub live: LiveSettings,
    /// Scans that tell leaks from caches.
    pub reachability: ReachabilitySettings,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            interval: Duration::from_secs(1),
            duration: None,
            targets: Vec::new(),
            collector: CollectorSettings::default(),
            kernel: KernelSettings::default(),
            history: crate::history::Bounds::default(),
            plugins: PluginSettings::default(),
            rules: RuleSettings::default(),
            alerts: AlertSettings::default(),
            report: ReportSettings::default(),
            recording: RecordingSettings::default(),
            templates_dir: None,
            live: LiveSettings::default(),
            reachability: ReachabilitySettings::default(),
        }
    }
}

impl Config {
    /// Reads a file (`None` starts from the defaults) and lays `sets`, each `key.path=value`, over it.
    ///
    /// # Errors
    /// The file cannot be read, or a setting is wrong; the message then has one line per problem, each with file,
    /// line and column or with the override.
    pub fn load(path: Option<&Path>, sets: &[String]) -> Result<Config> {
        let overrides = sets.iter().map(|s| Override::parse_set(s)).collect::<Result<Vec<_>, _>>();
        let overrides = overrides.map_err(|text| Error::config(format!("--set {text}")))?;
        let text = path.map(read_file).transpose()?;
        Config::resolve(path.zip(text.as_deref()), &overrides)
    }

    /// Settings from the text of a file, whose path is used in messages, and overrides; later ones win.
    ///
    /// # Errors
    /// One error for everything that is wrong, one line per problem.
    pub fn resolve(file: Option<(&Path, &str)>, overrides: &[Override]) -> Result<Config> {
        let name = file.map_or(String::new(), |(path, _)| path.display().to_string().escape_debug().to_string());
        let (mut entries, syntax) = file.map_or_else(Default::default, |(_, text)| tree::parse(text));
        if !syntax.is_empty() {
            // With broken syntax the keys cannot be trusted: complaints about them would mislead.
            return Err(describe(&name, &syntax));
        }
        let mut reader = read::Reader::default();
        for (index, over) in overrides.iter().enumerate() {
            if let Err(problem) = tree::apply(&mut entries, index, over) {
                reader.problems.push(problem);
            }
        }
        let config = decode::decode(&mut reader, entries);
        reader.finish();
        if reader.problems.is_empty() { Ok(config) } else { Err(describe(&name, &reader.problems)) }
    }
}

/// Reads a file of settings.
///
/// # Errors
/// The file cannot be read or is not UTF-8.
pub fn read_file(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| Error::io(format!("failed to read the settings {}", path.display()), e))
}

/// All problems as one error.
fn describe(file: &str, problems: &[tree::Problem]) -> Error {
    let lines: Vec<String> = problems
        .iter()
        .map(|p| match &p.origin {
            tree::Origin::File { line, column } => format!("{file}:{line}:{column}: {}", p.text),
            tree::Origin::Override { name, .. } => format!("{name}: {}", p.text),
        })
        .collect();
    Error::config(lines.join("\n"))
}

/// One thing to watch: all given conditions must hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TargetSpec {
    /// Process ids.
    pub pid: Vec<u32>,
    /// Glob over the process name (`comm`, cut to 15 bytes by the kernel, or the file name of the executable).
    pub name: Option<String>,
    /// Glob over the path of the executable.
    pub exe: Option<String>,
    /// Cgroup path below `/sys/fs/cgroup`, with everything below it; without outer slashes.
    pub cgroup: Option<String>,
    /// Id of a container, the beginning of one, or a glob over them.
    pub container: Option<String>,
    /// Glob over the name of the systemd unit; `.service` may be left out.
    pub unit: Option<String>,
    /// A command to launch and watch from its first instruction.
    pub command: Vec<String>,
    /// What tracing it may cost; `None` follows the collector's settings.
    pub budget: Option<Budget>,
    /// How it takes windows.
    pub latency: Latency,
}

/// A target's own budget.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Everything is traced whatever it costs.
    Off,
    /// Part of the target's own CPU time, 0 to 1.
    Share(f64),
}

/// How a target takes windows, in which it can be ten times slower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Latency {
    /// As the collector's settings say.
    #[default]
    Normal,
    /// Short ones, far apart: what they show is weaker evidence.
    Sensitive,
}

impl TargetSpec {
    /// True when it has a condition that processes which start later can meet.
    pub fn searches(&self) -> bool {
        [&self.name, &self.exe, &self.cgroup, &self.container, &self.unit].into_iter().any(Option::is_some)
    }
}

/// How the kernel side attaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// The best that works here.
    #[default]
    Auto,
    /// Uprobe sessions (Linux 6.13+).
    Session,
    /// Uprobe multi links (Linux 6.6+).
    Multi,
    /// One perf event per probe.
    Perf,
    /// One perf event and one copy of the program per probe, as Linux 5.10 needs it.
    PerfPlain,
}

/// Settings of the collector.
#[derive(Clone, Debug, PartialEq)]
pub struct CollectorSettings {
    /// How to attach.
    pub backend: Backend,
    /// Most outstanding allocations that are followed.
    pub max_outstanding: u32,
    /// Most allocation sites.
    pub max_sites: u32,
    /// Most threads followed at once.
    pub max_threads: u32,
    /// Most frames of a call stack, 1 to 127.
    pub max_frames: u32,
    /// Allocations below this size are not recorded.
    pub min_size: Bytes,
    /// Mean bytes between two allocations that are recorded; 0 records all.
    pub sample_bytes: Bytes,
    /// How call stacks are taken.
    pub stacks: Stacks,
    /// Whether frames of Python functions are read.
    pub python_frames: bool,
    /// Where unwind tables are kept on disk.
    pub unwind_cache: UnwindCache,
    /// Which instruction of a function is probed.
    pub placement: Placement,
    /// What tracing may cost.
    pub budget: BudgetSettings,
}

impl Default for CollectorSettings {
    fn default() -> Self {
        CollectorSettings {
            backend: Backend::Auto,
            max_outstanding: 1_000_000,
            max_sites: 32_768,
            max_threads: 16_384,
            max_frames: 64,
            min_size: Bytes(0),
            sample_bytes: Bytes(0),
            stacks: Stacks::default(),
            python_frames: true,
            unwind_cache: UnwindCache::default(),
            placement: Placement::default(),
            budget: BudgetSettings::default(),
        }
    }
}

/// What tracing may cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BudgetSettings {
    /// Part of a target's own CPU time, 0 to 1; `None` sets no limit: everything is traced whatever it costs.
    pub share: Option<f64>,
    /// CPU seconds per second that tracing a target may always cost, so that quiet targets are traced exactly.
    pub floor: f64,
    /// Part of the machine's CPU time that tracing all targets may cost together, 0 to 1.
    pub total: f64,
    /// Longest window.
    pub max_window: Duration,
    /// Most hits of one window; it closes early, and does not count, when they are used up.
    pub max_window_hits: u64,
    /// Part of a target's time, 0 to 1, that tracing may take within any second; beyond it everything is detached.
    pub max_slowdown: f64,
    /// How the target takes windows; a setting of targets, see [`BudgetSettings::of`].
    pub latency: Latency,
}

/// Longest window of a target that is sensitive to latency.
const SENSITIVE_WINDOW: Duration = Duration::from_millis(50);

impl BudgetSettings {
    /// These settings with what a target has of its own.
    pub fn of(&self, target: &TargetSpec) -> BudgetSettings {
        let mut own = BudgetSettings { latency: target.latency, ..*self };
        match target.budget {
            None => {}
            Some(Budget::Off) => own.share = None,
            Some(Budget::Share(share)) => {
                own.share = Some(share);
                // Who asks for less than the floor means it.
                own.floor = own.floor.min(share);
            }
        }
        if own.latency == Latency::Sensitive {
            own.max_window = own.max_window.min(SENSITIVE_WINDOW);
        }
        own
    }
}

impl Default for BudgetSettings {
    fn default() -> Self {
        BudgetSettings {
            share: Some(0.05),
            floor: 0.03,
            total: 0.05,
            max_window: Duration::from_millis(200),
            max_window_hits: 5_000_000,
            max_slowdown: 0.5,
            latency: Latency::Normal,
        }
    }
}

/// How call stacks are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stacks {
    /// By unwind tables; code without one by frame pointers.
    #[default]
    Auto,
    /// By frame pointers alone: to compare.
    FramePointers,
}

/// Where unwind tables are kept on disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum UnwindCache {
    /// `/var/cache/memleak` for root, else below the user's cache folder.
    #[default]
    Auto,
    /// Nowhere.
    Off,
    /// In this folder.
    Folder(PathBuf),
}

impl UnwindCache {
    /// The folder; `None` keeps nothing.
    pub fn folder(&self) -> Option<PathBuf> {
        match self {
            UnwindCache::Auto => CacheFolder::default_path(),
            UnwindCache::Off => None,
            UnwindCache::Folder(folder) => Some(folder.clone()),
        }
    }
}

/// Which instruction of a function is probed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// The first one that the kernel emulates and that is safe.
    #[default]
    Best,
    /// The first one, as other tools do: to compare them.
    Entry,
}

/// Which probe sets run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PluginSettings {
    /// Folder with manifests that are added to, or win over, the embedded ones.
    pub dir: Option<PathBuf>,
    /// Per probe set: on or off; what is not named follows its manifest.
    pub enabled: BTreeMap<String, bool>,
}

/// Rules and their parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct RuleSettings {
    /// Folder with rules that are added to, or win over, the embedded ones; watched for changes.
    pub dir: Option<PathBuf>,
    /// File of suppressions, LeakSanitizer's or ours; `None` is none.
    pub suppressions_file: Option<PathBuf>,
    /// Instructions that one call of a rule may use.
    pub max_instructions: u64,
    /// Memory that one rule may use.
    pub max_memory: Bytes,
    /// Per rule: `enabled` and parameters.
    pub params: BTreeMap<String, toml::Table>,
}

impl Default for RuleSettings {
    fn default() -> Self {
        RuleSettings {
            dir: None,
            suppressions_file: None,
            max_instructions: 1_000_000,
            max_memory: Bytes(32 << 20),
            params: BTreeMap::new(),
        }
    }
}

/// When and where people are told.
#[derive(Clone, Debug, PartialEq)]
pub struct AlertSettings {
    /// NDJSON file, appended to; `None` writes none.
    pub file: Option<PathBuf>,
    /// Also write alert lines to standard output.
    pub stdout: bool,
    /// How long a finding must stand before it becomes an alert.
    pub hold: Duration,
    /// How long an alert that was resolved stays quiet.
    pub cooldown: Duration,
    /// Findings below this severity are no alerts.
    pub min_severity: Severity,
    /// Where to POST alerts; `None` posts nowhere.
    pub webhook: Option<WebhookSettings>,
}

impl Default for AlertSettings {
    fn default() -> Self {
        AlertSettings {
            file: Some(PathBuf::from("memleak-alerts.ndjson")),
            stdout: false,
            hold: Duration::from_secs(3),
            cooldown: Duration::from_secs(300),
            min_severity: Severity::Warning,
            webhook: None,
        }
    }
}

/// A webhook.
#[derive(Clone, Debug, PartialEq)]
pub struct WebhookSettings {
    /// `http://` or `https://` address.
    pub url: String,
    /// Time for one attempt.
    pub timeout: Duration,
    /// Attempts per alert.
    pub attempts: u32,
    /// Alerts that may wait; the oldest is dropped (and counted) beyond that.
    pub queue: usize,
    /// Template of the body; `None` posts the alert line as JSON.
    pub template: Option<String>,
}

/// Everything but the address, which has no default.
impl Default for WebhookSettings {
    fn default() -> Self {
        WebhookSettings {
            url: String::new(),
            timeout: Duration::from_secs(5),
            attempts: 5,
            queue: 1_000,
            template: None,
        }
    }
}

/// The HTML report.
#[derive(Clone, Debug, PartialEq)]
pub struct ReportSettings {
    /// Where it is written; `None` writes none.
    pub path: Option<PathBuf>,
    /// How often it is rewritten while running; `None` only at the end and on SIGUSR1.
    pub every: Option<Duration>,
    /// Most sites in the report.
    pub max_sites: usize,
    /// Title; default names the targets.
    pub title: Option<String>,
}

impl Default for ReportSettings {
    fn default() -> Self {
        ReportSettings { path: Some(PathBuf::from("memleak-report.html")), every: None, max_sites: 2_000, title: None }
    }
}

/// The recording of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordingSettings {
    /// The file, which must not exist; `None` records nothing.
    pub path: Option<PathBuf>,
    /// Most bytes of the file; old snapshots are thinned to keep it.
    pub max_size: Bytes,
}

impl Default for RecordingSettings {
    fn default() -> Self {
        RecordingSettings { path: None, max_size: Bytes(512 << 20) }
    }
}

/// The live view and the snapshot lines of `--json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveSettings {
    /// Sites shown; 0 is all of them.
    pub sites: usize,
}

impl Default for LiveSettings {
    fn default() -> Self {
        LiveSettings { sites: 10 }
    }
}

/// Scans that tell leaks from caches.
#[derive(Clone, Debug, PartialEq)]
pub struct ReachabilitySettings {
    /// Scan a process by itself when a rule suspects one of its sites.
    pub automatic: bool,
    /// Shortest time between the automatic scans of a process.
    pub every: Duration,
    /// Part of one core that a scan may use, above 0 to 1.
    pub core_share: f64,
    /// Bytes of a process's memory that a scan may read per second.
    pub max_bandwidth: f64,
    /// With more outstanding blocks only those of suspected sites are judged.
    pub max_blocks: usize,
    /// Processes with more writable memory are not scanned.
    pub max_memory: Bytes,
    /// Stop the process for a moment at the end of a series, for registers and a copy of memory.
    pub stop: bool,
    /// Longest such stop.
    pub max_stop: Duration,
    /// Scan processes that end under `memleak run`, before their exit handlers run.
    pub at_exit: bool,
    /// How many scans make a series, and when a loss is definite.
    pub limits: crate::reachability::Limits,
}

impl ReachabilitySettings {
    /// How a process is scanned with these settings; `exact`: every free has been seen.
    pub fn options(&self, exact: bool) -> crate::reachability::scanner::Options {
        crate::reachability::scanner::Options {
            limits: self.limits,
            // Of what was allocated in a window nobody knows the frees: it must be older to be judged.
            min_age: Duration::from_secs(if exact { 1 } else { 10 }),
            core_share: self.core_share,
            bandwidth: self.max_bandwidth,
            max_blocks: self.max_blocks,
            max_bytes: self.max_memory.0,
            stop: self.stop.then_some(self.max_stop),
            still: false,
            unseen_frees: !exact,
        }
    }
}

impl Default for ReachabilitySettings {
    fn default() -> Self {
        ReachabilitySettings {
            automatic: true,
            every: Duration::from_secs(60),
            core_share: 0.5,
            max_bandwidth: (1_u64 << 30) as f64,
            max_blocks: 16 << 20,
            max_memory: Bytes(64 << 30),
            stop: false,
            max_stop: Duration::from_millis(50),
            at_exit: true,
            limits: crate::reachability::Limits::default(),
        }
    }
}
