//! Python functions in call stacks.
//!
//! A stack of CPython shows its interpreter, again and again the same C functions. Which Python functions it executes is
//! in memory: a list of frames per thread, each with a code object that names function, file and lines. The kernel side
//! reads them together with the stack (`probes/bpf/python.bpf.h`), from outside and without the target's help, which is why
//! not Python's own perf trampolines are used: those exist since 3.12 only and must be switched on by whoever starts the
//! process. This module knows the layouts of 3.11, 3.12 and 3.13, and turns what was read into [`PythonCall`]s.
//!
//! Sources: `Include/internal/pycore_{runtime,interp,frame}.h` and `Include/cpython/{pystate,code,unicodeobject}.h` of
//! CPython 3.11.7, 3.12.1 and 3.13.0. From 3.13 on the process itself says where most of it is (`_Py_DebugOffsets`).

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memleak_probes::python::{Layout, PythonCode, PythonFrame};
use memleak_probes::{SiteKey, Tracker, elf};

use crate::maps::elf::ElfInfo;
use crate::maps::{Backing, Mapping, Maps, open_mapped};
use crate::process::ProcDir;
use crate::recording::Location;
use crate::symbolize::{ModuleName, NormalizedFrame};
use crate::sys;
use crate::{Error, ErrorKind, Result};

mod objects;

use objects::Strings;

/// Most functions of a process that are remembered.
const MAX_CODES: usize = 65_536;
/// Longest line table that is read of a process, bytes: that of a function of some 10,000 lines.
const MAX_LINES: usize = 64 << 10;
/// Bytes of line tables of a process that are remembered.
const MAX_ALL_LINES: usize = 16 << 20;
/// Words of `_Py_DebugOffsets` that are read.
const DEBUG_OFFSETS: usize = 72;

/// A call of a Python function.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PythonCall {
    /// Qualified name: `Class.method`, `<module>`. Hostile text.
    pub function: Arc<str>,
    /// Path of the source file, or `<string>`, ... Hostile text.
    pub file: Arc<str>,
    /// Line of the function's definition.
    pub first_line: u32,
    /// Line that is executed, when the line table could be read.
    pub line: Option<u32>,
    /// It was called by C code: the next call belongs to another call of the interpreter.
    pub is_entry: bool,
}

impl PythonCall {
    /// For the identity of a site: the same in the next run, and wherever the function moves in its file.
    pub(crate) fn normalized(&self) -> NormalizedFrame {
        let line = self.line.unwrap_or(self.first_line);
        let offset = u64::from(line.saturating_sub(self.first_line));
        NormalizedFrame { module: ModuleName::Generated(self.place().into()), offset }
    }

    /// For a recording.
    pub(crate) fn location(&self) -> Location {
        let offset = u64::from(self.line.unwrap_or(self.first_line));
        Location { module: Some(self.place()), build_id: None, offset }
    }

    fn place(&self) -> String {
        format!("{}:{}", self.file, self.function)
    }
}

/// The Python interpreter of a process.
pub struct Interpreter {
    pid: u32,
    /// For example `3.11`.
    pub version: String,
    layout: Layout,
    /// In a code object: its first instruction.
    instructions: u64,
    strings: Strings,
    codes: HashMap<(u64, u64), Arc<Code>>,
    /// Bytes of their line tables.
    line_bytes: usize,
}

/// Why the frames of a process's Python are not read.
#[derive(Clone, Debug)]
pub struct Unread {
    /// For people.
    pub why: String,
    /// How often it was tried: a process that is just starting may not be there in full.
    pub tries: u32,
}

/// What is known of a Python function.
struct Code {
    function: Arc<str>,
    file: Arc<str>,
    first_line: u32,
    lines: Vec<u8>,
}

/// Where a version of the interpreter has what. What is the same in all: `code_names`, `thread_next`.
struct Version {
    /// Runtime state: pointer to the first interpreter.
    interpreters: u64,
    layout: Layout,
    instructions: u64,
    strings: Strings,
}

