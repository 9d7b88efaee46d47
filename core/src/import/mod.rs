//! Logs of other tools, made into recordings.
//!
//! [`run`] reads the text output of bcc's `memleak` line by line (`bcc` takes a line apart, `assemble` makes
//! snapshots of them) and writes each snapshot as soon as it is complete, so that a log of any size needs memory for its
//! sites only. A line that cannot be read is counted and shown with its number; it ends nothing. A log without a single
//! snapshot does, before a file is made.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use indicatif::{ProgressBar, ProgressStyle};

use crate::output::report::RunInfo;
use crate::output::text::{clip, visible};
use crate::recording::{Event, EventKind, Host, Limits, Location, Step, Writer};
use crate::snapshot::{Site, Snapshot};
use crate::units::{format_duration_s, parse_time_utc};
use crate::{Error, ErrorKind, Result};

mod assemble;
mod bcc;

use assemble::{Assembler, Setting};
use bcc::Line;

/// What a recording made from a log has in place of the way in which probes are attached.
pub const BACKEND: &str = "log of bcc's memleak";

/// Longest line that is read; what is longer is no line of such a log.
const MAX_LINE: u64 = 64 << 10;
/// Lines that could not be read and are shown.
const MAX_SHOWN: usize = 10;

/// What to import, and what the log does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct Args {
    /// Log to read: text output of bcc's memleak; - is standard input
    #[arg(value_name = "LOG", value_hint = clap::ValueHint::FilePath)]
    pub log: PathBuf,
    /// Recording to write; it must not exist
    #[arg(short, long, value_name = "REC", value_hint = clap::ValueHint::FilePath)]
    pub output: PathBuf,
    /// Name of the process; without it that of the file that holds its main function
    #[arg(long, value_name = "NAME")]
    pub comm: Option<String>,
    /// Process id, if the log does not give it
    #[arg(long, value_name = "PID")]
    pub pid: Option<u32>,
    /// Day on which the log begins, such as 2026-03-02; without it the day of the file's last change
    ///
    /// The log has the time of day alone. It is taken for UTC.
    #[arg(long, value_name = "DAY", value_parser = day)]
    pub date: Option<String>,
    /// How many stacks the tool was told to show (-T); without it the largest number in the log's headings
    ///
    /// A stack that is missing from a list with fewer stacks has been freed; from a full list, it may only be too small.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub top: Option<u32>,
}

fn day(text: &str) -> Result<String, String> {
    parse_time_utc(text).map(|_| text.to_owned())
}

/// What became of a log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Lines read.
    pub lines: u64,
    /// Lines that could not be read.
    pub bad: u64,
    /// The first of them, in words.
    pub shown: Vec<String>,
    /// Snapshots written.
    pub snapshots: u64,
    /// Sites found.
    pub sites: usize,
    /// Time from the first snapshot to the last, in words.
    pub time: String,
}

/// For standard error, a line for each thing to know.
impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.shown {
            writeln!(f, "memleak: {line}")?;
        }
        let more = self.bad - self.shown.len() as u64;
        if more > 0 {
            writeln!(f, "memleak: {more} more of {} lines are left out", self.lines)?;
        }
        let plural = |n: u64| if n == 1 { "" } else { "s" };
        let (snapshots, sites) = (self.snapshots, self.sites as u64);
        let s = (plural(snapshots), plural(sites));
        writeln!(f, "{snapshots} snapshot{} of {sites} site{} over {} recorded", s.0, s.1, self.time)
    }
}

/// Makes a recording of a log.
///
/// # Errors
/// The log cannot be read or holds no snapshot, or the recording cannot be written.
pub fn run(args: &Args) -> Result<Summary> {
    let shown = visible(&args.log.to_string_lossy()).into_owned();
    let failed = |e: io::Error| Error::io(format!("failed to read the log {shown}"), e);
    let (input, size, changed): (Box<dyn Read>, u64, SystemTime) = if args.log == Path::new("-") {
        (Box::new(io::stdin()), 0, SystemTime::now())
    } else {
        let file = File::open(&args.log).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        if meta.is_dir() {
            return Err(Error::new(ErrorKind::Io, format!("failed to read the log {shown}: it is a folder")));
        }
        (Box::new(file), meta.len(), meta.modified().unwrap_or(SystemTime::UNIX_EPOCH))
    };
    let bar = progress(size);
    let summary = import(&mut BufReader::new(bar.wrap_read(input)), args, &shown, changed);
    bar.finish_and_clear();
    summary
}

fn progress(size: u64) -> ProgressBar {
    if size < 8 << 20 || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(size);
    if let Ok(style) = ProgressStyle::with_template("reading the log {wide_bar} {bytes}/{total_bytes}") {
        bar.set_style(style);
    }
    bar
}

