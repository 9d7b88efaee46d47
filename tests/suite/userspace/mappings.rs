//! The `mmap` probe set: memory taken from the kernel without an allocator.

use memleak_tests::{Counts, Feature, Memleak, Program, needs};

use super::{account, assert_clean};

// Mapped, returned and resized ranges are exact, MAP_FAILED is no mapping, and malloc's own mmap is not counted twice.
#[test]
fn mappings_are_counted_and_not_those_of_malloc() {
    needs!(Feature::Bpf);
    let mut program = Program::start("mapper");
    let mut memleak = Memleak::watch_with(program.pid(), &["--set", "plugins.mmap.enabled=true"]);
    program.step("done");
    let snapshot = memleak.settled();
    assert_clean(&snapshot, program.pid());
    let through = |function| snapshot.sum(|site| site.probe_set == "mmap" && site.passes(function));
    const PAGE: u64 = 4096;
    assert_eq!(through("map_and_lose"), Counts::kept(11, 3 * PAGE));
    assert_eq!(through("map_and_return"), Counts::freed(13, 5 * PAGE));
    assert_eq!(snapshot.at("remap"), Counts::kept(5, 7 * PAGE));
    assert_eq!(snapshot.at("map_nothing"), Counts::default());
    let big = snapshot.site("big_malloc");
    assert_eq!((big.probe_set.as_str(), big.counts), ("glibc", Counts::kept(3, (1 << 20) + 1)));
    let mapped = snapshot.sum(|site| site.probe_set == "mmap");
    assert_eq!(mapped.outstanding_bytes, 11 * 3 * PAGE + 5 * 7 * PAGE, "{:#?}", snapshot.callers());
}

// The set is off unless asked for: a runtime that maps memory is not a leak by itself.
#[test]
fn mappings_are_not_counted_unless_asked_for() {
    needs!(Feature::Bpf);
    let (snapshot, _) = account("mapper", &[]);
    assert!(snapshot.sites.iter().all(|site| site.probe_set == "glibc"), "{:#?}", snapshot.callers());
    assert_eq!(snapshot.totals, Counts::kept(3, (1 << 20) + 1));
}
