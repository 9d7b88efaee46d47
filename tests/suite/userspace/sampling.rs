//! Sampling by bytes: estimates that hold the truth, and counters that stay exact.

use memleak_tests::{Feature, Memleak, Program, Snapshot, needs};

/// Blocks and size of what each function of the program `sampled` leaks.
const LEAKS: [(&str, u64, u64); 4] = [
    ("leak_small", 40_009, 67),
    ("leak_medium", 4_001, 1_011),
    ("leak_large", 53, 1_000_003),
    ("leak_realloc", 20_011, 129),
];
/// Blocks and size of what it frees again.
const CHURN: (u64, u64) = (30_011, 331);

fn run(args: &[&str]) -> (Snapshot, u32) {
    let mut program = Program::start("sampled");
    let mut all = vec!["--set", "collector.sample_bytes=16KiB"];
    all.extend(args);
    let mut memleak = Memleak::watch_with(program.pid(), &all);
    program.step("done");
    (memleak.settled(), program.pid())
}

fn assert_estimates(snapshot: &Snapshot, pid: u32) {
    let process = snapshot.process(pid);
    assert_eq!(process.mode, "sampled");
    assert_eq!(process.unmatched_frees, 0, "frees of blocks that were not sampled are no frees of unknown blocks");
    assert!(process.losses.values().all(|&n| n == 0), "losses: {:?}", process.losses);
    // Every call is counted, once, whether it was recorded or not.
    let sampling = process.sampling.expect("the process is sampled");
    let leaked = LEAKS.iter().map(|(_, count, size)| count * size).sum::<u64>();
    assert_eq!(sampling.mean_bytes, 16 << 10);
    assert_eq!(sampling.allocated_count, LEAKS.iter().map(|(_, count, _)| count).sum::<u64>() + CHURN.0);
    assert_eq!(sampling.allocated_bytes, leaked + CHURN.0 * CHURN.1);
    for (function, count, size) in LEAKS {
        let site = snapshot.site(function);
        let off = |estimate: u64, truth: u64| estimate as f64 - truth as f64;
        let (bytes, blocks) =
            (off(site.counts.outstanding_bytes, count * size), off(site.counts.outstanding_count, count));
        let (bytes_error, blocks_error) = (site.outstanding_bytes_stderr, site.outstanding_count_stderr);
        assert!(bytes.abs() <= 4.0 * bytes_error, "{function}: off by {bytes}, standard error {bytes_error}");
        assert!(blocks.abs() <= 4.0 * blocks_error, "{function}: off by {blocks}, standard error {blocks_error}");
        // The expected error, from the theory: the sample is neither all nor hardly anything.
        let x: f64 = size as f64 / 16384.0;
        let weight = -1.0 / (-x).exp_m1();
        let theory = (count as f64 * (weight - 1.0)).sqrt() * size as f64;
        assert!((bytes_error - theory).abs() <= 0.5 * theory, "{function}: {bytes_error}, in theory {theory}");
    }
    // Blocks of sixty times the mean are recorded for sure: no estimate at all.
    let large = snapshot.site("leak_large");
    assert_eq!((large.counts.outstanding_count, large.outstanding_count_stderr), (53, 0.0));
    // What was recorded is found again when it is freed, and takes its error with it.
    let churn = snapshot.site("churn_one");
    assert_eq!((churn.counts.outstanding_bytes, churn.counts.outstanding_count), (0, 0));
    assert_eq!((churn.outstanding_bytes_stderr, churn.outstanding_count_stderr), (0.0, 0.0));
    assert!(churn.counts.allocated_count > CHURN.0 / 2 && churn.counts.allocated_count < CHURN.0 * 2);
}

// A sample must lead to the truth within the error that it states, and calls that are left out must be counted.
#[test]
fn sampled_leaks_hold_the_truth_within_their_error() {
    needs!(Feature::Bpf);
    let (snapshot, pid) = run(&[]);
    assert_estimates(&snapshot, pid);
}

// Where the return of every call is seen, what is not sampled must be just as consistent.
#[test]
fn sampling_works_without_sessions() {
    needs!(Feature::Bpf, Feature::Backend("multi"), Feature::Backend("perf"));
    for backend in ["multi", "perf"] {
        let (snapshot, pid) = run(&["--set", &format!("collector.backend={backend}")]);
        assert_estimates(&snapshot, pid);
    }
}

// Parts of a mapping cannot be freed out of a sample, so address ranges are all recorded.
#[test]
fn mappings_are_never_sampled() {
    needs!(Feature::Bpf);
    let mut program = Program::start("mapper");
    let args = ["--set", "plugins.mmap.enabled=true", "--set", "collector.sample_bytes=64MiB"];
    let mut memleak = Memleak::watch_with(program.pid(), &args);
    program.step("done");
    let sampled = memleak.settled();
    let mut program = Program::start("mapper");
    let mut memleak = Memleak::watch_with(program.pid(), &args[..2]);
    program.step("done");
    let exact = memleak.settled();
    let mappings = |s: &Snapshot| s.sum(|site| site.probe_set == "mmap");
    assert!(mappings(&exact).allocated_count > 0);
    assert_eq!(mappings(&sampled), mappings(&exact));
}
