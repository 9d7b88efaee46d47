//! Addresses to frames.
//!
//! [`Symbolizer`] keeps, per watched process, its memory map and the files behind it, so that a call stack can be
//! named after the process has ended, after a deployment has replaced its files, and from outside its container. It
//! gives a stack two things: an identity that survives restarts ([`Symbolizer::normalize`], [`site_id`]), cheaply and
//! at once; and names ([`Symbolizer::symbolize`]), when a rule or report shows it. Targets, their files and names are
//! hostile: reads are bounded, and what cannot be named says why. Debug information is
//! read in another process, see [`worker`].
//!
//! Text in a [`Frame`] is as it was found, control characters included; whoever prints it escapes it.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};
use crate::maps::{Backing, FileId, Mapping, Maps, open_mapped};
use crate::process::ProcDir;
use crate::python::PythonCall;
use crate::snapshot::{Process, Site, SiteKey};

pub(crate) mod debug_file;
pub mod debuginfod;
mod demangle;
mod image;
mod interpreted;
mod locate;
mod lookup;
mod module;
pub mod offline;
mod perf_map;
mod site_id;
mod sources;
mod vdso;
pub mod worker;

pub(crate) use vdso::image as vdso_image;

use debuginfod::Debuginfod;
use module::Module;
use perf_map::PerfMap;
pub use site_id::{ModuleName, NormalizedFrame, site_id};
use sources::Surroundings;
use worker::Reader;

/// The instance number that stands for the kernel, see [`crate::snapshot::SiteKey`].
const KERNEL: u32 = 0;
/// After a reading of a memory map that did not explain an address, the next one waits for this many times what it took.
/// Damaged stacks are full of such addresses, and a map can have thousands of lines.
const PATIENCE: u32 = 10;
/// Most mappings of unloaded libraries that are remembered per process.
const MAX_RETIRED: usize = 1024;

/// One frame of a call stack.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Frame {
    /// Demangled function name; `None` when nothing is known, then `reason` says why. Hostile text.
    pub function: Option<String>,
    /// Path of the mapped file as the process sees it, or `[vdso]`, `[heap]`, ...; `None` for anonymous memory.
    pub module: Option<String>,
    /// With a function: bytes from its start (of an inlined one, from the start of the function it is part of).
    /// Without: offset in the module's file (or the address when there is no module).
    pub offset: u64,
    /// Source file, when debug information says so.
    pub file: Option<String>,
    /// Line in `file`, starting at 1.
    pub line: Option<u32>,
    /// True for a call that the compiler inlined into the next frame.
    pub inlined: bool,
    /// Why there is no function name.
    pub reason: Option<String>,
    /// Return address in the process.
    pub address: u64,
    /// Build id of the module, hexadecimal.
    pub build_id: Option<String>,
    /// Return address in the module's own terms, as addr2line(1) takes it; `None` without a file. With the build id it
    /// names the place for whoever has the symbols.
    pub file_address: Option<u64>,
}

/// Bounds of a [`Symbolizer`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes that are copied of one file: symbol tables and debug information, decompressed. Larger debug
    /// information is left out, so that frames have names but no lines.
    pub module_bytes: u64,
    /// Most bytes of such copies at a time; the ones not used for longest are dropped.
    pub total_bytes: u64,
    /// Most files of targets that are held open.
    pub open_files: usize,
    /// Folders with separate debug information, by build id or path.
    pub debug_dirs: Vec<PathBuf>,
    /// The program that is started to read debug information, see [`worker`]; `None` reads it in this process, which
    /// files made to be slow or deeply nested can hang or crash.
    pub worker: Option<PathBuf>,
    /// Servers that are asked for debug information; `None` asks nobody.
    pub debuginfod: Option<debuginfod::Settings>,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            module_bytes: 256 << 20,
            total_bytes: 512 << 20,
            open_files: 400,
            debug_dirs: vec![PathBuf::from("/usr/lib/debug")],
            worker: None,
            debuginfod: None,
        }
    }
}

