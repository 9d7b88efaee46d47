//! Every shipped rule on what it must find and on what it must leave alone.

use super::support::shapes::*;
use super::support::*;
use crate::finding::Severity;
use crate::rules::RuleEngine;
use crate::snapshot::{Mode, StandardErrors};

const INTERVALS: [f64; 3] = [1.0, 10.0, 60.0];

/// The first snapshot at which a rule says at least `severity` about a shape.
fn first(said: &[Said], shape: &str, rule: &str, severity: Severity) -> Option<u64> {
    let fits = |s: &&Said| s.shape == shape && &*s.finding.rule == rule && s.finding.severity >= severity;
    said.iter().find(fits).map(|s| s.snapshot)
}

fn quiet_shapes(unit_s: f64) -> Vec<(&'static str, Shape)> {
    vec![
        ("keyed_cache", keyed_cache(unit_s)),
        ("bounded_cache", bounded_cache(unit_s, 200e3, 15.0)),
        ("warm_up", warm_up(unit_s)),
        ("sawtooth_5", sawtooth(unit_s, 5.0)),
        ("sawtooth_15", sawtooth(unit_s, 15.0)),
        ("load_ramp", load_ramp(unit_s)),
        ("thread_pool", thread_pool(unit_s)),
        ("queue_3", queue(unit_s, 3.0)),
        ("queue_12", queue(unit_s, 12.0)),
        ("churn", churn(200.0 / unit_s, 300, 0.1 * unit_s, 0.0)),
        ("long_churn", churn(50.0 / unit_s, 300, 4.0 * unit_s, 0.0)),
        ("wandering_cache", wandering_cache(unit_s)),
    ]
}

/// Promise 4: what fills, levels off, drops or turns over is no leak, at any interval, however slowly it happens.
#[test]
fn shipped_rules_are_quiet_on_everything_that_is_no_leak() {
    for interval_s in INTERVALS {
        for unit_s in [interval_s, 1.0] {
            for seed in 1..=4 {
                let mut simulation = Simulation::new(interval_s, seed, quiet_shapes(unit_s));
                let said = simulation.run(&mut shipped(), 150);
                assert!(said.is_empty(), "interval {interval_s}, unit {unit_s}, seed {seed}: {:#?}", summary(&said));
            }
        }
    }
}

/// The same over hours: a slow rule has the time to be fooled.
#[test]
fn shipped_rules_are_quiet_on_what_is_no_leak_over_hours() {
    for (interval_s, unit_s) in [(10.0, 10.0), (10.0, 3.0), (60.0, 20.0)] {
        let mut simulation = Simulation::new(interval_s, 7, quiet_shapes(unit_s));
        let said = simulation.run(&mut shipped(), 700);
        assert!(said.is_empty(), "interval {interval_s}, unit {unit_s}: {:#?}", summary(&said));
    }
}

/// A cache that fills fast during the first minute is like a leak until it is full: a remark, never an alarm.
#[test]
fn a_fast_filling_cache_is_no_alarm_in_the_first_minute() {
    for interval_s in INTERVALS {
        for rate in [1e6, 4e6] {
            let shapes = vec![("fill", bounded_cache(1.0, rate, 50.0))];
            let said = Simulation::new(interval_s, 3, shapes).run(&mut shipped(), 120);
            assert!(alarming(&said).is_empty(), "interval {interval_s}: {:#?}", summary(&said));
            for s in said {
                assert!(s.finding.reason.contains("too early to tell"), "{}", s.finding.reason);
                assert!(s.finding.confidence <= 0.5);
            }
        }
    }
}

/// The demo's case: 10 to 100 KiB/s at one site must be found within 25 snapshots, at any interval.
#[test]
fn growth_finds_a_steady_leak_within_25_snapshots() {
    for interval_s in INTERVALS {
        for seed in 1..=8 {
            let shapes =
                vec![("10K", leak(10_240.0, 512)), ("30K", leak(30_720.0, 4_096)), ("100K", leak(102_400.0, 1_021))];
            let said = Simulation::new(interval_s, seed, shapes).run(&mut shipped(), 25);
            for shape in ["10K", "30K", "100K"] {
                let at = first(&said, shape, "growth", Severity::Warning);
                assert!(at.is_some_and(|n| n >= 21), "interval {interval_s}, seed {seed}: {shape} at {at:?}");
            }
        }
    }
}

