//! Processes that fork, exec, end, and libraries that arrive late.

use std::path::Path;
use std::process::Command;

use memleak_tests::{Counts, Feature, Memleak, Program, needs, program_path};

use super::assert_clean;

/// A copy of a test program under a name that no other test uses, so that it can be matched by name.
pub(super) fn copy_as(program: &str, folder: &Path, name: &str) -> std::path::PathBuf {
    let copy = folder.join(name);
    let original = program_path(program).expect("the program was built");
    std::fs::copy(original, &copy).expect("the program can be copied");
    copy
}

/// The pid after `child ` in the next line of the program.
fn child_pid(program: &mut Program) -> u32 {
    let line = program.next_line();
    line.strip_prefix("child ").and_then(|pid| pid.parse().ok()).unwrap_or_else(|| panic!("no child in `{line}`"))
}

// The child inherits copies of blocks and of probes; neither may change the parent's account.
#[test]
fn fork_leaves_the_parent_exact() {
    needs!(Feature::Bpf);
    let mut program = Program::start("fork");
    let pid = program.pid();
    let mut memleak = Memleak::watch(pid);
    program.go();
    child_pid(&mut program);
    program.step("child-done");
    program.step("done");
    let snapshot = memleak.settled();
    assert_clean(&snapshot, pid);
    let of_parent = |function| snapshot.sum(|site| site.pid == pid && site.caller() == Some(function));
    assert_eq!(of_parent("before_fork"), Counts::kept(7, 31));
    assert_eq!(of_parent("in_parent"), Counts::kept(13, 41));
    assert_eq!(of_parent("in_child"), Counts::default());
}

// A child that matches by name is watched from then on, with an account of its own that starts empty.
#[test]
fn forked_child_is_picked_up_empty() {
    needs!(Feature::Bpf);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let mut program = Program::start_command(&mut Command::new(copy_as("fork", folder.path(), "mlt-forker")));
    let pid = program.pid();
    let mut memleak = Memleak::start(&["--name", "mlt-forker"]);
    program.go();
    let child = child_pid(&mut program);
    memleak.wait_attached(child, 1);
    let snapshot = memleak.settled();
    assert_eq!(snapshot.sum(|site| site.pid == child), Counts::default());
    program.step("child-done");
    program.step("done");
    let snapshot = memleak.settled();
    assert_eq!(snapshot.sum(|site| site.pid == child), Counts::kept(11, 37));
    // Its frees were of the parent's blocks: unknown to the child, and still outstanding in the parent.
    assert_eq!(snapshot.process(child).unmatched_frees, 7);
    assert_eq!(snapshot.sum(|site| site.pid == pid), Counts::kept(7, 31).plus(Counts::kept(13, 41)));
}

// exec throws the old memory away: its records end, and the new image is watched from nothing.
#[test]
fn exec_closes_the_old_records_and_watches_the_new_image() {
    needs!(Feature::Bpf);
    let mut program = Program::start("exec");
    let pid = program.pid();
    let mut memleak = Memleak::watch(pid);
    program.step("allocated");
    assert_eq!(memleak.settled().at("before_exec"), Counts::kept(5, 43));
    program.step("again");
    memleak.wait_attached(pid, 2);
    program.step("done");
    let snapshot = memleak.settled();
    assert_eq!(snapshot.at("after_exec"), Counts::kept(7, 47));
    assert_clean(&snapshot, pid);
}

// What was outstanding at the end must be readable after the end, when the process itself is gone.
#[test]
fn exit_shows_what_was_outstanding() {
    needs!(Feature::Bpf);
    let mut program = Program::start("exit");
    let pid = program.pid();
    let memleak = Memleak::watch(pid);
    program.go();
    // With its only target gone memleak ends by itself.
    let outcome = memleak.outcome();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let snapshot =
        outcome.snapshots.iter().rev().find(|s| s.at("lost_at_exit") != Counts::default()).expect("a last look");
    assert_eq!(snapshot.at("lost_at_exit"), Counts::kept(23, 53));
    assert!(!outcome.last().watches(pid));
}

// A library that is loaded while watching leaks through an allocator that is already watched.
#[test]
fn library_loaded_later_is_named() {
    needs!(Feature::Bpf);
    let library = program_path("libplugin.so").expect("the library was built");
    let mut program = Program::start_with("dlopen", &[library.as_os_str(), "plugin_leak".as_ref()]);
    let mut memleak = Memleak::watch(program.pid());
    program.step("loaded");
    program.step("done");
    let snapshot = memleak.settled();
    let site = snapshot.site("plugin_leak");
    assert_eq!(site.counts, Counts::kept(17, 59));
    assert!(site.frames[0].module.as_deref().is_some_and(|m| m.ends_with("libplugin.so")), "{:?}", site.frames[0]);
}
