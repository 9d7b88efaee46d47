//! Names that come later: reports of stripped programs, and identities that hold without names.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use memleak_tests::memleak::{memleak_command, output_within};
use memleak_tests::program::program_path;
use memleak_tests::{Counts, Feature, Memleak, Program, needs};

/// The leaker without symbols in `folder`, and its debug file.
fn stripped(folder: &Path) -> (PathBuf, PathBuf) {
    let original = program_path("leaker").expect("the program was built");
    let (bare, debug) = (folder.join("leaker"), folder.join("debug/deep/leaker.dbg"));
    fs::create_dir_all(debug.parent().expect("has one")).expect("a folder can be made");
    for (flag, to) in [("--only-keep-debug", &debug), ("--strip-all", &bare)] {
        let status = Command::new("objcopy").arg(flag).arg(&original).arg(to).status().expect("objcopy starts");
        assert!(status.success());
    }
    (bare, debug)
}

fn symbolize(args: &[&Path]) -> (Option<i32>, String, String) {
    output_within(memleak_command().arg("symbolize").args(args))
}

// Names of another build would be wrong ones: none are better, and the reason must be said.
#[test]
fn debug_file_of_another_build_is_refused_and_said() {
    needs!(Feature::Bpf);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let (bare, debug) = stripped(folder.path());
    let status = Command::new("objcopy").arg(format!("--add-gnu-debuglink={}", debug.display())).arg(&bare).status();
    assert!(status.expect("objcopy starts").success());
    // Beside the program is where it is looked for.
    let beside = folder.path().join("leaker.dbg");
    let other = program_path("busy").expect("the program was built");
    for (file, name) in [(&other, None), (&debug, Some("lose_some"))] {
        fs::copy(file, &beside).expect("a debug file");
        let mut program = Program::start_command(&mut Command::new(&bare));
        let mut memleak = Memleak::watch(program.pid());
        program.step("done");
        let snapshot = memleak.settled();
        assert_eq!(snapshot.totals, Counts::kept(7, 67));
        assert_eq!(snapshot.sites[0].frames[0].function.as_deref(), name);
        let warning = format!("{} belongs to another build", beside.display());
        assert_eq!(memleak.stop().stderr.contains(&warning), name.is_none(), "{warning}");
    }
}

// Production has no symbols, the developer has: a report from there must become readable here.
#[test]
fn a_report_gets_names_from_a_debug_file() {
    needs!(Feature::Bpf);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let (bare, _) = stripped(folder.path());
    let debug = folder.path().join("debug");
    let mut program = Program::start_command(&mut Command::new(&bare));
    let mut memleak = Memleak::watch(program.pid());
    program.step("done");
    let snapshot = memleak.settled();
    assert_eq!(snapshot.totals, Counts::kept(7, 67));
    let frame = &snapshot.sites[0].frames[0];
    assert_eq!((&frame.function, &frame.file), (&None, &None));
    let made = memleak.folder().join("memleak-report.html");
    // The page is written at the end, and the folder goes with it.
    memleak.signal(libc::SIGUSR1);
    memleak.wait_for_message("report written to");
    let report = folder.path().join("report.html");
    fs::copy(&made, &report).expect("the report is there");
    let before = fs::read_to_string(&report).expect("text");
    assert!(!before.contains("lose_some") && !before.contains("leaker.c"));

    let out = folder.path().join("named.html");
    let (code, stdout, stderr) = symbolize(&[&report, Path::new("--debug-dir"), &debug, Path::new("-o"), &out]);
    assert_eq!(code, Some(0), "{stderr}");
    // lose_some() and main(), and _start() where the stack is unwound that far.
    assert!(stdout.starts_with("named 2 of ") || stdout.starts_with("named 3 of 3"), "{stdout}");
    let after = fs::read_to_string(&out).expect("text");
    assert_eq!(fs::read_to_string(&report).expect("text"), before, "the report itself is left alone");
    let data = after.split_once("id=\"data\">").expect("data").1.split_once("</script>").expect("data").0;
    let data: serde_json::Value = serde_json::from_str(data).expect("JSON");
    let stack = data["sites"][0]["stack"].as_array().expect("stack");
    let first = &data["frames"][stack[0].as_u64().expect("number") as usize];
    let text = |n: &serde_json::Value| data["strings"][n.as_u64().expect("known") as usize].as_str().expect("text");
    assert_eq!(text(&first[0]), "lose_some");
    assert!(text(&first[3]).ends_with("programs/leaker.c"), "{}", text(&first[3]));
    let source = include_str!("../programs/leaker.c");
    let line = source.lines().position(|l| l.contains("keep(malloc(67))")).expect("the line") as u64 + 1;
    assert_eq!(first[4], line);
    assert_eq!(data["sites"][0]["head"], 0);

    // A second time there is nothing left to do, which is said.
    let (code, _, stderr) = symbolize(&[&out, Path::new("--debug-dir"), &debug]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("failed to symbolize"), "{stderr}");
}

