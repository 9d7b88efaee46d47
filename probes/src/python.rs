//! Frames of Python functions, as `bpf/python.bpf.h` reads them from the interpreter of a process.

use libbpf_rs::{MapCore, MapFlags};

use crate::types::{
    Plain, bytes_of, from_bytes, memleak_python, memleak_python_code, memleak_python_code_key,
    memleak_python_got as got, memleak_python_stack,
};
use crate::{Error, Result, SiteKey};

/// Where the Python interpreter of a process keeps its frames. Offsets in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Address of the pointer to the first interpreter state.
    pub interpreters: u64,
    /// Interpreter state: first thread state.
    pub threads: u32,
    /// Thread state: the next one.
    pub thread_next: u32,
    /// Thread state: `pthread_self()`.
    pub thread_id: u32,
    /// Thread state: newest frame, or with `frame_holder` what holds it.
    pub thread_frame: u32,
    /// In what holds it: newest frame.
    pub frame_holder: Option<u32>,
    /// Code object: line of its definition.
    pub code_first_line: u32,
    /// Code object: names of file, function (short and qualified), and the line table, one after the other.
    pub code_names: u32,
    /// Frame: code object, previous frame, instruction; multiples of 8 below 72.
    pub frame_code: u8,
    /// See `frame_code`.
    pub frame_previous: u8,
    /// See `frame_code`.
    pub frame_instruction: u8,
    /// Frame: the byte that marks the outermost frame of a call of the interpreter; below 72.
    pub frame_entry: u8,
    /// Its value there, for an outermost frame that stands for no function; `None`: any but 0, and it does stand for one.
    pub entry_value: Option<u8>,
}

/// A call of a Python function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PythonFrame {
    /// Address of its code object.
    pub code: u64,
    /// Address of its line table.
    pub lines: u64,
    /// Address of the instruction.
    pub instruction: u64,
    /// It is the outermost one of a call of the interpreter.
    pub is_entry: bool,
}

/// What a code object says of itself: copies of the interpreter's objects, of which the end may be missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PythonCode {
    /// Line of its definition.
    pub first_line: Option<u32>,
    /// The string object with the name of its file.
    pub file: Option<Vec<u8>>,
    /// The string object with its qualified name.
    pub name: Option<Vec<u8>>,
    /// The bytes object with its line table.
    pub lines: Option<Vec<u8>>,
}

impl Layout {
    pub(crate) fn to_raw(self) -> memleak_python {
        let flags = self.frame_entry / 8;
        memleak_python {
            interpreters: self.interpreters,
            threads: self.threads,
            thread_next: self.thread_next,
            thread_id: self.thread_id,
            thread_frame: self.thread_frame,
            frame_holder: self.frame_holder.unwrap_or(u32::MAX),
            code_first_line: self.code_first_line,
            code_names: self.code_names,
            frame_code: self.frame_code / 8,
            frame_previous: self.frame_previous / 8,
            frame_instruction: self.frame_instruction / 8,
            frame_flags: flags,
            flags_shift: self.frame_entry % 8 * 8,
            flags_entry: self.entry_value.unwrap_or(0),
            entry_is_frame: self.entry_value.is_none().into(),
            pad: [0; 5],
        }
    }
}

fn read<K: Plain, V: Plain>(map: &dyn MapCore, key: &K, what: &str) -> Result<Option<V>> {
    let found = map.lookup(bytes_of(key), MapFlags::ANY).map_err(|e| Error::bpf(what, &e))?;
    Ok(found.and_then(|bytes| from_bytes::<V>(&bytes)))
}

/// The Python frames of a stack, innermost first, and whether there were more; `None` when it has none.
pub(crate) fn read_frames(map: &dyn MapCore, key: SiteKey) -> Result<Option<(Vec<PythonFrame>, bool)>> {
    let Some(raw) = read::<_, memleak_python_stack>(map, &key.to_raw(), "read the Python frames of a call stack")?
    else {
        return Ok(None);
    };
    let count = (raw.count as usize).min(raw.frames.len());
    let frame = |f: &crate::types::memleak_python_frame| PythonFrame {
        code: f.code,
        lines: f.lines,
        instruction: f.instruction & !1,
        is_entry: f.instruction & 1 != 0,
    };
    Ok(Some((raw.frames[..count].iter().map(frame).collect(), raw.cut != 0)))
}

/// What is known of the code object of a frame.
pub(crate) fn read_code(map: &dyn MapCore, instance: u32, frame: &PythonFrame) -> Result<Option<PythonCode>> {
    let key = memleak_python_code_key { code: frame.code, lines: frame.lines, instance: instance.into() };
    let raw: Option<memleak_python_code> = read(map, &key, "read the name of a Python function")?;
    Ok(raw.map(|raw| {
        let has = |part: got| raw.got & part.0 != 0;
        PythonCode {
            first_line: has(got::PYTHON_FIRST_LINE).then_some(raw.first_line),
            file: has(got::PYTHON_FILE).then(|| raw.file.to_vec()),
            name: has(got::PYTHON_NAME).then(|| raw.name.to_vec()),
            lines: has(got::PYTHON_LINES).then(|| raw.lines.to_vec()),
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel side takes the frame apart in words, and the mark out of one of them.
    #[test]
    fn offsets_of_a_frame_become_words() {
        let layout = Layout {
            interpreters: 0x1000,
            threads: 16,
            thread_next: 8,
            thread_id: 152,
            thread_frame: 56,
            frame_holder: Some(8),
            code_first_line: 72,
            code_names: 112,
            frame_code: 32,
            frame_previous: 48,
            frame_instruction: 56,
            frame_entry: 68,
            entry_value: None,
        };
        let raw = layout.to_raw();
        assert_eq!((raw.frame_code, raw.frame_previous, raw.frame_instruction), (4, 6, 7));
        assert_eq!((raw.frame_flags, raw.flags_shift, raw.flags_entry, raw.entry_is_frame), (8, 32, 0, 1));
        let newer = Layout { frame_holder: None, frame_entry: 70, entry_value: Some(3), ..layout }.to_raw();
        assert_eq!((newer.frame_holder, newer.frame_flags, newer.flags_shift), (u32::MAX, 8, 48));
        assert_eq!((newer.flags_entry, newer.entry_is_frame), (3, 0));
    }
}
