//! `memleak run`: what a command and its descendants leave, exactly, and what CI gets to see of it.

use std::path::Path;
use std::process::Command;

use memleak_tests::{Feature, memleak_command, needs, output_within, program_path};
use serde_json::Value;

/// Runs the test program `run` under `memleak run`: exit code and the report.
fn run(options: &[&str], doings: &[&str]) -> (Option<i32>, Value) {
    let (code, stdout, stderr) = run_raw(&[&["--format", "json", "-o", "-"], options].concat(), doings);
    let report = serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("no report ({e}): {stdout}\n{stderr}"));
    (code, report)
}

fn run_raw(options: &[&str], doings: &[&str]) -> (Option<i32>, String, String) {
    let program = program_path("run").expect("the program was built");
    output_within(memleak_command().arg("run").args(options).arg("--").arg(program).args(doings))
}

/// Bytes and blocks of the finding whose innermost function this is.
fn found(report: &Value, function: &str) -> Option<(u64, u64)> {
    let findings = report["findings"].as_array().expect("findings");
    let leak = findings.iter().find(|f| f["frames"][0]["function"] == function)?;
    Some((leak["bytes"].as_u64().expect("bytes"), leak["blocks"].as_u64().expect("blocks")))
}

fn count(report: &Value, key: &str) -> usize {
    report[key].as_array().expect("a list").len()
}

// The sum of the whole feature: what nobody freed is counted to the byte, what handlers and destructors freed is not.
#[test]
fn what_is_outstanding_after_the_handlers_is_exact() {
    needs!(Feature::Bpf);
    let (code, report) = run(&[], &["leak", "handler", "destructor", "static"]);
    assert_eq!(code, Some(1), "{report}");
    assert_eq!(found(&report, "leak_blocks"), Some((131 * 13, 131)), "{report}");
    assert_eq!(found(&report, "fill_static"), Some((1009, 1)));
    assert_eq!(count(&report, "findings"), 2, "{report}");
    let freed: Vec<(u64, u64)> = report["freed"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|f| (f["bytes"].as_u64().expect("bytes"), f["blocks"].as_u64().expect("blocks")))
        .collect();
    assert_eq!(freed, [(7 * 43, 7), (5 * 59, 5)], "{report}");
    assert!(report["freed"][0]["place"].as_str().is_some_and(|p| p.starts_with("fill_handled ")), "{report}");
    // What nothing refers to is a leak; a block that a global still holds is not.
    let of = |function: &str| {
        let findings = report["findings"].as_array().expect("findings");
        let finding = findings.iter().find(|f| f["frames"][0]["function"] == function).expect("a finding");
        (finding["severity"].as_str().expect("a severity"), finding["reason"].as_str().expect("a reason"))
    };
    let (severity, reason) = of("leak_blocks");
    assert!(severity == "critical" && reason.contains("nothing in its memory referred to"), "{severity} {reason}");
    let (severity, reason) = of("fill_static");
    assert!(severity == "info" && reason.contains("something still referred to them"), "{severity} {reason}");
    assert!(reason.contains("global kept (run)"), "{reason}");
}

// Whoever does not want to wait for the scan gets what there was before.
#[test]
fn without_a_scan_at_exit_nothing_is_told_apart() {
    needs!(Feature::Bpf);
    let (code, report) = run(&["--set", "reachability.at_exit=false"], &["leak", "static"]);
    assert_eq!((code, count(&report, "findings")), (Some(1), 2), "{report}");
    for finding in report["findings"].as_array().expect("findings") {
        assert_eq!(finding["severity"], "warning", "{report}");
        let reason = finding["reason"].as_str().expect("a reason");
        assert!(reason.contains("whether anything still pointed to them was not checked"), "{reason}");
    }
}

// Without a call of exit() no handler runs and nothing is scanned, and the global counts.
#[test]
fn what_handlers_had_no_chance_to_free_is_outstanding() {
    needs!(Feature::Bpf);
    let (code, report) = run(&[], &["handler", "_exit"]);
    assert_eq!((code, found(&report, "fill_handled")), (Some(1), Some((7 * 43, 7))), "{report}");
    assert_eq!(count(&report, "freed"), 0);
}

// A program that cleans up is clean: no finding of its own, of the C library or of the dynamic linker.
#[test]
fn a_clean_program_is_clean() {
    needs!(Feature::Bpf, Feature::StoppedChildren);
    let (code, report) = run(&[], &["handler", "vfork"]);
    assert_eq!((code, count(&report, "findings")), (Some(0), 0), "{report}");
    let mut programs: Vec<&str> =
        report["processes"].as_array().expect("a list").iter().filter_map(|p| p["comm"].as_str()).collect();
    programs.sort_unstable();
    assert_eq!(programs, ["run", "true"], "{report}");
}

