//! Names of generated code: `/tmp/perf-PID.map`, which language run times write for profilers.
//!
//! Source: tools/perf/Documentation/jit-interface.txt in the kernel tree. The process writes it into its own `/tmp`,
//! under the pid that it sees itself. Anyone can write into `/tmp`: only a file of the process's own user counts.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use crate::error::Result;
use crate::maps::{FileId, reopen_regular};
use crate::process::{self, ProcDir};

/// Most bytes of a map that are read.
const MAX_BYTES: u64 = 64 << 20;
/// Most functions that are kept.
const MAX_FUNCTIONS: usize = 500_000;

/// After a reading, the next one waits for this many times what it took: run times append all the time.
const PATIENCE: u32 = 10;

/// The map of one process.
#[derive(Debug, Default)]
pub(super) struct PerfMap {
    file: Option<File>,
    read: Option<FileId>,
    /// It is not read again before this; see [`PATIENCE`].
    quiet_until: Option<Instant>,
    /// By first address: first address behind it, and name. They do not overlap.
    functions: BTreeMap<u64, (u64, Arc<str>)>,
}

impl PerfMap {
    /// Opens the map when that has not been done and there is one now. It stays readable after the process has ended.
    pub(super) fn open(&mut self, dir: &ProcDir) {
        if self.file.is_none() {
            self.file = find(dir).ok().flatten();
        }
    }

    /// The function at an address: name, and bytes from its start; `None` when there is none. Reads what the process has
    /// written meanwhile, also when the address is known: the memory may hold another function by now.
    pub(super) fn find(&mut self, address: u64) -> Option<(Arc<str>, u64)> {
        self.reread();
        let (start, (end, name)) = self.functions.range(..=address).next_back()?;
        (address < *end).then(|| (name.clone(), address - start))
    }

    /// Reads the file if it has changed.
    fn reread(&mut self) {
        let Some(file) = &mut self.file else { return };
        let Ok(now) = FileId::of(file) else { return };
        let started = Instant::now();
        if self.read == Some(now) || self.quiet_until.is_some_and(|until| until > started) {
            return;
        }
        let mut data = Vec::new();
        let start = file.seek(SeekFrom::Start(0));
        if start.and_then(|_| file.take(MAX_BYTES).read_to_end(&mut data)).is_err() {
            return;
        }
        self.read = Some(now);
        self.functions = parse(&data);
        self.quiet_until = Some(Instant::now() + started.elapsed() * PATIENCE);
    }
}

/// Opens the process's map; `None` when there is none or it is not to be trusted.
fn find(dir: &ProcDir) -> Result<Option<File>> {
    let (uid, own_pid) = dir.uid_and_own_pid()?;
    let path = PathBuf::from(format!("/tmp/perf-{own_pid}.map"));
    let open = || -> io::Result<Option<File>> {
        let found = dir.open_in_root(&path, libc::O_PATH | libc::O_NOFOLLOW)?;
        let owner = found.metadata()?.uid();
        if owner != uid && owner != 0 {
            return Ok(None);
        }
        reopen_regular(&found).map(Some)
    };
    Ok(open().ok().flatten())
}

/// Parses lines of `START SIZE NAME` with hexadecimal numbers; others are left out. Where functions overlap, the later
/// line counts: the memory of the earlier one was used again.
fn parse(data: &[u8]) -> BTreeMap<u64, (u64, Arc<str>)> {
    let mut functions: BTreeMap<u64, (u64, Arc<str>)> = BTreeMap::new();
    for line in data.split(|b| *b == b'\n').rev() {
        if functions.len() == MAX_FUNCTIONS {
            break;
        }
        let Some((start, end, name)) = parse_line(line) else { continue };
        let overlaps = functions.range(..end).next_back().is_some_and(|(_, (e, _))| *e > start);
        if !overlaps {
            functions.insert(start, (end, process::bounded(name, super::demangle::MAX_NAME, false).into()));
        }
    }
    functions
}

fn parse_line(line: &[u8]) -> Option<(u64, u64, &[u8])> {
    let mut parts = line.splitn(3, |b| *b == b' ');
    let mut number = || u64::from_str_radix(std::str::from_utf8(parts.next()?).ok()?.trim_start_matches("0x"), 16).ok();
    let start = number()?;
    let end = start.checked_add(number()?)?;
    let name = parts.next()?.trim_ascii();
    (end > start && !name.is_empty()).then_some((start, end, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A map that grows is read again, for what is new in it and for what takes the place of something known.
    #[test]
    fn a_map_that_grows_is_read_again() {
        use std::io::Write;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"1000 100 first\n").unwrap();
        let mut map = PerfMap { file: Some(file.try_clone().unwrap()), ..PerfMap::default() };
        let name = |map: &mut PerfMap, address| {
            map.quiet_until = None;
            map.find(address).map(|(name, _)| name.to_string())
        };
        assert_eq!(name(&mut map, 0x1010).as_deref(), Some("first"));
        file.seek(SeekFrom::End(0)).unwrap();
        file.write_all(b"2000 10 second\n1000 20 third\n").unwrap();
        assert_eq!(name(&mut map, 0x2001).as_deref(), Some("second"));
        assert_eq!(name(&mut map, 0x1010).as_deref(), Some("third"));
        // Half a line is none yet.
        file.seek(SeekFrom::End(0)).unwrap();
        file.write_all(b"3000 10").unwrap();
        assert_eq!(name(&mut map, 0x3001), None);
        assert_eq!(name(&mut map, 0x2001).as_deref(), Some("second"));
    }

    /// Run times reuse memory and append lines; the newest name is the right one, and junk must not hide the rest.
    #[test]
    fn the_newest_line_counts_and_junk_is_left_out() {
        let map = parse(b"1000 100 old\n2000 10 LazyCompile:~f /app.js:1\nzz\n1080 20 new\n0x3000 10 hex\n4000 0 empty\nffffffffffffffff 2 over\n5000 10 cut\xff");
        let find = |address: u64| {
            let (start, (end, name)) = map.range(..=address).next_back()?;
            (address < *end).then(|| (&**name, address - start))
        };
        assert_eq!(find(0x1085), Some(("new", 5)));
        assert_eq!(find(0x1000), None, "its memory was used again");
        assert_eq!(find(0x200f), Some(("LazyCompile:~f /app.js:1", 15)));
        assert_eq!(find(0x2010), None);
        assert_eq!(find(0x3001), Some(("hex", 1)));
        assert_eq!(find(0x5000), Some(("cut\u{fffd}", 0)));
        assert_eq!(map.len(), 4);
    }
}
