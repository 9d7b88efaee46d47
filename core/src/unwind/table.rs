//! The unwind table of one ELF file: how to find the caller's frame, by address.
//!
//! Made from `.eh_frame`, which every program carries for C++ exceptions, or from `.debug_frame`. Of the rules that
//! these can express only the common ones are kept, those that need no more than rsp and rbp ([`Rule`]); the others
//! are marked as not supported. The file is hostile: the size of what is read, the number of rows and the time are
//! bounded, and a file beyond them is refused with a reason.

use std::collections::HashMap;
use std::fs::File;
use std::time::{Duration, Instant};

use gimli::{
    BaseAddresses, CfaRule, CieOrFde, CommonInformationEntry, EndianSlice, LittleEndian, Register, RegisterRule,
    UnwindContext, UnwindExpression, UnwindSection,
};
use memleak_probes::unwind::{Cfa, Rbp, Row, Rule};
use object::elf::{self, FileHeader64, ProgramHeader64, SectionHeader64};
use object::endian::Endianness;
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use sha2::{Digest, Sha256};

use crate::maps::elf::{Sections, malformed, read_at};
use crate::{Error, ErrorKind, Result};

/// Largest section that is read. Chromium's has 20 MB.
const MAX_SECTION: u64 = 192 << 20;
/// Most rows of a table: 64 MB.
const MAX_ROWS: usize = 8 << 20;
/// By then a table must be made.
const MAX_TIME: Duration = Duration::from_secs(20);
/// Most bytes of program headers.
const MAX_PROGRAM_HEADERS: u64 = 1 << 20;
/// Gaps between functions that are shorter hold padding only.
const PADDING: u64 = 16;

/// Registers by their DWARF numbers (System V ABI for AMD64, figure 3.36).
const RBP: Register = Register(6);
const RSP: Register = Register(7);
const RETURN_ADDRESS: Register = Register(16);

/// DWARF operations that occur in the expressions that are understood.
const OP_DEREF: u8 = 0x06;
const OP_BREG_RBP: u8 = 0x76;
const OP_BREG_RSP: u8 = 0x77;
/// Offset of the interrupted stack pointer from the one at the return of a signal handler.
const SIGNAL_RSP: i64 = 160;

type Bytes<'a> = EndianSlice<'a, LittleEndian>;

/// A piece of the file that is mapped as code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeSegment {
    /// Offset in the file.
    pub offset: u64,
    /// Bytes in the file.
    pub len: u64,
    /// Address in the table's terms.
    pub pc: u64,
}

/// Names the contents of a table: files with the same build id need not have the same table, for anybody can write a
/// build id.
pub type Content = [u8; 32];

/// Where in a file its unwind information lies, read and not yet decoded.
pub struct Source {
    /// Code, in the file's order.
    pub code: Vec<CodeSegment>,
    data: Vec<u8>,
    is_debug_frame: bool,
    /// Address of the section and of the file's first loaded byte.
    address: u64,
    base: u64,
}

impl Source {
    /// Reads it.
    ///
    /// # Errors
    /// The file is no ELF file for x86-64, is malformed, has no unwind information, or too much of it.
    pub fn read(file: &File) -> Result<Source> {
        let start = read_at(file, 0, 64, 64)?;
        let header = FileHeader64::<Endianness>::parse(start.as_slice()).map_err(|_| malformed("header"))?;
        let endian = header.endian().map_err(|_| malformed("byte order"))?;
        if header.e_machine(endian) != elf::EM_X86_64 || endian != Endianness::Little {
            return Err(refused("it is not for x86-64"));
        }
        let size = u64::from(header.e_phentsize(endian)).saturating_mul(u64::from(header.e_phnum(endian)));
        let table = read_at(file, header.e_phoff(endian), size, MAX_PROGRAM_HEADERS)?;
        let segments = object::pod::slice_from_all_bytes::<ProgramHeader64<Endianness>>(&table)
            .map_err(|()| malformed("program header table"))?;
        let loads = || segments.iter().filter(|s| s.p_type(endian) == elf::PT_LOAD);
        let base = loads().map(|s| s.p_vaddr(endian)).min().ok_or_else(|| refused("nothing of it is loaded"))?;
        let code = loads()
            .filter(|s| s.p_flags(endian).0 & elf::PF_X.0 != 0)
            .map(|s| CodeSegment {
                offset: s.p_offset(endian),
                len: s.p_filesz(endian),
                pc: s.p_vaddr(endian).wrapping_sub(base),
            })
            .collect();
        let (address, offset, size, is_debug_frame) = find_section(file, header, endian, segments)?;
        if size > MAX_SECTION {
            return Err(refused(format!("its unwind information has {} MiB", size >> 20)));
        }
        let data = read_at(file, offset, size, MAX_SECTION)?;
        if (data.len() as u64) < size {
            return Err(refused("its unwind information is cut off"));
        }
        Ok(Source { code, data, is_debug_frame, address, base })
    }

