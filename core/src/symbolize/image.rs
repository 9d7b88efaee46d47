//! A clean copy, in memory, of what symbol lookup needs of an ELF file.
//!
//! The symbol reader maps its files and trusts their headers. A target's file can change or shrink while it is
//! mapped (which would kill us), claim a compressed section of an exabyte, or name another file for us to open. So
//! the reader never sees it: the few sections it needs are copied, bounded and decompressed, behind headers of our own.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use lzma_rust2::XzReader;
use object::elf;
use object::endian::Endianness;
use object::pod::Pod;
use object::read::elf::{CompressionHeader, FileHeader, SectionHeader};

use crate::error::{Error, ErrorKind, Result};
use crate::maps::elf::{ByClass, Sections, malformed, read_at, with_class};
use crate::sys;

/// Symbol tables and the names in them.
const SYMBOLS: [&[u8]; 4] = [b".symtab", b".strtab", b".dynsym", b".dynstr"];
/// Debug information that functions, lines and inlined calls are found by.
const DEBUG: [&[u8]; 10] = [
    b".debug_abbrev",
    b".debug_addr",
    b".debug_aranges",
    b".debug_info",
    b".debug_line",
    b".debug_line_str",
    b".debug_ranges",
    b".debug_rnglists",
    b".debug_str",
    b".debug_str_offsets",
];
/// Memory that the decoder of `.gnu_debugdata` may use, in KiB: enough for the largest level of xz.
const MAX_XZ_KIB: u32 = 128 << 10;
/// Sections start at multiples of this in the copy; the reader wants its tables aligned.
const ALIGN: u64 = 16;

/// The copy.
#[derive(Debug)]
pub(super) struct Image {
    /// A file in memory that is a complete ELF file of its own.
    pub(super) file: File,
    /// Its length in bytes.
    pub(super) bytes: u64,
    /// What came along of debug information.
    pub(super) debug: DebugInfo,
    /// True when the symbol table that strip removes is there.
    pub(super) symbol_table: bool,
    /// The file with separate debug information that the original names.
    pub(super) link: Option<DebugLink>,
}

/// What of debug information an [`Image`] has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DebugInfo {
    /// The file has none.
    None,
    /// All of it.
    Copied,
    /// Left out, because it is larger than the bound or broken.
    LeftOut,
}

/// Contents of `.gnu_debuglink`. Hostile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DebugLink {
    /// File name, without any folder.
    pub(super) name: OsString,
    /// CRC-32 of the whole file.
    pub(super) crc: u32,
}

impl DebugLink {
    /// What a file says; `None` when it names no other file or is not sound.
    pub(super) fn read(file: &File) -> Option<Self> {
        struct Reader;
        impl ByClass for Reader {
            type Output = Option<DebugLink>;

            fn read<H: FileHeader<Endian = Endianness> + Pod>(
                self,
                file: &File,
                header: &H,
            ) -> Result<Option<DebugLink>> {
                let endian = header.endian().map_err(|_| malformed("byte order"))?;
                Ok(debug_link::<H>(file, &Sections::<H::SectionHeader>::read(file, header)?, endian))
            }
        }
        with_class(file, Reader).ok().flatten()
    }
}

impl Image {
    /// Copies a file, at most `max_bytes` of it. When debug information does not fit, it is left out.
    ///
    /// # Errors
    /// When it is no sound ELF file of this machine's byte order, its symbol tables alone are too large, or reading or
    /// writing fails.
    pub(super) fn copy(file: &File, max_bytes: u64) -> Result<Self> {
        with_class(file, Copier { max_bytes })
    }

