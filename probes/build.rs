//! Compiles every `bpf/*.bpf.c` and generates its skeleton into the build folder; compiles the sampler for the host.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use libbpf_cargo::SkeletonBuilder;

/// One object per entry; each becomes `NAME.skel.rs`.
const OBJECTS: [&str; 3] = ["userspace_alloc", "kernel_alloc", "features"];

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // What the user sees: no backtrace around it.
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    println!("cargo:rerun-if-changed=bpf");
    println!("cargo:rerun-if-env-changed=CLANG");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let clang = clang()?;
    let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    // Debian keeps asm/*.h in a folder per architecture, which clang does not search for the target bpf.
    let multiarch = format!("/usr/include/{arch}-linux-gnu");
    // libbpf's headers, of the very version that is linked.
    let libbpf = env::var("DEP_BPF_INCLUDE").map_err(|_| "libbpf-sys does not say where its headers are")?;
    for name in OBJECTS {
        SkeletonBuilder::new()
            .source(format!("bpf/{name}.bpf.c"))
            .clang(&clang)
            // v3 (32-bit registers and jumps) is the newest instruction set that Linux 5.10 knows.
            .clang_args([
                "-O2",
                "-g",
                "-mcpu=v3",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-Wno-unused-parameter",
                "-I",
                &libbpf,
                "-I",
                &multiarch,
            ])
            .build_and_generate(out.join(format!("{name}.skel.rs")))
            .map_err(|e| format!("failed to compile bpf/{name}.bpf.c with {clang}: {e:#}"))?;
    }
    cc::Build::new()
        .file("bpf/sampler_host.c")
        .warnings_into_errors(true)
        .try_compile("memleak_sampler")
        .map_err(|e| format!("failed to compile bpf/sampler_host.c: {e}"))
}

/// The newest clang of the usual names, or `$CLANG`.
fn clang() -> Result<String, String> {
    if let Ok(clang) = env::var("CLANG") {
        return Ok(clang);
    }
    let names =
        ["clang-21", "clang-20", "clang-19", "clang-18", "clang-17", "clang-16", "clang-15", "clang", "clang-14"];
    names
        .into_iter()
        .find(|name| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success()))
        .map(String::from)
        .ok_or_else(|| {
            "failed to find clang, which compiles the BPF programs: apt-get install clang (or set CLANG)".into()
        })
}
