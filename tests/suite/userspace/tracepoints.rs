//! Blocks that a program tells of by static tracepoints.

use memleak_tests::{Counts, Feature, Memleak, Program, memleak_command, needs, output_within};

use super::assert_clean;
use super::user_sets::{option, plugins};

/// Watches the program `tracepoints` with these options and checks the account, byte for byte.
fn counted(args: &[&str]) {
    let mut program = Program::start("tracepoints");
    let mut memleak = Memleak::watch_with(program.pid(), args);
    program.step("done");
    let snapshot = memleak.settled();
    assert_clean(&snapshot, program.pid());
    // The weights are what counts: three times the size, and 1009 for 53.
    let registers = Counts::kept(31, 3 * 79);
    let memory = Counts::kept(23, 1009);
    assert_eq!(snapshot.through("leak_sampled"), registers, "{:#?}", snapshot.callers());
    assert_eq!(snapshot.through("churn_sampled"), Counts::freed(29, 3 * 83));
    assert_eq!(snapshot.through("leak_in_memory"), memory);
    assert_eq!(snapshot.at("sampled"), registers.plus(Counts::freed(29, 3 * 83)));
    assert_eq!(snapshot.at("sampled_in_memory"), memory);
    assert_eq!(snapshot.totals, registers.plus(memory).plus(Counts::freed(29, 3 * 83)));
    assert!(snapshot.sites.iter().all(|site| site.probe_set == "otel-memory"), "{:#?}", snapshot.callers());
    assert_eq!(snapshot.process(program.pid()).unmatched_frees, 0);
    memleak.stop();
    // The program's sampler rests again when nobody listens any more.
    program.step("listeners 0");
}

const ON: [&str; 2] = ["--set", "plugins.otel-memory.enabled=true"];

// A program that samples its own allocations is cheap to watch; it samples only when its counter is raised.
#[test]
fn otel_memory_tracepoints_are_counted_exactly() {
    needs!(Feature::Bpf);
    counted(&ON);
}

// Each way to attach has its own way to raise the counter.
#[test]
fn otel_memory_tracepoints_are_counted_exactly_by_perf_events() {
    needs!(Feature::Bpf, Feature::Backend("perf"));
    counted(&[&ON[..], &["--set", "collector.backend=perf"]].concat());
}

#[test]
fn otel_memory_tracepoints_are_counted_exactly_by_multi_links() {
    needs!(Feature::Bpf, Feature::Backend("multi"));
    counted(&[&ON[..], &["--set", "collector.backend=multi"]].concat());
}

// Nobody asked for them: the program's sampler stays off.
#[test]
fn otel_memory_tracepoints_are_off_by_default() {
    needs!(Feature::Bpf);
    let mut program = Program::start("tracepoints");
    let mut memleak = Memleak::watch(program.pid());
    program.step("done");
    assert_eq!(memleak.settled().totals, Counts::default());
    program.step("listeners 0");
}

// A tracepoint without the argument that the manifest wants must not be counted as if it had it.
#[test]
fn missing_argument_of_a_tracepoint_is_named() {
    needs!(Feature::Bpf);
    let folder = plugins(
        r#"
        name = "wrong"
        kind = "usdt"
        domain = "wrong"
        [[function]]
        symbol = "otel_memory:alloc"
        role = "alloc"
        size = { arg = 3 }
        returns = { block_in_arg = 0 }
        [[function]]
        symbol = "otel_memory:free"
        role = "free"
        old = { arg = 0 }
        "#,
    );
    let program = Program::start("tracepoints");
    let pid = program.pid().to_string();
    let args = [&["doctor", "-p", &pid][..], &option(&folder)].concat();
    let (_, text, _) = output_within(memleak_command().args(args));
    assert!(text.contains("tracepoint otel_memory:alloc has no argument 3"), "{text}");
}
