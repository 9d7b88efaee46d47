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

/// True while probes are in the C library's code of a process.
fn is_attached(pid: u32) -> bool {
    let (mapped, file) = library_code(pid);
    mapped != file
}

// A process that must not be disturbed and one that may be at any price, in one run.
#[test]
fn targets_have_budgets_of_their_own() {
    needs!(Feature::Bpf);
    let (spared, free) = (busy(), busy());
    let folder = tempfile::tempdir().expect("a folder can be made");
    let config = folder.path().join("two.toml");
    let text = format!(
        "[[target]]\npid = {}\nbudget = \"2%\"\nlatency = \"sensitive\"\n[[target]]\npid = {}\nbudget = \"off\"\n",
        spared.pid(),
        free.pid()
    );
    std::fs::write(&config, text).expect("a file can be written");
    let mut memleak =
        Memleak::start(&["--config", config.to_str().expect("a plain name"), "--set", "collector.budget=5%"]);
    let seen = memleak.wait_until("three windows", |snapshot| {
        snapshot.processes.iter().any(|p| p.pid == spared.pid() && p.alive && p.windows >= 3)
    });
    let of = |pid| seen.processes.iter().rev().find(|p| p.pid == pid && p.alive).expect("it is watched");
    assert_eq!((of(spared.pid()).mode.as_str(), of(free.pid()).mode.as_str()), ("estimated", "exact"));
    // 50 ms each, and what a busy machine adds; the usual ones take four times as long.
    let windows = of(spared.pid());
    let longest = 0.12 * f64::from(u32::try_from(windows.windows).expect("a few"));
    assert!(windows.open_s < longest, "{windows:?}");
    memleak.signal(libc::SIGUSR1);
    memleak.wait_for_message("report written to");
    let report = std::fs::read_to_string(memleak.folder().join("memleak-report.html")).expect("it was written");
    assert!(report.contains("through windows of at most 50ms") && report.contains("verdicts are weaker"), "{report}");
}

// The budget is one promise, the cap on the slow-down the other: where the first would allow more, the second holds.
#[test]
fn slow_down_beyond_the_cap_stops_all_tracing_for_a_while() {
    needs!(Feature::Bpf);
    let mut program = Program::start("jump");
    let pid = program.pid();
    // So much is in the purse that half a second of full tracing would be paid for.
    let settings = ["budget=50%", "budget_floor=50%", "total_budget=100%"].map(|s| format!("--set=collector.{s}"));
    let mut memleak = Memleak::watch_with(pid, &settings);
    std::thread::sleep(Duration::from_secs(2));
    assert!(is_attached(pid), "traced exactly before");
    program.go();
    memleak.wait_for_message("all tracing stopped for 10s, because tracing took more of its time than max_slowdown");
    let stopped = Instant::now();
    let seen = memleak.wait_until("a snapshot that says so", |s| s.process(pid).stopped.is_some());
    assert_eq!(seen.process(pid).stopped.as_deref(), Some("slowdown"));
    assert_eq!((seen.process(pid).hard_stops, seen.process(pid).mode.as_str()), (1, "estimated"));
    while stopped.elapsed() < Duration::from_secs(8) {
        assert!(!is_attached(pid), "attached in the cool-down");
        std::thread::sleep(Duration::from_millis(50));
    }
    let seen = memleak.wait_until("a window after the cool-down", |s| s.process(pid).windows > 0);
    assert_eq!(seen.process(pid).stopped, None);
    assert!(stopped.elapsed() > Duration::from_millis(9_500), "{:?}", stopped.elapsed());
}

// A collector that got no CPU time has not seen what tracing did meanwhile, and may get none again.
#[test]
fn starved_collector_stops_tracing_what_it_could_not_watch_over() {
    needs!(Feature::Bpf);
    let mut program = Program::start("jump");
    let pid = program.pid();
    let memleak = Memleak::watch_with(pid, &BUDGET);
    assert!(is_attached(pid), "traced exactly before");
    // Stopped, as if others took all of the machine.
    memleak.signal(libc::SIGSTOP);
    program.go();
    std::thread::sleep(Duration::from_secs(3));
    memleak.signal(libc::SIGCONT);
    memleak.wait_for_message("all tracing stopped for 10s, because ");
    assert!(!is_attached(pid));
}

/// CPU time of a process with one thread.
fn cpu_time(pid: u32) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).expect("it runs");
    Duration::from_nanos(text.split(' ').next().and_then(|ns| ns.parse().ok()).expect("a number"))
}

// The bar is two seconds back to the budget; nobody should wait that long. On a busy machine both get less CPU time, and then the
// program's own counts.
#[test]
fn jump_of_the_rate_ends_exact_tracing_within_two_seconds() {
    needs!(Feature::Bpf);
    let mut program = Program::start("jump");
    let pid = program.pid();
    let memleak = Memleak::watch_with(pid, &BUDGET);
    std::thread::sleep(Duration::from_secs(1));
    assert!(is_attached(pid), "traced exactly before");
    let (jumped, before) = (Instant::now(), cpu_time(pid));
    program.go();
    memleak.wait_for_message("watching through windows");
    while is_attached(pid) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let (elapsed, used) = (jumped.elapsed(), cpu_time(pid) - before);
    assert!(elapsed.min(used * 2) < Duration::from_secs(2), "{elapsed:?}, CPU time of the program {used:?}");
}

