//! Logs of bcc's memleak become recordings: the numbers and names of the log, damage that is counted, bounded memory.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use memleak_tests::{memleak_command, output_within};
use serde_json::Value;
use tempfile::TempDir;

/// A log among the fixtures.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/bcc-memleak").join(name)
}

/// A folder with recordings in it.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Folder {
        Folder(tempfile::tempdir().expect("a folder can be made"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs memleak in the folder.
    pub fn run(&self, args: &[&str]) -> (Option<i32>, String, String) {
        output_within(memleak_command().current_dir(self.0.path()).args(args))
    }

    /// Runs memleak in the folder and expects success; returns standard output and standard error.
    pub fn succeed(&self, args: &[&str]) -> (String, String) {
        let (code, stdout, stderr) = self.run(args);
        assert_eq!(code, Some(0), "{args:?}\n{stderr}");
        (stdout, stderr)
    }

    /// Imports a log with more arguments; returns standard error.
    pub fn import(&self, log: &Path, recording: &str, more: &[&str]) -> String {
        let mut args = vec!["import", log.to_str().expect("UTF-8"), "-o", recording];
        args.extend(more);
        self.succeed(&args).1
    }

    /// The snapshot of a recording at a time, as JSON.
    pub fn snapshot(&self, recording: &str, at: &str) -> Value {
        let (stdout, _) = self.succeed(&["export", recording, "--format", "json", "--at", at]);
        serde_json::from_str(&stdout).expect("JSON")
    }
}

/// Name of the innermost named function, outstanding bytes and blocks of every site.
fn sites(snapshot: &Value) -> Vec<(String, u64, u64)> {
    let name = |s: &Value| {
        let named = s["frames"].as_array().and_then(|f| f.iter().find_map(|f| f["function"].as_str()));
        named.unwrap_or("").to_owned()
    };
    let number = |v: &Value| v.as_u64().expect("number");
    (snapshot["sites"].as_array().expect("sites").iter())
        .map(|s| (name(s), number(&s["outstanding_bytes"]), number(&s["outstanding_count"])))
        .collect()
}

fn listed(entries: &[(&str, u64, u64)]) -> Vec<(String, u64, u64)> {
    entries.iter().map(|(n, b, c)| ((*n).to_owned(), *b, *c)).collect()
}

// What the log says must be in the recording to the byte: first and last list, times, process, frames.
#[test]
fn a_log_of_libbpf_tools_keeps_its_numbers_and_names() {
    let folder = Folder::new();
    let said = folder.import(&fixture("libbpf-user.txt"), "a.memleak", &["--date", "2026-03-02", "--top", "10"]);
    assert_eq!(said, "6 snapshots of 3 sites over 10s recorded\n");
    let first = folder.snapshot("a.memleak", "start");
    assert_eq!(sites(&first), listed(&[("cache_put", 19_456, 64), ("order_new", 10_240, 80), ("book_add", 3_456, 27)]));
    assert_eq!(first["time"], "2026-03-02T08:34:43.000Z");
    let last = folder.snapshot("a.memleak", "end");
    assert_eq!(sites(&last), listed(&[("order_new", 63_104, 493), ("cache_put", 19_456, 64), ("book_add", 0, 0)]));
    assert_eq!(last["time"], "2026-03-02T08:34:53.000Z");
    let process = &last["processes"][0];
    assert_eq!((&process["pid"], &process["comm"]), (&16_851.into(), &"order-service".into()));
    assert_eq!(process["exe"], "/usr/local/bin/order-service");
    let frames = last["sites"][0]["frames"].as_array().expect("frames");
    assert_eq!(frames.len(), 4);
    assert_eq!((&frames[1]["function"], &frames[1]["offset"]), (&"handle_request".into(), &0x10.into()));
    assert_eq!(frames[1]["module"], "/usr/local/bin/order-service");
    assert_eq!(frames[1]["address"], 0x55c2_9ba0_519b_u64);
    assert_eq!(
        (&frames[3]["function"], &frames[3]["module"]),
        (&Value::Null, &"/usr/lib/x86_64-linux-gnu/libc.so.6".into())
    );
    let mode = std::fs::metadata(folder.path("a.memleak")).expect("recording").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

// -a adds a line per block and -C takes the lists from other tables; both must come out as they stand.
#[test]
fn every_mode_of_libbpf_tools_is_read_without_a_remark() {
    let folder = Folder::new();
    for (log, snapshots, expected) in [
        (
            "libbpf-user-show-allocs.txt",
            3,
            listed(&[("order_new", 31_360, 245), ("cache_put", 19_136, 63), ("book_add", 3_584, 28)]),
        ),
        (
            "libbpf-user-combined-only.txt",
            4,
            listed(&[("order_new", 43_648, 341), ("cache_put", 19_424, 64), ("book_add", 4_992, 39)]),
        ),
    ] {
        let said = folder.import(&fixture(log), log, &[]);
        assert!(said.starts_with(&format!("{snapshots} snapshots of 3 sites")), "{log}: {said}");
        assert_eq!(sites(&folder.snapshot(log, "end")), expected, "{log}");
    }
    let said = folder.import(&fixture("libbpf-kernel.txt"), "kernel", &[]);
    assert!(said.starts_with("4 snapshots of"), "{said}");
    let last = folder.snapshot("kernel", "end");
    let sites = last["sites"].as_array().expect("sites");
    assert_eq!(sites[0]["outstanding_bytes"], 60_784_640);
    assert_eq!((&last["processes"][0]["pid"], &last["processes"][0]["comm"]), (&0.into(), &"kernel".into()));
    assert_eq!(sites[0]["frames"][0]["module"], "[kernel]");
    assert_eq!(sites[0]["probe_set"], "bcc-kernel");
}

// The python tool indents differently, sorts the other way round, and may print addresses or none.
#[test]
fn every_mode_of_the_python_tool_is_read_without_a_remark() {
    let folder = Folder::new();
    let said = folder.import(&fixture("python-user.txt"), "a", &["--date", "2026-03-02"]);
    assert_eq!(said, "4 snapshots of 2 sites over 15s recorded\n");
    let last = folder.snapshot("a", "end");
    assert_eq!(last["time"], "2026-03-03T00:00:05.000Z");
    let parse = "parse_row(char const*, unsigned long)";
    assert_eq!(sites(&last), listed(&[(parse, 13 * 97, 97), ("operator new(unsigned long)", 0, 0)]));
    assert_eq!(last["sites"][0]["frames"][2]["function"], Value::Null);
    assert_eq!(last["processes"][0]["pid"], 5193);

    folder.import(&fixture("python-user-show-allocs.txt"), "b", &["--comm", "import-job"]);
    let last = folder.snapshot("b", "end");
    assert_eq!(sites(&last), listed(&[(parse, 85, 5), ("", 40, 1)]));
    assert_eq!(last["sites"][1]["truncated"], "bcc had no room for the stack");
    assert_eq!(last["sites"][0]["frames"][0]["address"], 0x55d0_c1a4_b16d_u64);
    assert_eq!(last["processes"][0]["comm"], "import-job");

    folder.import(&fixture("python-kernel-combined-only.txt"), "c", &[]);
    let last = folder.snapshot("c", "end");
    assert_eq!(sites(&last), listed(&[("kmem_cache_alloc", 192 * 72, 72), ("__alloc_pages", 4096, 1)]));
    assert_eq!(last["processes"][0]["comm"], "kernel");
}

// A damaged line costs that line, is shown with its number, and is written out where it would steer the terminal.
#[test]
fn damaged_lines_are_counted_and_shown_with_their_numbers() {
    let folder = Folder::new();
    let mut log = String::from("Attaching to pid 7, Ctrl+C to quit.\n\t\tlost+0x1 [a]\n");
    log += "[1:00:00] Top 10 stacks with outstanding allocations:\n\t64 bytes in 4 allocations from stack\n\t\tf+0x1 [a]\n";
    log += "Segmentation \x1b[2Jfault\n";
    log += &format!("{}\n", "x".repeat(200_000));
    log += "\t\tmain+0x2 [a]\n";
    log += &"junk\n".repeat(20);
    log += "[1:00:05] Top 10 stacks with outstanding allocations:\n\t80 bytes in 5 allocations from stack\n\t\tf+0x1 [a]\n\t\tmain+0x2 [a]\n";
    std::fs::write(folder.path("log"), log).expect("log");
    let said = folder.import(&folder.path("log"), "a", &[]);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 12, "{said}");
    assert!(
        lines[0].contains("log:2: left out: it belongs to no stack") && lines[0].ends_with("lost+0x1 [a]"),
        "{said}"
    );
    assert!(lines[1].contains("log:6: left out") && lines[1].contains(r"Segmentation \x1b[2Jfault"), "{said}");
    assert!(lines[2].contains("log:7: left out: the line is too long") && lines[2].len() < 300, "{said}");
    assert!(lines[9].contains("log:15: left out: it is no line of memleak's output: junk"), "{said}");
    assert_eq!(lines[10..], ["memleak: 13 more of 32 lines are left out", "2 snapshots of 1 site over 5s recorded"]);
    assert_eq!(sites(&folder.snapshot("a", "end")), listed(&[("f", 80, 5)]));
}

// There is nothing to report on: say why, and leave no file behind that looks like a recording.
#[test]
fn a_log_without_lists_is_refused_and_leaves_no_file() {
    let folder = Folder::new();
    for (text, why) in [
        ("", "it is empty"),
        ("Attaching to pid 7, Ctrl+C to quit.\n", "none of its 1 lines begins a list of stacks"),
        ("\x7fELF\u{1}\n\0\n", "is it the text output of bcc's memleak?"),
    ] {
        std::fs::write(folder.path("log"), text).expect("log");
        let (code, _, stderr) = folder.run(&["import", "log", "-o", "a.memleak"]);
        assert_eq!(code, Some(2), "{stderr}");
        assert!(stderr.starts_with("memleak: failed to import log: ") && stderr.contains(why), "{stderr}");
        assert!(!folder.path("a.memleak").exists());
    }
}

// What is in the way must stay as it is, be it a file, the target of a link, or a folder that takes no files.
#[test]
fn an_output_in_the_way_is_refused_and_untouched() {
    let folder = Folder::new();
    std::fs::write(folder.path("precious"), "precious").expect("file");
    std::os::unix::fs::symlink(folder.path("precious"), folder.path("link")).expect("link");
    let log = fixture("libbpf-user.txt");
    for (output, why) in [("precious", "exists"), ("link", "link"), ("no/such/folder", "No such file"), (".", "")] {
        let (code, _, stderr) = folder.run(&["import", log.to_str().expect("UTF-8"), "-o", output]);
        assert_eq!(code, Some(2), "{output}: {stderr}");
        assert!(stderr.contains("failed to create the recording") && stderr.contains(why), "{output}: {stderr}");
    }
    assert_eq!(std::fs::read_to_string(folder.path("precious")).expect("file"), "precious");
    for (log, why) in [("nothing-here", "No such file"), (".", "it is a folder")] {
        let (code, _, stderr) = folder.run(&["import", log, "-o", "new"]);
        assert_eq!(code, Some(2), "{stderr}");
        assert!(stderr.contains("failed to read the log") && stderr.contains(why), "{stderr}");
    }
}

/// Largest resident size so far, in KiB, of what `/proc/PID/status` says.
fn peak(status: &str) -> Option<u64> {
    let (_, after) = status.split_once("VmHWM:")?;
    after.split_whitespace().next()?.parse().ok()
}

/// CPU time so far in seconds, of what `/proc/PID/stat` says.
fn cpu_s(stat: &str) -> Option<f64> {
    let (_, after) = stat.rsplit_once(") ")?;
    let ticks = |field: usize| after.split_whitespace().nth(field)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) / 100.0)
}

