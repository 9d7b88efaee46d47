//! One process, read from `/proc`: identity, names, and what it uses.
//!
//! Everything goes through a [`ProcDir`], an open descriptor of `/proc/PID`: once it is open, reads never reach
//! another process that got the same pid later; they fail instead. All text is hostile and its length is bounded.
//! Nothing is cached here, nothing is decided: `target` decides what to watch.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::error::{Error, ErrorKind, Result};
use crate::labels::Labels;
use crate::snapshot::Process;
use crate::sys;

/// Longest command line that is kept, in bytes; a longer one ends in `...`.
pub const MAX_CMDLINE: usize = 4096;
/// Longest of the small files (`stat`, `status`, `cgroup`, `comm`), in bytes. The kernel's own are far below.
const MAX_SMALL_FILE: usize = 64 * 1024;
/// Size of the first read of a file, in bytes.
const FIRST_READ: usize = 2048;
/// `PF_KTHREAD` in the `flags` field: a thread of the kernel (include/linux/sched.h).
const PF_KTHREAD: u64 = 0x0020_0000;
/// What the kernel appends to the path of a file that has no name any more.
const DELETED: &[u8] = b" (deleted)";

/// An open `/proc/PID`: stays bound to the process it was opened for.
#[derive(Debug)]
pub struct ProcDir {
    pid: u32,
    dir: File,
}

/// What `/proc/PID/stat` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// Process id.
    pub pid: u32,
    /// Short name. Hostile text.
    pub comm: String,
    /// State letter, for example `S`, or `Z` for a process that has ended and was not waited for.
    pub state: char,
    /// Parent's process id; 0 when it has none that we can see.
    pub ppid: u32,
    /// True for a thread of the kernel.
    pub kernel_thread: bool,
    /// CPU time used so far by all threads, user and system, in clock ticks.
    pub cpu_ticks: u64,
    /// Number of threads.
    pub threads: u64,
    /// Start time in clock ticks after boot.
    pub start_ticks: u64,
    /// Resident set size in pages.
    pub rss_pages: u64,
    /// Lowest address of the program's code and start of its stack: they change when it calls exec. The first is 0
    /// while exec is under way and without a program. They are 1 and 0 when we may not know.
    pub image: (u64, u64),
}

/// Everything about a process that targets are chosen by and reports show.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProcessStat {
    /// Process id as the collector sees it.
    pub pid: u32,
    /// Parent's process id; 0 when it has none that we can see.
    pub ppid: u32,
    /// Start time in clock ticks after boot: with `pid` it names the process.
    pub start_ticks: u64,
    /// Short name. Hostile text.
    pub comm: String,
    /// Path of the executable as the process sees it, without ` (deleted)`; empty when it cannot be read. Hostile text.
    pub exe: String,
    /// True when the executable's name is gone or names another file now.
    pub exe_deleted: bool,
    /// Command line, arguments joined by spaces, at most [`MAX_CMDLINE`] bytes; empty when there is none. Hostile text.
    pub cmdline: String,
    /// Cgroup path below `/sys/fs/cgroup` (v2; without v2, the one of systemd or of the memory controller), starting
    /// with `/`; `None` when it cannot be read.
    pub cgroup: Option<String>,
    /// True for a thread of the kernel.
    pub kernel_thread: bool,
    /// Resident set size in bytes.
    pub rss_bytes: u64,
    /// CPU time used so far by all threads, user and system, in seconds.
    pub cpu_s: f64,
}

/// What a process uses at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Resident set size in bytes.
    pub rss_bytes: u64,
    /// The part of it that is no file's: heap, anonymous mappings, stacks. `None` when the kernel does not say.
    pub anon_bytes: Option<u64>,
    /// CPU time used so far by all threads, user and system, in seconds.
    pub cpu_s: f64,
}