/// Names call stacks. Stays on the thread that made it.
#[derive(Debug, Default)]
pub struct Symbolizer {
    limits: Limits,
    instances: HashMap<u32, Instance>,
    /// Files that are mapped by some process, shared between them.
    modules: HashMap<FileId, Weak<RefCell<Module>>>,
    /// Python calls of sites that have any.
    calls: HashMap<SiteKey, Vec<PythonCall>>,
    /// The kernel's code in every process; made on first use.
    vdso: Option<std::result::Result<Rc<RefCell<Module>>, String>>,
    reader: Reader,
    debuginfod: Option<RefCell<Debuginfod>>,
    /// Counts questions, to know what was not used for longest.
    clock: u64,
}

/// A file that a process has mapped, or why it cannot be read.
type Known = std::result::Result<Rc<RefCell<Module>>, String>;

/// What is kept of one process.
#[derive(Debug)]
struct Instance {
    dir: ProcDir,
    /// Changes with exec: then `/proc` speaks of another program, and is not asked any more.
    image: (u64, u64),
    /// Device and inode of the executable.
    exe: Option<(u64, u64)>,
    over: bool,
    maps: Maps,
    /// Code that was unloaded, newest first: sites may still point there.
    retired: VecDeque<Mapping>,
    /// By device and inode, as the memory map has them.
    modules: HashMap<((u32, u32), u64), Known>,
    /// Root directory, when it is not ours.
    root: Option<File>,
    perf_map: PerfMap,
    /// Addresses in no code do not make the map be read again before this; see [`PATIENCE`].
    quiet_until: Option<Instant>,
}

impl Instance {
    /// The mapping that an address of code lies in, or last lay in. Data of a file is not it: then the file has gone, and
    /// the map was not read since. (Memory without a file may change between data and code, as compilers at run time do.)
    fn find(&self, address: u64) -> Option<&Mapping> {
        let may_be_code = |m: &&Mapping| m.perms.execute || !matches!(m.backing, Backing::File { .. });
        self.maps.find(address).filter(may_be_code).or_else(|| self.retired.iter().find(|m| m.contains(address)))
    }

    /// Reads the map again; false when nothing changed or the program is over.
    fn reread(&mut self) -> Result<bool> {
        if self.over {
            return Ok(false);
        }
        // Seen in the middle of exec it had no code yet, but was that program already.
        let began = self.image.0 == 0 && self.exe == self.dir.exe_id();
        let stat = match self.dir.stat() {
            Ok(stat) if stat.image == self.image || began => stat,
            _ => {
                self.over = true;
                return Ok(false);
            }
        };
        let maps = match self.maps.reread(&self.dir) {
            Ok(maps) => maps,
            Err(e) if e.kind() == ErrorKind::Target || !stat.is_running() => {
                self.over = true;
                return Ok(false);
            }
            Err(e) => return Err(e),
        };
        let Some(maps) = maps else { return Ok(false) };
        // exec between the two readings.
        if self.dir.stat().map_or(true, |s| s.image != stat.image) {
            self.over = true;
            return Ok(false);
        }
        self.image = stat.image;
        let gone = self.maps.iter().filter(|m| m.perms.execute && maps.find(m.start) != Some(m));
        for mapping in gone {
            self.retired.push_front(mapping.clone());
        }
        self.retired.truncate(MAX_RETIRED);
        self.maps = maps;
        Ok(true)
    }

    /// The module behind a mapping; `None` when there is no file.
    fn module(&self, mapping: &Mapping) -> Option<&Known> {
        match mapping.backing {
            Backing::File { .. } => self.modules.get(&(mapping.dev, mapping.inode)),
            _ => None,
        }
    }
}

impl Symbolizer {
    /// A symbolizer with the default limits.
    pub fn new() -> Self {
        Self::default()
    }

    /// A symbolizer with limits of your own.
    pub fn with_limits(limits: Limits) -> Self {
        let reader = Reader::new(limits.worker.as_deref());
        let debuginfod = limits.debuginfod.as_ref().and_then(Debuginfod::start).map(RefCell::new);
        Symbolizer { limits, reader, debuginfod, ..Self::default() }
    }

