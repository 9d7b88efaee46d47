//! The commands that work on a recording: `report` and `replay`.
//!
//! Both need no privileges and not the processes that were watched. They use the same history, rules and report as a
//! running collector, with the settings that the recording keeps.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::alert::{AlertManager, Status};
use crate::config::Override;
use crate::finding::{Finding, Severity};
use crate::history::History;
use crate::output::atomic;
use crate::output::report::{AlertStatus, AlertView, Report, heading};
use crate::output::templates::Templates;
use crate::output::text::visible;
use crate::recording::{Filter, Reader, recorded};
use crate::rules::{RuleEngine, RuleError};
use crate::snapshot::SiteKey;
use crate::symbolize::Frame;
use crate::units::format_duration_s;
use crate::{Error, ErrorKind, Result, cli};

/// Writes the report of a recording.
///
/// # Errors
/// The recording cannot be read, it has nothing in the part that was asked for, or the page cannot be written.
pub fn report(
    path: &Path,
    output: &Path,
    filter: &Filter,
    overrides: &[Override],
    templates: Option<&Path>,
) -> Result<()> {
    let templates = Templates::new(templates)?;
    let reader = Reader::open(path)?;
    let config = recorded(&reader.session().settings, reader.shown(), overrides)?;
    let bar = progress(&reader, "reading");
    let history = reader.history(config.history, filter, &mut || bar.inc(1))?;
    bar.finish_and_clear();
    if history.snapshots() == 0 && !reader.contents().is_empty() {
        let length = reader.contents().last().map_or(0.0, |s| s.time_s);
        let what = format!("nothing of {} is in that part: it lasts {}", reader.shown(), format_duration_s(length));
        return Err(Error::new(ErrorKind::Config, what));
    }
    let alerts = alerts(&reader, &history, filter)?;
    let run = &reader.session().run;
    let mut shown: Vec<_> = history.sites().collect();
    shown.sort_by_key(|h| std::cmp::Reverse(h.latest.totals.outstanding_bytes()));
    // Those that the live report names, and those with an alert; the others are shown by where they lie.
    let named = shown.iter().take(config.report.max_sites).map(|h| h.site());
    named.chain(alerts.iter().filter_map(|a| reader.site(a.site))).try_for_each(|site| reader.name(site))?;
    let html = Report::new(&history, &alerts, run, config.report.max_sites).html(&templates)?;
    atomic::write(output, html.as_bytes())?;
    cli::print(&format!("report written to {}\n", visible(&output.to_string_lossy())))
}

/// The alerts of a recording that belong to a history, as of its end.
fn alerts(reader: &Reader, history: &History, filter: &Filter) -> Result<Vec<AlertView>> {
    let until = filter.until_s.unwrap_or(f64::INFINITY);
    let known = |a: &SiteKey| history.site(*a).is_some() || *filter == Filter::default();
    let alerts = reader.alerts()?.into_iter().filter(|a| a.fired_s <= until && known(&a.site));
    let view = |a: crate::recording::AlertRecord| AlertView {
        status: match a.status {
            Status::Resolved if a.resolved_s.is_some_and(|at| at <= until) => AlertStatus::Resolved,
            _ => AlertStatus::Firing,
        },
        id: a.id,
        since_s: a.fired_s,
        rule: a.rule,
        severity: a.severity,
        confidence: a.confidence,
        reason: a.reason,
        site: a.site,
        processes: a.processes,
    };
    Ok(alerts.map(view).collect())
}

fn progress(reader: &Reader, what: &str) -> ProgressBar {
    let count = reader.contents().len() as u64;
    let bar = if io::stderr().is_terminal() { ProgressBar::new(count) } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template(&format!("{what} {{wide_bar}} {{pos}}/{{len}}")) {
        bar.set_style(style);
    }
    bar
}

