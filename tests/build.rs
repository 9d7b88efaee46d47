//! Compiles the test programs (`programs/`) and the demo service (`demo/`) into the build folder.
//!
//! The programs keep frame pointers and are built without sibling calls, so that a call stack has exactly the
//! frames that the source shows. Variants for which a tool chain is missing (musl, C++) are left out: the tests
//! that need them say what is missing. Everything else must compile.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Flags of every program: light optimisation, lines, frame pointers, no call turned into a jump, no loop into a
/// sequence of calls (which would be as many allocation sites).
const COMMON: &[&str] = &[
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    "-fno-omit-frame-pointer",
    "-fno-optimize-sibling-calls",
    "--param=max-completely-peel-times=0",
    "-pthread",
];

/// One output of the compiler.
struct Build<'a> {
    /// File name of the result.
    name: &'a str,
    /// Source below the package folder.
    source: &'a str,
    /// Compiler; when it is not installed the output is left out.
    compiler: &'a str,
    /// Flags beyond [`COMMON`].
    flags: &'a [&'a str],
}

/// Libraries come first: programs link against them.
const BUILDS: &[Build] = &[
    lib("libpool.so", "programs/libpool.c"),
    lib("libplugin.so", "programs/libplugin.c"),
    // Without frame pointers, and with frames of different sizes.
    gcc("libplugin-small.so", "programs/libplugin.c", &["-shared", "-fPIC", "-fomit-frame-pointer"]),
    gcc("libplugin-large.so", "programs/libplugin.c", &["-shared", "-fPIC", "-fomit-frame-pointer", "-DROOM=900"]),
    gcc("libsteps.so", "programs/libsteps.c", &["-shared", "-fPIC", "-fomit-frame-pointer"]),
    gcc("kinds", "programs/kinds.c", &[]),
    gcc("kinds-static", "programs/kinds.c", &["-static"]),
    // For allocators that lack pvalloc: one's block is none of the other's business.
    gcc("kinds-no-pvalloc", "programs/kinds.c", &["-DNO_PVALLOC"]),
    gcc("kinds-static-stripped", "programs/kinds.c", &["-static", "-s"]),
    Build { name: "kinds-musl", source: "programs/kinds.c", compiler: "musl-gcc", flags: &[] },
    Build { name: "kinds-musl-static", source: "programs/kinds.c", compiler: "musl-gcc", flags: &["-static"] },
    gcc("reallocs", "programs/reallocs.c", &[]),
    gcc("null_returns", "programs/null_returns.c", &[]),
    gcc("cross_thread", "programs/cross_thread.c", &[]),
    gcc("threads64", "programs/threads64.c", &[]),
    gcc("fork", "programs/fork.c", &[]),
    gcc("eventfds", "programs/eventfds.c", &[]),
    gcc("exec", "programs/exec.c", &[]),
    gcc("exit", "programs/exit.c", &[]),
    gcc("interrupted", "programs/interrupted.c", &[]),
    Build { name: "interrupted-musl", source: "programs/interrupted.c", compiler: "musl-gcc", flags: &[] },
    gcc("run", "programs/run.c", &[]),
    gcc("leaker", "programs/leaker.c", &[]),
    gcc("busy", "programs/busy.c", &[]),
    gcc("shapes", "programs/shapes.c", &[]),
    gcc("hot", "programs/hot.c", &[]),
    gcc("big", "programs/big.c", &[]),
    gcc("growth", "programs/growth.c", &[]),
    gcc("heap_shapes", "programs/heap_shapes.c", &[]),
    gcc("jump", "programs/jump.c", &[]),
    gcc("fork_busy", "programs/fork_busy.c", &[]),
    gcc("early", "programs/early.c", &[]),
    gcc("dlopen", "programs/dlopen.c", &["-ldl"]),
    gcc("reload", "programs/reload.c", &["-ldl"]),
    gcc("sampled", "programs/sampled.c", &[]),
    gcc("mapper", "programs/mapper.c", &[]),
    gcc("files", "programs/files.c", &[]),
    // Without debug information the symbol table alone names the function, with the name made to do harm.
    gcc("hostile", "programs/hostile.c", &["-g0"]),
    gcc("pool", "programs/pool.c", &["-L.", "-l:libpool.so", "-Wl,-rpath,$ORIGIN"]),
    gcc("stepped", "programs/stepped.c", &[]),
    // Functions of the library are bound at their first call, through stubs.
    gcc(
        "stepped_through",
        "programs/stepped_through.c",
        &["-fomit-frame-pointer", "-ldl", "-Wl,-z,lazy", "-L.", "-l:libsteps.so", "-Wl,-rpath,$ORIGIN"],
    ),
    gcc("longjmp", "programs/longjmp.c", &["-L.", "-l:libpool.so", "-Wl,-rpath,$ORIGIN"]),
    gcc("jemalloc", "programs/jemalloc.c", &["-ldl"]),
    gcc("tcmalloc", "programs/tcmalloc.c", &["-ldl"]),
    gcc("mimalloc", "programs/mimalloc.c", &["-ldl"]),
    gcc("two_allocators", "programs/two_allocators.c", &["-ldl"]),
    // Told nothing about malloc, the compiler leaves the bodies as they are.
    gcc("own_malloc", "programs/own_malloc.c", &["-fno-builtin"]),
    gcc("tracepoints", "programs/tracepoints.c", &[]),
    gxx("operator_new", "programs/operator_new.cc", &[]),
    // As distributions build: no frame pointers, jumps for calls.
    gxx("stacks", "programs/stacks.cc", &["-O2", "-fomit-frame-pointer", "-foptimize-sibling-calls", "-ldl"]),
    gxx("operators", "programs/operators.cc", &["-std=c++17"]),
    gxx("own_operators", "programs/own_operators.cc", &[]),
];

