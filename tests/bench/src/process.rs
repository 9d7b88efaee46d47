//! Child processes: started with a handle, waited for with a limit, ended with everything below them.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

/// How long a process may take to end when it is asked to.
const END: Duration = Duration::from_secs(30);

/// A line that a command has printed.
#[derive(Debug)]
pub struct Line {
    /// When it arrived; it may be looked at much later.
    pub arrived: Instant,
    /// Its text, without the newline.
    pub text: String,
}

/// A running command; it is ended, with its descendants, when this is dropped.
#[derive(Debug)]
pub struct Running {
    /// What to call it in messages.
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<Line>,
    /// File that standard error goes to.
    errors: PathBuf,
}

impl Running {
    /// Starts a command with its input and output connected to us, and its errors to a file in `folder`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(command: &mut Command, folder: &Path) -> Result<Self> {
        let name = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let errors = folder.join(format!("{name}.stderr"));
        let file = File::create(&errors).with_context(|| format!("failed to create {}", errors.display()))?;
        die_with_us(command);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(file)
            .spawn()
            .with_context(|| format!("failed to start {name}"))?;
        let stdin = child.stdin.take();
        let (sender, lines) = channel();
        if let Some(stdout) = child.stdout.take() {
            // Ends with the process; nobody has to wait for it.
            std::thread::spawn(move || {
                for text in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if sender.send(Line { arrived: Instant::now(), text }).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Running { name, child, stdin, lines, errors })
    }

    /// Process id of the command itself; below a wrapper that is not the program that is measured.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes to its input.
    ///
    /// # Errors
    /// It has ended or closed its input.
    pub fn write(&mut self, text: &str) -> Result<()> {
        let written = match &mut self.stdin {
            Some(stdin) => stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()),
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        };
        written.with_context(|| format!("failed to write to {}{}", self.name, self.last_words()))
    }

    /// The next line for which `wanted` returns something; other lines are dropped: wrappers print theirs in between.
    ///
    /// # Errors
    /// It ends or closes its output first, or there is no such line within `limit`.
    pub fn expect<T>(&mut self, what: &str, limit: Duration, mut wanted: impl FnMut(&Line) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    if let Some(found) = wanted(&line) {
                        return Ok(found);
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!("no {what} from {} within {limit:?}", self.name),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("{} ended before {what}{}", self.name, self.last_words())
                }
            }
        }
    }

    /// The lines that have arrived and were not asked for yet.
    pub fn arrived(&self) -> impl Iterator<Item = Line> + '_ {
        self.lines.try_iter()
    }

    /// Sends a signal to the command.
    pub fn signal(&self, signal: libc::c_int) {
        send(self.child.id(), signal);
    }

    /// Closes its input and waits for its end.
    ///
    /// # Errors
    /// It does not end in time; it is killed then.
    pub fn finish(&mut self) -> Result<ExitStatus> {
        self.stdin = None;
        match wait_within(&mut self.child, END) {
            Some(status) => Ok(status),
            None => {
                self.kill();
                bail!("{} did not end within {END:?} and was killed{}", self.name, self.last_words())
            }
        }
    }

    /// True while it has not ended.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// ": " and the last line of its standard error that is not empty; empty when there is none.
    pub fn last_words(&self) -> String {
        let text = fs::read(&self.errors).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.lines().rfind(|line| !line.trim().is_empty()).map_or_else(String::new, |line| format!(": {}", line.trim()))
    }

    fn kill(&mut self) {
        // Children first: those of a dead parent are no longer found below us.
        for pid in descendants(self.child.id()).into_iter().rev() {
            send(pid, libc::SIGKILL);
        }
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stdin = None;
        if wait_within(&mut self.child, Duration::ZERO).is_none() {
            self.kill();
        }
    }
}

/// Runs a command to its end and returns what it printed.
///
/// # Errors
/// It cannot be started, does not end within `limit` (it is killed then), or ends with an error.
pub fn output_of(command: &mut Command, limit: Duration, folder: &Path) -> Result<String> {
    let mut running = Running::start(command, folder)?;
    running.stdin = None;
    let deadline = Instant::now() + limit;
    let mut output = String::new();
    loop {
        match running.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                output.push_str(&line.text);
                output.push('\n');
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => bail!("{} did not end within {limit:?}", running.name),
        }
    }
    let status = running.finish()?;
    if !status.success() {
        bail!("{} failed ({status}){}", running.name, running.last_words());
    }
    Ok(output)
}

