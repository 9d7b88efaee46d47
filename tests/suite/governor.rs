//! The overhead budget: quiet programs are traced exactly, busy ones through windows, and no window outlasts its time.
//!
//! Nothing here measures speed, which other load on the machine would disturb; `make bench` does.

use std::time::{Duration, Instant};

use memleak_tests::{Counts, Feature, Memleak, Program, needs};

use crate::cli::library_code;

/// The default budget; the harness switches it off otherwise.
const BUDGET: [&str; 2] = ["--set", "collector.budget=5%"];

fn busy() -> Program {
    let mut program = Program::start("busy");
    program.step("done");
    program
}

// What most programs get: within the budget nothing is left out.
#[test]
fn quiet_program_is_traced_exactly_within_the_budget() {
    needs!(Feature::Bpf);
    let mut program = Program::start("leaker");
    let mut memleak = Memleak::watch_with(program.pid(), &BUDGET);
    for _ in 0..11 {
        program.step("done");
    }
    let snapshot = memleak.settled();
    assert_eq!(snapshot.process(program.pid()).mode, "exact");
    assert_eq!(snapshot.at("lose_some"), Counts::kept(77, 67));
}

// A program that cannot be traced exactly is not slowed down for it: windows show what survives, and churn is not in it.
#[test]
fn busy_program_is_watched_through_windows() {
    needs!(Feature::Bpf);
    let program = busy();
    let pid = program.pid();
    let mut memleak = Memleak::watch_with(pid, &BUDGET);
    let seen = memleak.wait_until("three windows that count", |snapshot| {
        let process = snapshot.processes.iter().find(|p| p.pid == pid && p.alive);
        process.is_some_and(|p| p.mode == "estimated" && p.windows - p.windows_discarded >= 4)
            && snapshot.at("lose_one").outstanding_count > 0
    });
    let process = seen.processes.iter().find(|p| p.pid == pid && p.alive).expect("it is watched");
    assert!(process.open_s < 0.2 * f64::from(u32::try_from(process.windows).expect("a few")) * 2.0, "{process:?}");
    let (lost, churned) = (seen.at("lose_one"), seen.at("churn"));
    // The newest window may still be open: then up to the whole ring is not freed yet.
    assert!(churned.outstanding_count <= 256, "{churned}");
    assert!(churned.allocated_count > 10 * lost.allocated_count, "{churned}; {lost}");
    assert_eq!(lost.freed_count, 0, "{lost}");
    assert_eq!(lost.allocated_bytes, 997 * lost.allocated_count);
    let losses: u64 = seen.processes.iter().flat_map(|p| p.losses.values()).sum();
    assert_eq!(losses, 0, "{:?}", seen.processes);
    // While no window is open, the program runs its own code.
    let deadline = Instant::now() + Duration::from_secs(20);
    while {
        let (mapped, file) = library_code(pid);
        mapped != file
    } {
        assert!(Instant::now() < deadline, "probes stay attached");
        std::thread::sleep(Duration::from_millis(20));
    }
}

// Exact numbers are worth more than estimates, so they come back when they are affordable.
#[test]
fn program_that_calms_down_is_traced_exactly_again() {
    needs!(Feature::Bpf);
    let mut program = busy();
    let pid = program.pid();
    let mut memleak = Memleak::watch_with(pid, &BUDGET);
    memleak.wait_for_message("watching through windows");
    program.go();
    memleak.wait_for_message("everything is traced from here on");
    let snapshot = memleak.settled();
    let process = snapshot.processes.iter().find(|p| p.pid == pid && p.alive).expect("it is watched");
    assert_eq!(process.mode, "exact");
}

// Somebody presses ctrl-z at the worst moment: the program must not stay slowed down until they come back.
#[test]
fn stopped_collector_leaves_no_window_open() {
    needs!(Feature::Bpf);
    let program = busy();
    let pid = program.pid();
    let memleak = Memleak::watch_with(pid, &["--set", "collector.budget=50%"]);
    memleak.wait_for_message("watching through windows");
    let attached = || {
        let (mapped, file) = library_code(pid);
        mapped != file
    };
    let wait = |what: &str, wanted: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !wanted() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    wait("no window is closed", &|| !attached());
    wait("no window is opened", &attached);
    memleak.signal(libc::SIGSTOP);
    wait("probes stay attached while the collector is stopped", &|| !attached());
    let stopped = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", memleak.pid())).expect("it is there");
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
    };
    wait("the collector was woken and does not stop again", &stopped);
    assert!(!attached());
    memleak.signal(libc::SIGCONT);
    memleak.wait_for_message("was stopped while a window was open");
    let outcome = memleak.stop();
    assert!(matches!(outcome.code, Some(0 | 1)), "{:?}: {}", outcome.code, outcome.stderr);
}