/// True while somebody has stopped the collector.
fn is_stopped(memleak: &Memleak) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", memleak.pid())).expect("it is there");
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
}

// Somebody presses ctrl-z at the worst moment: the program must not stay slowed down until they come back.
#[test]
fn stopped_collector_leaves_no_window_open() {
    needs!(Feature::Bpf);
    let program = busy();
    let pid = program.pid();
    let memleak = Memleak::watch_with(pid, &["--set", "collector.budget=50%"]);
    memleak.wait_for_message("watching through windows");
    let attached = || is_attached(pid);
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
    wait("the collector was woken and does not stop again", &|| is_stopped(&memleak));
    assert!(!attached());
    memleak.signal(libc::SIGCONT);
    memleak.wait_for_message("was stopped while a window was open");
    let outcome = memleak.stop();
    assert!(matches!(outcome.code, Some(0 | 1)), "{:?}: {}", outcome.code, outcome.stderr);
}

// Somebody presses ctrl-z and forgets: a program that is quiet now may not be for ever.
#[test]
fn stopped_collector_gives_up_a_target_that_becomes_too_busy() {
    needs!(Feature::Bpf);
    let mut program = Program::start("jump");
    let pid = program.pid();
    let memleak = Memleak::watch_with(pid, &BUDGET);
    assert!(is_attached(pid), "traced exactly before");
    memleak.signal(libc::SIGSTOP);
    // Longer than the watchdog waits: looking at a quiet program changes nothing.
    std::thread::sleep(Duration::from_secs(3));
    assert!(is_attached(pid), "exact numbers are kept");
    program.go();
    let deadline = Instant::now() + Duration::from_secs(20);
    while is_attached(pid) || !is_stopped(&memleak) {
        assert!(Instant::now() < deadline, "probes stay attached while the collector is stopped");
        std::thread::sleep(Duration::from_millis(20));
    }
    memleak.signal(libc::SIGCONT);
    memleak.wait_for_message("all tracing stopped for 10s, because ");
}

// The hardest end: nobody is left to close the window, and often it strikes in the middle of attaching, where the kernel does not
// clean up. The next memleak must find nothing in its way either.
#[test]
fn killed_collector_leaves_no_window_open() {
    needs!(Feature::Bpf);
    let program = busy();
    let pid = program.pid();
    let wait = |what: &str, wanted: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !wanted() {
            assert!(Instant::now() < deadline, "{what}");
            std::hint::spin_loop();
        }
    };
    for _ in 0..5 {
        let memleak = Memleak::watch_with(pid, &["--set", "collector.budget=50%"]);
        memleak.wait_for_message("watching through windows");
        wait("no window is closed", &|| !is_attached(pid));
        wait("no window is opened", &|| is_attached(pid));
        memleak.signal(libc::SIGKILL);
        let killed = Instant::now();
        wait("probes stay attached", &|| !is_attached(pid));
        // The bar is a second, on a machine that does nothing else; `make bench-bars` measures it. Beside other tests it took 3.9 s.
        assert!(killed.elapsed() < Duration::from_secs(10), "{:?}", killed.elapsed());
    }
}

/// Nanoseconds of CPU time per pair, as the child of `fork_busy` prints it: the smallest of `times` lines.
fn pair_ns(program: &mut Program, times: usize) -> u64 {
    let line = |program: &mut Program| loop {
        // A child that is just being replaced may have said something before its end.
        if let Some(ns) = program.next_line().strip_prefix("pair ") {
            return ns.parse::<u64>().expect("a number");
        }
    };
    (0..times).map(|_| line(program)).min().expect("at least one")
}

// A child inherits the breakpoints of its traced parent; nobody counts its calls, so it must not pay for them.
#[test]
fn forked_child_that_nobody_watches_is_released() {
    needs!(Feature::Bpf);
    let (bare, first, released) = forked_child("auto");
    assert!(first > 3 * bare, "the child was never slow ({first} ns, {bare} ns bare): this test shows nothing");
    assert!(released * 2 <= bare * 3, "{bare} ns bare, {first} ns at first, {released} ns after a second");
}

// With perf events it is the kernel that takes the breakpoints out, at the first hit of each.
#[test]
fn forked_child_is_released_by_perf_events() {
    needs!(Feature::Bpf);
    let (bare, first, released) = forked_child("perf");
    assert!(released * 2 <= bare * 3, "{bare} ns bare, {first} ns at first, {released} ns after a second");
}

/// Nanoseconds per pair of a child of a traced program: before anybody traces, just after the fork, and a second later.
fn forked_child(backend: &str) -> (u64, u64, u64) {
    let mut program = Program::start("fork_busy");
    program.go();
    program.next_line();
    let bare = pair_ns(&mut program, 5);
    // Everything is traced, whatever it costs.
    let memleak = Memleak::watch_with(program.pid(), &["--set", &format!("collector.backend={backend}")]);
    assert!(is_attached(program.pid()));
    program.go();
    while !program.next_line().starts_with("child ") {}
    let first = pair_ns(&mut program, 1);
    std::thread::sleep(Duration::from_secs(1));
    // What was printed meanwhile comes first.
    pair_ns(&mut program, 5);
    let released = pair_ns(&mut program, 5);
    assert!(is_attached(program.pid()), "the parent is still traced");
    assert!(!memleak.stderr().contains("child"), "{}", memleak.stderr());
    (bare, first, released)
}
