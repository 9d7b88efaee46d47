//! `memleak replay`: rules over the snapshots of a recorded run, as they came.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::compare::{self, Comparison};
use super::labels::{self, Labels, Score};
use super::{open, progress};
use crate::alert::AlertManager;
use crate::config::{Config, Override};
use crate::finding::{Finding, Severity};
use crate::history::History;
use crate::output::report::heading;
use crate::output::text::visible;
use crate::recording::{Reader, recorded};
use crate::rules::{RuleEngine, RuleError};
use crate::snapshot::SiteKey;
use crate::symbolize::Frame;
use crate::units::format_duration_s;
use crate::{Error, ErrorKind, Result, cli};

/// What `memleak replay` is to do.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// The recording.
    pub recording: PathBuf,
    /// Print one JSON object.
    pub json: bool,
    /// What overrides the settings of the run.
    pub overrides: Vec<Override>,
    /// Folder with rules, as in a run.
    pub rules: Option<PathBuf>,
    /// File of suppressions, as in a run.
    pub suppressions: Option<PathBuf>,
    /// Folder with the rules of a second replay, to be compared with the first.
    pub compare: Option<PathBuf>,
    /// What overrides the settings for the second replay.
    pub compare_overrides: Vec<Override>,
    /// File that says which sites leak.
    pub labels: Option<PathBuf>,
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
    /// Number of the process in the run; no two have the same.
    pub instance: u32,
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

/// When one rule has fired.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RuleTimes {
    /// Name of the rule.
    pub rule: String,
    /// How many findings it made.
    pub findings: usize,
    /// At how many sites; processes that share one count as one.
    pub sites: usize,
    /// Time of the first finding, seconds since the collector started; `None` without one.
    pub first_s: Option<f64>,
    /// How many stand at the end.
    pub standing: usize,
}

/// What rules say of a recording.
#[derive(Debug, Serialize)]
pub struct Replayed {
    /// Snapshots that were looked at.
    pub snapshots: u64,
    /// How often an alert would have been raised.
    pub raised: u64,
    /// Every rule that ran, by name.
    pub rules: Vec<RuleTimes>,
    /// In the order in which they began.
    pub findings: Vec<Found>,
    /// Errors of rules, each once.
    pub errors: Vec<String>,
}

/// Runs the rules over all snapshots of a recording, as they came.
///
/// # Errors
/// The recording or a rule cannot be read.
pub fn run_rules(reader: &Reader, config: &Config, progress: &mut dyn FnMut()) -> Result<Replayed> {
    let mut rules = RuleEngine::new(&config.rules)?;
    let mut history = History::new(config.history);
    let mut alerts = AlertManager::new(&config.alerts);
    let mut found: Vec<Found> = Vec::new();
    let mut standing: HashMap<(String, SiteKey), usize> = HashMap::new();
    let mut errors: Vec<String> = Vec::new();
    let mut replay = reader.replay()?;
    while let Some(snapshot) = replay.push(&mut history)? {
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
    let ran = rules.rules().filter(|r| r.enabled).map(|r| times(&r.name, &found)).collect();
    Ok(Replayed { snapshots: history.snapshots(), raised: alerts.raised(), rules: ran, findings: found, errors })
}

fn times(rule: &str, found: &[Found]) -> RuleTimes {
    let of_rule = || found.iter().filter(|f| f.rule == rule);
    let mut sites: Vec<&str> = of_rule().map(|f| f.site.as_str()).collect();
    sites.sort_unstable();
    sites.dedup();
    RuleTimes {
        rule: rule.to_owned(),
        findings: of_rule().count(),
        sites: sites.len(),
        first_s: of_rule().map(|f| f.first_s).reduce(f64::min),
        standing: of_rule().filter(|f| f.standing).count(),
    }
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
        instance: finding.site.key.instance,
        first_snapshot: number,
        last_snapshot: number,
        first_s: time_s,
        last_s: time_s,
        standing: false,
    }
}

/// The function of a stack that people look at first, or its module.
pub(super) fn place(frames: &[Frame]) -> String {
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

/// One replay with what it is worth.
struct Judged {
    replayed: Replayed,
    scores: Vec<Score>,
}

/// What is printed with `--json`.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Printed<'a> {
    Replay {
        #[serde(flatten)]
        replayed: &'a Replayed,
        #[serde(skip_serializing_if = "<[Score]>::is_empty")]
        scores: &'a [Score],
    },
    ReplayComparison {
        #[serde(flatten)]
        comparison: &'a Comparison,
        #[serde(skip_serializing_if = "<[Score]>::is_empty")]
        first_scores: &'a [Score],
        #[serde(skip_serializing_if = "<[Score]>::is_empty")]
        second_scores: &'a [Score],
    },
}

