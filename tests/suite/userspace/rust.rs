//! Rust programs on allocators that crates have linked in: counted exactly, and by the allocator's own probe set.

use std::process::Command;

use memleak_tests::{Counts, Feature, Memleak, Program, SiteView, needs};

use super::assert_clean;

/// What `rust_blocks.rs` keeps: where, how often, and how much.
const KINDS: [(&str, u64, u64); 5] =
    [("bytes", 101, 17), ("words", 97, 40), ("zeroed", 89, 1003), ("aligned", 83, 128), ("grown", 79, 1029)];
/// How much of each it gives back.
const CHURNED: u64 = 59;

fn counted_exactly(path: &str, probe_set: &str) {
    needs!(Feature::Bpf);
    let mut running = Program::start_command(&mut Command::new(path));
    let mut memleak = Memleak::watch(running.pid());
    running.step("done");
    let snapshot = memleak.settled();
    assert_clean(&snapshot, running.pid());
    // With or without the path of its module: that is in symbols, and not in all debug information.
    let passes = |site: &SiteView, function: &str| {
        site.frames.iter().any(|f| f.function.as_deref().is_some_and(|f| f.rsplit(':').next() == Some(function)))
    };
    let at = |function: &str| snapshot.sum(|site| passes(site, function));
    // Vectors that grow: freed where they were made, allocated where they grew.
    let resized = Counts::freed(79 + CHURNED, 13);
    assert_eq!(at("to_be_grown"), resized, "{:#?}", snapshot.callers());
    let mut sum = resized;
    for (name, count, size) in KINDS {
        let of = |counts: Counts, first: u64| match name {
            "grown" => counts.plus(Counts::freed(first, 13)),
            _ => counts,
        };
        let (leaked, churned) = (Counts::kept(count, size), Counts::freed(CHURNED, size));
        assert_eq!(at(&format!("leak_{name}")), of(leaked, count), "leak_{name}: {:#?}", snapshot.callers());
        assert_eq!(at(&format!("churn_{name}")), of(churned, CHURNED), "churn_{name}: {:#?}", snapshot.callers());
        sum = sum.plus(leaked).plus(churned);
    }
    assert_eq!(snapshot.totals, sum, "{:#?}", snapshot.callers());
    assert!(snapshot.sites.iter().all(|site| site.probe_set == probe_set), "{:#?}", snapshot.callers());
    // From the allocator's wrappers in Rust up to the start of the program.
    assert!(snapshot.sites.iter().all(|site| site.truncated.is_none() && site.passes("main")), "{:#?}", snapshot.sites);
}

// Its functions have a prefix, and Rust's blocks are given back by sdallocx, which does not pass through free.
#[test]
fn rust_program_on_jemalloc_is_counted_exactly() {
    counted_exactly(env!("CARGO_BIN_EXE_rust_jemalloc"), "jemalloc");
}

// All of Rust's blocks are asked for with an alignment there.
#[test]
fn rust_program_on_mimalloc_is_counted_exactly() {
    counted_exactly(env!("CARGO_BIN_EXE_rust_mimalloc"), "mimalloc");
}
