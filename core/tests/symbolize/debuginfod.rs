//! Debug information from a server: a small one on loopback.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use memleak_core::symbolize::debuginfod::Settings;
use memleak_core::symbolize::{Frame, Limits, Symbolizer};

use super::program::{Folder, Running, run};
use super::{brief, limits, with_lines};

/// What the server does with a request.
#[derive(Clone)]
enum Answer {
    File(Vec<u8>),
    NotFound,
    /// Says that so many bytes follow, and sends zeros for ever.
    Endless(Option<u64>),
    /// Says nothing.
    Silence,
    /// Sends the file after a while.
    Late(Duration, Vec<u8>),
}

/// A server; it lives until the tests end.
struct Server {
    url: String,
    requests: Arc<AtomicUsize>,
    paths: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(answer: Answer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let (requests, paths) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
        let (count, seen) = (Arc::clone(&requests), Arc::clone(&paths));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                count.fetch_add(1, Ordering::Relaxed);
                let (answer, seen) = (answer.clone(), Arc::clone(&seen));
                std::thread::spawn(move || serve(stream, answer, &seen));
            }
        });
        Server { url, requests, paths }
    }
}

fn serve(mut stream: TcpStream, answer: Answer, seen: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream.try_clone().expect("a stream"));
    let mut line = String::new();
    let mut first = true;
    while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
        if std::mem::take(&mut first) {
            seen.lock().expect("no panic").push(line.split(' ').nth(1).unwrap_or_default().to_owned());
        }
        line.clear();
    }
    let head = |length: Option<u64>| {
        let length = length.map(|n| format!("Content-Length: {n}\r\n")).unwrap_or_default();
        format!("HTTP/1.1 200 OK\r\n{length}Connection: close\r\n\r\n")
    };
    let file = |stream: &mut TcpStream, data: &[u8]| {
        stream.write_all(head(Some(data.len() as u64)).as_bytes()).and_then(|()| stream.write_all(data))
    };
    let _ = match answer {
        Answer::File(data) => file(&mut stream, &data),
        Answer::NotFound => stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
        Answer::Endless(length) => {
            let sent = stream.write_all(head(length).as_bytes());
            while stream.write_all(&[0; 65_536]).is_ok() {}
            sent
        }
        Answer::Silence => {
            std::thread::sleep(Duration::from_secs(30));
            Ok(())
        }
        Answer::Late(pause, data) => {
            std::thread::sleep(pause);
            file(&mut stream, &data)
        }
    };
}

fn settings(folder: &Path, servers: &[&Server]) -> Settings {
    Settings {
        servers: servers.iter().map(|s| s.url.clone()).collect(),
        folder: folder.to_owned(),
        max_bytes: 8 << 20,
        max_time: Duration::from_secs(2),
        patience: Duration::from_secs(20),
    }
}

/// A stripped program, its debug file's contents, and its build id.
fn stripped(folder: &Folder) -> (std::path::PathBuf, Vec<u8>) {
    let exe = folder.program("stack", &["-g"]);
    let debug = folder.path("stack.debug");
    run(Command::new("objcopy").arg("--only-keep-debug").args([&exe, &debug]));
    run(Command::new("strip").arg(&exe));
    let data = std::fs::read(&debug).expect("it was made");
    (exe, data)
}

fn symbolizer(settings: Option<Settings>) -> Symbolizer {
    Symbolizer::with_limits(Limits { debuginfod: settings, ..limits() })
}

fn frames(exe: &Path, symbolizer: &mut Symbolizer) -> Vec<Frame> {
    let mut running = Running::start(exe, &[]);
    symbolizer.observe(&running.process(1)).expect("observed");
    let frames = symbolizer.frames(1, &running.ask("stack"));
    symbolizer.purge(1);
    frames
}

/// Names come from the server, are asked for by build id, and the next run need not ask again.
#[test]
fn names_come_from_a_server_and_are_kept() {
    let folder = Folder::new();
    let (exe, data) = stripped(&folder);
    let (first, second) = (Server::start(Answer::NotFound), Server::start(Answer::File(data)));
    let kept = folder.path("kept");
    let found = frames(&exe, &mut symbolizer(Some(settings(&kept, &[&first, &second]))));
    assert_eq!(brief(&found), with_lines());
    let id = found[0].build_id.clone().expect("build id");
    let paths = second.paths.lock().expect("no panic").clone();
    assert_eq!(paths.iter().filter(|p| **p == format!("/buildid/{id}/debuginfo")).count(), 1, "{paths:?}");
    let before = second.requests.load(Ordering::Relaxed);
    assert_eq!(brief(&frames(&exe, &mut symbolizer(Some(settings(&kept, &[&first, &second]))))), with_lines());
    let again = second.paths.lock().expect("no panic")[before..].to_vec();
    assert!(!again.iter().any(|p| p.contains(&id)), "{again:?}");
    // Without servers nobody is asked.
    let before = second.requests.load(Ordering::Relaxed);
    assert_eq!(frames(&exe, &mut symbolizer(None))[0].function, None);
    assert_eq!(second.requests.load(Ordering::Relaxed), before);
}

