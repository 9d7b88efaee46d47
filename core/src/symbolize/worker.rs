//! Reads debug information in a process of its own, so that it can be stopped.
//!
//! A thread that hangs in a file made for it cannot be ended; a process can. `Worker` starts this program again as
//! its worker, passes it the files to read (descriptors over a socket) and asks it one address at a time. A question
//! that takes too much CPU time, or kills the worker, costs that one file its debug information; the next question
//! starts a new worker. The worker gives up root and is bound in memory. [`serve`] is its side.
//!
//! A message is its length (4 bytes) and JSON. Strictly in turns: one question, one reply.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};

use super::lookup::{Answer, Lookups};
use crate::process::ProcDir;
use crate::sys;

/// The name that the program is started under as a worker (`argv[0]`).
pub const NAME: &str = "memleak-symbolizer";
/// This program, to be started as a worker.
pub const OWN_PROGRAM: &str = "/proc/self/exe";
/// CPU time that one question may take, seconds.
const MAX_CPU_S: f64 = 3.0;
/// Time that one question may take however busy the machine is.
const MAX_TIME: Duration = Duration::from_secs(20);
/// Time that all questions about one file may take together, beyond what is usual for one.
const MAX_TIME_OF_FILE: Duration = Duration::from_secs(10);
/// What a question may take without being counted.
const USUAL: Duration = Duration::from_millis(10);
/// How often it is looked whether the worker still has time.
const TICK: Duration = Duration::from_millis(200);
/// Longest message, in bytes: that of an answer with many inlined calls with long names.
const MAX_MESSAGE: usize = 4 << 20;
/// Memory of the worker's own, in bytes; files that it has mapped do not count.
const MAX_MEMORY: u64 = 1 << 30;
/// `nobody` and `nogroup`.
const NOBODY: u32 = 65_534;

#[derive(Serialize, Deserialize)]
struct Question {
    id: u64,
    address: u64,
    debug_info: bool,
    /// The file comes along with the message; these are its folders.
    open: Option<Vec<PathBuf>>,
    /// Files that are not needed any more.
    close: Vec<u64>,
}

/// A file to ask about.
#[derive(Debug)]
pub(super) struct Source {
    /// A number of its own.
    pub(super) id: u64,
    /// The file.
    pub(super) file: File,
    /// Folders with parts that it may share with other files.
    pub(super) debug_dirs: Vec<PathBuf>,
    /// Time that questions about it have taken.
    pub(super) spent: Duration,
    /// Tells whoever has opened it that it is gone.
    alive: Rc<()>,
}

impl Source {
    pub(super) fn new(file: File, debug_dirs: Vec<PathBuf>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Source { id, file, debug_dirs, spent: Duration::ZERO, alive: Rc::new(()) }
    }
}

/// What became of a question.
#[derive(Debug, PartialEq)]
pub(super) enum Reply {
    /// An answer.
    Answer(Answer),
    /// The file's debug information, or all of it, cannot be read, and why.
    Unreadable(String),
}

/// Who is asked.
pub(super) struct Reader {
    place: Place,
    /// Files that have been asked about.
    open: HashMap<u64, Weak<()>>,
}

enum Place {
    /// This process: for tests.
    Here(Lookups),
    Worker(Worker),
}

impl Default for Reader {
    fn default() -> Self {
        Reader::new(None)
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("open", &self.open.len()).finish_non_exhaustive()
    }
}

impl Reader {
    /// A reader that asks a worker made from `program`, or without one this process.
    pub(super) fn new(program: Option<&Path>) -> Self {
        let place = match program {
            None => Place::Here(Lookups::default()),
            Some(program) => Place::Worker(Worker::new(program)),
        };
        Reader { place, open: HashMap::new() }
    }