    /// Reads the memory map of a process and opens the files of its code. Call it as early as the process is known;
    /// again, it does what [`Symbolizer::refresh`] does.
    ///
    /// # Errors
    /// Kind [`ErrorKind::Target`] when the process has ended, [`ErrorKind::Permission`] when we may not look at it. A
    /// file that cannot be read is no error: its frames say so.
    pub fn observe(&mut self, process: &Arc<Process>) -> Result<()> {
        if self.instances.contains_key(&process.instance) {
            return self.refresh(process.instance).map(drop);
        }
        let dir = ProcDir::open_same(process.pid, process.start_ticks)?;
        let (image, exe) = (dir.stat()?.image, dir.exe_id());
        let maps = Maps::read(&dir)?;
        let root = if dir.shares_our_root() { None } else { dir.root().ok() };
        let mut instance = Instance {
            dir,
            image,
            exe,
            over: false,
            maps,
            retired: VecDeque::new(),
            modules: HashMap::new(),
            root,
            perf_map: PerfMap::default(),
            quiet_until: None,
        };
        self.open_modules(&mut instance);
        self.instances.insert(process.instance, instance);
        Ok(())
    }

    /// Reads the memory map again; true when it has changed. A process that has ended keeps what is known of it.
    ///
    /// # Errors
    /// Kind [`ErrorKind::Target`] for an instance that was not observed; otherwise as [`Symbolizer::observe`].
    pub fn refresh(&mut self, instance: u32) -> Result<bool> {
        let Some(mut found) = self.instances.remove(&instance) else {
            let message = format!("failed to read the memory map of process instance {instance}: it is not observed");
            return Err(Error::new(ErrorKind::Target, message));
        };
        let changed = found.reread();
        if matches!(changed, Ok(true)) {
            self.open_modules(&mut found);
        }
        self.instances.insert(instance, found);
        changed
    }

    /// Forgets a process that has ended, once its sites have been symbolized.
    pub fn purge(&mut self, instance: u32) {
        self.instances.remove(&instance);
        self.modules.retain(|_, m| m.strong_count() > 0);
        self.calls.retain(|key, _| key.instance != instance);
    }

    /// Takes note of the Python calls of a site, innermost first, for [`Symbolizer::symbolize`].
    pub fn set_calls(&mut self, key: SiteKey, calls: Vec<PythonCall>) {
        self.calls.insert(key, calls);
    }

    /// Opens the files of code that are mapped and not known yet.
    fn open_modules(&mut self, instance: &mut Instance) {
        let Instance { maps, modules, dir, .. } = instance;
        for mapping in maps.iter().filter(|m| m.perms.execute && matches!(m.backing, Backing::File { .. })) {
            let key = (mapping.dev, mapping.inode);
            modules.entry(key).or_insert_with(|| self.open_module(dir, mapping).map_err(|e| format!("{e:#}")));
        }
    }

    fn open_module(&mut self, dir: &ProcDir, mapping: &Mapping) -> Result<Rc<RefCell<Module>>> {
        let file = open_mapped(dir, mapping)?;
        let id = FileId::of(&file).map_err(|e| Error::io("failed to examine a mapped file", e))?;
        if let Some(module) = self.modules.get(&id).and_then(Weak::upgrade) {
            return Ok(module);
        }
        self.modules.retain(|_, m| m.strong_count() > 0);
        let kept = self.modules.values().filter_map(Weak::upgrade).filter(|m| m.borrow().is_kept()).count();
        let module = Rc::new(RefCell::new(Module::new(file, kept < self.limits.open_files)?));
        self.modules.insert(id, Rc::downgrade(&module));
        Ok(module)
    }

    /// Names return addresses so that they are the same in the next run of the program, in the same order. Addresses
    /// that are in no code known so far make it read the memory map again, at most once per call, and less often when that
    /// did not help.
    pub fn normalize(&mut self, instance: u32, addresses: &[u64]) -> Vec<NormalizedFrame> {
        // Memory that was data when last seen can hold code now.
        let is_code = |i: &Instance, a: &u64| i.maps.find(a.saturating_sub(1)).is_some_and(|m| m.perms.execute);
        self.explain(instance, |i| !addresses.iter().all(|a| is_code(i, a)));
        let Some(instance) = self.instances.get_mut(&instance) else {
            return addresses.iter().map(|a| page_offset(ModuleName::Unmapped, *a)).collect();
        };
        addresses.iter().map(|a| normalize(instance, *a)).collect()
    }