impl ProcessStat {
    /// Reads a process.
    ///
    /// # Errors
    /// Kind [`ErrorKind::Target`] when there is none, or it ends meanwhile.
    pub fn read(pid: u32) -> Result<Self> {
        ProcDir::open(pid)?.process_stat()
    }

    /// The process as the pipeline knows it, as instance number `instance` of the run.
    pub fn to_process(&self, instance: u32) -> Process {
        Process {
            instance,
            pid: self.pid,
            start_ticks: self.start_ticks,
            comm: self.comm.clone(),
            exe: self.exe.clone(),
            cmdline: self.cmdline.clone(),
            labels: self.cgroup.as_deref().map(Labels::from_cgroup).unwrap_or_default(),
        }
    }
}

impl ProcDir {
    /// Opens `/proc/PID`.
    ///
    /// # Errors
    /// Kind [`ErrorKind::Target`] when there is no such process.
    pub fn open(pid: u32) -> Result<Self> {
        let dir = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
            .open(format!("/proc/{pid}"))
            .map_err(|e| failed(pid, "", e))?;
        Ok(ProcDir { pid, dir })
    }

    /// Opens `/proc/PID` and checks that it is the process that started at `start_ticks`.
    ///
    /// # Errors
    /// Kind [`ErrorKind::Target`] when it has ended, whoever has its pid now.
    pub fn open_same(pid: u32, start_ticks: u64) -> Result<Self> {
        let dir = Self::open(pid)?;
        if dir.stat()?.start_ticks != start_ticks {
            return Err(Error::new(
                ErrorKind::Target,
                format!("failed to read process {pid}: it has ended and another process has its pid"),
            ));
        }
        Ok(dir)
    }

    /// The pid it was opened by.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Opens a file below `/proc/PID`, following the kernel's links (`exe`, `root`, `map_files/...`), with `flags` of
    /// `open(2)` in addition to `O_CLOEXEC`.
    pub(crate) fn open_at(&self, name: &str, flags: i32) -> io::Result<File> {
        sys::open_at(&self.dir, Path::new(name), flags)
    }

    /// Reads a file of `/proc/PID`, at most `max` bytes of it; the flag tells whether there was more.
    pub(crate) fn read(&self, name: &str, max: usize) -> io::Result<(Vec<u8>, bool)> {
        let mut file = self.open_at(name, libc::O_RDONLY)?.take(max as u64 + 1);
        // Most of these files fit here: then one read fetches all and the next, of nothing, ends it.
        let mut data = vec![0; FIRST_READ];
        let n = file.read(&mut data)?;
        data.truncate(n);
        if n > 0 {
            file.read_to_end(&mut data)?;
        }
        let cut = data.len() > max;
        data.truncate(max);
        Ok((data, cut))
    }

    fn small(&self, name: &str) -> Result<Vec<u8>> {
        Ok(self.read(name, MAX_SMALL_FILE).map_err(|e| failed(self.pid, name, e))?.0)
    }

    /// Reads `/proc/PID/stat`.
    ///
    /// # Errors
    /// Kind [`ErrorKind::Target`] when the process has ended.
    pub fn stat(&self) -> Result<Stat> {
        parse_stat(&self.small("stat")?).ok_or_else(|| self.malformed("stat"))
    }

    /// Path of the executable as the process sees it, and whether that name is gone or names another file now; `None`
    /// when it cannot be read (kernel thread, missing privilege, ended).
    pub fn exe(&self) -> Option<(PathBuf, bool)> {
        let link = sys::read_link_at(&self.dir, Path::new("exe")).ok()?;
        let bytes = link.as_os_str().as_bytes();
        let Some(stripped) = bytes.strip_suffix(DELETED) else { return Some((link, false)) };
        // A file may really be called `x (deleted)`: then that name still leads to the same file.
        let named = self.open_in_root(&link, libc::O_PATH).and_then(|f| f.metadata());
        if named.is_ok_and(|m| Some((m.dev(), m.ino())) == self.exe_id()) {
            return Some((link, false));
        }
        Some((PathBuf::from(std::ffi::OsString::from_vec(stripped.to_vec())), true))
    }

