//! Several threads: blocks that change hands, and all of them at once.

use memleak_tests::{Counts, Feature, needs};

use super::{account, assert_sites, kept};

// The account belongs to the process: who frees does not matter, not even when the allocating thread has ended.
#[test]
fn block_freed_by_another_thread_is_freed() {
    needs!(Feature::Bpf);
    let (snapshot, _) = account("cross_thread", &[]);
    let expected = Counts {
        allocated_bytes: 211 * 61,
        allocated_count: 211,
        freed_bytes: 198 * 61,
        freed_count: 198,
        outstanding_bytes: 13 * 61,
        outstanding_count: 13,
    };
    // Two loops in one function: two sites.
    assert_eq!(snapshot.at("produce"), expected);
}

// Two million calls from 64 threads, most frees in another thread than the allocation: not one may go astray.
#[test]
fn counts_stay_exact_with_64_threads_at_once() {
    needs!(Feature::Bpf);
    let (snapshot, _) = account("threads64", &[]);
    // Each thread asks for 1 + round % 509 bytes in each of its 16,000 rounds.
    let bytes: u64 = 64 * (0..16_000).map(|round| 1 + round % 509).sum::<u64>();
    let churn = Counts {
        allocated_bytes: bytes,
        allocated_count: 64 * 16_000,
        freed_bytes: bytes,
        freed_count: 64 * 16_000,
        outstanding_bytes: 0,
        outstanding_count: 0,
    };
    assert_eq!(snapshot.site("exchanged").counts, churn);
    assert_sites(&snapshot, &[kept("lost_by_thread", "malloc", 192, 33)]);
}