    /// Copies the symbol table that some distributions leave in stripped files, compressed (`.gnu_debugdata`); `None`
    /// when there is none.
    ///
    /// # Errors
    /// It is broken or larger than `max_bytes`.
    pub(super) fn mini(file: &File, max_bytes: u64) -> Result<Option<Self>> {
        let Some(packed) = with_class(file, MiniDebugInfo)? else { return Ok(None) };
        let unpacked = sys::memory_file().map_err(|e| Error::io("failed to make a file in memory", e))?;
        let failed = |e| Error::io("failed to decompress .gnu_debugdata", e);
        let mut to = At { file: &unpacked, at: 0 };
        // The decoder of hostile data may panic at worst.
        let decompress = AssertUnwindSafe(|| {
            let source = XzReader::new_mem_limit(io::BufReader::new(packed.read(file)), false, MAX_XZ_KIB);
            io::copy(&mut source.take(max_bytes + 1), &mut to)
        });
        let len =
            catch_unwind(decompress).unwrap_or_else(|_| Err(io::ErrorKind::InvalidData.into())).map_err(failed)?;
        if len > max_bytes {
            return Err(too_large(max_bytes));
        }
        Image::copy(&unpacked, max_bytes).map(Some)
    }
}

/// Finds `.gnu_debugdata`.
struct MiniDebugInfo;

impl ByClass for MiniDebugInfo {
    type Output = Option<Packed>;

    fn read<H: FileHeader<Endian = Endianness> + Pod>(self, file: &File, header: &H) -> Result<Self::Output> {
        let endian = header.endian().map_err(|_| malformed("byte order"))?;
        let sections = Sections::<H::SectionHeader>::read(file, header)?;
        let found = sections.headers.iter().find(|s| sections.name(endian, s) == b".gnu_debugdata");
        Ok(found.map(|s| Packed { offset: s.sh_offset(endian).into(), len: s.sh_size(endian).into() }))
    }
}

/// Where compressed data lies in a file.
struct Packed {
    offset: u64,
    len: u64,
}

impl Packed {
    fn read<'a>(&self, file: &'a File) -> Range<'a> {
        Range { file, at: self.offset, left: self.len }
    }
}

fn too_large(max_bytes: u64) -> Error {
    Error::new(ErrorKind::Io, format!("failed to read an ELF file: its symbols are larger than {max_bytes} bytes"))
}

/// One section to copy.
struct Part {
    name: &'static [u8],
    kind: u32,
    entry_size: u64,
    offset: u64,
    len: u64,
    /// How it is compressed, and its length then.
    compressed: Option<(elf::CompressionType, u64)>,
}

struct Copier {
    max_bytes: u64,
}

impl ByClass for Copier {
    type Output = Image;

    fn read<H: FileHeader<Endian = Endianness> + Pod>(self, file: &File, header: &H) -> Result<Image> {
        let endian = header.endian().map_err(|_| malformed("byte order"))?;
        if endian != Endianness::default() {
            return Err(malformed("byte order"));
        }
        let sections = Sections::<H::SectionHeader>::read(file, header)?;
        let symbols = parts::<H>(file, &sections, endian, &SYMBOLS)?;
        let symbol_table = symbols.iter().any(|p| p.name == b".symtab");
        let mut out = Writer::new(H::is_type_64_sized(), header.e_machine(endian).0, self.max_bytes)?;
        for part in &symbols {
            out.add(file, part)?;
        }
        let symbols_end = out.mark();
        // Symbol names are worth having even where debug information is broken or too large.
        let mut debug = DebugInfo::None;
        match parts::<H>(file, &sections, endian, &DEBUG) {
            Ok(parts) if parts.is_empty() => {}
            Ok(parts) => match parts.iter().try_for_each(|p| out.add(file, p)) {
                Ok(()) => debug = DebugInfo::Copied,
                Err(_) => {
                    out.rewind(symbols_end)?;
                    debug = DebugInfo::LeftOut;
                }
            },
            Err(_) => debug = DebugInfo::LeftOut,
        }
        let link = debug_link::<H>(file, &sections, endian);
        let (file, bytes) = out.finish()?;
        Ok(Image { file, bytes, debug, symbol_table, link })
    }
}