/// Runs rules over a recording and prints what they find. True when an alert would have been raised; with a comparison,
/// when the two replays differ.
///
/// # Errors
/// The recording, a rule, a setting or the labels cannot be read.
pub fn replay(options: &Options) -> Result<bool> {
    let labels = options.labels.as_deref().map(Labels::load).transpose()?;
    let reader = open(&options.recording)?;
    let config = |overrides: &[Override], rules: &Option<PathBuf>| -> Result<Config> {
        let mut config = recorded(&reader.session().settings, reader.shown(), overrides)?;
        config.rules.dir.clone_from(rules);
        config.rules.suppressions_file.clone_from(&options.suppressions);
        Ok(config)
    };
    let first = config(&options.overrides, &options.rules)?;
    let compared = options.compare.is_some() || !options.compare_overrides.is_empty();
    let (printed, text, differs) = if compared {
        let overrides = [options.overrides.as_slice(), &options.compare_overrides].concat();
        let rules = options.compare.clone().or_else(|| options.rules.clone());
        let second = config(&overrides, &rules)?;
        let bar = progress(2 * reader.contents().len(), "replaying");
        let judge = |config: &Config| judge(&options.recording, config, labels.as_ref(), &mut || bar.inc(1));
        // Each half has a reader of its own, so they run side by side.
        let (first, second) = std::thread::scope(|scope| {
            let other = scope.spawn(|| judge(&second));
            let first = judge(&first);
            let died = |_| Err(Error::new(ErrorKind::Io, "the second replay has died"));
            (first, other.join().unwrap_or_else(died))
        });
        bar.finish_and_clear();
        let (first, second) = (first?, second?);
        let comparison = compare::compare(&first.replayed, &second.replayed);
        let (first_scores, second_scores) = (first.scores.as_slice(), second.scores.as_slice());
        let mut text = comparison.text();
        text.push_str(&labels::text("first", first_scores));
        text.push_str(&labels::text("second", second_scores));
        (
            json(&Printed::ReplayComparison { comparison: &comparison, first_scores, second_scores })?,
            text,
            comparison.differs(),
        )
    } else {
        let bar = progress(reader.contents().len(), "replaying");
        let Judged { replayed, scores } = judge(&options.recording, &first, labels.as_ref(), &mut || bar.inc(1))?;
        bar.finish_and_clear();
        let text = text(&replayed) + &labels::text("", &scores);
        (json(&Printed::Replay { replayed: &replayed, scores: &scores })?, text, replayed.raised > 0)
    };
    cli::print(if options.json { &printed } else { &text })?;
    Ok(differs)
}

fn judge(path: &Path, config: &Config, labels: Option<&Labels>, progress: &mut dyn FnMut()) -> Result<Judged> {
    let reader = Reader::open(path)?;
    let replayed = run_rules(&reader, config, progress)?;
    for error in &replayed.errors {
        tracing::error!("{error}");
    }
    let scores = labels.map(|l| l.score(&reader, &replayed, config.alerts.min_severity)).transpose()?;
    Ok(Judged { replayed, scores: scores.unwrap_or_default() })
}

fn json(printed: &Printed<'_>) -> Result<String> {
    let failed = |e| Error::with_source(ErrorKind::Io, "failed to print the replay as JSON", e);
    serde_json::to_string(printed).map(|text| text + "\n").map_err(failed)
}

/// Rule by rule, each with its findings in the order in which they began.
fn text(replayed: &Replayed) -> String {
    let mut out = String::new();
    for times in &replayed.rules {
        let Some(first_s) = times.first_s else {
            out.push_str(&format!("{}: no finding\n", times.rule));
            continue;
        };
        let count = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        out.push_str(&format!(
            "{}: {} at {}, the first after {}; {} at the end\n",
            times.rule,
            count(times.findings, "finding"),
            count(times.sites, "site"),
            format_duration_s(first_s),
            times.standing
        ));
        for f in replayed.findings.iter().filter(|f| f.rule == times.rule) {
            let end = if f.standing { "the end".to_owned() } else { format_duration_s(f.last_s) };
            out.push_str(&format!(
                "  {} to {end}: {} {:.2} {} (pid {}, id {})\n      {}\n",
                format_duration_s(f.first_s),
                f.severity.as_str(),
                f.confidence,
                f.place,
                f.pid,
                f.id,
                visible(&f.reason)
            ));
        }
    }
    let (findings, snapshots, raised) = (replayed.findings.len(), replayed.snapshots, replayed.raised);
    out.push_str(&format!("{snapshots} snapshots, {findings} findings, {raised} alerts\n"));
    out
}
