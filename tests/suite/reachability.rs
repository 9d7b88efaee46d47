//! Leak or cache: what scans say of blocks whose fate is known.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use memleak_tests::{
    Feature, Memleak, Program, Reachability, Snapshot, library_path, memleak_command, needs, output_within,
    program_path,
};
use serde_json::Value;

/// How often every shape is checked; `MEMLEAK_SHAPE_RUNS=20` is what the project promises to hold.
fn runs() -> u32 {
    std::env::var("MEMLEAK_SHAPE_RUNS").ok().map_or(1, |text| text.parse().expect("MEMLEAK_SHAPE_RUNS is a number"))
}

/// What is known of the blocks of all sites with a function in their stack; `None` before the scan. A function has more
/// than one site when some of its stacks were taken before the unwind tables were ready: verdict and way are those of the
/// larger one.
fn reach(snapshot: &Snapshot, function: &str) -> Option<Reachability> {
    let mut sites: Vec<_> = snapshot.sites.iter().filter(|site| site.passes(function)).collect();
    sites.sort_by_key(|site| std::cmp::Reverse(site.counts.outstanding_count));
    let mut all = sites.iter().filter_map(|site| site.reachability.clone());
    let first = all.next()?;
    Some(all.fold(first, |sum, next| Reachability {
        lost: sum.lost.plus(next.lost),
        indirectly_lost: sum.indirectly_lost.plus(next.indirectly_lost),
        reachable: sum.reachable.plus(next.reachable),
        called_lost: sum.called_lost + next.called_lost,
        refuted: sum.refuted + next.refuted,
        ..sum
    }))
}

/// A program with one site per shape, watched from the start, and a first scan of it.
fn scanned(program: Program, settings: &[&str]) -> (Program, Memleak, Snapshot) {
    let mut program = program;
    let settings = settings.iter().flat_map(|s| ["--set", s]);
    let args: Vec<&str> = ["--set", "reachability.automatic=false"].into_iter().chain(settings).collect();
    let mut memleak = Memleak::watch_with(program.pid(), &args);
    program.step("done");
    // Blocks must be a second old to be judged.
    std::thread::sleep(Duration::from_millis(1500));
    memleak.signal(libc::SIGUSR2);
    let snapshot = memleak.wait_until("a scan", |snapshot| reach(snapshot, "lose").is_some());
    (program, memleak, snapshot)
}

fn scanned_shapes() -> (Program, Memleak, Snapshot) {
    scanned(Program::start("shapes"), &[])
}

/// Every shape that needs no stop.
fn check_shapes(snapshot: &Snapshot) {
    // Nothing refers to them, or only others of their kind.
    for (function, lost, indirectly) in
        [("lose", 23, 0), ("lose_list", 1, 16), ("lose_ring", 1, 10), ("hide_turned", 31, 0)]
    {
        let reach = reach(snapshot, function).expect("it was scanned");
        assert_eq!(reach.verdict, "definite", "{function}: {reach:?}");
        assert_eq!((reach.lost.blocks, reach.indirectly_lost.blocks), (lost, indirectly), "{function}: {reach:?}");
        assert_eq!(reach.reachable.blocks, 0, "{function}: {reach:?}");
    }
    let coded = reach(snapshot, "hide_coded").expect("it was scanned");
    assert_eq!((coded.verdict.as_str(), coded.lost.blocks), ("unknown", 0), "{coded:?}");
    assert_eq!(reach(snapshot, "keep_odd_interior").expect("it was scanned").verdict, "possible");
    check_what_is_held(snapshot, true);
}

