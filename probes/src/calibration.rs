//! What hits of probes cost on this machine, now.
//!
//! The figures differ by a factor of thirty between machines and by two between hours, so they are measured, never
//! assumed: functions of our own are attached and tracked like any allocator's, and called.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::reader::Counters;
use crate::spec::{FunctionSpec, Library, ProbeSetSpec, Returns, Role, SetKind, Size};
use crate::tracker::Tracker;
use crate::types::MAX_PROBE_SET;
use crate::{Error, ErrorKind, Result, own_code};

/// The programs time one in so many of their runs; each stands for so many then.
pub(crate) const TIMED_ONE_IN: u32 = 16;
/// Pairs of an allocation and its free per round.
const PAIRS: u64 = 300;
/// Pairs whose free is single-stepped: each can cost 30 times as much.
const STEPPED_PAIRS: u64 = 60;
/// The best of so many rounds counts: the others were disturbed.
const ROUNDS: u32 = 3;
/// Pairs after a pause, and the pause. It is longer than METER_COLD_NS, and long enough for the CPU to do something else.
const COLD_PAIRS: u64 = 7;
const PAUSE: Duration = Duration::from_millis(1);
/// Pairs with other work before and behind. It takes more than METER_COOL_NS and less than METER_COLD_NS, and touches so many
/// bytes.
const COOL_PAIRS: u64 = 61;
const WORK_BYTES: usize = 128 << 10;
/// Instance number that no real target has.
const NUMBER: u32 = u32::MAX;

/// What hits cost the target: traps by these prices, and the time in the programs as they measure it themselves. That time
/// has in it what differs from target to target, such as the depth of stacks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prices {
    /// Nanoseconds of one hit (an entry or a return) whose instruction the kernel emulates, everything included, with a short
    /// stack.
    pub hit_ns: f64,
    /// Of these, nanoseconds that are spent outside of the programs.
    pub trap_ns: f64,
    /// Nanoseconds that a trap costs more when the program has done something else since the last one, what that takes longer
    /// for it included: both throw the other out of the CPU's nearest caches.
    pub cool_ns: f64,
    /// Nanoseconds that a trap costs more after a pause, when the CPU's caches hold nothing of it any more.
    pub cold_ns: f64,
    /// Nanoseconds that a hit costs more when the kernel single-steps the instruction.
    pub stepped_ns: f64,
}

impl Prices {
    /// CPU seconds that these hits have cost.
    pub fn cost_s(&self, counters: &Counters) -> f64 {
        let traps_ns = counters.hits as f64 * self.trap_ns
            + counters.hits_cool as f64 * self.cool_ns
            + counters.hits_cold as f64 * self.cold_ns
            + counters.hits_stepped as f64 * self.stepped_ns;
        (traps_ns + counters.timed_ns as f64 * f64::from(TIMED_ONE_IN)) / 1e9
    }
}

/// Measures the prices, averaged over pairs of an allocation and its free. Takes some 30 ms, most of it asleep.
///
/// # Errors
/// The kernel refuses, or it attaches and does not tell of all calls.
pub(crate) fn measure(tracker: &mut Tracker) -> Result<Prices> {
    let function = |symbol: &str, role, block_arg| FunctionSpec {
        symbol: symbol.into(),
        role,
        size: Size::Argument { arg: 0, times: None },
        block_arg,
        returns: Returns::Value { failed: 0 },
        range: false,
        optional: false,
    };
    let set = ProbeSetSpec {
        kind: SetKind::Functions,
        number: MAX_PROBE_SET,
        name: "calibration".into(),
        domain: "memory".into(),
        prefixes: vec![String::new()],
        functions: vec![
            function("memleak_own_allocate", Role::Alloc, None),
            function("memleak_own_release", Role::Free, Some(0)),
            function("memleak_own_release_stepped", Role::Free, Some(0)),
        ],
    };
    let at = [
        (own_code::offset(own_code::allocate_address())?, true),
        (own_code::offset(own_code::release_address())?, true),
        (own_code::offset(own_code::release_stepped_address())?, false),
    ];
    let library = Library { path: PathBuf::from("/proc/self/exe"), name: "memleak itself".into(), debug: None };
    let alone = own_code::alone();
    tracker.add_target(std::process::id(), NUMBER, false)?;
    let work = OtherWork::new();
    let result = tracker.attach_at(NUMBER, &set, &library, &at).and_then(|()| {
        let pair = time_pairs(tracker, PAIRS, own_code::release)?;
        check_all_seen(&tracker.read_counters(NUMBER)?)?;
        let stepped = time_pairs(tracker, STEPPED_PAIRS, own_code::release_stepped)?;
        let cool_ns = single_pairs(tracker, COOL_PAIRS, || work.run(), || work.run())?;
        let cold_ns = single_pairs(tracker, COLD_PAIRS, || std::thread::sleep(PAUSE), || ())?;
        let trap_ns = (pair.all_ns - pair.programs_ns).max(0.0) / pair.hits;
        // Of the hits of such a pair the first one is cool, or cold.
        let more = |traps_ns: f64| (traps_ns - pair.hits * trap_ns).max(0.0);
        Ok(Prices {
            hit_ns: pair.all_ns / pair.hits,
            trap_ns,
            cool_ns: more(cool_ns),
            cold_ns: more(cold_ns),
            stepped_ns: (stepped.all_ns - pair.all_ns).max(0.0),
        })
    });
    let probes = tracker.take_links(NUMBER);
    // To take probes off takes 30 to 50 ms, in which nobody calls these functions any more.
    let take_off = move || drop((probes, alone));
    if let Err(e) = std::thread::Builder::new().name("detach".into()).spawn(take_off) {
        tracing::debug!("no thread to detach from our own functions, which was done at once: {e}");
    }
    tracker.forget(NUMBER)?;
    result
}

