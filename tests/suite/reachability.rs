//! Leak or cache: what scans say of blocks whose fate is known.

use memleak_tests::{Feature, Memleak, Program, Reachability, Snapshot, needs};

/// What is known of the blocks of all sites with a function in their stack; `None` before the scan. A function has more
/// than one site when some of its stacks were taken before the unwind tables were ready: verdict and way are those of the
/// larger one.
fn reach(snapshot: &Snapshot, function: &str) -> Option<Reachability> {
    let mut sites: Vec<_> = snapshot.sites.iter().filter(|site| site.passes(function)).collect();
    sites.sort_by_key(|site| std::cmp::Reverse(site.counts.outstanding_count));
    let mut all = sites.iter().filter_map(|site| site.reachability.clone());
    let first = all.next()?;
    Some(all.fold(first, |sum, next| Reachability {
        lost: sum.lost.plus(next.lost),
        indirectly_lost: sum.indirectly_lost.plus(next.indirectly_lost),
        reachable: sum.reachable.plus(next.reachable),
        called_lost: sum.called_lost + next.called_lost,
        refuted: sum.refuted + next.refuted,
        ..sum
    }))
}

/// A program with one site per shape, watched from the start, and a first scan of it.
fn scanned_shapes() -> (Program, Memleak, Snapshot) {
    let mut program = Program::start("shapes");
    let mut memleak = Memleak::watch_with(program.pid(), &["--set", "reachability.automatic=false"]);
    program.step("done");
    // Blocks must be a second old to be judged.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    memleak.signal(libc::SIGUSR2);
    let snapshot = memleak.wait_until("a scan", |snapshot| reach(snapshot, "lose").is_some());
    (program, memleak, snapshot)
}

// Nothing refers to them, or only others of their kind.
#[test]
fn lost_blocks_lists_and_rings_are_definitely_lost() {
    needs!(Feature::Bpf);
    let (_program, _memleak, snapshot) = scanned_shapes();
    let expect = |function: &str, lost: u64, indirectly: u64| {
        let reach = reach(&snapshot, function).expect("it was scanned");
        assert_eq!(reach.verdict, "definite", "{function}: {reach:?}");
        assert_eq!((reach.lost.blocks, reach.indirectly_lost.blocks), (lost, indirectly), "{function}: {reach:?}");
        assert_eq!(reach.reachable.blocks, 0, "{function}: {reach:?}");
    };
    expect("lose", 23, 0);
    expect("lose_list", 1, 16);
    expect("lose_ring", 1, 10);
}

// Globals, stacks and thread-local memory hold on to blocks, and so do pointers to a place that is usual for the site.
#[test]
fn blocks_that_something_refers_to_are_reachable() {
    needs!(Feature::Bpf);
    let (_program, _memleak, snapshot) = scanned_shapes();
    let expect = |function: &str, blocks: u64| {
        let reach = reach(&snapshot, function).expect("it was scanned");
        assert_eq!((reach.verdict.as_str(), reach.reachable.blocks), ("reachable", blocks), "{function}: {reach:?}");
        reach
    };
    let way = |reach: &Reachability| reach.way.clone().expect("there is a way to it");
    let list = expect("keep_global_list", 29);
    assert!(way(&list).starts_with("global global_list (shapes)"), "{list:?}");
    assert!(way(&expect("keep_interior", 19)).starts_with("global interior"));
    assert!(way(&expect("keep_on_stack", 13)).starts_with("stack or thread-local memory of thread"));
    expect("keep_thread_local", 13);
    assert_eq!(reach(&snapshot, "keep_odd_interior").expect("it was scanned").verdict, "possible");
}

// Blocks on the move are somewhere else whenever the scan comes by.
#[test]
fn blocks_that_are_moved_during_the_scan_are_not_lost() {
    needs!(Feature::Bpf);
    let (_program, _memleak, snapshot) = scanned_shapes();
    let rotated = reach(&snapshot, "fill_rotated").expect("it was scanned");
    assert_eq!((rotated.verdict.as_str(), rotated.reachable.blocks), ("reachable", 2000), "{rotated:?}");
    let table = reach(&snapshot, "insert").expect("it was scanned");
    assert_eq!((table.verdict.as_str(), table.lost.blocks), ("reachable", 0), "{table:?}");
    assert!(table.way.as_ref().expect("there is a way").starts_with("global table"), "{table:?}");
}

// A program cannot free what it has no pointer to: that it does shows that it hides its pointers.
#[test]
fn blocks_that_are_freed_after_all_refute_the_verdict() {
    needs!(Feature::Bpf);
    let (mut program, mut memleak, snapshot) = scanned_shapes();
    let hidden = reach(&snapshot, "hide").expect("it was scanned");
    assert_eq!((hidden.verdict.as_str(), hidden.lost.blocks), ("definite", 31), "{hidden:?}");
    program.step("freed");
    let after = memleak.wait_until("refutations", |s| reach(s, "hide").is_some_and(|r| r.refuted > 0));
    let hidden = reach(&after, "hide").expect("it was scanned");
    assert_eq!((hidden.verdict.as_str(), hidden.refuted, hidden.called_lost), ("unknown", 31, 31), "{hidden:?}");
    let lost = reach(&after, "lose").expect("it was scanned");
    assert_eq!((lost.verdict.as_str(), lost.refuted), ("definite", 0), "{lost:?}");
}