    /// The functions at an address, given in the file's own terms.
    pub(super) fn ask(&mut self, source: &mut Source, address: u64, debug_info: bool) -> Reply {
        let place = &mut self.place;
        self.open.retain(|id, alive| {
            let keep = alive.strong_count() > 0;
            if !keep {
                place.close(*id);
            }
            keep
        });
        self.open.insert(source.id, Rc::downgrade(&source.alive));
        match place {
            Place::Here(lookups) => ask_here(lookups, source, address, debug_info),
            Place::Worker(worker) => worker.ask(source, address, debug_info),
        }
    }
}

impl Place {
    fn close(&mut self, id: u64) {
        match self {
            Place::Here(lookups) => lookups.close(id),
            Place::Worker(worker) => worker.close(id),
        }
    }
}

fn ask_here(lookups: &mut Lookups, source: &Source, address: u64, debug_info: bool) -> Reply {
    if !lookups.has(source.id) {
        match source.file.try_clone() {
            Ok(file) => lookups.open(source.id, file, &source.debug_dirs),
            Err(e) => return Reply::Unreadable(format!("the file cannot be kept open: {e}")),
        }
    }
    match lookups.ask(source.id, address, debug_info) {
        Some(answer) => Reply::Answer(answer),
        None => Reply::Unreadable("it is malformed".to_owned()),
    }
}

/// The collector's side.
pub(super) struct Worker {
    program: PathBuf,
    running: Option<Running>,
    /// No worker can be started: only files without debug information are read, here.
    fallback: Option<Lookups>,
}

struct Running {
    child: Child,
    socket: UnixStream,
    /// Files that it has.
    known: HashSet<u64>,
    close: Vec<u64>,
}

/// Why there is no answer.
enum Failure {
    /// The worker took too long and was ended.
    Slow,
    /// It has ended.
    Died,
}

impl Worker {
    fn new(program: &Path) -> Self {
        Worker { program: program.to_owned(), running: None, fallback: None }
    }

    fn close(&mut self, id: u64) {
        if let Some(running) = &mut self.running
            && running.known.remove(&id)
        {
            running.close.push(id);
        }
        if let Some(lookups) = &mut self.fallback {
            lookups.close(id);
        }
    }

    fn ask(&mut self, source: &mut Source, address: u64, debug_info: bool) -> Reply {
        if debug_info && source.spent > MAX_TIME_OF_FILE {
            return Reply::Unreadable("it takes too long to read".to_owned());
        }
        // A worker may have died of files read before: only one that dies again, fresh, dies of this one.
        for attempt in 0..2 {
            let was_fresh = self.running.is_none();
            if self.fallback.is_none() && was_fresh {
                match Running::start(&self.program) {
                    Ok(running) => self.running = Some(running),
                    Err(e) => {
                        tracing::warn!("no source lines: failed to start {}: {e}", self.program.display());
                        self.fallback = Some(Lookups::default());
                    }
                }
            }
            let Some(running) = &mut self.running else { break };
            let started = Instant::now();
            let result = running.ask(source, address, debug_info);
            source.spent += started.elapsed().saturating_sub(USUAL);
            match result {
                Ok(Some(answer)) => return Reply::Answer(answer),
                Ok(None) => {
                    running.known.remove(&source.id);
                    return Reply::Unreadable("it is malformed".to_owned());
                }
                Err(failure) => {
                    self.running = None;
                    match failure {
                        Failure::Slow => return Reply::Unreadable("it takes too long to read".to_owned()),
                        Failure::Died if was_fresh || attempt > 0 => {
                            return Reply::Unreadable("reading it needs too much memory or nesting".to_owned());
                        }
                        Failure::Died => {}
                    }
                }
            }
        }
        match &mut self.fallback {
            Some(lookups) if !debug_info => ask_here(lookups, source, address, false),
            _ => Reply::Unreadable("there is no process to read it in".to_owned()),
        }
    }
}

