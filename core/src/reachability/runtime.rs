//! Language runtimes whose references cannot be followed from outside.
//!
//! A collector that moves objects or packs its references makes everything look lost that only its heap refers to.

use crate::error::{Error, ErrorKind};
use crate::maps::elf;
use crate::maps::{Backing, Maps, open_mapped};
use crate::process::ProcDir;

/// Libraries that are a runtime with a moving or compressing collector, by the beginning of their file name.
const LIBRARIES: [(&str, &str); 4] = [
    ("libjvm.so", "the Java virtual machine"),
    ("libcoreclr.so", "the .NET runtime"),
    ("libmonosgen", "the Mono runtime"),
    ("libart.so", "the Android runtime"),
];
/// Sections by which a program of such a runtime is known.
const SECTIONS: [(&str, &str); 2] = [(".note.go.buildid", "the Go runtime"), (".gopclntab", "the Go runtime")];
/// Programs that carry one inside, by their file name.
const PROGRAMS: [(&str, &str); 3] =
    [("node", "the V8 engine of node"), ("deno", "the V8 engine of deno"), ("bun", "the engine of bun")];

/// The runtime that keeps a process from being scanned, if it has one; unreadable processes seem to have none.
pub fn moving_collector(dir: &ProcDir) -> Option<&'static str> {
    let maps = Maps::read(dir).ok()?;
    let exe = dir.exe().map(|(path, _)| path);
    let mut seen = None;
    for mapping in maps.iter().filter(|m| m.perms.execute) {
        let Backing::File { path, .. } = &mapping.backing else { continue };
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        if let Some((_, runtime)) = LIBRARIES.iter().find(|(start, _)| name.starts_with(start)) {
            return Some(runtime);
        }
        if exe.as_deref() != Some(path) || seen.replace(()).is_some() {
            continue;
        }
        if let Some((_, runtime)) = PROGRAMS.iter().find(|(program, _)| name == *program) {
            return Some(runtime);
        }
        let file = open_mapped(dir, mapping).ok()?;
        let sections = elf::section_names(&file).unwrap_or_default();
        if let Some((_, runtime)) = SECTIONS.iter().find(|(section, _)| sections.iter().any(|s| s == section)) {
            return Some(runtime);
        }
    }
    None
}

/// Why a process with such a runtime is not scanned.
pub fn refused(pid: u32, runtime: &str) -> Error {
    let why = format!("failed to scan process {pid}: {runtime} moves and hides its references");
    Error::new(ErrorKind::Target, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_process_can_be_scanned() {
        assert_eq!(moving_collector(&ProcDir::open(std::process::id()).unwrap()), None);
    }
}
