//! A second process that sees to it that nothing gets out of hand while the collector is stopped.
//!
//! A collector that dies takes its probes with it: they are file descriptors. One that is stopped (SIGSTOP, ctrl-z)
//! keeps them, and while a window is open that can slow the target down tenfold. So before a window opens, this helper is
//! told when it must be closed again at the latest. If it is not and the collector is stopped, the helper wakes it
//! (SIGCONT); it closes the window and stops itself again. One that is stopped again and again is killed, which detaches it.
//! While a target is traced exactly the collector is woken every now and then for the same reason: should the target make too
//! many calls meanwhile, tracing ends. (A collector that a debugger has stopped cannot be woken, and is killed.)
//!
//! The helper is forked before any BPF object exists and holds nothing but its two pipes.

use std::ffi::{CStr, CString};
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// How long after its end a window may still be open.
const GRACE: Duration = Duration::from_millis(400);
/// How often the collector is woken, this long apart, before it is killed.
const WAKEUPS: u32 = 8;
const WAKEUP_EVERY_MS: libc::c_int = 250;

/// The collector's end.
#[derive(Debug)]
pub struct Watchdog {
    orders: PipeWriter,
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
        let (orders_reader, orders) = std::io::pipe().map_err(failed)?;
        let (wakeups, wakeups_writer) = std::io::pipe().map_err(failed)?;
        set_nonblocking(wakeups.as_raw_fd()).map_err(failed)?;
        let collector = std::process::id().cast_signed();
        let stat = CString::new(format!("/proc/{collector}/stat")).map_err(|e| failed(e.into()))?;
        // SAFETY: the child makes system calls only (no allocation, no locks), as a fork of a threaded process must.
        let pid = unsafe { libc::fork() };
        match pid {
            -1 => Err(failed(std::io::Error::last_os_error())),
            0 => watch(collector, &stat, orders_reader.as_raw_fd(), wakeups_writer.as_raw_fd()),
            pid => Ok(Watchdog { orders, wakeups, pid, armed: None }),
        }
    }

    /// We shall look again within `length`, by which a window will be closed; replaces what was said before.
    pub fn arm(&mut self, length: Duration) {
        self.armed = Some(Instant::now());
        let limit_ms = u32::try_from((length + GRACE).as_millis()).unwrap_or(u32::MAX);
        // A helper that is gone cannot help; the window is short anyway.
        let _ = self.orders.write_all(&limit_ms.max(1).to_ne_bytes());
    }

    /// We shall go on looking at least every `length`; `None`: there is nothing to look after any more. To be said again and
    /// again, which costs next to nothing.
    pub fn expect_looks(&mut self, length: Option<Duration>) {
        match length {
            Some(length) if self.armed.is_none_or(|at| at.elapsed() >= length / 2) => self.arm(length),
            None if self.armed.take().is_some() => {
                let _ = self.orders.write_all(&0_u32.to_ne_bytes());
            }
            _ => {}
        }
    }

    /// True when the helper has woken us since the last call: somebody had stopped us.
    pub fn has_woken_us(&mut self) -> bool {
        let mut bytes = [0; 16];
        matches!(self.wakeups.read(&mut bytes), Ok(1..))
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

/// The helper's life: system calls only, because it was forked from a process with threads.
fn watch(collector: libc::pid_t, stat: &CStr, orders: RawFd, wakeups: RawFd) -> ! {
    // SAFETY: plain system calls on descriptors that are open and buffers that live on this stack.
    unsafe {
        // A session of its own: ctrl-z and ctrl-c are meant for the collector.
        libc::setsid();
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::prctl(libc::PR_SET_NAME, c"memleak-watch".as_ptr());
        // What it has to do takes microseconds, and must not wait for others. Where that is not allowed, it waits.
        libc::setpriority(libc::PRIO_PROCESS, 0, -10);
        for fd in 0..1024 {
            if fd != orders && fd != wakeups {
                libc::close(fd);
            }
        }
        let mut limit_ms: libc::c_int = -1;
        let mut woken = 0;
        loop {
            let mut poll = libc::pollfd { fd: orders, events: libc::POLLIN, revents: 0 };
            let ready = libc::poll(&raw mut poll, 1, limit_ms);
            if ready > 0 {
                let mut order = [0_u8; 4];
                if libc::read(orders, order.as_mut_ptr().cast(), order.len()) != 4 {
                    libc::_exit(0); // the collector has ended
                }
                let order = u32::from_ne_bytes(order);
                limit_ms = if order == 0 { -1 } else { order.min(i32::MAX.unsigned_abs()).cast_signed() };
                woken = 0;
            } else if ready == 0 {
                limit_ms = WAKEUP_EVERY_MS;
                if !is_stopped(stat) {
                    continue; // late, but it runs and will close the window itself
                }
                woken += 1;
                if woken > WAKEUPS {
                    libc::kill(collector, libc::SIGKILL);
                    libc::_exit(0);
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
