//! Examples that a rule brings along: what a heap does over time, and what the rule has to say about it.
//!
//! ```lua
//! examples = {
//!   { shape = "leak", rate = "30KiB/s", size = "4KiB", snapshots = 30, expect = "warning" },
//!   { shape = "sawtooth", period = 5, expect = "quiet" },
//! }
//! ```
//!
//! `memleak rules test` runs them, in the sandbox and within the limits of the rule. The shapes are those that the
//! shipped rules are tested with; instead of a shape an example can have a recording, which lies beside the rule.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use mlua::{Table, Value};

use super::params::hint;
use super::simulate::{Shape, Simulation, shapes};
use super::{Ending, Evaluation, Origin, RuleEngine};
use crate::config::RuleSettings;
use crate::finding::Severity;
use crate::history::{Bounds, History};
use crate::kernel::KernelSample;
use crate::reachability::roots::Root;
use crate::reachability::verdict::Tally;
use crate::reachability::{SiteVerdict, Verdict};
use crate::recording::{Filter, Reader};
use crate::snapshot::{Mode, ReachWay, SiteReach, Snapshot};
use crate::units::{self, Bytes};

/// Most examples of one rule, and most snapshots of one example.
const MAX_EXAMPLES: usize = 100;
const MAX_SNAPSHOTS: f64 = 2_000.0;
/// Largest heap of an example, in blocks: it is held in memory.
const MAX_BLOCKS: usize = 200_000;
/// Most units of a shape that pass from one snapshot to the next.
const MAX_UNITS: f64 = 100.0;
/// Keys of an example.
const KEYS: [&str; 22] = [
    "name",
    "shape",
    "recording",
    "at_end",
    "expect",
    "by",
    "interval",
    "snapshots",
    "seed",
    "unit",
    "params",
    "mode",
    "rss_rate",
    "kernel",
    "reachability",
    "func",
    "at_exit",
    "rate",
    "size",
    "lifetime",
    "leaked",
    "period",
];
/// Shapes by name.
const SHAPES: [&str; 11] = [
    "leak",
    "churn",
    "bursts",
    "keyed_cache",
    "bounded_cache",
    "warm_up",
    "sawtooth",
    "load_ramp",
    "thread_pool",
    "queue",
    "wandering_cache",
];
/// Keys that an example with a recording can have.
const RECORDING_KEYS: [&str; 7] = ["name", "recording", "at_end", "expect", "by", "params", "func"];
const VERDICTS: [&str; 5] = ["quiet", "info", "warning", "critical", "suppressed"];

/// What became of one example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExampleResult {
    /// Its name, or its number and shape.
    pub name: String,
    /// What was expected.
    pub expected: String,
    /// What the rule said at most; `None` when it did as expected.
    pub failure: Option<String>,
}

/// An example as written.
struct Example {
    name: String,
    /// Empty with a recording.
    shape: String,
    /// A file beside the rule.
    recording: Option<PathBuf>,
    /// Only what is said of the last snapshot counts.
    at_end: bool,
    expect: String,
    by: Option<u64>,
    interval_s: f64,
    snapshots: u64,
    seed: u64,
    unit_s: f64,
    params: toml::Table,
    windows: bool,
    rss_rate: f64,
    reachability: Option<Verdict>,
    kernel: Option<KernelSample>,
    /// Innermost function of the shape; of a recording, only sites with it count.
    func: Option<String>,
    at_exit: Option<Ending>,
    rate: f64,
    size: u64,
    lifetime_s: f64,
    leaked: f64,
    period: f64,
}

/// Runs all examples of one rule; `None` when there is no such rule.
///
/// The rule runs with its defaults and the parameters of each example: settings of this machine do not count.
pub fn run(settings: &RuleSettings, rule: &str) -> crate::Result<Option<Vec<ExampleResult>>> {
    let plain = RuleSettings { params: Default::default(), suppressions_file: None, ..settings.clone() };
    let engine = RuleEngine::new(&plain)?;
    let Some(found) = engine.rules.values().find(|r| *r.info.name == *rule) else { return Ok(None) };
    let Some(table) = &found.examples else { return Ok(Some(Vec::new())) };
    let mut results = Vec::new();
    for (i, item) in table.sequence_values::<Value>().take(MAX_EXAMPLES).enumerate() {
        let example = match item {
            Ok(Value::Table(table)) => read(i + 1, &table),
            Ok(other) => Err(format!("must be a table, not a {}", other.type_name())),
            Err(error) => Err(error.to_string()),
        };
        results.push(match example {
            Ok(example) => judge(&plain, rule, example),
            Err(why) => broken(format!("example {}", i + 1), why),
        });
    }
    Ok(Some(results))
}