const fn gcc<'a>(name: &'a str, source: &'a str, flags: &'a [&'a str]) -> Build<'a> {
    Build { name, source, compiler: "gcc", flags }
}

const fn gxx<'a>(name: &'a str, source: &'a str, flags: &'a [&'a str]) -> Build<'a> {
    Build { name, source, compiler: "g++", flags }
}

const fn lib<'a>(name: &'a str, source: &'a str) -> Build<'a> {
    Build { name, source, compiler: "gcc", flags: &["-shared", "-fPIC"] }
}

fn main() {
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let package = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    println!("cargo::rerun-if-changed=programs");
    println!("cargo::rerun-if-changed=demo");
    println!("cargo::rustc-env=MEMLEAK_TEST_PROGRAMS={}", out.display());
    for build in BUILDS {
        compile(build, COMMON, &package, &out);
    }
    // The demo is built as its Makefile rule does: optimised like a service, frame pointers kept.
    let demo = gcc("memleak-demo", "demo/memleak-demo.c", &[]);
    compile(&demo, &["-O2", "-g", "-Wall", "-Wextra", "-fno-omit-frame-pointer", "-pthread"], &package, &out);
}

/// Compiles one output, in the build folder so that `-L.` finds the libraries that were built before.
fn compile(build: &Build, common: &[&str], package: &Path, out: &Path) {
    let target = out.join(build.name);
    // A result of an earlier build must not outlive its compiler.
    if let Err(error) = std::fs::remove_file(&target) {
        assert!(error.kind() == std::io::ErrorKind::NotFound, "failed to remove {}: {error}", target.display());
    }
    let mut command = Command::new(build.compiler);
    command.current_dir(out).args(common).arg("-o").arg(build.name).arg(package.join(build.source)).args(build.flags);
    if build.name.starts_with("lib") {
        command.arg(format!("-Wl,-soname,{}", build.name));
    }
    match command.status() {
        Ok(status) => assert!(status.success(), "failed to compile {}: {command:?}", build.source),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            // Cargo runs this again as long as a listed file is missing: the compiler may be installed later.
            println!("cargo::rerun-if-changed={}", target.display());
            println!("cargo::warning={} is not installed: tests with {} are skipped", build.compiler, build.name);
        }
        Err(error) => panic!("failed to start {}: {error}", build.compiler),
    }
}
