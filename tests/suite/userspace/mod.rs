//! Exact accounting of processes: every byte, every block, at the function that allocated it.

mod allocators;
mod glibc;
mod lifecycle;
mod linkage;
mod mappings;
mod rust;
mod sampling;
mod targets;
mod threads;
mod tracepoints;
mod user_sets;

use memleak_tests::{Counts, Memleak, Program, Snapshot};

/// Runs a test program of one step under memleak and returns the settled snapshot, checked for a clean account.
fn account(program: &str, args: &[&str]) -> (Snapshot, u32) {
    let mut program = Program::start(program);
    let mut memleak = Memleak::watch_with(program.pid(), args);
    program.step("done");
    let snapshot = memleak.settled();
    assert_clean(&snapshot, program.pid());
    (snapshot, program.pid())
}

/// Exact mode, and nothing lost.
fn assert_clean(snapshot: &Snapshot, pid: u32) {
    let process = snapshot.process(pid);
    assert_eq!(process.mode, "exact");
    assert!(process.losses.values().all(|&n| n == 0), "losses: {:?}", process.losses);
}

/// One line of an account: where, through which allocator function, and how much.
struct Expected {
    at: &'static str,
    /// Name of the allocator function; with `|` between them the names that one function has.
    function: &'static str,
    counts: Counts,
}

/// Each line must be one site with exactly these numbers.
fn assert_sites(snapshot: &Snapshot, expected: &[Expected]) {
    for line in expected {
        let site = snapshot.site(line.at);
        assert_eq!(site.counts, line.counts, "counted at {}", line.at);
        let mut names = line.function.split('|');
        assert!(names.any(|name| name == site.function), "{} called by {}", site.function, line.at);
    }
}

/// `count` blocks of `size` bytes kept.
fn kept(at: &'static str, function: &'static str, count: u64, size: u64) -> Expected {
    Expected { at, function, counts: Counts::kept(count, size) }
}

/// `count` blocks of `size` bytes allocated and freed.
fn freed(at: &'static str, function: &'static str, count: u64, size: u64) -> Expected {
    Expected { at, function, counts: Counts::freed(count, size) }
}
