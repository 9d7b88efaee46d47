//! Reads a recording, also one that is being written or whose writer was killed.
//!
//! Everything is as of the moment of [`Reader::open`]: a writer that goes on, and thins, changes nothing. Names of call
//! stacks are filled in when they are asked for ([`Reader::name`]), which most of what reads a recording does for a few
//! sites only.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rusqlite::{Connection, OpenFlags, OptionalExtension, Row};

use super::codec::{Decompressor, In, damaged};
use super::{
    AlertRecord, Event, EventKind, FindingSpan, Host, Location, Session, SnapshotInfo, details, schema, totals,
};
use crate::alert::Status;
use crate::finding::Severity;
use crate::output::text::visible;
use crate::snapshot::{LIFETIME_CLASSES, Process, ProcessSample, Site, SiteKey, SiteSample, Snapshot, Totals};
use crate::symbolize::Frame;
use crate::{Error, ErrorKind, Result};

/// Bytes that a site or process may take in a snapshot; more is damage.
const MAX_SITE_BYTES: usize = 4096;
/// How many numbers of sites there may be per site: they are given without gaps.
const MAX_SPARSE: u64 = 16;

/// Part of a recording.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Filter {
    /// Only snapshots from here on, seconds since the collector started.
    pub since_s: Option<f64>,
    /// Only snapshots up to here, seconds since the collector started.
    pub until_s: Option<f64>,
    /// Only processes with these ids; empty is all.
    pub pids: Vec<u32>,
    /// Only sites of these probe sets; empty is all.
    pub probe_sets: Vec<String>,
}

impl Filter {
    fn takes_process(&self, process: &Process) -> bool {
        self.pids.is_empty() || self.pids.contains(&process.pid)
    }

    pub(super) fn takes(&self, site: &Site) -> bool {
        self.takes_process(&site.process)
            && (self.probe_sets.is_empty() || self.probe_sets.iter().any(|p| **p == *site.probe_set))
    }
}

/// Blobs with the locations and the frames of a stack.
type Stack = (Vec<u8>, Option<Vec<u8>>);

/// A site and where its stack is.
struct Known {
    site: Arc<Site>,
    stack: i64,
}

/// An open recording.
pub struct Reader {
    db: Connection,
    shown: String,
    session: Session,
    processes: BTreeMap<u32, Arc<Process>>,
    /// By number in the file; most places are taken.
    sites: Vec<Option<Known>>,
    by_key: HashMap<SiteKey, u32>,
    snapshots: Vec<SnapshotInfo>,
    modules: HashMap<i64, (Option<String>, Option<String>)>,
    /// By row; addresses are left out. Read when the first name is asked for.
    frames: OnceCell<HashMap<u64, Frame>>,
}

impl Reader {
    /// Opens a recording and reads everything but its samples, names and findings.
    ///
    /// # Errors
    /// There is no such file, it is not a recording, it is damaged, or it is of a newer version.
    pub fn open(path: &Path) -> Result<Reader> {
        let shown = visible(&path.to_string_lossy()).into_owned();
        let refuse = |why: &str| Error::new(ErrorKind::Io, format!("failed to open {shown}: {why}"));
        let meta = fs::metadata(path).map_err(|e| Error::io(format!("failed to open {shown}"), e))?;
        if !meta.is_file() {
            return Err(refuse(if meta.is_dir() { "it is a folder" } else { "it is not a regular file" }));
        }
        if meta.len() == 0 {
            return Err(refuse("it is empty: the run ended before it was written"));
        }
        let failed = |e| schema::failed(&shown, e);
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let db = Connection::open_with_flags(path, flags).map_err(failed)?;
        db.busy_timeout(std::time::Duration::from_secs(5)).map_err(failed)?;
        db.pragma_update(None, "cache_size", -4096).map_err(failed)?;
        // Names in the schema of a hostile file must not run functions.
        db.pragma_update(None, "trusted_schema", false).map_err(failed)?;
        db.set_prepared_statement_cache_capacity(32);
        // One view of the file until the reader is dropped.
        db.execute_batch("BEGIN").map_err(failed)?;
        let format = schema::check(&db, &shown)?;
        let mut reader = Reader {
            db,
            shown,
            session: Session { format, ..Session::default() },
            processes: BTreeMap::new(),
            sites: Vec::new(),
            by_key: HashMap::new(),
            snapshots: Vec::new(),
            modules: HashMap::new(),
            frames: OnceCell::new(),
        };
        reader.read_session()?;
        reader.read_processes()?;
        reader.read_sites()?;
        reader.read_snapshots()?;
        Ok(reader)
    }

