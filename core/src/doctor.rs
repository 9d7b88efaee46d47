//! `memleak doctor`: what this kernel and a process allow, and what is missing.

use std::fmt::Write;
use std::time::Duration;

use memleak_probes::{Features, Tracker};

use crate::collector::{Collector, PluginState, Purpose};
use crate::config::{Config, TargetSpec};
use crate::output::filters::{format_count, format_percent};
use crate::output::text::visible;
use crate::process::ProcDir;
use crate::reachability::plan;
use crate::snapshot::ProcessSample;
use crate::units::format_bytes;
use crate::unwind::TableState;
use crate::{Error, Result};

/// Widest column of file names.
const MAX_COLUMN: usize = 60;
/// How long a process is counted to predict the overhead.
const COUNT: Duration = Duration::from_secs(1);

/// The text; the flag is false when memleak could not run here, or not on one of the processes.
pub fn run(config: &Config, pids: &[u32]) -> (String, bool) {
    let mut out = String::new();
    let _ = writeln!(out, "memleak {} on Linux {}", env!("CARGO_PKG_VERSION"), kernel_release());
    match Features::detect() {
        Err(e) => {
            let _ = writeln!(out, "  cannot run: {e}");
            return (out, false);
        }
        Ok(features) => {
            let mut best = true;
            for (backend, result) in features.results() {
                let _ = match result {
                    Ok(()) => {
                        let mark = if std::mem::take(&mut best) { "  <- used" } else { "" };
                        writeln!(out, "  uprobes by {backend:10} works{mark}")
                    }
                    Err(reason) => writeln!(out, "  uprobes by {backend:10} no: {reason}"),
                };
            }
        }
    }
    kernel(&mut out, config);
    let mut good = true;
    if pids.is_empty() {
        good &= section(&mut out, measure_cost(config));
    }
    for pid in pids {
        good &= section(&mut out, look_at(config, *pid));
    }
    (out, good)
}

fn section(out: &mut String, result: Result<String>) -> bool {
    let good = result.is_ok();
    out.push_str(&result.unwrap_or_else(|e| format!("  failed: {e:#}\n")));
    good
}

/// What of the kernel's own allocations can be followed here.
fn kernel(out: &mut String, config: &Config) {
    let mut config = Config { targets: Vec::new(), ..config.clone() };
    config.kernel.enabled = true;
    // Nothing is kept of what it sees.
    (config.kernel.max_outstanding, config.kernel.max_sites) = (1024, 1024);
    let collector = match Collector::start(&config, Purpose::Watch) {
        Ok(collector) => collector,
        Err(e) => {
            let _ = writeln!(out, "  kernel memory: cannot be watched: {}", visible(&format!("{e:#}")));
            return;
        }
    };
    for status in collector.kernel_statuses() {
        let _ = match &status.state {
            PluginState::Attached { file, functions } => {
                writeln!(out, "  {}: works in {file} ({} probes)", status.probe_set, functions.len())
            }
            PluginState::Failed { reason, .. } => writeln!(out, "  {}: no: {}", status.probe_set, visible(reason)),
            PluginState::NotMapped => Ok(()),
        };
    }
    for gap in collector.kernel_gaps() {
        let _ = writeln!(out, "  {}", visible(&gap));
    }
}

/// Loads everything without a process.
fn measure_cost(config: &Config) -> Result<String> {
    let config = Config { targets: Vec::new(), ..config.clone() };
    let collector = Collector::start(&config, Purpose::Watch)?;
    Ok(cost_line(&collector))
}

fn cost_line(collector: &Collector) -> String {
    let prices = collector.prices();
    format!(
        "  one hit of a well-placed probe costs {:.0} ns here, {:.1} us more where the kernel single-steps, {:.1} us more \
         between other work, {:.1} us more after a pause; a traced malloc and free are three hits\n",
        prices.hit_ns,
        prices.stepped_ns / 1e3,
        prices.cool_ns / 1e3,
        prices.cold_ns / 1e3
    )
}

