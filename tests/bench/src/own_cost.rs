//! What memleak itself needs, with much to look after: a million blocks from ten thousand places, and a history that is full.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::clock;
use crate::memleak::{Memleak, Session};
use crate::process::Running;
use crate::workloads::compile;

const SITES_C: &str = include_str!("../programs/sites.c");

/// Blocks and sites of the program.
const BLOCKS: u64 = 1_000_000;
const SITES: u64 = 10_000;
/// Time between snapshots; what a watch over days would use.
const INTERVAL: Duration = Duration::from_secs(10);
/// How long the program may take to allocate everything while it is traced.
const FILL: Duration = Duration::from_secs(120);

/// By then every site has as many points as the history has room for.
const SNAPSHOTS_UNTIL_FULL: u32 = 45;

/// The figures.
#[derive(Debug, Serialize)]
pub struct OwnCost {
    /// Blocks outstanding and sites, as memleak counted them.
    pub outstanding_count: u64,
    /// Sites that it saw.
    pub sites: u64,
    /// Events lost, of all kinds.
    pub losses: u64,
    /// From start until everything was attached, in seconds.
    pub attach_s: f64,
    /// How long the program took to allocate it all while it was traced, in seconds.
    pub fill_s: f64,
    /// Time between snapshots, in seconds.
    pub interval_s: f64,
    /// Intervals that were measured.
    pub intervals: u64,
    /// CPU time that one interval cost memleak with everything that it does, in seconds.
    pub cpu_s_per_interval: f64,
    /// CPU time of one snapshot, as memleak says itself, in seconds; `None` when it does not say.
    pub snapshot_cpu_s: Option<f64>,
    /// CPU time of memleak in percent of one CPU.
    pub cpu_percent: f64,
    /// Resident memory of memleak at the end, in bytes.
    pub rss_bytes: u64,
    /// The most that it was, in bytes.
    pub peak_rss_bytes: u64,
    /// Kernel memory of its BPF maps, in bytes.
    pub bpf_map_bytes: u64,
    /// Resident memory once the history holds as many points as it may, in bytes.
    pub full_rss_bytes: u64,
}

/// Measures it over that many intervals.
///
/// # Errors
/// The program cannot be built, memleak cannot be run, or it does not see what there is.
pub fn measure(memleak: &Memleak, intervals: u64, folder: &Path) -> Result<OwnCost> {
    // Ten thousand functions: optimising them takes the compiler half a minute and makes no difference.
    let program = compile("sites", SITES_C, &["-O0"], folder)?;
    let (mut session, _target, fill_s) = watch(memleak, &program, INTERVAL, folder)?;
    let limit = INTERVAL * 3;
    // The first snapshot after that has all that is new in it: what follows is the rule.
    session.wait_for("another snapshot", limit, |_| true)?;
    let (from, cpu_before_s) = (Instant::now(), session.cpu_s()?);
    let mut last = None;
    let mut each_cpu_s = Vec::new();
    for _ in 0..intervals {
        let snapshot = session.wait_for("another snapshot", limit, |_| true)?;
        each_cpu_s.extend(snapshot.snapshot_cpu_s);
        last = Some(snapshot);
    }
    let (elapsed_s, cpu_s) = (from.elapsed().as_secs_f64(), session.cpu_s()? - cpu_before_s);
    let last = last.context("no interval was asked for")?;
    ensure!(last.sites >= SITES, "only {} of {SITES} sites were seen", last.sites);
    let gone = "memleak has ended";
    let own_cost = OwnCost {
        outstanding_count: last.outstanding_count,
        sites: last.sites,
        losses: last.losses,
        attach_s: session.attach_s,
        fill_s,
        interval_s: INTERVAL.as_secs_f64(),
        intervals,
        cpu_s_per_interval: cpu_s / intervals as f64,
        snapshot_cpu_s: (!each_cpu_s.is_empty()).then(|| each_cpu_s.iter().sum::<f64>() / each_cpu_s.len() as f64),
        cpu_percent: cpu_s / elapsed_s * 100.0,
        rss_bytes: clock::rss_bytes(session.pid()).context(gone)?,
        peak_rss_bytes: clock::peak_rss_bytes(session.pid()).context(gone)?,
        bpf_map_bytes: clock::bpf_map_bytes(session.pid()).context(gone)?,
        full_rss_bytes: 0,
    };
    session.detach()?;
    Ok(OwnCost { full_rss_bytes: with_full_history(memleak, &program, folder)?, ..own_cost })
}

/// Starts program and memleak; returns when a snapshot has all blocks. The last value is how long the program took to
/// allocate them, in seconds.
fn watch(memleak: &Memleak, program: &Path, interval: Duration, folder: &Path) -> Result<(Session, Running, f64)> {
    let mut target = Running::start(&mut Command::new(program), folder)?;
    target.expect("`ready`", FILL, |line| (line.text == "ready").then_some(()))?;
    // A budget would not let it trace a program that allocates as fast as it can.
    let interval = format!("interval={}ms", interval.as_millis());
    let mut session = memleak.attach(target.pid(), &[&interval, "collector.budget=off"], folder)?;
    let start = Instant::now();
    target.write("fill\n")?;
    target.expect("`did`", FILL, |line| line.text.starts_with("did ").then_some(()))?;
    let fill_s = start.elapsed().as_secs_f64();
    session.wait_for("a snapshot with all blocks", FILL, |snapshot| snapshot.outstanding_count * 100 >= BLOCKS * 99)?;
    Ok((session, target, fill_s))
}

/// Resident memory of memleak that has watched the program for so long that its history is full.
fn with_full_history(memleak: &Memleak, program: &Path, folder: &Path) -> Result<u64> {
    let interval = Duration::from_millis(500);
    let (mut session, _target, _) = watch(memleak, program, interval, folder)?;
    for _ in 0..SNAPSHOTS_UNTIL_FULL {
        session.wait_for("another snapshot", INTERVAL * 3, |_| true)?;
    }
    let rss_bytes = clock::rss_bytes(session.pid()).context("memleak has ended")?;
    session.detach()?;
    Ok(rss_bytes)
}