/// Of these nothing may be called lost whatever the allocator. Its caches may hold on to them too, and then be named.
fn check_what_is_held(snapshot: &Snapshot, by_name: bool) {
    let of = |function: &str| reach(snapshot, function).unwrap_or_else(|| panic!("{function} was not scanned"));
    // What is lost in great number is found with every allocator.
    let lost = of("lose_many");
    let blocks = lost.lost.blocks + lost.indirectly_lost.blocks;
    assert!(lost.verdict == "definite" && blocks > 4000, "{lost:?}");
    // Something refers to them.
    for (function, blocks, held_by) in [
        ("keep_global_list", 29, "global global_list (shapes)"),
        ("keep_interior", 19, "global interior"),
        ("keep_on_stack", 13, "stack or thread-local memory of thread"),
        ("keep_thread_local", 13, ""),
        ("keep_in_epoll", 7, "data that the kernel keeps for epoll or a timer"),
        ("keep_shared", 7, "shared memory"),
        ("keep_frozen", 7, "memory that is not tracked"),
        ("keep_sealed", 7, "memory that is not tracked"),
        // Wherever the scan comes by, some are somewhere else.
        ("fill_rotated", 2000, "global rotated"),
    ] {
        let reach = of(function);
        assert_eq!((reach.verdict.as_str(), reach.reachable.blocks), ("reachable", blocks), "{function}: {reach:?}");
        let way = reach.way.as_deref().expect("there is a way");
        assert!(!by_name || way.starts_with(held_by), "{function}: {reach:?}");
    }
    // A table that grows, and a cache that drops its oldest entries.
    for (function, held_by) in [("insert", "global table"), ("cache_entry", "global ")] {
        let reach = of(function);
        assert_eq!((reach.verdict.as_str(), reach.lost.blocks), ("reachable", 0), "{function}: {reach:?}");
        assert!(reach.way.as_deref().is_some_and(|way| way.starts_with(held_by)), "{function}: {reach:?}");
    }
    let cache = of("cache_entry").way.expect("there is a way");
    assert!(cache.starts_with("global newest") || cache.starts_with("global oldest"), "{cache}");
}

// Lost, indirectly lost, ring, interior, global, stack, thread-local, kernel, shared, read-only, sealed, coded, freed later, growing,
// cached and moved blocks: each verdict right, the program unstopped. Only registers need the stop.
#[test]
fn every_shape_is_told_apart() {
    needs!(Feature::Bpf);
    for _ in 0..runs() {
        let (mut program, mut memleak, snapshot) = scanned_shapes();
        check_shapes(&snapshot);
        // A program cannot free what it has no pointer to: that it does shows that it hides its pointers.
        program.step("freed");
        let after = memleak.wait_until("refutations", |s| reach(s, "hide_turned").is_some_and(|r| r.refuted > 0));
        let hidden = reach(&after, "hide_turned").expect("it was scanned");
        assert_eq!((hidden.verdict.as_str(), hidden.refuted, hidden.called_lost), ("unknown", 31, 31), "{hidden:?}");
        let lost = reach(&after, "lose").expect("it was scanned");
        assert_eq!((lost.verdict.as_str(), lost.refuted), ("definite", 0), "{lost:?}");
    }
}

// Blocks that a thread has in registers only are found by a brief stop, which is measured and told; all others keep their
// verdicts, and the program runs on.
#[test]
fn a_brief_stop_finds_what_is_in_registers() {
    needs!(Feature::Bpf);
    if cfg!(not(target_arch = "x86_64")) {
        return;
    }
    for _ in 0..runs() {
        // A machine under load may need longer than 50 ms to get at every thread.
        let stop = ["reachability.stop=brief", "reachability.max_stop=500ms"];
        let (mut program, memleak, snapshot) = scanned(Program::start("shapes"), &stop);
        check_shapes(&snapshot);
        let held = reach(&snapshot, "fill_registers").expect("it was scanned");
        assert_eq!((held.verdict.as_str(), held.reachable.blocks), ("reachable", 9), "{held:?}");
        assert!(held.way.as_deref().is_some_and(|way| way.starts_with("register of thread")), "{held:?}");
        memleak.wait_for_message("it was stopped for");
        program.step("freed");
    }
}

// Without a stop nothing can be known of registers: the verdict is wrong there, which is why there is the setting.
#[test]
fn registers_are_out_of_sight_without_a_stop() {
    needs!(Feature::Bpf);
    if cfg!(not(target_arch = "x86_64")) {
        return;
    }
    let (_program, _memleak, snapshot) = scanned_shapes();
    let held = reach(&snapshot, "fill_registers").expect("it was scanned");
    assert_eq!((held.verdict.as_str(), held.reachable.blocks), ("definite", 0), "{held:?}");
}

/// State of a process in its status file, and who traces it.
fn status(pid: u32) -> (String, String) {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| {
        text.lines().find_map(|l| l.strip_prefix(name)).map(|rest| rest.trim().to_owned()).unwrap_or_default()
    };
    (field("State:"), field("TracerPid:"))
}

