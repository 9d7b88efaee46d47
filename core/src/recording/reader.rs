//! Reads a recording, also one that is being written or whose writer was killed.
//!
//! Everything is as of the moment of [`Reader::open`]: a writer that goes on, and thins, changes nothing. Names of call
//! stacks are filled in when they are asked for ([`Reader::name`]), which most of what reads a recording does for a few
//! sites only.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rusqlite::{OptionalExtension, Row};

use super::codec::{In, damaged};
use super::cursor::{Cursor, Replay, Snapshots};
use super::open::{self, Opened};
use super::{AlertRecord, Event, EventKind, FindingSpan, Host, Location, Session, SnapshotInfo, digest, schema};
use crate::alert::Status;
use crate::finding::Severity;
use crate::snapshot::{FirstThread, Process, ProcessSample, Site, SiteKey, Totals};
use crate::symbolize::Frame;
use crate::{Error, ErrorKind, Result};

/// How many numbers of sites there may be per site: they are given without gaps.
const MAX_SPARSE: u64 = 16;
/// What is wrong with a recording that is not whole.
const LACKS_WAL: &str = "its run was broken off, and the -wal file that belongs beside it is missing: bring it back";

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
pub(super) struct Known {
    pub(super) site: Arc<Site>,
    stack: i64,
}

/// An open recording.
pub struct Reader {
    pub(super) file: Opened,
    session: Session,
    pub(super) processes: BTreeMap<u32, Arc<Process>>,
    /// By number in the file; most places are taken.
    pub(super) sites: Vec<Option<Known>>,
    by_key: HashMap<SiteKey, u32>,
    pub(super) snapshots: Vec<SnapshotInfo>,
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
        let file = open::open(path)?;
        let Opened { db, shown, lacks_wal, .. } = &file;
        let format = schema::check(db, shown)?;
        let session = Session { format, lacks_wal: *lacks_wal, ..Session::default() };
        let mut reader = Reader {
            file,
            session,
            processes: BTreeMap::new(),
            sites: Vec::new(),
            by_key: HashMap::new(),
            snapshots: Vec::new(),
            modules: HashMap::new(),
            frames: OnceCell::new(),
        };
        reader.read().map_err(|e| match reader.session.lacks_wal {
            // Pages that the writer had begun to move from there.
            true => Error::with_source(ErrorKind::Io, LACKS_WAL, e),
            false => e,
        })?;
        Ok(reader)
    }

    /// What it says of the run as a whole.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The file, fit for messages.
    pub fn shown(&self) -> &str {
        &self.file.shown
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
        Snapshots::new(self, range, filter)
    }

    /// Takes all snapshots into a history, one after the other.
    ///
    /// # Errors
    /// The recording is damaged.
    pub fn replay(&self) -> Result<Replay<'_>> {
        Replay::new(self)
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

    pub(super) fn failed(&self, error: rusqlite::Error) -> Error {
        schema::failed(&self.file.shown, error)
    }

    pub(super) fn known(&self, id: u32) -> Option<&Known> {
        self.sites.get(id as usize)?.as_ref()
    }

    fn rows<T>(&self, sql: &str, mut row: impl FnMut(&Row<'_>) -> rusqlite::Result<T>) -> Result<Vec<T>> {
        let mut read = || {
            let mut statement = self.file.db.prepare_cached(sql)?;
            let rows = statement.query_map([], |r| row(r))?;
            rows.collect::<rusqlite::Result<Vec<T>>>()
        };
        read().map_err(|e| self.failed(e))
    }

    fn read(&mut self) -> Result<()> {
        self.read_session()?;
        self.read_processes()?;
        self.read_sites()?;
        self.read_snapshots()
    }

    fn read_session(&mut self) -> Result<()> {
        let rows = self.rows("SELECT key, value FROM session", |r| {
            Ok((r.get::<_, String>(0)?, r.get::<_, rusqlite::types::Value>(1)?))
        })?;
        let mut digest = None;
        for (key, value) in rows {
            match (key.as_str(), value) {
                ("run", rusqlite::types::Value::Text(text)) => {
                    self.session.run = serde_json::from_str(&text)
                        .map_err(|_| damaged("what it says of the run cannot be understood"))?;
                }
                ("settings", rusqlite::types::Value::Text(text)) => self.session.settings = text,
                ("complete", _) => self.session.complete = true,
                (digest::KEY, rusqlite::types::Value::Text(text)) => digest = Some(text),
                ("thinned", rusqlite::types::Value::Integer(n)) => self.session.thinned = n.cast_unsigned(),
                _ => {}
            }
        }
        let hosts = self.rows("SELECT name, kernel, machine, boot_id FROM hosts ORDER BY id LIMIT 1", |r| {
            Ok(Host { name: r.get(0)?, kernel: r.get(1)?, machine: r.get(2)?, boot_id: r.get(3)? })
        })?;
        self.session.host = hosts.into_iter().next().unwrap_or_default();
        if let Some(digest) = digest
            && digest::of(&self.file.db).map_err(|e| self.failed(e))? != digest
        {
            return Err(damaged("it is not what it was when its run ended"));
        }
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
        let thread = if self.session.format < 2 { "NULL, NULL" } else { "first_tid, first_thread" };
        let sql = format!(
            "SELECT id, site_id, instance, probe_set_number, stack_hash, probe_set, function, stack, addresses, \
             truncated, {thread} FROM sites"
        );
        let processes = &self.processes;
        let mut missing = false;
        let mut sites: Vec<Option<Known>> = Vec::new();
        sites.resize_with(max.unsigned_abs() as usize + 1, || None);
        let mut by_key = HashMap::with_capacity(sites.len());
        let rows = self.rows(&sql, |r| {
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
                first_thread: match (r.get(10)?, r.get(11)?) {
                    (Some(tid), Some(name)) => Some(FirstThread { tid, name }),
                    _ => None,
                },
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
            let mut statement = self.file.db.prepare_cached("SELECT locations, frames FROM stacks WHERE id = ?")?;
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
