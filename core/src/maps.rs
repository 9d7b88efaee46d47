//! What is mapped where in a process: `/proc/PID/maps`.
//!
//! [`Maps`] is one reading of it, with lookup by address. The files behind the mappings are opened by
//! [`open_mapped`] and looked into by [`elf::ElfInfo`]; both treat them as hostile.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::process::{self, ProcDir};

pub mod elf;
mod file;

pub(crate) use file::reopen_regular;
pub use file::{FileId, open_mapped};

/// Most bytes of `/proc/PID/maps` that are read.
const MAX_MAPS_BYTES: usize = 64 << 20;
/// Most mappings that are kept; the kernel's default limit is 65,530.
const MAX_MAPPINGS: usize = 262_144;
/// Longest name of a mapping that is kept, in bytes.
const MAX_NAME: usize = 4096;

/// Access rights of a mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Perms {
    /// Readable.
    pub read: bool,
    /// Writable.
    pub write: bool,
    /// Executable.
    pub execute: bool,
    /// Shared with other processes, so that writes reach the file.
    pub shared: bool,
}

/// What lies behind a mapping.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Memory without a name.
    Anonymous,
    /// Memory that the kernel or the program named, brackets included: `[heap]`, `[stack]`, `[vdso]`, `[anon:...]`.
    /// Hostile text.
    Special(Arc<str>),
    /// A file. Hostile text.
    File {
        /// Its path as the kernel shows it: seen from the process's root, or from ours when that contains it.
        path: Arc<Path>,
        /// True when its name is gone or names another file now.
        deleted: bool,
    },
}

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// Access rights.
    pub perms: Perms,
    /// Offset in the file of the first byte; 0 without a file.
    pub offset: u64,
    /// Device of the file, major and minor number; zeros without a file.
    pub dev: (u32, u32),
    /// Inode of the file; 0 without a file.
    pub inode: u64,
    /// What lies behind it.
    pub backing: Backing,
}

impl Mapping {
    /// True when `address` lies in it.
    pub fn contains(&self, address: u64) -> bool {
        (self.start..self.end).contains(&address)
    }

    /// Offset in the file of an address in the mapping (in the mapping, without a file).
    pub fn file_offset(&self, address: u64) -> u64 {
        self.offset.wrapping_add(address.wrapping_sub(self.start))
    }

    /// Path of the file, or the bracketed name; `None` for memory without a name.
    pub fn name(&self) -> Option<String> {
        match &self.backing {
            Backing::Anonymous => None,
            Backing::Special(name) => Some(name.to_string()),
            Backing::File { path, .. } => Some(process::bounded(path.as_os_str().as_bytes(), MAX_NAME, false)),
        }
    }
}

/// All mappings of a process at one time.
#[derive(Clone, Debug, Default)]
pub struct Maps {
    mappings: Vec<Mapping>,
    fingerprint: u64,
    truncated: bool,
}

impl Maps {
    /// Reads the mappings of a process.
    ///
    /// # Errors
    /// Kind [`ErrorKind::Target`] when it has ended or has no memory (kernel threads), [`ErrorKind::Permission`] when
    /// we may not look.
    pub fn read(dir: &ProcDir) -> Result<Self> {
        let (data, cut) = read_raw(dir)?;
        Ok(Self::from_raw(&data, cut))
    }

    /// Reads them again. `None` when nothing has changed since, which is found out without parsing.
    ///
    /// # Errors
    /// As [`Maps::read`].
    pub fn reread(&self, dir: &ProcDir) -> Result<Option<Self>> {
        let (data, cut) = read_raw(dir)?;
        Ok((fingerprint(&data) != self.fingerprint).then(|| Self::from_raw(&data, cut)))
    }

    /// Parses the text of `/proc/PID/maps`; lines that make no sense are left out.
    pub fn parse(data: &[u8]) -> Self {
        Self::from_raw(data, false)
    }

    fn from_raw(data: &[u8], cut: bool) -> Self {
        let mut maps = Maps { mappings: Vec::new(), fingerprint: fingerprint(data), truncated: cut };
        let mut names = Names::default();
        for line in data.split(|b| *b == b'\n') {
            if maps.mappings.len() == MAX_MAPPINGS {
                maps.truncated = true;
                break;
            }
            maps.mappings.extend(parse_line(line, &mut names));
        }
        // The kernel sorts them; text from elsewhere may not.
        if !maps.mappings.is_sorted_by_key(|m| m.start) {
            maps.mappings.sort_by_key(|m| m.start);
        }
        maps
    }

