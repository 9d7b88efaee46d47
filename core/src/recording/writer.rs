//! Writes a recording: one transaction per snapshot.
//!
//! What [`Writer::push`] has stored survives the end of the process at any moment. When it fails (a full disk), nothing
//! of that snapshot is in the file and the writer can go on: the next snapshot that can be stored is a keyframe, and an
//! event says what is missing.

mod places;
mod said;

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::Path;
use std::sync::Arc;

use rusqlite::params;

use super::codec::Compressor;
use super::create::{Created, create};
use super::details::{self, Row};
use super::reach::Stored;
use super::{Event, EventKind, Host, Location, digest, kernel, schema, thin, totals};
use crate::alert::Alert;
use crate::finding::Finding;
use crate::output::report::RunInfo;
use crate::snapshot::{Site, SiteKey, SiteReach, SiteSample, Snapshot};
use crate::symbolize::Frame;
use crate::units::format_duration_s;
use crate::{Error, ErrorKind, Result};

/// Entries of the caches of frames, modules and stacks; beyond that they begin anew, and some are stored twice.
const MAX_CACHED: usize = 100_000;
/// Events that wait while nothing can be stored; the oldest go first.
const MAX_WAITING: usize = 10_000;
/// Alerts whose text and figures are brought up to date per snapshot, beyond those that have just been told.
const ALERTS_PER_PUSH: usize = 256;

/// Bounds of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of the file; old snapshots are thinned to keep it.
    pub max_size: u64,
    /// Snapshots from one keyframe to the next: more make the file smaller, and finding a time in it slower.
    pub keyframe_every: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { max_size: 512 << 20, keyframe_every: 60 }
    }
}

/// One snapshot with what was said of it.
#[derive(Clone, Copy)]
pub struct Step<'a> {
    /// The snapshot; its number is higher than that of the one before.
    pub snapshot: &'a Snapshot,
    /// What the rules found in it.
    pub findings: &'a [Finding],
    /// Alerts that fire.
    pub active: &'a [&'a Alert],
    /// Alerts that have just been raised, got worse or were resolved.
    pub changed: &'a [&'a Alert],
    /// What the report would say of the run now; `None` leaves what was said before.
    pub run: Option<&'a RunInfo>,
}

impl<'a> Step<'a> {
    /// A snapshot of which nothing was said.
    pub fn new(snapshot: &'a Snapshot) -> Self {
        Step { snapshot, findings: &[], active: &[], changed: &[], run: None }
    }
}

/// A site of the newest snapshot.
struct Known {
    id: u32,
    stack: i64,
    named: bool,
    /// Number of the last snapshot with it.
    seen: u64,
}

/// A finding that stands.
struct Standing {
    row: i64,
    last: Finding,
    last_snapshot: u64,
    last_s: f64,
}

/// Rows that exist already. Of no use after a transaction has failed.
#[derive(Default)]
struct Caches {
    modules: HashMap<(Option<String>, Option<String>), i64>,
    frames: HashMap<Frame, i64>,
    /// By their locations.
    stacks: HashMap<Vec<u8>, i64>,
    named_stacks: HashSet<i64>,
    /// What was written of an alert last.
    alerts: HashMap<(String, u64), u64>,
}

/// Snapshots that could not be stored.
struct Gap {
    from_s: f64,
    from_wall_s: f64,
    until_s: f64,
    snapshots: u64,
    why: String,
}

impl Gap {
    fn event(&self) -> Event {
        let lasted = format_duration_s(self.until_s - self.from_s);
        let text = match self.snapshots {
            1 => format!("1 snapshot is missing: {}", self.why),
            n => format!("{n} snapshots over {lasted} are missing: {}", self.why),
        };
        Event { time_s: self.from_s, wall_s: self.from_wall_s, kind: EventKind::Gap, instance: None, text }
    }
}

/// Writes one recording. One per file; see the module for what happens when writing fails.
pub struct Writer {
    file: Created,
    limits: Limits,
    compressor: Compressor,
    totals: totals::Encoder,
    details: details::Encoder,
    sites: HashMap<SiteKey, Known>,
    /// What was said of the sites of the newest snapshot, as it was given and as it is stored.
    reaches: HashMap<SiteKey, (Arc<SiteReach>, Arc<Stored>)>,
    next_site: u32,
    processes: HashSet<u32>,
    /// Losses that have been told, by instance.
    losses: HashMap<u32, u64>,
    standing: HashMap<(String, SiteKey), Standing>,
    /// The same once the transaction is over.
    next_standing: HashMap<(String, SiteKey), Standing>,
    caches: Caches,
    events: VecDeque<Event>,
    /// Snapshots until the next keyframe.
    until_keyframe: u32,
    last_number: u64,
    gap: Option<Gap>,
    next_alert: usize,
}

