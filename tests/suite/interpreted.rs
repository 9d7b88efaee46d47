//! Call stacks of interpreted code and of code that is compiled while it runs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use memleak_tests::snapshot::FrameView;
use memleak_tests::{Counts, Feature, Memleak, Program, SiteView, Snapshot, needs};

/// A Python or JavaScript program of the tests.
fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(name)
}

/// Line with the mark `LINE name`.
fn line(name: &str) -> u32 {
    let text = fs::read_to_string(script("shop.py")).expect("the program is there");
    let index = text.lines().position(|l| l.ends_with(&format!("# LINE {name}"))).expect("a marked line");
    u32::try_from(index + 1).expect("a short file")
}

/// Pythons of the versions whose frames are read: Debian's, and those that pyenv has.
fn pythons() -> Vec<(String, PathBuf)> {
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let folders = fs::read_dir(home.join(".pyenv/versions")).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = folders.map(|f| f.path().join("bin/python3")).collect();
    found.extend(["python3", "python3.12", "python3.13"].map(|name| Path::new("/usr/bin").join(name)));
    let version = |path: &PathBuf| {
        let out =
            Command::new(path).arg("-c").arg("import sys; print('%d.%d' % sys.version_info[:2])").output().ok()?;
        let version = String::from_utf8(out.stdout).ok()?.trim().to_owned();
        ["3.11", "3.12", "3.13"].contains(&version.as_str()).then(|| (version, path.clone()))
    };
    found.iter().filter_map(version).collect()
}

/// What `bytes(10_001)` asks the C library for: the object's head, and a zero at the end.
const ORDER: u64 = 10_001 + 33;

/// The site of the orders, checked: Python's functions in their order, and C between them.
fn check_orders<'a>(version: &str, snapshot: &'a Snapshot) -> &'a SiteView {
    assert_eq!(snapshot.through("Shop.order"), Counts::kept(7, ORDER), "{version}: {:#?}", snapshot.callers());
    let site = snapshot.sites.iter().find(|site| site.passes("Shop.order")).expect("it was counted");
    let python: Vec<(&str, Option<u32>)> = (site.frames.iter())
        .filter(|f| f.file.as_deref().is_some_and(|file| file.ends_with("shop.py")))
        .map(|f| (f.function.as_deref().unwrap_or_default(), f.line))
        .collect();
    let expected = [("Shop.order", "order"), ("key", "key"), ("work", "work"), ("<module>", "module")];
    assert_eq!(python, expected.map(|(function, mark)| (function, Some(line(mark)))), "{version}: {site:#?}");
    let at = |function: &str| site.frames.iter().position(|f| f.function.as_deref() == Some(function));
    let between = &site.frames[at("key").expect("checked") + 1..at("work").expect("checked")];
    let is_c = |f: &FrameView| !f.file.as_deref().is_some_and(|file| file.ends_with(".py"));
    assert!(between.len() >= 2 && between.iter().all(is_c), "{version}: {site:#?}");
    site
}

// A leak in Python is only found by the Python function: the C stack is the same for all of them.
#[test]
fn python_functions_are_in_the_stack() {
    needs!(Feature::Bpf, Feature::Command("python3"));
    let pythons = pythons();
    assert!(!pythons.is_empty() || !Path::new("/usr/bin/python3").exists(), "no Python of a known version");
    for (version, python) in &pythons {
        let mut program = Program::start_command(Command::new(python).arg(script("shop.py")));
        let mut memleak = Memleak::watch(program.pid());
        program.step("done");
        let snapshot = memleak.settled();
        let site = check_orders(version, &snapshot);
        assert_eq!(site.truncated, None, "{version}: {site:#?}");
        eprintln!("python {version}: {} frames", site.frames.len());
    }
}

