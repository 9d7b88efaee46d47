//! What has changed between two snapshots: of two recordings, or of two times of one.
//!
//! [`Difference::new`] is pure. Sites are matched by their stable id first (build ids and offsets, so the same build), and
//! what is left by the names in their stacks, so that a rebuilt program, in which every offset moved, is still compared.
//! Sites of several processes with the same identity are one: a service with eight workers has each site once.
//!
//! Outstanding bytes are compared as they are. Two runs that were watched for different times, or through windows, are
//! compared all the same, with a note that says so.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use crate::Result;
use crate::export::names;
use crate::output::report::heading;
use crate::output::templates::Templates;
use crate::snapshot::{Mode, SiteSample, Snapshot};
use crate::symbolize::Frame;
use crate::units::{Bytes, format_duration_s};

mod run;

pub use run::{Args, run};

/// From which change on a site counts as changed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Limits {
    /// Least change in outstanding bytes.
    pub min_bytes: u64,
    /// Least change as a part of what was outstanding before.
    pub min_share: f64,
}

/// What became of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// It had nothing outstanding before.
    New,
    /// It has more outstanding than before.
    Grew,
    /// It has less outstanding than before.
    Shrank,
    /// It has nothing outstanding any more.
    Gone,
}

/// What makes a difference fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum FailOn {
    /// A site that had nothing outstanding before
    New,
    /// A site that grew
    Grown,
    /// Nothing
    None,
}

/// One of the two snapshots.
#[derive(Clone, Debug, Serialize)]
pub struct Side {
    recording: String,
    snapshot: u64,
    time_s: f64,
    wall_s: f64,
    outstanding_bytes: u64,
    outstanding_count: u64,
    sites: usize,
    #[serde(skip)]
    estimated: bool,
}

/// How many sites have changed in which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// See [`Change::New`].
    pub new: usize,
    /// See [`Change::Grew`].
    pub grew: usize,
    /// See [`Change::Shrank`].
    pub shrank: usize,
    /// See [`Change::Gone`].
    pub gone: usize,
    /// Changed by less than the limits.
    pub unchanged: usize,
}

/// A site that has changed.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    change: Change,
    /// `id` or `names`; of a new or gone site, that nothing matched it.
    matched: &'static str,
    /// Stable ids before and after, most outstanding bytes first; several when names matched.
    ids_before: Vec<String>,
    ids_after: Vec<String>,
    name: String,
    place: String,
    caller: String,
    comm: String,
    probe_set: String,
    function: String,
    before_bytes: u64,
    before_count: u64,
    after_bytes: u64,
    after_count: u64,
    difference_bytes: i64,
    difference_count: i64,
    stack: Vec<StackFrame>,
}

/// A frame as it is shown.
#[derive(Clone, Debug, Serialize)]
struct StackFrame {
    name: String,
    place: String,
}

/// The whole difference: the context of its templates, and what `--json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    r#type: &'static str,
    version: &'static str,
    before: Side,
    after: Side,
    limits: Limits,
    counts: Counts,
    notes: Vec<String>,
    failed: bool,
    verdict: String,
    sites: Vec<Entry>,
}

/// Sites with one identity.
#[derive(Clone)]
struct Group<'a> {
    /// The largest of them, which the group is shown by.
    shown: &'a SiteSample,
    bytes: u64,
    count: u64,
    ids: Vec<u64>,
}

impl<'a> Group<'a> {
    fn of(sample: &'a SiteSample) -> Self {
        let t = &sample.totals;
        Group { shown: sample, bytes: t.outstanding_bytes(), count: t.outstanding_count(), ids: vec![sample.site.id] }
    }

    fn add(&mut self, other: Group<'a>) {
        if other.shown.totals.outstanding_bytes() > self.shown.totals.outstanding_bytes() {
            self.shown = other.shown;
        }
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.count = self.count.saturating_add(other.count);
        for id in other.ids {
            if !self.ids.contains(&id) {
                self.ids.push(id);
            }
        }
    }
}

