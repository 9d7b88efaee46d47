//! The helper of a stop, which is forked for it: attaches, stops, copies, lets go.
//!
//! It was forked from a process with threads, so it makes system calls only: no allocation, no locks, no panics.

use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{MAX_THREADS, Mapping, Shared, outcome};
use crate::reachability::memory::Range;

/// Bytes copied at once: between two pieces the clock is looked at.
const PIECE: u64 = 1 << 20;
/// Share of the cap after which no further piece is copied, so that an orderly end fits.
const ORDERLY: f64 = 0.8;
/// How long the helper may take before anything is stopped.
const PREPARATION: Duration = Duration::from_secs(5);
/// A wait for a thread that has not stopped by then is interrupted for a look whether it has ended.
pub(super) const LOOK: Duration = Duration::from_millis(2);
/// Room for a listing of threads, bytes.
const LISTING: usize = 32 << 10;

/// A thread in the helper's hands.
#[derive(Clone, Copy)]
pub(super) struct Thread {
    pub(super) tid: libc::pid_t,
    pub(super) state: State,
    /// A signal that was on its way and is passed on at the end.
    pub(super) signal: libc::c_int,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Runs,
    Stopped,
    Ended,
}

/// The helper's life.
pub(super) fn live(
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
pub(super) struct Deadline(libc::timer_t);

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
    pub(super) fn set(&self, time: Duration, every: Duration) {
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
pub(super) fn looks() -> Option<Deadline> {
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
pub(super) fn has_ended(tasks: RawFd, tid: libc::pid_t) -> bool {
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
pub(super) fn decimal(mut number: u32, to: &mut [u8; 32]) -> usize {
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
pub(super) fn wait_for(thread: &mut Thread, tasks: RawFd) {
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
