//! Symbols of a file that a process has mapped, as file offsets.
//!
//! The file belongs to the traced side: it may be anything. Only the tables that are needed are read, nothing is
//! trusted to be in range, and sizes are bounded.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use object::read::elf::{Dyn, FileHeader, ProgramHeader, SectionHeader, SectionTable, Sym};
use object::read::{ReadCache, ReadRef, SectionIndex, StringTable};
use object::{Endianness, elf};

use crate::{Error, ErrorKind, Result};

/// Symbol tables with more entries than this are refused (the largest known executables have some 5 million).
const MAX_SYMBOLS: usize = 20_000_000;
/// The same for tables that are searched for variables (a Python library has some 2,000 symbols).
const MAX_VARIABLES: usize = 1_000_000;
/// Tables of names are refused that are longer than so many bytes for each of the most symbols.
const NAME_BYTES: usize = 64;
/// More sections are none (programs have some 40).
const MAX_SECTIONS: u32 = 65_536;
/// Sections that only the Go linker makes.
const GO_SECTIONS: [&[u8]; 2] = [b".note.go.buildid", b".gopclntab"];
/// A function's code is read up to this size for placement.
const MAX_CODE: u64 = 64 * 1024;

type Header = elf::FileHeader64<Endianness>;
type Sections<'a, R> = SectionTable<'a, Header, R>;
/// Symbols and their names.
type SymbolTable<'a> = (&'a [elf::Sym64<Endianness>], StringTable<'a>);

/// A function in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Offset of its first byte in the file.
    pub offset: u64,
    /// Its machine code, from the first byte; empty when the symbol has no size.
    pub code: Vec<u8>,
}

/// What the wanted names are in a file.
#[derive(Clone, Debug, Default)]
pub struct Symbols {
    /// By name: the functions that have it (several versions of a symbol may exist). Names without one are absent.
    pub functions: HashMap<String, Vec<Function>>,
    /// Those of the names that other files can use (dynamic symbols).
    pub exported: HashSet<String>,
    /// True when there are no symbols at all, as in a stripped static binary.
    pub stripped: bool,
    /// True when the Go compiler made it.
    pub go: bool,
}

/// Looks `names` up in the dynamic and the full symbol table of `path`, and in the full symbol table of `debug`, the
/// file with its debug information, where there is one.
///
/// # Errors
/// [`ErrorKind::Elf`] when the file cannot be opened or is not a sane 64-bit ELF file. A file with debug information
/// that is not sound adds nothing.
pub fn read_symbols(path: &Path, debug: Option<&Path>, names: &[&str]) -> Result<Symbols> {
    read_file(path, |data| {
        let mut symbols = read_functions(data, names)?;
        if let Some(debug) = debug
            && let Err(e) = read_file(debug, |from| add_functions(&mut symbols, data, from, names))
        {
            tracing::debug!("no symbols from debug information: {e}");
        }
        Ok(symbols)
    })
}

/// The file's own name (`DT_SONAME`); `None` when it has none.
///
/// # Errors
/// As [`read_symbols`].
pub fn read_soname(path: &Path) -> Result<Option<String>> {
    read_file(path, |data| read_dynamic_name(data))
}

/// Opens `path` and has `read` look at it.
pub(crate) fn read_file<T>(path: &Path, read: impl FnOnce(&ReadCache<File>) -> object::read::Result<T>) -> Result<T> {
    let fail = |why: String| Error::new(ErrorKind::Elf, format!("failed to read symbols of {}: {why}", path.display()));
    // O_NONBLOCK: a path that a hostile process made a FIFO must not block us.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
        .open(path)
        .map_err(|e| fail(e.to_string()))?;
    let meta = file.metadata().map_err(|e| fail(e.to_string()))?;
    if meta.mode() & libc::S_IFMT != libc::S_IFREG {
        return Err(fail("it is not a regular file".into()));
    }
    let cache = ReadCache::new(file);
    read(&cache).map_err(|e| fail(e.to_string()))
}

/// Addresses, in the file's own terms, of variables that other files can use.
///
/// # Errors
/// As [`read_symbols`].
pub fn read_variables(path: &Path, names: &[&str]) -> Result<HashMap<String, u64>> {
    read_file(path, |data| find_variables(data, names))
}

fn find_variables<'a, R: ReadRef<'a>>(data: R, names: &[&str]) -> object::read::Result<HashMap<String, u64>> {
    let header = elf::FileHeader64::<Endianness>::parse(data)?;
    let endian = header.endian()?;
    let mut found = HashMap::new();
    let sections = sections_of(header, endian, data)?;
    let Some((symbols, strings)) = symbols_of(&sections, endian, data, elf::SHT_DYNSYM, MAX_VARIABLES)? else {
        return Ok(found);
    };
    for symbol in symbols.iter().filter(|s| s.st_type() == elf::STT_OBJECT && !s.is_undefined(endian)) {
        let Ok(name) = symbol.name(endian, strings) else { continue };
        if let Some(name) = names.iter().find(|n| n.as_bytes() == name) {
            found.insert((*name).to_owned(), symbol.st_value(endian));
        }
    }
    Ok(found)
}

