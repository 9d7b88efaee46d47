//! Looks addresses up in one file, in this process.
//!
//! The symbol reader has no bound on time or depth: debug information made to be slow or endlessly nested can hang or
//! crash it. So, outside of tests, this runs in the worker process alone, see [`super::worker`]; files without debug
//! information, which cost what their symbols cost, may be read anywhere.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use blazesym::symbolize::source::{Elf, Source};
use blazesym::symbolize::{CodeInfo, Input, Sym, Symbolized, Symbolizer as Reader};
use serde::{Deserialize, Serialize};

use super::demangle::{cut, demangle};

/// Most calls that are told of one address; compilers inline a few dozen deep.
const MAX_INLINED: usize = 128;

/// One function at an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Function {
    pub(super) name: String,
    /// Bytes from the start of the function that has the machine code.
    pub(super) offset: u64,
    pub(super) file: Option<String>,
    pub(super) line: Option<u32>,
    pub(super) inlined: bool,
}

/// Functions at an address, innermost first, never empty; or why there are none.
pub(super) type Answer = Result<Vec<Function>, String>;

/// The files that have been opened for lookup, by a number that the owner gives.
#[derive(Default)]
pub(super) struct Lookups(HashMap<u64, Lookup>);

struct Lookup {
    reader: Reader,
    /// The reader opens it by its descriptor, so it stays open as long as the reader.
    file: File,
}

impl Lookups {
    /// True when the file of that number is open.
    pub(super) fn has(&self, id: u64) -> bool {
        self.0.contains_key(&id)
    }

    /// Opens a file. The folders are where it may share parts with other files; without any it refers to none.
    pub(super) fn open(&mut self, id: u64, file: File, debug_dirs: &[PathBuf]) {
        let reader = Reader::builder()
            .enable_auto_reload(false)
            // Done here, within bounds; see `demangle`.
            .enable_demangling(false)
            .set_debug_dirs(Some(debug_dirs))
            .build();
        self.0.insert(id, Lookup { reader, file });
    }

    /// Closes a file and gives back what was read of it.
    pub(super) fn close(&mut self, id: u64) {
        self.0.remove(&id);
    }

    /// Looks an address up, in the file's own terms. `None` when the reader failed on the file, as opposed to not
    /// knowing the address, and for a file that is not open; it is closed then.
    pub(super) fn ask(&mut self, id: u64, address: u64, debug_info: bool) -> Option<Answer> {
        let answer = self.0.get(&id)?.ask(address, debug_info);
        if answer.is_none() {
            self.close(id);
        }
        answer
    }
}

impl Lookup {
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
    let inlined = sym.inlined.iter().rev().take(MAX_INLINED).map(|f| function(&f.name, f.code_info.as_ref(), true));
    inlined.chain([function(&sym.name, sym.code_info.as_deref(), false)]).collect()
}
