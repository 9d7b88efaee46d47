//! What users, files, targets and machines get wrong: each is answered with what, where and how to fix it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use memleak_tests::{Counts, Feature, Memleak, Program, memleak_command, needs, output_within};
use tempfile::TempDir;

/// A folder with these files.
fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder can be made");
    for (name, text) in files {
        fs::write(folder.path().join(name), text).expect("a file can be written");
    }
    folder
}

/// Runs memleak with these arguments in that folder; it must refuse (exit code 2) and say all of `words`.
fn refuses(folder: &Path, args: &[&str], words: &[&str]) -> String {
    let (code, stdout, stderr) = output_within(memleak_command().current_dir(folder).args(args));
    assert_eq!(code, Some(2), "exit code of {args:?}\nstandard output:\n{stdout}\nstandard error:\n{stderr}");
    says(&stderr, words);
    stderr
}

fn says(text: &str, words: &[&str]) {
    assert!(!text.contains("panicked"), "{text}");
    for word in words {
        assert!(text.contains(word), "`{word}` is missing in:\n{text}");
    }
}

/// A configuration that must be refused, with and without running.
fn bad_config(text: &str, words: &[&str]) {
    let folder = folder(&[("bad.toml", text)]);
    refuses(folder.path(), &["check", "bad.toml"], words);
    refuses(folder.path(), &["--config", "bad.toml", "-p", "1"], words);
}

// A misspelt key must not be ignored: the user would believe in a setting that is not there.
#[test]
fn unknown_key_is_named_with_its_place_and_the_nearest_key() {
    bad_config("interval = \"1s\"\n\n[alerts]\n  cooldwn = \"1m\"\n", &["bad.toml:4:3", "cooldwn", "cooldown"]);
}

// A number without a known unit could mean anything.
#[test]
fn bad_unit_is_named_with_its_place_and_the_known_units() {
    bad_config("interval = \"5 fortnights\"\n", &["bad.toml:1:", "5 fortnights", "ms"]);
    bad_config("[collector]\nmin_size = \"3 KiloBytes\"\n", &["bad.toml:2:", "KiB"]);
    bad_config("interval = 5\n", &["bad.toml:1:", "interval", "unit"]);
}

// A glob that cannot be understood would match nothing, silently.
#[test]
fn bad_glob_is_named() {
    bad_config("[[target]]\nname = \"ng[inx\"\n", &["bad.toml:2:", "ng[inx"]);
    let folder = folder(&[]);
    refuses(folder.path(), &["--name", "ng[inx"], &["ng[inx", "--name"]);
}

// The mistakes of one file are told together: fixing them one by one is tiring.
#[test]
fn several_mistakes_are_told_together() {
    bad_config("interval = \"x\"\n[collector]\nmax_frams = 3\n", &["bad.toml:1:", "bad.toml:3:1", "max_frames"]);
}

// --set goes through the same checks as the file.
#[test]
fn bad_override_is_named() {
    let folder = folder(&[]);
    refuses(folder.path(), &["-p", "1", "--set", "alerts.hld=3s"], &["--set", "alerts.hld", "hold"]);
    refuses(folder.path(), &["-p", "1", "--set", "interval=soon"], &["--set", "interval", "soon"]);
}

// A folder that was named must exist: falling back to the built-in files would hide the typing error.
#[test]
fn missing_folders_are_named() {
    let folder = folder(&[]);
    for flag in ["--rules", "--plugins", "--templates"] {
        refuses(folder.path(), &["check", flag, "no/such/folder"], &["no/such/folder"]);
    }
    refuses(folder.path(), &["check", "no-such-file.toml"], &["no-such-file.toml", "No such file"]);
}

// A rule with a syntax error is named with file and line before anything runs.
#[test]
fn broken_lua_is_named_with_file_and_line() {
    let folder = folder(&[("broken.lua", "return {\n  name = 'broken',\n  evaluate = function( site, \n}\n")]);
    refuses(folder.path(), &["check", "--rules", "."], &["broken.lua:4"]);
    refuses(folder.path(), &["-p", "1", "--rules", "."], &["broken.lua:4"]);
}

// A loop at the top of a rule file must not hang the start.
#[test]
fn endless_lua_loop_at_load_is_stopped() {
    let folder = folder(&[("endless.lua", "local n = 0\nwhile true do n = n + 1 end\n")]);
    refuses(folder.path(), &["check", "--rules", "."], &["endless.lua", "instructions"]);
}