    /// Hash of everything that the rows depend on.
    pub fn content(&self) -> Content {
        let mut hash = Sha256::new();
        for number in [self.address, self.base, u64::from(self.is_debug_frame)] {
            hash.update(number.to_le_bytes());
        }
        hash.update(&self.data);
        hash.finalize().into()
    }

    /// Decodes it: rows by address, each holding up to the next.
    ///
    /// # Errors
    /// It is malformed, or takes too long or too many rows.
    pub fn rows(&self) -> Result<Vec<Row>> {
        let mut collected = Collected { rows: Vec::new(), base: self.base, deadline: Instant::now() + MAX_TIME };
        let bases = BaseAddresses::default().set_eh_frame(self.address);
        if self.is_debug_frame {
            let mut section = gimli::DebugFrame::new(&self.data, LittleEndian);
            section.set_address_size(8);
            collected.collect(&section, &bases)?;
        } else {
            let mut section = gimli::EhFrame::new(&self.data, LittleEndian);
            section.set_address_size(8);
            collected.collect(&section, &bases)?;
        }
        Ok(collected.finish())
    }
}

fn refused(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Io, why)
}

/// Address, file offset and size of `.eh_frame`, or of `.debug_frame` (the flag).
fn find_section(
    file: &File,
    header: &FileHeader64<Endianness>,
    endian: Endianness,
    segments: &[ProgramHeader64<Endianness>],
) -> Result<(u64, u64, u64, bool)> {
    // A file without sections can still be unwound by what is loaded.
    let sections = Sections::<SectionHeader64<Endianness>>::read(file, header).ok();
    let named = |name: &[u8]| {
        let sections = sections.as_ref()?;
        let found = sections.headers.iter().find(|s| {
            sections.name(endian, s) == name && s.sh_type(endian) != elf::SHT_NOBITS && s.sh_size(endian) > 0
        })?;
        let plain = found.sh_flags(endian).0 & elf::SHF_COMPRESSED.0 == 0;
        plain.then(|| (found.sh_addr(endian), found.sh_offset(endian), found.sh_size(endian)))
    };
    if let Some((address, offset, size)) = named(b".eh_frame") {
        return Ok((address, offset, size, false));
    }
    if let Some((address, offset, size)) = by_header(file, endian, segments)? {
        return Ok((address, offset, size, false));
    }
    if let Some((address, offset, size)) = named(b".debug_frame") {
        return Ok((address, offset, size, true));
    }
    Err(refused("it has no unwind information"))
}

/// `.eh_frame` as the loaded file itself finds it, by `PT_GNU_EH_FRAME`; its size is not told: it ends with the
/// segment at the latest.
fn by_header(
    file: &File,
    endian: Endianness,
    segments: &[ProgramHeader64<Endianness>],
) -> Result<Option<(u64, u64, u64)>> {
    /// Signed 4 bytes from where they are: what all linkers write.
    const RELATIVE_4: u8 = 0x1b;
    let Some(pointer) = segments.iter().find(|s| s.p_type(endian) == elf::PT_GNU_EH_FRAME) else { return Ok(None) };
    let head = read_at(file, pointer.p_offset(endian), 8, 8)?;
    let &[1, RELATIVE_4, _, _, a, b, c, d] = head.as_slice() else { return Ok(None) };
    let distance = i64::from(i32::from_le_bytes([a, b, c, d]));
    let address = pointer.p_vaddr(endian).wrapping_add(4).wrapping_add_signed(distance);
    let inside = |s: &&ProgramHeader64<Endianness>| {
        s.p_type(endian) == elf::PT_LOAD
            && address.checked_sub(s.p_vaddr(endian)).is_some_and(|into| into < s.p_filesz(endian))
    };
    Ok(segments.iter().find(inside).map(|s| {
        let into = address - s.p_vaddr(endian);
        (address, s.p_offset(endian).saturating_add(into), s.p_filesz(endian) - into)
    }))
}

