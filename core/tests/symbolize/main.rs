//! Call stacks of real processes: names, lines, inlined calls and identities, in all the states that production has.

mod debuginfod;
mod program;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use memleak_core::maps::Maps;
use memleak_core::process::ProcDir;
use memleak_core::snapshot::{Process, Site, SiteKey};
use memleak_core::symbolize::{Frame, Limits, ModuleName, Symbolizer, site_id};
use program::{Folder, Running, line, run};

/// Function, source line and the flag of each frame up to and including `main`.
fn brief(frames: &[Frame]) -> Vec<(&str, Option<u32>, bool)> {
    let end = frames.iter().position(|f| f.function.as_deref() == Some("main")).map_or(frames.len(), |i| i + 1);
    frames[..end].iter().map(|f| (f.function.as_deref().unwrap_or("?"), f.line, f.inlined)).collect()
}

fn with_lines() -> Vec<(&'static str, Option<u32>, bool)> {
    vec![
        ("innermost", Some(line("stack.c", "innermost")), true),
        ("middle", Some(line("stack.c", "middle")), true),
        ("outer", Some(line("stack.c", "outer")), false),
        ("main", Some(line("stack.c", "main")), false),
    ]
}

fn without_lines() -> Vec<(&'static str, Option<u32>, bool)> {
    vec![("outer", None, false), ("main", None, false)]
}

/// As in a run: debug information is read in a worker.
fn limits() -> Limits {
    Limits { worker: Some(env!("CARGO_BIN_EXE_memleak").into()), ..Limits::default() }
}

/// Observes a process as instance 1.
fn observed(process: &Arc<Process>) -> Symbolizer {
    let mut symbolizer = Symbolizer::with_limits(limits());
    symbolizer.observe(process).expect("observed");
    symbolizer
}

fn site(process: &Arc<Process>, addresses: Vec<u64>) -> Site {
    Site {
        key: SiteKey { instance: process.instance, probe_set: 0, stack: 0 },
        id: 0,
        process: process.clone(),
        probe_set: "glibc".into(),
        function: "malloc".into(),
        addresses,
        truncated: None,
        first_thread: None,
        frames: std::sync::OnceLock::new(),
    }
}

/// The heart of a report: every call, inlined ones included, with its own line.
#[test]
fn functions_lines_and_inlined_calls_are_exact() {
    let folder = Folder::new();
    let exe = folder.program("stack", &["-g"]);
    let mut running = Running::start(&exe, &[]);
    let process = running.process(1);
    let mut symbolizer = observed(&process);
    let site = site(&process, running.ask("stack"));
    symbolizer.symbolize(&site);
    let frames = site.frames();
    assert_eq!(brief(frames), with_lines());
    for frame in &frames[..4] {
        assert_eq!(frame.module.as_deref(), exe.to_str());
        assert!(frame.file.as_deref().expect("file").ends_with("tests/symbolize/stack.c"), "{frame:?}");
        assert_eq!(frame.reason, None);
        assert_eq!(frame.build_id.as_deref().map(str::len), Some(40));
    }
    // The three frames of the first address share it; it is shown as it is, not as it was looked up.
    assert_eq!(frames[..4].iter().map(|f| f.address).collect::<Vec<_>>(), {
        let (first, second) = (site.addresses[0], site.addresses[1]);
        vec![first, first, first, second]
    });
    assert!((1..200).contains(&frames[2].offset), "{:?}", frames[2]);
    // main's caller is in the C library, which has no separate debug information here or has it: named either way.
    let rest = &frames[4..];
    assert!(rest.iter().any(|f| f.module.as_deref().is_some_and(|m| m.contains("libc.so"))), "{rest:?}");
    assert!(rest.iter().any(|f| f.function.as_deref().is_some_and(|n| n.contains("libc_start"))), "{rest:?}");
}

/// Symbolizing is slow; it must happen once, and never undo what is there.
#[test]
fn a_site_with_frames_is_left_alone() {
    let process = Arc::new(Process { instance: 1, ..Process::default() });
    let site = site(&process, vec![1, 2]);
    site.frames.set(Vec::new()).expect("empty");
    Symbolizer::new().symbolize(&site);
    assert!(site.frames().is_empty());
}