    /// Device and inode of the executable; `None` when it cannot be read.
    pub(crate) fn exe_id(&self) -> Option<(u64, u64)> {
        let meta = self.open_at("exe", libc::O_PATH).and_then(|f| f.metadata()).ok()?;
        Some((meta.dev(), meta.ino()))
    }

    /// Opens a path as the process sees it, with `flags` of `open(2)` in addition to `O_CLOEXEC`. Absolute links are
    /// followed inside the process's root, not ours. Use `O_PATH` first on anything not known to be a regular file.
    pub(crate) fn open_in_root(&self, path: &Path, flags: i32) -> io::Result<File> {
        let root = self.root()?;
        sys::open_in_root(&root, path, flags)
    }

    /// The process's root directory, opened `O_PATH`.
    pub(crate) fn root(&self) -> io::Result<File> {
        self.open_at("root", libc::O_PATH | libc::O_DIRECTORY)
    }

    /// True when paths of the process mean the same files as ours: same mount namespace and same root directory.
    /// False when that cannot be found out.
    pub(crate) fn shares_our_root(&self) -> bool {
        let id = |f: io::Result<File>| f.and_then(|f| f.metadata()).map(|m| (m.dev(), m.ino())).ok();
        let namespace = id(self.open_at("ns/mnt", libc::O_PATH));
        let root = id(self.root());
        namespace.is_some()
            && root.is_some()
            && namespace == std::fs::metadata("/proc/self/ns/mnt").map(|m| (m.dev(), m.ino())).ok()
            && root == std::fs::metadata("/").map(|m| (m.dev(), m.ino())).ok()
    }

    /// The command line, arguments joined by spaces; empty when it has none or cannot be read.
    pub fn cmdline(&self) -> String {
        let Ok((mut data, cut)) = self.read("cmdline", MAX_CMDLINE) else { return String::new() };
        while data.last() == Some(&0) {
            data.pop();
        }
        for byte in data.iter_mut().filter(|b| **b == 0) {
            *byte = b' ';
        }
        bounded(&data, MAX_CMDLINE, cut)
    }

    /// The cgroup path, see [`ProcessStat::cgroup`].
    pub fn cgroup(&self) -> Option<String> {
        parse_cgroup(&self.small("cgroup").ok()?)
    }

    /// Effective user id, and the process id in its own pid namespace (the pid itself where the kernel does not say).
    ///
    /// # Errors
    /// Kind [`ErrorKind::Target`] when the process has ended.
    pub(crate) fn uid_and_own_pid(&self) -> Result<(u32, u32)> {
        let status = self.small("status")?;
        let uid = status_field(&status, "Uid:").and_then(|v| v.split_ascii_whitespace().nth(1)?.parse().ok());
        let own = status_field(&status, "NStgid:").and_then(|v| v.split_ascii_whitespace().next_back()?.parse().ok());
        let uid = uid.ok_or_else(|| self.malformed("status"))?;
        Ok((uid, own.unwrap_or(self.pid)))
    }

    /// Process id of the process that this belongs to: another one than its own pid when it is a thread.
    ///
    /// # Errors
    /// Kind [`ErrorKind::Target`] when the process has ended.
    pub fn thread_group(&self) -> Result<u32> {
        let status = self.small("status")?;
        let tgid = status_field(&status, "Tgid:").and_then(|v| v.trim().parse().ok());
        tgid.ok_or_else(|| self.malformed("status"))
    }

    /// Resident anonymous memory in bytes; `None` when the kernel does not say or the process has ended.
    fn anon_bytes(&self) -> Option<u64> {
        parse_anon_bytes(&self.small("status").ok()?)
    }

    fn malformed(&self, name: &str) -> Error {
        Error::new(ErrorKind::Kernel, format!("failed to read process {}: /proc/PID/{name} is malformed", self.pid))
    }

