//! Rule files that change while running, the ways editors and people change them.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::support::*;
use crate::config::RuleSettings;
use crate::rules::{ReloadEvent, ReloadOutcome, RuleEngine};

/// A rule that finds everything and says `word`.
fn rule(word: &str) -> String {
    format!(
        "return {{ name = 'test', description = 'x', evaluate = function(site)
          return {{severity = 'info', confidence = 1, reason = '{word}'}} end }}\n"
    )
}

struct Watched {
    dir: tempfile::TempDir,
    engine: RuleEngine,
    simulation: Simulation,
}

impl Watched {
    fn new(files: &[(&str, &str)]) -> Watched {
        let dir = tempfile::tempdir().expect("temporary folder");
        for (name, text) in files {
            write(&dir.path().join(name), text);
        }
        let settings = RuleSettings { dir: Some(dir.path().to_owned()), ..RuleSettings::default() };
        let engine = RuleEngine::new(&settings).expect("rules");
        let mut simulation = Simulation::new(1.0, 1, vec![("leak", shapes::leak(1_000.0, 100))]);
        simulation.step();
        simulation.step();
        // The watch is set up by the thread; a change before that is noticed later, which would only make tests slow.
        sleep(Duration::from_millis(200));
        Watched { dir, engine, simulation }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Polls until there are events.
    #[track_caller]
    fn events(&mut self) -> Vec<ReloadEvent> {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(20) {
            let before = Instant::now();
            let events = self.engine.poll(&self.simulation.history);
            assert!(before.elapsed() < Duration::from_secs(1), "polling must not block");
            if !events.is_empty() {
                return events;
            }
            sleep(Duration::from_millis(20));
        }
        panic!("no event within 20 s");
    }

    /// What rule `test` says now.
    fn says(&mut self) -> Option<String> {
        let said = evaluate(&mut self.engine, &self.simulation.history);
        assert!(said.errors.is_empty(), "{:?}", said.errors);
        said.findings.into_iter().find(|f| &*f.rule == "test").map(|f| f.reason)
    }
}

fn write(path: &Path, text: &str) {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).expect("folder");
    }
    fs::write(path, text).expect("rule file");
}

#[track_caller]
fn failed(events: &[ReloadEvent], text: &str) {
    let [ReloadEvent { outcome: ReloadOutcome::Failed(why), .. }] = events else { panic!("{events:?}") };
    assert!(why.contains(text), "{why} lacks {text}");
}

/// Written in place, and replaced by renaming as most editors do.
#[test]
fn a_changed_file_replaces_the_rule() {
    let mut w = Watched::new(&[("test.lua", &rule("one"))]);
    assert_eq!(w.says().as_deref(), Some("one"));
    write(&w.path("test.lua"), &rule("two"));
    let events = w.events();
    assert!(matches!(events[..], [ReloadEvent { outcome: ReloadOutcome::Changed, .. }]), "{events:?}");
    assert_eq!((events[0].file.clone(), events[0].rule.as_deref()), (w.path("test.lua"), Some("test")));
    assert_eq!(w.says().as_deref(), Some("two"));

    write(&w.path("test.lua.new"), &rule("three"));
    fs::rename(w.path("test.lua"), w.path("test.lua~")).expect("rename");
    fs::rename(w.path("test.lua.new"), w.path("test.lua")).expect("rename");
    let events = w.events();
    assert!(matches!(events[..], [ReloadEvent { outcome: ReloadOutcome::Changed, .. }]), "{events:?}");
    assert_eq!(w.says().as_deref(), Some("three"));
}

/// A broken version is reported with its place and the old one goes on, until a good one comes.
#[test]
fn a_broken_change_leaves_the_old_rule_running() {
    let mut w = Watched::new(&[("test.lua", &rule("one"))]);
    let head = &rule("two")[..40];
    for (text, why) in [
        (head, "test.lua:1: unfinished string"),
        ("", "must return a table, not nil"),
        ("return { name = 'growth', description = 'x', evaluate = function() end }", "a rule of the same name"),
        ("return { name = 'test', description = 'x',\n evaluate = function(s)\n return s.x.y end }", "test.lua:3:"),
        (
            "return { name = 'test', description = 'x',\n suppress = function(s)\n return 5 end }",
            "suppress must return",
        ),
        ("return { name = 'test', description = 'x', evaluate = function()\n while true do end end }", "test.lua:2:"),
    ] {
        write(&w.path("test.lua"), text);
        failed(&w.events(), why);
        assert_eq!(w.says().as_deref(), Some("one"));
    }
    write(&w.path("test.lua"), &rule("two"));
    w.events();
    assert_eq!(w.says().as_deref(), Some("two"));
}

