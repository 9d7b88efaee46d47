//! Programs of the tests: compiled, started, and asked for return addresses.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;

use memleak_core::process::ProcessStat;
use memleak_core::snapshot::Process;
use tempfile::TempDir;

/// A folder with compiled programs, removed with it.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Self {
        Folder(tempfile::tempdir().expect("temporary folder"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Compiles `stack.c`.
    pub fn program(&self, name: &str, flags: &[&str]) -> PathBuf {
        let path = self.path(name);
        compile("stack.c", &path, &[flags, &["-ldl"]].concat());
        path
    }

    /// Compiles `plugin.c`.
    pub fn plugin(&self, name: &str, flags: &[&str]) -> PathBuf {
        let path = self.path(name);
        compile("plugin.c", &path, &[&["-shared", "-fPIC"], flags].concat());
        path
    }
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/symbolize").join(name)
}

fn compile(name: &str, to: &Path, flags: &[&str]) {
    run(Command::new("gcc").arg("-O2").arg("-o").arg(to).arg(source(name)).args(flags));
}

/// Runs a tool that must succeed.
pub fn run(command: &mut Command) {
    let output = command.output().expect("tool starts");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Line that carries the mark `LINE name`.
pub fn line(file: &str, name: &str) -> u32 {
    let text = std::fs::read_to_string(source(file)).expect("source");
    let mark = format!("LINE {name}");
    let index = text.lines().position(|l| l.ends_with(&mark)).expect("marked line");
    u32::try_from(index + 1).expect("short file")
}

/// A running `stack.c`, ended with it.
pub struct Running {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Running {
    pub fn start(program: &Path, arguments: &[&Path]) -> Self {
        Self::spawn(Command::new(program).args(arguments))
    }

    pub fn spawn(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("starts");
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("piped"));
        Running { child, input, output }
    }

    /// Sends a word and reads the addresses of the answer.
    pub fn ask(&mut self, word: &str) -> Vec<u64> {
        let input = self.input.as_mut().expect("runs");
        writeln!(input, "{word}").expect("runs");
        let mut answer = String::new();
        self.output.read_line(&mut answer).expect("runs");
        assert!(answer.ends_with('\n'), "the program ended: {:?}", self.child.try_wait());
        answer.split_whitespace().map(|a| u64::from_str_radix(a, 16).expect("hexadecimal")).collect()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process as instance `instance`.
    pub fn process(&self, instance: u32) -> Arc<Process> {
        Arc::new(ProcessStat::read(self.pid()).expect("runs").to_process(instance))
    }

    /// Lets it end and waits for that.
    pub fn end(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(format!("/tmp/perf-{}.map", self.pid()));
        let _ = self.child.kill();
        self.stop();
    }
}
