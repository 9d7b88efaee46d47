//! Keeps a recording within its size: the older a part is, the fewer of its snapshots are kept.
//!
//! A part reaches from a keyframe to the next. The part whose snapshots lie closest together for their age loses every
//! second one; one that has only its keyframe left goes as a whole. So the distance between snapshots grows with their
//! age, and a step costs no more than reading one part and writing half of it. The first part, the newest one, and
//! snapshots in which a process ends are kept for as long as possible: nothing else says what these say.

use rusqlite::{Connection, params};

use super::codec::{Compressor, Decompressor, damaged};
use super::details::{self, Row};
use super::{schema, totals};
use crate::Result;

/// Most bytes of one snapshot that are read back.
pub(super) const MAX_BYTES: usize = 1 << 30;

/// One part.
#[derive(Clone, Copy, Debug)]
struct Part {
    keyframe: i64,
    /// Snapshots that may go.
    loose: i64,
    /// The end of a process is told in it.
    pinned: bool,
    /// How often it was halved.
    times: i32,
    /// Time of its keyframe, seconds since the collector started.
    time_s: f64,
}

/// Takes out some snapshots, within a transaction; `max_site` is the highest number of a site. Returns how many; 0 when
/// nothing is left that may go.
///
/// # Errors
/// The file cannot be read or written.
pub(super) fn halve_one(db: &Connection, shown: &str, compressor: &mut Compressor, max_site: u32) -> Result<u64> {
    let failed = |e| schema::failed(shown, e);
    let parts = parts(db).map_err(failed)?;
    let Some((newest, old)) = parts.split_last() else { return Ok(0) };
    let score = |p: &Part| (newest.time_s - p.time_s) / f64::from(p.times).exp2();
    let densest = |may_go: &dyn Fn(usize, &Part) -> bool| {
        let candidates = old.iter().enumerate().filter(|(place, p)| may_go(*place, p));
        candidates.max_by(|(_, a), (_, b)| score(a).total_cmp(&score(b)))
    };
    let best = densest(&|place, p| p.loose > 0 || (place > 0 && !p.pinned)).or_else(|| densest(&|place, _| place > 0));
    let Some((place, part)) = best else { return Ok(0) };
    let end = parts[place + 1].keyframe;
    let (taken, halved) = if part.loose > 0 {
        (halve(db, shown, compressor, max_site, part.keyframe, end)?, part.keyframe)
    } else {
        // The part before now stands for the time of this one too.
        (delete(db, part.keyframe, end).map_err(failed)?, parts[place - 1].keyframe)
    };
    let note = || {
        db.execute(
            "INSERT INTO thinned (keyframe, times) VALUES (?, 1) ON CONFLICT DO UPDATE SET times = times + 1",
            [halved],
        )?;
        db.execute(
            "INSERT INTO session (key, value) VALUES ('thinned', ?) ON CONFLICT DO UPDATE SET value = value + ?1",
            [taken],
        )
    };
    note().map_err(failed)?;
    Ok(taken.unsigned_abs())
}

fn parts(db: &Connection) -> rusqlite::Result<Vec<Part>> {
    let sql = "SELECT number, time_s, snapshots.keyframe, pinned, coalesce(times, 0) FROM snapshots \
               LEFT JOIN thinned ON thinned.keyframe = number ORDER BY number";
    let mut statement = db.prepare_cached(sql)?;
    let mut rows = statement.query([])?;
    let mut parts: Vec<Part> = Vec::new();
    while let Some(row) = rows.next()? {
        let (keyframe, pinned): (bool, bool) = (row.get(2)?, row.get(3)?);
        match parts.last_mut() {
            Some(part) if !keyframe => {
                part.loose += i64::from(!pinned);
                part.pinned |= pinned;
            }
            _ => parts.push(Part { keyframe: row.get(0)?, loose: 0, pinned, times: row.get(4)?, time_s: row.get(1)? }),
        }
    }
    Ok(parts)
}

