//! The interval loop: reads, judges, tells, in this order and nothing more.
//!
//! ```text
//! read maps -> snapshot -> history -> rules -> alerts -> sinks (lines, files, webhook, live view, report)
//! ```

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::time::Duration;

use crate::alert::{AlertEvent, AlertManager};
use crate::collector::{Collector, Purpose};
use crate::config::Config;
use crate::history::History;
use crate::output::templates::Templates;
use crate::recording::EventKind;
use crate::rules::{Evaluation, ReloadEvent, ReloadOutcome, RuleEngine};
use crate::snapshot::Snapshot;
use crate::stop::Stop;
use crate::{Result, check, sys};

mod recorder;
mod reporter;
mod sinks;

use recorder::Recorder;
use reporter::Reporter;
use sinks::Sinks;

/// Longest time between looks at signals, rules' files and processes.
const TICK: Duration = Duration::from_millis(100);

/// What standard output shows of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// No live view and no closing text.
    pub quiet: bool,
    /// Snapshots and alerts as JSON lines.
    pub json: bool,
}

/// Starts logging to standard error: warnings, with `verbosity` 1 information, with 2 everything.
pub fn start_log(verbosity: u8) {
    let level = match verbosity {
        0 => tracing_subscriber::filter::LevelFilter::WARN,
        1 => tracing_subscriber::filter::LevelFilter::INFO,
        _ => tracing_subscriber::filter::LevelFilter::DEBUG,
    };
    let log = tracing_subscriber::fmt().with_writer(io::stderr).with_max_level(level).with_target(false).without_time();
    // A second call (in tests) finds a log in place, which is fine.
    let _ = log.with_ansi(io::stderr().is_terminal()).try_init();
    memleak_probes::forward_libbpf_messages();
}

/// Watches the targets of `config` until it is told to stop; true when an alert was raised.
///
/// # Errors
/// Anything that keeps the run from starting, and a report that cannot be written at its end.
pub fn run(config: &Config, output: Output, stop: &Stop) -> Result<bool> {
    if let Some(problem) = check::outputs(config).into_iter().next() {
        return Err(problem);
    }
    // Everything that can be wrong with files comes before anything is attached.
    let templates = Arc::new(Templates::new(config.templates_dir.as_deref())?);
    let rules = RuleEngine::new(&config.rules)?;
    let mut sinks = Sinks::new(config, output, &templates)?;
    let mut collector = Collector::start(config, Purpose::Watch)?;
    collector.require_attached()?;
    sinks.prices = Some(collector.prices());
    let reporter = Reporter::new(config, &collector, templates);
    let history = History::new(config.history);
    let recorder = Recorder::start(config, &reporter.run_info(&history, &rules))?;
    let mut engine = Engine {
        config,
        history,
        alerts: AlertManager::new(&config.alerts),
        reporter,
        recorder,
        collector,
        rules,
        sinks,
        last: None,
    };
    engine.run(stop)
}

struct Engine<'a> {
    config: &'a Config,
    collector: Collector,
    history: History,
    rules: RuleEngine,
    alerts: AlertManager,
    reporter: Reporter<'a>,
    recorder: Option<Recorder>,
    sinks: Sinks,
    last: Option<Snapshot>,
}

