//! What the tests need from the machine: libraries, compilers, root.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Notes that the running test was skipped.
///
/// # Panics
/// When `CI` is set: there the machine is meant to have everything.
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    assert!(std::env::var_os("CI").is_none(), "{test} cannot run, and CI may not skip it: {reason}");
    eprintln!("SKIP {test}: {reason}");
}

/// Where a library is installed, whatever its version if the name has none.
///
/// # Errors
/// A sentence that says that it is missing.
pub fn library(name: &str) -> Result<PathBuf, String> {
    const FOLDERS: [&str; 4] =
        ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-musl", "/usr/lib64"];
    // glibc's own libc.so is a linker script.
    let folders = FOLDERS.iter().filter(|folder| name != "libc.so" || folder.ends_with("musl"));
    let names: Vec<String> = ["", ".2", ".3"].map(|version| format!("{name}{version}")).into();
    folders
        .flat_map(|folder| names.iter().map(move |name| Path::new(folder).join(name)))
        .find_map(|path| path.canonicalize().ok())
        .ok_or_else(|| format!("{name} is not installed (tests/setup.sh test installs it)"))
}

/// Compiles the caller of allocator functions under a name of its own.
///
/// # Errors
/// A sentence that says what is missing.
pub fn compiled(name: &str, arguments: &[&str]) -> Result<PathBuf, String> {
    compile("gcc", name, arguments)
}

/// As [`compiled`], with another compiler.
///
/// # Errors
/// A sentence that says what is missing.
pub fn compile(compiler: &str, name: &str, arguments: &[&str]) -> Result<PathBuf, String> {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("caller-{name}"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/placement/caller.c");
    // Tests run side by side, and in several processes: each compiles its own and puts it in place at once.
    let fresh = out.with_extension(format!("{}.{name}", std::process::id()));
    let done = Command::new(compiler)
        .args(["-O1", "-g0", "-fno-builtin", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&fresh)
        .arg(source)
        .args(arguments)
        .output()
        .map_err(|e| format!("{compiler} cannot be run: {e} (tests/setup.sh test installs it)"))?;
    if !done.status.success() {
        return Err(format!("{compiler} failed: {}", String::from_utf8_lossy(&done.stderr)));
    }
    std::fs::rename(&fresh, &out).map_err(|e| format!("failed to put {} in place: {e}", out.display()))?;
    Ok(out)
}
