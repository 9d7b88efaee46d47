//! Probe sets that a user adds with a manifest alone: a pool allocator, and handles instead of memory.

use std::fs;
use std::process::Command;

use memleak_tests::{Counts, Feature, Memleak, Program, Snapshot, needs, program_path};
use tempfile::TempDir;

use super::{assert_clean, assert_sites, freed, kept};

/// The pool allocator of libpool.so, without its bulk release.
const POOL: &str = r#"
    name = "pool"
    kind = "userspace"
    [match]
    sonames = ["libpool.so"]
    [[function]]
    symbol = "pool_alloc"
    role = "alloc"
    size = { arg = 0 }
    [[function]]
    symbol = "pool_alloc_or_jump"
    role = "alloc"
    size = { arg = 0 }
    [[function]]
    symbol = "pool_alloc_large"
    role = "alloc"
    size = { arg = 0 }
    [[function]]
    symbol = "pool_free"
    role = "free"
    old = { arg = 0 }
    [[function]]
    symbol = "pool_free_large"
    role = "free"
    old = { arg = 0 }
"#;

/// Open files of the C library, counted one by one.
const STREAMS: &str = r#"
    name = "streams"
    kind = "userspace"
    domain = "files"
    [match]
    sonames = ["libc.so.6"]
    [[function]]
    symbol = "fopen"
    role = "alloc"
    size = { const = 1 }
    [[function]]
    symbol = "fclose"
    role = "free"
    old = { arg = 0 }
"#;

/// A plugin folder with one manifest.
pub(super) fn plugins(manifest: &str) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder can be made");
    fs::write(folder.path().join("added.toml"), manifest).expect("the manifest can be written");
    folder
}

/// `--plugins` with that folder.
pub(super) fn option(folder: &TempDir) -> [&str; 2] {
    ["--plugins", folder.path().to_str().expect("the folder has a plain name")]
}

/// Runs the program `pool` with a folder's manifests and checks its account; returns the snapshot.
pub(super) fn assert_pool(folder: &TempDir) -> Snapshot {
    let mut program = Program::start("pool");
    let mut memleak = Memleak::watch_with(program.pid(), &option(folder));
    program.step("done");
    let snapshot = memleak.settled();
    assert_clean(&snapshot, program.pid());
    let expected = [
        kept("pool_leak", "pool_alloc", 31, 79),
        freed("pool_churn", "pool_alloc", 37, 83),
        kept("pool_leak_large", "pool_alloc_large", 5, 2001),
        freed("pool_churn_large", "pool_alloc_large", 3, 2003),
    ];
    assert_sites(&snapshot, &expected);
    snapshot
}

// An allocator of one's own needs nothing but a manifest; a pool call that rests on malloc counts once.
#[test]
fn pool_allocator_is_counted_from_its_manifest() {
    needs!(Feature::Bpf);
    let folder = plugins(POOL);
    let snapshot = assert_pool(&folder);
    assert!(snapshot.sites.iter().all(|site| site.probe_set == "pool"), "{:#?}", snapshot.callers());
}

// An update replaces a library under a running program: a breakpoint at an offset of the new file would corrupt the old one.
#[test]
fn library_replaced_on_disk_is_probed_as_it_is_mapped() {
    needs!(Feature::Bpf);
    let manifest = plugins(POOL);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let copy = |from: &str, to: &str| {
        let to = folder.path().join(to);
        fs::copy(program_path(from).expect("it was built"), &to).expect("it can be copied");
        to
    };
    let (program, library) = (copy("pool", "pool"), copy("libpool.so", "libpool.so"));
    let mut program = Program::start_command(&mut Command::new(program));
    // Another library under the same name, as a package manager puts it there.
    fs::rename(copy("libplugin.so", "new"), library).expect("it can be renamed");
    let mut memleak = Memleak::watch_with(program.pid(), &option(&manifest));
    memleak.wait_for_message("libpool.so (replaced or deleted on disk: the file that is mapped is probed)");
    program.step("done");
    let snapshot = memleak.settled();
    assert_clean(&snapshot, program.pid());
    assert_eq!(snapshot.site("pool_leak").counts, Counts::kept(31, 79));
    assert_eq!(snapshot.site("pool_leak_large").counts, Counts::kept(5, 2001));
    program.step("done");
    program.finish();
}

