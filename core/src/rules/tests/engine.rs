//! Loading, overriding, parameters, identities and what the engine adds to what rules say.

use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use super::support::*;
use crate::config::RuleSettings;
use crate::history::History;
use crate::labels::Labels;
use crate::rules::{Origin, ParamValue, RuleEngine, finding_id, loss_factor};
use crate::snapshot::{LIFETIME_CLASSES, Losses, Mode, Process, ProcessSample, Site, SiteSample, Snapshot, Totals};
use crate::symbolize::Frame;

fn in_dir(dir: &Path) -> RuleSettings {
    RuleSettings { dir: Some(dir.to_owned()), ..RuleSettings::default() }
}

/// A history of one snapshot with sites 1 to `n`, without frames.
fn history(n: u64, losses: Losses) -> History {
    let labels = Labels::from_cgroup("/system.slice/shop.service");
    let process = Arc::new(Process { instance: 1, pid: 42, labels, ..Process::default() });
    let mut snapshot = Snapshot { number: 1, time_s: 1.0, ..Snapshot::default() };
    snapshot.processes.push(ProcessSample {
        process: Arc::clone(&process),
        alive: true,
        hits: 990,
        losses,
        ..Default::default()
    });
    for id in 1..=n {
        let site = Arc::try_unwrap(site(&process, id, "f")).expect("sole owner");
        let totals = Totals { allocated_bytes: 100 * id, allocated_count: id, ..Totals::default() };
        snapshot.sites.push(SiteSample {
            site: Arc::new(Site { frames: OnceLock::new(), ..site }),
            totals,
            stderr: Default::default(),
            last_allocation_s: 0.5,
            cohorts: Vec::new(),
            lifetimes: [0; LIFETIME_CLASSES],
            reachability: None,
            kernel: None,
        });
    }
    let mut history = History::default();
    history.push(&snapshot);
    history
}

/// The shipped rules, by file name, each with a description and documented parameters.
#[test]
fn shipped_rules_describe_themselves() {
    let engine = shipped();
    let names: Vec<&str> = engine.rules().map(|r| &*r.name).collect();
    assert_eq!(
        names,
        [
            "at_exit",
            "definitely_lost",
            "growth",
            "imbalance",
            "kernel_growth",
            "reachable_growth",
            "slow_growth",
            "suppressions",
            "survival",
            "suspected",
            "threshold",
        ]
    );
    for rule in engine.rules() {
        assert!(rule.enabled && rule.origin == Origin::Embedded && rule.description.len() > 20, "{rule:?}");
        assert!(!rule.params.is_empty());
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../rules/{}.lua", rule.name));
        let text = fs::read_to_string(path).expect("rule file");
        let head: String = text.lines().take_while(|l| l.starts_with("--")).collect();
        for part in ["-- Arguments", "-- Sample "] {
            assert!(head.contains(part), "{} opens without {part}", rule.name);
        }
        for param in &rule.params {
            assert!(head.contains(&param.name), "{} does not document {}", rule.name, param.name);
        }
    }
}

/// Sites that are too small for a rule are passed over, by the value that holds: that of the settings.
#[test]
fn a_rule_sees_only_sites_that_are_large_enough_for_it() {
    let dir = tempfile::tempdir().expect("folder");
    let text = "return { name = 'n', description = 'x', params = { size = '300B' }, needs = { outstanding = 'size' }, \
                evaluate = function() return { severity = 'info', confidence = 1, reason = 'seen' } end }";
    fs::write(dir.path().join("n.lua"), text).expect("rule file");
    for (size, expected) in [("", 3), ("n.size = \"500B\"", 1), ("n.size = \"0B\"", 5)] {
        let settings = RuleSettings { dir: Some(dir.path().into()), ..settings(size) };
        let evaluation = evaluate(&mut RuleEngine::new(&settings).expect("rule"), &history(5, Losses::default()));
        let seen = evaluation.findings.iter().filter(|f| &*f.rule == "n").count();
        assert_eq!(seen, expected, "{size}: {:?}", evaluation.errors);
    }
}