    /// Reads everything.
    ///
    /// # Errors
    /// Kind [`ErrorKind::Target`] when the process has ended.
    pub fn process_stat(&self) -> Result<ProcessStat> {
        let stat = self.stat()?;
        let (exe, exe_deleted) = self.exe().unwrap_or_default();
        let cmdline = self.cmdline();
        let cgroup = self.cgroup();
        Ok(ProcessStat {
            pid: stat.pid,
            ppid: stat.ppid,
            start_ticks: stat.start_ticks,
            exe: exe.to_string_lossy().into_owned(),
            exe_deleted,
            cmdline,
            cgroup,
            kernel_thread: stat.kernel_thread,
            rss_bytes: stat.rss_bytes(),
            cpu_s: stat.cpu_s(),
            comm: stat.comm,
        })
    }
}

impl Stat {
    /// False when the process has ended and only its exit status is left to be fetched.
    pub fn is_running(&self) -> bool {
        // A main thread that has ended while others run is shown as a zombie too.
        !matches!(self.state, 'Z' | 'X' | 'x') || self.threads > 1
    }

    /// Resident set size in bytes.
    pub fn rss_bytes(&self) -> u64 {
        self.rss_pages.saturating_mul(scales().0)
    }

    /// CPU time in seconds.
    pub fn cpu_s(&self) -> f64 {
        self.cpu_ticks as f64 / scales().1
    }
}

/// True while the process that started at `start_ticks` runs; a later process with the same pid does not count, and
/// neither does one that has ended and was not waited for.
pub fn is_alive(pid: u32, start_ticks: u64) -> bool {
    let stat = ProcDir::open(pid).and_then(|d| d.stat());
    stat.is_ok_and(|s| s.start_ticks == start_ticks && s.is_running())
}

/// Memory and CPU time of the process that started at `start_ticks`.
///
/// # Errors
/// Kind [`ErrorKind::Target`] when it has ended.
pub fn usage(pid: u32, start_ticks: u64) -> Result<Usage> {
    let dir = ProcDir::open(pid)?;
    let stat = dir.stat()?;
    if stat.start_ticks != start_ticks || !stat.is_running() {
        return Err(Error::new(ErrorKind::Target, format!("failed to read process {pid}: it has ended")));
    }
    Ok(Usage { rss_bytes: stat.rss_bytes(), anon_bytes: dir.anon_bytes(), cpu_s: stat.cpu_s() })
}

/// All process ids that `/proc` shows now, in no order.
///
/// # Errors
/// Kind [`ErrorKind::Io`] when `/proc` cannot be read.
pub fn pids() -> Result<Vec<u32>> {
    let entries = std::fs::read_dir("/proc").map_err(|e| Error::io("failed to read /proc", e))?;
    Ok(entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect())
}

/// Turns a failed access to `/proc/PID` into an error with the right kind and fix.
pub(crate) fn failed(pid: u32, name: &str, e: io::Error) -> Error {
    let what = if name.is_empty() { String::new() } else { format!("/{name}") };
    match e.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => Error::with_source(
            ErrorKind::Target,
            format!("failed to read process {pid}: no such process, or it has ended"),
            e,
        ),
        Some(libc::EACCES | libc::EPERM) => Error::with_source(
            ErrorKind::Permission,
            format!("failed to read /proc/{pid}{what}: run as root or with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH"),
            e,
        ),
        _ => Error::io(format!("failed to read /proc/{pid}{what}"), e),
    }
}

/// Text from hostile bytes: invalid UTF-8 is replaced, at most `max` bytes are kept, and `...` marks what was cut.
pub(crate) fn bounded(bytes: &[u8], max: usize, cut: bool) -> String {
    let mut text = String::from_utf8_lossy(&bytes[..bytes.len().min(max)]).into_owned();
    if cut || bytes.len() > max || text.len() > max {
        let mut end = max.saturating_sub(3).min(text.len());
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str("...");
    }
    text
}

