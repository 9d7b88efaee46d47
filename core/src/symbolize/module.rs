//! One file that processes have mapped: kept open, looked into when a frame in it is asked for the first time.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use blazesym::symbolize::source::{Elf, Source};
use blazesym::symbolize::{CodeInfo, Input, Sym, Symbolized, Symbolizer as Reader};

use super::debug_file::{DebugFile, Search};
use super::demangle::{cut, demangle};
use super::image::{DebugInfo, Image};
use crate::error::Result;
use crate::maps::elf::ElfInfo;

/// Most addresses of one module whose answer is kept.
const MAX_ANSWERS: usize = 65_536;
/// A trusted file with debug information may be this many times larger than the bound of a copy: it is mapped, and the
/// memory for that can be taken back.
const MAPPED_FACTOR: u64 = 4;

/// One function at an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Function {
    pub(super) name: String,
    /// Bytes from the start of the function that has the machine code.
    pub(super) offset: u64,
    pub(super) file: Option<String>,
    pub(super) line: Option<u32>,
    pub(super) inlined: bool,
}

/// Functions at an address, innermost first, never empty; or why there are none.
pub(super) type Answer = std::result::Result<Vec<Function>, String>;

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

/// A mapped file.
#[derive(Debug)]
pub(super) struct Module {
    /// The file; `None` when too many were open already.
    file: Option<File>,
    info: ElfInfo,
    /// Opened for lookup; `None` before the first and after [`Module::unload`].
    sources: Option<std::result::Result<Vec<Lookup>, String>>,
    answers: HashMap<u64, Rc<Answer>>,
    /// When it was last asked, for [`Module::unload`]; counted by the caller.
    pub(super) used: u64,
}

impl Module {
    /// A module from an open file. `keep` holds the file open, so that it can be read after it was deleted.
    ///
    /// # Errors
    /// When it is no ELF file.
    pub(super) fn new(file: File, keep: bool) -> Result<Self> {
        let info = ElfInfo::read(&file)?;
        Ok(Module { file: keep.then_some(file), info, sources: None, answers: HashMap::new(), used: 0 })
    }

    /// Its build id, hexadecimal.
    pub(super) fn build_id(&self) -> Option<&str> {
        self.info.build_id.as_deref()
    }

    /// True when the file is held open.
    pub(super) fn is_kept(&self) -> bool {
        self.file.is_some()
    }

    /// Memory that copies of its file take, in bytes.
    pub(super) fn loaded_bytes(&self) -> u64 {
        self.sources.iter().flatten().flatten().map(|s| s.bytes).sum()
    }

    /// Gives the memory of copies back; answers are kept, and the next new question makes the copies again.
    pub(super) fn unload(&mut self) {
        self.sources = None;
    }

    /// The functions at a return address, given by its offset in the file. `reopen` is called when the file is needed
    /// and not held open.
    pub(super) fn answer(
        &mut self,
        return_offset: u64,
        around: &Surroundings<'_>,
        reopen: impl FnOnce() -> Option<File>,
    ) -> Rc<Answer> {
        if let Some(answer) = self.answers.get(&return_offset) {
            return answer.clone();
        }
        let answer = Rc::new(self.look_up(return_offset, around, reopen));
        if self.answers.len() >= MAX_ANSWERS {
            self.answers.clear();
        }
        self.answers.insert(return_offset, answer.clone());
        answer
    }

    fn look_up(
        &mut self,
        return_offset: u64,
        around: &Surroundings<'_>,
        reopen: impl FnOnce() -> Option<File>,
    ) -> Answer {
        // The return address is behind the call; the call itself may be the last of its line, block or function.
        let call = return_offset.checked_sub(1).and_then(|o| self.info.address_of(o));
        let call = call.ok_or_else(|| "the address is outside of what the file loads".to_owned())?;
        let sources = self.sources.get_or_insert_with(|| match self.file.as_ref() {
            Some(file) => open_sources(file, &self.info, around),
            None => match reopen() {
                Some(file) => open_sources(&file, &self.info, around),
                None => Err("the file is out of reach".to_owned()),
            },
        });
        let sources = sources.as_mut().map_err(|reason| reason.clone())?;
        let mut first_reason = None;
        for source in sources.iter_mut() {
            match source.look_up(call) {
                Ok(functions) => return Ok(functions),
                Err(reason) => first_reason = first_reason.or(Some(reason)),
            }
        }
        Err(first_reason.unwrap_or_else(|| "the file has no symbols".to_owned()))
    }
}