/// Rows as they are found.
struct Collected {
    rows: Vec<Row>,
    base: u64,
    deadline: Instant,
}

impl Collected {
    fn collect<'a, S: UnwindSection<Bytes<'a>>>(&mut self, section: &S, bases: &BaseAddresses) -> Result<()>
    where
        S::Offset: std::hash::Hash + Eq,
    {
        let broken = |e: gimli::Error| refused(format!("its unwind information is malformed: {e}"));
        let mut cies: HashMap<S::Offset, CommonInformationEntry<Bytes<'a>>> = HashMap::new();
        let mut context = UnwindContext::new();
        let mut entries = section.entries(bases);
        while let Some(entry) = entries.next().map_err(broken)? {
            let CieOrFde::Fde(partial) = entry else { continue };
            let fde = partial
                .parse(|section, bases, offset| {
                    if let Some(cie) = cies.get(&offset) {
                        return Ok(cie.clone());
                    }
                    let cie = section.cie_from_offset(bases, offset)?;
                    cies.insert(offset, cie.clone());
                    Ok(cie)
                })
                .map_err(broken)?;
            let (Some(start), Some(end)) = (self.pc(fde.initial_address()), self.pc(fde.end_address())) else {
                continue;
            };
            if start >= end || fde.cie().return_address_register() != RETURN_ADDRESS {
                continue;
            }
            self.check_time()?;
            self.push(end, Rule::Unknown)?;
            // One function that makes no sense does not spoil the others: hand-written assembler is full of them.
            let signal = fde.is_signal_trampoline();
            let Ok(mut rows) = fde.rows(section, bases, &mut context) else {
                self.push(start, Rule::Unsupported)?;
                continue;
            };
            let mut known_to = start;
            loop {
                let row = match rows.next_row() {
                    Ok(Some(row)) => row,
                    Ok(None) => break,
                    Err(_) => {
                        self.push(known_to, Rule::Unsupported)?;
                        break;
                    }
                };
                known_to = self.pc(row.end_address()).filter(|pc| (start..end).contains(pc)).unwrap_or(known_to);
                if let Some(pc) = self.pc(row.start_address()).filter(|pc| (start..end).contains(pc)) {
                    let cfa = cfa_rule(row.cfa(), section, signal);
                    self.push(pc, rule(cfa, row.register(RBP), row.register(RETURN_ADDRESS), section))?;
                }
            }
        }
        Ok(())
    }

    /// An address in the table's terms; `None` when it lies beyond what a table can say.
    fn pc(&self, address: u64) -> Option<u32> {
        u32::try_from(address.checked_sub(self.base)?).ok()
    }

    fn push(&mut self, pc: u32, rule: Rule) -> Result<()> {
        if self.rows.len() >= 2 * MAX_ROWS {
            return Err(refused(format!("its unwind information has more than {MAX_ROWS} rows")));
        }
        if self.rows.len().is_multiple_of(1024) {
            self.check_time()?;
        }
        self.rows.push(Row::new(pc, rule));
        Ok(())
    }

    fn check_time(&self) -> Result<()> {
        if Instant::now() > self.deadline {
            return Err(refused(format!("its unwind information takes longer than {} s", MAX_TIME.as_secs())));
        }
        Ok(())
    }