/// Debug information of another build has the wrong names: refused, also when it lies in the folder already.
#[test]
fn a_file_of_another_build_is_refused() {
    let folder = Folder::new();
    let (exe, _) = stripped(&folder);
    let other = std::fs::read(folder.program("other", &["-g", "-O1"])).expect("it was made");
    let kept = folder.path("kept");
    for answer in [Answer::File(other.clone()), Answer::File(b"no program".to_vec()), Answer::File(Vec::new())] {
        let server = Server::start(answer);
        let found = frames(&exe, &mut symbolizer(Some(settings(&kept, &[&server]))));
        assert_eq!(found[0].function, None);
        let id = found[0].build_id.clone().expect("build id");
        assert!(!kept.join(format!("{id}.debug")).exists());
        std::fs::create_dir_all(&kept).expect("a folder");
        std::fs::write(kept.join(format!("{id}.debug")), &other).expect("a file");
    }
    // No draft stays behind.
    let left = std::fs::read_dir(&kept).expect("it is there").flatten().map(|f| f.file_name());
    assert!(left.filter(|n| n.to_string_lossy().ends_with(".draft")).count() == 0);
}

/// A server can send anything, for any time: it costs the lines, not the disk and not the run.
#[test]
fn size_and_time_are_bounded() {
    let folder = Folder::new();
    let (exe, _) = stripped(&folder);
    for answer in [Answer::Endless(None), Answer::Endless(Some(1 << 40)), Answer::Silence] {
        let (server, kept) = (Server::start(answer), folder.path("kept"));
        let started = Instant::now();
        let found = frames(&exe, &mut symbolizer(Some(settings(&kept, &[&server]))));
        assert_eq!(found[0].function, None);
        assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
        let bytes: u64 =
            std::fs::read_dir(&kept).into_iter().flatten().flatten().map(|f| f.metadata().map_or(0, |m| m.len())).sum();
        assert_eq!(bytes, 0);
    }
    // Nobody listens.
    let gone = Server { url: "http://127.0.0.1:1".into(), requests: Arc::default(), paths: Arc::default() };
    assert_eq!(frames(&exe, &mut symbolizer(Some(settings(&folder.path("kept"), &[&gone]))))[0].function, None);
}

/// The collector does not wait for a slow server; what comes later is used for later questions.
#[test]
fn a_slow_server_holds_nobody_up() {
    let folder = Folder::new();
    let (exe, data) = stripped(&folder);
    let server = Server::start(Answer::Late(Duration::from_millis(1200), data));
    let settings = Settings { patience: Duration::from_millis(50), ..settings(&folder.path("kept"), &[&server]) };
    let mut symbolizer = symbolizer(Some(settings));
    let mut running = Running::start(&exe, &[]);
    symbolizer.observe(&running.process(1)).expect("observed");
    let addresses = running.ask("stack");
    let started = Instant::now();
    assert_eq!(symbolizer.frames(1, &addresses)[0].function, None);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    let deadline = Instant::now() + Duration::from_secs(20);
    while symbolizer.frames(1, &addresses)[0].function.is_none() {
        assert!(Instant::now() < deadline, "the names never came");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(brief(&symbolizer.frames(1, &addresses)), with_lines());
}

/// A report from a machine without symbols gets its names from a server, which `memleak symbolize` waits for.
#[test]
fn a_report_gets_names_from_a_server() {
    let folder = Folder::new();
    let (exe, data) = stripped(&folder);
    let nameless = frames(&exe, &mut symbolizer(None));
    assert_eq!(nameless[0].function, None);
    let line = serde_json::json!({ "type": "snapshot", "sites": [{ "frames": nameless }] }).to_string() + "\n";
    let (log, no_files) = (folder.path("log.ndjson"), folder.path("no-files"));
    std::fs::write(&log, &line).expect("written");
    std::fs::create_dir(&no_files).expect("a folder");
    let symbolize = |servers: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memleak"));
        command.arg("symbolize").arg(&log).arg("--debug-dir").arg(&no_files);
        command.env("DEBUGINFOD_URLS", servers).env("DEBUGINFOD_CACHE_PATH", folder.path("kept"));
        let output = command.output().expect("it starts");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };

    // Nobody to ask, and somebody who knows nothing.
    let ignorant = Server::start(Answer::NotFound);
    for servers in ["", &ignorant.url] {
        let (code, text) = symbolize(servers);
        let id = nameless[0].build_id.as_deref().expect("build id");
        assert!(code == Some(2) && text.contains(&format!("needs one with build id {id}")), "{servers}: {text}");
        assert_eq!(std::fs::read_to_string(&log).expect("text"), line);
    }
    assert!(ignorant.requests.load(Ordering::Relaxed) > 0);

    // The first has another build's; the second takes longer than a run would wait for it.
    let other = std::fs::read(folder.program("other", &["-g", "-O1"])).expect("it was made");
    let wrong = Server::start(Answer::File(other));
    let late = Server::start(Answer::Late(Duration::from_secs(4), data));
    let (code, text) = symbolize(&format!("{} {}", wrong.url, late.url));
    assert!(code == Some(0) && text.contains("it belongs to another build"), "{text}");
    let named = std::fs::read_to_string(&log).expect("text");
    let named: serde_json::Value = serde_json::from_str(&named).expect("JSON");
    let named = named["sites"][0]["frames"].as_array().expect("frames");
    for ((function, line, inlined), frame) in with_lines().into_iter().zip(named) {
        assert_eq!((&frame["function"], &frame["line"]), (&function.into(), &line.into()), "{named:#?}");
        assert_eq!(frame["inlined"], inlined);
    }
}
