//! Real servers from Debian packages, under load on loopback: the default rules must stay quiet, and scans must call no
//! block definitely lost.
//!
//! `MEMLEAK_WATCH=10m MEMLEAK_DATA=1024 cargo test -p memleak_tests --test suite servers -- --test-threads 1 --nocapture`
//! watches each for ten minutes. The stores are filled with a gigabyte while they are watched, which rules may call growth:
//! then only what scans say counts. `MEMLEAK_ARGS="--set collector.budget=off --set collector.max_outstanding=8000000"` traces
//! every call, so that all of the gigabyte is judged.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use memleak_tests::{Feature, Memleak, Outcome, memleak_command, needs};

/// How long each server is watched under load.
fn watched() -> Duration {
    let text = std::env::var("MEMLEAK_WATCH").unwrap_or_else(|_| "30s".to_owned());
    let (number, unit) = text.split_at(text.len() - 1);
    let number: u64 = number.parse().expect("MEMLEAK_WATCH is a time such as 10m");
    Duration::from_secs(number * if unit == "m" { 60 } else { 1 })
}

/// What a store holds, in MiB, if the test is to be about that.
fn much_data() -> Option<u64> {
    std::env::var("MEMLEAK_DATA").ok().map(|text| text.parse().expect("MEMLEAK_DATA is a number of MiB"))
}

fn data() -> u64 {
    much_data().unwrap_or(32)
}

/// Fills a store: now, or if much is to be tracked when it is being watched.
fn fill(work: impl FnOnce() + Send + 'static) {
    if much_data().is_some() {
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(8));
            work();
        });
    } else {
        work();
    }
}

/// One server at a time: more than one load at once would only measure this machine's two cores.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A child process that is killed when dropped.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        Running(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("the command starts"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let pid = libc::pid_t::try_from(self.0.id()).expect("a pid fits");
        // SAFETY: kill takes plain numbers; the child has not been waited for, so the pid is still its own.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        if memleak_tests::memleak::wait_within(&mut self.0, Duration::from_secs(5)).is_none() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// A port that nobody listens on; somebody else could take it in between, then the test fails and says so.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port can be had");
    listener.local_addr().expect("a bound listener has an address").port()
}

/// Waits until the server accepts connections.
fn wait_for(port: u16) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "nothing listens on port {port}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Watches the processes with the default rules for a while, and scans them again and again; no block is definitely lost.
fn watch(server: &str, pids: &[u32], args: &[&str]) -> Outcome {
    let run = tempfile::tempdir().expect("a folder can be made");
    let pids: Vec<_> = pids.iter().map(u32::to_string).collect();
    let duration = format!("{}s", watched().as_secs());
    let mut command = memleak_command();
    command.current_dir(run.path()).args(["--json", "--duration", &duration, "-p", &pids.join(",")]);
    // Stacks must be complete from the first one on, also where no table has been made before.
    command.args(["--set", "live.sites=0", "--set", "collector.unwind_cache=off"]).args(args);
    command.args(std::env::var("MEMLEAK_ARGS").unwrap_or_default().split_whitespace());
    let mut memleak = Memleak::spawn(&mut command, tempfile::tempdir().expect("a folder can be made"));
    memleak.wait_until("the first snapshot", |_| true);
    // Rules that suspect nothing ask for no scan, so we do.
    let end = Instant::now() + watched().saturating_sub(Duration::from_secs(5));
    while Instant::now() < end {
        std::thread::sleep(Duration::from_secs(5));
        memleak.signal(libc::SIGUSR2);
    }
    let outcome = memleak.outcome();
    scans_call_nothing_lost(server, &outcome);
    outcome
}

/// Watches the processes; there must be no finding, and at least `busy` traced calls.
fn stays_quiet(server: &str, pids: &[u32], args: &[&str], busy: u64) {
    let outcome = watch(server, pids, args);
    let alerts: Vec<_> = outcome.alerts().collect();
    if much_data().is_some() {
        eprintln!("{server}: {} alerts while it was filled", alerts.len());
    } else {
        assert!(alerts.is_empty(), "{server}: {alerts:#?}");
        assert_eq!(outcome.code, Some(0), "{server}: {}", outcome.stderr);
    }
    let last = outcome.last();
    // Debian builds without frame pointers.
    for share in last.processes.iter().filter_map(|process| process.complete_stacks) {
        eprintln!("{server}: {:.2} % complete call stacks", share * 100.0);
        assert!(share >= 0.98, "{server}: {share} of the stacks are complete");
    }
    let hits: u64 = last.processes.iter().map(|process| process.hits).sum();
    let lost: Vec<_> = last.processes.iter().flat_map(|p| &p.losses).filter(|(_, count)| **count > 0).collect();
    eprintln!("{server}: {hits} traced calls, lost: {lost:?}, no finding");
    assert!(hits >= busy, "{server} was busy: {hits} traced calls");
}

