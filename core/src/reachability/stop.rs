//! A brief stop: registers of all threads and a copy of memory, taken while a process stands still.
//!
//! Only on request (`reachability.stop = "brief"`): nothing else in memleak stops a running target. A helper is forked
//! that attaches to every thread with PTRACE_SEIZE, stops them with PTRACE_INTERRUPT, copies, and detaches. The time is
//! capped by a timer that kills the helper: the kernel then detaches all threads and lets them run on, whatever state
//! memleak is in. The helper also dies with the thread that forked it. A process that is being debugged is refused.
//!
//! The helper was forked from a process with threads, so it makes system calls only: no allocation, no locks, no panics.

use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::memory::{Memory, ProcessMemory, Range};
use crate::error::{Error, ErrorKind, Result};

/// Most memory that is copied, bytes: memleak holds the copy for the time of the scan.
pub const MAX_COPY: u64 = 256 << 20;
/// Bytes copied at once: between two pieces the clock is looked at.
const PIECE: u64 = 1 << 20;
/// Share of the cap after which no further piece is copied, so that an orderly end fits.
const ORDERLY: f64 = 0.8;
/// Most threads that are stopped; with more, the process is refused.
const MAX_THREADS: usize = 4096;
/// Words of registers that are kept per thread: general ones, then vector ones.
const WORDS: usize = 27 + 64;
/// Ranges that a copy may consist of.
const MAX_PIECES: usize = 65_536;
/// How long the helper may take before anything is stopped.
const PREPARATION: Duration = Duration::from_secs(5);
/// A wait for a thread that has not stopped by then is interrupted for a look whether it has ended.
const LOOK: Duration = Duration::from_millis(2);
/// Room for a listing of threads, bytes.
const LISTING: usize = 32 << 10;

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
    // SAFETY: the child makes system calls only, see the module.
    let helper = match unsafe { libc::fork() } {
        -1 => return Err(failed(std::io::Error::last_os_error())),
        0 => helper(&mapping, pid.cast_signed(), &folder, ranges, cap, parent),
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

/// A thread in the helper's hands.
#[derive(Clone, Copy)]
struct Thread {
    tid: libc::pid_t,
    state: State,
    /// A signal that was on its way and is passed on at the end.
    signal: libc::c_int,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Runs,
    Stopped,
    Ended,
}

/// The helper's life: system calls only.
fn helper(
    mapping: &Mapping,
    pid: libc::pid_t,
    folder: &std::ffi::CStr,
    ranges: &[Range],
    cap: Duration,
    parent: libc::pid_t,
) -> ! {
    // SAFETY: the mapping holds a `Shared`; the parent does not touch it while this process lives.
    let shared = unsafe { &mut *mapping.shared() };
    // SAFETY: plain system calls on valid buffers.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if libc::getppid() != parent {
            libc::_exit(1);
        }
    }
    let Some(timer) = Deadline::new(libc::SIGKILL, PREPARATION) else { end(shared, outcome::FAILED) };
    let Some(looks) = looks() else { end(shared, outcome::FAILED) };
    touch(mapping);
    // SAFETY: `folder` is a C string.
    let tasks = unsafe { libc::open(folder.as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC) };
    if tasks < 0 {
        end(shared, outcome::GONE);
    }
    let mut threads = [Thread { tid: 0, state: State::Runs, signal: 0 }; MAX_THREADS];
    let mut count = 0;
    // Nothing is stopped by this; afterwards stopping takes a moment only.
    seize_all(shared, tasks, &mut threads, &mut count);
    timer.set(cap, Duration::ZERO);
    looks.set(LOOK, LOOK);
    let began_ns = now_ns();
    loop {
        let running = |t: &&mut Thread| t.state == State::Runs;
        for thread in threads[..count].iter_mut().filter(running) {
            // SAFETY: no memory is involved; a thread that has ended is an error and no more.
            unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, thread.tid, 0, 0) };
        }
        for thread in threads[..count].iter_mut().filter(running) {
            wait_for(thread, tasks);
        }
        // Threads that others have started meanwhile.
        let before = count;
        seize_all(shared, tasks, &mut threads, &mut count);
        if count == before {
            break;
        }
    }
    looks.set(Duration::ZERO, Duration::ZERO);
    let stopped = threads[..count].iter().filter(|t| t.state == State::Stopped);
    if stopped.clone().next().is_none() {
        end(shared, outcome::GONE);
    }
    shared.stopped.store(1, Ordering::Release);
    for thread in stopped.clone() {
        keep_registers(shared, thread.tid);
    }
    copy(shared, mapping, pid, ranges, began_ns + (cap.as_nanos() as f64 * ORDERLY) as u64);
    for thread in stopped {
        // SAFETY: no memory is involved. A signal that was on its way goes on.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, thread.tid, 0, thread.signal) };
    }
    shared.stopped_ns.store((now_ns() - began_ns).max(1), Ordering::Release);
    end(shared, outcome::DONE)
}

