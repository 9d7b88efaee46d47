//! Strings, bytes and line tables as CPython keeps them in memory. All of it is the target's and may be anything.

use crate::process;

/// Longest name that is kept, bytes.
const MAX_TEXT: usize = 1024;
/// In string and bytes objects: how long they are.
const LENGTH: usize = 16;
/// In string objects: what kind they are, as bits.
const STATE: usize = 32;
/// In bytes objects: what they hold.
pub(super) const BYTES_DATA: u64 = 32;

/// Where string objects have their characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Strings {
    /// Those of ASCII alone.
    pub(super) ascii: usize,
    /// Others.
    pub(super) compact: usize,
}

fn word(object: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(object.get(at..at + 8)?.try_into().ok()?))
}

impl Strings {
    /// The text of a string object; what is missing at its end is left out, and said by an ellipsis.
    pub(super) fn text(&self, object: &[u8]) -> Option<String> {
        let length = usize::try_from(word(object, LENGTH)?).ok()?;
        let state = *object.get(STATE)?;
        // interned: 2 bits, kind: 3 bits, compact, ascii
        let (kind, is_compact, is_ascii) = (usize::from(state >> 2 & 7), state & 1 << 5 != 0, state & 1 << 6 != 0);
        if !is_compact || !matches!(kind, 1 | 2 | 4) {
            return None;
        }
        let data = object.get(if is_ascii { self.ascii } else { self.compact }..)?;
        let there = length.min(data.len() / kind);
        let characters = data.chunks_exact(kind).take(there).map(|c| {
            let number = c.iter().rev().fold(0_u32, |n, byte| n << 8 | u32::from(*byte));
            char::from_u32(number).unwrap_or(char::REPLACEMENT_CHARACTER)
        });
        let mut text: String = characters.collect();
        if there < length {
            text.push('…');
        }
        Some(process::bounded(text.as_bytes(), MAX_TEXT, false))
    }
}

/// What a bytes object holds, as far as it is there, and how many bytes are missing.
pub(super) fn bytes(object: &[u8]) -> (&[u8], usize) {
    let data = object.get(BYTES_DATA as usize..).unwrap_or_default();
    let length = word(object, LENGTH).and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
    let there = length.min(data.len());
    (&data[..there], length - there)
}

/// The line of the instruction at a byte offset; `None` when it has none or the table ends before.
///
/// Format: `Objects/locations.md` of CPython. An entry begins with a byte that has its highest bit set, then 4 bits that say
/// what follows, and 3 bits with the number of instructions (of 2 bytes) less one.
pub(super) fn line_at(table: &[u8], first_line: u32, offset: usize) -> Option<u32> {
    let mut line = i64::from(first_line);
    let mut end = 0_usize;
    let mut rest = table;
    while let Some((&head, after)) = rest.split_first() {
        if head & 0x80 == 0 {
            return None;
        }
        let mut has_line = true;
        match head >> 3 & 15 {
            15 => has_line = false,
            13 | 14 => {
                let (delta, _) = signed(after)?;
                line = line.checked_add(delta)?;
            }
            code @ 10..=12 => line = line.checked_add(i64::from(code) - 10)?,
            _ => {}
        }
        // All other bytes of the entry have the highest bit clear.
        let next = after.iter().position(|b| b & 0x80 != 0).unwrap_or(after.len());
        rest = &after[next..];
        end = end.checked_add((usize::from(head & 7) + 1) * 2)?;
        if offset < end {
            return if has_line { u32::try_from(line).ok().filter(|l| *l > 0) } else { None };
        }
    }
    None
}