/// What a rule says that it needs decides which sites it is called for, and nothing else does.
#[test]
fn a_rule_is_called_for_sites_that_have_what_it_needs() {
    let once: Shape = Box::new(|heap, _, _| {
        if heap.now_s < 0.15 {
            (0..100).for_each(|_| heap.alloc(1_000));
        }
    });
    let shapes = vec![("once", once), ("leak", shapes::leak(10_000.0, 1_000)), ("queue", shapes::queue(1.0, 3.0))];
    let mut simulation = Simulation::new(1.0, 1, shapes);
    (0..60).for_each(|_| simulation.step());
    let dir = tempfile::tempdir().expect("folder");
    let called_for = |simulation: &Simulation, needs: &str| -> Vec<&'static str> {
        let text = format!(
            "return {{ name = 'n', description = 'x', params = {{ size = '300KiB', old = '5s' }}, needs = {{ {needs} }}, \
             evaluate = function() return {{ severity = 'info', confidence = 1, reason = 'seen' }} end }}"
        );
        fs::write(dir.path().join("n.lua"), text).expect("rule file");
        let evaluation = evaluate(&mut RuleEngine::new(&in_dir(dir.path())).expect("rule"), &simulation.history);
        let of_site = |id| simulation.sites.iter().find(|s| s.site.id == id).map_or("", |s| s.name);
        let mut names: Vec<_> =
            evaluation.findings.iter().filter(|f| &*f.rule == "n").map(|f| of_site(f.site.id)).collect();
        names.sort_unstable();
        names
    };
    for (needs, expected) in [
        ("", &["leak", "once", "queue"][..]),
        ("outstanding = 99999", &["leak", "once", "queue"]),
        ("outstanding = 'size'", &["leak"]),
        ("rise = 1", &["leak", "queue"]),
        ("rise = 'size'", &["leak"]),
        ("generations = 3, age = 'old'", &["leak"]),
        ("generations = 1, age = 'old'", &["leak", "once"]),
        ("snapshots = 59", &["leak", "once", "queue"]),
        ("snapshots = 60", &[]),
        ("time = 58", &["leak", "once", "queue"]),
        ("time = 59", &[]),
        ("scan = true", &[]),
        ("kernel = true", &[]),
        ("kernel = false, windows = false", &["leak", "once", "queue"]),
        ("windows = true", &[]),
    ] {
        assert_eq!(called_for(&simulation, needs), expected, "{needs}");
    }
    simulation.process.mode = Mode::Estimated;
    simulation.kernel = Some(Arc::default());
    simulation.reachability = Some(Arc::default());
    simulation.step();
    for (needs, count) in
        [("windows = true, kernel = true, scan = true", 3), ("windows = false", 0), ("kernel = false", 0)]
    {
        assert_eq!(called_for(&simulation, needs).len(), count, "{needs}");
    }
}

/// The id is part of the alert format: it must stay the same for ever.
#[test]
fn finding_ids_never_change() {
    assert_eq!(finding_id("growth", 0x0123_4567_89ab_cdef), "7e98e0c3078911d2");
    assert_ne!(finding_id("growth", 1), finding_id("growth", 2));
    assert_ne!(finding_id("growth", 1), finding_id("survival", 1));
}

