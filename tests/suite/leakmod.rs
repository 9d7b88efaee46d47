//! Leaks of a kernel module of our own (`tests/vm/leakmod`), to the byte, by function and module, on every way to attach.
//!
//! Only in virtual machines: `make test-kernels` builds the module for each kernel and runs these ignored tests there.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use memleak_tests::{Counts, Feature, Memleak, Outcome, SiteView, Snapshot, memleak_command, needs, output_within};

/// Sizes of the objects, as in the module.
const KMALLOC_BYTES: u64 = 97;
const KMALLOC_SIZE_BYTES: u64 = 73;
const KMALLOC_LARGE_BYTES: u64 = 12289;
const KREALLOC_FIRST_BYTES: u64 = 33;
const KREALLOC_BYTES: u64 = 211;
const KVMALLOC_BYTES: u64 = 1201;
const CACHE_BYTES: u64 = 360;
const CACHE_OBJECT_BYTES: u64 = 384;
const VMALLOC_BYTES: u64 = 20011;
const PAGES_BYTES: u64 = 4 * 4096;
const PERCPU_BYTES: u64 = 52;
const RCU_BYTES: u64 = 120;

const PARAMETERS: &str = "/sys/module/leakmod/parameters";

/// The module while it is loaded. There is one kernel: tests that need the module wait for each other.
struct Module(Option<MutexGuard<'static, ()>>);

impl Module {
    fn load(arguments: &[&str]) -> Self {
        static LOADED: Mutex<()> = Mutex::new(());
        let guard = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let module = std::env::var("MEMLEAK_TEST_MODULE").expect("make test-kernels runs this test");
        let (code, _, stderr) = output_within(Command::new("insmod").arg(module).args(arguments));
        assert_eq!(code, Some(0), "insmod: {stderr}");
        Module(Some(guard))
    }

    /// Allocates `count` objects of a kind.
    fn allocate(&self, kind: &str, count: u64) {
        let path = Path::new(PARAMETERS).join(kind);
        fs::write(path, count.to_string()).unwrap_or_else(|e| panic!("failed to allocate {count} of {kind}: {e}"));
    }

    /// Takes the module out; it frees what it has allocated.
    fn remove(mut self) {
        self.unload();
    }

    fn unload(&mut self) {
        // Held until the module is gone.
        if let Some(_guard) = self.0.take() {
            let (code, _, stderr) = output_within(Command::new("rmmod").arg("leakmod"));
            assert!(code == Some(0) || std::thread::panicking(), "rmmod: {stderr}");
        }
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        self.unload();
    }
}

/// What is expected at a function of the module.
struct Expected {
    /// Parameter, and the end of the function's name.
    kind: &'static str,
    counts: Counts,
}

/// Objects that slab allocators hand out, one kind each.
fn slab_kinds() -> Vec<Expected> {
    let reallocated = Counts::freed(61, KREALLOC_FIRST_BYTES).plus(Counts::kept(61, KREALLOC_BYTES));
    let kept = |kind, count, size| Expected { kind, counts: Counts::kept(count, size) };
    vec![
        kept("kmalloc", 101, KMALLOC_BYTES),
        kept("kmalloc_size", 83, KMALLOC_SIZE_BYTES),
        kept("kmalloc_large", 7, KMALLOC_LARGE_BYTES),
        kept("kmalloc_node", 67, KMALLOC_BYTES),
        kept("kvmalloc", 53, KVMALLOC_BYTES),
        kept("cache", 47, CACHE_BYTES),
        Expected { kind: "krealloc", counts: reallocated },
    ]
}

/// Those of them that functions tell of: since Linux 6.15 kvmalloc() calls none that can be probed.
fn kinds_of_functions() -> Vec<Expected> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel has a release");
    let mut numbers = release.split(['.', '-']).map_while(|n| n.parse::<u32>().ok());
    let is_hidden = (numbers.next(), numbers.next()) >= (Some(6), Some(15));
    slab_kinds().into_iter().filter(|line| line.kind != "kvmalloc" || !is_hidden).collect()
}

/// Writes the numbers of objects to the module's parameters.
fn allocate_all(module: &Module, expected: &[Expected]) {
    for line in expected {
        // Of a krealloc() only half of the blocks stay.
        module.allocate(line.kind, line.counts.outstanding_count);
    }
}

