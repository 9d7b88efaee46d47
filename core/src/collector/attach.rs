//! Which probe set goes to which file of a process.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memleak_probes::{Attached, Library, SetKind, elf, usdt};

use super::{Collector, Life, Purpose, Watched};
use crate::maps::{Backing, FileId, Mapping, Maps, open_mapped};
use crate::plugin::{Facts, Plugin};
use crate::process::ProcDir;
use crate::python::{Interpreter, Unread};
use crate::symbolize::{self, debug_file};
use crate::{Error, Result};

/// What became of one probe set in one process.
#[derive(Clone, Debug, PartialEq)]
pub struct PluginStatus {
    /// Name of the probe set.
    pub probe_set: Arc<str>,
    /// What became of it.
    pub state: PluginState,
}

/// What became of a probe set.
#[derive(Clone, Debug, PartialEq)]
pub enum PluginState {
    /// Attached to `file`.
    Attached {
        /// Path of the file as the process sees it. Hostile text.
        file: String,
        /// Its functions.
        functions: Vec<Attached>,
    },
    /// The process maps nothing that provides it.
    NotMapped,
    /// It should be there and could not be attached.
    Failed {
        /// Path of the file as the process sees it. Hostile text.
        file: String,
        /// Why.
        reason: String,
    },
}

/// What was found out about files, by identity: many processes map the same ones.
#[derive(Debug, Default)]
pub(super) struct Libraries {
    facts: HashMap<FileId, Arc<Known>>,
}

/// What was found out about a file.
#[derive(Debug)]
struct Known {
    names: Facts,
    /// Its debug information, when only that names the functions of a probe set.
    debug: Option<File>,
}

/// How long probes wait for the unwind tables of a process, seconds. Chromium's take two.
pub(super) const WAIT_FOR_TABLES_S: f64 = 5.0;

/// How often a Python interpreter is looked for whose frames cannot be read: each time reads its symbols.
const PYTHON_TRIES: u32 = 4;

/// Most files that are remembered; beyond it the caches start anew.
const MAX_FILES: usize = 16_384;

impl Collector {
    /// Attaches every probe set to the files of a process that provide it and have not been attached to yet.
    pub(super) fn attach_to(&mut self, instance: u32) {
        let Some(watched) = self.watched.get(&instance) else { return };
        let process = Arc::clone(&watched.process);
        let maps = ProcDir::open_same(process.pid, process.start_ticks).and_then(|dir| Ok((Maps::read(&dir)?, dir)));
        let (maps, dir) = match maps {
            Ok(found) => found,
            Err(e) => return tracing::debug!(pid = process.pid, "nothing attached: {e:#}"),
        };
        let code: Vec<(u64, u64)> = maps.iter().filter(|m| m.perms.execute).map(|m| (m.start, m.end)).collect();
        if let Err(e) = self.tracker.get_mut().and_then(|t| Ok(t.set_code(instance, &code)?)) {
            tracing::debug!(pid = process.pid, "call stacks are not cut where they leave the code: {e}");
        }
        if let (Some(unwinder), Some(tracker)) = (&mut self.unwinder, self.tracker.loaded_mut()) {
            unwinder.observe(instance, &maps, &dir);
            unwinder.apply(tracker);
        }
        self.look_for_python(instance, &dir, &maps);
        if self.waits_for_tables(instance) {
            return;
        }
        let mut files: Vec<&Mapping> = Vec::new();
        for mapping in maps.iter() {
            let same = |m: &&Mapping| (m.dev, m.inode) == (mapping.dev, mapping.inode);
            if mapping.perms.execute && matches!(mapping.backing, Backing::File { .. }) && !files.iter().any(same) {
                files.push(mapping);
            }
        }
        let mut found: Vec<PluginStatus> = Vec::new();
        for mapping in files {
            let name = mapping.name().unwrap_or_default();
            if let Err(e) = self.attach_file(instance, &dir, mapping, &name, &mut found) {
                tracing::debug!(pid = process.pid, file = name, "not attached to: {e:#}");
            }
        }
        let Some(Watched { status, .. }) = self.watched.get_mut(&instance) else { return };
        for new in found {
            status.retain(|s| s.probe_set != new.probe_set || matches!(s.state, PluginState::Attached { .. }));
            status.push(new);
        }
        for plugin in &self.plugins {
            if !status.iter().any(|s| *s.probe_set == *plugin.spec.name) {
                status
                    .push(PluginStatus { probe_set: plugin.spec.name.as_str().into(), state: PluginState::NotMapped });
            }
        }
    }

