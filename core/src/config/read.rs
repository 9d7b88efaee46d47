//! Typed reading of the raw tree.
//!
//! [`Section`] hands out the keys of one table by type, checks units and ranges, and complains about what is left
//! over. Problems are collected, not returned: a user wants to see all of them at once.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::tree::{Entries, Entry, Node, Origin, Problem, Value};
use crate::finding::Severity;
use crate::units::{Bytes, format_duration, parse_duration};

/// What reading has found so far.
#[derive(Default)]
pub(super) struct Reader {
    pub problems: Vec<Problem>,
    /// Paths of all keys that have a meaning, whether given or not.
    pub known: BTreeSet<String>,
    /// Unknown keys; judged at the end, when all known ones have been seen.
    unknown: Vec<(String, String, Origin)>,
}

impl Reader {
    /// Turns unknown keys into problems, each with the most likely correction.
    pub fn finish(&mut self) {
        for (section, key, origin) in std::mem::take(&mut self.unknown) {
            let path = join(&section, &key);
            let siblings = self.known.iter().filter_map(|k| match section.as_str() {
                "" => (!k.contains('.')).then_some(k.as_str()),
                _ => k.strip_prefix(&section)?.strip_prefix('.').filter(|rest| !rest.contains('.')),
            });
            let near = nearest(&key, siblings).map(|n| join(&section, n));
            // The right key in the wrong table is as common as a misspelt one.
            let elsewhere = || self.known.iter().find(|k| k.rsplit('.').next() == Some(key.as_str())).cloned();
            let hint = near.or_else(elsewhere).map_or(String::new(), |n| format!("; did you mean `{n}`?"));
            self.problems.push(Problem { origin, text: format!("unknown key `{}`{hint}", path.escape_debug()) });
        }
        self.problems.sort();
    }

    /// Number of problems and unknown keys so far.
    pub fn count(&self) -> usize {
        self.problems.len() + self.unknown.len()
    }

    fn problem(&mut self, node: &Node, text: String) {
        self.problems.push(Problem { origin: node.origin.clone(), text });
    }
}

/// One table while it is being read.
pub(super) struct Section<'r> {
    pub reader: &'r mut Reader,
    path: String,
    entries: Entries,
}

impl<'r> Section<'r> {
    /// The whole tree.
    pub fn root(reader: &'r mut Reader, entries: Entries) -> Section<'r> {
        Section { reader, path: String::new(), entries }
    }

    /// One table of a list of tables; `path` is that of the list.
    pub fn item(reader: &'r mut Reader, path: &str, node: Node) -> Option<Section<'r>> {
        match node.value {
            Value::Table(entries) => Some(Section { reader, path: path.to_owned(), entries }),
            _ => {
                reader.problem(&node, format!("`{path}` must be a list of tables, not of {}", plural(&node.value)));
                None
            }
        }
    }

    /// Takes a table out; an absent one is empty.
    pub fn section(&mut self, key: &str) -> Section<'_> {
        let path = join(&self.path, key);
        self.reader.known.insert(path.clone());
        let entries = match self.entries.remove(key).map(|e| e.node) {
            None => Entries::new(),
            Some(Node { value: Value::Table(entries), .. }) => entries,
            Some(node) => {
                self.reader.problem(&node, format!("`{path}` must be a table, not {}", node.value.kind()));
                Entries::new()
            }
        };
        Section { reader: self.reader, path, entries }
    }

    /// Takes all entries that have not been asked for: tables named by the user.
    pub fn rest(&mut self) -> Entries {
        std::mem::take(&mut self.entries)
    }

    /// A table named by the user, taken by [`Section::rest`].
    pub fn named(&mut self, key: &str, entry: Entry) -> Option<Section<'_>> {
        let path = join(&self.path, &key.escape_debug().to_string());
        match entry.node.value {
            Value::Table(entries) => Some(Section { reader: self.reader, path, entries }),
            // A value here is a misspelt setting rather than a name.
            _ => {
                self.reader.unknown.push((self.path.clone(), key.to_owned(), entry.key_origin));
                None
            }
        }
    }

    /// Ends the table: what has not been asked for is unknown.
    pub fn finish(self) {
        for (key, entry) in self.entries {
            self.reader.unknown.push((self.path.clone(), key, entry.key_origin));
        }
    }

    /// Reads a key with a function; its error is completed with the path.
    pub fn read<T>(&mut self, key: &str, read: impl FnOnce(&Node) -> Result<T, String>) -> Option<T> {
        let path = join(&self.path, key);
        self.reader.known.insert(path.clone());
        let node = self.entries.remove(key)?.node;
        match read(&node) {
            Ok(value) => Some(value),
            Err(text) => {
                self.reader.problem(&node, format!("`{path}`: {text}"));
                None
            }
        }
    }

    /// A string that is checked by a function; an empty one is `None`.
    pub fn text(&mut self, key: &str, out: &mut Option<String>, parse: impl FnOnce(&str) -> Result<String, String>) {
        let read = |node: &Node| match string(node)? {
            "" => Ok(None),
            text => parse(text).map(Some),
        };
        set(out, self.read(key, read));
    }

    /// A path; an empty string is `None`.
    pub fn path(&mut self, key: &str, out: &mut Option<PathBuf>) {
        set(out, self.read(key, |node| string(node).map(|s| (!s.is_empty()).then(|| PathBuf::from(s)))));
    }