fn function(kind: &str) -> String {
    format!("leakmod_leak_{kind}")
}

/// Each kind is at its own function of the module, to the byte.
fn assert_counted(snapshot: &Snapshot, expected: &[Expected]) {
    for line in expected {
        let at = function(line.kind);
        assert_eq!(snapshot.at(&at), line.counts, "counted at {at}; all: {:#?}", snapshot.callers());
        let sites = snapshot.sites.iter().filter(|s| s.caller() == Some(&at));
        for site in sites {
            assert_eq!(site.frames[0].module.as_deref(), Some("leakmod"), "{site:?}");
            assert!(site.frames.iter().any(|f| f.module.as_deref() == Some("vmlinux")), "{site:?}");
            let kernel = site.kernel.as_ref().expect("a site of the kernel");
            assert_eq!(kernel.unverifiable, None, "{site:?}");
        }
    }
    let losses = &snapshot.process(0).losses;
    // Of the whole machine: the kernel keeps events from programs that are preempted (since Linux 7.0).
    let of_others = ["implicit_frees", "missed_events"];
    assert!(losses.iter().all(|(kind, &n)| n == 0 || of_others.contains(&kind.as_str())), "{losses:?}");
}

fn freed(expected: &[Expected]) -> Vec<Expected> {
    let freed = |line: &Expected| Counts {
        freed_bytes: line.counts.allocated_bytes,
        freed_count: line.counts.allocated_count,
        outstanding_bytes: 0,
        outstanding_count: 0,
        ..line.counts
    };
    expected.iter().map(|line| Expected { kind: line.kind, counts: freed(line) }).collect()
}

/// Leaks, looks, removes the module, looks again.
fn account(arguments: &[&str], expected: &[Expected]) {
    let module = Module::load(&[]);
    let mut memleak = Memleak::kernel(&[&["--module", "leakmod"], arguments].concat());
    allocate_all(&module, expected);
    let snapshot = memleak.settled();
    assert_counted(&snapshot, expected);
    module.remove();
    assert_counted(&memleak.settled(), &freed(expected));
}

/// Why a way to attach does not work here, as memleak says it; `None` when it does.
fn backend_missing(backend: &str, probe_set: &str) -> Option<String> {
    let arguments = ["kernel", "--backend", backend, "--probe-set", probe_set, "--duration", "100ms"];
    let (code, _, stderr) = output_within(memleak_command().args(arguments));
    (code == Some(2)).then(|| stderr.trim().replace('\n', "; "))
}

macro_rules! needs_backend {
    ($backend:expr, $probe_set:expr) => {
        needs!(Feature::Bpf);
        if let Some(reason) = backend_missing($backend, $probe_set) {
            memleak_tests::skip(&format!("no {} by {}: {reason}", $probe_set, $backend));
            return;
        }
    };
}

// The reason for all this: a driver that leaks, whatever it allocates with, is found and named.
#[test]
#[ignore = "needs a virtual machine: make test-kernels"]
fn slab_objects_are_counted_exactly_through_tracepoints() {
    needs_backend!("tracepoint", "kernel-slab");
    account(&["--backend", "tracepoint", "--probe-set", "kernel-slab"], &slab_kinds());
}

// Each way to attach must count the same.
#[test]
#[ignore = "needs a virtual machine: make test-kernels"]
fn slab_objects_are_counted_exactly_through_trampolines() {
    needs_backend!("fentry", "kernel-slab");
    account(&["--backend", "fentry", "--probe-set", "kernel-slab"], &kinds_of_functions());
}

#[test]
#[ignore = "needs a virtual machine: make test-kernels"]
fn slab_objects_are_counted_exactly_through_kprobes() {
    needs_backend!("kprobe", "kernel-slab");
    account(&["--backend", "kprobe", "--probe-set", "kernel-slab"], &kinds_of_functions());
}

