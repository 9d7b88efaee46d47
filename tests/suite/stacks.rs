//! Call stacks of programs without frame pointers: complete, and the same as a debugger's.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use memleak_tests::{
    Counts, Feature, Memleak, Program, SiteView, Snapshot, missing, needs, output_within, program_path, skip,
};

/// Runs a command under memleak to its end; returns the last snapshot.
fn run(settings: &[&str], command: &[&str]) -> Snapshot {
    let mut args: Vec<&str> = settings.iter().flat_map(|s| ["--set", s]).collect();
    args.push("--");
    args.extend(command);
    let outcome = Memleak::launch(&args).outcome();
    outcome.snapshots.into_iter().next_back().unwrap_or_else(|| panic!("no snapshot: {}", outcome.stderr))
}

fn path(name: &str) -> String {
    program_path(name).expect("it was asked for").to_str().expect("a plain path").to_owned()
}

/// Return addresses of a stack; inlined calls share the address of the call they are part of. Of those in the plugin
/// only the offset in the page, see `stacks.gdb.py`; it is the only module that may have no name, when the program ends
/// before anybody has looked at its mapping.
fn addresses(site: &SiteView) -> Vec<u64> {
    let in_plugin = |module: &Option<String>| module.as_ref().is_none_or(|m| m.ends_with("libplugin.so"));
    (site.frames.iter().filter(|frame| !frame.inlined))
        .map(|frame| if in_plugin(&frame.module) { frame.address & 0xfff } else { frame.address })
        .collect()
}