/// Attaches to one process, counts for a moment, and detaches.
fn look_at(config: &Config, pid: u32) -> Result<String> {
    let target = TargetSpec { pid: vec![pid], ..TargetSpec::default() };
    let mut config = Config { targets: vec![target], ..config.clone() };
    // What tracing everything costs is the question.
    config.collector.budget.share = None;
    let mut collector = Collector::start(&config, Purpose::Watch)?;
    let mut out = cost_line(&collector);
    for (process, statuses) in collector.statuses() {
        let _ = writeln!(out, "process {} {} ({})", process.pid, visible(&process.comm), visible(&process.exe));
        for status in statuses {
            let _ = match &status.state {
                PluginState::NotMapped => {
                    writeln!(out, "  {}: nothing that it has mapped provides it", status.probe_set)
                }
                PluginState::Failed { file, reason } => {
                    writeln!(out, "  {}: failed in {}: {}", status.probe_set, visible(file), visible(reason))
                }
                PluginState::Attached { file, functions } => {
                    let _ = writeln!(out, "  {}: attached to {}", status.probe_set, visible(file));
                    for function in functions {
                        let _ = match &function.placement {
                            Err(why) => writeln!(out, "    {:18} -  {why}", function.symbol),
                            Ok(p) if p.emulated => writeln!(out, "    {:18} +{} emulated", function.symbol, p.offset),
                            Ok(p) => writeln!(
                                out,
                                "    {:18} +{} single-stepped{}: a hit costs {:.1} us more",
                                function.symbol,
                                p.offset,
                                p.reason.map(|why| format!(" ({why})")).unwrap_or_default(),
                                collector.prices().stepped_ns / 1e3
                            ),
                        };
                    }
                    Ok(())
                }
            };
        }
    }
    let _ = writeln!(
        out,
        "  children that it forks inherit the breakpoints; those that are no targets are released within a second"
    );
    collector.require_attached()?;
    let first = collector.snapshot()?;
    let mut waited = collector.now_s();
    while collector.now_s() - first.time_s < COUNT.as_secs_f64() && !collector.is_finished() {
        collector.poll(Duration::from_millis(50))?;
    }
    let second = collector.snapshot()?;
    waited = collector.now_s() - waited;
    let (Some(a), Some(b)) = (first.processes.first(), second.processes.first()) else {
        return Err(Error::new(crate::ErrorKind::Target, format!("process {pid} has ended")));
    };
    let rate = (b.hits - a.hits) as f64 / waited;
    let cost = (b.overhead_s - a.overhead_s) / waited;
    let cpu = b.cpu_s.zip(a.cpu_s).map_or(0.0, |(b, a)| (b - a) / waited);
    let _ = writeln!(
        out,
        "  {rate:.0} hits/s: tracing everything costs about {:.1} % of one core (estimate); the process uses {:.0} % of one",
        cost * 100.0,
        cpu * 100.0
    );
    stacks(&mut out, &collector, b);
    symbols(&mut out, &collector.symbol_sources(b.process.instance));
    scans(&mut out, &config, pid);
    Ok(out)
}

/// Where the names of each file's functions come from.
fn symbols(out: &mut String, sources: &[(String, String)]) {
    if sources.is_empty() {
        return;
    }
    let _ = writeln!(out, "  names of functions come from");
    let width = sources.iter().map(|(file, _)| visible(file).chars().count()).max().unwrap_or(0).min(MAX_COLUMN);
    for (file, source) in sources {
        let _ = writeln!(out, "    {:width$}  {}", visible(file), visible(source));
    }
}

/// Whether the process's memory can be scanned, and what that would take.
fn scans(out: &mut String, config: &Config, pid: u32) {
    let settings = &config.reachability;
    let plan = ProcDir::open(pid).and_then(|dir| plan::plan(&dir, &settings.options(true)));
    let _ = match plan {
        Err(e) => writeln!(out, "  no verdict on leak or cache: {e:#}"),
        Ok(plan) => {
            let _ = writeln!(
                out,
                "  can be scanned for leaks: {} scans of {}, {:.1} s of CPU time ({} a second), about {:.1} s at {} of a core",
                plan.scans,
                format_bytes(plan.bytes),
                plan.cpu_s,
                format_bytes(plan.bytes_per_s as u64),
                plan.about_s,
                format_percent(settings.core_share)
            );
            if plan.device_bytes > 0 {
                let bytes = format_bytes(plan.device_bytes);
                let _ = writeln!(out, "    {bytes} of devices are not read: nothing will be called definitely lost");
            }
            match plan.no_stop {
                Some(why) => writeln!(out, "    it could not be stopped for its registers (reachability.stop): {why}"),
                None => Ok(()),
            }
        }
    };
}

/// How far call stacks reach, and which files keep them from reaching further.
fn stacks(out: &mut String, collector: &Collector, process: &ProcessSample) {
    let counts = process.stacks;
    let _ = match counts.complete_share() {
        Some(share) => writeln!(
            out,
            "  {} of {} recorded allocations have a complete call stack",
            format_percent(share),
            format_count(counts.taken as f64)
        ),
        None if counts.by_tables => writeln!(out, "  no allocation was recorded: call stacks were not tried"),
        None => writeln!(out, "  call stacks are walked by frame pointers: whether they are complete is not known"),
    };
    let (tables, left_out) = collector.unwind_tables(process.process.instance);
    let (mut ready, mut rows) = (0, 0);
    for (file, state) in &tables {
        match state {
            TableState::Ready(n) => (ready, rows) = (ready + 1, rows + n),
            TableState::Pending => drop(writeln!(out, "    {}: its unwind table is not ready yet", visible(file))),
            TableState::Refused(why) => drop(writeln!(out, "    {}: no unwind table: {}", visible(file), visible(why))),
        }
    }
    if ready > 0 {
        let memory = format_bytes(collector.tracker().map_or(0, Tracker::unwind_bytes));
        let _ = writeln!(out, "    unwind tables of {ready} files, {rows} rows, {memory} of kernel memory");
    }
    let _ = match collector.python(process.process.instance) {
        Some(Ok(version)) => writeln!(out, "    Python {version}: its functions are shown in call stacks"),
        Some(Err(why)) => writeln!(out, "    Python: its functions are not shown in call stacks: {}", visible(why)),
        None => Ok(()),
    };
    if left_out > 0 {
        let _ = writeln!(out, "    {left_out} pieces of code had no room: their frames are walked by frame pointers");
    }
}

/// Release of the running kernel.
pub fn kernel_release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(|_| "?".into(), |s| s.trim().to_owned())
}
