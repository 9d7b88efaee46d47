//! What is written must be what is read, whatever happens in between.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use super::*;
use crate::coverage::{Baseline, Coverage};
use crate::finding::Finding;
use crate::governor::StopReason;
use crate::history::{Bounds, History};
use crate::kernel::{CacheLine, KernelSample, KernelSummary, Origin};
use crate::labels::Labels;
use crate::reachability::roots::Root;
use crate::reachability::verdict::Tally;
use crate::reachability::{SiteVerdict, Verdict};
use crate::snapshot::{
    Cohort, FirstThread, LIFETIME_CLASSES, Losses, Mode, Process, ProcessSample, ReachStep, ReachWay, Sampling,
    SiteReach, SiteSample, Snapshot, StackCounts, StandardErrors,
};
use crate::symbolize::Frame;

/// A deterministic source of numbers.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % n
    }
}

/// A run with every feature that a recording must keep.
struct Run {
    numbers: Numbers,
    processes: Vec<Arc<Process>>,
    samples: Vec<SiteSample>,
    number: u64,
    stacks: u64,
}

impl Run {
    fn new(seed: u64) -> Run {
        Run { numbers: Numbers(seed), processes: Vec::new(), samples: Vec::new(), number: 0, stacks: 0 }
    }

    fn add_process(&mut self) {
        let instance = self.processes.len() as u32 + 1;
        self.processes.push(Arc::new(Process {
            instance,
            pid: 1000 + instance,
            start_ticks: u64::MAX - u64::from(instance),
            comm: format!("evil\0\u{1b}[31m{instance}"),
            exe: "/usr/bin/\u{202e}x".into(),
            cmdline: "a 'b' \"c\"".into(),
            labels: Labels { unit: Some("\u{1b}x.service".into()), ..Labels::default() },
        }));
    }

    fn add_site(&mut self, process: usize) {
        self.stacks += 1;
        let stack = self.stacks.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let process = Arc::clone(&self.processes[process]);
        let key = SiteKey { instance: process.instance, probe_set: 3, stack };
        let depth = self.numbers.below(5);
        let addresses: Vec<u64> = (0..depth).map(|i| 0x7fff_0000_0000 + stack % 977 + i * 16).collect();
        let frames = addresses.iter().flat_map(|a| {
            let frame = |function: &str, inlined| Frame {
                function: Some(function.into()),
                module: Some("/usr/lib/libx.so".into()),
                offset: a % 64,
                file: Some("x.c".into()),
                line: Some(7),
                inlined,
                reason: None,
                address: *a,
                build_id: Some("abcd".into()),
                file_address: Some(a % 4096),
            };
            [frame("inner", true), frame("outer", false)]
        });
        let site = Site {
            key,
            id: stack.rotate_left(7),
            process,
            probe_set: "glibc".into(),
            function: "malloc".into(),
            frames: if stack.is_multiple_of(3) { OnceLock::from(frames.collect::<Vec<_>>()) } else { OnceLock::new() },
            addresses,
            truncated: stack.is_multiple_of(5).then(|| "it ends early".into()),
            first_thread: stack
                .is_multiple_of(3)
                .then(|| FirstThread { tid: 100 + stack as u32, name: "worker \u{202e}".into() }),
        };
        self.samples.push(SiteSample {
            site: Arc::new(site),
            totals: Totals::default(),
            last_allocation_s: 0.0,
            cohorts: Vec::new(),
            lifetimes: [0; LIFETIME_CLASSES],
            reachability: None,
            kernel: None,
            stderr: StandardErrors::default(),
        });
    }

