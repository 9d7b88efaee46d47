//! The command line: flags and subcommands, and what they resolve to.
//!
//! [`Cli`] is what was typed. [`Cli::resolve`] turns it into an [`Invocation`]: a command and checked settings, in
//! which flags have overridden `--set`, and `--set` the file. Nothing is run here.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{ArgAction, Args, Parser, Subcommand, ValueHint};
use clap_complete::Shell;

use crate::config::{self, Override};
use crate::run::{ExitCode, FailOn, Format};
use crate::units;
use crate::{diff, export, import};

mod invocation;
mod output;

pub use invocation::{Command, Invocation};
pub use output::{is_closed_pipe, print, write_completions, write_man};

const ABOUT: &str = "Finds memory leaks in running processes, without changing or restarting them";

const LONG_ABOUT: &str = "\
Finds memory leaks in running processes, without changing or restarting them.

memleak watches the allocator calls of its targets with eBPF, follows what is still outstanding per call stack, and lets \
rules decide what looks like a leak. Findings become alerts (JSON lines), and the run ends with a report (HTML).";

const EXIT_CODES: &str = "\
Exit codes:
  0  clean: no alert was raised
  1  at least one alert was raised
  2  could not run: wrong settings, missing privileges, no such process";

const RUN_EXIT_CODES: &str = "\
Exit codes:
  0  no finding fails the run (--fail-on), whatever the command's own exit code, which the report shows
  1  a finding fails the run
  2  could not run
With --exit-code command, a command that fails passes its own code on (128 and the number of a signal).";

const EXAMPLES: &str = "\
Examples:
  memleak -p 1234 --duration 30s          watch one process for 30 seconds
  memleak --name 'nginx*'                 watch every process of that name, later starters included
  memleak -- ./server --port 8080         launch a command and watch it from the start
  memleak --config prod.toml              watch what a file says
  memleak -p 1234 --json | jq .           one JSON object per snapshot and alert";

/// Heading of the flags that say what to watch.
const TARGETS: &str = "Targets";

const NO_TARGET: &str = "\
no target: say what to watch, for example
  memleak -p 1234                   a process by its id
  memleak --name 'nginx*'           processes by name
  memleak --exe '/opt/shop/bin/*'   processes by executable
  memleak --unit nginx              the processes of a systemd unit
  memleak --container 3f4e9a        the processes of a container
  memleak -- ./server --port 8080   a command to launch
  memleak kernel                    the kernel itself
or with [[target]] in a file given by --config";

