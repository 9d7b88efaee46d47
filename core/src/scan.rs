//! `memleak scan`: watches processes for a while, scans their memory once, and says which of the blocks they can no longer
//! reach.
//!
//! What was allocated before the attach is not known and counts as a root, so there is something to say only about what is
//! allocated while it watches. A collector that runs already scans at once on SIGUSR2.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use crate::collector::{Collector, Notice, Purpose};
use crate::config::Config;
use crate::live::{notice_line, scan_line, stack_head};
use crate::output::alerts::json_line;
use crate::output::reach::ReachView;
use crate::output::text::visible;
use crate::reachability::Verdict;
use crate::reachability::scanner::Cost;
use crate::snapshot::{Mode, ProcessSample, SiteSample, Snapshot};
use crate::stop::Stop;
use crate::symbolize::Frame;
use crate::units::{format_bytes, format_duration_s};
use crate::{Error, ErrorKind, Result, cli};

/// How long processes are watched unless `--duration` says otherwise.
pub const WATCHED: Duration = Duration::from_secs(30);
/// Longest time between looks at signals and processes.
const TICK: Duration = Duration::from_millis(100);

/// A line of `scan --json`, documented in `docs/json.md`.
#[derive(Serialize)]
struct ScanLine<'a> {
    r#type: &'static str,
    pid: u32,
    comm: &'a str,
    exe: &'a str,
    mode: Mode,
    watched_s: f64,
    cost: &'a Cost,
    sites: Vec<SiteLine<'a>>,
}

#[derive(Serialize)]
struct SiteLine<'a> {
    id: String,
    probe_set: &'a str,
    function: &'a str,
    outstanding_bytes: u64,
    outstanding_count: u64,
    frames: &'a [Frame],
    reachability: ReachView,
}

/// Watches and scans the targets of `config`; true when a site is definitely lost.
///
/// # Errors
/// As [`Collector::start`], none of the processes could be scanned, or standard output cannot be written.
pub fn run(config: &Config, json: bool, stop: &Stop) -> Result<bool> {
    let mut collector = Collector::start(config, Purpose::Watch)?;
    collector.require_attached()?;
    let mut scanned: Vec<(u32, Cost)> = Vec::new();
    let mut failed: Vec<String> = Vec::new();
    let watched = config.duration.unwrap_or(WATCHED).as_secs_f64();
    let end_s = collector.now_s() + watched;
    let mut next_s = collector.now_s();
    let mut asked = false;
    let snapshot = loop {
        collector.poll(TICK)?;
        let over = stop.is_requested() || collector.is_finished();
        if over || collector.now_s() >= next_s || (asked && !collector.is_scanning()) {
            collector.scan()?;
            let snapshot = collector.snapshot()?;
            next_s = collector.now_s() + config.interval.as_secs_f64();
            for notice in collector.take_notices() {
                match &notice {
                    Notice::Scanned { process, cost } => scanned.push((process.instance, cost.clone())),
                    Notice::NotScanned { reason, .. } => failed.push(reason.clone()),
                    _ => {}
                }
                if !matches!(notice, Notice::Scanned { .. }) {
                    eprintln!("{}", notice_line(&notice));
                }
            }
            if over || (asked && !collector.is_scanning()) {
                break snapshot;
            }
        }
        if !asked && collector.now_s() >= end_s {
            collector.scan_all()?;
            asked = true;
        }
    };
    if scanned.is_empty() {
        let why = if failed.is_empty() {
            "the processes have ended, or the scan was stopped".to_owned()
        } else {
            failed.join("; ")
        };
        return Err(Error::new(ErrorKind::Target, format!("no process was scanned: {why}")));
    }
    let mut definite = false;
    for process in &snapshot.processes {
        let Some((_, cost)) = scanned.iter().find(|(instance, _)| *instance == process.process.instance) else {
            continue;
        };
        let sites = sites_of(&snapshot, process);
        sites.iter().for_each(|s| collector.symbolize(&s.site));
        definite |= sites.iter().any(|s| verdict(s) == Verdict::Definite);
        if json {
            cli::print(&format!("{}\n", json_line(&line(process, watched, cost, &sites))?))?;
        } else {
            cli::print(&text(process, watched, cost, &sites, config.live.sites))?;
        }
    }
    Ok(definite)
}

