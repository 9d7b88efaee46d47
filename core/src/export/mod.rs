//! One snapshot in the formats of other tools.
//!
//! [`encode`] is pure: a snapshot in, bytes out. Each format is a module. All of them give the same sites with the same
//! numbers; what a format has no place for is left out, never made up. A site whose stack is not known has its process as
//! its only frame. Names come from the traced system: control characters are written out, and every format quotes as its
//! readers expect.

use clap::ValueEnum;
use serde::Serialize;

use crate::Result;
use crate::error::{Error, ErrorKind};
use crate::history::{Bounds, History};
use crate::output::snapshots::SnapshotLine;
use crate::selfstats::OwnCost;
use crate::snapshot::{Mode, Snapshot};

mod csv;
mod folded;
pub(crate) mod names;
mod pprof;
mod proto;
mod run;
mod speedscope;

pub use run::{Args, run};

/// A format that a snapshot can be exported to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Profile of pprof (protocol buffers, gzip), for `go tool pprof` and what reads its files
    Pprof,
    /// One line per call stack with its outstanding bytes, for flame graph tools
    Folded,
    /// For <https://www.speedscope.app>
    Speedscope,
    /// The snapshot as `memleak --json` prints it, with every site
    Json,
    /// One row per allocation site, for spreadsheets
    Csv,
}

impl Format {
    /// Whether a terminal cannot show it.
    pub fn is_binary(self) -> bool {
        self == Format::Pprof
    }
}

/// A snapshot in a format.
///
/// # Errors
/// The snapshot cannot be expressed in the format.
pub fn encode(format: Format, snapshot: &Snapshot) -> Result<Vec<u8>> {
    match format {
        Format::Pprof => pprof::encode(snapshot),
        Format::Folded => Ok(folded::encode(snapshot)),
        Format::Speedscope => json(&speedscope::file(snapshot)),
        Format::Json => {
            let mut history = History::new(Bounds::default());
            history.push(snapshot);
            json(&SnapshotLine::new(snapshot, &history, usize::MAX, OwnCost::default(), None))
        }
        Format::Csv => Ok(csv::encode(snapshot)),
    }
}

fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut out = serde_json::to_vec(value)
        .map_err(|e| Error::with_source(ErrorKind::Io, "failed to write the snapshot as JSON", e))?;
    out.push(b'\n');
    Ok(out)
}

/// What the numbers are, in a few words, for formats that have a place for it.
fn description(snapshot: &Snapshot) -> String {
    let estimated = snapshot.processes.iter().any(|p| p.mode != Mode::Exact);
    let lost = match snapshot.losses().total() {
        0 => String::new(),
        n => format!(", {n} events lost"),
    };
    // Not "exact" of the rest: what was imported is as exact as its log.
    let kind = if estimated { ", estimates" } else { "" };
    format!("memleak snapshot {} at {}{kind}{lost}", snapshot.number, crate::units::format_time_utc(snapshot.wall_s))
}

#[cfg(test)]
pub(crate) mod sample {
    //! Snapshots for the tests of formats and of differences.

    use std::sync::Arc;

    use crate::snapshot::{
        FirstThread, LIFETIME_CLASSES, Process, ProcessSample, Site, SiteKey, SiteSample, Snapshot, StandardErrors,
        Totals,
    };
    use crate::symbolize::Frame;

    /// A name that would break every format if it were not quoted.
    pub(crate) const HOSTILE: &str = "=cmd|'/c'!A1;\"</script>\n\u{202e},x 7";

    pub(crate) fn frame(function: &str, address: u64) -> Frame {
        Frame {
            function: Some(function.to_owned()),
            module: Some("/opt/shop".to_owned()),
            offset: 0x10,
            file: Some("src/shop.c".to_owned()),
            line: Some(7),
            address,
            build_id: Some("ab12".to_owned()),
            ..Frame::default()
        }
    }

    pub(crate) fn process() -> Arc<Process> {
        Arc::new(Process {
            instance: 1,
            pid: 4711,
            comm: "shop".to_owned(),
            exe: "/opt/shop".to_owned(),
            ..Process::default()
        })
    }

    /// A site with allocated and freed bytes; a block has 10 bytes.
    pub(crate) fn site(process: &Arc<Process>, id: u64, frames: Vec<Frame>, allocated: u64, freed: u64) -> SiteSample {
        let site = Site {
            key: SiteKey { instance: process.instance, probe_set: 1, stack: id },
            id,
            process: Arc::clone(process),
            probe_set: "glibc".into(),
            function: "malloc".into(),
            addresses: frames.iter().filter(|f| !f.inlined).map(|f| f.address).collect(),
            truncated: None,
            first_thread: (id == 1).then(|| FirstThread { tid: 4712, name: "worker 1".into() }),
            frames: frames.into(),
        };
        SiteSample {
            site: Arc::new(site),
            totals: Totals {
                allocated_bytes: allocated,
                allocated_count: allocated / 10,
                freed_bytes: freed,
                freed_count: freed / 10,
            },
            stderr: StandardErrors::default(),
            last_allocation_s: 1.5,
            cohorts: Vec::new(),
            lifetimes: [0; LIFETIME_CLASSES],
            reachability: None,
            kernel: None,
        }
    }

    pub(crate) fn snapshot(sites: Vec<SiteSample>) -> Snapshot {
        let mut processes: Vec<Arc<Process>> = Vec::new();
        for s in &sites {
            if !processes.contains(&s.site.process) {
                processes.push(Arc::clone(&s.site.process));
            }
        }
        let processes =
            processes.into_iter().map(|process| ProcessSample { process, alive: true, ..ProcessSample::default() });
        Snapshot {
            number: 3,
            time_s: 60.0,
            wall_s: 1_772_443_800.0,
            processes: processes.collect(),
            sites,
            ..Snapshot::default()
        }
    }

    /// Two sites that share their outer frames, an inlined call, a hostile name, and a site without a stack.
    pub(crate) fn typical() -> Snapshot {
        let process = process();
        let inlined = Frame { inlined: true, ..frame("inner", 0x5000) };
        let nameless = Frame { function: None, file: None, line: None, offset: 0x77, ..frame("", 0x9000) };
        snapshot(vec![
            site(&process, 1, vec![inlined, frame("outer", 0x5000), frame("main", 0x6000)], 1_300, 300),
            site(&process, 2, vec![frame(HOSTILE, 0x7000), nameless, frame("main", 0x6000)], 70, 0),
            site(&process, 3, Vec::new(), 30, 20),
        ])
    }
}