/// Without debug information the symbol table still names the functions.
#[test]
fn a_symbol_table_alone_gives_functions() {
    let folder = Folder::new();
    let mut running = Running::start(&folder.program("stack", &["-g0"]), &[]);
    let frames = observed(&running.process(1)).frames(1, &running.ask("stack"));
    assert_eq!(brief(&frames), without_lines());
    assert!(frames[0].file.is_none());
}

/// A stripped program cannot be named, but module and offset let somebody with its symbols do so later.
#[test]
fn a_stripped_program_gives_module_offset_and_the_reason() {
    let folder = Folder::new();
    let exe = folder.program("stack", &["-s"]);
    let mut running = Running::start(&exe, &[]);
    let process = running.process(1);
    let addresses = running.ask("stack");
    let frames = observed(&process).frames(1, &addresses);
    assert_eq!(frames[0].function, None);
    assert_eq!(frames[0].module.as_deref(), exe.to_str());
    assert_eq!(frames[0].reason.as_deref(), Some("symbolization source has no or no relevant symbols"));
    let dir = ProcDir::open(process.pid).expect("runs");
    let maps = Maps::read(&dir).expect("runs");
    let mapping = maps.find(addresses[0]).expect("mapped");
    assert_eq!(frames[0].offset, addresses[0] - mapping.start + mapping.offset);
}

/// Distributions ship debug information apart: by build id in a folder for all, or by name beside the program.
#[test]
fn separate_debug_information_is_found_by_build_id_and_by_link() {
    let folder = Folder::new();
    let exe = folder.program("stack", &["-g", "-gz"]);
    let debug = folder.path("stack.debug");
    run(Command::new("objcopy").arg("--only-keep-debug").args([&exe, &debug]));
    run(Command::new("strip").arg(&exe));
    let frames_with = |exe: &Path, limits: Limits| {
        let mut running = Running::start(exe, &[]);
        let mut symbolizer = Symbolizer::with_limits(limits);
        symbolizer.observe(&running.process(1)).expect("observed");
        symbolizer.frames(1, &running.ask("stack"))
    };
    let none = frames_with(&exe, limits());
    assert_eq!(none[0].function, None);

    let id = none[0].build_id.clone().expect("build id");
    let by_id = folder.path("debug/.build-id").join(&id[..2]);
    std::fs::create_dir_all(&by_id).expect("folder");
    std::fs::copy(&debug, by_id.join(format!("{}.debug", &id[2..]))).expect("copy");
    let by_id_limits = Limits { debug_dirs: vec![folder.path("debug")], ..limits() };
    assert_eq!(brief(&frames_with(&exe, by_id_limits.clone())), with_lines());

    // A file that anybody may write is copied instead of mapped; the names are the same.
    run(Command::new("chmod").arg("666").arg(by_id.join(format!("{}.debug", &id[2..]))));
    assert_eq!(brief(&frames_with(&exe, by_id_limits.clone())), with_lines());

    // Debug information of another build has the wrong names and must not be used.
    let other = folder.program("other", &["-g", "-DSTAY="]);
    std::fs::copy(&other, by_id.join(format!("{}.debug", &id[2..]))).expect("copy");
    assert_eq!(frames_with(&exe, by_id_limits)[0].function, None);

    let linked = folder.program("linked", &["-g", "-Wl,--build-id=none"]);
    let debug = folder.path("linked.debug");
    run(Command::new("objcopy").arg("--only-keep-debug").args([&linked, &debug]));
    run(Command::new("strip").arg(&linked));
    run(Command::new("objcopy").arg(format!("--add-gnu-debuglink={}", debug.display())).arg(&linked));
    let frames = frames_with(&linked, limits());
    assert_eq!(brief(&frames), with_lines());
    assert_eq!(frames[0].build_id, None);
    // One byte more, and it is not the file that was linked.
    std::fs::OpenOptions::new()
        .append(true)
        .open(&debug)
        .and_then(|mut f| std::io::Write::write_all(&mut f, b"x"))
        .expect("append");
    assert_eq!(frames_with(&linked, limits())[0].function, None);
}