fn delete(db: &Connection, from: i64, end: i64) -> rusqlite::Result<i64> {
    let mut taken = 0;
    for (table, column) in [("details", "snapshot"), ("totals", "snapshot"), ("snapshots", "number")] {
        taken = db.execute(&format!("DELETE FROM {table} WHERE {column} >= ? AND {column} < ?"), params![from, end])?;
    }
    db.execute("DELETE FROM thinned WHERE keyframe = ?", [from])?;
    Ok(taken as i64)
}

/// Takes every second snapshot out of a part and writes the others anew, as differences from what is left.
fn halve(db: &Connection, shown: &str, compressor: &mut Compressor, max_site: u32, from: i64, end: i64) -> Result<i64> {
    let failed = |e| schema::failed(shown, e);
    let list = || {
        let sql = "SELECT number, time_s, keyframe OR pinned FROM snapshots WHERE number >= ? AND number < ? \
                   ORDER BY number";
        let mut statement = db.prepare_cached(sql)?;
        let rows = statement.query_map([from, end], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?)))?;
        rows.collect::<rusqlite::Result<Vec<(i64, f64, bool)>>>()
    };
    let snapshots = list().map_err(failed)?;
    let blob = |table: &str, number: i64| {
        db.prepare_cached(&format!("SELECT data FROM {table} WHERE snapshot = ?"))
            .and_then(|mut q| q.query_row([number], |r| r.get::<_, Vec<u8>>(0)))
            .map_err(failed)
    };
    let store = |table: &str, number: i64, data: Vec<u8>| {
        db.prepare_cached(&format!("UPDATE {table} SET data = ? WHERE snapshot = ?"))
            .and_then(|mut q| q.execute(params![data, number]))
            .map_err(failed)
    };
    let mut decompressor = Decompressor::new()?;
    let (mut totals, mut details) = (totals::Decoder::new(max_site), details::Decoder::new(max_site));
    let (mut new_totals, mut new_details) = (totals::Encoder::default(), details::Encoder::default());
    let mut loose = 0;
    let mut taken = 0;
    for (number, time_s, kept) in snapshots {
        totals.apply(decompressor.decompress(&blob("totals", number)?, MAX_BYTES)?)?;
        details.apply(decompressor.decompress(&blob("details", number)?, MAX_BYTES)?, &totals, time_s)?;
        loose += i64::from(!kept);
        if !kept && loose % 2 == 1 {
            for (table, column) in [("details", "snapshot"), ("totals", "snapshot"), ("snapshots", "number")] {
                let sql = format!("DELETE FROM {table} WHERE {column} = ?");
                db.prepare_cached(&sql).and_then(|mut q| q.execute([number])).map_err(failed)?;
            }
            taken += 1;
            continue;
        }
        let sites: Vec<_> = totals.present().iter().map(|id| (*id, totals.totals(*id))).collect();
        let data = new_totals.encode(&sites, totals.process_rows().to_vec(), totals.kernel().to_owned());
        store("totals", number, compressor.compress(&data)?)?;
        let cohorts: Vec<_> =
            sites.iter().map(|(id, _)| details.details(*id).cohorts_at(time_s).collect::<Vec<_>>()).collect();
        let rows: Vec<Row<'_>> = (sites.iter().zip(&cohorts))
            .map(|((id, totals), cohorts)| {
                let d = details.details(*id);
                let (last_allocation_s, lifetimes) = (d.last_allocation_s, &d.lifetimes);
                let (stderr, reach, kernel) = (d.stderr, d.reach.clone(), d.kernel.clone());
                Row { id: *id, totals: *totals, last_allocation_s, cohorts, lifetimes, stderr, reach, kernel }
            })
            .collect();
        store("details", number, compressor.compress(&new_details.encode(&rows, time_s))?)?;
    }
    if taken == 0 { Err(damaged("a part that should be thinned has nothing to take out")) } else { Ok(taken) }
}
