use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use serde_json::Value;

use super::*;
use crate::alert::Alert;
use crate::labels::Labels;
use crate::output::reach;
use crate::snapshot::{Process, Site, SiteKey, Totals};

const DOCS: &str = include_str!("../../../../docs/alerts.md");

/// An alert of a hostile process, with one frame of which everything and one of which nothing is known.
pub(crate) fn event(rule: &str) -> AlertEvent {
    let process = Process {
        pid: 4711,
        comm: "</script>\"\n".to_owned(),
        exe: "/tmp/\u{1b}[2J\u{9b}31m\u{202e}x".to_owned(),
        labels: Labels {
            container: Some("0a".repeat(32)),
            runtime: Some("docker".to_owned()),
            pod: Some("6f2c1f9e-93a1-4ee4-8d1b-1b7b2c0c7a11".to_owned()),
            unit: Some("x\u{1b}[2J.service".to_owned()),
            slice: Some("system.slice".to_owned()),
        },
        ..Process::default()
    };
    let known = Frame {
        function: Some("audit_append".to_owned()),
        module: Some("/opt/demo".to_owned()),
        offset: 31,
        file: Some("audit.c".to_owned()),
        line: Some(58),
        address: u64::MAX,
        build_id: Some("8c1f".to_owned()),
        file_address: Some(0x14ff),
        ..Frame::default()
    };
    let unknown = Frame { reason: Some("no symbols".to_owned()), ..Frame::default() };
    let site = Site {
        key: SiteKey { instance: 1, probe_set: 0, stack: 7 },
        id: 0xab,
        process: Arc::new(process),
        probe_set: "glibc".into(),
        function: "malloc".into(),
        addresses: vec![1],
        truncated: Some("page not present".into()),
        first_thread: None,
        frames: vec![known, unknown].into(),
    };
    AlertEvent {
        alert: Alert {
            id: "5f0a3c9d1be27846".to_owned(),
            rule: rule.into(),
            severity: Severity::Critical,
            confidence: 0.97,
            reason: "grew in all 12 snapshots".to_owned(),
            site: Arc::new(site),
            totals: Totals { allocated_bytes: 3000, freed_bytes: 1000, allocated_count: 30, freed_count: 10 },
            processes: 2,
            ended: false,
            status: Status::Firing,
            first_seen_s: 9.0,
            fired_s: 12.0,
            resolved_s: None,
        },
        time_s: 12.0,
        wall_s: 1_740_832_205.25,
        mode: Mode::Exact,
        growth_bytes_per_s: 24576.0,
        oldest_age_s: 12.0,
        losses: Losses { implicit_frees: 3, ..Losses::default() },
        reachability: None,
    }
}

/// Path of each field and the types it was seen with, such as `site.frames[].line` -> `integer`, `null`.
fn types(value: &Value, path: &str, into: &mut BTreeMap<String, Vec<&'static str>>) {
    let name = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(items) => {
            items.iter().for_each(|item| types(item, &format!("{path}[]"), into));
            "list"
        }
        Value::Object(fields) => {
            for (key, field) in fields {
                types(field, &if path.is_empty() { key.clone() } else { format!("{path}.{key}") }, into);
            }
            "object"
        }
    };
    // The root and the elements of a list have no row of their own.
    if !path.is_empty() && !path.ends_with("[]") {
        let seen = into.entry(path.to_owned()).or_default();
        if !seen.contains(&name) {
            seen.push(name);
        }
    }
}

/// Rows of the documented table: path -> types.
fn documented() -> BTreeMap<String, Vec<&'static str>> {
    DOCS.lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| `")?.split(" | ");
            let path = cells.next()?.trim_end_matches('`').to_owned();
            Some((path, cells.next()?.split(" or ").collect()))
        })
        .collect()
}