/// A service is often replaced on disk while it runs, and started from files that are gone at once.
#[test]
fn a_deleted_executable_still_has_names() {
    let folder = Folder::new();
    let exe = folder.program("stack", &["-g"]);
    let mut running = Running::start(&exe, &[]);
    let addresses = running.ask("stack");
    std::fs::remove_file(&exe).expect("remove");
    std::fs::write(&exe, "another file").expect("write");
    let process = running.process(1);
    assert_eq!(Path::new(&process.exe), exe);
    let frames = observed(&process).frames(1, &addresses);
    assert_eq!(brief(&frames), with_lines());
    assert_eq!(frames[0].module.as_deref(), exe.to_str(), "without the kernel's mark");
}

/// After an upgrade the path leads to the new library; names must come from the old one, which is what runs.
#[test]
fn a_library_that_was_replaced_keeps_its_old_names() {
    let folder = Folder::new();
    let exe = folder.program("stack", &[]);
    let library = folder.plugin("plugin.so", &["-g"]);
    let next = folder.plugin("next.so", &["-g", "-DPADDING"]);
    let mut running = Running::start(&exe, &[&library]);
    let address = running.ask("plugin");
    std::fs::rename(&next, &library).expect("rename");
    let frames = observed(&running.process(1)).frames(1, &address);
    assert_eq!(brief(&frames), [("plugin_call_itself", Some(line("plugin.c", "plugin")), false)]);
    // The next start has the new one.
    let mut running = Running::start(&exe, &[&library]);
    let address = running.ask("plugin");
    assert_eq!(brief(&observed(&running.process(1)).frames(1, &address))[0].0, "other_name");
}

/// A library that shrinks under our reading must cost its names at most, never the collector.
#[test]
fn a_library_that_was_cut_short_gives_a_reason() {
    let folder = Folder::new();
    let exe = folder.program("stack", &[]);
    let library = folder.plugin("plugin.so", &["-g"]);
    let mut running = Running::start(&exe, &[&library]);
    let address = running.ask("plugin");
    let process = running.process(1);
    let mut symbolizer = observed(&process);
    std::fs::OpenOptions::new().write(true).open(&library).and_then(|f| f.set_len(100)).expect("cut");
    let frames = symbolizer.frames(1, &address);
    assert_eq!(frames[0].function, None);
    assert_eq!(frames[0].module.as_deref(), library.to_str());
    assert_eq!(frames[0].reason.as_deref(), Some("failed to read an ELF file: its section table is malformed"));
}

/// Short-lived programs end before a rule looks at their sites; a container takes its files along.
#[test]
fn a_process_that_has_ended_still_has_names() {
    let folder = Folder::new();
    let exe = folder.program("stack", &["-g"]);
    let library = folder.plugin("plugin.so", &["-g"]);
    let mut running = Running::start(&exe, &[&library]);
    let mut symbolizer = observed(&running.process(1));
    let stack = running.ask("stack");
    let plugin = running.ask("plugin");
    // As for every new site; it notices what was loaded since.
    symbolizer.normalize(1, &[stack.clone(), plugin.clone()].concat());
    running.end();
    std::fs::remove_file(&exe).expect("remove");
    std::fs::remove_file(&library).expect("remove");
    assert_eq!(brief(&symbolizer.frames(1, &stack)), with_lines());
    assert_eq!(brief(&symbolizer.frames(1, &plugin))[0].0, "plugin_call_itself");
    assert!(matches!(symbolizer.normalize(1, &plugin)[0].module, ModuleName::BuildId(_)));
    assert!(!symbolizer.refresh(1).expect("observed"), "nothing is read from a later process with that pid");
    symbolizer.purge(1);
    let frames = symbolizer.frames(1, &plugin);
    assert_eq!(frames[0].reason.as_deref(), Some("the memory map of the process is not known"));
    assert_eq!(frames[0].offset, plugin[0]);
}

