//! The command line: help, exit codes, signals, forms of output, and what is left behind.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use memleak_tests::memleak::wait_within;
use memleak_tests::{Counts, Feature, Memleak, Program, memleak_command, needs, output_within};
use serde_json::Value;

/// Runs memleak to its end in a folder of its own.
fn memleak(args: &[&str]) -> (Option<i32>, String, String) {
    let folder = tempfile::tempdir().expect("a folder can be made");
    output_within(memleak_command().current_dir(folder.path()).args(args))
}

// Help is what was asked for: on standard output, with success.
#[test]
fn help_and_version_go_to_stdout() {
    let (code, stdout, stderr) = memleak(&["--help"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    for word in ["--pid", "--name", "--config", "--set", "check", "doctor", "trace", "Exit codes"] {
        assert!(stdout.contains(word), "help speaks of {word}");
    }
    let (code, stdout, _) = memleak(&["--version"]);
    assert_eq!(code, Some(0));
    assert!(stdout.starts_with("memleak "), "{stdout}");
}

// Somebody who types nothing but the name needs to be shown the way.
#[test]
fn no_target_is_refused_with_examples() {
    let (code, stdout, stderr) = memleak(&[]);
    assert_eq!((code, stdout.as_str()), (Some(2), ""));
    assert!(stderr.contains("no target") && stderr.contains("memleak -p "), "{stderr}");
}

// A typing error is answered with what was probably meant.
#[test]
fn unknown_flag_is_refused_with_a_suggestion() {
    let (code, _, stderr) = memleak(&["--intervall", "1s", "-p", "1"]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("--intervall") && stderr.contains("--interval'"), "{stderr}");
}

// Packagers call these at build time, without privileges.
#[test]
fn completions_and_man_page_are_generated() {
    for shell in ["bash", "zsh", "fish"] {
        let (code, stdout, _) = memleak(&["completions", shell]);
        assert_eq!(code, Some(0));
        assert!(stdout.contains("memleak") && stdout.contains("doctor"), "{shell}");
    }
    let (code, stdout, _) = memleak(&["man"]);
    assert_eq!(code, Some(0));
    assert!(stdout.contains(".TH memleak"), "{stdout}");
}

// The example is the documentation of every key: it must be accepted as it stands.
#[test]
fn check_accepts_the_example_configuration() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../config.example.toml");
    let (code, _, stderr) = memleak(&["check", example]);
    assert_eq!(code, Some(0), "{stderr}");
}

// doctor tells what works here even to a user who may do nothing.
#[test]
fn doctor_lists_what_this_machine_allows() {
    let (code, stdout, stderr) = memleak(&["doctor"]);
    assert!(matches!(code, Some(0 | 2)), "{code:?}: {stderr}");
    for word in ["session", "multi", "perf"] {
        assert!(stdout.contains(word), "doctor speaks of {word}: {stdout}");
    }
}

// For one process, doctor names each probe set and what became of it.
#[test]
fn doctor_says_what_can_be_attached_to_a_process() {
    needs!(Feature::Bpf);
    let program = Program::start("leaker");
    let (code, stdout, stderr) = memleak(&["doctor", "-p", &program.pid().to_string()]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains("glibc") && stdout.contains("libc.so.6"), "{stdout}");
}

// How far its stacks reach and what will have a name are questions about a process before it is watched for days.
#[test]
fn doctor_says_how_far_stacks_reach_and_where_names_come_from() {
    needs!(Feature::Bpf, Feature::Program("busy"));
    let mut program = Program::start("busy");
    program.go();
    let (code, stdout, stderr) = memleak(&["doctor", "-p", &program.pid().to_string()]);
    assert_eq!(code, Some(0), "{stderr}");
    let says = |line: &dyn Fn(&str) -> bool| assert!(stdout.lines().any(line), "{stdout}");
    says(&|l| l.trim_start().starts_with("100") && l.ends_with("recorded allocations have a complete call stack"));
    says(&|l| l.contains("unwind tables of") && l.contains("of kernel memory"));
    says(&|l| l.contains("/busy ") && l.ends_with("its own debug information"));
    // Debian's C library, with or without its debug package.
    says(&|l| l.contains("libc.so.6 ") && (l.contains("debug file /usr/lib/debug") || l.contains("what it exports")));
}

// Nothing found is success: scripts rely on it.
#[test]
fn clean_run_exits_with_0() {
    needs!(Feature::Bpf);
    let program = Program::start("leaker");
    let (code, _, stderr) = memleak(&["-p", &program.pid().to_string(), "--duration", "1s"]);
    assert_eq!(code, Some(0), "{stderr}");
}

// A leak is exit code 1, an alert line with everything that the schema promises, and a report.
#[test]
fn leak_exits_with_1_and_leaves_alert_and_report() {
    needs!(Feature::Bpf);
    let mut program = Program::start("leaker");
    let pid = program.pid();
    let folder = tempfile::tempdir().expect("a folder can be made");
    let mut command = memleak_command();
    command.current_dir(folder.path()).args(["--json", "--interval", "100ms", "-p", &pid.to_string()]);
    // A low bar, so that the test is quick: the shipped defaults are tested with the demo.
    command.args(["--set", "rules.threshold.max_bytes=\"1KiB\"", "--set", "rules.threshold.enabled=true"]);
    command.args(["--set", "alerts.hold=200ms"]);
    let mut memleak = Memleak::spawn(&mut command, tempfile::tempdir().expect("a folder can be made"));
    memleak.wait_until("the first snapshot", |_| true);
    for _ in 0..11 {
        program.step("done");
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    let alerts = folder.path().join("memleak-alerts.ndjson");
    while std::fs::read_to_string(&alerts).unwrap_or_default().is_empty() && Instant::now() < deadline {
        memleak.settled();
    }
    let outcome = memleak.stop();
    assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
    let text = std::fs::read_to_string(&alerts).expect("alerts were written");
    let alert: Value = serde_json::from_str(text.lines().next().expect("one line")).expect("a line is JSON");
    assert_eq!(alert["status"], "firing");
    assert_eq!(alert["mode"], "exact");
    assert_eq!(alert["process"]["pid"], pid);
    assert_eq!(alert["site"]["probe_set"], "glibc");
    assert_eq!(alert["site"]["frames"][0]["function"], "lose_some");
    for key in ["id", "time", "rule", "severity", "confidence", "reason", "losses"] {
        assert!(!alert[key].is_null(), "{key} in {alert}");
    }
    assert_eq!(outcome.alerts().count(), text.lines().count(), "--json prints the same alerts");
    let report = folder.path().join("memleak-report.html");
    let page = std::fs::read_to_string(&report).expect("the report was written");
    assert!(page.contains("lose_some"));
    for file in [&alerts, &report] {
        let mode = std::fs::metadata(file).expect("the file exists").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", file.display());
    }
}

// SIGTERM and SIGINT end a run well: last snapshot, report, exit code.
#[test]
fn signals_end_the_run_with_a_report() {
    needs!(Feature::Bpf);
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let program = Program::start("leaker");
        let report = tempfile::tempdir().expect("a folder can be made").keep();
        let path = report.join("end.html");
        let memleak =
            Memleak::watch_with(program.pid(), &["--report", path.to_str().expect("the folder has a plain name")]);
        memleak.signal(signal);
        let outcome = memleak.outcome();
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        assert!(path.exists(), "a report after signal {signal}");
        std::fs::remove_dir_all(report).expect("the folder can be removed");
    }
}

// A service is asked for a report in between, without ending it.
#[test]
fn sigusr1_writes_the_report_and_goes_on() {
    needs!(Feature::Bpf);
    let program = Program::start("leaker");
    let mut memleak = Memleak::watch(program.pid());
    let report = memleak.folder().join("memleak-report.html");
    assert!(!report.exists());
    memleak.signal(libc::SIGUSR1);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !report.exists() {
        assert!(Instant::now() < deadline, "no report; standard error:\n{}", memleak.stderr());
        std::thread::sleep(Duration::from_millis(20));
    }
    memleak.settled();
    assert_eq!(memleak.stop().code, Some(0));
}

// Ctrl-C while everything is still being set up must neither hang nor be lost nor read as a crash.
#[test]
fn signal_during_start_ends_cleanly() {
    needs!(Feature::Bpf);
    let program = Program::start("leaker");
    let pid = program.pid().to_string();
    for delay_ms in [0, 5, 20, 50, 100, 200, 400] {
        for signal in [libc::SIGINT, libc::SIGTERM] {
            let folder = tempfile::tempdir().expect("a folder can be made");
            let mut command = memleak_command();
            command
                .current_dir(folder.path())
                .args(["--json", "-p", &pid])
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            // A shell starts what is to run in the background with SIGINT ignored, and so would this test's children be.
            // SAFETY: sets a signal's action, which a forked child may do.
            unsafe {
                command.pre_exec(|| {
                    libc::signal(libc::SIGINT, libc::SIG_DFL);
                    Ok(())
                });
            }
            let mut child = command.spawn().expect("memleak starts");
            std::thread::sleep(Duration::from_millis(delay_ms));
            // SAFETY: kill takes plain numbers; the child has not been waited for, so the pid is still its own.
            unsafe { libc::kill(libc::pid_t::try_from(child.id()).expect("a pid fits"), signal) };
            let status = wait_within(&mut child, Duration::from_secs(20));
            if status.is_none() {
                let _ = child.kill();
            }
            let mut stderr = String::new();
            child.stderr.take().expect("piped").read_to_string(&mut stderr).expect("messages are text");
            let status = status.unwrap_or_else(|| panic!("still there after signal {signal} at {delay_ms} ms"));
            assert!(!stderr.contains("panicked"), "{stderr}");
            // Before its handler is there the signal ends the process; afterwards memleak ends it itself, in order.
            let by_signal = std::os::unix::process::ExitStatusExt::signal(&status);
            assert!(status.code() == Some(0) || by_signal == Some(signal), "{status} at {delay_ms} ms: {stderr}");
        }
    }
}

/// The pages of the C library's code as the process sees them, and as the file has them.
pub(crate) fn library_code(pid: u32) -> (Vec<u8>, Vec<u8>) {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps can be read");
    let line = maps.lines().find(|l| l.contains(" r-xp ") && l.contains("libc.so.6")).expect("libc is mapped");
    let fields: Vec<_> = line.split_whitespace().collect();
    let (start, end) = fields[0].split_once('-').expect("a range");
    let number = |hex: &str| u64::from_str_radix(hex, 16).expect("a hexadecimal number");
    let (start, end, offset) = (number(start), number(end), number(fields[2]));
    let read = |path: &str, at: u64| {
        let mut bytes = vec![0; usize::try_from(end - start).expect("a mapping fits")];
        let file = std::fs::File::open(path).expect("the file can be opened");
        let mut done = 0;
        while done < bytes.len() {
            match file.read_at(&mut bytes[done..], at + done as u64).expect("the file can be read") {
                0 => break,
                n => done += n,
            }
        }
        bytes
    };
    (read(&format!("/proc/{pid}/mem"), start), read(fields[5], offset))
}

/// The ids of the BPF links that a process holds.
fn links_of(pid: u32) -> Vec<u64> {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("descriptors can be read");
    descriptors
        .filter_map(|entry| std::fs::read_to_string(entry.ok()?.path()).ok())
        .filter_map(|info| info.lines().find_map(|line| line.strip_prefix("link_id:")?.trim().parse().ok()))
        .collect()
}

/// The ids of all BPF links of this machine.
fn all_links() -> Vec<u64> {
    let (code, stdout, stderr) = output_within(Command::new("bpftool").args(["--json", "link", "show"]));
    assert_eq!(code, Some(0), "{stderr}");
    let links: Vec<Value> = serde_json::from_str(&stdout).expect("bpftool prints JSON");
    links.iter().filter_map(|link| link["id"].as_u64()).collect()
}

// The worst end of all: no handler runs, and yet the target goes on as if nothing had been, with its own code.
#[test]
fn kill_9_leaves_the_target_untouched_and_nothing_behind() {
    needs!(Feature::Bpf, Feature::Command("bpftool"));
    let mut program = Program::start("leaker");
    let pid = program.pid();
    let memleak = Memleak::watch(pid);
    let (mapped, file) = library_code(pid);
    assert_ne!(mapped, file, "probes show as changed instructions: the comparison below can fail");
    let links = links_of(memleak.pid());
    let all = all_links();
    assert!(links.len() > 3 && links.iter().all(|link| all.contains(link)), "our links {links:?} in {all:?}");
    program.step("done");

    memleak.signal(libc::SIGKILL);
    drop(memleak);
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let left: Vec<_> = all_links().into_iter().filter(|link| links.contains(link)).collect();
        let (mapped, file) = library_code(pid);
        if left.is_empty() && mapped == file {
            break;
        }
        assert!(Instant::now() < deadline, "links left: {left:?}, code restored: {}", mapped == file);
        std::thread::sleep(Duration::from_millis(50));
    }
    let pinned: Vec<_> = std::fs::read_dir("/sys/fs/bpf")
        .map(|dir| dir.filter_map(|entry| Some(entry.ok()?.file_name())).collect())
        .unwrap_or_default();
    assert!(pinned.iter().all(|name| !name.to_string_lossy().contains("memleak")), "{pinned:?}");
    for _ in 0..10 {
        program.step("done");
    }
    // And it can be watched again, exactly.
    let mut again = Memleak::watch(pid);
    program.step("done");
    assert_eq!(again.settled().totals, Counts::kept(7, 67));
}

