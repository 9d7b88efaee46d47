//! `memleak export`: a recording in, a file of another format out.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use super::{Format, encode};
use crate::moment::{Moment, snapshot_at};
use crate::output::atomic;
use crate::recording::Reader;
use crate::{Error, Result};

/// What to export, and where to.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct Args {
    /// Recording to read
    #[arg(value_name = "REC", value_hint = clap::ValueHint::FilePath)]
    pub recording: PathBuf,
    /// Format to write
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Format,
    /// File to write, mode 0600; without it standard output
    #[arg(short, long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub output: Option<PathBuf>,
    /// Time to export: the newest snapshot that is not after it
    ///
    /// 10m is after the start, -5m before the end; also start, end, or a time in UTC such as 2026-03-02T09:30:00Z.
    #[arg(long, value_name = "TIME", default_value = "end", allow_hyphen_values = true)]
    pub at: Moment,
}

/// Exports one snapshot of a recording.
///
/// # Errors
/// The recording cannot be read or has no snapshot at that time, or the output cannot be written.
pub fn run(args: &Args) -> Result<()> {
    let to_terminal = args.output.is_none() && io::stdout().is_terminal();
    if to_terminal && args.format.is_binary() {
        return Err(Error::config("a terminal cannot show this format: write a file with -o FILE, or pipe it"));
    }
    let snapshot = snapshot_at(&Reader::open(&args.recording)?, args.at)?;
    let bytes = encode(args.format, &snapshot)?;
    match &args.output {
        Some(path) => atomic::write(path, &bytes),
        None => (io::stdout().write_all(&bytes).and_then(|()| io::stdout().flush()))
            .map_err(|e| Error::io("failed to write to standard output", e)),
    }
}