fn broken(name: String, why: String) -> ExampleResult {
    ExampleResult { name, expected: "?".to_owned(), failure: Some(why) }
}

fn judge(settings: &RuleSettings, rule: &str, example: Example) -> ExampleResult {
    let mut settings = settings.clone();
    if !example.params.is_empty() {
        settings.params.insert(rule.to_owned(), example.params.clone());
    }
    let (name, expected) = (example.name.clone(), example.expect.clone());
    match verdict(&settings, rule, &example) {
        Ok((said, _)) if said != expected => {
            ExampleResult { failure: Some(format!("expected {expected}, the rule said {said}")), name, expected }
        }
        Ok((_, Some(at))) if example.by.is_some_and(|by| at > by) => {
            let by = example.by.unwrap_or(0);
            let why = format!("expected {expected} by snapshot {by}, it came at {at}");
            ExampleResult { failure: Some(why), name, expected }
        }
        Ok(_) => ExampleResult { name, expected, failure: None },
        Err(why) => ExampleResult { failure: Some(why), name, expected },
    }
}

/// What scans of a hundred blocks say when they end in a verdict.
fn scanned(verdict: Verdict, time_s: f64) -> SiteReach {
    let of = |blocks| Tally { blocks, bytes: 1_000 * blocks };
    let mut counts = SiteVerdict { scans: 3, ..SiteVerdict::default() };
    match verdict {
        Verdict::Definite => counts.lost = of(100),
        Verdict::Possible => counts.possible = of(100),
        Verdict::Reachable => counts.reachable = of(100),
        Verdict::Unknown => counts.disguised = of(100),
    }
    let root = Root::Global { module: "/srv/app".to_owned(), name: Some("table".to_owned()), offset: 0 };
    let way = (verdict == Verdict::Reachable).then(|| ReachWay { root, steps: Vec::new() });
    SiteReach { verdict, counts, time_s, way }
}

/// What a rule has said of an example so far.
struct Said<'a> {
    rule: &'a str,
    /// It judges findings of others.
    suppresses: bool,
    /// The most, and the snapshot at which it first said that.
    most: Option<(Severity, u64)>,
    /// The first snapshot at which it silenced something.
    suppressed: Option<u64>,
}

impl Said<'_> {
    /// Takes in what was said of a snapshot.
    fn note(&mut self, evaluation: &Evaluation, number: u64) -> Result<(), String> {
        if let Some(error) = evaluation.errors.first() {
            return Err(error.to_string());
        }
        for finding in evaluation.findings.iter().filter(|f| *f.rule == *self.rule) {
            if self.most.is_none_or(|(severity, _)| finding.severity > severity) {
                self.most = Some((finding.severity, number));
            }
        }
        if self.suppresses && !evaluation.suppressed.is_empty() {
            self.suppressed.get_or_insert(number);
        }
        Ok(())
    }
}

/// The most that the rule said, and the snapshot at which it first said that.
fn verdict(settings: &RuleSettings, rule: &str, example: &Example) -> Result<(String, Option<u64>), String> {
    let mut engine = RuleEngine::new(settings).map_err(|e| format!("{e:#}"))?;
    let suppresses = engine.rules.values().any(|r| *r.info.name == *rule && r.suppresses());
    if !suppresses {
        engine.rules.retain(|_, r| *r.info.name == *rule);
    }
    let mut said = Said { rule, suppresses, most: None, suppressed: None };
    match &example.recording {
        Some(name) => replay(&mut engine, &mut said, name, example)?,
        None => simulate(&mut engine, &mut said, example)?,
    }
    Ok(match (said.suppressed, said.most) {
        (Some(at), _) => ("suppressed".to_owned(), Some(at)),
        (None, Some((severity, at))) => (severity.as_str().to_owned(), Some(at)),
        (None, None) => ("quiet".to_owned(), None),
    })
}