impl Interpreter {
    /// The interpreter among the files that a process has mapped; `None` when there is none.
    ///
    /// # Errors
    /// Its version is not known, or its memory cannot be read.
    pub fn find(dir: &ProcDir, maps: &Maps) -> Result<Option<Interpreter>> {
        for mapping in maps.iter().filter(|m| m.perms.execute && may_be_python(m)) {
            let file = open_mapped(dir, mapping)?;
            let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            let symbols = elf::read_variables(&path, &["_PyRuntime", "Py_Version"])?;
            let (Some(runtime), Some(version)) = (symbols.get("_PyRuntime"), symbols.get("Py_Version")) else {
                continue;
            };
            let Some(begin) = ElfInfo::read(&file)?.address_of(mapping.offset) else { continue };
            let place = |address: u64| mapping.start.wrapping_add(address.wrapping_sub(begin));
            return Interpreter::at(dir.pid(), place(*runtime), place(*version)).map(Some);
        }
        Ok(None)
    }

    fn at(pid: u32, runtime: u64, version: u64) -> Result<Interpreter> {
        let [number] = words::<1>(pid, version)?;
        // PY_VERSION_HEX: 0x030b02f0 is 3.11.2.
        let (major, minor) = (number >> 24 & 0xff, number >> 16 & 0xff);
        let known = match (major, minor) {
            (3, 11) => version_3_11(),
            (3, 12) => version_3_12(),
            (3, 13) => version_3_13(&words::<DEBUG_OFFSETS>(pid, runtime)?)?,
            _ => return Err(refused(format!("frames of Python {major}.{minor} are not read: 3.11 to 3.13 are known"))),
        };
        let layout = Layout { interpreters: runtime.wrapping_add(known.interpreters), ..known.layout };
        Ok(Interpreter {
            pid,
            version: format!("{major}.{minor}"),
            layout,
            instructions: known.instructions,
            strings: known.strings,
            codes: HashMap::new(),
            line_bytes: 0,
        })
    }

    /// Where the kernel side finds its frames.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The Python calls of a new site, innermost first, and whether there were more; empty without any.
    ///
    /// # Errors
    /// When the maps cannot be read.
    pub fn calls(&mut self, tracker: &Tracker, key: SiteKey) -> Result<(Vec<PythonCall>, bool)> {
        let Some((frames, cut)) = tracker.take_python(key)? else { return Ok((Vec::new(), false)) };
        let mut calls = Vec::with_capacity(frames.len());
        for frame in &frames {
            let code = self.code(tracker, key.instance, frame)?;
            // An instruction before the first one: the function has not begun.
            let at = frame.instruction.wrapping_sub(frame.code.wrapping_add(self.instructions)).cast_signed();
            let line = usize::try_from(at).ok().and_then(|at| objects::line_at(&code.lines, code.first_line, at));
            calls.push(PythonCall {
                function: Arc::clone(&code.function),
                file: Arc::clone(&code.file),
                first_line: code.first_line,
                line: if at < 0 { Some(code.first_line) } else { line },
                is_entry: frame.is_entry,
            });
        }
        Ok((calls, cut))
    }

    fn code(&mut self, tracker: &Tracker, instance: u32, frame: &PythonFrame) -> Result<Arc<Code>> {
        let key = (frame.code, frame.lines);
        if let Some(code) = self.codes.get(&key) {
            return Ok(Arc::clone(code));
        }
        let found = tracker.python_code(instance, frame)?.unwrap_or_default();
        let code = Arc::new(self.decode(&found, frame));
        self.remember(key, &code);
        Ok(code)
    }

    fn remember(&mut self, key: (u64, u64), code: &Arc<Code>) {
        let bytes = code.lines.len();
        if self.codes.len() >= MAX_CODES || self.line_bytes + bytes > MAX_ALL_LINES {
            self.codes.clear();
            self.line_bytes = 0;
        }
        self.codes.insert(key, Arc::clone(code));
        self.line_bytes += bytes;
    }