// The same with the lines of `--json`, which people keep in their logs.
#[test]
fn json_lines_get_names_from_a_debug_file() {
    needs!(Feature::Bpf);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let (bare, _) = stripped(folder.path());
    let mut program = Program::start_command(&mut Command::new(&bare));
    let pid = program.pid().to_string();
    let log = folder.path().join("log.ndjson");
    let mut command = memleak_command();
    command.args(["-p", &pid, "--json", "--duration", "5s", "--set", "report.path=", "--set", "alerts.file="]);
    let mut child = command.stdout(fs::File::create(&log).expect("file")).spawn().expect("starts");
    // With the first line everything is attached.
    let deadline = Instant::now() + Duration::from_secs(30);
    while !fs::read_to_string(&log).expect("text").contains("\"snapshot\"") {
        assert!(Instant::now() < deadline, "no snapshot");
        std::thread::sleep(Duration::from_millis(20));
    }
    program.step("done");
    assert!(child.wait().expect("ends").success());
    let (code, _, stderr) = symbolize(&[&log, Path::new("--debug-dir"), &folder.path().join("debug")]);
    assert_eq!(code, Some(0), "{stderr}");
    let lines = fs::read_to_string(&log).expect("text");
    let last: serde_json::Value = serde_json::from_str(lines.lines().last().expect("lines")).expect("JSON");
    assert_eq!(last["sites"][0]["frames"][0]["function"], "lose_some");
    assert_eq!(last["sites"][0]["allocated_count"], 7);
}

// Whatever is given instead of a report is refused with the reason, and stays as it was.
#[test]
fn what_is_no_report_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let dirs = folder.path().join("debug");
    fs::create_dir(&dirs).expect("folder");
    let data = |json: &str| format!("<html><script type=\"application/json\" id=\"data\">{json}</script>");
    let id = "ab".repeat(20);
    let frame =
        |address: i64| format!("{{\"strings\":[\"{id}\"],\"frames\":[[-1,-1,-1,-1,-1,0,-1,0,{address}]],\"sites\":[");
    let cases: Vec<(&str, Vec<u8>, String)> = vec![
        ("empty", Vec::new(), "it is no HTML report of memleak and has no lines of its JSON".to_owned()),
        ("page", b"<html><p>hello".to_vec(), "it is no HTML report of memleak".to_owned()),
        ("binary", vec![0xff, 0xfe, 0], "it is not text".to_owned()),
        ("cut", data("{\"strings\":[").replace("</script>", "").into_bytes(), "it was cut short".to_owned()),
        ("broken", data("{\"strings\":[}").into_bytes(), "its data is malformed".to_owned()),
        (
            "older",
            data("{\"strings\":[],\"frames\":[[0,0,0,0,0,0,0]],\"sites\":[]}").into_bytes(),
            "another version".to_owned(),
        ),
        ("outside", data(&format!("{}{{\"stack\":[7]}}]}}", frame(16))).into_bytes(), "another version".to_owned()),
        ("named", data("{\"strings\":[],\"frames\":[],\"sites\":[]}").into_bytes(), "is named already".to_owned()),
        (
            "unknown",
            data(&format!("{}{{\"stack\":[0]}}]}}", frame(16))).into_bytes(),
            format!("needs one with build id {id}"),
        ),
        ("line", b"{\"type\":\"snapshot\",\"sites\":[]}\nnonsense\n".to_vec(), "line 2 is no line of".to_owned()),
    ];
    for (name, contents, expected) in cases {
        let path = folder.path().join(name);
        fs::write(&path, &contents).expect("write");
        let (code, stdout, stderr) = symbolize(&[&path, Path::new("--debug-dir"), &dirs]);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{name}: {stderr}");
        assert!(stderr.contains("failed to symbolize") && stderr.contains(&expected), "{name}: {stderr}");
        assert_eq!(fs::read(&path).expect("read"), contents, "{name}");
    }
    let missing = folder.path().join("missing");
    let (code, _, stderr) = symbolize(&[&missing, Path::new("--debug-dir"), &dirs]);
    assert!(code == Some(2) && stderr.contains("failed to read"), "{stderr}");
    let (code, _, stderr) = symbolize(&[&missing, Path::new("--debug-dir"), &missing]);
    assert!(code == Some(2) && stderr.contains("failed to read the folder"), "{stderr}");
}

// Alerts are followed over restarts by their id: randomised addresses and other names of the file must not change it.
#[test]
fn a_site_keeps_its_id_over_restarts_without_symbols() {
    needs!(Feature::Bpf);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let (bare, _) = stripped(folder.path());
    let mut seen = Vec::new();
    for _ in 0..3 {
        let mut program = Program::start_command(&mut Command::new(&bare));
        let args = ["--set", "rules.threshold.max_bytes=1B", "--set", "alerts.hold=0s"];
        let mut memleak = Memleak::watch_with(program.pid(), &args);
        program.step("done");
        let site = memleak.settled().sites[0].clone();
        assert_eq!(site.counts, Counts::kept(7, 67));
        let outcome = memleak.stop();
        let findings: Vec<String> = outcome.alerts().map(|a| a["id"].to_string()).collect();
        assert!(!findings.is_empty(), "{}", outcome.stderr);
        seen.push(((site.id, findings[0].clone()), site.frames[0].address));
        program.finish();
    }
    assert!(seen.iter().all(|(ids, _)| *ids == seen[0].0), "{seen:?}");
    assert!(seen.iter().any(|(_, address)| *address != seen[0].1), "addresses are randomised: {seen:?}");
}
