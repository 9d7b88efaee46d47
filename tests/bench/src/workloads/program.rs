//! Programs of the benchmark's own, which work for as long as a line of input says.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Done, Launch, READY, SLACK, Target, Workload, helpers_of, missing_command, worker_of};
use crate::process::{Running, output_of};
use crate::tools::path_of;

/// Sources are part of the binary, so that it runs from anywhere.
const PAIRS_C: &str = include_str!("../../programs/pairs.c");
const OBJECTS_PY: &str = include_str!("../../programs/objects.py");

/// How long the compiler may take.
const COMPILE: Duration = Duration::from_secs(120);

/// What is run.
enum Source {
    /// `pairs.c` with so many pairs per second; 0 is without pause.
    Pairs(u32),
    /// `objects.py`, with every object a block of the C library.
    Python,
}

/// A program with the line protocol.
pub struct Program {
    id: &'static str,
    title: &'static str,
    unit: &'static str,
    source: Source,
}

const fn paced(id: &'static str, title: &'static str, rate: u32) -> Program {
    Program { id, title, unit: "pairs", source: Source::Pairs(rate) }
}

pub const PACED_1K: Program = paced("paced-1k", "1,000 pairs of malloc and free per second", 1_000);
pub const PACED_10K: Program = paced("paced-10k", "10,000 pairs per second", 10_000);
pub const PACED_50K: Program = paced("paced-50k", "50,000 pairs per second", 50_000);
pub const PACED_200K: Program = paced("paced-200k", "200,000 pairs per second", 200_000);
pub const LOOP: Program = paced("loop", "malloc and free in a loop, nothing else", 0);
pub const PYTHON: Program = Program {
    id: "python",
    title: "Python making objects, PYTHONMALLOC=malloc",
    unit: "batches",
    source: Source::Python,
};

impl Workload for Program {
    fn id(&self) -> &'static str {
        self.id
    }

    fn title(&self) -> &'static str {
        self.title
    }

    fn unit(&self) -> &'static str {
        self.unit
    }

    fn missing(&self) -> Option<String> {
        match self.source {
            Source::Pairs(_) => missing_command(&["gcc"]),
            Source::Python => missing_command(&["python3"]),
        }
    }

    fn settings(&self) -> &'static [&'static str] {
        match self.source {
            // Its estimate is compared to what is measured, so both must be of the same time.
            Source::Pairs(1..) => &["interval=200ms"],
            _ => &[],
        }
    }

    fn can_be_sanitized(&self) -> bool {
        matches!(self.source, Source::Pairs(_))
    }

    fn start(&self, launch: &Launch, folder: &Path) -> Result<Box<dyn Target>> {
        let (program, command) = match self.source {
            Source::Pairs(rate) => {
                let sanitize: &[&str] = if *launch == Launch::Sanitized { &["-fsanitize=address"] } else { &[] };
                let program = compile("pairs", PAIRS_C, &[&["-O2"], sanitize].concat(), folder)?;
                let mut command = launch.command(&program);
                command.arg(rate.to_string());
                (program, command)
            }
            Source::Python => {
                let script = folder.join("objects.py");
                fs::write(&script, OBJECTS_PY).with_context(|| format!("failed to write {}", script.display()))?;
                let program = path_of("python3").context("python3 is not installed")?;
                let mut command = launch.command(&program);
                command.env("PYTHONMALLOC", "malloc").arg(script);
                (program, command)
            }
        };
        Ok(Box::new(Speaking::start(command, launch, &program, folder)?))
    }
}

/// Compiles a C source in `folder`; returns the path of the program.
///
/// # Errors
/// The compiler is missing or refuses it.
pub fn compile(name: &str, source: &str, flags: &[&str], folder: &Path) -> Result<PathBuf> {
    let file = folder.join(format!("{name}.c"));
    fs::write(&file, source).with_context(|| format!("failed to write {}", file.display()))?;
    let program = folder.join(name);
    let mut command = Command::new("gcc");
    // Frame pointers: everybody gets whole stacks, whatever they unwind with.
    command.args(["-g", "-fno-omit-frame-pointer"]).args(flags).arg("-o").arg(&program).arg(&file);
    output_of(&mut command, COMPILE, folder)?;
    Ok(program)
}

/// A running program that speaks the protocol described in `programs/pairs.c`.
pub struct Speaking {
    running: Running,
    worker: u32,
}

impl Speaking {
    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// It does not get ready.
    pub fn start(mut command: Command, launch: &Launch, program: &Path, folder: &Path) -> Result<Self> {
        let mut running = Running::start(command.current_dir(folder), folder)?;
        running.expect("`ready`", READY, |line| (line.text == "ready").then_some(()))?;
        let worker = worker_of(&running, launch, program)?;
        Ok(Speaking { running, worker })
    }
}

impl Target for Speaking {
    fn pid(&self) -> u32 {
        self.worker
    }

    fn helpers(&self) -> Vec<u32> {
        helpers_of(&self.running, self.worker)
    }

    fn load(&mut self, seconds: u64) -> Result<Done> {
        self.running.write(&format!("{seconds}\n"))?;
        self.running.expect("`did`", Duration::from_secs(seconds) + SLACK, |line| parse_did(&line.text))
    }

    fn stop(&mut self) {
        // The end of its input ends it; if not, it is killed there, and was measured already.
        let _ = self.running.finish();
    }
}

/// Reads "did UNITS NANOSECONDS".
fn parse_did(line: &str) -> Option<Done> {
    let mut words = line.strip_prefix("did ")?.split(' ');
    let units = words.next()?.parse::<u64>().ok()? as f64;
    let elapsed_s = words.next()?.parse::<u64>().ok()? as f64 / 1e9;
    (elapsed_s > 0.0).then_some(Done { units, elapsed_s, p99_ms: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    // The rate that the benchmark asks for is the rate that it gets.
    #[test]
    fn paced_program_keeps_its_pace() {
        let folder = tempfile::tempdir().unwrap();
        let mut target = PACED_10K.start(&Launch::Plain, folder.path()).unwrap();
        let done = target.load(1).unwrap();
        target.stop();
        // A loaded machine may lose some of it; nothing may be added.
        assert!((1_000.0..=10_000.0).contains(&done.units), "{done:?}");
        assert!((0.9..10.0).contains(&done.elapsed_s), "{done:?}");
    }

    // Wrappers print lines of their own, which must not be taken for results.
    #[test]
    fn results_are_told_from_other_lines() {
        assert_eq!(parse_did("did 20 2000000000"), Some(Done { units: 20.0, elapsed_s: 2.0, p99_ms: None }));
        for line in ["", "did", "did 1", "did 1 0", "did x 1", "heaptrack output will be written to \"x\""] {
            assert_eq!(parse_did(line), None, "{line}");
        }
    }
}
