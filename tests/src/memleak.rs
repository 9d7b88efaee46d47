//! memleak itself, as a child process that prints NDJSON.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;
use tempfile::TempDir;

use crate::snapshot::Snapshot;

/// How long memleak may take to attach, to show something that has happened, or to end; emulated machines are slow.
const PATIENCE: Duration = Duration::from_secs(180);

/// What is left when memleak has ended.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// All snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
    /// All lines that are not snapshots, oldest first.
    pub others: Vec<Value>,
    /// Everything from standard error.
    pub stderr: String,
}

impl Outcome {
    /// The last snapshot.
    ///
    /// # Panics
    /// When there was none.
    pub fn last(&self) -> &Snapshot {
        self.snapshots.last().unwrap_or_else(|| panic!("no snapshot; standard error:\n{}", self.stderr))
    }

    /// Lines of type `alert`.
    pub fn alerts(&self) -> impl Iterator<Item = &Value> {
        self.others.iter().filter(|line| line["type"] == "alert")
    }
}

/// A running memleak in a folder of its own; killed when dropped.
#[derive(Debug)]
pub struct Memleak {
    child: Child,
    lines: Receiver<String>,
    stderr: Arc<Mutex<String>>,
    stderr_reader: Option<JoinHandle<()>>,
    snapshots: Vec<Snapshot>,
    others: Vec<Value>,
    /// Working folder: the report and alerts of the run go there.
    folder: TempDir,
}

impl Memleak {
    /// Watches one process, with quick snapshots and every site in them; returns when everything is attached.
    pub fn watch(pid: u32) -> Self {
        Self::watch_with(pid, &[] as &[&str])
    }

    /// Like [`Memleak::watch`], with more arguments.
    pub fn watch_with(pid: u32, args: &[impl AsRef<OsStr>]) -> Self {
        let pid = pid.to_string();
        let mut all = vec![OsStr::new("-p"), OsStr::new(&pid)];
        all.extend(args.iter().map(AsRef::as_ref));
        Self::start(&all)
    }

    /// Starts memleak with these arguments, quick snapshots and every site in them; returns when everything is
    /// attached.
    pub fn start(args: &[impl AsRef<OsStr>]) -> Self {
        let mut memleak = Self::launch(args);
        memleak.wait_until("the first snapshot", |_| true);
        memleak
    }

    /// Watches the kernel, with quick snapshots, every site in them, and every allocation traced; returns when everything
    /// is attached.
    pub fn kernel(args: &[impl AsRef<OsStr>]) -> Self {
        let folder = tempfile::tempdir().expect("a folder for the run can be made");
        let mut command = memleak_command();
        let common = ["--json", "--interval", "200ms", "--set", "live.sites=0", "--set", "kernel.budget=off"];
        command.arg("kernel").args(common).args(args);
        let mut memleak = Self::spawn(command.current_dir(folder.path()), folder);
        memleak.wait_until("the first snapshot", |_| true);
        memleak
    }

    /// Like [`Memleak::start`], but returns at once.
    pub fn launch(args: &[impl AsRef<OsStr>]) -> Self {
        let folder = tempfile::tempdir().expect("a folder for the run can be made");
        let mut command = memleak_command();
        // The common settings come first: a test's own settings win over them.
        // Without a budget: accounts are exact only if nothing is left out.
        command
            .args(["--json", "--interval", "200ms", "--set", "live.sites=0", "--set", "collector.budget=off"])
            .args(args);
        Self::spawn(command.current_dir(folder.path()), folder)
    }

