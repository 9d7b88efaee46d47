//! Which processes to watch: `[[target]]` conditions against `/proc`.
//!
//! A [`Matcher`] is made once from the settings and asked at every interval. It never matches the collector itself
//! nor threads of the kernel. It decides nothing about attaching.

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};

use globset::{GlobBuilder, GlobMatcher};

use crate::config::TargetSpec;
use crate::error::{Error, ErrorKind, Result};
use crate::labels::Labels;
use crate::process::{self, ProcDir, ProcessStat, Stat};
use crate::snapshot::Process;

/// Conditions of one target, compiled.
#[derive(Debug)]
struct Conditions {
    /// Empty: any.
    pids: Vec<u32>,
    name: Option<GlobMatcher>,
    exe: Option<GlobMatcher>,
    /// Without the leading and trailing `/`.
    cgroup: Option<String>,
    /// The id's beginning, and the same as a glob.
    container: Option<(String, GlobMatcher)>,
    unit: Option<GlobMatcher>,
    /// False for a target that only launches a command: there is nothing to look for.
    searches: bool,
}

/// Finds the processes that the settings name.
#[derive(Debug)]
pub struct Matcher {
    targets: Vec<Conditions>,
    /// Start time of the process that a configured pid meant when it was first seen. A later process with that pid is
    /// not what the user asked for.
    pinned: HashMap<u32, u64>,
    /// Processes that matched nothing, as they were then.
    rejected: HashMap<(u32, u64), Rejected>,
}

/// What of a process must change before it is worth another look.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rejected {
    comm: String,
    /// See [`Stat::image`]: changes with exec, when the new program has the same name (wrapper scripts).
    image: (u64, u64),
}

/// What conditions ask about a process; read only when asked, because most processes fail at the first condition.
trait Facts {
    fn pid(&self) -> u32;
    fn start_ticks(&self) -> u64;
    fn comm(&self) -> &str;
    fn exe(&self) -> &str;
    fn cgroup(&self) -> Option<&str>;
}

impl Facts for ProcessStat {
    fn pid(&self) -> u32 {
        self.pid
    }
    fn start_ticks(&self) -> u64 {
        self.start_ticks
    }
    fn comm(&self) -> &str {
        &self.comm
    }
    fn exe(&self) -> &str {
        &self.exe
    }
    fn cgroup(&self) -> Option<&str> {
        self.cgroup.as_deref()
    }
}

/// A process in `/proc`, read as far as needed.
struct Lazy<'a> {
    dir: &'a ProcDir,
    stat: &'a Stat,
    exe: OnceCell<String>,
    cgroup: OnceCell<Option<String>>,
}

impl Facts for Lazy<'_> {
    fn pid(&self) -> u32 {
        self.stat.pid
    }
    fn start_ticks(&self) -> u64 {
        self.stat.start_ticks
    }
    fn comm(&self) -> &str {
        &self.stat.comm
    }
    fn exe(&self) -> &str {
        let read = || self.dir.exe().unwrap_or_default().0.to_string_lossy().into_owned();
        self.exe.get_or_init(read)
    }
    fn cgroup(&self) -> Option<&str> {
        self.cgroup.get_or_init(|| self.dir.cgroup()).as_deref()
    }
}

impl Conditions {
    fn new(spec: &TargetSpec, number: usize) -> Result<Self> {
        let glob = |key: &str, pattern: &Option<String>| {
            pattern.as_ref().map(|p| compile(p, &format!("target {number}: {key}"))).transpose()
        };
        let cgroup = spec.cgroup.as_deref().map(|c| {
            let below = c.strip_prefix("/sys/fs/cgroup").unwrap_or(c);
            below.trim_matches('/').to_owned()
        });
        let searches = !spec.pid.is_empty() || spec.searches();
        if !searches && spec.command.is_empty() {
            return Err(Error::config(format!(
                "failed to use target {number}: it has no condition; give one of pid, name, exe, cgroup, container, unit, command"
            )));
        }
        if let Some(own) = spec.pid.iter().find(|p| **p == std::process::id()) {
            return Err(Error::config(format!("failed to use target {number}: pid {own} is this program itself")));
        }
        Ok(Conditions {
            pids: spec.pid.clone(),
            name: glob("name", &spec.name)?,
            exe: glob("exe", &spec.exe)?,
            cgroup,
            container: spec.container.clone().zip(glob("container", &spec.container)?),
            unit: glob("unit", &spec.unit)?,
            searches,
        })
    }