/// 10 of 1000 events lost cost 5 %; nothing lost costs nothing; however much is lost, half remains.
#[test]
fn losses_lower_the_confidence() {
    let sample = |hits, lost| ProcessSample {
        hits,
        losses: Losses { implicit_frees: lost, ..Losses::default() },
        ..ProcessSample::default()
    };
    assert_eq!(loss_factor(&sample(1_000, 0)), 1.0);
    assert_eq!(loss_factor(&sample(0, 0)), 1.0);
    assert!((loss_factor(&sample(990, 10)) - 0.95).abs() < 1e-12);
    assert_eq!(loss_factor(&sample(0, 10)), 0.5);

    let dir = tempfile::tempdir().expect("temporary folder");
    let text = "return { name = 'all', description = 'x', evaluate = function(site)
        return {severity = 'info', confidence = 0.8, reason = 'lost ' .. site.losses} end }";
    fs::write(dir.path().join("all.lua"), text).expect("rule");
    let mut engine = RuleEngine::new(&in_dir(dir.path())).expect("rules");
    let lossy = history(1, Losses { implicit_frees: 4, events_dropped: 6, ..Losses::default() });
    let findings = evaluate(&mut engine, &lossy).findings;
    assert!((findings[0].confidence - 0.8 * 0.95).abs() < 1e-12);
    assert_eq!(findings[0].reason, "lost 10");
}

/// A rule can look at one service only, and a label that a process has not is nil.
#[test]
fn labels_of_the_process_are_seen_by_rules() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let text = "return { name = 'all', description = 'x', evaluate = function(site)
        local p = site.process
        local has = tostring(p.container) .. tostring(p.pod) .. tostring(p.runtime)
        return {severity = 'info', confidence = 0.8, reason = p.unit .. ' in ' .. p.slice .. has} end }";
    fs::write(dir.path().join("all.lua"), text).expect("rule");
    let mut engine = RuleEngine::new(&in_dir(dir.path())).expect("rules");
    let findings = evaluate(&mut engine, &history(1, Losses::default())).findings;
    assert_eq!(findings[0].reason, "shop.service in system.slicenilnilnil");
}

/// `[rules.NAME]` changes what the rule sees, and `enabled = false` silences it.
#[test]
fn settings_reach_the_rules() {
    let engine = RuleEngine::new(&settings("growth = { min_bytes = \"1MiB\", enabled = false }")).expect("settings");
    let growth = engine.rules().find(|r| &*r.name == "growth").expect("growth");
    assert!(!growth.enabled);
    let param = growth.params.iter().find(|p| p.name == "min_bytes").expect("parameter");
    assert_eq!((&param.default, &param.value), (&ParamValue::Bytes(128 << 10), &ParamValue::Bytes(1 << 20)));

    let leak = || vec![("leak", shapes::leak(50_000.0, 1_000))];
    let mut off = RuleEngine::new(&settings("growth.enabled = false")).expect("settings");
    assert!(Simulation::new(1.0, 1, leak()).run(&mut off, 30).is_empty());
    let mut later = RuleEngine::new(&settings("growth.min_time = \"28s\"")).expect("settings");
    // The site is seen first in snapshot 2, after its first allocations.
    let said = Simulation::new(1.0, 1, leak()).run(&mut later, 40);
    assert_eq!(said[0].snapshot, 30);
}