    /// Takes over any command that prints memleak's NDJSON; `folder` is deleted at the end.
    pub fn spawn(command: &mut Command, folder: TempDir) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("failed to start {command:?}: {error}"));
        let stdout = child.stdout.take().expect("standard output is piped");
        let mut errors = child.stderr.take().expect("standard error is piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let stderr = Arc::new(Mutex::new(String::new()));
        let collected = Arc::clone(&stderr);
        let stderr_reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = errors.read(&mut buffer) {
                collected.lock().expect("no reader panics").push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
        });
        Memleak {
            child,
            lines,
            stderr,
            stderr_reader: Some(stderr_reader),
            snapshots: Vec::new(),
            others: Vec::new(),
            folder,
        }
    }

    /// Process id of memleak.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The folder in which it runs.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.lock().expect("no reader panics").clone()
    }

    /// A snapshot of everything that has happened before the call.
    ///
    /// The next snapshot may have been begun before that, so it is the one after the next.
    pub fn settled(&mut self) -> Snapshot {
        // Lines that were written but not read yet are old news, too.
        std::thread::sleep(Duration::from_millis(50));
        self.drain();
        let seen = self.snapshots.last().map_or(0, |snapshot| snapshot.number);
        self.wait_until("two more snapshots", |snapshot| snapshot.number >= seen + 2)
    }

    /// The first new snapshot that satisfies `wanted`; `what` describes it in the message of a failed test.
    ///
    /// # Panics
    /// When memleak ends or minutes pass without such a snapshot.
    pub fn wait_until(&mut self, what: &str, wanted: impl Fn(&Snapshot) -> bool) -> Snapshot {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    if let Some(snapshot) = self.take(&line)
                        && wanted(snapshot)
                    {
                        return snapshot.clone();
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    let last = self.snapshots.last().map(Snapshot::callers);
                    panic!("no {what} within {PATIENCE:?}; last: {last:#?}\nstandard error:\n{}", self.stderr())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = wait_within(&mut self.child, PATIENCE);
                    self.join_stderr();
                    panic!("memleak ended with {status:?} before {what}; standard error:\n{}", self.stderr())
                }
            }
        }
    }

    /// Waits until memleak has said for the `times`th time that a process is watched: that its allocator is attached.
    ///
    /// A process can be in a snapshot before that, while its dynamic linker is still loading the allocator.
    pub fn wait_attached(&mut self, pid: u32, times: usize) {
        let start = format!("watching {pid} ");
        self.wait_for_stderr(&format!("{times} lines with `{start}`"), |text| {
            text.lines().filter(|line| line.starts_with(&start) && line.contains(" functions)")).count() >= times
        });
    }

    /// Waits until standard error contains `text`.
    pub fn wait_for_message(&self, text: &str) {
        self.wait_for_stderr(&format!("`{text}`"), |stderr| stderr.contains(text));
    }

    fn wait_for_stderr(&self, what: &str, there: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !there(&self.stderr()) {
            assert!(Instant::now() < deadline, "no {what} on standard error:\n{}", self.stderr());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: libc::c_int) {
        let pid = libc::pid_t::try_from(self.child.id()).expect("a pid fits");
        // SAFETY: kill takes plain numbers; the child has not been waited for, so the pid is still its own.
        let result = unsafe { libc::kill(pid, signal) };
        assert_eq!(result, 0, "failed to signal memleak: {}", std::io::Error::last_os_error());
    }

    /// Asks memleak to end as Ctrl-C does and returns what it has said.
    pub fn stop(self) -> Outcome {
        self.signal(libc::SIGINT);
        self.outcome()
    }

    /// Waits until memleak ends by itself and returns what it has said.
    pub fn outcome(mut self) -> Outcome {
        // Keep reading while waiting: a full pipe would keep it from ending.
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.take(&line);
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("memleak did not end within {PATIENCE:?}; standard error:\n{}", self.stderr())
                }
            }
        }
        let status = wait_within(&mut self.child, PATIENCE)
            .unwrap_or_else(|| panic!("memleak closed its output but did not end; standard error:\n{}", self.stderr()));
        self.join_stderr();
        Outcome {
            code: status.code(),
            snapshots: std::mem::take(&mut self.snapshots),
            others: std::mem::take(&mut self.others),
            stderr: self.stderr(),
        }
    }

    fn join_stderr(&mut self) {
        if let Some(reader) = self.stderr_reader.take() {
            reader.join().expect("the reader of standard error does not panic");
        }
    }

    /// Files away the lines that have arrived.
    fn drain(&mut self) {
        while let Ok(line) = self.lines.try_recv() {
            self.take(&line);
        }
    }

    /// Files one line away; returns it when it is a snapshot.
    fn take(&mut self, line: &str) -> Option<&Snapshot> {
        let value: Value = serde_json::from_str(line)
            .unwrap_or_else(|error| panic!("standard output has a line that is not JSON ({error}): {line}"));
        if value["type"] != "snapshot" {
            self.others.push(value);
            return None;
        }
        let snapshot = serde_json::from_value(value).unwrap_or_else(|error| panic!("bad snapshot ({error}): {line}"));
        self.snapshots.push(snapshot);
        self.snapshots.last()
    }
}

impl Drop for Memleak {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The `memleak` binary of this build, ready for arguments.
///
/// # Panics
/// When it was not built or is older than its sources: a test of yesterday's binary proves nothing.
pub fn memleak_command() -> Command {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    Command::new(BINARY.get_or_init(|| {
        let test = std::env::current_exe().expect("the running test has a path");
        let folder = test.ancestors().nth(2).expect("the test lies in target/PROFILE/deps");
        let binary = folder.join("memleak");
        if let Some(reason) = stale(&binary) {
            panic!("{reason}: run `cargo build -p memleak` first, or test everything with `cargo test --workspace`");
        }
        binary
    }))
}

/// Why the binary does not belong to the sources as they are; `None` when it does.
fn stale(binary: &Path) -> Option<String> {
    let modified = |path: &Path| std::fs::metadata(path).and_then(|metadata| metadata.modified());
    let Ok(built) = modified(binary) else {
        return Some(format!("{} does not exist", binary.display()));
    };
    // Cargo lists every source of the binary, embedded files included, in a makefile rule beside it.
    let rule = std::fs::read_to_string(binary.with_extension("d")).unwrap_or_default();
    let sources = rule.split_once(": ").map_or("", |(_, sources)| sources).replace("\\ ", "\0");
    sources
        .split_whitespace()
        .map(|source| PathBuf::from(source.replace('\0', " ")))
        .find(|source| modified(source).unwrap_or(SystemTime::UNIX_EPOCH) > built)
        .map(|source| format!("{} is older than {}", binary.display(), source.display()))
}

/// Runs a command to its end and returns exit code, standard output and standard error.
///
/// # Panics
/// When it does not end within minutes; it is killed then.
pub fn output_within(command: &mut Command) -> (Option<i32>, String, String) {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("failed to start {command:?}: {error}"));
    let stdout = collect(child.stdout.take().expect("standard output is piped"));
    let stderr = collect(child.stderr.take().expect("standard error is piped"));
    let status = wait_within(&mut child, PATIENCE);
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let stdout = stdout.join().expect("the reader does not panic");
    let stderr = stderr.join().expect("the reader does not panic");
    let status = status.unwrap_or_else(|| panic!("{command:?} did not end within {PATIENCE:?}:\n{stdout}\n{stderr}"));
    assert_eq!(status.signal(), None, "{command:?} was ended by a signal:\n{stderr}");
    (status.code(), stdout, stderr)
}

fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What has arrived before an error is what there is to show.
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Waits for a child's end, at most `limit`; `None` when it has not ended by then.
pub fn wait_within(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