/// Findings keep their history across restarts: randomised addresses must not show in the identity of a site.
#[test]
fn a_restart_does_not_change_the_identity_of_a_site() {
    let folder = Folder::new();
    for flags in [&["-g"][..], &["-Wl,--build-id=none"]] {
        let exe = folder.program("stack", flags);
        let once = || {
            let mut running = Running::start(&exe, &[]);
            let process = running.process(1);
            let mut symbolizer = observed(&process);
            let stack = running.ask("stack");
            let frames = symbolizer.normalize(1, &stack);
            assert_eq!(frames.len(), stack.len());
            (stack[0], site_id(&process.exe, "glibc", "malloc", &frames), frames[0].module.clone())
        };
        let ((first_address, first, module), mut second) = (once(), once());
        for _ in 0..10 {
            if second.0 != first_address {
                break;
            }
            second = once();
        }
        assert_ne!(second.0, first_address, "addresses are randomised");
        assert_eq!(first, second.1);
        assert_eq!(matches!(module, ModuleName::BuildId(_)), flags[0] == "-g");
        assert!(
            matches!(&module, ModuleName::BuildId(_))
                || module == ModuleName::Path(exe.to_str().expect("UTF-8").into())
        );
    }
}

/// Plugins come and go; a site in one that was unloaded is exactly what one wants to find.
#[test]
fn libraries_that_come_and_go_are_noticed() {
    let folder = Folder::new();
    let library = folder.plugin("plugin.so", &["-g"]);
    let mut running = Running::start(&folder.program("stack", &[]), &[]);
    running.ask("stack");
    let mut symbolizer = observed(&running.process(1));
    assert!(!symbolizer.refresh(1).expect("observed"));
    running.ask(library.to_str().expect("UTF-8"));
    let address = running.ask("plugin");
    let loaded = symbolizer.normalize(1, &address);
    assert!(matches!(loaded[0].module, ModuleName::BuildId(_)), "{loaded:?}");
    running.ask("unload");
    assert!(symbolizer.refresh(1).expect("observed"));
    assert_eq!(symbolizer.normalize(1, &address), loaded);
    assert_eq!(brief(&symbolizer.frames(1, &address))[0].0, "plugin_call_itself");
}

/// After exec the pid belongs to another program, whose map must not be taken for the old one's.
#[test]
fn a_program_that_called_exec_is_not_read_again() {
    let folder = Folder::new();
    let exe = folder.program("stack", &[]);
    let mut command = Command::new("bash");
    command.args(["-c", "read line; exec \"$0\""]).arg(&exe);
    let mut running = Running::spawn(&mut command);
    let shell = running.process(1);
    assert!(shell.exe.ends_with("bash"), "{}", shell.exe);
    let mut symbolizer = observed(&shell);
    // The shell takes the first line, the program answers the second.
    let stack = running.ask("\nstack");
    assert!(!symbolizer.refresh(1).expect("observed"));
    let frames = symbolizer.frames(1, &stack);
    assert_ne!(frames[0].function.as_deref(), Some("outer"));
    // As a new instance it is read.
    symbolizer.observe(&running.process(2)).expect("observed");
    assert_eq!(brief(&symbolizer.frames(2, &stack)), without_lines());
}

/// A container's files are not at their paths here, and after its end they are nowhere.
#[test]
fn a_program_in_another_mount_namespace_has_names() {
    let folder = Folder::new();
    let exe = folder.program("stack", &["-g"]);
    let inside = folder.path("inside");
    std::fs::create_dir(&inside).expect("folder");
    let hidden = inside.join("stack");
    let script = "mount -t tmpfs none \"$1\" && cp \"$0\" \"$1/stack\" && exec \"$1/stack\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).args([&exe, &inside]);
    if !Command::new("unshare").args(["--mount", "true"]).output().is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: no privilege to make a mount namespace");
        return;
    }
    let mut running = Running::spawn(&mut command);
    let stack = running.ask("stack");
    assert!(!hidden.exists());
    let process = running.process(1);
    assert_eq!(Path::new(&process.exe), hidden);
    let mut symbolizer = observed(&process);
    running.end();
    let frames = symbolizer.frames(1, &stack);
    assert_eq!(brief(&frames), with_lines());
    assert_eq!(frames[0].module.as_deref(), hidden.to_str());
}

