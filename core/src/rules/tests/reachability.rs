//! What the shipped rules make of scans of a process's memory.

use std::sync::Arc;

use super::support::*;
use crate::config::RuleSettings;
use crate::finding::Severity;
use crate::reachability::roots::Root;
use crate::reachability::verdict::Tally;
use crate::reachability::{SiteVerdict, Verdict};
use crate::rules::RuleEngine;
use crate::rules::simulate::shapes::*;
use crate::snapshot::{ReachWay, SiteReach};

fn reach(verdict: Verdict, lost: u64, reachable: u64) -> SiteReach {
    let of = |blocks| Tally { blocks, bytes: 100 * blocks };
    let counts = SiteVerdict { scans: 3, lost: of(lost), reachable: of(reachable), ..SiteVerdict::default() };
    let root = Root::Global { module: "/srv/app".into(), name: Some("sessions".into()), offset: 16 };
    let way = (reachable > 0).then(|| ReachWay { root, steps: Vec::new() });
    SiteReach { verdict, counts, time_s: 30.0, way }
}

/// A leak of 50 KB/s, scanned after half a minute, to its end after 100 s.
fn said_after(scan: SiteReach) -> Vec<Said> {
    let mut simulation = Simulation::new(1.0, 1, vec![("leak", leak(50_000.0, 1_000))]);
    let mut engine = shipped();
    simulation.run(&mut engine, 30);
    simulation.reachability = Some(Arc::new(scan));
    simulation.run(&mut engine, 70).into_iter().filter(|s| s.snapshot == 100).collect()
}

fn of<'a>(said: &'a [Said], rule: &str) -> Option<&'a Said> {
    said.iter().find(|s| &*s.finding.rule == rule)
}

/// What nothing refers to needs no growth to be a leak, and growth of it needs no patience.
#[test]
fn lost_blocks_are_critical() {
    let said = said_after(reach(Verdict::Definite, 40, 1));
    let lost = of(&said, "definitely_lost").expect("a finding");
    assert_eq!(lost.finding.severity, Severity::Critical);
    assert!((0.85..0.9).contains(&lost.finding.confidence), "{lost:?}");
    assert!(lost.finding.reason.contains("40 of 41 judged blocks"), "{lost:?}");
    assert_eq!(of(&said, "growth").expect("it grows").finding.severity, Severity::Critical);
    assert!(of(&said, "reachable_growth").is_none());
}

/// A container that is never emptied is named by its variable, also by the rule that only sees growth.
#[test]
fn reachable_growth_names_what_holds_on() {
    let said = said_after(reach(Verdict::Reachable, 0, 400));
    let growth = of(&said, "reachable_growth").expect("a finding");
    assert_eq!(growth.finding.severity, Severity::Warning);
    assert!(growth.finding.reason.contains("global sessions+0x10 (app)"), "{growth:?}");
    let plain = of(&said, "growth").expect("it grows");
    assert_eq!(plain.finding.severity, Severity::Warning);
    assert!(plain.finding.reason.contains("still refers to its blocks: global sessions"), "{plain:?}");
    assert!(of(&said, "definitely_lost").is_none());
}

/// Hidden pointers: nothing is claimed, and growth counts as it does without a scan.
#[test]
fn unknown_verdicts_change_nothing() {
    let said = said_after(reach(Verdict::Unknown, 40, 0));
    assert!(of(&said, "definitely_lost").is_none() && of(&said, "reachable_growth").is_none(), "{said:?}");
    assert_eq!(of(&said, "growth").expect("it grows").finding.severity, Severity::Warning);
}

/// A bounded cache that was seen to be reachable stays quiet.
#[test]
fn a_full_cache_that_is_reachable_is_no_finding() {
    let mut simulation = Simulation::new(1.0, 1, vec![("cache", bounded_cache(1.0, 200e3, 15.0))]);
    simulation.reachability = Some(Arc::new(reach(Verdict::Reachable, 0, 400)));
    let said = simulation.run(&mut shipped(), 300);
    assert!(said.is_empty(), "{:#?}", summary(&said));
}

/// A rule may ask for a scan with or without a finding; anything else than yes or no is an error of the rule.
#[test]
fn rules_ask_for_scans() {
    let asked = |returned: &str| {
        let dir = tempfile::tempdir().unwrap();
        let rule = format!(
            "return {{ name = 'ask', description = 'asks', params = {{}}, evaluate = function(site, p) return {returned} end }}"
        );
        std::fs::write(dir.path().join("ask.lua"), rule).unwrap();
        let settings = RuleSettings { dir: Some(dir.path().into()), ..RuleSettings::default() };
        let mut engine = RuleEngine::new(&settings).unwrap();
        let mut simulation = Simulation::new(1.0, 1, vec![("leak", leak(50_000.0, 1_000))]);
        (0..5).for_each(|_| simulation.step());
        let evaluation = evaluate(&mut engine, &simulation.history);
        let found = evaluation.findings.iter().filter(|f| &*f.rule == "ask").count();
        (evaluation.scans.len(), found, evaluation.errors.first().map(ToString::to_string))
    };
    assert_eq!(asked("{ scan = true }"), (1, 0, None));
    let finding = "severity = 'info', confidence = 0.5, reason = 'because'";
    assert_eq!(asked(&format!("{{ scan = true, {finding} }}")), (1, 1, None));
    assert_eq!(asked(&format!("{{ scan = false, {finding} }}")), (0, 1, None));
    let (scans, found, error) = asked("{ scan = 1 }");
    assert_eq!((scans, found), (0, 0));
    assert!(error.unwrap().contains("scan must be true or false, not 1"));
    let (scans, found, error) = asked("{ scan = true, severity = 'info' }");
    assert_eq!((scans, found), (0, 0));
    assert!(error.unwrap().contains("confidence must be a number"));
}
