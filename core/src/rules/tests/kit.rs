//! The rule author's kit: examples, the list, new rules.

use crate::config::RuleSettings;
use crate::rules::kit;

/// A rule without examples, or with wrong ones, would be shipped untested.
#[test]
fn every_shipped_rule_does_what_its_examples_say() {
    let (text, good) = kit::test(&RuleSettings::default(), None).expect("runs");
    assert!(good && !text.contains("no examples"), "{text}");
    for rule in super::support::shipped().rules() {
        assert!(
            text.matches(&format!("\n{}: ok: ", rule.name)).count() + usize::from(text.starts_with(&*rule.name)) > 1,
            "{}",
            rule.name
        );
    }
}

/// An example that expects what the rule does not say must fail, or examples prove nothing; mistakes are named.
#[test]
fn wrong_examples_fail() {
    let dir = tempfile::tempdir().expect("folder");
    let rule = |examples: &str| {
        let text = format!(
            "return {{ name = 'big', description = 'd', evaluate = function(s) if s.outstanding_bytes > 100000 then \
             return {{ severity = 'info', confidence = 1, reason = 'big' }} end end, examples = {{ {examples} }} }}"
        );
        std::fs::write(dir.path().join("big.lua"), text).expect("written");
        kit::test(&RuleSettings::default(), dir.path().to_str()).expect("runs")
    };
    let (text, good) = rule("{ shape = 'leak', expect = 'info', snapshots = 9 }");
    assert!(good && text == "big: ok: example 1: leak (info)\n1 examples, 0 failed\n", "{text}");
    for (example, why) in [
        ("{ shape = 'leak', expect = 'quiet', snapshots = 9 }", "expected quiet, the rule said info"),
        ("{ shape = 'leak', expect = 'info', by = 2, snapshots = 9 }", "expected info by snapshot 2, it came at"),
        ("{ shape = 'leek', expect = 'info' }", "there is no shape \"leek\"; did you mean leak?"),
        ("{ shape = 'leak', expect = 'info', snapshot = 9 }", "unknown key 'snapshot'; did you mean snapshots?"),
        ("{ shape = 'leak', expect = 'info', rate = 'fast' }", "rate: "),
        (
            "{ shape = 'leak', expect = 'info', rate = '1GiB/s', size = '1B', snapshots = 2 }",
            "blocks at a time are more than 200000",
        ),
        ("{ shape = 'leak', expect = 'info', rate = '150kB/s', size = '1B' }", "grows beyond 200000 blocks"),
        ("{ expect = 'quiet' }", "it needs a shape or a recording"),
        ("{ recording = 'no.memleak', expect = 'quiet' }", "no.memleak: No such file"),
        ("{ recording = 'big.lua', expect = 'quiet' }", "big.lua: it is not a recording"),
        ("{ recording = '../x', expect = 'quiet' }", "must be the name of a file in the folder of the rule"),
        ("{ recording = 'x', shape = 'leak', expect = 'quiet' }", "shape says nothing about a recording"),
        ("{ shape = 'queue', expect = 'quiet', unit = '1ms' }", "unit must be at least interval / 100"),
    ] {
        let (text, good) = rule(example);
        assert!(!good && text.contains("FAILED") && text.contains(why), "{example}: {text}");
    }
    assert!(!rule("").1, "a folder without any example is not tested");
    let error = kit::test(&RuleSettings::default(), Some("grwoth")).expect_err("no such rule").to_string();
    assert!(error.contains("did you mean growth?"), "{error}");
}

/// What `rules new` writes is a rule whose examples pass; no file is overwritten and no built-in rule shadowed.
#[test]
fn a_new_rule_passes_its_own_examples() {
    let dir = tempfile::tempdir().expect("folder");
    let path = kit::create("my_rule", dir.path()).expect("written");
    assert_eq!(path, dir.path().join("my_rule.lua"));
    let (text, good) = kit::test(&RuleSettings::default(), dir.path().to_str()).expect("runs");
    assert!(good && text.contains("4 examples, 0 failed"), "{text}");
    assert!(kit::create("my_rule", dir.path()).is_err());
    assert!(path.exists(), "the first one is still there");
    // A rule without its recording would be one whose example fails.
    std::fs::write(dir.path().join("other-leak.memleak"), "mine").expect("a file");
    assert!(kit::create("other", dir.path()).is_err());
    assert!(!dir.path().join("other.lua").exists());
    for bad in ["", "My", "a/b", "../x", "growth"] {
        assert!(kit::create(bad, dir.path()).is_err(), "{bad}");
    }
}

/// The list has each parameter with its kind, unit, default and value.
#[test]
fn the_list_shows_parameters_with_their_values() {
    let settings = super::support::settings("growth = { min_bytes = \"1MiB\" }");
    let text = kit::list(&settings, false).expect("lists");
    assert!(text.contains("growth: ") && text.contains("  min_bytes = 1MiB (default "), "{text}");
    let json = kit::list(&settings, true).expect("lists");
    let rules: Vec<serde_json::Value> = json.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    let growth = rules.iter().find(|r| r["name"] == "growth").expect("growth");
    let param = growth["params"].as_array().expect("params").iter().find(|p| p["name"] == "min_bytes").expect("it");
    assert_eq!((&param["unit"], &param["value"]), (&"bytes".into(), &(1 << 20).into()));
    assert_eq!(rules.len(), 11);
}
