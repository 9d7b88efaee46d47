//! What a report must say about its own numbers: exact or estimated, what was lost, what was never seen.

use serde::Serialize;

use super::site::SiteView;
use super::{PluginState, RunInfo};
use crate::history::History;
use crate::output::filters::{format_count, format_percent};
use crate::snapshot::{Losses, Mode};

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
    /// Sites whose stack is known to end early.
    pub truncated_sites: usize,
    /// Why stacks end early, most frequent first.
    pub truncated_reasons: Vec<Reason>,
    /// Sites without a single named function.
    pub unnamed_sites: usize,
    /// What was not seen at all, one sentence each.
    pub unseen: Vec<String>,
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
        let (mut exact, mut sampled, mut estimated, mut unmatched) = (0_usize, 0_usize, 0_usize, 0_u64);
        for p in history.processes() {
            losses.add(&p.losses);
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
            truncated_sites: truncated_reasons.iter().map(|r| r.sites).sum(),
            truncated_reasons,
            unnamed_sites: sites.iter().filter(|s| s.frames.iter().all(|f| f.function.is_none())).count(),
            unseen: if imported { vec![NOT_LOGGED.to_owned()] } else { unseen(run, unmatched) },
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

#[cfg(test)]
mod tests {
    use super::*;

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
