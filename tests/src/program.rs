//! Test programs: found, started, told to work, and ended.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// How long a program may take for one step of its work; probes make it slow, other tests make the machine slow, and an
/// emulated machine is slow.
const STEP: Duration = Duration::from_secs(180);

/// Path of a test program (or library, or the demo); `None` when its compiler was not installed.
pub fn program_path(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("MEMLEAK_TEST_PROGRAMS")).join(name);
    path.is_file().then_some(path)
}

/// A folder with the leaker, as `service`, and what it needs of the C library, and nothing else of this system: a root
/// directory for tests about containers.
///
/// # Panics
/// When it cannot be made.
pub fn image() -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a folder can be made");
    let program = program_path("leaker").expect("the program was built");
    let needed = Command::new("ldd").arg(&program).output().expect("ldd runs");
    let needed = String::from_utf8(needed.stdout).expect("ldd prints text");
    for library in needed.split_whitespace().filter(|word| word.starts_with('/')) {
        let copy = root.path().join(&library[1..]);
        fs::create_dir_all(copy.parent().expect("a library lies in a folder")).expect("folders can be made");
        fs::copy(library, copy).expect("the library can be copied");
    }
    fs::copy(&program, root.path().join("service")).expect("the program can be copied");
    root
}

/// A running test program; killed when dropped.
#[derive(Debug)]
pub struct Program {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Program {
    /// Starts the test program `name` and waits until it is ready.
    ///
    /// # Panics
    /// When it was not built (ask with [`crate::Feature::Program`] first) or does not get ready.
    pub fn start(name: &str) -> Self {
        Self::start_with(name, &[] as &[&str])
    }

    /// Like [`Program::start`], with arguments.
    pub fn start_with(name: &str, args: &[impl AsRef<OsStr>]) -> Self {
        let path = program_path(name).unwrap_or_else(|| panic!("the test program {name} was not built"));
        Self::start_command(Command::new(path).args(args))
    }

    /// Starts any command that keeps to the protocol, and waits until it is ready.
    pub fn start_command(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("failed to start {command:?}: {error}"));
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("standard output is piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut program = Program { child, stdin, lines };
        program.expect_line("ready");
        program
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lets the program do its next step.
    pub fn go(&mut self) {
        let stdin = self.stdin.as_mut().expect("the program's input is open");
        stdin.write_all(b"go\n").expect("the program takes its next step");
    }

    /// Lets the program do its next step and waits until it says `answer`.
    pub fn step(&mut self, answer: &str) {
        self.go();
        self.expect_line(answer);
    }

    /// The next line that the program prints.
    pub fn next_line(&mut self) -> String {
        match self.lines.recv_timeout(STEP) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => panic!("the program said nothing for {STEP:?}"),
            Err(RecvTimeoutError::Disconnected) => {
                panic!("the program ended too early: {:?}", self.child.try_wait())
            }
        }
    }

    /// Waits for a line that must be `expected`.
    pub fn expect_line(&mut self, expected: &str) {
        assert_eq!(self.next_line(), expected, "the program's answer");
    }

    /// True as long as the program has not ended.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Closes the program's input, which ends it, and checks that it ends well.
    pub fn finish(mut self) {
        self.stdin = None;
        let status = crate::memleak::wait_within(&mut self.child, STEP).expect("the program ends when its input does");
        assert!(status.success(), "the program ended with {status}");
    }

    /// Kills the program and waits for its end.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.end();
    }
}