    fn decode(&self, found: &PythonCode, frame: &PythonFrame) -> Code {
        let text = |object: &Option<Vec<u8>>, unknown: &str| {
            object.as_ref().and_then(|o| self.strings.text(o)).unwrap_or_else(|| unknown.to_owned()).into()
        };
        let lines = match found.lines.as_ref().map(|object| objects::bytes(object)) {
            Some((lines, missing)) if missing > 0 && lines.len() + missing <= MAX_LINES => {
                // The rest, if the process is still there and has not used the memory for something else.
                let mut whole = vec![0; lines.len() + missing];
                match sys::read_memory(self.pid, frame.lines.wrapping_add(objects::BYTES_DATA), &mut whole) {
                    Ok(n) if n == whole.len() && whole.starts_with(lines) => whole,
                    _ => lines.to_vec(),
                }
            }
            Some((lines, _)) => lines.to_vec(),
            None => Vec::new(),
        };
        Code {
            function: text(&found.name, "a Python function"),
            file: text(&found.file, "?"),
            first_line: found.first_line.unwrap_or(0),
            lines,
        }
    }
}

/// Cheap: only files whose name says so are looked into.
fn may_be_python(mapping: &Mapping) -> bool {
    let Backing::File { path, .. } = &mapping.backing else { return false };
    Path::file_name(path).is_some_and(|name| name.to_string_lossy().contains("python"))
}

fn refused(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Target, why)
}

/// Words of a process's memory.
fn words<const N: usize>(pid: u32, address: u64) -> Result<[u64; N]> {
    let mut bytes = vec![0; N * 8];
    let failed = |e| Error::io("failed to read the memory of a Python interpreter", e);
    let got = sys::read_memory(pid, address, &mut bytes).map_err(failed)?;
    if got < bytes.len() {
        return Err(refused("failed to read the memory of a Python interpreter: it is not all there"));
    }
    let (words, _) = bytes.as_chunks::<8>();
    let mut out = [0; N];
    for (to, word) in out.iter_mut().zip(words) {
        *to = u64::from_le_bytes(*word);
    }
    Ok(out)
}

fn version_3_11() -> Version {
    let layout = Layout {
        interpreters: 0,
        threads: 16,
        thread_next: 8,
        thread_id: 152,
        // The frame hangs on a structure on the C stack.
        thread_frame: 56,
        frame_holder: Some(8),
        code_first_line: 72,
        code_names: 112,
        frame_code: 32,
        frame_previous: 48,
        frame_instruction: 56,
        // is_entry
        frame_entry: 68,
        entry_value: None,
    };
    Version { interpreters: 48, layout, instructions: 184, strings: Strings { ascii: 48, compact: 72 } }
}

/// `owner` of the frame that a call of the interpreter puts below those of functions.
const FRAME_OWNED_BY_CSTACK: u8 = 3;

fn version_3_12() -> Version {
    let layout = Layout {
        interpreters: 0,
        threads: 72,
        thread_next: 8,
        thread_id: 136,
        thread_frame: 56,
        frame_holder: Some(0),
        code_first_line: 68,
        code_names: 112,
        frame_code: 0,
        frame_previous: 8,
        frame_instruction: 56,
        frame_entry: 70,
        entry_value: Some(FRAME_OWNED_BY_CSTACK),
    };
    Version { interpreters: 48, layout, instructions: 192, strings: Strings { ascii: 40, compact: 56 } }
}

