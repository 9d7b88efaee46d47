//! What `memleak rules` prints and writes: the list of rules, the results of their examples, and a new rule's file.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::params::{ParamInfo, ParamValue, hint};
use super::{RuleEngine, RuleInfo, examples};
use crate::config::RuleSettings;
use crate::output::text::visible;
use crate::{Error, Result};

/// Every rule with its parameters: text for people, or one JSON object per line.
///
/// # Errors
/// As [`RuleEngine::new`].
pub fn list(settings: &RuleSettings, json: bool) -> Result<String> {
    let engine = RuleEngine::new(settings)?;
    let mut out = String::new();
    for rule in engine.rules() {
        if json {
            out.push_str(&format!("{}\n", as_json(rule)));
        } else {
            // Writing to a string cannot fail.
            let _ = as_text(&mut out, rule);
        }
    }
    Ok(out)
}

fn as_text(out: &mut String, rule: &RuleInfo) -> std::fmt::Result {
    let off = if rule.enabled { "" } else { " (switched off)" };
    writeln!(out, "{}{off}: {}", rule.name, visible(&rule.description))?;
    writeln!(out, "  from {}", visible(&rule.origin.to_string()))?;
    for param in &rule.params {
        let set = if param.value == param.default { String::new() } else { format!(" (default {})", param.default) };
        writeln!(
            out,
            "  {} = {}{}  {}",
            visible(&param.name),
            visible(&param.value.to_string()),
            visible(&set),
            kind(&param.default)
        )?;
    }
    writeln!(out)
}

fn as_json(rule: &RuleInfo) -> Value {
    let param = |p: &ParamInfo| {
        json!({
            "name": p.name, "kind": kind(&p.default), "unit": unit(&p.default),
            "default": plain(&p.default), "value": plain(&p.value), "value_text": p.value.to_string(),
        })
    };
    json!({
        "type": "rule", "name": &*rule.name, "description": rule.description, "origin": rule.origin.to_string(),
        "enabled": rule.enabled, "params": rule.params.iter().map(param).collect::<Vec<_>>(),
    })
}

fn kind(value: &ParamValue) -> &'static str {
    match value {
        ParamValue::Number(_) => "number",
        ParamValue::Flag(_) => "flag",
        ParamValue::Bytes(_) => "size",
        ParamValue::Rate(_) => "rate",
        ParamValue::Seconds(_) => "duration",
        ParamValue::Texts(_) => "texts",
    }
}

fn unit(value: &ParamValue) -> Option<&'static str> {
    match value {
        ParamValue::Bytes(_) => Some("bytes"),
        ParamValue::Rate(_) => Some("bytes per second"),
        ParamValue::Seconds(_) => Some("seconds"),
        ParamValue::Number(_) | ParamValue::Flag(_) | ParamValue::Texts(_) => None,
    }
}

fn plain(value: &ParamValue) -> Value {
    match value {
        ParamValue::Number(n) | ParamValue::Rate(n) | ParamValue::Seconds(n) => json!(n),
        ParamValue::Flag(on) => json!(on),
        ParamValue::Bytes(n) => json!(n),
        ParamValue::Texts(texts) => json!(texts),
    }
}

/// Runs the examples of one rule, of the rules in a folder, or of all: the text, and whether all did as expected.
///
/// # Errors
/// A rule cannot be loaded, there is no such rule, or nothing has an example.
pub fn test(settings: &RuleSettings, what: Option<&str>) -> Result<(String, bool)> {
    let mut settings = settings.clone();
    let folder = what.map(PathBuf::from).filter(|path| path.is_dir());
    if let Some(folder) = &folder {
        settings.dir = Some(folder.clone());
    }
    let engine = RuleEngine::new(&settings)?;
    let name = if folder.is_some() { None } else { what };
    let chosen = |rule: &RuleInfo| match (name, &folder) {
        (Some(name), _) => *rule.name == *name,
        (None, Some(_)) => matches!(rule.origin, super::Origin::File(_)),
        (None, None) => true,
    };
    let names: Vec<String> = engine.rules().filter(|r| chosen(r)).map(|r| r.name.to_string()).collect();
    if names.is_empty() {
        return Err(Error::config(match name {
            Some(name) => {
                let known: Vec<&str> = engine.rules().map(|r| &*r.name).collect();
                format!("there is no rule and no folder {name}; {}", hint(name, known))
            }
            None => "there is no rule in this folder".to_owned(),
        }));
    }
    let (mut out, mut run, mut failed) = (String::new(), 0, 0);
    for name in names {
        let results = examples::run(&settings, &name)?.unwrap_or_default();
        if results.is_empty() {
            out.push_str(&format!("{name}: no examples\n"));
        }
        for result in results {
            run += 1;
            let example = visible(&result.name).into_owned();
            match result.failure {
                None => out.push_str(&format!("{name}: ok: {example} ({})\n", result.expected)),
                Some(why) => {
                    failed += 1;
                    out.push_str(&format!("{name}: FAILED: {example}: {}\n", visible(&why)));
                }
            }
        }
    }
    out.push_str(&format!("{run} examples, {failed} failed\n"));
    Ok((out, failed == 0 && run > 0))
}