    /// Reads the memory map again while something is unknown in it, unless that was of no use a moment ago.
    fn explain(&mut self, instance: u32, unknown: impl Fn(&Instance) -> bool) {
        let started = Instant::now();
        let worth = |i: &Instance| !i.over && i.quiet_until.is_none_or(|until| until <= started) && unknown(i);
        if !self.instances.get(&instance).is_some_and(worth) {
            return;
        }
        // An address that stays unknown, for whatever reason, is shown as such.
        let _ = self.refresh(instance);
        if let Some(instance) = self.instances.get_mut(&instance) {
            instance.quiet_until = unknown(instance).then(|| Instant::now() + started.elapsed() * PATIENCE);
        }
    }

    /// Fills `site.frames`, innermost first, unless that has been done. Every address yields at least one frame; more
    /// when calls were inlined there.
    pub fn symbolize(&mut self, site: &Site) {
        if site.frames.get().is_some() {
            return;
        }
        let mut frames = self.frames(site.key.instance, &site.addresses);
        if let Some(calls) = self.calls.remove(&site.key) {
            frames = interpreted::merge(frames, &calls);
        }
        // Set meanwhile by somebody else: then it holds the same.
        let _ = site.frames.set(frames);
    }

    /// The frames of return addresses of an observed process, innermost first; see [`Symbolizer::symbolize`].
    pub fn frames(&mut self, instance: u32, addresses: &[u64]) -> Vec<Frame> {
        let nameless = |reason: &str| {
            let frame =
                |a: &u64| Frame { address: *a, offset: *a, reason: Some(reason.to_owned()), ..Frame::default() };
            addresses.iter().map(frame).collect::<Vec<_>>()
        };
        if instance == KERNEL {
            return nameless("addresses of the kernel are not resolved");
        }
        let is_code = |i: &Instance, a: &u64| i.find(a.saturating_sub(1)).is_some_and(|m| m.perms.execute);
        self.explain(instance, |i| !addresses.iter().all(|a| is_code(i, a)));
        let Some(mut found) = self.instances.remove(&instance) else {
            return nameless("the memory map of the process is not known");
        };
        let frames = addresses.iter().flat_map(|a| self.resolve(&mut found, *a)).collect();
        self.instances.insert(instance, found);
        self.unload();
        frames
    }

    /// The frames of one return address.
    fn resolve(&mut self, instance: &mut Instance, address: u64) -> Vec<Frame> {
        let mut frame = Frame { address, offset: address, ..Frame::default() };
        // The call is before the return address, maybe as the last instruction of the mapping.
        let Some(mapping) = instance.find(address.saturating_sub(1)).cloned() else {
            frame.reason = Some("nothing is known to be mapped at the address".to_owned());
            return vec![frame];
        };
        frame.module = mapping.name();
        if frame.module.is_some() {
            frame.offset = mapping.file_offset(address);
        }
        let (module, path) = match &mapping.backing {
            Backing::File { path, .. } => (instance.module(&mapping).cloned(), Some(path.clone())),
            Backing::Special(name) if **name == *"[vdso]" && mapping.start > u64::from(u32::MAX) => {
                (Some(self.vdso()), None)
            }
            Backing::Special(name) if !name.starts_with("[anon") => {
                frame.reason = Some(format!("the memory is {name}, which has no symbols"));
                return vec![frame];
            }
            Backing::Anonymous | Backing::Special(_) => return vec![generated(instance, frame)],
        };
        let module = match module {
            Some(Ok(module)) => module,
            Some(Err(reason)) => {
                frame.reason = Some(reason);
                return vec![frame];
            }
            None => {
                frame.reason = Some("the memory was not executable".to_owned());
                return vec![frame];
            }
        };
        let mut module = module.borrow_mut();
        self.clock += 1;
        module.used = self.clock;
        frame.build_id = module.build_id().map(str::to_owned);
        frame.file_address = module.address_of(mapping.file_offset(address));
        let around = Surroundings {
            path: path.as_deref(),
            root: instance.root.as_ref(),
            debug_dirs: &self.limits.debug_dirs,
            max_bytes: self.limits.module_bytes,
            debuginfod: self.debuginfod.as_ref(),
        };
        let reopen = || open_mapped(&instance.dir, &mapping).ok();
        match &*module.answer(mapping.file_offset(address), &around, &mut self.reader, reopen) {
            Ok(functions) => (functions.iter())
                .map(|f| Frame {
                    function: Some(f.name.clone()),
                    offset: f.offset,
                    file: f.file.clone(),
                    line: f.line,
                    inlined: f.inlined,
                    ..frame.clone()
                })
                .collect(),
            Err(reason) => {
                frame.reason = Some(reason.clone());
                vec![frame]
            }
        }
    }