/// What goes on growing becomes critical, and stays a finding in every snapshot until then.
#[test]
fn growth_becomes_critical_and_does_not_flicker() {
    let said = Simulation::new(1.0, 1, vec![("leak", leak(50_000.0, 1_000))]).run(&mut shipped(), 1_700);
    let growth: Vec<_> = said.iter().filter(|s| &*s.finding.rule == "growth").collect();
    let start = growth[0].snapshot;
    assert_eq!(growth.len() as u64, 1_700 - start + 1, "one finding per snapshot");
    // A fifth of the run has to be five minutes: 1,500 s.
    let critical = first(&said, "leak", "growth", Severity::Critical);
    assert!(critical.is_some_and(|n| (1_490..=1_510).contains(&n)), "{critical:?}");
    assert!(growth.windows(2).all(|w| w[0].finding.id == w[1].finding.id));
}

/// A leak that starts late in a quiet run is found too, although most of its series is flat.
#[test]
fn growth_finds_a_leak_that_starts_late() {
    let mut leaking = leak(50_000.0, 1_000);
    let late: Shape = Box::new(move |heap, dt, rng| {
        if heap.now_s < 1.0 {
            heap.alloc(10_000);
        } else if heap.now_s > 300.0 {
            leaking(heap, dt, rng);
        }
    });
    let said = Simulation::new(1.0, 1, vec![("late", late)]).run(&mut shipped(), 420);
    let at = first(&said, "late", "growth", Severity::Warning);
    assert!(at.is_some_and(|n| (300..=400).contains(&n)), "{at:?}");
}

/// Two of a hundred short-lived blocks stay: no growth rule sees 1 KiB/s under that, survival does.
#[test]
fn survival_finds_a_slow_leak_buried_in_churn() {
    for (interval_s, within) in [(1.0, 80), (10.0, 40), (60.0, 40)] {
        for seed in 1..=4 {
            let shapes = vec![("buried", churn(400.0, 256, 0.01, 0.02)), ("half", churn(60.0, 300, 0.5, 0.3))];
            let said = Simulation::new(interval_s, seed, shapes).run(&mut shipped(), within);
            for shape in ["buried", "half"] {
                let at = first(&said, shape, "survival", Severity::Warning);
                assert!(at.is_some(), "interval {interval_s}, seed {seed}: {shape} not found");
            }
        }
    }
}

/// Through windows nothing is proven: only a process that grows is suspected, and only by the rule that says so.
#[test]
fn windows_make_suspicions_only() {
    for (growing, expected) in [(true, true), (false, false)] {
        let shapes = vec![("leak", leak(20_000.0, 500)), ("churn", churn(500.0, 300, 0.05, 0.0))];
        let mut simulation = Simulation::new(1.0, 5, shapes);
        let mut engine = shipped();
        let mut said = Vec::new();
        for n in 0..200_u64 {
            simulation.process.mode = Mode::Estimated;
            // Files that are read in are no leak, however fast they make the resident memory grow.
            simulation.process.rss_bytes = Some((50 << 20) + n * 40_000);
            simulation.process.rss_anon_bytes = Some((50 << 20) + if growing { n * 20_000 } else { 0 });
            said.extend(simulation.run(&mut engine, 1));
        }
        assert!(said.iter().all(|s| &*s.finding.rule == "suspected" && s.shape == "leak"), "{:#?}", summary(&said));
        assert_eq!(first(&said, "leak", "suspected", Severity::Warning).is_some(), expected, "{:#?}", summary(&said));
        assert!(said.iter().all(|s| s.finding.reason.contains("not proven") && s.finding.confidence <= 0.5));
    }
}

/// Growth of 2.4 MB is proof when the sample's error is small beside it, and noise when it is not.
#[test]
fn what_may_be_the_noise_of_a_sample_is_no_growth() {
    for (bytes, expected) in [(100e3, true), (1e6, false)] {
        let mut simulation = Simulation::new(1.0, 5, vec![("leak", leak(20_000.0, 500))]);
        simulation.process.mode = Mode::Sampled;
        simulation.stderr = StandardErrors { bytes, count: bytes / 500.0 };
        let said = simulation.run(&mut shipped(), 120);
        assert_eq!(first(&said, "leak", "growth", Severity::Warning).is_some(), expected, "{:#?}", summary(&said));
        assert!(expected || said.is_empty(), "{:#?}", summary(&said));
    }
}

/// 2 KiB a minute below noise ten times as large.
#[test]
fn slow_growth_finds_a_trend_under_noise() {
    for interval_s in [10.0, 60.0] {
        let mut noise = churn(2.0, 1_000, 20.0, 0.0);
        let mut slow = leak(4_096.0 / 60.0, 256);
        let shape: Shape = Box::new(move |heap, dt, rng| {
            noise(heap, dt, rng);
            slow(heap, dt, rng);
        });
        let said = Simulation::new(interval_s, 5, vec![("slow", shape)]).run(&mut shipped(), 360);
        assert!(first(&said, "slow", "slow_growth", Severity::Warning).is_some(), "interval {interval_s}");
    }
}

