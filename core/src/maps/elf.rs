//! The little that we need of an ELF file: build id, and which file offset is loaded where. Reads are bounded by
//! constants, whatever the headers claim.

use std::fs::File;
use std::os::unix::fs::FileExt;

use object::elf::{self, FileHeader32, FileHeader64};
use object::endian::Endianness;
use object::pod::Pod;
use object::read::elf::{FileHeader, NoteIterator, ProgramHeader, SectionHeader};

use crate::error::{Error, ErrorKind, Result};

/// Most bytes of program headers, section headers and notes that are read, each.
const MAX_TABLE: u64 = 4 << 20;
/// Most bytes of one note segment.
const MAX_NOTES: u64 = 64 << 10;
/// Longest build id that is believed, in bytes (20 is usual).
const MAX_BUILD_ID: usize = 64;

/// A range of the file that is loaded at a range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Offset in the file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Address in the file's own terms (before relocation).
    pub address: u64,
}

/// What an ELF file says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ElfInfo {
    /// GNU build id, lower-case hexadecimal; `None` when it has none.
    pub build_id: Option<String>,
    /// Loaded ranges, in the file's order.
    pub loads: Vec<Load>,
}

impl ElfInfo {
    /// Reads the headers and notes of a file.
    ///
    /// # Errors
    /// Kind [`ErrorKind::Io`] when it is no ELF file, cut short, or cannot be read.
    pub fn read(file: &File) -> Result<Self> {
        with_class(file, Info)
    }

    /// Address, in the file's own terms, of a file offset; `None` when that is not loaded.
    pub fn address_of(&self, file_offset: u64) -> Option<u64> {
        let load = self.loads.iter().find(|l| file_offset.checked_sub(l.offset).is_some_and(|d| d < l.len))?;
        load.address.checked_add(file_offset - load.offset)
    }
}

/// A reader that works on both classes of ELF files.
pub(crate) trait ByClass {
    /// What it makes of the file.
    type Output;
    /// Does it for one class.
    fn read<H: FileHeader<Endian = Endianness> + Pod>(self, file: &File, header: &H) -> Result<Self::Output>;
}

/// Reads the file header and calls `reader` for its class.
pub(crate) fn with_class<R: ByClass>(file: &File, reader: R) -> Result<R::Output> {
    let start = read_at(file, 0, 64, 64)?;
    if !start.starts_with(&elf::ELFMAG) {
        return Err(malformed("magic number"));
    }
    match start.get(4).copied().map(elf::FileClass) {
        Some(elf::ELFCLASS64) => {
            let header = FileHeader64::<Endianness>::parse(start.as_slice()).map_err(|_| malformed("header"))?;
            reader.read(file, header)
        }
        Some(elf::ELFCLASS32) => {
            let header = FileHeader32::<Endianness>::parse(start.as_slice()).map_err(|_| malformed("header"))?;
            reader.read(file, header)
        }
        _ => Err(malformed("class")),
    }
}

/// An error for a file that is no sound ELF file.
pub(crate) fn malformed(what: &str) -> Error {
    Error::new(ErrorKind::Io, format!("failed to read an ELF file: its {what} is malformed"))
}

/// Reads `len` bytes (less at the end of the file), which must be at most `max`.
pub(crate) fn read_at(file: &File, offset: u64, len: u64, max: u64) -> Result<Vec<u8>> {
    if len > max {
        return Err(malformed("size of a table"));
    }
    let mut data = vec![0; len as usize];
    let mut filled = 0;
    while filled < data.len() {
        match file.read_at(&mut data[filled..], offset.saturating_add(filled as u64)) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("failed to read an ELF file", e)),
        }
    }
    data.truncate(filled);
    Ok(data)
}

/// Reads a table of `count` entries of type `T`; an absent table (offset 0) has none.
fn read_table<T: Pod>(file: &File, offset: u64, count: usize, entry_size: u16, what: &str) -> Result<Vec<u8>> {
    if offset == 0 || count == 0 {
        return Ok(Vec::new());
    }
    if usize::from(entry_size) != size_of::<T>() {
        return Err(malformed(what));
    }
    let len = (count * size_of::<T>()) as u64;
    let data = read_at(file, offset, len, MAX_TABLE)?;
    if (data.len() as u64) < len { Err(malformed(what)) } else { Ok(data) }
}

/// The section headers and their names.
pub(crate) struct Sections<S> {
    /// Headers, in the file's order.
    pub(crate) headers: Vec<S>,
    names: Vec<u8>,
}