fn end(shared: &Shared, outcome: u32) -> ! {
    if outcome != outcome::DONE {
        // SAFETY: errno of this thread.
        shared.errno.store(unsafe { *libc::__errno_location() }.cast_unsigned(), Ordering::Release);
    }
    shared.outcome.store(outcome, Ordering::Release);
    // SAFETY: ends this process at once; attached threads are let go by the kernel.
    unsafe { libc::_exit(0) }
}

/// Sends this process a signal when the time is up: SIGKILL comes even if somebody has stopped it.
struct Deadline(libc::timer_t);

impl Deadline {
    fn new(signal: libc::c_int, time: Duration) -> Option<Deadline> {
        // SAFETY: `sigevent` is plain data for which all-zero is valid.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = signal;
        let mut timer: libc::timer_t = ptr::null_mut();
        // SAFETY: both live over the call.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) } != 0 {
            return None;
        }
        let deadline = Deadline(timer);
        deadline.set(time, Duration::ZERO);
        Some(deadline)
    }

    /// After so much time, and then again and again if `every` is not zero. No time at all is never.
    fn set(&self, time: Duration, every: Duration) {
        let of = |time: Duration| libc::timespec {
            tv_sec: time.as_secs().cast_signed(),
            tv_nsec: time.subsec_nanos().into(),
        };
        let value = libc::itimerspec { it_interval: of(every), it_value: of(time) };
        // SAFETY: `value` lives over the call; the old one is not asked for.
        unsafe { libc::timer_settime(self.0, 0, &raw const value, ptr::null_mut()) };
    }
}

/// Interrupts waiting, once it is set. The signal itself does nothing.
fn looks() -> Option<Deadline> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: plain data, for which all-zero is valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // No SA_RESTART: the wait must return.
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: the handler does nothing, `action` and the set live over the calls; the signal may be blocked in the thread
    // that this process was forked from.
    let is_ready = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGALRM);
        libc::sigaction(libc::SIGALRM, &raw const action, ptr::null_mut()) == 0
            && libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut()) == 0
    };
    if is_ready { Deadline::new(libc::SIGALRM, Duration::ZERO) } else { None }
}

/// Makes the pages of the copy present, so that copying does not have to.
fn touch(mapping: &Mapping) {
    let start = mapping.copy_at();
    // SAFETY: within the mapping.
    let populated = unsafe { libc::madvise(start.cast(), mapping.copy as usize, libc::MADV_POPULATE_WRITE) } == 0;
    let mut at = 0;
    // Before Linux 5.14.
    while !populated && at < mapping.copy as usize {
        // SAFETY: within the mapping.
        unsafe { start.add(at).write_volatile(0) };
        at += 4096;
    }
}

/// Attaches to every thread that is not attached to yet; ends the helper when one cannot be.
fn seize_all(shared: &Shared, tasks: RawFd, threads: &mut [Thread; MAX_THREADS], count: &mut usize) {
    let mut listing = [0_u64; LISTING / 8];
    // SAFETY: the descriptor is open.
    unsafe { libc::lseek(tasks, 0, libc::SEEK_SET) };
    loop {
        // SAFETY: the buffer is writable for its length.
        let got = unsafe { libc::syscall(libc::SYS_getdents64, tasks, listing.as_mut_ptr(), LISTING) };
        let Ok(got @ 1..) = usize::try_from(got) else { return };
        // SAFETY: the kernel has just filled so many bytes of the buffer.
        let bytes = unsafe { std::slice::from_raw_parts(listing.as_ptr().cast::<u8>(), got.min(LISTING)) };
        let mut rest = bytes;
        // ino (8), offset (8), length (2), type (1), name.
        while let (Some(length), Some(name)) = (rest.get(16..18), rest.get(19..)) {
            let length = usize::from(u16::from_ne_bytes([length[0], length[1]]));
            let mut tid: libc::pid_t = 0;
            for digit in name.iter().take_while(|b| b.is_ascii_digit()) {
                tid = tid.wrapping_mul(10).wrapping_add(libc::pid_t::from(digit - b'0'));
            }
            if tid > 0 && !threads[..*count].iter().any(|t| t.tid == tid) {
                seize(shared, tasks, tid, threads, count);
            }
            match rest.get(length..) {
                Some(next) if length > 0 => rest = next,
                _ => break,
            }
        }
    }
}

fn seize(shared: &Shared, tasks: RawFd, tid: libc::pid_t, threads: &mut [Thread; MAX_THREADS], count: &mut usize) {
    // SAFETY: no memory is involved.
    if unsafe { libc::ptrace(libc::PTRACE_SEIZE, tid, 0, 0) } != 0 {
        // SAFETY: errno of this thread.
        let errno = unsafe { *libc::__errno_location() };
        // EPERM is also the answer for a thread that is ending. A first thread that has ended stays in the listing.
        if errno == libc::ESRCH || has_ended(tasks, tid) {
            return;
        }
        // SAFETY: as above; looking at the thread has changed it.
        unsafe { *libc::__errno_location() = errno };
        end(shared, outcome::REFUSED);
    }
    match threads.get_mut(*count) {
        Some(thread) => *thread = Thread { tid, state: State::Runs, signal: 0 },
        None => end(shared, outcome::TOO_MANY),
    }
    *count += 1;
}

