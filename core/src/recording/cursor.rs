//! Goes through the snapshots of a recording, one after the other.
//!
//! A [`Cursor`] reads numbers. [`Snapshots`] makes whole snapshots of them, [`Replay`] takes what has changed into a
//! history.

use std::ops::Range;
use std::sync::Arc;

use super::codec::{Decompressor, In, damaged};
use super::thin::MAX_BYTES;
use super::{Filter, Reader, SnapshotInfo, details, totals};
use crate::history::History;
use crate::reachability::roots::MAX_NAME;
use crate::snapshot::{LIFETIME_CLASSES, Site, SiteSample, Snapshot, StandardErrors, Totals};
use crate::{Error, ErrorKind, Result};

/// Bytes that a site or process may take in a snapshot; more is damage. The most is the way to a block, with the names in
/// it that the scan bounds ([`crate::reachability::roots::MAX_NAME`]); a byte of those may take six in the file.
const MAX_SITE_BYTES: usize = 4096 + 2 * 6 * MAX_NAME;

/// Reads the numbers of one snapshot after the other.
pub(super) struct Cursor {
    pub(super) totals: totals::Decoder,
    pub(super) details: details::Decoder,
    decompressor: Decompressor,
    limit: usize,
    /// Place of the snapshot to be read next.
    next: usize,
}

impl Cursor {
    /// Ready to read the snapshot at a place of the contents.
    pub(super) fn new(reader: &Reader, place: usize) -> Result<Cursor> {
        let max = reader.max_number();
        let mut cursor = Cursor {
            totals: totals::Decoder::new(max),
            details: details::Decoder::new(max),
            decompressor: Decompressor::new()?,
            limit: (reader.sites.len() + reader.processes.len() + 16).saturating_mul(MAX_SITE_BYTES).min(MAX_BYTES),
            next: 0,
        };
        cursor.seek(reader, place);
        Ok(cursor)
    }

    /// Skips to the last keyframe before a place, that one included, unless it is behind what was read already.
    pub(super) fn seek(&mut self, reader: &Reader, place: usize) {
        let before = &reader.snapshots[..reader.snapshots.len().min(place + 1)];
        let keyframe = before.iter().rposition(|s| s.keyframe).unwrap_or(0);
        self.next = self.next.max(keyframe);
    }

    /// Reads up to a snapshot, that one included, with the details if they are wanted; these can only be had when they
    /// were wanted since the last keyframe.
    pub(super) fn read(&mut self, reader: &Reader, place: usize, details: bool) -> Result<()> {
        while self.next <= place {
            let info = reader.snapshots[self.next];
            self.apply(reader, &info, details).map_err(|e| {
                Error::with_source(
                    ErrorKind::Io,
                    format!("failed to read snapshot {} of {}", info.number, reader.file.shown),
                    e,
                )
            })?;
            self.next += 1;
        }
        Ok(())
    }

    fn apply(&mut self, reader: &Reader, info: &SnapshotInfo, details: bool) -> Result<()> {
        let number = info.number.cast_signed();
        let failed = |e| match e {
            rusqlite::Error::QueryReturnedNoRows => damaged("a snapshot has no samples"),
            e => reader.failed(e),
        };
        let limit = self.limit;
        if info.keyframe {
            self.totals.reset();
            self.details.reset();
        }
        let mut apply = |sql: &str, take: &mut dyn FnMut(In<'_>) -> Result<()>| -> Result<()> {
            let mut statement = reader.file.db.prepare_cached(sql).map_err(failed)?;
            let mut rows = statement.query([number]).map_err(failed)?;
            let row = rows.next().map_err(failed)?.ok_or_else(|| damaged("a snapshot has no samples"))?;
            let blob = row.get_ref(0).map_err(failed)?;
            let blob = blob.as_blob().map_err(|_| damaged("the samples of a snapshot are no blob"))?;
            take(self.decompressor.decompress(blob, limit)?)
        };
        apply("SELECT data FROM totals WHERE snapshot = ?", &mut |input| self.totals.apply(input))?;
        if *self.totals.sum() != info.totals {
            return Err(damaged("the totals of a snapshot are not the sum of its sites"));
        }
        if details {
            let totals = &self.totals;
            apply("SELECT data FROM details WHERE snapshot = ?", &mut |input| {
                self.details.apply(input, totals, info.time_s)
            })?;
        }
        Ok(())
    }

    /// The snapshot that was read last.
    fn snapshot(&self, reader: &Reader, info: &SnapshotInfo, filter: &Filter) -> Result<Snapshot> {
        let processes = reader.process_samples(self, filter)?;
        let mut sites = Vec::with_capacity(self.totals.present().len());
        for id in self.totals.present() {
            let Some(known) = reader.known(*id) else { return Err(damaged("a site of a snapshot is missing")) };
            if filter.takes(&known.site) {
                sites.push(self.sample(reader, &known.site, *id, info.time_s)?);
            }
        }
        sites.sort_unstable_by_key(|s| (std::cmp::Reverse(s.totals.outstanding_bytes()), s.site.key));
        let SnapshotInfo { number, time_s, wall_s, collect_cpu_s, .. } = *info;
        Ok(Snapshot { number, time_s, wall_s, processes, sites, collect_cpu_s })
    }

