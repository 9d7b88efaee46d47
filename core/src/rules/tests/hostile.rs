//! Rules that are broken, greedy or hostile: each must fail alone, quickly, and with its place.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::support::*;
use crate::config::RuleSettings;
use crate::finding::Finding;
use crate::rules::{Evaluation, RuleEngine};
use crate::units::Bytes;

/// A folder with one rule `test.lua` whose `evaluate` has this body; the body starts on line 2.
fn folder(body: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temporary folder");
    let text = format!("return {{ name = 'test', description = 'x', evaluate = function(site, p)\n{body}\nend }}\n");
    std::fs::write(dir.path().join("test.lua"), text).expect("test rule");
    dir
}

fn engine(dir: &tempfile::TempDir) -> RuleEngine {
    let settings = RuleSettings {
        dir: Some(dir.path().to_owned()),
        max_instructions: 1_000_000,
        max_memory: Bytes(32 << 20),
        ..RuleSettings::default()
    };
    RuleEngine::new(&settings).expect("test rule loads")
}

/// Runs a body over a leak (which `growth` finds) and a cache; what was said at the last of 30 snapshots.
fn run(body: &str) -> Evaluation {
    let dir = folder(body);
    let mut engine = engine(&dir);
    let shapes: Vec<(&'static str, Shape)> =
        vec![("leak", shapes::leak(50_000.0, 1_000)), ("queue", shapes::queue(1.0, 3.0))];
    let mut simulation = Simulation::new(1.0, 1, shapes);
    for _ in 0..30 {
        simulation.step();
    }
    evaluate(&mut engine, &simulation.history)
}

/// Runs a body that must fail with this text on this line, in time, while `growth` still finds the leak.
#[track_caller]
fn fails(body: &str, line: u32, text: &str) {
    let start = Instant::now();
    let evaluation = run(body);
    let took = start.elapsed();
    assert!(took < Duration::from_secs(20), "{body}: took {took:?}");
    let [error] = &evaluation.errors[..] else { panic!("{body}: {:?}", evaluation.errors) };
    assert_eq!(&*error.rule, "test");
    assert!(error.file.ends_with("/test.lua"), "{body}: {error}");
    assert!(error.message.contains(text), "{body}: {error}");
    assert_eq!(error.line, Some(line), "{body}: {error}");
    assert!(evaluation.findings.iter().any(|f| &*f.rule == "growth"), "{body}: the other rules must go on");
}

/// Endless loops end, also those that hide in pcall, metamethods, patterns and library functions that loop in C.
#[test]
fn endless_loops_are_stopped() {
    const LIMIT: &str = "more than 1000000 instructions";
    fails("while true do end", 2, LIMIT);
    fails("\n\n local n = 0 repeat n = n + 1 until false", 4, LIMIT);
    fails("while true do pcall(function() while true do end end) end", 2, LIMIT);
    fails("while true do pcall(error) end", 2, LIMIT);
    fails(
        "local t = setmetatable({}, {__index = function(t, k) return t[k + 1] end}) return pcall(function() for i = 1, 1e9 do local _ = #t end end)",
        2,
        LIMIT,
    );
    fails("return (('a'):rep(200)):find(('.-'):rep(12) .. 'b')", 2, LIMIT);
    fails("return (('a'):rep(2000)):match('(.-)(.-)(.-)(.-)b')", 2, LIMIT);
    fails("return (('('):rep(30000)):gsub('%b()', '')", 2, LIMIT);
    fails("for _ in (('a'):rep(3000)):gmatch('.-.-.-b') do end", 2, LIMIT);
    fails("return (''):rep(1 << 62), ('x'):rep(1 << 62)", 2, LIMIT);
    fails("table.move({}, 1, 1 << 61, 2)", 2, LIMIT);
    fails("table.move({}, 1, 2^61, 2)", 2, LIMIT);
    fails("table.move({}, '1', '2305843009213693952', 2)", 2, LIMIT);
    fails("local t = {} for i = 1, 1e5 do t[i] = i end while true do table.insert(t, 1, 1) end", 2, LIMIT);
    fails("local t = {} for i = 1, 1e5 do t[i] = i % 7 end while true do table.sort(t) end", 2, LIMIT);
}

/// Tables that lie about their length could keep C loops busy for years.
#[test]
fn table_functions_refuse_metatables() {
    let lying = "local t = setmetatable({}, {__len = function() return 1 << 60 end}) ";
    for call in ["table.insert(t, 1, 1)", "table.remove(t, 1)", "table.concat(t)", "table.sort(t)", "table.unpack(t)"] {
        fails(&format!("{lying}{call}"), 2, "tables without a metatable only");
    }
}

/// Memory is bounded too, in every way of eating it, and cannot be had by catching the error.
#[test]
fn memory_eaters_are_stopped() {
    // Lua's own report of it carries no place, so the function's first line has to do.
    const LIMIT: &str = "of memory";
    fails("local big = ('x'):rep(1e5) local t = {} for i = 1, 1e9 do t[i] = big .. i end", 1, LIMIT);
    fails("local s = 'x' while true do s = s .. s end", 1, LIMIT);
    fails("local s = 'x' while true do pcall(function() s = s .. s end) end", 2, LIMIT);
    fails("return (('x'):rep(64)):rep(700000)", 2, LIMIT);
    fails("return (('x'):rep(1e4)):gsub('x', ('y'):rep(1e4))", 2, LIMIT);
    // Small objects cost so many instructions that this limit comes first; the host's own objects count too.
    const EITHER: &str = "used more than";
    fails("local t = {} for i = 1, 1e7 do t[i] = {} end", 2, EITHER);
    fails("local t = {} while true do t[#t + 1] = ('x'):gmatch('.') end", 2, EITHER);
    fails("local t = {} while true do t[#t + 1] = site.series end", 2, EITHER);
}

/// Deep recursion is an error like any other.
#[test]
fn deep_recursion_is_an_error() {
    fails("local function f() return 1 + f() end f()", 1, "of memory");
    fails("local function f() return pcall(f) end while true do f() end", 2, "");
    fails("return ('x'):rep(300):find(('(x'):rep(100))", 2, "too many captures");
}

/// What a rule piled up before it failed is gone at the next snapshot.
#[test]
fn a_rule_that_failed_starts_afresh() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let text = "local calls = 0\nreturn { name = 'test', description = 'x', evaluate = function()\n\
                calls = calls + 1 if calls > 1 then error('call ' .. calls) end end }";
    std::fs::write(dir.path().join("test.lua"), text).expect("test rule");
    let mut engine = engine(&dir);
    let mut simulation = Simulation::new(1.0, 1, vec![("leak", shapes::leak(50_000.0, 1_000))]);
    simulation.step();
    let mut errors = Vec::new();
    for _ in 0..4 {
        simulation.step();
        let said = evaluate(&mut engine, &simulation.history).errors;
        errors.extend(said.into_iter().map(|e| (e.line, e.message)));
    }
    assert_eq!(errors, [(Some(3), "call 2".to_owned()), (Some(3), "call 2".to_owned())]);
}