impl Engine<'_> {
    fn run(&mut self, stop: &Stop) -> Result<bool> {
        let interval = self.config.interval.as_secs_f64();
        let end = self.config.duration.map(|d| self.collector.now_s() + d.as_secs_f64());
        let mut next = self.collector.now_s();
        let mut next_report = self.config.report.every.map(|every| next + every.as_secs_f64());
        loop {
            let now = self.collector.now_s();
            let over = stop.is_requested() || end.is_some_and(|e| now >= e) || self.collector.is_finished();
            if over || now >= next {
                self.step(stop)?;
                sys::give_memory_back();
                // Late by more than an interval: go on from now instead of catching up.
                next = (next + interval).max(self.collector.now_s().min(next + 2.0 * interval));
            }
            if over {
                break;
            }
            if stop.take_scan_request() {
                self.collector.scan_all()?;
            }
            if stop.take_report_request() || next_report.is_some_and(|at| now >= at) {
                next_report = self.config.report.every.map(|every| now + every.as_secs_f64());
                self.report_while_running();
            }
            let until = end.map_or(next, |e| e.min(next)) - self.collector.now_s();
            // The step may have taken longer than what was left, and to follow the targets may take long, too.
            if stop.is_requested() || end.is_some_and(|e| self.collector.now_s() >= e) {
                continue;
            }
            self.collector.poll(Duration::from_secs_f64(until.max(0.0)).min(TICK))?;
            self.follow_processes();
            self.reload_rules();
        }
        self.finish()
    }

    /// One interval.
    fn step(&mut self, stop: &Stop) -> Result<()> {
        self.collector.scan()?;
        self.follow_processes();
        let snapshot = self.collector.snapshot()?;
        self.history.push(&snapshot);
        self.reporter.note_snapshot(&snapshot);
        let collector = &mut self.collector;
        let evaluation = self.rules.evaluate(&self.history, &mut |site| collector.symbolize(site));
        self.reporter.note_rule_errors(&evaluation.errors);
        self.collector.scan_suspects(evaluation.findings.iter().map(|f| &*f.site))?;
        self.collector.scan_asked(evaluation.scans.iter().map(|site| &**site))?;
        let events = self.alerts.update(&evaluation.findings, &self.history, snapshot.time_s, snapshot.wall_s);
        self.name(&snapshot, &events);
        self.record(&snapshot, &evaluation, &events);
        let told = self.sinks.tell(&snapshot, &self.history, &self.alerts, &events);
        // Only a recording asks for it, and with many sites it is large.
        self.last = self.recorder.is_some().then_some(snapshot);
        match told {
            // The reader of our output has seen enough.
            Err(e) if crate::cli::is_closed_pipe(&e) => {
                stop.request();
                Ok(())
            }
            other => other,
        }
    }

    /// Symbolizes what is about to be shown.
    fn name(&mut self, snapshot: &Snapshot, events: &[AlertEvent]) {
        for sample in snapshot.sites.iter().take(self.sinks.sites_shown()) {
            self.collector.symbolize(&sample.site);
        }
        for alert in self.alerts.active() {
            self.collector.symbolize(&alert.site);
        }
        for event in events {
            self.collector.symbolize(&event.alert.site);
        }
    }

    /// Writes the recording, if there is one.
    fn record(&mut self, snapshot: &Snapshot, evaluation: &Evaluation, events: &[AlertEvent]) {
        let Some(recorder) = &mut self.recorder else { return };
        let run = self.reporter.run_info(&self.history, &self.rules);
        let said = recorder.push(snapshot, evaluation, (&self.alerts, events), &run, &mut self.collector);
        if let Some(line) = said {
            self.sinks.say(&line);
        }
    }

    fn follow_processes(&mut self) {
        for notice in self.collector.take_notices() {
            self.reporter.note_process(&notice);
            if let Some(recorder) = &mut self.recorder {
                recorder.note(&notice, self.collector.now_s());
            }
            self.sinks.notice(&notice);
        }
    }

    fn reload_rules(&mut self) {
        for ReloadEvent { file, rule, outcome } in self.rules.poll(&self.history) {
            if let Some(recorder) = &mut self.recorder {
                let what = format!("rule {}: {outcome:?} ({})", rule.as_deref().unwrap_or("?"), file.display());
                recorder.event(EventKind::Rule, self.collector.now_s(), None, what);
            }
            let file = file.display();
            let name = rule.as_deref().unwrap_or("?");
            match outcome {
                ReloadOutcome::Added => self.sinks.say(&format!("rule {name}: added from {file}")),
                ReloadOutcome::Changed => self.sinks.say(&format!("rule {name}: reloaded from {file}")),
                ReloadOutcome::Removed => self.sinks.say(&format!("rule {name}: removed with {file}")),
                ReloadOutcome::Failed(why) => {
                    let message = format!("{file}: {why}");
                    tracing::error!("rule {name} is not reloaded, what ran before goes on: {message}");
                    self.reporter.note_reload_failure(name, &message);
                }
            }
        }
    }

    /// A report that was asked for; failing to write it ends nothing.
    fn report_while_running(&mut self) {
        match self.report() {
            Ok(Some(path)) => self.sinks.say(&format!("report written to {}", path.display())),
            Ok(None) => tracing::warn!("no report is written: report.path is not set"),
            Err(e) => tracing::error!("{e:#}"),
        }
    }

    fn report(&mut self) -> Result<Option<std::path::PathBuf>> {
        let sites = self.reporter.sites(&self.history);
        self.sinks.symbolize_all(&mut self.collector, &sites);
        self.reporter.write(&self.history, &self.alerts, &self.rules)
    }

    /// The last words: report, closing text, webhook.
    fn finish(&mut self) -> Result<bool> {
        let written = self.report();
        if let Some(recorder) = self.recorder.take() {
            let run = self.reporter.run_info(&self.history, &self.rules);
            recorder.finish(self.last.as_ref(), &self.alerts, &run, &mut self.collector);
        }
        self.collector.terminate_launched();
        let text = self.reporter.text(&self.history, &self.alerts, &self.rules);
        let told = self.sinks.finish(text);
        let raised = self.alerts.raised() > 0;
        written?;
        match told {
            Err(e) if crate::cli::is_closed_pipe(&e) => Ok(raised),
            other => other.map(|()| raised),
        }
    }
}
