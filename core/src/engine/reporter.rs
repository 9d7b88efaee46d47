//! Gathers what a report says of the run besides its history, and writes the report.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::alert::{Alert, AlertManager, Status};
use crate::collector::{self, Collector, Notice};
use crate::config::{Budget, Config, Latency, TargetSpec};
use crate::doctor::kernel_release;
use crate::history::History;
use crate::output::atomic;
use crate::output::report::{AlertStatus, AlertView, PluginState, PluginStatus, Report, RuleStatus, RunInfo};
use crate::output::templates::Templates;
use crate::rules::{RuleEngine, RuleError};
use crate::selfstats::own_cost;
use crate::snapshot::{Mode, Site, Snapshot};
use crate::units::format_duration_s;
use crate::{Error, Result};

/// Most lines of the table of probe sets; the newest are kept.
const MAX_STATUSES: usize = 500;

pub(super) struct Reporter<'a> {
    config: &'a Config,
    templates: Arc<Templates>,
    backend: String,
    started_wall_s: f64,
    prices: memleak_probes::Prices,
    statuses: Vec<PluginStatus>,
    rule_errors: BTreeMap<String, String>,
    /// CPU time of all snapshots, seconds.
    snapshots_cpu_s: f64,
}

impl<'a> Reporter<'a> {
    pub(super) fn new(config: &'a Config, collector: &Collector, templates: Arc<Templates>) -> Self {
        Reporter {
            config,
            templates,
            backend: collector.backend(),
            started_wall_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64()),
            prices: collector.prices(),
            statuses: Vec::new(),
            rule_errors: BTreeMap::new(),
            snapshots_cpu_s: 0.0,
        }
    }

    /// Keeps what a snapshot has cost.
    pub(super) fn note_snapshot(&mut self, snapshot: &Snapshot) {
        self.snapshots_cpu_s += snapshot.collect_cpu_s;
    }

    /// Keeps what became of the probe sets.
    pub(super) fn note_process(&mut self, notice: &Notice) {
        let Notice::Watching(process, statuses) = notice else { return };
        for status in statuses {
            let (state, probes, detail) = match &status.state {
                collector::PluginState::Attached { file, functions } => {
                    let probes = functions.iter().filter(|f| f.placement.is_ok()).count() as u64;
                    (PluginState::Attached, probes, file.clone())
                }
                collector::PluginState::NotMapped => {
                    (PluginState::Skipped, 0, "nothing that the process has mapped provides it".to_owned())
                }
                collector::PluginState::Failed { file, reason } => {
                    (PluginState::Failed, 0, format!("{file}: {reason}"))
                }
            };
            let target = format!("{} {}", process.pid, process.comm);
            let probe_set = status.probe_set.to_string();
            self.statuses.push(PluginStatus { probe_set, target, state, probes, detail });
        }
        let excess = self.statuses.len().saturating_sub(MAX_STATUSES);
        self.statuses.drain(..excess);
    }

    /// Keeps the newest error of each rule; tells of each new one.
    pub(super) fn note_rule_errors(&mut self, errors: &[RuleError]) {
        for error in errors {
            let message = error.to_string();
            if self.rule_errors.insert(error.rule.to_string(), message.clone()).is_none_or(|old| old != message) {
                tracing::error!("{message}");
            }
        }
    }

    /// Keeps why a changed rule was not taken in.
    pub(super) fn note_reload_failure(&mut self, rule: &str, message: &str) {
        self.rule_errors.insert(rule.to_owned(), message.to_owned());
    }

    /// The sites that a report will show, or some more.
    pub(super) fn sites(&self, history: &History) -> Vec<Arc<Site>> {
        if self.config.report.path.is_none() {
            return Vec::new();
        }
        let mut sites: Vec<_> = history.sites().filter(|h| h.latest.totals.outstanding_bytes() > 0).collect();
        sites.sort_by_key(|h| std::cmp::Reverse(h.latest.totals.outstanding_bytes()));
        sites.iter().take(self.config.report.max_sites).map(|h| Arc::clone(h.site())).collect()
    }

    /// Writes the page; `None` when none is wanted.
    pub(super) fn write(
        &self,
        history: &History,
        alerts: &AlertManager,
        rules: &RuleEngine,
    ) -> Result<Option<PathBuf>> {
        let Some(path) = &self.config.report.path else { return Ok(None) };
        let html = self.report(history, alerts, rules).html(&self.templates)?;
        atomic::write(path, html.as_bytes())
            .map_err(|e| Error::with_source(e.kind(), format!("failed to write the report {}", path.display()), e))?;
        Ok(Some(path.clone()))
    }

    /// The closing text.
    pub(super) fn text(&self, history: &History, alerts: &AlertManager, rules: &RuleEngine) -> Result<String> {
        self.report(history, alerts, rules).text(&self.templates)
    }

    fn report(&self, history: &History, alerts: &AlertManager, rules: &RuleEngine) -> Report {
        let views: Vec<AlertView> = alerts.active().into_iter().chain(alerts.resolved()).map(view).collect();
        Report::new(history, &views, &self.run_info(history, rules), self.config.report.max_sites)
    }

    /// What the report says of the run.
    pub(super) fn run_info(&self, history: &History, rules: &RuleEngine) -> RunInfo {
        let kernel = self.config.kernel.enabled.then(|| "kernel".to_owned());
        let targets: Vec<String> = self.config.targets.iter().map(describe).chain(kernel).collect();
        let own = own_cost();
        let shown = |path: &Option<PathBuf>| {
            path.as_ref().map(|p| std::path::absolute(p).unwrap_or_else(|_| p.clone()).display().to_string())
        };
        RunInfo {
            title: self.config.report.title.clone().unwrap_or_else(|| format!("memleak: {}", targets.join(", "))),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host: std::fs::read_to_string("/proc/sys/kernel/hostname")
                .map_or_else(|_| "?".into(), |s| s.trim().to_owned()),
            kernel: kernel_release(),
            started_wall_s: self.started_wall_s,
            targets,
            interval_s: self.config.interval.as_secs_f64(),
            backend: self.backend.clone(),
            rules: rules
                .rules()
                .filter(|r| r.enabled)
                .map(|r| RuleStatus {
                    name: r.name.to_string(),
                    description: r.description.clone(),
                    error: self.rule_errors.get(&*r.name).cloned(),
                })
                .collect(),
            plugins: self.statuses.clone(),
            budget: Some(self.overhead_line(history)),
            own_cpu_s: own.cpu_s,
            own_rss_bytes: own.rss_bytes,
            own_map_bytes: own.map_bytes,
            own_snapshot_cpu_s: Some(self.snapshots_cpu_s / history.snapshots() as f64).filter(|s| s.is_finite()),
            report_path: shown(&self.config.report.path),
            alerts_path: shown(&self.config.alerts.file),
            gaps: Vec::new(),
        }
    }

    /// What tracing has cost the targets, as an estimate, and what it was allowed to.
    fn overhead_line(&self, history: &History) -> String {
        // The kernel's events have a price of their own.
        let processes = || history.processes().filter(|p| p.kernel.is_none());
        let hits: u64 = processes().map(|p| p.hits).sum();
        let cost: f64 = processes().map(|p| p.overhead_s).sum();
        let kernel: f64 = history.processes().filter(|p| p.kernel.is_some()).map(|p| p.overhead_s).sum();
        let kernel = match kernel / history.time_s() {
            share if share > 0.0 => format!("; tracing the kernel about {:.1} % of one core", share * 100.0),
            _ => String::new(),
        };
        if self.config.targets.is_empty() {
            let allowed = match self.config.kernel.budget {
                None => "no budget: everything is recorded whatever it costs".to_owned(),
                Some(part) => format!("budget: {:.0} % of the machine's CPU time", part * 100.0),
            };
            return format!("{allowed}{kernel}");
        }
        let share = if history.time_s() > 0.0 { cost / history.time_s() * 100.0 } else { 0.0 };
        let budget = &self.config.collector.budget;
        let allowed = match budget.share {
            None => "no budget: every call is traced whatever it costs".to_owned(),
            Some(part) => format!(
                "budget: {:.0} % of a target's CPU time, at least {:.0} % of one core, kept by tracing through windows \
                 where every call would cost more",
                part * 100.0,
                budget.floor * 100.0
            ),
        };
        let own = self.config.targets.iter().filter(|t| t.budget.is_some() || t.latency == Latency::Sensitive).count();
        let allowed = match own {
            0 => allowed,
            n => format!("{allowed} ({n} of {} targets with settings of their own)", self.config.targets.len()),
        };
        let windowed = history.processes().filter(|p| p.mode == Mode::Estimated);
        let (windows, discarded, open_s) =
            windowed.fold((0, 0, 0.0), |(w, d, o), p| (w + p.windows, d + p.windows_discarded, o + p.open_s));
        let stops: u64 = history.processes().map(|p| p.hard_stops).sum();
        let stops = match stops {
            0 => String::new(),
            1 => "; 1 hard stop".to_owned(),
            n => format!("; {n} hard stops"),
        };
        let windows = match windows {
            0 => String::new(),
            n => format!("; {n} windows, {discarded} of them discarded, open for {}", format_duration_s(open_s)),
        };
        format!(
            "tracing cost the targets about {share:.1} % of one core (estimate: {hits} hits, {:.0} ns of trap each and what \
             the programs took); {allowed}{windows}{stops}{kernel}",
            self.prices.trap_ns
        )
    }
}

