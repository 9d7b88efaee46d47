//! A second process that sees to it that nothing gets out of hand while the collector is stopped.
//!
//! A collector that dies takes its probes with it: they are file descriptors. One that is stopped (SIGSTOP, ctrl-z)
//! keeps them, and while a window is open that can slow the target down tenfold. So before a window opens, this helper is
//! told when it must be closed again at the latest. If it is not and the collector is stopped, the helper wakes it
//! (SIGCONT); it closes the window and stops itself again. One that is stopped again and again is killed, which detaches it.
//! While a target is traced exactly the collector is woken every now and then for the same reason: should the target make too
//! many calls meanwhile, tracing ends. (A collector that a debugger has stopped cannot be woken, and is killed.)
//!
//! A collector that is killed in the middle of attaching or detaching leaves breakpoints behind, see [`memleak_probes::sweep`]:
//! the helper is told of all attachments, and sweeps them when the collector is gone.
//!
//! The helper is forked before any BPF object exists. It holds its ends of a socket and a pipe, and of what it is told.

use std::ffi::{CStr, CString};
use std::io::{IoSlice, IoSliceMut, PipeReader, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use memleak_probes::sweep::{Attachment, MAX_PLACES, Witness};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use crate::{Error, Result};

/// How long after its end a window may still be open.
const GRACE: Duration = Duration::from_millis(400);
/// How often the collector is woken, this long apart, before it is killed.
const WAKEUPS: u32 = 8;
const WAKEUP_EVERY_MS: libc::c_int = 250;
/// So many attachments are kept in mind; further ones are not swept.
const MAX_ATTACHMENTS: usize = 256;

/// What the helper is told: a packet of a few numbers, with the program and the file of an attachment as descriptors.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order<'a> {
    /// Expect a sign of life within so many milliseconds; 0: expect none.
    Arm { limit_ms: u32 },
    /// Probes are about to be attached to a process.
    Attaching { pid: u32, session: bool, offsets: &'a [u64] },
    /// All probes of a process have been detached.
    Detached { pid: u32 },
}

/// Numbers of an order: what it is, a number, whether sessions are meant, and offsets.
const WORDS: usize = 3 + MAX_PLACES;
type Packet = [u8; WORDS * 8];

impl Order<'_> {
    /// The packet, and how many bytes of it are used.
    fn encode(&self) -> (Packet, usize) {
        let (kind, number, session, offsets): (u64, u32, bool, &[u64]) = match *self {
            Order::Arm { limit_ms } => (0, limit_ms, false, &[]),
            Order::Attaching { pid, session, offsets } => (1, pid, session, offsets),
            Order::Detached { pid } => (2, pid, false, &[]),
        };
        let mut packet = [0; WORDS * 8];
        let words = [kind, number.into(), session.into()].into_iter().chain(offsets.iter().copied());
        let mut used = 0;
        for (place, word) in packet.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *place = word.to_ne_bytes();
            used += 8;
        }
        (packet, used)
    }

    /// Reads what [`Order::encode`] made; the offsets go to `offsets`.
    fn decode<'a>(packet: &[u8], offsets: &'a mut [u64; MAX_PLACES]) -> Option<Order<'a>> {
        let mut words = packet.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word));
        let (kind, number, session) = (words.next()?, u32::try_from(words.next()?).ok()?, words.next()? != 0);
        let mut count = 0;
        for (place, word) in offsets.iter_mut().zip(words) {
            *place = word;
            count += 1;
        }
        match kind {
            0 => Some(Order::Arm { limit_ms: number }),
            1 => Some(Order::Attaching { pid: number, session, offsets: &offsets[..count] }),
            2 => Some(Order::Detached { pid: number }),
            _ => None,
        }
    }
}

/// Tells the helper. One that is gone cannot help: nothing depends on it until something else goes wrong.
fn tell(socket: &OwnedFd, order: Order<'_>, files: &[BorrowedFd<'_>]) {
    let (packet, used) = order.encode();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(files));
    }
    let _ = sendmsg(socket, &[IoSlice::new(&packet[..used])], &mut ancillary, SendFlags::NOSIGNAL);
}

/// The collector's end.
#[derive(Debug)]
pub struct Watchdog {
    orders: Arc<OwnedFd>,
    wakeups: PipeReader,
    pid: libc::pid_t,
    /// When the helper was last told to expect something; `None` while it expects nothing.
    armed: Option<Instant>,
}

impl Watchdog {
    /// Forks the helper.
    ///
    /// # Errors
    /// No process or pipe can be made.
    pub fn start() -> Result<Watchdog> {
        let failed = |e| Error::io("failed to start the watchdog", e);
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (theirs, orders) = socketpair(AddressFamily::UNIX, kind, flags, None).map_err(|e| failed(e.into()))?;
        let (wakeups, wakeups_writer) = std::io::pipe().map_err(failed)?;
        set_nonblocking(wakeups.as_raw_fd()).map_err(failed)?;
        let collector = std::process::id().cast_signed();
        let stat = CString::new(format!("/proc/{collector}/stat")).map_err(|e| failed(e.into()))?;
        // SAFETY: the child makes system calls only (no allocation, no locks), as a fork of a threaded process must.
        let pid = unsafe { libc::fork() };
        match pid {
            -1 => Err(failed(std::io::Error::last_os_error())),
            0 => watch(collector, &stat, theirs.as_fd(), wakeups_writer.as_raw_fd()),
            pid => Ok(Watchdog { orders: Arc::new(orders), wakeups, pid, armed: None }),
        }
    }

