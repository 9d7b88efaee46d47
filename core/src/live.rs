//! The live view: what is going on, at each interval.
//!
//! On a terminal a small page that is redrawn in place; elsewhere a line per interval and one per change, so that a
//! log of it reads well. Makes text, writes nothing.

use std::fmt::Write;
use std::time::Duration;

use crate::alert::{Alert, AlertEvent, Status};
use crate::collector::{Notice, PluginState, PluginStatus};
use crate::finding::Severity;
use crate::history::{History, SiteHistory};
use crate::output::filters::format_percent;
use crate::output::report::heading;
use crate::output::text::{clip, visible};
use crate::reachability::Verdict;
use crate::reachability::scanner::{Cost, Stopped};
use crate::selfstats::OwnCost;
use crate::snapshot::{Mode, Process, Site, Snapshot, StackCounts};
use crate::stats::theil_sen_slope;
use crate::symbolize::Frame;
use crate::units::{format_bytes, format_duration_s, format_rate};

/// Longest function name in a line, in characters.
const LONGEST_NAME: usize = 60;
/// What to say when nothing is found to attach to.
const NO_ALLOCATOR: &str = "none of the probe sets that are on finds its functions in what the process has mapped; a \
    statically linked and stripped program has no symbols to find them by, another allocator needs its own probe set \
    (plugins.dir)";

/// So many times the shown sites, the largest ones, are looked at for their growth.
pub const LOOKED_AT: usize = 5;

/// Functions of a stack that fit a line.
const STACK_HEAD: usize = 4;

/// The numbers of a site that the view shows.
struct Row<'a> {
    site: &'a Site,
    bytes: u64,
    count: u64,
    /// The numbers are estimates from a sample.
    sampled: bool,
    growth: f64,
    /// Whether the process can still reach its blocks; unknown before a scan.
    verdict: Verdict,
    alert: Option<&'a Alert>,
}

/// What the view is made from.
pub struct View<'a> {
    /// The newest snapshot.
    pub snapshot: &'a Snapshot,
    /// Its history.
    pub history: &'a History,
    /// Alerts that fire, most severe first.
    pub alerts: &'a [&'a Alert],
    /// Sites to show.
    pub sites: usize,
    /// How long the run takes; `None` until stopped.
    pub duration: Option<Duration>,
    /// What the collector has cost so far.
    pub own: OwnCost,
}