/// The table of sections; as if there were none when it is larger than one can be.
fn sections_of<'a, R: ReadRef<'a>>(
    header: &Header,
    endian: Endianness,
    data: R,
) -> object::read::Result<Sections<'a, R>> {
    if header.shnum(endian, data)? > MAX_SECTIONS {
        return Ok(Sections::default());
    }
    header.sections(endian, data)
}

/// A symbol table and its strings, each read at once: name by name, each would be read and kept for itself. `None` without
/// symbols, and when it has more than `most` or longer names than so many could have.
fn symbols_of<'a, R: ReadRef<'a>>(
    sections: &Sections<'a, R>,
    endian: Endianness,
    data: R,
    kind: elf::SectionType,
    most: usize,
) -> object::read::Result<Option<SymbolTable<'a>>> {
    let Some(section) = sections.iter().find(|s| s.sh_type(endian) == kind) else { return Ok(None) };
    let strings = sections.section(SectionIndex(section.sh_link(endian) as usize))?;
    let is_long = |section: &elf::SectionHeader64<Endianness>, each: usize| {
        section.sh_size(endian) > most.saturating_mul(each) as u64
    };
    // A sparse file may be larger than memory: what it says must be checked before it is read.
    if is_long(section, size_of::<elf::Sym64<Endianness>>()) || is_long(strings, NAME_BYTES) {
        return Ok(None);
    }
    let symbols: &[elf::Sym64<Endianness>] = section.data_as_array(endian, data)?;
    let strings = strings.data(endian, data)?;
    Ok((!symbols.is_empty()).then(|| (symbols, StringTable::new(strings, 0, strings.len() as u64))))
}

fn read_dynamic_name<'a, R: ReadRef<'a>>(data: R) -> object::read::Result<Option<String>> {
    let header = elf::FileHeader64::<Endianness>::parse(data)?;
    let endian = header.endian()?;
    let sections = sections_of(header, endian, data)?;
    for section in sections.iter() {
        let Some((dynamic, link)) = section.dynamic(endian, data)? else { continue };
        let strings = sections.strings(endian, data, link)?;
        let entry = dynamic.iter().find(|d| d.d_tag(endian) == elf::DT_SONAME);
        let name = entry.and_then(|d| strings.get(u32::try_from(d.d_val(endian)).ok()?).ok());
        return Ok(name.map(|n| String::from_utf8_lossy(n).into_owned()));
    }
    Ok(None)
}

fn read_functions<'a, R: ReadRef<'a>>(data: R, names: &[&str]) -> object::read::Result<Symbols> {
    let header = elf::FileHeader64::<Endianness>::parse(data)?;
    let endian = header.endian()?;
    let sections = sections_of(header, endian, data)?;
    let go = sections.iter().any(|s| sections.section_name(endian, s).is_ok_and(|name| GO_SECTIONS.contains(&name)));
    let mut out = Symbols { stripped: true, go, ..Symbols::default() };
    add_functions(&mut out, data, data, names)?;
    Ok(out)
}

/// Adds what the symbol tables of `tables` say about the code of `data`: the same file or its debug information.
fn add_functions<'a, 'b, R: ReadRef<'a>, T: ReadRef<'b>>(
    out: &mut Symbols,
    data: R,
    tables: T,
    names: &[&str],
) -> object::read::Result<()> {
    let code = elf::FileHeader64::<Endianness>::parse(data)?;
    let segments = code.program_headers(code.endian()?, data)?;
    let header = elf::FileHeader64::<Endianness>::parse(tables)?;
    let endian = header.endian()?;
    let sections = sections_of(header, endian, tables)?;
    let wanted: HashSet<&[u8]> = names.iter().map(|n| n.as_bytes()).collect();
    for kind in [elf::SHT_DYNSYM, elf::SHT_SYMTAB] {
        let Some((symbols, strings)) = symbols_of(&sections, endian, tables, kind, MAX_SYMBOLS)? else { continue };
        for symbol in symbols {
            if symbol.is_undefined(endian) || symbol.st_type() != elf::STT_FUNC || symbol.st_value(endian) == 0 {
                continue;
            }
            out.stripped = false;
            let Ok(name) = symbol.name(endian, strings) else { continue };
            if !wanted.contains(name) {
                continue;
            }
            let Some(function) = locate(segments, endian, data, symbol) else { continue };
            let name = String::from_utf8_lossy(name).into_owned();
            if kind == elf::SHT_DYNSYM {
                out.exported.insert(name.clone());
            }
            let known = out.functions.entry(name).or_default();
            if known.iter().all(|f: &Function| f.offset != function.offset) {
                known.push(function);
            }
        }
    }
    Ok(())
}