fn simulate(engine: &mut RuleEngine, said: &mut Said<'_>, example: &Example) -> Result<(), String> {
    check_pace(example)?;
    // The name lives as long as the program: a handful of bytes per example, in a command that ends soon.
    let func = example.func.clone().unwrap_or_else(|| "allocate".to_owned());
    let func: &'static str = Box::leak(func.into_boxed_str());
    let mut simulation = Simulation::new(example.interval_s, example.seed, vec![(func, shape(example)?)]);
    for n in 1..=example.snapshots {
        if example.windows {
            simulation.process.mode = Mode::Estimated;
        }
        let grown = example.rss_rate * example.interval_s * (n - 1) as f64;
        simulation.process.rss_bytes = Some((64 << 20) + grown as u64);
        simulation.kernel = example.kernel.clone().map(Arc::new);
        simulation.reachability = example.reachability.map(|v| Arc::new(scanned(v, simulation.history.time_s())));
        simulation.step();
        if let Some(site) = simulation.sites.iter().find(|s| s.heap.len() > MAX_BLOCKS) {
            let why = format!("grows beyond {MAX_BLOCKS} blocks: lower rate, or raise size");
            return Err(format!("the heap of {} {why}", site.name));
        }
        let last = n == example.snapshots;
        let evaluation = match example.at_exit {
            None => engine.evaluate(&simulation.history, &mut |_| {}),
            Some(ending) if last => engine.evaluate_exit(&newest(&simulation), ending, &mut |_| {}),
            Some(_) => continue,
        };
        if last || !example.at_end {
            said.note(&evaluation, n)?;
        }
    }
    Ok(())
}

/// Runs a rule over a recording that lies beside its file.
fn replay(engine: &mut RuleEngine, said: &mut Said<'_>, name: &Path, example: &Example) -> Result<(), String> {
    let origin = engine.rules.values().find(|r| *r.info.name == *said.rule).map(|r| r.info.origin.clone());
    let Some(Origin::File(file)) = origin else { return Err("only a rule in a folder can have recordings".to_owned()) };
    let path = file.parent().unwrap_or(Path::new("")).join(name);
    let failed = |e: crate::Error| format!("{e:#}");
    let reader = Reader::open(&path).map_err(failed)?;
    let mut history = History::new(Bounds::default());
    let (count, filter) = (reader.contents().len() as u64, Filter::default());
    for (n, snapshot) in (1..).zip(reader.snapshots(&filter)) {
        history.push(&snapshot.map_err(failed)?);
        let mut damage = None;
        let mut name = |site: &Arc<_>| damage = reader.name(site).err().or(damage.take());
        let mut evaluation = engine.evaluate(&history, &mut name);
        if let Some(func) = &example.func {
            evaluation.findings.iter().for_each(|f| name(&f.site));
            evaluation.findings.retain(|f| f.site.frames().iter().any(|frame| frame.function.as_ref() == Some(func)));
        }
        if let Some(damage) = damage {
            return Err(failed(damage));
        }
        if n == count || !example.at_end {
            said.note(&evaluation, n)?;
        }
    }
    Ok(())
}

/// The newest snapshot of a simulation, as `memleak run` shows it to rules at the end of a process.
fn newest(simulation: &Simulation) -> History {
    let history = &simulation.history;
    let mut newest = History::new(Bounds::default());
    newest.push(&Snapshot {
        number: 1,
        time_s: history.time_s(),
        processes: vec![simulation.process.clone()],
        sites: history.sites().map(|h| h.latest.clone()).collect(),
        ..Snapshot::default()
    });
    newest
}

/// That no single snapshot is asked to make more blocks than fit: they are made before anybody can count them.
fn check_pace(e: &Example) -> Result<(), String> {
    let (size, span_s) = match e.shape.as_str() {
        "bursts" => (e.size, e.interval_s.max(e.period * e.unit_s)),
        "bounded_cache" => (4_096, e.interval_s),
        _ => (e.size, e.interval_s),
    };
    let births = e.rate * span_s / size as f64;
    if births > MAX_BLOCKS as f64 {
        return Err(format!("{births:.0} blocks at a time are more than {MAX_BLOCKS}: lower rate, or raise size"));
    }
    if e.interval_s > MAX_UNITS * e.unit_s {
        return Err(format!("unit must be at least interval / {MAX_UNITS}"));
    }
    Ok(())
}