/// Everything wrong is reported at once, each with rule, key, place and the way out.
#[test]
fn check_reports_every_problem() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let rule = |name: &str, text: &str| fs::write(dir.path().join(name), text).expect("rule");
    rule("a.lua", "return {\n  name = 'a'\n  description = 'x' }");
    rule("b.lua", "\nlocal x = nil\nreturn x.y");
    rule("c.lua", "return 5");
    rule("d.lua", "return { name = 'Bad Name', description = 'x', evaluate = function() end }");
    rule("e.lua", "return { name = 'e', description = 'x', evalute = function() end }");
    rule("f.lua", "return { name = 'f', description = 'x' }");
    rule("g.lua", "return { name = 'growth', description = 'x', evaluate = function() end }");
    rule("h.lua", "return { name = 'h', description = 'x', evaluate = 1 }");
    rule("i.lua", "return { name = 'i', description = 'x', params = { n = 'soon' }, evaluate = function() end }");
    rule("j.lua", "while true do end");
    rule("k.lua", "return { name = 'k', evaluate = function() end }");
    rule("l.lua", "\u{1b}Lua");
    let least = |name: &str| {
        let rule = format!("name = 'n', description = 'x', params = {{ size = '1KiB', t = '1s' }}, needs = {name}");
        format!("return {{ {rule}, evaluate = function() end }}")
    };
    rule("n.lua", &least("{ outstanding = 'siz' }"));
    rule("o.lua", &least("{ rise = 't' }"));
    rule("p.lua", &least("1024"));
    rule("q.lua", &least("{ outstandin = 1 }"));
    rule("r.lua", &least("{ scan = 1 }"));
    rule("s.lua", &least("{ age = 't' }"));
    rule(".hidden.lua", "not lua");
    rule("readme.txt", "not lua");
    fs::create_dir(dir.path().join("m.lua")).expect("folder");
    let errors: Vec<String> = RuleEngine::check(&in_dir(dir.path())).iter().map(|e| format!("{e:#}")).collect();
    let expected = [
        ("m.lua", "not a regular file"),
        ("a.lua:3", "'}' expected"),
        ("b.lua:3", "attempt to index a nil value (local 'x')"),
        ("c.lua", "a rule file must return a table, not integer"),
        ("d.lua", "the name \"Bad Name\" must be"),
        ("e.lua", "unknown key 'evalute'; did you mean evaluate?"),
        ("f.lua", "none of evaluate, evaluate_snapshot, evaluate_exit and suppress"),
        ("g.lua", "there is a rule of the same name in growth.lua"),
        ("h.lua", "evaluate must be a function, not a integer"),
        ("i.lua", "params.n: \"soon\" is not a size"),
        ("j.lua:1", "more than 1000000 instructions"),
        ("k.lua", "the table needs description, a text"),
        ("l.lua", ""),
        ("n.lua", "needs.outstanding names no parameter: 'siz'; did you mean size?"),
        ("o.lua", "needs.rise must be a size"),
        ("p.lua", "needs must be a table, not a integer"),
        ("q.lua", "needs has an unknown key 'outstandin'; did you mean outstanding?"),
        ("r.lua", "needs.scan must be true or false, not a integer"),
        ("s.lua", "needs.age says how old generations must be"),
    ];
    assert_eq!(errors.len(), expected.len(), "{errors:#?}");
    for (error, (place, why)) in errors.iter().zip(expected) {
        assert!(error.contains(place) && error.contains(why), "{error:?} lacks {place:?} or {why:?}");
    }
    let first = RuleEngine::new(&in_dir(dir.path())).err().expect("broken rules");
    assert_eq!(format!("{first:#}"), errors[0]);
}

/// A wrong name in the settings is found, and the nearest one named.
#[test]
fn unknown_rules_and_parameters_are_errors() {
    let errors =
        |toml: &str| -> Vec<String> { RuleEngine::check(&settings(toml)).iter().map(ToString::to_string).collect() };
    assert_eq!(errors("growht.min_bytes = \"1MiB\""), ["rules.growht: there is no rule growht; did you mean growth?"]);
    let two = errors("growth = { min_byte = \"1MiB\", min_time = 5 }");
    assert_eq!(two.len(), 2, "{two:?}");
    assert!(two[0].contains("rules.growth.min_byte") && two[0].contains("did you mean min_bytes?"), "{two:?}");
    assert!(two[1].contains("rules.growth.min_time = 5: expected a duration such as \"30s\" (default 20s)"), "{two:?}");
}

/// A folder that is not there is named with the way out.
#[test]
fn a_missing_folder_is_an_error() {
    let error = RuleEngine::new(&in_dir(Path::new("/nowhere/rules"))).err().expect("missing folder");
    let text = format!("{error:#}");
    assert!(text.contains("/nowhere/rules") && text.contains("create it") && text.contains("No such file"), "{text}");
}

