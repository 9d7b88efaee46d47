//! What a report must say about its own numbers: exact or estimated, what was lost, what was never seen.

use serde::Serialize;

use super::site::SiteView;
use super::{PluginState, RunInfo};
use crate::coverage::Coverage;
use crate::history::History;
use crate::kernel::KernelSummary;
use crate::output::filters::{format_count, format_percent};
use crate::output::text::visible;
use crate::snapshot::{Losses, Mode, ProcessSample, StackCounts};
use crate::units::{format_bytes, format_duration_s};

/// The report's statement about its own numbers.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Truth {
    /// `exact`, `sampled`, `estimated`, or `mixed` when processes differ; `imported` from a log; `none` without any
    /// process.
    pub mode: &'static str,
    /// True when the numbers are exact and nothing was lost.
    pub complete: bool,
    /// The statement in one sentence.
    pub headline: String,
    /// Number of lost events over all kinds and processes.
    pub losses_total: u64,
    /// The kinds of loss that occurred, most frequent first.
    pub losses: Vec<Loss>,
    /// Share of the recorded allocations whose stack reaches the outermost frame, 0 to 1; `None` when not known.
    pub complete_stacks: Option<f64>,
    /// Sites whose stack is known to end early.
    pub truncated_sites: usize,
    /// Why stacks end early, most frequent first.
    pub truncated_reasons: Vec<Reason>,
    /// Sites without a single named function.
    pub unnamed_sites: usize,
    /// What is missing in the recording that the report was made of, one sentence each.
    pub gaps: Vec<String>,
    /// What was not seen at all, one sentence each.
    pub unseen: Vec<String>,
    /// How much of the growth of each process its sites explain, one sentence each.
    pub coverage: Vec<String>,
}

/// One kind of loss.
#[derive(Clone, Debug, Serialize)]
pub struct Loss {
    /// Its name, as in alerts and recordings.
    pub kind: &'static str,
    /// Number of events.
    pub count: u64,
    /// What happened.
    pub what: &'static str,
    /// What it means for the numbers, and what helps.
    pub effect: &'static str,
}

/// Why stacks end early.
#[derive(Clone, Debug, Serialize)]
pub struct Reason {
    /// The reason.
    pub reason: String,
    /// Number of sites.
    pub sites: usize,
}

/// What numbers from a log are.
const IMPORTED: &str =
    "Numbers come from a log of bcc's memleak, which lists what is outstanding in the largest stacks.";
/// What such a log leaves out.
const NOT_LOGGED: &str = "The log does not say what was allocated and freed between two lists, how old blocks are, or what \
                          was lost: totals are the least that must have happened, and ages are upper bounds.";

impl Truth {
    /// The statement about `history`; `sites` are those of the report.
    pub(super) fn new(history: &History, sites: &[SiteView], run: &RunInfo) -> Truth {
        let mut losses = Losses::default();
        let mut stacks = StackCounts::default();
        let (mut exact, mut sampled, mut estimated, mut unmatched) = (0_usize, 0_usize, 0_usize, 0_u64);
        for p in history.processes() {
            losses.add(&p.losses);
            stacks.add(&p.stacks);
            unmatched += p.unmatched_frees;
            match p.mode {
                Mode::Exact => exact += 1,
                Mode::Sampled => sampled += 1,
                Mode::Estimated => estimated += 1,
            }
        }
        let mode = match (exact, sampled, estimated) {
            (0, 0, 0) => "none",
            (_, 0, 0) => "exact",
            (0, _, 0) => "sampled",
            (0, 0, _) => "estimated",
            _ => "mixed",
        };
        let allocations = history.totals().samples().last().map_or(0, |s| s.totals.allocated_count);
        let losses_total = losses.total();
        let mut truncated_reasons: Vec<Reason> = Vec::new();
        for reason in sites.iter().filter_map(|s| s.truncated.as_deref()) {
            match truncated_reasons.iter_mut().find(|r| r.reason == reason) {
                Some(r) => r.sites += 1,
                None => truncated_reasons.push(Reason { reason: reason.to_owned(), sites: 1 }),
            }
        }
        truncated_reasons.sort_by(|a, b| b.sites.cmp(&a.sites).then_with(|| a.reason.cmp(&b.reason)));
        let imported = run.backend == crate::import::BACKEND;
        Truth {
            mode: if imported { "imported" } else { mode },
            complete: mode == "exact" && losses_total == 0 && !imported,
            headline: if imported { IMPORTED.to_owned() } else { headline(mode, losses_total, allocations) },
            losses_total,
            losses: explained(&losses),
            complete_stacks: stacks.complete_share(),
            truncated_sites: truncated_reasons.iter().map(|r| r.sites).sum(),
            truncated_reasons,
            unnamed_sites: sites.iter().filter(|s| s.frames.iter().all(|f| f.function.is_none())).count(),
            gaps: run.gaps.clone(),
            unseen: if imported {
                vec![NOT_LOGGED.to_owned()]
            } else {
                unseen(run, unmatched).into_iter().chain(limits(history)).collect()
            },
            coverage: coverage(history),
        }
    }
}

