//! From findings to alerts: hold time, merging, cool-down, resolving.
//!
//! [`AlertManager`] decides when people are told, and nothing else: it does no I/O and knows time only as it is
//! given. The engine calls [`AlertManager::update`] once per snapshot and hands the events to the sinks in `output`.
//!
//! ```text
//!            stands for hold              gone for hold              cool-down over
//! (finding) ----------------> firing --------------------> resolved ----------------> (forgotten)
//!                             | ^ severity rises: told again
//!                             +-+
//! ```
//!
//! - Findings with the same id, which are those of one rule at one site in several processes, make one alert. It
//!   speaks of the process with the most outstanding bytes there, and has the highest severity of all of them.
//! - A finding that pauses before it has stood for the hold time starts anew; one that pauses for less than the hold
//!   time while its alert fires changes nothing.
//! - A process that ends takes its findings with it, but that repairs nothing: its alerts keep firing, marked as ended.
//!   Nor does the end of the run resolve anything.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::config::AlertSettings;
use crate::finding::{Finding, Severity};
use crate::history::History;
use crate::snapshot::{Losses, Mode, Site, SiteKey, SiteReach, Totals};
use crate::stats::theil_sen_slope;

/// Most alerts of ended processes, and most resolved ones, that are remembered. The oldest go first.
const MAX_REMEMBERED: usize = 1_000;

/// Whether an alert still stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The finding stands.
    Firing,
    /// The finding has been gone for the hold time.
    Resolved,
}

/// A finding that has stood for the hold time.
#[derive(Clone, Debug)]
pub struct Alert {
    /// Id of the finding, see [`Finding::id`].
    pub id: String,
    /// Name of the rule.
    pub rule: Arc<str>,
    /// How bad it is now: the highest severity over the processes.
    pub severity: Severity,
    /// How sure the rule is, 0 to 1; of the process that the alert speaks of, like what follows.
    pub confidence: f64,
    /// One sentence for people.
    pub reason: String,
    /// The site, in the process with the most outstanding bytes there.
    pub site: Arc<Site>,
    /// The site's totals when they were last known.
    pub totals: Totals,
    /// Number of processes with this finding, those that ended with it included.
    pub processes: usize,
    /// True once the process that the alert speaks of has ended.
    pub ended: bool,
    /// Whether it still stands.
    pub status: Status,
    /// When the finding was first made, seconds since the collector started.
    pub first_seen_s: f64,
    /// When the alert was raised, seconds since the collector started.
    pub fired_s: f64,
    /// When it was resolved, seconds since the collector started; `None` while it fires.
    pub resolved_s: Option<f64>,
}

/// A change that people are to be told of, with the figures of that time.
#[derive(Clone, Debug)]
pub struct AlertEvent {
    /// The alert after the change.
    pub alert: Alert,
    /// Time of the change, seconds since the collector started.
    pub time_s: f64,
    /// The same by the wall clock, seconds since 1970.
    pub wall_s: f64,
    /// How the figures were obtained.
    pub mode: Mode,
    /// Growth of the site's outstanding bytes over its whole series, bytes per second.
    pub growth_bytes_per_s: f64,
    /// Age of the oldest outstanding block in seconds, an upper bound.
    pub oldest_age_s: f64,
    /// What was lost in the process so far.
    pub losses: Losses,
    /// What scans of the process's memory say of the site; `None` before there was one.
    pub reachability: Option<Arc<SiteReach>>,
}

/// What is known of one finding id.
#[derive(Debug)]
struct Entry {
    alert: Alert,
    phase: Phase,
    /// Sites with the finding: those of the newest findings, and those that ended with theirs.
    keys: Vec<SiteKey>,
}

#[derive(Debug)]
enum Phase {
    /// Not an alert yet.
    Holding,
    /// People know.
    Firing {
        /// Since when the finding is gone.
        gone_s: Option<f64>,
        /// The highest severity that people were told.
        told: Severity,
    },
    /// Resolved, and quiet until the cool-down ends.
    Cooling {
        /// When that is.
        until_s: f64,
        /// Since when the finding stands again.
        back_s: Option<f64>,
    },
}

/// All alerts of a run.
#[derive(Debug)]
pub struct AlertManager {
    hold_s: f64,
    cooldown_s: f64,
    min_severity: Severity,
    /// By finding id; ordered, so that everything that is told has an order.
    entries: BTreeMap<String, Entry>,
    resolved: VecDeque<Alert>,
    raised: u64,
}

