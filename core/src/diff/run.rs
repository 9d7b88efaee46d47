//! `memleak diff`: one or two recordings in, what has changed out.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::{Difference, FailOn, Limits};
use crate::moment::{Moment, snapshot_at};
use crate::output::atomic;
use crate::output::templates::Templates;
use crate::recording::Reader;
use crate::units::Bytes;
use crate::{Error, ErrorKind, Result, cli};

/// What to compare, and how to say it.
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct Args {
    /// Recording to compare from; REC@TIME is that time of it, else its last snapshot
    ///
    /// TIME is 10m (after the start), -5m (before the end), start, end, or a time in UTC such as 2026-03-02T09:30:00Z.
    #[arg(value_name = "BEFORE")]
    pub before: OsString,
    /// Recording to compare with, also as REC@TIME; without it the first is compared with its own end
    #[arg(value_name = "AFTER")]
    pub after: Option<OsString>,
    /// Least change in outstanding bytes
    #[arg(long, value_name = "SIZE", default_value = "64KiB")]
    pub min_bytes: Bytes,
    /// Least change in percent of what was outstanding before
    #[arg(long, value_name = "PERCENT", default_value_t = 10.0, value_parser = percent, allow_negative_numbers = true)]
    pub min_percent: f64,
    /// What gives exit code 1: a comma list of new, grown; or none
    #[arg(long, value_name = "WHAT", value_delimiter = ',', default_value = "new,grown")]
    pub fail_on: Vec<FailOn>,
    /// Print one JSON object in place of text
    #[arg(long)]
    pub json: bool,
    /// Write an HTML page, too
    #[arg(long, value_name = "OUT.html", value_hint = clap::ValueHint::FilePath)]
    pub html: Option<PathBuf>,
    /// Folder with templates (*.tera) that replace the built-in ones of the same name
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub templates: Option<PathBuf>,
}

fn percent(text: &str) -> Result<f64, String> {
    let number: Option<f64> = text.trim_end_matches('%').trim().parse().ok();
    number.filter(|n| n.is_finite() && *n >= 0.0).ok_or_else(|| "a number of 0 or more is expected".to_owned())
}

/// A recording and a time of it.
#[derive(Debug, PartialEq)]
struct Operand {
    path: PathBuf,
    moment: Option<Moment>,
}

impl Operand {
    /// Takes `REC` or `REC@TIME`. A file that has the whole as its name wins.
    fn parse(text: &OsStr) -> Result<Operand> {
        let path = PathBuf::from(text);
        let bytes = text.as_bytes();
        let at = bytes.iter().rposition(|b| *b == b'@').filter(|_| !path.exists());
        let Some(at) = at else { return Ok(Operand { path, moment: None }) };
        let (file, time) = (OsStr::from_bytes(&bytes[..at]), String::from_utf8_lossy(&bytes[at + 1..]));
        let moment: Moment = time.parse().map_err(|e| Error::config(format!("wrong time after @: {e}")))?;
        Ok(Operand { path: file.into(), moment: Some(moment) })
    }

    fn shown(&self) -> String {
        self.path.to_string_lossy().into_owned()
    }
}

/// Compares and says what has changed; true when something has that must not.
///
/// # Errors
/// A recording cannot be read or has no snapshot at a time, or an output cannot be written.
pub fn run(args: &Args) -> Result<bool> {
    let mut before = Operand::parse(&args.before)?;
    let after = match &args.after {
        Some(text) => Operand::parse(text)?,
        None => {
            before.moment.get_or_insert(Moment::Start);
            Operand { path: before.path.clone(), moment: None }
        }
    };
    // Before the work: a template of the user's may be broken.
    let templates = Templates::new(args.templates.as_deref())?;
    let mut snapshots = Vec::new();
    for side in [&before, &after] {
        let recording = Reader::open(&side.path)?;
        snapshots.push(snapshot_at(&recording, side.moment.unwrap_or(Moment::End))?);
    }
    let limits = Limits { min_bytes: args.min_bytes.0, min_share: args.min_percent / 100.0 };
    let names = [&*before.shown(), &*after.shown()];
    let difference = Difference::new(names, &snapshots[0], &snapshots[1], limits, &args.fail_on);
    if let Some(path) = &args.html {
        atomic::write(path, difference.html(&templates)?.as_bytes())?;
    }
    if args.json {
        let line = serde_json::to_string(&difference)
            .map_err(|e| Error::with_source(ErrorKind::Io, "failed to write the difference as JSON", e))?;
        cli::print(&(line + "\n"))?;
    } else {
        cli::print(&difference.text(&templates)?)?;
    }
    Ok(difference.has_failed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// An @ in a name must not make a recording unreadable, and a wrong time is told from a wrong name.
    #[test]
    fn an_operand_is_a_file_or_a_file_and_a_time() {
        let parse = |text: &str| Operand::parse(OsStr::new(text));
        let operand = |path: &str, moment| Operand { path: path.into(), moment };
        assert_eq!(parse("a.memleak").expect("file"), operand("a.memleak", None));
        let ten = Some(Moment::After(Duration::from_secs(600)));
        assert_eq!(parse("a@b.memleak@10m").expect("file"), operand("a@b.memleak", ten));
        assert_eq!(parse("a@-5m").expect("file"), operand("a", Some(Moment::BeforeEnd(Duration::from_secs(300)))));
        assert!(parse("a@soon").expect_err("time").to_string().contains("wrong time after @"));
        let dir = tempfile::tempdir().expect("folder");
        let file = dir.path().join("a@10m");
        std::fs::write(&file, "").expect("file");
        assert_eq!(Operand::parse(file.as_os_str()).expect("file"), Operand { path: file.clone(), moment: None });
    }

    /// Percent with and without its sign, and nothing else.
    #[test]
    fn percent_is_a_number() {
        assert_eq!((percent("12.5"), percent("10 %")), (Ok(12.5), Ok(10.0)));
        assert!(percent("-1").is_err() && percent("NaN").is_err() && percent("ten").is_err());
    }
}
