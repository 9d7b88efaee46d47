//! The shipped rules on recordings of real programs (`tests/programs/heap_shapes.c`): one for every shape, ten minutes,
//! a snapshot every two seconds.

use std::collections::BTreeMap;
use std::path::Path;

use crate::config::Config;
use crate::finding::Severity;
use crate::recorded::{Found, run_rules};
use crate::recording::Reader;

/// What the rules say of a recording: the findings that are no mere remark.
fn alarms(shape: &str) -> (Vec<Found>, u64) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rules/recordings").join(format!("{shape}.memleak"));
    let reader = Reader::open(&path).expect("it opens");
    assert!(reader.session().complete && reader.contents().len() > 250, "{shape} is whole");
    let replayed = run_rules(&reader, &Config::default(), &mut || {}).expect("replays");
    assert!(replayed.errors.is_empty(), "{:?}", replayed.errors);
    let mut findings = replayed.findings;
    findings.retain(|f| f.severity >= Severity::Warning);
    (findings, replayed.snapshots)
}

/// When each rule first raised its voice about a function.
fn first(findings: &[Found], place: &str) -> BTreeMap<String, f64> {
    let mut first = BTreeMap::new();
    for f in findings.iter().filter(|f| f.place == place) {
        first.entry(f.rule.clone()).or_insert(f.first_s);
    }
    first
}

/// A leak is found while it is small, and stands for as long as it goes on.
#[test]
fn a_recorded_leak_is_found_and_stands() {
    let (findings, _) = alarms("leak");
    let first = first(&findings, "leak_steadily");
    assert!(first.get("growth").is_some_and(|at| *at < 70.0), "{first:?}");
    assert!(findings.iter().any(|f| f.rule == "growth" && f.standing), "{findings:#?}");
    assert!(findings.iter().all(|f| f.place == "leak_steadily"), "{findings:#?}");
}

/// One kilobyte a second under sixty-four blocks that come and go at the same place.
#[test]
fn a_recorded_slow_leak_is_found_under_its_noise() {
    let (findings, _) = alarms("slow_leak");
    let standing: Vec<_> = findings.iter().filter(|f| f.standing).collect();
    assert!(!standing.is_empty() && standing.iter().all(|f| f.place == "remember"), "{findings:#?}");
}

/// What fills, warms up, is flushed or follows the load is no leak in the end: whatever was thought of it while it grew,
/// nothing stands, and what never looked like a leak was never called one.
#[test]
fn recorded_shapes_that_are_no_leak_end_without_a_finding() {
    for (shape, may_be_suspected) in [("cache_fill", true), ("warm_up", true), ("sawtooth", false), ("load_ramp", true)]
    {
        let (findings, snapshots) = alarms(shape);
        let standing: Vec<_> = findings.iter().filter(|f| f.standing).collect();
        assert!(standing.is_empty(), "{shape}, {snapshots} snapshots: {standing:#?}");
        assert!(may_be_suspected || findings.is_empty(), "{shape}: {findings:#?}");
    }
}
