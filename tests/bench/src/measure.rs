//! The measurement: phases without and with a tool take turns, and every phase with is compared to its two neighbours.
//!
//! A machine's speed drifts, and on a shared one it jumps. A tool's phase is therefore set against the mean of the phase before
//! and the phase after it (A B A B A), and what is reported is the median of those ratios with the smallest and the
//! largest.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::clock;
use crate::memleak::{Memleak, estimated_overhead};
use crate::tools::{Kind, TOOLS, Tool, is_installed};
use crate::workloads::{Launch, Target, Workload};

/// How much is measured.
#[derive(Clone, Debug, Serialize)]
pub struct Effort {
    /// Phases with each tool.
    pub rounds: usize,
    /// Length of a phase in seconds; some tools need longer ones.
    pub seconds: u64,
}

/// One phase of load and what it cost.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Phase {
    /// Units of work done.
    pub units: f64,
    /// How long they took, in seconds.
    pub elapsed_s: f64,
    /// 99 of 100 requests were answered within this, in milliseconds.
    pub p99_ms: Option<f64>,
    /// CPU time of the target, in seconds, by its process clock.
    pub cpu_s: f64,
    /// Time that its threads were ready and had no CPU, in seconds.
    pub waited_s: f64,
}

impl Phase {
    /// Units per second.
    pub fn rate(&self) -> f64 {
        self.units / self.elapsed_s
    }

    /// Share of the time in which it was ready and had no CPU, in percent.
    pub fn waited_percent(&self) -> f64 {
        self.waited_s / self.elapsed_s * 100.0
    }

    /// CPU time of the target per unit, in microseconds.
    pub fn cpu_us_per_unit(&self) -> f64 {
        self.cpu_s * 1e6 / self.units
    }
}

/// One phase with a tool, between two without.
#[derive(Clone, Debug, Serialize)]
pub struct Round {
    /// Without, before.
    pub before: Phase,
    /// With.
    pub with: Phase,
    /// Without, after.
    pub after: Phase,
    /// CPU time of the tool's own processes during the phase, in seconds; `None` when it has none.
    pub tool_cpu_s: Option<f64>,
    /// What only memleak has to say.
    pub memleak: Option<Account>,
}

/// What memleak said of itself in one phase.
#[derive(Clone, Debug, Serialize)]
pub struct Account {
    /// From its start until everything was attached, in seconds.
    pub attach_s: f64,
    /// From the request to end until it had ended, in seconds; report and alerts are off.
    pub detach_s: f64,
    /// Its own estimate of what tracing costs the target, in percent of one CPU; `None` with fewer than two snapshots.
    pub estimated_cpu_percent: Option<f64>,
    /// Its calibrated price of a bare hit, in nanoseconds; `None` when it does not say.
    pub trap_ns: Option<f64>,
    /// Mode of its last snapshot.
    pub mode: String,
    /// Events lost, of all kinds.
    pub losses: u64,
}

impl Round {
    /// Throughput with the tool; 1 is as without.
    pub fn throughput(&self) -> f64 {
        self.with.rate() / mean(self.before.rate(), self.after.rate())
    }

    /// Latency with the tool; 1 is as without. `None` where there is no latency.
    pub fn p99(&self) -> Option<f64> {
        Some(self.with.p99_ms? / mean(self.before.p99_ms?, self.after.p99_ms?))
    }

    /// CPU time that the tool adds to the target per unit of work, in microseconds.
    pub fn added_us_per_unit(&self) -> f64 {
        self.with.cpu_us_per_unit() - mean(self.before.cpu_us_per_unit(), self.after.cpu_us_per_unit())
    }

    /// The same per second, in percent of one CPU.
    pub fn added_cpu_percent(&self) -> f64 {
        self.added_us_per_unit() * self.with.rate() / 1e4
    }

    /// CPU time of the tool's own processes in percent of one CPU; `None` when it has none.
    pub fn tool_cpu_percent(&self) -> Option<f64> {
        Some(self.tool_cpu_s? / self.with.elapsed_s * 100.0)
    }
}

