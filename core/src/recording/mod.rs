//! Recordings: a run in one file, written as it goes, read without privileges and without the target.
//!
//! [`Writer`] takes every snapshot in, with what the rules said of it; [`Reader`] gives the same snapshots back, made of
//! the same types as in a running collector, so that reports, rules and comparisons work on both. The file is an SQLite
//! database: tables for what people may want to ask for (processes, sites, frames, findings, events, totals per
//! snapshot), and one packed blob per snapshot for the numbers of the sites, because a row per site and snapshot would
//! be ten times the size. `docs/recordings.md` describes the file.
//!
//! Nothing here decides about leaks or talks to the kernel, and reading never changes a file. Everything that is read is
//! taken for hostile.

mod codec;
mod create;
mod cursor;
mod details;
mod digest;
mod history;
mod kernel;
mod open;
mod reach;
mod reader;
mod schema;
mod settings;
#[cfg(test)]
mod tests;
mod thin;
mod totals;
mod writer;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::alert::Status;
use crate::finding::Severity;
use crate::output::report::RunInfo;
use crate::snapshot::{Site, SiteKey, Totals};

pub use cursor::{Replay, Snapshots};
pub use reader::{Filter, Reader};
pub use schema::VERSION;
pub use settings::{Settings, recorded};
pub use writer::{Limits, Step, Writer};

/// The machine that a run was on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Release of its kernel.
    pub kernel: String,
    /// Its architecture, such as `x86_64`.
    pub machine: String,
    /// Changes with every boot; empty when it is not known.
    pub boot_id: String,
}

impl Host {
    /// The machine that this runs on.
    pub fn this() -> Host {
        let read = |path: &str| std::fs::read_to_string(path).map_or_else(|_| String::new(), |s| s.trim().to_owned());
        Host {
            name: read("/proc/sys/kernel/hostname"),
            kernel: read("/proc/sys/kernel/osrelease"),
            machine: std::env::consts::ARCH.to_owned(),
            boot_id: read("/proc/sys/kernel/random/boot_id"),
        }
    }
}

/// What a recording says of its run as a whole.
#[derive(Clone, Debug, Default)]
pub struct Session {
    /// Number of the schema that it was written with.
    pub format: i32,
    /// What the report says of the run, as of the newest snapshot.
    pub run: RunInfo,
    /// The settings that a replay needs (rules, alerts, history, report), as text of a file of settings.
    pub settings: String,
    /// The machine.
    pub host: Host,
    /// True when the run ended in order; false when it was killed, or still runs.
    pub complete: bool,
    /// True when the run was broken off and the file with what it had written last (`-wal`) is not beside the recording:
    /// its end may be missing.
    pub lacks_wal: bool,
    /// How many snapshots were taken out again to keep the file within its size.
    pub thinned: u64,
}

/// Where a return address lies, in terms that are the same in the next run and on another host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Location {
    /// Path of the mapped file as the process sees it, or `[vdso]`, ...; `None` for memory without a name.
    pub module: Option<String>,
    /// Build id of the file, hexadecimal.
    pub build_id: Option<String>,
    /// Offset in the file; without one, the address.
    pub offset: u64,
}

/// What kind of thing has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// A process is watched from now on.
    Attach,
    /// A watched process has ended.
    End,
    /// A process is traced in another way from now on.
    Mode,
    /// Something could not be watched or was not attached.
    Failed,
    /// A process's memory was scanned, or could not be.
    Scan,
    /// Events were lost.
    Loss,
    /// A rule failed, or was added, changed or removed.
    Rule,
    /// An alert was raised, got worse or was resolved.
    Alert,
    /// Snapshots are missing.
    Gap,
    /// A kind that this version does not know.
    Other,
}

impl EventKind {
    /// Its name in the file.
    pub fn as_str(self) -> &'static str {
        match self {
            EventKind::Attach => "attach",
            EventKind::End => "end",
            EventKind::Mode => "mode",
            EventKind::Failed => "failed",
            EventKind::Scan => "scan",
            EventKind::Loss => "loss",
            EventKind::Rule => "rule",
            EventKind::Alert => "alert",
            EventKind::Gap => "gap",
            EventKind::Other => "other",
        }
    }

    fn from_name(name: &str) -> EventKind {
        let known = [
            EventKind::Attach,
            EventKind::End,
            EventKind::Mode,
            EventKind::Failed,
            EventKind::Scan,
            EventKind::Loss,
            EventKind::Rule,
            EventKind::Alert,
            EventKind::Gap,
        ];
        known.into_iter().find(|k| k.as_str() == name).unwrap_or(EventKind::Other)
    }
}

/// Something that happened during the run.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// When, seconds since the collector started.
    pub time_s: f64,
    /// When, seconds since 1970.
    pub wall_s: f64,
    /// What kind of thing.
    pub kind: EventKind,
    /// The process instance that it is about.
    pub instance: Option<u32>,
    /// In words. Hostile text.
    pub text: String,
}

/// A finding over the time for which it stood without a break and with one severity.
#[derive(Clone, Debug)]
pub struct FindingSpan {
    /// Id of the finding, see [`crate::finding::Finding::id`].
    pub id: String,
    /// Name of the rule.
    pub rule: String,
    /// How bad it is.
    pub severity: Severity,
    /// How sure the rule was when it last said so, 0 to 1.
    pub confidence: f64,
    /// What the rule said last (of a run that was killed, first).
    pub reason: String,
    /// The site.
    pub site: Arc<Site>,
    /// Number of the first snapshot with it.
    pub first_snapshot: u64,
    /// Number of the last snapshot with it.
    pub last_snapshot: u64,
    /// Time of the first snapshot with it, seconds since the collector started.
    pub first_s: f64,
    /// Time of the last snapshot with it, seconds since the collector started.
    pub last_s: f64,
    /// True when it stood in the last snapshot of the recording.
    pub standing: bool,
}

/// An alert as it was last known.
#[derive(Clone, Debug)]
pub struct AlertRecord {
    /// Id of the finding.
    pub id: String,
    /// Name of the rule.
    pub rule: String,
    /// How bad it is.
    pub severity: Severity,
    /// How sure the rule was, 0 to 1.
    pub confidence: f64,
    /// One sentence for people.
    pub reason: String,
    /// The site; of several processes the one with the most outstanding bytes.
    pub site: SiteKey,
    /// Outstanding bytes there.
    pub outstanding_bytes: u64,
    /// In how many processes.
    pub processes: usize,
    /// True when the process had ended.
    pub ended: bool,
    /// Whether it still stood.
    pub status: Status,
    /// When the finding was first made, seconds since the collector started.
    pub first_seen_s: f64,
    /// When it was raised, seconds since the collector started.
    pub fired_s: f64,
    /// When it was resolved, seconds since the collector started.
    pub resolved_s: Option<f64>,
}

/// One snapshot in the table of contents.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SnapshotInfo {
    /// Its number in the run.
    pub number: u64,
    /// Seconds since the collector started.
    pub time_s: f64,
    /// Seconds since 1970.
    pub wall_s: f64,
    /// CPU time that reading it has cost the collector, seconds.
    pub collect_cpu_s: f64,
    /// Number of sites.
    pub sites: u64,
    /// Totals over all sites.
    pub totals: Totals,
    /// Readable without the ones before.
    keyframe: bool,
}
