//! Recordings of live runs: what is replayed and reported is what was seen, whatever happened to the run or the disk.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use memleak_tests::{Feature, Memleak, Outcome, Program, memleak_command, needs, output_within, program_path};
use serde_json::{Value, json};

use crate::import::{Folder, fixture};

/// Settings under which a leak is found within seconds.
const QUICK: [&str; 10] = [
    "--set",
    "rules.growth.min_time=2s",
    "--set",
    "rules.growth.min_snapshots=10",
    "--set",
    "rules.growth.min_bytes=8KiB",
    "--set",
    "alerts.hold=200ms",
    "--set",
    "reachability.automatic=false",
];

/// A program with one shape of heap; killed when dropped.
struct Shape(std::process::Child);

impl Shape {
    fn start(shape: &str) -> Shape {
        let path = program_path("heap_shapes").expect("the program was built");
        let mut command = Command::new(path);
        Shape(command.arg(shape).stdout(std::process::Stdio::null()).spawn().expect("it starts"))
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Shape {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a Python script with arguments; its output as JSON.
fn python(script: &str, args: &[&Path]) -> Value {
    let (code, stdout, stderr) = output_within(Command::new("python3").args(["-c", script]).args(args));
    assert_eq!(code, Some(0), "{stderr}");
    serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{e}: {stdout}"))
}

/// What rules said during the run, as the recording has it. Its format is documented: anybody can read it.
fn live_findings(recording: &Path) -> Value {
    python(
        "import sqlite3, json, sys\n\
         db = sqlite3.connect(sys.argv[1])\n\
         last = db.execute('SELECT max(number) FROM snapshots').fetchone()[0]\n\
         rows = db.execute('SELECT finding, rule, severity, confidence, reason, first_snapshot, \
         coalesce(last_snapshot, ?), last_snapshot IS NULL FROM findings ORDER BY finding, first_snapshot', (last,))\n\
         print(json.dumps([list(r) for r in rows]))",
        &[recording],
    )
}

/// Texts of the events of a kind.
fn events(recording: &Path, kind: &str) -> Vec<String> {
    let script = "import sqlite3, json, sys\n\
                  rows = sqlite3.connect(sys.argv[1]).execute('SELECT text FROM events WHERE kind = ?', (sys.argv[2],))\n\
                  print(json.dumps([r[0] for r in rows]))";
    serde_json::from_value(python(script, &[recording, Path::new(kind)])).expect("texts")
}

/// The same of a replay.
fn replayed_findings(folder: &Path, args: &[&str]) -> (Option<i32>, Value) {
    let (code, stdout, stderr) = output_within(memleak_command().current_dir(folder).arg("replay").args(args));
    let replay: Value = serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{e}: {stdout}\n{stderr}"));
    let mut rows: Vec<Value> = (replay["findings"].as_array().expect("findings").iter())
        .map(|f| {
            let keys =
                ["id", "rule", "severity", "confidence", "reason", "first_snapshot", "last_snapshot", "standing"];
            let value = |k: &&str| if *k == "standing" { json!(i32::from(f[*k] == true)) } else { f[*k].clone() };
            keys.iter().map(value).collect()
        })
        .collect();
    rows.sort_by_key(|r| (r[0].as_str().map(str::to_owned), r[5].as_u64()));
    (code, rows.into())
}

/// Findings without confidence and reason of those that stand.
fn without_last_words(mut findings: Value) -> Value {
    for finding in findings.as_array_mut().expect("findings") {
        let finding = finding.as_array_mut().expect("a row");
        if finding[7] == 1 {
            (finding[3], finding[4]) = (Value::Null, Value::Null);
        }
    }
    findings
}

/// A recorded run of a leaking and a quiet program: the folder of the run, their pids, and what was said live.
fn recorded_run() -> (tempfile::TempDir, [Shape; 2], Outcome) {
    let shapes = [Shape::start("leak"), Shape::start("sawtooth")];
    let folder = tempfile::tempdir().expect("a folder can be made");
    let pids = format!("{},{}", shapes[0].pid(), shapes[1].pid());
    let mut command = memleak_command();
    command.current_dir(folder.path()).args(["-p", &pids, "--json", "--interval", "200ms", "--duration", "8s"]);
    command.args(QUICK).args(["--record", "run.memleak"]);
    let outcome = Memleak::spawn(&mut command, tempfile::tempdir().expect("a folder can be made")).outcome();
    (folder, shapes, outcome)
}

/// Copies a recording that is being written, with what is beside it and belongs to it.
fn copy_recording(from: &Path, to: &Path) {
    for suffix in ["", "-wal"] {
        let name = |p: &Path| PathBuf::from(format!("{}{suffix}", p.display()));
        fs::copy(name(from), name(to)).expect("copied");
    }
}

/// The data of a page.
fn data(page: &Path) -> Value {
    let html = fs::read_to_string(page).expect("the page can be read");
    let (_, rest) = html.split_once("id=\"data\"").expect("data in the page");
    let (_, rest) = rest.split_once('>').expect("the end of the tag");
    serde_json::from_str(rest.split_once("</script>").expect("its end").0).expect("JSON")
}

/// Everything that a page says, as text.
fn functions(page: &Value) -> String {
    page.to_string()
}

// The promise of a recording: rules say the same as they did live, to the last digit and at the same snapshots, and the
// report is the same page, made by somebody without privileges.
#[test]
fn replay_and_report_of_a_run_are_what_was_seen_live() {
    needs!(Feature::Bpf, Feature::Command("python3"));
    let (folder, shapes, outcome) = recorded_run();
    let path = folder.path().join("run.memleak");
    assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
    assert_eq!(fs::metadata(&path).expect("the recording").permissions().mode() & 0o777, 0o600);
    assert!(!folder.path().join("run.memleak-wal").exists(), "it ended in order: one file");
    let live = live_findings(&path);
    assert!(live.as_array().is_some_and(|f| !f.is_empty()), "{live}");
    let (code, replayed) = replayed_findings(folder.path(), &["run.memleak", "--json"]);
    assert_eq!((code, &replayed), (Some(1), &live), "live, then replayed");
    let fired: Vec<_> = outcome.alerts().map(|a| a["id"].clone()).collect();
    assert!(fired.iter().all(|id| live.as_array().is_some_and(|f| f.iter().any(|f| f[0] == *id))), "{fired:?}");

    // As nobody: no privileges, and no way to look at processes.
    let nobody = tempfile::tempdir().expect("a folder can be made");
    fs::set_permissions(nobody.path(), fs::Permissions::from_mode(0o777)).expect("permissions");
    let copy = nobody.path().join("run.memleak");
    fs::copy(&path, &copy).expect("copied");
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o644)).expect("permissions");
    let program = nobody.path().join("memleak");
    fs::copy(memleak_command().get_program(), &program).expect("copied");
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
    command.current_dir(nobody.path()).args(["report", "run.memleak", "-o", "again.html"]);
    let (code, stdout, stderr) = output_within(&mut command);
    assert_eq!((code, stdout.as_str()), (Some(0), "report written to again.html\n"), "{stderr}");
    let (mut page, mut again) =
        (data(&folder.path().join("memleak-report.html")), data(&nobody.path().join("again.html")));
    // What the collector says of itself goes on until the page is written.
    for page in [&mut page, &mut again] {
        page.as_object_mut().expect("an object").retain(|key, _| key != "collector");
    }
    assert_eq!(page, again);

    // A part of it.
    let part = |args: &[&str]| {
        let args = [&["report", "run.memleak", "-o", "part.html"], args].concat();
        let (code, _, stderr) = output_within(memleak_command().current_dir(folder.path()).args(args));
        assert_eq!(code, Some(0), "{stderr}");
        data(&folder.path().join("part.html"))
    };
    let all = functions(&part(&[]));
    assert!(all.contains("leak_steadily") && all.contains("fill_buffer"), "{all}");
    let leak = functions(&part(&["--pid", &shapes[0].pid()]));
    assert!(leak.contains("leak_steadily") && !leak.contains("fill_buffer"), "{leak}");
    assert!(functions(&part(&["--probe-set", "glibc"])).contains("leak_steadily"));
    let seconds = |page: &Value| {
        let times = page["times"].as_array().or(page["totals"]["times"].as_array());
        times.map(|t| (t.first().and_then(Value::as_f64), t.last().and_then(Value::as_f64)))
    };
    if let Some((first, last)) = seconds(&part(&["--since", "2s", "--until", "5s"])) {
        assert!(first.is_some_and(|t| t >= 2.0) && last.is_some_and(|t| t <= 5.0), "{first:?} to {last:?}");
    }
    let refused = |args: &[&str], why: &str| {
        let args = [&["report", "run.memleak", "-o", "none.html"], args].concat();
        let (code, _, stderr) = output_within(memleak_command().current_dir(folder.path()).args(args));
        assert!(code == Some(2) && stderr.contains(why), "{stderr}");
        assert!(!folder.path().join("none.html").exists());
    };
    refused(&["--pid", "1"], "there is no process 1 in run.memleak; there are: ");
    refused(&["--probe-set", "glbic"], "there is no site of the probe set glbic in run.memleak; there are: glibc");
    refused(&["--since", "1h"], "nothing of run.memleak is in that part");
}

// People tune rules by what changes: a finding that vanishes, one that appears, one that comes later, and how that
// compares with what they know.
#[test]
fn rules_can_be_tuned_on_a_recording() {
    needs!(Feature::Bpf, Feature::Command("python3"));
    let (folder, _shapes, _) = recorded_run();
    let run = |args: &[&str]| {
        let args = [&["replay", "run.memleak"], args].concat();
        output_within(memleak_command().current_dir(folder.path()).args(args))
    };
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("written");
    let (_, text, _) = run(&[]);
    assert!(text.contains("growth: ") && text.contains("the first after ") && text.contains("leak_steadily"), "{text}");
    assert!(text.contains("threshold: no finding"), "{text}");
    // The same rules twice: nothing changes.
    fs::create_dir(folder.path().join("same")).expect("a folder");
    let (code, text, stderr) = run(&["--compare", "same"]);
    assert_eq!(code, Some(0), "{text}{stderr}");
    assert!(text.contains("0 findings appear, 0 vanish, 0 move"), "{text}");
    // Later.
    let (code, text, stderr) = run(&["--compare-set", "rules.growth.min_time=4s", "--json"]);
    assert_eq!(code, Some(1), "{stderr}");
    let diff: Value = serde_json::from_str(&text).expect("JSON");
    let moved = diff["moved"].as_array().expect("moved findings");
    let moved = moved.iter().find(|m| m["place"] == "leak_steadily").unwrap_or_else(|| panic!("{diff}"));
    assert_eq!(moved["rule"], "growth", "{diff}");
    assert!(moved["second"]["first_s"].as_f64() > moved["first"]["first_s"].as_f64().map(|t| t + 1.0), "{diff}");
    // Another folder of rules: one is replaced by one that says nothing, one is new.
    fs::create_dir(folder.path().join("other")).expect("a folder");
    let rule = |name: &str, says: &str| {
        format!("return {{ name = '{name}', description = 'x', evaluate = function(site) {says} end }}")
    };
    write(
        "other/growth.lua",
        &rule("growth", "return nil")
            .replace("description", "params = { min_time = '1s', min_snapshots = 1, min_bytes = '1B' }, description"),
    );
    write(
        "other/big.lua",
        &rule(
            "big",
            "if site.outstanding_bytes > 50000 then return { severity = 'warning', confidence = 1, reason = 'big' } end",
        ),
    );
    let (code, text, stderr) = run(&["--compare", "other"]);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(text.contains("vanishes growth leak_steadily (pid "), "{text}");
    assert!(text.contains("appears big leak_steadily (pid "), "{text}");
    // What is known of the sites.
    write("labels", "# by hand\nleak function:^leak_steadily$\nquiet function:^fill_buffer$\nquiet function:^work$\n");
    let (_, text, stderr) = run(&["--labels", "labels", "--json"]);
    let replay: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {stderr}"));
    let score = |replay: &Value, key: &str, rule: Value| {
        replay[key].as_array().expect("scores").iter().find(|s| s["rule"] == rule).expect("the rule").clone()
    };
    let growth = score(&replay, "scores", "growth".into());
    assert_eq!((&growth["found"], &growth["recall"]), (&1.into(), &1.0.into()), "{growth}");
    // With settings this quick a buffer that fills for seconds looks like a leak: that is what the labels are for.
    assert_eq!((&growth["precision"], &growth["false_alarms"]), (&0.5.into(), &json!(["fill_buffer"])), "{growth}");
    assert!(growth["median_delay_s"].as_f64().is_some_and(|s| (1.0..8.0).contains(&s)), "{growth}");
    let (_, text, _) = run(&["--labels", "labels", "--compare", "other"]);
    assert!(text.contains("first, growth: precision 50 %, recall 100 %"), "{text}");
    assert!(text.contains("second, growth: precision -, recall 0 %; missed: leak_steadily"), "{text}");
    assert!(text.contains("second, big: precision 50 %") && text.contains("false alarms: fill_buffer"), "{text}");
    for (labels, why) in [
        ("leak leak_steadily\n", "labels:1: \"leak_steadily\" is no pattern for code"),
        ("fine function:x\n", "labels:1: \"fine\" is no label"),
        ("# nothing\n", "there is no label in it"),
    ] {
        write("labels", labels);
        let (code, _, stderr) = run(&["--labels", "labels"]);
        assert!(code == Some(2) && stderr.contains(why), "{stderr}");
    }
}

// What scans of memory have said is part of the run: rules that rest on it say the same again.
#[test]
fn verdicts_of_scans_are_replayed() {
    needs!(Feature::Bpf, Feature::Command("python3"));
    let mut program = Program::start("shapes");
    let mut memleak =
        Memleak::watch_with(program.pid(), &["--record", "run.memleak", "--set", "reachability.automatic=false"]);
    program.step("done");
    std::thread::sleep(Duration::from_millis(1500));
    memleak.signal(libc::SIGUSR2);
    let scanned = |s: &memleak_tests::Snapshot| s.sites.iter().any(|site| site.reachability.is_some());
    memleak.wait_until("a scan", scanned);
    memleak.settled();
    let folder = tempfile::tempdir().expect("a folder");
    copy_recording(&memleak.folder().join("run.memleak"), &folder.path().join("run.memleak"));
    assert!(memleak.stop().code.is_some());
    let live = live_findings(&folder.path().join("run.memleak"));
    let lost = |f: &&Value| f[1] == "definitely_lost";
    assert!(live.as_array().expect("findings").iter().filter(lost).count() >= 3, "{live}");
    let (_, replayed) = replayed_findings(folder.path(), &["run.memleak", "--json"]);
    // The last words about what stands are written at the end of a run, which this copy has not seen.
    assert_eq!(without_last_words(replayed), without_last_words(live));
    assert!(!events(&folder.path().join("run.memleak"), "scan").is_empty());
}

// kill -9 of the whole collector: what was stored until then is there, and is the same in a read-only copy and without
// the file beside it as far as that goes.
#[test]
fn a_killed_run_can_be_reported() {
    needs!(Feature::Bpf, Feature::MountNamespace);
    let shape = Shape::start("leak");
    let folder = tempfile::tempdir().expect("a folder can be made");
    fs::write(folder.path().join("memleak.toml"), "[recording]\npath = \"run.memleak\"\n").expect("settings");
    let mut command = memleak_command();
    command.current_dir(folder.path()).args(["--config", "memleak.toml", "-p", &shape.pid(), "--json"]);
    command.args(["--interval", "200ms"]).args(QUICK);
    let mut memleak = Memleak::spawn(&mut command, tempfile::tempdir().expect("a folder can be made"));
    let seen = memleak.wait_until("twenty snapshots", |s| s.number >= 20).number;
    memleak.signal(libc::SIGKILL);
    drop(memleak);
    assert!(folder.path().join("run.memleak-wal").exists());
    let count = |stdout: &str| {
        let replay: Value = serde_json::from_str(stdout).unwrap_or_else(|e| panic!("{e}: {stdout}"));
        replay["snapshots"].as_u64().expect("a number")
    };
    // A folder that nothing can be written into, not even by root, without what the writer had in memory.
    let (readonly, plain) = (folder.path().join("readonly"), tempfile::tempdir().expect("a folder"));
    fs::create_dir(&readonly).expect("a folder");
    let script = format!(
        "mount -t tmpfs none {0} && cp run.memleak run.memleak-wal {0} && mount -o remount,ro {0} && exec \"$@\"",
        readonly.display()
    );
    let mut command = Command::new("unshare");
    command.current_dir(folder.path()).args(["--mount", "sh", "-c", &script, "sh"]);
    command.arg(memleak_command().get_program()).args(["replay", "readonly/run.memleak", "--json"]);
    let (code, stdout, stderr) = output_within(&mut command);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(count(&stdout) >= seen, "{} of {seen}", count(&stdout));
    // Alone it is what had been moved into it by then.
    fs::copy(folder.path().join("run.memleak"), plain.path().join("run.memleak")).expect("copied");
    let (code, _, stderr) =
        output_within(memleak_command().current_dir(plain.path()).args(["replay", "run.memleak", "--json"]));
    assert!(code.is_some_and(|c| c < 2), "{stderr}");
    assert!(stderr.contains("was broken off, and there is no -wal file beside it"), "{stderr}");
    assert_eq!(fs::read_dir(plain.path()).expect("a folder").count(), 1, "reading makes no files");
    // Together.
    let (code, stdout, stderr) =
        output_within(memleak_command().current_dir(folder.path()).args(["replay", "run.memleak", "--json"]));
    assert_eq!((code, stderr.as_str()), (Some(1), ""));
    assert!(count(&stdout) >= seen);
    let (code, _, stderr) =
        output_within(memleak_command().current_dir(folder.path()).args(["report", "run.memleak", "-o", "r.html"]));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(functions(&data(&folder.path().join("r.html"))).contains("leak_steadily"));
}

// A full disk ends nothing: the run goes on, the gap is in the recording, and is told then and later.
#[test]
fn a_full_disk_leaves_a_gap_and_nothing_else() {
    needs!(Feature::Bpf, Feature::MountNamespace, Feature::Command("python3"));
    let shape = Shape::start("leak");
    let folder = tempfile::tempdir().expect("a folder can be made");
    let small = folder.path().join("small");
    fs::create_dir(&small).expect("a folder");
    let script = format!("mount -t tmpfs -o size=3m none {} && exec \"$@\"", small.display());
    let mut command = Command::new("unshare");
    command.current_dir(folder.path()).args(["--mount", "sh", "-c", &script, "sh"]);
    command.arg(memleak_command().get_program()).args(["-p", &shape.pid(), "--json", "--interval", "200ms"]);
    command.args(QUICK).args(["--record", "small/run.memleak"]);
    let mut memleak = Memleak::spawn(&mut command, tempfile::tempdir().expect("a folder can be made"));
    memleak.wait_until("some snapshots", |s| s.number >= 5);
    // The file system is that of the namespace, which the process leads to.
    let inside = PathBuf::from(format!("/proc/{}/root{}", memleak.pid(), small.display()));
    let mut filler = fs::File::create(inside.join("filler")).expect("a file");
    let block = [7_u8; 4096];
    while filler.write_all(&block).is_ok() {}
    memleak.wait_for_message("recording pauses, everything else goes on");
    assert!(memleak.stderr().contains("the disk is full"), "{}", memleak.stderr());
    let before = memleak.settled().number;
    let after = memleak.settled().number;
    assert!(after > before, "collection goes on");
    // Its space is free once nobody has it open either.
    drop(filler);
    fs::remove_file(inside.join("filler")).expect("removed");
    memleak.wait_for_message("recording goes on; ");
    memleak.settled();
    let recording = folder.path().join("run.memleak");
    copy_recording(&inside.join("run.memleak"), &recording);
    let gaps = events(&recording, "gap");
    assert!(gaps.len() == 1 && gaps[0].contains("missing: ") && gaps[0].contains("the disk is full"), "{gaps:?}");
    let (code, stdout, stderr) =
        output_within(memleak_command().current_dir(folder.path()).args(["replay", "run.memleak", "--json"]));
    assert!(code.is_some_and(|c| c < 2), "{stderr}");
    assert!(stderr.contains("snapshots over ") && stderr.contains("are missing"), "told again: {stderr}");
    let snapshots = serde_json::from_str::<Value>(&stdout).expect("JSON")["snapshots"].as_u64();
    assert!(snapshots.is_some_and(|n| n >= 5), "{stdout}");
    let args = ["report", "run.memleak", "-o", "gap.html"];
    let (code, _, stderr) = output_within(memleak_command().current_dir(folder.path()).args(args));
    assert_eq!(code, Some(0), "{stderr}");
    let page = fs::read_to_string(folder.path().join("gap.html")).expect("the page");
    assert!(page.contains("The recording has a gap at ") && page.contains("the disk is full"), "told on the page");
    assert!(memleak.stop().code.is_some_and(|c| c < 2));
}

// Whatever is in the way of a recording is refused before anything is watched, and stays as it is.
#[test]
fn a_recording_that_cannot_be_made_is_refused() {
    needs!(Feature::Bpf, Feature::MountNamespace);
    let shape = Shape::start("leak");
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = |name: &str| folder.path().join(name);
    fs::write(at("precious"), "precious").expect("a file");
    symlink(at("precious"), at("link")).expect("a link");
    symlink(at("nowhere"), at("dangling")).expect("a link");
    let pid = shape.pid();
    for (path, why) in [
        ("precious", "the file exists"),
        ("link", "symbolic link"),
        ("dangling", "symbolic link"),
        (".", "folder"),
        ("no/such/run.memleak", "no/such"),
    ] {
        let args = ["-p", &pid, "--duration", "10m", "--record", path];
        let (code, _, stderr) = output_within(memleak_command().current_dir(folder.path()).args(args));
        assert!(code == Some(2) && stderr.contains(why), "{path}: {stderr}");
    }
    assert_eq!(fs::read_to_string(at("precious")).expect("a file"), "precious");
    assert!(!at("nowhere").exists());
    fs::create_dir(at("readonly")).expect("a folder");
    let script = format!("mount -t tmpfs -o ro none {} && exec \"$@\"", at("readonly").display());
    let mut command = Command::new("unshare");
    command.current_dir(folder.path()).args(["--mount", "sh", "-c", &script, "sh"]);
    command.arg(memleak_command().get_program()).args(["-p", &pid, "--duration", "10m"]);
    let (code, _, stderr) = output_within(command.args(["--record", "readonly/run.memleak"]));
    assert!(code == Some(2) && stderr.contains("readonly"), "{stderr}");
    // One that another run is writing.
    let memleak = Memleak::watch_with(shape.0.id(), &["--record", "busy.memleak"]);
    let args = ["-p", &pid, "--duration", "10m", "--record", "busy.memleak"];
    let (code, _, stderr) = output_within(memleak_command().current_dir(memleak.folder()).args(args));
    assert!(code == Some(2) && stderr.contains("another memleak is writing it"), "{stderr}");
    assert_eq!(memleak.stop().code, Some(0));
}

// Files from anywhere: each is refused by name, with what is wrong, by everything that reads recordings.
#[test]
fn what_is_no_sound_recording_is_refused_by_every_command() {
    needs!(Feature::Command("python3"));
    let folder = Folder::new();
    folder.import(&fixture("libbpf-user.txt"), "good", &[]);
    let good = fs::read(folder.path("good")).expect("a recording");
    let file = |name: &str, bytes: &[u8]| fs::write(folder.path(name), bytes).expect("a file");
    file("text", &b"hello, world\n".repeat(1000));
    file("empty", b"");
    file("short", &good[..good.len() / 2]);
    let newer = "import sqlite3, sys\nsqlite3.connect(sys.argv[1]).execute('PRAGMA user_version = 99')\nprint('0')";
    file("newer", &good);
    python(newer, &[&folder.path("newer")]);
    let changed = "import sqlite3, sys\ndb = sqlite3.connect(sys.argv[1])\n\
                   db.execute(\"UPDATE processes SET comm = 'else'\")\ndb.commit()\nprint('0')";
    file("changed", &good);
    python(changed, &[&folder.path("changed")]);
    for (name, why) in [
        ("text", "it is not a recording"),
        ("empty", "it is empty"),
        ("short", "damaged"),
        ("newer", "was written by a newer memleak (format 99;"),
        ("changed", "not what it was when its run ended"),
        ("missing", "No such file"),
        (".", "it is a folder"),
    ] {
        for args in [
            vec!["report", name, "-o", "out.html"],
            vec!["replay", name],
            vec!["export", name, "--format", "csv"],
            vec!["diff", name, "good"],
            vec!["diff", "good", name],
        ] {
            let (code, _, stderr) = folder.run(&args);
            assert_eq!(code, Some(2), "{args:?}: {stderr}");
            assert!(stderr.contains(why) && !stderr.contains("panicked"), "{args:?}: {stderr}");
        }
        assert!(!folder.path("out.html").exists());
    }
    // A report goes over a file that is there, but not through a link to another one.
    file("precious", b"precious");
    symlink(folder.path("precious"), folder.path("link.html")).expect("a link");
    let (code, _, stderr) = folder.run(&["report", "good", "-o", "link.html"]);
    assert!(code.is_some(), "{stderr}");
    assert_eq!(fs::read_to_string(folder.path("precious")).expect("a file"), "precious");
}

// On a terminal a bar shows how far it is; elsewhere there is none.
#[test]
fn a_report_shows_its_progress_on_a_terminal_only() {
    needs!(Feature::Command("python3"));
    let folder = Folder::new();
    folder.import(&fixture("libbpf-user.txt"), "good", &[]);
    let script = "import pty, os, sys, json\n\
                  out = []\n\
                  def read(fd):\n    data = os.read(fd, 4096)\n    out.append(data)\n    return b''\n\
                  os.chdir(sys.argv[2])\n\
                  sys.stdout.flush()\n\
                  pid, fd = pty.fork()\n\
                  if pid == 0:\n    os.execv(sys.argv[1], [sys.argv[1], 'report', 'good', '-o', 'r.html'])\n\
                  while True:\n    \
                      try:\n        data = os.read(fd, 4096)\n    \
                      except OSError:\n        break\n    \
                      if not data:\n        break\n    out.append(data)\n\
                  os.waitpid(pid, 0)\n\
                  print(json.dumps(b''.join(out).decode(errors='replace')))";
    let said = python(script, &[Path::new(memleak_command().get_program()), &folder.path("")]);
    let said = said.as_str().expect("text");
    assert!(said.contains("reading") && said.contains("/6") && said.contains("report written to r.html"), "{said:?}");
    let (stdout, stderr) = folder.succeed(&["report", "good", "-o", "r.html"]);
    assert_eq!((stdout.as_str(), stderr.as_str()), ("report written to r.html\n", ""));
    let begun = Instant::now();
    folder.succeed(&["replay", "good"]);
    assert!(begun.elapsed() < Duration::from_secs(30));
}

// The kernel's own allocations, live: sites with their caches and what rules said of them come back, the page too.
#[test]
fn a_run_of_the_kernel_is_replayed_as_it_was() {
    needs!(Feature::Bpf, Feature::Command("python3"));
    let mut program = Program::start("eventfds");
    let pid = program.pid().to_string();
    let args = ["-p", &pid, "--probe-set", "kernel-slab", "--record", "run.memleak"];
    let rule = ["--set", "rules.threshold.max_count=200", "--set", "alerts.hold=200ms"];
    let mut memleak = Memleak::kernel(&[&args[..], &rule].concat());
    program.step("done");
    let contexts = |s: &memleak_tests::SiteView| s.caller() == Some("do_eventfd") && s.function == "kmalloc";
    memleak.wait_until("the event counters", |s| s.sum(contexts).outstanding_count == 211);
    let settled = memleak.settled();
    let folder = Folder::new();
    let recording = folder.path("run.memleak");
    copy_recording(&memleak.folder().join("run.memleak"), &recording);
    assert_eq!(memleak.stop().code, Some(1), "an alert was raised");

    let export: Value = folder.snapshot("run.memleak", "end");
    assert!(export["number"].as_u64() >= Some(settled.number), "the copy goes so far");
    let recorded: Vec<&Value> = (export["sites"].as_array().expect("sites").iter())
        .filter(|s| s["function"] == "kmalloc" && s["frames"][0]["function"] == "do_eventfd")
        .collect();
    let sum = |key: &str| recorded.iter().filter_map(|s| s[key].as_u64()).sum::<u64>();
    assert_eq!((sum("outstanding_count"), sum("freed_count")), (211, 307), "{recorded:#?}");
    for site in &recorded {
        assert_eq!((&site["kernel"]["first_comm"], &site["pid"]), (&"eventfds".into(), &0.into()), "{site}");
        assert_eq!(site["first_thread"], json!({ "tid": program.pid(), "name": "eventfds" }), "{site}");
        assert!(site["kernel"]["cache"].as_str().is_some_and(|c| c.starts_with("kmalloc-")), "{site}");
    }
    assert!(export["kernel"]["caches"].as_array().is_some_and(|c| !c.is_empty()), "the kernel's own books");

    let live = live_findings(&recording);
    assert!(live.as_array().is_some_and(|f| f.iter().any(|f| f[1] == "threshold")), "{live}");
    let (code, replayed) = replayed_findings(&folder.path("."), &["run.memleak", "--json"]);
    // The last words about what stands are written at the end of a run, which this copy has not seen.
    assert_eq!((code, without_last_words(replayed)), (Some(1), without_last_words(live)));
    folder.succeed(&["report", "run.memleak", "-o", "kernel.html"]);
    assert!(functions(&data(&folder.path("kernel.html"))).contains("do_eventfd"));
}

// The thread that allocated at a site first is known, by its id and by the name that it gave itself.
#[test]
fn the_first_thread_of_a_site_is_recorded_and_exported() {
    needs!(Feature::Bpf, Feature::Command("go"));
    let mut program = Program::start("cross_thread");
    let mut memleak = Memleak::watch_with(program.pid(), &["--record", "run.memleak"]);
    program.step("done");
    memleak.settled();
    let folder = Folder::new();
    copy_recording(&memleak.folder().join("run.memleak"), &folder.path("run.memleak"));
    let snapshot = folder.snapshot("run.memleak", "end");
    let threads = |function: &str| -> Vec<Value> {
        let sites = snapshot["sites"].as_array().expect("sites").iter();
        let calls = |s: &&Value| s["frames"].as_array().is_some_and(|f| f.iter().any(|f| f["function"] == *function));
        sites.filter(calls).map(|s| s["first_thread"].clone()).collect()
    };
    let (producer, main) = (threads("produce"), threads("work"));
    assert!(!producer.is_empty() && !main.is_empty(), "{snapshot}");
    for thread in producer {
        assert!(thread["name"] == "producer" && thread["tid"].as_u64() > Some(program.pid().into()), "{thread}");
    }
    assert!(main.contains(&json!({ "tid": program.pid(), "name": "cross_thread" })), "{main:?}");
    folder.succeed(&["export", "run.memleak", "--format", "pprof", "-o", "run.pb.gz"]);
    let mut command = Command::new("go");
    command.current_dir(folder.path(".")).args(["tool", "pprof", "-symbolize=none", "-tags", "run.pb.gz"]);
    command.env("HOME", folder.path(".")).env("GOFLAGS", "-mod=mod").env("GOPROXY", "off");
    let (code, tags, stderr) = output_within(&mut command);
    assert_eq!(code, Some(0), "{stderr}");
    for tag in ["first_thread: ", "producer", "first_tid: "] {
        assert!(tags.contains(tag), "{tag} is missing in\n{tags}");
    }
}

// What was recorded of the kernel has no process behind it: every command takes it all the same.
#[test]
fn kernel_recordings_are_taken_by_every_command() {
    let folder = Folder::new();
    folder.import(&fixture("libbpf-kernel.txt"), "kernel", &[]);
    folder.succeed(&["report", "kernel", "-o", "kernel.html"]);
    let page = functions(&data(&folder.path("kernel.html")));
    let csv = folder.succeed(&["export", "kernel", "--format", "csv"]).0;
    assert!(csv.lines().count() > 2 && csv.contains("kernel"), "{csv}");
    let name = folder.snapshot("kernel", "end")["sites"][0]["frames"][0]["function"].clone();
    assert!(name.as_str().is_some_and(|name| page.contains(name)), "{name} in the page");
    for format in ["pprof", "folded", "speedscope", "json"] {
        folder.succeed(&["export", "kernel", "--format", format, "-o", "out"]);
        fs::remove_file(folder.path("out")).expect("written");
    }
    let (code, stdout, stderr) = folder.run(&["replay", "kernel", "--json"]);
    assert!(code.is_some_and(|c| c < 2) && stderr.is_empty(), "{stderr}");
    let replay: Value = serde_json::from_str(&stdout).expect("JSON");
    assert!(replay["snapshots"].as_u64().is_some_and(|n| n > 0), "{replay}");
    let (code, ..) = folder.run(&["diff", "kernel", "kernel"]);
    assert_eq!(code, Some(0));
}
