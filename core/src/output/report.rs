//! The report: one documented context made from the history, rendered as a page and as text.
//!
//! [`Report::new`] decides (ranking, headings, what to say about losses), the templates only lay out. Nothing here
//! symbolizes: frames that were not filled by then are shown as addresses. `templates/README.md` documents the
//! context field by field.

mod context;
mod page;
mod sample;
mod site;
mod trend;
mod truth;

use serde::{Deserialize, Serialize};

pub use context::Report;
pub(crate) use context::nonce;
pub use site::heading;

use super::templates::Templates;
use crate::error::{Error, Result};
use crate::finding::Severity;
use crate::snapshot::SiteKey;

/// What a report says of the run besides its history. `Default` is a run of which nothing is known.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
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
    /// Kernel memory of the collector's BPF maps in bytes; `None` when it is not known.
    pub own_map_bytes: Option<u64>,
    /// CPU time that a snapshot takes the collector on average, seconds; `None` without any.
    pub own_snapshot_cpu_s: Option<f64>,
    /// Where the page is written; `None` when none is.
    pub report_path: Option<String>,
    /// Where alert lines are written; `None` when they are not.
    pub alerts_path: Option<String>,
    /// Of a recorded run: what is missing in the recording, a sentence each.
    #[serde(skip)]
    pub gaps: Vec<String>,
}

/// One rule of the run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RuleStatus {
    /// Name of the rule.
    pub name: String,
    /// What it looks for.
    pub description: String,
    /// Its last error, with file and line; `None` when it works.
    pub error: Option<String>,
}

