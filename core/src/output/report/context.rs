//! The context that report templates get: `templates/README.md` describes every field for their authors.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

use serde::Serialize;

use super::site::{Heading, SiteView, name};
use super::truth::Truth;
use super::{AlertStatus, AlertView, PluginStatus, RuleStatus, RunInfo, trend};
use crate::coverage::Coverage;
use crate::finding::Severity;
use crate::history::{History, Sample, SiteHistory};
use crate::output::text::clip;
use crate::reachability::Verdict;
use crate::snapshot::{Mode, ProcessSample, SiteKey, StandardErrors, Totals};

/// Longest page title.
const MAX_TITLE: usize = 200;

/// Everything that a report says. Made by [`Report::new`], rendered by [`Report::html`] and [`Report::text`].
#[derive(Debug, Serialize)]
pub struct Report {
    title: String,
    version: String,
    host: String,
    kernel: String,
    targets: Vec<String>,
    backend: String,
    interval_s: f64,
    started_wall_s: f64,
    ended_wall_s: f64,
    duration_s: f64,
    snapshots: u64,
    /// A number that the page's own scripts carry and hostile text cannot know: only they may run.
    nonce: String,
    totals: TotalsView,
    findings: Findings,
    pub(super) truth: Truth,
    pub(super) alerts: Vec<AlertContext>,
    pub(super) sites: Vec<SiteView>,
    sites_total: usize,
    hidden_sites: usize,
    hidden_bytes: u64,
    pub(super) processes: Vec<ProcessView>,
    probe_sets: Vec<PluginStatus>,
    rules: Vec<RuleStatus>,
    cost: Cost,
    report_path: Option<String>,
    alerts_path: Option<String>,
    /// The series of all sites together, for the page's charts.
    #[serde(skip)]
    pub(super) series: Vec<Sample>,
    /// Wall-clock time of the collector's start, for the page's time axis.
    #[serde(skip)]
    pub(super) zero_wall_s: f64,
    #[serde(skip)]
    pub(super) now_s: f64,
}

/// Totals over all sites, those that are not listed included.
#[derive(Debug, Default, Serialize)]
pub(super) struct TotalsView {
    outstanding_bytes: u64,
    outstanding_count: u64,
    #[serde(flatten)]
    totals: Totals,
    #[serde(flatten)]
    stderr: StandardErrors,
    growth_bytes_per_s: f64,
    pub(super) growing_since_s: Option<f64>,
    growing_for_s: Option<f64>,
}

/// Number of alerts that fire by severity, and of those that have been resolved.
#[derive(Debug, Default, Serialize)]
struct Findings {
    total: usize,
    critical: usize,
    warning: usize,
    info: usize,
    resolved: usize,
}

/// One alert.
#[derive(Debug, Serialize)]
pub(super) struct AlertContext {
    id: String,
    pub(super) status: AlertStatus,
    since_s: f64,
    since_wall_s: f64,
    lasted_s: f64,
    pub(super) rule: String,
    pub(super) severity: Severity,
    confidence: f64,
    pub(super) reason: String,
    processes: usize,
    /// What the report says of its site; `None` when the site is not in the history any more.
    pub(super) site: Option<AlertSite>,
}

/// The site of an alert, in short.
#[derive(Debug, Serialize)]
pub(super) struct AlertSite {
    /// Place in `sites`, counted from 0.
    pub(super) index: usize,
    id: String,
    pid: u32,
    comm: String,
    probe_set: String,
    function: String,
    heading: Heading,
    outstanding_bytes: u64,
    outstanding_count: u64,
    growth_bytes_per_s: f64,
    oldest_age_s: f64,
    reachability: Option<AlertReach>,
}

/// What scans say of the site of an alert, in short.
#[derive(Debug, Serialize)]
struct AlertReach {
    verdict: Verdict,
    evidence: String,
    way: Option<String>,
}

/// One process.
#[derive(Debug, Serialize)]
pub(super) struct ProcessView {
    pub(super) instance: u32,
    pub(super) pid: u32,
    pub(super) comm: String,
    exe: String,
    cmdline: String,
    container: Option<String>,
    runtime: Option<String>,
    pod: Option<String>,
    unit: Option<String>,
    slice: Option<String>,
    /// All of these in a few words; empty when nothing is known.
    labels: String,
    alive: bool,
    mode: Mode,
    sites: usize,
    outstanding_bytes: u64,
    outstanding_count: u64,
    rss_bytes: Option<u64>,
    rss_anon_bytes: Option<u64>,
    coverage: Option<Coverage>,
    hard_stops: u64,
    hits: u64,
    cpu_s: Option<f64>,
    overhead_s: f64,
    overhead_share: Option<f64>,
    losses: u64,
}

