//! The keys: which there are, their types and ranges, and where their values go.

use std::path::PathBuf;
use std::time::Duration;

use super::read::{Reader, Section, boolean, size, string, wrong_type};
use super::tree::{Entries, Node, Problem, Value};
use super::{Backend, Budget, Config, Latency, Placement, Stacks, TargetSpec, UnwindCache, WebhookSettings};
use crate::units::{Bytes, format_duration, parse_duration, parse_rate};

const MS: Duration = Duration::from_millis(1);
const DAY: Duration = Duration::from_secs(86_400);
/// Where cgroup paths start; users may write it or leave it out.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// The largest process id that Linux gives out (`PID_MAX_LIMIT`).
pub const MAX_PID: i64 = 4_194_304;

/// Reads the whole tree; keys that are not given keep their defaults. Problems are left in the reader.
pub(super) fn decode(reader: &mut Reader, entries: Entries) -> Config {
    let mut config = Config::default();
    let mut root = Section::root(reader, entries);
    root.duration("interval", 10 * MS..=DAY, &mut config.interval);
    root.optional_duration("duration", MS..=3_650 * DAY, &mut config.duration);
    collector(root.section("collector"), &mut config);
    // After the collector's settings, which bound a target's own.
    if let Some(nodes) = root.read("target", list_of_tables) {
        let most = config.collector.budget.max_slowdown;
        config.targets = nodes.into_iter().filter_map(|node| target(root.reader, node, most)).collect();
    }
    // Also without a target the keys of one are known, so that one that is misplaced can be named.
    for key in ["pid", "name", "exe", "cgroup", "container", "unit", "command", "budget", "latency"] {
        root.reader.known.insert(format!("target.{key}"));
    }
    super::kernel::kernel(root.section("kernel"), &mut config.kernel);
    history(root.section("history"), &mut config);
    plugins(root.section("plugins"), &mut config);
    rules(root.section("rules"), &mut config);
    alerts(root.section("alerts"), &mut config);
    report(root.section("report"), &mut config);
    let mut recording = root.section("recording");
    recording.path("path", &mut config.recording.path);
    recording.bytes("max_size", Bytes(1 << 20)..=Bytes(1 << 40), &mut config.recording.max_size);
    recording.finish();
    let mut templates = root.section("templates");
    templates.path("dir", &mut config.templates_dir);
    templates.finish();
    let mut live = root.section("live");
    live.integer("sites", 0..=1_000_000, &mut config.live.sites);
    live.finish();
    reachability(root.section("reachability"), &mut config);
    root.finish();
    config
}

/// Mean distances between samples that make sense, bytes: below, next to everything is recorded anyway.
const SAMPLE_BYTES: std::ops::RangeInclusive<u64> = 64..=memleak_probes::MAX_SAMPLE_BYTES;

fn collector(mut s: Section<'_>, config: &mut Config) {
    let c = &mut config.collector;
    let backends = [
        ("auto", Backend::Auto),
        ("session", Backend::Session),
        ("multi", Backend::Multi),
        ("perf", Backend::Perf),
        ("perf-plain", Backend::PerfPlain),
    ];
    s.choice("backend", &backends, &mut c.backend);
    s.integer("max_outstanding", 1..=200_000_000, &mut c.max_outstanding);
    s.integer("max_sites", 1..=4_194_304, &mut c.max_sites);
    s.integer("max_threads", 1..=4_194_304, &mut c.max_threads);
    s.integer("max_frames", 1..=127, &mut c.max_frames);
    s.bytes("min_size", Bytes(0)..=Bytes(1 << 40), &mut c.min_size);
    if let Some(mean) = s.read("sample_bytes", sample_bytes) {
        c.sample_bytes = mean;
    }
    s.choice("placement", &[("best", Placement::Best), ("entry", Placement::Entry)], &mut c.placement);
    s.choice("stacks", &[("auto", Stacks::Auto), ("frame-pointers", Stacks::FramePointers)], &mut c.stacks);
    s.boolean("python_frames", &mut c.python_frames);
    if let Some(cache) = s.read("unwind_cache", unwind_cache) {
        c.unwind_cache = cache;
    }
    let b = &mut c.budget;
    set_percent(&mut s, "max_slowdown", &mut b.max_slowdown);
    let most = b.max_slowdown;
    match s.read("budget", |node| budget(node, most)) {
        Some(Budget::Off) => b.share = None,
        Some(Budget::Share(share)) => b.share = Some(share),
        None => b.share = b.share.map(|share| share.min(most)),
    }
    match s.read("budget_floor", |node| share(node, most)) {
        Some(floor) => b.floor = floor,
        None => b.floor = b.floor.min(most),
    }
    set_percent(&mut s, "total_budget", &mut b.total);
    let interval = config.interval;
    // The rest is for windows that close late.
    let longest = Duration::from_secs_f64(0.8 * most);
    let read_window = |node: &Node| {
        let window = string(node).and_then(parse_duration)?;
        match window {
            w if w < 10 * MS => Err(format!("{} is too short: at least 10ms", format_duration(w))),
            w if w > interval => {
                let (w, i) = (format_duration(w), format_duration(interval));
                Err(format!("{w} is longer than the interval ({i}): a window must end before the next snapshot"))
            }
            w if w > longest => {
                let (w, longest) = (format_duration(w), format_duration(longest));
                Err(format!(
                    "{w} is too long: a busy target would be slowed down by more than max_slowdown ({:.0} %) in that \
                     second; at most {longest}",
                    most * 100.0
                ))
            }
            w => Ok(w),
        }
    };
    match s.read("max_window", read_window) {
        Some(window) => b.max_window = window,
        None => b.max_window = b.max_window.min(interval).min(longest).max(10 * MS),
    }
    s.integer("max_window_hits", 1_000..=u64::MAX, &mut b.max_window_hits);
    s.finish();
}