// Children that end at once are followed from their first instruction, however short they live.
#[test]
fn short_lived_children_are_counted_to_the_byte() {
    needs!(Feature::Bpf, Feature::StoppedChildren);
    for _ in 0..3 {
        let (code, report) = run(&[], &["fork"]);
        assert_eq!((code, found(&report, "leak_in_child")), (Some(1), Some((3 * 11 * 37, 3 * 11))), "{report}");
        assert_eq!(report["findings"][0]["processes"], 3);
        assert_eq!(count(&report, "processes"), 4, "{report}");
    }
}

// Container run times put children into pid namespaces of their own, in which they have other numbers than ours.
#[test]
fn children_in_a_pid_namespace_are_counted_to_the_byte() {
    needs!(Feature::Bpf, Feature::UserNamespace);
    let program = program_path("run").expect("the program was built");
    let mut command = memleak_command();
    command.args(["run", "--format", "json", "-o", "-", "--", "unshare", "--pid", "--fork"]).arg(program);
    let (code, stdout, stderr) = output_within(command.args(["leak", "fork"]));
    let report: Value = serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("no report ({e}): {stderr}"));
    assert_eq!((code, found(&report, "leak_blocks")), (Some(1), Some((131 * 13, 131))), "{report}");
    assert_eq!(found(&report, "leak_in_child"), Some((3 * 11 * 37, 3 * 11)), "{report}");
}

// exec throws memory away on purpose; the image that comes after it is judged like any other.
#[test]
fn exec_chains_are_followed_and_only_the_end_is_judged() {
    needs!(Feature::Bpf);
    let (code, report) = run(&[], &["handler", "exec", "exec", "leak", "exit3"]);
    assert_eq!((code, found(&report, "leak_blocks")), (Some(1), Some((131 * 13, 131))), "{report}");
    assert_eq!(count(&report, "findings"), 1, "{report}");
    let ends: Vec<&str> =
        report["processes"].as_array().expect("a list").iter().filter_map(|p| p["end"].as_str()).collect();
    assert_eq!(ends, ["exec", "exec", "exited"]);
}

// What is kept of a thread must go with it, also when it takes the process over: the table of threads would fill up.
#[test]
fn exec_leaves_no_threads_behind() {
    needs!(Feature::Bpf);
    let doings: Vec<&str> = std::iter::repeat_n("texec", 24).chain(["leak"]).collect();
    let (code, report) = run(&["--set", "collector.max_threads=16"], &doings);
    assert_eq!((code, found(&report, "leak_blocks")), (Some(1), Some((131 * 13, 131))), "{report}");
    assert_eq!(report["losses"]["threads_full"], 0, "{report}");
}

// A scan that cannot be made must not keep the process: it is stopped, and waits for nothing else.
#[test]
fn a_process_ends_when_its_scan_at_exit_fails() {
    needs!(Feature::Bpf, Feature::Command("prlimit"));
    // With no file left to memleak, which is the shell's parent, nothing more can be read.
    let script = "prlimit --pid $PPID --nofile=3; exit 7";
    let mut command = memleak_command();
    command.args(["run", "--exit-code", "command", "--", "bash", "-c", script]);
    let (code, stdout, stderr) = output_within(&mut command);
    assert!(stderr.contains("what the process held at its exit is not known"), "{code:?} {stdout}{stderr}");
    assert!(stderr.contains("the command exited with 7"), "{code:?} {stdout}{stderr}");
}

// The command's own end is never hidden, and passed on when asked for.
#[test]
fn the_commands_own_exit_is_shown_and_can_be_passed_on() {
    needs!(Feature::Bpf);
    let (code, report) = run(&[], &["exit3"]);
    assert_eq!((code, &report["command_end"]["exited"]), (Some(0), &3.into()), "{report}");
    let (code, _, stderr) = run_raw(&["--exit-code", "command"], &["leak", "exit3"]);
    assert_eq!(code, Some(3), "{stderr}");
    assert!(stderr.contains("the command exited with 3") && stderr.contains("1 finding fails the run"), "{stderr}");
    // A crash had no chance to clean up: what it held is remarked and fails nothing.
    let (code, report) = run(&[], &["leak", "crash"]);
    assert_eq!((code, &report["command_end"]["killed"]), (Some(0), &libc::SIGSEGV.into()), "{report}");
    assert_eq!(report["findings"][0]["severity"], "info");
    assert_eq!(run(&["--exit-code", "command"], &["crash"]).0, Some(128 + libc::SIGSEGV));
}

