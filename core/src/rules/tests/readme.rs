//! Every example of `rules/README.md` is run.

use std::fs;

use super::support::*;
use crate::config::RuleSettings;
use crate::rules::RuleEngine;

const README: &str = include_str!("../../../../rules/README.md");

/// The code blocks of a language.
fn blocks(language: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut lines = README.lines();
    while let Some(line) = lines.next() {
        if line.strip_prefix("```") == Some(language) {
            let block: Vec<&str> = lines.by_ref().take_while(|l| !l.starts_with("```")).collect();
            blocks.push(block.join("\n"));
        }
    }
    blocks
}

/// Each Lua example is a whole rule: it must load, and run over leaks, caches and churn without an error.
#[test]
fn every_lua_example_runs() {
    let examples = blocks("lua");
    assert_eq!(examples.len(), 7);
    let dir = tempfile::tempdir().expect("temporary folder");
    for (i, example) in examples.iter().enumerate() {
        fs::write(dir.path().join(format!("example_{i}.lua")), example).expect("example");
    }
    let settings = RuleSettings { dir: Some(dir.path().to_owned()), ..RuleSettings::default() };
    let mut engine = RuleEngine::new(&settings).expect("examples load");
    let mut quiet_then_leak = shapes::leak(20_000.0, 1_000);
    let shapes: Vec<(&'static str, Shape)> = vec![
        ("leak", shapes::leak(2_000_000.0, 50_000)),
        ("buried", shapes::churn(100.0, 100, 0.1, 0.02)),
        ("cache", shapes::bounded_cache(10.0, 200e3, 15.0)),
        (
            "late",
            Box::new(move |heap, dt, rng| {
                if heap.now_s < 20.0 {
                    heap.alloc(100_000);
                } else if heap.now_s > 4_800.0 {
                    quiet_then_leak(heap, dt, rng);
                }
            }),
        ),
    ];
    let mut simulation = Simulation::new(20.0, 1, shapes);
    let said = simulation.run(&mut engine, 290);
    // The examples are no decoration: each that can say something about these shapes does.
    for (rule, shape) in [("outliers", "buried"), ("night_shift", "late"), ("dominant", "leak"), ("forgotten", "cache")]
    {
        let found = said.iter().any(|s| &*s.finding.rule == rule && s.shape == shape);
        assert_eq!(found, rule != "forgotten", "{rule} about {shape}");
    }
}

/// The settings example is valid for the shipped rules.
#[test]
fn the_settings_example_is_valid() {
    let examples = blocks("toml");
    assert_eq!(examples.len(), 1);
    let table: toml::Table = toml::from_str(&examples[0]).expect("TOML");
    let text = toml::to_string(&table["rules"]).expect("TOML");
    assert!(RuleEngine::check(&settings(&text)).is_empty());
}

/// The table of rules lists every shipped rule with the words of its description.
#[test]
fn the_table_lists_every_rule() {
    for rule in shipped().rules() {
        let row = README.lines().find(|l| l.starts_with(&format!("| `{}` |", rule.name)));
        let row = row.unwrap_or_else(|| panic!("no row for {}", rule.name));
        if rule.name.as_ref() != "suppressions" {
            let words = &rule.description;
            assert!(row.contains(words.as_str()), "{row} lacks {words}");
        }
    }
}

/// Every field and method that Lua can reach is documented.
#[test]
fn every_field_and_method_is_documented() {
    let api = include_str!("../api.rs");
    let mut names = Vec::new();
    for line in api.lines().map(str::trim) {
        let call = ["add_field_method_get(\"", "add_method(\""].iter().find_map(|c| line.split_once(c));
        let entry = line.strip_prefix('"').filter(|_| line.contains("\" => "));
        let name = call.map(|(_, rest)| rest).or(entry).and_then(|rest| rest.split('"').next());
        names.extend(name);
    }
    assert!(names.len() > 45, "{} names", names.len());
    for name in names {
        let documented = [format!("`{name}`"), format!("`{name}("), format!(":{name}(")];
        assert!(documented.iter().any(|d| README.contains(d.as_str())), "{name} is not documented");
    }
}