    /// Has the frames of a Python interpreter read, if the process has mapped one.
    fn look_for_python(&mut self, instance: u32, dir: &ProcDir, maps: &Maps) {
        let tries = match self.pythons.get(&instance) {
            None => 0,
            Some(Err(unread)) if unread.tries < PYTHON_TRIES => unread.tries,
            _ => return,
        };
        if !self.reads_python {
            return;
        }
        let found = Interpreter::find(dir, maps).transpose().map(|found| {
            let python = found.map_err(|e| format!("{e:#}"))?;
            let tracker = self.tracker.get_mut().map_err(|e| e.to_string())?;
            tracker.set_python(instance, python.layout()).map_err(|e| e.to_string())?;
            Ok(python)
        });
        if let Some(found) = found {
            if let Err(why) = &found {
                tracing::debug!(pid = dir.pid(), "no Python functions in call stacks: {why}");
            }
            self.pythons.insert(instance, found.map_err(|why| Unread { why, tries: tries + 1 }));
        }
    }

    /// Whether nothing is to be attached to a process yet, because its stacks would end early: its unwind tables are being
    /// made. A launched command is stopped meanwhile; one that is traced already goes on being traced.
    fn waits_for_tables(&mut self, instance: u32) -> bool {
        let now_s = self.now_s();
        let is_held = self.watched.get(&instance).is_some_and(|w| self.is_held(w.process.pid));
        let Some(watched) = self.watched.get_mut(&instance) else { return false };
        watched.waits = now_s - watched.since_s < WAIT_FOR_TABLES_S
            && !watched.status.iter().any(|s| matches!(s.state, PluginState::Attached { .. }))
            && !is_held
            && self.unwinder.as_ref().is_some_and(|u| u.is_pending(instance));
        watched.waits
    }

    /// Attaches to processes that have waited long enough.
    pub(super) fn attach_to_waiting(&mut self) {
        let now_s = self.now_s();
        let is_over = |i: u32, w: &Watched| {
            now_s - w.since_s >= WAIT_FOR_TABLES_S || !self.unwinder.as_ref().is_some_and(|u| u.is_pending(i))
        };
        let waiting = self.watched.iter().filter(|(_, w)| w.waits && w.life == Life::Running);
        let over: Vec<u32> = waiting.filter(|(i, w)| is_over(**i, w)).map(|(i, _)| *i).collect();
        for instance in over {
            self.attach_to(instance);
            self.announce(instance, false);
        }
    }

    /// True while a process waits for its unwind tables.
    pub(super) fn is_waiting(&self) -> bool {
        self.watched.values().any(|w| w.waits && w.life == Life::Running)
    }

