//! The kernel's own allocations, live on this machine: a program has the kernel allocate a known number of blocks.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use memleak_tests::{Counts, Feature, Memleak, Program, memleak_command, needs, output_within};
use serde_json::Value;

/// As in the program: event counters that are kept, and that are closed again.
const KEPT: u64 = 211;
const CLOSED: u64 = 307;

/// The promise in short: what the kernel allocates for a program is counted exactly, by call stack, with names.
#[test]
fn kernel_allocations_of_a_process_are_counted_exactly() {
    needs!(Feature::Bpf);
    let mut program = Program::start("eventfds");
    let pid = program.pid().to_string();
    let mut memleak = Memleak::kernel(&["-p", &pid, "--probe-set", "kernel-slab"]);
    program.step("done");
    let snapshot = memleak.settled();
    let contexts = |s: &memleak_tests::SiteView| s.caller() == Some("do_eventfd") && s.function == "kmalloc";
    let sites: Vec<_> = snapshot.sites.iter().filter(|s| contexts(s)).collect();
    assert!(!sites.is_empty(), "{:#?}", snapshot.callers());
    let size = sites[0].counts.allocated_bytes / sites[0].counts.allocated_count;
    let expected = Counts::kept(KEPT, size).plus(Counts::freed(CLOSED, size));
    assert_eq!(snapshot.sum(contexts), expected, "{:#?}", snapshot.callers());
    for site in sites {
        let kernel = site.kernel.as_ref().expect("a site of the kernel");
        assert_eq!(site.pid, 0);
        assert!(kernel.cache.as_deref().is_some_and(|c| c.starts_with("kmalloc-")), "{kernel:?}");
        assert_eq!(kernel.slack_bytes, (kernel.object_bytes - size) * site.counts.outstanding_count);
        assert_eq!(kernel.first_comm, "eventfds");
        assert!(site.frames.iter().all(|f| f.module.as_deref() == Some("vmlinux")), "{:?}", site.frames);
        assert!(site.passes("do_syscall_64"), "{:?}", site.frames);
    }
    program.finish();
    let freed = memleak.wait_until("the kernel to free", |s| s.sum(contexts).outstanding_count == 0);
    assert_eq!(freed.sum(contexts).freed_count, KEPT + CLOSED);
    let process = freed.process(0);
    assert_eq!((process.comm.as_str(), process.mode.as_str()), ("kernel", "exact"));
}

/// Runs `memleak kernel` with these arguments; it must refuse and say all of these words.
fn refuses(args: &[&str], words: &[&str]) {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let mut command = memleak_command();
    command.current_dir(folder.path()).arg("kernel").args(args).args(["--duration", "1s"]);
    let (code, _, stderr) = output_within(&mut command);
    assert_eq!(code, Some(2), "exit code of {args:?}\n{stderr}");
    for word in words {
        assert!(stderr.contains(word), "`{word}` is missing in:\n{stderr}");
    }
}

/// A filter that matches nothing, silently, would pass for a kernel without leaks.
#[test]
fn wrong_settings_of_the_kernel_are_named_with_what_would_be_right() {
    refuses(&["--backend", "tracepiont"], &["tracepiont", "did you mean \"tracepoint\"?"]);
    refuses(&["--probe-set", "kernel-slub"], &["kernel-slub", "kernel-slab"]);
    refuses(&["--set", "kernel.max_sites=0"], &["kernel.max_sites", "out of range"]);
    needs!(Feature::Bpf);
    refuses(&["--gfp", "__GFP_ACOUNT"], &["__GFP_ACOUNT"]);
    refuses(&["--cgroup", "no/such/group"], &["/sys/fs/cgroup/no/such/group", "kernel.cgroup"]);
}

/// A cache that does not exist may come with a module; a slip of the pen should not go unnoticed for a night.
#[test]
fn cache_that_there_is_not_is_said() {
    needs!(Feature::Bpf);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let mut command = memleak_command();
    command.current_dir(folder.path()).args(["kernel", "--cache", "flip", "--cache", "fil*", "--duration", "1s"]);
    let (code, _, stderr) = output_within(&mut command);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("no slab cache is called flip now; did you mean filp?"), "{stderr}");
    assert!(!stderr.contains("fil*"), "{stderr}");
}