/// A finding over the time for which it stood without a break and with one severity.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Found {
    /// Id of the finding.
    pub id: String,
    /// Name of the rule.
    pub rule: String,
    /// How bad it is.
    pub severity: Severity,
    /// How sure the rule was last.
    pub confidence: f64,
    /// What the rule said last.
    pub reason: String,
    /// Stable identity of the site, hexadecimal.
    pub site: String,
    /// The site in short: the function of its own that allocates.
    pub place: String,
    /// The process.
    pub pid: u32,
    /// Number of the first snapshot with it.
    pub first_snapshot: u64,
    /// Number of the last snapshot with it.
    pub last_snapshot: u64,
    /// Time of the first snapshot with it, seconds since the collector started.
    pub first_s: f64,
    /// Time of the last snapshot with it, seconds since the collector started.
    pub last_s: f64,
    /// True when it stands at the end.
    pub standing: bool,
}

/// What rules say of a recording.
#[derive(Debug, Serialize)]
pub struct Replayed {
    /// Snapshots that were looked at.
    pub snapshots: u64,
    /// How often an alert would have been raised.
    pub raised: u64,
    /// In the order in which they began.
    pub findings: Vec<Found>,
    /// Errors of rules, each once.
    pub errors: Vec<String>,
}

/// Runs the rules over all snapshots of a recording, as they came.
///
/// # Errors
/// The recording or a rule cannot be read.
pub fn run_rules(reader: &Reader, config: &crate::config::Config, progress: &mut dyn FnMut()) -> Result<Replayed> {
    let mut rules = RuleEngine::new(&config.rules)?;
    let mut history = History::new(config.history);
    let mut alerts = AlertManager::new(&config.alerts);
    let mut found: Vec<Found> = Vec::new();
    let mut standing: HashMap<(String, SiteKey), usize> = HashMap::new();
    let mut errors: Vec<String> = Vec::new();
    let filter = Filter::default();
    for snapshot in reader.snapshots(&filter) {
        let snapshot = snapshot?;
        history.push(&snapshot);
        let mut damage = None;
        let evaluation = rules.evaluate(&history, &mut |site| damage = reader.name(site).err().or(damage.take()));
        if let Some(damage) = damage {
            return Err(damage);
        }
        note_errors(&mut errors, &evaluation.errors);
        alerts.update(&evaluation.findings, &history, snapshot.time_s, snapshot.wall_s);
        let mut next = HashMap::new();
        for finding in &evaluation.findings {
            let key = (finding.id.clone(), finding.site.key);
            let place = match standing.get(&key).filter(|place| found[**place].severity == finding.severity) {
                Some(place) => *place,
                None => {
                    reader.name(&finding.site)?;
                    found.push(new_found(finding, snapshot.number, snapshot.time_s));
                    found.len() - 1
                }
            };
            let entry = &mut found[place];
            (entry.last_snapshot, entry.last_s) = (snapshot.number, snapshot.time_s);
            (entry.confidence, entry.reason) = (finding.confidence, finding.reason.clone());
            next.insert(key, place);
        }
        standing = next;
        progress();
    }
    for place in standing.values() {
        found[*place].standing = true;
    }
    Ok(Replayed { snapshots: history.snapshots(), raised: alerts.raised(), findings: found, errors })
}

fn new_found(finding: &Finding, number: u64, time_s: f64) -> Found {
    Found {
        id: finding.id.clone(),
        rule: finding.rule.to_string(),
        severity: finding.severity,
        confidence: finding.confidence,
        reason: finding.reason.clone(),
        site: format!("{:016x}", finding.site.id),
        place: place(finding.site.frames()),
        pid: finding.site.process.pid,
        first_snapshot: number,
        last_snapshot: number,
        first_s: time_s,
        last_s: time_s,
        standing: false,
    }
}

/// The function of a stack that people look at first, or its module.
fn place(frames: &[Frame]) -> String {
    let frame = heading(frames).and_then(|at| frames.get(at)).or(frames.first());
    let name = frame.and_then(|f| f.function.as_ref().or(f.module.as_ref()));
    name.map_or_else(|| "a stack without names".to_owned(), |n| visible(n).into_owned())
}

fn note_errors(known: &mut Vec<String>, errors: &[RuleError]) {
    for error in errors.iter().map(RuleError::to_string) {
        if !known.contains(&error) {
            known.push(error);
        }
    }
}