// Only one process can debug another: the stop is refused by name, and the scans without it go on.
#[test]
fn a_process_under_a_debugger_is_scanned_but_not_stopped() {
    needs!(Feature::Bpf);
    let program = Program::start("shapes");
    let pid = libc::pid_t::try_from(program.pid()).expect("a pid fits");
    // SAFETY: no memory is involved. This thread is the debugger until it ends; nothing is stopped by it.
    assert_eq!(unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) }, 0);
    let (_program, memleak, snapshot) = scanned(program, &["reachability.stop=brief"]);
    check_shapes(&snapshot);
    memleak.wait_for_message("it was not stopped");
    assert!(memleak.stderr().contains("is debugging it already"), "{}", memleak.stderr());
}

// Whatever happens to memleak while a process stands still, the process runs on.
#[test]
fn killing_memleak_during_a_stop_lets_the_process_run_on() {
    needs!(Feature::Bpf);
    let mut caught = 0;
    for _ in 0..10 {
        // Large, so that the copy takes a while.
        let mut program = Program::start_with("shapes", &["48"]);
        let args = ["reachability.automatic=false", "reachability.stop=brief", "reachability.max_stop=1s"];
        let args: Vec<&str> = args.iter().flat_map(|s| ["--set", s]).collect();
        let memleak = Memleak::watch_with(program.pid(), &args);
        program.step("done");
        std::thread::sleep(Duration::from_millis(1500));
        memleak.signal(libc::SIGUSR2);
        let deadline = Instant::now() + Duration::from_secs(60);
        let stopped = loop {
            let (state, _) = status(program.pid());
            if state.starts_with('t') {
                break true;
            }
            if memleak.stderr().contains("it was stopped for") || Instant::now() > deadline {
                break false;
            }
        };
        // Kills it at once.
        drop(memleak);
        // Its helper dies with it.
        let deadline = Instant::now() + Duration::from_secs(5);
        while !matches!(status(program.pid()), (state, tracer) if !state.starts_with('t') && tracer == "0") {
            assert!(Instant::now() < deadline, "{:?}", status(program.pid()));
            std::thread::sleep(Duration::from_millis(1));
        }
        program.step("freed");
        program.finish();
        caught += u32::from(stopped);
        if caught == 2 {
            return;
        }
    }
    panic!("memleak was never caught with the process stopped");
}

// What can be reached does not depend on the allocator, nor do losses in number. The newest blocks of each size may still be
// referenced by an allocator's own caches (jemalloc), or by each other through links that it left in them (tcmalloc, mimalloc).
fn shapes_with(library: &'static str) {
    needs!(Feature::Bpf, Feature::Library(library));
    let path = program_path("shapes").expect("it was built");
    let library = library_path(library).expect("the library is installed");
    let program = Program::start_command(Command::new(path).env("LD_PRELOAD", library));
    let (_program, _memleak, snapshot) = scanned(program, &[]);
    check_what_is_held(&snapshot, false);
}

#[test]
fn shapes_are_told_apart_with_jemalloc() {
    shapes_with("libjemalloc.so.2");
}

#[test]
fn shapes_are_told_apart_with_tcmalloc() {
    shapes_with("libtcmalloc.so.4");
}

#[test]
fn shapes_are_told_apart_with_mimalloc() {
    shapes_with("libmimalloc.so.2");
}