/// People build on the documented schema: what is written must be in it, and all of it must be written.
#[test]
fn the_documented_fields_are_exactly_those_written() {
    let documented = documented();
    let example = DOCS.split("```json").nth(1).and_then(|s| s.split("```").next()).unwrap();
    let mut resolved = event("growth");
    let process = Process { labels: Labels::default(), ..Process::clone(&resolved.alert.site.process) };
    resolved.alert.site = Arc::new(Site {
        process: Arc::new(process),
        truncated: None,
        frames: resolved.alert.site.frames.clone(),
        ..site_copy(&resolved)
    });
    let scanned = AlertEvent { reachability: Some(Arc::new(reach::sample())), ..event("growth") };
    resolved.reachability = Some(Arc::default());
    let lines = [event("growth"), scanned, resolved].map(|e| serde_json::to_value(AlertLine::from(&e)).unwrap());
    let mut written = BTreeMap::new();
    lines.iter().for_each(|line| types(line, "", &mut written));
    written.values_mut().for_each(|seen| seen.sort_by_key(|name| *name == "null"));
    assert_eq!(written, documented);
    // The example is real: it has every field, with types from the table.
    let mut shown = BTreeMap::new();
    types(&serde_json::from_str(example).unwrap(), "", &mut shown);
    assert!(shown.keys().eq(documented.keys()));
    for (path, seen) in shown {
        assert!(seen.iter().all(|name| documented[&path].contains(name)), "{path}: {seen:?}");
    }
}

fn site_copy(event: &AlertEvent) -> Site {
    let s = &event.alert.site;
    Site {
        key: s.key,
        id: s.id,
        process: s.process.clone(),
        probe_set: s.probe_set.clone(),
        function: s.function.clone(),
        addresses: s.addresses.clone(),
        truncated: s.truncated.clone(),
        first_thread: s.first_thread.clone(),
        frames: s.frames.clone(),
    }
}

/// The values, not only the shape.
#[test]
fn a_line_carries_the_values_of_its_event() {
    let value = serde_json::to_value(AlertLine::from(&event("growth"))).unwrap();
    let expected = [
        ("/type", "\"alert\""),
        ("/id", "\"5f0a3c9d1be27846\""),
        ("/time", "\"2025-03-01T12:30:05.250Z\""),
        ("/since", "\"2025-03-01T12:30:02.250Z\""),
        ("/status", "\"firing\""),
        ("/severity", "\"critical\""),
        ("/mode", "\"exact\""),
        ("/processes", "2"),
        ("/process/pid", "4711"),
        ("/site/id", "\"00000000000000ab\""),
        ("/site/outstanding_bytes", "2000"),
        ("/site/outstanding_count", "20"),
        ("/site/growth_bytes_per_s", "24576.0"),
        ("/site/frames/0/function", "\"audit_append\""),
        ("/site/frames/0/address", "\"0xffffffffffffffff\""),
        ("/site/frames/1/reason", "\"no symbols\""),
        ("/losses/implicit_frees", "3"),
    ];
    for (path, json) in expected {
        assert_eq!(value.pointer(path).unwrap().to_string(), json, "{path}");
    }
}

/// A rule may return rubbish; the line keeps its types.
#[test]
fn numbers_that_are_none_do_not_break_the_schema() {
    let mut broken = event("growth");
    broken.alert.confidence = f64::NAN;
    broken.growth_bytes_per_s = f64::INFINITY;
    let line = AlertLine::from(&broken);
    assert_eq!((line.confidence, line.site.growth_bytes_per_s), (0.0, 0.0));
}

/// `memleak --json` is read on terminals: names must not be able to steer them, and must survive unchanged.
#[test]
fn hostile_names_are_escaped_and_survive() {
    let line = json_line(&AlertLine::from(&event("growth"))).unwrap();
    assert!(!line.contains(steers), "{line}");
    assert!(line.contains("\\u001b[2J\\u009b31m\\u202ex"), "{line}");
    let back: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(back["process"]["exe"], "/tmp/\u{1b}[2J\u{9b}31m\u{202e}x");
    assert_eq!(back["process"]["comm"], "</script>\"\n");
    let plane_14 = json_line(&"\u{e0041}é").unwrap();
    assert_eq!(plane_14, "\"\\udb40\\udc41é\"");
    assert_eq!(serde_json::from_str::<String>(&plane_14).unwrap(), "\u{e0041}é");
}

