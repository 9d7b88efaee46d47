//! Where the names of one module come from: separate debug information, compressed symbol tables, the file itself.

use std::cell::RefCell;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::debug_file::{DebugFile, Search};
use super::debuginfod::Debuginfod;
use super::image::{DebugInfo, Image};
use super::lookup::Answer;
use super::worker::{Reader, Reply, Source};
use crate::maps::elf::ElfInfo;
use crate::output::text::visible;

/// A trusted file with debug information may be this many times larger than the bound of a copy: it is mapped, and the
/// memory for that can be taken back.
const MAPPED_FACTOR: u64 = 4;

/// What a module needs from its process to be looked into.
pub(super) struct Surroundings<'a> {
    /// Path as the process sees it.
    pub(super) path: Option<&'a Path>,
    /// Root directory of the process, when it is not ours.
    pub(super) root: Option<&'a File>,
    /// Folders of debug information.
    pub(super) debug_dirs: &'a [PathBuf],
    /// Most bytes that a copy may have.
    pub(super) max_bytes: u64,
    /// Servers that are asked for debug information.
    pub(super) debuginfod: Option<&'a RefCell<Debuginfod>>,
}

impl Surroundings<'_> {
    /// True while the debug information of a build is being fetched.
    pub(super) fn is_fetching(&self, build_id: Option<&str>) -> bool {
        self.debuginfod.zip(build_id).is_some_and(|(servers, id)| servers.borrow_mut().is_pending(id))
    }

    /// The module, for a message.
    fn shown(&self) -> String {
        self.path.map_or_else(|| "a module".to_owned(), |p| visible(&p.to_string_lossy()).into_owned())
    }
}

/// One file that addresses of a module are looked up in.
#[derive(Debug)]
pub(super) struct Layer {
    source: Source,
    /// Memory that the copy takes.
    pub(super) bytes: u64,
    /// Where it was found.
    pub(super) origin: Origin,
    debug_info: bool,
}

/// What names come from.
#[derive(Debug)]
pub(super) enum Origin {
    /// A separate file with debug information.
    DebugFile(PathBuf),
    /// A debuginfod server.
    Server,
    /// Debug information in the file itself.
    Own,
    /// The compressed symbol table.
    Mini,
    /// The file's symbol table; debug information, if it has any, is larger than the bound or broken.
    Table,
    /// What the file exports.
    Exports,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::DebugFile(path) => write!(f, "debug file {}", path.display()),
            Origin::Server => f.write_str("debug file from a debuginfod server"),
            Origin::Own => f.write_str("its own debug information"),
            Origin::Mini => f.write_str("its compressed symbol table"),
            Origin::Table => f.write_str("its symbol table (no lines)"),
            Origin::Exports => f.write_str("what it exports (stripped, and there is no debug file)"),
        }
    }
}

/// Prepares a file for lookup: what knows more comes first.
pub(super) fn open_layers(file: &File, info: &ElfInfo, around: &Surroundings<'_>) -> Result<Vec<Layer>, String> {
    let own = Image::copy(file, around.max_bytes).map_err(|e| format!("{e:#}"))?;
    let mut layers = Vec::new();
    if own.debug == DebugInfo::None {
        let search = Search {
            dirs: around.debug_dirs,
            root: around.root,
            module: around.path,
            build_id: info.build_id.as_deref(),
            link: own.link.as_ref(),
        };
        let (found, refused) = search.find();
        for reason in refused {
            tracing::warn!("debug information for {} is not used: {reason}", around.shown());
        }
        layers.extend(found.and_then(|f| Layer::separate(f, around)));
        if layers.is_empty()
            && let Some((servers, id)) = around.debuginfod.zip(info.build_id.as_deref())
        {
            let fetched = servers.borrow_mut().get(id);
            // Whoever runs the server is not the administrator of this machine: it is copied within the bounds.
            let image = fetched.and_then(|file| Image::copy(&file, around.max_bytes).ok());
            layers.extend(image.map(|image| Layer::copy(image, Origin::Server)));
        }
    }
    if layers.is_empty() && !own.symbol_table {
        match Image::mini(file, around.max_bytes) {
            Ok(mini) => layers.extend(mini.map(|image| Layer::copy(image, Origin::Mini))),
            Err(e) => tracing::warn!("the compressed symbols of {} are not used: {e:#}", around.shown()),
        }
    }
    let origin = match own.debug {
        DebugInfo::Copied => Origin::Own,
        _ if own.symbol_table => Origin::Table,
        _ => Origin::Exports,
    };
    layers.push(Layer::copy(own, origin));
    Ok(layers)
}

impl Layer {
    /// Looks up in a copy, which refers to no other file.
    fn copy(image: Image, origin: Origin) -> Self {
        let source = Source::new(image.file, Vec::new());
        Layer { source, bytes: image.bytes, origin, debug_info: image.debug == DebugInfo::Copied }
    }

    /// Looks up in a file with debug information; `None` when it is unusable.
    fn separate(found: DebugFile, around: &Surroundings<'_>) -> Option<Self> {
        let len = found.file.metadata().ok()?.len();
        if found.trusted && len <= around.max_bytes.saturating_mul(MAPPED_FACTOR) {
            // It may share parts with other files of its folder, which the reader finds by itself.
            let source = Source::new(found.file, around.debug_dirs.to_vec());
            return Some(Layer { source, bytes: 0, origin: Origin::DebugFile(found.path), debug_info: true });
        }
        let image = Image::copy(&found.file, around.max_bytes).ok()?;
        Some(Layer::copy(image, Origin::DebugFile(found.path)))
    }

    /// Looks up in a file that was given by hand.
    ///
    /// # Errors
    /// It is no sound ELF file, or its symbol tables alone are larger than `max_bytes`.
    pub(super) fn of_file(file: &File, path: PathBuf, max_bytes: u64) -> crate::Result<Self> {
        Image::copy(file, max_bytes).map(|image| Layer::copy(image, Origin::DebugFile(path)))
    }

    /// Looks an address up, in the file's own terms. Debug information that cannot be read is given up for good: what
    /// is left are the symbol tables.
    pub(super) fn look_up(&mut self, address: u64, around: &Surroundings<'_>, reader: &mut Reader) -> Answer {
        if self.debug_info {
            match reader.ask(&mut self.source, address, true) {
                Reply::Answer(answer) => return answer,
                Reply::Unreadable(reason) => {
                    tracing::warn!("the debug information of {} is not used: {reason}", around.shown());
                    self.debug_info = false;
                    self.source.spent = std::time::Duration::ZERO;
                }
            }
        }
        match reader.ask(&mut self.source, address, false) {
            Reply::Answer(answer) => answer,
            Reply::Unreadable(reason) => Err(format!("the symbol tables of the file cannot be read: {reason}")),
        }
    }
}