/// The first section of each of the names.
fn parts<H: FileHeader<Endian = Endianness>>(
    file: &File,
    sections: &Sections<H::SectionHeader>,
    endian: Endianness,
    names: &[&'static [u8]],
) -> Result<Vec<Part>> {
    let mut parts: Vec<Part> = Vec::new();
    for s in &sections.headers {
        let Some(name) = names.iter().find(|n| **n == sections.name(endian, s)) else { continue };
        // Files with separate debug information keep the other half's sections without contents.
        if s.sh_type(endian) == elf::SHT_NOBITS || parts.iter().any(|p| p.name == *name) {
            continue;
        }
        let (mut offset, mut len) = (s.sh_offset(endian).into(), s.sh_size(endian).into());
        let mut compressed = None;
        if s.sh_flags(endian).0 & elf::SHF_COMPRESSED.0 != 0 {
            let size = size_of::<H::CompressionHeader>() as u64;
            let data = read_at(file, offset, size, size)?;
            let (header, _) =
                object::pod::from_bytes::<H::CompressionHeader>(&data).map_err(|()| malformed("compression header"))?;
            compressed = Some((header.ch_type(endian), header.ch_size(endian).into()));
            offset = offset.saturating_add(size);
            len = len.checked_sub(size).ok_or_else(|| malformed("compression header"))?;
        }
        let (kind, entry_size) = (s.sh_type(endian).0, s.sh_entsize(endian).into());
        parts.push(Part { name, kind, entry_size, offset, len, compressed });
    }
    Ok(parts)
}

/// Reads `.gnu_debuglink`; `None` when there is none or it is malformed.
fn debug_link<H: FileHeader<Endian = Endianness>>(
    file: &File,
    sections: &Sections<H::SectionHeader>,
    endian: Endianness,
) -> Option<DebugLink> {
    let s = sections.headers.iter().find(|s| sections.name(endian, s) == b".gnu_debuglink")?;
    let data = read_at(file, s.sh_offset(endian).into(), s.sh_size(endian).into(), 4096).ok()?;
    let end = data.iter().position(|b| *b == 0)?;
    // Anything but a plain file name would let the file choose what we open.
    let name = &data[..end];
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
        return None;
    }
    let crc = data.get((end + 1).next_multiple_of(4)..)?.first_chunk()?;
    Some(DebugLink { name: OsString::from_vec(name.to_vec()), crc: u32::from_ne_bytes(*crc) })
}

/// A section header of the copy.
struct Written {
    name: &'static [u8],
    kind: u32,
    entry_size: u64,
    offset: u64,
    len: u64,
}

/// Writes an ELF file that consists of sections alone.
struct Writer {
    file: File,
    wide: bool,
    machine: u16,
    at: u64,
    max_bytes: u64,
    sections: Vec<Written>,
}

impl Writer {
    fn new(wide: bool, machine: u16, max_bytes: u64) -> Result<Self> {
        let file = sys::memory_file().map_err(|e| Error::io("failed to make a file in memory", e))?;
        let at = if wide { 64 } else { 52 };
        Ok(Writer { file, wide, machine, at, max_bytes, sections: Vec::new() })
    }

    /// Where it is now, for [`Writer::rewind`].
    fn mark(&self) -> (usize, u64) {
        (self.sections.len(), self.at)
    }

    /// Forgets everything that was added after the mark.
    fn rewind(&mut self, (sections, at): (usize, u64)) -> Result<()> {
        self.sections.truncate(sections);
        self.at = at;
        self.file.set_len(at).map_err(|e| Error::io("failed to shorten a file in memory", e))
    }