// Memory taken at the top of a rule file must not take the machine's.
#[test]
fn lua_that_eats_memory_at_load_is_stopped() {
    let folder = folder(&[("hungry.lua", "local t = {}\nfor i = 1, 1e9 do t[i] = ('x'):rep(4096) .. i end\n")]);
    refuses(
        folder.path(),
        &["check", "--rules", ".", "--set", "rules.max_instructions=1000000000"],
        &["hungry.lua", "memory"],
    );
}

/// Runs with one bad rule beside the shipped ones: it must be named, and everything else must go on.
fn bad_rule_while_running(name: &str, body: &str, words: &[&str]) {
    needs!(Feature::Bpf);
    let file = format!("{name}.lua");
    let rule =
        format!("return {{\n  name = '{name}',\n  description = 'bad',\n  params = {{}},\n  evaluate = {body},\n}}\n");
    let rules = folder(&[(file.as_str(), rule.as_str())]);
    let mut program = Program::start("leaker");
    let mut memleak =
        Memleak::watch_with(program.pid(), &["--rules", rules.path().to_str().expect("the folder has a plain name")]);
    program.step("done");
    memleak.wait_for_message(&file);
    let snapshot = memleak.settled();
    assert_eq!(snapshot.totals, Counts::kept(7, 67), "counting goes on");
    let outcome = memleak.stop();
    says(&outcome.stderr, words);
    // One message, not one per snapshot and site.
    assert!(outcome.stderr.matches(&file).count() <= 3, "{}", outcome.stderr);
}

// An endless loop in a rule costs that rule, not the run.
#[test]
fn endless_lua_loop_while_running_stops_only_that_rule() {
    bad_rule_while_running("endless", "function() while true do end end", &["endless.lua:5", "instructions"]);
}

// So does a rule that eats memory,
#[test]
fn lua_that_eats_memory_while_running_stops_only_that_rule() {
    let body = "function() local s = 'x' while true do s = s .. s end end";
    bad_rule_while_running("hungry", body, &["hungry.lua", "memory"]);
}

// and a rule that raises an error.
#[test]
fn lua_error_while_running_stops_only_that_rule() {
    bad_rule_while_running("failing", "function(site) return site.nothing.at_all end", &["failing.lua:5"]);
}

// A template error is found before the run, not when the report is due.
#[test]
fn broken_template_is_named_before_the_run() {
    let folder = folder(&[("report.html.tera", "<html>\n{% for site in sites %}\n{{ site }\n")]);
    refuses(folder.path(), &["check", "--templates", "."], &["report.html.tera", "3"]);
    refuses(folder.path(), &["-p", "1", "--templates", "."], &["report.html.tera"]);
}

// A manifest with a mistake is named with its file and place.
#[test]
fn broken_manifest_is_named() {
    let folder = folder(&[("pool.toml", "name = \"pool\"\nkind = \"userspace\"\nsonmes = []\n")]);
    refuses(folder.path(), &["check", "--plugins", "."], &["pool.toml", "sonmes"]);
}

// A budget that is none would stop all tracing or protect nobody; a window that outlasts the interval is in two snapshots.
#[test]
fn senseless_budgets_are_named() {
    for (value, why) in [("0%", "more than 0 %"), ("-2%", "more than 0 %"), ("1000%", "at most 100 %")] {
        bad_config(&format!("[collector]\nbudget = \"{value}\"\n"), &["bad.toml:2:", "collector.budget", why]);
        let target = format!("[[target]]\nname = \"x\"\nbudget = \"{value}\"\n");
        bad_config(&target, &["bad.toml:3:", "target.budget", why]);
    }
    bad_config("[[target]]\nname = \"x\"\nbudget = \"60%\"\n", &["bad.toml:3:", "above max_slowdown (50 %)"]);
    bad_config("[[target]]\nname = \"x\"\nlatency = \"low\"\n", &["bad.toml:3:", "normal, sensitive"]);
    let window = "interval = \"100ms\"\n[collector]\nmax_window = \"150ms\"\n";
    bad_config(window, &["bad.toml:3:", "max_window", "longer than the interval"]);
    bad_config("[collector]\nmax_window = \"500ms\"\n", &["bad.toml:2:", "at most 400ms", "max_slowdown"]);
}

// The places that one tool probes are occupied for no other: both count exactly, and the program is none the worse.
#[test]
fn two_collectors_on_one_process_are_both_exact() {
    needs!(Feature::Bpf);
    let mut program = Program::start("leaker");
    let (mut one, mut two) = (Memleak::watch(program.pid()), Memleak::watch(program.pid()));
    program.step("done");
    for memleak in [&mut one, &mut two] {
        let snapshot = memleak.settled();
        assert_eq!(snapshot.totals, Counts::kept(7, 67));
        assert!(snapshot.process(program.pid()).losses.values().all(|n| *n == 0), "{:?}", snapshot.processes);
    }
    // When one leaves, the other's probes stay.
    assert_eq!(one.stop().code, Some(0));
    program.step("done");
    assert_eq!(two.settled().totals, Counts::kept(14, 67));
    assert_eq!(two.stop().code, Some(0));
    program.finish();
}

