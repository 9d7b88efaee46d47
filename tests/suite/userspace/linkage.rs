//! C libraries other than the usual one: musl, and both of them linked statically.

use memleak_tests::{Feature, Memleak, Program, needs};

use super::account;
use super::glibc::{assert_nothing_else, expected_common_kinds, expected_kinds};
use super::{assert_clean, assert_sites};

// musl has its own probe set; its functions nest differently from glibc's.
#[test]
fn musl_program_is_counted_exactly() {
    needs!(Feature::Bpf, Feature::Program("kinds-musl"));
    let (snapshot, _) = account("kinds-musl", &[]);
    let expected = expected_common_kinds();
    assert_sites(&snapshot, &expected);
    assert_nothing_else(&snapshot, &expected);
    assert!(snapshot.sites.iter().all(|site| site.probe_set == "musl"), "{:#?}", snapshot.callers());
}

// A static binary has the allocator in the executable itself; its symbol table says where.
#[test]
fn static_glibc_program_is_counted_exactly() {
    needs!(Feature::Bpf, Feature::Program("kinds-static"));
    let (snapshot, _) = account("kinds-static", &[]);
    let expected = expected_kinds();
    assert_sites(&snapshot, &expected);
    assert_nothing_else(&snapshot, &expected);
}

// The same with musl.
#[test]
fn static_musl_program_is_counted_exactly() {
    needs!(Feature::Bpf, Feature::Program("kinds-musl-static"));
    let (snapshot, _) = account("kinds-musl-static", &[]);
    let expected = expected_common_kinds();
    assert_sites(&snapshot, &expected);
    assert_nothing_else(&snapshot, &expected);
}

// Without symbols there is nothing to attach to; silence would read as "no leaks".
#[test]
fn stripped_static_program_is_refused_with_the_reason() {
    needs!(Feature::Bpf, Feature::Program("kinds-static-stripped"));
    let program = Program::start("kinds-static-stripped");
    let outcome = Memleak::launch(&["-p", &program.pid().to_string(), "--duration", "5s"]).outcome();
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    assert!(outcome.stderr.contains(&program.pid().to_string()), "names the process: {}", outcome.stderr);
    assert!(outcome.stderr.contains("symbol"), "says what is missing: {}", outcome.stderr);
}

// Together with a program that can be watched, the one that cannot is named and the other one counted.
#[test]
fn stripped_static_program_does_not_keep_others_from_being_watched() {
    needs!(Feature::Bpf, Feature::Program("kinds-static-stripped"));
    let stripped = Program::start("kinds-static-stripped");
    let mut program = Program::start("leaker");
    let mut memleak = Memleak::watch_with(program.pid(), &["-p", &stripped.pid().to_string()]);
    program.step("done");
    let snapshot = memleak.settled();
    assert_clean(&snapshot, program.pid());
    assert_eq!(snapshot.at("lose_some").outstanding_count, 7);
    memleak.wait_for_message(&stripped.pid().to_string());
}