    /// Copies a section, decompressed.
    fn add(&mut self, from: &File, part: &Part) -> Result<()> {
        let offset = self.at.next_multiple_of(ALIGN);
        let len = part.compressed.map_or(part.len, |(_, len)| len);
        if offset.saturating_add(len) > self.max_bytes {
            return Err(too_large(self.max_bytes));
        }
        let source = Range { file: from, at: part.offset, left: part.len };
        let failed = |e| Error::io("failed to copy a section of an ELF file", e);
        // One byte more than promised is read, so that a section that grows beyond its promise is noticed.
        let mut source: Box<dyn Read + '_> = match part.compressed {
            None => Box::new(source),
            Some((elf::ELFCOMPRESS_ZLIB, _)) => Box::new(flate2::read::ZlibDecoder::new(source).take(len + 1)),
            Some((elf::ELFCOMPRESS_ZSTD, _)) => {
                Box::new(zstd::stream::read::Decoder::new(source).map_err(failed)?.take(len + 1))
            }
            Some(_) => return Err(malformed("compression type")),
        };
        let mut to = At { file: &self.file, at: offset };
        let copied = io::copy(&mut source, &mut to).map_err(failed)?;
        if copied != len {
            return Err(malformed("size of a section"));
        }
        self.at = offset + len;
        let Part { name, kind, entry_size, .. } = *part;
        self.sections.push(Written { name, kind, entry_size, offset, len });
        Ok(())
    }

    /// Adds the headers.
    fn finish(self) -> Result<(File, u64)> {
        let failed = |e| Error::io("failed to write a file in memory", e);
        // The first section and the first name are empty by definition.
        let mut names = vec![0u8];
        let mut table = self.section(0, 0, 0, 0, 0, 0);
        for s in &self.sections {
            let name = names.len() as u32;
            names.extend_from_slice(s.name);
            names.push(0);
            table.extend(self.section(name, s.kind, s.offset, s.len, s.entry_size, ALIGN));
        }
        let names_name = names.len() as u32;
        names.extend_from_slice(b".shstrtab\0");
        let names_at = self.at.next_multiple_of(ALIGN);
        let table_at = (names_at + names.len() as u64).next_multiple_of(ALIGN);
        table.extend(self.section(names_name, elf::SHT_STRTAB.0, names_at, names.len() as u64, 0, 1));
        self.file.write_all_at(&names, names_at).map_err(failed)?;
        self.file.write_all_at(&table, table_at).map_err(failed)?;
        self.file.write_all_at(&self.header(table_at), 0).map_err(failed)?;
        Ok((self.file, table_at + table.len() as u64))
    }

    /// A number of the class's word size.
    fn word(&self, to: &mut Vec<u8>, n: u64) {
        if self.wide {
            to.extend(n.to_ne_bytes());
        } else {
            // A copy of 4 GiB is far beyond the bound.
            to.extend((n as u32).to_ne_bytes());
        }
    }

    fn section(&self, name: u32, kind: u32, offset: u64, len: u64, entry_size: u64, align: u64) -> Vec<u8> {
        let mut h = Vec::with_capacity(64);
        h.extend(name.to_ne_bytes());
        h.extend(kind.to_ne_bytes());
        for word in [0, 0, offset, len] {
            self.word(&mut h, word);
        }
        // Link and info.
        h.extend([0; 8]);
        self.word(&mut h, align);
        self.word(&mut h, entry_size);
        h
    }

    fn header(&self, table_at: u64) -> Vec<u8> {
        let mut h = Vec::with_capacity(64);
        h.extend(elf::ELFMAG);
        let class = if self.wide { elf::ELFCLASS64 } else { elf::ELFCLASS32 };
        let data = if cfg!(target_endian = "little") { elf::ELFDATA2LSB } else { elf::ELFDATA2MSB };
        h.extend([class.0, data.0, 1]);
        h.resize(16, 0);
        h.extend(elf::ET_DYN.0.to_ne_bytes());
        h.extend(self.machine.to_ne_bytes());
        h.extend(1u32.to_ne_bytes());
        for word in [0, 0, table_at] {
            self.word(&mut h, word);
        }
        h.extend(0u32.to_ne_bytes());
        let (header, segment, section): (u16, u16, u16) = if self.wide { (64, 56, 64) } else { (52, 32, 40) };
        // The empty section, ours, and the one with the names.
        let count = self.sections.len() as u16 + 2;
        for short in [header, segment, 0, section, count, count - 1] {
            h.extend(short.to_ne_bytes());
        }
        h
    }
}

/// A part of a file, read from its start.
struct Range<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Range<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let n = self.file.read_at(&mut buffer[..want], self.at)?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

/// A file, written from a place on.
struct At<'a> {
    file: &'a File,
    at: u64,
}

impl Write for At<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let n = self.file.write_at(data, self.at)?;
        self.at += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
