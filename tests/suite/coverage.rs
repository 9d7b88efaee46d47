//! How much of a program's growth the sites explain, and what the rest is called.

use memleak_tests::{Feature, Memleak, Program, needs};

/// What tests/programs/growth.c takes through malloc, and maps itself.
const LOST: u64 = 20_011 * 1_009 + 3 * 2_000_003;
const MAPPED: u64 = 31 << 20;

// Who sees a program grow by 57 MiB and sites with 25 MiB must be told where the other 32 are.
#[test]
fn growth_is_divided_between_sites_and_direct_mappings() {
    needs!(Feature::Bpf);
    let mut program = Program::start("growth");
    let pid = program.pid();
    let mut memleak = Memleak::watch(pid);
    program.step("done");
    // The mappings are looked at now and then only.
    let seen = memleak.wait_until("a look at the mappings", |snapshot| {
        snapshot.process(pid).coverage.is_some_and(|c| c.mapped_bytes == Some(MAPPED))
    });
    let coverage = seen.process(pid).coverage.expect("it was there");
    assert_eq!(seen.totals.outstanding_bytes, LOST);
    assert_eq!(coverage.explained_bytes, Some(LOST), "{coverage:?}");
    let other = coverage.other_bytes.expect("every call is traced");
    // Rounding up to 16 bytes and the header take 15 bytes a block.
    assert!((200_000..2_000_000).contains(&other), "{coverage:?}");
    let growth = u64::try_from(coverage.growth_bytes).expect("it grew");
    assert_eq!(LOST + MAPPED + other, growth, "{coverage:?}");
    let share = coverage.share.expect("it grew enough");
    assert!((share - LOST as f64 / growth as f64).abs() < 1e-9, "{coverage:?}");
}

// With the probe set for mappings on, they are sites like any others.
#[test]
fn traced_mappings_explain_their_growth() {
    needs!(Feature::Bpf);
    let mut program = Program::start("growth");
    let pid = program.pid();
    let mut memleak = Memleak::watch_with(pid, &["--set", "plugins.mmap.enabled=true"]);
    program.step("done");
    let seen = memleak.settled();
    let coverage = seen.process(pid).coverage.expect("every supported kernel tells anonymous memory apart");
    assert_eq!(coverage.explained_bytes, Some(LOST + MAPPED), "{coverage:?}");
    assert_eq!(coverage.mapped_bytes, Some(0), "{coverage:?}");
}
