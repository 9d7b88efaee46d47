//! Every allocator function of every allocator, probed where placement says, in a program that calls it so many times.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use memleak_probes::{
    Backend, Features, FunctionSpec, Library, ProbeSetSpec, Returns, Role, SetKind, Settings, Size, Tracker,
};

use crate::programs;

/// Calls of each function; a prime, so that nothing comes out right by halves or twice.
const CALLS: u64 = 211;
/// What caller.c asks for, bytes.
const SIZE: u64 = 77;
const ALIGNED_SIZE: u64 = 192;

/// A function that caller.c knows: symbol, role, size argument, its factor, block argument, bytes per call.
type Known = (&'static str, Role, u8, Option<u8>, Option<u8>, u64);

const C_FUNCTIONS: [Known; 11] = [
    ("malloc", Role::Alloc, 0, None, None, SIZE),
    ("calloc", Role::Alloc, 1, Some(0), None, SIZE),
    ("realloc", Role::Realloc, 1, None, Some(0), SIZE),
    ("reallocarray", Role::Realloc, 2, Some(1), Some(0), SIZE),
    ("posix_memalign", Role::Alloc, 2, None, None, ALIGNED_SIZE),
    ("aligned_alloc", Role::Alloc, 1, None, None, ALIGNED_SIZE),
    ("memalign", Role::Alloc, 1, None, None, ALIGNED_SIZE),
    ("valloc", Role::Alloc, 0, None, None, SIZE),
    ("pvalloc", Role::Alloc, 0, None, None, SIZE),
    ("free", Role::Free, 0, None, Some(0), 0),
    ("cfree", Role::Free, 0, None, Some(0), 0),
];

const CXX_FUNCTIONS: [Known; 7] = [
    ("_Znwm", Role::Alloc, 0, None, None, SIZE),
    ("_Znam", Role::Alloc, 0, None, None, SIZE),
    ("_ZnwmSt11align_val_t", Role::Alloc, 0, None, None, ALIGNED_SIZE),
    ("_ZdlPv", Role::Free, 0, None, Some(0), 0),
    ("_ZdaPv", Role::Free, 0, None, Some(0), 0),
    ("_ZdlPvm", Role::Free, 1, None, Some(0), 0),
    ("_ZdlPvSt11align_val_t", Role::Free, 0, None, Some(0), 0),
];

fn probe_set(number: u32, known: Known) -> ProbeSetSpec {
    let (symbol, role, arg, times, block_arg, _) = known;
    let returns = match symbol {
        "posix_memalign" => Returns::Pointer { arg: 0, ok: 0 },
        _ => Returns::Value { failed: 0 },
    };
    let size = Size::Argument { arg, times };
    let function = FunctionSpec { symbol: symbol.into(), role, size, block_arg, returns, range: false, optional: true };
    ProbeSetSpec {
        kind: SetKind::Functions,
        number,
        name: symbol.into(),
        domain: "memory".into(),
        prefixes: vec![String::new()],
        functions: vec![function],
    }
}

fn tracker(backend: Option<Backend>) -> Tracker {
    let settings = Settings {
        backend,
        max_outstanding: 10_000,
        max_sites: 1000,
        max_threads: 100,
        max_frames: 16,
        min_size: 0,
        sample_bytes: 0,
        trace_events: false,
        at_entry: false,
        stop_children: false,
    };
    Tracker::load(settings).unwrap()
}

/// A caller that is not let live on when a check fails.
struct Caller(Child);

impl Drop for Caller {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Caller {
    fn start(program: &Path, preload: Option<&Path>, function: &str) -> Caller {
        let mut command = Command::new(program);
        command.arg(function).arg(CALLS.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(library) = preload {
            command.env("LD_PRELOAD", library);
        }
        let mut caller = Caller(command.spawn().unwrap());
        caller.await_pause();
        caller
    }

    fn await_pause(&mut self) {
        let mut byte = [0];
        if self.0.stdout.as_mut().unwrap().read_exact(&mut byte).is_err() {
            panic!("the program ended early: {}", self.0.wait().unwrap());
        }
    }

    fn go_on(&mut self) {
        self.0.stdin.as_mut().unwrap().write_all(b".").unwrap();
    }
}

/// Probes each of the functions that the library has, alone, in a program of its own; checks every count.
fn check(tracker: &mut Tracker, program: &Path, library: &Path, preload: Option<&Path>, functions: &[Known]) {
    let name = library.file_name().unwrap().to_string_lossy().into_owned();
    let library = Library { path: library.to_owned(), name: name.clone(), debug: None };
    let mut probed = 0;
    for (n, known) in functions.iter().enumerate() {
        let &(symbol, role, .., bytes) = known;
        let instance = n as u32 + 1;
        let set = probe_set(instance, *known);
        if tracker.symbols(&set, &library).unwrap().functions.is_empty() {
            continue;
        }
        let mut caller = Caller::start(program, preload, symbol);
        tracker.add_target(caller.0.id(), instance, false).unwrap();
        let attached = tracker.attach(instance, &set, &library).unwrap();
        // A symbol of several versions is several functions, of which a new program calls one.
        let places: Vec<_> = attached.iter().map(|a| a.placement.clone()).collect();
        eprintln!("{name} {symbol}: {places:?}");
        caller.go_on();
        caller.await_pause();
        let counters = tracker.read_counters(instance).unwrap();
        let sites = tracker.read_sites().unwrap();
        let mine = sites.iter().filter(|(key, _)| key.instance == instance).map(|(_, totals)| totals);
        let (count, size) = mine.fold((0, 0), |(c, b), t| (c + t.allocated_count, b + t.allocated_bytes));
        caller.go_on();
        let status = caller.0.wait().unwrap();
        assert_eq!(status.code(), Some(0), "{name} {symbol} at {places:?}: the program ended with {status}");
        let (blocks, hits) = if role == Role::Free { (0, CALLS) } else { (CALLS, 2 * CALLS) };
        assert_eq!(counters.hits, hits, "{name} {symbol} at {places:?}: {counters:?}");
        assert_eq!((count, size), (blocks, blocks * bytes), "{name} {symbol} at {places:?}: {counters:?}");
        assert_eq!(counters.missed_returns + counters.stacks_failed, 0, "{name} {symbol}: {counters:?}");
        let frees = if role == Role::Free { CALLS } else { 0 };
        assert_eq!(counters.unmatched_frees, frees, "{name} {symbol}: {counters:?}");
        tracker.forget(instance).unwrap();
        probed += 1;
    }
    assert!(probed >= 5, "{name}: only {probed} of {} functions were found", functions.len());
}

/// Whether probes can be attached here; a note says so when not. (The tests load their programs side by side, which each
/// find out what works here with the same functions of this process.)
fn can_attach() -> bool {
    // SAFETY: geteuid takes nothing and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        programs::skip("not root (run the tests with sudo)");
    }
    root
}

/// Checks a library that a program without an allocator of its own preloads.
fn check_preloaded(library: &str) {
    if !can_attach() {
        return;
    }
    match programs::library(library).and_then(|path| Ok((programs::compiled(library, &[])?, path))) {
        Ok((program, path)) => {
            let functions = [&C_FUNCTIONS[..], &CXX_FUNCTIONS].concat();
            check(&mut tracker(None), &program, &path, Some(&path), &functions);
        }
        Err(why) => programs::skip(&why),
    }
}

/// Checks a program that brings its library along, by the name of one or as the program itself.
fn check_linked(compiler: &str, name: &str, arguments: &[&str], library: Option<&str>, functions: &[Known]) {
    if !can_attach() {
        return;
    }
    let program = match programs::compile(compiler, name, arguments) {
        Ok(program) => program,
        Err(why) => return programs::skip(&why),
    };
    let path: PathBuf = match library.map(programs::library) {
        None => program.clone(),
        Some(Ok(path)) => path,
        Some(Err(why)) => return programs::skip(&why),
    };
    check(&mut tracker(None), &program, &path, None, functions);
}

/// Each call is hit once at its entry and once at its return, and the program computes what it always does.
#[test]
fn probes_in_glibc_count_every_call_and_do_no_harm() {
    check_linked("gcc", "glibc", &[], Some("libc.so.6"), &C_FUNCTIONS);
}

/// The same through every way of attaching that works here: the place does not depend on it.
#[test]
fn probes_count_the_same_through_every_backend() {
    if !can_attach() {
        return;
    }
    let program = match programs::compiled("backends", &[]) {
        Ok(program) => program,
        Err(why) => return programs::skip(&why),
    };
    let library = programs::library("libc.so.6").unwrap();
    let features = Features::detect().unwrap();
    let mut checked = 0;
    for (backend, _) in features.results().filter(|(_, result)| result.is_ok()) {
        check(&mut tracker(Some(backend)), &program, &library, None, &C_FUNCTIONS);
        checked += 1;
    }
    assert_ne!(checked, 0);
}

#[test]
fn probes_in_musl_count_every_call_and_do_no_harm() {
    check_linked("musl-gcc", "musl", &[], Some("libc.so"), &C_FUNCTIONS);
}

/// Code and symbols of the allocator are in the program's own file.
#[test]
fn probes_in_a_static_program_count_every_call_and_do_no_harm() {
    check_linked("gcc", "static-live", &["-static", "-Wl,-u,reallocarray"], None, &C_FUNCTIONS);
}

/// C++'s operators, which call the C library's functions.
#[test]
fn probes_in_libstdcxx_count_every_call_and_do_no_harm() {
    let arguments = ["-Wl,--no-as-needed", "-l:libstdc++.so.6"];
    check_linked("gcc", "libstdcxx", &arguments, Some("libstdc++.so.6"), &CXX_FUNCTIONS);
}

#[test]
fn probes_in_jemalloc_count_every_call_and_do_no_harm() {
    check_preloaded("libjemalloc.so.2");
}

#[test]
fn probes_in_tcmalloc_count_every_call_and_do_no_harm() {
    check_preloaded("libtcmalloc_minimal.so.4");
}

#[test]
fn probes_in_mimalloc_count_every_call_and_do_no_harm() {
    check_preloaded("libmimalloc.so");
}
