//! What scans must hold in figures. Not part of the suite: they take minutes, want a release build and a calm machine.
//!
//! `cargo build --release && cargo test --release -p memleak_tests --test suite bars -- --ignored --test-threads 1 --nocapture`

use std::time::{Duration, Instant};

use memleak_tests::{Memleak, Program, Reachability, Snapshot};

/// The number that a program prints after a word, over so many seconds: their median.
fn median(program: &mut Program, word: &str, seconds: usize) -> f64 {
    let mut numbers: Vec<f64> = (0..seconds)
        .map(|_| {
            let line = program.next_line();
            let number = line.strip_prefix(word).unwrap_or_else(|| panic!("{word}: {line}"));
            number.trim().parse().expect("a number")
        })
        .collect();
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

fn memory(pid: u32, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix(field)).expect("the kernel says so");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// What memleak has said of each scan.
fn scans(memleak: &Memleak) -> Vec<String> {
    memleak.stderr().lines().filter(|l| l.contains("told what it can still reach")).map(str::to_owned).collect()
}

/// The speed that such a line tells, GB per second of CPU time.
fn speed(line: &str) -> f64 {
    let number = line.split("memory at ").nth(1).and_then(|rest| rest.split(" GB/s").next());
    number.and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no speed in {line}"))
}

// With MEMLEAK_CORE_SHARE of a core (50 %): 0.8 GB/s per core while the target keeps 95 % of its throughput; at most 64 bytes per block and 64 MB.
#[test]
#[ignore = "measures; see the module"]
fn bars_of_speed_and_memory() {
    let megabytes = std::env::var("MEMLEAK_DATA").unwrap_or_else(|_| "1024".to_owned());
    let mut program = Program::start_with("big", &[&megabytes]);
    let blocks = megabytes.parse::<u64>().expect("a number") * (1 << 20) / 272;
    let most = format!("collector.max_outstanding={}", blocks * 2);
    let share = std::env::var("MEMLEAK_CORE_SHARE").unwrap_or_else(|_| "50%".to_owned());
    let share = format!("reachability.core_share={share}");
    let args = ["--set", "reachability.automatic=false", "--set", &share, "--set", &most];
    let mut memleak = Memleak::watch_with(program.pid(), &args);
    program.step("done");
    let last = memleak.settled();
    let outstanding: u64 = last.sites.iter().map(|s| s.counts.outstanding_count).sum();
    program.go();
    let before = memory(memleak.pid(), "VmRSS:");
    let mut ratios = Vec::new();
    for round in 1..=5 {
        let base = median(&mut program, "lookups", 5);
        let cpu = memleak_cpu_s(memleak.pid());
        memleak.signal(libc::SIGUSR2);
        let mut during = Vec::new();
        while scans(&memleak).len() < round {
            during.push(median(&mut program, "lookups", 1));
        }
        let cpu_s = memleak_cpu_s(memleak.pid()) - cpu;
        let after = median(&mut program, "lookups", 5);
        let during = during.iter().sum::<f64>() / during.len() as f64;
        ratios.push(2.0 * during / (base + after));
        eprintln!(
            "round {round}: {base:.0} then {during:.0} then {after:.0} lookups/s, CPU {cpu_s:.2} s; {}",
            scans(&memleak).last().expect("there is one")
        );
    }
    let peak = memory(memleak.pid(), "VmHWM:");
    ratios.sort_by(f64::total_cmp);
    let mut speeds: Vec<f64> = scans(&memleak).iter().map(|line| speed(line)).collect();
    speeds.sort_by(f64::total_cmp);
    let per_block = peak.saturating_sub(before) as f64 / outstanding as f64;
    eprintln!(
        "target's throughput while it is scanned: {:.3}; {:.2} GB/s (medians of 5); {outstanding} blocks; memory {} MiB \
         before, {} MiB at most: {per_block:.1} bytes per block more, allowed are {} MiB in all",
        ratios[2],
        speeds[2],
        before >> 20,
        peak >> 20,
        (64 * outstanding + (64 << 20)) >> 20
    );
    assert!(speeds[2] >= 0.8, "{speeds:?} GB/s");
    assert!(ratios[2] >= 0.95, "{ratios:?} of the target's throughput");
    assert!(peak <= 64 * outstanding + (64 << 20), "{peak} bytes for {outstanding} blocks");
}

/// CPU time of a process, seconds.
fn memleak_cpu_s(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("there is a name").split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>().expect("ticks") + fields[12].parse::<f64>().expect("ticks");
    ticks / 100.0
}

// A leak of one block in a thousand among three million allocations a second, watched through windows at 5 %: definite within
// 90 s; churn, cache and sessions of the same program never.
#[test]
#[ignore = "measures; see the module"]
fn bars_of_windows() {
    let seconds: u64 = std::env::var("MEMLEAK_BAR_SECONDS").map_or(180, |text| text.parse().expect("a number"));
    let mut program = Program::start("hot");
    program.go();
    let base = median(&mut program, "pairs", 5);
    let args = ["--set", "collector.budget=5%", "--set", "reachability.every=5s"];
    let mut memleak = Memleak::watch_with(program.pid(), &args);
    let began = Instant::now();
    let of = |snapshot: &Snapshot, function: &str| -> Option<Reachability> {
        snapshot.sites.iter().find(|s| s.passes(function)).and_then(|s| s.reachability.clone())
    };
    let mut definite_after = None;
    let mut last = None;
    while began.elapsed() < Duration::from_secs(seconds) {
        memleak.signal(libc::SIGUSR2);
        let from = Instant::now();
        let snapshot = memleak.wait_until("time to pass", |_| from.elapsed() > Duration::from_secs(3));
        for function in ["churn", "cache_insert", "open_session"] {
            let reach = of(&snapshot, function);
            assert!(reach.as_ref().is_none_or(|r| r.verdict != "definite"), "{function}: {reach:?}");
        }
        if definite_after.is_none() && of(&snapshot, "leak").is_some_and(|r| r.verdict == "definite") {
            definite_after = Some(began.elapsed());
            eprintln!("definite after {:.0} s: {:?}", began.elapsed().as_secs_f64(), of(&snapshot, "leak"));
        }
        last = Some(snapshot);
    }
    let last = last.expect("there were snapshots");
    for function in ["leak", "churn", "cache_insert", "open_session"] {
        eprintln!("{function}: {:?}", of(&last, function));
    }
    let watched = median(&mut program, "pairs", 5);
    eprintln!("{base:.0} pairs/s before, {watched:.0} at the end");
    let after = definite_after.expect("the leak is definite at last");
    assert!(after <= Duration::from_secs(90), "definite after {after:?}");
}