impl View<'_> {
    /// One line with the totals.
    pub fn summary(&self) -> String {
        let (totals, stderr) = (self.snapshot.totals(), self.snapshot.stderr());
        let alive = self.snapshot.processes.iter().filter(|p| p.alive).count();
        let exact = self.snapshot.processes.iter().all(|p| p.mode == Mode::Exact);
        let lost = self.snapshot.losses().total();
        let mut line = format!(
            "{:>7}  {} process{} {}  {} outstanding in {} blocks  {}",
            format_duration_s(self.snapshot.time_s.round()),
            alive,
            if alive == 1 { "" } else { "es" },
            if exact { "exact" } else { "estimated" },
            with_error(format_bytes(totals.outstanding_bytes()), format_bytes(stderr.bytes as u64), stderr.bytes),
            with_error(totals.outstanding_count().to_string(), format!("{:.0}", stderr.count), stderr.count),
            signed_rate(slope(self.history.totals().samples())),
        );
        let cost_s: f64 = self.history.processes().map(|p| p.overhead_s).sum();
        if self.snapshot.time_s > 0.0 {
            let _ = write!(line, "  tracing ~{:.1} % of a core (estimate)", cost_s / self.snapshot.time_s * 100.0);
        }
        let stopped = self.snapshot.processes.iter().filter(|p| p.alive && p.stopped.is_some()).count();
        if stopped > 0 {
            let _ = write!(line, "  {stopped} stopped: tracing cost too much");
        }
        let mut stacks = StackCounts::default();
        self.snapshot.processes.iter().for_each(|p| stacks.add(&p.stacks));
        if let Some(share) = stacks.complete_share() {
            let _ = write!(line, "  complete stacks {}", format_percent(share));
        }
        let _ = write!(line, "  lost {lost}");
        if !self.alerts.is_empty() {
            let _ = write!(line, "  {} alert{}", self.alerts.len(), if self.alerts.len() == 1 { "" } else { "s" });
        }
        line
    }

    /// The page for a terminal of this size (columns, lines), with colours.
    pub fn page(&self, columns: usize, lines: usize) -> String {
        let mut out = String::new();
        let left = self.duration.map(|d| format!(" of {}", format_duration_s(d.as_secs_f64()))).unwrap_or_default();
        let own = self.own.cpu_s.map(|s| format!("  own CPU {s:.2} s")).unwrap_or_default();
        let memory = self.own.rss_bytes.map(|b| format!(", {}", format_bytes(b))).unwrap_or_default();
        let maps = self.own.map_bytes.map(|b| format!(" + {} in maps", format_bytes(b))).unwrap_or_default();
        let each = format!(", {} per snapshot", format_duration_s(self.snapshot.collect_cpu_s));
        let line = format!("memleak{left}{own}{memory}{maps}{each}    ctrl-c ends, with a report");
        push_line(&mut out, columns, &line, DIM);
        push_line(&mut out, columns, &self.summary(), BOLD);
        for (name, count) in self.snapshot.losses().entries().into_iter().filter(|(_, n)| *n > 0) {
            push_line(&mut out, columns, &format!("         lost: {count} {}", name.replace('_', " ")), YELLOW);
        }
        push_line(&mut out, columns, "", "");
        push_line(&mut out, columns, &format!("{:>10} {:>9} {:>14}  SITE", "BYTES", "BLOCKS", "GROWTH"), DIM);
        let room = lines.saturating_sub(out.lines().count() + self.alerts.len().min(5) + 3).max(3);
        for row in self.rows().into_iter().take(room) {
            let colour = row.alert.map_or("", |a| colour(a.severity));
            push_line(&mut out, columns, &row.line(), colour);
        }
        if !self.alerts.is_empty() {
            push_line(&mut out, columns, "", "");
        }
        for alert in self.alerts.iter().take(5) {
            push_line(&mut out, columns, &alert_line(alert), colour(alert.severity));
        }
        out
    }

    /// Sites by leaked bytes: those with an alert first, then by growth. Growth is looked at for the largest only.
    fn rows(&self) -> Vec<Row<'_>> {
        let mut sites: Vec<&SiteHistory> =
            self.history.live_sites().filter(|h| h.latest.totals.outstanding_bytes() > 0).collect();
        sites.sort_by_key(|h| (std::cmp::Reverse(h.latest.totals.outstanding_bytes()), h.site().key));
        let alert = |h: &SiteHistory| self.alerts.iter().find(|a| a.site.key == h.site().key).copied();
        let most = if self.sites == 0 { usize::MAX } else { self.sites };
        let mut rows: Vec<Row<'_>> = (sites.iter().enumerate())
            .filter(|(rank, h)| *rank < most.saturating_mul(LOOKED_AT) || alert(h).is_some())
            .map(|(_, h)| Row {
                site: h.site(),
                bytes: h.latest.totals.outstanding_bytes(),
                count: h.latest.totals.outstanding_count(),
                sampled: h.latest.stderr.bytes > 0.0,
                growth: slope(h.series.samples()),
                verdict: h.latest.reachability.as_ref().map(|r| r.verdict).unwrap_or_default(),
                alert: alert(h),
            })
            .collect();
        // Stable: of equals the largest comes first.
        rows.sort_by(|a, b| {
            let severity = |r: &Row<'_>| r.alert.map(|a| a.severity);
            severity(b).cmp(&severity(a)).then(b.growth.max(0.0).total_cmp(&a.growth.max(0.0)))
        });
        rows.truncate(most);
        rows
    }
}

impl Row<'_> {
    fn line(&self) -> String {
        let process = &self.site.process;
        let verdict = match self.verdict {
            Verdict::Definite => "(lost) ",
            Verdict::Possible => "(possibly lost) ",
            Verdict::Reachable => "(reachable) ",
            Verdict::Unknown => "",
        };
        let who = format!("{verdict}{} [{} {}]", stack_head(self.site), process.pid, visible(&process.comm));
        let mark = if self.sampled { "~" } else { "" };
        let (bytes, count) = (format!("{mark}{}", format_bytes(self.bytes)), format!("{mark}{}", self.count));
        format!("{bytes:>10} {count:>9} {:>14}  {who}", signed_rate(self.growth))
    }
}

