//! memleak as a tool that is measured: which settings it knows, and one run of it on a live process.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::clock;
use crate::process::{Line, Running, output_of};

/// How long memleak may take to attach, or to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// The binary that is measured.
#[derive(Debug)]
pub struct Memleak {
    binary: PathBuf,
}

impl Memleak {
    /// Takes a binary.
    ///
    /// # Errors
    /// There is no such file.
    pub fn new(binary: &Path) -> Result<Self> {
        let binary = std::path::absolute(binary)?;
        if !binary.is_file() {
            bail!("{} does not exist: build it with `cargo build --release -p memleak`", binary.display());
        }
        Ok(Memleak { binary })
    }

    /// What it calls its version.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn version(&self, folder: &Path) -> Result<String> {
        Ok(output_of(Command::new(&self.binary).arg("--version"), PATIENCE, folder)?.trim().to_owned())
    }

    /// Why these settings (`key=value`) cannot be used; `None` when they can.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn refuses(&self, settings: &[&str], folder: &Path) -> Result<Option<String>> {
        let mut command = Command::new(&self.binary);
        command.arg("check");
        for setting in settings {
            command.args(["--set", setting]);
        }
        let mut running = Running::start(&mut command, folder)?;
        if running.finish()?.success() {
            return Ok(None);
        }
        let words = running.last_words();
        Ok(Some(if words.contains("unknown key") {
            "setting not known".to_owned()
        } else {
            format!("setting refused{words}")
        }))
    }

    /// Attaches to a running process; returns when everything is attached.
    ///
    /// Nothing but `settings` differs from the defaults, other than that report and alerts go nowhere.
    ///
    /// # Errors
    /// It does not attach.
    pub fn attach(&self, pid: u32, settings: &[&str], folder: &Path) -> Result<Session> {
        let mut command = Command::new(&self.binary);
        command.current_dir(folder).args(["--json", "-p", &pid.to_string()]);
        for setting in ["report.path=", "alerts.file="].iter().chain(settings) {
            command.args(["--set", setting]);
        }
        let start = Instant::now();
        let mut running = Running::start(&mut command, folder)?;
        let first = running.expect("its first snapshot", PATIENCE, Snapshot::parse)?;
        Ok(Session { running, attach_s: start.elapsed().as_secs_f64(), snapshots: vec![first] })
    }
}

/// memleak, attached to a process; killed when dropped.
#[derive(Debug)]
pub struct Session {
    running: Running,
    /// From start to first snapshot, in seconds: everything was attached by then.
    pub attach_s: f64,
    snapshots: Vec<Snapshot>,
}

impl Session {
    /// Process id of memleak.
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// CPU time that memleak itself has used so far, in seconds.
    ///
    /// # Errors
    /// It has ended.
    pub fn cpu_s(&self) -> Result<f64> {
        clock::cpu_s(self.pid()).with_context(|| format!("memleak has ended{}", self.running.last_words()))
    }

    /// All snapshots so far, oldest first.
    pub fn snapshots(&mut self) -> &[Snapshot] {
        self.snapshots.extend(self.running.arrived().filter_map(|line| Snapshot::parse(&line)));
        &self.snapshots
    }

    /// Waits for a snapshot that satisfies `wanted` and has not been seen yet.
    ///
    /// # Errors
    /// It does not come within `limit`.
    pub fn wait_for(&mut self, what: &str, limit: Duration, wanted: impl Fn(&Snapshot) -> bool) -> Result<Snapshot> {
        let snapshots = &mut self.snapshots;
        self.running.expect(what, limit, |line| {
            let snapshot = Snapshot::parse(line)?;
            snapshots.push(snapshot.clone());
            wanted(&snapshot).then_some(snapshot)
        })
    }

    /// Ends it as Ctrl-C does; returns how long that took, in seconds.
    ///
    /// # Errors
    /// It had ended before, does not end, or says that it could not run. Findings are no error.
    pub fn detach(mut self) -> Result<f64> {
        if !self.running.is_running() {
            bail!("memleak ended by itself{}", self.running.last_words());
        }
        let start = Instant::now();
        self.running.signal(libc::SIGINT);
        let status = self.running.finish()?;
        match status.code() {
            Some(0 | 1) => Ok(start.elapsed().as_secs_f64()),
            _ => bail!("memleak failed ({status}){}", self.running.last_words()),
        }
    }
}