impl AlertManager {
    /// No alerts yet.
    pub fn new(settings: &AlertSettings) -> Self {
        let seconds = |d: Duration| d.as_secs_f64();
        AlertManager {
            hold_s: seconds(settings.hold),
            cooldown_s: seconds(settings.cooldown),
            min_severity: settings.min_severity,
            entries: BTreeMap::new(),
            resolved: VecDeque::new(),
            raised: 0,
        }
    }

    /// Takes in the findings of one snapshot, which is already part of the history, and returns what is new: by site,
    /// the most severe first. `now_s` is the snapshot's time in seconds since the collector started, `wall_s` the
    /// same in seconds since 1970.
    pub fn update(&mut self, findings: &[Finding], history: &History, now_s: f64, wall_s: f64) -> Vec<AlertEvent> {
        let mut found: BTreeMap<&str, Vec<&Finding>> = BTreeMap::new();
        for finding in findings.iter().filter(|f| f.severity >= self.min_severity) {
            found.entry(&finding.id).or_default().push(finding);
        }
        for (id, group) in &found {
            let merged = merge(group, history, now_s);
            match self.entries.get_mut(*id) {
                Some(entry) => entry.refresh(merged, group, history),
                None => {
                    let keys = group.iter().map(|f| f.site.key).collect();
                    self.entries.insert((*id).to_owned(), Entry { alert: merged, phase: Phase::Holding, keys });
                }
            }
        }
        let mut events = Vec::new();
        let ids: Vec<String> = self.entries.keys().cloned().collect();
        for id in ids {
            let present = found.contains_key(id.as_str());
            let Some(mut entry) = self.entries.remove(&id) else { continue };
            entry.follow(history);
            let (keep, told) = self.step(&mut entry, present, now_s);
            if told {
                events.push(AlertEvent::new(entry.alert.clone(), history, now_s, wall_s));
            }
            if keep {
                self.entries.insert(id, entry);
            }
        }
        self.forget();
        events.sort_by(|a, b| {
            let site = |e: &AlertEvent| (e.alert.site.key, std::cmp::Reverse(e.alert.severity), e.alert.rule.clone());
            site(a).cmp(&site(b))
        });
        events
    }

    /// Moves one alert on. Returns whether it is to be kept and whether people are to be told.
    fn step(&mut self, entry: &mut Entry, present: bool, now_s: f64) -> (bool, bool) {
        match &mut entry.phase {
            Phase::Holding if !present => (false, false),
            Phase::Holding => {
                let fire = now_s - entry.alert.first_seen_s >= self.hold_s;
                if fire {
                    self.raise(entry, now_s);
                }
                (true, fire)
            }
            Phase::Firing { gone_s, told } if present => {
                *gone_s = None;
                let worse = entry.alert.severity > *told;
                *told = entry.alert.severity.max(*told);
                (true, worse)
            }
            // What ended with its finding cannot be seen to recover.
            Phase::Firing { .. } if entry.alert.ended => (true, false),
            Phase::Firing { gone_s, .. } => {
                if now_s - *gone_s.get_or_insert(now_s) < self.hold_s {
                    return (true, false);
                }
                entry.alert.status = Status::Resolved;
                entry.alert.resolved_s = Some(now_s);
                entry.phase = Phase::Cooling { until_s: now_s + self.cooldown_s, back_s: None };
                self.resolved.push_back(entry.alert.clone());
                (true, true)
            }
            Phase::Cooling { until_s, back_s } => {
                *back_s = if present { back_s.or(Some(now_s)) } else { None };
                let (over, back) = (now_s >= *until_s, *back_s);
                match back {
                    Some(since) if over && now_s - since >= self.hold_s => {
                        entry.alert.first_seen_s = since;
                        self.raise(entry, now_s);
                        (true, true)
                    }
                    Some(_) => (true, false),
                    None => (!over, false),
                }
            }
        }
    }

    fn raise(&mut self, entry: &mut Entry, now_s: f64) {
        entry.alert.status = Status::Firing;
        entry.alert.fired_s = now_s;
        entry.alert.resolved_s = None;
        entry.phase = Phase::Firing { gone_s: None, told: entry.alert.severity };
        self.raised += 1;
    }

    /// Keeps memory bounded when targets come and go for months.
    fn forget(&mut self) {
        let excess = self.resolved.len().saturating_sub(MAX_REMEMBERED);
        self.resolved.drain(..excess);
        let mut ended: Vec<(f64, String)> =
            (self.entries.iter()).filter(|(_, e)| e.alert.ended).map(|(id, e)| (e.alert.fired_s, id.clone())).collect();
        let excess = ended.len().saturating_sub(MAX_REMEMBERED);
        if excess > 0 {
            ended.sort_by(|a, b| a.0.total_cmp(&b.0));
            for (_, id) in &ended[..excess] {
                self.entries.remove(id);
            }
        }
    }

