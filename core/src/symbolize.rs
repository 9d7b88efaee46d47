//! Addresses to frames.

use serde::Serialize;

/// One frame of a call stack.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Frame {
    /// Demangled function name; `None` when nothing is known, then `reason` says why. Hostile text.
    pub function: Option<String>,
    /// Path of the mapped file as the process sees it, or `[vdso]`, `[heap]`, ...; `None` for anonymous memory.
    pub module: Option<String>,
    /// With a function: bytes from its start. Without: offset in the module's file (or the address when there is
    /// no module).
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
}
