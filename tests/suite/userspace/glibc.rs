//! Every allocator function of glibc, its failures included, and C++ on top of it; on every way to attach.

use std::fs;

use memleak_tests::{Counts, Feature, Memleak, Program, Snapshot, needs};

use super::{Expected, account, assert_clean, assert_sites, freed, kept};

/// One function with two names in glibc before 2.38; two functions elsewhere.
const MEMALIGN: &str = "memalign|aligned_alloc";

/// What the program `kinds` does with glibc.
pub(super) fn expected_kinds() -> Vec<Expected> {
    let mut all = expected_common_kinds();
    all.extend([
        kept("leak_valloc", "valloc", 67, 47),
        freed("churn_valloc", "valloc", 59, 47),
        kept("leak_pvalloc", "pvalloc", 61, 51),
        freed("churn_pvalloc", "pvalloc", 59, 51),
    ]);
    all
}

/// What the program `kinds` does with any C library.
pub(super) fn expected_common_kinds() -> Vec<Expected> {
    vec![
        kept("leak_malloc", "malloc", 101, 17),
        freed("churn_malloc", "malloc", 59, 17),
        kept("leak_calloc", "calloc", 97, 33),
        freed("churn_calloc", "calloc", 59, 33),
        kept("leak_realloc", "realloc", 89, 29),
        freed("churn_realloc", "realloc", 59, 29),
        kept("leak_reallocarray", "reallocarray", 83, 35),
        freed("churn_reallocarray", "reallocarray", 59, 35),
        kept("leak_posix_memalign", "posix_memalign", 79, 41),
        freed("churn_posix_memalign", "posix_memalign", 59, 41),
        kept("leak_aligned_alloc", MEMALIGN, 73, 31),
        freed("churn_aligned_alloc", MEMALIGN, 59, 31),
        kept("leak_memalign", MEMALIGN, 71, 43),
        freed("churn_memalign", MEMALIGN, 59, 43),
    ]
}

/// The account is complete: these sites, and not a byte more anywhere else.
pub(super) fn assert_nothing_else(snapshot: &Snapshot, expected: &[Expected]) {
    let sum = expected.iter().fold(Counts::default(), |sum, line| sum.plus(line.counts));
    assert_eq!(snapshot.totals, sum, "totals; sites: {:#?}", snapshot.callers());
}

// Every function of the glibc set, kept and freed, byte for byte, and nothing counted twice on the way.
#[test]
fn every_glibc_function_is_counted_exactly() {
    needs!(Feature::Bpf);
    let (snapshot, pid) = account("kinds", &[]);
    let expected = expected_kinds();
    assert_sites(&snapshot, &expected);
    assert_nothing_else(&snapshot, &expected);
    // Every block that was freed had been seen before, and free(NULL) is not a free.
    assert_eq!(snapshot.process(pid).unmatched_frees, 0);
}

// A line number that points at the allocating line is what a user acts on.
#[test]
fn site_names_file_and_line_of_the_allocation() {
    needs!(Feature::Bpf);
    let (snapshot, _) = account("reallocs", &[]);
    let frame = &snapshot.site("kept_through_failure").frames[0];
    let source = include_str!("../../programs/reallocs.c");
    let line = source.lines().position(|line| line.contains("malloc(37)")).expect("the program allocates 37") + 1;
    assert!(frame.file.as_deref().is_some_and(|file| file.ends_with("reallocs.c")), "{frame:?}");
    assert_eq!(frame.line, u32::try_from(line).ok());
}

// The whole chain of callers is there, innermost first, because programs are compiled with frame pointers here.
#[test]
fn call_stack_lists_the_callers_in_order() {
    needs!(Feature::Bpf);
    let (snapshot, _) = account("kinds", &[]);
    let site = snapshot.site("leak_calloc");
    let names: Vec<_> = site.frames.iter().filter(|f| !f.inlined).filter_map(|f| f.function.as_deref()).collect();
    assert_eq!(names[0], "leak_calloc");
    assert!(names.iter().position(|name| *name == "main") > Some(0), "{names:?}");
}

fn with_backend(backend: &'static str) {
    needs!(Feature::Bpf, Feature::Backend(backend));
    let mut program = Program::start("kinds");
    let mut memleak = Memleak::watch_with(program.pid(), &["--set", &format!("collector.backend={backend}")]);
    program.step("done");
    let snapshot = memleak.settled();
    assert_clean(&snapshot, program.pid());
    let expected = expected_kinds();
    assert_sites(&snapshot, &expected);
    assert_nothing_else(&snapshot, &expected);
}

// Each way to attach must count the same: uprobe sessions,
#[test]
fn session_backend_counts_exactly() {
    with_backend("session");
}

// uprobe multi links,
#[test]
fn multi_backend_counts_exactly() {
    with_backend("multi");
}

