//! The report: one documented context made from the history, rendered as a page and as text.
//!
//! [`Report::new`] decides (ranking, headings, what to say about losses), the templates only lay out. Nothing here
//! symbolizes: frames that were not filled by then are shown as addresses. `templates/README.md` documents the
//! context field by field.

mod context;
mod page;
mod sample;
mod trend;
mod truth;

use serde::Serialize;

pub use context::{Report, heading};

use super::templates::Templates;
use crate::error::{Error, Result};
use crate::finding::Severity;
use crate::snapshot::SiteKey;

/// What a report says of the run besides its history. `Default` is a run of which nothing is known.
#[derive(Clone, Debug, Default)]
pub struct RunInfo {
    /// Heading of the report.
    pub title: String,
    /// Version of the collector.
    pub version: String,
    /// Name of the machine.
    pub host: String,
    /// Release of the running kernel.
    pub kernel: String,
    /// When the collector started, wall clock, seconds since 1970.
    pub started_wall_s: f64,
    /// What was to be watched, one line per target, such as `pid 4711` or `name redis-*`.
    pub targets: Vec<String>,
    /// Time between snapshots, seconds.
    pub interval_s: f64,
    /// How the probes are attached, such as `session`; empty when nothing attached.
    pub backend: String,
    /// The rules, with what is wrong with them.
    pub rules: Vec<RuleStatus>,
    /// What became of the probe sets.
    pub plugins: Vec<PluginStatus>,
    /// The overhead budget and how it was kept, in a sentence; `None` when there is no budget.
    pub budget: Option<String>,
    /// CPU time that the collector has used itself, seconds; `None` when it cannot be read.
    pub own_cpu_s: Option<f64>,
    /// The collector's resident memory in bytes; `None` when it cannot be read.
    pub own_rss_bytes: Option<u64>,
    /// Where the page is written; `None` when none is.
    pub report_path: Option<String>,
    /// Where alert lines are written; `None` when they are not.
    pub alerts_path: Option<String>,
}

/// One rule of the run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RuleStatus {
    /// Name of the rule.
    pub name: String,
    /// What it looks for.
    pub description: String,
    /// Its last error, with file and line; `None` when it works.
    pub error: Option<String>,
}

/// What became of a probe set on one target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PluginState {
    /// All of its required probes are attached.
    Attached,
    /// It does not apply to the target or is switched off.
    #[default]
    Skipped,
    /// It should have been attached and could not be.
    Failed,
}

/// One line of the table of probe sets.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PluginStatus {
    /// Name of the probe set.
    pub probe_set: String,
    /// The target, such as `4711 redis-server`; hostile text.
    pub target: String,
    /// What became of it.
    pub state: PluginState,
    /// The number of attached probes.
    pub probes: u64,
    /// Which file provides the functions, or why it was skipped or has failed; empty when there is nothing to say.
    pub detail: String,
}

/// Whether a finding still stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AlertStatus {
    /// It still stands.
    Firing,
    /// It stood, and does not any more.
    Resolved,
}

/// An alert as the report needs it.
#[derive(Clone, Debug)]
pub struct AlertView {
    /// Stable id of the finding.
    pub id: String,
    /// Whether it still stands.
    pub status: AlertStatus,
    /// When it began to fire, seconds since the collector started.
    pub since_s: f64,
    /// Name of the rule.
    pub rule: String,
    /// How bad it is.
    pub severity: Severity,
    /// How sure the rule is, 0 to 1.
    pub confidence: f64,
    /// One sentence for people.
    pub reason: String,
    /// The site; of several processes the one with the largest outstanding bytes.
    pub site: SiteKey,
    /// In how many processes; at least 1.
    pub processes: usize,
}

impl Report {
    /// The self-contained page: `report.html.tera`.
    ///
    /// # Errors
    /// The template fails, see [`Templates::render`].
    pub fn html(&self, templates: &Templates) -> Result<String> {
        #[derive(Serialize)]
        struct Context<'a> {
            #[serde(flatten)]
            report: &'a Report,
            page: page::Page,
        }
        let context = Context { report: self, page: page::Page::new(self) };
        templates.render_for("report.html.tera", &format!("report {:?}", self.title()), &context)
    }

    /// The text for a terminal, at most 80 columns wide except for paths: `report.txt.tera`.
    ///
    /// # Errors
    /// The template fails, see [`Templates::render`].
    pub fn text(&self, templates: &Templates) -> Result<String> {
        templates.render_for("report.txt.tera", &format!("report {:?}", self.title()), self)
    }
}

/// Renders both reports from a small sample that has every field, and returns what is wrong with the templates.
pub(super) fn check_templates(templates: &Templates) -> Vec<Error> {
    let report = sample::report();
    [report.html(templates), report.text(templates)].into_iter().filter_map(|r| r.err()).collect()
}