    /// All given conditions hold; the cheap ones come first.
    fn hold(&self, facts: &impl Facts, pinned: &HashMap<u32, u64>) -> bool {
        let pid = facts.pid();
        self.searches
            && (self.pids.is_empty()
                || self.pids.contains(&pid) && pinned.get(&pid).is_none_or(|start| *start == facts.start_ticks()))
            && self.name.as_ref().is_none_or(|g| g.is_match(facts.comm()) || g.is_match(file_name(facts.exe())))
            && self.exe.as_ref().is_none_or(|g| !facts.exe().is_empty() && g.is_match(facts.exe()))
            && self.cgroup.as_ref().is_none_or(|c| facts.cgroup().is_some_and(|path| is_below(path, c)))
            && ((self.container.is_none() && self.unit.is_none()) || self.labels_hold(facts))
    }

    fn labels_hold(&self, facts: &impl Facts) -> bool {
        let labels = facts.cgroup().map(Labels::from_cgroup).unwrap_or_default();
        let container = |(start, glob): &(String, GlobMatcher)| {
            labels.container.as_ref().is_some_and(|id| id.starts_with(start) || glob.is_match(id))
        };
        let unit = |glob: &GlobMatcher| {
            let named = labels.unit.as_deref();
            named.is_some_and(|u| glob.is_match(u) || u.strip_suffix(".service").is_some_and(|u| glob.is_match(u)))
        };
        self.container.as_ref().is_none_or(container) && self.unit.as_ref().is_none_or(unit)
    }
}