/// Generated code has names in a file that the run time writes, in its own pid's name, in its own /tmp.
#[test]
fn generated_code_is_named_by_its_perf_map() {
    let folder = Folder::new();
    let exe = folder.program("stack", &[]);
    let mut running = Running::start(&exe, &[]);
    let mut symbolizer = observed(&running.process(1));
    let address = running.ask("generated");
    let normalized = symbolizer.normalize(1, &address);
    let name = "jit:<b>\x1b[1m name with spaces";
    assert_eq!((&normalized[0].module, normalized[0].offset), (&ModuleName::Generated(name.into()), 6));
    let frames = symbolizer.frames(1, &address);
    assert_eq!(frames[0].function.as_deref(), Some(name));
    assert_eq!((frames[0].module.as_deref(), frames[0].offset), (None, 6));

    // A map that somebody else has put there is not believed.
    let pid = running.pid();
    if std::os::unix::fs::chown(format!("/tmp/perf-{pid}.map"), Some(65_534), None).is_err() {
        eprintln!("skipped in part: no privilege to give a file away");
        return;
    }
    let mut symbolizer = observed(&running.process(1));
    let frames = symbolizer.frames(1, &address);
    let reason = "the memory belongs to no file, and no perf map names the address";
    assert_eq!((frames[0].function.as_deref(), frames[0].reason.as_deref()), (None, Some(reason)));
    assert_eq!(symbolizer.normalize(1, &address)[0].module, ModuleName::Anonymous);
}

/// In a container the process has another pid and another /tmp than we see.
#[test]
fn a_perf_map_is_found_in_a_container() {
    let folder = Folder::new();
    let exe = folder.program("stack", &[]);
    let unshare = ["--mount", "--pid", "--fork", "--kill-child"];
    if !Command::new("unshare").args(unshare).arg("true").output().is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: no privilege to make namespaces");
        return;
    }
    // The program lies in /tmp itself, which is about to be covered.
    let script = "mount -t tmpfs none /mnt && cp \"$0\" /mnt/stack && mount -t tmpfs none /tmp && exec /mnt/stack";
    let mut command = Command::new("unshare");
    command.args(unshare).args(["sh", "-c", script]).arg(&exe);
    let mut running = Running::spawn(&mut command);
    let address = running.ask("generated");
    // The child of `unshare` is the program.
    let children = format!("/proc/{0}/task/{0}/children", running.pid());
    let pid: u32 = std::fs::read_to_string(children).expect("runs").trim().parse().expect("one child");
    assert!(!Path::new("/tmp/perf-1.map").exists());
    let process = memleak_core::process::ProcessStat::read(pid).expect("runs").to_process(1);
    let frames = observed(&Arc::new(process)).frames(1, &address);
    assert_eq!(frames[0].function.as_deref(), Some("jit:<b>\x1b[1m name with spaces"));
}

/// Addresses in memory without code are damage of the stack; they are shown as what they are.
#[test]
fn addresses_outside_of_code_say_what_they_are() {
    let folder = Folder::new();
    let mut running = Running::start(&folder.program("stack", &[]), &[]);
    running.ask("stack");
    let process = running.process(1);
    let mut symbolizer = observed(&process);
    let maps = Maps::read(&ProcDir::open(process.pid).expect("runs")).expect("runs");
    let stack = maps.iter().find(|m| m.name().as_deref() == Some("[stack]")).expect("has a stack");
    let data = maps.iter().find(|m| !m.perms.execute && m.inode != 0).expect("has read-only data");
    let frames = symbolizer.frames(1, &[stack.start + 8, data.start + 8, 0, 1, u64::MAX]);
    assert_eq!(frames[0].module.as_deref(), Some("[stack]"));
    assert_eq!(frames[0].reason.as_deref(), Some("the memory is [stack], which has no symbols"));
    assert_eq!(frames[1].function, None);
    // Code was there, so that file is no more: its name would be a wrong one, and become part of the site's identity.
    assert_eq!(frames[1].module, None);
    for frame in &frames[2..] {
        assert_eq!(frame.reason.as_deref(), Some("nothing is known to be mapped at the address"));
        assert_eq!((frame.module.as_deref(), frame.offset), (None, frame.address));
    }
    assert_eq!(frames.len(), 5);
}