// Where the kernel emulates no instruction that would do, probes are dear, and right: the tool says so before they are used.
#[test]
fn function_without_a_cheap_place_is_counted_exactly_and_named() {
    needs!(Feature::Bpf);
    let manifest = "name = \"stepped\"\nkind = \"userspace\"\n[match]\nsonames = [\"stepped\"]\n\
                    [[function]]\nsymbol = \"stepped_take\"\nrole = \"alloc\"\nsize = { arg = 0 }\n\
                    [[function]]\nsymbol = \"stepped_give\"\nrole = \"free\"\nold = { arg = 0 }\n";
    let plugins = folder(&[("stepped.toml", manifest)]);
    let plugins = plugins.path().to_str().expect("the folder has a plain name");
    let mut program = Program::start("stepped");
    let mut doctor = memleak_command();
    let (code, stdout, stderr) =
        output_within(doctor.args(["doctor", "--plugins", plugins, "-p", &program.pid().to_string()]));
    assert_eq!(code, Some(0), "{stderr}");
    for function in ["stepped_take", "stepped_give"] {
        let line = stdout.lines().find(|line| line.contains(function)).unwrap_or_default();
        says(line, &["+0 single-stepped", "a hit costs", "us more"]);
    }
    let mut memleak = Memleak::watch_with(program.pid(), &["--plugins", plugins]);
    program.step("done");
    let snapshot = memleak.settled();
    assert_eq!(snapshot.site("lose_stepped").counts, Counts::kept(31, 79));
    assert_eq!(snapshot.site("churn_stepped").counts.outstanding_count, 0);
    assert_eq!(snapshot.site("churn_stepped").counts.freed_count, 31);
    assert_eq!(memleak.stop().code, Some(0));
    program.finish();
}

// A pid that nobody has: said at once, not watched for ever.
#[test]
fn pid_that_does_not_exist_is_named() {
    needs!(Feature::Bpf);
    let folder = folder(&[]);
    // One above the largest pid that the kernel gives.
    refuses(folder.path(), &["-p", "4194304"], &["4194304", "no such process"]);
}

// Processes that end while they are being attached are ordinary, and must never look like a crash.
#[test]
fn pid_that_dies_during_attach_is_survived() {
    needs!(Feature::Bpf);
    let folder = folder(&[]);
    for delay_ms in [10, 30, 60, 100, 150, 200, 300, 400] {
        let mut sleeper = Command::new("sleep")
            .arg(format!("{}", Duration::from_millis(delay_ms).as_secs_f64()))
            .spawn()
            .expect("sleep starts");
        let pid = sleeper.id().to_string();
        let reaper = std::thread::spawn(move || sleeper.wait());
        let (code, _, stderr) = output_within(memleak_command().current_dir(folder.path()).args([
            "-p",
            &pid,
            "--duration",
            "5s",
            "--quiet",
        ]));
        reaper.join().expect("the thread does not panic").expect("sleep ends");
        assert!(!stderr.contains("panicked"), "{stderr}");
        match code {
            Some(0) => {}
            Some(2) => says(&stderr, &[&pid]),
            other => panic!("exit code {other:?} with a target of {delay_ms} ms: {stderr}"),
        }
    }
}

// Many short-lived processes of a matching name come and go while we look: the run goes on, the steady one is exact.
#[test]
fn churn_of_matching_processes_is_survived() {
    needs!(Feature::Bpf);
    let copies = tempfile::tempdir().expect("a folder can be made");
    let path = copies.path().join("mlt-shortlived");
    fs::copy(memleak_tests::program_path("early").expect("the program was built"), &path).expect("it can be copied");
    let steady = copies.path().join("mlt-short-steady");
    fs::copy(memleak_tests::program_path("leaker").expect("the program was built"), &steady).expect("it can be copied");
    let mut program = Program::start_command(&mut Command::new(&steady));
    let pid = program.pid();
    let mut memleak = Memleak::start(&["--name", "mlt-short*"]);
    for _ in 0..200 {
        let mut child = Command::new(&path).spawn().expect("the program starts");
        child.wait().expect("the program ends");
    }
    program.step("done");
    let snapshot = memleak.settled();
    assert_eq!(snapshot.sum(|site| site.pid == pid), Counts::kept(7, 67));
    let outcome = memleak.stop();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    says(&outcome.stderr, &[]);
}