/// What was typed.
#[derive(Debug, Parser)]
#[command(
    name = "memleak",
    version,
    about = ABOUT,
    long_about = LONG_ABOUT,
    after_help = EXAMPLES,
    after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"),
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true,
    max_term_width = 100,
)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Subcommands>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    /// Check settings, probe sets, rules and templates without running
    ///
    /// Prints every problem with file, line and column; exit code 0 when there is none, else 2. Needs no privileges.
    Check {
        /// File of settings; without it the defaults and the other flags are checked
        #[arg(value_name = "CONFIG")]
        file: Option<PathBuf>,
        #[command(flatten)]
        settings: SettingsArgs,
    },
    /// Show what this kernel and a target allow, what is missing, and how to fix it
    Doctor {
        /// Process to look at; repeat it or give a comma list
        ///
        /// Without it only the kernel and the privileges are looked at.
        #[arg(short, long, value_name = "PID", value_delimiter = ',', value_parser = pid())]
        pid: Vec<u32>,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        settings: SettingsArgs,
    },
    /// Watch the kernel's own allocations: slab, pages, per-CPU memory, vmalloc
    ///
    /// Everything that the kernel and its modules allocate from now on, by call stack and slab cache. The same rules,
    /// alerts and report as for processes. docs/kernel.md says what can be known and what cannot.
    #[command(after_long_help = EXIT_CODES)]
    Kernel {
        #[command(flatten)]
        kernel: KernelArgs,
        #[command(flatten)]
        watch: WatchArgs,
    },
    /// Run a command to its end and report what it leaves outstanding: for tests and CI
    ///
    /// The command and all processes that it starts are followed from their first instruction, with every call traced
    /// whatever it costs. What is outstanding when a process has ended, after its exit handlers, is reported by call
    /// site, lost or still referenced. docs/ci.md has examples.
    #[command(after_long_help = RUN_EXIT_CODES)]
    Run(LaunchArgs),
    /// Print every allocation and free of a process as a line
    ///
    /// Each line has time, PID, TID, comm, address, size, at a free the lifetime, and the call stack. Lines that a
    /// slow reader makes impossible are dropped and counted.
    Trace {
        /// Process to trace; repeat it or give a comma list
        #[arg(short, long, value_name = "PID", value_delimiter = ',', value_parser = pid(), required = true)]
        pid: Vec<u32>,
        /// Print one JSON object per line
        #[arg(long)]
        json: bool,
        /// How long to trace, such as 5s; until stopped if not given
        #[arg(long, value_name = "TIME")]
        duration: Option<String>,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        settings: SettingsArgs,
    },
    /// Tell leaks from caches: which blocks can a process no longer reach?
    ///
    /// Watches processes for a while, reads their memory from outside while they run, and says for each allocation site
    /// which blocks nothing refers to any more, and what holds on to the others. A collector that runs already scans on
    /// SIGUSR2. Exit codes: 0 nothing is definitely lost, 1 something is, 2 no process could be scanned.
    Scan {
        /// Process to scan; repeat it or give a comma list
        #[arg(short, long, value_name = "PID", value_delimiter = ',', value_parser = pid(), required = true)]
        pid: Vec<u32>,
        /// Print one JSON object per process
        #[arg(long)]
        json: bool,
        /// How long to watch before the scan, such as 2m; 30s if not given
        #[arg(long, value_name = "TIME")]
        duration: Option<String>,
        /// Stop the process for a moment, for its registers and memory that stands still (reachability.stop = "brief")
        #[arg(long)]
        stop: bool,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        settings: SettingsArgs,
    },
    /// Put function names and lines into a report, from debug files
    ///
    /// For a report that was written where there were no symbols: it knows every place in code by build id and address.
    /// Takes an HTML report, lines of `memleak --json`, or alerts. Needs no privileges.
    Symbolize {
        /// Report, or file with lines of JSON
        #[arg(value_name = "REPORT")]
        report: PathBuf,
        /// Folder with debug files; repeatable [default: /usr/lib/debug]
        ///
        /// Files are found by build id: at .build-id/ab/cdef.debug, or anywhere below the folder. Where DEBUGINFOD_URLS names
        /// servers, they are asked for what is in no folder.
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        debug_dir: Vec<PathBuf>,
        /// Where the result is written; in place of the report if not given
        #[arg(short, long, value_name = "OUT", value_hint = ValueHint::FilePath)]
        out: Option<PathBuf>,
    },
    /// Make a recording of a log of bcc's memleak
    ///
    /// Reads what memleak of bcc (python) and of its libbpf-tools print, with and without -a and --combined-only, of
    /// processes and of the kernel. Diff and export work on the recording. Lines that cannot be read are counted and
    /// shown; they end nothing.
    Import(import::Args),
    /// Write a snapshot of a recording in the format of another tool
    Export(export::Args),
    /// Show what has changed between two recordings, or two times of one
    ///
    /// Sites are matched by build id and offset, and across builds by the functions in their stacks. Exit code 1 when
    /// there is a new or a grown site, see --fail-on.
    Diff(diff::Args),
    /// List, test and make rules
    Rules {
        #[command(subcommand)]
        command: RulesCommand,
    },
    /// Write the report of a recorded run
    ///
    /// The same page as at the end of the run itself. Needs no privileges and not the processes that were watched.
    Report {
        /// The recording
        #[arg(value_name = "REC", value_hint = ValueHint::FilePath)]
        recording: PathBuf,
        /// Where the page is written
        #[arg(short, long, value_name = "OUT.html", default_value = "memleak-report.html", value_hint = ValueHint::FilePath)]
        output: PathBuf,
        #[command(flatten)]
        part: PartArgs,
        #[command(flatten)]
        settings: SettingsArgs,
    },
    /// Run rules over a recorded run
    ///
    /// Prints what they find, and when. Settings are those of the run; --set and --rules override them. Exit code 1 when
    /// an alert would have been raised; with a comparison, when the two replays differ.
    Replay(ReplayArgs),
    /// Print a completion script for a shell
    Completions {
        /// Shell to complete for
        shell: Shell,
    },
    /// Print the manual page, in the form that man(1) reads
    Man {
        /// Subcommand whose page is printed; without it that of memleak itself
        subcommand: Option<String>,
    },
}