/// What the observation has cost.
#[derive(Debug, Serialize)]
struct Cost {
    budget: Option<String>,
    overhead_s: f64,
    overhead_share: Option<f64>,
    own_cpu_s: Option<f64>,
    own_rss_bytes: Option<u64>,
    own_map_bytes: Option<u64>,
    own_snapshot_cpu_s: Option<f64>,
}

impl Report {
    /// Makes the report: the `max_sites` sites that rank first (all that an alert is about among them), ranked by
    /// severity of the alerts that fire, then growth, then outstanding bytes.
    pub fn new(history: &History, alerts: &[AlertView], run: &RunInfo, max_sites: usize) -> Report {
        let now_s = history.time_s();
        let started_wall_s = run.started_wall_s;
        let zero_wall_s = if history.snapshots() > 0 { history.wall_s() - now_s } else { started_wall_s };
        let mut severities: HashMap<SiteKey, (Option<Severity>, Vec<String>)> = HashMap::new();
        for a in alerts {
            let (severity, rules) = severities.entry(a.site).or_default();
            if a.status == AlertStatus::Firing {
                *severity = (*severity).max(Some(a.severity));
            }
            if !rules.contains(&a.rule) {
                rules.push(a.rule.clone());
            }
        }
        let sites_total = history.sites().count();
        let all_bytes: u64 = history.sites().map(|h| h.latest.totals.outstanding_bytes()).sum();
        let sites: Vec<SiteView> = (ranked(history, &severities, max_sites).into_iter().enumerate())
            .map(|(i, (h, growth))| {
                let (severity, rules) = severities.get(&h.site().key).cloned().unwrap_or_default();
                SiteView::new(i + 1, h, growth, severity, rules, now_s)
            })
            .collect();
        let series = history.totals().samples();
        let processes = processes(history);
        Report {
            title: clip(&run.title, MAX_TITLE).into_owned(),
            version: run.version.clone(),
            host: name(&run.host),
            kernel: name(&run.kernel),
            targets: run.targets.iter().map(|t| name(t)).collect(),
            backend: run.backend.clone(),
            interval_s: run.interval_s,
            started_wall_s,
            ended_wall_s: zero_wall_s + now_s,
            duration_s: now_s,
            snapshots: history.snapshots(),
            nonce: nonce(),
            totals: TotalsView::new(history, now_s),
            findings: Findings::new(alerts),
            truth: Truth::new(history, &sites, run),
            alerts: alert_contexts(alerts, &sites, now_s, zero_wall_s),
            sites_total,
            hidden_sites: sites_total - sites.len(),
            hidden_bytes: all_bytes - sites.iter().map(|s| s.outstanding_bytes).sum::<u64>(),
            cost: Cost::new(&processes, run),
            sites,
            processes,
            probe_sets: run.plugins.iter().map(shown_plugin).collect(),
            rules: run.rules.clone(),
            report_path: run.report_path.clone(),
            alerts_path: run.alerts_path.clone(),
            series: series.to_vec(),
            zero_wall_s,
            now_s,
        }
    }

    /// The title.
    pub fn title(&self) -> &str {
        &self.title
    }

    /// When the total began to grow without a break; see [`trend::growing_since_s`].
    pub(super) fn growing_since_s(&self) -> Option<f64> {
        self.totals.growing_since_s
    }
}

