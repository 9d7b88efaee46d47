//! The raw settings: a tree of TOML values that remembers where each of them was written.
//!
//! The file is parsed into a tree, then `--set` and flags are laid over it; what the keys mean is the business of
//! `read`. Positions are kept so that a wrong value can be named with file, line and column, or with its flag.

use std::collections::BTreeMap;
use std::fmt;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Most syntax errors of one file that are reported: later ones mostly follow from the first.
const MAX_SYNTAX_ERRORS: usize = 5;

/// Where something was written. Ordered: the file from top to bottom, then overrides in the order given.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Origin {
    /// In the file, both from 1; columns count characters.
    File { line: usize, column: usize },
    /// By an override: its place among them, and how the user gave it (`--interval`, `--set a.b`).
    Override { index: usize, name: String },
}

/// A problem and where it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Problem {
    pub origin: Origin,
    pub text: String,
}

/// A value with its origin.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub value: Value,
    pub origin: Origin,
    /// The text of an override as it was typed: where a string is wanted, `--set report.title=2025` means "2025".
    pub raw: Option<String>,
}

/// A key of a table: where the key stands, and its value.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub key_origin: Origin,
    pub node: Node,
}

/// The entries of one table by key.
pub(super) type Entries = BTreeMap<String, Entry>;

/// A TOML value.
#[derive(Clone, Debug)]
pub(super) enum Value {
    String(String),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    Datetime(toml::value::Datetime),
    Array(Vec<Node>),
    Table(Entries),
}

impl Value {
    /// The type with its article, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::String(_) => "a string",
            Value::Integer(_) => "an integer",
            Value::Float(_) => "a number with decimals",
            Value::Boolean(_) => "a boolean",
            Value::Datetime(_) => "a date",
            Value::Array(_) => "a list",
            Value::Table(_) => "a table",
        }
    }
}

impl Node {
    /// The value without origins, for parameters that are passed on as they are.
    pub fn into_toml(self) -> toml::Value {
        match self.value {
            Value::String(s) => toml::Value::String(s),
            Value::Integer(n) => toml::Value::Integer(n),
            Value::Float(n) => toml::Value::Float(n),
            Value::Boolean(b) => toml::Value::Boolean(b),
            Value::Datetime(d) => toml::Value::Datetime(d),
            Value::Array(items) => toml::Value::Array(items.into_iter().map(Node::into_toml).collect()),
            Value::Table(entries) => {
                toml::Value::Table(entries.into_iter().map(|(key, entry)| (key, entry.node.into_toml())).collect())
            }
        }
    }
}

/// One setting from the command line; wins over the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    /// Key path with dots, such as `alerts.hold`.
    pub key: String,
    /// Text of the value: TOML if it can be read as such, a string otherwise.
    pub value: String,
    /// How the user gave it, for messages: `--interval`, `--set alerts.hold`.
    pub name: String,
}

impl Override {
    /// A setting given by a flag of its own.
    pub fn flag(name: &str, key: &str, value: impl fmt::Display) -> Override {
        Override { key: key.to_owned(), value: value.to_string(), name: name.to_owned() }
    }

    /// Reads the argument of `--set`: `key.path=value`.
    ///
    /// # Errors
    /// A sentence when there is no `=` or no key.
    pub fn parse_set(argument: &str) -> Result<Override, String> {
        match argument.split_once('=') {
            Some((key, value)) if !key.trim().is_empty() => {
                let key = key.trim().to_owned();
                Ok(Override { name: format!("--set {}", key.escape_debug()), key, value: value.trim().to_owned() })
            }
            _ => Err(format!("{argument:?} is not of the form key.path=value, such as alerts.hold=10s")),
        }
    }
}

/// Parses a file. With syntax errors the tree is not to be used.
pub(super) fn parse(text: &str) -> (Entries, Vec<Problem>) {
    // Editors of other systems put a byte order mark in front.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines = Lines::new(text);
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut problems: Vec<Problem> = errors
        .iter()
        .take(MAX_SYNTAX_ERRORS)
        .map(|e| Problem {
            origin: lines.origin(e.span().map_or(text.len(), |s| s.start)),
            text: e.message().to_owned(),
        })
        .collect();
    let entries = convert_table(table.into_inner(), &|at| lines.origin(at), &mut problems);
    (entries, problems)
}