/// There were scans, and none of them called a site definitely lost.
fn scans_call_nothing_lost(server: &str, outcome: &Outcome) {
    let scans = outcome.stderr.lines().filter(|line| line.contains("told what it can still reach")).count();
    let sites = outcome.snapshots.iter().flat_map(|snapshot| &snapshot.sites);
    let definite = sites.clone().filter(|s| s.reachability.as_ref().is_some_and(|r| r.verdict == "definite"));
    let definite: Vec<_> = definite.map(|s| (&s.frames, &s.reachability)).collect();
    assert!(definite.is_empty(), "{server}: {:#?}", definite.first());
    let lost = sites.filter_map(|s| s.reachability.as_ref().map(|r| r.lost.blocks)).max();
    eprintln!("{server}: {scans} scans, at most {} blocks of a site not reached", lost.unwrap_or(0));
    let newest: Vec<&str> = outcome.stderr.lines().rev().take(if much_data().is_some() { 20 } else { 1 }).collect();
    newest.iter().rev().for_each(|line| eprintln!("{server}: {line}"));
    assert!(scans > 0, "{server}: {}", outcome.stderr);
}

/// The child processes of a process.
fn children_of(pid: u32) -> Vec<u32> {
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("children can be read");
    list.split_whitespace().map(|pid| pid.parse().expect("a pid")).collect()
}

/// Debian's redis brings its own allocator in a library: watched with a probe set that a user would write.
const JEMALLOC: &str = r#"
    name = "jemalloc"
    kind = "userspace"
    [match]
    sonames = ["libjemalloc.so.2"]
    [[function]]
    symbol = "malloc"
    role = "alloc"
    size = { arg = 0 }
    [[function]]
    symbol = "calloc"
    role = "alloc"
    size = { arg = 1, times = 0 }
    [[function]]
    symbol = "realloc"
    role = "realloc"
    old = { arg = 0 }
    size = { arg = 1 }
    [[function]]
    symbol = "free"
    role = "free"
    old = { arg = 0 }
"#;

// A store in memory, half writes, half reads, with more keys than the load repeats at once.
#[test]
fn redis_under_load_is_quiet() {
    needs!(Feature::Bpf, Feature::Command("redis-server"), Feature::Command("redis-benchmark"));
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let port = free_port();
    let folder = tempfile::tempdir().expect("a folder can be made");
    let mut server = Command::new("redis-server");
    server.current_dir(folder.path()).args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""]);
    let server = Running::start(&mut server);
    wait_for(port);
    // With what redis keeps beside it, a value of 1,000 bytes takes about 1,200.
    let keys = (data() << 20) / 1200;
    let mut filling = Command::new("redis-benchmark");
    filling.args(["-p", &port.to_string(), "-t", "set", "-d", "1000", "-P", "50", "-q"]);
    filling.args(["-n", &(2 * keys).to_string(), "-r", &keys.to_string()]).stdout(Stdio::null());
    fill(move || assert!(filling.status().expect("redis-benchmark runs").success()));
    let mut load = Command::new("redis-benchmark");
    load.args([
        "-p",
        &port.to_string(),
        "-t",
        "set,get,lpush,lpop",
        "-r",
        "10000",
        "-d",
        "100",
        "-n",
        "20000",
        "-l",
        "-q",
    ]);
    let _load = Running::start(&mut load);
    // The data set is filled before we look: what comes after is steady.
    std::thread::sleep(Duration::from_secs(5));
    let plugins = tempfile::tempdir().expect("a folder can be made");
    std::fs::write(plugins.path().join("jemalloc.toml"), JEMALLOC).expect("a manifest can be written");
    let plugins = plugins.path().to_str().expect("the folder has a plain name");
    stays_quiet("redis", &[server.0.id()], &["--plugins", plugins], 10_000);
}

// A web server: request memory lives in pools that die with the request.
#[test]
fn nginx_under_load_is_quiet() {
    needs!(Feature::Bpf, Feature::Command("nginx"), Feature::Command("wrk"));
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let port = free_port();
    let folder = tempfile::tempdir().expect("a folder can be made");
    let config = nginx_config(folder.path(), port);
    let server = Running::start(Command::new("/usr/sbin/nginx").arg("-c").arg(config).arg("-p").arg(folder.path()));
    wait_for(port);
    let workers = children_of(server.0.id());
    assert!(!workers.is_empty(), "nginx has workers");
    let mut load = Command::new("wrk");
    let duration = format!("{}s", watched().as_secs() + 90);
    load.args(["-t", "1", "-c", "20", "-d", &duration, &format!("http://127.0.0.1:{port}/")]);
    let _load = Running::start(&mut load);
    std::thread::sleep(Duration::from_secs(2));
    stays_quiet("nginx", &workers, &[], 10_000);
}

