//! `memleak run`: a command and all of its descendants from their first instruction to their end, for tests and CI.
//!
//! Owns the loop and the decision what fails the run. What is reported is outstanding when a process has ended, after
//! its exit handlers; what the handlers have freed is told apart. A process that calls exit() is scanned before them
//! ([`crate::reachability`]). It never touches the command's own output: the report goes to a file or to standard error.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use globset::{Glob, GlobMatcher};
use memleak_probes::Tracker;

use crate::alert::AlertManager;
use crate::collector::{Collector, End, Notice, Purpose};
use crate::config::{Config, nearest};
use crate::finding::{Finding, Severity};
use crate::history::History;
use crate::output::atomic;
use crate::rules::{Ending, RuleEngine};
use crate::snapshot::{Mode, Process, ProcessSample, SiteSample, Snapshot, Totals};
use crate::stop::Stop;
use crate::{Error, Result, check, live};

mod report;
mod text;

pub use report::{CommandEnd, FreedSite, Leak, ProcessEnd, RunReport, Suppressed};

/// Longest time between looks at signals and processes.
const TICK: Duration = Duration::from_millis(100);

/// What makes the run fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FailOn {
    /// Nothing.
    Never,
    /// A finding of this severity or above.
    Severity(Severity),
    /// A finding of the rule of this name.
    Rule(String),
}

impl FromStr for FailOn {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "" => return Err("expected a severity, the name of a rule, or never".to_owned()),
            "never" => FailOn::Never,
            "info" => FailOn::Severity(Severity::Info),
            "warning" => FailOn::Severity(Severity::Warning),
            "critical" => FailOn::Severity(Severity::Critical),
            rule => FailOn::Rule(rule.to_owned()),
        })
    }
}

impl std::fmt::Display for FailOn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            FailOn::Never => "never",
            FailOn::Severity(severity) => severity.as_str(),
            FailOn::Rule(rule) => rule,
        })
    }
}

impl FailOn {
    fn fails(&self, severity: Severity, rule: &str) -> bool {
        match self {
            FailOn::Never => false,
            FailOn::Severity(least) => severity >= *least,
            FailOn::Rule(name) => rule == name,
        }
    }
}

/// How the report is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object.
    Json,
    /// JUnit XML: a test case per finding.
    Junit,
    /// SARIF 2.1.0, for code scanning.
    Sarif,
}

/// Whose exit code `memleak run` ends with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ExitCode {
    /// 0 clean, 1 findings, 2 could not run; the command's own code is only shown.
    #[default]
    Memleak,
    /// The command's own code (128 and the signal's number for a signal) unless that is 0; then memleak's.
    Command,
}

/// What was asked for beside the settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// What makes the run fail.
    pub fail_on: Vec<FailOn>,
    /// How the report is written.
    pub format: Format,
    /// Where to; `None` is standard error, `-` standard output.
    pub out: Option<PathBuf>,
    /// How long to wait for descendants that outlive the command.
    pub wait: Duration,
    /// Globs over names or paths of executables: other processes are followed but not judged. Empty judges all.
    pub only: Vec<String>,
    /// Whose exit code.
    pub exit_code: ExitCode,
    /// No text beside a report in a file.
    pub quiet: bool,
}

/// Runs the command of the settings' target to its end and writes the report.
///
/// # Errors
/// The command cannot be started or watched, or the report cannot be written.
pub fn run(config: &Config, options: &Options, stop: &Stop) -> Result<RunReport> {
    let mut rules = RuleEngine::new(&config.rules)?;
    check_fail_on(options, &rules)?;
    let only = globs(&options.only)?;
    let file = options.out.as_deref().filter(|p| p.as_os_str() != "-");
    if let Some(path) = file {
        check::output("report", path)?;
    }
    let collector = Collector::start(config, Purpose::Run)?;
    let command = config.targets.first().map(|t| t.command.clone()).unwrap_or_default();
    let mut run = Run {
        config,
        options,
        only,
        collector,
        rules: &mut rules,
        history: History::new(config.history),
        alerts: AlertManager::new(&config.alerts),
        report: RunReport::new(command, options),
        last: None,
    };
    run.follow(stop)?;
    let report = run.finish();
    write(&report, options)?;
    Ok(report)
}

fn check_fail_on(options: &Options, rules: &RuleEngine) -> Result<()> {
    for fail_on in &options.fail_on {
        if let FailOn::Rule(name) = fail_on
            && !rules.rules().any(|r| *r.name == **name)
        {
            let known: Vec<&str> =
                ["never", "info", "warning", "critical"].into_iter().chain(rules.rules().map(|r| &*r.name)).collect();
            let hint = nearest(name, known.iter().copied())
                .map_or_else(|| format!("known: {}", known.join(", ")), |n| format!("did you mean {n}?"));
            return Err(Error::config(format!("--fail-on {name}: there is no such severity or rule; {hint}")));
        }
    }
    Ok(())
}