fn headline(mode: &str, losses: u64, allocations: u64) -> String {
    let lost = match (losses, allocations) {
        (0, _) => String::new(),
        (1, _) => ", but 1 event was lost".to_owned(),
        (n, 0) => format!(", but {} events were lost", format_count(n as f64)),
        (n, all) => {
            let share = format_percent(n as f64 / all as f64);
            format!(", but {} events were lost ({share} of the allocations)", format_count(n as f64))
        }
    };
    match mode {
        "exact" if losses == 0 => "Every allocation and every free since the attach was counted.".to_owned(),
        "exact" => format!("Every call was traced{lost}."),
        "sampled" => {
            format!(
                "Every call was seen, a random sample of the allocations was recorded: numbers are estimates{lost}."
            )
        }
        "estimated" => format!("Numbers are estimates from short periods of tracing{lost}."),
        "mixed" => format!("Some processes were traced in full, of the others the numbers are estimates{lost}."),
        _ => "No process has been watched.".to_owned(),
    }
}

/// Every kind that occurred, with its meaning, most frequent first.
fn explained(losses: &Losses) -> Vec<Loss> {
    let explain = |kind| match kind {
        "outstanding_full" => (
            "allocations not recorded: the table of outstanding allocations was full",
            "Totals are too small. Raise collector.max_outstanding.",
        ),
        "sites_full" => (
            "allocations not recorded: the table of allocation sites was full",
            "New sites are missing. Raise collector.max_sites.",
        ),
        "implicit_frees" => (
            "frees not seen, noticed when the address was handed out again",
            "Corrected in the totals; until the correction such blocks count as outstanding.",
        ),
        "missed_returns" => (
            "calls that never returned (longjmp, exception or a killed thread)",
            "Blocks of such calls are not counted.",
        ),
        "threads_full" => {
            ("calls not followed: the table of threads was full", "Totals are too small. Raise collector.max_threads.")
        }
        "pointers_unreadable" => {
            ("returned pointers that could not be read from the process", "Blocks of such calls are not counted.")
        }
        "partial_ranges" => ("ranges unmapped or resized in part", "Sizes of such mappings are off by the part."),
        "stacks_full" => (
            "stacks not stored: the table of stacks was full",
            "Bytes are right, but some sites have no frames. Raise collector.max_sites.",
        ),
        "stacks_failed" => {
            ("stacks that could not be read", "Bytes are right, but these allocations share a site without frames.")
        }
        "events_dropped" => (
            "events dropped because the reader was slow",
            "Ends of processes may be noticed late; totals are not affected.",
        ),
        "missed_events" => (
            "calls of the kernel not seen: the same program was running on that CPU",
            "Such allocations are missing, and what such calls freed counts as outstanding until its address is handed out \
             again.",
        ),
        "python_lost" => (
            "Python functions not recorded: a table was full, or there were more than 512 threads",
            "Bytes are right, but some sites show the interpreter's C functions or functions without a name.",
        ),
        _ => ("events lost", "The effect on the totals is not known."),
    };
    let mut kinds: Vec<Loss> = (losses.entries().into_iter().filter(|(_, count)| *count > 0))
        .map(|(kind, count)| {
            let (what, effect) = explain(kind);
            Loss { kind, count, what, effect }
        })
        .collect();
    kinds.sort_by_key(|l| std::cmp::Reverse(l.count));
    kinds
}

