//! The report of a run as SARIF 2.1.0, for code scanning.
//!
//! A finding is a result with its rule, the call stack, and the innermost frame with file and line as its place.
//! The finding's id is a fingerprint, so that the same code is the same result in the next run. Files below the working
//! folder are relative to it, as code scanning wants them.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::finding::Severity;
use crate::live::frame_name;
use crate::output::text::visible;
use crate::run::{CommandEnd, Leak, RunReport, Suppressed};
use crate::symbolize::Frame;

const SCHEMA: &str = "https://json.schemastore.org/sarif-2.1.0.json";

/// The whole document.
///
/// # Errors
/// When it cannot be made into JSON.
pub fn render(report: &RunReport) -> serde_json::Result<String> {
    let root = std::env::current_dir().ok();
    let mut log = document(report, root.as_deref());
    if let Some(root) = &root {
        let uri = format!("file://{}/", encode(&root.to_string_lossy()).trim_end_matches('/'));
        log["runs"][0]["originalUriBaseIds"] = json!({ "SRCROOT": { "uri": uri } });
    }
    serde_json::to_string_pretty(&log).map(|text| text + "\n")
}

fn document(report: &RunReport, root: Option<&Path>) -> Value {
    let names: Vec<&String> = report.rules.keys().collect();
    let index = |rule: &str| names.iter().position(|n| *n == rule);
    let rules: Vec<Value> = report
        .rules
        .iter()
        .map(|(name, text)| json!({ "id": name, "name": name, "shortDescription": { "text": visible(text) } }))
        .collect();
    let mut results: Vec<Value> = report.findings.iter().map(|l| of_leak(l, index(&l.rule), root)).collect();
    results.extend(report.suppressed.iter().map(|s| of_suppressed(s, index(&s.rule), root)));
    let mut invocation = json!({
        "executionSuccessful": !matches!(report.command_end, CommandEnd::Killed(_)),
        "commandLine": visible(&report.command.join(" ")),
        "toolExecutionNotifications": report.notes.iter()
            .map(|n| json!({ "level": "note", "message": { "text": visible(n) } })).collect::<Vec<_>>(),
    });
    match report.command_end {
        CommandEnd::Exited(code) => invocation["exitCode"] = json!(code),
        CommandEnd::Killed(signal) => invocation["exitSignalNumber"] = json!(signal),
        CommandEnd::Running | CommandEnd::Unknown => {}
    }
    json!({
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": { "name": "memleak", "version": report.version, "rules": rules } },
            "invocations": [invocation],
            "columnKind": "unicodeCodePoints",
            "results": results,
        }],
    })
}

fn of_leak(leak: &Leak, rule_index: Option<usize>, root: Option<&Path>) -> Value {
    let level = match leak.severity {
        _ if leak.fails => "error",
        Severity::Critical => "error",
        Severity::Warning => "warning",
        Severity::Info => "note",
    };
    let mut result = result(&leak.rule, rule_index, &leak.id, &leak.frames, root);
    result["level"] = json!(level);
    let text = format!("{}: {}", leak.place, leak.reason);
    result["message"] = json!({ "text": visible(&text) });
    result["properties"] = json!({
        "bytes": leak.bytes, "blocks": leak.blocks, "confidence": leak.confidence, "exact": leak.exact,
        "processes": leak.processes, "comm": visible(&leak.comm), "failsRun": leak.fails,
    });
    result
}

fn of_suppressed(s: &Suppressed, rule_index: Option<usize>, root: Option<&Path>) -> Value {
    let mut result = result(&s.rule, rule_index, &s.id, &s.frames, root);
    result["level"] = json!("note");
    result["message"] = json!({ "text": visible(&s.place) });
    result["suppressions"] = json!([{ "kind": "external", "justification": visible(&s.by) }]);
    result
}

fn result(rule: &str, rule_index: Option<usize>, id: &str, frames: &[Frame], root: Option<&Path>) -> Value {
    let mut result = Map::new();
    result.insert("ruleId".into(), json!(rule));
    if let Some(index) = rule_index {
        result.insert("ruleIndex".into(), json!(index));
    }
    result.insert("partialFingerprints".into(), json!({ "memleakFinding/v1": id }));
    let place = frames.iter().find(|f| f.file.is_some() && f.line.is_some()).or(frames.first());
    let locations: Vec<Value> = place.map(|f| location(f, root)).into_iter().collect();
    result.insert("locations".into(), json!(locations));
    if !frames.is_empty() {
        let frames: Vec<Value> = frames.iter().map(|f| stack_frame(f, root)).collect();
        result.insert("stacks".into(), json!([{ "message": { "text": "allocated at" }, "frames": frames }]));
    }
    Value::Object(result)
}

fn stack_frame(frame: &Frame, root: Option<&Path>) -> Value {
    let mut out = json!({ "location": location(frame, root) });
    if let Some(module) = &frame.module {
        out["module"] = json!(visible(module));
    }
    out
}

/// A frame's place: the source file and line, else the module.
fn location(frame: &Frame, root: Option<&Path>) -> Value {
    let mut out = json!({
        "logicalLocations": [{ "fullyQualifiedName": frame_name(frame), "kind": "function" }],
        "message": { "text": frame_name(frame) },
    });
    let file = frame.file.as_deref().or(frame.module.as_deref().filter(|m| m.starts_with('/')));
    if let Some(file) = file {
        let mut physical = json!({ "artifactLocation": artifact(file, root) });
        if let (Some(line @ 1..), true) = (frame.line, frame.file.is_some()) {
            physical["region"] = json!({ "startLine": line });
        }
        out["physicalLocation"] = physical;
    }
    out
}

fn artifact(file: &str, root: Option<&Path>) -> Value {
    let path = Path::new(file);
    match root.and_then(|root| path.strip_prefix(root).ok()) {
        Some(below) => json!({ "uri": encode(&below.to_string_lossy()), "uriBaseId": "SRCROOT" }),
        None if path.is_absolute() => json!({ "uri": format!("file://{}", encode(file)) }),
        None => json!({ "uri": encode(file), "uriBaseId": "SRCROOT" }),
    }
}

/// A path as the path of a URI.
fn encode(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            out.push(byte.into());
        } else {
            // Writing to a string cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Viewers find a file only under a sound URI; below the working folder it has to be relative.
    #[test]
    fn files_become_uris() {
        let root = Some(Path::new("/src/app"));
        assert_eq!(artifact("/src/app/a b.c", root), json!({ "uri": "a%20b.c", "uriBaseId": "SRCROOT" }));
        assert_eq!(artifact("/usr/x#y.c", root), json!({ "uri": "file:///usr/x%23y.c" }));
        assert_eq!(artifact("../lib/z.c", root), json!({ "uri": "../lib/z.c", "uriBaseId": "SRCROOT" }));
    }
}