/// The kernel's own code in every process has names too.
#[test]
fn the_vdso_has_names() {
    let folder = Folder::new();
    let running = Running::start(&folder.program("stack", &[]), &[]);
    let process = running.process(1);
    let mut symbolizer = observed(&process);
    let maps = Maps::read(&ProcDir::open(process.pid).expect("runs")).expect("runs");
    let Some(vdso) = maps.iter().find(|m| m.name().as_deref() == Some("[vdso]")) else {
        eprintln!("skipped: this kernel maps no vdso");
        return;
    };
    let addresses: Vec<u64> = (vdso.start..vdso.end).step_by(64).collect();
    let frames = symbolizer.frames(1, &addresses);
    let named = frames.iter().filter_map(|f| f.function.as_deref()).any(|n| n.contains("clock_gettime"));
    assert!(named, "{:?}", frames[0]);
    assert!(frames.iter().filter(|f| f.function.is_some()).all(|f| f.module.as_deref() == Some("[vdso]")));
}

/// Paths are chosen by whoever runs the program; they are kept as they are, for the outputs to escape.
#[test]
fn a_hostile_path_is_kept_as_it_is() {
    let folder = Folder::new();
    let exe = folder.path("<script>\"'\n\x1b[2J&(deleted)");
    std::fs::rename(folder.program("stack", &["-g"]), &exe).expect("rename");
    let mut running = Running::start(&exe, &[]);
    let process = running.process(1);
    assert_eq!(Path::new(&process.exe), exe);
    let frames = observed(&process).frames(1, &running.ask("stack"));
    assert_eq!(brief(&frames), with_lines());
    assert_eq!(frames[0].module.as_deref(), exe.to_str());
}

/// A debug build of a large service exceeds any bound; its functions must still have names.
#[test]
fn debug_information_beyond_the_bound_costs_only_lines() {
    let folder = Folder::new();
    let types = folder.path("types.h");
    let text: String = (0..5_000).map(|i| format!("struct type_{i} {{ struct type_{i} *next; }};\n")).collect();
    std::fs::write(&types, text).expect("write");
    let include = types.to_str().expect("UTF-8");
    let exe = folder.program("stack", &["-g", "-fno-eliminate-unused-debug-types", "-include", include]);
    let mut running = Running::start(&exe, &[]);
    let stack = running.ask("stack");
    let frames_within = |module_bytes| {
        let mut symbolizer = Symbolizer::with_limits(Limits { module_bytes, ..limits() });
        symbolizer.observe(&running.process(1)).expect("observed");
        symbolizer.frames(1, &stack[..2])
    };
    assert_eq!(brief(&frames_within(1 << 20)), with_lines());
    assert_eq!(brief(&frames_within(64 << 10)), without_lines());
    let frames = frames_within(100);
    assert_eq!(frames[0].reason.as_deref(), Some("failed to read an ELF file: its symbols are larger than 100 bytes"));
}

/// With all descriptors in use, files are opened again when they are needed.
#[test]
fn no_room_for_open_files_costs_nothing_while_the_process_runs() {
    let folder = Folder::new();
    let exe = folder.program("stack", &["-g"]);
    let mut running = Running::start(&exe, &[]);
    let stack = running.ask("stack");
    let mut symbolizer = Symbolizer::with_limits(Limits { open_files: 0, total_bytes: 0, ..limits() });
    symbolizer.observe(&running.process(1)).expect("observed");
    assert_eq!(brief(&symbolizer.frames(1, &stack)), with_lines());
    running.end();
    std::fs::remove_file(&exe).expect("remove");
    assert_eq!(brief(&symbolizer.frames(1, &stack)), with_lines(), "answers are kept");
    let other = stack[0] - 1;
    assert_eq!(symbolizer.frames(1, &[other])[0].reason.as_deref(), Some("the file is out of reach"));
}