// `memleak scan` watches, scans once, tells verdicts and ways, and ends with 1 because something is lost.
#[test]
fn the_scan_command_tells_leaks_from_caches() {
    needs!(Feature::Bpf);
    for json in [false, true] {
        let mut program = Program::start("shapes");
        let pid = program.pid().to_string();
        let mut command = memleak_command();
        command.args(["scan", "-p", &pid, "--duration", "8s", "--set", "collector.budget=off"]);
        command.args(if json { &["--json"][..] } else { &["--set", "live.sites=0"] });
        let run = std::thread::spawn(move || output_within(&mut command));
        wait_for_probes(program.pid());
        program.step("done");
        let (code, stdout, stderr) = run.join().expect("memleak runs");
        assert_eq!(code, Some(1), "{stdout}\n{stderr}");
        if json {
            let line: Value = serde_json::from_str(&stdout).expect("a line of JSON");
            assert_eq!((&line["type"], &line["mode"]), (&"scan".into(), &"exact".into()));
            assert!(line["cost"]["scans"].as_u64() >= Some(3), "{line}");
            let lost: u64 = (line["sites"].as_array().expect("a list").iter())
                .filter(|s| s["frames"].to_string().contains("\"lose\""))
                .filter_map(|s| s["reachability"]["lost"]["blocks"].as_u64())
                .sum();
            assert_eq!(lost, 23, "{line}");
        } else {
            assert!(stdout.contains("every call was traced"), "{stdout}");
            assert!(stdout.contains("definite   lose (shapes.c:"), "{stdout}");
            assert!(stdout.contains("held by: global global_list (shapes)"), "{stdout}");
        }
    }
}

// Forbids tracing until the next boot: tests/vm/run.sh runs it on its own.
#[test]
#[ignore = "forbids ptrace for good: make test-kernels"]
fn forbidden_ptrace_is_named() {
    needs!(Feature::Bpf);
    let scope = Path::new("/proc/sys/kernel/yama/ptrace_scope");
    if let Err(error) = std::fs::write(scope, "3") {
        memleak_tests::skip(&format!("this kernel has no ptrace_scope: {error}"));
        return;
    }
    const WHY: &str = "kernel.yama.ptrace_scope is 3";
    let mut program = Program::start("shapes");
    let pid = program.pid().to_string();
    let (_, stdout, stderr) = output_within(memleak_command().args(["doctor", "-p", &pid]));
    assert!(stdout.contains(WHY), "{stdout}\n{stderr}");
    let mut command = memleak_command();
    command.args(["scan", "-p", &pid, "--duration", "8s", "--set", "collector.budget=off"]);
    let run = std::thread::spawn(move || output_within(&mut command));
    wait_for_probes(program.pid());
    program.step("done");
    let (code, stdout, stderr) = run.join().expect("memleak runs");
    assert_eq!(code, Some(2), "{stdout}\n{stderr}");
    assert!(stderr.contains(WHY), "{stdout}\n{stderr}");
}

/// Waits until breakpoints are in a process: its mapping of them is called `[uprobes]`; at the latest after some seconds.
fn wait_for_probes(pid: u32) {
    for _ in 0..100 {
        std::thread::sleep(Duration::from_millis(20));
        // The page is there from the first hit on only, so time must do.
        if std::fs::read_to_string(format!("/proc/{pid}/maps")).is_ok_and(|maps| maps.contains("[uprobes]")) {
            return;
        }
    }
}

// What cannot be scanned says why, and in the right words.
#[test]
fn scans_that_cannot_be_made_say_why() {
    needs!(Feature::Bpf);
    // Memory that is too large by the settings.
    let program = Program::start_with("shapes", &["64"]);
    let pid = program.pid().to_string();
    let small = ["scan", "-p", &pid, "--duration", "1s", "--set", "reachability.max_memory=1MiB"];
    let (code, stdout, stderr) = output_within(memleak_command().args(small));
    assert_eq!(code, Some(2), "{stdout}{stderr}");
    assert!(stderr.contains("reachability.max_memory"), "{stderr}");
    // A process that ends while it is watched.
    let sleep = |time: &str| Command::new("sleep").arg(time).spawn().expect("sleep starts");
    let mut child = sleep("6");
    let pid = child.id().to_string();
    let (code, _, stderr) = output_within(memleak_command().args(["scan", "-p", &pid, "--duration", "30s"]));
    child.wait().expect("our child");
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("no process was scanned: the processes have ended"), "{stderr}");
}