/// Smallest, median and largest of some values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Smallest.
    pub min: f64,
    /// Median; of an even number the mean of the two in the middle.
    pub median: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// Of some values; `None` when there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<_> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (&min, &max) = (values.first()?, values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[middle] } else { mean(values[middle - 1], values[middle]) };
        Some(Spread { min, median, max })
    }
}

/// What a tool did to a workload.
#[derive(Debug, Serialize)]
pub struct Column {
    /// Id of the tool.
    pub tool: &'static str,
    /// Its name in the table.
    pub title: &'static str,
    /// Why it cannot be used here; `None` when it can.
    pub missing: Option<String>,
    /// What went wrong, after which it was left out; `None` when nothing did.
    pub failed: Option<String>,
    /// What was computed from the rounds; `None` when there are none.
    pub summary: Option<Summary>,
    /// Everything as measured.
    pub rounds: Vec<Round>,
}

/// The figures of the table.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// See [`Round::throughput`].
    pub throughput: Spread,
    /// See [`Round::p99`].
    pub p99: Option<Spread>,
    /// See [`Round::added_us_per_unit`].
    pub added_us_per_unit: Spread,
    /// See [`Round::added_cpu_percent`].
    pub added_cpu_percent: Spread,
    /// See [`Account::estimated_cpu_percent`].
    pub estimated_cpu_percent: Option<Spread>,
    /// memleak's estimate of all rounds together, as a part of what was measured from outside; `None` where nothing
    /// measurable was added.
    pub estimate_ratio: Option<f64>,
    /// See [`Round::tool_cpu_percent`].
    pub tool_cpu_percent: Option<Spread>,
    /// See [`Phase::waited_percent`]; of the phases with the tool.
    pub waited_percent: Spread,
    /// See [`Account::attach_s`].
    pub attach_s: Option<Spread>,
    /// See [`Account::trap_ns`].
    pub trap_ns: Option<Spread>,
    /// All modes that memleak was in, sorted.
    pub modes: Vec<String>,
}

impl Summary {
    fn of(rounds: &[Round]) -> Option<Self> {
        let spread = |value: fn(&Round) -> Option<f64>| Spread::of(rounds.iter().filter_map(value));
        let mut modes: Vec<_> = rounds.iter().filter_map(|round| Some(round.memleak.as_ref()?.mode.clone())).collect();
        modes.sort_unstable();
        modes.dedup();
        Some(Summary {
            throughput: spread(|round| Some(round.throughput()))?,
            p99: spread(Round::p99),
            added_us_per_unit: spread(|round| Some(round.added_us_per_unit()))?,
            added_cpu_percent: spread(|round| Some(round.added_cpu_percent()))?,
            estimated_cpu_percent: spread(|round| round.memleak.as_ref()?.estimated_cpu_percent),
            estimate_ratio: estimate_ratio(rounds),
            tool_cpu_percent: spread(Round::tool_cpu_percent),
            waited_percent: spread(|round| Some(round.with.waited_percent()))?,
            attach_s: spread(|round| Some(round.memleak.as_ref()?.attach_s)),
            trap_ns: spread(|round| round.memleak.as_ref()?.trap_ns),
            modes,
        })
    }
}

/// Sums, not ratios round by round: where little is added, one round is mostly noise.
fn estimate_ratio(rounds: &[Round]) -> Option<f64> {
    let both = rounds
        .iter()
        .filter_map(|round| Some((round.memleak.as_ref()?.estimated_cpu_percent?, round.added_cpu_percent())));
    let (estimated, added) = both.fold((0.0, 0.0), |sum, (estimated, added)| (sum.0 + estimated, sum.1 + added));
    (added > 0.0).then(|| estimated / added)
}

/// Everything about one workload.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// Id of the workload.
    pub workload: &'static str,
    /// Its name in the table.
    pub title: &'static str,
    /// What its throughput counts.
    pub unit: &'static str,
    /// Why it cannot be measured here; `None` when it can.
    pub missing: Option<String>,
    /// What went wrong, which ended it; `None` when nothing did.
    pub failed: Option<String>,
    /// The program without any tool; `None` when it could not be measured.
    pub base: Option<Base>,
    /// The tools, in the order of the table.
    pub columns: Vec<Column>,
}

