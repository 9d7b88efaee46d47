//! `make bench`: what memleak and other tools cost real programs, measured side by side.
//!
//! A workload (`workloads/`) is a program with a load on it, a tool (`tools.rs`) is what it runs under. Phases without
//! and with a tool take turns (`measure.rs`); cost is read from outside, from the kernel's clocks (`clock.rs`). A
//! table goes to standard output, everything as measured to a JSON file. docs/benchmarks.md says how to read it.

mod attach;
mod bars;
mod clock;
mod interrupted;
mod jump;
mod machine;
mod measure;
mod memleak;
mod output;
mod own_cost;
mod process;
mod slices;
mod tools;
mod unwinding;
mod workloads;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde::Serialize;

use attach::Attach;
use bars::Bar;
use interrupted::Interrupted;
use jump::Jumps;
use machine::Machine;
use measure::{Bench, Effort, Outcome};
use memleak::Memleak;
use own_cost::OwnCost;
use unwinding::Unwinding;

/// What is measured apart from programs under tools, by the names that they have among the workloads.
const JUMP: &str = "jump";
const ATTACH: &str = "attach";
const INTERRUPTED: &str = "interrupted";
const OWN_COST: &str = "own-cost";
/// The id of the cost of call stacks among them.
const UNWINDING: &str = "unwinding";

/// The tools that the bars ask about: with a budget everywhere, without one where a pair of calls is all there is.
const BAR_TOOLS: [&str; 1] = ["governed"];
const BAR_TOOLS_IN_LOOP: [&str; 3] = ["governed", "exact", "classic"];

/// Measures what memleak and other tools cost real programs.
#[derive(Debug, Parser)]
#[command(name = "memleak_bench", version, max_term_width = 100)]
struct Options {
    /// The memleak to measure
    #[arg(long, value_name = "PATH", default_value = "target/release/memleak")]
    memleak: PathBuf,
    /// Phases with each tool; the median is reported
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Length of a phase in seconds; those with memleak's budget on have at least ten
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Only these workloads, as a comma list; `--list` names them
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    workloads: Vec<String>,
    /// Only these tools, as a comma list; `--list` names them
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    tools: Vec<String>,
    /// Where everything as measured is written
    #[arg(long, value_name = "PATH", default_value = "target/bench.json")]
    json: PathBuf,
    /// Only what the bars ask for: about 22 minutes with the other defaults
    #[arg(long, conflicts_with = "tools")]
    bars: bool,
    /// Print the ids of workloads and tools, and measure nothing
    #[arg(long)]
    list: bool,
}

/// What is written as JSON.
#[derive(Debug, Serialize)]
struct Results {
    machine: Machine,
    effort: Effort,
    workloads: Vec<Outcome>,
    /// These are `None` when they were not asked for, or failed.
    jump: Option<Jumps>,
    attach: Option<Attach>,
    interrupted: Option<Interrupted>,
    own_cost: Option<OwnCost>,
    bars: Vec<Bar>,
    /// As `own_cost`.
    unwinding: Option<Unwinding>,
}

