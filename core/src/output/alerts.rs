//! Alerts as JSON lines, and where the lines go: a file, standard output.
//!
//! The schema is documented in `docs/alerts.md`; fields are only ever added. Names from the traced system are passed
//! on as they are, except that characters which steer a terminal are written as JSON escapes.

mod text;

use std::collections::VecDeque;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::alert::{AlertEvent, Status};
use crate::error::{Error, ErrorKind, Result};
use crate::finding::Severity;
use crate::labels::Labels;
use crate::output::reach::ReachView;
use crate::snapshot::{Losses, Mode};
use crate::symbolize::Frame;
use crate::units::format_time_utc;

pub(super) use text::check_templates;
pub use text::{AlertGroup, check_template, group, text};

/// Most lines that wait for a file that cannot be written; the oldest are lost beyond that.
const MAX_WAITING: usize = 1_000;

/// One alert line, see `docs/alerts.md`.
#[derive(Clone, Debug, Serialize)]
pub struct AlertLine {
    /// Always `alert`: tells the line apart from others in a mixed stream.
    pub r#type: &'static str,
    /// Id of the finding: the same for the same rule and site, also after restarts.
    pub id: String,
    /// When the line was made, RFC 3339 in UTC.
    pub time: String,
    /// Whether the alert stands.
    pub status: Status,
    /// When the finding was first made, RFC 3339 in UTC.
    pub since: String,
    /// Name of the rule.
    pub rule: String,
    /// How bad it is.
    pub severity: Severity,
    /// How sure the rule is, 0 to 1.
    pub confidence: f64,
    /// One sentence for people.
    pub reason: String,
    /// How the figures were obtained.
    pub mode: Mode,
    /// Number of processes with the finding.
    pub processes: usize,
    /// The process that the line speaks of: the one with the most outstanding bytes.
    pub process: ProcessLine,
    /// The allocation site in that process.
    pub site: SiteLine,
    /// What was lost in that process so far, by kind; all zero means that nothing was.
    pub losses: Losses,
}

/// The process of an alert line.
#[derive(Clone, Debug, Serialize)]
pub struct ProcessLine {
    /// Process id as the collector sees it.
    pub pid: u32,
    /// Short name. Hostile text.
    pub comm: String,
    /// Path of the executable. Hostile text.
    pub exe: String,
    /// Container, pod and systemd unit. Hostile text.
    pub labels: Labels,
    /// True when it has ended.
    pub ended: bool,
}

/// The allocation site of an alert line.
#[derive(Clone, Debug, Serialize)]
pub struct SiteLine {
    /// Identity that survives restarts, 16 hexadecimal digits.
    pub id: String,
    /// Name of the probe set.
    pub probe_set: String,
    /// The allocator function that was called.
    pub function: String,
    /// Bytes allocated and not freed yet.
    pub outstanding_bytes: u64,
    /// Blocks allocated and not freed yet.
    pub outstanding_count: u64,
    /// Trend of the outstanding bytes, negative when they shrink.
    pub growth_bytes_per_s: f64,
    /// Age of the oldest outstanding block, an upper bound.
    pub oldest_age_s: f64,
    /// The call stack, innermost first.
    pub frames: Vec<FrameLine>,
    /// Why the call stack ends early, if it is known to.
    pub truncated: Option<String>,
    /// Whether the process can still reach its blocks; `None` before its memory was scanned.
    pub reachability: Option<ReachView>,
}

/// One frame of an alert line. Texts are hostile.
#[derive(Clone, Debug, Serialize)]
pub struct FrameLine {
    /// Demangled name.
    pub function: Option<String>,
    /// Mapped file.
    pub module: Option<String>,
    /// Bytes from the start of the function, or else of the module.
    pub offset: u64,
    /// Source file.
    pub file: Option<String>,
    /// Line in the source file.
    pub line: Option<u32>,
    /// True for a call that the compiler inlined into the next frame.
    pub inlined: bool,
    /// Why there is no function.
    pub reason: Option<String>,
    /// Return address, hexadecimal: beyond what numbers in JSON hold exactly.
    pub address: String,
    /// Build id of the module.
    pub build_id: Option<String>,
    /// Return address in the module's own terms, hexadecimal.
    pub file_address: Option<String>,
}

impl From<&Frame> for FrameLine {
    fn from(f: &Frame) -> Self {
        FrameLine {
            function: f.function.clone(),
            module: f.module.clone(),
            offset: f.offset,
            file: f.file.clone(),
            line: f.line,
            inlined: f.inlined,
            reason: f.reason.clone(),
            address: format!("{:#x}", f.address),
            build_id: f.build_id.clone(),
            file_address: f.file_address.map(|a| format!("{a:#x}")),
        }
    }
}

impl From<&AlertEvent> for AlertLine {
    /// The site should have been symbolized before: frames that are not known yet are left out.
    fn from(event: &AlertEvent) -> Self {
        let alert = &event.alert;
        let site = &alert.site;
        // A rule or a clock gone wrong must not put a null where the schema promises a number.
        let finite = |n: f64| if n.is_finite() { n } else { 0.0 };
        AlertLine {
            r#type: "alert",
            id: alert.id.clone(),
            time: format_time_utc(event.wall_s),
            status: alert.status,
            since: format_time_utc(event.wall_s - (event.time_s - alert.first_seen_s)),
            rule: alert.rule.to_string(),
            severity: alert.severity,
            confidence: finite(alert.confidence).clamp(0.0, 1.0),
            reason: alert.reason.clone(),
            mode: event.mode,
            processes: alert.processes,
            process: ProcessLine {
                pid: site.process.pid,
                comm: site.process.comm.clone(),
                exe: site.process.exe.clone(),
                labels: site.process.labels.clone(),
                ended: alert.ended,
            },
            site: SiteLine {
                id: format!("{:016x}", site.id),
                probe_set: site.probe_set.to_string(),
                function: site.function.to_string(),
                outstanding_bytes: alert.totals.outstanding_bytes(),
                outstanding_count: alert.totals.outstanding_count(),
                growth_bytes_per_s: finite(event.growth_bytes_per_s),
                oldest_age_s: finite(event.oldest_age_s),
                frames: site.frames().iter().map(FrameLine::from).collect(),
                truncated: site.truncated.as_deref().map(str::to_owned),
                reachability: event.reachability.as_deref().map(ReachView::from),
            },
            losses: event.losses,
        }
    }
}