fn globs(only: &[String]) -> Result<Vec<GlobMatcher>> {
    only.iter()
        .map(|text| Glob::new(text).map(|g| g.compile_matcher()))
        .collect::<Result<_, _>>()
        .map_err(|e| Error::config(format!("--only: {e}")))
}

fn write(report: &RunReport, options: &Options) -> Result<()> {
    let text = match options.format {
        Format::Text => text::render(report),
        Format::Json => format!("{}\n", serde_json::to_string(report).map_err(unwritable)?),
        Format::Junit => crate::output::junit::render(report),
        Format::Sarif => crate::output::sarif::render(report).map_err(unwritable)?,
    };
    match options.out.as_deref() {
        Some(path) if path.as_os_str() == "-" => crate::cli::print(&text),
        Some(path) => {
            atomic::write(path, text.as_bytes())?;
            if !options.quiet {
                eprint!("{}", text::render(report));
                eprintln!("report written to {}", crate::output::text::visible(&path.to_string_lossy()));
            }
            Ok(())
        }
        None => {
            eprint!("{text}");
            Ok(())
        }
    }
}

fn unwritable(e: serde_json::Error) -> Error {
    Error::with_source(crate::ErrorKind::Io, "failed to make the report", e)
}

struct Run<'a> {
    config: &'a Config,
    options: &'a Options,
    only: Vec<GlobMatcher>,
    collector: Collector,
    rules: &'a mut RuleEngine,
    history: History,
    alerts: AlertManager,
    report: RunReport,
    /// The newest snapshot: the last look at what outlives the run.
    last: Option<Snapshot>,
}