/// What the numbers leave out however well everything worked.
fn unseen(run: &RunInfo, unmatched_frees: u64) -> Vec<String> {
    let mut out = vec![match unmatched_frees {
        0 => "Blocks allocated before the attach are not counted.".to_owned(),
        1 => "Blocks allocated before the attach are not counted; 1 such block was freed meanwhile.".to_owned(),
        n => format!(
            "Blocks allocated before the attach are not counted; {} such blocks were freed meanwhile.",
            format_count(n as f64)
        ),
    }];
    let mut probe_sets: Vec<&str> =
        (run.plugins.iter().filter(|p| p.state == PluginState::Attached)).map(|p| p.probe_set.as_str()).collect();
    probe_sets.sort_unstable();
    probe_sets.dedup();
    if !probe_sets.is_empty() {
        out.push(format!("Only calls of these probe sets are seen: {}.", probe_sets.join(", ")));
    }
    let failed = run.plugins.iter().filter(|p| p.state == PluginState::Failed).count();
    match failed {
        0 => {}
        1 => out.push("1 probe set could not be attached.".to_owned()),
        n => out.push(format!("{n} probe sets could not be attached.")),
    }
    out
}

/// Most processes that get a sentence of their own; the others are summed up.
const MAX_PROCESSES: usize = 8;

/// Why numbers of single processes are weaker than others.
fn limits(history: &History) -> Vec<String> {
    let mut processes: Vec<_> = history.processes().collect();
    processes.sort_by_key(|p| p.process.instance);
    let mut out = Vec::new();
    for p in processes {
        let name = visible(&p.process.comm);
        let pid = p.process.pid;
        if let Some(why) = p.stopped {
            out.push(format!("{name} ({pid}) is not traced at the moment: {}.", why.as_str()));
        }
        if p.hard_stops > 0 {
            let times = if p.hard_stops == 1 { "once".to_owned() } else { format!("{} times", p.hard_stops) };
            out.push(format!("All tracing of {name} ({pid}) was stopped {times} for a while to protect it."));
        }
        if let Some(window_s) = p.window_s.filter(|w| *w < FULL_WINDOW_S && p.mode == Mode::Estimated) {
            out.push(format!(
                "{name} ({pid}) was seen through windows of at most {}: blocks that live longer than half of that look \
                 like survivors, so verdicts are weaker.",
                format_duration_s(window_s)
            ));
        }
    }
    summed_up(out)
}

/// Windows that are shorter than this are worth a remark, seconds.
const FULL_WINDOW_S: f64 = 0.1;

/// How much of the growth of each process its sites explain, largest growth first.
fn coverage(history: &History) -> Vec<String> {
    let mut grown: Vec<(&ProcessSample, Coverage)> =
        history.processes().filter_map(|p| p.coverage.map(|c| (p, c))).collect();
    grown.sort_by_key(|(p, c)| (std::cmp::Reverse(c.growth_bytes), p.process.instance));
    // Of several instances the newest: the others' books are closed.
    let kernel = history.processes().filter(|p| p.kernel.is_some()).max_by_key(|p| p.process.instance);
    let of_kernel = kernel.and_then(|p| p.kernel.as_deref()).into_iter().flat_map(KernelSummary::sentences);
    let of_processes = summed_up(grown.into_iter().map(|(p, c)| coverage_sentence(p, &c)).collect());
    of_kernel.chain(of_processes).collect()
}

fn summed_up(mut sentences: Vec<String>) -> Vec<String> {
    let more = sentences.len().saturating_sub(MAX_PROCESSES);
    if more > 0 {
        sentences.truncate(MAX_PROCESSES);
        sentences.push(format!("The same is known of {more} more; see the snapshots of --json."));
    }
    sentences
}