// A free that nobody saw shows itself when the address is handed out again: the old block is closed and counted.
#[test]
fn missed_free_is_an_implicit_free() {
    needs!(Feature::Bpf);
    let folder = plugins(POOL);
    let mut program = Program::start("pool");
    let mut memleak = Memleak::watch_with(program.pid(), &option(&folder));
    program.step("done");
    assert_eq!(memleak.settled().site("pool_leak").counts, Counts::kept(31, 79));
    // The pool starts over and hands out the first 23 of the 31 addresses.
    program.step("done");
    let snapshot = memleak.settled();
    let left = Counts {
        allocated_bytes: 31 * 79,
        allocated_count: 31,
        freed_bytes: 23 * 79,
        freed_count: 23,
        outstanding_bytes: 8 * 79,
        outstanding_count: 8,
    };
    assert_eq!(snapshot.site("pool_leak").counts, left);
    assert_eq!(snapshot.site("handed_out_again").counts, Counts::kept(23, 79));
    assert_eq!(snapshot.process(program.pid()).lost("implicit_frees"), 23);
}

// A call that never returns must not make the thread's next calls look nested in it.
#[test]
fn allocation_after_longjmp_is_counted() {
    needs!(Feature::Bpf);
    let folder = plugins(POOL);
    let mut program = Program::start("longjmp");
    let mut memleak = Memleak::watch_with(program.pid(), &option(&folder));
    program.step("done");
    let snapshot = memleak.settled();
    assert_eq!(snapshot.site("malloc_after_jump").counts, Counts::kept(7, 97));
    assert_eq!(snapshot.site("after_jump").counts, Counts::kept(7, 89));
    assert_eq!(snapshot.at("jump_out"), Counts::default());
    assert_eq!(snapshot.process(program.pid()).lost("missed_returns"), 7);
}

// Handles are a domain of their own: fopen's block from malloc and its handle are both counted, each once.
#[test]
fn open_files_are_counted_beside_memory() {
    needs!(Feature::Bpf);
    let folder = plugins(STREAMS);
    let mut program = Program::start("files");
    let mut memleak = Memleak::watch_with(program.pid(), &option(&folder));
    program.step("done");
    let snapshot = memleak.settled();
    assert_clean(&snapshot, program.pid());
    let handles = |function| snapshot.sum(|site| site.probe_set == "streams" && site.caller() == Some(function));
    assert_eq!(handles("open_and_forget"), Counts::kept(7, 1));
    assert_eq!(handles("open_and_close"), Counts::freed(5, 1));
    assert_eq!(handles("fail_to_open"), Counts::default());
    // One FILE from malloc per open stream; the seven that were forgotten, and nothing else, are outstanding.
    let memory = snapshot.sum(|site| site.probe_set == "glibc");
    assert_eq!(memory.outstanding_count, 7, "{:#?}", snapshot.callers());
}

// An allocator that arrives with a library after the attach is watched as soon as the mapping is noticed.
#[test]
fn allocator_loaded_later_is_watched() {
    needs!(Feature::Bpf);
    let folder = plugins(POOL);
    let library = program_path("libpool.so").expect("the library was built");
    let args = [library.as_os_str(), "pool_alloc".as_ref(), "103".as_ref()];
    let mut program = Program::start_with("dlopen", &args);
    let mut memleak = Memleak::watch_with(program.pid(), &option(&folder));
    program.step("loaded");
    // New mappings are looked for once per snapshot.
    memleak.settled();
    program.step("done");
    let snapshot = memleak.settled();
    let site = snapshot.site("call_loaded_allocator");
    assert_eq!(site.counts, Counts::kept(19, 103));
    assert_eq!(site.probe_set, "pool");
}

// One broken probe set is named with its reason and costs only itself: glibc is counted all the same.
#[test]
fn probe_set_that_cannot_attach_leaves_the_others_working() {
    needs!(Feature::Bpf);
    let folder = plugins(&POOL.replace("\"pool_alloc\"", "\"pool_no_such_function\""));
    let mut program = Program::start("pool");
    let mut memleak = Memleak::watch_with(program.pid(), &option(&folder));
    program.step("done");
    let snapshot = memleak.settled();
    assert_eq!(snapshot.through("pool_leak_large"), Counts::kept(5, 2003));
    let stderr = memleak.stderr();
    assert!(stderr.contains("pool_no_such_function"), "{stderr}");
}