    /// A boolean.
    pub fn boolean(&mut self, key: &str, out: &mut bool) {
        set(out, self.read(key, boolean));
    }

    /// A whole number within a range.
    pub fn integer<T>(&mut self, key: &str, range: RangeInclusive<T>, out: &mut T)
    where
        T: TryFrom<i64> + PartialOrd + Display,
    {
        let read = |node: &Node| match node.value {
            Value::Integer(n) => T::try_from(n)
                .ok()
                .filter(|n| range.contains(n))
                .ok_or_else(|| format!("{n} is out of range: it must be from {} to {}", range.start(), range.end())),
            _ => Err(wrong_type("an integer", node)),
        };
        set(out, self.read(key, read));
    }

    /// A duration within a range.
    pub fn duration(&mut self, key: &str, range: RangeInclusive<Duration>, out: &mut Duration) {
        set(out, self.read(key, |node| duration(node, &range)));
    }

    /// A duration within a range; an empty string is `None`.
    pub fn optional_duration(&mut self, key: &str, range: RangeInclusive<Duration>, out: &mut Option<Duration>) {
        let read = |node: &Node| match &node.value {
            Value::String(s) if s.is_empty() => Ok(None),
            _ => duration(node, &range).map(Some),
        };
        set(out, self.read(key, read));
    }

    /// A size within a range: a string with a unit, or a number of bytes.
    pub fn bytes(&mut self, key: &str, range: RangeInclusive<Bytes>, out: &mut Bytes) {
        let read = |node: &Node| {
            let bytes = size(node)?;
            match range.contains(&bytes) {
                true => Ok(bytes),
                false => Err(format!("{bytes} is out of range: it must be from {} to {}", range.start(), range.end())),
            }
        };
        set(out, self.read(key, read));
    }

    /// One of a few words.
    pub fn choice<T: Copy>(&mut self, key: &str, choices: &[(&str, T)], out: &mut T) {
        let read = |node: &Node| {
            let text = string(node)?;
            let names = || choices.iter().map(|(n, _)| *n);
            choices.iter().find(|(n, _)| *n == text).map(|(_, value)| *value).ok_or_else(|| {
                let hint = nearest(text, names()).map_or(String::new(), |n| format!("; did you mean {n:?}?"));
                format!("{text:?} is none of {}{hint}", names().collect::<Vec<_>>().join(", "))
            })
        };
        set(out, self.read(key, read));
    }

    /// A severity.
    pub fn severity(&mut self, key: &str, out: &mut Severity) {
        let choices = [Severity::Info, Severity::Warning, Severity::Critical].map(|s| (s.as_str(), s));
        self.choice(key, &choices, out);
    }
}

/// The known word that was most likely meant; `None` when none is near.
///
/// Near is: few typing errors for the length, or one of the two contains the other.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    let cost = |candidate: &str| {
        let distance = strsim::osa_distance(&word, candidate);
        let contained =
            word.len() >= 3 && candidate.contains(&word) || candidate.len() >= 3 && word.contains(candidate);
        let allowed = (candidate.chars().count().max(word.chars().count()) / 3).max(1);
        (distance <= allowed || contained).then_some(distance)
    };
    known.into_iter().filter_map(|c| cost(c).map(|distance| (distance, c))).min().map(|(_, c)| c)
}

/// A string; for an override also what looked like another type.
pub(super) fn string(node: &Node) -> Result<&str, String> {
    match (&node.value, &node.raw) {
        (Value::String(s), _) => Ok(s),
        (_, Some(raw)) => Ok(raw),
        _ => Err(wrong_type("a string", node)),
    }
}

/// A boolean.
pub(super) fn size(node: &Node) -> Result<Bytes, String> {
    match &node.value {
        Value::String(s) => Bytes::parse(s),
        Value::Integer(n) => Ok(Bytes(u64::try_from(*n).map_err(|_| format!("{n} is no size: it is negative"))?)),
        _ => Err(wrong_type("a size such as \"64KiB\"", node)),
    }
}

pub(super) fn boolean(node: &Node) -> Result<bool, String> {
    match node.value {
        Value::Boolean(b) => Ok(b),
        _ => Err(wrong_type("true or false", node)),
    }
}

/// The message for a value of a wrong type.
pub(super) fn wrong_type(wanted: &str, node: &Node) -> String {
    match &node.value {
        Value::String(s) => format!("must be {wanted}, not the string {s:?}"),
        value => format!("must be {wanted}, not {}", value.kind()),
    }
}

fn duration(node: &Node, range: &RangeInclusive<Duration>) -> Result<Duration, String> {
    let duration = match &node.value {
        Value::String(s) => parse_duration(s)?,
        Value::Integer(n) => parse_duration(&n.to_string())?,
        _ => return Err(wrong_type("a duration such as \"30s\"", node)),
    };
    if range.contains(&duration) {
        return Ok(duration);
    }
    let (least, most) = (format_duration(*range.start()), format_duration(*range.end()));
    Err(format!("{} is out of range: it must be from {least} to {most}", format_duration(duration)))
}

fn set<T>(out: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *out = value;
    }
}

fn join(section: &str, key: &str) -> String {
    match section {
        "" => key.to_owned(),
        _ => format!("{section}.{key}"),
    }
}

fn plural(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "strings",
        Value::Integer(_) | Value::Float(_) => "numbers",
        Value::Boolean(_) => "booleans",
        Value::Datetime(_) => "dates",
        Value::Array(_) => "lists",
        Value::Table(_) => "tables",
    }
}
