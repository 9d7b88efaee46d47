//! What a call stack costs by unwind tables, what by frame pointers, of the same depth, and what Python's functions add to it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::measure::Spread;
use crate::memleak::Memleak;
use crate::process::{Running, output_of};
use crate::tools::path_of;
use crate::workloads::compile;

const DEPTH_C: &str = include_str!("../programs/depth.c");
const DEPTH_PY: &str = include_str!("../programs/depth.py");
/// Prints nothing when the functions of this Python can be read.
const KNOWN_PYTHON: &str = "import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or print(sys.version)";

/// Return addresses of the stack.
const FRAMES: u32 = 20;
/// How deep the program calls itself: deeper, so that the setting decides where the walk ends.
const DEPTH: &str = "40";
/// How long the program may take beyond what it was asked to work.
const PATIENCE: Duration = Duration::from_secs(60);

/// The figures, nanoseconds of CPU time of the traced program.
#[derive(Debug, Serialize)]
pub struct Unwinding {
    /// Return addresses of the stack.
    pub frames: u32,
    /// Rounds that were measured; the medians are below.
    pub rounds: usize,
    /// One traced `malloc` and `free`, with one return address.
    pub pair_ns: f64,
    /// What the other return addresses cost by unwind tables, in a program without frame pointers.
    pub tables_ns: f64,
    /// What they cost by frame pointers, in the same program built with them.
    pub frame_pointers_ns: f64,
    /// By tables, as a multiple of by frame pointers.
    pub ratio: f64,
    /// `None` without a Python whose functions can be read.
    pub python: Option<Python>,
}

/// The cost of Python's functions in call stacks, nanoseconds of CPU time of the traced program.
#[derive(Debug, Serialize)]
pub struct Python {
    /// Python functions in the call stack.
    pub functions: u32,
    /// One traced `calloc` and `free` of the interpreter, with its call stack of C functions.
    pub pair_ns: f64,
    /// What reading the Python functions adds.
    pub functions_ns: f64,
}

/// Measures it. In each round every combination has its turn, so that other load on the machine meets all of them.
///
/// # Errors
/// The program cannot be built, or memleak cannot be run.
pub fn measure(memleak: &Memleak, rounds: usize, seconds: f64, folder: &Path) -> Result<Unwinding> {
    // Calls in tail position would be jumps, and the stack one frame deep.
    let flags = |pointers| ["-O2", "-fno-optimize-sibling-calls", pointers];
    let without = compile("depth", DEPTH_C, &flags("-fomit-frame-pointer"), folder)?;
    let with = compile("depth-frame-pointers", DEPTH_C, &flags("-fno-omit-frame-pointer"), folder)?;
    let (mut pair, mut tables, mut pointers) = (Vec::new(), Vec::new(), Vec::new());
    let traced = |command: &mut Command, settings: &[&str]| {
        let mut target = Running::start(command, folder)?;
        target.expect("`ready`", PATIENCE, |line| (line.text == "ready").then_some(()))?;
        let session = memleak.attach(target.pid(), &[&["collector.budget=off"], settings].concat(), folder)?;
        target.write(&format!("{seconds}\n"))?;
        let limit = PATIENCE + Duration::from_secs_f64(seconds);
        let ns = target.expect("`did`", limit, |line| ns_per_pair(&line.text))?;
        session.detach()?;
        anyhow::Ok(ns)
    };
    for _ in 0..rounds {
        let one = |program: &Path, stacks: &str, frames: u32| {
            traced(Command::new(program).arg(DEPTH), &[stacks, &format!("collector.max_frames={frames}")])
        };
        let by_tables = "collector.stacks=auto";
        let by_pointers = "collector.stacks=frame-pointers";
        let shallow = one(&without, by_tables, 1)?;
        pair.push(shallow);
        tables.push(one(&without, by_tables, FRAMES)? - shallow);
        let shallow = one(&with, by_pointers, 1)?;
        pointers.push(one(&with, by_pointers, FRAMES)? - shallow);
    }
    let (mut c_only, mut functions) = (Vec::new(), Vec::new());
    if let Some(python) = known_python(folder) {
        let script = folder.join("depth.py");
        fs::write(&script, DEPTH_PY).with_context(|| format!("failed to write {}", script.display()))?;
        for _ in 0..rounds {
            let one = |frames| traced(Command::new(&python).arg(&script).arg(FRAMES.to_string()), &[frames]);
            let without = one("collector.python_frames=false")?;
            c_only.push(without);
            functions.push(one("collector.python_frames=true")? - without);
        }
    }
    let of = |values: Vec<f64>| Spread::of(values).map(|s| s.median).context("no round was asked for");
    let (tables_ns, frame_pointers_ns) = (of(tables)?, of(pointers)?);
    if frame_pointers_ns <= 0.0 {
        bail!("the walk by frame pointers could not be told from noise: measure longer (--seconds)");
    }
    let ratio = tables_ns / frame_pointers_ns;
    let python = match c_only.is_empty() {
        true => None,
        false => Some(Python { functions: FRAMES, pair_ns: of(c_only)?, functions_ns: of(functions)? }),
    };
    Ok(Unwinding { frames: FRAMES, rounds, pair_ns: of(pair)?, tables_ns, frame_pointers_ns, ratio, python })
}

/// Debian's Python, when memleak can read its functions.
fn known_python(folder: &Path) -> Option<PathBuf> {
    let python = path_of("python3")?;
    let said = output_of(Command::new(&python).args(["-c", KNOWN_PYTHON]), PATIENCE, folder).ok()?;
    said.trim().is_empty().then_some(python)
}

/// From a line `did UNITS NANOSECONDS`.
fn ns_per_pair(line: &str) -> Option<f64> {
    let mut words = line.strip_prefix("did ")?.split(' ').map(str::parse::<f64>);
    let (units, ns) = (words.next()?.ok()?, words.next()?.ok()?);
    (units > 0.0).then_some(ns / units)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_line_is_read() {
        assert_eq!(ns_per_pair("did 2000 5000000"), Some(2500.0));
        assert_eq!(ns_per_pair("did 0 5"), None);
        assert_eq!(ns_per_pair("ready"), None);
    }
}