impl<S: SectionHeader<Endian = Endianness>> Sections<S> {
    /// Reads them; empty when the file has none.
    pub(crate) fn read<H>(file: &File, header: &H) -> Result<Self>
    where
        H: FileHeader<Endian = Endianness, SectionHeader = S>,
        S: Pod + Clone,
    {
        let endian = header.endian().map_err(|_| malformed("byte order"))?;
        let count = usize::from(header.e_shnum(endian));
        let table =
            read_table::<S>(file, header.e_shoff(endian).into(), count, header.e_shentsize(endian), "section table")?;
        let headers = to_vec::<S>(&table)?;
        let names = match headers.get(usize::from(header.e_shstrndx(endian).0)) {
            Some(s) => read_at(file, s.sh_offset(endian).into(), s.sh_size(endian).into(), MAX_TABLE)?,
            None => Vec::new(),
        };
        Ok(Sections { headers, names })
    }

    /// Name of a section; empty when it has none.
    pub(crate) fn name(&self, endian: Endianness, section: &S) -> &[u8] {
        let name = self.names.get(section.sh_name(endian) as usize..).unwrap_or_default();
        name.split(|b| *b == 0).next().unwrap_or_default()
    }
}

fn to_vec<T: Pod + Clone>(bytes: &[u8]) -> Result<Vec<T>> {
    object::pod::slice_from_all_bytes::<T>(bytes).map(<[T]>::to_vec).map_err(|()| malformed("table"))
}

struct Info;

impl ByClass for Info {
    type Output = ElfInfo;

    fn read<H: FileHeader<Endian = Endianness> + Pod>(self, file: &File, header: &H) -> Result<ElfInfo> {
        let endian = header.endian().map_err(|_| malformed("byte order"))?;
        let count = usize::from(header.e_phnum(endian));
        let offset = header.e_phoff(endian).into();
        let table =
            read_table::<H::ProgramHeader>(file, offset, count, header.e_phentsize(endian), "program header table")?;
        let mut info = ElfInfo::default();
        for segment in to_vec::<H::ProgramHeader>(&table)? {
            let (offset, len) = (segment.p_offset(endian).into(), segment.p_filesz(endian).into());
            match segment.p_type(endian) {
                elf::PT_LOAD if len > 0 => {
                    info.loads.push(Load { offset, len, address: segment.p_vaddr(endian).into() });
                }
                elf::PT_NOTE if info.build_id.is_none() => {
                    info.build_id = build_id::<H>(file, endian, offset, len, segment.p_align(endian));
                }
                _ => {}
            }
        }
        if info.build_id.is_none() {
            // Files with debug information alone keep the note as a section only.
            let sections = Sections::<H::SectionHeader>::read(file, header)?;
            for s in sections.headers.iter().filter(|s| s.sh_type(endian) == elf::SHT_NOTE) {
                let (offset, len) = (s.sh_offset(endian).into(), s.sh_size(endian).into());
                info.build_id = build_id::<H>(file, endian, offset, len, s.sh_addralign(endian));
                if info.build_id.is_some() {
                    break;
                }
            }
        }
        Ok(info)
    }
}

/// Names of a file's sections; empty when it has none.
///
/// # Errors
/// As [`ElfInfo::read`].
pub(crate) fn section_names(file: &File) -> Result<Vec<String>> {
    with_class(file, SectionNames)
}

struct SectionNames;

impl ByClass for SectionNames {
    type Output = Vec<String>;

    fn read<H: FileHeader<Endian = Endianness> + Pod>(self, file: &File, header: &H) -> Result<Vec<String>> {
        let endian = header.endian().map_err(|_| malformed("byte order"))?;
        let sections = Sections::<H::SectionHeader>::read(file, header)?;
        let name = |s: &H::SectionHeader| String::from_utf8_lossy(sections.name(endian, s)).into_owned();
        Ok(sections.headers.iter().map(name).collect())
    }
}

/// The GNU build id among the notes at a place of the file. Broken notes are as good as none.
fn build_id<H: FileHeader<Endian = Endianness>>(
    file: &File,
    endian: Endianness,
    offset: u64,
    len: u64,
    align: H::Word,
) -> Option<String> {
    let data = read_at(file, offset, len, MAX_NOTES).ok()?;
    let mut notes = NoteIterator::<H>::new(endian, align, data.as_slice()).ok()?;
    while let Ok(Some(note)) = notes.next() {
        let id = note.desc();
        if note.name() == elf::ELF_NOTE_GNU
            && note.n_type(endian) == elf::NT_GNU_BUILD_ID
            && (1..=MAX_BUILD_ID).contains(&id.len())
        {
            return Some(id.iter().map(|b| format!("{b:02x}")).collect());
        }
    }
    None
}