/// Mean bytes between two samples.
pub(super) fn sample_bytes(node: &Node) -> Result<Bytes, String> {
    let mean = size(node)?;
    if mean.0 == 0 || SAMPLE_BYTES.contains(&mean.0) {
        return Ok(mean);
    }
    let (least, most) = (Bytes(*SAMPLE_BYTES.start()), Bytes(*SAMPLE_BYTES.end()));
    Err(format!("{mean} is out of range: it must be 0B, which records everything, or from {least} to {most}"))
}

fn unwind_cache(node: &Node) -> Result<UnwindCache, String> {
    Ok(match string(node)? {
        "auto" => UnwindCache::Auto,
        "off" => UnwindCache::Off,
        "" => return Err("\"\" is no folder: give one, \"auto\", or \"off\" to keep nothing on disk".to_owned()),
        folder => UnwindCache::Folder(PathBuf::from(folder)),
    })
}

/// A part of something: a string such as "5%", more than 0 and at most 100 %.
pub(super) fn percent(node: &Node) -> Result<f64, String> {
    let text = string(node)?;
    let number = text.trim().strip_suffix('%').and_then(|n| n.trim().parse::<f64>().ok());
    match number {
        None => Err(format!("{text:?} is no percentage such as \"5%\"")),
        Some(n) if n > 0.0 && n <= 100.0 => Ok(n / 100.0),
        Some(n) => Err(format!("{n} % is out of range: it must be more than 0 % and at most 100 %")),
    }
}

/// "off", or a part of the target's CPU time.
fn budget(node: &Node, max_slowdown: f64) -> Result<Budget, String> {
    if string(node) == Ok("off") {
        return Ok(Budget::Off);
    }
    share(node, max_slowdown).map(Budget::Share)
}

/// A percentage that is not above what a hard stop would end.
fn share(node: &Node, max_slowdown: f64) -> Result<f64, String> {
    match percent(node)? {
        share if share > max_slowdown => Err(format!(
            "{:.0} % is above max_slowdown ({:.0} %), where all tracing is stopped: lower the one or raise the other",
            share * 100.0,
            max_slowdown * 100.0
        )),
        share => Ok(share),
    }
}

fn set_percent(s: &mut Section<'_>, key: &str, out: &mut f64) {
    if let Some(value) = s.read(key, percent) {
        *out = value;
    }
}

/// Bytes per second: a string such as "1GiB/s".
fn bandwidth(node: &Node) -> Result<f64, String> {
    let text = string(node)?;
    match parse_rate(text)? {
        rate if rate >= (1_u32 << 20).into() => Ok(rate),
        _ => Err(format!("{text:?} is too little: it must be at least 1MiB/s")),
    }
}

fn reachability(mut s: Section<'_>, config: &mut Config) {
    let r = &mut config.reachability;
    s.boolean("automatic", &mut r.automatic);
    s.duration("every", 1000 * MS..=DAY, &mut r.every);
    set_percent(&mut s, "core_share", &mut r.core_share);
    if let Some(value) = s.read("max_bandwidth", bandwidth) {
        r.max_bandwidth = value;
    }
    s.integer("max_blocks", 1_000..=1 << 30, &mut r.max_blocks);
    s.bytes("max_memory", Bytes(1 << 20)..=Bytes(1 << 50), &mut r.max_memory);
    s.choice("stop", &[("never", false), ("brief", true)], &mut r.stop);
    s.duration("max_stop", MS..=1000 * MS, &mut r.max_stop);
    s.boolean("at_exit", &mut r.at_exit);
    s.integer("scans", 2..=100, &mut r.limits.scans);
    s.integer("min_lost", 1..=u64::MAX, &mut r.limits.min_lost);
    set_percent(&mut s, "min_fraction", &mut r.limits.min_fraction);
    r.limits.most_scans = r.limits.most_scans.max(r.limits.scans);
    s.finish();
}