    /// The next snapshot: some sites change, some are new, at times a process ends.
    fn next(&mut self) -> Snapshot {
        self.number += 1;
        let time_s = self.number as f64 * 1.000_3;
        if self.number % 40 == 1 {
            self.add_process();
        }
        if self.number.is_multiple_of(3) {
            let process = self.processes.len() - 1;
            self.add_site(process);
        }
        for i in 0..self.samples.len() {
            if self.numbers.below(3) == 0 {
                self.change(i, time_s);
            } else if let Some(last) = self.samples[i].cohorts.last_mut()
                && last.start_s >= time_s - 10.0
            {
                last.end_s = time_s;
            }
        }
        // The process before the newest ends a while after that has begun.
        let ended = (self.number % 40 == 20 && self.processes.len() > 1).then(|| self.processes.len() as u32 - 1);
        let newest = self.processes.len() as u32;
        let alive_before = self.number % 40 < 20;
        let processes = (self.processes.iter())
            .filter(|p| p.instance == newest || Some(p.instance) == ended || (alive_before && p.instance + 1 == newest))
            .map(|p| ProcessSample {
                process: Arc::clone(p),
                alive: Some(p.instance) != ended,
                mode: [Mode::Exact, Mode::Estimated, Mode::Sampled][p.instance as usize % 3],
                sampling: p.instance.is_multiple_of(3).then_some(Sampling {
                    mean_bytes: 4096,
                    allocated_bytes: self.number << 12,
                    allocated_count: self.number,
                }),
                hits: self.number * 1000,
                unmatched_frees: self.number / 2,
                losses: Losses {
                    events_dropped: self.number / 50,
                    missed_returns: 3,
                    python_lost: 2,
                    ..Losses::default()
                },
                rss_bytes: (!self.number.is_multiple_of(7)).then_some(self.number << 20),
                cpu_s: (!self.number.is_multiple_of(5)).then_some(self.number as f64 * 0.01),
                overhead_s: self.number as f64 * 1e-4,
                budget: p.instance.is_multiple_of(2).then_some(0.03),
                windows: self.number,
                windows_discarded: self.number / 3,
                open_s: self.number as f64 * 0.2,
                stacks: StackCounts { taken: self.number, complete: self.number / 2, by_tables: alive_before },
                rss_anon_bytes: (!self.number.is_multiple_of(7)).then_some(self.number << 19),
                window_s: p.instance.is_multiple_of(2).then_some(0.2),
                hard_stops: self.number / 9,
                kernel: p.instance.is_multiple_of(2).then(|| {
                    let caches = vec![CacheLine { name: "dentry".into(), growth: -3, ..CacheLine::default() }];
                    let explained_share = Some(1.0 / 3.0);
                    Arc::new(KernelSummary {
                        missed_events: self.number / 4,
                        caches,
                        explained_share,
                        ..Default::default()
                    })
                }),
                stopped: self.number.is_multiple_of(9).then_some(StopReason::Slowdown),
                coverage: (!self.number.is_multiple_of(7)).then(|| {
                    let before = Baseline { resident_bytes: 9 << 20, heap_bytes: 4 << 20, regions: Vec::new() };
                    let outstanding = p.instance.is_multiple_of(2).then_some(self.number << 17);
                    Coverage::new(1.5, &before, self.number << 19, outstanding, 3 << 20)
                }),
            })
            .collect();
        let mut sites = self.samples.clone();
        sites.sort_by_key(|s| (std::cmp::Reverse(s.totals.outstanding_bytes()), s.site.key));
        if let Some(ended) = ended {
            self.samples.retain(|s| s.site.key.instance != ended);
        }
        let number = self.number;
        Snapshot { number, time_s, wall_s: 1e9 + time_s, processes, sites, collect_cpu_s: number as f64 * 1e-6 }
    }

    fn change(&mut self, i: usize, time_s: f64) {
        let (born, size) = (self.numbers.below(50), 16 + self.numbers.below(3) * 24);
        let died = self.numbers.below(born + 5).min(self.samples[i].totals.outstanding_count() + born);
        let odd = self.numbers.below(10) == 0;
        let n = &mut self.numbers;
        let sample = &mut self.samples[i];
        sample.totals.allocated_count += born;
        sample.totals.allocated_bytes += born * size;
        sample.totals.freed_count += died;
        sample.totals.freed_bytes = (sample.totals.freed_bytes + died * size).min(sample.totals.allocated_bytes);
        sample.last_allocation_s = if odd { time_s - 1e-7 } else { (time_s * 1e3).floor() / 1e3 };
        if born.is_multiple_of(4) {
            sample.stderr = StandardErrors { bytes: time_s * 7.1, count: time_s.sqrt() };
        }
        sample.lifetimes[n.below(32) as usize] += died / 2;
        sample.lifetimes[n.below(32) as usize] += died - died / 2 + u64::from(odd);
        match sample.cohorts.last_mut() {
            Some(last) if last.start_s >= time_s - 10.0 => {
                last.end_s = time_s;
                last.born_count += born;
                last.born_bytes += born * size;
                last.outstanding_count = last.outstanding_count.wrapping_add(born).wrapping_sub(died / 2);
            }
            _ => sample.cohorts.push(Cohort {
                start_s: (time_s / 10.0).floor() * 10.0,
                end_s: time_s,
                born_bytes: born * size,
                born_count: born,
                outstanding_bytes: born * size,
                outstanding_count: born,
            }),
        }
        if sample.cohorts.len() > 6 {
            sample.cohorts.remove(0);
        }
        if born.is_multiple_of(5) {
            sample.kernel = (born % 2 == 0).then(|| {
                let origin =
                    Origin { cache: Some(format!("kmalloc-{size}")), gfp: "\u{1b}x".into(), ..Origin::default() };
                Arc::new(KernelSample {
                    origin: Arc::new(origin),
                    unseen_frees: died,
                    unverifiable: (born % 4 == 0).then(|| "frees by RCU".into()),
                    cache_growth_bytes: (born % 3 == 0).then_some(-7 * born.cast_signed()),
                    reclaimable: odd,
                })
            });
        }
        if born.is_multiple_of(6) {
            sample.reachability = reach(n, time_s, &sample.site);
        }
        if let Some(first) = sample.cohorts.first_mut() {
            first.outstanding_count = first.outstanding_count.saturating_sub(died);
        }
    }
}