// and one perf event per probe,
#[test]
fn perf_backend_counts_exactly() {
    with_backend("perf");
}

// also without attach cookies, as on Linux 5.10.
#[test]
fn perf_plain_backend_counts_exactly() {
    with_backend("perf-plain");
}

// A chain of reallocs is one block that moves: only its last size is outstanding, at the last call.
#[test]
fn realloc_chain_leaves_only_the_last_block() {
    needs!(Feature::Bpf);
    let (snapshot, _) = account("reallocs", &[]);
    // Seven chains, each of 101 steps of two bytes from 11 to 213.
    let sizes: u64 = (1..=101).map(|i| 11 + 2 * i).sum();
    assert_eq!(snapshot.site("chain_start").counts, Counts::freed(7, 11));
    let grown = Counts {
        allocated_bytes: 7 * sizes,
        allocated_count: 7 * 101,
        freed_bytes: 7 * (sizes - 213),
        freed_count: 7 * 100,
        outstanding_bytes: 7 * 213,
        outstanding_count: 7,
    };
    assert_eq!(snapshot.site("chain_grow").counts, grown);
}

// A realloc that fails leaves the old block where it was: still allocated, still at its own site.
#[test]
fn failed_realloc_keeps_the_old_block() {
    needs!(Feature::Bpf);
    let (snapshot, _) = account("reallocs", &[]);
    assert_eq!(snapshot.site("kept_through_failure").counts, Counts::kept(13, 37));
    assert_eq!(snapshot.at("fail_to_grow"), Counts::default());
}

// glibc frees on realloc(p, 0) and returns NULL: that is no failure.
#[test]
fn realloc_to_zero_frees() {
    needs!(Feature::Bpf);
    let (snapshot, _) = account("reallocs", &[]);
    assert_eq!(snapshot.site("freed_by_zero").counts, Counts::freed(19, 23));
    assert_eq!(snapshot.at("realloc_to_zero"), Counts::default());
}

// Shrinking in place hands back the same address with a new size: the block belongs to the shrinking call.
#[test]
fn realloc_in_place_moves_the_block_to_the_new_site() {
    needs!(Feature::Bpf);
    let (snapshot, _) = account("reallocs", &[]);
    assert_eq!(snapshot.site("shrink_from").counts, Counts::freed(17, 1001));
    assert_eq!(snapshot.site("shrink_to").counts, Counts::kept(17, 501));
}

// NULL, an overflowing product, EINVAL with a plausible address left in the pointer argument: none is a block.
#[test]
fn failing_calls_record_nothing() {
    needs!(Feature::Bpf);
    let (snapshot, _) = account("null_returns", &[]);
    let expected = [kept("after_failures", "malloc", 5, 19)];
    assert_sites(&snapshot, &expected);
    assert_nothing_else(&snapshot, &expected);
}

// operator new calls malloc: one block for the user, one in the account.
#[test]
fn operator_new_is_counted_once() {
    needs!(Feature::Bpf, Feature::Program("operator_new"));
    let (snapshot, _) = account("operator_new", &[]);
    let total = Counts::kept(31, 71).plus(Counts::kept(29, 73)).plus(Counts::freed(23, 71));
    assert_eq!(snapshot.totals, total, "{:#?}", snapshot.callers());
}

// Two probe sets that nest count the outer call, and the site is the user's line instead of the C++ library.
#[test]
fn nested_probe_sets_count_the_outer_call() {
    needs!(Feature::Bpf, Feature::Program("operator_new"));
    let plugins = tempfile::tempdir().expect("a folder can be made");
    let manifest = r#"
        name = "operators"
        kind = "userspace"
        [match]
        sonames = ["libstdc++.so.6"]
        [[function]]
        symbol = "_Znwm"
        role = "alloc"
        size = { arg = 0 }
        [[function]]
        symbol = "_Znam"
        role = "alloc"
        size = { arg = 0 }
        [[function]]
        symbol = "_ZdlPvm"
        role = "free"
        old = { arg = 0 }
        [[function]]
        symbol = "_ZdlPv"
        role = "free"
        old = { arg = 0 }
    "#;
    fs::write(plugins.path().join("operators.toml"), manifest).expect("the manifest can be written");
    let folder = plugins.path().to_str().expect("the folder has a plain name");
    let (snapshot, _) = account("operator_new", &["--plugins", folder]);
    let expected = [
        kept("leak_new", "_Znwm", 31, 71),
        kept("leak_new_array", "_Znam", 29, 73),
        freed("churn_new", "_Znwm", 23, 71),
    ];
    assert_sites(&snapshot, &expected);
    assert_nothing_else(&snapshot, &expected);
    assert!(snapshot.sites.iter().all(|site| site.probe_set == "operators"), "{:#?}", snapshot.callers());
}