/// What became of a probe set on one target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, OnceLock};

    use super::*;
    use crate::history::{Bounds, History};
    use crate::snapshot::{LIFETIME_CLASSES, Process, ProcessSample, Site, SiteSample, Snapshot, Totals};

    fn key(number: u64) -> SiteKey {
        SiteKey { instance: 1, probe_set: 1, stack: number }
    }

    /// A history of 20 s in which site `i` holds `sites[i].0` bytes and grows by `sites[i].1` bytes per second.
    fn history(sites: &[(u64, u64)]) -> History {
        let process = Arc::new(Process { instance: 1, pid: 7, ..Process::default() });
        let sites: Vec<(Arc<Site>, u64, u64)> = (sites.iter().zip(0..))
            .map(|((bytes, growth), number)| {
                let site = Site {
                    key: key(number),
                    id: number,
                    process: Arc::clone(&process),
                    probe_set: "glibc".into(),
                    function: "malloc".into(),
                    addresses: vec![0x1000 + number],
                    truncated: None,
                    first_thread: None,
                    frames: OnceLock::new(),
                };
                (Arc::new(site), *bytes, *growth)
            })
            .collect();
        let mut history = History::new(Bounds::default());
        for t in 1..=20 {
            let sample = |(site, bytes, growth): &(Arc<Site>, u64, u64)| SiteSample {
                site: Arc::clone(site),
                totals: Totals { allocated_bytes: bytes + growth * t, allocated_count: 1, ..Totals::default() },
                stderr: Default::default(),
                last_allocation_s: t as f64,
                cohorts: Vec::new(),
                lifetimes: [0; LIFETIME_CLASSES],
                reachability: None,
                kernel: None,
            };
            history.push(&Snapshot {
                number: t,
                time_s: t as f64,
                wall_s: 1e9 + t as f64,
                processes: vec![ProcessSample {
                    process: Arc::clone(&process),
                    alive: true,
                    ..ProcessSample::default()
                }],
                sites: sites.iter().map(sample).collect(),
                collect_cpu_s: 0.0,
            });
        }
        history
    }

    fn alert(number: u64, status: AlertStatus, severity: Severity) -> AlertView {
        AlertView {
            id: format!("{number:016x}"),
            status,
            since_s: 3.0,
            rule: "growth".to_owned(),
            severity,
            confidence: 0.5,
            reason: "grew".to_owned(),
            site: key(number),
            processes: 1,
        }
    }

    fn order(report: &Report) -> Vec<String> {
        report.sites.iter().map(|s| s.heading.name.clone()).collect()
    }

    /// What hurts most comes first: severity, then growth, then size; a small leak beats a large cache.
    #[test]
    fn sites_rank_by_severity_then_growth_then_bytes() {
        let history = history(&[(9_000, 0), (10, 5), (10, 70), (20, 0), (500, 5), (1, 0)]);
        let alerts = [
            alert(3, AlertStatus::Firing, Severity::Info),
            alert(1, AlertStatus::Firing, Severity::Critical),
            alert(5, AlertStatus::Resolved, Severity::Critical),
        ];
        let report = Report::new(&history, &alerts, &RunInfo::default(), 10);
        assert_eq!(order(&report), ["0x1001", "0x1003", "0x1005", "0x1002", "0x1004", "0x1000"]);
        let severities: Vec<_> = report.sites.iter().map(|s| s.severity).collect();
        assert_eq!(severities[..3], [Some(Severity::Critical), Some(Severity::Info), None]);
    }

    /// A bound on the sites must cut from the end, keep what alerts are about, and say what it hides.
    #[test]
    fn the_bound_keeps_alerts_and_counts_what_it_hides() {
        let history = history(&[(9_000, 0), (10, 5), (10, 70), (20, 0)]);
        let alerts = [alert(3, AlertStatus::Firing, Severity::Info), alert(1, AlertStatus::Resolved, Severity::Info)];
        let report = Report::new(&history, &alerts, &RunInfo::default(), 1);
        assert_eq!(order(&report), ["0x1003", "0x1001"]);
        let context = serde_json::to_value(&report).expect("context");
        assert_eq!(context["sites_total"], 4);
        assert_eq!(context["hidden_sites"], 2);
        assert_eq!(context["hidden_bytes"], 9_000 + 10 + 70 * 20);
        let report = Report::new(&history, &[], &RunInfo::default(), 3);
        assert_eq!(order(&report), ["0x1002", "0x1001", "0x1000"]);
    }

    /// Alerts of one site stay together, the resolved ones last, and one whose site is gone is still shown.
    #[test]
    fn alerts_are_ordered_and_survive_their_site() {
        use AlertStatus::{Firing, Resolved};
        use Severity::{Critical, Info, Warning};
        let history = history(&[(10, 1), (10, 9)]);
        let alerts = [
            alert(99, Firing, Critical),
            alert(0, Resolved, Critical),
            alert(0, Firing, Info),
            alert(1, Firing, Info),
            alert(1, Firing, Warning),
        ];
        let report = Report::new(&history, &alerts, &RunInfo::default(), 10);
        let shown: Vec<_> =
            (report.alerts.iter()).map(|a| (a.severity, a.status, a.site.as_ref().map(|s| s.index))).collect();
        assert_eq!(
            shown,
            [
                (Warning, Firing, Some(0)),
                (Info, Firing, Some(0)),
                (Info, Firing, Some(1)),
                (Critical, Firing, None),
                (Critical, Resolved, Some(1)),
            ]
        );
    }

    /// Paths of all values, with `[]` for the elements of arrays.
    fn paths(value: &serde_json::Value, path: &str, out: &mut std::collections::BTreeSet<String>) {
        match value {
            serde_json::Value::Object(fields) => {
                for (name, value) in fields {
                    paths(value, &format!("{path}{}{name}", if path.is_empty() { "" } else { "." }), out);
                }
            }
            serde_json::Value::Array(elements) if elements.iter().any(|e| e.is_object()) => {
                elements.iter().for_each(|e| paths(e, &format!("{path}[]"), out));
            }
            _ => drop(out.insert(path.to_owned())),
        }
    }

    /// The reference for authors of templates must list every field, and no field that does not exist.
    #[test]
    fn the_reference_lists_exactly_the_fields_of_the_context() {
        let mut fields = std::collections::BTreeSet::new();
        paths(&serde_json::to_value(sample::report()).expect("context"), "", &mut fields);
        let reference = include_str!("../../../templates/README.md");
        let (_, reference) = reference.split_once("## The report's context").expect("section");
        let documented: std::collections::BTreeSet<String> = (reference.lines())
            .filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(path, _)| path.to_owned()))
            .collect();
        assert_eq!(fields, documented);
    }

    /// A run that ends before its first snapshot still gets its report.
    #[test]
    fn an_empty_history_renders() {
        let templates = Templates::new(None).expect("templates");
        let report = Report::new(&History::default(), &[], &RunInfo::default(), 10);
        let text = report.text(&templates).expect("text");
        assert!(text.contains("NO FINDINGS") && text.contains("No process has been watched."), "{text}");
        assert!(report.html(&templates).expect("page").contains("No process has been watched."));
    }
}
