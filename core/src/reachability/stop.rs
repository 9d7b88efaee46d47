//! A brief stop: registers of all threads and a copy of memory, taken while a process stands still.
//!
//! Only on request (`reachability.stop = "brief"`): nothing else in memleak stops a running target. A helper is forked
//! that attaches to every thread with PTRACE_SEIZE, stops them with PTRACE_INTERRUPT, copies, and detaches. The time is
//! capped by a timer that kills the helper: the kernel then detaches all threads and lets them run on, whatever state
//! memleak is in. The helper also dies with the thread that forked it. A process that is being debugged is refused.

mod helper;

use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::memory::{Memory, ProcessMemory, Range};
use crate::error::{Error, ErrorKind, Result};

/// Most memory that is copied, bytes: memleak holds the copy for the time of the scan.
pub const MAX_COPY: u64 = 256 << 20;
/// Most threads that are stopped; with more, the process is refused.
const MAX_THREADS: usize = 4096;
/// Words of registers that are kept per thread: general ones, then vector ones.
const WORDS: usize = 27 + 64;
/// Ranges that a copy may consist of.
const MAX_PIECES: usize = 65_536;

/// Place of the stack pointer among the general registers (`struct user_regs_struct`, `struct user_pt_regs`).
#[cfg(target_arch = "x86_64")]
const STACK_POINTER: usize = 19;
#[cfg(not(target_arch = "x86_64"))]
const STACK_POINTER: usize = 31;
/// What a function may use below the stack pointer (the red zone of the x86-64 ABI).
const BELOW: u64 = 128;

/// What a stop has brought.
#[derive(Debug)]
pub struct Taken {
    /// Threads with the values of their registers.
    pub registers: Vec<(u32, Vec<u64>)>,
    /// What was copied.
    pub memory: Copied,
    /// How long the process stood still, from the first thread stopped to the last one let go.
    pub stopped: Duration,
    /// The time was up before everything was copied.
    pub cut_short: bool,
}

impl Taken {
    /// The part of the main thread's stack that is not in use: what lies there is left over from calls that have returned.
    /// `stack` is the mapping of that stack; empty when the thread is on another one.
    pub fn dead_stack(&self, main: u32, stack: Range) -> Range {
        let registers = self.registers.iter().find(|(tid, _)| *tid == main);
        let pointer = registers.and_then(|(_, values)| values.get(STACK_POINTER)).copied().unwrap_or(0);
        let end = if (stack.start..stack.end).contains(&pointer) { pointer.saturating_sub(BELOW) & !7 } else { 0 };
        Range { start: stack.start, end: end.max(stack.start) }
    }
}

/// How a helper ended, in `Shared::outcome`.
mod outcome {
    pub(super) const UNDER_WAY: u32 = 0;
    pub(super) const DONE: u32 = 1;
    pub(super) const REFUSED: u32 = 2;
    pub(super) const GONE: u32 = 3;
    pub(super) const TOO_MANY: u32 = 4;
    pub(super) const FAILED: u32 = 5;
}

/// Registers of a thread.
#[repr(C)]
#[derive(Clone, Copy)]
struct Registers {
    tid: u32,
    words: u32,
    values: [u64; WORDS],
}

/// What the helper and memleak share; the copy follows behind it.
#[repr(C)]
struct Shared {
    outcome: AtomicU32,
    errno: AtomicU32,
    threads: AtomicU32,
    pieces: AtomicU32,
    cut_short: AtomicU32,
    /// The process stands still.
    stopped: AtomicU32,
    stopped_ns: AtomicU64,
    piece: [(u64, u64); MAX_PIECES],
    registers: [Registers; MAX_THREADS],
}

/// Shared memory: a [`Shared`] and room for the copy.
#[derive(Debug)]
struct Mapping {
    start: *mut libc::c_void,
    length: usize,
    copy: u64,
}

// SAFETY: the mapping belongs to this value alone; nothing in it is bound to a thread.
unsafe impl Send for Mapping {}
// SAFETY: shared references only read plain data that nobody writes any more once the helper has ended.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(copy: u64) -> std::io::Result<Mapping> {
        let length = size_of::<Shared>().next_multiple_of(4096) + copy as usize;
        // SAFETY: a fresh anonymous mapping; the result is checked.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Mapping { start, length, copy })
    }

    fn shared(&self) -> *mut Shared {
        self.start.cast()
    }

    fn copy_at(&self) -> *mut u8 {
        // SAFETY: the mapping is longer than this by construction.
        unsafe { self.start.cast::<u8>().add(self.length - self.copy as usize) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `new` with this length, and nothing refers to it any more.
        unsafe { libc::munmap(self.start, self.length) };
    }
}

/// Memory as it was during a stop; what was not copied is read as it is now.
#[derive(Debug)]
pub struct Copied {
    mapping: Mapping,
    /// Where pieces were, how long they are, and where they begin in the copy; ascending.
    pieces: Vec<(u64, u64, u64)>,
    rest: ProcessMemory,
}