/// An alert as the report needs it.
fn view(alert: &Alert) -> AlertView {
    AlertView {
        id: alert.id.clone(),
        status: match alert.status {
            Status::Firing => AlertStatus::Firing,
            Status::Resolved => AlertStatus::Resolved,
        },
        since_s: alert.fired_s,
        rule: alert.rule.to_string(),
        severity: alert.severity,
        confidence: alert.confidence,
        reason: alert.reason.clone(),
        site: alert.site.key,
        processes: alert.processes,
    }
}

/// A target in words.
fn describe(target: &TargetSpec) -> String {
    let mut parts: Vec<String> = target.pid.iter().map(|pid| format!("pid {pid}")).collect();
    let conditions = [
        ("name", &target.name),
        ("exe", &target.exe),
        ("cgroup", &target.cgroup),
        ("container", &target.container),
        ("unit", &target.unit),
    ];
    for (what, value) in conditions {
        parts.extend(value.as_ref().map(|v| format!("{what} {v}")));
    }
    if !target.command.is_empty() {
        parts.push(format!("command {}", target.command.join(" ")));
    }
    match target.budget {
        None => {}
        Some(Budget::Off) => parts.push("without a budget".to_owned()),
        Some(Budget::Share(share)) => parts.push(format!("budget {} %", share * 100.0)),
    }
    if target.latency == Latency::Sensitive {
        parts.push("latency-sensitive".to_owned());
    }
    parts.join(" ")
}