// Who looks only when the program has ended finds neither its frames nor its memory; and the next run is the same site.
#[test]
fn python_functions_are_known_after_the_end() {
    needs!(Feature::Bpf, Feature::Command("python3"));
    for (version, python) in &pythons() {
        let ids = [(); 2].map(|()| {
            let python = python.to_str().expect("a plain path");
            let script = script("shop.py");
            let command = ["--", python, script.to_str().expect("a plain path"), "quiet"];
            let outcome = Memleak::launch(&command).outcome();
            let snapshot = outcome.snapshots.iter().rev().find(|s| !s.sites.is_empty()).expect("there was a snapshot");
            check_orders(version, snapshot);
            // The interpreter goes on by other ways once it has seen a call a few times.
            let theirs = snapshot.sites.iter().filter(|site| site.passes("Shop.order"));
            theirs.map(|site| site.id.clone()).collect::<BTreeSet<String>>()
        });
        assert_eq!(ids[0], ids[1], "{version}");
    }
}

// Python 3.13 has a copy of mimalloc in it, most of whose functions are inlined into Python's own.
#[test]
fn python_on_its_own_mimalloc_is_counted_exactly() {
    needs!(Feature::Bpf, Feature::Command("python3"));
    let code = "import os, sys\n\
        kept = []\n\
        def keep():\n  for n in range(31): kept.append(bytes(20_011))\n\
        def churn():\n  for n in range(53): bytes(20_021)\n\
        def grow():\n  for n in range(17): b = bytearray(30_011); b.extend(bytes(20_031)); kept.append(b)\n\
        print('ready', flush=True); sys.stdin.readline()\n\
        keep(); churn(); grow()\n\
        print('done', flush=True); sys.stdin.readline(); os._exit(0)";
    for (version, python) in pythons().iter().filter(|(version, _)| version == "3.13") {
        let mut program =
            Program::start_command(Command::new(python).env("PYTHONMALLOC", "mimalloc").args(["-c", code]));
        let mut memleak = Memleak::watch(program.pid());
        program.step("done");
        let snapshot = memleak.settled();
        // There is much else that Python allocates; these are known by their size.
        let of = |function: &str, bytes: u64| {
            snapshot.sum(|s| s.passes(function) && s.counts.allocated_bytes == s.counts.allocated_count * bytes)
        };
        assert_eq!(of("keep", 20_011 + 33), Counts::kept(31, 20_011 + 33), "{version}: {:#?}", snapshot.callers());
        assert_eq!(of("churn", 20_021 + 33), Counts::freed(53, 20_021 + 33), "{version}: {:#?}", snapshot.callers());
        assert_eq!(of("grow", 20_031 + 33), Counts::freed(17, 20_031 + 33), "{version}: {:#?}", snapshot.callers());
        assert_eq!(of("grow", 30_011 + 1), Counts::freed(17, 30_011 + 1), "{version}: {:#?}", snapshot.callers());
        let large = |s: &&SiteView| s.counts.allocated_bytes >= s.counts.allocated_count.max(1) * 20_000;
        assert!(snapshot.sites.iter().filter(large).all(|s| s.probe_set == "mimalloc"), "{:#?}", snapshot.callers());
        assert!(snapshot.process(program.pid()).losses.values().all(|n| *n == 0));
    }
}

// Functions that V8 compiles are in no file; node writes their names when asked to, and goes on writing.
#[test]
fn functions_of_node_are_named_by_its_growing_perf_map() {
    needs!(Feature::Bpf, Feature::Command("node"));
    // It leaves a log in its folder.
    let folder = tempfile::tempdir().expect("a folder can be made");
    let mut node = Command::new("node");
    node.current_dir(folder.path());
    node.args(["--perf-basic-prof", "--interpreted-frames-native-stack"]).arg(script("shop.js"));
    let mut program = Program::start_command(&mut node);
    let mut memleak = Memleak::watch(program.pid());
    program.step("compiled");
    let named = |snapshot: &Snapshot, size: u64, names: [&str; 2]| {
        let theirs = |site: &&SiteView| site.counts.allocated_bytes == site.counts.allocated_count * size;
        snapshot.sites.iter().filter(theirs).any(|site| {
            names.iter().all(|name| site.frames.iter().any(|f| f.function.as_deref().is_some_and(|f| f.contains(name))))
        })
    };
    memleak.wait_until("the first functions have names", |s| named(s, 100_003, ["keepOrder", "serveOrders"]));
    program.step("done");
    // The map was read by now, and has grown since.
    memleak.wait_until("a later function has a name", |s| named(s, 200_003, ["keepOrder", "laterOrders"]));
    let _ = fs::remove_file(format!("/tmp/perf-{}.map", program.pid()));
}
