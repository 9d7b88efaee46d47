//! Allocators beyond the C library's: preloaded, linked in, or unknown; each counted exactly and by its own probe set.

use std::path::Path;
use std::process::Command;

use memleak_tests::{Counts, Feature, Memleak, Program, Snapshot, library_path, needs, program_path};

use super::glibc::{assert_nothing_else, expected_common_kinds, expected_kinds};
use super::user_sets::{assert_pool, option, plugins};
use super::{Expected, assert_clean, assert_sites, freed, kept};

/// Debian's shared libraries.
const JEMALLOC: &str = "libjemalloc.so.2";
const TCMALLOC: &str = "libtcmalloc.so.4";
const TCMALLOC_MINIMAL: &str = "libtcmalloc_minimal.so.4";
const MIMALLOC: &str = "libmimalloc.so.2";

/// Runs one step of a program with a library preloaded and returns the settled snapshot, checked for a clean account.
fn account_preloaded(program: &str, library: &str) -> Snapshot {
    let path = program_path(program).expect("the program was built");
    let library = library_path(library).expect("the library is installed");
    account_command(Command::new(path).env("LD_PRELOAD", library), &[])
}

/// The same for any command.
fn account_command(command: &mut Command, args: &[&str]) -> Snapshot {
    let mut program = Program::start_command(command);
    let mut memleak = Memleak::watch_with(program.pid(), args);
    program.step("done");
    let snapshot = memleak.settled();
    assert_clean(&snapshot, program.pid());
    snapshot
}

/// Every site belongs to this probe set.
fn assert_all_from(snapshot: &Snapshot, probe_set: &str) {
    assert!(snapshot.sites.iter().all(|site| site.probe_set == probe_set), "{:#?}", snapshot.callers());
}

/// One of the programs `kinds` on an allocator which may share one function between several names, or have others.
fn kinds_with(program: &str, library: &str, probe_set: &str, expected: &[Expected]) {
    let snapshot = account_preloaded(program, library);
    for line in expected {
        assert_eq!(snapshot.at(line.at), line.counts, "counted at {}: {:#?}", line.at, snapshot.callers());
    }
    assert_nothing_else(&snapshot, expected);
    // glibc's reallocarray calls the allocator's realloc where the allocator has none of its own.
    let foreign = snapshot.sites.iter().filter(|site| site.probe_set != probe_set);
    let names: Vec<&str> = foreign.map(|site| site.function.as_str()).collect();
    assert!(names.iter().all(|name| *name == "reallocarray"), "{:#?}", snapshot.callers());
}

// The malloc family of a preloaded allocator: libc's own functions are there too, and none counts twice.
#[test]
fn preloaded_jemalloc_malloc_family_is_counted_exactly() {
    needs!(Feature::Bpf, Feature::Library(JEMALLOC));
    kinds_with("kinds-no-pvalloc", JEMALLOC, "jemalloc", &expected_common_kinds());
}

#[test]
fn preloaded_tcmalloc_malloc_family_is_counted_exactly() {
    needs!(Feature::Bpf, Feature::Library(TCMALLOC));
    kinds_with("kinds", TCMALLOC, "tcmalloc", &expected_kinds());
}

#[test]
fn preloaded_tcmalloc_minimal_malloc_family_is_counted_exactly() {
    needs!(Feature::Bpf, Feature::Library(TCMALLOC_MINIMAL));
    kinds_with("kinds", TCMALLOC_MINIMAL, "tcmalloc", &expected_kinds());
}

#[test]
fn preloaded_mimalloc_malloc_family_is_counted_exactly() {
    needs!(Feature::Bpf, Feature::Library(MIMALLOC));
    kinds_with("kinds", MIMALLOC, "mimalloc", &expected_kinds());
}