/// Alerts name paths and processes: others have no business reading them. Earlier runs are kept.
#[test]
fn the_file_is_private_and_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("alerts.ndjson");
    assert!(AlertFile::new(&path).write(&["1".to_owned()]).is_none());
    let mut file = AlertFile::new(&path);
    assert!(file.write(&["2".to_owned(), "3".to_owned()]).is_none());
    assert!(file.write(&[]).is_none());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n2\n3\n");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    // As after logrotate.
    std::fs::rename(&path, dir.path().join("old")).unwrap();
    assert!(file.write(&["4".to_owned()]).is_none());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "4\n");
}

/// A folder that is missing for a while must cost no alert, and one complaint only.
#[test]
fn a_file_that_cannot_be_written_is_reported_once_and_retried() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("later/alerts.ndjson");
    let mut file = AlertFile::new(&path);
    let Some(FileNotice::Failed(e)) = file.write(&["1".to_owned()]) else { panic!("a failure is told") };
    assert!(format!("{e:#}").contains("later/alerts.ndjson: No such file"), "{e:#}");
    assert!(file.write(&["2".to_owned()]).is_none(), "once");
    assert!(file.write(&[]).is_none());
    std::fs::create_dir(dir.path().join("later")).unwrap();
    let Some(FileNotice::Recovered { written, lost }) = file.write(&["3".to_owned()]) else { panic!("told as over") };
    assert_eq!((written, lost), (2, 0));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n2\n3\n");
    assert!(file.write(&["4".to_owned()]).is_none());
}

/// Waiting lines are bounded, and what is lost is counted: the newest are kept.
#[test]
fn lines_that_wait_for_too_long_are_counted_as_lost() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("later/a");
    let mut file = AlertFile::new(&path);
    for n in 0..MAX_WAITING + 7 {
        file.write(&[n.to_string()]);
    }
    assert_eq!((file.lost(), file.waiting()), (7, MAX_WAITING));
    std::fs::create_dir(dir.path().join("later")).unwrap();
    file.write(&[]);
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count(), MAX_WAITING);
    assert!(text.starts_with("7\n"));
}

/// A device without space and a pipe without reader must neither hang nor panic.
#[test]
fn a_full_device_and_a_pipe_without_reader_are_failures() {
    let mut full = AlertFile::new("/dev/full");
    let Some(FileNotice::Failed(e)) = full.write(&["1".to_owned()]) else { panic!("a failure is told") };
    assert!(format!("{e:#}").contains("No space left"), "{e:#}");
    assert_eq!(full.waiting(), 1);
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    assert!(matches!(AlertFile::new(&pipe).write(&["1".to_owned()]), Some(FileNotice::Failed(_))));
}

/// A disk that becomes full within a line must not leave half a line behind: readers would choke on it.
#[test]
fn half_a_line_is_taken_back() {
    // A limit on the size of files cuts a write short just like a full disk does. It holds for a whole process, so
    // the test runs itself once more in one of its own.
    const MARK: &str = "MEMLEAK_TEST_FILE_SIZE_LIMIT";
    let Some(path) = std::env::var_os(MARK) else {
        let dir = tempfile::tempdir().unwrap();
        let this = std::env::current_exe().unwrap();
        let name = "output::alerts::tests::half_a_line_is_taken_back";
        let output = std::process::Command::new(this)
            .args([name, "--exact", "--nocapture"])
            .env(MARK, dir.path().join("a"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(std::fs::read_to_string(dir.path().join("a")).unwrap(), "12345\n");
        return;
    };
    let limit = libc::rlimit { rlim_cur: 9, rlim_max: 9 };
    // SAFETY: the signal is ignored, which installs no handler; `limit` is valid for the duration of the call.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
    }
    let mut file = AlertFile::new(path);
    assert!(file.write(&["12345".to_owned()]).is_none());
    assert!(matches!(file.write(&["67890".to_owned()]), Some(FileNotice::Failed(_))));
    assert_eq!(file.waiting(), 1);
}