// A service that detaches itself is waited for, and when that takes too long shown for what it is.
#[test]
fn descendants_that_outlive_the_command_are_waited_for() {
    needs!(Feature::Bpf, Feature::StoppedChildren);
    let (code, report) = run(&[], &["short"]);
    assert_eq!((code, found(&report, "leak_in_daemon")), (Some(1), Some((17 * 71, 17))), "{report}");
    let (code, report) = run(&["--wait", "1s"], &["daemon"]);
    assert_eq!((code, found(&report, "leak_in_daemon")), (Some(0), Some((17 * 71, 17))), "{report}");
    let running = report["processes"].as_array().expect("a list").iter().find(|p| p["end"] == "running");
    let pid = running.expect("it runs")["pid"].as_i64().expect("a pid");
    // It goes on after the run, unharmed; this test ends it.
    // SAFETY: kill takes plain numbers.
    assert_eq!(unsafe { libc::kill(i32::try_from(pid).expect("a pid"), libc::SIGKILL) }, 0);
}

// A process that calls exit() is stopped there. It must go on also where the kernel has not stopped it before: then it
// has been joined while it ran.
#[test]
fn descendants_that_exit_are_let_go() {
    needs!(Feature::Bpf);
    let script = "(sleep 0.5; \"$0\" static; true) & wait";
    let program = program_path("run").expect("the program was built");
    let mut command = memleak_command();
    command.args(["run", "--format", "json", "-o", "-", "--fail-on", "never", "--", "sh", "-c", script]).arg(program);
    let (code, stdout, stderr) = output_within(&mut command);
    let report: Value = serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("no report ({e}): {stderr}"));
    assert_eq!(code, Some(0), "{report}");
    let processes = report["processes"].as_array().expect("a list");
    assert!(processes.iter().any(|p| p["comm"] == "run"), "{report}");
    assert!(processes.iter().all(|p| p["end"] != "running"), "{report}");
}

// A run that does not wait any longer, or fails, leaves nobody stopped whom it was about to attach to.
#[test]
fn descendants_that_are_not_waited_for_go_on() {
    needs!(Feature::Bpf);
    let mark = format!("33.0{}", std::process::id());
    let script = format!("i=0; while [ $i -lt 20 ]; do sleep {mark} >/dev/null 2>&1 & i=$((i+1)); done");
    let mut command = memleak_command();
    command.args(["run", "--fail-on", "never", "--wait", "0s", "--", "sh", "-c", &script]);
    let (code, _, stderr) = output_within(&mut command);
    assert_eq!(code, Some(0), "{stderr}");
    let names = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let state = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let stopped = |pid: &u32| state(*pid).rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'));
    let pids = std::fs::read_dir("/proc").expect("processes").flatten();
    let pids: Vec<u32> = pids.filter_map(|p| p.file_name().to_str()?.parse().ok()).collect();
    let ours: Vec<u32> = pids.into_iter().filter(|pid| names(*pid).contains(&mark)).collect();
    let still: Vec<u32> = ours.iter().copied().filter(stopped).collect();
    for pid in &ours {
        // SAFETY: kill takes plain numbers.
        unsafe { libc::kill(pid.cast_signed(), libc::SIGKILL) };
    }
    assert!(!ours.is_empty() && still.is_empty(), "{} of {} are stopped", still.len(), ours.len());
}

// What fails the run is for the user to say.
#[test]
fn fail_on_decides_the_exit_code() {
    needs!(Feature::Bpf);
    for (fail_on, expected) in [("never", 0), ("critical", 1), ("growth", 0), ("at_exit", 1), ("growth,info", 1)] {
        assert_eq!(run(&["--fail-on", fail_on], &["leak"]).0, Some(expected), "{fail_on}");
    }
    let (code, _, stderr) = run_raw(&["--fail-on", "at_exti"], &[]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("--fail-on at_exti") && stderr.contains("did you mean at_exit?"), "{stderr}");
    // Another program than the judged ones is followed and not reported.
    assert_eq!(run(&["--only", "true"], &["leak", "vfork"]).0, Some(0));
}

// A file written for LeakSanitizer works as it is; each line says what it has done.
#[test]
fn suppressions_silence_and_are_counted() {
    needs!(Feature::Bpf);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let path = folder.path().join("known.supp");
    std::fs::write(&path, "# known\nleak:^leak_blocks$\nleak:libnever\nfile:programs/run.c\n").expect("written");
    let path = path.to_str().expect("UTF-8");
    let (code, report) = run(&["--suppressions", path], &["leak", "static"]);
    assert_eq!((code, count(&report, "findings"), count(&report, "suppressed")), (Some(0), 0, 2), "{report}");
    let uses: Vec<(u64, u64)> = report["suppressions"]["lines"]
        .as_array()
        .expect("lines")
        .iter()
        .map(|l| (l["findings"].as_u64().expect("n"), l["bytes"].as_u64().expect("n")))
        .collect();
    assert_eq!(uses, [(1, 131 * 13), (0, 0), (1, 1009)], "{report}");
    let (_, _, stderr) = run_raw(&["--suppressions", path], &["leak"]);
    assert!(stderr.contains("suppression never used:") && stderr.contains("known.supp:3: leak:libnever"), "{stderr}");
}