/// A leak that was recorded, for new rules to be tried on.
const RECORDING: &[u8] = include_bytes!("../../../rules/recordings/leak.memleak");

/// Writes a new rule with examples, and a recording for them, into a folder; the path of the rule.
///
/// # Errors
/// The name is none, there is such a rule or file already, or the folder cannot be written.
pub fn create(name: &str, dir: &Path) -> Result<PathBuf> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
        return Err(Error::config(format!(
            "{name:?} is no name for a rule: 1 to 64 lower-case letters, digits and '_'"
        )));
    }
    if RuleEngine::new(&RuleSettings::default())?.rules().any(|r| *r.name == *name) {
        return Err(Error::config(format!("there is a built-in rule {name} already: take another name")));
    }
    std::fs::create_dir_all(dir)
        .map_err(|e| Error::io(format!("failed to make the folder {} for the new rule", dir.display()), e))?;
    let path = dir.join(format!("{name}.lua"));
    write_new(&path, TEMPLATE.replace("NAME", name).as_bytes())?;
    write_new(&dir.join(format!("{name}-leak.memleak")), RECORDING).inspect_err(|_| {
        // A rule whose example is missing would spoil every run with this folder, and the next attempt.
        let _ = std::fs::remove_file(&path);
    })?;
    Ok(path)
}

/// Never over a file, and never through a link. What could not be written in full is removed.
fn write_new(path: &Path, contents: &[u8]) -> Result<()> {
    let failed = |e| Error::io(format!("failed to write {} of the new rule", path.display()), e);
    let mut file = OpenOptions::new().write(true).create_new(true).open(path).map_err(failed)?;
    file.write_all(contents).map_err(|e| {
        let _ = std::fs::remove_file(path);
        failed(e)
    })
}

/// A rule that works and says something: to be changed into what is wanted.
const TEMPLATE: &str = r#"-- Finds ... (say in one sentence what, and what it must not be taken for).
--
-- Arguments
--   min_bytes      least bytes outstanding at the site
--   min_snapshots  fewest snapshots of it
--
-- Sample finding
--   warning 0.50: holds 1.2 MiB in 1,204 blocks and grew by 1.1 MiB in 59s

local function evaluate(site, p)
  local series = site.series
  -- Half of it may go again without this being a leak.
  if series:growth() < site.outstanding_bytes / 2 or series:largest_drop() > series:growth() / 2 then
    return nil
  end
  return {
    severity = "warning",
    confidence = 0.5,
    reason = string.format("holds %s in %s blocks and grew by %s in %s", units.bytes(site.outstanding_bytes),
      units.count(site.outstanding_count), units.bytes(series:growth()), units.duration(series:duration())),
  }
end

return {
  name = "NAME",
  description = "a site has grown by half of what it holds",
  params = {
    min_bytes = "1MiB",
    min_snapshots = 20,
  },
  -- Sites without this are not asked about at all: with thousands of them that decides what a rule costs.
  needs = { outstanding = "min_bytes", snapshots = "min_snapshots" },
  evaluate = evaluate,
  -- What it must find and what it must leave alone; `memleak rules test NAME --rules DIR` runs them.
  examples = {
    { name = "a steady leak", shape = "leak", rate = "50KiB/s", size = "1KiB", snapshots = 60, expect = "warning" },
    { name = "too small yet", shape = "leak", rate = "1KiB/s", size = "256B", snapshots = 60, expect = "quiet" },
    { name = "a buffer that is flushed", shape = "sawtooth", period = 5, snapshots = 60, expect = "quiet" },
    -- Of a real program. Record your own with memleak --record, and put the file beside this one.
    { name = "a recorded leak", recording = "NAME-leak.memleak", func = "leak_steadily", expect = "warning" },
  },
}
"#;