    /// What it says of the run as a whole.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The file, fit for messages.
    pub fn shown(&self) -> &str {
        &self.shown
    }

    /// Every process that was watched, by instance.
    pub fn processes(&self) -> impl Iterator<Item = &Arc<Process>> {
        self.processes.values()
    }

    /// Every site, in the order in which they were first seen. Their frames are empty until [`Reader::name`].
    pub fn sites(&self) -> impl Iterator<Item = &Arc<Site>> {
        self.sites.iter().flatten().map(|k| &k.site)
    }

    /// One site.
    pub fn site(&self, key: SiteKey) -> Option<&Arc<Site>> {
        self.by_key.get(&key).and_then(|id| self.known(*id)).map(|k| &k.site)
    }

    /// All snapshots, in their order.
    pub fn contents(&self) -> &[SnapshotInfo] {
        &self.snapshots
    }

    /// The snapshots that a filter takes, in their order.
    pub fn snapshots<'a>(&'a self, filter: &'a Filter) -> Snapshots<'a> {
        let range = self.range(filter);
        Snapshots { cursor: Cursor::new(self, range.start), range, reader: self, filter }
    }

    /// Fills the frames of a site: its names if any were recorded, else where its return addresses lie.
    ///
    /// # Errors
    /// The recording is damaged.
    pub fn name(&self, site: &Site) -> Result<()> {
        if site.frames.get().is_none() {
            // Set meanwhile by somebody else: then it holds the same.
            let _ = site.frames.set(self.frames_of(site)?);
        }
        Ok(())
    }

    /// Where the return addresses of a site lie, in their order; empty when that was not recorded.
    ///
    /// # Errors
    /// The recording is damaged.
    pub fn locations(&self, site: &Site) -> Result<Vec<Location>> {
        let Some((locations, _)) = self.stack(site)? else { return Ok(Vec::new()) };
        let mut input = In::new(&locations);
        let mut out = Vec::new();
        while !input.is_empty() {
            let (module, offset) = (input.get()?, input.get()?);
            let (path, build_id) = self.modules.get(&module.cast_signed()).cloned().unwrap_or_default();
            out.push(Location { module: path, build_id, offset });
        }
        Ok(out)
    }

    /// What rules said during the run, in the order in which it began.
    ///
    /// # Errors
    /// The recording is damaged.
    pub fn findings(&self) -> Result<Vec<FindingSpan>> {
        let last = self.snapshots.last();
        let sql = "SELECT finding, rule, site, severity, confidence, reason, first_snapshot, last_snapshot, first_s, \
                   last_s FROM findings ORDER BY id";
        let rows = self.rows(sql, |r| {
            let end: (Option<i64>, Option<f64>) = (r.get(7)?, r.get(9)?);
            let site = r.get::<_, Option<u32>>(2)?.and_then(|id| self.known(id)).map(|k| Arc::clone(&k.site));
            Ok(site.map(|site| {
                Ok::<_, rusqlite::Error>(FindingSpan {
                    id: r.get(0)?,
                    rule: r.get(1)?,
                    severity: severity(&r.get::<_, String>(3)?),
                    confidence: real(r, 4)?,
                    reason: r.get(5)?,
                    site,
                    first_snapshot: r.get::<_, i64>(6)?.cast_unsigned(),
                    last_snapshot: end.0.map_or(last.map_or(0, |s| s.number), i64::cast_unsigned),
                    first_s: real(r, 8)?,
                    last_s: end.1.or(last.map(|s| s.time_s)).unwrap_or(0.0),
                    standing: end.0.is_none(),
                })
            }))
        })?;
        rows.into_iter().flatten().collect::<rusqlite::Result<_>>().map_err(|e| self.failed(e))
    }

