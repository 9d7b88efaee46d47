//! The file format of speedscope: two sampled profiles over the same stacks, outstanding bytes and outstanding blocks.
//!
//! Relied on, of its published schema: `shared.frames` with `name`, `file` and `line`; profiles of type `sampled` with
//! `unit`, `startValue`, `endValue`, `samples` (frame numbers, outermost first) and `weights`.

use std::collections::HashMap;

use serde::Serialize;

use super::names;
use crate::snapshot::{SiteSample, Snapshot};

const SCHEMA: &str = "https://www.speedscope.app/file-format-schema.json";

/// The file.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct File {
    #[serde(rename = "$schema")]
    schema: &'static str,
    shared: Shared,
    profiles: Vec<Profile>,
    name: String,
    active_profile_index: usize,
    exporter: String,
}

#[derive(Debug, Serialize)]
struct Shared {
    frames: Vec<SharedFrame>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
struct SharedFrame {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u32>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    r#type: &'static str,
    name: &'static str,
    unit: &'static str,
    start_value: u64,
    end_value: u64,
    samples: Vec<Vec<usize>>,
    weights: Vec<u64>,
}

pub(super) fn file(snapshot: &Snapshot) -> File {
    let mut frames: Vec<SharedFrame> = Vec::new();
    let mut numbers: HashMap<SharedFrame, usize> = HashMap::new();
    let mut number = |frame: SharedFrame| {
        *numbers.entry(frame.clone()).or_insert_with(|| {
            frames.push(frame);
            frames.len() - 1
        })
    };
    let sites: Vec<&SiteSample> = snapshot.sites.iter().filter(|s| s.totals.outstanding_bytes() > 0).collect();
    let stacks: Vec<Vec<usize>> = (sites.iter())
        .map(|s| {
            let process = SharedFrame { name: names::process(&s.site.process), file: None, line: None };
            let mut stack = vec![number(process)];
            stack.extend(names::frames(&s.site).iter().rev().map(|f| {
                let file = f.file.as_deref().or(f.module.as_deref()).map(names::shown);
                // A line belongs to a source file.
                number(SharedFrame { name: names::frame(f), file, line: f.line.filter(|_| f.file.is_some()) })
            }));
            stack
        })
        .collect();
    let profile = |name, unit, weights: Vec<u64>| Profile {
        r#type: "sampled",
        name,
        unit,
        start_value: 0,
        end_value: weights.iter().fold(0, |sum: u64, w| sum.saturating_add(*w)),
        samples: stacks.clone(),
        weights,
    };
    let profiles = vec![
        profile("outstanding bytes", "bytes", sites.iter().map(|s| s.totals.outstanding_bytes()).collect()),
        profile("outstanding blocks", "none", sites.iter().map(|s| s.totals.outstanding_count()).collect()),
    ];
    File {
        schema: SCHEMA,
        shared: Shared { frames },
        profiles,
        name: super::description(snapshot),
        active_profile_index: 0,
        exporter: format!("memleak {}", env!("CARGO_PKG_VERSION")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::sample;

    /// Frames are shared, stacks begin outside, and the weights add up to the end.
    #[test]
    fn both_profiles_share_frames_and_add_up() {
        let value = serde_json::to_value(file(&sample::typical())).expect("JSON");
        let names: Vec<&str> =
            value["shared"]["frames"].as_array().expect("frames").iter().filter_map(|f| f["name"].as_str()).collect();
        assert_eq!(names[..4], ["shop (4711)", "main", "outer", "inner"]);
        assert_eq!(names.len(), 6);
        for (profile, unit, weights, end) in [(0, "bytes", [1_000, 70, 10], 1_080), (1, "none", [100, 7, 1], 108)] {
            let p = &value["profiles"][profile];
            assert_eq!((p["unit"].as_str(), p["endValue"].as_u64()), (Some(unit), Some(end)));
            assert_eq!(p["weights"], serde_json::json!(weights));
            assert_eq!(p["samples"], serde_json::json!([[0, 1, 2, 3], [0, 1, 4, 5], [0]]));
        }
    }
}