/// Imports a made-up log of so many snapshots of 20 sites, 10 KiB each, through a pipe as from zcat; what it took.
fn import_large(folder: &Folder, snapshots: u64) -> Large {
    let begun = Instant::now();
    let mut child = memleak_command()
        .current_dir(folder.path(".."))
        .args(["import", "-", "-o"])
        .arg(folder.path("large.memleak"))
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("memleak starts");
    let mut bytes = 0;
    {
        let mut log = std::io::BufWriter::new(child.stdin.take().expect("standard input is piped"));
        for i in 0..snapshots {
            let (h, m, s) = (i / 3600 % 24, i / 60 % 60, i % 60);
            let mut text = format!("[{h}:{m}:{s}] Top 10 stacks with outstanding allocations:\n");
            for site in 0..20_u64 {
                text += &format!("{} bytes in {} allocations from stack\n", (i + 1) * (site + 1), i + 1);
                for frame in 0..6_u64 {
                    let address = 0x55c2_9ba0_0000 + site * 64 + frame;
                    text +=
                        &format!("\t{frame} [<{address:016x}>] function_{site}_{frame}+0x10 [/usr/local/bin/shop]\n");
                }
            }
            bytes += text.len();
            log.write_all(text.as_bytes()).expect("memleak reads");
        }
    }
    // Not from wait4: what it says of a process counts the memory of the one that started it. The files are gone once the
    // process has ended.
    let proc = |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", child.id())).ok();
    let (mut peak_kib, mut cpu) = (0, 0.0);
    while let Some(kib) = proc("status").as_deref().and_then(peak) {
        peak_kib = kib;
        cpu = proc("stat").as_deref().and_then(cpu_s).unwrap_or(cpu);
        std::thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().expect("memleak ends");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Large { bytes, peak_kib, cpu_s: cpu, wall_s: begun.elapsed().as_secs_f64(), said }
}

/// What it took to import a large log.
struct Large {
    bytes: usize,
    peak_kib: u64,
    cpu_s: f64,
    wall_s: f64,
    said: String,
}

// A log of any size must stream: memory may grow with the sites, not with the lines.
#[test]
fn a_large_log_needs_memory_for_its_sites_only() {
    let folder = Folder::new();
    let large = import_large(&folder, 6_000);
    assert!(large.bytes > 40 << 20, "{}", large.bytes);
    assert_eq!(large.said, "6000 snapshots of 20 sites over 1h 39m recorded\n");
    assert!((1..32 << 10).contains(&large.peak_kib), "{} KiB for {} MiB", large.peak_kib, large.bytes >> 20);
    let last = folder.snapshot("large.memleak", "end");
    assert_eq!(last["sites"][0]["outstanding_bytes"], 6_000 * 20);
}

// The same with a gigabyte, for docs/recordings.md.
#[test]
#[ignore = "measures, best with a release build: --ignored --nocapture a_gigabyte"]
fn a_gigabyte_of_log_needs_no_more() {
    let folder = Folder::new();
    let large = import_large(&folder, 125_000);
    assert!(large.bytes > 1 << 30, "{}", large.bytes);
    assert!(large.said.starts_with("125000 snapshots of 20 sites"), "{}", large.said);
    let recording = std::fs::metadata(folder.path("large.memleak")).expect("the recording").len();
    eprintln!(
        "a log of {:.2} GB: {:.1} s CPU, {:.1} s by the clock with the program that writes it, {} KiB at most, a recording of \
         {:.1} MB",
        large.bytes as f64 / 1e9,
        large.cpu_s,
        large.wall_s,
        large.peak_kib,
        recording as f64 / 1e6
    );
    assert!((1..32 << 10).contains(&large.peak_kib), "{} KiB", large.peak_kib);
}