fn coverage_sentence(p: &ProcessSample, c: &Coverage) -> String {
    let who = format!("{} ({})", visible(&p.process.comm), p.process.pid);
    let before = format!(
        "{} were in use before, in a heap of {} and elsewhere.",
        format_bytes(c.before_bytes),
        format_bytes(c.heap_before_bytes)
    );
    let grown = format_bytes(c.growth_bytes.max(0).unsigned_abs());
    match (c.share, c.explained_bytes, c.mapped_bytes, c.other_bytes) {
        (Some(share), Some(explained), Some(mapped), Some(other)) => {
            let mut rest = Vec::new();
            if mapped > 0 {
                rest.push(format!(
                    "up to {} were mapped directly (mmap, stacks of threads) and are not traced",
                    format_bytes(mapped)
                ));
            }
            if other > 0 {
                rest.push(format!("{} are the allocator's overhead and fragmentation", format_bytes(other)));
            }
            let rest = if rest.is_empty() { String::new() } else { format!("; {}", rest.join(", ")) };
            format!(
                "{who} grew by {grown} of anonymous memory since the attach: sites explain {} ({}){rest}. {before}",
                format_bytes(explained),
                format_percent(share)
            )
        }
        (_, None, ..) if c.growth_bytes > 0 => format!(
            "{who} grew by {grown} of anonymous memory; through windows it is not known how much of it the sites explain. \
             {before}"
        ),
        _ => format!("{who} hardly grew since the attach: its anonymous memory by {grown}. {before}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coverage::Baseline;

    /// The parts are said with their names, and what is not known is not made up.
    #[test]
    fn coverage_names_its_parts() {
        const MIB: u64 = 1 << 20;
        let process =
            std::sync::Arc::new(crate::snapshot::Process { pid: 7, comm: "shop".into(), ..Default::default() });
        let p = ProcessSample { process, ..ProcessSample::default() };
        let before = Baseline { resident_bytes: 10 * MIB, heap_bytes: 4 * MIB, regions: Vec::new() };
        let say = |resident: u64, outstanding: Option<u64>, untraced: u64| {
            let c = Coverage::new(1.0, &before, resident * MIB, outstanding.map(|b| b * MIB), untraced * MIB);
            coverage_sentence(&p, &c)
        };
        assert_eq!(
            say(60, Some(20), 25),
            "shop (7) grew by 50.0 MiB of anonymous memory since the attach: sites explain 20.0 MiB (40 %); up to 25.0 MiB \
             were mapped directly (mmap, stacks of threads) and are not traced, 5.0 MiB are the allocator's overhead and \
             fragmentation. 10.0 MiB were in use before, in a heap of 4.0 MiB and elsewhere."
        );
        assert!(say(60, Some(70), 0).contains("sites explain 50.0 MiB (100 %). 10.0 MiB were"));
        assert!(say(60, None, 25).contains("through windows it is not known"));
        assert!(say(9, Some(20), 0).contains("hardly grew since the attach: its anonymous memory by 0 B"));
    }

    /// Every kind of loss that exists must have an explanation of its own, also one added later.
    #[test]
    fn every_kind_of_loss_is_explained() {
        let one_each = Losses {
            outstanding_full: 1,
            sites_full: 1,
            stacks_full: 1,
            stacks_failed: 1,
            threads_full: 1,
            missed_returns: 1,
            implicit_frees: 1,
            partial_ranges: 1,
            pointers_unreadable: 1,
            events_dropped: 1,
            missed_events: 1,
            python_lost: 1,
        };
        let explained = explained(&one_each);
        assert_eq!(explained.len(), Losses::default().entries().len());
        for loss in explained {
            assert_ne!(loss.what, "events lost", "{}", loss.kind);
        }
    }

    /// The word "every" may only be used when nothing at all was lost.
    #[test]
    fn a_loss_takes_the_completeness_out_of_the_headline() {
        assert_eq!(headline("exact", 0, 10), "Every allocation and every free since the attach was counted.");
        assert_eq!(
            headline("exact", 1_500, 1_000_000),
            "Every call was traced, but 1,500 events were lost (0.15 % of the allocations)."
        );
        assert!(headline("sampled", 0, 10).contains("estimates"));
        assert!(headline("estimated", 0, 10).contains("estimates"));
    }
}
