//! Where a scan's words come from: the writable memory of a process.
//!
//! [`ProcessMemory`] reads with `process_vm_readv`, which neither stops nor changes the process, and through
//! `/proc/PID/mem` what the process has protected from itself. Only pages that are there are read: touching the others would
//! make the process grow. [`Ranges`] lists what is worth reading, [`Pagemap`] what of it is there.

use std::cell::OnceCell;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::maps::{Backing, Maps};
use crate::sys;

const PAGE: u64 = 4096;
/// Pages looked up at once in `/proc/PID/pagemap`.
const LOOKED_UP: usize = 8192;
/// In an entry of pagemap: the page is in memory, or swapped out (Linux `Documentation/admin-guide/mm/pagemap.rst`).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// It is a file's, or shared: not a private page that has been written.
const OF_FILE: u64 = 1 << 61;
/// Asks for runs of pages at once, and passes over what is not there (Linux 6.7): `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u64 = 0xc060_6610;
/// The same three, as categories of it (include/uapi/linux/fs.h).
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// Runs that are taken at once.
const RUNS: usize = 1024;

/// Memory that can be read by address.
pub trait Memory {
    /// Reads up to `buffer.len()` bytes at `address`; returns how many could be read from there on without a gap.
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> usize;

    /// The next address worth a try when nothing could be read at this one.
    fn behind_gap(&self, address: u64) -> u64 {
        (address / PAGE).saturating_add(1).saturating_mul(PAGE)
    }
}

impl<M: Memory + ?Sized> Memory for Box<M> {
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> usize {
        (**self).read(address, buffer)
    }

    fn behind_gap(&self, address: u64) -> u64 {
        (**self).behind_gap(address)
    }
}

/// The memory of another process.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: u32,
    /// `/proc/PID/mem`, once it was needed; `None` when it cannot be opened.
    forced: OnceCell<Option<File>>,
}

impl ProcessMemory {
    /// Memory of a process; whether it may be read shows when it is.
    pub fn new(pid: u32) -> Self {
        ProcessMemory { pid, forced: OnceCell::new() }
    }
}

impl Memory for ProcessMemory {
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> usize {
        match sys::read_memory(self.pid, address, buffer) {
            Ok(got) => got,
            // The process itself may not read it at the moment. Debuggers may.
            Err(e) if e.raw_os_error() == Some(libc::EFAULT) => {
                let forced = self.forced.get_or_init(|| File::open(format!("/proc/{}/mem", self.pid)).ok());
                forced.as_ref().and_then(|file| file.read_at(buffer, address).ok()).unwrap_or(0)
            }
            Err(_) => 0,
        }
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

/// Memory of which only some ranges are read. Reading a page that is not there would make the process grow: a hole in
/// shared memory is filled, a huge page is taken from the pool.
pub struct Within<M> {
    memory: M,
    /// Ascending.
    ranges: Vec<Range>,
}

impl<M> Within<M> {
    /// Restricts reading to `ranges`, which do not overlap.
    pub fn new(memory: M, mut ranges: Vec<Range>) -> Self {
        ranges.sort_unstable_by_key(|r| r.start);
        Within { memory, ranges }
    }

    /// The first range that ends behind an address.
    fn next(&self, address: u64) -> Option<Range> {
        self.ranges.get(self.ranges.partition_point(|r| r.end <= address)).copied()
    }
}

impl<M: Memory> Memory for Within<M> {
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> usize {
        match self.next(address) {
            Some(range) if range.start <= address => {
                let length = (range.end - address).min(buffer.len() as u64) as usize;
                self.memory.read(address, &mut buffer[..length])
            }
            _ => 0,
        }
    }

    fn behind_gap(&self, address: u64) -> u64 {
        match self.next(address) {
            Some(range) if range.start <= address => self.memory.behind_gap(address),
            Some(range) => range.start,
            None => u64::MAX,
        }
    }
}

/// What of a process's memory may hold references.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    /// Writable memory with a name of its own: data of programs and libraries, the main stack. It should be read first,
    /// so that the way from a block to its root begins at something with a name.
    pub named: Vec<Range>,
    /// The other writable memory.
    pub others: Vec<Range>,
    /// Private memory that is read-only by now, or closed: what of it has been written before may hold references.
    pub frozen: Vec<Range>,
    /// Writable memory of devices, in bytes: reading it may act on the device, and can stall.
    pub device_bytes: u64,
}

impl Ranges {
    /// Sorts the mappings of a process.
    pub fn of(maps: &Maps) -> Ranges {
        let mut ranges = Ranges::default();
        for m in maps.iter() {
            let range = Range { start: m.start, end: m.end };
            match &m.backing {
                _ if !m.perms.write || !m.perms.read => {
                    if !m.perms.shared && !m.perms.execute && !matches!(m.backing, Backing::Special(_)) {
                        ranges.frozen.push(range);
                    }
                }
                // Zeroed data lies behind the rest of a file's data.
                Backing::Anonymous if ranges.named.last().is_some_and(|before| before.end == m.start) => {
                    ranges.named.push(range);
                }
                Backing::File { path, .. } if is_device(path) => ranges.device_bytes += range.end - range.start,
                Backing::File { .. } => ranges.named.push(range),
                Backing::Special(name) if name.starts_with("[stack") => ranges.named.push(range),
                Backing::Special(name) if name.starts_with("[v") => {}
                _ => ranges.others.push(range),
            }
        }
        ranges
    }

