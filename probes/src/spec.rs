//! What is to be probed: functions, what their arguments mean, and the files that define them.

use std::path::PathBuf;

use crate::placement::{Needs, Placement};

/// What a function does with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Hands one out.
    Alloc,
    /// Takes one back and hands one out.
    Realloc,
    /// Takes one back.
    Free,
}

/// Where a block's size comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// Argument `arg` (from 0), times argument `times`.
    Argument {
        /// The argument with the size or the number of elements.
        arg: u8,
        /// The argument it is multiplied by.
        times: Option<u8>,
    },
    /// Always this many bytes.
    Constant(u64),
}

/// How a function hands a block out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Returns {
    /// It returns its address, or `failed`.
    Value {
        /// The return value of a failed call: 0 for NULL, `u64::MAX` for MAP_FAILED.
        failed: u64,
    },
    /// It returns `ok` and stores the address where argument `arg` points.
    Pointer {
        /// The argument with the pointer.
        arg: u8,
        /// The return value of a call that worked (an int).
        ok: i32,
    },
    /// The block stays where it is; it returns the size that the block has now, less than was asked for when that did
    /// not change.
    InPlace,
    /// The block was handed out before: argument `arg` is its address.
    AtEntry {
        /// The argument with the block.
        arg: u8,
    },
}

/// One function of a probe set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionSpec {
    /// Symbol name.
    pub symbol: String,
    /// What it does.
    pub role: Role,
    /// Size of the block that it hands out; for a range, of what it takes back.
    pub size: Size,
    /// The argument with the block that it takes back.
    pub block_arg: Option<u8>,
    /// How it hands a block out.
    pub returns: Returns,
    /// The block is an address range that may be taken back in parts.
    pub range: bool,
    /// The set attaches without it.
    pub optional: bool,
}

impl FunctionSpec {
    /// True when a block is known to be handed out only once the function returns.
    pub fn is_return_probed(&self) -> bool {
        self.role != Role::Free && !matches!(self.returns, Returns::AtEntry { .. })
    }

    /// The argument with the block that is taken back or has been handed out.
    pub(crate) fn block(&self) -> Option<u8> {
        match self.returns {
            Returns::AtEntry { arg } => Some(arg),
            _ => self.block_arg,
        }
    }
}

/// What the names of a probe set's functions mean in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetKind {
    /// Symbols of functions.
    Functions,
    /// Static tracepoints (USDT), `provider:name`.
    Tracepoints,
}

/// A probe set, resolved from its manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeSetSpec {
    /// What its functions are.
    pub kind: SetKind,
    /// Number within the run, part of every site's key.
    pub number: u32,
    /// Name, for messages.
    pub name: String,
    /// Group of probe sets in which nested calls count once.
    pub domain: String,
    /// What the names of its functions may begin with in a file, in addition to their names here; mostly one, empty.
    pub prefixes: Vec<String>,
    /// Its functions.
    pub functions: Vec<FunctionSpec>,
}

impl ProbeSetSpec {
    /// Every name that a function of the set may have.
    pub(crate) fn names(&self) -> Vec<String> {
        self.prefixes.iter().flat_map(|p| self.functions.iter().map(move |f| format!("{p}{}", f.symbol))).collect()
    }
}

/// A file that a process has mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Library {
    /// How we can open it (`/proc/PID/map_files/...` or `/proc/PID/root/...`).
    pub path: PathBuf,
    /// Its name for people.
    pub name: String,
    /// How we can open the file with its debug information; `None` when there is none, or nobody looked for it.
    pub debug: Option<PathBuf>,
}

/// What became of one function of a probe set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Symbol name.
    pub symbol: String,
    /// Where the probe is; `Err` says why there is none.
    pub placement: Result<Placement, String>,
}

/// What a function's probe must find intact.
pub(crate) fn needs(spec: &FunctionSpec) -> Needs {
    let (size, times) = match spec.size {
        Size::Argument { arg, times } => (Some(arg), times),
        Size::Constant(_) => (None, None),
    };
    let out = match spec.returns {
        Returns::Pointer { arg, .. } => Some(arg),
        _ => None,
    };
    let arguments = [size, times, spec.block(), out].into_iter().flatten().fold(0, |mask, n| mask | 1 << n);
    Needs { arguments, returns: spec.is_return_probed() }
}