/// The parts of a snapshot line (docs/json.md) that are of interest here.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// When its line arrived.
    pub arrived: Instant,
    /// Seconds since the collector started.
    pub time_s: f64,
    /// CPU time that tracing has cost the processes so far, by memleak's own estimate, in seconds.
    pub overhead_s: f64,
    /// How the numbers were obtained: `exact`, `estimated`, or `mixed` when processes differ.
    pub mode: String,
    /// Blocks outstanding, and sites.
    pub outstanding_count: u64,
    /// Number of sites.
    pub sites: u64,
    /// Events lost, of all kinds.
    pub losses: u64,
    /// CPU time that reading it cost memleak, in seconds; `None` when this memleak does not say.
    pub snapshot_cpu_s: Option<f64>,
    /// Calibrated price of a hit outside of memleak's programs, in nanoseconds; `None` when it does not say.
    pub trap_ns: Option<f64>,
}

impl Snapshot {
    /// Reads a line; `None` when it is not a snapshot.
    fn parse(line: &Line) -> Option<Self> {
        let value: Value = serde_json::from_str(&line.text).ok()?;
        if value["type"] != "snapshot" {
            return None;
        }
        let processes = value["processes"].as_array().map_or(&[][..], Vec::as_slice);
        let mut modes: Vec<_> = processes.iter().filter_map(|process| process["mode"].as_str()).collect();
        modes.sort_unstable();
        modes.dedup();
        Some(Snapshot {
            arrived: line.arrived,
            time_s: value["time_s"].as_f64()?,
            overhead_s: processes.iter().filter_map(|process| process["overhead_s"].as_f64()).sum(),
            mode: if modes.len() > 1 { "mixed" } else { modes.first().copied().unwrap_or_default() }.to_owned(),
            outstanding_count: value["totals"]["outstanding_count"].as_u64()?,
            sites: value["sites_total"].as_u64()?,
            losses: processes
                .iter()
                .filter_map(|process| process["losses"].as_object())
                .flat_map(|losses| losses.values().filter_map(Value::as_u64))
                .sum(),
            snapshot_cpu_s: value["own"]["snapshot_cpu_s"].as_f64(),
            trap_ns: value["calibration"]["trap_ns"].as_f64(),
        })
    }
}

/// The rate of memleak's own estimate in the snapshots that arrived between two instants: seconds of CPU time per second.
///
/// `None` when there are not two snapshots to compare.
pub fn estimated_overhead(snapshots: &[Snapshot], from: Instant, to: Instant) -> Option<f64> {
    let mut within = snapshots.iter().filter(|snapshot| (from..=to).contains(&snapshot.arrived));
    let first = within.next()?;
    let last = within.next_back()?;
    let passed_s = last.time_s - first.time_s;
    (passed_s > 0.0).then(|| (last.overhead_s - first.overhead_s) / passed_s)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Line {
        Line { arrived: Instant::now(), text: text.to_owned() }
    }

    const LINE: &str = r#"{"type":"snapshot","number":2,"time_s":1.5,"processes":[
        {"mode":"exact","overhead_s":0.25,"losses":{"a":1,"b":2}},
        {"mode":"estimated","overhead_s":0.5,"losses":{"a":4,"b":0}}],
        "totals":{"outstanding_count":7},"sites_total":3,"sites":[],"calibration":{"trap_ns":400.5}}"#;

    // The columns for estimate, mode and losses come from here.
    #[test]
    fn snapshot_sums_over_processes() {
        let snapshot = Snapshot::parse(&line(LINE)).unwrap();
        assert_eq!(snapshot.overhead_s, 0.75);
        assert_eq!(snapshot.mode, "mixed");
        assert_eq!((snapshot.outstanding_count, snapshot.sites, snapshot.losses), (7, 3, 7));
        assert_eq!((snapshot.snapshot_cpu_s, snapshot.trap_ns), (None, Some(400.5)));
        assert_eq!(Snapshot::parse(&line(r#"{"type":"alert","status":"firing"}"#)), None);
        assert_eq!(Snapshot::parse(&line("no JSON")), None);
    }

    // What was estimated before the phase began is not part of it.
    #[test]
    fn estimate_is_that_of_the_phase() {
        let start = Instant::now();
        let at = |seconds: u64, overhead_s: f64| Snapshot {
            arrived: start + Duration::from_secs(seconds),
            time_s: seconds as f64,
            overhead_s,
            ..Snapshot::parse(&line(LINE)).unwrap()
        };
        let snapshots = [at(0, 0.0), at(1, 5.0), at(2, 5.1), at(3, 5.2), at(4, 9.0)];
        let (from, to) = (start + Duration::from_millis(500), start + Duration::from_millis(3500));
        let rate = estimated_overhead(&snapshots, from, to).unwrap();
        assert!((rate - 0.1).abs() < 1e-9, "{rate}");
        assert_eq!(estimated_overhead(&snapshots[..2], from, to), None);
    }
}