    /// The alerts of the run: those that fire, the most severe first, then the largest; then the resolved ones, the
    /// newest first. The same order as in a running collector.
    ///
    /// # Errors
    /// The recording is damaged.
    pub fn alerts(&self) -> Result<Vec<AlertRecord>> {
        let sql = "SELECT finding, rule, severity, confidence, reason, site, outstanding_bytes, processes, ended, \
                   first_seen_s, fired_s, resolved_s FROM alerts";
        let rows = self.rows(sql, |r| {
            let site = r.get::<_, Option<u32>>(5)?.and_then(|id| self.known(id)).map(|k| k.site.key);
            let resolved_s: Option<f64> = r.get(11)?;
            Ok(AlertRecord {
                id: r.get(0)?,
                rule: r.get(1)?,
                severity: severity(&r.get::<_, String>(2)?),
                confidence: real(r, 3)?,
                reason: r.get(4)?,
                // Its site may be of a process whose samples were lost: the alert is still told.
                site: site.unwrap_or(SiteKey { instance: u32::MAX, probe_set: u32::MAX, stack: u64::MAX }),
                outstanding_bytes: r.get::<_, i64>(6)?.cast_unsigned(),
                processes: usize::try_from(r.get::<_, i64>(7)?).unwrap_or(1),
                ended: r.get(8)?,
                status: if resolved_s.is_some() { Status::Resolved } else { Status::Firing },
                first_seen_s: real(r, 9)?,
                fired_s: real(r, 10)?,
                resolved_s,
            })
        })?;
        let (mut firing, mut resolved): (Vec<_>, Vec<_>) = rows.into_iter().partition(|a| a.status == Status::Firing);
        firing.sort_by(|a, b| {
            (b.severity, b.outstanding_bytes).cmp(&(a.severity, a.outstanding_bytes)).then_with(|| a.id.cmp(&b.id))
        });
        resolved.sort_by(|a, b| {
            let at = |r: &AlertRecord| r.resolved_s.unwrap_or(0.0);
            at(b).total_cmp(&at(a)).then_with(|| b.id.cmp(&a.id))
        });
        firing.append(&mut resolved);
        Ok(firing)
    }

    /// What happened during the run, in the order in which it was stored.
    ///
    /// # Errors
    /// The recording is damaged.
    pub fn events(&self) -> Result<Vec<Event>> {
        self.rows("SELECT time_s, wall_s, kind, instance, text FROM events ORDER BY id", |r| {
            Ok(Event {
                time_s: real(r, 0)?,
                wall_s: real(r, 1)?,
                kind: EventKind::from_name(&r.get::<_, String>(2)?),
                instance: r.get(3)?,
                text: r.get(4)?,
            })
        })
    }

    /// Number of a site in the file.
    pub(super) fn known_id(&self, key: SiteKey) -> Option<u32> {
        self.by_key.get(&key).copied()
    }

    /// The highest number of a site in the file; 0 without one.
    pub(super) fn max_number(&self) -> u32 {
        // As many places as fit a number: checked when they were read.
        self.sites.len().saturating_sub(1) as u32
    }

    /// The site of a number in the file.
    pub(super) fn numbered(&self, id: u32) -> Option<&Arc<Site>> {
        self.known(id).map(|k| &k.site)
    }

    /// The processes of the snapshot that a cursor has read last.
    pub(super) fn process_samples(&self, cursor: &Cursor, filter: &Filter) -> Result<Vec<ProcessSample>> {
        let mut processes = cursor.totals.processes(|instance| self.processes.get(&instance))?;
        processes.retain(|p| filter.takes_process(&p.process));
        Ok(processes)
    }