/// Calibration proves that this way to attach works, too.
fn check_all_seen(counters: &Counters) -> Result<()> {
    let pairs = PAIRS * u64::from(ROUNDS);
    // Entry, return and free; with sampling, the return of an allocation that is not recorded may be left out.
    if (2 * pairs + 1..=3 * pairs).contains(&counters.hits) {
        return Ok(());
    }
    let what = format!("probes attach, but {pairs} calls of two functions of our own made {} hits", counters.hits);
    Err(Error::new(ErrorKind::Kernel, what))
}

/// What an allocation with its free took.
#[derive(Clone, Copy)]
struct Pair {
    /// Nanoseconds of all.
    all_ns: f64,
    /// Of them in the programs; all are timed here.
    programs_ns: f64,
    /// Number of hits, at least 1.
    hits: f64,
}

impl Pair {
    /// From what `pairs` of them took.
    fn of(all_ns: f64, pairs: u64, before: &Counters, after: &Counters) -> Self {
        let each = |total: u64| total as f64 / pairs as f64;
        Pair {
            all_ns,
            programs_ns: each(after.timed_ns - before.timed_ns),
            hits: each(after.hits - before.hits).max(1.0),
        }
    }
}

/// Pairs one after the other: the best round.
fn time_pairs(tracker: &Tracker, pairs: u64, release: fn(u64)) -> Result<Pair> {
    let mut best: Option<Pair> = None;
    for _ in 0..ROUNDS {
        let before = tracker.read_counters(NUMBER)?;
        let start = Instant::now();
        for n in 0..pairs {
            release(own_code::allocate(n));
        }
        let all_ns = start.elapsed().as_nanos() as f64 / pairs as f64;
        let pair = Pair::of(all_ns, pairs, &before, &tracker.read_counters(NUMBER)?);
        best = best.filter(|best| best.all_ns <= pair.all_ns).or(Some(pair));
    }
    Ok(best.unwrap_or(Pair { all_ns: 0.0, programs_ns: 0.0, hits: 1.0 }))
}

/// What programs do between allocations: some data, and some of the kernel's code.
struct OtherWork {
    data: Vec<u8>,
    file: Option<File>,
}

impl OtherWork {
    fn new() -> Self {
        OtherWork { data: vec![1; WORK_BYTES], file: File::open("/proc/self/stat").ok() }
    }

    fn run(&self) {
        black_box(self.data.iter().step_by(64).fold(0_u8, |sum, byte| sum ^ black_box(*byte)));
        let mut text = [0; 512];
        // What it says, and whether it says anything, is of no interest.
        let _ = self.file.as_ref().map(|file| file.read_at(&mut text, 0));
    }
}

/// What the traps of single pairs cost, nanoseconds: each comes after something else, is timed together with what is behind, and
/// compared to the same without it. The median, because some are disturbed by whatever else the machine does.
fn single_pairs(tracker: &Tracker, pairs: u64, before: impl Fn(), behind: impl Fn()) -> Result<f64> {
    let timed = |pair: &dyn Fn()| {
        before();
        let start = Instant::now();
        pair();
        behind();
        start.elapsed().as_nanos() as f64
    };
    let mut traps_ns = Vec::new();
    for n in 0..pairs {
        let bare_ns = timed(&|| ());
        let counters = tracker.read_counters(NUMBER)?;
        let all_ns = timed(&|| own_code::release(own_code::allocate(n)));
        let pair = Pair::of(all_ns, 1, &counters, &tracker.read_counters(NUMBER)?);
        traps_ns.push(pair.all_ns - pair.programs_ns - bare_ns);
    }
    traps_ns.sort_by(f64::total_cmp);
    Ok(traps_ns[traps_ns.len() / 2])
}
