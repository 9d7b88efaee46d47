//! The kernel's own allocations, live on this machine: a program has the kernel allocate a known number of blocks.

use memleak_tests::{Counts, Feature, Memleak, Program, needs};

/// As in the program: event counters that are kept, and that are closed again.
const KEPT: u64 = 211;
const CLOSED: u64 = 307;

/// The promise in short: what the kernel allocates for a program is counted exactly, by call stack, with names.
#[test]
fn kernel_allocations_of_a_process_are_counted_exactly() {
    needs!(Feature::Bpf);
    let mut program = Program::start("eventfds");
    let pid = program.pid().to_string();
    let mut memleak = Memleak::kernel(&["-p", &pid, "--probe-set", "kernel-slab"]);
    program.step("done");
    let snapshot = memleak.settled();
    let contexts = |s: &memleak_tests::SiteView| s.caller() == Some("do_eventfd") && s.function == "kmalloc";
    let sites: Vec<_> = snapshot.sites.iter().filter(|s| contexts(s)).collect();
    assert!(!sites.is_empty(), "{:#?}", snapshot.callers());
    let size = sites[0].counts.allocated_bytes / sites[0].counts.allocated_count;
    let expected = Counts::kept(KEPT, size).plus(Counts::freed(CLOSED, size));
    assert_eq!(snapshot.sum(contexts), expected, "{:#?}", snapshot.callers());
    for site in sites {
        let kernel = site.kernel.as_ref().expect("a site of the kernel");
        assert_eq!(site.pid, 0);
        assert!(kernel.cache.as_deref().is_some_and(|c| c.starts_with("kmalloc-")), "{kernel:?}");
        assert_eq!(kernel.slack_bytes, (kernel.object_bytes - size) * site.counts.outstanding_count);
        assert_eq!(kernel.first_comm, "eventfds");
        assert!(site.frames.iter().all(|f| f.module.as_deref() == Some("vmlinux")), "{:?}", site.frames);
        assert!(site.passes("do_syscall_64"), "{:?}", site.frames);
    }
    program.finish();
    let freed = memleak.wait_until("the kernel to free", |s| s.sum(contexts).outstanding_count == 0);
    assert_eq!(freed.sum(contexts).freed_count, KEPT + CLOSED);
    let process = freed.process(0);
    assert_eq!((process.comm.as_str(), process.mode.as_str()), ("kernel", "exact"));
}