fn shape(e: &Example) -> Result<Shape, String> {
    Ok(match e.shape.as_str() {
        "leak" => shapes::leak(e.rate, e.size),
        "churn" => shapes::churn(e.rate / e.size as f64, e.size, e.lifetime_s, e.leaked),
        "bursts" => {
            let every_s = e.period * e.unit_s;
            shapes::bursts(every_s, (e.rate * every_s / e.size as f64).max(1.0) as u64, e.size)
        }
        "keyed_cache" => shapes::keyed_cache(e.unit_s),
        "bounded_cache" => shapes::bounded_cache(e.unit_s, e.rate * e.unit_s, e.period),
        "warm_up" => shapes::warm_up(e.unit_s),
        "sawtooth" => shapes::sawtooth(e.unit_s, e.period),
        "load_ramp" => shapes::load_ramp(e.unit_s),
        "thread_pool" => shapes::thread_pool(e.unit_s),
        "queue" => shapes::queue(e.unit_s, e.period),
        "wandering_cache" => shapes::wandering_cache(e.unit_s),
        other => return Err(format!("there is no shape {other:?}; {}", hint(other, SHAPES))),
    })
}

fn read(number: usize, table: &Table) -> Result<Example, String> {
    for pair in table.pairs::<Value, Value>() {
        let key = pair.map_err(|e| e.to_string())?.0.to_string().unwrap_or_default();
        if !KEYS.contains(&key.as_str()) {
            return Err(format!("unknown key '{key}'; {}", hint(&key, KEYS)));
        }
    }
    let text = |key: &str| match table.raw_get::<Value>(key) {
        Ok(Value::Nil) => Ok(None),
        Ok(Value::String(text)) => Ok(Some(text.to_string_lossy())),
        _ => Err(format!("{key} must be a text")),
    };
    let number_in = |key: &str, default: f64, least: f64, most: f64| match table.raw_get::<Value>(key) {
        Ok(Value::Nil) => Ok(default),
        Ok(Value::Integer(n)) if (least..=most).contains(&(n as f64)) => Ok(n as f64),
        Ok(Value::Number(n)) if (least..=most).contains(&n) => Ok(n),
        _ => Err(format!("{key} must be a number from {least} to {most}")),
    };
    let seconds = |key: &str, default: f64| match text(key)? {
        None => Ok(default),
        Some(text) => {
            units::parse_duration(&text).map(|d| d.as_secs_f64().max(1e-3)).map_err(|e| format!("{key}: {e}"))
        }
    };
    let rate = |key: &str, default: f64| match text(key)? {
        None => Ok(default),
        Some(text) => units::parse_rate(&text).map_err(|e| format!("{key}: {e}")),
    };
    let recording = text("recording")?.map(PathBuf::from);
    let shape = match (&recording, text("shape")?) {
        (None, shape) => shape.ok_or("it needs a shape or a recording")?,
        (Some(name), _) => {
            check_recording(name, table)?;
            String::new()
        }
    };
    let expect = text("expect")?.ok_or("it needs expect")?;
    if !VERDICTS.contains(&expect.as_str()) {
        return Err(format!("expect cannot be {expect:?}; {}", hint(&expect, VERDICTS)));
    }
    let interval_s = seconds("interval", 1.0)?;
    let size = text("size")?.map_or(Ok(Bytes(1_024)), |t| Bytes::parse(&t)).map_err(|e| format!("size: {e}"))?.0;
    let by = match table.raw_get::<Value>("by") {
        Ok(Value::Nil) => None,
        Ok(Value::Integer(n)) if n > 0 => u64::try_from(n).ok(),
        _ => return Err("by must be the number of a snapshot".to_owned()),
    };
    let windows = match text("mode")?.as_deref() {
        None | Some("exact") => false,
        Some("estimated") => true,
        Some(other) => return Err(format!("mode must be \"exact\" or \"estimated\", not {other:?}")),
    };
    let kernel = match text("kernel")? {
        None => None,
        Some(word) => {
            let mut sample = KernelSample::default();
            match word.as_str() {
                "verifiable" => {}
                "unverifiable" => sample.unverifiable = Some("its frees are not seen".into()),
                "reclaimable" => sample.reclaimable = true,
                _ => {
                    let words = ["verifiable", "unverifiable", "reclaimable"];
                    return Err(format!("kernel cannot be {word:?}; {}", hint(&word, words)));
                }
            }
            Some(sample)
        }
    };
    let reachability = match text("reachability")? {
        None => None,
        Some(word) => {
            let verdicts = [Verdict::Definite, Verdict::Possible, Verdict::Reachable, Verdict::Unknown];
            let found = verdicts.into_iter().find(|v| v.as_str() == word);
            Some(found.ok_or_else(|| {
                format!("reachability cannot be {word:?}; {}", hint(&word, verdicts.map(Verdict::as_str)))
            })?)
        }
    };
    let at_exit = match text("at_exit")?.as_deref() {
        None => None,
        Some("exit") => Some(Ending::Exit),
        Some("signal") => Some(Ending::Signal),
        Some("running") => Some(Ending::Running),
        Some(other) => return Err(format!("at_exit must be \"exit\", \"signal\" or \"running\", not {other:?}")),
    };
    let params = match table.raw_get::<Value>("params") {
        Ok(Value::Nil) => toml::Table::new(),
        Ok(Value::Table(params)) => to_toml(&params)?,
        _ => return Err("params must be a table".to_owned()),
    };
    Ok(Example {
        name: match (text("name")?, &recording) {
            (Some(name), _) => name,
            (None, None) => format!("example {number}: {shape}"),
            (None, Some(name)) => format!("example {number}: {}", name.display()),
        },
        shape,
        recording,
        at_end: match table.raw_get::<Value>("at_end") {
            Ok(Value::Nil) => false,
            Ok(Value::Boolean(at_end)) => at_end,
            _ => return Err("at_end must be true or false".to_owned()),
        },
        expect,
        by,
        interval_s,
        snapshots: number_in("snapshots", 150.0, 1.0, MAX_SNAPSHOTS)? as u64,
        seed: number_in("seed", 1.0, 0.0, 1e9)? as u64,
        unit_s: seconds("unit", interval_s)?,
        params,
        windows,
        rss_rate: rate("rss_rate", 0.0)?,
        reachability,
        kernel,
        func: text("func")?,
        at_exit,
        rate: rate("rate", 50_000.0)?,
        size: size.max(1),
        lifetime_s: seconds("lifetime", 0.1 * interval_s)?,
        leaked: number_in("leaked", 0.0, 0.0, 1.0)?,
        period: number_in("period", 10.0, 0.1, 1e6)?,
    })
}