    /// All of them that are there, in the order in which they should be read.
    pub fn present(&self, pagemap: &mut Pagemap) -> Vec<Range> {
        let mut runs = Vec::new();
        for range in self.named.iter().chain(&self.others) {
            pagemap.present(*range, &mut |run| runs.push(run));
        }
        for range in &self.frozen {
            pagemap.written(*range, &mut |run| runs.push(run));
        }
        runs
    }
}

/// Whether a mapped file is a device. Some files in /dev are plain memory.
fn is_device(path: &Path) -> bool {
    const MEMORY: [&str; 3] = ["/dev/shm", "/dev/zero", "/dev/hugepages"];
    let text = path.to_string_lossy();
    path.starts_with("/dev") && !MEMORY.iter().any(|memory| text.starts_with(memory))
}

/// Which pages of a process are there.
#[derive(Debug)]
pub struct Pagemap {
    file: Option<File>,
    /// The kernel has told that it cannot do `PAGEMAP_SCAN`.
    is_old: bool,
    /// Pages that were found to be swapped out, and are read all the same.
    pub swapped: u64,
}

/// `struct pm_scan_arg` (include/uapi/linux/fs.h).
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Run {
    start: u64,
    end: u64,
    categories: u64,
}

impl Pagemap {
    /// Opens `/proc/PID/pagemap`. Where that is not possible every page counts as being there.
    pub fn open(pid: u32) -> Self {
        Pagemap { file: File::open(format!("/proc/{pid}/pagemap")).ok(), is_old: false, swapped: 0 }
    }

    /// Calls `visit` with each run of pages of a range that are there.
    pub fn present(&mut self, range: Range, visit: &mut dyn FnMut(Range)) {
        self.runs(range, false, visit);
    }

    /// Calls `visit` with each run of private pages of a range that have been written.
    pub fn written(&mut self, range: Range, visit: &mut dyn FnMut(Range)) {
        self.runs(range, true, visit);
    }

    fn runs(&mut self, range: Range, only_written: bool, visit: &mut dyn FnMut(Range)) {
        // Runs that touch are one, also when they differ in what does not matter here.
        let mut run: Option<Range> = None;
        let mut join = |next: Range| match &mut run {
            Some(before) if before.end == next.start => before.end = next.end,
            _ => run.replace(next).into_iter().for_each(&mut *visit),
        };
        let mut from = range.start;
        if !self.is_old {
            from = self.ask(range, only_written, &mut join);
        }
        if from < range.end {
            self.look_up(Range { start: from, end: range.end }, only_written, &mut join);
        }
        run.into_iter().for_each(visit);
    }