// Per-CPU memory exists once for each CPU that there could be.
#[test]
#[ignore = "needs a virtual machine: make test-kernels"]
fn percpu_memory_is_counted_exactly() {
    needs!(Feature::Bpf);
    let possible = fs::read_to_string("/sys/devices/system/cpu/possible").expect("CPUs are listed");
    let last = possible.trim().rsplit(['-', ',']).next().and_then(|n| n.parse::<u64>().ok()).expect("a number");
    let expected = [Expected { kind: "percpu", counts: Counts::kept(31, PERCPU_BYTES * (last + 1)) }];
    account(&["--probe-set", "kernel-percpu"], &expected);
}

// A vmalloc() is one block, although it takes small ones for its own purposes and pages one by one.
#[test]
#[ignore = "needs a virtual machine: make test-kernels"]
fn vmalloc_is_counted_once() {
    needs!(Feature::Bpf);
    // The tracepoint tells whole pages, the function what was asked for.
    let bytes = match backend_missing("tracepoint", "kernel-vmalloc") {
        None => VMALLOC_BYTES.next_multiple_of(4096),
        Some(_) => VMALLOC_BYTES,
    };
    let expected = [Expected { kind: "vmalloc", counts: Counts::kept(5, bytes) }];
    account(&["--probe-set", "kernel-vmalloc,kernel-pages"], &expected);
}

// Pages by their order; those behind slab objects are the slab's.
#[test]
#[ignore = "needs a virtual machine: make test-kernels"]
fn pages_are_counted_exactly_and_once() {
    needs!(Feature::Bpf);
    let module = Module::load(&[]);
    let mut memleak = Memleak::kernel(&["--module", "leakmod", "--probe-set", "kernel-slab,kernel-pages"]);
    module.allocate("pages", 13);
    module.allocate("kmalloc", 1009);
    module.allocate("kmalloc_large", 7);
    let snapshot = memleak.settled();
    let pages = [Expected { kind: "pages", counts: Counts::kept(13, PAGES_BYTES) }];
    assert_counted(&snapshot, &pages);
    assert_eq!(snapshot.at("leakmod_leak_kmalloc"), Counts::kept(1009, KMALLOC_BYTES), "{:#?}", snapshot.callers());
    let large = Counts::kept(7, KMALLOC_LARGE_BYTES);
    assert_eq!(snapshot.at("leakmod_leak_kmalloc_large"), large, "{:#?}", snapshot.callers());
    module.remove();
    assert_counted(&memleak.settled(), &freed(&pages));
}

// A cache of one's own has a name, and more room per object than was asked for.
#[test]
#[ignore = "needs a virtual machine: make test-kernels"]
fn objects_are_told_apart_by_cache() {
    needs!(Feature::Bpf);
    let module = Module::load(&[]);
    let mut memleak = Memleak::kernel(&["--cache", "leakmod_*", "--probe-set", "kernel-slab"]);
    module.allocate("kmalloc", 101);
    module.allocate("cache", 47);
    let snapshot = memleak.settled();
    assert_eq!(snapshot.totals, Counts::kept(47, CACHE_BYTES), "{:#?}", snapshot.callers());
    let kernel = snapshot.site("leakmod_leak_cache").kernel.as_ref().expect("a site of the kernel");
    assert_eq!((kernel.cache.as_deref(), kernel.object_bytes), (Some("leakmod_cache"), CACHE_OBJECT_BYTES));
    assert_eq!(kernel.slack_bytes, 47 * (CACHE_OBJECT_BYTES - CACHE_BYTES));
}

// What a module allocates when it is loaded is named, although it was not there when memleak began.
#[test]
#[ignore = "needs a virtual machine: make test-kernels"]
fn module_that_is_loaded_later_is_named() {
    needs!(Feature::Bpf);
    let mut memleak = Memleak::kernel(&["--module", "leakmod", "--probe-set", "kernel-slab"]);
    let module = Module::load(&["kmalloc=101", "cache=47"]);
    let snapshot = memleak.settled();
    assert_eq!(snapshot.at("leakmod_leak_kmalloc"), Counts::kept(101, KMALLOC_BYTES), "{:#?}", snapshot.callers());
    assert_eq!(snapshot.at("leakmod_leak_cache"), Counts::kept(47, CACHE_BYTES), "{:#?}", snapshot.callers());
    drop(module);
}