/// Nothing of Lua that reaches files, code, time, chance or the collector is there.
#[test]
fn rules_cannot_reach_the_outside() {
    for name in [
        "io",
        "os",
        "package",
        "debug",
        "load",
        "loadfile",
        "dofile",
        "loadstring",
        "collectgarbage",
        "coroutine",
        "rawset",
        "xpcall",
        "warn",
        "_G",
        "_ENV.load",
        "math.random",
        "math.randomseed",
        "string.dump",
        "string.pack",
        "table.create",
        "jit",
        "bit32",
    ] {
        let body = format!(
            "local ok, value = pcall(function() return {name} end) if ok and value ~= nil then error('found') end"
        );
        let evaluation = run(&body);
        assert!(evaluation.errors.is_empty(), "{name}: {:?}", evaluation.errors);
    }
    fails("return os.time()", 2, "no global 'os' is available");
    fails("require('os')", 2, "no shared module 'lib.os' (known: glob, grow)");
    fails("require('../../etc/passwd')", 2, "no shared module");
}

/// What rules share, with each other or with the host, they cannot change.
#[test]
fn rules_cannot_change_their_surroundings() {
    fails("leaked = 1", 2, "rules cannot set globals: write 'local leaked'");
    fails("string.format = nil", 2, "'string' cannot be changed");
    fails("math.pi = 3", 2, "'math' cannot be changed");
    fails("units.bytes = nil", 2, "'units' cannot be changed");
    fails("getmetatable('').__index = {}", 2, "");
    fails("setmetatable(_ENV, {})", 2, "protected metatable");
    fails("setmetatable({}, {__gc = function() end})", 2, "'__gc' is not available");
    fails("setmetatable({}, {__mode = 'k'})", 2, "'__mode' is not available");
    fails("setmetatable({}, {__close = function() end})", 2, "'__close' is not available");
    fails("site.outstanding_bytes = 1", 2, "");
    fails("p.x = 1 site.series.slope = nil", 2, "");
}

/// A metatable that is changed after it was set has no effect: what was checked is what holds.
#[test]
fn metatables_cannot_be_changed_behind_the_check() {
    let body = "local mt = {__index = {x = 1}} local t = setmetatable({}, mt) mt.__gc = function() end mt.__index = nil
        if t.x ~= 1 or getmetatable(t) ~= false then error('changed') end";
    let evaluation = run(body);
    assert!(evaluation.errors.is_empty(), "{:?}", evaluation.errors);
}