/// `memleak ARGS` with only these capabilities left to root; none of them is CAP_DAC_OVERRIDE.
fn with_capabilities(capabilities: &[&str], args: &[&str]) -> Command {
    let list: String = capabilities.iter().map(|name| format!(",+{name}")).collect();
    let mut command = Command::new("setpriv");
    command.args([format!("--inh-caps=-all{list}"), format!("--bounding-set=-all{list}"), "--".to_owned()]);
    command.arg(memleak_command().get_program()).args(args);
    command
}

// "Operation not permitted" helps nobody: the missing capability is named, together with what to do.
#[test]
fn missing_capability_is_named_with_the_fix() {
    needs!(Feature::Bpf, Feature::Command("setpriv"));
    let folder = folder(&[]);
    let program = Program::start("leaker");
    let pid = program.pid().to_string();
    for (left, missing) in
        [(&[][..], "CAP_BPF"), (&["perfmon", "sys_ptrace"], "CAP_BPF"), (&["bpf", "sys_ptrace"], "CAP_PERFMON")]
    {
        for what in [&["-p", &pid][..], &["kernel"]] {
            let mut command = with_capabilities(left, &[what, &["--duration", "1s"]].concat());
            let (code, _, stderr) = output_within(command.current_dir(folder.path()));
            assert_eq!(code, Some(2), "{what:?} with {left:?}: {stderr}");
            says(&stderr, &[missing, "sudo"]);
        }
    }
}

// The documented minimum is enough, so that nobody has to give memleak all of root.
#[test]
fn documented_capabilities_are_enough() {
    needs!(Feature::Bpf, Feature::Command("setpriv"));
    let folder = folder(&[]);
    let program = Program::start("leaker");
    let args = ["-p", &program.pid().to_string(), "--duration", "1s"];
    let (code, _, stderr) =
        output_within(with_capabilities(&["bpf", "perfmon", "sys_ptrace"], &args).current_dir(folder.path()));
    assert_eq!(code, Some(0), "{stderr}");
    // The kernel's names are for those who have CAP_SYSLOG.
    let args = ["kernel", "--probe-set", "kernel-slab", "--duration", "1s"];
    let (code, _, stderr) =
        output_within(with_capabilities(&["bpf", "perfmon", "syslog"], &args).current_dir(folder.path()));
    assert_eq!(code, Some(0), "{stderr}");
}

// An executable that we may run but not read still has a C library: its leaks are counted, its frames say why they
// have no names.
#[test]
fn unreadable_binary_is_watched_through_its_library() {
    needs!(Feature::Bpf, Feature::Command("setpriv"));
    let copies = tempfile::tempdir().expect("a folder can be made");
    let path = copies.path().join("unreadable");
    fs::copy(memleak_tests::program_path("leaker").expect("the program was built"), &path).expect("it can be copied");
    // Somebody else's file, executable for all, readable for its owner alone.
    std::os::unix::fs::chown(&path, Some(65534), Some(65534)).expect("root can give files away");
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o711)).expect("root can set modes");
    fs::set_permissions(copies.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("so it can here");
    let mut program = Program::start_command(&mut Command::new(&path));
    let pid = program.pid().to_string();
    let args = ["--json", "--interval", "200ms", "-p", &pid];
    let run = tempfile::tempdir().expect("a folder can be made");
    let mut command = with_capabilities(&["bpf", "perfmon", "sys_ptrace"], &args);
    let mut memleak = Memleak::spawn(command.current_dir(run.path()), folder(&[]));
    memleak.wait_until("the first snapshot", |_| true);
    program.step("done");
    let snapshot = memleak.settled();
    assert_eq!(snapshot.totals, Counts::kept(7, 67));
    assert_eq!(snapshot.sites[0].frames[0].function, None);
    assert!(snapshot.sites[0].frames[0].module.as_deref().is_some_and(|m| m.ends_with("/unreadable")));
    assert_eq!(memleak.stop().code, Some(0));
}

/// `memleak ARGS` in a mount namespace of its own, prepared by a line of shell.
fn in_namespace(prepare: &str, args: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &format!("{prepare} && exec \"$@\""), "sh"]);
    command.arg(memleak_command().get_program()).args(args);
    command
}

// A kernel built without BTF cannot be read by our programs: the option that is missing is named.
#[test]
fn kernel_without_btf_is_named() {
    needs!(Feature::Bpf, Feature::MountNamespace);
    let folder = folder(&[]);
    let program = Program::start("leaker");
    let args = ["-p", &program.pid().to_string(), "--duration", "1s"];
    let mut command = in_namespace("mount -t tmpfs none /sys/kernel/btf", &args);
    let (code, _, stderr) = output_within(command.current_dir(folder.path()));
    assert_eq!(code, Some(2), "{stderr}");
    says(&stderr, &["BTF", "CONFIG_DEBUG_INFO_BTF"]);
}

