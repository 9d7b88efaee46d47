//! The table that people read.

use std::fmt::Write;

use crate::attach::Attach;
use crate::bars::Bar;
use crate::interrupted::Interrupted;
use crate::jump::Jumps;
use crate::machine::Machine;
use crate::measure::{Base, Column, Effort, Outcome, Spread};
use crate::own_cost::OwnCost;
use crate::unwinding::{Python, Unwinding};

/// Titles of the table's columns, and their widths.
const COLUMNS: [(&str, usize); 9] = [
    ("", 31),
    ("throughput", 21),
    ("p99", 20),
    ("added us/unit", 22),
    ("added CPU %", 18),
    ("estimate %", 12),
    ("est/added", 11),
    ("tool CPU %", 12),
    ("waited %", 10),
];

/// The head of the output: where and how much.
pub fn head(machine: &Machine, effort: &Effort) -> String {
    format!(
        "{}, {}, Linux {}, {} x {}, {:.1} GiB, load {:.2} before the start\n\
         {} rounds with phases of {} s. Ratios are to the phases before and after; median (smallest-largest).\n",
        machine.memleak,
        machine.system,
        machine.kernel,
        machine.cpus,
        machine.cpu,
        machine.memory_bytes as f64 / f64::from(1 << 30),
        machine.load_before,
        effort.rounds,
        effort.seconds,
    )
}

/// The block of one workload.
pub fn block(outcome: &Outcome) -> String {
    let mut text = format!("\n{}: {}\n", outcome.workload, outcome.title);
    if let Some(missing) = &outcome.missing {
        line(&mut text, &format!("  n/a ({missing})"));
    }
    if let Some(failed) = &outcome.failed {
        line(&mut text, &format!("  failed: {failed}"));
    }
    if let Some(base) = &outcome.base {
        line(&mut text, &base_line(base, outcome.unit));
        let titles: Vec<_> = COLUMNS.iter().map(|(title, _)| (*title).to_owned()).collect();
        line(&mut text, &row(&titles));
        for column in &outcome.columns {
            line(&mut text, &column_row(column));
        }
    }
    text
}

fn base_line(base: &Base, unit: &str) -> String {
    let mut text = format!(
        "  alone: {} {unit}/s, {} us CPU per unit",
        quantities(&base.rate),
        spread(&base.cpu_us_per_unit, significant)
    );
    if let Some(p99) = &base.p99_ms {
        let _ = write!(text, ", p99 {} ms", spread(p99, significant));
    }
    let _ = write!(text, ", waited for a CPU {} % of the time", spread(&base.waited_percent, significant));
    text
}

fn column_row(column: &Column) -> String {
    let Some(summary) = &column.summary else {
        let reason = match (&column.missing, &column.failed) {
            (Some(missing), _) => format!("n/a ({missing})"),
            (None, Some(failed)) => format!("failed in {failed}"),
            (None, None) => "not measured".to_owned(),
        };
        return row(&[format!("  {}", column.title), reason]);
    };
    let ratio = |s: &Spread| spread(s, |value| format!("{value:.3}"));
    let median = |s: &Option<Spread>| s.map_or_else(|| "-".to_owned(), |s| percent(s.median));
    let mut text = row(&[
        format!("  {}", column.title),
        ratio(&summary.throughput),
        summary.p99.as_ref().map_or_else(|| "-".to_owned(), |p99| spread(p99, |value| format!("{value:.2}"))),
        spread(&summary.added_us_per_unit, significant),
        spread(&summary.added_cpu_percent, percent),
        median(&summary.estimated_cpu_percent),
        summary.estimate_ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
        median(&summary.tool_cpu_percent),
        percent(summary.waited_percent.median),
    ]);
    if !summary.modes.is_empty() {
        let _ = write!(text, "  {}", summary.modes.join("+"));
    }
    if let Some(failed) = &column.failed {
        let _ = write!(text, "  (failed in {failed})");
    }
    text
}

/// The block of memleak's own cost.
pub fn own_cost_block(own_cost: &OwnCost) -> String {
    let mib = |bytes: u64| format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20));
    let mut text = format!(
        "\nown-cost: {} blocks outstanding, {} sites, {} events lost, a snapshot every {} s\n",
        own_cost.outstanding_count, own_cost.sites, own_cost.losses, own_cost.interval_s
    );
    let read = own_cost.snapshot_cpu_s.map_or_else(String::new, |s| format!(", of it reading it {:.1} ms", s * 1e3));
    line(
        &mut text,
        &format!("  CPU per snapshot    {:.1} ms with all that follows{read}", own_cost.cpu_s_per_interval * 1e3),
    );
    line(&mut text, &format!("  CPU                 {:.2} % of one core", own_cost.cpu_percent));
    line(
        &mut text,
        &format!(
            "  memory              {} resident (at most {}), {} in BPF maps; resident with a full history {}",
            mib(own_cost.rss_bytes),
            mib(own_cost.peak_rss_bytes),
            mib(own_cost.bpf_map_bytes),
            mib(own_cost.full_rss_bytes)
        ),
    );
    line(
        &mut text,
        &format!(
            "  attached in         {:.0} ms; the program allocated it all in {:.2} s while traced",
            own_cost.attach_s * 1e3,
            own_cost.fill_s
        ),
    );
    text
}