fn main() -> ExitCode {
    match run(Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// True when nothing that was tried has failed; what is not installed is not tried.
fn run(mut options: Options) -> Result<bool> {
    // `WORKLOADS=` in a make call means all of them.
    options.workloads.retain(|id| !id.is_empty());
    options.tools.retain(|id| !id.is_empty());
    let workloads = workloads::workloads();
    let workload_ids: Vec<_> = workloads
        .iter()
        .map(|workload| workload.id())
        .chain([JUMP, ATTACH, INTERRUPTED, OWN_COST, UNWINDING])
        .collect();
    let tool_ids: Vec<_> = tools::TOOLS.iter().map(|tool| tool.id).collect();
    if options.list {
        println!("workloads: {}\ntools: {}", workload_ids.join(", "), tool_ids.join(", "));
        return Ok(true);
    }
    check_ids("workload", &options.workloads, &workload_ids)?;
    check_ids("tool", &options.tools, &tool_ids)?;

    let folder = tempfile::Builder::new().prefix("memleak-bench-").tempdir().context("failed to make a folder")?;
    let memleak = Memleak::new(&options.memleak)?;
    let effort = Effort { rounds: options.rounds as usize, seconds: options.seconds };
    let machine = Machine::here(memleak.version(folder.path())?);
    print!("{}", output::head(&machine, &effort));
    let tools = measure::available(&options.tools, &memleak, folder.path())?;
    if memleak.refuses(&["collector.budget=off"], folder.path())?.is_some() {
        println!("This memleak has no budget setting: it traces everything, also where the table says just `memleak`.");
    }

    let wanted = |id: &str| options.workloads.is_empty() || options.workloads.iter().any(|wanted| wanted == id);
    let mut results = Results {
        machine,
        effort: effort.clone(),
        workloads: Vec::new(),
        jump: None,
        attach: None,
        interrupted: None,
        own_cost: None,
        unwinding: None,
        bars: Vec::new(),
    };
    let mut good = true;
    for workload in workloads.iter().filter(|workload| wanted(workload.id())) {
        let place = folder.path().join(workload.id());
        let tools: Vec<_> =
            tools.iter().filter(|(tool, _)| !options.bars || is_for_bars(workload.id(), tool.id)).cloned().collect();
        let outcome = Bench { memleak: &memleak, tools: &tools, effort: &effort }.measure(&**workload, &place);
        good &= !outcome.has_failed();
        print!("{}", output::block(&outcome));
        results.workloads.push(outcome);
        // After each one: a run that is interrupted leaves what it has.
        write_json(&mut results, &options.json)?;
        // What a tool wrote can be large.
        let _ = fs::remove_dir_all(place);
    }
    let place = folder.path();
    // Each of its rounds takes 40 seconds.
    let few = effort.rounds.div_ceil(2);
    if wanted(JUMP) {
        results.jump = apart(JUMP, jump::measure(&memleak, few, place), output::jump_block, &mut good);
    }
    if wanted(ATTACH) {
        results.attach =
            apart(ATTACH, attach::measure(&memleak, effort.rounds, place), output::attach_block, &mut good);
    }
    if wanted(INTERRUPTED) {
        let measured = interrupted::measure(&memleak, few, place);
        results.interrupted = apart(INTERRUPTED, measured, output::interrupted_block, &mut good);
    }
    if wanted(OWN_COST) {
        // A tenth of a percent of a core can be told apart over three intervals.
        results.own_cost = apart(OWN_COST, own_cost::measure(&memleak, 3, place), output::own_cost_block, &mut good);
    }
    results.bars = bars::bars(&results);
    if !results.bars.is_empty() {
        print!("{}", output::bars_block(&results.bars));
    }
    if wanted(UNWINDING) {
        let measured = unwinding::measure(&memleak, effort.rounds, effort.seconds as f64, place);
        results.unwinding = apart(UNWINDING, measured, output::unwinding_block, &mut good);
    }
    write_json(&mut results, &options.json)?;
    println!("\nload {:.2} at the end; everything as measured: {}", results.machine.load_after, options.json.display());
    Ok(good)
}

fn is_for_bars(workload: &str, tool: &str) -> bool {
    if workload == "loop" { BAR_TOOLS_IN_LOOP.contains(&tool) } else { BAR_TOOLS.contains(&tool) }
}

/// Prints what was measured; `None` when it failed, which is no longer `good`.
fn apart<T>(id: &str, measured: Result<T>, block: fn(&T) -> String, good: &mut bool) -> Option<T> {
    match measured {
        Ok(figures) => {
            print!("{}", block(&figures));
            Some(figures)
        }
        Err(error) => {
            println!("\n{id}: n/a (failed: {error:#})");
            *good = false;
            None
        }
    }
}

fn check_ids(what: &str, wanted: &[String], known: &[&str]) -> Result<()> {
    for id in wanted {
        if !known.contains(&id.as_str()) {
            bail!("unknown {what} `{id}`: there are {}", known.join(", "));
        }
    }
    Ok(())
}

fn write_json(results: &mut Results, path: &std::path::Path) -> Result<()> {
    results.machine.finish();
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("failed to create {}", folder.display()))?;
    }
    let text = serde_json::to_string_pretty(results)?;
    fs::write(path, text + "\n").with_context(|| format!("failed to write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    // A misspelt name must not measure nothing for an hour, or everything.
    #[test]
    fn unknown_ids_are_refused_with_those_that_exist() {
        let error = check_ids("tool", &["valgrnd".to_owned()], &["valgrind", "asan"]).unwrap_err();
        assert_eq!(error.to_string(), "unknown tool `valgrnd`: there are valgrind, asan");
    }

    // The Makefile passes variables on as flags.
    #[test]
    fn options_can_be_parsed() {
        let options = Options::parse_from(["bench", "--rounds", "1", "--seconds=2", "--workloads", "loop,python"]);
        assert_eq!((options.rounds, options.seconds), (1, 2));
        assert_eq!(options.workloads, ["loop", "python"]);
        <Options as clap::CommandFactory>::command().debug_assert();
    }
}