/// Last part of a path.
fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// True when cgroup `path` is `group` or below it; the empty group is the root.
fn is_below(path: &str, group: &str) -> bool {
    let path = path.trim_matches('/');
    group.is_empty() || path.strip_prefix(group).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Compiles a glob: `*` and `?` stop at `/`, `**` does not.
fn compile(pattern: &str, what: &str) -> Result<GlobMatcher> {
    let glob = GlobBuilder::new(pattern).literal_separator(true).build();
    glob.map(|g| g.compile_matcher())
        .map_err(|e| Error::with_source(ErrorKind::Config, format!("failed to use {what} = {pattern:?} as a glob"), e))
}

impl Matcher {
    /// Compiles the conditions.
    ///
    /// # Errors
    /// Kind [`ErrorKind::Config`] naming the target (counted from 1) and the glob that is malformed, a target without
    /// any condition, or our own pid.
    pub fn new(specs: &[TargetSpec]) -> Result<Self> {
        let targets = specs.iter().enumerate().map(|(i, s)| Conditions::new(s, i + 1)).collect::<Result<_>>()?;
        Ok(Matcher { targets, pinned: HashMap::new(), rejected: HashMap::new() })
    }

    /// Checks at the start that every configured pid is a process that can be watched, and ties the pid to it: a later
    /// process with the same pid will not match.
    ///
    /// # Errors
    /// Kind [`ErrorKind::Target`] for the first pid that is no process, a thread, or a thread of the kernel.
    pub fn check_pids(&mut self) -> Result<()> {
        for pid in self.targets.iter().flat_map(|t| &t.pids) {
            let refuse = |why: String| Error::new(ErrorKind::Target, format!("failed to watch pid {pid}: {why}"));
            let dir = ProcDir::open(*pid).map_err(|_| refuse("there is no such process".to_owned()))?;
            let stat = dir.stat()?;
            // A thread id opens like a process but is not listed, and probes filtered by it would see one thread.
            let leader = dir.thread_group()?;
            if leader != *pid {
                return Err(refuse(format!("it is a thread of process {leader}; give that one")));
            }
            if stat.kernel_thread {
                return Err(refuse("it is a thread of the kernel".to_owned()));
            }
            if !stat.is_running() {
                return Err(refuse("it has ended".to_owned()));
            }
            self.pinned.insert(*pid, stat.start_ticks);
        }
        Ok(())
    }

    /// Number (from 0) of the first target that the process meets; `None` when it meets none, is this program, or a
    /// thread of the kernel.
    pub fn matches(&self, process: &ProcessStat) -> Option<usize> {
        if process.kernel_thread { None } else { self.first(process) }
    }

    fn first(&self, facts: &impl Facts) -> Option<usize> {
        if facts.pid() == std::process::id() {
            return None;
        }
        self.targets.iter().position(|t| t.hold(facts, &self.pinned))
    }

    /// All running processes that meet a target and are not in `known` (pid, start time), by pid, with the number (from 0)
    /// of that target. Their `instance` is 0: numbering them is up to the caller. A process that ends meanwhile is left
    /// out.
    ///
    /// # Errors
    /// Kind [`ErrorKind::Io`] when `/proc` cannot be listed.
    pub fn scan(&mut self, known: &HashSet<(u32, u64)>) -> Result<Vec<(Process, usize)>> {
        let mut found = Vec::new();
        if !self.targets.iter().any(|t| t.searches) {
            return Ok(found);
        }
        // A process can be moved to another cgroup without any trace in what we remember of it.
        let may_remember =
            (self.targets.iter()).all(|t| t.cgroup.is_none() && t.container.is_none() && t.unit.is_none());
        let only_pids = self.targets.iter().all(|t| !t.searches || !t.pids.is_empty());
        let pids = if only_pids {
            self.targets.iter().flat_map(|t| t.pids.iter().copied()).collect::<HashSet<_>>().into_iter().collect()
        } else {
            process::pids()?
        };
        let mut still_rejected = HashMap::with_capacity(self.rejected.len());
        for pid in pids {
            let Ok(dir) = ProcDir::open(pid) else { continue };
            let Ok(stat) = dir.stat() else { continue };
            let key = (pid, stat.start_ticks);
            if stat.kernel_thread || known.contains(&key) || !stat.is_running() {
                continue;
            }
            if let Some((key, seen)) = self.rejected.remove_entry(&key)
                && seen.comm == stat.comm
                && seen.image == stat.image
            {
                still_rejected.insert(key, seen);
                continue;
            }
            let facts = Lazy { dir: &dir, stat: &stat, exe: OnceCell::new(), cgroup: OnceCell::new() };
            if self.first(&facts).is_none() {
                if may_remember {
                    still_rejected.insert(key, Rejected { comm: stat.comm, image: stat.image });
                }
                continue;
            }
            // Read again as a whole: it may have called exec in between.
            let Ok(whole) = dir.process_stat() else { continue };
            if let Some(target) = self.matches(&whole) {
                if !self.targets[target].pids.is_empty() {
                    self.pinned.insert(pid, whole.start_ticks);
                }
                found.push((whole.to_process(0), target));
            }
        }
        self.rejected = still_rejected;
        found.sort_unstable_by_key(|(p, _)| p.pid);
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::*;
    use crate::process::testing::Running;

    fn spec(f: impl FnOnce(&mut TargetSpec)) -> TargetSpec {
        let mut spec = TargetSpec::default();
        f(&mut spec);
        spec
    }

    fn redis() -> ProcessStat {
        ProcessStat {
            pid: 4_000_000,
            start_ticks: 5,
            comm: "redis-main".into(),
            exe: "/usr/bin/redis-server".into(),
            cgroup: Some("/system.slice/redis.service".into()),
            ..ProcessStat::default()
        }
    }

    fn meets(f: impl FnOnce(&mut TargetSpec)) -> bool {
        Matcher::new(&[spec(f)]).expect("sound").matches(&redis()).is_some()
    }

    /// Users give the name they know: the kernel's short name or the executable's file name.
    #[test]
    fn a_name_matches_comm_or_the_file_name_of_the_executable() {
        assert!(meets(|s| s.name = Some("redis-m*".into())));
        assert!(meets(|s| s.name = Some("redis-server".into())));
        assert!(meets(|s| s.name = Some("redis-{server,cli}".into())));
        assert!(!meets(|s| s.name = Some("redis".into())));
        assert!(!meets(|s| s.name = Some("usr*".into())));
    }

    /// `*` in a path must not reach into deeper folders, or `/usr/bin/*` would watch half the system.
    #[test]
    fn an_executable_glob_stops_at_slashes() {
        assert!(meets(|s| s.exe = Some("/usr/bin/redis-*".into())));
        assert!(meets(|s| s.exe = Some("/usr/**/redis-server".into())));
        assert!(!meets(|s| s.exe = Some("/usr/*".into())));
    }

    /// A cgroup takes everything below along, but not its neighbour with a longer name.
    #[test]
    fn a_cgroup_includes_what_is_below_it() {
        for group in ["/system.slice", "system.slice/", "/sys/fs/cgroup/system.slice/redis.service", "/"] {
            assert!(meets(|s| s.cgroup = Some(group.into())), "{group}");
        }
        assert!(!meets(|s| s.cgroup = Some("/system.slice/redis".into())));
        assert!(!meets(|s| s.cgroup = Some("/user.slice".into())));
    }

    /// People name a container by the beginning of its id and a unit without its ending.
    #[test]
    fn containers_and_units_are_met_by_what_people_call_them() {
        for unit in ["redis", "redis.service", "red*"] {
            assert!(meets(|s| s.unit = Some(unit.into())), "{unit}");
        }
        for unit in ["redi", "system", "redis.slice"] {
            assert!(!meets(|s| s.unit = Some(unit.into())), "{unit}");
        }
        assert!(!meets(|s| s.container = Some("????*".into())), "it is in none");
        let id = "3f4a".repeat(16);
        let inside = ProcessStat { cgroup: Some(format!("/system.slice/docker-{id}.scope")), ..redis() };
        let meets = |s: TargetSpec| Matcher::new(&[s]).expect("sound").matches(&inside).is_some();
        for container in [&id[..], &id[..12], "3f4a3f4a*"] {
            assert!(meets(spec(|s| s.container = Some(container.into()))), "{container}");
        }
        for container in ["4a3f", "3f4a3f4a?"] {
            assert!(!meets(spec(|s| s.container = Some(container.into()))), "{container}");
        }
        assert!(!meets(spec(|s| s.unit = Some("docker*".into()))), "the runtime's scope is not the unit");
    }

    /// Conditions narrow each other, and the first target that fits is the one that is told.
    #[test]
    fn all_conditions_of_one_target_must_hold() {
        assert!(meets(|s| (s.name, s.exe) = (Some("redis*".into()), Some("/usr/bin/*".into()))));
        assert!(!meets(|s| (s.name, s.exe) = (Some("redis*".into()), Some("/opt/*".into()))));
        assert!(!meets(|s| (s.pid, s.name) = (vec![7], Some("redis*".into()))));
        let specs = [spec(|s| s.name = Some("nginx".into())), spec(|s| s.name = Some("redis*".into()))];
        assert_eq!(Matcher::new(&specs).expect("sound").matches(&redis()), Some(1));
        let kernel = ProcessStat { kernel_thread: true, ..redis() };
        assert_eq!(Matcher::new(&specs).expect("sound").matches(&kernel), None);
    }

    /// A mistyped glob or an empty target must be told with its place, not silently watch nothing.
    #[test]
    fn mistakes_are_named() {
        let error = |s: TargetSpec| {
            format!(
                "{:#}",
                Matcher::new(&[TargetSpec { pid: vec![1], ..TargetSpec::default() }, s]).expect_err("mistake")
            )
        };
        let bad = error(spec(|s| s.exe = Some("/opt/[a".into())));
        assert!(bad.contains("target 2: exe") && bad.contains("/opt/[a") && bad.contains("unclosed"), "{bad}");
        assert!(error(TargetSpec::default()).contains("target 2: it has no condition"));
        assert!(error(spec(|s| s.pid = vec![std::process::id()])).contains("this program itself"));
    }

    /// Running processes are found once, are not found again when known, and come back when restarted.
    #[test]
    fn a_scan_finds_new_processes_only() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let exe = folder.path().join("memleak-scan");
        std::fs::copy("/bin/sleep", &exe).expect("copy");
        let mut matcher = Matcher::new(&[spec(|s| s.exe = Some(exe.display().to_string()))]).expect("sound");
        let mut known = HashSet::new();
        assert_eq!(matcher.scan(&known).expect("scan"), []);
        let start = || Running::start(Command::new(&exe).arg("1000"));
        let (one, two) = (start(), start());
        let found = matcher.scan(&known).expect("scan");
        let mut expected = [one.pid(), two.pid()];
        expected.sort_unstable();
        assert_eq!(found.iter().map(|(p, _)| p.pid).collect::<Vec<_>>(), expected);
        assert!(found.iter().all(|(p, n)| *n == 0 && p.instance == 0 && p.cmdline.ends_with("memleak-scan 1000")));
        known.extend(found.iter().map(|(p, _)| (p.pid, p.start_ticks)));
        assert_eq!(matcher.scan(&known).expect("scan"), []);
        drop(one);
        let three = start();
        let found = matcher.scan(&known).expect("scan");
        assert_eq!(found.iter().map(|(p, _)| p.pid).collect::<Vec<_>>(), [three.pid()]);
    }

    /// A shell that execs the service keeps pid, start time and, in a wrapper script, even its name.
    #[test]
    fn a_rejected_process_is_seen_again_after_exec() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (first, second) = (folder.path().join("a/tool"), folder.path().join("b/tool"));
        for (path, from) in [(&first, "/bin/bash"), (&second, "/bin/sleep")] {
            std::fs::create_dir(path.parent().expect("has one")).expect("folder");
            std::fs::copy(from, path).expect("copy");
        }
        let mut matcher = Matcher::new(&[spec(|s| s.exe = Some(second.display().to_string()))]).expect("sound");
        let script = format!("read line; exec {} 1000", second.display());
        let mut process =
            Running::start(Command::new(&first).arg0("tool").args(["-c", &script]).stdin(std::process::Stdio::piped()));
        let known = HashSet::new();
        assert_eq!(matcher.scan(&known).expect("scan"), []);
        assert_eq!(matcher.scan(&known).expect("scan"), []);
        std::io::Write::write_all(process.0.stdin.as_mut().expect("piped"), b"\n").expect("write");
        while ProcessStat::read(process.pid()).expect("runs").exe != second.display().to_string() {
            std::thread::yield_now();
        }
        let found = matcher.scan(&known).expect("scan");
        let seen: Vec<_> = found.iter().map(|(p, _)| (p.pid, p.comm.as_str())).collect();
        assert_eq!(seen, [(process.pid(), "tool")]);
    }

    /// A pid stands for the process that had it when the user gave it.
    #[test]
    fn a_pid_does_not_match_its_next_owner() {
        let process = Running::sleep();
        let mut matcher = Matcher::new(&[spec(|s| s.pid = vec![process.pid()])]).expect("sound");
        matcher.check_pids().expect("runs");
        let stat = ProcessStat::read(process.pid()).expect("runs");
        assert_eq!(matcher.matches(&stat), Some(0));
        let next = ProcessStat { start_ticks: stat.start_ticks + 1, ..stat };
        assert_eq!(matcher.matches(&next), None);
        assert_eq!(matcher.scan(&HashSet::new()).expect("scan").len(), 1);
    }

    /// A wrong pid must stop the start with a reason that says what to do.
    #[test]
    fn a_pid_that_cannot_be_watched_is_refused_with_the_reason() {
        let refused = |pid| {
            let mut matcher = Matcher::new(&[spec(|s| s.pid = vec![pid])]).expect("sound");
            let error = matcher.check_pids().expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::Target);
            error.to_string()
        };
        let pid = { Running::sleep().pid() };
        assert_eq!(refused(pid), format!("failed to watch pid {pid}: there is no such process"));
        if ProcessStat::read(2).is_ok_and(|p| p.kernel_thread) {
            assert_eq!(refused(2), "failed to watch pid 2: it is a thread of the kernel");
        }
        let (send, receive) = std::sync::mpsc::channel();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let tid = std::fs::read_link("/proc/thread-self").expect("thread").file_name().expect("tid").to_owned();
            send.send(tid.to_str().expect("number").parse().expect("number")).expect("send");
            let _ = stopped.recv();
        });
        let tid: u32 = receive.recv().expect("tid");
        let expected =
            format!("failed to watch pid {tid}: it is a thread of process {}; give that one", std::process::id());
        assert_eq!(refused(tid), expected);
        drop(stop);
        thread.join().expect("thread");
    }

    /// A target that only launches a command must not pick up everything that runs.
    #[test]
    fn a_command_target_finds_nothing_by_itself() {
        let mut matcher = Matcher::new(&[spec(|s| s.command = vec!["sleep".into()])]).expect("sound");
        let _process = Running::sleep();
        assert_eq!(matcher.scan(&HashSet::new()).expect("scan"), []);
        assert_eq!(matcher.matches(&redis()), None);
    }
}