// A target that exits, runs another program, forks, and maps and unmaps memory while it is being read.
#[test]
fn targets_that_change_during_the_scan_do_no_harm() {
    needs!(Feature::Bpf);
    // Slow enough that the scan is under way whatever happens.
    let slow = ["reachability.automatic=false", "reachability.core_share=1%"];
    let args: Vec<&str> = slow.iter().flat_map(|s| ["--set", s]).collect();
    let mut killed = Program::start_with("shapes", &["64"]);
    let mut memleak = Memleak::watch_with(killed.pid(), &args);
    killed.step("done");
    memleak.settled();
    memleak.signal(libc::SIGUSR2);
    std::thread::sleep(Duration::from_millis(400));
    killed.kill();
    let outcome = memleak.outcome();
    assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);

    // exec
    let mut command = Command::new("sh");
    // SAFETY: nothing is called between fork and exec but what the standard library does itself.
    let mut shell = command.args(["-c", "sleep 2; exec sleep 30"]).process_group(0).spawn().expect("a shell starts");
    let memleak = Memleak::watch_with(shell.id(), &args);
    memleak.signal(libc::SIGUSR2);
    memleak.wait_for_message(&format!("ended {}", shell.id()));
    let outcome = memleak.stop();
    assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
    shell.kill().expect("our child");
    shell.wait().expect("our child");

    // fork, mmap and munmap all the time
    let churn = "import os,mmap\nwhile True:\n m=[mmap.mmap(-1,1<<22) for _ in range(8)]\n [x.write(b'x'*65536) for x in m]\n \
                 [x.close() for x in m]\n p=os.fork()\n if p==0: os._exit(0)\n os.waitpid(p,0)\n";
    let mut python = Command::new("python3").args(["-c", churn]).spawn().expect("python3 starts");
    std::thread::sleep(Duration::from_millis(300));
    let memleak = Memleak::watch_with(python.id(), &["--set", "reachability.automatic=false"]);
    for _ in 0..3 {
        memleak.signal(libc::SIGUSR2);
        std::thread::sleep(Duration::from_secs(1));
    }
    memleak.wait_for_message("told what it can still reach");
    let outcome = memleak.stop();
    python.kill().expect("our child");
    python.wait().expect("our child");
    assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
    let definite =
        |s: &Snapshot| s.sites.iter().any(|s| s.reachability.as_ref().is_some_and(|r| r.verdict == "definite"));
    assert!(!outcome.snapshots.iter().any(definite), "{}", outcome.stderr);
}

// A target of another user, in a user namespace of its own, is scanned all the same by root.
#[test]
fn targets_of_other_users_and_namespaces_are_scanned() {
    needs!(Feature::Bpf);
    let path = program_path("shapes").expect("it was built");
    let copy = tempfile::tempdir().expect("a folder can be made");
    let program = copy.path().join("shapes");
    std::fs::copy(path, &program).expect("the program can be copied");
    let open = |path: &Path| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(path, mode).expect("permissions can be set");
    };
    open(copy.path());
    open(&program);
    let mut other_user = Command::new(&program);
    other_user.uid(65_534).gid(65_534);
    let mut namespace = Command::new("unshare");
    namespace.args(["--user", "--map-root-user", "--mount"]).arg(&program);
    for mut command in [other_user, namespace] {
        let program = Program::start_command(&mut command);
        let (_program, _memleak, snapshot) = scanned(program, &[]);
        check_shapes(&snapshot);
    }
}

// `memleak doctor` says whether a scan is possible and what it takes; for a Go-like program it says why not.
#[test]
fn doctor_plans_a_scan() {
    needs!(Feature::Bpf);
    let program = Program::start_with("shapes", &["64"]);
    let pid = program.pid().to_string();
    let (code, stdout, stderr) = output_within(memleak_command().args(["doctor", "-p", &pid]));
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    let line = stdout.lines().find(|l| l.contains("can be scanned for leaks")).unwrap_or_else(|| panic!("{stdout}"));
    let mib: f64 = (line.split("scans of ").nth(1).and_then(|rest| rest.split(" MiB").next()))
        .and_then(|n| n.parse().ok())
        .unwrap_or_else(|| panic!("{line}"));
    assert!((64.0..80.0).contains(&mib), "{line}");
}

