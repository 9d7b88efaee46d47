//! The `memleak` program: parse, run, exit code.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use memleak_core::check;
use memleak_core::cli::{self, Cli, Command, Invocation, RulesTask};
use memleak_core::config::Config;
use memleak_core::engine::{self, Output};
use memleak_core::rules::kit;
use memleak_core::stop::Stop;
use memleak_core::symbolize::debuginfod;
use memleak_core::symbolize::offline::DebugFolders;
use memleak_core::symbolize::worker;
use memleak_core::{Result, diff, doctor, export, import, recorded, resymbolize, run, scan, trace};

/// Nothing found.
const CLEAN: u8 = 0;
/// At least one alert was raised.
const FINDINGS: u8 = 1;
/// It could not run.
const FAILED: u8 = 2;

fn main() -> ExitCode {
    if worker::is_worker() {
        worker::serve();
        return ExitCode::SUCCESS;
    }
    let result = Cli::parse().resolve().and_then(invoke);
    ExitCode::from(result.unwrap_or_else(|e| {
        if cli::is_closed_pipe(&e) {
            return CLEAN;
        }
        // Nothing is left to do when standard error is closed too.
        let _ = writeln!(io::stderr(), "memleak: {e:#}");
        FAILED
    }))
}

fn invoke(invocation: Invocation) -> Result<u8> {
    let Invocation { command, config, verbosity } = invocation;
    engine::start_log(verbosity);
    match command {
        Command::Run { quiet, json } => {
            let raised = engine::run(&config, Output { quiet, json }, &Stop::listen()?)?;
            Ok(if raised { FINDINGS } else { CLEAN })
        }
        Command::Launch(options) => {
            let report = run::run(&config, &options, &Stop::listen()?)?;
            Ok(report.exit_code(options.exit_code))
        }
        Command::Rules(task) => rules(&task, &config),
        Command::Check => {
            let problems = check::check(&config);
            for problem in &problems {
                eprintln!("memleak: {problem:#}");
            }
            Ok(if problems.is_empty() { CLEAN } else { FAILED })
        }
        Command::Doctor { pids } => {
            let (text, good) = doctor::run(&config, &pids);
            cli::print(&text)?;
            Ok(if good { CLEAN } else { FAILED })
        }
        Command::Trace { json } => trace::run(&config, json, &Stop::listen()?).map(|()| CLEAN),
        Command::Scan { json } => {
            let lost = scan::run(&config, json, &Stop::listen()?)?;
            Ok(if lost { FINDINGS } else { CLEAN })
        }
        Command::Symbolize { report, debug_dirs, out } => {
            let servers = debuginfod::Settings::from_environment();
            let mut folders = DebugFolders::new(debug_dirs, servers.as_ref(), worker::OWN_PROGRAM.as_ref())?;
            let summary = resymbolize::symbolize(&report, &mut folders, &out)?;
            cli::print(&summary.to_string()).map(|()| CLEAN)
        }
        Command::Import(args) => {
            let summary = import::run(&args)?;
            eprint!("{summary}");
            Ok(CLEAN)
        }
        Command::Export(args) => export::run(&args).map(|()| CLEAN),
        Command::Diff(args) => Ok(if diff::run(&args)? { FINDINGS } else { CLEAN }),
        Command::Report { recording, output, filter, overrides } => {
            recorded::report(&recording, &output, &filter, &overrides, config.templates_dir.as_deref())?;
            Ok(CLEAN)
        }
        Command::Replay(options) => Ok(if recorded::replay(&options)? { FINDINGS } else { CLEAN }),
        Command::Completions(shell) => cli::write_completions(shell, &mut io::stdout()).map(|()| CLEAN),
        Command::Man(subcommand) => cli::write_man(subcommand.as_deref(), &mut io::stdout()).map(|()| CLEAN),
    }
}

fn rules(task: &RulesTask, config: &Config) -> Result<u8> {
    match task {
        RulesTask::List { json } => cli::print(&kit::list(&config.rules, *json)?).map(|()| CLEAN),
        RulesTask::Test(what) => {
            let (text, good) = kit::test(&config.rules, what.as_deref())?;
            cli::print(&text)?;
            Ok(if good { CLEAN } else { FINDINGS })
        }
        RulesTask::New { name, dir } => {
            let path = kit::create(name, dir)?;
            cli::print(&format!("wrote {}; try it: memleak rules test {}\n", path.display(), dir.display()))?;
            Ok(CLEAN)
        }
    }
}