// A report that cannot be written is known before the run, not after an hour of it.
#[test]
fn output_folder_that_does_not_exist_is_named_before_the_run() {
    needs!(Feature::Bpf);
    let folder = folder(&[]);
    let program = Program::start("leaker");
    let pid = program.pid().to_string();
    for flag in ["--report", "--alerts"] {
        // Long enough that a late error would run into the time limit of the test.
        let args = ["-p", &pid, "--duration", "10m", flag, "no/such/folder/out"];
        refuses(folder.path(), &args, &["no/such/folder", flag.trim_start_matches('-')]);
    }
}

// The same for a folder that is there but read-only.
#[test]
fn output_folder_that_is_not_writable_is_named_before_the_run() {
    needs!(Feature::Bpf, Feature::MountNamespace);
    let folder = folder(&[]);
    let program = Program::start("leaker");
    let target = folder.path().join("readonly");
    fs::create_dir(&target).expect("a folder can be made");
    let mount = format!("mount -t tmpfs -o ro none {}", target.display());
    let pid = program.pid().to_string();
    for flag in ["--report", "--alerts"] {
        let args = ["-p", &pid, "--duration", "10m", flag, "readonly/out"];
        let (code, _, stderr) = output_within(in_namespace(&mount, &args).current_dir(folder.path()));
        assert_eq!(code, Some(2), "{stderr}");
        says(&stderr, &["readonly"]);
    }
}

// A full disk costs the file, is said, and leaves no torn report; memleak ends with an error.
#[test]
fn full_disk_is_named_and_leaves_no_half_written_report() {
    needs!(Feature::Bpf, Feature::MountNamespace);
    let folder = folder(&[]);
    let program = Program::start("leaker");
    let target = folder.path().join("full");
    fs::create_dir(&target).expect("a folder can be made");
    // Sixteen kilobytes are far less than any report; what is left of it is listed before the namespace goes.
    let script = format!(
        "mount -t tmpfs -o size=16k none {0} && {{ \"$@\"; code=$?; ls -A {0} >&2; exit $code; }}; true",
        target.display()
    );
    let args = ["-p", &program.pid().to_string(), "--duration", "1s", "--report", "full/report.html"];
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script, "sh"]).arg(memleak_command().get_program()).args(args);
    let (code, _, stderr) = output_within(command.current_dir(folder.path()));
    assert_eq!(code, Some(2), "{stderr}");
    says(&stderr, &["report.html", "No space left"]);
    assert!(!stderr.lines().any(|line| line.trim_start().starts_with("report.html")), "a torn report: {stderr}");
}

// Names from the target are other people's text: inert in the terminal, in JSON, in the page.
#[test]
fn hostile_names_are_inert_everywhere() {
    needs!(Feature::Bpf);
    let run = folder(&[]);
    let mut program = Program::start("hostile");
    let pid = program.pid();
    let mut memleak = Memleak::watch(pid);
    program.step("done");
    let snapshot = memleak.settled();
    let site = &snapshot.sites[0];
    assert_eq!(site.counts, Counts::kept(13, 101));
    assert_eq!(site.caller(), Some("<script>alert('s')</script>"), "JSON keeps the name as it is");
    assert_eq!(snapshot.process(pid).comm, "<b>'\"\n\u{1b}[31m&x");
    let report = memleak.folder().join("memleak-report.html");
    memleak.signal(libc::SIGUSR1);
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !report.exists() {
        assert!(std::time::Instant::now() < deadline, "no report; standard error:\n{}", memleak.stderr());
        std::thread::sleep(Duration::from_millis(20));
    }
    let page = fs::read_to_string(&report).expect("the report can be read");
    assert!(!page.contains("<script>alert") && !page.contains("<b>'"), "markup from the target in the page");
    assert!(!page.contains('\u{1b}'), "an escape character in the page");
    drop(memleak);

    // The live view and the closing text: no control character but line breaks.
    let mut command = memleak_command();
    let args = ["-p", &pid.to_string(), "--interval", "200ms", "--duration", "2s"];
    let (_, stdout, stderr) = output_within(command.current_dir(run.path()).args(args));
    let control = |c: char| c.is_control() && c != '\n';
    assert!(!stdout.contains(control) && !stderr.contains(control), "{stdout:?}\n{stderr:?}");
}
