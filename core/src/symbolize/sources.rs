//! Where the names of one module come from: separate debug information, compressed symbol tables, the file itself.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::debug_file::{DebugFile, Search};
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
}

impl Surroundings<'_> {
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
    debug_info: bool,
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
    }
    if layers.is_empty() && !own.symbol_table {
        match Image::mini(file, around.max_bytes) {
            Ok(mini) => layers.extend(mini.map(Layer::copy)),
            Err(e) => tracing::warn!("the compressed symbols of {} are not used: {e:#}", around.shown()),
        }
    }
    layers.push(Layer::copy(own));
    Ok(layers)
}

impl Layer {
    /// Looks up in a copy, which refers to no other file.
    fn copy(image: Image) -> Self {
        let source = Source::new(image.file, Vec::new());
        Layer { source, bytes: image.bytes, debug_info: image.debug == DebugInfo::Copied }
    }

    /// Looks up in a file with debug information; `None` when it is unusable.
    fn separate(found: DebugFile, around: &Surroundings<'_>) -> Option<Self> {
        let len = found.file.metadata().ok()?.len();
        if found.trusted && len <= around.max_bytes.saturating_mul(MAPPED_FACTOR) {
            // It may share parts with other files of its folder, which the reader finds by itself.
            let source = Source::new(found.file, around.debug_dirs.to_vec());
            return Some(Layer { source, bytes: 0, debug_info: true });
        }
        Image::copy(&found.file, around.max_bytes).ok().map(Layer::copy)
    }

    /// Looks up in a file that was given by hand.
    ///
    /// # Errors
    /// It is no sound ELF file, or its symbol tables alone are larger than `max_bytes`.
    pub(super) fn of_file(file: File, max_bytes: u64) -> crate::Result<Self> {
        Image::copy(&file, max_bytes).map(Layer::copy)
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