impl Difference {
    /// Compares two snapshots; `names` are what their recordings are called.
    pub fn new(
        names: [&str; 2],
        before: &Snapshot,
        after: &Snapshot,
        limits: Limits,
        fail_on: &[FailOn],
    ) -> Difference {
        let (mut old, mut new) = (by_id(before), by_id(after));
        let mut pairs: Vec<(Option<Group<'_>>, Option<Group<'_>>, &'static str)> = Vec::new();
        let shared: Vec<u64> = old.keys().filter(|id| new.contains_key(id)).copied().collect();
        for id in shared {
            pairs.push((old.remove(&id), new.remove(&id), "id"));
        }
        let mut unmatched: BTreeMap<Key, [Option<Group<'_>>; 2]> = BTreeMap::new();
        for (side, groups) in [old, new].into_iter().enumerate() {
            for (_, group) in groups {
                match key(group.shown) {
                    Some(key) => {
                        let place = &mut unmatched.entry(key).or_default()[side];
                        match place {
                            Some(there) => there.add(group),
                            None => *place = Some(group),
                        }
                    }
                    // Nothing to match it by.
                    None if side == 0 => pairs.push((Some(group), None, "id")),
                    None => pairs.push((None, Some(group), "id")),
                }
            }
        }
        pairs.extend(unmatched.into_values().map(|[old, new]| (old, new, "names")));
        let mut counts = Counts::default();
        let mut sites: Vec<Entry> = Vec::new();
        for (old, new, matched) in pairs {
            let values = |g: &Option<Group<'_>>| g.as_ref().map_or((0, 0), |g| (g.bytes, g.count));
            let Some(change) = change(values(&old).0, values(&new).0, limits) else {
                counts.unchanged += usize::from(values(&old).0 > 0 || values(&new).0 > 0);
                continue;
            };
            *match change {
                Change::New => &mut counts.new,
                Change::Grew => &mut counts.grew,
                Change::Shrank => &mut counts.shrank,
                Change::Gone => &mut counts.gone,
            } += 1;
            sites.extend(Entry::new(change, matched, old, new));
        }
        sites.sort_by(|a, b| {
            // What grows is what one looks for; of the rest the largest comes first.
            (a.difference_bytes < 0)
                .cmp(&(b.difference_bytes < 0))
                .then_with(|| b.difference_bytes.unsigned_abs().cmp(&a.difference_bytes.unsigned_abs()))
                .then_with(|| (&a.name, &a.ids_after, &a.ids_before).cmp(&(&b.name, &b.ids_after, &b.ids_before)))
        });
        let (failed, verdict) = verdict(counts, limits, fail_on);
        let sides = [Side::new(names[0], before), Side::new(names[1], after)];
        let notes = notes(&sides);
        let [before, after] = sides;
        let version = env!("CARGO_PKG_VERSION");
        Difference { r#type: "diff", version, before, after, limits, counts, notes, failed, verdict, sites }
    }

    /// Whether something has changed that must not.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// How many sites have changed in which way.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// For a terminal: `diff.txt.tera`.
    ///
    /// # Errors
    /// The template fails.
    pub fn text(&self, templates: &Templates) -> Result<String> {
        templates.render_for("diff.txt.tera", "the difference", self)
    }

    /// A page that is complete in itself: `diff.html.tera`.
    ///
    /// # Errors
    /// The template fails.
    pub fn html(&self, templates: &Templates) -> Result<String> {
        #[derive(Serialize)]
        struct Context<'a> {
            #[serde(flatten)]
            difference: &'a Difference,
            nonce: String,
        }
        let context = Context { difference: self, nonce: crate::output::report::nonce() };
        templates.render_for("diff.html.tera", "the difference", &context)
    }
}

impl Side {
    fn new(recording: &str, snapshot: &Snapshot) -> Side {
        let totals = snapshot.totals();
        Side {
            recording: names::shown(recording),
            snapshot: snapshot.number,
            time_s: snapshot.time_s,
            wall_s: snapshot.wall_s,
            outstanding_bytes: totals.outstanding_bytes(),
            outstanding_count: totals.outstanding_count(),
            sites: snapshot.sites.len(),
            estimated: snapshot.processes.iter().any(|p| p.mode != Mode::Exact),
        }
    }
}

impl Entry {
    /// `None` when there is no site at all.
    fn new(change: Change, matched: &'static str, old: Option<Group<'_>>, new: Option<Group<'_>>) -> Option<Entry> {
        let shown = new.as_ref().or(old.as_ref())?.shown;
        let ids = |g: &Option<Group<'_>>| {
            g.as_ref().map_or(Vec::new(), |g| g.ids.iter().map(|id| format!("{id:016x}")).collect())
        };
        let values = |g: &Option<Group<'_>>| g.as_ref().map_or((0, 0), |g| (g.bytes, g.count));
        let ((before_bytes, before_count), (after_bytes, after_count)) = (values(&old), values(&new));
        let frames = names::frames(&shown.site);
        let stack: Vec<StackFrame> =
            frames.iter().map(|f| StackFrame { name: names::frame(f), place: place(f) }).collect();
        let head = heading(&frames).unwrap_or(0);
        let matched = if old.is_some() && new.is_some() { matched } else { "nothing" };
        let unknown = || format!("unknown caller of {}", names::shown(&shown.site.function));
        Some(Entry {
            change,
            matched,
            ids_before: ids(&old),
            ids_after: ids(&new),
            name: stack.get(head).map_or_else(unknown, |f| f.name.clone()),
            place: stack.get(head).map_or_else(String::new, |f| f.place.clone()),
            caller: stack.get(head + 1).map_or_else(String::new, |f| f.name.clone()),
            comm: names::shown(&shown.site.process.comm),
            probe_set: names::shown(&shown.site.probe_set),
            function: names::shown(&shown.site.function),
            before_bytes,
            before_count,
            after_bytes,
            after_count,
            difference_bytes: difference(before_bytes, after_bytes),
            difference_count: difference(before_count, after_count),
            stack,
        })
    }
}

/// Source file and line, else the file name of the module.
fn place(f: &Frame) -> String {
    match (&f.file, f.line, &f.module) {
        (Some(file), Some(line), _) => format!("{}:{line}", names::shown(file)),
        (Some(file), None, _) => names::shown(file),
        (None, _, Some(module)) => names::shown(names::file_name(module)),
        _ => String::new(),
    }
}

fn by_id(snapshot: &Snapshot) -> HashMap<u64, Group<'_>> {
    let mut groups: HashMap<u64, Group<'_>> = HashMap::new();
    for s in &snapshot.sites {
        match groups.get_mut(&s.site.id) {
            Some(group) => group.add(Group::of(s)),
            None => drop(groups.insert(s.site.id, Group::of(s))),
        }
    }
    groups
}