impl Outcome {
    /// True when something was tried and went wrong; what cannot be used here is not tried.
    pub fn has_failed(&self) -> bool {
        self.failed.is_some() || self.columns.iter().any(|column| column.failed.is_some())
    }
}

/// A program without any tool.
#[derive(Debug, Serialize)]
pub struct Base {
    /// Units per second.
    pub rate: Spread,
    /// CPU time per unit, in microseconds.
    pub cpu_us_per_unit: Spread,
    /// 99 of 100 requests were answered within this, in milliseconds.
    pub p99_ms: Option<Spread>,
    /// See [`Phase::waited_percent`]: how much others disturbed, the load generator among them.
    pub waited_percent: Spread,
}

impl Base {
    fn of(phases: &[Phase]) -> Option<Self> {
        Some(Base {
            rate: Spread::of(phases.iter().map(Phase::rate))?,
            cpu_us_per_unit: Spread::of(phases.iter().map(Phase::cpu_us_per_unit))?,
            p99_ms: Spread::of(phases.iter().filter_map(|phase| phase.p99_ms)),
            waited_percent: Spread::of(phases.iter().map(Phase::waited_percent))?,
        })
    }
}

/// What is there to measure with.
#[derive(Debug)]
pub struct Bench<'a> {
    /// The memleak that is measured.
    pub memleak: &'a Memleak,
    /// Per tool, why it cannot be used; see [`available`].
    pub tools: &'a [(&'static Tool, Option<String>)],
    /// How much.
    pub effort: &'a Effort,
}

/// For each of the wanted tools why it cannot be used here; `None` when it can.
///
/// # Errors
/// memleak cannot be run.
pub fn available(wanted: &[String], memleak: &Memleak, folder: &Path) -> Result<Vec<(&'static Tool, Option<String>)>> {
    // SAFETY: geteuid takes nothing and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    TOOLS
        .iter()
        .filter(|tool| wanted.is_empty() || wanted.iter().any(|id| id == tool.id))
        .map(|tool| {
            let missing = match tool.kind {
                Kind::Attach(_) if !root => Some("needs root".to_owned()),
                Kind::Attach(settings) => memleak.refuses(settings, folder)?,
                Kind::Relaunch(words) => {
                    words.first().filter(|name| !is_installed(name)).map(|name| format!("{name} is not installed"))
                }
                Kind::Rebuild => None,
            };
            Ok((tool, missing))
        })
        .collect()
}