impl Writer {
    /// Makes a recording; `settings` is what [`super::Session::settings`] gives back.
    ///
    /// # Errors
    /// Something has that name already (a file, a link, a recording that is being written), or nothing can be written
    /// there.
    pub fn create(path: &Path, limits: Limits, host: &Host, run: &RunInfo, settings: &str) -> Result<Writer> {
        let writer = Writer {
            file: create(path)?,
            limits,
            compressor: Compressor::new()?,
            totals: totals::Encoder::default(),
            details: details::Encoder::default(),
            sites: HashMap::new(),
            reaches: HashMap::new(),
            next_site: 1,
            processes: HashSet::new(),
            losses: HashMap::new(),
            standing: HashMap::new(),
            next_standing: HashMap::new(),
            caches: Caches::default(),
            events: VecDeque::new(),
            until_keyframe: 0,
            last_number: 0,
            gap: None,
            next_alert: 0,
        };
        let begin = || -> Result<()> {
            writer.session("writer", env!("CARGO_PKG_VERSION"))?;
            writer.session("settings", settings)?;
            writer.session("run", &json(run)?)?;
            let db = &writer.file.db;
            db.execute(
                "INSERT INTO hosts (id, name, kernel, machine, boot_id) VALUES (1, ?, ?, ?, ?)",
                params![host.name, host.kernel, host.machine, host.boot_id],
            )
            .map_err(|e| writer.failed(e))?;
            // The file alone is a recording from now on, even without what is beside it.
            db.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(())).map_err(|e| writer.failed(e))
        };
        begin()?;
        Ok(writer)
    }

    /// Keeps an event, to be stored with the next snapshot.
    pub fn event(&mut self, event: Event) {
        if self.events.len() >= MAX_WAITING {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// Stores a snapshot and everything that is new with it. `locate` says where the return addresses of a site lie, in
    /// their order, and is asked once per site; an empty answer means that it is not known.
    ///
    /// # Errors
    /// Nothing of the snapshot could be stored; the next one may be pushed all the same.
    pub fn push(&mut self, step: &Step<'_>, locate: &mut dyn FnMut(&Site) -> Vec<Location>) -> Result<()> {
        let snapshot = step.snapshot;
        if snapshot.number <= self.last_number {
            let what = format!("failed to record snapshot {}: it is not newer than the last one", snapshot.number);
            return Err(Error::new(ErrorKind::Io, what));
        }
        self.events.extend(self.gap.as_ref().map(Gap::event));
        let first_new = self.next_site;
        let done = self.keep_size().and_then(|()| self.transaction(|w| w.store(step, locate)));
        match done {
            Ok(()) => {
                self.events.clear();
                self.gap = None;
                self.standing = std::mem::take(&mut self.next_standing);
                self.last_number = snapshot.number;
                self.until_keyframe = self.until_keyframe.saturating_sub(1);
                self.sites.retain(|_, known| known.seen == snapshot.number);
                self.limit_caches();
                Ok(())
            }
            Err(e) => {
                self.events.retain(|e| e.kind != EventKind::Gap);
                // What the caches say may have been undone.
                self.caches = Caches::default();
                self.sites.retain(|_, known| known.id < first_new);
                self.next_site = first_new;
                self.reaches.clear();
                self.processes.clear();
                self.next_standing.clear();
                self.until_keyframe = 0;
                let gap = self.gap.get_or_insert_with(|| Gap {
                    from_s: snapshot.time_s,
                    from_wall_s: snapshot.wall_s,
                    until_s: snapshot.time_s,
                    snapshots: 0,
                    why: format!("{e:#}"),
                });
                gap.snapshots += 1;
                gap.until_s = snapshot.time_s;
                Err(e)
            }
        }
    }

    /// Names of stacks that have been found since; `sites` are those of the newest snapshot, or some of them.
    ///
    /// # Errors
    /// They could not be stored.
    pub fn name<'s>(&mut self, sites: impl Iterator<Item = &'s Arc<Site>>) -> Result<()> {
        let unnamed: Vec<&Arc<Site>> = sites.collect();
        let done = self.transaction(|w| unnamed.into_iter().try_for_each(|site| w.store_names(site)));
        if done.is_err() {
            self.caches = Caches::default();
        }
        done
    }

    /// True while a site of the newest snapshot has no names in the file.
    pub fn lacks_name(&self, site: &Site) -> bool {
        self.sites.get(&site.key).is_some_and(|k| !k.named && !self.caches.named_stacks.contains(&k.stack))
    }

    /// Ends the recording in order, as one file with nothing beside it. `active` are all alerts that fire.
    ///
    /// # Errors
    /// Something could not be stored; the recording can be read, but counts as broken off.
    pub fn finish(mut self, run: Option<&RunInfo>, active: &[&Alert]) -> Result<()> {
        self.events.extend(self.gap.as_ref().map(Gap::event));
        self.transaction(|w| {
            w.store_events()?;
            let standing = std::mem::take(&mut w.standing);
            standing.values().try_for_each(|s| w.close_finding(s, true))?;
            active.iter().try_for_each(|a| w.store_alert(a))?;
            if let Some(run) = run {
                w.session("run", &json(run)?)?;
            }
            w.session("complete", "1")?;
            let digest = digest::of(&w.file.db).map_err(|e| w.failed(e))?;
            w.session(digest::KEY, &digest)
        })?;
        let db = &self.file.db;
        db.pragma_update(None, "journal_mode", "DELETE").map_err(|e| self.failed(e))
    }

    /// Bytes in use in the file.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn size(&self) -> Result<u64> {
        let number = |pragma: &str| {
            self.file.db.pragma_query_value(None, pragma, |r| r.get::<_, i64>(0)).map_err(|e| self.failed(e))
        };
        let pages = number("page_count")? - number("freelist_count")?;
        Ok(pages.unsigned_abs() * number("page_size")?.unsigned_abs())
    }

    fn failed(&self, error: rusqlite::Error) -> Error {
        schema::failed(&self.file.shown, error)
    }

    fn run_sql(&self, sql: &str, values: impl rusqlite::Params) -> Result<i64> {
        let run = || {
            self.file.db.prepare_cached(sql)?.execute(values)?;
            Ok(self.file.db.last_insert_rowid())
        };
        run().map_err(|e| self.failed(e))
    }

    fn session(&self, key: &str, value: &str) -> Result<()> {
        self.run_sql("INSERT OR REPLACE INTO session (key, value) VALUES (?, ?)", params![key, value]).map(drop)
    }

    fn transaction(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.file.db.execute_batch("BEGIN IMMEDIATE").map_err(|e| self.failed(e))?;
        let done = work(self).and_then(|()| self.file.db.execute_batch("COMMIT").map_err(|e| self.failed(e)));
        if done.is_err() && !self.file.db.is_autocommit() {
            // SQLite undoes everything by itself at the next opening, should this fail too.
            let _ = self.file.db.execute_batch("ROLLBACK");
        }
        done
    }

    /// Stores one snapshot, within a transaction.
    fn store(&mut self, step: &Step<'_>, locate: &mut dyn FnMut(&Site) -> Vec<Location>) -> Result<()> {
        let snapshot = step.snapshot;
        let keyframe = self.until_keyframe == 0;
        if keyframe {
            self.totals = totals::Encoder::default();
            self.details = details::Encoder::default();
            self.until_keyframe = self.limits.keyframe_every.max(1);
        }
        for p in &snapshot.processes {
            if self.processes.insert(p.process.instance) {
                self.store_process(&p.process)?;
            }
        }
        let mut samples: Vec<(u32, &SiteSample)> = Vec::with_capacity(snapshot.sites.len());
        for sample in &snapshot.sites {
            samples.push((self.site(&sample.site, snapshot.number, locate)?, sample));
        }
        self.store_reaches(snapshot, locate)?;
        samples.sort_unstable_by_key(|(id, _)| *id);
        samples.dedup_by_key(|(id, _)| *id);
        let pinned = snapshot.processes.iter().any(|p| !p.alive);
        let number = snapshot.number.cast_signed();
        let sum = snapshot.totals();
        self.run_sql(
            "INSERT INTO snapshots (number, time_s, wall_s, collect_cpu_s, keyframe, pinned, sites, allocated_bytes, \
             allocated_count, freed_bytes, freed_count) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            params![
                number,
                snapshot.time_s,
                snapshot.wall_s,
                snapshot.collect_cpu_s,
                keyframe,
                pinned,
                samples.len() as i64,
                sum.allocated_bytes.cast_signed(),
                sum.allocated_count.cast_signed(),
                sum.freed_bytes.cast_signed(),
                sum.freed_count.cast_signed()
            ],
        )?;
        let plain: Vec<_> = samples.iter().map(|(id, s)| (*id, s.totals)).collect();
        let blob = self.totals.encode(
            &plain,
            totals::process_rows(&snapshot.processes),
            totals::of_kernel(&snapshot.processes)?,
        );
        let blob = self.compressor.compress(&blob)?;
        self.run_sql("INSERT INTO totals (snapshot, data) VALUES (?, ?)", params![number, blob])?;
        let rows: Vec<Row<'_>> = samples.iter().map(|(id, sample)| self.row(*id, sample)).collect::<Result<_>>()?;
        let blob = self.details.encode(&rows, snapshot.time_s);
        let blob = self.compressor.compress(&blob)?;
        self.run_sql("INSERT INTO details (snapshot, data) VALUES (?, ?)", params![number, blob])?;
        for sample in &snapshot.sites {
            self.store_names(&sample.site)?;
        }
        self.note_losses(snapshot);
        self.store_findings(step)?;
        self.store_alerts(step)?;
        self.store_events()?;
        match step.run {
            Some(run) => self.session("run", &json(run)?),
            None => Ok(()),
        }
    }

    /// A sample of a site. Every field is named, so that one that is added cannot be forgotten here.
    fn row<'s>(&self, id: u32, sample: &'s SiteSample) -> Result<Row<'s>> {
        let SiteSample { site, totals, stderr, last_allocation_s, cohorts, lifetimes, reachability, kernel } = sample;
        let (last_allocation_s, stderr) = (*last_allocation_s, *stderr);
        let reach = reachability.as_ref().and_then(|_| self.reaches.get(&site.key)).map(|(_, s)| Arc::clone(s));
        let kernel = kernel.as_ref().map(|k| kernel::Stored::new(k).map(Arc::new)).transpose()?;
        Ok(Row { id, totals: *totals, last_allocation_s, cohorts, lifetimes, stderr, reach, kernel })
    }

    /// Brings what scans said of the sites of a snapshot into the form in which it is stored.
    fn store_reaches(&mut self, snapshot: &Snapshot, locate: &mut dyn FnMut(&Site) -> Vec<Location>) -> Result<()> {
        let mut known = std::mem::take(&mut self.reaches);
        for sample in &snapshot.sites {
            let Some(reach) = &sample.reachability else { continue };
            let entry = match known.remove(&sample.site.key).filter(|(given, _)| Arc::ptr_eq(given, reach)) {
                Some(entry) => entry,
                None => {
                    let stored = Stored::new(reach, &mut |site| {
                        let id = self.site(site, snapshot.number, locate)?;
                        self.store_names(site)?;
                        Ok(id)
                    })?;
                    (Arc::clone(reach), Arc::new(stored))
                }
            };
            self.reaches.insert(sample.site.key, entry);
        }
        Ok(())
    }

    /// An event for losses that have begun or doubled.
    fn note_losses(&mut self, snapshot: &Snapshot) {
        for p in &snapshot.processes {
            let total = p.losses.total();
            let told = self.losses.entry(p.process.instance).or_default();
            if total == 0 || total < told.saturating_mul(2) {
                continue;
            }
            *told = total;
            let kinds: Vec<String> =
                p.losses.entries().iter().filter(|(_, n)| *n > 0).map(|(kind, n)| format!("{n} {kind}")).collect();
            self.event(Event {
                time_s: snapshot.time_s,
                wall_s: snapshot.wall_s,
                kind: EventKind::Loss,
                instance: Some(p.process.instance),
                text: kinds.join(", "),
            });
        }
        self.losses.retain(|instance, _| snapshot.processes.iter().any(|p| p.process.instance == *instance));
    }

    fn store_events(&self) -> Result<()> {
        self.events.iter().try_for_each(|e| {
            self.run_sql(
                "INSERT INTO events (time_s, wall_s, kind, instance, text) VALUES (?, ?, ?, ?, ?)",
                params![e.time_s, e.wall_s, e.kind.as_str(), e.instance, e.text],
            )
            .map(drop)
        })
    }

    fn limit_caches(&mut self) {
        let c = &mut self.caches;
        if c.modules.len() + c.frames.len() + c.stacks.len() + c.named_stacks.len() + c.alerts.len() > MAX_CACHED {
            *c = Caches::default();
        }
    }

    /// Thins old snapshots when the file is nearly as large as it may be.
    fn keep_size(&mut self) -> Result<()> {
        // Some room, so that the file itself never gets that large.
        let size = self.size()?;
        if size <= self.limits.max_size / 16 * 15 {
            return Ok(());
        }
        let next_site = self.next_site;
        let mut taken = 0;
        self.transaction(|w| {
            taken = thin::halve_one(&w.file.db, &w.file.shown, &mut w.compressor, next_site)?;
            Ok(())
        })?;
        if taken == 0 && size > self.limits.max_size {
            let shown = &self.file.shown;
            let what = format!("{shown} is full and nothing is left to thin: raise recording.max_size");
            return Err(Error::new(ErrorKind::Io, what));
        }
        Ok(())
    }
}

fn json(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::with_source(ErrorKind::Io, "failed to record the run's facts", e))
}
