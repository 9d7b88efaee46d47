//! What people know of a recording's sites, and how well rules agree with it: precision and recall.
//!
//! A file of labels has a line per group of sites: `leak` or `quiet`, and a pattern as in a file of suppressions. The
//! first line that fits a site counts; a site that none fits counts for nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;

use super::replay::{Replayed, place};
use crate::finding::Severity;
use crate::output::text::visible;
use crate::recording::Reader;
use crate::rules::CodePattern;
use crate::units::format_duration_s;
use crate::{Error, Result};

/// Largest file, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// How well the findings of a rule agree with the labels. Sites count, not findings, and processes that share a site
/// count as one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Score {
    /// The rule; `None` for all together.
    pub rule: Option<String>,
    /// Leaks that it found.
    pub found: usize,
    /// Quiet sites that it took for leaks: their names.
    pub false_alarms: Vec<String>,
    /// Leaks that it did not find: their names.
    pub missed: Vec<String>,
    /// Sites with a finding and without a label.
    pub unlabelled: usize,
    /// Part of the labelled sites with a finding that are leaks; `None` without any.
    pub precision: Option<f64>,
    /// Part of the leaks that were found; `None` when there is no leak.
    pub recall: Option<f64>,
    /// Time from the first snapshot of a leaking site to the finding, seconds: the median; `None` without any.
    pub median_delay_s: Option<f64>,
}

/// A file of labels.
#[derive(Debug)]
pub(super) struct Labels(Vec<(bool, CodePattern)>);

impl Labels {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or has a line that is no label: with file and line.
    pub(super) fn load(path: &Path) -> Result<Labels> {
        let shown = path.display();
        let failed = |e| Error::io(format!("failed to read the labels {shown}"), e);
        let mut text = String::new();
        File::open(path).map_err(failed)?.take(MAX_FILE + 1).read_to_string(&mut text).map_err(failed)?;
        if text.len() as u64 > MAX_FILE {
            return Err(Error::config(format!("{shown}: the file is larger than {MAX_FILE} bytes")));
        }
        let mut labels = Vec::new();
        for (number, line) in (1..).zip(text.lines().map(str::trim)) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let label = parse(line).map_err(|why| Error::config(format!("{shown}:{number}: {why}")))?;
            labels.push(label);
        }
        if labels.is_empty() {
            return Err(Error::config(format!("{shown}: there is no label in it")));
        }
        Ok(Labels(labels))
    }

    /// Compares findings of at least a severity with the labels: every rule by itself, then all together.
    ///
    /// # Errors
    /// The recording is damaged.
    pub(super) fn score(&self, reader: &Reader, replayed: &Replayed, least: Severity) -> Result<Vec<Score>> {
        let mut known: BTreeMap<String, (bool, String)> = BTreeMap::new();
        for site in reader.sites() {
            reader.name(site)?;
            if let Some((leaks, _)) = self.0.iter().find(|(_, pattern)| pattern.matches(site.frames())) {
                known.insert(format!("{:016x}", site.id), (*leaks, place(site.frames())));
            }
        }
        let begins = first_seen(reader)?;
        let rules = replayed.rules.iter().map(|r| Some(r.rule.clone()));
        Ok(rules.chain([None]).map(|rule| score(rule, &known, &begins, replayed, least)).collect())
    }
}

/// When each site was first seen, seconds since the collector started.
fn first_seen(reader: &Reader) -> Result<BTreeMap<String, f64>> {
    let mut begins = BTreeMap::new();
    for (site, time_s) in reader.first_seen()? {
        begins.entry(format!("{:016x}", site.id)).or_insert(time_s);
    }
    Ok(begins)
}

fn score(
    rule: Option<String>,
    known: &BTreeMap<String, (bool, String)>,
    begins: &BTreeMap<String, f64>,
    replayed: &Replayed,
    least: Severity,
) -> Score {
    let counts = |f: &&super::Found| f.severity >= least && rule.as_ref().is_none_or(|r| *r == f.rule);
    let mut fired: BTreeMap<&str, f64> = BTreeMap::new();
    for found in replayed.findings.iter().filter(counts) {
        let first = fired.entry(&found.site).or_insert(found.first_s);
        *first = first.min(found.first_s);
    }
    let label = |site: &str| known.get(site).map(|(leaks, _)| *leaks);
    let found: Vec<(&str, f64)> = fired.iter().filter(|(s, _)| label(s) == Some(true)).map(|(s, t)| (*s, *t)).collect();
    let name = |site: &&&str| known.get(**site).map_or_else(String::new, |(_, name)| name.clone());
    let false_alarms: Vec<String> = fired.keys().filter(|s| label(s) == Some(false)).map(|s| name(&s)).collect();
    let missed: BTreeSet<&String> = known
        .iter()
        .filter(|(site, (leaks, _))| *leaks && !fired.contains_key(site.as_str()))
        .map(|(_, (_, n))| n)
        .collect();
    let leaks = known.values().filter(|(leaks, _)| *leaks).count();
    let share = |part: usize, of: usize| (of > 0).then(|| part as f64 / of as f64);
    let mut delays: Vec<f64> =
        found.iter().map(|(site, at)| (at - begins.get(*site).copied().unwrap_or(0.0)).max(0.0)).collect();
    delays.sort_by(f64::total_cmp);
    Score {
        precision: share(found.len(), found.len() + false_alarms.len()),
        recall: share(found.len(), leaks),
        found: found.len(),
        unlabelled: fired.keys().filter(|s| label(s).is_none()).count(),
        missed: missed.into_iter().cloned().collect(),
        median_delay_s: delays.get(delays.len() / 2).copied(),
        false_alarms,
        rule,
    }
}

fn parse(line: &str) -> Result<(bool, CodePattern), String> {
    let (word, pattern) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let leaks = match word {
        "leak" => true,
        "quiet" => false,
        other => {
            return Err(format!("{:?} is no label: a line is \"leak PATTERN\" or \"quiet PATTERN\"", visible(other)));
        }
    };
    Ok((leaks, CodePattern::parse(pattern.trim())?))
}

/// A table for people; nothing without scores.
pub(super) fn text(which: &str, scores: &[Score]) -> String {
    let mut out = String::new();
    for score in scores {
        let share = |s: Option<f64>| s.map_or_else(|| "-".to_owned(), |s| format!("{:.0} %", 100.0 * s));
        let rule = score.rule.as_deref().unwrap_or("all rules");
        let head = if which.is_empty() { rule.to_owned() } else { format!("{which}, {rule}") };
        out.push_str(&format!("{head}: precision {}, recall {}", share(score.precision), share(score.recall)));
        if let Some(delay_s) = score.median_delay_s {
            out.push_str(&format!(", found after {}", format_duration_s(delay_s)));
        }
        let list = |names: &[String]| names.join(", ");
        if !score.false_alarms.is_empty() {
            out.push_str(&format!("; false alarms: {}", list(&score.false_alarms)));
        }
        if !score.missed.is_empty() {
            out.push_str(&format!("; missed: {}", list(&score.missed)));
        }
        if score.unlabelled > 0 {
            out.push_str(&format!("; {} without a label", score.unlabelled));
        }
        out.push('\n');
    }
    out
}