impl Running {
    fn start(program: &Path) -> io::Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        let child = Command::new(program)
            .arg0(NAME)
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // ctrl-c and ctrl-z are meant for us.
            .process_group(0)
            .spawn()?;
        socket.set_read_timeout(Some(TICK))?;
        socket.set_write_timeout(Some(MAX_TIME))?;
        Ok(Running { child, socket, known: HashSet::new(), close: Vec::new() })
    }

    fn ask(&mut self, source: &Source, address: u64, debug_info: bool) -> Result<Option<Answer>, Failure> {
        let new = !self.known.contains(&source.id);
        let question = Question {
            id: source.id,
            address,
            debug_info,
            open: new.then(|| source.debug_dirs.clone()),
            close: std::mem::take(&mut self.close),
        };
        let started = Instant::now();
        let cpu_before = self.cpu_s();
        send(&self.socket, &question, new.then_some(source.file.as_fd())).map_err(|_| Failure::Died)?;
        self.known.insert(source.id);
        let mut length = [0; 4];
        self.read(&mut length, started, cpu_before)?;
        let length = u32::from_ne_bytes(length) as usize;
        if length > MAX_MESSAGE {
            return Err(Failure::Died);
        }
        let mut body = vec![0; length];
        self.read(&mut body, started, cpu_before)?;
        serde_json::from_slice(&body).map_err(|_| Failure::Died)
    }

    /// Fills the buffer, while the worker has time.
    fn read(&mut self, buffer: &mut [u8], started: Instant, cpu_before: f64) -> Result<(), Failure> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.socket.read(&mut buffer[filled..]) {
                Ok(0) => return Err(Failure::Died),
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if self.cpu_s() - cpu_before > MAX_CPU_S || started.elapsed() > MAX_TIME {
                        return Err(Failure::Slow);
                    }
                }
                Err(_) => return Err(Failure::Died),
            }
        }
        Ok(())
    }

    /// CPU time that it has used; 0 when that cannot be read.
    fn cpu_s(&self) -> f64 {
        ProcDir::open(self.child.id()).and_then(|d| d.stat()).map_or(0.0, |s| s.cpu_s())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a message, with a descriptor.
fn send(mut socket: &UnixStream, message: &impl Serialize, file: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).map_err(io::Error::other)?.to_ne_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let files = file.as_slice();
    if !files.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(files));
    }
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(&length)], &mut ancillary, SendFlags::NOSIGNAL)?;
    socket.write_all(&length[sent..])?;
    socket.write_all(&body)
}

/// Receives a question and the file that came along; `None` at the end.
fn receive(mut socket: &UnixStream) -> io::Result<Option<(Question, Option<File>)>> {
    let mut length = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let buffers = &mut [IoSliceMut::new(&mut length)];
    let received = rustix::net::recvmsg(socket, buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?.bytes;
    if received == 0 {
        return Ok(None);
    }
    let mut file = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            file = files.last().map(File::from);
        }
    }
    socket.read_exact(&mut length[received..])?;
    let length = u32::from_ne_bytes(length) as usize;
    if length > MAX_MESSAGE {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; length];
    socket.read_exact(&mut body)?;
    Ok(Some((serde_json::from_slice(&body)?, file)))
}

/// True when this process was started as a worker; then [`serve`] is all that it is to do.
pub fn is_worker() -> bool {
    std::env::args_os().next().is_some_and(|name| name == NAME)
}

/// The worker's life: answers what comes over standard input, a socket, until its other end is closed.
pub fn serve() {
    sys::confine(NOBODY, MAX_MEMORY);
    let Ok(input) = io::stdin().as_fd().try_clone_to_owned() else { return };
    let socket = UnixStream::from(input);
    let mut lookups = Lookups::default();
    // Nobody is left to be told what went wrong here.
    while let Ok(Some((question, file))) = receive(&socket) {
        for id in question.close {
            lookups.close(id);
        }
        if let Some((dirs, file)) = question.open.zip(file) {
            lookups.open(question.id, file, &dirs);
        }
        let answer = lookups.ask(question.id, question.address, question.debug_info);
        if send(&socket, &answer, None).is_err() {
            return;
        }
    }
}