/// What a scan may say, the way over the site itself included; at times it takes everything back.
fn reach(numbers: &mut Numbers, time_s: f64, site: &Arc<Site>) -> Option<Arc<SiteReach>> {
    let mut tally = || Tally { blocks: numbers.below(9), bytes: numbers.below(9000) };
    let (lost, indirectly_lost, possible, reachable) = (tally(), tally(), tally(), tally());
    let counts = SiteVerdict {
        scans: 3,
        lost,
        indirectly_lost,
        possible,
        reachable,
        disguised: tally(),
        young: tally(),
        called_lost: lost.blocks * 7,
        refuted: lost.blocks / 2,
        still: lost.blocks == 3,
        gone: tally(),
        in_requests: lost.blocks,
        device_bytes: lost.bytes,
    };
    let verdict =
        [Verdict::Unknown, Verdict::Reachable, Verdict::Possible, Verdict::Definite][lost.blocks as usize % 4];
    let root = match possible.blocks % 3 {
        0 => Root::Global { module: "/bin/\u{1b}x".into(), name: Some("table".into()), offset: 8 },
        1 => Root::Stack { tid: None },
        _ => Root::Untracked { address: u64::MAX },
    };
    let steps = vec![ReachStep::Blocks(Arc::clone(site), 3), ReachStep::Skipped(7)];
    let way = (reachable.blocks > 2).then_some(ReachWay { root, steps });
    (possible.blocks != 8).then(|| Arc::new(SiteReach { verdict, counts, time_s, way }))
}

/// The same as text; sites on the way by their keys.
fn reach_text(reach: &SiteReach) -> String {
    let SiteReach { verdict, counts, time_s, way } = reach;
    let step = |s: &ReachStep| match s {
        ReachStep::Blocks(site, count) => format!("{:?} {count}", site.key),
        ReachStep::Skipped(count) => format!("{count} more"),
    };
    let way = way.as_ref().map(|w| (&w.root, w.steps.iter().map(step).collect::<Vec<_>>()));
    format!("{verdict:?} {counts:?} {time_s:?} {way:?}")
}

fn locate(site: &Site) -> Vec<Location> {
    let location = |a: &u64| Location {
        module: Some("/usr/lib/libx.so".into()),
        build_id: Some("abcd".into()),
        offset: a % 0x1000,
    };
    site.addresses.iter().map(location).collect()
}

fn create(limits: Limits) -> (tempfile::TempDir, PathBuf, Writer) {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("run.memleak");
    let run = RunInfo { title: "a <title>".into(), interval_s: 1.0, ..RunInfo::default() };
    let writer = Writer::create(&path, limits, &Host::this(), &run, "interval = \"1s\"\n").expect("recording");
    (dir, path, writer)
}

/// Everything of a snapshot as text, for comparison: floating-point numbers are printed so that they differ when a bit
/// differs.
fn text(snapshot: &Snapshot) -> String {
    let sites: Vec<_> = (snapshot.sites.iter())
        .map(|s| {
            format!(
                "{:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?}",
                s.site.key,
                s.site.first_thread,
                s.kernel,
                s.stderr,
                s.totals,
                s.last_allocation_s,
                s.cohorts,
                s.lifetimes,
                s.reachability.as_deref().map(reach_text)
            )
        })
        .collect();
    let head = (snapshot.number, snapshot.time_s, snapshot.wall_s, snapshot.collect_cpu_s);
    format!("{head:?} {:?}\n{}", snapshot.processes, sites.join("\n"))
}

fn write(limits: Limits, count: usize, seed: u64) -> (tempfile::TempDir, PathBuf, Vec<Snapshot>) {
    let (dir, path, mut writer) = create(limits);
    let mut run = Run::new(seed);
    let snapshots: Vec<Snapshot> = (0..count).map(|_| run.next()).collect();
    for snapshot in &snapshots {
        writer.push(&Step::new(snapshot), &mut locate).expect("stored");
    }
    writer.finish(None, &[]).expect("finished");
    (dir, path, snapshots)
}