// The module is gone and its objects are still there: the worst leak, and nobody else knows whose they are.
#[test]
#[ignore = "needs a virtual machine: make test-kernels"]
fn frames_keep_their_names_when_the_module_is_unloaded() {
    needs!(Feature::Bpf);
    let module = Module::load(&["abandon=1"]);
    let mut memleak = Memleak::kernel(&["--module", "leakmod", "--probe-set", "kernel-slab"]);
    module.allocate("kmalloc", 101);
    let expected = [Expected { kind: "kmalloc", counts: Counts::kept(101, KMALLOC_BYTES) }];
    assert_counted(&memleak.settled(), &expected);
    module.remove();
    assert_counted(&memleak.settled(), &expected);
}

/// Lets memleak watch while `step` is done again and again, with rules that are quick to judge.
fn watched(mut step: impl FnMut(&Module)) -> Outcome {
    let module = Module::load(&[]);
    let quick = ["min_time=\"2s\"", "max_time=\"4s\"", "min_snapshots=6", "min_bytes=\"1KiB\""];
    let settings: Vec<String> = quick.iter().map(|s| format!("rules.kernel_growth.{s}")).collect();
    let mut arguments = vec!["--set", "alerts.hold=0s"];
    arguments.extend(settings.iter().flat_map(|s| ["--set", s]));
    let mut memleak = Memleak::kernel(&arguments);
    for _ in 0..25 {
        step(&module);
        sleep(Duration::from_millis(400));
    }
    memleak.settled();
    memleak.stop()
}

fn alerts_about_the_module(outcome: &Outcome) -> Vec<String> {
    outcome.alerts().map(ToString::to_string).filter(|alert| alert.contains("leakmod")).collect()
}

// The control: with the same rules a leak of that rhythm is found.
#[test]
#[ignore = "needs a virtual machine: make test-kernels"]
fn steady_leak_is_a_finding() {
    needs!(Feature::Bpf);
    let outcome = watched(|module| module.allocate("kmalloc", 401));
    let alerts = alerts_about_the_module(&outcome);
    assert!(alerts.iter().any(|a| a.contains("leakmod_leak_kmalloc")), "{alerts:#?}\n{}", outcome.stderr);
}

// What is freed by whatever way must not be reported: at once, from a cache, in an interrupt, in bulk, or by RCU (10,000).
#[test]
#[ignore = "needs a virtual machine: make test-kernels"]
fn churn_is_no_finding() {
    needs!(Feature::Bpf);
    let outcome = watched(|module| {
        for kind in ["churn", "churn_cache", "churn_irq", "churn_bulk", "churn_rcu"] {
            module.allocate(kind, 401);
        }
    });
    assert_eq!(alerts_about_the_module(&outcome), [] as [String; 0]);
    let last = outcome.last();
    let missed = last.process(0).losses.get("missed_events").copied().unwrap_or(0);
    let at = |function: &str, size: u64| {
        let counts = last.at(function);
        // What the kernel kept from the programs, because they had been preempted there, it says.
        let missing = (25 * 401_u64).checked_sub(counts.allocated_count).expect("no more than there were");
        assert!(missing <= missed, "{function}: {missing} missing, {missed} missed: {:#?}", last.callers());
        assert_eq!(counts.allocated_bytes, counts.allocated_count * size, "{function}");
        let sites = || last.sites.iter().filter(move |s| s.caller() == Some(function));
        let unverifiable = |s: &SiteView| s.kernel.as_ref().is_some_and(|k| k.unverifiable.is_some());
        (counts, sites().all(unverifiable))
    };
    for (function, size) in [
        ("leakmod_churn_kmalloc", KMALLOC_BYTES),
        ("leakmod_churn_cache", CACHE_BYTES),
        ("leakmod_churn_irq", KMALLOC_BYTES),
    ] {
        let (counts, _) = at(function, size);
        assert!(counts.outstanding_count <= missed, "{function}: {counts}");
    }
    // Nothing may be left, or it must be said that it cannot be known.
    for (function, size) in [("leakmod_churn_bulk", CACHE_BYTES), ("leakmod_churn_rcu", RCU_BYTES)] {
        let (counts, unverifiable) = at(function, size);
        assert!(counts.outstanding_count <= missed || unverifiable, "{function}: {counts}");
    }
}

