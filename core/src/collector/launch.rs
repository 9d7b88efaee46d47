//! Commands that the collector starts itself, watched from their first instruction.
//!
//! The child waits before exec until the kernel side knows it, and stops (SIGSTOP) right after exec, so that probes
//! are attached before it runs; it stops again when its dynamic linker has mapped its libraries, before their
//! constructors run. No debugger interface is involved. Should the collector die meanwhile, the kernel lets the child
//! go on (parent-death signal SIGCONT).
//!
//! With [`super::Purpose::Run`] all descendants are handled the same way: the kernel side stops them as they are forked,
//! where it can, and when they call exit(). A collector that ends, by an error too, lets all of them go on. One that is
//! killed (SIGKILL) cannot: a descendant that is stopped at that moment stays so until somebody sends it SIGCONT.

use std::io::{PipeReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use memleak_probes::{ProcessEvent, Tracker};

use super::{Collector, Life, Purpose};
use crate::{Error, ErrorKind, Result};

/// For so long after its start a command stops when it has loaded a library, until the tables of that are there, seconds.
/// With [`Purpose::Run`] it always does; a service is not to be held up once it serves.
const STOPS_FOR_S: f64 = 10.0;

/// How long a command waits for the tables by which its stacks are unwound.
const WAIT_FOR_TABLES: Duration = Duration::from_secs(5);

/// A command that runs, or a descendant of it. Once nobody has this any more, nobody would let the process go on.
pub(super) struct Launched {
    pub(super) pid: u32,
    /// It stops before its first instruction and for libraries; else, if at all, when it calls exit() only.
    held: bool,
    /// Number of the target that names it, from 0.
    pub(super) target: usize,
    name: String,
    /// Names the process even when its pid has been given to another.
    pidfd: OwnedFd,
    /// Brings the exit status of a command; `None` for its descendants, which are their parents' to wait for.
    ended: Option<mpsc::Receiver<std::io::Result<ExitStatus>>>,
}

impl Launched {
    /// Whether it has ended, and if it is a command how.
    fn poll(&self) -> Option<Option<ExitStatus>> {
        match &self.ended {
            Some(ended) => match ended.try_recv() {
                Err(mpsc::TryRecvError::Empty) => None,
                result => Some(result.ok().and_then(std::io::Result::ok)),
            },
            None => has_ended(&self.pidfd).then_some(None),
        }
    }
}

/// At the end nobody stays stopped: neither who was launched (see `Launched`) nor children of which was not yet taken note.
impl Drop for Collector {
    fn drop(&mut self) {
        let Some(tracker) = self.tracker.loaded_mut() else { return };
        tracker.detach_stops();
        if !tracker.stops_children() {
            return;
        }
        if let Err(e) = tracker.poll(Duration::ZERO) {
            tracing::warn!("children of the command may stay stopped: {e}");
        }
        while let Some(event) = tracker.next_process_event() {
            if let ProcessEvent::Fork { child, .. } = event {
                let_go(child);
            }
        }
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        send_signal(&self.pidfd, libc::SIGCONT);
    }
}

impl Collector {
    /// Starts a command and begins to watch it.
    pub(super) fn launch(&mut self, command: &[String], target: usize) -> Result<()> {
        let name = command.join(" ");
        let failed = |e| Error::io(format!("failed to start {name}"), e);
        let (mut pid_reader, pid_writer) = std::io::pipe().map_err(failed)?;
        let (go_reader, mut go_writer) = std::io::pipe().map_err(failed)?;
        let (started_sender, started) = mpsc::channel();
        let (ended_sender, ended) = mpsc::channel();
        let mut child = child_command(command, pid_writer, go_reader);
        // The thread that forks must live as long as the child: its end would be the "death" of the child's parent.
        thread::Builder::new()
            .name("launch".into())
            .spawn(move || {
                let spawned = child.spawn();
                drop(child); // its pipe ends
                match spawned {
                    Ok(mut process) => {
                        let _ = started_sender.send(Ok(()));
                        let _ = ended_sender.send(process.wait());
                    }
                    Err(e) => drop(started_sender.send(Err(e))),
                }
            })
            .map_err(failed)?;
        let mut pid = [0; 4];
        if let Err(e) = pid_reader.read_exact(&mut pid) {
            // No child: its thread knows why.
            let why = started.recv().ok().and_then(Result::err);
            return Err(failed(why.unwrap_or(e)));
        }
        let pid = u32::from_ne_bytes(pid);
        let pidfd = open_pidfd(pid).map_err(failed)?;
        self.tracker.get_mut()?.launch(pid)?;
        go_writer.write_all(&[1]).map_err(failed)?;
        match started.recv() {
            Ok(Ok(())) => {}
            Ok(Err(e)) => {
                self.launch_done(pid);
                return Err(failed(e));
            }
            Err(_) => {
                return Err(Error::new(ErrorKind::Target, format!("failed to start {name}: its thread has gone")));
            }
        }
        self.launched.push(Launched { pid, held: true, target, name, pidfd, ended: Some(ended) });
        Ok(())
    }

    /// Whether a process is stopped before its first instruction and for libraries.
    pub(super) fn is_held(&self, pid: u32) -> bool {
        self.launched.iter().any(|l| l.pid == pid && l.held)
    }

    /// Whether a process can be let go on after a stop.
    pub(super) fn can_go_on(&self, pid: u32) -> bool {
        self.launched.iter().any(|l| l.pid == pid)
    }

    /// Lets a launched process go on after a stop, when the tables for its stacks are there.
    pub(super) fn go_on(&mut self, pid: u32) {
        let instance =
            self.watched.iter().find(|(_, w)| w.life == Life::Running && w.process.pid == pid).map(|(i, _)| *i);
        let parts = (&mut self.unwinder, self.tracker.loaded_mut(), instance);
        if let (Some(unwinder), Some(tracker), Some(instance)) = parts {
            unwinder.wait(tracker, instance, WAIT_FOR_TABLES);
        }
        if let Some(launched) = self.launched.iter().find(|l| l.pid == pid) {
            send_signal(&launched.pidfd, libc::SIGCONT);
        }
    }

    /// The dynamic linker of a process has mapped or unmapped something.
    pub(super) fn loaded(&mut self, instance: u32) {
        let now_s = self.now_s();
        let Some(watched) = self.watched.get(&instance) else { return };
        let (since_s, pid) = (now_s - watched.since_s, watched.process.pid);
        if let Err(e) = self.symbolizer.refresh(instance) {
            tracing::debug!(pid, "mappings not read again: {e:#}");
        }
        self.attach_to(instance);
        self.announce(instance, false);
        if self.is_held(pid) {
            if since_s > STOPS_FOR_S
                && self.purpose != Purpose::Run
                && let Err(e) = self.tracker.get_mut().and_then(|t| Ok(t.set_stop_on_load(instance, false)?))
            {
                tracing::warn!(pid, "the process will stop briefly at each load of a library: {e}");
            }
            self.go_on(pid);
        }
    }

    /// The kernel side need not stop a process any more.
    fn launch_done(&mut self, pid: u32) {
        if let Some(tracker) = self.tracker.loaded_mut() {
            tracker.launch_done(pid);
        }
    }

    /// Takes note of commands and descendants that have ended.
    pub(super) fn reap(&mut self) {
        let mut ended = Vec::new();
        self.launched.retain(|l| match l.poll() {
            None => true,
            Some(status) => {
                ended.push((l.pid, l.name.clone(), l.ended.is_some(), status));
                false
            }
        });
        for (pid, name, is_command, status) in ended {
            self.launch_done(pid);
            if !is_command {
                continue;
            }
            self.command_status = status;
            self.command_ended = true;
            if let Some(status) = status.filter(|s| !s.success()) {
                let how = status.signal().map_or_else(|| status.to_string(), |s| format!("killed by signal {s}"));
                tracing::warn!(pid, "the command has ended: {name}: {how}");
            }
        }
    }

    /// How the launched command ended: `None` while it runs; inside, `None` when nobody can tell.
    pub fn command_end(&self) -> Option<Option<ExitStatus>> {
        self.command_ended.then_some(self.command_status)
    }

    /// The child of a followed process: it will stop after every exec, where the kernel can do that.
    /// `followed` is the target that it belongs to by descent.
    pub(super) fn descends(&mut self, child: u32, followed: Option<usize>) {
        if self.purpose != Purpose::Run {
            return;
        }
        let held = self.tracker.loaded().is_some_and(Tracker::stops_children);
        match followed.map(|target| (target, open_pidfd(child))) {
            Some((target, Ok(pidfd))) => {
                self.launched.push(Launched { pid: child, held, target, name: String::new(), pidfd, ended: None });
            }
            // It has ended already; or there are no descriptors left, and it would be stopped for ever.
            _ if held => {
                // The kernel side need not stop whoever gets its number.
                self.launch_done(child);
                let_go(child);
            }
            _ => {}
        }
    }

    /// A watched process has ended: if it is a descendant, it is not waited for any more.
    pub(super) fn descendant_ended(&mut self, pid: u32) {
        let before = self.launched.len();
        self.launched.retain(|l| l.pid != pid || l.ended.is_some());
        if self.launched.len() < before {
            self.launch_done(pid);
        }
    }

    /// Asks launched commands that still run to end (SIGTERM).
    pub fn terminate_launched(&self) {
        for launched in self.launched.iter().filter(|l| l.ended.is_some()) {
            send_signal(&launched.pidfd, libc::SIGTERM);
            send_signal(&launched.pidfd, libc::SIGCONT);
        }
    }
}

/// Lets a process go on of which there is no descriptor.
fn let_go(pid: u32) {
    // SAFETY: the call takes no pointers.
    unsafe { libc::kill(pid.cast_signed(), libc::SIGCONT) };
}

/// The command, set up to report its pid and to wait before exec.
fn child_command(command: &[String], mut pid_writer: std::io::PipeWriter, mut go_reader: PipeReader) -> Command {
    let (program, arguments) = command.split_first().map_or(("", &[][..]), |(p, a)| (p.as_str(), a));
    let mut child = Command::new(program);
    child.args(arguments);
    let parent = std::process::id();
    // SAFETY: between fork and exec the closure makes system calls only: no allocation, no locks.
    unsafe {
        child.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGCONT) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            // The parent may have died before the line above.
            if libc::getppid().cast_unsigned() != parent {
                return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
            }
            pid_writer.write_all(&libc::getpid().to_ne_bytes())?;
            go_reader.read_exact(&mut [0])
        });
    }
    child
}

/// A descriptor for a child that has not been waited for (Linux 5.3).
fn open_pidfd(pid: u32) -> std::io::Result<OwnedFd> {
    // SAFETY: the call takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor for us and nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Whether the process of a descriptor has ended, waited for or not.
fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd, and the count says one.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

/// Sends a signal; a process that has ended needs none.
fn send_signal(pidfd: &OwnedFd, signal: libc::c_int) {
    // SAFETY: a null siginfo is allowed; the descriptor is open.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<u8>(), 0) };
}