/// The functions that tell a site apart, innermost first.
pub fn stack_head(site: &Site) -> String {
    let frames = site.frames();
    let start = heading(frames).unwrap_or(0);
    let mut names: Vec<String> = frames.iter().skip(start).take(STACK_HEAD).map(frame_name).collect();
    if let (Some(first), Some(Frame { file: Some(file), line: Some(line), .. })) =
        (names.first_mut(), frames.get(start))
    {
        *first = format!("{first} ({}:{line})", visible(file_name(file)));
    }
    if names.is_empty() {
        return site.addresses.first().map_or_else(|| "no stack".into(), |a| format!("0x{a:x}"));
    }
    names.join(" < ")
}

/// A frame in a word: its function, or module and offset, or the address.
pub fn frame_name(frame: &Frame) -> String {
    match (&frame.function, &frame.module) {
        (Some(function), _) => clip(&visible(function), LONGEST_NAME).into_owned(),
        (None, Some(module)) => format!("{}+0x{:x}", visible(file_name(module)), frame.offset),
        (None, None) => format!("0x{:x}", frame.address),
    }
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Why a process is not watched although it was named; `None` when some probe set is attached.
pub fn why_not_attached(process: &Process, statuses: &[PluginStatus]) -> Option<String> {
    if statuses.iter().any(|s| matches!(s.state, PluginState::Attached { .. })) {
        return None;
    }
    let failures: Vec<String> = (statuses.iter())
        .filter_map(|s| match &s.state {
            PluginState::Failed { file, reason } => {
                Some(format!("{} in {}: {}", s.probe_set, visible(file), visible(reason)))
            }
            _ => None,
        })
        .collect();
    let why = if failures.is_empty() { NO_ALLOCATOR.to_owned() } else { failures.join(", ") };
    Some(format!("process {} {} ({}): {why}", process.pid, visible(&process.comm), visible(&process.exe)))
}

/// An alert that fires, in one line.
fn alert_line(alert: &Alert) -> String {
    format!(
        "{} {}: {} {}",
        alert.severity.as_str().to_uppercase(),
        visible(&alert.rule),
        stack_head(&alert.site),
        visible(&alert.reason)
    )
}

/// A change of an alert, in one line.
pub fn event_line(event: &AlertEvent) -> String {
    match event.alert.status {
        Status::Firing => alert_line(&event.alert),
        Status::Resolved => format!("resolved {}: {}", visible(&event.alert.rule), stack_head(&event.alert.site)),
    }
}

/// What happened to a process, in one line.
pub fn notice_line(notice: &Notice) -> String {
    match notice {
        Notice::Watching(process, status) => {
            let mut parts = Vec::new();
            for s in status {
                match &s.state {
                    PluginState::Attached { file, functions } => {
                        let probes = functions.iter().filter(|f| f.placement.is_ok()).count();
                        parts.push(format!("{} in {} ({probes} functions)", s.probe_set, visible(file)));
                    }
                    PluginState::Failed { file, reason } => {
                        parts.push(format!("{} FAILED in {}: {}", s.probe_set, visible(file), visible(reason)));
                    }
                    PluginState::NotMapped => {}
                }
            }
            if parts.is_empty() {
                parts.push(format!("{}: {NO_ALLOCATOR}", visible(&process.exe)));
            }
            format!("watching {} {}: {}", process.pid, visible(&process.comm), parts.join(", "))
        }
        Notice::Mode { process, exact: true } => {
            format!(
                "{} {}: calls are rare enough again, everything is traced from here on",
                process.pid,
                visible(&process.comm)
            )
        }
        Notice::Mode { process, exact: false } => format!(
            "{} {}: tracing every call would exceed the budget; watching through windows from here on, numbers are estimates",
            process.pid,
            visible(&process.comm)
        ),
        Notice::Limited { process, what } => format!("{} {}: {what}", process.pid, visible(&process.comm)),
        Notice::Sampled { process, mean_bytes, too_costly } => {
            let why =
                if *too_costly { "recording more would exceed the budget" } else { "there is budget for more again" };
            let what = match mean_bytes {
                0 => "every allocation is recorded from here on".to_owned(),
                n => format!(
                    "a sample is recorded from here on, one allocation in {} on average, and numbers are estimates",
                    format_bytes(*n)
                ),
            };
            format!("{} {}: {why}; {what}", process.pid, visible(&process.comm))
        }
        Notice::Stopped { process, why, cool_down_s } => format!(
            "{} {}: all tracing stopped for {}, because {}",
            process.pid,
            visible(&process.comm),
            format_duration_s(*cool_down_s),
            why.as_str()
        ),
        Notice::Ended(process) => format!("ended {} {}", process.pid, visible(&process.comm)),
        Notice::Scanning { process, bytes, scans, about_s } => format!(
            "{} {}: scanning {} {scans} times, about {}",
            process.pid,
            visible(&process.comm),
            format_bytes(*bytes),
            format_duration_s(about_s.round())
        ),
        Notice::Scanned { process, cost } => format!("{} {}: {}", process.pid, visible(&process.comm), scan_line(cost)),
        Notice::NotScanned { process, reason } => {
            format!("{} {}: {}", process.pid, visible(&process.comm), visible(reason))
        }
        Notice::Failed { pid, reason } => format!("failed to watch process {pid}: {}", visible(reason)),
    }
}

/// What a series of scans took, in one line.
pub fn scan_line(cost: &Cost) -> String {
    let mut line = format!(
        "{} scan{} of {} in {} told what it can still reach ({} of CPU time, memory at {:.2} GB/s)",
        cost.scans,
        if cost.scans == 1 { "" } else { "s" },
        format_bytes(cost.read_bytes / u64::from(cost.scans.max(1))),
        format_duration_s(cost.wall_s),
        format_duration_s(cost.cpu_s),
        cost.read_bytes as f64 / cost.memory_cpu_s.max(1e-9) / 1e9
    );
    match &cost.stop {
        Some(Stopped::Done { for_s, copied_bytes, cut_short, threads }) => {
            let _ = write!(
                line,
                "; it was stopped for {} ({threads} thread{}, {} copied{})",
                format_duration_s(*for_s),
                if *threads == 1 { "" } else { "s" },
                format_bytes(*copied_bytes),
                if *cut_short { ", not everything" } else { "" }
            );
        }
        Some(Stopped::Refused { reason }) => {
            let _ = write!(line, "; it was not stopped: {}", visible(reason));
        }
        None => {}
    }
    if cost.suspects_only {
        line.push_str("; it has so many blocks that only those of suspected sites were judged");
    }
    line
}

const BOLD: &str = "\x1b[1m";
const DIM: &str = "\x1b[2m";
const YELLOW: &str = "\x1b[33m";
const RESET: &str = "\x1b[0m";

fn colour(severity: Severity) -> &'static str {
    match severity {
        Severity::Info => "\x1b[36m",
        Severity::Warning => YELLOW,
        Severity::Critical => "\x1b[31m",
    }
}

fn push_line(out: &mut String, columns: usize, text: &str, style: &str) {
    let text = clip(text, columns.max(20));
    if style.is_empty() {
        let _ = writeln!(out, "{text}");
    } else {
        let _ = writeln!(out, "{style}{text}{RESET}");
    }
}

/// A number, marked as an estimate with its standard error where it has one.
fn with_error(number: String, error_text: String, error: f64) -> String {
    if error > 0.0 { format!("~{number} +- {error_text}") } else { number }
}

fn slope(samples: &[crate::history::Sample]) -> f64 {
    let points: Vec<(f64, f64)> = samples.iter().map(|s| (s.time_s, s.totals.outstanding_bytes() as f64)).collect();
    theil_sen_slope(&points)
}

fn signed_rate(rate: f64) -> String {
    let sign = if rate > 0.0 { "+" } else { "" };
    format!("{sign}{}", format_rate(rate))
}