impl Run<'_> {
    /// Until the command and its descendants have ended, or the wait for the latter is over.
    fn follow(&mut self, stop: &Stop) -> Result<()> {
        let interval = self.config.interval.as_secs_f64();
        let mut next = self.collector.now_s() + interval;
        let mut deadline = self.config.duration.map(|d| self.collector.now_s() + d.as_secs_f64());
        let mut asked = false;
        loop {
            let left = (next.min(deadline.unwrap_or(next)) - self.collector.now_s()).max(0.0);
            self.collector.poll(Duration::from_secs_f64(left).min(TICK))?;
            self.take_notices();
            let now = self.collector.now_s();
            let wait = self.options.wait.as_secs_f64();
            let command_ended = self.collector.command_end().is_some();
            if !asked && (stop.is_requested() || (!command_ended && deadline.is_some_and(|d| now >= d))) {
                // It is asked to end as a service would be, so that its exit handlers run.
                asked = true;
                self.collector.terminate_launched();
                self.report.notes.push("the command was asked to end (SIGTERM)".to_owned());
                deadline = Some(now + wait);
            }
            if command_ended && deadline.is_none_or(|d| d > now + wait) {
                deadline = Some(now + wait);
            }
            let over = self.collector.is_finished() || deadline.is_some_and(|d| now >= d);
            if over || now >= next {
                self.collector.scan()?;
                self.step()?;
                next = self.collector.now_s() + interval;
            }
            if over {
                return Ok(());
            }
        }
    }

    fn take_notices(&mut self) {
        for notice in self.collector.take_notices() {
            match &notice {
                Notice::Failed { pid, reason } => {
                    self.report.notes.push(format!("process {pid} was not watched: {reason}"));
                }
                Notice::Watching(process, statuses) => {
                    if let Some(why) = live::why_not_attached(process, statuses) {
                        self.report.notes.push(format!("nothing was counted in {why}"));
                    }
                }
                _ => {}
            }
            tracing::info!("{}", live::notice_line(&notice));
        }
    }

    /// One interval: the rules for running processes, and the ends since the last one.
    fn step(&mut self) -> Result<()> {
        let snapshot = self.collector.snapshot()?;
        self.history.push(&snapshot);
        let collector = &mut self.collector;
        let evaluation = self.rules.evaluate(&self.history, &mut |site| collector.symbolize(site));
        self.report.note_rule_errors(&evaluation.errors);
        self.alerts.update(&evaluation.findings, &self.history, snapshot.time_s, snapshot.wall_s);
        for alert in self.alerts.active() {
            collector.symbolize(&alert.site);
        }
        for process in snapshot.processes.iter().filter(|p| !p.alive) {
            self.ended(&snapshot, process);
        }
        self.report.duration_s = snapshot.time_s;
        self.report.command_end = CommandEnd::of(self.collector.command_end());
        self.last = Some(snapshot);
        Ok(())
    }

    /// A process has ended: this snapshot is its last.
    fn ended(&mut self, snapshot: &Snapshot, process: &ProcessSample) {
        let ended = self.collector.take_ended(process.process.instance).unwrap_or_default();
        let sites: Vec<&SiteSample> = of(snapshot, process.process.instance);
        let freed: Vec<FreedSite> = ended.before_handlers.iter().flat_map(|b| freed(&sites, b)).collect();
        let ending = match ended.how {
            End::Killed(_) => Some(Ending::Signal),
            End::Exited(_) | End::Unknown => Some(Ending::Exit),
            // What it held was thrown away with its program: that is how exec is meant to be used.
            End::Exec => None,
        };
        let judged = self.is_judged(&process.process);
        let end = ProcessEnd::new(process, ended.how, &sites, &freed, judged && ending.is_some());
        self.report.losses.add(&process.losses);
        self.report.processes.push(end);
        self.report.freed.extend(freed);
        if let (true, Some(ending)) = (judged, ending) {
            self.judge(snapshot, process, &sites, ending);
        }
    }

    fn is_judged(&self, process: &Process) -> bool {
        let name = process.exe.rsplit('/').next().unwrap_or_default();
        let names = [process.comm.as_str(), name, process.exe.as_str()];
        self.only.is_empty() || self.only.iter().any(|glob| names.iter().any(|n| glob.is_match(n)))
    }

    fn judge(&mut self, snapshot: &Snapshot, process: &ProcessSample, sites: &[&SiteSample], ending: Ending) {
        let mut history = History::new(self.config.history);
        history.push(&Snapshot {
            processes: vec![ProcessSample { alive: true, ..process.clone() }],
            sites: sites.iter().copied().cloned().collect(),
            number: 1,
            time_s: snapshot.time_s,
            wall_s: snapshot.wall_s,
            ..Snapshot::default()
        });
        let collector = &mut self.collector;
        let evaluation = self.rules.evaluate_exit(&history, ending, &mut |site| collector.symbolize(site));
        self.report.note_rule_errors(&evaluation.errors);
        for finding in evaluation.findings {
            let totals = history.site(finding.site.key).map(|h| h.latest.totals).unwrap_or_default();
            self.report.add(&finding, totals, process.mode == Mode::Exact);
        }
        for (finding, why) in evaluation.suppressed {
            let totals = history.site(finding.site.key).map(|h| h.latest.totals).unwrap_or_default();
            self.report.suppressed.push(Suppressed::new(&finding, totals, why));
        }
    }

    fn finish(mut self) -> RunReport {
        if let Some(last) = self.last.take() {
            for process in last.processes.iter().filter(|p| p.alive) {
                let sites = of(&last, process.process.instance);
                for sample in sites.iter().filter(|s| s.totals.outstanding_count() > 0) {
                    self.collector.symbolize(&sample.site);
                }
                let judged = self.is_judged(&process.process);
                self.report.losses.add(&process.losses);
                self.report.processes.push(ProcessEnd::running(process, &sites, judged));
                if judged {
                    self.judge(&last, process, &sites, Ending::Running);
                }
            }
        }
        let alerts: Vec<_> = self.alerts.active().into_iter().chain(self.alerts.resolved()).cloned().collect();
        for alert in alerts {
            let finding = Finding {
                id: alert.id.clone(),
                rule: Arc::clone(&alert.rule),
                severity: alert.severity,
                confidence: alert.confidence,
                reason: alert.reason.clone(),
                site: Arc::clone(&alert.site),
            };
            let exact = self.history.process(alert.site.key.instance).is_none_or(|p| p.mode == Mode::Exact);
            self.report.add(&finding, alert.totals, exact);
        }
        if !self.collector.tracker().is_some_and(Tracker::stops_children) {
            let why =
                "this kernel cannot stop new children (Linux 6.13 can): what they allocate at first may be missing";
            self.report.notes.push(why.to_owned());
        }
        let descriptions: BTreeMap<String, String> =
            self.rules.rules().map(|r| (r.name.to_string(), r.description.clone())).collect();
        let suppressions = self.rules.suppressions().map(|(path, uses)| (path.to_owned(), uses));
        let mut report = self.report;
        report.close(&self.options.fail_on, descriptions, suppressions);
        report
    }
}

/// The sites of one process.
fn of(snapshot: &Snapshot, instance: u32) -> Vec<&SiteSample> {
    snapshot.sites.iter().filter(|s| s.site.key.instance == instance).collect()
}

/// What exit handlers have freed of what was outstanding before them.
fn freed<'a>(
    sites: &'a [&SiteSample],
    before: &'a std::collections::HashMap<crate::snapshot::SiteKey, Totals>,
) -> impl Iterator<Item = FreedSite> + 'a {
    sites.iter().filter_map(|sample| {
        let before = before.get(&sample.site.key)?;
        // Handlers may allocate and free blocks of their own: those were not outstanding before.
        let bytes = (sample.totals.freed_bytes - before.freed_bytes).min(before.outstanding_bytes());
        let blocks = (sample.totals.freed_count - before.freed_count).min(before.outstanding_count());
        (blocks > 0).then(|| FreedSite { place: live::stack_head(&sample.site), bytes, blocks })
    })
}
