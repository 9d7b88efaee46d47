//! The demo service, watched with the shipped example configuration: what `make run` promises.

use std::collections::BTreeSet;

use memleak_tests::{Feature, Memleak, Program, memleak_command, needs, program_path};
use serde_json::Value;

/// A running demo; killed when dropped.
struct Demo(std::process::Child);

impl Drop for Demo {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

// The leak is found within 30 s by function, file and line; the cache, the pool, the queue and the churn are not.
#[test]
fn demo_leak_is_found_and_nothing_else() {
    needs!(Feature::Bpf);
    let path = program_path("memleak-demo").expect("the demo was built");
    let demo =
        Demo(std::process::Command::new(path).arg("120").stdout(std::process::Stdio::null()).spawn().expect("starts"));
    let pid = demo.0.id().to_string();
    let run = tempfile::tempdir().expect("a folder can be made");
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../config.example.toml");
    let mut command = memleak_command();
    // By pid instead of by name: another demo may be running on this machine.
    command.current_dir(run.path()).args(["--config", example, "-p", &pid, "--duration", "30s", "--json"]);
    let outcome = Memleak::spawn(&mut command, tempfile::tempdir().expect("a folder can be made")).outcome();
    assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
    let firing: Vec<&Value> = outcome.alerts().filter(|alert| alert["status"] == "firing").collect();
    let places: BTreeSet<_> = firing.iter().map(|a| a["site"]["frames"][0]["function"].as_str()).collect();
    assert_eq!(places, BTreeSet::from([Some("remember_applied_discount")]), "{firing:#?}");

    let frame = &firing[0]["site"]["frames"][0];
    let source = include_str!("../demo/memleak-demo.c");
    let line = 1 + source.lines().position(|l| l.contains("struct discount_note *note = allocate(")).expect("the leak");
    assert!(frame["file"].as_str().is_some_and(|file| file.ends_with("memleak-demo.c")), "{frame}");
    assert_eq!(frame["line"], line);
    let names: Vec<_> =
        firing[0]["site"]["frames"].as_array().expect("frames").iter().filter_map(|f| f["function"].as_str()).collect();
    for caller in ["apply_discounts", "price_order", "handle_order"] {
        assert!(names.contains(&caller), "{caller} in {names:?}");
    }
    assert!(run.path().join("memleak-report.html").exists());
}

// A program that only does its work is no finding: the same service's shape, with nothing lost.
#[test]
fn bounded_program_is_no_finding() {
    needs!(Feature::Bpf);
    let mut program = Program::start("leaker");
    let run = tempfile::tempdir().expect("a folder can be made");
    let mut command = memleak_command();
    command.current_dir(run.path()).args(["--json", "-p", &program.pid().to_string(), "--duration", "15s"]);
    let mut memleak = Memleak::spawn(&mut command, tempfile::tempdir().expect("a folder can be made"));
    memleak.wait_until("the first snapshot", |_| true);
    // Some memory at the start that stays: warm-up, not a leak.
    for _ in 0..50 {
        program.step("done");
    }
    let outcome = memleak.outcome();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
}
