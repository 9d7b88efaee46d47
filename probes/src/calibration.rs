//! What one hit of a probe costs on this machine, now.
//!
//! The figure differs by a factor of thirty between machines and by two between hours, so it is measured, never
//! assumed: functions of our own are attached and tracked like any allocator's, and called.

use std::path::PathBuf;
use std::time::Instant;

use crate::spec::{FunctionSpec, Library, ProbeSetSpec, Returns, Role, SetKind, Size};
use crate::tracker::Tracker;
use crate::types::MAX_PROBE_SET;
use crate::{Result, own_code};

/// Pairs of an allocation and its free per round.
const PAIRS: u64 = 300;
/// The best of so many rounds counts: the others were disturbed.
const ROUNDS: u32 = 3;
/// Instance number that no real target has.
const NUMBER: u32 = u32::MAX;

/// Nanoseconds per hit (an entry or a return), averaged over pairs of an allocation and its free, everything included:
/// trap, stack, tables. Takes a few milliseconds.
pub(crate) fn measure(tracker: &mut Tracker) -> Result<f64> {
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
        ],
    };
    let at = [own_code::offset(own_code::allocate_address())?, own_code::offset(own_code::release_address())?];
    let library = Library { path: PathBuf::from("/proc/self/exe"), name: "memleak itself".into(), debug: None };
    tracker.add_target(std::process::id(), NUMBER, false)?;
    let result = tracker.attach_at(NUMBER, &set, &library, &at).and_then(|()| {
        let mut best = f64::INFINITY;
        for _ in 0..ROUNDS {
            let before = tracker.read_counters(NUMBER)?.hits;
            let start = Instant::now();
            for n in 0..PAIRS {
                own_code::release(own_code::allocate(n));
            }
            let elapsed_ns = start.elapsed().as_nanos() as f64;
            let hits = tracker.read_counters(NUMBER)?.hits - before;
            best = best.min(elapsed_ns / hits.max(1) as f64);
        }
        Ok(best)
    });
    tracker.forget(NUMBER)?;
    result
}