/// That a recording is a file beside the rule, and that nothing else says what happens.
fn check_recording(name: &Path, table: &Table) -> Result<(), String> {
    if name.as_os_str().is_empty() || !name.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(format!("recording {:?} must be the name of a file in the folder of the rule", name.display()));
    }
    for pair in table.pairs::<Value, Value>() {
        let key = pair.map_err(|e| e.to_string())?.0.to_string().unwrap_or_default();
        if !RECORDING_KEYS.contains(&key.as_str()) {
            return Err(format!("{key} says nothing about a recording; {}", hint(&key, RECORDING_KEYS)));
        }
    }
    Ok(())
}

/// Parameters as `[rules.NAME]` would have them.
fn to_toml(params: &Table) -> Result<toml::Table, String> {
    let mut out = toml::Table::new();
    for pair in params.pairs::<String, Value>() {
        let (key, value) = pair.map_err(|e| format!("params: {e}"))?;
        let value = match value {
            Value::Boolean(b) => toml::Value::Boolean(b),
            Value::Integer(n) => toml::Value::Integer(n),
            Value::Number(n) => toml::Value::Float(n),
            Value::String(text) => toml::Value::String(text.to_string_lossy()),
            Value::Table(list) => {
                let texts: mlua::Result<Vec<String>> = list.sequence_values::<String>().collect();
                let texts = texts.map_err(|e| format!("params.{key}: {e}"))?;
                toml::Value::Array(texts.into_iter().map(toml::Value::String).collect())
            }
            other => return Err(format!("params.{key} cannot be a {}", other.type_name())),
        };
        out.insert(key, value);
    }
    Ok(out)
}
