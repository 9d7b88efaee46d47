//! Static tracepoints of a file (USDT): where they are, and where their arguments lie.
//!
//! A tracepoint is a `nop` in the code and a note in `.note.stapsdt` that says where it is, how it is called, where the
//! arguments are at that instruction, and which counter in memory (the semaphore) says that somebody listens. Source:
//! `sys/sdt.h` of SystemTap.
//!
//! The file belongs to the traced side: everything is bounded, and an argument that is not understood is named, not
//! guessed.

use std::fs::File;
use std::path::Path;

use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use object::read::{ReadCache, ReadRef};
use object::{Endianness, elf};

use crate::Result;
use crate::elf::read_file;
use crate::operand::Operand;
use crate::placement::Placement;

/// The instruction of a tracepoint on x86-64.
const NOP: &[u8] = &[0x90];
/// Type of the notes.
const NT_STAPSDT: elf::NoteType = elf::NoteType(3);
/// Most tracepoints of one file that are looked at; the largest known (libjvm) have some 600.
const MAX_TRACEPOINTS: usize = 16_384;
/// Longest provider or name that is believed, bytes.
const MAX_NAME: usize = 256;
/// Most arguments of a tracepoint, as `sys/sdt.h` defines them.
const MAX_ARGUMENTS: usize = 12;

/// One place where a tracepoint is hit; a tracepoint may have many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tracepoint {
    /// `provider:name`.
    pub(crate) name: String,
    /// File offset of its instruction.
    pub(crate) offset: u64,
    /// File offset of the counter to raise while somebody listens; `None` when it is always live.
    pub(crate) semaphore: Option<u64>,
    /// Its arguments; what cannot be read is there as text.
    pub(crate) arguments: Vec<std::result::Result<Operand, String>>,
    /// The instruction is one that kernels emulate.
    emulated: bool,
}

impl Tracepoint {
    /// Where the probe goes: nowhere else.
    pub(crate) fn placement(&self) -> Placement {
        if self.emulated { Placement { emulated: true, reason: None, ..Placement::ENTRY } } else { Placement::ENTRY }
    }
}

/// The tracepoints of a file.
///
/// # Errors
/// [`crate::ErrorKind::Elf`] when the file cannot be opened or is not a sane 64-bit ELF file.
pub(crate) fn read_tracepoints(path: &Path) -> Result<Vec<Tracepoint>> {
    read_file(path, |data: &ReadCache<File>| tracepoints(data))
}

/// Names (`provider:name`) of the tracepoints of a file.
///
/// # Errors
/// As for a file's symbols, see [`crate::elf::read_symbols`].
pub fn read_names(path: &Path) -> Result<Vec<String>> {
    Ok(read_tracepoints(path)?.into_iter().map(|t| t.name).collect())
}

fn tracepoints<'a, R: ReadRef<'a>>(data: R) -> object::read::Result<Vec<Tracepoint>> {
    let header = elf::FileHeader64::<Endianness>::parse(data)?;
    let endian = header.endian()?;
    let segments = header.program_headers(endian, data)?;
    let sections = header.sections(endian, data)?;
    // What prelinking moved since the notes were written.
    let base = sections.section_by_name(endian, b".stapsdt.base").map(|(_, s)| s.sh_addr(endian));
    let offset_of = |address: u64| {
        let segment = segments.iter().find(|s| {
            s.p_type(endian) == elf::PT_LOAD
                && address.checked_sub(s.p_vaddr(endian)).is_some_and(|into| into < s.p_filesz(endian))
        })?;
        segment.p_offset(endian).checked_add(address - segment.p_vaddr(endian))
    };
    let mut found = Vec::new();
    let Some((_, section)) = sections.section_by_name(endian, b".note.stapsdt") else { return Ok(found) };
    let Some(mut notes) = section.notes(endian, data)? else { return Ok(found) };
    while let Ok(Some(note)) = notes.next() {
        if note.name() != b"stapsdt" || note.n_type(endian) != NT_STAPSDT || found.len() == MAX_TRACEPOINTS {
            continue;
        }
        let Some(raw) = RawNote::parse(note.desc()) else { continue };
        let moved = base.map_or(0, |base| base.wrapping_sub(raw.base));
        let Some(offset) = offset_of(raw.address.wrapping_add(moved)) else { continue };
        let semaphore = (raw.semaphore != 0).then(|| offset_of(raw.semaphore.wrapping_add(moved)));
        // A counter that is not in the file cannot be raised: the tracepoint would stay silent.
        let Some(semaphore) = semaphore.map_or(Some(None), |s| s.map(Some)) else { continue };
        let arguments = raw.arguments.split_ascii_whitespace().take(MAX_ARGUMENTS).map(parse_argument).collect();
        let emulated = data.read_bytes_at(offset, 1).is_ok_and(|code| code == NOP);
        found.push(Tracepoint { name: raw.name, offset, semaphore, arguments, emulated });
    }
    Ok(found)
}

/// A note, taken apart.
struct RawNote {
    address: u64,
    base: u64,
    semaphore: u64,
    name: String,
    arguments: String,
}

impl RawNote {
    fn parse(note: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u64::from_le_bytes(*note.get(at..)?.first_chunk()?));
        let mut texts = note.get(24..)?.split(|b| *b == 0);
        let mut text = || std::str::from_utf8(texts.next()?).ok();
        let (provider, name, arguments) = (text()?, text()?, text()?);
        if provider.is_empty() || name.is_empty() || provider.len() + name.len() > MAX_NAME {
            return None;
        }
        Some(RawNote {
            address: word(0)?,
            base: word(8)?,
            semaphore: word(16)?,
            name: format!("{provider}:{name}"),
            arguments: arguments.to_owned(),
        })
    }
}