/// The promise of the format: the same snapshots, to the last bit, with new sites, ended processes and odd numbers.
#[test]
fn snapshots_come_back_exactly() {
    for (seed, keyframe_every) in [(1, 60), (2, 1), (3, 7), (4, 1000)] {
        let (_dir, path, written) = write(Limits { keyframe_every, ..Limits::default() }, 130, seed);
        let reader = Reader::open(&path).expect("opens");
        let filter = Filter::default();
        let read: Vec<Snapshot> = reader.snapshots(&filter).map(|s| s.expect("reads")).collect();
        assert_eq!(read.len(), 130);
        for (a, b) in written.iter().zip(&read) {
            assert_eq!(text(a), text(b), "snapshot {} of seed {seed}", a.number);
        }
        assert!(reader.session().complete);
        assert_eq!(reader.session().run.title, "a <title>");
        assert_eq!(reader.session().settings, "interval = \"1s\"\n");
        assert_eq!(reader.session().host, Host::this());
    }
}

/// Everything that a history says, as text.
fn history_text(history: &History) -> String {
    let mut known: Vec<_> = history.sites().collect();
    known.sort_by_key(|h| h.site().key);
    let series: Vec<_> = known.iter().map(|h| (h.series.samples(), h.series.rise(), h.ended_s)).collect();
    let mut processes: Vec<_> = history.processes().cloned().collect();
    processes.sort_by_key(|p| p.process.instance);
    let sites = known.iter().map(|h| h.latest.clone()).collect();
    let latest = Snapshot { sites, processes, number: history.snapshots(), ..Snapshot::default() };
    format!("{} {series:?} {:?} {}", text(&latest), history.totals().samples(), history.time_s())
}

/// A history is made in three ways: by pushing every snapshot, as live; by replaying; and in one pass over the totals, also
/// of a part. All of them must say the same, with series that are thinned, sites that go, and processes that end.
#[test]
fn every_way_to_a_history_leads_to_the_same() {
    let bounds = Bounds { samples: 40, points: 900 };
    for (seed, keyframe_every) in [(21, 60), (22, 7), (23, 1000)] {
        let (_dir, path, written) = write(Limits { keyframe_every, ..Limits::default() }, 130, seed);
        let reader = Reader::open(&path).expect("opens");
        let (mut pushed, mut replayed) = (History::new(bounds), History::new(bounds));
        let mut replay = reader.replay().expect("begins");
        for snapshot in &written {
            pushed.push(snapshot);
            let info = replay.push(&mut replayed).expect("reads").expect("a snapshot");
            assert_eq!(info.number, snapshot.number);
            assert_eq!(history_text(&pushed), history_text(&replayed), "snapshot {} of seed {seed}", snapshot.number);
        }
        assert!(replay.push(&mut replayed).expect("reads").is_none());
        assert!(pushed.sites().any(|h| h.ended_s.is_some()) && pushed.sites().count() > pushed.live_sites().count());
        let part =
            Filter { since_s: Some(written[20].time_s), until_s: Some(written[100].time_s), ..Filter::default() };
        let process = Filter { pids: vec![1002], ..Filter::default() };
        let both = Filter { pids: vec![1001, 1002], ..part.clone() };
        for filter in [Filter::default(), part, process, both] {
            let mut pushed = History::new(bounds);
            reader.snapshots(&filter).for_each(|s| pushed.push(&s.expect("reads")));
            let passed = reader.history(bounds, &filter, &mut || {}).expect("reads");
            assert_eq!(history_text(&pushed), history_text(&passed), "{filter:?} of seed {seed}");
        }
    }
}

/// Sites come with the time of their first snapshot, once each.
#[test]
fn sites_have_the_time_at_which_they_were_first_seen() {
    let (_dir, path, written) = write(Limits { keyframe_every: 9, ..Limits::default() }, 60, 24);
    let reader = Reader::open(&path).expect("opens");
    let seen: Vec<_> = reader.first_seen().expect("reads").into_iter().map(|(site, at)| (site.key, at)).collect();
    let mut expected: Vec<(SiteKey, f64)> = Vec::new();
    for snapshot in &written {
        for sample in &snapshot.sites {
            if expected.iter().all(|(key, _)| *key != sample.site.key) {
                expected.push((sample.site.key, snapshot.time_s));
            }
        }
    }
    assert_eq!(seen.len(), expected.len());
    assert!(expected.iter().all(|e| seen.contains(e)) && seen.windows(2).all(|w| w[0].1 <= w[1].1), "{seen:?}");
}