    /// Alerts that fire: the most severe first, then the largest.
    pub fn active(&self) -> Vec<&Alert> {
        let firing = |e: &&Entry| matches!(e.phase, Phase::Firing { .. });
        let mut active: Vec<&Alert> = self.entries.values().filter(firing).map(|e| &e.alert).collect();
        active.sort_by_key(|a| std::cmp::Reverse((a.severity, a.totals.outstanding_bytes())));
        active
    }

    /// Alerts that were resolved during the run (the last 1,000), the newest first. One that fired and was resolved
    /// twice is here twice.
    pub fn resolved(&self) -> impl Iterator<Item = &Alert> {
        self.resolved.iter().rev()
    }

    /// How often an alert was raised; a rise of severity does not count.
    pub fn raised(&self) -> u64 {
        self.raised
    }
}

impl Entry {
    /// Takes over what the newest findings say.
    fn refresh(&mut self, merged: Alert, group: &[&Finding], history: &History) {
        let has_ended = |key: &SiteKey| history.site(*key).is_none_or(|h| h.ended_s.is_some());
        self.keys.retain(|key| has_ended(key) && group.iter().all(|f| f.site.key != *key));
        self.keys.extend(group.iter().map(|f| f.site.key));
        let old = &self.alert;
        self.alert = Alert {
            processes: instances(&self.keys),
            status: old.status,
            first_seen_s: old.first_seen_s,
            fired_s: old.fired_s,
            resolved_s: old.resolved_s,
            ..merged
        };
    }

    /// Takes over what the history knows, finding or not.
    fn follow(&mut self, history: &History) {
        // A site that the history has dropped belongs to a process that ended long ago.
        let known = history.site(self.alert.site.key);
        self.alert.ended = known.is_none_or(|h| h.ended_s.is_some());
        if let Some(h) = known {
            self.alert.totals = h.latest.totals;
        }
    }
}

impl AlertEvent {
    /// An alert with the figures of now.
    pub fn new(alert: Alert, history: &History, now_s: f64, wall_s: f64) -> AlertEvent {
        let process = history.process(alert.site.key.instance);
        let site = history.site(alert.site.key);
        let points: Vec<(f64, f64)> = site.map_or_else(Vec::new, |h| {
            h.series.samples().iter().map(|s| (s.time_s, s.totals.outstanding_bytes() as f64)).collect()
        });
        AlertEvent {
            time_s: now_s,
            wall_s,
            mode: process.map_or(Mode::default(), |p| p.mode),
            growth_bytes_per_s: theil_sen_slope(&points),
            oldest_age_s: site.map_or(0.0, |h| h.oldest_age_s(now_s)),
            reachability: site.and_then(|h| h.latest.reachability.clone()),
            losses: process.map_or_else(Losses::default, |p| p.losses),
            alert,
        }
    }
}

/// One alert, not raised yet, from the findings of one id; there is at least one.
fn merge(group: &[&Finding], history: &History, now_s: f64) -> Alert {
    let totals = |f: &Finding| history.site(f.site.key).map_or_else(Totals::default, |h| h.latest.totals);
    let mut largest = group[0];
    for finding in &group[1..] {
        // Of equals the one with the lower key: the order of findings means nothing.
        let rank = |f: &Finding| (totals(f).outstanding_bytes(), std::cmp::Reverse(f.site.key));
        if rank(finding) > rank(largest) {
            largest = finding;
        }
    }
    let keys: Vec<SiteKey> = group.iter().map(|f| f.site.key).collect();
    Alert {
        id: largest.id.clone(),
        rule: largest.rule.clone(),
        severity: group.iter().map(|f| f.severity).max().unwrap_or(largest.severity),
        confidence: largest.confidence,
        reason: largest.reason.clone(),
        site: largest.site.clone(),
        totals: totals(largest),
        processes: instances(&keys),
        ended: false,
        status: Status::Firing,
        first_seen_s: now_s,
        fired_s: now_s,
        resolved_s: None,
    }
}

/// Number of process instances: one instance may have several sites with the same identity.
fn instances(keys: &[SiteKey]) -> usize {
    let mut instances: Vec<u32> = keys.iter().map(|k| k.instance).collect();
    instances.sort_unstable();
    instances.dedup();
    instances.len()
}

#[cfg(test)]
mod tests;