    /// We shall look again within `length`, by which a window will be closed; replaces what was said before.
    pub fn arm(&mut self, length: Duration) {
        self.armed = Some(Instant::now());
        let limit_ms = u32::try_from((length + GRACE).as_millis()).unwrap_or(u32::MAX).max(1);
        tell(&self.orders, Order::Arm { limit_ms }, &[]);
    }

    /// We shall go on looking at least every `length`; `None`: there is nothing to look after any more. To be said again and
    /// again, which costs next to nothing.
    pub fn expect_looks(&mut self, length: Option<Duration>) {
        match length {
            Some(length) if self.armed.is_none_or(|at| at.elapsed() >= length / 2) => self.arm(length),
            None if self.armed.take().is_some() => {
                tell(&self.orders, Order::Arm { limit_ms: 0 }, &[]);
            }
            _ => {}
        }
    }

    /// Whom to tell of attachments.
    pub fn witness(&self) -> Box<dyn Witness> {
        Box::new(Teller { orders: Arc::clone(&self.orders) })
    }

    /// True when the helper has woken us since the last call: somebody had stopped us.
    pub fn has_woken_us(&mut self) -> bool {
        let mut bytes = [0; 16];
        matches!(self.wakeups.read(&mut bytes), Ok(1..))
    }
}

/// Tells the helper of attachments.
struct Teller {
    orders: Arc<OwnedFd>,
}

impl Witness for Teller {
    fn attaching(&self, attachment: &Attachment<'_>) {
        let Attachment { pid, program, session, file, offsets } = *attachment;
        tell(&self.orders, Order::Attaching { pid, session, offsets }, &[program, file]);
    }