/// A value as one line of JSON without the line break. What a terminal would obey instead of show (control
/// characters, direction marks) is written as an escape, so that the line can be printed anywhere.
///
/// # Errors
/// The value has no JSON form, such as a map whose keys are no strings.
pub fn json_line(value: &impl Serialize) -> Result<String> {
    let json = serde_json::to_string(value)
        .map_err(|e| Error::with_source(ErrorKind::Io, "failed to write a line as JSON", e))?;
    if !json.contains(steers) {
        return Ok(json);
    }
    let mut line = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if steers(c) {
            // Outside of strings JSON is ASCII without control characters, so this is inside of one.
            for unit in c.encode_utf16(&mut [0; 2]) {
                line.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            line.push(c);
        }
    }
    Ok(line)
}

/// Characters that steer a terminal or the direction of text.
fn steers(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' |
            '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Writes lines to a stream such as standard output, each with one write, and flushes.
///
/// # Errors
/// The stream cannot be written; a closed pipe is recognised by [`crate::cli::is_closed_pipe`].
pub fn write_lines(out: &mut dyn Write, lines: &[String]) -> Result<()> {
    let failed = |e| Error::io("failed to write alerts to standard output", e);
    for line in lines {
        out.write_all(format!("{line}\n").as_bytes()).map_err(failed)?;
    }
    out.flush().map_err(failed)
}

/// What is worth telling about a file of alerts.
#[derive(Debug)]
pub enum FileNotice {
    /// It cannot be written since now. The lines wait and are tried again.
    Failed(Error),
    /// It can be written again.
    Recovered {
        /// Lines that had waited and are written now.
        written: usize,
        /// Lines that were lost meanwhile.
        lost: u64,
    },
}

impl fmt::Display for FileNotice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FileNotice::Failed(e) => write!(f, "{e:#}; alerts wait and are tried again"),
            FileNotice::Recovered { written, lost } => {
                write!(f, "alerts can be written again: {written} that waited are written, {lost} were lost")
            }
        }
    }
}

/// A file that lines are appended to. It is opened for each batch, so that it may be rotated, removed or made
/// writable meanwhile; it is created with mode 0600.
#[derive(Debug)]
pub struct AlertFile {
    path: PathBuf,
    waiting: VecDeque<String>,
    failing: bool,
    lost: u64,
}

impl AlertFile {
    /// Nothing is opened yet.
    pub fn new(path: impl Into<PathBuf>) -> AlertFile {
        AlertFile { path: path.into(), waiting: VecDeque::new(), failing: false, lost: 0 }
    }

    /// Where the lines go.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lines that were lost because the file could not be written for too long.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Lines that wait for the file to be writable.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Appends lines, after those that wait. To be called at each snapshot, also without lines: then what waits is
    /// tried again. A failure is told once, until it is over.
    pub fn write(&mut self, lines: &[String]) -> Option<FileNotice> {
        self.waiting.extend(lines.iter().cloned());
        let before = self.waiting.len();
        if before == 0 {
            return None;
        }
        match self.append() {
            Ok(()) if !self.failing => None,
            Ok(()) => {
                self.failing = false;
                Some(FileNotice::Recovered { written: before - lines.len(), lost: self.lost })
            }
            Err(e) => {
                let excess = self.waiting.len().saturating_sub(MAX_WAITING);
                self.waiting.drain(..excess);
                self.lost += excess as u64;
                let first = !std::mem::replace(&mut self.failing, true);
                first.then(|| FileNotice::Failed(Error::io(format!("failed to append to {}", self.path.display()), e)))
            }
        }
    }

    /// Writes what waits, line by line; what is written no longer waits.
    fn append(&mut self) -> io::Result<()> {
        let mut options = OpenOptions::new();
        // Without O_NONBLOCK, a pipe that nobody reads would stop the collector.
        options.append(true).create(true).mode(0o600).custom_flags(libc::O_NONBLOCK);
        let mut file = options.open(&self.path)?;
        while let Some(line) = self.waiting.front() {
            append_line(&mut file, line)?;
            self.waiting.pop_front();
        }
        Ok(())
    }
}

/// Appends a line with one write, so that lines of several writers do not mix; takes half a line back.
fn append_line(file: &mut File, line: &str) -> io::Result<()> {
    let bytes = format!("{line}\n").into_bytes();
    let written = loop {
        match file.write(&bytes) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => break result?,
        }
    };
    if written == bytes.len() {
        return Ok(());
    }
    // The disk became full within the line. A pipe or device cannot be cut, and is not asked to.
    let metadata = file.metadata()?;
    if metadata.is_file() {
        file.set_len(metadata.len().saturating_sub(written as u64))?;
    }
    Err(io::ErrorKind::StorageFull.into())
}

#[cfg(test)]
pub(crate) mod tests;