/// A reader that begins in the middle must see the same as one that begins at the start.
#[test]
fn a_part_is_read_as_in_the_whole() {
    let (_dir, path, written) = write(Limits { keyframe_every: 16, ..Limits::default() }, 100, 5);
    let reader = Reader::open(&path).expect("opens");
    let filter = Filter { since_s: Some(written[37].time_s), until_s: Some(written[52].time_s), ..Filter::default() };
    let read: Vec<Snapshot> = reader.snapshots(&filter).map(|s| s.expect("reads")).collect();
    assert_eq!(read.len(), 16);
    for (a, b) in written[37..].iter().zip(&read) {
        assert_eq!(text(a), text(b));
    }
    let filter = Filter { pids: vec![1001], ..Filter::default() };
    let read: Vec<Snapshot> = reader.snapshots(&filter).map(|s| s.expect("reads")).collect();
    assert!(read.iter().flat_map(|s| &s.sites).all(|s| s.site.process.pid == 1001));
    assert!(read.iter().flat_map(|s| &s.processes).all(|p| p.process.pid == 1001));
    assert!(read.iter().any(|s| !s.sites.is_empty()));
    let filter = Filter { probe_sets: vec!["jemalloc".into()], ..Filter::default() };
    assert!(reader.snapshots(&filter).all(|s| s.expect("reads").sites.is_empty()));
}

/// Stacks keep where they lie always and their names when they had any, also inlined ones.
#[test]
fn stacks_keep_locations_and_names() {
    let (_dir, path, written) = write(Limits::default(), 60, 6);
    let reader = Reader::open(&path).expect("opens");
    let mut named = 0;
    for sample in &written[59].sites {
        let site = reader.site(sample.site.key).expect("recorded");
        let original = &sample.site;
        assert_eq!(
            (site.id, &site.addresses, &site.truncated),
            (original.id, &original.addresses, &original.truncated)
        );
        assert_eq!((&*site.probe_set, &*site.function), ("glibc", "malloc"));
        assert_eq!(site.process, original.process);
        assert_eq!(reader.locations(site).expect("locations"), locate(original));
        reader.name(site).expect("names");
        if let Some(frames) = original.frames.get() {
            named += 1;
            assert_eq!(site.frames(), frames);
        } else {
            assert_eq!(site.frames().len(), site.addresses.len());
        }
    }
    assert!(named > 3, "{named}");
}

/// Names found later, at the end of a run, belong into the recording as well.
#[test]
fn names_can_come_later() {
    let (_dir, path, mut writer) = create(Limits::default());
    let mut run = Run::new(7);
    let snapshot = (0..12).map(|_| run.next()).last().expect("snapshot");
    writer.push(&Step::new(&snapshot), &mut |_| Vec::new()).expect("stored");
    let site = &snapshot.sites.iter().find(|s| s.site.frames.get().is_none()).expect("unnamed").site;
    assert!(writer.lacks_name(site));
    let frame = Frame { function: Some("late".into()), address: 99, ..Frame::default() };
    site.frames.set(vec![frame.clone()]).expect("empty");
    writer.name([site].into_iter()).expect("stored");
    assert!(!writer.lacks_name(site));
    writer.finish(None, &[]).expect("finished");
    let reader = Reader::open(&path).expect("opens");
    let read = reader.site(site.key).expect("recorded");
    reader.name(read).expect("names");
    assert_eq!(read.frames(), [frame]);
    assert_eq!(reader.locations(read).expect("locations"), []);
}

/// When a finding began, paused and got worse is what people tune rules by.
#[test]
fn findings_are_kept_with_their_history() {
    let (_dir, path, mut writer) = create(Limits::default());
    let mut run = Run::new(8);
    let site = (0..5).map(|_| run.next()).last().expect("snapshot").sites[0].site.clone();
    for step in 1..=10_u64 {
        let snapshot = run.next();
        let finding = |severity, reason: String| Finding {
            id: "00ab".into(),
            rule: "growth".into(),
            severity,
            confidence: step as f64 / 10.0,
            reason,
            site: Arc::clone(&site),
        };
        let findings = match step {
            2..=4 => vec![finding(Severity::Warning, format!("step {step}"))],
            5 => vec![finding(Severity::Critical, format!("step {step}"))],
            8.. => vec![finding(Severity::Warning, format!("step {step}"))],
            _ => Vec::new(),
        };
        writer.push(&Step { findings: &findings, ..Step::new(&snapshot) }, &mut locate).expect("stored");
    }
    let spans = |path: &PathBuf| -> Vec<(Severity, u64, u64, bool, String)> {
        let spans = Reader::open(path).expect("opens").findings().expect("reads");
        spans.into_iter().map(|s| (s.severity, s.first_snapshot, s.last_snapshot, s.standing, s.reason)).collect()
    };
    let first = [
        (Severity::Warning, 7, 9, false, "step 4".to_owned()),
        (Severity::Critical, 10, 10, false, "step 5".to_owned()),
    ];
    assert_eq!(spans(&path), [&first[..], &[(Severity::Warning, 13, 15, true, "step 8".to_owned())]].concat());
    writer.finish(None, &[]).expect("finished");
    assert_eq!(spans(&path), [&first[..], &[(Severity::Warning, 13, 15, true, "step 10".to_owned())]].concat());
}