/// A leak in bursts rises in few of the steps, so `growth` does not see it.
#[test]
fn imbalance_finds_a_leak_in_bursts() {
    let said = Simulation::new(1.0, 1, vec![("bursts", bursts(7.0, 200, 512))]).run(&mut shipped(), 120);
    assert!(first(&said, "bursts", "imbalance", Severity::Warning).is_some());
    assert!(first(&said, "bursts", "growth", Severity::Info).is_none());
}

/// Off by default; with a threshold it looks at bytes and blocks.
#[test]
fn threshold_fires_above_its_thresholds_only() {
    let shape = || vec![("big", warm_up(1.0))];
    let run = |toml: &str| {
        let mut engine = RuleEngine::new(&settings(toml)).expect("settings");
        let said = Simulation::new(1.0, 1, shape()).run(&mut engine, 20);
        said.into_iter().filter(|s| &*s.finding.rule == "threshold").map(|s| s.finding).next_back()
    };
    assert!(run("").is_none());
    assert!(run("threshold = { max_bytes = \"1GiB\", max_count = 1000000 }").is_none());
    let bytes = run("threshold = { max_bytes = \"1MiB\" }").expect("more than 1 MiB");
    assert_eq!((bytes.severity, bytes.confidence), (Severity::Warning, 1.0));
    assert!(bytes.reason.ends_with("more than 1.0 MiB"), "{}", bytes.reason);
    let count = run("threshold = { max_count = 100 }").expect("more than 100 blocks");
    assert_eq!(count.severity, Severity::Critical);
    assert!(count.reason.ends_with("more than 100 blocks"), "{}", count.reason);
}

/// After an attach to a full cache only its new entries are seen: they look like a leak, but old blocks go for them.
#[test]
fn replacing_blocks_from_before_the_attach_is_no_alarm() {
    let run = |unmatched_per_s: u64, rss_per_s: u64| {
        let mut simulation = Simulation::new(1.0, 1, vec![("entries", leak(50_000.0, 1_000))]);
        let mut engine = shipped();
        let mut said = Vec::new();
        for i in 0..40 {
            simulation.process.unmatched_frees = i * unmatched_per_s;
            simulation.process.rss_bytes = Some(100_000_000 + i * rss_per_s);
            said.extend(simulation.run(&mut engine, 1));
        }
        (said.len(), alarming(&said).len())
    };
    assert!(matches!(run(0, 50_000), (1.., 1..)), "a leak");
    assert!(matches!(run(60, 0), (1.., 0)), "replacement: a remark");
    assert!(matches!(run(60, 50_000), (1.., 1..)), "resident memory grows with it: a leak");
}

/// Known code is silenced by function, module or stack, and the reason names the pattern.
#[test]
fn suppressions_match_functions_modules_and_stacks() {
    let run = |toml: &str| {
        let mut simulation =
            Simulation::new(1.0, 1, vec![("g_quark_new", leak(50_000.0, 1_000)), ("other", leak(50_000.0, 1_000))]);
        let mut engine = RuleEngine::new(&settings(toml)).expect("settings");
        simulation.run(&mut engine, 29);
        simulation.step();
        let evaluation = evaluate(&mut engine, &simulation.history);
        assert!(evaluation.errors.is_empty(), "{:?}", evaluation.errors);
        assert_eq!(evaluation.findings.len() + evaluation.suppressed.len(), 2);
        let reasons: Vec<_> = evaluation.suppressed.into_iter().map(|(f, why)| (f.site.id, why)).collect();
        reasons
    };
    assert_eq!(run(""), []);
    let one = |why: &str| vec![(1, why.to_owned())];
    assert_eq!(run("suppressions.functions = [\"g_quark_*\"]"), one("function g_quark_new matches \"g_quark_*\""));
    assert_eq!(run("suppressions.functions = [\"g_quark\", \"?_quark_ne\", \"*.quark*\"]"), []);
    assert_eq!(run("suppressions.stacks = [\"main;*;g_*\"]"), one("the call stack matches \"main;*;g_*\""));
    assert_eq!(run("suppressions.stacks = [\"handle_request;*\"]"), []);
    assert_eq!(run("suppressions.modules = [\"*/libshapes.so*\"]").len(), 2);
    assert_eq!(run("suppressions.modules = [\"/srv/ap?\"]").len(), 2);
}