/// Registers of x86-64 by the processor's numbers: 64, 32, 16 and 8 bits.
const REGISTERS: [[&str; 4]; 16] = [
    ["rax", "eax", "ax", "al"],
    ["rcx", "ecx", "cx", "cl"],
    ["rdx", "edx", "dx", "dl"],
    ["rbx", "ebx", "bx", "bl"],
    ["rsp", "esp", "sp", "spl"],
    ["rbp", "ebp", "bp", "bpl"],
    ["rsi", "esi", "si", "sil"],
    ["rdi", "edi", "di", "dil"],
    ["r8", "r8d", "r8w", "r8b"],
    ["r9", "r9d", "r9w", "r9b"],
    ["r10", "r10d", "r10w", "r10b"],
    ["r11", "r11d", "r11w", "r11b"],
    ["r12", "r12d", "r12w", "r12b"],
    ["r13", "r13d", "r13w", "r13b"],
    ["r14", "r14d", "r14w", "r14b"],
    ["r15", "r15d", "r15w", "r15b"],
];

/// Parses `8@%rdi`, `-4@$5`, `4@-20(%rbp)`: a width in bytes, negative when signed, and an operand as the assembler
/// writes it.
fn parse_argument(text: &str) -> std::result::Result<Operand, String> {
    let failed = || format!("argument \"{}\" is of a form that is not known here", text.escape_debug());
    let (width, place) = text.split_once('@').ok_or_else(failed)?;
    let width: i8 = width.parse().map_err(|_| failed())?;
    let (bytes, signed) = (width.unsigned_abs(), width < 0);
    if !matches!(bytes, 1 | 2 | 4 | 8) || !cfg!(target_arch = "x86_64") {
        return Err(failed());
    }
    let register = |name: &str| {
        let number = REGISTERS.iter().position(|names| names.contains(&name))?;
        u8::try_from(number).ok()
    };
    if let Some(name) = place.strip_prefix('%') {
        let number = register(name).ok_or_else(failed)?;
        return Ok(Operand::Part { number, bytes, signed });
    }
    if let Some(constant) = place.strip_prefix('$') {
        let value = number(constant).ok_or_else(failed)?;
        return Ok(Operand::Constant(value.cast_unsigned()));
    }
    let (offset, base) = place.strip_suffix(')').and_then(|p| p.split_once("(%")).ok_or_else(failed)?;
    let offset = if offset.is_empty() { Some(0) } else { number(offset) };
    // The address is the whole register.
    let base = register(base).filter(|n| REGISTERS[usize::from(*n)][0] == base);
    match (offset, base) {
        (Some(offset), Some(number)) => Ok(Operand::Memory { number, offset, bytes, signed }),
        _ => Err(failed()),
    }
}

/// A decimal or hexadecimal number as assemblers write it.
fn number(text: &str) -> Option<i64> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let value = match digits.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok()?,
        None => digits.parse::<u64>().ok()?,
    };
    Some(if negative { value.cast_signed().wrapping_neg() } else { value.cast_signed() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What compilers write for arguments in registers, constants and memory.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn arguments_are_understood() {
        let part = |number, bytes, signed| Ok(Operand::Part { number, bytes, signed });
        let memory = |number, offset, bytes, signed| Ok(Operand::Memory { number, offset, bytes, signed });
        assert_eq!(parse_argument("8@%rdi"), part(7, 8, false));
        assert_eq!(parse_argument("-4@%eax"), part(0, 4, true));
        assert_eq!(parse_argument("2@%r9w"), part(9, 2, false));
        assert_eq!(parse_argument("1@%sil"), part(6, 1, false));
        assert_eq!(parse_argument("-4@$-5"), Ok(Operand::Constant((-5_i64).cast_unsigned())));
        assert_eq!(parse_argument("8@$0x10"), Ok(Operand::Constant(16)));
        assert_eq!(parse_argument("8@-24(%rbp)"), memory(5, -24, 8, false));
        assert_eq!(parse_argument("-8@(%r12)"), memory(12, 0, 8, true));
    }

    /// A guess would count garbage: what is not understood is an error that shows it.
    #[test]
    fn other_arguments_are_named() {
        let others = ["", "8", "@", "8@", "3@%rdi", "8f@%xmm0", "8@%xmm0", "8@%", "8@$", "8@$x", "8@counter(%rip)"];
        let more =
            ["8@(%rax,%rbx,8)", "8@8(%eax)", "8@8(%rax", "8@%fs:(%rax)", "16@%rdi", "8@99999999999999999999(%rax)"];
        for text in others.into_iter().chain(more) {
            let error = parse_argument(text).unwrap_err();
            assert!(error.contains(&format!("\"{text}\"")), "{error}");
        }
    }

    /// Notes are as hostile as the file.
    #[test]
    fn broken_notes_are_left_out() {
        let mut note = vec![0; 24];
        assert!(RawNote::parse(&note).is_none());
        note.extend(b"provider\0name\x00");
        assert_eq!(RawNote::parse(&note).map(|n| n.arguments), Some(String::new()));
        note.extend(b"8@%rdi\0");
        let whole = RawNote::parse(&note).unwrap();
        assert_eq!((whole.name.as_str(), whole.arguments.as_str()), ("provider:name", "8@%rdi"));
        for cut in 0..36 {
            let _ = RawNote::parse(&note[..cut]);
        }
        assert!(RawNote::parse(&note[..30]).is_none());
        let mut nameless = vec![0; 24];
        nameless.extend(b"\0name\0\0");
        assert!(RawNote::parse(&nameless).is_none());
    }
}
