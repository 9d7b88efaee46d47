//! What is asked of memleak, judged by what was measured.

use serde::Serialize;

use crate::Results;
use crate::measure::{Column, Outcome, Summary};

/// One demand.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bar {
    /// What is asked for.
    pub what: String,
    /// What was measured.
    pub value: String,
    /// Whether it is what was asked for.
    pub met: bool,
}

/// Smallest part of their throughput that programs that are always busy keep, and paced ones.
const THROUGHPUT: f64 = 0.95;
const PACED_RATE: f64 = 0.99;
/// Most that latency may grow.
const P99: f64 = 1.5;
/// The budget: this part of a program's CPU time, and always so many percent of one core.
const BUDGET_SHARE: f64 = 0.05;
const BUDGET_FLOOR_PERCENT: f64 = 3.0;
/// How far memleak's own estimate may be from what is measured.
const ESTIMATE: std::ops::RangeInclusive<f64> = 0.7..=1.3;
/// Most microseconds of a traced pair of calls, where a bare hit costs so many nanoseconds.
const PAIR_US: f64 = 3.5;
const BARE_HIT_NS: f64 = 700.0;
/// How much cheaper probes are that lie where the kernel emulates.
const PLACEMENT: f64 = 6.0;
/// A rate that jumps: seconds until the program has its speed again, and its largest loss over any ten seconds.
const BACK_S: f64 = 2.0;
const LOSS: f64 = 0.05;
/// Seconds to the first snapshot, and to full speed after memleak was killed or stopped.
const FIRST_SNAPSHOT_S: f64 = 0.3;
const RECOVERED_S: f64 = 1.0;
/// CPU seconds of a snapshot, percent of a core, and bytes, with a million blocks from ten thousand sites.
const SNAPSHOT_CPU_S: f64 = 0.05;
const OWN_CPU_PERCENT: f64 = 2.0;
const OWN_BYTES: u64 = 200_000_000;

/// Every demand that something was measured for.
pub fn bars(results: &Results) -> Vec<Bar> {
    let mut bars = Vec::new();
    for outcome in &results.workloads {
        if let Some(summary) = summary_of(outcome, "governed") {
            let paced = outcome.workload.starts_with("paced");
            if paced { governed_paced(outcome, summary, &mut bars) } else { saturated(outcome, summary, &mut bars) }
        }
        if let Some(exact) = summary_of(outcome, "exact").filter(|_| outcome.unit == "pairs") {
            every_call(outcome, exact, &mut bars);
        }
    }
    if let Some(jumps) = &results.jump {
        let (back_s, loss) = (jumps.back_s.median, jumps.worst_loss.median);
        bars.push(bar(format!("jump: full speed within {BACK_S} s"), format!("{back_s:.2} s"), back_s <= BACK_S));
        let value = format!("{:.1} %", loss * 100.0);
        bars.push(bar(format!("jump: at most {} % lost in any 10 s", LOSS * 100.0), value, loss <= LOSS));
    }
    if let Some(attach) = &results.attach {
        let first_s = attach.first_snapshot_s.median;
        let what = format!("attach: first snapshot within {} ms", FIRST_SNAPSHOT_S * 1e3);
        let value = format!("{:.0} ms, {} mappings", first_s * 1e3, attach.mappings);
        bars.push(bar(what, value, first_s <= FIRST_SNAPSHOT_S));
    }
    if let Some(interrupted) = &results.interrupted {
        for (what, took) in [("killed", interrupted.killed_s), ("stopped", interrupted.stopped_s)] {
            let value = format!("{:.2} s at most", took.max);
            let what = format!("{what} in a window: full speed within {RECOVERED_S} s");
            bars.push(bar(what, value, took.max <= RECOVERED_S));
        }
    }
    if let Some(own) = &results.own_cost {
        let cpu_s = own.snapshot_cpu_s.unwrap_or(own.cpu_s_per_interval);
        let value = format!("{:.0} ms", cpu_s * 1e3);
        let what = format!("own cost: a snapshot takes at most {} ms of CPU", SNAPSHOT_CPU_S * 1e3);
        bars.push(bar(what, value, cpu_s <= SNAPSHOT_CPU_S));
        let value = format!("{:.2} %", own.cpu_percent);
        let what = format!("own cost: at most {OWN_CPU_PERCENT} % of a core");
        bars.push(bar(what, value, own.cpu_percent <= OWN_CPU_PERCENT));
        let mb = |bytes: u64| format!("{:.0} MB", bytes as f64 / 1e6);
        for (when, rss_bytes) in [("", own.rss_bytes), (", history full", own.full_rss_bytes)] {
            let bytes = rss_bytes + own.bpf_map_bytes;
            let what = format!("own cost: at most {}, maps included{when}", mb(OWN_BYTES));
            bars.push(bar(what, mb(bytes), bytes <= OWN_BYTES));
        }
    }
    bars
}