/// The sites that rank first, with their growth in bytes per second.
///
/// A slope costs more than everything else here, so it is computed only for sites that can make it into the report:
/// those with an alert, the largest, and those that grew most between their first and their newest sample.
fn ranked<'a>(
    history: &'a History,
    severities: &HashMap<SiteKey, (Option<Severity>, Vec<String>)>,
    max_sites: usize,
) -> Vec<(&'a SiteHistory, f64)> {
    let mut candidates: Vec<&SiteHistory> = history.sites().collect();
    if candidates.len() > max_sites {
        let mut chosen: HashSet<SiteKey> = severities.keys().copied().collect();
        candidates.sort_by_key(|h| (Reverse(h.latest.totals.outstanding_bytes()), h.site().key));
        chosen.extend(candidates.iter().take(max_sites).map(|h| h.site().key));
        candidates.sort_by(|a, b| rise(b).total_cmp(&rise(a)).then_with(|| a.site().key.cmp(&b.site().key)));
        chosen.extend(candidates.iter().take(max_sites).map(|h| h.site().key));
        candidates.retain(|h| chosen.contains(&h.site().key));
    }
    let severity = |h: &SiteHistory| severities.get(&h.site().key).map(|(severity, _)| *severity);
    let mut ranked: Vec<(&SiteHistory, f64)> =
        candidates.into_iter().map(|h| (h, trend::growth_bytes_per_s(h.series.samples()))).collect();
    ranked.sort_by(|(a, a_growth), (b, b_growth)| {
        // Sites that only a resolved alert is about come right after those with one that fires.
        (severity(b).cmp(&severity(a)))
            .then_with(|| b_growth.total_cmp(a_growth))
            .then_with(|| b.latest.totals.outstanding_bytes().cmp(&a.latest.totals.outstanding_bytes()))
            .then_with(|| a.site().key.cmp(&b.site().key))
    });
    let with_alert = ranked.iter().take_while(|(h, _)| severity(h).is_some()).count();
    ranked.truncate(max_sites.max(with_alert));
    ranked
}

/// Rise of the outstanding bytes from the first to the newest sample, bytes per second.
fn rise(h: &SiteHistory) -> f64 {
    match (h.series.samples().first(), h.series.samples().last()) {
        (Some(first), Some(last)) if last.time_s > first.time_s => {
            let (from, to) = (first.totals.outstanding_bytes() as f64, last.totals.outstanding_bytes() as f64);
            (to - from) / (last.time_s - first.time_s)
        }
        _ => 0.0,
    }
}

impl TotalsView {
    fn new(history: &History, now_s: f64) -> Self {
        let series = history.totals().samples();
        let mut stderr = StandardErrors::default();
        history.live_sites().for_each(|h| stderr.add(&h.latest.stderr));
        let totals = series.last().map(|s| s.totals).unwrap_or_default();
        let growing_since_s = trend::growing_since_s(series);
        TotalsView {
            outstanding_bytes: totals.outstanding_bytes(),
            outstanding_count: totals.outstanding_count(),
            totals,
            stderr,
            growth_bytes_per_s: trend::growth_bytes_per_s(series),
            growing_since_s,
            growing_for_s: growing_since_s.map(|s| now_s - s),
        }
    }
}

impl Findings {
    fn new(alerts: &[AlertView]) -> Self {
        let firing =
            |severity| alerts.iter().filter(|a| a.status == AlertStatus::Firing && a.severity == severity).count();
        let (critical, warning, info) = (firing(Severity::Critical), firing(Severity::Warning), firing(Severity::Info));
        let total = critical + warning + info;
        Findings { total, critical, warning, info, resolved: alerts.len() - total }
    }
}

/// Alerts in the order of the report: firing first, then by rank of the site, then by severity.
fn alert_contexts(alerts: &[AlertView], sites: &[SiteView], now_s: f64, zero_wall_s: f64) -> Vec<AlertContext> {
    let places: HashMap<SiteKey, usize> = sites.iter().enumerate().map(|(i, s)| (s.key, i)).collect();
    let mut out: Vec<AlertContext> = (alerts.iter())
        .map(|a| AlertContext {
            id: name(&a.id),
            status: a.status,
            since_s: a.since_s,
            since_wall_s: zero_wall_s + a.since_s,
            lasted_s: (now_s - a.since_s).max(0.0),
            rule: name(&a.rule),
            severity: a.severity,
            confidence: a.confidence,
            reason: name(&a.reason),
            processes: a.processes.max(1),
            site: places.get(&a.site).map(|i| AlertSite::new(*i, &sites[*i])),
        })
        .collect();
    let place = |a: &AlertContext| a.site.as_ref().map_or(usize::MAX, |s| s.index);
    out.sort_by(|a, b| {
        (a.status == AlertStatus::Resolved)
            .cmp(&(b.status == AlertStatus::Resolved))
            // The places follow the worst severity of a site, and keep what is said about one site together.
            .then_with(|| place(a).cmp(&place(b)))
            .then_with(|| b.severity.cmp(&a.severity))
            .then_with(|| (&a.rule, &a.id).cmp(&(&b.rule, &b.id)))
    });
    out
}