/// Where settings come from.
#[derive(Debug, Default, Args)]
struct ConfigArgs {
    /// File of settings (TOML)
    ///
    /// Every key has a default; flags override the file. config.example.toml shows every key. `memleak check FILE`
    /// checks a file.
    #[arg(long = "config", value_name = "FILE")]
    file: Option<PathBuf>,
}

/// Settings that every command takes.
#[derive(Debug, Default, Args)]
struct SettingsArgs {
    /// Override a setting, such as alerts.hold=10s; repeatable
    ///
    /// Any key of the file can be set. The value is read as TOML, or else as a string. The last one wins.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = Override::parse_set)]
    sets: Vec<Override>,
    /// Folder with rules (*.lua) that are added to the built-in ones or replace them
    ///
    /// A file of the same name wins. The folder is watched while running: changed rules are taken in.
    #[arg(long, value_name = "DIR", value_parser = path(), value_hint = ValueHint::DirPath)]
    rules: Option<PathBuf>,
    /// Folder with probe sets (*.toml) that are added to the built-in ones or replace them
    #[arg(long, value_name = "DIR", value_parser = path(), value_hint = ValueHint::DirPath)]
    plugins: Option<PathBuf>,
    /// Folder with templates (*.tera) that replace the built-in ones of the same name
    #[arg(long, value_name = "DIR", value_parser = path(), value_hint = ValueHint::DirPath)]
    templates: Option<PathBuf>,
    /// File of suppressions: findings about known code are silenced
    ///
    /// One per line, as LeakSanitizer has them (leak:PATTERN), or function:, module:, file: or stack: PATTERN.
    #[arg(long, value_name = "FILE", value_parser = path(), value_hint = ValueHint::FilePath)]
    suppressions: Option<PathBuf>,
    /// Log more on standard error; -vv logs everything
    #[arg(short, long, action = ArgAction::Count)]
    verbose: u8,
}