    /// Name of every file whose code a process has mapped, and where its functions' names come from. Opens them all: for
    /// `doctor`.
    pub fn sources(&mut self, instance: u32) -> Vec<(String, String)> {
        let Some(known) = self.instances.get_mut(&instance) else { return Vec::new() };
        let mut out = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for mapping in known.maps.iter().filter(|m| m.perms.execute && seen.insert((m.dev, m.inode))) {
            let Backing::File { path, .. } = &mapping.backing else { continue };
            let source = match known.module(mapping) {
                Some(Ok(module)) => {
                    let around = Surroundings {
                        path: Some(path),
                        root: known.root.as_ref(),
                        debug_dirs: &self.limits.debug_dirs,
                        max_bytes: self.limits.module_bytes,
                        debuginfod: self.debuginfod.as_ref(),
                    };
                    module.borrow_mut().source(&around, || open_mapped(&known.dir, mapping).ok())
                }
                Some(Err(reason)) => format!("nowhere: {reason}"),
                None => continue,
            };
            out.push((mapping.name().unwrap_or_default(), source));
        }
        out
    }

    fn vdso(&mut self) -> Known {
        self.vdso.get_or_insert_with(|| vdso::module().map_err(|e| format!("{e:#}"))).clone()
    }

    /// Drops the copies that were not used for longest until the rest is within the limit.
    fn unload(&mut self) {
        let mut loaded: Vec<_> = (self.modules.values().filter_map(Weak::upgrade))
            .map(|m| {
                let (used, bytes) = (m.borrow().used, m.borrow().loaded_bytes());
                (used, bytes, m)
            })
            .filter(|(_, bytes, _)| *bytes > 0)
            .collect();
        let mut total: u64 = loaded.iter().map(|(_, bytes, _)| bytes).sum();
        loaded.sort_unstable_by_key(|(used, _, _)| *used);
        for (_, bytes, module) in loaded {
            if total <= self.limits.total_bytes {
                break;
            }
            module.borrow_mut().unload();
            total -= bytes;
        }
    }
}

/// A frame in memory without a file: generated code, when the process has left a map of it.
fn generated(instance: &mut Instance, mut frame: Frame) -> Frame {
    if !instance.over {
        instance.perf_map.open(&instance.dir);
    }
    match instance.perf_map.find(frame.address.saturating_sub(1)) {
        Some((name, offset)) => {
            frame.function = Some(name.to_string());
            frame.offset = offset + 1;
        }
        None => frame.reason = Some("the memory belongs to no file, and no perf map names the address".to_owned()),
    }
    frame
}

/// Without file or name, only the place in the page is the same in the next run.
fn page_offset(module: ModuleName, address: u64) -> NormalizedFrame {
    NormalizedFrame { module, offset: address & 0xfff }
}

fn normalize(instance: &mut Instance, address: u64) -> NormalizedFrame {
    let Some(mapping) = instance.find(address.saturating_sub(1)) else {
        return page_offset(ModuleName::Unmapped, address);
    };
    let offset = mapping.file_offset(address);
    match &mapping.backing {
        Backing::File { path, .. } => {
            let build_id = instance.module(mapping).and_then(|m| m.as_ref().ok()?.borrow().build_id().map(Arc::from));
            let by_path = || ModuleName::Path(path_text(path));
            NormalizedFrame { module: build_id.map_or_else(by_path, ModuleName::BuildId), offset }
        }
        Backing::Special(name) if !name.starts_with("[anon") => {
            NormalizedFrame { module: ModuleName::Special(name.clone()), offset }
        }
        Backing::Anonymous | Backing::Special(_) => {
            if !instance.over {
                instance.perf_map.open(&instance.dir);
            }
            match instance.perf_map.find(address.saturating_sub(1)) {
                Some((name, offset)) => NormalizedFrame { module: ModuleName::Generated(name), offset: offset + 1 },
                None => page_offset(ModuleName::Anonymous, address),
            }
        }
    }
}

fn path_text(path: &Path) -> Arc<str> {
    path.to_string_lossy().into()
}