/// A number in 6-bit groups, the lowest first; its lowest bit is the sign. And how many bytes it had.
fn signed(bytes: &[u8]) -> Option<(i64, usize)> {
    let mut value = 0_i64;
    for (n, byte) in bytes.iter().enumerate().take(6) {
        value |= i64::from(byte & 63) << (6 * n);
        if byte & 64 == 0 {
            let half = value >> 1;
            return Some((if value & 1 == 0 { half } else { -half }, n + 1));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const NEWER: Strings = Strings { ascii: 40, compact: 56 };

    fn object(length: u64, state: u8, data_at: usize, data: &[u8]) -> Vec<u8> {
        let mut object = vec![0; data_at];
        object[LENGTH..LENGTH + 8].copy_from_slice(&length.to_le_bytes());
        object.extend(data);
        if data_at > STATE {
            object[STATE] = state;
        }
        object
    }

    const ASCII: u8 = 1 << 2 | 1 << 5 | 1 << 6;

    /// Names are not all ASCII, and of long ones only the beginning is there.
    #[test]
    fn strings_of_all_widths_are_read() {
        assert_eq!(NEWER.text(&object(3, ASCII, 40, b"abc")).as_deref(), Some("abc"));
        assert_eq!(NEWER.text(&object(9, ASCII, 40, b"abc")).as_deref(), Some("abc…"));
        assert_eq!(NEWER.text(&object(2, 1 << 2 | 1 << 5, 56, &[0xe9, b'x'])).as_deref(), Some("éx"));
        assert_eq!(NEWER.text(&object(1, 2 << 2 | 1 << 5, 56, &[0x3b, 0x04])).as_deref(), Some("л"));
        assert_eq!(NEWER.text(&object(1, 4 << 2 | 1 << 5, 56, &[0x00, 0xf6, 1, 0])).as_deref(), Some("😀"));
    }

    /// Whatever lies there, it is text or nothing.
    #[test]
    fn hostile_strings_do_no_harm() {
        assert_eq!(NEWER.text(&[]), None);
        assert_eq!(NEWER.text(&object(u64::MAX, ASCII, 40, b"")).as_deref(), Some("…"));
        assert_eq!(NEWER.text(&object(1, 3 << 2 | 1 << 5, 56, b"abc")), None);
        assert_eq!(NEWER.text(&object(1, 1 << 2, 40, b"abc")), None);
        assert_eq!(NEWER.text(&object(1, 4 << 2 | 1 << 5, 56, &[0xff; 4])).as_deref(), Some("\u{fffd}"));
        assert_eq!(bytes(&object(u64::MAX, 0, 32, b"ab")).0, b"ab");
        assert_eq!(bytes(&[1, 2]), (&[][..], 0));
    }

    /// Line numbers must be Python's own: each instruction of a module, compared with what `co_positions()` says.
    #[test]
    fn lines_are_those_that_python_says() {
        let script = "import sys\n\
            source = 'def f(a):\\n  x = (a +\\n    1)\\n  for i in range(3):\\n    x += i\\n' + '\\n' * 300 + '  return [\\n x for y in (1,)\\n]\\n'\n\
            code = compile(source, 'f.py', 'exec').co_consts[0]\n\
            lines = [p[0] for p in code.co_positions()]\n\
            print(sys.version_info >= (3, 11), code.co_firstlineno, code.co_linetable.hex())\n\
            print(*lines)";
        let Ok(out) = Command::new("python3").args(["-c", script]).output() else { return };
        let text = String::from_utf8(out.stdout).unwrap();
        let mut head = text.lines().next().unwrap_or("False 0 ").split(' ');
        if head.next() != Some("True") {
            return eprintln!("SKIP: python3 is older than 3.11");
        }
        let first_line = head.next().unwrap().parse().unwrap();
        let hex = head.next().unwrap();
        let table: Vec<u8> =
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
        let lines: Vec<Option<u32>> = text.lines().nth(1).unwrap().split(' ').map(|l| l.parse().ok()).collect();
        assert!(lines.len() > 20 && lines.contains(&Some(306)), "{lines:?}");
        for (n, line) in lines.iter().enumerate() {
            assert_eq!(line_at(&table, first_line, 2 * n), *line, "instruction {n}");
        }
        assert_eq!(line_at(&table, first_line, 2 * lines.len()), None);
    }

    /// A table that is cut off or scribbled over gives no line, or any, and no panic.
    #[test]
    fn hostile_line_tables_do_no_harm() {
        for length in 0..40 {
            for byte in 0..=255 {
                let table = vec![byte; length];
                line_at(&table, u32::MAX, 50);
            }
        }
        assert_eq!(line_at(&[0x80 | 13 << 3, 0x7f], 1, 0), None);
        assert_eq!(line_at(&[0x80 | 13 << 3, 1 << 1 | 1], 1, 0), None, "line 0 is none");
    }
}