    /// Sorts the rows, and drops those that say nothing new.
    fn finish(mut self) -> Vec<Row> {
        let unknown = |row: &Row| row.same_rule(Row::new(0, Rule::Unknown));
        // Where one function ends and the next begins, the next counts.
        self.rows.sort_by_key(|row| (row.pc(), !unknown(row)));
        let mut out: Vec<Row> = Vec::with_capacity(self.rows.len() / 2);
        for (n, row) in self.rows.iter().enumerate() {
            let next = self.rows.get(n + 1).map_or(u64::MAX, |next| u64::from(next.pc()));
            let replaced = next == u64::from(row.pc());
            let padding = unknown(row) && next - u64::from(row.pc()) < PADDING;
            if !replaced && !padding && !out.last().is_some_and(|last| last.same_rule(*row)) {
                out.push(*row);
            }
        }
        out.shrink_to_fit();
        out
    }
}

/// What became of a rule for the canonical frame address.
enum CfaFound {
    Is(Cfa),
    Signal,
    Unsupported,
}

fn cfa_rule<'a, S: UnwindSection<Bytes<'a>>>(rule: &CfaRule<usize>, section: &S, signal: bool) -> CfaFound {
    match rule {
        CfaRule::RegisterAndOffset { register, offset } if *register == RSP => CfaFound::Is(Cfa::Rsp(*offset)),
        CfaRule::RegisterAndOffset { register, offset } if *register == RBP => CfaFound::Is(Cfa::Rbp(*offset)),
        CfaRule::RegisterAndOffset { .. } => CfaFound::Unsupported,
        CfaRule::Expression(expression) => {
            let bytes = expression_bytes(expression, section);
            // What linkers write for the stubs of a procedure linkage table: rsp + 8 + ((rip & 15) >= N) * 8.
            if let [OP_BREG_RSP, 8, 0x80, 0, 0x3f, 0x1a, n @ 0x30..=0x3f, 0x2a, 0x33, 0x24, 0x22] = *bytes {
                return CfaFound::Is(Cfa::Plt(n - 0x30));
            }
            match based_on(bytes, true) {
                Some((OP_BREG_RSP, SIGNAL_RSP)) if signal => CfaFound::Signal,
                Some((OP_BREG_RBP, offset)) => CfaFound::Is(Cfa::RbpDeref(offset)),
                _ => CfaFound::Unsupported,
            }
        }
    }
}

fn rule<'a, S: UnwindSection<Bytes<'a>>>(
    cfa: CfaFound,
    rbp: Option<RegisterRule<usize>>,
    return_address: Option<RegisterRule<usize>>,
    section: &S,
) -> Rule {
    let cfa = match (cfa, return_address) {
        (_, Some(RegisterRule::Undefined)) => return Rule::Outermost,
        (CfaFound::Signal, _) => return Rule::Signal,
        (CfaFound::Is(cfa), Some(RegisterRule::Offset(-8))) => cfa,
        _ => return Rule::Unsupported,
    };
    let rbp = match rbp {
        None | Some(RegisterRule::SameValue) => Rbp::Same,
        Some(RegisterRule::Offset(offset)) => Rbp::AtCfa(offset),
        Some(RegisterRule::Expression(expression)) => match based_on(expression_bytes(&expression, section), false) {
            Some((OP_BREG_RBP, offset)) => Rbp::Aligned(offset),
            _ => Rbp::Lost,
        },
        Some(_) => Rbp::Lost,
    };
    Rule::Frame(cfa, rbp)
}

fn expression_bytes<'a, S: UnwindSection<Bytes<'a>>>(expression: &UnwindExpression<usize>, section: &S) -> &'a [u8] {
    expression.get(section).map_or(&[][..], |e| e.0.slice())
}

