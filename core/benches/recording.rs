//! Recordings at full size: `cargo bench -p memleak --bench recording`.
//!
//! Writes a day of a large process (10,000 sites, a snapshot every 10 s: 8,640), then makes its report and replays it
//! through all rules, each in a process of its own, so that its memory is its own. The bars: recording 1 % of a core,
//! report 5 s, 500 MB and a page below 5 MB, replay 60 s; a day of 2,000 sites in 200 MB.
//!
//! `-- --sites N --snapshots N` makes it smaller, `--busy` makes every site change in every snapshot, which is the most
//! that there can be to write; `--day` writes the day of 2,000 sites only; `--parts` says where the time of a replay goes. Times are CPU time, which other work on the machine changes less than the clock.

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use memleak_core::config::Config;
use memleak_core::history::History;
use memleak_core::output::report::RunInfo;
use memleak_core::recorded;
use memleak_core::recording::{Filter, Host, Limits, Location, Settings, Step, Writer};
use memleak_core::rules::RuleEngine;
use memleak_core::snapshot::{
    Cohort, LIFETIME_CLASSES, Process, ProcessSample, Site, SiteKey, SiteSample, Snapshot, StandardErrors, Totals,
};
use memleak_core::symbolize::Frame;

const INTERVAL_S: f64 = 10.0;
/// Snapshots that a cohort lasts, and cohorts of a site.
const COHORT: u64 = 60;
const COHORTS: usize = 12;
const DEPTH: u64 = 14;
const FUNCTIONS: u64 = 5_000;

/// What a site does.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// 1 of 500: grows for ever.
    Leak,
    /// 20 of 100: allocates and frees all the time.
    Busy,
    /// 30 of 100: does so in one snapshot of ten.
    Seldom,
    /// The rest: what it made at start-up stays.
    Idle,
}

struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// A large process over time.
struct Heap {
    numbers: Numbers,
    kinds: Vec<(Kind, u64, u64)>,
    samples: Vec<SiteSample>,
    process: Arc<Process>,
}

impl Heap {
    fn new(sites: u64, busy: bool) -> Heap {
        let process = Arc::new(Process { instance: 1, pid: 4711, comm: "shop".into(), ..Process::default() });
        let mut numbers = Numbers(0x2545_f491_4f6c_dd1d);
        let (mut kinds, mut samples) = (Vec::new(), Vec::new());
        for i in 0..sites {
            let kind = match i % 500 {
                0 => Kind::Leak,
                _ if busy => Kind::Busy,
                n if n % 10 < 2 => Kind::Busy,
                n if n % 10 < 5 => Kind::Seldom,
                _ => Kind::Idle,
            };
            let size = 16 << numbers.below(8);
            // 97 of 100 sites hold 16 B to 64 KiB, the others up to 16 MiB; evenly by order of magnitude.
            let exponent = if i % 33 == 7 { 16 + numbers.below(8) } else { 4 + numbers.below(12) };
            let held = ((1_u64 << exponent) / size).max(1);
            kinds.push((kind, size, held));
            samples.push(sample(&process, i, &mut numbers, Totals::default()));
        }
        Heap { numbers, kinds, samples, process }
    }

    fn snapshot(&mut self, number: u64) -> Snapshot {
        let time_s = number as f64 * INTERVAL_S;
        let start_s = (number / COHORT * COHORT) as f64 * INTERVAL_S;
        for (sample, (kind, size, held)) in self.samples.iter_mut().zip(&self.kinds) {
            let n = &mut self.numbers;
            let first = sample.totals.allocated_count == 0;
            let (born, died) = match kind {
                _ if first => (*held, 0),
                Kind::Leak => (20 + n.below(20), n.below(10)),
                Kind::Busy => churn(n, sample, *held),
                Kind::Seldom if n.below(10) == 0 => churn(n, sample, *held),
                Kind::Seldom | Kind::Idle => continue,
            };
            change(sample, (born, died), *size, time_s, start_s);
        }
        let mut sites = self.samples.clone();
        sites.sort_by_key(|s| (std::cmp::Reverse(s.totals.outstanding_bytes()), s.site.key));
        let process = ProcessSample {
            process: Arc::clone(&self.process),
            alive: true,
            hits: number * 1_000_003,
            rss_bytes: Some((1 << 30) + number * 4096 * (number % 7)),
            rss_anon_bytes: Some((1 << 29) + number * 4096 * (number % 5)),
            cpu_s: Some(number as f64 * 3.01),
            overhead_s: number as f64 * 0.011,
            ..ProcessSample::default()
        };
        Snapshot { number, time_s, wall_s: 1.7e9 + time_s, processes: vec![process], sites, collect_cpu_s: 0.01 }
    }
}