/// A site kept from an earlier snapshot must not show another site's numbers.
#[test]
fn kept_objects_are_stale() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let text = "local kept\nreturn { name = 'test', description = 'x', evaluate = function(site)\n\
                kept = kept or site return kept.outstanding_bytes < 0 end }";
    std::fs::write(dir.path().join("test.lua"), text).expect("test rule");
    let mut engine = engine(&dir);
    let mut simulation = Simulation::new(1.0, 1, vec![("leak", shapes::leak(50_000.0, 1_000))]);
    simulation.step();
    simulation.step();
    assert!(evaluate(&mut engine, &simulation.history).errors.is_empty());
    simulation.step();
    let errors = evaluate(&mut engine, &simulation.history).errors;
    assert!(errors[0].message.contains("belongs to an earlier snapshot"), "{errors:?}");
}

/// Results are checked as strictly as files.
#[test]
fn rubbish_results_are_errors_with_a_place() {
    let fails = |result: &str, text: &str| fails(&format!("return {result}"), 1, text);
    fails("1", "evaluate must return nil or a table, not integer");
    fails("true", "must return nil or a table");
    fails("{}", "severity must be \"info\", \"warning\" or \"critical\", not nil");
    fails("{severity = 'fatal', confidence = 1, reason = 'x'}", "not \"fatal\"");
    fails("{severity = 'info', confidence = 0/0, reason = 'x'}", "confidence must be a number from 0 to 1, not NaN");
    fails("{severity = 'info', confidence = 1.5, reason = 'x'}", "not 1.5");
    fails("{severity = 'info', confidence = -1, reason = 'x'}", "not -1");
    fails("{severity = 'info', confidence = math.huge, reason = 'x'}", "not inf");
    fails("{severity = 'info', confidence = '1', reason = 'x'}", "confidence must be a number");
    fails("{severity = 'info', confidence = 1}", "reason must be a text, not nil");
    fails("{severity = 'info', confidence = 1, reason = ''}", "1 to 1000 bytes, not of 0");
    fails("{severity = 'info', confidence = 1, reason = ('x'):rep(1e6)}", "not of 1000000");
    fails(
        "{severity = 'info', confidence = 1, reason = 'x', severty = 1}",
        "unknown key 'severty'; did you mean severity?",
    );
    fails("{severity = {}, confidence = 1, reason = 'x'}", "not table");
}

/// Errors of any kind are one line with the place where they were raised.
#[test]
fn errors_carry_their_place() {
    fails("\n\nlocal x = nil\nreturn x.y", 5, "attempt to index a nil value (local 'x')");
    fails("error('own\\nwords')", 2, "own words");
    fails("error({1})", 2, "table");
    fails("error()", 2, "nil");
    fails("site:survival('x')", 2, "");
    fails("site.series.slope()", 2, "");
    fails("\nreturn ('x'):find('[')", 3, "missing ']'");
    // In a shared module the place is there.
    let evaluation = run("require('lib.grow').span(site.series)");
    let error = &evaluation.errors[0];
    assert_eq!((error.file.as_str(), error.line), ("rules/lib/grow.lua (built in)", Some(9)), "{error}");
}

/// A rule that fails for one site in many still judges the others, and says how often it failed.
#[test]
fn a_failure_costs_one_site_only() {
    let body = "if site.frames[1].func == 'queue' then error('no queues') end
        return {severity = 'info', confidence = 1, reason = site.frames[1].func}";
    let evaluation = run(body);
    assert_eq!(evaluation.errors.len(), 1);
    assert_eq!(evaluation.errors[0].failures, 1);
    assert_eq!(evaluation.errors[0].site.as_ref().map(|s| s.id), Some(2));
    let own: Vec<&Finding> = evaluation.findings.iter().filter(|f| &*f.rule == "test").collect();
    assert_eq!(own.len(), 1);
    assert_eq!(own[0].reason, "leak");
}

/// All calls of a rule together are bounded too: 10,000 sites times just below the limit would take minutes.
#[test]
fn cpu_time_is_bounded_over_all_sites() {
    let dir = folder("for _ = 1, 300000 do end");
    let mut engine = engine(&dir);
    let process = Arc::default();
    let mut snapshot = crate::snapshot::Snapshot { number: 1, time_s: 1.0, ..Default::default() };
    for id in 1..=10_000 {
        snapshot.sites.push(crate::snapshot::SiteSample {
            site: site(&process, id, "f"),
            totals: crate::snapshot::Totals { allocated_bytes: 1, allocated_count: 1, ..Default::default() },
            stderr: Default::default(),
            last_allocation_s: 0.0,
            cohorts: Vec::new(),
            lifetimes: [0; crate::snapshot::LIFETIME_CLASSES],
            reachability: None,
            kernel: None,
        });
    }
    let mut history = crate::history::History::default();
    history.push(&snapshot);
    let evaluation = evaluate(&mut engine, &history);
    assert_eq!(evaluation.errors.len(), 1);
    assert!(evaluation.errors[0].message.contains("2 s of CPU time in one snapshot"), "{:?}", evaluation.errors);
}