/// What `memleak replay` takes.
#[derive(Debug, Args)]
struct ReplayArgs {
    /// The recording
    #[arg(value_name = "REC", value_hint = ValueHint::FilePath)]
    recording: PathBuf,
    /// Replay again with the rules of this folder, and show which findings appear, vanish or move in time
    #[arg(long, value_name = "DIR2", value_hint = ValueHint::DirPath)]
    compare: Option<PathBuf>,
    /// Replay again with another setting, such as rules.growth.min_bytes=1MiB, and compare; repeatable
    #[arg(long, value_name = "KEY=VALUE", value_parser = Override::parse_set)]
    compare_set: Vec<Override>,
    /// File that says which sites leak: prints precision and recall of every rule
    ///
    /// A line is "leak PATTERN" or "quiet PATTERN", with patterns as in a file of suppressions; the first that fits a
    /// site counts. Findings below alerts.min_severity do not count.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    labels: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// Part of a recording.
#[derive(Debug, Default, Args)]
struct PartArgs {
    /// From this time after the start of the run on, such as 10m
    #[arg(long, value_name = "TIME", value_parser = duration())]
    since: Option<f64>,
    /// Up to this time after the start of the run, such as 1h30m
    #[arg(long, value_name = "TIME", value_parser = duration())]
    until: Option<f64>,
    /// Only these processes; repeat it or give a comma list
    #[arg(short, long, value_name = "PID", value_delimiter = ',', value_parser = pid())]
    pid: Vec<u32>,
    /// Only sites of this probe set, such as glibc; repeatable
    #[arg(long, value_name = "NAME")]
    probe_set: Vec<String>,
}

/// What to watch.
#[derive(Debug, Default, Args)]
struct TargetArgs {
    /// Process to watch; repeat it or give a comma list
    #[arg(short, long, help_heading = TARGETS, value_name = "PID", value_delimiter = ',', value_parser = pid())]
    pid: Vec<u32>,
    /// Watch processes whose name matches, also those that start later
    ///
    /// Glob over the kernel's short name (15 bytes) or the file name of the executable. Quote it, so that the shell
    /// leaves it alone. --name, --exe, --cgroup, --container and --unit narrow each
    /// other.
    #[arg(long, help_heading = TARGETS, value_name = "GLOB", value_parser = config::parse_glob)]
    name: Option<String>,
    /// Watch processes whose executable's path matches, also those that start later
    #[arg(long, help_heading = TARGETS, value_name = "GLOB", value_parser = config::parse_glob)]
    exe: Option<String>,
    /// Watch the processes of a cgroup and of those below it
    ///
    /// Path below /sys/fs/cgroup, such as system.slice/nginx.service: a systemd unit or a container.
    #[arg(long, help_heading = TARGETS, value_name = "PATH", value_parser = config::parse_cgroup)]
    cgroup: Option<String>,
    /// Watch the processes of a container, by its id
    ///
    /// The id, at least 4 characters of its beginning, or a glob. Docker, containerd, CRI-O, Podman, LXC.
    #[arg(long, help_heading = TARGETS, value_name = "ID", value_parser = config::parse_container)]
    container: Option<String>,
    /// Watch the processes of a systemd unit, such as nginx.service
    ///
    /// Glob; `.service` may be left out.
    #[arg(long, help_heading = TARGETS, value_name = "GLOB", value_parser = config::parse_glob)]
    unit: Option<String>,
    /// Launch a command and watch it from its first instruction
    ///
    /// The string is split like a shell does (quotes, backslashes), but no shell is started: no variables, globs or
    /// pipes. The form `memleak [OPTIONS] -- CMD ARGS...` needs no quoting.
    #[arg(short, long, help_heading = TARGETS, value_name = "CMD")]
    command: Option<CommandLine>,
    /// Command to launch and watch, after `--`
    #[arg(last = true, help_heading = TARGETS, value_name = "CMD", conflicts_with = "command")]
    trailing: Vec<String>,
}

/// What `memleak` without a subcommand takes.
#[derive(Debug, Default, Args)]
struct RunArgs {
    #[command(flatten)]
    targets: TargetArgs,
    #[command(flatten)]
    watch: WatchArgs,
}

/// What part of the kernel is watched, and how.
#[derive(Debug, Default, Args)]
struct KernelArgs {
    /// Probe sets that run, such as kernel-slab; repeat it or give a comma list
    ///
    /// kernel-slab, kernel-percpu, kernel-vmalloc and kernel-pages; without it, those that the settings leave on.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    probe_set: Vec<String>,
    /// How to attach: auto, tracepoint, fentry or kprobe
    #[arg(long, value_name = "HOW")]
    backend: Option<String>,
    /// Only sites of slab caches that match; repeatable
    #[arg(long, value_name = "GLOB", value_parser = config::parse_glob)]
    cache: Vec<String>,
    /// Only sites with code of a kernel module that matches; repeatable
    #[arg(long, value_name = "GLOB", value_parser = config::parse_glob)]
    module: Vec<String>,
    /// Only allocations with this flag, such as __GFP_ACCOUNT; repeatable: with all of them
    #[arg(long, value_name = "FLAG")]
    gfp: Vec<String>,
    /// Only allocations by this process; repeat it or give a comma list
    #[arg(short, long, value_name = "PID", value_delimiter = ',', value_parser = pid())]
    pid: Vec<u32>,
    /// Only allocations in a cgroup and in those below it
    #[arg(long, value_name = "PATH", value_parser = config::parse_cgroup)]
    cgroup: Option<String>,
    /// Print every allocation and free as a line, whatever it costs
    ///
    /// Each line has time, PID, TID, comm, address, size, at a free the lifetime, slab cache, flags, and the call stack of
    /// the allocation. Nothing else is done with them: no rules, no report.
    #[arg(long)]
    trace: bool,
}

/// How to watch, whatever is watched.
#[derive(Debug, Default, Args)]
struct WatchArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Time between snapshots [default: 1s]
    ///
    /// Units are ms, s, m, h, d. Rules look at snapshots: a shorter interval finds leaks sooner and costs more of
    /// memleak's own CPU time.
    #[arg(long, value_name = "TIME")]
    interval: Option<String>,
    /// How long to run, such as 30s or 1m30s
    ///
    /// Without it: until stopped, or until the last target has ended.
    #[arg(long, value_name = "TIME")]
    duration: Option<String>,
    /// Where the HTML report is written [default: memleak-report.html]
    ///
    /// Written at the end of the run and on SIGUSR1.
    #[arg(long, value_name = "OUT.html", value_parser = path(), value_hint = ValueHint::FilePath)]
    report: Option<PathBuf>,
    /// File that alerts are appended to as JSON lines [default: memleak-alerts.ndjson]
    #[arg(long, value_name = "OUT.ndjson", value_parser = path(), value_hint = ValueHint::FilePath)]
    alerts: Option<PathBuf>,
    /// File that the run is recorded to, for `memleak report` and `memleak replay`; it must not exist
    #[arg(long, value_name = "FILE.memleak", value_parser = path(), value_hint = ValueHint::FilePath)]
    record: Option<PathBuf>,
    #[command(flatten)]
    settings: SettingsArgs,
    /// No live view; errors are still printed
    #[arg(short, long)]
    quiet: bool,
    /// Print one JSON object per snapshot and alert on standard output, in place of the live view
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum RulesCommand {
    /// Show every rule with its parameters, their values and units
    List {
        /// Print one JSON object per rule
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        settings: SettingsArgs,
    },
    /// Run the examples that rules bring along; exit code 1 when a rule says something else than they expect
    Test {
        /// Name of a rule, or a folder with rules; without it all rules are tested
        #[arg(value_name = "RULE|DIR")]
        what: Option<String>,
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        settings: SettingsArgs,
    },
    /// Write the file of a new rule, with examples, to start from
    New {
        /// Name of the rule
        name: String,
        /// Folder for it
        #[arg(long, value_name = "DIR", default_value = "rules", value_hint = ValueHint::DirPath)]
        dir: PathBuf,
    },
}

/// What is to be done about rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RulesTask {
    /// Show them, as JSON lines or as text.
    List {
        /// As JSON lines.
        json: bool,
    },
    /// Run the examples of a rule, of a folder, or all.
    Test(Option<String>),
    /// Write a new one into a folder.
    New {
        /// Its name.
        name: String,
        /// The folder.
        dir: PathBuf,
    },
}