/// A file of the folder wins over the built-in one of the same name, shared modules too; others are added.
#[test]
fn files_of_the_folder_win() {
    let dir = tempfile::tempdir().expect("temporary folder");
    fs::create_dir(dir.path().join("lib")).expect("folder");
    fs::write(dir.path().join("lib/grow.lua"), "return { span = function() return 'mine' end }").expect("module");
    fs::write(dir.path().join("lib/own.lua"), "return { grow = require('lib.grow') }").expect("module");
    fs::write(
        dir.path().join("growth.lua"),
        "local own = require('lib.own')\nreturn { name = 'growth', description = 'mine', evaluate = function()
            return {severity = 'info', confidence = 1, reason = own.grow.span()} end }",
    )
    .expect("rule");
    let mut engine = RuleEngine::new(&in_dir(dir.path())).expect("rules");
    let growth = engine.rules().find(|r| &*r.name == "growth").expect("growth");
    assert_eq!(growth.origin, Origin::File(dir.path().join("growth.lua")));
    assert_eq!(growth.description, "mine");
    let said = evaluate(&mut engine, &history(1, Losses::default()));
    assert_eq!(said.findings.iter().map(|f| f.reason.as_str()).collect::<Vec<_>>(), ["mine"]);
}

/// Symbolizing is dear: it happens for sites whose frames are asked for, once, and not for what has frames already.
#[test]
fn only_sites_whose_frames_are_asked_for_are_symbolized() {
    let dir = tempfile::tempdir().expect("temporary folder");
    for name in ["one", "two"] {
        let text = format!(
            "return {{ name = '{name}', description = 'x', evaluate = function(site)
                if site.outstanding_count < 3 then return end
                local f = site.frames[1]
                return {{severity = 'info', confidence = 1, reason = f.func .. ' ' .. f.line .. ' ' .. tostring(f.file)}} end }}"
        );
        fs::write(dir.path().join(format!("{name}.lua")), text).expect("rule");
    }
    let mut engine = RuleEngine::new(&in_dir(dir.path())).expect("rules");
    let asked = RefCell::new(Vec::new());
    let history = history(4, Losses::default());
    let mut symbolize = |site: &Arc<Site>| {
        asked.borrow_mut().push(site.id);
        let frame = Frame { function: Some(format!("f{}", site.id)), line: Some(7), ..Frame::default() };
        site.frames.set(vec![frame]).expect("not symbolized before");
    };
    let evaluation = engine.evaluate(&history, &mut symbolize);
    assert!(evaluation.errors.is_empty(), "{:?}", evaluation.errors);
    let reasons: Vec<_> = evaluation.findings.iter().map(|f| f.reason.as_str()).collect();
    // Largest site first, by rule.
    assert_eq!(reasons, ["f4 7 nil", "f3 7 nil", "f4 7 nil", "f3 7 nil"]);
    assert_eq!(*asked.borrow(), [4, 3]);
}

/// `evaluate_snapshot` sees all sites and processes and names the sites it means.
#[test]
fn evaluate_snapshot_compares_sites() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let text = "return { name = 'top', description = 'x', evaluate_snapshot = function(snapshot, p)
        local found = {}
        for i, site in ipairs(snapshot.sites) do
          if i <= 2 then
            found[i] = {site = site, severity = 'warning', confidence = 1,
              reason = i .. ' of ' .. #snapshot.sites .. ' in ' .. #snapshot.processes .. ' at ' .. snapshot.time_s}
          end
        end
        found[3] = {site = 'x'}
        return found
      end }";
    fs::write(dir.path().join("top.lua"), text).expect("rule");
    let mut engine = RuleEngine::new(&in_dir(dir.path())).expect("rules");
    let evaluation = evaluate(&mut engine, &history(5, Losses::default()));
    let said: Vec<_> = evaluation.findings.iter().map(|f| (f.site.id, f.reason.as_str())).collect();
    assert_eq!(said, [(5, "1 of 5 in 1 at 1.0"), (4, "2 of 5 in 1 at 1.0")]);
    assert!(evaluation.errors[0].message.contains("finding 3: its site must be one of snapshot.sites"));
}