fn import(input: &mut dyn BufRead, args: &Args, shown: &str, changed: SystemTime) -> Result<Summary> {
    let mut out = Out { path: &args.output, writer: None, run: run_info(shown), last_s: 0.0 };
    let changed_s = changed.duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
    // Checked when the command line was read.
    let date = args.date.as_deref().and_then(|d| parse_time_utc(d).ok()).unwrap_or(changed_s);
    let mut assembler = Assembler::new(Setting {
        day_wall_s: (date / 86_400.0).floor() * 86_400.0,
        pid: args.pid,
        comm: args.comm.clone(),
        top: args.top.map(|n| n as usize),
    });
    let mut summary = Summary::default();
    let mut cut = false;
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = Read::take(&mut *input, MAX_LINE).read_until(b'\n', &mut line);
        if read.map_err(|e| Error::io(format!("failed to read the log {shown}"), e))? == 0 {
            break;
        }
        summary.lines += 1;
        cut = !line.ends_with(b"\n");
        let too_long = cut && line.len() as u64 == MAX_LINE;
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches(['\n', '\r']);
        let parsed = if too_long {
            skip_line(input).map_err(|e| Error::io(format!("failed to read the log {shown}"), e))?;
            Err("the line is too long")
        } else {
            Line::parse(text).and_then(|l| assembler.push(l))
        };
        match parsed {
            Ok(Some(snapshot)) => out.push(&snapshot)?,
            Ok(None) => {}
            Err(why) => {
                summary.bad += 1;
                if summary.shown.len() < MAX_SHOWN {
                    let text = visible(text.trim()).into_owned();
                    summary.shown.push(format!("{shown}:{}: left out: {why}: {}", summary.lines, clip(&text, 80)));
                }
            }
        }
    }
    if let Some(snapshot) = assembler.end(cut) {
        out.push(&snapshot)?;
    }
    summary.sites = assembler.sites();
    summary.snapshots = assembler.snapshots();
    summary.time = format_duration_s(out.last_s);
    if summary.snapshots == 0 {
        return Err(nothing(&summary, shown));
    }
    out.finish(&summary)?;
    Ok(summary)
}

/// Reads to the end of a line that is too long to be kept.
fn skip_line(input: &mut dyn BufRead) -> io::Result<()> {
    loop {
        let buffer = input.fill_buf()?;
        let (used, over) = match buffer.iter().position(|b| *b == b'\n') {
            Some(i) => (i + 1, true),
            None => (buffer.len(), buffer.is_empty()),
        };
        input.consume(used);
        if over {
            return Ok(());
        }
    }
}

/// Why a log is of no use.
fn nothing(summary: &Summary, shown: &str) -> Error {
    let mut why = match summary.lines {
        0 => "it is empty".to_owned(),
        n => format!(
            "none of its {n} lines begins a list of stacks (`[TIME] Top N stacks with outstanding allocations:`): is it \
             the text output of bcc's memleak?"
        ),
    };
    if let Some(first) = summary.shown.first() {
        // Writing to a string cannot fail.
        let _ = write!(why, "; {first}");
    }
    Error::config(format!("failed to import {shown}: {why}"))
}

/// What the report says of the run.
fn run_info(shown: &str) -> RunInfo {
    RunInfo {
        title: format!("memleak: log {shown}"),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        targets: vec![format!("log {shown}")],
        backend: BACKEND.to_owned(),
        ..RunInfo::default()
    }
}

/// The recording, made with the first snapshot.
struct Out<'a> {
    path: &'a Path,
    writer: Option<Writer>,
    run: RunInfo,
    last_s: f64,
}

impl Out<'_> {
    fn push(&mut self, snapshot: &Snapshot) -> Result<()> {
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => {
                self.run.started_wall_s = snapshot.wall_s - snapshot.time_s;
                // Nothing is known of the machine: it need not be this one.
                let writer = Writer::create(self.path, Limits::default(), &Host::default(), &self.run, "")?;
                self.writer.insert(writer)
            }
        };
        if self.run.interval_s == 0.0 {
            self.run.interval_s = snapshot.time_s - self.last_s;
        }
        self.last_s = snapshot.time_s;
        writer.push(&Step::new(snapshot), &mut locations)?;
        let unnamed = snapshot.sites.iter().map(|s| &s.site).filter(|s| writer.lacks_name(s));
        let unnamed: Vec<_> = unnamed.collect();
        if unnamed.is_empty() { Ok(()) } else { writer.name(unnamed.into_iter()) }
    }

    fn finish(mut self, summary: &Summary) -> Result<()> {
        let Some(mut writer) = self.writer.take() else { return Ok(()) };
        if summary.bad > 0 {
            let text = format!("{} of {} lines of the log could not be read", summary.bad, summary.lines);
            let wall_s = self.run.started_wall_s + self.last_s;
            writer.event(Event { time_s: self.last_s, wall_s, kind: EventKind::Gap, instance: None, text });
        }
        writer.finish(Some(&self.run), &[])
    }
}

/// Where the frames of a site lie, as far as the log says. Nothing when it gives no addresses: stacks of one module would
/// all lie at the same places, and be taken for one.
fn locations(site: &Site) -> Vec<Location> {
    if site.addresses.contains(&0) {
        return Vec::new();
    }
    let location = |f: &crate::symbolize::Frame| Location {
        module: f.module.clone(),
        build_id: None,
        // Where a function begins in its file is not known.
        offset: f.address,
    };
    site.frames().iter().map(location).collect()
}
