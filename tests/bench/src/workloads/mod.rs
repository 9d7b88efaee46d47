//! The programs that are measured, and the load that is put on them.

mod nginx;
mod program;
pub use program::compile;
mod redis;
mod sqlite;

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::process::{self, Running, find_below};
use crate::tools::path_of;

/// How long a program may take to get ready: valgrind needs seconds for what takes milliseconds.
const READY: Duration = Duration::from_secs(60);

/// How much longer than it was told to a phase may take.
const SLACK: Duration = Duration::from_secs(60);

/// How a program is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Launch {
    /// As it is.
    Plain,
    /// Below a command, given by its words.
    Below(Vec<String>),
    /// Compiled with AddressSanitizer.
    Sanitized,
}

impl Launch {
    /// A command that starts `program` this way.
    pub fn command(&self, program: &Path) -> Command {
        match self {
            Launch::Below(words) if !words.is_empty() => {
                let mut command = Command::new(path_of(&words[0]).unwrap_or_else(|| PathBuf::from(&words[0])));
                command.args(&words[1..]).arg(program);
                command
            }
            _ => Command::new(program),
        }
    }
}

/// What one phase of load has done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Done {
    /// Units of work, such as requests.
    pub units: f64,
    /// How long they took, in seconds.
    pub elapsed_s: f64,
    /// 99 of 100 requests were answered within this, in milliseconds; `None` where nothing is asked.
    pub p99_ms: Option<f64>,
}

/// A running program under measurement; ended when dropped.
pub trait Target {
    /// The process that does the work: what memleak attaches to and whose clock is read.
    fn pid(&self) -> u32;

    /// The processes of the tool that it was started below; empty when there is none.
    fn helpers(&self) -> Vec<u32>;

    /// Puts load on it for about that long.
    ///
    /// # Errors
    /// It has ended, or does not answer in time.
    fn load(&mut self, seconds: u64) -> Result<Done>;

    /// Asks it to end, and waits.
    fn stop(&mut self);
}

/// A program with its load.
pub trait Workload {
    /// What it is called in options and in JSON.
    fn id(&self) -> &'static str;

    /// What it is, in a few words.
    fn title(&self) -> &'static str;

    /// What [`Done::units`] counts, in the plural.
    fn unit(&self) -> &'static str;

    /// Why it cannot be run here; `None` when it can.
    fn missing(&self) -> Option<String>;

    /// Settings of memleak that the measurement itself needs; none as a rule.
    fn settings(&self) -> &'static [&'static str] {
        &[]
    }

    /// True when the benchmark compiles the program itself.
    fn can_be_sanitized(&self) -> bool {
        false
    }

    /// Starts the program and waits until it can work; `folder` is its own.
    ///
    /// # Errors
    /// It does not start.
    fn start(&self, launch: &Launch, folder: &Path) -> Result<Box<dyn Target>>;
}

/// All workloads, in the order of the table.
pub fn workloads() -> Vec<Box<dyn Workload>> {
    vec![
        Box::new(program::PACED_1K),
        Box::new(program::PACED_10K),
        Box::new(program::PACED_50K),
        Box::new(program::PACED_200K),
        Box::new(program::LOOP),
        Box::new(redis::SET),
        Box::new(redis::GET),
        Box::new(sqlite::Sqlite),
        Box::new(nginx::Nginx),
        Box::new(program::PYTHON),
    ]
}

/// The process of a command that was started with [`Launch::command`].
///
/// # Errors
/// It cannot be found below the command that launched it.
fn worker_of(running: &Running, launch: &Launch, program: &Path) -> Result<u32> {
    match launch {
        // valgrind becomes the program; others have it as a child.
        Launch::Below(words) if words.first().is_some_and(|word| word != "valgrind") => {
            find_below(running.pid(), program)
        }
        _ => Ok(running.pid()),
    }
}

/// The processes of a launcher other than the one that does the work.
fn helpers_of(running: &Running, worker: u32) -> Vec<u32> {
    let pid = running.pid();
    if pid == worker {
        return Vec::new();
    }
    std::iter::once(pid).chain(process::descendants(pid)).filter(|&p| p != worker).collect()
}

/// `missing` for a workload that needs commands of Debian packages.
fn missing_command(names: &[&str]) -> Option<String> {
    let name = names.iter().find(|name| path_of(name).is_none())?;
    Some(format!("{name} is not installed (tests/setup.sh bench installs it)"))
}

/// A server on loopback that was started with [`Launch::command`].
#[derive(Debug)]
struct Server {
    running: Running,
    worker: u32,
    port: u16,
}

impl Server {
    /// Starts it and waits until it accepts connections.
    fn start(mut command: Command, launch: &Launch, program: &Path, port: u16, folder: &Path) -> Result<Self> {
        let mut running = Running::start(command.current_dir(folder), folder)?;
        let deadline = Instant::now() + READY;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if !running.is_running() {
                bail!("{} ended before it listened{}", program.display(), running.last_words());
            }
            if Instant::now() >= deadline {
                bail!("{} does not listen on port {port} after {READY:?}", program.display());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let worker = worker_of(&running, launch, program)?;
        Ok(Server { running, worker, port })
    }

    fn stop(&mut self) {
        if self.running.is_running() {
            process::send(self.worker, libc::SIGTERM);
            // One that does not end is killed there; it was measured already.
            let _ = self.running.finish();
        }
    }
}

/// A port that nobody listens on; should somebody take it in between, the server does not start and says so.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("failed to find a free port on 127.0.0.1")?;
    Ok(listener.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    // Names are typed by people and read by programs.
    #[test]
    fn ids_are_distinct() {
        let all = workloads();
        for (n, workload) in all.iter().enumerate() {
            assert!(all[..n].iter().all(|other| other.id() != workload.id()), "{}", workload.id());
        }
    }

    // A wrapper comes before the program, whose arguments follow.
    #[test]
    fn launchers_come_first() {
        let launch = Launch::Below(vec!["no-such-tool".into(), "-o".into(), "x".into()]);
        let mut command = launch.command(Path::new("/bin/true"));
        command.arg("argument");
        assert_eq!(command.get_program(), "no-such-tool");
        assert_eq!(command.get_args().collect::<Vec<_>>(), ["-o", "x", "/bin/true", "argument"]);
        assert_eq!(Launch::Plain.command(Path::new("/bin/true")).get_program(), "/bin/true");
    }
}