// Where functions can be probed, what is handed to RCU or freed in bulk is followed exactly.
#[test]
#[ignore = "needs a virtual machine: make test-kernels"]
fn objects_freed_by_rcu_and_in_bulk_are_followed() {
    needs_backend!("kprobe", "kernel-slab");
    let module = Module::load(&[]);
    let mut memleak = Memleak::kernel(&["--module", "leakmod", "--probe-set", "kernel-slab"]);
    module.allocate("churn_rcu", 10_007);
    module.allocate("churn_bulk", 1009);
    let snapshot = memleak.settled();
    assert_eq!(snapshot.at("leakmod_churn_rcu"), Counts::freed(10_007, RCU_BYTES), "{:#?}", snapshot.callers());
    assert_eq!(snapshot.at("leakmod_churn_bulk"), Counts::freed(1009, CACHE_BYTES), "{:#?}", snapshot.callers());
}

// Objects handed out in bulk pass no probe. Their frees must then change nothing.
#[test]
#[ignore = "needs a virtual machine: make test-kernels"]
fn objects_allocated_in_bulk_do_no_harm() {
    needs!(Feature::Bpf);
    let module = Module::load(&[]);
    let mut memleak = Memleak::kernel(&["--module", "leakmod", "--probe-set", "kernel-slab"]);
    module.allocate("bulk", 43);
    module.allocate("cache", 47);
    let expected = [Expected { kind: "cache", counts: Counts::kept(47, CACHE_BYTES) }];
    assert_counted(&memleak.settled(), &expected);
    module.remove();
    assert_counted(&memleak.settled(), &freed(&expected));
}

// tracefs is often not mounted in containers. Nothing but the names of flags depends on it, and memleak says so.
#[test]
#[ignore = "needs a virtual machine: make test-kernels"]
fn counts_exactly_without_tracefs() {
    needs!(Feature::Bpf, Feature::MountNamespace);
    let module = Module::load(&[]);
    let folder = tempfile::tempdir().expect("a folder for the run can be made");
    // /sys/kernel/debug/tracing is mounted when it is looked at.
    let script = "umount /sys/kernel/debug/tracing; umount /sys/kernel/debug; umount /sys/kernel/tracing; exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(memleak_command().get_program());
    command.args(["kernel", "--json", "--interval", "200ms", "--set", "live.sites=0", "--set", "kernel.budget=off"]);
    command.args(["--module", "leakmod", "--probe-set", "kernel-slab"]).current_dir(folder.path());
    let mut memleak = Memleak::spawn(&mut command, folder);
    memleak.wait_until("the first snapshot", |_| true);
    module.allocate("kmalloc", 101);
    let expected = [Expected { kind: "kmalloc", counts: Counts::kept(101, KMALLOC_BYTES) }];
    let last = memleak.settled();
    assert_counted(&last, &expected);
    // Linux 6.10 and newer tell the names in their type information.
    let flags = last.sites.iter().filter_map(|s| s.kernel.as_ref()).map(|k| k.gfp.as_str());
    let are_named = flags.clone().any(|gfp| gfp.contains("GFP_KERNEL"));
    let stderr = memleak.stderr();
    assert_eq!(stderr.contains("tracefs"), !are_named, "{:?}\n{stderr}", flags.collect::<Vec<_>>());
}

// A kernel without a tracepoint says which, and what to do.
#[test]
#[ignore = "needs a virtual machine: make test-kernels"]
fn missing_tracepoint_is_named() {
    needs!(Feature::Bpf);
    let Some(reason) = backend_missing("tracepoint", "kernel-vmalloc") else {
        memleak_tests::skip("this kernel has all tracepoints");
        return;
    };
    assert!(reason.contains("alloc_vmap_area"), "{reason}");
}

// Locks the kernel down for good: tests/vm/run.sh runs it on its own, as the last one.
#[test]
#[ignore = "locks the kernel down: make test-kernels"]
fn locked_down_kernel_is_named() {
    needs!(Feature::Bpf);
    let lockdown = Path::new("/sys/kernel/security/lockdown");
    if let Err(error) = fs::write(lockdown, "confidentiality") {
        memleak_tests::skip(&format!("the kernel cannot be locked down: {error}"));
        return;
    }
    let (code, _, stderr) = output_within(memleak_command().args(["kernel", "--duration", "1s"]));
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("locked down"), "{stderr}");
}