/// The process at or below `pid` that runs `program`, by the file that it executes.
///
/// # Errors
/// There is none within ten seconds.
pub fn find_below(pid: u32, program: &Path) -> Result<u32> {
    let program = fs::canonicalize(program).with_context(|| format!("failed to find {}", program.display()))?;
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let found = std::iter::once(pid)
            .chain(descendants(pid))
            .find(|p| fs::read_link(format!("/proc/{p}/exe")).is_ok_and(|exe| exe == program));
        if let Some(found) = found {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(anyhow!("no process below {pid} runs {}", program.display()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// All processes below `pid`, parents before children.
pub fn descendants(pid: u32) -> Vec<u32> {
    let mut found = children(pid);
    let mut next = 0;
    while next < found.len() {
        let more = children(found[next]);
        found.extend(more);
        next += 1;
    }
    found
}

/// The child processes of all threads of a process.
fn children(pid: u32) -> Vec<u32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let mut found = Vec::new();
    for thread in threads.flatten() {
        // A thread that has ended in the meantime has no children.
        let list = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        found.extend(list.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    found
}

/// Sends a signal to a process of ours: a child, or a descendant that was found just now.
pub fn send(pid: u32, signal: libc::c_int) {
    if let Ok(pid) = libc::pid_t::try_from(pid) {
        // SAFETY: kill takes plain numbers. A process that has ended since it was found makes it fail, which is fine.
        unsafe { libc::kill(pid, signal) };
    }
}

/// Waits for a child's end, at most `limit`; `None` when it has not ended by then.
fn wait_within(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Lets the kernel kill the child when the benchmark is killed: no load may go on behind anybody's back.
fn die_with_us(command: &mut Command) {
    let kill_on_parent_exit = || {
        // SAFETY: prctl is a plain system call, which is allowed between fork and exec.
        match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: the closure makes one system call; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(kill_on_parent_exit) };
}

#[cfg(test)]
mod tests {
    use super::*;

    // A load that outlives the benchmark would disturb everything that comes after it.
    #[test]
    fn drop_ends_the_whole_tree() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 & sleep 1000 & echo started; wait"]);
        let mut running = Running::start(&mut command, folder.path()).unwrap();
        running.expect("a start", END, |line| (line.text == "started").then_some(())).unwrap();
        let below = descendants(running.pid());
        assert_eq!(below.len(), 2);
        drop(running);
        let deadline = Instant::now() + END;
        let alive =
            |pid: &u32| fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
        while below.iter().any(alive) {
            assert!(Instant::now() < deadline, "{below:?} still run");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    // A snapshot belongs to the phase in which it was printed, not to the moment in which it was looked at.
    #[test]
    fn lines_carry_the_time_at_which_they_came() {
        let folder = tempfile::tempdir().unwrap();
        let mut running = Running::start(Command::new("sh").args(["-c", "echo early; read x"]), folder.path()).unwrap();
        std::thread::sleep(Duration::from_millis(500));
        let looked = Instant::now();
        let arrived = running.expect("a line", END, |line| Some(line.arrived)).unwrap();
        assert!(arrived + Duration::from_millis(100) < looked, "{:?} before", looked - arrived);
    }

    // Wrappers print lines of their own; what a program said last is the best reason there is.
    #[test]
    fn failure_quotes_the_last_line_of_standard_error() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo noise; echo one >&2; echo the reason >&2; echo >&2; exit 3"]);
        let error = output_of(&mut command, END, folder.path()).unwrap_err();
        assert!(error.to_string().ends_with("exit status: 3): the reason"), "{error}");
    }

    // Every wait is bounded, or one hanging tool stops the whole benchmark.
    #[test]
    fn output_of_a_hanging_command_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let start = Instant::now();
        let error = output_of(Command::new("sleep").arg("1000"), Duration::from_millis(50), folder.path()).unwrap_err();
        assert!(error.to_string().contains("did not end within 50ms"), "{error}");
        assert!(start.elapsed() < END);
    }
}
