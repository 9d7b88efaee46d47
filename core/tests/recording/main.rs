//! A recording survives the end of its writer at any moment: killed two hundred times, whatever it was doing.
//!
//! The writer is this program again: the test that is ignored, told by the environment where to write. What it has
//! stored it notes in a second file, eight bytes per snapshot, which is what the recording is held against.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use memleak_core::output::report::RunInfo;
use memleak_core::recording::{Filter, Host, Limits, Reader, Step, Writer};
use memleak_core::snapshot::{
    LIFETIME_CLASSES, Process, ProcessSample, Site, SiteKey, SiteSample, Snapshot, StandardErrors, Totals,
};

/// Where the writer writes.
const FOLDER: &str = "MEMLEAK_TEST_RECORDING";
const KILLS: usize = 200;
const SITES: u64 = 300;
/// Small, so that thinning and checkpoints are killed too.
const LIMITS: Limits = Limits { max_size: 1 << 20, keyframe_every: 8 };

fn sites() -> Vec<Arc<Site>> {
    let process = Arc::new(Process { instance: 1, pid: 4711, comm: "app".into(), ..Process::default() });
    let site = |stack| Site {
        key: SiteKey { instance: 1, probe_set: 1, stack },
        id: stack,
        process: Arc::clone(&process),
        probe_set: "glibc".into(),
        function: "malloc".into(),
        addresses: vec![stack, stack + 1],
        truncated: None,
        first_thread: None,
        frames: OnceLock::new(),
    };
    (1..=SITES).map(|stack| Arc::new(site(stack))).collect()
}

/// The `number`th snapshot: what it says follows from its number, so that a reader can check it. Sites come and change.
fn snapshot(number: u64, sites: &[Arc<Site>]) -> Snapshot {
    let time_s = number as f64;
    let process = Arc::clone(&sites[0].process);
    let seen = sites.len().min(10 + number as usize);
    let sample = |site: &Arc<Site>| {
        let born = number.wrapping_mul(site.id).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        SiteSample {
            site: Arc::clone(site),
            totals: Totals {
                allocated_bytes: born * site.id,
                allocated_count: born,
                freed_bytes: born / 2 * site.id,
                freed_count: born / 2,
            },
            stderr: StandardErrors::default(),
            last_allocation_s: time_s,
            cohorts: Vec::new(),
            lifetimes: [born; LIFETIME_CLASSES],
            reachability: None,
            kernel: None,
        }
    };
    Snapshot {
        number,
        time_s,
        wall_s: 1e9 + time_s,
        processes: vec![ProcessSample { process, alive: true, hits: number, ..Default::default() }],
        sites: sites[..seen].iter().map(sample).collect(),
        collect_cpu_s: 0.0,
    }
}

/// The writer: stores as fast as it can until it is killed.
#[test]
#[ignore = "the other half of the test that kills it"]
fn writer() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let folder = Path::new(&folder);
    let sites = sites();
    let mut stored = File::create(folder.join("stored")).expect("a file");
    let path = folder.join("run.memleak");
    let mut writer = Writer::create(&path, LIMITS, &Host::default(), &RunInfo::default(), "").expect("a recording");
    for number in 1..=1_000_000_u64 {
        writer.push(&Step::new(&snapshot(number, &sites)), &mut |_| Vec::new()).expect("stored");
        stored.write_all(&number.to_le_bytes()).expect("noted");
    }
}

/// How many snapshots the writer says that it has stored.
fn stored(folder: &Path) -> u64 {
    fs::metadata(folder.join("stored")).map_or(0, |m| m.len() / 8)
}

/// Issue: at kill -9 at most the last interval may be missing, and the file must open.
#[test]
fn a_writer_killed_at_any_moment_loses_at_most_the_last_snapshot() {
    let sites = sites();
    let (mut most, mut thinned, mut last) = (0, 0, 0);
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for kill in 0..KILLS {
        let folder = tempfile::tempdir().expect("a folder");
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "writer", "--ignored", "--nocapture", "--test-threads=1"])
            .env(FOLDER, folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("the writer starts");
        let begun = Instant::now();
        while stored(folder.path()) == 0 {
            assert!(begun.elapsed() < Duration::from_secs(60), "nothing was stored");
            std::thread::sleep(Duration::from_millis(1));
        }
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Mostly short, some long enough for the file to be thinned.
        let longest_us = if kill % 20 == 0 { 1_500_000 } else { 60_000 };
        std::thread::sleep(Duration::from_micros(state % longest_us));
        child.kill().expect("killed");
        child.wait().expect("it has ended");

        let known = stored(folder.path());
        let reader = Reader::open(&folder.path().join("run.memleak")).expect("it opens");
        let contents = reader.contents();
        let newest = contents.last().expect("a snapshot").number;
        assert!(newest == known || newest == known + 1, "{newest} in the file, {known} stored");
        let gaps = contents.windows(2).map(|w| w[1].number - w[0].number - 1).sum::<u64>() + contents[0].number - 1;
        assert_eq!(gaps, reader.session().thinned, "only thinning takes snapshots out");
        let mut read = 0;
        for (got, info) in reader.snapshots(&Filter::default()).zip(contents) {
            let got = got.expect("reads");
            let expected = snapshot(info.number, &sites);
            assert_eq!((got.number, got.totals()), (info.number, expected.totals()));
            assert_eq!(got.sites.len(), expected.sites.len());
            read += 1;
        }
        assert_eq!(read, contents.len());
        assert!(!reader.session().complete);
        (most, last) = (most.max(newest), last + u64::from(newest == known));
        thinned += u64::from(reader.session().thinned > 0);
    }
    println!("{KILLS} kills: at most {most} snapshots, {thinned} thinned, {last} without a snapshot under way");
    assert!(thinned > 0, "thinning was never killed");
}