// A typing error must stop the run before the command starts, with file and line.
#[test]
fn bad_input_could_not_run() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let file = folder.path().join("bad.supp");
    std::fs::write(&file, "leak:ok\nlaek:x\n").expect("written");
    let bad = file.to_str().expect("UTF-8");
    for (options, message) in [
        (&["--suppressions", bad][..], "bad.supp:2: there is no kind \"laek\""),
        (&["--suppressions", "/no/such"], "failed to read the suppressions /no/such"),
        (&["-o", "/no/such/report.xml"], "failed to prepare the report /no/such/report.xml"),
        (&["--wait", "soon"], "soon"),
        (&["--format", "xml"], "junit"),
        (&["--only", "[a"], "[a"),
        (&["--budget", "lots"], "collector.budget"),
    ] {
        let (code, stdout, stderr) = run_raw(options, &["exit3"]);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{options:?}: {stderr}");
        assert!(stderr.contains(message), "{options:?}: {stderr}");
    }
    let (code, _, stderr) = output_within(memleak_command().arg("run"));
    assert!(code == Some(2) && stderr.contains("CMD"), "{stderr}");
}

/// Checks a file with a Python script that gets its path; prints what it says when it fails.
fn python(script: &str, path: &Path) {
    let (code, stdout, stderr) = output_within(Command::new("python3").args(["-c", script]).arg(path));
    assert_eq!(code, Some(0), "{stdout}\n{stderr}\n{}", std::fs::read_to_string(path).unwrap_or_default());
}

// CI systems parse these files with parsers of their own: a hostile name must not break them.
#[test]
fn junit_and_sarif_are_well_formed_and_count_the_same() {
    needs!(Feature::Bpf, Feature::Command("python3"));
    let folder = tempfile::tempdir().expect("a folder can be made");
    let (junit, sarif) = (folder.path().join("memleak.xml"), folder.path().join("memleak.sarif"));
    let doings = ["leak", "static", "exit3"];
    let (code, _, stderr) = run_raw(&["--format", "junit", "-o", junit.to_str().expect("UTF-8")], &doings);
    assert!(code == Some(1) && stderr.contains("CRITICAL at_exit"), "{stderr}");
    python(
        r#"
import sys, xml.etree.ElementTree as et
suite = et.parse(sys.argv[1]).getroot().find("testsuite")
cases = suite.findall("testcase")
assert (suite.get("tests"), suite.get("failures")) == ("3", "1") and len(cases) == 3, suite.attrib
assert len(suite.findall("testcase/failure")) == 1
assert any("leak_blocks" in c.get("name") and c.get("file").endswith("run.c") for c in cases)
assert any(p.get("value") == "exited with 3" for p in suite.findall("properties/property"))
"#,
        &junit,
    );
    let (code, _, stderr) = run_raw(&["-q", "--format", "sarif", "-o", sarif.to_str().expect("UTF-8")], &doings);
    assert!(code == Some(1) && !stderr.contains("at_exit"), "{stderr}");
    python(
        r#"
import sys, json
log = json.load(open(sys.argv[1]))
run, = log["runs"]
assert log["version"] == "2.1.0" and run["tool"]["driver"]["name"] == "memleak"
rules = [r["id"] for r in run["tool"]["driver"]["rules"]]
assert len(run["results"]) == 2 and run["invocations"][0]["exitCode"] == 3
for r in run["results"]:
    assert rules[r["ruleIndex"]] == r["ruleId"] == "at_exit" and r["level"] in ("error", "note") and r["message"]["text"]
    place = r["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"].endswith("run.c") and place["region"]["startLine"] > 1
    assert len(r["partialFingerprints"]["memleakFinding/v1"]) == 16 and r["stacks"][0]["frames"]
"#,
        &sarif,
    );
}

// Test harnesses put what they run into namespaces: process ids inside are others than outside.
#[test]
fn processes_in_a_pid_namespace_are_counted_to_the_byte() {
    needs!(Feature::Bpf, Feature::MountNamespace);
    let program = program_path("run").expect("the program was built");
    let mut command = memleak_command();
    command.args(["run", "--format", "json", "-o", "-", "--only", "run", "--", "unshare", "--pid", "--fork"]);
    let (code, stdout, stderr) = output_within(command.arg(program).args(["leak", "fork"]));
    let report: Value = serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("no report ({e}): {stdout}\n{stderr}"));
    assert_eq!(code, Some(1), "{report}");
    assert_eq!(found(&report, "leak_blocks"), Some((131 * 13, 131)), "{report}");
    assert_eq!(found(&report, "leak_in_child"), Some((3 * 11 * 37, 3 * 11)), "{report}");
}