impl AlertSite {
    fn new(index: usize, s: &SiteView) -> Self {
        AlertSite {
            index,
            id: s.id.clone(),
            pid: s.pid,
            comm: s.comm.clone(),
            probe_set: s.probe_set.clone(),
            function: s.function.clone(),
            heading: s.heading.clone(),
            outstanding_bytes: s.outstanding_bytes,
            outstanding_count: s.outstanding_count,
            growth_bytes_per_s: s.growth_bytes_per_s,
            oldest_age_s: s.oldest_age_s,
            reachability: s.reachability.as_ref().map(|r| AlertReach {
                verdict: r.verdict,
                evidence: r.evidence.clone(),
                way: r.way.clone(),
            }),
        }
    }
}

fn shown_plugin(p: &PluginStatus) -> PluginStatus {
    PluginStatus { target: name(&p.target), detail: name(&p.detail), ..p.clone() }
}

/// Processes, largest outstanding bytes first.
fn processes(history: &History) -> Vec<ProcessView> {
    let mut sums: HashMap<u32, (usize, Totals)> = HashMap::new();
    for h in history.sites() {
        let (sites, totals) = sums.entry(h.site().key.instance).or_default();
        *sites += 1;
        totals.add(&h.latest.totals);
    }
    let mut out: Vec<ProcessView> = (history.processes())
        .map(|p| {
            let (sites, totals) = sums.get(&p.process.instance).copied().unwrap_or_default();
            ProcessView::new(p, sites, totals)
        })
        .collect();
    out.sort_by_key(|p| (Reverse(p.outstanding_bytes), p.instance));
    out
}

impl ProcessView {
    fn new(p: &ProcessSample, sites: usize, totals: Totals) -> Self {
        let labels = &p.process.labels;
        let label = |text: &Option<String>| text.as_deref().map(name);
        ProcessView {
            instance: p.process.instance,
            pid: p.process.pid,
            comm: name(&p.process.comm),
            exe: name(&p.process.exe),
            cmdline: name(&p.process.cmdline),
            container: label(&labels.container),
            runtime: label(&labels.runtime),
            pod: label(&labels.pod),
            unit: label(&labels.unit),
            slice: label(&labels.slice),
            labels: name(&labels.summary()),
            alive: p.alive,
            mode: p.mode,
            sites,
            outstanding_bytes: totals.outstanding_bytes(),
            outstanding_count: totals.outstanding_count(),
            rss_bytes: p.rss_bytes,
            rss_anon_bytes: p.rss_anon_bytes,
            coverage: p.coverage,
            hard_stops: p.hard_stops,
            hits: p.hits,
            cpu_s: p.cpu_s,
            overhead_s: p.overhead_s,
            overhead_share: share(p.overhead_s, p.cpu_s),
            losses: p.losses.total(),
        }
    }
}

impl Cost {
    fn new(processes: &[ProcessView], run: &RunInfo) -> Self {
        let overhead_s = processes.iter().map(|p| p.overhead_s).sum();
        let cpu_s: Option<f64> = processes.iter().map(|p| p.cpu_s).sum();
        Cost {
            budget: run.budget.clone(),
            overhead_s,
            overhead_share: share(overhead_s, cpu_s),
            own_cpu_s: run.own_cpu_s,
            own_rss_bytes: run.own_rss_bytes,
            own_map_bytes: run.own_map_bytes,
            own_snapshot_cpu_s: run.own_snapshot_cpu_s,
        }
    }
}

/// Share of the CPU time; `None` when that is not known or zero.
fn share(overhead_s: f64, cpu_s: Option<f64>) -> Option<f64> {
    cpu_s.filter(|cpu| *cpu > 0.0).map(|cpu| (overhead_s / cpu).min(1.0))
}

/// 128 bits that nothing in the report's data can have known: the standard library seeds its hashers from the
/// operating system's random numbers.
pub(crate) fn nonce() -> String {
    use std::hash::{BuildHasher, RandomState};
    let random = || RandomState::new().hash_one(0_u8);
    format!("{:016x}{:016x}", random(), random())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two reports must not share a nonce, or the one could carry scripts for the other.
    #[test]
    fn nonces_differ() {
        let (a, b) = (nonce(), nonce());
        assert_eq!(a.len(), 32);
        assert_ne!(a, b);
    }
}