/// The block of what call stacks cost.
pub fn unwinding_block(unwinding: &Unwinding) -> String {
    let Unwinding { frames, rounds, pair_ns, tables_ns, frame_pointers_ns, ratio, python } = unwinding;
    let mut text = format!("\nunwinding: call stacks of {frames} return addresses, medians of {rounds} rounds\n");
    line(&mut text, &format!("  by unwind tables    {tables_ns:.0} ns for all but the first"));
    line(&mut text, &format!("  by frame pointers   {frame_pointers_ns:.0} ns for all but the first"));
    line(
        &mut text,
        &format!("  ratio               {ratio:.2}; a traced malloc and free with one address {pair_ns:.0} ns"),
    );
    match python {
        Some(Python { functions, pair_ns, functions_ns }) => line(
            &mut text,
            &format!(
                "  {functions} Python functions {functions_ns:.0} ns, {:.2} of what a traced calloc and free of Python costs \
                 without ({pair_ns:.0} ns)",
                functions_ns / pair_ns
            ),
        ),
        None => line(&mut text, "  Python functions    n/a (no python3 of 3.11 to 3.13)"),
    }
    text
}

/// The block of a rate that jumps.
pub fn jump_block(jumps: &Jumps) -> String {
    let mut text = String::from("\njump: 1,000 pairs per second, then three million\n");
    let percent = |value: f64| percent(value * 100.0);
    line(&mut text, &format!("  full speed again    after {} s", spread(&jumps.back_s, significant)));
    line(&mut text, &format!("  worst ten seconds   {} % less per CPU second", spread(&jumps.worst_loss, percent)));
    line(&mut text, &format!("                      {} % less by the clock", spread(&jumps.worst_loss_clock, percent)));
    text
}

/// The block of a memleak that ends or is stopped in a window.
pub fn interrupted_block(interrupted: &Interrupted) -> String {
    let mut text = String::from("\ninterrupted: memleak is killed, or stopped, while a window is open\n");
    line(
        &mut text,
        &format!("  killed              full speed after {} s", spread(&interrupted.killed_s, significant)),
    );
    line(
        &mut text,
        &format!("  stopped             full speed after {} s", spread(&interrupted.stopped_s, significant)),
    );
    text
}

/// The block of attaching.
pub fn attach_block(attach: &Attach) -> String {
    let mut text = format!("\nattach: to a program with {} mappings\n", attach.mappings);
    let ms = |value: f64| significant(value * 1e3);
    line(&mut text, &format!("  first snapshot      after {} ms", spread(&attach.first_snapshot_s, ms)));
    text
}

/// What was asked of memleak, and whether it holds.
pub fn bars_block(bars: &[Bar]) -> String {
    let mut text = String::from("\nbars\n");
    for bar in bars {
        let verdict = if bar.met { "met" } else { "NOT MET" };
        line(&mut text, &format!("  {verdict:<8} {:<58} {}", bar.what, bar.value));
    }
    text
}

fn row(cells: &[String]) -> String {
    let mut text = String::new();
    for (cell, (_, width)) in cells.iter().zip(COLUMNS) {
        // A cell that is too wide keeps its distance to the next one.
        let _ = write!(text, "{cell:<width$}", width = width - 1);
        text.push(' ');
    }
    text.trim_end().to_owned()
}

fn line(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}

/// "median (smallest-largest)"; the median alone when they are the same.
fn spread(spread: &Spread, format: impl Fn(f64) -> String) -> String {
    let (min, median, max) = (format(spread.min), format(spread.median), format(spread.max));
    // A minus sign and a dash side by side cannot be read.
    let dash = if spread.min < 0.0 { " to " } else { "-" };
    if min == max { median } else { format!("{median} ({min}{dash}{max})") }
}

/// Three significant digits, but no more than five after the point: below that everything here is noise.
fn significant(value: f64) -> String {
    let digits = if value == 0.0 { 0 } else { 2 - value.abs().log10().floor().clamp(-3.0, 2.0) as i32 };
    positive_zero(format!("{value:.*}", usize::try_from(digits).unwrap_or(0)))
}