    /// Places of the snapshots that a filter takes.
    pub(super) fn range(&self, filter: &Filter) -> Range<usize> {
        let start = filter.since_s.map_or(0, |since| self.snapshots.partition_point(|s| s.time_s < since));
        let end =
            filter.until_s.map_or(self.snapshots.len(), |until| self.snapshots.partition_point(|s| s.time_s <= until));
        start..end.max(start)
    }

    fn failed(&self, error: rusqlite::Error) -> Error {
        schema::failed(&self.shown, error)
    }

    fn known(&self, id: u32) -> Option<&Known> {
        self.sites.get(id as usize)?.as_ref()
    }

    fn rows<T>(&self, sql: &str, mut row: impl FnMut(&Row<'_>) -> rusqlite::Result<T>) -> Result<Vec<T>> {
        let mut read = || {
            let mut statement = self.db.prepare_cached(sql)?;
            let rows = statement.query_map([], |r| row(r))?;
            rows.collect::<rusqlite::Result<Vec<T>>>()
        };
        read().map_err(|e| self.failed(e))
    }

    fn read_session(&mut self) -> Result<()> {
        let rows = self.rows("SELECT key, value FROM session", |r| {
            Ok((r.get::<_, String>(0)?, r.get::<_, rusqlite::types::Value>(1)?))
        })?;
        for (key, value) in rows {
            match (key.as_str(), value) {
                ("run", rusqlite::types::Value::Text(text)) => {
                    self.session.run = serde_json::from_str(&text)
                        .map_err(|_| damaged("what it says of the run cannot be understood"))?;
                }
                ("settings", rusqlite::types::Value::Text(text)) => self.session.settings = text,
                ("complete", _) => self.session.complete = true,
                ("thinned", rusqlite::types::Value::Integer(n)) => self.session.thinned = n.cast_unsigned(),
                _ => {}
            }
        }
        let hosts = self.rows("SELECT name, kernel, machine, boot_id FROM hosts ORDER BY id LIMIT 1", |r| {
            Ok(Host { name: r.get(0)?, kernel: r.get(1)?, machine: r.get(2)?, boot_id: r.get(3)? })
        })?;
        self.session.host = hosts.into_iter().next().unwrap_or_default();
        Ok(())
    }

    fn read_processes(&mut self) -> Result<()> {
        let rows = self.rows("SELECT instance, pid, start_ticks, comm, exe, cmdline, labels FROM processes", |r| {
            Ok(Process {
                instance: r.get(0)?,
                pid: r.get(1)?,
                start_ticks: r.get::<_, i64>(2)?.cast_unsigned(),
                comm: r.get(3)?,
                exe: r.get(4)?,
                cmdline: r.get(5)?,
                // What cannot be understood is as good as not known.
                labels: serde_json::from_str(&r.get::<_, String>(6)?).unwrap_or_default(),
            })
        })?;
        self.processes = rows.into_iter().map(|p| (p.instance, Arc::new(p))).collect();
        let modules =
            self.rows("SELECT id, path, build_id FROM modules", |r| Ok((r.get(0)?, (r.get(1)?, r.get(2)?))))?;
        self.modules = modules.into_iter().collect();
        Ok(())
    }

    fn read_sites(&mut self) -> Result<()> {
        let bounds = self.rows("SELECT count(*), coalesce(max(id), 0), coalesce(min(id), 1) FROM sites", |r| {
            Ok((r.get::<_, i64>(0)?, r.get::<_, i64>(1)?, r.get::<_, i64>(2)?))
        })?;
        let (count, max, min) = bounds.first().copied().unwrap_or_default();
        let limit = count.unsigned_abs().saturating_mul(MAX_SPARSE).min(u64::from(u32::MAX) - 1);
        if min < 1 || max.unsigned_abs() > limit {
            return Err(damaged("its sites have impossible numbers"));
        }
        let mut names: BTreeSet<Arc<str>> = BTreeSet::new();
        let mut shared = |text: String| match names.get(text.as_str()) {
            Some(known) => Arc::clone(known),
            None => {
                let text: Arc<str> = text.into();
                names.insert(Arc::clone(&text));
                text
            }
        };
        let sql = "SELECT id, site_id, instance, probe_set_number, stack_hash, probe_set, function, stack, addresses, \
                   truncated FROM sites";
        let processes = &self.processes;
        let mut missing = false;
        let mut sites: Vec<Option<Known>> = Vec::new();
        sites.resize_with(max.unsigned_abs() as usize + 1, || None);
        let mut by_key = HashMap::with_capacity(sites.len());
        let rows = self.rows(sql, |r| {
            let key = SiteKey { instance: r.get(2)?, probe_set: r.get(3)?, stack: r.get::<_, i64>(4)?.cast_unsigned() };
            let process = processes.get(&key.instance);
            missing |= process.is_none();
            let site = Site {
                key,
                id: r.get::<_, i64>(1)?.cast_unsigned(),
                process: process.cloned().unwrap_or_default(),
                probe_set: shared(r.get(5)?),
                function: shared(r.get(6)?),
                addresses: addresses(r.get_ref(8)?.as_blob()?),
                truncated: r.get::<_, Option<String>>(9)?.map(&mut shared),
                frames: OnceLock::new(),
            };
            let id: u32 = r.get(0)?;
            by_key.insert(key, id);
            if let Some(place) = sites.get_mut(id as usize) {
                *place = Some(Known { site: Arc::new(site), stack: r.get(7)? });
            }
            Ok(())
        })?;
        drop(rows);
        if missing {
            return Err(damaged("a site is of a process that is missing"));
        }
        (self.sites, self.by_key) = (sites, by_key);
        Ok(())
    }

    fn read_snapshots(&mut self) -> Result<()> {
        let sql = "SELECT number, time_s, wall_s, collect_cpu_s, keyframe, sites, allocated_bytes, allocated_count, \
                   freed_bytes, freed_count FROM snapshots ORDER BY number";
        self.snapshots = self.rows(sql, |r| {
            let number = |i: usize| r.get::<_, i64>(i).map(i64::cast_unsigned);
            Ok(SnapshotInfo {
                number: number(0)?,
                time_s: real(r, 1)?,
                wall_s: real(r, 2)?,
                collect_cpu_s: real(r, 3)?,
                keyframe: r.get(4)?,
                sites: number(5)?,
                totals: Totals {
                    allocated_bytes: number(6)?,
                    allocated_count: number(7)?,
                    freed_bytes: number(8)?,
                    freed_count: number(9)?,
                },
            })
        })?;
        if self.snapshots.first().is_some_and(|s| !s.keyframe) {
            return Err(damaged("its first snapshot is missing"));
        }
        Ok(())
    }

    /// Locations and, once known, frames of a site's stack.
    fn stack(&self, site: &Site) -> Result<Option<Stack>> {
        let Some(known) = self.known_id(site.key).and_then(|id| self.known(id)) else { return Ok(None) };
        let read = || {
            let mut statement = self.db.prepare_cached("SELECT locations, frames FROM stacks WHERE id = ?")?;
            statement.query_row([known.stack], |r| Ok((r.get(0)?, r.get(1)?))).optional()
        };
        read().map_err(|e| self.failed(e))
    }

    fn frames_of(&self, site: &Site) -> Result<Vec<Frame>> {
        let Some((_, Some(blob))) = self.stack(site)? else { return self.unnamed(site) };
        let known = match self.frames.get() {
            Some(frames) => frames,
            None => {
                let frames = self.read_frames()?;
                self.frames.get_or_init(|| frames)
            }
        };
        let mut input = In::new(&blob);
        let mut out = Vec::new();
        while !input.is_empty() {
            let frame = known.get(&input.get()?).ok_or_else(|| damaged("a frame of a call stack is missing"))?;
            let place = input.get()?;
            let address = match place {
                0 => input.get()?,
                n => usize::try_from(n - 1).ok().and_then(|n| site.addresses.get(n)).copied().unwrap_or(0),
            };
            out.push(Frame { address, ..frame.clone() });
        }
        Ok(out)
    }

    fn read_frames(&self) -> Result<HashMap<u64, Frame>> {
        let sql = "SELECT id, module, function, offset, file, line, inlined, reason, file_address FROM frames";
        let rows = self.rows(sql, |r| {
            let module: Option<i64> = r.get(1)?;
            let (path, build_id) = module.and_then(|m| self.modules.get(&m).cloned()).unwrap_or_default();
            let frame = Frame {
                function: r.get(2)?,
                module: path,
                offset: r.get::<_, i64>(3)?.cast_unsigned(),
                file: r.get(4)?,
                line: r.get(5)?,
                inlined: r.get(6)?,
                reason: r.get(7)?,
                address: 0,
                build_id,
                file_address: r.get::<_, Option<i64>>(8)?.map(i64::cast_unsigned),
            };
            Ok((r.get::<_, i64>(0)?.cast_unsigned(), frame))
        })?;
        Ok(rows.into_iter().collect())
    }

    /// Frames of a stack that was not named while its process ran.
    fn unnamed(&self, site: &Site) -> Result<Vec<Frame>> {
        let mut locations = self.locations(site)?.into_iter();
        let frame = |address: &u64| {
            let location = locations.next().unwrap_or(Location { offset: *address, ..Location::default() });
            Frame {
                module: location.module,
                build_id: location.build_id,
                offset: location.offset,
                address: *address,
                reason: Some("it was not named while it was recorded".to_owned()),
                ..Frame::default()
            }
        };
        Ok(site.addresses.iter().map(frame).collect())
    }
}

fn severity(name: &str) -> Severity {
    match name {
        "critical" => Severity::Critical,
        "warning" => Severity::Warning,
        _ => Severity::Info,
    }
}

/// A time or share; SQLite stores what is not a number as nothing.
fn real(row: &Row<'_>, column: usize) -> rusqlite::Result<f64> {
    Ok(row.get::<_, Option<f64>>(column)?.unwrap_or(f64::NAN))
}

/// Return addresses; what cannot be read ends the list.
fn addresses(blob: &[u8]) -> Vec<u64> {
    let mut input = In::new(blob);
    let (mut out, mut before) = (Vec::new(), 0);
    while !input.is_empty()
        && let Ok(address) = input.get_delta(before)
    {
        out.push(address);
        before = address;
    }
    out
}

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
            limit: (reader.sites.len() + reader.processes.len() + 16) * MAX_SITE_BYTES,
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
                    format!("failed to read snapshot {} of {}", info.number, reader.shown),
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
            let mut statement = reader.db.prepare_cached(sql).map_err(failed)?;
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
                sites.push(self.sample(&known.site, *id, info.time_s));
            }
        }
        sites.sort_unstable_by_key(|s| (std::cmp::Reverse(s.totals.outstanding_bytes()), s.site.key));
        let SnapshotInfo { number, time_s, wall_s, collect_cpu_s, .. } = *info;
        Ok(Snapshot { number, time_s, wall_s, processes, sites, collect_cpu_s })
    }

    /// One site of the snapshot that was read last.
    pub(super) fn sample(&self, site: &Arc<Site>, id: u32, time_s: f64) -> SiteSample {
        let details = self.details.details(id);
        let lifetimes: [u64; LIFETIME_CLASSES] = details.lifetimes;
        SiteSample {
            site: Arc::clone(site),
            totals: self.totals.totals(id),
            last_allocation_s: details.last_allocation_s,
            cohorts: details.cohorts_at(time_s),
            lifetimes,
            reachability: None,
            kernel: None,
            stderr: details.stderr,
        }
    }
}

/// The snapshots of a recording, see [`Reader::snapshots`]. After an error it ends.
pub struct Snapshots<'a> {
    reader: &'a Reader,
    filter: &'a Filter,
    cursor: Result<Cursor>,
    range: Range<usize>,
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
