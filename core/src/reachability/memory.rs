//! Where a scan's words come from: the writable memory of a process.
//!
//! [`ProcessMemory`] reads with `process_vm_readv`, which neither stops nor changes the process. Only pages that are
//! there are read: touching the others would make the process grow. [`ranges`] lists what is worth reading.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::maps::{Backing, Maps};
use crate::sys;

const PAGE: u64 = 4096;
/// Pages looked up at once in `/proc/PID/pagemap`.
const LOOKED_UP: usize = 8192;
/// In an entry of pagemap: the page is in memory, or swapped out (Linux `Documentation/admin-guide/mm/pagemap.rst`).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;

/// Memory that can be read by address.
pub trait Memory {
    /// Reads up to `buffer.len()` bytes at `address`; returns how many could be read from there on without a gap.
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> usize;
}

/// The memory of another process.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: u32,
}

impl ProcessMemory {
    /// Memory of a process; whether it may be read shows when it is.
    pub fn new(pid: u32) -> Self {
        ProcessMemory { pid }
    }
}

impl Memory for ProcessMemory {
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> usize {
        sys::read_memory(self.pid, address, buffer).unwrap_or(0)
    }
}

/// Part of the address space that may hold references.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
}

/// Writable memory of a process: what has a name of its own (data of programs and libraries, the main stack), and the
/// rest. The first should be read first, so that the way from a block to its root begins at something with a name.
pub fn ranges(maps: &Maps) -> (Vec<Range>, Vec<Range>) {
    let mut named: Vec<Range> = Vec::new();
    let mut others = Vec::new();
    for m in maps.iter().filter(|m| m.perms.read && m.perms.write) {
        let range = Range { start: m.start, end: m.end };
        match &m.backing {
            // Zeroed data lies behind the rest of a file's data.
            Backing::Anonymous if named.last().is_some_and(|before| before.end == m.start) => named.push(range),
            // Registers of a device: reading may act on it, and can stall.
            Backing::File { path, .. } if path.starts_with("/dev") && !path.starts_with("/dev/shm") => {}
            Backing::File { .. } => named.push(range),
            Backing::Special(name) if name.starts_with("[stack") => named.push(range),
            Backing::Special(name) if name.starts_with("[v") => {}
            _ => others.push(range),
        }
    }
    (named, others)
}

/// Which pages of a process are there.
#[derive(Debug)]
pub struct Pagemap {
    file: Option<File>,
    /// Pages that were found to be swapped out, and are read all the same.
    pub swapped: u64,
}

impl Pagemap {
    /// Opens `/proc/PID/pagemap`. Where that is not possible every page counts as being there.
    pub fn open(pid: u32) -> Self {
        Pagemap { file: File::open(format!("/proc/{pid}/pagemap")).ok(), swapped: 0 }
    }

    /// Calls `visit` with each run of pages of a range that are there.
    pub fn present(&mut self, range: Range, visit: &mut dyn FnMut(Range)) {
        let Some(file) = &self.file else { return visit(range) };
        let mut entries = vec![0_u8; 8 * LOOKED_UP];
        let mut run: Option<Range> = None;
        let mut at = range.start;
        while at < range.end {
            let want = (((range.end - at).div_ceil(PAGE)) as usize).min(LOOKED_UP);
            let got = file.read_at(&mut entries[..8 * want], at / PAGE * 8).unwrap_or(0) / 8;
            if got == 0 {
                break;
            }
            for entry in entries[..8 * got].as_chunks::<8>().0 {
                let entry = u64::from_ne_bytes(*entry);
                self.swapped += u64::from(entry & SWAPPED != 0);
                let end = (at + PAGE).min(range.end);
                if entry & (PRESENT | SWAPPED) == 0 {
                    run.take().into_iter().for_each(&mut *visit);
                } else {
                    run = Some(Range { start: run.map_or(at, |r| r.start), end });
                }
                at = end;
            }
        }
        run.into_iter().for_each(visit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // A touched page among reserved ones is all that is read; the reserve stays unbacked.
    #[test]
    fn only_pages_that_are_there_are_read() {
        const PAGES: usize = 64;
        // SAFETY: a fresh anonymous mapping, unmapped below.
        let start = unsafe {
            let at = libc::mmap(
                std::ptr::null_mut(),
                PAGES * PAGE as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            assert_ne!(at, libc::MAP_FAILED);
            libc::madvise(at, PAGES * PAGE as usize, libc::MADV_NOHUGEPAGE);
            for page in [3, 4, 60] {
                at.cast::<u64>().add(page * 512).write_volatile(page as u64);
            }
            at
        };
        let base = start as u64;
        let mut runs = Vec::new();
        Pagemap::open(std::process::id())
            .present(Range { start: base, end: base + PAGES as u64 * PAGE }, &mut |r| runs.push(r));
        let page = |n: u64| base + n * PAGE;
        assert_eq!(runs, [Range { start: page(3), end: page(5) }, Range { start: page(60), end: page(61) }]);
        let mut word = [0; 8];
        assert_eq!(ProcessMemory::new(std::process::id()).read(page(4), &mut word), 8);
        assert_eq!(u64::from_ne_bytes(word), 4);
        // SAFETY: the mapping made above, which nothing refers to any more.
        unsafe { libc::munmap(start, PAGES * PAGE as usize) };
        assert_eq!(ProcessMemory::new(std::process::id()).read(page(4), &mut word), 0);
    }

    // Globals come before the heap, so that chains begin at them.
    #[test]
    fn data_of_files_and_stacks_comes_first() {
        let maps = Maps::parse(
            b"1000-2000 rw-p 0 00:00 0 \n\
              3000-4000 r--p 0 00:01 7 /bin/x\n\
              5000-6000 rw-p 0 00:01 7 /bin/x\n\
              6000-6800 rw-p 0 00:00 0 \n\
              7000-8000 rw-s 0 00:01 9 /dev/dri/card0\n\
              9000-a000 rw-p 0 00:00 0 [stack]\n",
        );
        let starts = |ranges: Vec<Range>| ranges.iter().map(|r| r.start).collect::<Vec<u64>>();
        let (named, others) = ranges(&maps);
        assert_eq!((starts(named), starts(others)), (vec![0x5000, 0x6000, 0x9000], vec![0x1000]));
    }
}