// mallocx and its relatives do not pass through malloc.
#[test]
fn jemalloc_mallocx_family_is_counted_exactly() {
    needs!(Feature::Bpf, Feature::Library(JEMALLOC));
    let snapshot = account_preloaded("jemalloc", JEMALLOC);
    let expected = [
        kept("leak_mallocx", "mallocx", 101, 17),
        freed("churn_mallocx", "mallocx", 59, 17),
        kept("leak_mallocx_aligned", "mallocx", 97, 33),
        freed("churn_mallocx_aligned", "mallocx", 59, 33),
        kept("leak_mallocx_large", "mallocx", 3, 100_003),
        freed("churn_mallocx_large", "mallocx", 59, 100_003),
        kept("leak_rallocx", "rallocx", 89, 1029),
        freed("churn_rallocx", "rallocx", 59, 1029),
        freed("grows", "mallocx", 37, 1001),
        kept("resize_in_place", "xallocx", 37, 1021),
        kept("stays", "mallocx", 31, 39),
        kept("leak_valloc", "valloc", 79, 47),
        freed("churn_valloc", "valloc", 59, 47),
        kept("leak_mixed", "mallocx", 83, 35),
        freed("churn_mixed", "mallocx", 59, 35),
    ];
    assert_sites(&snapshot, &expected);
    assert_all_from(&snapshot, "jemalloc");
    let resized = Counts::freed(89 + 59, 13);
    assert_eq!(snapshot.at("to_be_resized"), resized);
    let sum = expected.iter().fold(resized, |sum, line| sum.plus(line.counts));
    assert_eq!(snapshot.totals, sum, "{:#?}", snapshot.callers());
}

/// What the program `tcmalloc` does.
fn expected_tcmalloc() -> Vec<Expected> {
    vec![
        kept("leak_tc_malloc", "malloc|tc_malloc", 101, 17),
        freed("churn_tc_malloc", "malloc|tc_malloc", 59, 17),
        kept("leak_tc_skip", "tc_malloc_skip_new_handler", 97, 33),
        freed("churn_tc_skip", "tc_malloc_skip_new_handler", 59, 33),
        kept("leak_tc_calloc", "calloc|tc_calloc", 89, 33),
        freed("churn_tc_calloc", "calloc|tc_calloc", 59, 33),
        kept("leak_tc_realloc", "realloc|tc_realloc", 83, 29),
        freed("churn_tc_realloc", "realloc|tc_realloc", 59, 29),
        kept("leak_tc_memalign", "memalign|aligned_alloc|tc_memalign", 79, 43),
        freed("churn_tc_memalign", "memalign|aligned_alloc|tc_memalign", 59, 43),
        kept("leak_tc_posix_memalign", "posix_memalign|tc_posix_memalign", 73, 41),
        freed("churn_tc_posix_memalign", "posix_memalign|tc_posix_memalign", 59, 41),
        kept("leak_tc_valloc", "valloc|tc_valloc", 71, 47),
        freed("churn_tc_valloc", "valloc|tc_valloc", 59, 47),
        kept("leak_tc_new", "_Znwm|_Znam|tc_new", 67, 71),
        freed("churn_tc_new", "_Znwm|_Znam|tc_new", 59, 71),
        kept("leak_tc_newarray_aligned", "_ZnwmSt11align_val_t|_ZnamSt11align_val_t|tc_newarray_aligned", 61, 73),
        freed("churn_tc_newarray_aligned", "_ZnwmSt11align_val_t|_ZnamSt11align_val_t|tc_newarray_aligned", 59, 73),
        kept("leak_mixed", "malloc|tc_malloc", 59, 300_007),
        freed("churn_mixed", "malloc|tc_malloc", 59, 300_007),
    ]
}

fn tc_family(library: &str) {
    let snapshot = account_preloaded("tcmalloc", library);
    let expected = expected_tcmalloc();
    assert_sites(&snapshot, &expected);
    assert_nothing_else(&snapshot, &expected);
    assert_all_from(&snapshot, "tcmalloc");
}

// The tc_ names are mostly other names of the malloc family: each call counts once, sized deletes included.
#[test]
fn tcmalloc_tc_family_is_counted_exactly() {
    needs!(Feature::Bpf, Feature::Library(TCMALLOC));
    tc_family(TCMALLOC);
}

#[test]
fn tcmalloc_minimal_tc_family_is_counted_exactly() {
    needs!(Feature::Bpf, Feature::Library(TCMALLOC_MINIMAL));
    tc_family(TCMALLOC_MINIMAL);
}