/// What a site is known by in another build: probe set, allocator function, process name, and the names in its stack.
type Key = (String, String, String, Vec<String>);

/// `None` for a stack without a single name: it would match any other.
fn key(sample: &SiteSample) -> Option<Key> {
    let site = &sample.site;
    let frames = site.frames();
    frames.iter().find(|f| f.function.is_some())?;
    // A frame without a name is known by its file.
    let name = |f: &Frame| f.function.clone().unwrap_or_else(|| f.module.clone().unwrap_or_default());
    let comm = site.process.comm.clone();
    Some((site.probe_set.to_string(), site.function.to_string(), comm, frames.iter().map(name).collect()))
}

fn difference(before: u64, after: u64) -> i64 {
    let size = i64::try_from(before.abs_diff(after)).unwrap_or(i64::MAX);
    if after < before { -size } else { size }
}

/// `None` below the limits.
fn change(before: u64, after: u64, limits: Limits) -> Option<Change> {
    let size = before.abs_diff(after);
    if size == 0 || size < limits.min_bytes || (size as f64) < limits.min_share * before as f64 {
        return None;
    }
    Some(match (before, after) {
        (0, _) => Change::New,
        (_, 0) => Change::Gone,
        _ if after > before => Change::Grew,
        _ => Change::Shrank,
    })
}

fn verdict(counts: Counts, limits: Limits, fail_on: &[FailOn]) -> (bool, String) {
    let mut parts = Vec::new();
    for (what, count, word) in [(FailOn::New, counts.new, "new"), (FailOn::Grown, counts.grew, "grown")] {
        if fail_on.contains(&what) && count > 0 {
            parts.push(format!("{count} {word} site{}", if count == 1 { "" } else { "s" }));
        }
    }
    let by = format!("by {} and {:.0} % or more", Bytes(limits.min_bytes), limits.min_share * 100.0);
    let watched: Vec<&str> = (fail_on.iter())
        .filter_map(|f| match f {
            FailOn::New => Some("new"),
            FailOn::Grown => Some("grown"),
            FailOn::None => None,
        })
        .collect();
    match (parts.is_empty(), watched.is_empty()) {
        (false, _) => (true, format!("{}, {by}.", parts.join(" and "))),
        (true, true) => (false, "Nothing was to be refused.".to_owned()),
        (true, false) => (false, format!("No {} site, {by}.", watched.join(" or "))),
    }
}

/// What makes the two sides hard to compare.
fn notes(sides: &[Side; 2]) -> Vec<String> {
    let mut notes = Vec::new();
    let [before, after] = sides;
    let (short, long) = (before.time_s.min(after.time_s), before.time_s.max(after.time_s));
    if before.recording != after.recording && long > 1.1 * short + 1.0 {
        notes.push(format!(
            "one run had been watched for {}, the other for {}: a steady leak holds more after the longer one",
            format_duration_s(before.time_s),
            format_duration_s(after.time_s)
        ));
    }
    if before.estimated || after.estimated {
        notes.push("some numbers are estimates, from a sample or from short periods of tracing".to_owned());
    }
    notes
}

#[cfg(test)]
mod tests;