/// The register operation and the offset of an expression "register + offset", followed by a dereference or not.
fn based_on(bytes: &[u8], deref: bool) -> Option<(u8, i64)> {
    let (op, rest) = bytes.split_first()?;
    let mut rest = EndianSlice::new(rest, LittleEndian);
    let offset = gimli::Reader::read_sleb128(&mut rest).ok()?;
    let expected: &[u8] = if deref { &[OP_DEREF] } else { &[] };
    (rest.slice() == expected).then_some((*op, offset))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    /// Compiles C code to an object that is loaded, and opens it.
    fn compiled(code: &str, flags: &[&str]) -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("code.c"), code).unwrap();
        let mut gcc = Command::new("gcc");
        gcc.current_dir(dir.path()).args(["-O2", "-shared", "-fPIC", "-o", "code.so", "code.c"]).args(flags);
        assert!(gcc.status().unwrap().success());
        let file = File::open(dir.path().join("code.so")).unwrap();
        (dir, file)
    }

    const CODE: &str = "int other(int *); int leaf(int n) { return n * 3; } \
        int caller(int n) { int a[40]; a[0] = n; return other(a) + a[1] + 1; }";

    /// Address of a symbol, as nm says.
    fn address(dir: &tempfile::TempDir, symbol: &str) -> u32 {
        let out = Command::new("nm").arg(dir.path().join("code.so")).output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        let line = text.lines().find(|l| l.ends_with(&format!(" {symbol}"))).unwrap();
        u32::from_str_radix(line.split(' ').next().unwrap(), 16).unwrap()
    }

    fn rule_at(rows: &[Row], pc: u32) -> Row {
        rows[rows.partition_point(|r| r.pc() <= pc) - 1]
    }

    /// At its first instruction every function's frame ends right above the return address.
    #[test]
    fn rules_follow_the_prologue() {
        let (dir, file) = compiled(CODE, &["-fomit-frame-pointer"]);
        let rows = Source::read(&file).unwrap().rows().unwrap();
        let entry = Row::new(0, Rule::Frame(Cfa::Rsp(8), Rbp::Same));
        assert!(rule_at(&rows, address(&dir, "leaf")).same_rule(entry), "{rows:?}");
        let caller = address(&dir, "caller");
        assert!(rule_at(&rows, caller).same_rule(entry));
        // Forty ints need more than 160 bytes of stack.
        let inside = rows.iter().find(|r| r.pc() > caller && !r.same_rule(entry)).unwrap();
        assert!(
            (1..20).any(|n| inside.same_rule(Row::new(0, Rule::Frame(Cfa::Rsp(160 + 8 * n), Rbp::Same)))),
            "{inside:?}"
        );
        assert!(rows.is_sorted_by_key(|r| r.pc()));
    }

    /// A program that was stripped of its section table, or that has `.debug_frame` only, is unwound all the same.
    #[test]
    fn other_places_of_unwind_information_are_found() {
        let (dir, file) = compiled(CODE, &["-fomit-frame-pointer"]);
        let whole = Source::read(&file).unwrap().rows().unwrap();
        let path = dir.path().join("code.so");
        let copy = File::options().read(true).write(true).open(&path).unwrap();
        // e_shoff, e_shnum and e_shstrndx.
        copy.write_all_at(&[0; 8], 40).unwrap();
        copy.write_all_at(&[0; 4], 60).unwrap();
        let without = Source::read(&copy).unwrap().rows().unwrap();
        assert_eq!(without, whole);
        let flags = ["-g", "-fomit-frame-pointer", "-fno-asynchronous-unwind-tables", "-nostdlib"];
        let (dir, file) = compiled(CODE, &flags);
        let source = Source::read(&file).unwrap();
        assert!(source.is_debug_frame);
        let entry = Row::new(0, Rule::Frame(Cfa::Rsp(8), Rbp::Same));
        assert!(rule_at(&source.rows().unwrap(), address(&dir, "caller")).same_rule(entry));
    }

    /// The outermost frame is marked where programs and threads start, the signal frame where handlers return to.
    #[test]
    fn the_c_library_marks_thread_starts_and_signal_frames() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let Some(path) = maps.split_whitespace().find(|w| w.ends_with("/libc.so.6")) else { return };
        let rows = Source::read(&File::open(path).unwrap()).unwrap().rows().unwrap();
        assert!(rows.iter().any(|r| r.same_rule(Row::new(0, Rule::Signal))));
        assert!(rows.iter().any(|r| r.same_rule(Row::new(0, Rule::Outermost))));
        assert!(rows.len() > 10_000, "{}", rows.len());
        // What is not supported must be the exception.
        let rest = rows.iter().filter(|r| r.same_rule(Row::new(0, Rule::Unsupported))).count();
        assert!(rest * 50 < rows.len(), "{rest} of {}", rows.len());
    }

    /// The bar: tables of the C library, redis and OpenSSL in 2 s and 40 MB, here in CPU time and of a debug build.
    #[test]
    fn tables_of_redis_and_its_libraries_are_quick_and_small() {
        const REDIS: &str = "/usr/bin/redis-server";
        let Ok(ldd) = Command::new("ldd").arg(REDIS).output() else { return };
        let needed = String::from_utf8(ldd.stdout).unwrap();
        let files: Vec<&str> = needed.split_whitespace().filter(|w| w.starts_with('/')).chain([REDIS]).collect();
        if !["redis", "libc.so", "libcrypto.so", "libssl.so"].iter().all(|n| files.iter().any(|f| f.contains(n))) {
            return eprintln!("SKIP: redis-server with OpenSSL is not installed");
        }
        let cpu_s = || {
            let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: `time` is a valid timespec for the kernel to write.
            assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) }, 0);
            time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
        };
        let start = cpu_s();
        let rows: usize =
            files.iter().map(|f| Source::read(&File::open(f).unwrap()).unwrap().rows().unwrap().len()).sum();
        let (time, bytes) = (cpu_s() - start, rows * 8);
        eprintln!("{} files, {rows} rows, {:.1} MiB, {time:.2} s", files.len(), bytes as f64 / f64::from(1 << 20));
        assert!(time <= 2.0, "{time} s");
        assert!(bytes <= 40_000_000, "{bytes} bytes");
    }

    /// A file without code, or of another kind, is refused with a reason.
    #[test]
    fn files_without_unwind_information_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for content in [&b""[..], b"#!/bin/sh\n", b"\x7fELF\x02\x01\x01", &[0x7f; 100]] {
            std::fs::write(&path, content).unwrap();
            let error = Source::read(&File::open(&path).unwrap()).err().unwrap();
            assert!(error.to_string().contains("malformed"), "{error}");
        }
        let (_dir, file) = compiled("int f(int n) { return n; }", &["-fno-asynchronous-unwind-tables", "-nostdlib"]);
        assert_eq!(Source::read(&file).err().unwrap().to_string(), "it has no unwind information");
    }

    /// A section that claims to be enormous is neither read nor allocated.
    #[test]
    fn an_enormous_section_is_refused() {
        let (dir, file) = compiled(CODE, &[]);
        let headers = Command::new("readelf").args(["-SW"]).arg(dir.path().join("code.so")).output().unwrap();
        let text = String::from_utf8(headers.stdout).unwrap();
        let number: u64 = (text.lines())
            .find_map(|l| l.trim_start().strip_prefix('[')?.split_once(']').filter(|(_, r)| r.contains(".eh_frame ")))
            .and_then(|(n, _)| n.trim().parse().ok())
            .unwrap();
        drop(file);
        let file = File::options().read(true).write(true).open(dir.path().join("code.so")).unwrap();
        let mut offset = [0; 8];
        file.read_exact_at(&mut offset, 40).unwrap();
        let size_at = u64::from_le_bytes(offset) + number * 64 + 32;
        file.write_all_at(&(1_u64 << 40).to_le_bytes(), size_at).unwrap();
        let error = Source::read(&file).err().unwrap();
        assert_eq!(error.to_string(), "its unwind information has 1048576 MiB");
        file.write_all_at(&(1_u64 << 20).to_le_bytes(), size_at).unwrap();
        assert_eq!(Source::read(&file).err().unwrap().to_string(), "its unwind information is cut off");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

        /// Scribbled unwind information ends in rows or in a reason, never in a panic, and the rows stay sorted.
        #[test]
        fn scribbled_unwind_information_does_no_harm(
            edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40),
            cut in any::<prop::sample::Index>(),
            whole in any::<bool>(),
            is_debug_frame in any::<bool>(),
        ) {
            static SOURCE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
            let mut data = SOURCE.get_or_init(|| {
                let (_dir, file) = compiled(CODE, &[]);
                Source::read(&file).unwrap().data
            }).clone();
            for (at, value) in edits {
                let at = at.index(data.len());
                data[at] = value;
            }
            if !whole {
                data.truncate(cut.index(data.len()));
            }
            let source = Source { code: Vec::new(), data, is_debug_frame, address: 0x2000, base: 0 };
            if let Ok(rows) = source.rows() {
                prop_assert!(rows.is_sorted_by_key(|r| r.pc()));
            }
        }
    }
}