    /// The mapping that an address lies in; `None` when it lies in none.
    pub fn find(&self, address: u64) -> Option<&Mapping> {
        let behind = self.mappings.partition_point(|m| m.start <= address);
        self.mappings[..behind].last().filter(|m| m.contains(address))
    }

    /// All mappings, by address.
    pub fn iter(&self) -> std::slice::Iter<'_, Mapping> {
        self.mappings.iter()
    }

    /// True when the process has more mappings than are kept.
    pub fn is_truncated(&self) -> bool {
        self.truncated
    }
}

impl<'a> IntoIterator for &'a Maps {
    type Item = &'a Mapping;
    type IntoIter = std::slice::Iter<'a, Mapping>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Adjacent mappings of one file share their path.
#[derive(Default)]
struct Names {
    last: Vec<u8>,
    backing: Option<Backing>,
}

impl Names {
    fn backing(&mut self, name: &[u8], inode: u64) -> Backing {
        if let Some(backing) = self.backing.as_ref().filter(|_| self.last == name) {
            return backing.clone();
        }
        let backing = if name.is_empty() {
            Backing::Anonymous
        } else if name.starts_with(b"[") && inode == 0 {
            Backing::Special(process::bounded(name, MAX_NAME, false).into())
        } else {
            let (name, deleted) = match name.strip_suffix(b" (deleted)") {
                Some(stripped) => (stripped, true),
                None => (name, false),
            };
            Backing::File { path: Arc::from(Path::new(&unescape(name))), deleted }
        };
        self.last = name.to_vec();
        self.backing = Some(backing.clone());
        backing
    }
}

/// Newlines in paths are the one thing that the kernel escapes here (`seq_file_path(m, file, "\n")`, fs/proc/task_mmu.c).
fn unescape(name: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((byte, tail)) = rest.split_first() {
        if let Some(tail) = rest.strip_prefix(b"\\012") {
            plain.push(b'\n');
            rest = tail;
        } else {
            plain.push(*byte);
            rest = tail;
        }
    }
    OsString::from_vec(plain)
}

fn read_raw(dir: &ProcDir) -> Result<(Vec<u8>, bool)> {
    let (data, cut) = dir.read("maps", MAX_MAPS_BYTES).map_err(|e| process::failed(dir.pid(), "maps", e))?;
    if data.is_empty() {
        let pid = dir.pid();
        return Err(Error::new(
            ErrorKind::Target,
            format!("failed to read the memory map of process {pid}: it has ended or is a kernel thread"),
        ));
    }
    Ok((data, cut))
}

/// Tells two readings apart. Eight bytes at a time, because the text of a large process is megabytes.
fn fingerprint(data: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64 ^ data.len() as u64;
    let (words, rest) = data.as_chunks::<8>();
    for word in words {
        hash = (hash ^ u64::from_le_bytes(*word)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29);
    }
    rest.iter().fold(hash, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Parses `start-end perms offset major:minor inode   name`; `None` when the line is malformed.
fn parse_line(line: &[u8], names: &mut Names) -> Option<Mapping> {
    let mut rest = line;
    let mut field = || {
        let end = rest.iter().position(|b| *b == b' ').unwrap_or(rest.len());
        let (field, tail) = rest.split_at(end);
        rest = tail.get(1..).unwrap_or_default();
        std::str::from_utf8(field).ok().filter(|f| !f.is_empty())
    };
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    let (start, end) = field()?.split_once('-')?;
    let perms = field()?.as_bytes();
    let offset = hex(field()?)?;
    let (major, minor) = field()?.split_once(':')?;
    let inode = field()?.parse().ok()?;
    let (start, end) = (hex(start)?, hex(end)?);
    let &[read, write, execute, shared] = perms else { return None };
    if start >= end {
        return None;
    }
    Some(Mapping {
        start,
        end,
        perms: Perms { read: read == b'r', write: write == b'w', execute: execute == b'x', shared: shared == b's' },
        offset,
        dev: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
        inode,
        backing: names.backing(rest.trim_ascii_start(), inode),
    })
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;
    use crate::process::testing::Running;

    const TEXT: &[u8] = b"\
55d0c0000000-55d0c0002000 r--p 00000000 fe:01 131                        /opt/my app\n\
55d0c0002000-55d0c0005000 r-xp 00002000 fe:01 131                        /opt/my app\n\
55d0c1000000-55d0c1021000 rw-p 00000000 00:00 0                          [heap]\n\
7f0000000000-7f0000010000 rwxp 00000000 00:00 0 \n\
7f0000020000-7f0000030000 r-xs 00001000 00:05 77                         /lib/old\\012\\x.so (deleted)\n\
7f0000040000-7f0000050000 r--p 00000000 00:00 0                          [anon:[x] ]\n\
7ffd00000000-7ffd00002000 r-xp 00000000 00:00 0                          [vdso]\n\
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";

    /// Every field must come out as the kernel meant it, or frames are looked for in the wrong file.
    #[test]
    fn all_fields_and_kinds_are_understood() {
        let maps = Maps::parse(TEXT);
        assert_eq!(maps.iter().len(), 8);
        let app = maps.find(0x55d0_c000_2010).expect("mapped");
        assert_eq!((app.start, app.end), (0x55d0_c000_2000, 0x55d0_c000_5000));
        assert_eq!(app.perms, Perms { read: true, write: false, execute: true, shared: false });
        assert_eq!((app.offset, app.dev, app.inode), (0x2000, (0xfe, 1), 131));
        assert_eq!(app.file_offset(0x55d0_c000_2010), 0x2010);
        assert_eq!(app.backing, Backing::File { path: Path::new("/opt/my app").into(), deleted: false });
        let gone = maps.find(0x7f00_0002_0000).expect("mapped");
        assert_eq!(gone.backing, Backing::File { path: Path::new("/lib/old\n\\x.so").into(), deleted: true });
        assert!(gone.perms.shared);
        assert_eq!(maps.find(0x55d0_c100_0000).and_then(Mapping::name).as_deref(), Some("[heap]"));
        assert_eq!(maps.find(0x7f00_0000_ffff).expect("mapped").backing, Backing::Anonymous);
        assert_eq!(maps.find(0x7f00_0004_0000).and_then(Mapping::name).as_deref(), Some("[anon:[x] ]"));
        assert_eq!(maps.find(0xffff_ffff_ff60_0000).and_then(Mapping::name).as_deref(), Some("[vsyscall]"));
    }

    /// The ends of mappings are the classic off-by-one: the first byte is in, the byte behind the last is not.
    #[test]
    fn lookup_is_exact_at_both_ends() {
        let maps = Maps::parse(TEXT);
        assert!(maps.find(0x55d0_bfff_ffff).is_none());
        assert_eq!(maps.find(0x55d0_c000_0000).expect("first byte").offset, 0);
        assert_eq!(maps.find(0x55d0_c000_1fff).expect("last byte").offset, 0);
        assert_eq!(maps.find(0x55d0_c000_2000).expect("next mapping").offset, 0x2000);
        assert!(maps.find(0x55d0_c000_5000).is_none());
        assert!(maps.find(0).is_none() && maps.find(u64::MAX).is_none());
    }

    /// Malformed lines must neither stop the rest nor panic.
    #[test]
    fn malformed_lines_are_left_out() {
        let maps =
            Maps::parse(b"\nnonsense\n1-2\n2-1 r-xp 0 0:0 0 /x\n1000-2000 r-x 0 0:0 0 /x\n1000-2000 r-xp 0 0:0 0\n");
        assert_eq!(maps.iter().len(), 1);
        for end in 0..TEXT.len() {
            let _ = Maps::parse(&TEXT[..end]);
        }
    }

    /// Whoever watches for libraries loaded later relies on a change being noticed, and on quiet being cheap.
    #[test]
    fn a_new_mapping_is_noticed_and_no_change_is_not() {
        use std::io::{Read, Write};
        let mut command = std::process::Command::new("cat");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("starts");
        let (mut input, mut output) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let running = Running(child);
        let dir = ProcDir::open(running.pid()).expect("runs");
        // Early, most likely: before the dynamic loader is done.
        let early = Maps::read(&dir).expect("runs");
        input.write_all(b"x").expect("runs");
        output.read_exact(&mut [0]).expect("runs");
        let maps = Maps::read(&dir).expect("runs");
        let same = early.iter().eq(maps.iter());
        assert_eq!(early.reread(&dir).expect("runs").is_none(), same);
        assert!(maps.reread(&dir).expect("runs").is_none());
        assert!(maps.iter().any(|m| m.perms.execute && m.name().is_some_and(|n| n.ends_with("/cat"))));
        drop(running);
        assert_eq!(Maps::read(&dir).expect_err("ended").kind(), ErrorKind::Target);
        assert_ne!(fingerprint(TEXT), fingerprint(&TEXT[1..]));
        assert_ne!(fingerprint(TEXT), fingerprint(&TEXT[..TEXT.len() - 1]));
    }
}
