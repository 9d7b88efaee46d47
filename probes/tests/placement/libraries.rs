//! Every function of the machine's C libraries and allocators.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use memleak_probes::placement::{Needs, Reason, place};

use crate::disassembly::File;
use crate::{oracle, programs};

/// The string functions of C libraries are written in assembly and share their bodies: one function jumps behind the
/// first instruction of another, which only the whole file shows. Compilers do not, and allocators are compiled.
const SHARED_BODIES: [&str; 4] = ["mem", "__mem", "wmem", "bcopy"];

/// Everything that the shipped probe sets ask for, and more.
fn representative() -> impl Iterator<Item = Needs> {
    let arguments = [0b0, 0b1, 0b11, 0b111];
    arguments.into_iter().flat_map(|arguments| [false, true].map(|returns| Needs { arguments, returns }))
}

/// Checks every function of a file for all [`representative`] needs: the place is as good as the oracle's, and sound.
fn check(path: &Path, at_least: usize) {
    let file = File::read(path);
    let mut wrong = Vec::new();
    let mut counts: BTreeMap<Option<Reason>, usize> = BTreeMap::new();
    let mut checked = 0;
    for function in &file.functions {
        let Some(code) = file.code(function.start, function.end) else { continue };
        checked += 1;
        for needs in representative() {
            let placement = place(&code, needs);
            *counts.entry(placement.reason).or_default() += 1;
            let best = oracle::best(&file, function, needs);
            // The oracle does not look for jump tables.
            let as_good = best == placement.emulated.then_some((placement.offset, placement.sp_offset))
                || placement.reason == Some(Reason::Unprovable);
            let stepped = placement.emulated || oracle::is_accepted(&file, function, placement.offset);
            let fault = oracle::fault(&file, function, placement, needs)
                .filter(|_| !SHARED_BODIES.iter().any(|name| function.name.starts_with(name)));
            if !as_good || !stepped || fault.is_some() {
                let name = &function.name;
                let start = function.start;
                wrong.push(format!("{name} {start:#x} {needs:?}: {placement:?}, best {best:?}, {stepped}, {fault:?}"));
            }
        }
    }
    let places: usize = counts.values().sum();
    let emulated = counts.get(&None).copied().unwrap_or_default();
    eprintln!("{}: {checked} functions, {emulated} of {places} places emulated, {counts:?}", path.display());
    let shown = wrong[..wrong.len().min(40)].join("\n");
    assert!(wrong.is_empty(), "{}: {} wrong:\n{shown}", path.display(), wrong.len());
    assert!(checked >= at_least, "{}: only {checked} functions were found", path.display());
    // Without this a rule that always answers the entry would pass.
    assert!(emulated * 4 > places, "{}: only {emulated} of {places} places are emulated", path.display());
}

fn check_installed(library: &str, at_least: usize) {
    match programs::library(library) {
        Ok(path) => check(&path, at_least),
        Err(why) => programs::skip(&why),
    }
}

/// The one that nearly every target has.
#[test]
fn every_function_of_glibc_has_a_sound_place() {
    check_installed("libc.so.6", 2000);
}

/// Older and newer ones than the machine's: Debian's 2.31 and 2.41, where `tests/setup.sh glibcs` has put them.
#[test]
fn every_function_of_other_glibcs_has_a_sound_place() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("glibcs");
    let releases = std::fs::read_dir(&folder).into_iter().flatten().flatten();
    let found: Vec<PathBuf> = releases.map(|r| r.path().join("libc.so.6")).filter(|path| path.is_file()).collect();
    if found.is_empty() {
        // Not a matter of what the machine must have: they are fetched on demand.
        eprintln!("SKIP: no other glibc in {} (tests/setup.sh glibcs fetches some)", folder.display());
    }
    for path in found {
        check(&path, 2000);
    }
}

/// C++'s operators new and delete, and thousands of functions besides.
#[test]
fn every_function_of_libstdcxx_has_a_sound_place() {
    check_installed("libstdc++.so.6", 3000);
}

/// Stripped of all but its exports: the others are found through the unwind tables.
#[test]
fn every_function_of_jemalloc_has_a_sound_place() {
    check_installed("libjemalloc.so.2", 500);
}

#[test]
fn every_function_of_tcmalloc_has_a_sound_place() {
    check_installed("libtcmalloc_minimal.so.4", 200);
}

#[test]
fn every_function_of_mimalloc_has_a_sound_place() {
    check_installed("libmimalloc.so", 100);
}

/// Without unwind tables, and with functions in assembly.
#[test]
fn every_function_of_musl_has_a_sound_place() {
    check_installed("libc.so", 1000);
}

/// A static program keeps local functions and IFUNCs in its symbol table.
#[test]
fn every_function_of_a_static_program_has_a_sound_place() {
    match programs::compiled("static", &["-static"]) {
        Ok(program) => check(&program, 1000),
        Err(why) => programs::skip(&why),
    }
}

/// What this was compiled to: Rust, unoptimised, full of functions that compilers of C do not make.
#[test]
fn every_function_of_this_test_has_a_sound_place() {
    check(&PathBuf::from("/proc/self/exe").canonicalize().unwrap(), 1000);
}