// An ordinary end detaches, too: the target runs its own code again.
#[test]
fn end_of_the_run_restores_the_targets_code() {
    needs!(Feature::Bpf);
    let program = Program::start("leaker");
    let memleak = Memleak::watch(program.pid());
    assert_eq!(memleak.stop().code, Some(0));
    let (mapped, file) = library_code(program.pid());
    assert_eq!(mapped, file);
}

// `memleak ... | head` is an ordinary thing to do.
#[test]
fn closed_pipe_is_not_an_error() {
    needs!(Feature::Bpf);
    let program = Program::start("leaker");
    let folder = tempfile::tempdir().expect("a folder can be made");
    let mut child = memleak_command()
        .current_dir(folder.path())
        .args(["--json", "--interval", "50ms", "-p", &program.pid().to_string()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("memleak starts");
    let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    stdout.read_line(&mut line).expect("a first line");
    drop(stdout);
    let status = wait_within(&mut child, Duration::from_secs(20));
    if status.is_none() {
        let _ = child.kill();
    }
    let mut stderr = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut stderr).expect("messages are text");
    assert_eq!(status.and_then(|status| status.code()), Some(0), "{stderr}");
    assert!(!stderr.contains("panicked") && !stderr.contains("roken pipe"), "{stderr}");
}

// Without a terminal the live view is plain lines: no cursor movements, no colours.
#[test]
fn output_to_a_pipe_has_no_escape_sequences() {
    needs!(Feature::Bpf);
    let program = Program::start("leaker");
    let (code, stdout, stderr) =
        memleak(&["-p", &program.pid().to_string(), "--interval", "200ms", "--duration", "1s"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(!stdout.contains('\u{1b}') && !stderr.contains('\u{1b}'), "{stdout}\n{stderr}");
    assert!(!stdout.is_empty(), "the live view is shown");
}

// --quiet is for services: a clean run says nothing at all on standard output.
#[test]
fn quiet_run_prints_nothing() {
    needs!(Feature::Bpf);
    let program = Program::start("leaker");
    let (code, stdout, stderr) = memleak(&["-p", &program.pid().to_string(), "--quiet", "--duration", "1s"]);
    assert_eq!((code, stdout.as_str()), (Some(0), ""), "{stderr}");
}

// trace shows each event once: what was allocated and freed, by whom, from where.
#[test]
fn trace_prints_every_event() {
    needs!(Feature::Bpf);
    let mut program = Program::start("kinds");
    let pid = program.pid();
    let folder = tempfile::tempdir().expect("a folder can be made");
    let mut child = memleak_command()
        .current_dir(folder.path())
        .args(["trace", "--json", "-p", &pid.to_string()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("memleak starts");
    let mut stdout = child.stdout.take().expect("piped");
    // Read while it runs: the events do not fit into a pipe.
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    // There is no snapshot to wait for: it is attached once the target's code has changed.
    let deadline = Instant::now() + Duration::from_secs(30);
    while {
        let (mapped, file) = library_code(pid);
        mapped == file
    } {
        assert!(Instant::now() < deadline, "never attached");
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_millis(500));
    program.step("done");
    program.finish();
    let status = wait_within(&mut child, Duration::from_secs(30));
    if status.is_none() {
        let _ = child.kill();
    }
    let stdout = reader.join().expect("the reader does not panic").expect("events are text");
    assert_eq!(status.and_then(|status| status.code()), Some(0), "ends with its target");
    let events: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).expect("an event is JSON")).collect();
    let allocations: Vec<_> = events.iter().filter(|event| event["type"] == "alloc").collect();
    let frees: Vec<_> = events.iter().filter(|event| event["type"] == "free").collect();
    // Nine functions: the sum of their primes, and 59 freed blocks each.
    let kept = 101 + 97 + 89 + 83 + 79 + 73 + 71 + 67 + 61;
    assert_eq!(allocations.len(), kept + 9 * 59);
    assert_eq!(frees.len(), 9 * 59);
    let first = allocations[0];
    assert_eq!(first["pid"], pid);
    assert_eq!(first["tid"], pid);
    assert_eq!(first["comm"], "kinds");
    assert_eq!(first["size"], 17);
    assert_eq!(first["frames"][0]["function"], "leak_malloc");
    assert!(frees.iter().all(|event| event["lifetime_ns"].as_u64().is_some()), "{:?}", frees[0]);
}