// The mi_ family, with heaps of the program's own, aligned and resized blocks.
#[test]
fn mimalloc_mi_family_is_counted_exactly() {
    needs!(Feature::Bpf, Feature::Library(MIMALLOC));
    let snapshot = account_preloaded("mimalloc", MIMALLOC);
    let pairs = [
        ("mi_malloc", 101, 17),
        ("mi_zalloc", 97, 19),
        ("mi_malloc_small", 89, 23),
        ("mi_calloc", 83, 33),
        ("mi_mallocn", 79, 35),
        ("mi_realloc", 73, 1029),
        ("mi_reallocf", 71, 1031),
        ("mi_rezalloc", 67, 1033),
        ("mi_recalloc", 61, 41 * 27),
        ("mi_malloc_aligned", 53, 43),
        ("mi_calloc_aligned", 47, 45),
        ("mi_realloc_aligned", 43, 1039),
        ("mi_aligned_alloc", 41, 51),
        ("mi_posix_memalign", 37, 53),
        ("mi_new", 31, 71),
        ("mi_new_n", 29, 75),
        // Its size is no argument.
        ("mi_strdup", 23, 0),
        ("mi_heap_malloc", 19, 77),
        ("mi_heap_calloc", 17, 81),
        ("mi_heap_realloc", 13, 1041),
        ("mi_heap_malloc_aligned", 11, 83),
        ("mi_large", 7, 3_000_017),
        ("mixed", 5, 87),
    ];
    let mut sum = Counts::default();
    for (name, count, size) in pairs {
        let (leaked, churned) = (Counts::kept(count, size), Counts::freed(59, size));
        assert_eq!(snapshot.at(&format!("leak_{name}")), leaked, "leak_{name}");
        assert_eq!(snapshot.at(&format!("churn_{name}")), churned, "churn_{name}");
        sum = sum.plus(leaked).plus(churned);
    }
    let resized = 73 + 71 + 67 + 61 + 43 + 13 + 6 * 59;
    assert_eq!(snapshot.at("to_be_resized"), Counts::freed(resized, 13));
    assert_eq!(snapshot.totals, sum.plus(Counts::freed(resized, 13)), "{:#?}", snapshot.callers());
    assert_all_from(&snapshot, "mimalloc");
}

/// What the program `operators` keeps: where, how often, and how much.
const OPERATORS: [(&str, u64, u64); 12] = [
    ("plain", 101, 17),
    ("array", 97, 19),
    ("nothrow", 89, 23),
    ("array_nothrow", 83, 29),
    ("aligned", 79, 31),
    ("array_aligned", 73, 37),
    ("aligned_nothrow", 71, 41),
    ("array_aligned_nothrow", 67, 43),
    ("sized", 61, 47),
    ("array_sized", 53, 51),
    ("sized_aligned", 47, 57),
    ("array_sized_aligned", 43, 61),
];

fn operators_with(library: &str, probe_set: &str) {
    let snapshot = account_preloaded("operators", library);
    let mut sum = Counts::default();
    for (name, count, size) in OPERATORS {
        let (leaked, churned) = (Counts::kept(count, size), Counts::freed(59, size));
        assert_eq!(snapshot.at(&format!("leak_{name}")), leaked, "leak_{name}: {:#?}", snapshot.callers());
        assert_eq!(snapshot.at(&format!("churn_{name}")), churned, "churn_{name}: {:#?}", snapshot.callers());
        sum = sum.plus(leaked).plus(churned);
    }
    assert_eq!(snapshot.totals, sum, "{:#?}", snapshot.callers());
    assert_all_from(&snapshot, probe_set);
}

// All forms of operator new and delete where the allocator brings them itself, on paths that do not pass malloc.
#[test]
fn jemalloc_operators_are_counted_exactly() {
    needs!(Feature::Bpf, Feature::Library(JEMALLOC), Feature::Program("operators"));
    operators_with(JEMALLOC, "jemalloc");
}

#[test]
fn tcmalloc_operators_are_counted_exactly() {
    needs!(Feature::Bpf, Feature::Library(TCMALLOC), Feature::Program("operators"));
    operators_with(TCMALLOC, "tcmalloc");
}

#[test]
fn tcmalloc_minimal_operators_are_counted_exactly() {
    needs!(Feature::Bpf, Feature::Library(TCMALLOC_MINIMAL), Feature::Program("operators"));
    operators_with(TCMALLOC_MINIMAL, "tcmalloc");
}

