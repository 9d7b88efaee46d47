//! What hits of probes cost on this machine, now.
//!
//! The figures differ by a factor of thirty between machines and by two between hours, so they are measured, never
//! assumed: functions of our own are attached and tracked like any allocator's, and called.

use std::path::PathBuf;
use std::time::Instant;

use crate::reader::Counters;
use crate::spec::{FunctionSpec, Library, ProbeSetSpec, Returns, Role, SetKind, Size};
use crate::tracker::Tracker;
use crate::types::MAX_PROBE_SET;
use crate::{Result, own_code};

/// Pairs of an allocation and its free per round.
const PAIRS: u64 = 300;
/// Pairs whose free is single-stepped: each can cost 30 times as much.
const STEPPED_PAIRS: u64 = 60;
/// The best of so many rounds counts: the others were disturbed.
const ROUNDS: u32 = 3;
/// Instance number that no real target has.
const NUMBER: u32 = u32::MAX;

/// What hits cost the target, everything included: trap, stack, tables.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prices {
    /// Nanoseconds of one hit (an entry or a return) whose instruction the kernel emulates.
    pub hit_ns: f64,
    /// Nanoseconds that a hit costs more when the kernel single-steps the instruction.
    pub stepped_ns: f64,
}

impl Prices {
    /// CPU seconds that these hits have cost.
    pub fn cost_s(&self, counters: &Counters) -> f64 {
        (counters.hits as f64 * self.hit_ns + counters.hits_stepped as f64 * self.stepped_ns) / 1e9
    }
}

/// Measures the prices, averaged over pairs of an allocation and its free. Takes a few milliseconds.
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
    tracker.add_target(std::process::id(), NUMBER, false)?;
    let result = tracker.attach_at(NUMBER, &set, &library, &at).and_then(|()| {
        let (pair_ns, hits) = time_pairs(tracker, PAIRS, own_code::release)?;
        let (stepped_ns, _) = time_pairs(tracker, STEPPED_PAIRS, own_code::release_stepped)?;
        Ok(Prices { hit_ns: pair_ns / hits, stepped_ns: (stepped_ns - pair_ns).max(0.0) })
    });
    tracker.forget(NUMBER)?;
    result
}

/// Nanoseconds of an allocation and its free, and the number of hits in them.
fn time_pairs(tracker: &Tracker, pairs: u64, release: fn(u64)) -> Result<(f64, f64)> {
    let mut best = (f64::INFINITY, 1.0);
    for _ in 0..ROUNDS {
        let before = tracker.read_counters(NUMBER)?.hits;
        let start = Instant::now();
        for n in 0..pairs {
            release(own_code::allocate(n));
        }
        let pair_ns = start.elapsed().as_nanos() as f64 / pairs as f64;
        let hits = tracker.read_counters(NUMBER)?.hits - before;
        if pair_ns < best.0 {
            best = (pair_ns, (hits as f64 / pairs as f64).max(1.0));
        }
    }
    Ok(best)
}