/// Bytes of a page, and clock ticks of a second.
fn scales() -> (u64, f64) {
    static SCALES: OnceLock<(u64, f64)> = OnceLock::new();
    *SCALES.get_or_init(|| {
        (u64::try_from(sys::sysconf(libc::_SC_PAGESIZE)).unwrap_or(4096), sys::sysconf(libc::_SC_CLK_TCK).max(1) as f64)
    })
}

/// Parses `/proc/PID/stat` (Source: proc_pid_stat(5)); `None` when it is malformed. The name in parentheses may hold
/// anything, parentheses, spaces and newlines included, so the fields start behind the *last* parenthesis.
pub(crate) fn parse_stat(data: &[u8]) -> Option<Stat> {
    let open = data.iter().position(|b| *b == b'(')?;
    let close = data.iter().rposition(|b| *b == b')')?;
    let pid = std::str::from_utf8(data.get(..open)?).ok()?.trim().parse().ok()?;
    let comm = bounded(data.get(open + 1..close)?, MAX_COMM, false);
    let rest = std::str::from_utf8(data.get(close + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // Numbered as in the manual, where the state is field 3.
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(Stat {
        pid,
        comm,
        state: fields.first()?.chars().next()?,
        ppid: fields.get(1)?.parse().ok()?,
        kernel_thread: number(9)? & PF_KTHREAD != 0,
        cpu_ticks: number(14)?.saturating_add(number(15)?),
        threads: number(20)?,
        start_ticks: number(22)?,
        rss_pages: fields.get(21)?.parse::<i64>().ok()?.max(0).unsigned_abs(),
        image: (number(26).unwrap_or(0), number(28).unwrap_or(0)),
    })
}

/// Value of a field of `/proc/PID/status`; its names come from the kernel and `Name:`'s text is escaped there.
fn status_field<'a>(status: &'a [u8], name: &str) -> Option<&'a str> {
    let mut lines = status.split(|b| *b == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
    lines.find_map(|line| line.strip_prefix(name))
}

/// `RssAnon` of `/proc/PID/status`, in bytes (Source: proc_pid_status(5); Linux 4.5 and later).
fn parse_anon_bytes(status: &[u8]) -> Option<u64> {
    let kib: u64 = status_field(status, "RssAnon:")?.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kib.checked_mul(1024)
}

/// Longest process name that is kept, in bytes (the kernel's are at most 63).
const MAX_COMM: usize = 64;

/// Picks the cgroup path out of `/proc/PID/cgroup`: the unified (v2) line, unless only v1 says more than `/`.
fn parse_cgroup(data: &[u8]) -> Option<String> {
    let mut best: Option<(u8, &[u8])> = None;
    for line in data.split(|b| *b == b'\n') {
        let mut parts = line.splitn(3, |b| *b == b':');
        let (Some(id), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let rank = match (id, controllers) {
            (b"0", b"") if path != b"/" => 4,
            (_, b"name=systemd") => 3,
            (_, c) if c.split(|b| *b == b',').any(|c| c == b"memory") => 2,
            (b"0", b"") => 1,
            _ => 0,
        };
        if best.is_none_or(|(r, _)| rank > r) {
            best = Some((rank, path));
        }
    }
    best.map(|(_, path)| bounded(path.strip_suffix(DELETED).unwrap_or(path), MAX_CMDLINE, false))
}

/// Processes for tests, of this module and others.
/// Time so far in which this thread was ready to run and had no CPU, in seconds; 0 where the kernel does not count it.
pub fn waited_s() -> f64 {
    // CPU time, waiting time, slices (Source: Documentation/scheduler/sched-stats.rst).
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_ascii_whitespace().nth(1).and_then(|ns| ns.parse::<u64>().ok()).map_or(0.0, |ns| ns as f64 / 1e9)
}

#[cfg(test)]
pub(crate) mod testing {
    use std::process::{Child, Command, Stdio};

    use super::ProcessStat;

    /// A process, ended with it.
    pub(crate) struct Running(pub(crate) Child);

    impl Running {
        /// Starts it and waits until the new program shows: the kernel lets the parent go on shortly before.
        pub(crate) fn start(command: &mut Command) -> Self {
            let running = Running(command.stdout(Stdio::null()).spawn().expect("starts"));
            while running.stat().cmdline.is_empty() {
                std::thread::yield_now();
            }
            running
        }

        /// One that only waits.
        pub(crate) fn sleep() -> Self {
            Self::start(Command::new("sleep").arg("1000"))
        }

        pub(crate) fn pid(&self) -> u32 {
            self.0.id()
        }

        pub(crate) fn stat(&self) -> ProcessStat {
            ProcessStat::read(self.pid()).expect("runs")
        }
    }

    impl Drop for Running {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::testing::Running;
    use super::*;

    /// A program chooses its own name; one that looks like the end of the field must not shift the other fields.
    #[test]
    fn a_name_with_parentheses_and_spaces_does_not_shift_the_fields() {
        let line = b"42 (a) S 1 (b)\n) Z 7 42 42 0 -1 2097216 1 2 3 4 100 23 5 6 20 0 3 0 4242 9000 17 184 11 12 13";
        let stat = parse_stat(line).expect("parses");
        assert_eq!(stat.pid, 42);
        assert_eq!(stat.comm, "a) S 1 (b)\n");
        assert_eq!(stat.state, 'Z');
        assert_eq!(stat.ppid, 7);
        assert!(stat.kernel_thread);
        assert_eq!(stat.cpu_ticks, 123);
        assert_eq!(stat.threads, 3);
        assert!(stat.is_running(), "two other threads still run");
        assert_eq!(stat.start_ticks, 4242);
        assert_eq!(stat.rss_pages, 17);
        assert_eq!(stat.image, (11, 13));
    }

    /// A file cut short at any byte must be refused or read, never panic.
    #[test]
    fn a_stat_file_cut_anywhere_does_not_panic() {
        let line = b"42 (x) S 1 42 42 0 -1 64 1 2 3 4 100 23 5 6 20 0 3 0 4242 9000 17 184 11 12 13";
        for end in 0..line.len() {
            let _ = parse_stat(&line[..end]);
        }
        assert_eq!(parse_stat(b") ("), None);
    }

    /// v2 names the group; on a v1 host its line is only `/`, and systemd's line must win.
    #[test]
    fn the_cgroup_is_v2_unless_only_v1_says_more() {
        let pick = |s: &str| parse_cgroup(s.as_bytes());
        assert_eq!(pick("0::/system.slice/redis.service\n").as_deref(), Some("/system.slice/redis.service"));
        assert_eq!(pick("0::/a:b\n").as_deref(), Some("/a:b"));
        let v1 = "12:pids:/p\n5:cpu,memory:/m\n1:name=systemd:/s\n0::/\n";
        assert_eq!(pick(v1).as_deref(), Some("/s"));
        assert_eq!(pick("5:cpu,memory:/m\n3:pids:/p\n").as_deref(), Some("/m"));
        assert_eq!(pick("0::/gone (deleted)\n").as_deref(), Some("/gone"));
        assert_eq!(pick(""), None);
    }

    /// The figures of a process that we know (ourselves) must be plausible and in the right units.
    #[test]
    fn our_own_process_is_read_whole() {
        let stat = ProcessStat::read(std::process::id()).expect("we run");
        assert_eq!(stat.pid, std::process::id());
        assert_eq!(Path::new(&stat.exe), std::env::current_exe().expect("own path"));
        assert!(!stat.exe_deleted && !stat.kernel_thread);
        assert!((1 << 20..1 << 34).contains(&stat.rss_bytes), "{}", stat.rss_bytes);
        assert!(stat.cpu_s < 3600.0);
        let now = usage(stat.pid, stat.start_ticks).expect("we run");
        let anon = now.anon_bytes.expect("every supported kernel tells it");
        assert!(anon > 1 << 16 && anon <= now.rss_bytes + (1 << 20), "{now:?}");
        assert!(is_alive(stat.pid, stat.start_ticks));
        assert!(!is_alive(stat.pid, stat.start_ticks + 1), "another start time is another process");
    }

    /// A name cannot pose as a field, and what is not a number of kB is not known.
    #[test]
    fn anonymous_memory_is_read_from_its_own_line() {
        assert_eq!(
            parse_anon_bytes(b"Name:\tRssAnon: 7 kB\nRssAnon:\t    1234 kB\nRssFile:\t 9 kB\n"),
            Some(1234 << 10)
        );
        assert_eq!(parse_anon_bytes(b"VmRSS:\t 10 kB\n"), None);
        assert_eq!(parse_anon_bytes(b"RssAnon:\t 10 MB\n"), None);
        assert_eq!(parse_anon_bytes(b"RssAnon:\t 99999999999999999999 kB\n"), None);
        assert_eq!(parse_anon_bytes(b"RssAnon:\t 18446744073709551615 kB\n"), None);
    }

    /// An ended process, waited for or not, is not alive, and reading it says so with the kind that callers act on.
    #[test]
    fn an_ended_process_is_a_target_error() {
        let mut running = Running::sleep();
        let pid = running.pid();
        let dir = ProcDir::open(pid).expect("runs");
        let start = dir.stat().expect("runs").start_ticks;
        assert!(is_alive(pid, start));
        running.0.kill().expect("kill");
        while dir.stat().expect("not waited for").is_running() {
            std::thread::yield_now();
        }
        assert!(!is_alive(pid, start), "zombie");
        assert_eq!(usage(pid, start).expect_err("zombie").kind(), ErrorKind::Target);
        drop(running);
        assert!(!is_alive(pid, start));
        assert_eq!(dir.stat().expect_err("gone").kind(), ErrorKind::Target);
        assert_eq!(ProcessStat::read(pid).expect_err("gone").kind(), ErrorKind::Target);
    }

    /// A deployment replaces the executable under a running service; a name that merely looks deleted is not.
    #[test]
    fn a_deleted_executable_is_told_from_one_that_is_called_deleted() {
        let dir = tempfile::tempdir().expect("temporary folder");
        for (name, remove) in [("plain", true), ("odd (deleted)", false), ("odd (deleted)", true)] {
            let path = dir.path().join(name);
            std::fs::copy("/bin/sleep", &path).expect("copy");
            let running = Running::start(Command::new(&path).arg("1000"));
            if remove {
                std::fs::remove_file(&path).expect("remove");
            }
            let stat = running.stat();
            assert_eq!((Path::new(&stat.exe), stat.exe_deleted), (path.as_path(), remove));
            assert!(stat.cmdline.ends_with(&format!("{name} 1000")), "{}", stat.cmdline);
        }
    }

    /// A program can make its command line as long as it likes; we keep a bounded part and say so.
    #[test]
    fn a_long_command_line_is_cut_with_a_mark() {
        let stat = Running::start(Command::new("sleep").arg("1000").arg("0".repeat(100_000))).stat();
        assert_eq!(stat.cmdline.len(), MAX_CMDLINE);
        assert!(stat.cmdline.starts_with("sleep 1000 000") && stat.cmdline.ends_with("0..."));
    }

    /// Cutting must not split a character, and replacement characters must not push a text over its bound.
    #[test]
    fn bounded_text_stays_within_its_bound() {
        assert_eq!(bounded("aé".as_bytes(), 10, false), "aé");
        for max in 3..12 {
            assert!(bounded("ééééééé".as_bytes(), max, false).len() <= max);
            assert!(bounded(&[0xff; 40], max, false).len() <= max);
        }
    }
}