#[test]
fn mimalloc_operators_are_counted_exactly() {
    needs!(Feature::Bpf, Feature::Library(MIMALLOC), Feature::Program("operators"));
    operators_with(MIMALLOC, "mimalloc");
}

// On the C++ library's own operators the bytes are the same, counted where malloc is called.
#[test]
fn operators_that_rest_on_malloc_are_counted_once() {
    needs!(Feature::Bpf, Feature::Program("operators"));
    let snapshot = account_command(&mut Command::new(program_path("operators").expect("built")), &[]);
    // Aligned operators ask aligned_alloc for whole alignments: 128 bytes each here.
    let plain: Counts = OPERATORS
        .iter()
        .filter(|o| !o.0.contains("aligned"))
        .fold(Counts::default(), |sum, o| sum.plus(Counts::kept(o.1, o.2)).plus(Counts::freed(59, o.2)));
    let aligned: u64 = OPERATORS.iter().filter(|o| o.0.contains("aligned")).map(|o| o.1).sum();
    let sum = plain.plus(Counts::kept(aligned, 128)).plus(Counts::freed(6 * 59, 128));
    assert_eq!(snapshot.totals, sum, "{:#?}", snapshot.callers());
    assert_all_from(&snapshot, "glibc");
}

// A program's own operators hand out blocks that malloc never sees; those that rest on malloc count once.
#[test]
fn own_operators_are_counted_exactly() {
    needs!(Feature::Bpf, Feature::Program("own_operators"));
    let snapshot = account_command(&mut Command::new(program_path("own_operators").expect("built")), &[]);
    let at = |set: &str, what: &str| {
        snapshot.sum(|site| {
            site.probe_set == set
                && site.frames.iter().any(|f| f.function.as_deref().is_some_and(|name| name.starts_with(what)))
        })
    };
    assert_eq!(at("operators", "leak_from_pool"), Counts::kept(31, 71), "{:#?}", snapshot.callers());
    assert_eq!(at("operators", "churn_from_pool"), Counts::freed(29, 73));
    assert_eq!(at("operators", "leak_from_malloc"), Counts::kept(23, 1001));
    assert_eq!(at("operators", "churn_from_malloc"), Counts::freed(19, 1003));
    // Called by operator new[] of the C++ library, which has no frame pointer to walk on from.
    assert_eq!(snapshot.sum(|site| site.counts == Counts::kept(17, 79)), Counts::kept(17, 79));
    assert_eq!(at("glibc", "leak_malloc"), Counts::kept(13, 83));
    let parts = [(31, 71), (23, 1001), (17, 79), (13, 83)].map(|(n, size)| Counts::kept(n, size));
    let sum = parts.into_iter().fold(Counts::freed(29, 73).plus(Counts::freed(19, 1003)), Counts::plus);
    assert_eq!(snapshot.totals, sum, "{:#?}", snapshot.callers());
}

// An allocator without a set of its own, in the program itself: what takes malloc over is watched all the same.
#[test]
fn unknown_allocator_of_the_program_is_counted_exactly() {
    needs!(Feature::Bpf);
    let snapshot = account_command(&mut Command::new(program_path("own_malloc").expect("built")), &[]);
    assert_eq!(snapshot.site("leak_malloc").counts, Counts::kept(101, 17));
    assert_eq!(snapshot.site("churn_malloc").counts, Counts::freed(59, 17));
    assert_eq!(snapshot.site("leak_calloc").counts, Counts::kept(101, 33));
    let total = Counts::kept(101, 17 + 33 + 21).outstanding_bytes;
    assert_eq!(snapshot.totals.outstanding_bytes, total, "{:#?}", snapshot.callers());
    assert_eq!(snapshot.totals.outstanding_count, 3 * 101);
    assert_all_from(&snapshot, "interposed");
}

// Two allocators side by side: each counted by its own set, and neither sees the other's blocks.
#[test]
fn two_allocators_in_one_process_are_told_apart() {
    needs!(Feature::Bpf, Feature::Library(MIMALLOC));
    let path = program_path("two_allocators").expect("built");
    let snapshot = account_command(Command::new(path).arg(library_path(MIMALLOC).expect("installed")), &[]);
    let expected = [
        kept("leak_malloc", "malloc", 101, 17),
        freed("churn_malloc", "malloc", 59, 19),
        kept("leak_other", "mi_malloc", 97, 23),
        freed("churn_other", "mi_malloc", 53, 29),
    ];
    assert_sites(&snapshot, &expected);
    assert_nothing_else(&snapshot, &expected);
    for (at, set) in [("leak_malloc", "glibc"), ("churn_malloc", "glibc"), ("leak_other", "mimalloc")] {
        assert_eq!(snapshot.site(at).probe_set, set);
    }
}