/// A percentage to a tenth.
fn percent(value: f64) -> String {
    positive_zero(format!("{value:.1}"))
}

/// Less than nothing that was rounded to nothing is nothing.
fn positive_zero(number: String) -> String {
    match number.strip_prefix('-') {
        Some(digits) if digits.chars().all(|c| matches!(c, '0' | '.')) => digits.to_owned(),
        _ => number,
    }
}

/// A spread with k or M, the same for all three: its numbers are compared to each other.
fn quantities(values: &Spread) -> String {
    let (unit, suffix) = match values.median {
        v if v >= 1e6 => (1e6, " M"),
        v if v >= 1e4 => (1e3, " k"),
        _ => (1.0, ""),
    };
    spread(values, |value| significant(value / unit)) + suffix
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{Account, Phase, Round, Summary};

    // What is read is the median; the rest says how far to trust it.
    #[test]
    fn spread_puts_the_median_first() {
        let of = |min, median, max| spread(&Spread { min, median, max }, percent);
        assert_eq!(of(1.0, 2.0, 3.0), "2.0 (1.0-3.0)");
        assert_eq!(of(2.0, 2.0, 2.0), "2.0");
        assert_eq!(of(-3.0, -2.0, -1.0), "-2.0 (-3.0 to -1.0)");
        assert_eq!(of(-0.5, 0.1, 0.4), "0.1 (-0.5 to 0.4)");
    }

    // Microseconds per pair and requests per second stand in one table.
    #[test]
    fn numbers_have_three_digits() {
        for (value, text) in [(0.0, "0"), (0.02346, "0.0235"), (1.5, "1.50"), (23.46, "23.5"), (1234.0, "1234")] {
            assert_eq!(significant(value), text);
        }
        assert_eq!((significant(-0.000_003), percent(-0.04)), ("0.00000".to_owned(), "0.0".to_owned()));
        let rates = |min, median, max| quantities(&Spread { min, median, max });
        assert_eq!(rates(43_835_000.0, 43_835_000.0, 43_835_000.0), "43.8 M");
        assert_eq!(rates(58.7, 43_900.0, 45_400.0), "43.9 (0.0587-45.4) k");
        assert_eq!(rates(998.0, 998.0, 998.0), "998");
    }

    // A tool that could not run is a line with a reason, never a missing line.
    #[test]
    fn every_tool_has_its_line() {
        let phase = Phase { units: 1000.0, elapsed_s: 1.0, p99_ms: None, cpu_s: 0.5, waited_s: 0.0 };
        let slow = Phase { units: 500.0, ..phase };
        let account = Account {
            attach_s: 0.2,
            detach_s: 0.1,
            estimated_cpu_percent: Some(40.0),
            trap_ns: None,
            mode: "exact".to_owned(),
            losses: 0,
        };
        let round = Round { before: phase, with: slow, after: phase, tool_cpu_s: Some(0.01), memleak: Some(account) };
        let one = |value| Spread { min: value, median: value, max: value };
        let summary = Summary {
            throughput: one(round.throughput()),
            p99: None,
            added_us_per_unit: one(round.added_us_per_unit()),
            added_cpu_percent: one(round.added_cpu_percent()),
            estimated_cpu_percent: Some(one(40.0)),
            estimate_ratio: Some(1.6),
            tool_cpu_percent: Some(one(1.0)),
            waited_percent: one(3.0),
            attach_s: Some(one(0.2)),
            trap_ns: None,
            modes: vec!["exact".to_owned()],
        };
        let missing = Some("valgrind is not installed".to_owned());
        let outcome = Outcome {
            workload: "loop",
            title: "a loop",
            unit: "pairs",
            missing: None,
            failed: None,
            base: Some(Base { rate: one(1000.0), cpu_us_per_unit: one(500.0), p99_ms: None, waited_percent: one(0.0) }),
            columns: vec![
                Column {
                    tool: "exact",
                    title: "memleak, exact",
                    missing: None,
                    failed: None,
                    summary: Some(summary),
                    rounds: vec![round],
                },
                Column {
                    tool: "valgrind",
                    title: "valgrind",
                    missing,
                    failed: None,
                    summary: None,
                    rounds: Vec::new(),
                },
            ],
        };
        let text = block(&outcome);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 6, "{text}");
        assert_eq!(lines[2], "  alone: 1000 pairs/s, 500 us CPU per unit, waited for a CPU 0 % of the time");
        let words: Vec<_> = lines[4].split_whitespace().collect();
        assert_eq!(words, ["memleak,", "exact", "0.500", "-", "500", "25.0", "40.0", "1.60", "1.0", "3.0", "exact"]);
        assert!(lines[5].ends_with("n/a (valgrind is not installed)"), "{text}");
    }
}