    /// Asks for runs of pages; returns how far that could be done.
    fn ask(&mut self, range: Range, only_written: bool, visit: &mut dyn FnMut(Range)) -> u64 {
        let Some(file) = &self.file else { return range.start };
        let mut runs = vec![Run::default(); RUNS];
        let not_of_file = if only_written { PAGE_IS_FILE } else { 0 };
        // The kernel wants whole pages.
        let end = range.end.next_multiple_of(PAGE);
        let mut at = range.start;
        while at < range.end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                start: at,
                end,
                vec: runs.as_mut_ptr() as u64,
                vec_len: RUNS as u64,
                category_inverted: not_of_file,
                category_mask: not_of_file,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                ..ScanArg::default()
            };
            // SAFETY: `arg` and the runs that it names are writable over the call, for the lengths in it.
            let got = unsafe { libc::ioctl(file.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut arg) };
            let Some(found) = usize::try_from(got).ok().and_then(|got| runs.get(..got)) else {
                self.is_old = true;
                return at;
            };
            for run in found {
                if run.categories & PAGE_IS_SWAPPED != 0 {
                    self.swapped += (run.end - run.start) / PAGE;
                }
                visit(Range { start: run.start, end: run.end.min(range.end) });
            }
            if arg.walk_end <= at {
                break;
            }
            at = arg.walk_end;
        }
        range.end
    }

    /// Looks every page up.
    fn look_up(&mut self, range: Range, only_written: bool, visit: &mut dyn FnMut(Range)) {
        let Some(file) = &self.file else { return visit(range) };
        let pages = (range.end - range.start).div_ceil(PAGE);
        let mut entries = vec![0_u8; 8 * pages.min(LOOKED_UP as u64) as usize];
        let mut at = range.start;
        while at < range.end {
            let want = (((range.end - at).div_ceil(PAGE)) as usize).min(LOOKED_UP);
            let got = file.read_at(&mut entries[..8 * want], at / PAGE * 8).unwrap_or(0) / 8;
            if got == 0 {
                return;
            }
            for entry in entries[..8 * got].as_chunks::<8>().0 {
                let entry = u64::from_ne_bytes(*entry);
                let end = (at + PAGE).min(range.end);
                if entry & (PRESENT | SWAPPED) != 0 && !(only_written && entry & OF_FILE != 0) {
                    self.swapped += u64::from(entry & SWAPPED != 0);
                    visit(Range { start: at, end });
                }
                at = end;
            }
        }
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
        let page = |n: u64| base + n * PAGE;
        // Kernels of both kinds say the same.
        for is_old in [false, true] {
            let mut runs = Vec::new();
            let mut pagemap = Pagemap { is_old, ..Pagemap::open(std::process::id()) };
            pagemap.present(Range { start: base, end: base + PAGES as u64 * PAGE }, &mut |r| runs.push(r));
            assert_eq!(runs, [Range { start: page(3), end: page(5) }, Range { start: page(60), end: page(61) }]);
        }
        let mut word = [0; 8];
        assert_eq!(ProcessMemory::new(std::process::id()).read(page(4), &mut word), 8);
        assert_eq!(u64::from_ne_bytes(word), 4);
        // SAFETY: the mapping made above, which nothing refers to any more.
        unsafe { libc::munmap(start, PAGES * PAGE as usize) };
        assert_eq!(ProcessMemory::new(std::process::id()).read(page(4), &mut word), 0);
    }

    // A sanitizer's shadow, or an arena for all times: terabytes of address space with next to nothing in it.
    #[test]
    fn reserved_address_space_costs_next_to_nothing() {
        const LENGTH: usize = 1 << 42;
        // SAFETY: a fresh anonymous mapping, unmapped below.
        let start = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let at = libc::mmap(std::ptr::null_mut(), LENGTH, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_ne!(at, libc::MAP_FAILED);
            libc::madvise(at, LENGTH, libc::MADV_NOHUGEPAGE);
            at.cast::<u8>().add(LENGTH / 2).write_volatile(1);
            at
        };
        let base = start as u64;
        let mut pagemap = Pagemap::open(std::process::id());
        let mut runs = Vec::new();
        let began = std::time::Instant::now();
        if pagemap.ask(Range { start: base, end: base + LENGTH as u64 }, false, &mut |r| runs.push(r)) > base {
            let middle = base + LENGTH as u64 / 2;
            assert_eq!(runs, [Range { start: middle, end: middle + PAGE }]);
            assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
        }
        // SAFETY: the mapping made above, which nothing refers to any more.
        unsafe { libc::munmap(start, LENGTH) };
    }

    /// Everything is there and zero.
    struct Zeroes;

    impl Memory for Zeroes {
        fn read(&mut self, _: u64, buffer: &mut [u8]) -> usize {
            buffer.len()
        }
    }

    // Nothing is read outside of the ranges, and gaps between them are passed over at once.
    #[test]
    fn reading_keeps_within_its_ranges() {
        let range = |start, end| Range { start: start * PAGE, end: end * PAGE };
        let mut memory = Within::new(Zeroes, vec![range(1 << 30, 1 << 31), range(2, 4), range(4, 5)]);
        let mut read = |at: u64| memory.read(at, &mut [0; 4 * PAGE as usize]) as u64;
        assert_eq!((read(PAGE), read(3 * PAGE + 8), read(4 * PAGE), read(5 * PAGE)), (0, PAGE - 8, PAGE, 0));
        assert_eq!(memory.behind_gap(0), 2 * PAGE);
        assert_eq!(memory.behind_gap(2 * PAGE + 8), 3 * PAGE);
        assert_eq!(memory.behind_gap(5 * PAGE), PAGE << 30);
        assert_eq!(memory.behind_gap(PAGE << 31), u64::MAX);
    }

    // Globals come before the heap, so that chains begin at them; devices are left alone and counted.
    #[test]
    fn data_of_files_and_stacks_comes_first() {
        let maps = Maps::parse(
            b"1000-2000 rw-p 0 00:00 0 \n\
              3000-4000 r--p 0 00:01 7 /bin/x\n\
              4000-5000 r-xp 0 00:01 7 /bin/x\n\
              5000-6000 rw-p 0 00:01 7 /bin/x\n\
              6000-6800 rw-p 0 00:00 0 \n\
              7000-8000 rw-s 0 00:01 9 /dev/dri/card0\n\
              8000-8800 rw-s 0 00:01 9 /dev/zero (deleted)\n\
              9000-a000 rw-p 0 00:00 0 [stack]\n\
              b000-c000 ---p 0 00:00 0 \n\
              c000-d000 ---s 0 00:00 0 \n",
        );
        let starts = |ranges: &[Range]| ranges.iter().map(|r| r.start).collect::<Vec<u64>>();
        let ranges = Ranges::of(&maps);
        assert_eq!(starts(&ranges.named), [0x5000, 0x6000, 0x8000, 0x9000]);
        assert_eq!((starts(&ranges.others), starts(&ranges.frozen)), (vec![0x1000], vec![0x3000, 0xb000]));
        assert_eq!(ranges.device_bytes, 0x1000);
    }

    // What was written and then protected is read; what is only a file's content is not.
    #[test]
    fn written_pages_that_are_read_only_now_are_found() {
        const PAGES: usize = 4;
        // SAFETY: a fresh private mapping of this program's file, unmapped below.
        let start = unsafe {
            let file = File::open("/proc/self/exe").unwrap();
            let at = libc::mmap(
                std::ptr::null_mut(),
                PAGES * PAGE as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE,
                std::os::fd::AsRawFd::as_raw_fd(&file),
                0,
            );
            assert_ne!(at, libc::MAP_FAILED);
            for page in 0..PAGES {
                std::hint::black_box(at.cast::<u8>().add(page * PAGE as usize).read_volatile());
            }
            at.cast::<u64>().add(2 * 512).write_volatile(7);
            libc::mprotect(at, PAGES * PAGE as usize, libc::PROT_READ);
            at
        };
        let base = start as u64;
        let range = Range { start: base, end: base + PAGES as u64 * PAGE };
        for is_old in [false, true] {
            let mut runs = Vec::new();
            let mut pagemap = Pagemap { is_old, ..Pagemap::open(std::process::id()) };
            pagemap.written(range, &mut |r| runs.push(r));
            assert_eq!(runs, [Range { start: base + 2 * PAGE, end: base + 3 * PAGE }]);
        }
        // The process closes it for itself: what lies there may still be what holds a block.
        // SAFETY: ours, and nothing refers to it.
        unsafe { libc::mprotect(start, PAGES * PAGE as usize, libc::PROT_NONE) };
        let mut runs = Vec::new();
        Pagemap::open(std::process::id()).written(range, &mut |r| runs.push(r));
        assert_eq!(runs, [Range { start: base + 2 * PAGE, end: base + 3 * PAGE }]);
        let mut words = [0; 16];
        assert_eq!(ProcessMemory::new(std::process::id()).read(runs[0].start, &mut words), 16);
        assert_eq!(words[..8], 7_u64.to_ne_bytes());
        // SAFETY: the mapping made above, which nothing refers to any more.
        unsafe { libc::munmap(start, PAGES * PAGE as usize) };
    }
}