// A debugger stops at the same calls and knows all registers: both must see the same frames.
#[test]
fn stacks_are_those_that_gdb_sees() {
    needs!(Feature::Bpf, Feature::Program("stacks"), Feature::Command("gdb"), Feature::Command("setarch"));
    let (program, plugin) = (path("stacks"), path("libplugin.so"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/stacks.gdb.py");
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-q", "-batch", "-x"]).arg(script).args(["--args", &program, &plugin, "shapes", "300"]);
    let (_, stdout, stderr) = output_within(&mut gdb);
    let mut expected: BTreeMap<Vec<u64>, u64> = BTreeMap::new();
    for line in stdout.lines().filter_map(|line| line.strip_prefix("stack ")) {
        *expected.entry(serde_json::from_str(line).expect("a list of addresses")).or_default() += 1;
    }
    let events: u64 = expected.values().sum();
    assert!(events >= 200, "{events} events; gdb said:\n{stderr}");

    // gdb switches address randomization off, too.
    let snapshot = run(&[], &["setarch", "-R", &program, &plugin, "shapes", "300"]);
    let mut found: BTreeMap<Vec<u64>, u64> = BTreeMap::new();
    for site in snapshot.sites.iter().filter(|site| site.passes("work") || site.passes("thread")) {
        assert_eq!(site.truncated, None, "{site:?}");
        *found.entry(addresses(site)).or_default() += site.counts.allocated_count;
    }
    // What one side sees and the other does not, event by event; of those, frames that agree.
    let only = |a: &BTreeMap<Vec<u64>, u64>, b: &BTreeMap<Vec<u64>, u64>| -> Vec<(Vec<u64>, u64)> {
        let less = |(stack, n): (&Vec<u64>, &u64)| (stack.clone(), n.saturating_sub(*b.get(stack).unwrap_or(&0)));
        a.iter().map(less).filter(|(_, n)| *n > 0).collect()
    };
    let (missing, extra) = (only(&expected, &found), only(&found, &expected));
    let frames = |list: &[(Vec<u64>, u64)]| list.iter().map(|(stack, n)| stack.len() as u64 * n).sum::<u64>();
    let all: Vec<_> = expected.iter().map(|(stack, n)| (stack.clone(), *n)).collect();
    eprintln!("{events} events, {} stacks, {} frames; not the same: {}", all.len(), frames(&all), frames(&missing));
    assert!(
        frames(&missing) * 100 <= frames(&all) && frames(&extra) * 100 <= frames(&all),
        "only gdb: {missing:x?}\nonly memleak: {extra:x?}"
    );
}

// What is cut off must say so, and it must not cost the frames that tell sites apart.
#[test]
fn deep_recursion_is_cut_off_and_said() {
    needs!(Feature::Bpf, Feature::Program("stacks"));
    for (frames, settings) in [(64, &[][..]), (127, &["collector.max_frames=127"])] {
        let snapshot = run(settings, &[&path("stacks"), &path("libplugin.so"), "deep", "10000"]);
        let site = snapshot.sites.iter().find(|site| site.passes("recurse")).expect("the recursion allocates");
        assert_eq!(addresses(site).len(), frames, "{site:?}");
        assert_eq!(site.truncated.as_deref(), Some("the limit of frames was reached (collector.max_frames)"));
        assert_eq!(site.counts.allocated_count, 1);
    }
}

// Exactly as deep as the limit is not cut off: main and what comes before it are there.
#[test]
fn a_stack_within_the_limit_is_complete() {
    needs!(Feature::Bpf, Feature::Program("stacks"));
    let snapshot = run(&["collector.max_frames=127"], &[&path("stacks"), &path("libplugin.so"), "deep", "100"]);
    let site = snapshot.sites.iter().find(|site| site.passes("recurse")).expect("the recursion allocates");
    assert_eq!(site.truncated, None, "{site:?}");
    assert!(site.passes("dig") && site.passes("main") && site.passes("_start"), "{site:?}");
    // recurse(100) to recurse(0), take, dig, main, two of the C library, _start.
    assert_eq!(addresses(site).len(), 101 + 6, "{site:?}");
}

// Kernels before 6.6 have other programs, without bpf_loop(); they must walk as far.
#[test]
fn every_backend_unwinds_completely() {
    needs!(Feature::Bpf, Feature::Program("stacks"));
    let mut stacks = Vec::new();
    for backend in ["session", "multi", "perf", "perf-plain"] {
        if let Some(reason) = missing(&[Feature::Backend(backend)]) {
            skip(&reason);
            continue;
        }
        let setting = format!("collector.backend={backend}");
        let command = ["setarch", "-R", &path("stacks"), &path("libplugin.so"), "shapes", "60"];
        let snapshot = run(&[&setting], &command);
        let mut found: BTreeMap<Vec<u64>, u64> = BTreeMap::new();
        for site in snapshot.sites.iter().filter(|site| site.passes("work")) {
            assert_eq!(site.truncated, None, "{backend}: {site:?}");
            *found.entry(addresses(site)).or_default() += site.counts.allocated_count;
        }
        assert!(found.len() > 20, "{backend}: {} stacks", found.len());
        stacks.push(found);
    }
    assert!(stacks.windows(2).all(|pair| pair[0] == pair[1]), "{stacks:x?}");
}

// A handler's caller is what it interrupted. The C library says so in its unwind information; musl's has none for it.
#[test]
fn stacks_of_signal_handlers_go_on_in_the_interrupted_code() {
    needs!(Feature::Bpf, Feature::Program("interrupted"), Feature::Program("interrupted-musl"));
    for name in ["interrupted", "interrupted-musl"] {
        let mut program = Program::start(name);
        let mut memleak = Memleak::watch(program.pid());
        program.step("done");
        let snapshot = memleak.settled();
        assert_eq!(snapshot.at("on_alarm"), Counts::kept(11, 37), "{name}: {:#?}", snapshot.callers());
        for site in snapshot.sites.iter().filter(|site| site.passes("on_alarm")) {
            assert!(site.passes("spin") && site.passes("main"), "{name}: {site:#?}");
        }
        // In the kernel's own code, which is in no file. musl has no unwind information for the
        // function that calls it.
        assert_eq!(snapshot.at("on_tick"), Counts::kept(31, 43), "{name}: {:#?}", snapshot.callers());
        let ticks = || snapshot.sites.iter().filter(|site| site.passes("on_tick"));
        let in_vdso = |site: &SiteView| site.frames.iter().any(|f| f.module.as_deref() == Some("[vdso]"));
        assert!(ticks().any(in_vdso), "{name}: {:#?}", snapshot.callers());
        let is_complete = |site: &SiteView| site.passes("ask_the_time") && site.passes("main");
        assert!(name == "interrupted-musl" || ticks().all(is_complete), "{snapshot:#?}");
        // Interrupted at the very first instruction: the byte before it belongs to another function.
        let site = snapshot.site("on_refusal");
        assert_eq!(site.counts, Counts::kept(13, 41), "{name}");
        let names: Vec<&str> = site.frames.iter().filter_map(|f| f.function.as_deref()).collect();
        let at = names.iter().position(|name| *name == "refused").unwrap_or_else(|| panic!("{name}: {names:?}"));
        assert_eq!(names[at + 1..at + 3], ["be_refused", "main"], "{name}");
        assert!(!names.contains(&"just_before"), "{name}: {names:?}");
    }
}

// Where a library was, another may be next, whose stacks must not be walked by the rows of the first.
#[test]
fn library_in_the_place_of_another_is_unwound_by_its_own_rows() {
    needs!(Feature::Bpf, Feature::Program("reload"));
    let libraries = ["libplugin-small.so", "libplugin-large.so", "libplugin-small.so"].map(path);
    let mut program = Program::start_command(Command::new(path("reload")).args(&libraries));
    let mut memleak = Memleak::watch(program.pid());
    let mut places = Vec::new();
    for n in 1..=3 {
        program.go();
        places.push(program.next_line());
        // By the second snapshot what was loaded has its rows.
        memleak.settled();
        memleak.settled();
        program.step("called");
        let snapshot = memleak.settled();
        assert_eq!(snapshot.at("plugin_leak"), Counts::kept(17 * n, 59), "{:#?}", snapshot.callers());
        for site in snapshot.sites.iter().filter(|site| site.passes("plugin_leak")) {
            assert!(site.truncated.is_none() && site.passes("main") && site.passes("_start"), "{places:?}: {site:#?}");
        }
    }
    let page = |line: &String| line.rsplit(' ').next().and_then(|n| n.parse::<u64>().ok()).expect("an address") >> 12;
    assert_eq!(page(&places[0]), page(&places[1]), "the libraries did not take each other's place");
}

// Between any two instructions the frame is in another state, and the stubs that calls into libraries go through have
// frames of their own kind.
#[test]
fn stacks_from_every_instruction_of_a_call_are_complete() {
    needs!(Feature::Bpf, Feature::Program("stepped_through"));
    let mut program = Program::start("stepped_through");
    let mut memleak = Memleak::watch(program.pid());
    program.go();
    let line = program.next_line();
    let kept: u64 = line.strip_prefix("done ").and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{line}"));
    let snapshot = memleak.settled();
    assert_eq!(snapshot.at("on_step"), Counts::kept(kept, 43));
    let mut interrupted = BTreeMap::new();
    for site in &snapshot.sites {
        assert!(site.truncated.is_none() && site.passes("be_stepped") && site.passes("main"), "{site:#?}");
        // on_step(), what it returns to, and then the instruction.
        *interrupted.entry(site.frames[2].function.clone()).or_insert(0) += site.counts.allocated_count;
    }
    eprintln!("{kept} instructions: {interrupted:?}");
    assert!(kept >= 60, "{kept}");
    for function in ["be_stepped", "steps_outer", "steps_leaf"] {
        assert!(interrupted.contains_key(&Some(function.to_owned())), "{interrupted:?}");
    }
    // The stubs, which have no symbols of their own.
    assert!(interrupted.len() > 3, "{interrupted:?}");
}

// The setting is for comparisons: without frame pointers in the program it shows the difference.
#[test]
fn frame_pointers_alone_end_early() {
    needs!(Feature::Bpf, Feature::Program("stacks"));
    let command = [&*path("stacks"), &path("libplugin.so"), "deep", "20"];
    let snapshot = run(&["collector.stacks=frame-pointers"], &command);
    assert!(!snapshot.sites.iter().any(|site| site.passes("main") && site.passes("recurse")), "{:?}", snapshot.sites);
    assert!(snapshot.processes.iter().all(|process| process.complete_stacks.is_none()));
}

/// Runs a program of the distribution to its end, or for a few seconds; nearly all of its stacks must be complete, although
/// no table has been made before.
fn is_complete(settings: &[&str], command: &[&str], least: u64) {
    let snapshot = run(&[&["collector.unwind_cache=off", "live.sites=50"], settings].concat(), command);
    let process = snapshot.processes.last().expect("it was watched");
    let share = process.complete_stacks.expect("stacks were taken");
    eprintln!("{}: {:.2} % of {} stacks are complete", command[0], share * 100.0, snapshot.totals.allocated_count);
    let ends: Vec<_> = snapshot.sites.iter().filter(|s| s.truncated.is_some()).take(5).collect();
    assert!(share >= 0.98, "{share}: {ends:#?}");
    assert!(snapshot.totals.allocated_count >= least, "{} allocations", snapshot.totals.allocated_count);
}

// A program whose allocations come from deep within a parser, a compiler and a virtual machine.
#[test]
fn sqlite_has_complete_stacks() {
    needs!(Feature::Bpf, Feature::Command("sqlite3"));
    let sql = "create table t(a, b); create index i on t(b); \
        with recursive n(x) as (select 1 union all select x + 1 from n where x < 2000) \
        insert into t select x, hex(randomblob(40)) from n; \
        select count(*), max(b), group_concat(a) from t where b like '%AB%' group by a % 7 order by 2;";
    // What it prints would be mixed with the snapshots.
    is_complete(&[], &["sqlite3", ":memory:", ".output /dev/null", sql], 200);
}

// An interpreter and the extension modules that it loads while it runs: for their tables it is stopped.
#[test]
fn python_has_complete_stacks() {
    needs!(Feature::Bpf, Feature::Command("python3"));
    let code = "import json, re, sqlite3, ssl\n\
        d = {'k%d' % i: list(range(i % 50)) for i in range(500)}\n\
        for i in range(120): json.loads(json.dumps(d)); re.findall('k[0-9]+', str(d)); [bytes(600 + n) for n in range(900)]";
    is_complete(&[], &["/usr/bin/python3", "-c", code], 1000);
}

// Perl allocates everything with malloc.
#[test]
fn perl_has_complete_stacks() {
    needs!(Feature::Bpf, Feature::Command("perl"));
    let code = "for my $n (1..5) { my %h; $h{\"k$_\"} = [ 'x' x ($_ % 300), $_ ] for 1..1000; my $s = join(',', sort keys %h); \
        my @m = ($s =~ /(k\\d+)/g); }";
    is_complete(&[], &["perl", "-e", code], 5000);
}

// Once warm memcached asks for no memory any more: nearly all that it ever does is at its start, on several threads.
#[test]
fn memcached_has_complete_stacks() {
    needs!(Feature::Bpf, Feature::Command("memcached"));
    let command = ["memcached", "-u", "root", "-l", "127.0.0.1", "-p", "0", "-U", "0", "-m", "64", "-t", "2"];
    is_complete(&["duration=8s"], &command, 20);
}