/// A reader of a run that goes on sees everything that was pushed, and needs nothing from the writer.
#[test]
fn a_recording_can_be_read_while_it_is_written() {
    let (_dir, path, mut writer) = create(Limits::default());
    assert_eq!(Reader::open(&path).expect("opens").contents().len(), 0);
    let mut run = Run::new(9);
    for n in 1..=20 {
        let snapshot = run.next();
        writer.event(Event {
            time_s: 1.0,
            wall_s: 2.0,
            kind: EventKind::Attach,
            instance: Some(1),
            text: "x\0".into(),
        });
        writer.push(&Step::new(&snapshot), &mut locate).expect("stored");
        let reader = Reader::open(&path).expect("opens");
        assert_eq!(reader.contents().len(), n);
        assert!(!reader.session().complete);
        let last = reader.snapshots(&Filter::default()).last().expect("snapshot").expect("reads");
        assert_eq!(text(&last), text(&snapshot));
        let attached = reader.events().expect("events").iter().filter(|e| e.kind == EventKind::Attach).count();
        assert_eq!(attached, n);
    }
}

/// The file must not grow beyond its bound, keep both ends, and what is left must be what was there.
#[test]
fn thinning_keeps_the_size_the_ends_and_the_truth() {
    let limits = Limits { max_size: 700 << 10, keyframe_every: 16 };
    let (_dir, path, written) = write(limits, 1500, 10);
    let size = std::fs::metadata(&path).expect("file").len();
    assert!(size <= limits.max_size, "{size}");
    let reader = Reader::open(&path).expect("opens");
    let filter = Filter::default();
    let read: Vec<Snapshot> = reader.snapshots(&filter).map(|s| s.expect("reads")).collect();
    assert_eq!(reader.session().thinned, 1500 - read.len() as u64);
    assert!((100..1200).contains(&read.len()), "{}", read.len());
    for snapshot in &read {
        assert_eq!(text(snapshot), text(&written[snapshot.number as usize - 1]));
    }
    assert_eq!((read[0].number, read[read.len() - 1].number), (1, 1500));
    // The newest sixteen are all there, and gaps grow with age.
    assert_eq!(read[read.len() - 16].number, 1485);
    let gaps: Vec<u64> = read.windows(2).map(|w| w[1].number - w[0].number).collect();
    let mean = |g: &[u64]| g.iter().sum::<u64>() as f64 / g.len() as f64;
    assert!(mean(&gaps[..gaps.len() / 4]) > 2.0 * mean(&gaps[gaps.len() * 3 / 4..]), "{gaps:?}");
    // Every end of a process is still told.
    let ends = |s: &[Snapshot]| s.iter().flat_map(|s| &s.processes).filter(|p| !p.alive).count();
    assert_eq!(ends(&read), ends(&written));
}

/// A recording is as private as a report, and no second writer, link or folder may get in the way.
#[test]
fn the_file_is_private_and_nobody_elses() {
    let (dir, path, mut writer) = create(Limits::default());
    writer.push(&Step::new(&Run::new(11).next()), &mut locate).expect("stored");
    for file in std::fs::read_dir(dir.path()).expect("folder") {
        let meta = file.expect("entry").metadata().expect("file");
        assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    }
    let again = |path: &std::path::Path| {
        let result = Writer::create(path, Limits::default(), &Host::this(), &RunInfo::default(), "");
        format!("{:#}", result.err().expect("refused"))
    };
    assert!(again(&path).contains("another memleak is writing it"), "{}", again(&path));
    writer.finish(None, &[]).expect("finished");
    assert_eq!(std::fs::read_dir(dir.path()).expect("folder").count(), 1);
    assert!(again(&path).contains("remove it or choose another name"), "{}", again(&path));
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), &link).expect("link");
    assert!(again(&link).contains("a symbolic link of that name"), "{}", again(&link));
    assert!(again(dir.path()).contains("it is a folder"), "{}", again(dir.path()));
    assert!(again(&dir.path().join("no/x")).contains("does not exist"), "{}", again(&dir.path().join("no/x")));
    std::fs::write(dir.path().join("y-wal"), "planted").expect("file");
    assert!(again(&dir.path().join("y")).contains("-wal at its end"), "{}", again(&dir.path().join("y")));
    assert!(!dir.path().join("y").exists());
}