/// From what the process says of itself: `struct _Py_DebugOffsets`.
fn version_3_13(said: &[u64; DEBUG_OFFSETS]) -> Result<Version> {
    if said[0].to_le_bytes() != *b"xdebugpy" {
        return Err(refused("frames of this Python are not read: it does not say where they are"));
    }
    if said[2] != 0 {
        return Err(refused("frames of Python built without its global lock are not read"));
    }
    let small = |n: usize| {
        let fits = u32::try_from(said[n]).ok().filter(|offset| *offset < 1 << 20);
        fits.ok_or_else(|| refused("frames of this Python are not read: what it says of itself makes no sense"))
    };
    let in_frame = |n: usize| {
        let fits = u8::try_from(said[n]).ok().filter(|offset| *offset < 72);
        fits.ok_or_else(|| refused("frames of this Python are not read: what it says of itself makes no sense"))
    };
    // runtime_state at 3, interpreter_state at 6, thread_state at 19, interpreter_frame at 28, code_object at 34.
    let layout = Layout {
        interpreters: 0,
        threads: small(9)?,
        thread_next: small(21)?,
        thread_id: small(24)?,
        thread_frame: small(23)?,
        frame_holder: None,
        code_first_line: small(39)?,
        code_names: small(35)?,
        frame_code: in_frame(30)?,
        frame_previous: in_frame(29)?,
        frame_instruction: in_frame(31)?,
        frame_entry: in_frame(33)?,
        entry_value: Some(FRAME_OWNED_BY_CSTACK),
    };
    // The pointer to the main interpreter lies behind that to the newest one.
    let interpreters = u64::from(small(5)?) + 8;
    let instructions = u64::from(small(43)?);
    let names: Vec<u64> = said[35..39].iter().map(|at| at.wrapping_sub(said[35])).collect();
    if names != [0, 8, 16, 24] {
        return Err(refused("frames of this Python are not read: its code objects look different"));
    }
    Ok(Version { interpreters, layout, instructions, strings: Strings { ascii: 40, compact: 56 } })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What CPython 3.13.0 says of itself, by its header.
    fn said_by_3_13() -> [u64; DEBUG_OFFSETS] {
        let mut said = [0; DEBUG_OFFSETS];
        said[0] = u64::from_le_bytes(*b"xdebugpy");
        said[1] = 0x030d_00f0;
        (said[5], said[9]) = (632, 7344);
        (said[21], said[23], said[24]) = (8, 72, 152);
        (said[29], said[30], said[31], said[33]) = (8, 0, 56, 70);
        (said[35], said[36], said[37], said[38], said[39], said[43]) = (112, 120, 128, 136, 68, 200);
        said
    }

    /// The offsets must be the compiler's; these were printed by a program that includes the headers of 3.13.0.
    #[test]
    fn python_3_13_is_read_by_what_it_says() {
        let version = version_3_13(&said_by_3_13()).unwrap();
        assert_eq!((version.interpreters, version.layout.threads, version.instructions), (640, 7344, 200));
        assert_eq!((version.layout.thread_id, version.layout.thread_frame), (152, 72));
        assert_eq!((version.layout.frame_previous, version.layout.frame_instruction), (8, 56));
        assert_eq!((version.layout.code_names, version.layout.code_first_line), (112, 68));
    }

    /// It is the process that says so: nonsense must be refused, not believed.
    #[test]
    fn nonsense_is_refused() {
        for (word, value) in [(0, 7), (2, 1), (9, 1 << 40), (30, 72), (33, 4096)] {
            let mut said = said_by_3_13();
            said[word] = value;
            assert!(version_3_13(&said).is_err(), "word {word}");
        }
        // An address where nothing is, and one of a number that is no version.
        let numbers = [0_u64, 0x020b_0000, 0x030e_0000];
        for number in &numbers {
            let error = Interpreter::at(std::process::id(), 8, std::ptr::from_ref(number) as u64).err().unwrap();
            assert!(error.to_string().contains("are not read"), "{error}");
        }
        assert!(Interpreter::at(std::process::id(), 8, 8).is_err());
    }

    /// A process can have line tables of any number and length.
    #[test]
    fn line_tables_are_bounded_in_all() {
        let numbers = [0x030b_0000_u64];
        let mut python = Interpreter::at(std::process::id(), 8, std::ptr::from_ref(&numbers[0]) as u64).unwrap();
        let lines = vec![0; MAX_LINES];
        let code = Arc::new(Code { function: "f".into(), file: "f".into(), first_line: 1, lines });
        for n in 0..2 * (MAX_ALL_LINES / MAX_LINES) as u64 + 1 {
            python.remember((n, 0), &code);
            assert_eq!(python.line_bytes, python.codes.len() * MAX_LINES);
            assert!(python.line_bytes <= MAX_ALL_LINES);
        }
        assert_eq!(python.codes.len(), 1);
    }

    /// A process that is no Python has none.
    #[test]
    fn other_processes_have_no_interpreter() {
        let dir = ProcDir::open(std::process::id()).unwrap();
        assert!(Interpreter::find(&dir, &Maps::read(&dir).unwrap()).unwrap().is_none());
    }
}
