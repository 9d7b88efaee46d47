//! Which processes are watched: several, later ones, restarted ones, launched ones, by cgroup and in containers.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use memleak_tests::{Counts, Feature, Memleak, Program, image, needs, program_path};

use super::assert_clean;
use super::lifecycle::copy_as;

/// Starts a copy of the program `leaker` under its own name.
fn start(path: &Path) -> Program {
    Program::start_command(&mut Command::new(path))
}

// One name pattern, three processes: each has its own account.
#[test]
fn all_processes_of_a_name_are_watched_apart() {
    needs!(Feature::Bpf);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let mut programs: Vec<_> =
        ["mlt-many-a", "mlt-many-b", "mlt-many-c"].map(|name| start(&copy_as("leaker", folder.path(), name))).into();
    let mut memleak = Memleak::start(&["--name", "mlt-many-*"]);
    for (n, program) in programs.iter_mut().enumerate() {
        for _ in 0..=n {
            program.step("done");
        }
    }
    let snapshot = memleak.settled();
    for (n, program) in (1..).zip(&programs) {
        let pid = program.pid();
        assert_eq!(snapshot.sum(|site| site.pid == pid), Counts::kept(7 * n, 67), "process {n}");
        assert_clean(&snapshot, pid);
    }
}

// A process that starts after memleak is picked up by name while memleak runs.
#[test]
fn later_process_is_picked_up_by_name() {
    needs!(Feature::Bpf);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let first = start(&copy_as("leaker", folder.path(), "mlt-later-a"));
    let mut memleak = Memleak::start(&["--name", "mlt-later-*"]);
    let mut second = start(&copy_as("leaker", folder.path(), "mlt-later-b"));
    let pid = second.pid();
    memleak.wait_attached(pid, 1);
    second.step("done");
    let snapshot = memleak.settled();
    assert_eq!(snapshot.sum(|site| site.pid == pid), Counts::kept(7, 67));
    assert!(snapshot.watches(first.pid()));
}

// A restarted service is watched again, and its site keeps its identity, so that its history goes on.
#[test]
fn restarted_process_is_picked_up_with_the_same_site_id() {
    needs!(Feature::Bpf);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let path = copy_as("leaker", folder.path(), "mlt-restart");
    let mut first = start(&path);
    let mut memleak = Memleak::start(&["--name", "mlt-restart"]);
    first.step("done");
    let before = memleak.settled().site("lose_some").id.clone();
    let first_pid = first.pid();
    first.kill();
    memleak.wait_until("end of the first process", |snapshot| !snapshot.watches(first_pid));

    let mut second = start(&path);
    let pid = second.pid();
    memleak.wait_attached(pid, 1);
    second.step("done");
    let snapshot = memleak.settled();
    let site = snapshot.sites.iter().find(|site| site.pid == pid).expect("the new process has a site");
    assert_eq!(site.counts, Counts::kept(7, 67));
    assert_eq!(site.id, before);
}

// Patterns match the path of the executable, too.
#[test]
fn process_is_found_by_the_path_of_its_executable() {
    needs!(Feature::Bpf);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let mut program = start(&copy_as("leaker", folder.path(), "by-path"));
    let mut memleak = Memleak::start(&["--exe", &format!("{}/by-*", folder.path().display())]);
    program.step("done");
    assert_eq!(memleak.settled().totals, Counts::kept(7, 67));
}

/// A cgroup that is removed again.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Self {
        let root = memleak_tests::features::cgroup_root().expect("there is one");
        let path = root.join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("the cgroup can be made");
        Cgroup(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Fails while a process is still in it; then there is nothing better to do.
        let _ = fs::remove_dir(&self.0);
    }
}

// Everything in a control group, whatever it is called: that is how services and containers are named.
#[test]
fn process_is_found_by_its_cgroup() {
    needs!(Feature::Bpf, Feature::CgroupV2);
    let group = Cgroup::new("memleak-test");
    let mut inside = Program::start("leaker");
    let mut outside = Program::start("leaker");
    fs::write(group.0.join("cgroup.procs"), inside.pid().to_string()).expect("a process can be moved");
    let name = group.0.file_name().and_then(|name| name.to_str()).expect("the group has a plain name");
    let mut memleak = Memleak::start(&["--cgroup", name]);
    inside.step("done");
    outside.step("done");
    let snapshot = memleak.settled();
    assert_eq!(snapshot.totals, Counts::kept(7, 67));
    assert!(!snapshot.watches(outside.pid()));
    inside.kill();
}

// In a container the C library is another file than ours, at a path that means something else to us.
#[test]
fn process_in_another_root_is_counted_and_named() {
    needs!(Feature::Bpf, Feature::MountNamespace);
    let root = image();
    let mut command = Command::new("unshare");
    command.args(["--mount", "chroot"]).arg(root.path()).arg("/service");
    let mut program = Program::start_command(&mut command);
    let mut memleak = Memleak::watch(program.pid());
    program.step("done");
    let snapshot = memleak.settled();
    assert_clean(&snapshot, program.pid());
    let site = snapshot.site("lose_some");
    assert_eq!(site.counts, Counts::kept(7, 67));
    assert!(site.frames[0].file.as_deref().is_some_and(|file| file.ends_with("leaker.c")), "{:?}", site.frames[0]);
}

// A file that was replaced while its process runs (an update) is still the one that the process executes.
#[test]
fn process_whose_executable_was_deleted_is_counted_and_named() {
    needs!(Feature::Bpf);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let path = copy_as("kinds-static", folder.path(), "updated");
    let mut program = start(&path);
    fs::remove_file(&path).expect("the file can be removed");
    fs::write(&path, "not a program").expect("another file can take its place");
    let mut memleak = Memleak::watch(program.pid());
    program.step("done");
    let snapshot = memleak.settled();
    assert_clean(&snapshot, program.pid());
    assert_eq!(snapshot.site("leak_malloc").counts, Counts::kept(101, 17));
}

// A launched command is watched from its first instruction: even what constructors allocate before main is counted.
#[test]
fn launched_command_is_exact_from_its_first_allocation() {
    needs!(Feature::Bpf);
    let program = program_path("early").expect("the program was built");
    let command = format!("{} 'two words'", program.display());
    let outcome = Memleak::launch(&["-c", &command]).outcome();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let has_both = |s: &&memleak_tests::Snapshot| s.at("first_thing") != Counts::default();
    let snapshot = outcome.snapshots.iter().rev().find(has_both).expect("a snapshot with the account");
    assert_eq!(snapshot.at("before_main"), Counts::kept(3, 71));
    assert_eq!(snapshot.at("first_thing"), Counts::kept(5, 73));
}

// Ending memleak must not leave a service that it launched behind without an owner.
#[test]
fn launched_command_ends_with_memleak() {
    needs!(Feature::Bpf);
    let mut memleak = Memleak::start(&["-c", "sleep 600"]);
    let pid = memleak.wait_until("the command", |s| !s.processes.is_empty()).processes[0].pid;
    memleak.stop();
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    assert_ne!(comm.trim(), "sleep", "process {pid} is still there");
}

// A watched process that is killed together with its group must not take memleak along.
#[test]
fn killed_target_ends_the_run_cleanly() {
    needs!(Feature::Bpf);
    let path = program_path("leaker").expect("the program was built");
    let mut program = Program::start_command(Command::new(path).process_group(0));
    let pid = program.pid();
    let memleak = Memleak::watch(pid);
    program.step("done");
    program.kill();
    let outcome = memleak.outcome();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(outcome.snapshots.iter().any(|snapshot| snapshot.at("lose_some") == Counts::kept(7, 67)));
}