// Runtimes that move their objects, or pack what refers to them, are refused by name: everything would look lost.
#[test]
fn runtimes_that_move_objects_are_refused() {
    needs!(Feature::Bpf, Feature::Command("node"), Feature::Command("go"));
    let folder = tempfile::tempdir().expect("a folder can be made");
    let jvm = folder.path().join("libjvm.so");
    std::fs::copy(program_path("libpool.so").expect("it was built"), &jvm).expect("it can be copied");
    let mut node = Command::new("node");
    node.args(["-e", "setTimeout(() => {}, 60000)"]);
    // It waits for what comes from its input.
    let mut go = Command::new("go");
    go.args(["mod", "edit", "-json", "/dev/stdin"]).env("HOME", folder.path()).stdout(Stdio::null());
    let mut java = Command::new("sleep");
    java.arg("60").env("LD_PRELOAD", &jvm);
    for (mut command, runtime) in
        [(node, "the V8 engine of node"), (go, "the Go runtime"), (java, "the Java virtual machine")]
    {
        let mut child = command.stdin(Stdio::piped()).spawn().expect("it starts");
        // What it is shows when its libraries are mapped.
        std::thread::sleep(Duration::from_millis(500));
        let pid = child.id().to_string();
        let (_, stdout, stderr) = output_within(memleak_command().args(["doctor", "-p", &pid]));
        let expected = format!("no verdict on leak or cache: failed to scan process {pid}: {runtime} moves");
        assert!(stdout.contains(&expected), "{runtime}: {stdout}{stderr}");
        child.kill().expect("our child");
        child.wait().expect("our child");
    }
}

// Without CAP_SYS_PTRACE a process with more rights cannot be read; what is missing is said by name.
#[test]
fn what_a_scan_lacks_is_named() {
    needs!(Feature::Bpf, Feature::Command("setpriv"));
    let program = Program::start("shapes");
    let pid = program.pid().to_string();
    let mut command = Command::new("setpriv");
    command.args(["--inh-caps=-sys_ptrace", "--bounding-set=-sys_ptrace"]).arg(memleak_command().get_program());
    let (_, stdout, stderr) = output_within(command.args(["doctor", "-p", &pid]));
    assert!(format!("{stdout}{stderr}").contains("CAP_SYS_PTRACE"), "{stdout}{stderr}");
}

// With more blocks than a scan may judge, those of suspected sites come first, and it is told.
#[test]
fn suspects_come_first_when_there_are_too_many_blocks() {
    needs!(Feature::Bpf);
    let rules = tempfile::tempdir().expect("a folder can be made");
    let rule = "return { name = 'ask', description = 'asks', params = {}, evaluate = function(site, p)\n\
                if site.outstanding_count == 5000 then return { scan = true } end end }";
    std::fs::write(rules.path().join("ask.lua"), rule).expect("the rule can be written");
    let mut program = Program::start("shapes");
    let dir = rules.path().to_str().expect("it is text");
    let settings = ["reachability.automatic=false", "reachability.every=2s", "reachability.max_blocks=6000"];
    let mut args: Vec<&str> = settings.iter().flat_map(|s| ["--set", s]).collect();
    args.extend(["--rules", dir]);
    let mut memleak = Memleak::watch_with(program.pid(), &args);
    memleak.settled();
    program.step("done");
    let snapshot =
        memleak.wait_until("a scan of suspects", |s| reach(s, "lose_many").is_some_and(|r| r.verdict == "definite"));
    memleak.wait_for_message("only those of suspected sites were judged");
    assert!(reach(&snapshot, "insert").is_none() && reach(&snapshot, "lose").is_none());
}

// A rule may ask for a scan of the process before it makes up its mind, also where scans are not automatic.
#[test]
fn a_rule_may_ask_for_a_scan() {
    needs!(Feature::Bpf);
    let rules = tempfile::tempdir().expect("a folder can be made");
    let rule = "return { name = 'ask', description = 'asks', params = {}, evaluate = function(site, p)\n\
                if not site.reachability or site.reachability.verdict == 'unknown' then return { scan = true } end\n\
                if site.reachability.verdict == 'definite' then\n\
                return { severity = 'info', confidence = 0.5, reason = 'it is lost' } end end }";
    std::fs::write(rules.path().join("ask.lua"), rule).expect("the rule can be written");
    let mut program = Program::start("shapes");
    let dir = rules.path().to_str().expect("it is text");
    let args = ["--set", "reachability.automatic=false", "--set", "reachability.every=2s", "--rules", dir];
    let mut memleak = Memleak::watch_with(program.pid(), &args);
    program.step("done");
    memleak.wait_until("a scan that a rule asked for", |s| reach(s, "lose").is_some_and(|r| r.lost.blocks == 23));
}