fn history(mut s: Section<'_>, config: &mut Config) {
    s.integer("samples", 32..=1_000_000, &mut config.history.samples);
    s.integer("points", 1_000..=1_000_000_000, &mut config.history.points);
    s.finish();
}

fn plugins(mut s: Section<'_>, config: &mut Config) {
    s.path("dir", &mut config.plugins.dir);
    for (name, entry) in s.rest() {
        let Some(mut plugin) = s.named(&name, entry) else { continue };
        if let Some(enabled) = plugin.read("enabled", boolean) {
            config.plugins.enabled.insert(name, enabled);
        }
        plugin.finish();
    }
    s.finish();
}

fn rules(mut s: Section<'_>, config: &mut Config) {
    s.path("dir", &mut config.rules.dir);
    s.path("suppressions_file", &mut config.rules.suppressions_file);
    s.integer("max_instructions", 1_000..=1_000_000_000_000, &mut config.rules.max_instructions);
    s.bytes("max_memory", Bytes(256 << 10)..=Bytes(64 << 30), &mut config.rules.max_memory);
    for (name, entry) in s.rest() {
        let Some(mut rule) = s.named(&name, entry) else { continue };
        let mut params = toml::Table::new();
        if let Some(enabled) = rule.read("enabled", boolean) {
            params.insert("enabled".to_owned(), toml::Value::Boolean(enabled));
        }
        // Which parameters there are is known to the rule alone.
        params.extend(rule.rest().into_iter().map(|(key, entry)| (key, entry.node.into_toml())));
        config.rules.params.insert(name, params);
    }
    s.finish();
}

fn alerts(mut s: Section<'_>, config: &mut Config) {
    let a = &mut config.alerts;
    s.path("file", &mut a.file);
    s.boolean("stdout", &mut a.stdout);
    s.duration("hold", Duration::ZERO..=30 * DAY, &mut a.hold);
    s.duration("cooldown", Duration::ZERO..=365 * DAY, &mut a.cooldown);
    s.severity("min_severity", &mut a.min_severity);
    let mut w = s.section("webhook");
    let mut url = None;
    let mut webhook = WebhookSettings::default();
    w.text("url", &mut url, parse_url);
    w.duration("timeout", 10 * MS..=Duration::from_secs(300), &mut webhook.timeout);
    w.integer("attempts", 1..=100, &mut webhook.attempts);
    w.integer("queue", 1..=1_000_000, &mut webhook.queue);
    w.text("template", &mut webhook.template, |text| Ok(text.to_owned()));
    w.finish();
    a.webhook = url.map(|url| WebhookSettings { url, ..webhook });
    s.finish();
}

fn report(mut s: Section<'_>, config: &mut Config) {
    let r = &mut config.report;
    s.path("path", &mut r.path);
    s.optional_duration("every", Duration::from_secs(1)..=365 * DAY, &mut r.every);
    s.integer("max_sites", 1..=1_000_000, &mut r.max_sites);
    s.text("title", &mut r.title, |text| Ok(text.to_owned()));
    s.finish();
}

/// Reads one `[[target]]`; problems are collected in the reader.
fn target(reader: &mut Reader, node: Node, max_slowdown: f64) -> Option<TargetSpec> {
    let origin = node.origin.clone();
    let before = reader.count();
    let mut s = Section::item(reader, "target", node)?;
    let mut t = TargetSpec { pid: s.read("pid", pids).unwrap_or_default(), ..TargetSpec::default() };
    s.text("name", &mut t.name, parse_glob);
    s.text("exe", &mut t.exe, parse_glob);
    s.text("cgroup", &mut t.cgroup, parse_cgroup);
    s.text("container", &mut t.container, parse_container);
    s.text("unit", &mut t.unit, parse_glob);
    t.command = s.read("command", command).unwrap_or_default();
    t.budget = s.read("budget", |node| budget(node, max_slowdown));
    s.choice("latency", &[("normal", Latency::Normal), ("sensitive", Latency::Sensitive)], &mut t.latency);
    s.finish();
    if reader.count() > before {
        // Its conditions may be the wrong ones; what is missing shows once they are right.
        return None;
    }
    let conditions = !t.pid.is_empty() || t.searches();
    let text = match (conditions, t.command.is_empty()) {
        (true, true) | (false, false) => return Some(t),
        (false, true) => "a target needs at least one of pid, name, exe, cgroup, container, unit or command",
        (true, false) => "a target with a command takes no other condition: give them a [[target]] of their own",
    };
    reader.problems.push(Problem { origin, text: text.to_owned() });
    None
}

