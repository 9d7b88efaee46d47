//! `make bench`: what memleak and other tools cost real programs, measured side by side.
//!
//! A workload (`workloads/`) is a program with a load on it, a tool (`tools.rs`) is what it runs under. Phases without
//! and with a tool take turns (`measure.rs`); cost is read from outside, from the kernel's clocks (`clock.rs`). A
//! table goes to standard output, everything as measured to a JSON file. docs/benchmarks.md says how to read it.

mod clock;
mod machine;
mod measure;
mod memleak;
mod output;
mod own_cost;
mod process;
mod tools;
mod unwinding;
mod workloads;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde::Serialize;

use machine::Machine;
use measure::{Bench, Effort, Outcome};
use memleak::Memleak;
use own_cost::OwnCost;
use unwinding::Unwinding;

/// The id of memleak's own cost among the workloads.
const OWN_COST: &str = "own-cost";
/// The id of the cost of call stacks among them.
const UNWINDING: &str = "unwinding";

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
    /// `None` when it was not asked for, or failed.
    own_cost: Option<OwnCost>,
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
    let workload_ids: Vec<_> = workloads.iter().map(|workload| workload.id()).chain([OWN_COST, UNWINDING]).collect();
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
    let mut results =
        Results { machine, effort: effort.clone(), workloads: Vec::new(), own_cost: None, unwinding: None };
    let bench = Bench { memleak: &memleak, tools: &tools, effort: &effort };
    let mut good = true;
    for workload in workloads.iter().filter(|workload| wanted(workload.id())) {
        let place = folder.path().join(workload.id());
        let outcome = bench.measure(&**workload, &place);
        good &= !outcome.has_failed();
        print!("{}", output::block(&outcome));
        results.workloads.push(outcome);
        // After each one: a run that is interrupted leaves what it has.
        write_json(&mut results, &options.json)?;
        // What a tool wrote can be large.
        let _ = fs::remove_dir_all(place);
    }
    if wanted(OWN_COST) {
        // A tenth of a percent of a core can be told apart over three intervals.
        match own_cost::measure(&memleak, 3, folder.path()) {
            Ok(own_cost) => {
                print!("{}", output::own_cost_block(&own_cost));
                results.own_cost = Some(own_cost);
            }
            Err(error) => {
                println!("\n{OWN_COST}: n/a (failed: {error:#})");
                good = false;
            }
        }
    }
    if wanted(UNWINDING) {
        match unwinding::measure(&memleak, effort.rounds, effort.seconds as f64, folder.path()) {
            Ok(unwinding) => {
                print!("{}", output::unwinding_block(&unwinding));
                results.unwinding = Some(unwinding);
            }
            Err(error) => {
                println!("\n{UNWINDING}: n/a (failed: {error:#})");
                good = false;
            }
        }
    }
    write_json(&mut results, &options.json)?;
    println!("\nload {:.2} at the end; everything as measured: {}", results.machine.load_after, options.json.display());
    Ok(good)
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