    fn detached(&self, pid: u32) {
        tell(&self.orders, Order::Detached { pid }, &[]);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        // SAFETY: no memory is involved; the helper is our child and has not been waited for, so the pid is its own.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}

fn set_nonblocking(fd: RawFd) -> std::io::Result<()> {
    // SAFETY: F_SETFL takes an integer; the descriptor is open.
    match unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// An attachment as the helper keeps it in mind; free without a pid.
#[derive(Clone, Copy)]
struct Kept {
    pid: u32,
    session: bool,
    program: RawFd,
    file: RawFd,
    count: usize,
    offsets: [u64; MAX_PLACES],
}

impl Kept {
    const FREE: Kept = Kept { pid: 0, session: false, program: -1, file: -1, count: 0, offsets: [0; MAX_PLACES] };

    fn forget(&mut self) {
        // SAFETY: both descriptors are ours, and nobody else's.
        unsafe {
            libc::close(self.program);
            libc::close(self.file);
        }
        *self = Kept::FREE;
    }

    fn sweep(&self) {
        // SAFETY: both descriptors are open until `forget`.
        let (program, file) = unsafe { (BorrowedFd::borrow_raw(self.program), BorrowedFd::borrow_raw(self.file)) };
        let offsets = &self.offsets[..self.count];
        // The process may have ended, and then nothing is left.
        let _ = Attachment { pid: self.pid, program, session: self.session, file, offsets }.sweep();
    }
}

/// What a packet meant.
enum Received {
    /// Expect a sign of life within so many milliseconds; -1: expect none.
    Limit(libc::c_int),
    /// An attachment, or nothing.
    Noted,
    /// The collector has gone.
    End,
}

/// Receives a packet. System calls only.
fn receive(orders: BorrowedFd<'_>, kept: &mut [Kept; MAX_ATTACHMENTS]) -> Received {
    let (mut packet, mut offsets): (Packet, _) = ([0; WORDS * 8], [0; MAX_PLACES]);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(orders, &mut [IoSliceMut::new(&mut packet)], &mut ancillary, RecvFlags::CMSG_CLOEXEC);
    let bytes = match received {
        Ok(received) if received.bytes > 0 => received.bytes,
        Err(rustix::io::Errno::INTR) => return Received::Noted,
        _ => return Received::End,
    };
    let mut files = [-1; 2];
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            files.iter_mut().zip(received).for_each(|(place, file)| *place = file.into_raw_fd());
        }
    }
    match Order::decode(&packet[..bytes], &mut offsets) {
        Some(Order::Arm { limit_ms: 0 }) => return Received::Limit(-1),
        Some(Order::Arm { limit_ms }) => {
            return Received::Limit(limit_ms.min(i32::MAX.unsigned_abs()).cast_signed());
        }
        Some(Order::Attaching { pid, session, offsets }) => {
            let mut new = Kept { pid, session, program: files[0], file: files[1], count: offsets.len(), ..Kept::FREE };
            new.offsets[..offsets.len()].copy_from_slice(offsets);
            match kept.iter_mut().find(|kept| kept.pid == 0) {
                Some(free) => *free = new,
                None => new.forget(),
            }
        }
        Some(Order::Detached { pid }) => kept.iter_mut().filter(|kept| kept.pid == pid).for_each(Kept::forget),
        None => {}
    }
    Received::Noted
}

/// The helper's life: system calls only, because it was forked from a process with threads.
fn watch(collector: libc::pid_t, stat: &CStr, orders: BorrowedFd<'_>, wakeups: RawFd) -> ! {
    let mut kept = [Kept::FREE; MAX_ATTACHMENTS];
    // SAFETY: plain system calls on descriptors that are open and buffers that live on this stack.
    unsafe {
        // A session of its own: ctrl-z and ctrl-c are meant for the collector.
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, c"memleak-watch".as_ptr());
        // What it has to do takes microseconds, and must not wait for others. Where that is not allowed, it waits.
        libc::setpriority(libc::PRIO_PROCESS, 0, -10);
        for fd in 0..1024 {
            if fd != orders.as_raw_fd() && fd != wakeups {
                libc::close(fd);
            }
        }
        let mut limit_ms: libc::c_int = -1;
        let mut woken = 0;
        loop {
            let mut poll = libc::pollfd { fd: orders.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            let ready = libc::poll(&raw mut poll, 1, limit_ms);
            if ready > 0 {
                match receive(orders, &mut kept) {
                    Received::Limit(limit) => (limit_ms, woken) = (limit, 0),
                    Received::Noted => {}
                    Received::End => {
                        kept.iter().filter(|kept| kept.pid != 0).for_each(Kept::sweep);
                        libc::_exit(0);
                    }
                }
            } else if ready == 0 {
                limit_ms = WAKEUP_EVERY_MS;
                if !is_stopped(stat) {
                    continue; // late, but it runs and will close the window itself
                }
                woken += 1;
                if woken > WAKEUPS {
                    libc::kill(collector, libc::SIGKILL);
                    // That ends the socket, too.
                    limit_ms = -1;
                    continue;
                }
                libc::write(wakeups, [1_u8].as_ptr().cast(), 1);
                libc::kill(collector, libc::SIGCONT);
            }
        }
    }
}

/// Whether the process whose `/proc/PID/stat` this is has been stopped. System calls only.
fn is_stopped(stat: &CStr) -> bool {
    let mut bytes = [0_u8; 256];
    // SAFETY: `stat` is a C string; the buffer is writable for its length; the descriptor is closed again.
    let length = unsafe {
        let fd = libc::open(stat.as_ptr(), libc::O_RDONLY);
        let length = libc::read(fd, bytes.as_mut_ptr().cast(), bytes.len());
        libc::close(fd);
        length
    };
    let bytes = &bytes[..usize::try_from(length).unwrap_or(0)];
    // The state follows the name, which may contain anything, so the last parenthesis counts.
    let end = bytes.iter().rposition(|b| *b == b')').unwrap_or(0);
    matches!(bytes.get(end + 2), Some(b'T' | b't'))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that somebody stops while a window is open runs on; one that is only late is left alone. (The whole,
    /// with a real collector, is a test of the suite.)
    #[test]
    fn only_a_stopped_process_counts_as_stopped() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let stat = CString::new(format!("/proc/{}/stat", child.id())).unwrap();
        assert!(!is_stopped(&stat));
        // SAFETY: the child is ours and has not been waited for.
        unsafe { libc::kill(child.id().cast_signed(), libc::SIGSTOP) };
        for _ in 0..100 {
            std::thread::sleep(Duration::from_millis(10));
            if is_stopped(&stat) {
                break;
            }
        }
        assert!(is_stopped(&stat));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_stopped(&stat), "gone");
    }

    /// What is told must arrive, whatever the number of places; packets of another size or kind are nothing.
    #[test]
    fn orders_arrive_as_they_were_told() {
        let places: Vec<u64> = (0..MAX_PLACES as u64).map(|n| n << 40 | 7).collect();
        for order in [
            Order::Arm { limit_ms: 600 },
            Order::Attaching { pid: 4_194_304, session: true, offsets: &places },
            Order::Attaching { pid: 1, session: false, offsets: &places[..1] },
            Order::Detached { pid: 77 },
        ] {
            let (packet, used) = order.encode();
            assert_eq!(Order::decode(&packet[..used], &mut [0; MAX_PLACES]), Some(order));
        }
        assert_eq!(Order::decode(&[0; 23], &mut [0; MAX_PLACES]), None);
        assert_eq!(Order::decode(&[9; 24], &mut [0; MAX_PLACES]), None);
    }

    /// A collector that is late but runs must not be signalled.
    #[test]
    fn a_late_collector_is_left_alone() {
        let mut watchdog = Watchdog::start().unwrap();
        watchdog.arm(Duration::from_millis(10));
        std::thread::sleep(GRACE + Duration::from_millis(300));
        assert!(!watchdog.has_woken_us());
        watchdog.expect_looks(None);
    }
}