    /// Attaches every probe set that one mapped file provides.
    fn attach_file(
        &mut self,
        instance: u32,
        dir: &ProcDir,
        mapping: &Mapping,
        name: &str,
        found: &mut Vec<PluginStatus>,
    ) -> Result<()> {
        let file = open_mapped(dir, mapping)?;
        let id = FileId::of(&file).map_err(|e| Error::io(format!("failed to look at {name}"), e))?;
        // The very file that is mapped, whatever its name leads to now.
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let mut library = Library { path, name: name.to_owned(), debug: None };
        if is_dynamic_linker(name)
            && let Err(e) = self.tracker.get_mut().and_then(|t| Ok(t.attach_loader(instance, &library)?))
        {
            tracing::debug!(file = name, "loads of libraries will be noticed late: {e}");
        }
        let facts = self.libraries.facts(id, &file, &library, &self.plugins);
        let debug = facts.debug.as_ref();
        library.debug = debug.map(|debug| PathBuf::from(format!("/proc/self/fd/{}", debug.as_raw_fd())));
        // musl's dynamic linker is its C library; a static program defines exit() itself.
        let watched = self.watched.get(&instance);
        let is_executable = watched.is_some_and(|w| w.process.exe == name);
        let is_glibc = facts.names.soname.as_deref() == Some("libc.so.6");
        let may_be_libc = is_executable || is_glibc || is_dynamic_linker(name);
        // Only who can be let go on is stopped.
        let may_stop = self.purpose == Purpose::Run && watched.is_some_and(|w| self.can_go_on(w.process.pid));
        if may_stop
            && may_be_libc
            && let Err(e) = self.tracker.get_mut().and_then(|t| Ok(t.attach_exit(instance, &library)?))
        {
            tracing::debug!(file = name, "what exit handlers free will not be told apart: {e}");
        }
        let replaced = matches!(mapping.backing, Backing::File { deleted: true, .. });
        let note = if replaced { " (replaced or deleted on disk: the file that is mapped is probed)" } else { "" };
        let shown = format!("{name}{note}");
        for plugin in providers(&self.plugins, name, &facts.names) {
            let state = match self.tracker.get_mut().and_then(|t| Ok(t.attach(instance, &plugin.spec, &library)?)) {
                Ok(functions) if functions.is_empty() => continue, // was attached before
                Ok(functions) => PluginState::Attached { file: shown.clone(), functions },
                Err(e) => PluginState::Failed { file: shown.clone(), reason: e.to_string() },
            };
            found.push(PluginStatus { probe_set: plugin.spec.name.as_str().into(), state });
        }
        Ok(())
    }
}

/// The probe sets that a file provides; those that are a fallback only where no other set of their domain fits.
fn providers<'a>(plugins: &'a [Plugin], path: &str, facts: &Facts) -> Vec<&'a Plugin> {
    let fitting =
        |fallback| plugins.iter().filter(move |p| p.matching.is_fallback() == fallback && p.matching.fits(path, facts));
    let mut found: Vec<&Plugin> = fitting(false).collect();
    let known: HashSet<&str> = found.iter().map(|p| p.spec.domain.as_str()).collect();
    found.extend(fitting(true).filter(|p| !known.contains(p.spec.domain.as_str())));
    found
}

impl Libraries {
    fn facts(&mut self, id: FileId, file: &File, library: &Library, plugins: &[Plugin]) -> Arc<Known> {
        if self.facts.len() > MAX_FILES {
            self.facts.clear();
        }
        let read = || Arc::new(Known::read(file, library, plugins));
        Arc::clone(self.facts.entry(id).or_insert_with(read))
    }
}

impl Known {
    /// Looks at the file's own symbols and, when no probe set knows it by those, at those of its debug information.
    fn read(file: &File, library: &Library, plugins: &[Plugin]) -> Self {
        let names: Vec<String> = plugins.iter().flat_map(|p| p.matching.names()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let soname = elf::read_soname(&library.path).ok().flatten();
        let look = |debug: Option<&Path>| {
            // Not every mapped file is a library.
            let symbols = elf::read_symbols(&library.path, debug, &names).unwrap_or_default();
            let mut defined: HashSet<String> = symbols.functions.into_keys().collect();
            if plugins.iter().any(|p| p.spec.kind == SetKind::Tracepoints) {
                let tracepoints = usdt::read_names(&library.path).unwrap_or_default();
                defined.extend(tracepoints.into_iter().filter(|t| names.contains(&t.as_str())));
            }
            let exported = symbols.exported;
            Facts { soname: soname.clone(), defined, exported }
        };
        let own = look(None);
        let provides = |facts: &Facts| plugins.iter().any(|p| p.matching.fits(&library.name, facts));
        if provides(&own) {
            return Known { names: own, debug: None };
        }
        let dirs = symbolize::Limits::default().debug_dirs;
        if let Some(debug) = debug_file::for_probes(file, Path::new(&library.name), &dirs) {
            let both = look(Some(Path::new(&format!("/proc/self/fd/{}", debug.as_raw_fd()))));
            if provides(&both) {
                return Known { names: both, debug: Some(debug) };
            }
        }
        Known { names: own, debug: None }
    }
}

/// True for names of dynamic linkers: ld-linux-x86-64.so.2, ld-2.31.so, ld-musl-x86_64.so.1, musl's libc.so.
fn is_dynamic_linker(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.starts_with("ld-") || name.starts_with("ld.so") || name == "libc.so" || name.starts_with("libc.musl-")
}