/// Births and deaths that keep a site near what it holds.
fn churn(n: &mut Numbers, sample: &SiteSample, held: u64) -> (u64, u64) {
    let born = 1 + n.below(200);
    let now = sample.totals.outstanding_count() + born;
    let wanted = held - held / 8 + n.below(held / 4 + 2);
    (born, now.saturating_sub(wanted))
}

fn change(sample: &mut SiteSample, (born, died): (u64, u64), size: u64, time_s: f64, start_s: f64) {
    let totals = &mut sample.totals;
    totals.allocated_count += born;
    totals.allocated_bytes += born * size;
    totals.freed_count += died;
    totals.freed_bytes += died * size;
    sample.last_allocation_s = (time_s * 1e3 - 7.0).round() / 1e3;
    sample.lifetimes[12] += died / 3;
    sample.lifetimes[14] += died - died / 3;
    if sample.cohorts.last().is_none_or(|c| c.start_s < start_s) {
        if let Some(last) = sample.cohorts.last_mut() {
            last.end_s = start_s;
        }
        sample.cohorts.push(Cohort { start_s, ..Cohort::default() });
        if sample.cohorts.len() > COHORTS {
            let old = sample.cohorts.remove(0);
            let first = &mut sample.cohorts[0];
            first.start_s = old.start_s;
            first.born_count += old.born_count;
            first.born_bytes += old.born_bytes;
            first.outstanding_count += old.outstanding_count;
            first.outstanding_bytes += old.outstanding_bytes;
        }
    }
    if let Some(last) = sample.cohorts.last_mut() {
        last.end_s = time_s;
        last.born_count += born;
        last.born_bytes += born * size;
        last.outstanding_count += born;
        last.outstanding_bytes += born * size;
    }
    // The youngest die first.
    let mut left = died;
    for cohort in sample.cohorts.iter_mut().rev() {
        let gone = left.min(cohort.outstanding_count);
        cohort.outstanding_count -= gone;
        cohort.outstanding_bytes -= gone * size;
        left -= gone;
    }
}

fn sample(process: &Arc<Process>, i: u64, numbers: &mut Numbers, totals: Totals) -> SiteSample {
    let functions: Vec<u64> = (0..DEPTH).map(|d| if d > 9 { d } else { numbers.below(FUNCTIONS) }).collect();
    let frames = (functions.iter())
        .map(|f| Frame {
            function: Some(format!("shop::module_{}::function_{f}(Request const&)", f % 97)),
            module: Some("/srv/shop/bin/shop".into()),
            offset: f % 512,
            file: Some(format!("src/module_{}.cc", f % 97)),
            line: Some((f % 900) as u32),
            address: 0x5555_0000_0000 + f * 512,
            build_id: Some("4f3a9c0de1b2a3948576aabbccddeeff00112233".into()),
            file_address: Some(f * 512),
            ..Frame::default()
        })
        .collect::<Vec<_>>();
    let site = Site {
        key: SiteKey { instance: 1, probe_set: 1, stack: (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) },
        id: (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15),
        process: Arc::clone(process),
        probe_set: "glibc".into(),
        function: "malloc".into(),
        addresses: frames.iter().map(|f| f.address).collect(),
        truncated: None,
        first_thread: None,
        frames: OnceLock::from(frames),
    };
    SiteSample {
        site: Arc::new(site),
        totals,
        stderr: StandardErrors::default(),
        last_allocation_s: 0.0,
        cohorts: Vec::new(),
        lifetimes: [0; LIFETIME_CLASSES],
        reachability: None,
        kernel: None,
    }
}

fn locate(site: &Site) -> Vec<Location> {
    let build_id = "4f3a9c0de1b2a3948576aabbccddeeff00112233";
    let location = |a: &u64| Location {
        module: Some("/srv/shop/bin/shop".into()),
        build_id: Some(build_id.into()),
        offset: a & 0xffff_ffff,
    };
    site.addresses.iter().map(location).collect()
}