/// Whatever is wrong with a file, the message says what and names it.
#[test]
fn what_is_no_recording_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("folder");
    let message = |name: &str| format!("{:#}", Reader::open(&dir.path().join(name)).err().expect("refused"));
    assert!(message("missing").contains("missing: No such file"), "{}", message("missing"));
    std::fs::write(dir.path().join("empty"), "").expect("file");
    assert!(message("empty").contains("it is empty"), "{}", message("empty"));
    std::fs::write(dir.path().join("text"), "hello, world\n".repeat(1000)).expect("file");
    assert!(message("text").contains("not a recording"), "{}", message("text"));
    assert!(message(".").contains("it is a folder"), "{}", message("."));
    let other = rusqlite::Connection::open(dir.path().join("other")).expect("database");
    other.execute_batch("CREATE TABLE t (x)").expect("table");
    assert!(message("other").contains("not a recording of memleak"), "{}", message("other"));
    let (_keep, path, _) = write(Limits::default(), 3, 12);
    let newer = rusqlite::Connection::open(&path).expect("database");
    newer.pragma_update(None, "user_version", VERSION + 1).expect("version");
    let text = format!("{:#}", Reader::open(&path).err().expect("refused"));
    assert!(text.contains("written by a newer memleak (format 3;"), "{text}");
}

/// Recordings of format 1 do not know threads; everything else in them is read, and they stay what they are.
#[test]
fn an_older_format_is_read_and_left_as_it_is() {
    let (_dir, path, written) = write(Limits::default(), 30, 18);
    let db = rusqlite::Connection::open(&path).expect("database");
    db.execute_batch(&format!(
        "DELETE FROM session WHERE key = '{}'; ALTER TABLE sites DROP COLUMN first_tid; \
         ALTER TABLE sites DROP COLUMN first_thread; PRAGMA user_version = 1",
        digest::KEY
    ))
    .expect("as it was");
    drop(db);
    let before = std::fs::read(&path).expect("file");
    let reader = Reader::open(&path).expect("opens");
    assert_eq!((VERSION, reader.session().format), (2, 1));
    assert!(written[29].sites.iter().any(|s| s.site.first_thread.is_some()));
    assert!(reader.sites().count() > 5 && reader.sites().all(|s| s.first_thread.is_none()));
    let filter = Filter::default();
    let read: Vec<Snapshot> = reader.snapshots(&filter).map(|s| s.expect("reads")).collect();
    assert_eq!(read.len(), 30);
    for (a, b) in written.iter().zip(&read) {
        assert_eq!((a.totals(), a.sites.len()), (b.totals(), b.sites.len()), "snapshot {}", a.number);
    }
    assert_eq!(before, std::fs::read(&path).expect("file"), "reading changes nothing");
}

/// Reads everything that a recording has; what it says, or the error.
fn read_all(path: &std::path::Path) -> crate::Result<String> {
    let reader = Reader::open(path)?;
    let mut all = String::new();
    for snapshot in reader.snapshots(&Filter::default()) {
        all.push_str(&text(&snapshot?));
    }
    for site in reader.sites() {
        reader.name(site)?;
        all.push_str(&format!("{site:?} {:?}", reader.locations(site)?));
    }
    let session = reader.session();
    let head = (session.format, &session.settings, &session.host, session.complete, session.thinned);
    all.push_str(&format!("{:?} {:?} {:?} {head:?}", reader.findings()?, reader.alerts()?, reader.events()?));
    Ok(all)
}

/// A damaged file is an error, never a panic, and never another truth: samples carry checksums, and so does the rest
/// once a run has ended in order. Flipped bits in places that say nothing (free pages) change nothing.
#[test]
fn truncated_and_flipped_files_never_panic_and_never_lie() {
    let (dir, path, _) = write(Limits { keyframe_every: 5, ..Limits::default() }, 24, 13);
    let whole = std::fs::read(&path).expect("file");
    let said = read_all(&path).expect("reads");
    let damaged = dir.path().join("damaged");
    let mut noticed = 0;
    for end in (0..whole.len()).step_by(whole.len() / 40) {
        std::fs::write(&damaged, &whole[..end]).expect("file");
        noticed += usize::from(read_all(&damaged).is_err());
    }
    assert!(noticed >= 39, "{noticed}");
    let mut numbers = Numbers(14);
    let mut noticed = 0;
    for _ in 0..400 {
        let mut bytes = whole.clone();
        let bit = numbers.below(bytes.len() as u64 * 8) as usize;
        bytes[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&damaged, &bytes).expect("file");
        match read_all(&damaged) {
            Ok(again) => assert!(again == said, "bit {bit}"),
            Err(_) => noticed += 1,
        }
    }
    assert!(noticed > 40, "{noticed}");
}

