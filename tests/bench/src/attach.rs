//! How long it takes memleak to attach to a program that has mapped many libraries.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::measure::Spread;
use crate::memleak::Memleak;
use crate::process::Running;
use crate::tools::path_of;

const MAPPED_PY: &str = include_str!("../programs/mapped.py");

/// How long the program may take to load its libraries.
const READY: Duration = Duration::from_secs(30);

/// The figures.
#[derive(Debug, Serialize)]
pub struct Attach {
    /// Mappings of the program.
    pub mappings: u64,
    /// From memleak's start to its first snapshot, in seconds; everything is attached by then.
    pub first_snapshot_s: Spread,
}

/// Measures it so many times.
///
/// # Errors
/// The program or memleak cannot be run.
pub fn measure(memleak: &Memleak, rounds: usize, folder: &Path) -> Result<Attach> {
    let script = folder.join("mapped.py");
    fs::write(&script, MAPPED_PY).with_context(|| format!("failed to write {}", script.display()))?;
    let python = path_of("python3").context("python3 is not installed")?;
    let mut target = Running::start(Command::new(python).arg(script), folder)?;
    let mappings = target.expect("`ready`", READY, |line| line.text.strip_prefix("ready ")?.parse::<u64>().ok())?;
    let mut times = Vec::new();
    for _ in 0..rounds {
        let session = memleak.attach(target.pid(), &[], folder)?;
        times.push(session.attach_s);
        session.detach()?;
    }
    Ok(Attach { mappings, first_snapshot_s: Spread::of(times).context("nothing was measured")? })
}