    /// One site of the snapshot that was read last.
    ///
    /// # Errors
    /// The recording is damaged.
    pub(super) fn sample(&self, reader: &Reader, site: &Arc<Site>, id: u32, time_s: f64) -> Result<SiteSample> {
        let mut sample = SiteSample {
            site: Arc::clone(site),
            totals: Totals::default(),
            last_allocation_s: 0.0,
            cohorts: Vec::new(),
            lifetimes: [0; LIFETIME_CLASSES],
            reachability: None,
            kernel: None,
            stderr: StandardErrors::default(),
        };
        self.update(reader, &mut sample, id, time_s)?;
        Ok(sample)
    }

    /// Brings a sample of a site up to the snapshot that was read last.
    fn update(&self, reader: &Reader, sample: &mut SiteSample, id: u32, time_s: f64) -> Result<()> {
        let details = self.details.details(id);
        let mut on_the_way = |id| {
            let known = reader.known(id).ok_or_else(|| damaged("a site on the way to a block is missing"))?;
            reader.name(&known.site)?;
            Ok(Arc::clone(&known.site))
        };
        let SiteSample { site: _, totals, stderr, last_allocation_s, cohorts, lifetimes, reachability, kernel } =
            sample;
        (*totals, *last_allocation_s, *stderr) = (self.totals.totals(id), details.last_allocation_s, details.stderr);
        *lifetimes = details.lifetimes;
        cohorts.clear();
        cohorts.extend(details.cohorts_at(time_s));
        *reachability = details.reach.as_ref().map(|stored| stored.reach(&mut on_the_way)).transpose()?;
        *kernel = details.kernel.as_ref().map(|stored| stored.sample()).transpose()?;
        Ok(())
    }
}

/// Takes the snapshots of a recording into a history, see [`Reader::replay`]: the same as making each one and pushing it,
/// and several times as fast, because what has not changed is not made again.
pub struct Replay<'a> {
    reader: &'a Reader,
    cursor: Cursor,
    next: usize,
    /// By number of the site: place of the last snapshot that said something new of it, from 1.
    news: Vec<usize>,
}

impl<'a> Replay<'a> {
    pub(super) fn new(reader: &'a Reader) -> Result<Replay<'a>> {
        Ok(Replay { reader, cursor: Cursor::new(reader, 0)?, next: 0, news: vec![0; reader.sites.len()] })
    }

    /// Takes the next snapshot into the history, which must have taken all before it in; `None` at the end.
    ///
    /// # Errors
    /// The recording is damaged.
    pub fn push(&mut self, history: &mut History) -> Result<Option<SnapshotInfo>> {
        let (reader, cursor) = (self.reader, &mut self.cursor);
        let Some(info) = reader.snapshots.get(self.next).copied() else { return Ok(None) };
        cursor.read(reader, self.next, true)?;
        self.next += 1;
        let place = self.next;
        cursor.totals.changes.iter().for_each(|c| self.news[c.id as usize] = place);
        cursor.details.changes.iter().for_each(|id| self.news[*id as usize] = place);
        let processes = reader.process_samples(cursor, &Filter::default())?;
        let present = cursor.totals.present();
        let mut taking = history.take((info.time_s, info.wall_s), info.totals, present.len());
        for id in present {
            let site = &reader.known(*id).ok_or_else(|| damaged("a site of a snapshot is missing"))?.site;
            match taking.known(site.key, cursor.totals.totals(*id)) {
                Some(latest) if self.news[*id as usize] == place => cursor.update(reader, latest, *id, info.time_s)?,
                Some(latest) => {
                    if let Some(last) = latest.cohorts.last_mut()
                        && cursor.details.details(*id).is_last_open()
                    {
                        last.end_s = info.time_s;
                    }
                }
                None => taking.insert(cursor.sample(reader, site, *id, info.time_s)?),
            }
        }
        taking.end(processes.into_iter());
        Ok(Some(info))
    }
}

/// The snapshots of a recording, see [`Reader::snapshots`]. After an error it ends.
pub struct Snapshots<'a> {
    reader: &'a Reader,
    filter: &'a Filter,
    cursor: Result<Cursor>,
    range: Range<usize>,
}

impl<'a> Snapshots<'a> {
    pub(super) fn new(reader: &'a Reader, range: Range<usize>, filter: &'a Filter) -> Snapshots<'a> {
        Snapshots { cursor: Cursor::new(reader, range.start), range, reader, filter }
    }
}

impl Iterator for Snapshots<'_> {
    type Item = Result<Snapshot>;

    fn next(&mut self) -> Option<Result<Snapshot>> {
        let place = self.range.next()?;
        let mut read = || {
            let cursor = self.cursor.as_mut().map_err(|e| Error::new(e.kind(), e.to_string()))?;
            cursor.read(self.reader, place, true)?;
            cursor.snapshot(self.reader, &self.reader.snapshots[place], self.filter)
        };
        let result = read();
        if result.is_err() {
            self.range = 0..0;
        }
        Some(result)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (0, Some(self.range.len()))
    }
}