/// What somebody has changed in an ended recording is noticed, also where SQLite sees nothing wrong.
#[test]
fn a_changed_recording_is_refused() {
    for change in [
        "UPDATE frames SET function = 'inner2'",
        "UPDATE processes SET pid = 1 WHERE instance = 1",
        "DELETE FROM sites WHERE id = (SELECT max(id) FROM sites)",
        "UPDATE session SET value = 'interval = \"2s\"' WHERE key = 'settings'",
    ] {
        let (_dir, path, _) = write(Limits::default(), 30, 15);
        rusqlite::Connection::open(&path).expect("database").execute_batch(change).expect("changed");
        let text = format!("{:#}", Reader::open(&path).err().unwrap_or_else(|| panic!("{change} was not noticed")));
        assert!(text.contains("it is not what it was when its run ended"), "{change}: {text}");
    }
}

/// A killed writer leaves its newest snapshots beside the recording: with that file nothing is missing, without it the
/// reader says so, and it never makes files of its own.
#[test]
fn a_broken_off_recording_is_read_with_and_without_its_wal() {
    let (dir, path, mut writer) = create(Limits::default());
    let mut run = Run::new(16);
    let snapshots: Vec<Snapshot> = (0..8).map(|_| run.next()).collect();
    for snapshot in &snapshots {
        writer.push(&Step::new(snapshot), &mut locate).expect("stored");
    }
    // What a kill would leave, as the writer goes on.
    let left = tempfile::tempdir().expect("folder");
    let copy = |suffix: &str| {
        let name = format!("run.memleak{suffix}");
        std::fs::copy(dir.path().join(&name), left.path().join(&name)).expect("copied");
    };
    copy("");
    copy("-wal");
    let path_left = left.path().join("run.memleak");
    let reader = Reader::open(&path_left).expect("opens");
    assert_eq!((reader.contents().len(), reader.session().lacks_wal, reader.session().complete), (8, false, false));
    drop(reader);
    for name in ["run.memleak-wal", "run.memleak-shm"] {
        let _ = std::fs::remove_file(left.path().join(name));
    }
    let reader = Reader::open(&path_left).expect("opens");
    assert_eq!((reader.contents().len(), reader.session().lacks_wal), (0, true));
    assert_eq!(std::fs::read_dir(left.path()).expect("folder").count(), 1);
    writer.finish(None, &[]).expect("finished");
    let reader = Reader::open(&path).expect("opens");
    assert_eq!((reader.contents().len(), reader.session().lacks_wal), (8, false));
}

/// The ways on which sites lie are stored with their names, although these sites may have nothing outstanding.
#[test]
fn a_way_over_a_site_that_is_in_no_snapshot_comes_back() {
    let (_dir, path, mut writer) = create(Limits::default());
    let mut run = Run::new(17);
    let mut snapshot = (0..9).map(|_| run.next()).last().expect("snapshot");
    let between = snapshot.sites.pop().expect("a site").site;
    let function = Some("dict_expand".to_owned());
    let address = between.addresses.first().copied().unwrap_or(1);
    let _ = between.frames.set(vec![Frame { function, address, ..Frame::default() }]);
    let root = Root::Global { module: "/srv/app".into(), name: Some("table".into()), offset: 0 };
    let way = ReachWay { root, steps: vec![ReachStep::Blocks(Arc::clone(&between), 3)] };
    let said = way.describe();
    let counts = SiteVerdict { scans: 3, ..SiteVerdict::default() };
    let reach = SiteReach { verdict: Verdict::Reachable, counts, time_s: 1.0, way: Some(way) };
    snapshot.sites[0].reachability = Some(Arc::new(reach));
    writer.push(&Step::new(&snapshot), &mut locate).expect("stored");
    writer.finish(None, &[]).expect("finished");
    let reader = Reader::open(&path).expect("opens");
    let read = reader.snapshots(&Filter::default()).next().expect("snapshot").expect("reads");
    let reach = read.sites[0].reachability.as_ref().expect("a verdict");
    assert_eq!(reach.way.as_ref().map(ReachWay::describe), Some(said));
}