/// A file that is written in pieces is read when it is whole.
#[test]
fn a_file_written_in_pieces_is_read_once() {
    use std::io::Write as _;
    let mut w = Watched::new(&[("test.lua", &rule("one"))]);
    let mut file = fs::File::create(w.path("test.lua")).expect("rule file");
    for piece in rule("two").as_bytes().chunks(20) {
        file.write_all(piece).expect("piece");
        file.sync_all().expect("piece");
        assert!(w.engine.poll(&w.simulation.history).is_empty(), "half a file was taken");
        sleep(Duration::from_millis(30));
    }
    let events = w.events();
    assert!(matches!(events[..], [ReloadEvent { outcome: ReloadOutcome::Changed, .. }]), "{events:?}");
    assert_eq!(w.says().as_deref(), Some("two"));
}

/// New rules run, removed ones do not, and a built-in rule that was replaced comes back.
#[test]
fn files_come_and_go() {
    let mut w = Watched::new(&[]);
    assert_eq!(w.says(), None);
    write(&w.path("test.lua"), &rule("new"));
    let events = w.events();
    assert!(matches!(events[..], [ReloadEvent { outcome: ReloadOutcome::Added, .. }]), "{events:?}");
    assert_eq!(w.says().as_deref(), Some("new"));
    fs::rename(w.path("test.lua"), w.path("other.lua")).expect("rename");
    let events = w.events();
    assert!(matches!(events[0].outcome, ReloadOutcome::Removed) && matches!(events[1].outcome, ReloadOutcome::Added));
    assert_eq!(w.says().as_deref(), Some("new"));
    fs::remove_file(w.path("other.lua")).expect("remove");
    assert!(matches!(w.events()[..], [ReloadEvent { outcome: ReloadOutcome::Removed, .. }]));
    assert_eq!(w.says(), None);

    let own = "return { name = 'growth', description = 'mine', evaluate = function() end }";
    let growth = |w: &Watched| w.engine.rules().find(|r| &*r.name == "growth").map(|r| r.description.clone());
    let description = |w: &Watched| growth(w).unwrap_or_default();
    write(&w.path("growth.lua"), own);
    assert!(matches!(w.events()[..], [ReloadEvent { outcome: ReloadOutcome::Changed, .. }]));
    assert_eq!(description(&w), "mine");
    fs::remove_file(w.path("growth.lua")).expect("remove");
    assert!(matches!(w.events()[..], [ReloadEvent { outcome: ReloadOutcome::Removed, .. }]));
    assert_ne!(description(&w), "mine");
}

/// A shared module that changes reaches the rules that use it; a broken one breaks none.
#[test]
fn shared_modules_are_reloaded() {
    let user = "local m = require('lib.word')\n".to_owned() + &rule("x").replace("'x'}", "m.word}");
    let mut w = Watched::new(&[("test.lua", &user), ("lib/word.lua", "return { word = 'one' }")]);
    assert_eq!(w.says().as_deref(), Some("one"));
    write(&w.path("lib/word.lua"), "return { word = }");
    failed(&w.events(), "lib/word.lua:1");
    assert_eq!(w.says().as_deref(), Some("one"));
    write(&w.path("lib/word.lua"), "return { word = 'two' }");
    while w.says().as_deref() != Some("two") {
        w.engine.poll(&w.simulation.history);
        sleep(Duration::from_millis(20));
    }
}

/// A folder that vanishes takes no rules away.
#[test]
fn a_folder_that_vanishes_is_reported() {
    let mut w = Watched::new(&[("test.lua", &rule("one"))]);
    fs::rename(w.dir.path(), w.dir.path().with_extension("gone")).expect("rename");
    failed(&w.events(), "failed to read the rules folder");
    assert_eq!(w.says().as_deref(), Some("one"));
    fs::rename(w.dir.path().with_extension("gone"), w.dir.path()).expect("rename");
}