/// Lays one override over the tree.
pub(super) fn apply(root: &mut Entries, index: usize, over: &Override) -> Result<(), Problem> {
    let origin = Origin::Override { index, name: over.name.clone() };
    let problem = |text| Problem { origin: origin.clone(), text };
    let path =
        key_path(&over.key).ok_or_else(|| problem(format!("{:?} is not a key path such as alerts.hold", over.key)))?;
    let Some((last, parents)) = path.split_last() else { return Ok(()) };
    let mut entries = root;
    for (depth, key) in parents.iter().enumerate() {
        let entry = entries.entry(key.clone()).or_insert_with(|| Entry {
            key_origin: origin.clone(),
            node: Node { value: Value::Table(Entries::new()), origin: origin.clone(), raw: None },
        });
        let kind = entry.node.value.kind();
        let Value::Table(inner) = &mut entry.node.value else {
            return Err(problem(format!("`{}` is {kind} and has no keys below it", path[..=depth].join("."))));
        };
        entries = inner;
    }
    let value = match DeValue::parse(&over.value) {
        Ok(parsed) => {
            let mut problems = Vec::new();
            let node = convert(parsed, &|_| origin.clone(), &mut problems);
            if let Some(first) = problems.pop() {
                return Err(first);
            }
            node.value
        }
        Err(_) => Value::String(over.value.clone()),
    };
    let node = Node { value, origin: origin.clone(), raw: Some(over.value.clone()) };
    entries.insert(last.clone(), Entry { key_origin: origin, node });
    Ok(())
}

/// Splits a key path by TOML's rules, so that `rules."my.rule".enabled` works.
fn key_path(key: &str) -> Option<Vec<String>> {
    // A line break would let the text say more than one key.
    if key.contains(['\n', '\r']) {
        return None;
    }
    let line = format!("{key} = 0");
    let mut table = DeTable::parse(&line).ok()?.into_inner();
    let mut path = Vec::new();
    loop {
        let (key, value) = std::mem::take(&mut table).into_iter().next()?;
        path.push(key.into_inner().into_owned());
        match value.into_inner() {
            DeValue::Table(inner) => table = inner,
            _ => return Some(path),
        }
    }
}

fn convert_table(table: DeTable<'_>, origin: &dyn Fn(usize) -> Origin, problems: &mut Vec<Problem>) -> Entries {
    let mut entries = Entries::new();
    for (key, value) in table {
        let key_origin = origin(key.span().start);
        let node = convert(value, origin, problems);
        entries.insert(key.into_inner().into_owned(), Entry { key_origin, node });
    }
    entries
}

fn convert(value: Spanned<DeValue<'_>>, origin: &dyn Fn(usize) -> Origin, problems: &mut Vec<Problem>) -> Node {
    let here = origin(value.span().start);
    let value = match value.into_inner() {
        DeValue::String(s) => Value::String(s.into_owned()),
        // The parser has checked the digits, so only the size of a number can be wrong here.
        DeValue::Integer(n) => i64::from_str_radix(n.as_str(), n.radix()).map_or_else(
            |_| {
                problems.push(Problem { origin: here.clone(), text: format!("the number {n} is too large") });
                Value::Integer(0)
            },
            Value::Integer,
        ),
        DeValue::Float(n) => Value::Float(n.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(b) => Value::Boolean(b),
        DeValue::Datetime(d) => Value::Datetime(d),
        DeValue::Array(items) => Value::Array(items.into_iter().map(|i| convert(i, origin, problems)).collect()),
        DeValue::Table(table) => Value::Table(convert_table(table, origin, problems)),
    };
    Node { value, origin: here, raw: None }
}

/// Line starts of a text.
struct Lines<'a> {
    text: &'a str,
    starts: Vec<usize>,
}

impl<'a> Lines<'a> {
    fn new(text: &'a str) -> Self {
        let starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Lines { text, starts }
    }

    fn origin(&self, at: usize) -> Origin {
        let line = self.starts.partition_point(|start| *start <= at);
        let start = self.starts[line - 1];
        let column = self.text.get(start..at).map_or(1, |s| s.chars().count() + 1);
        Origin::File { line, column }
    }
}