/// Writes a page and a configuration that touch nothing outside the folder.
fn nginx_config(folder: &Path, port: u16) -> std::path::PathBuf {
    let root = folder.display();
    std::fs::write(folder.join("index.html"), "x".repeat(5000)).expect("a page can be written");
    // Workers run as root here, so that they can read the folder.
    let text = format!(
        "user root;\ndaemon off;\nworker_processes 1;\npid {root}/nginx.pid;\nerror_log {root}/error.log;\n\
         events {{ worker_connections 256; }}\n\
         http {{\n  access_log off;\n  gzip on;\n  gzip_types text/html;\n\
         client_body_temp_path {root}/body;\n  proxy_temp_path {root}/proxy;\n  fastcgi_temp_path {root}/fastcgi;\n\
         uwsgi_temp_path {root}/uwsgi;\n  scgi_temp_path {root}/scgi;\n\
         server {{ listen 127.0.0.1:{port}; root {root}; }}\n}}\n"
    );
    let path = folder.join("nginx.conf");
    std::fs::write(&path, text).expect("a configuration can be written");
    path
}

/// Clients that set and get over memcached's text protocol until they are dropped.
struct MemcachedLoad {
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
    clients: Vec<JoinHandle<std::io::Result<()>>>,
}

impl MemcachedLoad {
    fn start(port: u16, clients: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let requests = Arc::new(AtomicU64::new(0));
        let clients = (0..clients)
            .map(|seed| {
                let (stop, requests) = (Arc::clone(&stop), Arc::clone(&requests));
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        // A new connection now and then: connection buffers are allocated, items live in slabs.
                        memcached_session(port, seed, &requests)?;
                    }
                    Ok(())
                })
            })
            .collect();
        MemcachedLoad { stop, requests, clients }
    }

    fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.join().expect("a client does not panic").expect("memcached answers");
        }
        self.requests.load(Ordering::Relaxed)
    }
}

/// Stores so many bytes in items of a kilobyte, and waits until they are there.
fn fill_memcached(port: u16, bytes: u64) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    let value = "x".repeat(1000);
    let mut batch = String::new();
    for n in 0..bytes / 1100 {
        batch.push_str(&format!("set fill{n} 0 0 1000 noreply\r\n{value}\r\n"));
        if batch.len() > 1 << 20 {
            stream.write_all(batch.as_bytes())?;
            batch.clear();
        }
    }
    batch.push_str("version\r\n");
    stream.write_all(batch.as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).map(drop)
}

/// One connection: 50 pairs of set and get.
fn memcached_session(port: u16, seed: u64, requests: &AtomicU64) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_nodelay(true)?;
    let mut answers = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    let mut next = |answers: &mut BufReader<TcpStream>| {
        line.clear();
        answers.read_line(&mut line).map(|_| line.trim_end().to_owned())
    };
    for n in 0..50 {
        let key = (seed * 7919 + n * 104_729) % 5000;
        let value = "v".repeat(100 + key as usize % 400);
        write!(stream, "set key{key} 0 0 {}\r\n{value}\r\nget key{key}\r\n", value.len())?;
        let stored = next(&mut answers)?;
        if stored != "STORED" {
            return Err(std::io::Error::other(format!("answer to set: {stored}")));
        }
        while next(&mut answers)? != "END" {}
        requests.fetch_add(2, Ordering::Relaxed);
    }
    Ok(())
}

// A cache with its own slab allocator, and connections that come and go.
#[test]
fn memcached_under_load_is_quiet() {
    needs!(Feature::Bpf, Feature::Command("memcached"));
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let port = free_port();
    let mut server = Command::new("memcached");
    let megabytes = (2 * data()).to_string();
    server.args(["-u", "root", "-l", "127.0.0.1", "-p", &port.to_string(), "-U", "0", "-m", &megabytes, "-t", "2"]);
    let server = Running::start(&mut server);
    wait_for(port);
    fill(move || fill_memcached(port, data() << 20).expect("memcached takes the data"));
    let load = MemcachedLoad::start(port, 4);
    std::thread::sleep(Duration::from_secs(2));
    // Once warm it lives on its slabs and free lists: that there was traffic is known from the answers.
    stays_quiet("memcached", &[server.0.id()], &[], 0);
    let requests = load.finish();
    eprintln!("memcached: {requests} requests answered");
    assert!(requests > 10_000, "{requests} requests");
}

// An interpreter with a bounded cache, garbage in cycles, and buffers that come and go: everything it frees, it frees late.
#[test]
fn python_under_load_is_quiet() {
    needs!(Feature::Bpf, Feature::Command("python3"));
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let script = [
        "import collections, random, time",
        "cache = collections.OrderedDict()",
        "while True:",
        " k = random.randrange(20000)",
        " cache[k] = bytearray(random.randrange(600, 3000))",
        " cache.move_to_end(k)",
        " if len(cache) > 5000: cache.popitem(last=False)",
        " a = []",
        " a.append(a)",
        " if k % 50 == 0: time.sleep(0.001)",
    ]
    .join("\n");
    let python = Running::start(Command::new("python3").args(["-c", &script]));
    // The cache is full before we look.
    std::thread::sleep(Duration::from_secs(4));
    let outcome = watch("python", &[python.0.id()], &[]);
    let alerts: Vec<_> = outcome.alerts().collect();
    assert!(alerts.is_empty(), "{alerts:#?}");
}