/// Writes a recording; prints what that took.
fn write(path: &Path, sites: u64, snapshots: u64, busy: bool, max_size: u64) {
    let settings = Settings::of(&Config::default()).to_text();
    let run = RunInfo { title: "shop".into(), interval_s: INTERVAL_S, ..RunInfo::default() };
    let limits = Limits { max_size, ..Limits::default() };
    let mut writer = Writer::create(path, limits, &Host::this(), &run, &settings).expect("a recording");
    let mut heap = Heap::new(sites, busy);
    let (mut all, mut first, mut most) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    for number in 1..=snapshots {
        let snapshot = heap.snapshot(number);
        let step = Step { run: Some(&run), ..Step::new(&snapshot) };
        let start = cpu(libc::CLOCK_THREAD_CPUTIME_ID);
        writer.push(&step, &mut locate).expect("stored");
        let took = cpu(libc::CLOCK_THREAD_CPUTIME_ID) - start;
        all += took;
        if number == 1 { first = took } else { most = most.max(took) }
    }
    let start = cpu(libc::CLOCK_THREAD_CPUTIME_ID);
    writer.finish(Some(&run), &[]).expect("finished");
    let end = cpu(libc::CLOCK_THREAD_CPUTIME_ID) - start;
    let mean_ms = ms(all) / snapshots as f64;
    let size = std::fs::metadata(path).expect("the file").len();
    let reader = memleak_core::recording::Reader::open(path).expect("opens");
    let mix = if busy { "every site changes every time" } else { "the mix" };
    println!(
        "write {sites} sites x {snapshots}, {mix}: {mean_ms:.2} ms CPU per snapshot ({:.3} % of a core at {INTERVAL_S} s), the first \
         {:.0} ms, the longest other {:.0} ms, the end {:.0} ms; {:.1} MB, {} snapshots thinned",
        mean_ms / (INTERVAL_S * 10.0),
        ms(first),
        ms(most),
        ms(end),
        size as f64 / 1e6,
        reader.session().thinned
    );
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// CPU time used so far, by a clock of the C library.
fn cpu(clock: libc::clockid_t) -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec that outlives the call.
    let result = unsafe { libc::clock_gettime(clock, &raw mut now) };
    assert_eq!(result, 0, "the clock exists on every Linux");
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

/// The other half of [`apart`]: does one thing to a recording and says what it took.
fn alone(what: &str, path: &Path) {
    let begun = Instant::now();
    let page = path.with_extension("html");
    match what {
        "parts" => parts(path),
        "report" => recorded::report(path, &page, &Filter::default(), &[], None).expect("a report"),
        _ => {
            let options = recorded::Options { recording: path.to_owned(), json: true, ..Default::default() };
            recorded::replay(&options).expect("a replay");
        }
    }
    let status = std::fs::read_to_string("/proc/self/status").expect("a process");
    let peak = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap_or_default();
    let size = std::fs::metadata(&page).map_or(0.0, |m| m.len() as f64 / 1e6);
    let page = if what == "report" { format!("; a page of {size:.2} MB") } else { String::new() };
    eprintln!(
        "{what}: {:.1} s CPU, {:.1} s by the clock, {}{page}",
        cpu(libc::CLOCK_PROCESS_CPUTIME_ID).as_secs_f64(),
        begun.elapsed().as_secs_f64(),
        peak.split_whitespace().collect::<Vec<_>>().join(" ")
    );
}

/// Where the time of a replay goes.
fn parts(path: &Path) {
    let reader = memleak_core::recording::Reader::open(path).expect("a recording");
    let config = Config::default();
    let mut rules = RuleEngine::new(&config.rules).expect("the rules");
    let mut history = History::new(config.history);
    let (mut reading, mut judging, mut findings) = (Duration::ZERO, Duration::ZERO, 0);
    let mut replay = reader.replay().expect("a recording");
    let now = || cpu(libc::CLOCK_THREAD_CPUTIME_ID);
    loop {
        let start = now();
        if replay.push(&mut history).expect("reads").is_none() {
            break;
        }
        let read = now();
        findings += rules.evaluate(&history, &mut |_| {}).findings.len();
        reading += read - start;
        judging += now() - read;
    }
    let count = history.snapshots() as f64;
    let (reading, judging) = (ms(reading) / count, ms(judging) / count);
    eprintln!("per snapshot: {reading:.2} ms to read it, {judging:.2} ms for the rules; {findings} findings in all");
}

fn apart(what: &str, path: &Path) {
    let program = std::env::current_exe().expect("this program");
    let status = Command::new(program).args(["--alone", what]).arg(path).stdout(std::process::Stdio::null()).status();
    assert!(status.expect("starts").success(), "{what} failed");
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, what, path] = args.as_slice()
        && flag == "--alone"
    {
        return alone(what, Path::new(path));
    }
    let value = |name: &str, default: u64| {
        let at = args.iter().position(|a| a == name);
        at.and_then(|at| args.get(at + 1)).map_or(default, |v| v.parse().expect("a number"))
    };
    let (sites, snapshots) = (value("--sites", 10_000), value("--snapshots", 8_640));
    let busy = args.iter().any(|a| a == "--busy");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("large.memleak");
    let has = |name: &str| args.iter().any(|a| a == name);
    if !has("--day") {
        // Without a bound that matters: nothing is thinned.
        write(&path, sites, snapshots, busy, value("--max-mib", 16 << 10) << 20);
        apart("report", &path);
        apart(if has("--parts") { "parts" } else { "replay" }, &path);
    }
    let day = folder.path().join("day.memleak");
    write(&day, sites / 5, snapshots, busy, 200_000_000);
}
