//! Unwinding without frame pointers: which table covers which code of which process.
//!
//! [`Unwinder`] is told of every process's mappings, has the tables of the mapped files made by a thread of its own
//! ([`table`], with [`cache`] on disk), and puts them into the kernel, one for all processes that map the same file.
//! Until all tables of a process are ready the kernel side walks its stacks by frame pointers; probes wait for that, see
//! the collector. What a file has no table for, and why, is kept for `memleak doctor`.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use memleak_probes::unwind::{Code, Row, TableId};
use memleak_probes::{ErrorKind as ProbeErrorKind, Tracker};

use crate::maps::{Backing, FileId, Mapping, Maps, open_mapped};
use crate::process::ProcDir;
use crate::symbolize;
use crate::{Error, Result};

pub mod cache;
pub mod table;

use cache::Cache;
use table::{CodeSegment, Content, Source};

/// Most mappings with code that are looked at in one process; the kernel side has no room for more.
const MAX_MAPPINGS: usize = 4096;

/// A mapped file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    File(FileId),
    /// The kernel's own, the same for all processes.
    Vdso,
}

/// What is known of a file's table.
#[derive(Clone, Debug)]
enum Known {
    Pending,
    Ready(Arc<Ready>),
    Refused(Arc<str>),
}

/// A table that has been made.
#[derive(Debug)]
struct Ready {
    code: Vec<CodeSegment>,
    content: Content,
    rows: usize,
}

/// A file whose table is to be made.
struct Job {
    key: Key,
    file: File,
}

/// A table that the thread has made.
struct Made {
    key: Key,
    result: Result<(Ready, Vec<Row>)>,
}

/// Code of a process.
#[derive(Clone, Debug, PartialEq)]
struct MappedCode {
    start: u64,
    end: u64,
    offset: u64,
    identity: ((u32, u32), u64),
    name: String,
    key: Key,
}

/// What is known of a process.
#[derive(Debug, Default)]
struct ProcessCode {
    mapped: Vec<MappedCode>,
    /// What the kernel side was told last; `None` while it walks by frame pointers.
    told: Option<Vec<Code>>,
    /// When it was told of a piece of code, by its first address.
    told_at: HashMap<u64, Instant>,
    /// Pieces of code that the kernel side had no room for.
    left_out: usize,
}

/// What became of a mapped file's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableState {
    /// It is being made.
    Pending,
    /// It is used, and has so many rows.
    Ready(usize),
    /// There is none: why.
    Refused(Arc<str>),
}

/// See the module.
pub struct Unwinder {
    jobs: Sender<Job>,
    made: Receiver<Made>,
    files: HashMap<Key, Known>,
    tables: HashMap<Content, TableId>,
    processes: HashMap<u32, ProcessCode>,
}

