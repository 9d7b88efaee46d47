//! Names for places that a report knows by build id and address only, from debug files given later.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Frame;
use super::debuginfod::{self, Debuginfod};
use super::sources::{Layer, Surroundings};
use super::worker::Reader;
use crate::error::{Error, Result};
use crate::maps::elf::ElfInfo;

/// Most bytes that are copied of one debug file.
const MAX_BYTES: u64 = 1 << 30;
/// Most files that are looked into for their build id, and how deep folders may be.
const MAX_FILES: usize = 100_000;
const MAX_DEPTH: usize = 12;

/// Folders with debug files.
#[derive(Debug)]
pub struct DebugFolders {
    dirs: Vec<PathBuf>,
    reader: Reader,
    /// By build id, opened on first use; `None` when there is no file.
    files: HashMap<String, Option<Layer>>,
    /// Files in the folders by build id; made when the usual name is not there.
    index: Option<HashMap<String, PathBuf>>,
    /// Asked for what is in no folder.
    debuginfod: Option<Debuginfod>,
}

impl DebugFolders {
    /// Folders to look into, each either laid out like `/usr/lib/debug` (`.build-id/ab/cdef.debug`) or with the files
    /// somewhere below it; `servers` are asked for what is in none. Debug information is read by a worker made from `program`, see [`super::worker`].
    ///
    /// # Errors
    /// One is no folder.
    pub fn new(dirs: Vec<PathBuf>, servers: Option<&debuginfod::Settings>, program: &Path) -> Result<Self> {
        for dir in &dirs {
            std::fs::read_dir(dir).map_err(|e| Error::io(format!("failed to read the folder {}", dir.display()), e))?;
        }
        let reader = Reader::new(Some(program));
        // Nobody else waits: as long as it takes.
        let settings = servers.map(|s| debuginfod::Settings { patience: Duration::MAX, ..s.clone() });
        let debuginfod = settings.as_ref().and_then(Debuginfod::start);
        Ok(DebugFolders { dirs, reader, files: HashMap::new(), index: None, debuginfod })
    }

    /// True when there is a file with this build id.
    pub fn has(&mut self, build_id: &str) -> bool {
        self.layer(build_id).is_some()
    }

    /// Frames of a return address, given in the module's own terms, innermost first; empty when there is no name.
    pub fn frames(&mut self, build_id: &str, return_address: u64) -> Vec<Frame> {
        let dirs = self.dirs.clone();
        let around = Surroundings {
            path: Some(Path::new(build_id)),
            root: None,
            debug_dirs: &dirs,
            max_bytes: MAX_BYTES,
            debuginfod: None,
        };
        if self.layer(build_id).is_none() {
            return Vec::new();
        }
        let Some(Some(layer)) = self.files.get_mut(build_id) else { return Vec::new() };
        let answer = layer.look_up(return_address.saturating_sub(1), &around, &mut self.reader);
        let frame = |f: super::lookup::Function| Frame {
            function: Some(f.name),
            offset: f.offset,
            file: f.file,
            line: f.line,
            inlined: f.inlined,
            ..Frame::default()
        };
        answer.map_or_else(|_| Vec::new(), |functions| functions.into_iter().map(frame).collect())
    }

    fn layer(&mut self, build_id: &str) -> Option<&Layer> {
        if !self.files.contains_key(build_id) {
            let layer = self.open(build_id);
            self.files.insert(build_id.to_owned(), layer);
        }
        self.files.get(build_id)?.as_ref()
    }

    fn open(&mut self, build_id: &str) -> Option<Layer> {
        // It becomes part of a path, and comes from a file that anybody may have written.
        if build_id.len() < 4 || !build_id.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let (first, rest) = build_id.split_at(2);
        let name = Path::new(".build-id").join(first).join(format!("{rest}.debug"));
        let usual = self.dirs.iter().map(|d| d.join(&name)).find(|p| id_of(p).as_deref() == Some(build_id));
        let found = usual.or_else(|| self.index.get_or_insert_with(|| index(&self.dirs)).get(build_id).cloned());
        let (path, file) = match (found, &mut self.debuginfod) {
            (Some(path), _) => (path.clone(), File::open(&path).ok()?),
            (None, Some(servers)) => ("a file from a debuginfod server".into(), servers.get(build_id)?),
            (None, None) => return None,
        };
        Layer::of_file(&file, path.clone(), MAX_BYTES)
            .inspect_err(|e| tracing::warn!("{} is not used: {e:#}", path.display()))
            .ok()
    }
}

/// Build id of a regular ELF file.
fn id_of(path: &Path) -> Option<String> {
    if !std::fs::metadata(path).ok()?.is_file() {
        return None;
    }
    let mut file = File::open(path).ok()?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic).ok()?;
    (magic == *b"\x7fELF").then(|| ElfInfo::read(&file).ok()?.build_id).flatten()
}

/// All files below the folders that have a build id; of two with the same, one with `.debug` in its name wins.
fn index(dirs: &[PathBuf]) -> HashMap<String, PathBuf> {
    let mut found: HashMap<String, PathBuf> = HashMap::new();
    let mut folders: Vec<(PathBuf, usize)> = dirs.iter().map(|d| (d.clone(), 0)).collect();
    let mut seen = 0;
    while let Some((folder, depth)) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            seen += 1;
            if seen > MAX_FILES {
                tracing::warn!("only {MAX_FILES} files of the debug folders have been looked at");
                return found;
            }
            // Links to folders are not followed: they may lead in circles.
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                if depth < MAX_DEPTH {
                    folders.push((entry.path(), depth + 1));
                }
            } else if let Some(id) = id_of(&entry.path()) {
                let debug = |p: &Path| p.extension().is_some_and(|e| e == "debug");
                if !found.get(&id).is_some_and(|p| debug(p)) {
                    found.insert(id, entry.path());
                }
            }
        }
    }
    found
}