/// What `memleak run` takes.
#[derive(Debug, Args)]
struct LaunchArgs {
    /// What makes the run fail: info, warning, critical, the name of a rule, or never; repeatable or a comma list
    #[arg(long, value_name = "WHAT", value_delimiter = ',', default_value = "warning")]
    fail_on: Vec<FailOn>,
    /// Format of the report
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Where the report is written, "-" for standard output; without it to standard error
    ///
    /// The command's own output is left alone. Beside a report in a file the text still goes to standard error.
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    output: Option<PathBuf>,
    /// Judge only processes whose name or executable matches this glob; repeatable
    ///
    /// Other processes, such as the shell around a test, are followed too, but what they leave is not reported.
    #[arg(long, value_name = "GLOB", value_parser = config::parse_glob)]
    only: Vec<String>,
    /// How long to wait for processes that outlive the command
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::parse_duration)]
    wait: Duration,
    /// Whose exit code to end with
    #[arg(long, value_enum, default_value_t)]
    exit_code: ExitCode,
    /// What tracing may cost, such as 5%; without it every call is traced whatever it costs
    ///
    /// With a budget a busy process is watched through windows: what it leaves is an estimate and never fails the run.
    #[arg(long, value_name = "SHARE")]
    budget: Option<String>,
    /// End the command (SIGTERM) after this time, such as 5m
    #[arg(long, value_name = "TIME")]
    duration: Option<String>,
    /// No text on standard error beside a report in a file
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    settings: SettingsArgs,
    /// Command to run, after `--`
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

/// A command line split into words.
#[derive(Clone, Debug)]
struct CommandLine(Vec<String>);

impl FromStr for CommandLine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        config::split_command(text).map(CommandLine)
    }
}

fn pid() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=config::MAX_PID)
}

/// A time in seconds.
fn duration() -> impl TypedValueParser<Value = f64> {
    clap::builder::StringValueParser::new().try_map(|text| units::parse_duration(&text).map(|d| d.as_secs_f64()))
}

/// A path that may be empty, which clap's own parser refuses.
fn path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

#[cfg(test)]
mod tests;
