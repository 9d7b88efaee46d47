//! The commands that work on a recorded run: `report` and `replay`.
//!
//! Both need no privileges and not the processes that were watched. They use the same history, rules and report as a
//! running collector, with the settings that the recording keeps.

mod compare;
mod labels;
mod replay;
mod report;
#[cfg(test)]
mod tests;

use std::io::{self, IsTerminal};
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};

pub use compare::{Change, Comparison, Outcome};
pub use labels::Score;
pub use replay::{Found, Options, Replayed, RuleTimes, replay, run_rules};
pub use report::report;

use crate::Result;
use crate::output::text::visible;
use crate::recording::{Event, EventKind, Reader};
use crate::units::format_duration_s;

/// Opens a recording, and says what may be missing in it.
fn open(path: &Path) -> Result<Reader> {
    let reader = Reader::open(path)?;
    let (shown, session) = (reader.shown(), reader.session());
    if session.lacks_wal {
        tracing::warn!(
            "the run of {shown} was broken off, and there is no -wal file beside it: its end may be missing"
        );
    } else if !session.complete {
        tracing::info!("the run of {shown} goes on, or was broken off");
    }
    for (_, gap) in gaps(&reader)? {
        tracing::warn!("{shown} has {gap}");
    }
    Ok(reader)
}

/// Where snapshots are missing: when that began, seconds since the collector started, and all of it in words.
fn gaps(reader: &Reader) -> Result<Vec<(f64, String)>> {
    let gaps = reader.events()?.into_iter().filter(|e| e.kind == EventKind::Gap);
    let words = |e: &Event| format!("a gap at {}: {}", format_duration_s(e.time_s), visible(&e.text));
    Ok(gaps.map(|e| (e.time_s, words(&e))).collect())
}

/// A bar on a terminal, nothing elsewhere.
fn progress(steps: usize, what: &str) -> ProgressBar {
    let bar = if io::stderr().is_terminal() { ProgressBar::new(steps as u64) } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template(&format!("{what} {{wide_bar}} {{pos}}/{{len}}")) {
        bar.set_style(style);
    }
    bar
}