/// Where a way to attach does not work, memleak says so; it never runs without seeing anything.
#[test]
fn a_backend_that_does_not_work_is_named() {
    needs!(Feature::Bpf);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let (_, doctor, _) = output_within(memleak_command().current_dir(folder.path()).arg("doctor"));
    assert!(doctor.contains("kernel-slab: works in the kernel, by tracepoint"), "{doctor}");
    if doctor.contains("frees by RCU and of many blocks at a time are not seen") {
        refuses(&["--backend", "kprobe"], &["nothing of the kernel can be followed", "kernel-slab", "kprobe"]);
    }
}

/// Filters narrow what is shown, and a budget of next to nothing is kept by recording less.
#[test]
fn filters_and_budget_of_the_kernel_hold() {
    needs!(Feature::Bpf);
    let mut program = Program::start("eventfds");
    let mut memleak = Memleak::kernel(&["--cache", "filp", "--set", "kernel.budget=0.001%"]);
    program.step("done");
    let sampled = memleak.wait_until("sampling", |s| s.processes.iter().any(|p| p.mode == "sampled" && p.alive));
    assert!(sampled.sites.iter().all(|s| s.kernel.as_ref().is_some_and(|k| k.cache.as_deref() == Some("filp"))));
    program.finish();
    assert!(memleak.stderr().contains("would exceed the budget"), "{}", memleak.stderr());
}

/// A trace shows each allocation and free once: who, what, when, and from where.
#[test]
fn trace_of_the_kernel_prints_every_event() {
    needs!(Feature::Bpf);
    let mut program = Program::start("eventfds");
    let pid = program.pid();
    let folder = tempfile::tempdir().expect("a folder can be made");
    let mut memleak = memleak_command()
        .current_dir(folder.path())
        .args([
            "kernel",
            "--trace",
            "--json",
            "--probe-set",
            "kernel-slab",
            "--duration",
            "60s",
            "-p",
            &pid.to_string(),
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("memleak starts");
    // It says what it watches once it is attached.
    let mut said = String::new();
    let mut stderr = BufReader::new(memleak.stderr.take().expect("piped"));
    while !said.contains("kernel-slab") {
        assert!(stderr.read_line(&mut said).expect("messages are text") > 0, "ended: {said}");
    }
    let lines = BufReader::new(memleak.stdout.take().expect("piped")).lines();
    program.step("done");
    let mut program = Some(program);
    let (mut allocations, mut frees) = (Vec::new(), 0);
    for line in lines {
        let line = line.expect("events are text");
        let event: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
        if event["frames"][0]["function"] != "do_eventfd" || event["function"] == "kmem_cache_alloc" {
            continue;
        }
        match event["type"].as_str() {
            Some("alloc") => allocations.push(event),
            Some("free") => {
                assert!(event["lifetime_ns"].as_u64().is_some_and(|ns| ns > 0), "{event}");
                frees += 1;
                // The others are freed when the program ends.
                if frees == CLOSED
                    && let Some(program) = program.take()
                {
                    program.finish();
                }
            }
            other => panic!("{other:?}: {event}"),
        }
        if frees == CLOSED + KEPT {
            break;
        }
    }
    // Ends at its next line: nobody reads them any more.
    let _ = memleak.kill();
    let _ = memleak.wait();
    assert_eq!((allocations.len() as u64, frees), (KEPT + CLOSED, KEPT + CLOSED));
    for event in &allocations {
        assert_eq!((&event["pid"], &event["tid"], &event["comm"]), (&pid.into(), &pid.into(), &"eventfds".into()));
        let kernel = &event["kernel"];
        assert!(kernel["cache"].as_str().is_some_and(|c| c.starts_with("kmalloc-")), "{event}");
        assert!(kernel["object_bytes"].as_u64() >= event["size"].as_u64(), "{event}");
        assert!(kernel["gfp"].as_str().is_some_and(|g| !g.is_empty()) && kernel["cgroup"].is_u64(), "{event}");
    }
}