impl Unwinder {
    /// Starts the thread that makes tables. `None` on processors whose compilers keep frame pointers.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(cache: Option<Cache>) -> Result<Option<Unwinder>> {
        if !cfg!(target_arch = "x86_64") {
            return Ok(None);
        }
        let (jobs, todo) = mpsc::channel::<Job>();
        let (done, made) = mpsc::channel();
        thread::Builder::new()
            .name("unwind".into())
            .spawn(move || {
                for Job { key, file } in todo {
                    let result = make(&file, cache.as_ref());
                    if done.send(Made { key, result }).is_err() {
                        break;
                    }
                }
            })
            .map_err(|e| Error::io("failed to start the thread that makes unwind tables", e))?;
        let (files, tables, processes) = (HashMap::new(), HashMap::new(), HashMap::new());
        Ok(Some(Unwinder { jobs, made, files, tables, processes }))
    }

    /// Has the tables of a process made that will be watched soon.
    pub fn prepare(&mut self, maps: &Maps, dir: &ProcDir) {
        for mapping in maps.iter().filter(|m| m.perms.execute).take(MAX_MAPPINGS) {
            self.key_of(mapping, dir);
        }
    }

    /// Takes note of what a process has mapped now; [`Unwinder::apply`] makes it count.
    pub fn observe(&mut self, instance: u32, maps: &Maps, dir: &ProcDir) {
        let before = self.processes.entry(instance).or_default();
        let old = std::mem::take(&mut before.mapped);
        let mut mapped = Vec::new();
        for mapping in maps.iter().filter(|m| m.perms.execute).take(MAX_MAPPINGS) {
            let identity = (mapping.dev, mapping.inode);
            // A mapping that was there before still maps the same file.
            let same = old.iter().find(|m| {
                (m.start, m.end, m.offset, m.identity) == (mapping.start, mapping.end, mapping.offset, identity)
            });
            let key = match same {
                Some(known) => Some(known.key),
                None => self.key_of(mapping, dir),
            };
            let Some(key) = key else { continue };
            let (start, end, offset) = (mapping.start, mapping.end, mapping.offset);
            mapped.push(MappedCode { start, end, offset, identity, name: mapping.name().unwrap_or_default(), key });
        }
        if let Some(process) = self.processes.get_mut(&instance) {
            process.mapped = mapped;
        }
    }

    /// The file behind a mapping, whose table is asked for if it is new; `None` for code without a file.
    fn key_of(&mut self, mapping: &Mapping, dir: &ProcDir) -> Option<Key> {
        let opened = match &mapping.backing {
            Backing::File { .. } => open_mapped(dir, mapping).and_then(|file| {
                let id = FileId::of(&file).map_err(|e| Error::io("failed to look at a mapped file", e))?;
                Ok((Key::File(id), file))
            }),
            Backing::Special(name) if **name == *"[vdso]" => match self.files.get(&Key::Vdso) {
                Some(_) => return Some(Key::Vdso),
                None => symbolize::vdso_image().map(|file| (Key::Vdso, file)),
            },
            _ => return None,
        };
        match opened {
            Ok((key, file)) => {
                let jobs = &self.jobs;
                self.files.entry(key).or_insert_with(|| match jobs.send(Job { key, file }) {
                    Ok(()) => Known::Pending,
                    Err(_) => Known::Refused("the thread that makes unwind tables has ended".into()),
                });
                Some(key)
            }
            Err(e) => {
                tracing::debug!(file = mapping.name(), "no unwind table: {e:#}");
                None
            }
        }
    }

    /// Puts tables that are ready into the kernel, and tells it of processes whose tables are all there.
    pub fn apply(&mut self, tracker: &mut Tracker) {
        while let Ok(made) = self.made.try_recv() {
            self.take(tracker, made);
        }
        let instances: Vec<u32> = self.processes.keys().copied().collect();
        for instance in instances {
            self.tell(tracker, instance);
        }
    }

    /// As [`Unwinder::apply`], but waits for the tables of one process, at most `limit`.
    pub fn wait(&mut self, tracker: &mut Tracker, instance: u32, limit: Duration) {
        let start = Instant::now();
        while self.is_pending(instance) {
            let Some(left) = limit.checked_sub(start.elapsed()) else { break };
            match self.made.recv_timeout(left) {
                Ok(made) => self.take(tracker, made),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        self.apply(tracker);
    }

    /// Whether a stack taken since `since` may end in the code at an address only because the kernel side did not know its
    /// rows yet.
    pub fn was_late(&self, instance: u32, address: u64, since: Instant) -> bool {
        let Some(process) = self.processes.get(&instance) else { return false };
        // What nobody has told us of has just been mapped.
        let Some(mapped) = process.mapped.iter().find(|m| (m.start..m.end).contains(&address)) else { return true };
        match self.files.get(&mapped.key) {
            Some(Known::Pending) => true,
            Some(Known::Ready(_)) => {
                let code = process.told.iter().flatten().find(|c| (c.start..c.end).contains(&address));
                code.is_some_and(|code| process.told_at.get(&code.start).is_none_or(|at| *at >= since))
            }
            Some(Known::Refused(_)) | None => false,
        }
    }

    /// True while tables of the process are being made.
    pub fn is_pending(&self, instance: u32) -> bool {
        let Some(process) = self.processes.get(&instance) else { return false };
        process.mapped.iter().any(|m| matches!(self.files.get(&m.key), Some(Known::Pending)))
    }

    fn take(&mut self, tracker: &mut Tracker, made: Made) {
        let known = match made.result.and_then(|(ready, rows)| {
            self.add(tracker, ready.content, &rows)?;
            Ok(ready)
        }) {
            Ok(ready) => Known::Ready(Arc::new(ready)),
            Err(e) => Known::Refused(format!("{e:#}").into()),
        };
        self.files.insert(made.key, known);
    }

    /// Puts a table into the kernel unless it is there; those that no process uses make room.
    fn add(&mut self, tracker: &mut Tracker, content: Content, rows: &[Row]) -> Result<()> {
        if self.tables.contains_key(&content) {
            return Ok(());
        }
        let added = match tracker.add_unwind_table(rows) {
            Err(e) if e.kind() == ProbeErrorKind::Limit => {
                self.remove_unused(tracker);
                tracker.add_unwind_table(rows)
            }
            added => added,
        };
        self.tables.insert(content, added?);
        Ok(())
    }

    fn remove_unused(&mut self, tracker: &mut Tracker) {
        let mapped = self.processes.values().flat_map(|p| &p.mapped);
        let used: HashSet<Key> = mapped.map(|m| m.key).collect();
        self.files.retain(|key, known| used.contains(key) || matches!(known, Known::Pending));
        let contents = self.files.values().filter_map(|known| match known {
            Known::Ready(ready) => Some(ready.content),
            _ => None,
        });
        let contents: HashSet<Content> = contents.collect();
        self.tables.retain(|content, table| {
            let keep = contents.contains(content);
            if !keep {
                tracker.remove_unwind_table(*table);
            }
            keep
        });
    }

    /// Tells the kernel side of a process's code, when that has changed and everything is known.
    fn tell(&mut self, tracker: &mut Tracker, instance: u32) {
        let pending = self.is_pending(instance);
        let Some(process) = self.processes.get(&instance) else { return };
        // A process that is unwound by tables already is better off with those that there are.
        if pending && process.told.is_none() {
            return;
        }
        let mut code: Vec<Code> = Vec::new();
        for mapped in &process.mapped {
            if let Some(Known::Ready(ready)) = self.files.get(&mapped.key)
                && let Some(table) = self.tables.get(&ready.content)
            {
                code.extend(ready.code.iter().filter_map(|segment| overlap(mapped, segment, *table)));
            }
        }
        code.sort_unstable_by_key(|c| c.start);
        if process.told.as_ref() == Some(&code) || (process.told.is_none() && code.is_empty()) {
            return;
        }
        match tracker.set_unwind_code(instance, &code) {
            Ok(left_out) => {
                if let Some(process) = self.processes.get_mut(&instance) {
                    let before = process.told.take().unwrap_or_default();
                    process.told_at.retain(|start, _| code.iter().any(|c| c.start == *start));
                    for piece in code.iter().filter(|piece| !before.contains(piece)) {
                        process.told_at.insert(piece.start, Instant::now());
                    }
                    process.told = Some(code);
                    process.left_out = left_out;
                }
            }
            Err(e) => tracing::debug!(instance, "stacks are walked by frame pointers: {e}"),
        }
    }

    /// Forgets a process. Its tables stay as long as there is room.
    pub fn forget(&mut self, instance: u32) {
        self.processes.remove(&instance);
        // Files of programs that have long been replaced must not add up.
        const MAX_FILES: usize = 16_384;
        if self.files.len() > MAX_FILES {
            self.files.retain(|_, known| matches!(known, Known::Ready(_) | Known::Pending));
        }
    }

    /// Name and table of every mapped file of a process, without repeats; then how many pieces of code had no room.
    pub fn tables_of(&self, instance: u32) -> (Vec<(String, TableState)>, usize) {
        let Some(process) = self.processes.get(&instance) else { return (Vec::new(), 0) };
        let mut seen = HashSet::new();
        let mut out = Vec::new();
        for mapped in process.mapped.iter().filter(|m| seen.insert(m.key)) {
            let state = match self.files.get(&mapped.key) {
                Some(Known::Ready(ready)) => TableState::Ready(ready.rows),
                Some(Known::Refused(why)) => TableState::Refused(Arc::clone(why)),
                Some(Known::Pending) | None => TableState::Pending,
            };
            out.push((mapped.name.clone(), state));
        }
        (out, process.left_out)
    }
}

/// The part of a mapping that a segment of its file covers.
fn overlap(mapped: &MappedCode, segment: &CodeSegment, table: TableId) -> Option<Code> {
    let mapped_end = mapped.offset.saturating_add(mapped.end - mapped.start);
    let from = mapped.offset.max(segment.offset);
    let to = mapped_end.min(segment.offset.saturating_add(segment.len));
    let pc = u32::try_from(segment.pc.checked_add(from.checked_sub(segment.offset)?)?).ok()?;
    (from < to).then(|| Code {
        start: mapped.start + (from - mapped.offset),
        end: mapped.start + (to - mapped.offset),
        pc,
        table,
    })
}

/// Makes a table, or finds it on disk.
fn make(file: &File, cache: Option<&Cache>) -> Result<(Ready, Vec<Row>)> {
    let source = Source::read(file)?;
    let content = source.content();
    let rows = match cache.and_then(|cache| cache.load(&content)) {
        Some(rows) => rows,
        None => {
            let rows = source.rows()?;
            if let Some(Err(e)) = cache.map(|cache| cache.store(&content, &rows)) {
                tracing::debug!("unwind table not kept on disk: {e}");
            }
            rows
        }
    };
    Ok((Ready { code: source.code, content, rows: rows.len() }, rows))
}