/// Runs rules over a recording and prints what they find; true when an alert would have been raised.
///
/// # Errors
/// The recording, a rule or a setting cannot be read.
pub fn replay(path: &Path, json: bool, overrides: &[Override], rules: Option<PathBuf>) -> Result<bool> {
    let reader = Reader::open(path)?;
    let mut config = recorded(&reader.session().settings, reader.shown(), overrides)?;
    if rules.is_some() {
        config.rules.dir = rules;
    }
    let bar = progress(&reader, "replaying");
    let replayed = run_rules(&reader, &config, &mut || bar.inc(1))?;
    bar.finish_and_clear();
    for error in &replayed.errors {
        tracing::error!("{error}");
    }
    if json {
        let failed = |e| Error::with_source(ErrorKind::Io, "failed to print the replay as JSON", e);
        let text = serde_json::to_string(&replayed).map_err(failed)?;
        cli::print(&format!("{text}\n"))?;
    } else {
        cli::print(&text(&replayed))?;
    }
    Ok(replayed.raised > 0)
}

fn text(replayed: &Replayed) -> String {
    let mut by_rule: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
    let mut out = String::new();
    for f in &replayed.findings {
        let (count, first_s) = by_rule.entry(&f.rule).or_insert((0, f.first_s));
        *count += 1;
        *first_s = first_s.min(f.first_s);
        let end = if f.standing { "the end".to_owned() } else { format_duration_s(f.last_s) };
        let head = format!("{} to {end}  {} {} ", format_duration_s(f.first_s), f.severity.as_str(), f.rule);
        out.push_str(&format!(
            "{head} {} (pid {}, id {})\n    {}\n",
            visible(&f.place),
            f.pid,
            f.id,
            visible(&f.reason)
        ));
    }
    for (rule, (count, first_s)) in by_rule {
        out.push_str(&format!("rule {rule}: {count} findings, the first after {}\n", format_duration_s(first_s)));
    }
    let (findings, snapshots, raised) = (replayed.findings.len(), replayed.snapshots, replayed.raised);
    out.push_str(&format!("{snapshots} snapshots, {findings} findings, {raised} alerts\n"));
    out
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, OnceLock};

    use super::*;
    use crate::alert::Alert;
    use crate::config::Config;
    use crate::output::report::RunInfo;
    use crate::recording::{Host, Limits, Settings, Step, Writer};
    use crate::snapshot::{
        LIFETIME_CLASSES, Process, ProcessSample, Site, SiteSample, Snapshot, StandardErrors, Totals,
    };

    /// Forty sites, of which every tenth leaks; one a second.
    fn snapshot(number: u64, sites: &[Arc<Site>]) -> Snapshot {
        let sample = |(i, site): (u64, &Arc<Site>)| {
            let held = if i.is_multiple_of(10) { number * 300 } else { 500 + (number * 7 + i) % 23 };
            SiteSample {
                site: Arc::clone(site),
                totals: Totals {
                    allocated_bytes: (held + number * i) * 96,
                    allocated_count: held + number * i,
                    freed_bytes: number * i * 96,
                    freed_count: number * i,
                },
                stderr: StandardErrors::default(),
                last_allocation_s: number as f64,
                cohorts: Vec::new(),
                lifetimes: [0; LIFETIME_CLASSES],
                reachability: None,
                kernel: None,
            }
        };
        let process = Arc::clone(&sites[0].process);
        let mut sites: Vec<SiteSample> = (0..).zip(sites).map(sample).collect();
        sites.sort_by_key(|s| (std::cmp::Reverse(s.totals.outstanding_bytes()), s.site.key));
        Snapshot {
            number,
            time_s: number as f64,
            wall_s: 1e9 + number as f64,
            processes: vec![ProcessSample { process, alive: true, hits: number * 1000, ..Default::default() }],
            sites,
            collect_cpu_s: 0.0,
        }
    }

    fn sites() -> Vec<Arc<Site>> {
        let process = Arc::new(Process { instance: 1, pid: 4711, comm: "app".into(), ..Process::default() });
        let site = |i: u64| {
            let function = Some(format!("function_{i}"));
            let frame = Frame { function, address: i + 1, ..Frame::default() };
            Arc::new(Site {
                key: SiteKey { instance: 1, probe_set: 1, stack: i },
                id: i.wrapping_mul(0x9e37_79b9_7f4a_7c15),
                process: Arc::clone(&process),
                probe_set: "glibc".into(),
                function: "malloc".into(),
                addresses: vec![i + 1],
                truncated: None,
                frames: OnceLock::from(vec![frame]),
            })
        };
        (0..40).map(site).collect()
    }

    /// The report's page without what is drawn at random for each page.
    fn page(history: &History, alerts: &[AlertView]) -> String {
        let templates = Templates::new(None).expect("templates");
        let html = Report::new(history, alerts, &RunInfo::default(), 100).html(&templates).expect("page");
        let nonce = html.split("nonce-").nth(1).and_then(|rest| rest.get(..32)).expect("nonce").to_owned();
        html.replace(&nonce, "")
    }

    /// The promise of a recording: rules find the same at the same times with the same ids as they did live, and the
    /// report shows the same numbers.
    #[test]
    fn replay_and_report_are_as_live() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("run.memleak");
        let config = Config::default();
        let settings = Settings::of(&config).to_text();
        let run = RunInfo::default();
        let mut writer = Writer::create(&path, Limits::default(), &Host::default(), &run, &settings).expect("file");
        let mut rules = RuleEngine::new(&config.rules).expect("rules");
        let (mut history, mut alerts) = (History::new(config.history), AlertManager::new(&config.alerts));
        let sites = sites();
        // More than a series keeps, so that thinning counts too.
        for number in 1..=700 {
            let snapshot = snapshot(number, &sites);
            history.push(&snapshot);
            let evaluation = rules.evaluate(&history, &mut |_| {});
            let events = alerts.update(&evaluation.findings, &history, snapshot.time_s, snapshot.wall_s);
            let changed: Vec<&Alert> = events.iter().map(|e| &e.alert).collect();
            let (active, findings) = (alerts.active(), &evaluation.findings);
            let step = Step { snapshot: &snapshot, findings, active: &active, changed: &changed, run: None };
            writer.push(&step, &mut |_| Vec::new()).expect("stored");
        }
        writer.finish(None, &alerts.active()).expect("finished");
        let reader = Reader::open(&path).expect("opens");
        let replayed = run_rules(&reader, &config, &mut || {}).expect("replays");
        let live = reader.findings().expect("reads").into_iter().map(|f| {
            (
                f.id,
                f.severity,
                f.confidence,
                f.reason,
                f.first_snapshot,
                f.last_snapshot,
                f.first_s,
                f.last_s,
                f.standing,
            )
        });
        let mut live: Vec<_> = live.collect();
        let mut again: Vec<_> = (replayed.findings.into_iter())
            .map(|f| {
                (
                    f.id,
                    f.severity,
                    f.confidence,
                    f.reason,
                    f.first_snapshot,
                    f.last_snapshot,
                    f.first_s,
                    f.last_s,
                    f.standing,
                )
            })
            .collect();
        live.sort_by(|a, b| (&a.0, a.4).cmp(&(&b.0, b.4)));
        again.sort_by(|a, b| (&a.0, a.4).cmp(&(&b.0, b.4)));
        assert!(live.len() >= 4, "{live:?}");
        assert_eq!(live, again);
        assert_eq!((replayed.snapshots, replayed.raised), (700, alerts.raised()));
        let filter = Filter::default();
        let recorded = reader.history(config.history, &filter, &mut || {}).expect("reads");
        recorded.sites().for_each(|h| reader.name(h.site()).expect("names"));
        let live_views: Vec<AlertView> = (alerts.active().into_iter())
            .map(|a| AlertView {
                id: a.id.clone(),
                status: AlertStatus::Firing,
                since_s: a.fired_s,
                rule: a.rule.to_string(),
                severity: a.severity,
                confidence: a.confidence,
                reason: a.reason.clone(),
                site: a.site.key,
                processes: a.processes,
            })
            .collect();
        let views = super::alerts(&reader, &recorded, &filter).expect("alerts");
        assert!(!views.is_empty());
        assert!(page(&history, &live_views) == page(&recorded, &views), "the pages differ");
    }
}