fn list_of_tables(node: &Node) -> Result<Vec<Node>, String> {
    match &node.value {
        Value::Array(items) => Ok(items.clone()),
        Value::Table(_) => {
            Err("must be a list of tables: [[target]] with two brackets in a file, target=[{pid=1}] with --set"
                .to_owned())
        }
        _ => Err(wrong_type("a list of tables", node)),
    }
}

/// One process id or a list of them.
pub(super) fn pids(node: &Node) -> Result<Vec<u32>, String> {
    let one = |node: &Node| match node.value {
        Value::Integer(n) if (1..=MAX_PID).contains(&n) => u32::try_from(n).map_err(|e| e.to_string()),
        Value::Integer(n) => Err(format!("{n} is no process id: it must be from 1 to {MAX_PID}")),
        _ => Err(wrong_type("a process id or a list of them", node)),
    };
    match &node.value {
        Value::Array(items) => items.iter().map(one).collect(),
        _ => Ok(vec![one(node)?]),
    }
}

/// A list of arguments, or one string that is split like a shell does.
fn command(node: &Node) -> Result<Vec<String>, String> {
    let words: Vec<String> = match &node.value {
        Value::Array(items) => items.iter().map(|item| string(item).map(str::to_owned)).collect::<Result<_, _>>()?,
        _ => {
            let text = string(node).map_err(|_| wrong_type("a list of strings", node))?;
            split_command(text)?
        }
    };
    match words.first() {
        Some(program) if program.is_empty() => Err("the name of the program is empty".to_owned()),
        // A NUL cannot be passed to exec.
        _ if words.iter().any(|w| w.contains('\0')) => Err("a NUL character cannot be part of a command".to_owned()),
        _ => Ok(words),
    }
}

/// Splits a command by the quoting rules of a shell, without starting one: no variables, globs or pipes.
///
/// # Errors
/// An unclosed quote, or nothing but blanks.
pub fn split_command(text: &str) -> Result<Vec<String>, String> {
    match shlex::split(text) {
        None => Err(format!("a quote in {text:?} is not closed")),
        Some(words) if words.is_empty() => Err("the command is empty".to_owned()),
        Some(words) => Ok(words),
    }
}

/// Checks a glob and returns it.
///
/// # Errors
/// It is empty or cannot be compiled.
pub fn parse_glob(pattern: &str) -> Result<String, String> {
    match globset::Glob::new(pattern) {
        _ if pattern.is_empty() => Err("it is empty and would match nothing".to_owned()),
        Ok(_) => Ok(pattern.to_owned()),
        Err(e) => Err(format!("{pattern:?} is not a valid glob: {}", e.kind())),
    }
}

/// Checks a cgroup path and returns it without the mount point and outer slashes.
///
/// # Errors
/// It names the root or is not a plain path.
pub fn parse_cgroup(text: &str) -> Result<String, String> {
    let path = text.strip_prefix(CGROUP_ROOT).filter(|rest| rest.is_empty() || rest.starts_with('/')).unwrap_or(text);
    let path = path.trim_matches('/');
    if path.is_empty() {
        return Err(format!("{text:?} is the root of all cgroups: name one below it"));
    }
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(format!("{text:?} is not a plain path below {CGROUP_ROOT}"));
    }
    Ok(path.to_owned())
}

/// Checks the id of a container, the beginning of one, or a glob over them, and returns it.
///
/// # Errors
/// It is too short to name one container, or a glob that cannot be compiled.
pub fn parse_container(text: &str) -> Result<String, String> {
    match text.chars().count() {
        ..4 => Err(format!("{text:?} is too short: give at least 4 characters of the container's id")),
        _ => parse_glob(text),
    }
}

fn parse_url(url: &str) -> Result<String, String> {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    let host = rest.map(|r| r.split(['/', '?', '#']).next().unwrap_or_default());
    match host {
        None => Err(format!("{url:?} is no web address: it must start with http:// or https://")),
        Some(host) if host.is_empty() || url.contains(|c: char| c.is_whitespace() || c.is_control()) => {
            Err(format!("{url:?} is not a valid web address"))
        }
        Some(_) => Ok(url.to_owned()),
    }
}