/// Two processes of one program share what is read; forgetting one must not take it from the other.
#[test]
fn processes_share_modules_and_are_forgotten_apart() {
    let folder = Folder::new();
    let exe = folder.program("stack", &["-g"]);
    let (mut one, mut two) = (Running::start(&exe, &[]), Running::start(&exe, &[]));
    let mut symbolizer = Symbolizer::new();
    symbolizer.observe(&one.process(1)).expect("observed");
    symbolizer.observe(&two.process(2)).expect("observed");
    let (first, second) = (one.ask("stack"), two.ask("stack"));
    assert_eq!(brief(&symbolizer.frames(1, &first)), with_lines());
    symbolizer.purge(1);
    one.end();
    assert_eq!(brief(&symbolizer.frames(2, &second)), with_lines());
}

/// A pid that was reused since, or is gone, must be told, not watched.
#[test]
fn a_process_that_is_gone_is_not_observed() {
    let folder = Folder::new();
    let running = Running::start(&folder.program("stack", &[]), &[]);
    let mut process = Process::clone(&running.process(1));
    process.start_ticks += 1;
    let error = Symbolizer::new().observe(&Arc::new(process.clone())).expect_err("another process");
    assert_eq!(error.kind(), memleak_core::ErrorKind::Target);
    running.end();
    process.start_ticks -= 1;
    assert_eq!(
        Symbolizer::new().observe(&Arc::new(process)).expect_err("gone").kind(),
        memleak_core::ErrorKind::Target
    );
}

/// Some distributions leave compressed symbol tables in stripped files: names without any further package.
#[test]
fn compressed_symbols_in_a_stripped_file_give_functions() {
    let folder = Folder::new();
    let exe = folder.program("stack", &[]);
    let mini = folder.path("mini");
    run(Command::new("objcopy").arg("--only-keep-debug").args([&exe, &mini]));
    run(Command::new("strip").arg("-g").arg(&mini));
    run(Command::new("strip").arg(&exe));
    run(Command::new("xz").arg(&mini));
    let add = |from: &str, to: &str| {
        let (from, to) = (folder.path(from), folder.path(to));
        let section = format!(".gnu_debugdata={}", from.display());
        run(Command::new("objcopy").args(["--add-section", &section]).args([&exe, &to]));
        to
    };
    let frames_of = |exe: &Path, limits: Limits| {
        let mut running = Running::start(exe, &[]);
        let mut symbolizer = Symbolizer::with_limits(limits);
        symbolizer.observe(&running.process(1)).expect("observed");
        symbolizer.frames(1, &running.ask("stack"))
    };
    assert_eq!(brief(&frames_of(&add("mini.xz", "packed"), limits())), without_lines());

    // One that stands for more than the bound, and one that is cut short, cost the names and nothing else.
    std::fs::write(folder.path("zeros"), vec![0; 4 << 20]).expect("write");
    run(Command::new("xz").arg(folder.path("zeros")));
    let small = Limits { module_bytes: 1 << 20, ..limits() };
    assert_eq!(frames_of(&add("zeros.xz", "bomb"), small)[0].function, None);
    let sound = std::fs::read(folder.path("mini.xz")).expect("read");
    std::fs::write(folder.path("cut.xz"), &sound[..sound.len() / 2]).expect("write");
    assert_eq!(frames_of(&add("cut.xz", "broken"), limits())[0].function, None);
}

/// A program with debug information made to do harm beside its symbol table.
fn with_debug_info(folder: &Folder, name: &str, assembly: &str) -> std::path::PathBuf {
    let source = folder.path(&format!("{name}.s"));
    std::fs::write(&source, assembly).expect("write");
    folder.program(name, &["-g0", source.to_str().expect("UTF-8")])
}

/// Frames of that program, of a sound one asked before and after, and the time that it took.
fn asked_between_sound_ones(folder: &Folder, exe: &Path) -> (Vec<Frame>, std::time::Duration) {
    let sound = folder.program("sound", &["-g"]);
    let (mut one, mut two) = (Running::start(&sound, &[]), Running::start(exe, &[]));
    let mut symbolizer = Symbolizer::with_limits(limits());
    symbolizer.observe(&one.process(1)).expect("observed");
    symbolizer.observe(&two.process(2)).expect("observed");
    assert_eq!(brief(&symbolizer.frames(1, &one.ask("stack"))), with_lines());
    let started = std::time::Instant::now();
    let frames = symbolizer.frames(2, &two.ask("stack"));
    let took = started.elapsed();
    let other: Vec<u64> = one.ask("stack").iter().map(|a| a - 1).collect();
    assert_eq!(symbolizer.frames(1, &other)[0].function.as_deref(), Some("innermost"));
    (frames, took)
}