/// Whether a thread is not there any more, or is a zombie; `tasks` is the folder of all threads.
fn has_ended(tasks: RawFd, tid: libc::pid_t) -> bool {
    // The path "TID/stat".
    let mut path = [0_u8; 32];
    let digits = decimal(tid.cast_unsigned(), &mut path);
    let suffix = b"/stat\0";
    let Some(rest) = path.get_mut(digits..digits + suffix.len()) else { return false };
    rest.copy_from_slice(suffix);
    let mut text = [0_u8; 128];
    // SAFETY: the path is a C string, the buffer is writable for its length, and the descriptor is closed once.
    let got = unsafe {
        let file = libc::openat(tasks, path.as_ptr().cast(), libc::O_RDONLY | libc::O_CLOEXEC);
        if file < 0 {
            return true;
        }
        let got = libc::read(file, text.as_mut_ptr().cast(), text.len());
        libc::close(file);
        got
    };
    // "TID (NAME) STATE ...": the name may have any bytes. A thread that ends while it is looked at gives an error.
    let text = usize::try_from(got).ok().and_then(|got| text.get(..got)).unwrap_or_default();
    let name_end = text.iter().rposition(|b| *b == b')');
    !matches!(name_end.and_then(|at| text.get(at + 2)), Some(state) if !b"ZX".contains(state))
}

/// Writes a number; returns how many digits it has.
fn decimal(mut number: u32, to: &mut [u8; 32]) -> usize {
    let mut digits = [0_u8; 10];
    let mut count = 0;
    while let Some(digit) = digits.get_mut(count) {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
        count += 1;
        if number == 0 {
            break;
        }
    }
    for (to, digit) in to.iter_mut().zip(digits.iter().take(count).rev()) {
        *to = *digit;
    }
    count
}

/// Waits until a thread that was interrupted stands still or has ended. One that can do neither is left when the time is up.
fn wait_for(thread: &mut Thread, tasks: RawFd) {
    let mut status = 0;
    // SAFETY: `status` is writable.
    while unsafe { libc::waitpid(thread.tid, &raw mut status, libc::__WALL) } < 0 {
        // SAFETY: errno of this thread.
        let is_interrupted = unsafe { *libc::__errno_location() } == libc::EINTR;
        // The end of the first thread is not told while others live.
        if !is_interrupted || has_ended(tasks, thread.tid) {
            thread.state = State::Ended;
            return;
        }
    }
    if !libc::WIFSTOPPED(status) {
        thread.state = State::Ended;
        return;
    }
    thread.state = State::Stopped;
    // Stopped by a signal on its way, not by the interruption (PTRACE_EVENT_STOP).
    if status >> 16 == 0 {
        thread.signal = libc::WSTOPSIG(status);
    }
}

fn keep_registers(shared: &mut Shared, tid: libc::pid_t) {
    let number = shared.threads.load(Ordering::Relaxed) as usize;
    let Some(kept) = shared.registers.get_mut(number) else { return };
    kept.tid = tid.cast_unsigned();
    let mut words = 0;
    for set in [libc::NT_PRSTATUS, libc::NT_PRFPREG] {
        let Some(room) = kept.values.get_mut(words..) else { break };
        let mut area = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: size_of_val(room) };
        // SAFETY: the area is writable for the length that is passed.
        if unsafe { libc::ptrace(libc::PTRACE_GETREGSET, tid, set, &raw mut area) } == 0 {
            words += area.iov_len / 8;
        }
    }
    kept.words = words as u32;
    shared.threads.store(number as u32 + 1, Ordering::Release);
}

/// Copies until there is no more, no more room, or no more time.
fn copy(shared: &mut Shared, mapping: &Mapping, pid: libc::pid_t, ranges: &[Range], until_ns: u64) {
    let (mut filled, mut count) = (0, 0_usize);
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let want = (range.end - at).min(PIECE).min(mapping.copy - filled);
            let Some(piece) = shared.piece.get_mut(count) else { return cut(shared) };
            if want == 0 || now_ns() >= until_ns {
                return cut(shared);
            }
            // SAFETY: within the copy, see `want`.
            let room = unsafe { mapping.copy_at().add(filled as usize) };
            let local = libc::iovec { iov_base: room.cast(), iov_len: want as usize };
            let remote = libc::iovec { iov_base: at as *mut libc::c_void, iov_len: want as usize };
            // SAFETY: `local` is writable for its length; the kernel checks the other side.
            let got = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
            let Ok(got @ 1..) = u64::try_from(got) else {
                // A page that cannot be read.
                at = (at / 4096 + 1) * 4096;
                continue;
            };
            *piece = (at, got);
            filled += got;
            count += 1;
            shared.pieces.store(count as u32, Ordering::Release);
            at += if got == want { got } else { (got / 4096 + 1) * 4096 };
        }
    }
}

fn cut(shared: &Shared) {
    shared.cut_short.store(1, Ordering::Release);
}

fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable over the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

#[cfg(test)]
mod tests;
