//! What two replays of one recording say differently: findings that appear, vanish or move in time.

use std::collections::BTreeMap;

use serde::Serialize;

use super::replay::{Found, Replayed};
use crate::finding::Severity;
use crate::units::format_duration_s;

/// All that one replay says of a site by one rule.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// When the rule first said something, seconds since the collector started.
    pub first_s: f64,
    /// When it last did, seconds since the collector started.
    pub last_s: f64,
    /// True when it stands at the end.
    pub standing: bool,
    /// The worst that it said ...
    pub severity: Severity,
    /// ... and when it first said that, seconds since the collector started.
    pub severity_s: f64,
}

/// A finding that only one of the replays has, or that is another one in each.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// Id of the finding.
    pub id: String,
    /// Name of the rule.
    pub rule: String,
    /// The site in short.
    pub place: String,
    /// The process.
    pub pid: u32,
    /// What the first replay says; `None` when it says nothing.
    pub first: Option<Outcome>,
    /// What the second replay says; `None` when it says nothing.
    pub second: Option<Outcome>,
}

/// Two replays side by side.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// Snapshots that were looked at.
    pub snapshots: u64,
    /// Alerts that the first would have raised, and the second.
    pub raised: [u64; 2],
    /// Findings that both have, at the same times.
    pub same: usize,
    /// Only the second has them.
    pub appeared: Vec<Change>,
    /// Only the first has them.
    pub vanished: Vec<Change>,
    /// Both have them, at other times or with another severity.
    pub moved: Vec<Change>,
    /// Errors of rules in the first, and in the second.
    pub errors: [Vec<String>; 2],
}

impl Comparison {
    /// Whether there is any difference.
    pub fn differs(&self) -> bool {
        !(self.appeared.is_empty() && self.vanished.is_empty() && self.moved.is_empty())
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let mut out = String::new();
        for change in &self.appeared {
            line(&mut out, "appears", change, change.second.as_ref().map_or_else(String::new, when));
        }
        for change in &self.vanished {
            line(&mut out, "vanishes", change, change.first.as_ref().map_or_else(String::new, when));
        }
        for change in &self.moved {
            if let (Some(first), Some(second)) = (&change.first, &change.second) {
                line(&mut out, "moves", change, shifted(first, second));
            }
        }
        out.push_str(&format!(
            "{} findings appear, {} vanish, {} move, {} are the same; {} alerts, now {}\n",
            self.appeared.len(),
            self.vanished.len(),
            self.moved.len(),
            self.same,
            self.raised[0],
            self.raised[1]
        ));
        out
    }
}

fn line(out: &mut String, what: &str, change: &Change, how: String) {
    let Change { id, rule, place, pid, .. } = change;
    out.push_str(&format!("{what} {rule} {place} (pid {pid}, id {id}): {how}\n"));
}

fn end(o: &Outcome) -> String {
    if o.standing { "the end".to_owned() } else { format_duration_s(o.last_s) }
}

fn when(o: &Outcome) -> String {
    format!("{} from {} to {}", o.severity.as_str(), format_duration_s(o.first_s), end(o))
}

fn shifted(a: &Outcome, b: &Outcome) -> String {
    let mut said = Vec::new();
    let shift = |what: &str, from: f64, to: f64| {
        let by = format_duration_s((to - from).abs());
        let how = if to < from { "sooner" } else { "later" };
        format!("{what} at {} instead of {}, {by} {how}", format_duration_s(to), format_duration_s(from))
    };
    if a.first_s != b.first_s {
        said.push(shift("begins", a.first_s, b.first_s));
    }
    if a.severity != b.severity {
        said.push(format!("{} instead of {}", b.severity.as_str(), a.severity.as_str()));
    } else if a.severity_s != b.severity_s && a.severity_s - a.first_s != b.severity_s - b.first_s {
        said.push(shift(a.severity.as_str(), a.severity_s, b.severity_s));
    }
    if (a.last_s, a.standing) != (b.last_s, b.standing) {
        said.push(format!("ends at {} instead of {}", end(b), end(a)));
    }
    said.join("; ")
}

/// Compares what two replays of the same recording found.
pub(super) fn compare(first: &Replayed, second: &Replayed) -> Comparison {
    let mut all: BTreeMap<(&str, u32), Change> = BTreeMap::new();
    for (replayed, is_second) in [(first, false), (second, true)] {
        for found in &replayed.findings {
            let change = all.entry((&found.id, found.instance)).or_insert_with(|| Change {
                id: found.id.clone(),
                rule: found.rule.clone(),
                place: found.place.clone(),
                pid: found.pid,
                first: None,
                second: None,
            });
            add(if is_second { &mut change.second } else { &mut change.first }, found);
        }
    }
    let mut comparison = Comparison {
        snapshots: first.snapshots,
        raised: [first.raised, second.raised],
        same: 0,
        appeared: Vec::new(),
        vanished: Vec::new(),
        moved: Vec::new(),
        errors: [first.errors.clone(), second.errors.clone()],
    };
    for change in all.into_values() {
        match (&change.first, &change.second) {
            (Some(a), Some(b)) if a == b => comparison.same += 1,
            (Some(_), Some(_)) => comparison.moved.push(change),
            (None, _) => comparison.appeared.push(change),
            (_, None) => comparison.vanished.push(change),
        }
    }
    let first_s = |c: &Change| c.second.as_ref().or(c.first.as_ref()).map_or(0.0, |o| o.first_s);
    for list in [&mut comparison.appeared, &mut comparison.vanished, &mut comparison.moved] {
        list.sort_by(|a, b| first_s(a).total_cmp(&first_s(b)).then_with(|| a.id.cmp(&b.id)));
    }
    comparison
}

/// Takes one more span of a finding in; they come in the order in which they began.
fn add(outcome: &mut Option<Outcome>, found: &Found) {
    let Found { severity, first_s, last_s, standing, .. } = *found;
    match outcome {
        None => *outcome = Some(Outcome { first_s, last_s, standing, severity, severity_s: first_s }),
        Some(o) => {
            (o.last_s, o.standing) = (o.last_s.max(last_s), o.standing || standing);
            if severity > o.severity {
                (o.severity, o.severity_s) = (severity, first_s);
            }
        }
    }
}