fn saturated(outcome: &Outcome, summary: &Summary, bars: &mut Vec<Bar>) {
    let (id, kept) = (outcome.workload, summary.throughput.median);
    bars.push(bar(format!("{id}: throughput at least {THROUGHPUT}"), format!("{kept:.3}"), kept >= THROUGHPUT));
    if let Some(p99) = summary.p99.filter(|_| id.starts_with("redis")) {
        let p99 = p99.median;
        bars.push(bar(format!("{id}: p99 at most {P99} times"), format!("{p99:.2}"), p99 <= P99));
    }
}

fn governed_paced(outcome: &Outcome, summary: &Summary, bars: &mut Vec<Bar>) {
    let (id, rate, added) = (outcome.workload, summary.throughput.median, summary.added_cpu_percent.median);
    bars.push(bar(format!("{id}: rate at least {PACED_RATE}"), format!("{rate:.3}"), rate >= PACED_RATE));
    let Some(base) = &outcome.base else { return };
    let used_percent = base.cpu_us_per_unit.median * base.rate.median / 1e4;
    let budget = (used_percent * BUDGET_SHARE).max(BUDGET_FLOOR_PERCENT);
    let value = format!("{added:.2} %");
    bars.push(bar(format!("{id}: added CPU within the budget of {budget:.1} %"), value, added <= budget));
    let ratio = summary.estimate_ratio;
    let value = ratio.map_or_else(|| "nothing was added".to_owned(), |ratio| format!("{ratio:.2}"));
    let met = ratio.is_some_and(|ratio| ESTIMATE.contains(&ratio));
    bars.push(bar(format!("{id}: estimate within 30 % of what is added"), value, met));
    if id == "paced-10k" {
        let modes = summary.modes.join("+");
        let met = modes == "exact";
        bars.push(bar(format!("{id}: traced exactly"), modes, met));
    }
}

fn every_call(outcome: &Outcome, exact: &Summary, bars: &mut Vec<Bar>) {
    let (id, pair_us) = (outcome.workload, exact.added_us_per_unit.median);
    if let Some(trap_ns) = exact.trap_ns {
        // What is slow here altogether may take longer here.
        let most_us = PAIR_US * (trap_ns.median / BARE_HIT_NS).max(1.0);
        let value = format!("{pair_us:.2} us, a bare hit {:.0} ns", trap_ns.median);
        bars.push(bar(format!("{id}: a traced pair at most {most_us:.1} us"), value, pair_us <= most_us));
    }
    if let Some(classic) = summary_of(outcome, "classic") {
        let times = classic.added_us_per_unit.median / pair_us;
        let what = format!("{id}: at least {PLACEMENT} times cheaper than classic probes");
        bars.push(bar(what, format!("{times:.1}"), times >= PLACEMENT));
    }
}

fn summary_of<'a>(outcome: &'a Outcome, tool: &str) -> Option<&'a Summary> {
    outcome.columns.iter().find(|column: &&Column| column.tool == tool)?.summary.as_ref()
}

fn bar(what: String, value: String, met: bool) -> Bar {
    Bar { what, value, met }
}