/// Where a symbol's code lies in the file; `None` when it is in no executable segment.
fn locate<'a, R: ReadRef<'a>>(
    segments: &[elf::ProgramHeader64<Endianness>],
    endian: Endianness,
    data: R,
    symbol: &elf::Sym64<Endianness>,
) -> Option<Function> {
    let address = symbol.st_value(endian);
    let segment = segments.iter().find(|s| {
        s.p_type(endian) == elf::PT_LOAD
            && s.p_flags(endian).0 & elf::PF_X.0 != 0
            && address >= s.p_vaddr(endian)
            && address - s.p_vaddr(endian) < s.p_filesz(endian)
    })?;
    let into = address - segment.p_vaddr(endian);
    let offset = segment.p_offset(endian).checked_add(into)?;
    let size = symbol.st_size(endian).min(segment.p_filesz(endian) - into).min(MAX_CODE);
    let code = data.read_bytes_at(offset, size).map(<[u8]>::to_vec).unwrap_or_default();
    Some(Function { offset, code })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A FIFO in place of a library must neither block nor be read.
    #[test]
    fn a_fifo_is_refused_at_once() {
        let dir = std::env::temp_dir().join(format!("memleak-elf-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let fifo = dir.join("libc.so.6");
        let name = std::ffi::CString::new(fifo.to_str().unwrap()).unwrap();
        // SAFETY: `name` is a valid C string.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let message = read_symbols(&fifo, None, &["malloc"]).unwrap_err().to_string();
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(message.contains("not a regular file"), "{message}");
    }

    /// A return probe on a Go function crashes the program, so Go programs must be recognised; others must not be
    /// taken for one.
    #[test]
    fn go_programs_are_recognised_by_their_sections() {
        let dir = std::env::temp_dir().join(format!("memleak-go-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let source = dir.join("go.c");
        let note = "__attribute__((section(\".note.go.buildid\"))) const char id[] = \"x\";";
        std::fs::write(&source, format!("{note} int main(void) {{ return id[0] == 0; }}")).unwrap();
        let program = dir.join("go");
        let status = std::process::Command::new("gcc").arg(&source).arg("-o").arg(&program).status().unwrap();
        assert!(status.success());
        let symbols = read_symbols(&program, None, &["main"]).unwrap();
        let own = read_symbols(Path::new("/proc/self/exe"), None, &["main"]).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(symbols.go && symbols.functions.contains_key("main"), "{symbols:?}");
        assert!(!own.go);
    }

    /// A sparse file costs nothing and says that it has more symbols than there is memory.
    #[test]
    fn tables_beyond_all_reason_are_not_read() {
        let mut file = std::fs::read("/proc/self/exe").unwrap();
        let names = ["main"];
        let before = read_functions(file.as_slice(), &names).unwrap();
        assert!(!before.stripped && before.functions.contains_key("main"));
        let word = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
        let (table, count) = (word(40), usize::from(u16::from_le_bytes([file[60], file[61]])));
        for section in 0..count {
            let at = table + section * 64;
            let kind = u32::from_le_bytes(file[at + 4..at + 8].try_into().unwrap());
            if kind == elf::SHT_SYMTAB.0 || kind == elf::SHT_DYNSYM.0 {
                file[at + 32..at + 40].copy_from_slice(&(24 * 20_000_001_u64).to_le_bytes());
            }
        }
        // Read, it would be an error: the file is not that large.
        assert!(read_functions(file.as_slice(), &names).unwrap().stripped);
        assert!(find_variables(file.as_slice(), &names).unwrap().is_empty());
    }

    /// Truncated and scribbled ELF files are errors or empty results, never panics.
    #[test]
    fn damaged_files_do_not_panic() {
        let whole = std::fs::read("/proc/self/exe").unwrap();
        for cut in [0, 3, 16, 63, 64, 100, 1000, whole.len() / 2] {
            let _ = read_functions(&whole[..cut], &["main"]);
        }
        let mut scribbled = whole[..4096.min(whole.len())].to_vec();
        for at in 16..scribbled.len() {
            scribbled[at] ^= 0xff;
            let _ = read_functions(scribbled.as_slice(), &["main"]);
            let _ = read_dynamic_name(scribbled.as_slice());
            let _ = find_variables(scribbled.as_slice(), &["main"]);
            scribbled[at] ^= 0xff;
        }
    }
}
