//! Settings: what the file may say, the defaults, and the checks.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::finding::Severity;
use crate::units::Bytes;

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
    /// Folder with templates that win over the embedded ones; `None` uses the embedded ones.
    pub templates_dir: Option<PathBuf>,
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
    /// Cgroup path below `/sys/fs/cgroup`, with everything below it.
    pub cgroup: Option<String>,
    /// A command to launch and watch from its first instruction.
    pub command: Vec<String>,
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
    /// Instructions that one call of a rule may use.
    pub max_instructions: u64,
    /// Memory that one rule may use.
    pub max_memory: Bytes,
    /// Per rule: `enabled` and parameters.
    pub params: BTreeMap<String, toml::Table>,
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
