//! What tests of rules share: simulations that ask the rules at each snapshot.

use std::collections::BTreeMap;

use crate::config::RuleSettings;
use crate::finding::{Finding, Severity};
use crate::history::History;
pub use crate::rules::simulate::*;
use crate::rules::{Evaluation, RuleEngine};

/// What a rule said of a shape.
#[derive(Clone)]
pub struct Said {
    pub shape: &'static str,
    pub snapshot: u64,
    pub finding: Finding,
}

impl std::fmt::Debug for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Finding { rule, severity, confidence, reason, .. } = &self.finding;
        write!(f, "{} at {}: {rule} {severity:?} {confidence:.2} {reason}", self.shape, self.snapshot)
    }
}

/// The first finding of each rule about each shape, and how many there were.
pub fn summary(said: &[Said]) -> Vec<(usize, &Said)> {
    let mut groups: BTreeMap<_, Vec<&Said>> = BTreeMap::new();
    for s in said {
        groups.entry((s.shape, &s.finding.rule)).or_default().push(s);
    }
    groups.into_values().map(|group| (group.len(), group[0])).collect()
}

impl Simulation {
    /// Takes `snapshots` and collects what the rules say at each.
    pub fn run(&mut self, engine: &mut RuleEngine, snapshots: u64) -> Vec<Said> {
        let mut said = Vec::new();
        for _ in 0..snapshots {
            self.step();
            let evaluation = evaluate(engine, &self.history);
            assert!(evaluation.errors.is_empty(), "{:?}", evaluation.errors);
            said.extend(evaluation.findings.into_iter().map(|finding| {
                let shape = self.sites.iter().find(|s| s.site.id == finding.site.id).map_or("", |s| s.name);
                Said { shape, snapshot: self.number, finding }
            }));
        }
        said
    }
}

/// Evaluates without a symbolizer.
pub fn evaluate(engine: &mut RuleEngine, history: &History) -> Evaluation {
    engine.evaluate(history, &mut |_| {})
}

/// The shipped rules with default settings.
pub fn shipped() -> RuleEngine {
    RuleEngine::new(&RuleSettings::default()).expect("shipped rules load")
}

/// Settings with overrides in TOML, as below `[rules]`.
pub fn settings(toml: &str) -> RuleSettings {
    RuleSettings { params: toml::from_str(toml).expect("test settings"), ..RuleSettings::default() }
}

/// Findings that would alert with default settings.
pub fn alarming(said: &[Said]) -> Vec<&Said> {
    said.iter().filter(|s| s.finding.severity >= Severity::Warning).collect()
}
