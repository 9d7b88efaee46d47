//! A time in a recording, as people write it, and the snapshot of that time.

use std::str::FromStr;
use std::time::Duration;

use crate::recording::{Filter, Reader, SnapshotInfo};
use crate::snapshot::Snapshot;
use crate::units::{format_duration_s, parse_duration, parse_time_utc};
use crate::{Error, Result};

/// What a time can be, for help and errors.
pub const FORMS: &str = "10m (after the start), -5m (before the end), start, end, or 2026-03-02T09:30:00Z";

/// A time in a recording.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Moment {
    /// The first snapshot.
    Start,
    /// This long after the collector's start.
    After(Duration),
    /// This long before the last snapshot.
    BeforeEnd(Duration),
    /// Wall-clock time, seconds since 1970.
    Wall(f64),
    /// The last snapshot.
    #[default]
    End,
}

// A wall-clock time comes from text and is never NaN.
impl Eq for Moment {}

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |e: String| format!("{e}; a time is {FORMS}");
        match text.trim() {
            "start" => Ok(Moment::Start),
            "end" => Ok(Moment::End),
            t if t.starts_with('-') => parse_duration(&t[1..]).map(Moment::BeforeEnd).map_err(wrong),
            t if t.contains('T') || t.matches('-').count() == 2 => parse_time_utc(t).map(Moment::Wall).map_err(wrong),
            t => parse_duration(t).map(Moment::After).map_err(wrong),
        }
    }
}

impl Moment {
    /// The place of the newest snapshot that is not after this time.
    ///
    /// # Errors
    /// There is none: when the first one was, in words.
    fn find(self, contents: &[SnapshotInfo]) -> Result<usize, String> {
        let (Some(first), Some(last)) = (contents.first(), contents.last()) else {
            return Err("it holds no snapshot".to_owned());
        };
        let up_to = |time: &dyn Fn(&SnapshotInfo) -> f64, limit: f64| {
            // Times are kept as they were taken: half a millisecond is rounding.
            contents.iter().rposition(|s| time(s) <= limit + 0.0005)
        };
        let found = match self {
            Moment::Start => Some(0),
            Moment::End => Some(contents.len() - 1),
            Moment::After(d) => up_to(&|s| s.time_s, d.as_secs_f64()),
            Moment::BeforeEnd(d) => up_to(&|s| s.time_s, last.time_s - d.as_secs_f64()),
            Moment::Wall(wall_s) => up_to(&|s| s.wall_s, wall_s),
        };
        found.ok_or_else(|| {
            let began = crate::units::format_time_utc(first.wall_s);
            format!(
                "it has no snapshot so early: the first is from {} after the start ({began})",
                format_duration_s(first.time_s)
            )
        })
    }
}

/// The snapshot of a recording at a time, its stacks named.
///
/// # Errors
/// The recording has none so early, or is damaged.
pub fn snapshot_at(recording: &Reader, moment: Moment) -> Result<Snapshot> {
    let failed = |why: String| Error::config(format!("failed to use {}: {why}", recording.shown()));
    let place = moment.find(recording.contents()).map_err(failed)?;
    let info = &recording.contents()[place];
    let filter = Filter { since_s: Some(info.time_s), until_s: Some(info.time_s), ..Filter::default() };
    for snapshot in recording.snapshots(&filter) {
        let snapshot = snapshot?;
        if snapshot.number == info.number {
            for s in &snapshot.sites {
                recording.name(&s.site)?;
            }
            return Ok(snapshot);
        }
    }
    Err(failed(format!("snapshot {} is missing", info.number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every form, and what is none of them.
    #[test]
    fn times_are_read_in_all_their_forms() {
        for (text, expected) in [
            ("start", Moment::Start),
            ("end", Moment::End),
            ("10m", Moment::After(Duration::from_secs(600))),
            ("0", Moment::After(Duration::ZERO)),
            ("-1m30s", Moment::BeforeEnd(Duration::from_secs(90))),
            ("2026-03-02T09:30:00Z", Moment::Wall(1_772_443_800.0)),
            ("2026-03-02T09:30:00.250Z", Moment::Wall(1_772_443_800.25)),
            ("2026-03-02", Moment::Wall(1_772_409_600.0)),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for text in ["", "10", "-", "soon", "2026-13-02T00:00:00Z", "2026-02-30", "2026-03-02T25:00:00Z", "1T"] {
            let error = text.parse::<Moment>().expect_err(text);
            assert!(error.contains("a time is 10m"), "{text}: {error}");
        }
    }
}