impl Bench<'_> {
    /// Measures one workload with all tools; what goes wrong is part of the outcome.
    pub fn measure(&self, workload: &dyn Workload, folder: &Path) -> Outcome {
        let mut outcome = Outcome {
            workload: workload.id(),
            title: workload.title(),
            unit: workload.unit(),
            missing: workload.missing(),
            failed: None,
            base: None,
            columns: self.columns(workload),
        };
        if outcome.missing.is_some() {
            return outcome;
        }
        let mut phases = Vec::new();
        if let Err(error) = self.rounds(workload, folder, &mut phases, &mut outcome.columns) {
            outcome.failed = Some(format!("{error:#}"));
        }
        outcome.base = Base::of(&phases);
        for column in &mut outcome.columns {
            column.summary = Summary::of(&column.rounds);
        }
        outcome
    }

    fn columns(&self, workload: &dyn Workload) -> Vec<Column> {
        let column = |(tool, missing): &(&'static Tool, Option<String>)| {
            let fits = tool.kind != Kind::Rebuild || workload.can_be_sanitized();
            let misfit = || Some("not compiled by the benchmark".to_owned());
            let missing = missing.clone().or_else(|| if fits { None } else { misfit() });
            Column { tool: tool.id, title: tool.title, missing, failed: None, summary: None, rounds: Vec::new() }
        };
        self.tools.iter().map(column).collect()
    }

    /// The phases in their order; a tool that fails is left out from then on, a failing program ends it all.
    fn rounds(
        &self,
        workload: &dyn Workload,
        folder: &Path,
        phases: &mut Vec<Phase>,
        columns: &mut [Column],
    ) -> Result<()> {
        let mut target = workload.start(&Launch::Plain, &subfolder(folder, "base")?)?;
        target.load(1)?;
        phases.push(phase(&mut *target, self.effort.seconds)?.0);
        for number in 1..=self.effort.rounds {
            for ((tool, _), column) in self.tools.iter().zip(&mut *columns) {
                if column.missing.is_some() || column.failed.is_some() {
                    continue;
                }
                let Some(&before) = phases.last() else { return Ok(()) };
                let with = self.with(tool, workload, &mut *target, folder);
                let after = phase(&mut *target, self.effort.seconds).context("the program without any tool failed")?.0;
                phases.push(after);
                match with {
                    Ok((with, tool_cpu_s, memleak)) => {
                        let round = Round { before, with, after, tool_cpu_s, memleak };
                        let (id, of, ratio) = (workload.id(), self.effort.rounds, round.throughput());
                        eprintln!("bench: {id}, round {number} of {of}, {tool}: {ratio:.3} of the throughput");
                        column.rounds.push(round);
                    }
                    Err(error) => {
                        eprintln!("bench: {}, {tool} failed: {error:#}", workload.id());
                        column.failed = Some(format!("round {number}: {error:#}"));
                    }
                }
            }
        }
        target.stop();
        Ok(())
    }

    /// One phase with a tool.
    fn with(
        &self,
        tool: &Tool,
        workload: &dyn Workload,
        target: &mut dyn Target,
        folder: &Path,
    ) -> Result<(Phase, Option<f64>, Option<Account>)> {
        let folder = subfolder(folder, tool.id)?;
        let launch = match tool.kind {
            Kind::Attach(settings) => {
                let (phase, cpu_s, account) =
                    self.attached(tool, &[settings, workload.settings()].concat(), target, &folder)?;
                return Ok((phase, Some(cpu_s), Some(account)));
            }
            Kind::Relaunch(words) => {
                let place = folder.to_string_lossy();
                Launch::Below(words.iter().map(|word| word.replace("{}", &place)).collect())
            }
            Kind::Rebuild => Launch::Sanitized,
        };
        let mut relaunched = workload.start(&launch, &folder)?;
        relaunched.load(tool.warm_up_s)?;
        let (phase, helpers_cpu_s) = phase(&mut *relaunched, self.effort.seconds.max(tool.least_s))?;
        relaunched.stop();
        Ok((phase, helpers_cpu_s, None))
    }

    /// One phase with memleak attached.
    fn attached(
        &self,
        tool: &Tool,
        settings: &[&str],
        target: &mut dyn Target,
        folder: &Path,
    ) -> Result<(Phase, f64, Account)> {
        let mut session = self.memleak.attach(target.pid(), settings, folder)?;
        target.load(tool.warm_up_s)?;
        let (from, cpu_before_s) = (Instant::now(), session.cpu_s()?);
        let (phase, _) = phase(target, self.effort.seconds.max(tool.least_s))?;
        let (to, cpu_s) = (Instant::now(), session.cpu_s()? - cpu_before_s);
        let snapshots = session.snapshots();
        let estimated_cpu_percent = estimated_overhead(snapshots, from, to).map(|rate| rate * 100.0);
        let (mode, losses, trap_ns) =
            snapshots.last().map(|last| (last.mode.clone(), last.losses, last.trap_ns)).unwrap_or_default();
        let attach_s = session.attach_s;
        let detach_s = session.detach()?;
        Ok((phase, cpu_s, Account { attach_s, detach_s, estimated_cpu_percent, trap_ns, mode, losses }))
    }
}