/// Prepares a file for lookup: separate debug information first, because it knows more.
fn open_sources(file: &File, info: &ElfInfo, around: &Surroundings<'_>) -> std::result::Result<Vec<Lookup>, String> {
    let own = Image::copy(file, around.max_bytes).map_err(|e| format!("{e:#}"))?;
    let mut sources = Vec::new();
    if own.debug == DebugInfo::None {
        let search = Search {
            dirs: around.debug_dirs,
            root: around.root,
            module: around.path,
            build_id: info.build_id.as_deref(),
            link: own.link.as_ref(),
        };
        sources.extend(search.find().and_then(|f| Lookup::separate(f, around)));
    }
    sources.push(Lookup::copy(own));
    Ok(sources)
}

/// One file that addresses are looked up in.
#[derive(Debug)]
struct Lookup {
    reader: Reader,
    /// The reader opens it by its descriptor, so it stays open as long as the reader.
    file: File,
    bytes: u64,
    debug_info: bool,
}

impl Lookup {
    /// Looks up in a copy, which refers to no other file.
    fn copy(image: Image) -> Self {
        let reader = reader(&[]);
        Lookup { reader, file: image.file, bytes: image.bytes, debug_info: image.debug == DebugInfo::Copied }
    }

    /// Looks up in a file with debug information; `None` when it is unusable.
    fn separate(found: DebugFile, around: &Surroundings<'_>) -> Option<Self> {
        let len = found.file.metadata().ok()?.len();
        if found.trusted && len <= around.max_bytes.saturating_mul(MAPPED_FACTOR) {
            // It may share parts with other files of its folder, which the reader finds by itself.
            return Some(Lookup { reader: reader(around.debug_dirs), file: found.file, bytes: 0, debug_info: true });
        }
        Image::copy(&found.file, around.max_bytes).ok().map(Lookup::copy)
    }

    /// Looks an address up, in the file's own terms. Broken debug information is given up for good: what is left are
    /// the symbol tables.
    fn look_up(&mut self, address: u64) -> Answer {
        if self.debug_info {
            match self.ask(address, true) {
                Some(answer) => return answer,
                None => {
                    self.debug_info = false;
                    self.reader = reader(&[]);
                }
            }
        }
        self.ask(address, false).unwrap_or_else(|| Err("the symbol tables of the file are malformed".to_owned()))
    }

    /// `None` when the reader failed on the file, as opposed to not knowing the address.
    fn ask(&self, address: u64, debug_info: bool) -> Option<Answer> {
        let mut elf = Elf::new(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        elf.debug_syms = debug_info;
        let source = Source::Elf(elf);
        // The file is hostile, and arithmetic on its contents may overflow or index out of range. A reader that
        // panicked is not used again.
        let result = catch_unwind(AssertUnwindSafe(|| {
            let found = self.reader.symbolize_single(&source, Input::VirtOffset(address)).ok()?;
            Some(match found {
                Symbolized::Sym(sym) if !sym.name.is_empty() => Ok(functions(&sym)),
                Symbolized::Sym(_) => Err("the function has no name".to_owned()),
                Symbolized::Unknown(reason) => Err(reason.to_string()),
            })
        }));
        result.ok().flatten()
    }
}

fn reader(debug_dirs: &[PathBuf]) -> Reader {
    Reader::builder()
        .enable_auto_reload(false)
        // Done here, within bounds; see `demangle`.
        .enable_demangling(false)
        .set_debug_dirs(Some(debug_dirs))
        .build()
}

/// Innermost first: calls that were inlined, then the function that has the code.
fn functions(sym: &Sym<'_>) -> Vec<Function> {
    // The address that was looked up is one before the return address.
    let offset = (sym.offset as u64).saturating_add(1);
    let function = |name: &str, code: Option<&CodeInfo<'_>>, inlined| Function {
        name: demangle(name),
        offset,
        file: code.map(|c| cut(&c.to_path().to_string_lossy())),
        line: code.and_then(|c| c.line).filter(|l| *l > 0),
        inlined,
    };
    let inlined = sym.inlined.iter().rev().map(|f| function(&f.name, f.code_info.as_ref(), true));
    inlined.chain([function(&sym.name, sym.code_info.as_deref(), false)]).collect()
}