fn verdict(sample: &SiteSample) -> Verdict {
    sample.reachability.as_ref().map(|r| r.verdict).unwrap_or_default()
}

/// Sites with a verdict: lost ones first, then by bytes.
fn sites_of<'a>(snapshot: &'a Snapshot, process: &ProcessSample) -> Vec<&'a SiteSample> {
    let theirs = |s: &&SiteSample| s.site.key.instance == process.process.instance && s.reachability.is_some();
    let mut sites: Vec<&SiteSample> = snapshot.sites.iter().filter(theirs).collect();
    let order = |v: Verdict| match v {
        Verdict::Definite => 0,
        Verdict::Possible => 1,
        Verdict::Unknown => 2,
        Verdict::Reachable => 3,
    };
    let lost = |s: &SiteSample| s.reachability.as_ref().map_or(0, |r| r.counts.lost_bytes());
    sites.sort_by_key(|s| {
        let bytes = std::cmp::Reverse((lost(s), s.totals.outstanding_bytes()));
        (order(verdict(s)), bytes, s.site.key)
    });
    sites
}

fn line<'a>(process: &'a ProcessSample, watched_s: f64, cost: &'a Cost, sites: &[&'a SiteSample]) -> ScanLine<'a> {
    let site = |s: &&'a SiteSample| {
        Some(SiteLine {
            id: format!("{:016x}", s.site.id),
            probe_set: &s.site.probe_set,
            function: &s.site.function,
            outstanding_bytes: s.totals.outstanding_bytes(),
            outstanding_count: s.totals.outstanding_count(),
            frames: s.site.frames(),
            reachability: ReachView::from(&**s.reachability.as_ref()?),
        })
    };
    ScanLine {
        r#type: "scan",
        pid: process.process.pid,
        comm: &process.process.comm,
        exe: &process.process.exe,
        mode: process.mode,
        watched_s,
        cost,
        sites: sites.iter().filter_map(site).collect(),
    }
}

/// For people: what is lost in full, of what is reachable the first `most` sites.
fn text(process: &ProcessSample, watched_s: f64, cost: &Cost, sites: &[&SiteSample], most: usize) -> String {
    let mut out = String::new();
    let p = &process.process;
    let how = match process.mode {
        Mode::Exact => "every call was traced",
        Mode::Sampled => "allocations were sampled",
        Mode::Estimated => "it was watched through windows",
    };
    let watched = format_duration_s(watched_s);
    let _ = writeln!(out, "process {} {}: watched for {watched}, {how}", p.pid, visible(&p.comm));
    let _ = writeln!(out, "  {}", scan_line(cost));
    let shown = |s: &&&SiteSample| verdict(s) != Verdict::Reachable;
    let lost = sites.iter().filter(shown);
    let reachable = sites.iter().filter(|s| verdict(s) == Verdict::Reachable);
    let most = if most == 0 { usize::MAX } else { most };
    let left_out = reachable.clone().count().saturating_sub(most);
    for sample in lost.chain(reachable.take(most)) {
        let Some(reach) = &sample.reachability else { continue };
        let (bytes, count) = (sample.totals.outstanding_bytes(), sample.totals.outstanding_count());
        let _ = writeln!(
            out,
            "\n{:9}  {}, {} in {count} block{} outstanding",
            reach.verdict.as_str(),
            stack_head(&sample.site),
            format_bytes(bytes),
            if count == 1 { "" } else { "s" }
        );
        let _ = writeln!(out, "           {}", visible(&reach.describe()));
        if let Some(way) = &reach.way {
            let _ = writeln!(out, "           held by: {}", visible(&way.describe()));
        }
    }
    if sites.is_empty() {
        out.push_str("  nothing that was allocated meanwhile is outstanding\n");
    }
    if left_out > 0 {
        let _ = writeln!(out, "\n{left_out} more sites are reachable (--set live.sites=0 shows all)");
    }
    out
}