impl Copied {
    /// The pieces that were copied, ascending.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.pieces.iter().map(|&(address, length, at)| (address, self.bytes(at, length)))
    }

    /// Bytes that were copied.
    pub fn bytes_copied(&self) -> u64 {
        self.pieces.iter().map(|p| p.1).sum()
    }

    fn bytes(&self, at: u64, length: u64) -> &[u8] {
        let length = length.min(self.mapping.copy.saturating_sub(at));
        // SAFETY: within the copy, which lives as long as `self` and is not written any more.
        unsafe { std::slice::from_raw_parts(self.mapping.copy_at().add(at as usize), length as usize) }
    }
}

impl Memory for Copied {
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> usize {
        let behind = self.pieces.partition_point(|p| p.0 <= address);
        let piece = behind.checked_sub(1).and_then(|n| self.pieces.get(n).copied());
        match piece {
            Some((start, length, at)) if address < start + length => {
                let offset = address - start;
                let got = (length - offset).min(buffer.len() as u64);
                buffer[..got as usize].copy_from_slice(self.bytes(at + offset, got));
                got as usize
            }
            _ => self.rest.read(address, buffer),
        }
    }
}

/// Stops a process for at most `cap` and copies its registers and, as far as time and `most` allow, the given ranges.
///
/// # Errors
/// Kind [`ErrorKind::Permission`] when the process may not be stopped: it is being debugged, or ptrace is not allowed.
/// Kind [`ErrorKind::Target`] when it has ended or has too many threads.
pub fn take(pid: u32, ranges: &[Range], most: u64, cap: Duration) -> Result<Taken> {
    if let Some(tracer) = tracer_of(pid) {
        let what = format!(
            "failed to stop process {pid}: process {tracer} is debugging it already (TracerPid in /proc/{pid}/status), \
             and only one can; end that, or scan without a stop"
        );
        return Err(Error::new(ErrorKind::Permission, what));
    }
    let failed = |e| Error::io(format!("failed to stop process {pid}"), e);
    let wanted: u64 = ranges.iter().map(|r| r.end - r.start).sum();
    let mapping = Mapping::new(wanted.min(most).next_multiple_of(4096)).map_err(failed)?;
    let folder = std::ffi::CString::new(format!("/proc/{pid}/task")).map_err(|e| failed(e.into()))?;
    let parent = std::process::id().cast_signed();
    // SAFETY: the child makes system calls only, see [`helper`].
    let helper = match unsafe { libc::fork() } {
        -1 => return Err(failed(std::io::Error::last_os_error())),
        0 => helper::live(&mapping, pid.cast_signed(), &folder, ranges, cap, parent),
        helper => helper,
    };
    let mut status = 0;
    // SAFETY: the helper is our child and is waited for once.
    while unsafe { libc::waitpid(helper, &raw mut status, 0) } < 0 {
        if std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
            break;
        }
    }
    // SAFETY: the mapping holds a `Shared` (all-zero is valid), and its only writer has ended.
    let shared = unsafe { &*mapping.shared() };
    let errno = std::io::Error::from_raw_os_error(shared.errno.load(Ordering::Acquire).cast_signed());
    let target = |why: &str| Error::new(ErrorKind::Target, format!("failed to stop process {pid}: {why}"));
    match shared.outcome.load(Ordering::Acquire) {
        outcome::REFUSED => {
            let what = format!(
                "failed to stop process {pid}: {errno}; this needs CAP_SYS_PTRACE, kernel.yama.ptrace_scope below 3, and \
                 a process that nobody is debugging"
            );
            return Err(Error::new(ErrorKind::Permission, what));
        }
        outcome::GONE => return Err(target("it has ended")),
        outcome::TOO_MANY => return Err(target(&format!("it has more than {MAX_THREADS} threads"))),
        outcome::FAILED => return Err(failed(errno)),
        outcome::UNDER_WAY if shared.stopped.load(Ordering::Acquire) == 0 => {
            return Err(target("not all of its threads could be stopped in time; all run on"));
        }
        _ => {}
    }
    let cut_short = shared.cut_short.load(Ordering::Acquire) != 0 || shared.outcome.load(Ordering::Acquire) == 0;
    let threads = (shared.threads.load(Ordering::Acquire) as usize).min(MAX_THREADS);
    let registers = shared.registers[..threads].iter();
    let registers = registers.map(|r| (r.tid, r.values[..(r.words as usize).min(WORDS)].to_vec())).collect();
    let count = (shared.pieces.load(Ordering::Acquire) as usize).min(MAX_PIECES);
    let mut at = 0;
    let mut pieces = Vec::with_capacity(count);
    for &(address, length) in &shared.piece[..count] {
        pieces.push((address, length, at));
        at += length;
    }
    pieces.sort_unstable();
    let stopped = match shared.stopped_ns.load(Ordering::Acquire) {
        0 => cap,
        ns => Duration::from_nanos(ns),
    };
    Ok(Taken { registers, memory: Copied { mapping, pieces, rest: ProcessMemory::new(pid) }, stopped, cut_short })
}

/// The process that debugs this one, if any.
pub fn tracer_of(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?.trim().parse().ok()?;
    (tracer != 0).then_some(tracer)
}

#[cfg(test)]
mod tests;