/// Puts load on a target; returns what it did, and the CPU time of its helpers, `None` when it has none.
fn phase(target: &mut dyn Target, seconds: u64) -> Result<(Phase, Option<f64>)> {
    let pid = target.pid();
    let helpers = target.helpers();
    // A helper that has ended, such as a compressor that had nothing to do, costs nothing any more.
    let helpers_cpu_s = || helpers.iter().filter_map(|&helper| clock::cpu_s(helper).ok()).sum::<f64>();
    let before = (clock::cpu_s(pid)?, clock::waited_s(pid), helpers_cpu_s());
    let done = target.load(seconds)?;
    let phase = Phase {
        units: done.units,
        elapsed_s: done.elapsed_s,
        p99_ms: done.p99_ms,
        cpu_s: clock::cpu_s(pid)? - before.0,
        waited_s: clock::waited_s(pid) - before.1,
    };
    anyhow::ensure!(phase.units > 0.0 && phase.elapsed_s > 0.0, "nothing was done in a phase of {seconds} s");
    Ok((phase, (!helpers.is_empty()).then(|| helpers_cpu_s() - before.2)))
}

/// A folder that is there and empty: every start finds the same.
fn subfolder(folder: &Path, name: &str) -> Result<std::path::PathBuf> {
    let path = folder.join(name);
    if path.exists() {
        std::fs::remove_dir_all(&path).with_context(|| format!("failed to empty {}", path.display()))?;
    }
    std::fs::create_dir_all(&path).with_context(|| format!("failed to create {}", path.display()))?;
    Ok(path)
}

fn mean(a: f64, b: f64) -> f64 {
    f64::midpoint(a, b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase_of(units: f64, cpu_s: f64, p99_ms: f64) -> Phase {
        Phase { units, elapsed_s: 2.0, p99_ms: Some(p99_ms), cpu_s, waited_s: 0.0 }
    }

    // A drifting machine must not look like a tool: the neighbours' mean is the base.
    #[test]
    fn a_round_is_compared_to_its_neighbours() {
        let round = Round {
            before: phase_of(1000.0, 1.0, 1.0),
            with: phase_of(1200.0, 1.8, 6.0),
            after: phase_of(3000.0, 3.0, 3.0),
            tool_cpu_s: Some(0.5),
            memleak: None,
        };
        assert_eq!(round.throughput(), 0.6);
        assert_eq!(round.p99(), Some(3.0));
        // 1,500 us per unit with, 1,000 without; 600 units per second.
        assert!((round.added_us_per_unit() - 500.0).abs() < 1e-9);
        assert!((round.added_cpu_percent() - 30.0).abs() < 1e-9);
        assert_eq!(round.tool_cpu_percent(), Some(25.0));
    }

    // Noise goes in both directions, and must not be divided by.
    #[test]
    fn estimate_is_compared_over_all_rounds() {
        let round = |estimated_cpu_percent, with_cpu_s| Round {
            before: phase_of(1000.0, 1.0, 1.0),
            with: phase_of(1000.0, with_cpu_s, 1.0),
            after: phase_of(1000.0, 1.0, 1.0),
            tool_cpu_s: None,
            memleak: Some(Account {
                attach_s: 0.1,
                detach_s: 0.1,
                estimated_cpu_percent: Some(estimated_cpu_percent),
                trap_ns: None,
                mode: "exact".to_owned(),
                losses: 0,
            }),
        };
        // 5 and -1 percent added.
        let ratio = estimate_ratio(&[round(3.0, 1.1), round(2.0, 0.98)]).unwrap();
        assert!((ratio - 1.25).abs() < 1e-9, "{ratio}");
        assert_eq!(estimate_ratio(&[round(2.0, 0.98)]), None);
    }

    // One phase in which something else ran must not decide the result.
    #[test]
    fn the_median_ignores_an_outlier() {
        assert_eq!(Spread::of([0.9, 0.1, 0.95]), Some(Spread { min: 0.1, median: 0.9, max: 0.95 }));
        assert_eq!(Spread::of([2.0, 1.0]), Some(Spread { min: 1.0, median: 1.5, max: 2.0 }));
        assert_eq!(Spread::of([]), None);
    }
}