// Two sets that name the same function of one domain would count each call twice.
#[test]
fn function_of_two_sets_is_counted_once() {
    needs!(Feature::Bpf);
    let folder = plugins(
        r#"
        name = "again"
        kind = "userspace"
        [match]
        sonames = ["libc.so.6"]
        [[function]]
        symbols = ["malloc", "valloc"]
        role = "alloc"
        size = { arg = 0 }
        [[function]]
        symbol = "free"
        role = "free"
        old = { arg = 0 }
        "#,
    );
    let path = program_path("kinds").expect("built");
    let snapshot = account_command(&mut Command::new(path), &option(&folder));
    let expected = expected_kinds();
    assert_sites(&snapshot, &expected);
    assert_nothing_else(&snapshot, &expected);
}

// A copy of an allocator whose names have a prefix needs no set of its own.
#[test]
fn prefixed_names_are_found() {
    needs!(Feature::Bpf);
    let folder = plugins(
        r#"
        name = "prefixed"
        kind = "userspace"
        [match]
        defines = ["alloc", "alloc_large"]
        prefixes = ["", "pool_"]
        [[function]]
        symbols = ["alloc", "alloc_large"]
        role = "alloc"
        size = { arg = 0 }
        [[function]]
        symbols = ["free", "free_large"]
        role = "free"
        old = { arg = 0 }
        "#,
    );
    assert_pool(&folder);
}

/// Splits the debug information of `program` off into `debug` and leaves a stripped program that names it.
fn split_debug(program: &Path, debug: &Path) {
    let run = |args: &[&std::ffi::OsStr]| {
        let status = Command::new("objcopy").args(args).status().expect("objcopy can be started");
        assert!(status.success(), "objcopy {args:?}");
    };
    run(&["--only-keep-debug".as_ref(), program.as_ref(), debug.as_ref()]);
    let mut link = std::ffi::OsString::from("--add-gnu-debuglink=");
    link.push(debug);
    run(&["--strip-all".as_ref(), link.as_ref(), program.as_ref()]);
}

// A stripped static program has no names; its debug information beside it has.
#[test]
fn stripped_static_program_is_counted_through_its_debug_file() {
    needs!(Feature::Bpf, Feature::Program("kinds-static"), Feature::Command("objcopy"));
    let folder = tempfile::tempdir().expect("a folder can be made");
    let (program, debug) = (folder.path().join("kinds-stripped"), folder.path().join("kinds-stripped.debug"));
    std::fs::copy(program_path("kinds-static").expect("built"), &program).expect("the program can be copied");
    split_debug(&program, &debug);
    let snapshot = account_command(&mut Command::new(&program), &[]);
    let expected = expected_kinds();
    assert_sites(&snapshot, &expected);
    assert_nothing_else(&snapshot, &expected);
    assert_all_from(&snapshot, "glibc");
}

// Symbols of another build would put probes into the middle of instructions.
#[test]
fn debug_file_of_another_build_is_refused() {
    needs!(Feature::Bpf, Feature::Program("kinds-static"), Feature::Command("objcopy"));
    let folder = tempfile::tempdir().expect("a folder can be made");
    let (program, debug) = (folder.path().join("kinds-stripped"), folder.path().join("kinds-stripped.debug"));
    std::fs::copy(program_path("kinds-static").expect("built"), &program).expect("the program can be copied");
    split_debug(&program, &debug);
    std::fs::copy(program_path("kinds-musl-static").unwrap_or_else(|| program_path("kinds").expect("built")), &debug)
        .expect("the file can be replaced");
    let target = Program::start_command(&mut Command::new(&program));
    let outcome = Memleak::launch(&["-p", &target.pid().to_string(), "--duration", "5s"]).outcome();
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("symbol"), "says what is missing: {}", outcome.stderr);
}
