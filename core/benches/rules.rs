//! Time of all shipped rules over 10,000 sites, per snapshot: `cargo bench -p memleak --bench rules`.
//!
//! Aim: 200 ms or less. Times are CPU time of the thread, which other work on the machine does not change much. Two mixes: a busy process (most sites flat or churning, one in fifty leaking) and the worst case
//! in which every site leaks, so that no rule can leave early. Each evaluation runs on a new snapshot, as in a run.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use memleak_core::config::RuleSettings;
use memleak_core::history::{Bounds, History};
use memleak_core::rules::RuleEngine;
use memleak_core::snapshot::{
    Cohort, LIFETIME_CLASSES, Process, ProcessSample, Site, SiteKey, SiteSample, Snapshot, Totals,
};

const SITES: u64 = 10_000;
/// Evaluations that are timed.
const ROUNDS: u64 = 20;

/// The `number`th snapshot, one second after the one before.
fn snapshot(number: u64, sites: &[Arc<Site>], leaking_share: u64) -> Snapshot {
    let time_s = number as f64;
    let mut snapshot = Snapshot { number, time_s, ..Snapshot::default() };
    let process = Arc::clone(&sites[0].process);
    snapshot.processes.push(ProcessSample { process, alive: true, hits: 1_000_000, ..Default::default() });
    for (i, site) in (0..).zip(sites) {
        let leaking = i % leaking_share == 0;
        let churned = number * (100 + i % 50);
        // What does not leak holds some blocks more or fewer at times.
        let held = if leaking { number * 40 } else { 100 + (number * 7 + i) % 23 };
        let totals = Totals {
            allocated_bytes: (churned + held) * 512,
            allocated_count: churned + held,
            freed_bytes: churned * 512,
            freed_count: churned,
        };
        let cohorts = (0..16_u64.min(number))
            .map(|c| Cohort {
                start_s: time_s - (c + 1) as f64 * time_s / 16.0,
                end_s: time_s - c as f64 * time_s / 16.0,
                born_bytes: totals.allocated_bytes / 16,
                born_count: totals.allocated_count / 16,
                outstanding_bytes: totals.outstanding_bytes() / 16,
                outstanding_count: totals.outstanding_count() / 16,
            })
            .rev()
            .collect();
        let lifetimes = [totals.freed_count / LIFETIME_CLASSES as u64; LIFETIME_CLASSES];
        snapshot.sites.push(SiteSample {
            site: Arc::clone(site),
            totals,
            stderr: Default::default(),
            last_allocation_s: time_s,
            cohorts,
            lifetimes,
            reachability: None,
            kernel: None,
        });
    }
    snapshot
}

fn sites() -> Vec<Arc<Site>> {
    let process = Arc::new(Process { instance: 1, pid: 1, comm: "bench".into(), ..Process::default() });
    let site = |id| Site {
        key: SiteKey { instance: 1, probe_set: 1, stack: id },
        id,
        process: Arc::clone(&process),
        probe_set: Arc::from("glibc"),
        function: Arc::from("malloc"),
        addresses: vec![id],
        truncated: None,
        first_thread: None,
        frames: OnceLock::new(),
    };
    (1..=SITES).map(|id| Arc::new(site(id))).collect()
}

/// CPU time that this thread has used.
fn thread_cpu() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec that outlives the call.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    assert_eq!(result, 0, "the clock exists on every Linux");
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

fn main() {
    let sites = sites();
    println!("{SITES} sites x 6 rules, per snapshot (median and slowest of {ROUNDS})");
    for (mix, leaking_share) in [("one site in 50 leaks", 50), ("every site leaks", 1)] {
        for samples in [60, 500] {
            let bounds = Bounds { samples: 500, points: SITES as usize * 500 };
            let mut history = History::new(bounds);
            let mut engine = RuleEngine::new(&RuleSettings::default()).expect("shipped rules");
            for number in 1..=samples {
                history.push(&snapshot(number, &sites, leaking_share));
            }
            let mut times = Vec::new();
            let mut findings = 0;
            for number in samples + 1..=samples + ROUNDS {
                history.push(&snapshot(number, &sites, leaking_share));
                let start = thread_cpu();
                let evaluation = engine.evaluate(&history, &mut |_| {});
                times.push(thread_cpu() - start);
                assert!(evaluation.errors.is_empty(), "{:?}", evaluation.errors);
                findings = evaluation.findings.len();
            }
            times.sort_unstable();
            let ms = |t: Duration| t.as_secs_f64() * 1e3;
            let (median, slowest) = (ms(times[times.len() / 2]), ms(times[times.len() - 1]));
            println!("  {mix}, {samples:>3} samples: {median:6.1} ms, {slowest:6.1} ms ({findings} findings)");
        }
    }
}