/// A unit over all addresses with one line, and abbreviations 1 (unit), 2 (function by range), 3 (inlined call), 4 (function by list).
const UNIT: &str = "
    .section .debug_abbrev
    .uleb128 1, 0x11; .byte 1; .uleb128 0x10, 0x17, 0x11, 1, 0x12, 7, 0, 0
    .uleb128 2, 0x2e; .byte 1; .uleb128 3, 8, 0x11, 1, 0x12, 7, 0, 0
    .uleb128 3, 0x1d; .byte 1; .uleb128 0x31, 0x13, 0x11, 1, 0x12, 7, 0, 0
    .uleb128 4, 0x2e; .byte 0; .uleb128 3, 8, 0x55, 0x17, 0, 0
    .byte 0
    .section .debug_line
    .long line_end - line
line:
    .short 4; .long program - header
header:
    .byte 1, 1, 1, 0xfb, 14, 13, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0
    .asciz \"f.c\"; .byte 0, 0, 0, 0
program:
    .byte 0, 9, 2; .quad 1; .byte 1, 2; .uleb128 0x7ffffff0; .byte 0, 1, 1
line_end:
    .section .debug_info
start:
    .long end - begin
begin:
    .short 4; .long 0; .byte 8
    .uleb128 1; .long 0; .quad 0, 0x7fffffff
";

/// Calls inlined into each other a million deep overflow the stack of a reader that recurses; the collector must live,
/// and the symbol table must still name the function.
#[test]
fn endlessly_nested_debug_information_costs_only_lines() {
    let folder = Folder::new();
    let assembly = format!(
        "{UNIT}
function: .uleb128 2; .asciz \"nested\"; .quad 0, 0x7fffffff
    .rept 1000000
    .uleb128 3; .long function - start; .quad 0, 0x7fffffff
    .endr
    .zero 1000002
end:
"
    );
    let (frames, took) = asked_between_sound_ones(&folder, &with_debug_info(&folder, "nested", &assembly));
    assert_eq!(brief(&frames), without_lines());
    assert!(took.as_secs() < 60, "{took:?}");
}

/// Functions that share one long list of ranges cost their product: hours, from a file of a few megabytes.
#[test]
fn slow_debug_information_is_given_up() {
    let folder = Folder::new();
    let assembly = format!(
        "{UNIT}
    .rept 200000
    .uleb128 4; .asciz \"f\"; .long 0
    .endr
    .byte 0
end:
    .section .debug_ranges
    .rept 200000
    .quad 1, 1
    .endr
    .quad 0, 0
"
    );
    let (frames, took) = asked_between_sound_ones(&folder, &with_debug_info(&folder, "slow", &assembly));
    assert_eq!(brief(&frames), without_lines());
    assert!(took.as_secs() < 60, "{took:?}");
}

/// Where no second process can be started, names come from the symbol tables, and nothing hostile is read here.
#[test]
fn without_a_worker_there_are_functions_and_no_lines() {
    let folder = Folder::new();
    let mut running = Running::start(&folder.program("stack", &["-g"]), &[]);
    for worker in ["/nonexistent/memleak", "/bin/true"] {
        let mut symbolizer = Symbolizer::with_limits(Limits { worker: Some(worker.into()), ..limits() });
        symbolizer.observe(&running.process(1)).expect("observed");
        let frames = symbolizer.frames(1, &running.ask("stack"));
        if worker == "/bin/true" {
            // It starts and says nothing.
            assert!(frames[0].reason.as_deref().is_some_and(|r| r.contains("cannot be read")), "{:?}", frames[0]);
        } else {
            assert_eq!(brief(&frames), without_lines());
        }
    }
}
