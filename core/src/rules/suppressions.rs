//! The file of suppressions (`rules.suppressions_file`): one pattern per line about code whose findings are known.
//!
//! The format is LeakSanitizer's, so that its files work as they are, with a few kinds more. Owns parsing, matching and
//! the count of what each line has silenced; which findings there are is not its business. Suppressions that need
//! logic are rules of their own (`suppress` in Lua).

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::params::hint;
use crate::finding::Finding;
use crate::symbolize::Frame;
use crate::{Error, Result};

/// Largest file, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Most lines with a pattern.
const MAX_ENTRIES: usize = 10_000;
/// Kinds of lines.
const KINDS: [(&str, Kind); 5] = [
    ("leak", Kind::Any),
    ("function", Kind::Function),
    ("module", Kind::Module),
    ("file", Kind::File),
    ("stack", Kind::Stack),
];

/// What a pattern is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Function, module or source file of any frame: LeakSanitizer's `leak:`.
    Any,
    Function,
    Module,
    File,
    /// The functions of the whole stack, outermost first, joined by `;`.
    Stack,
}

/// A piece of text to be found anywhere: `*` is any text, `^` at the start and `$` at the end hold it to the ends.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pattern {
    pieces: Vec<String>,
    from_start: bool,
    to_end: bool,
}

impl Pattern {
    fn new(text: &str) -> Pattern {
        let (from_start, text) = text.strip_prefix('^').map_or((false, text), |rest| (true, rest));
        let (to_end, text) = text.strip_suffix('$').map_or((false, text), |rest| (true, rest));
        let pieces: Vec<String> = text.split('*').map(str::to_owned).collect();
        // An asterisk at an end makes that end free again: its piece is empty, and the empty text fits everywhere.
        Pattern { pieces, from_start, to_end }
    }

    fn matches(&self, text: &str) -> bool {
        if text.is_empty() {
            return false;
        }
        let last = self.pieces.len() - 1;
        let mut rest = text;
        for (i, piece) in self.pieces.iter().enumerate() {
            let (held_left, held_right) = (i == 0 && self.from_start, i == last && self.to_end);
            rest = match (held_left, held_right) {
                (true, true) => return rest == piece,
                (false, true) => return rest.ends_with(piece.as_str()),
                (true, false) => match rest.strip_prefix(piece.as_str()) {
                    Some(rest) => rest,
                    None => return false,
                },
                // The first place leaves most for what follows.
                (false, false) => match rest.find(piece.as_str()) {
                    Some(at) => &rest[at + piece.len()..],
                    None => return false,
                },
            };
        }
        true
    }
}

/// A pattern for code, in the form `KIND:PATTERN`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodePattern {
    kind: Kind,
    pattern: Pattern,
}

/// One line.
struct Entry {
    line: usize,
    text: String,
    code: CodePattern,
    /// Bytes and blocks of what it has silenced, by finding and process instance, as of the newest look.
    silenced: HashMap<(String, u32), (u64, u64)>,
}

impl CodePattern {
    /// Reads one.
    ///
    /// # Errors
    /// It is none: why, without a place.
    pub fn parse(line: &str) -> Result<CodePattern, String> {
        let names = KINDS.map(|(name, _)| name);
        let Some((kind, pattern)) = line.split_once(':') else {
            let shown = super::sandbox::cut(line, 60);
            return Err(format!(
                "{shown:?} is no pattern for code: expected KIND:PATTERN, such as leak:my_cache_insert"
            ));
        };
        let (kind, pattern) = (kind.trim(), pattern.trim());
        let Some((_, found)) = KINDS.iter().find(|(name, _)| *name == kind) else {
            return Err(format!(
                "there is no kind {:?} of patterns; {}",
                super::sandbox::cut(kind, 40),
                hint(kind, names)
            ));
        };
        if pattern.chars().all(|c| matches!(c, '*' | '^' | '$')) {
            return Err(format!("the pattern {pattern:?} fits everything: name a function, module or file"));
        }
        Ok(CodePattern { kind: *found, pattern: Pattern::new(pattern) })
    }

    /// Whether it fits a call stack.
    pub fn matches(&self, frames: &[Frame]) -> bool {
        let fits = |text: &Option<String>| text.as_deref().is_some_and(|t| self.pattern.matches(t));
        match self.kind {
            Kind::Any => frames.iter().any(|f| fits(&f.function) || fits(&f.module) || fits(&f.file)),
            Kind::Function => frames.iter().any(|f| fits(&f.function)),
            Kind::Module => frames.iter().any(|f| fits(&f.module)),
            Kind::File => frames.iter().any(|f| fits(&f.file)),
            Kind::Stack => {
                let names: Vec<&str> = frames.iter().rev().map(|f| f.function.as_deref().unwrap_or("?")).collect();
                self.pattern.matches(&names.join(";"))
            }
        }
    }
}

/// What one line of the file has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SuppressionUse {
    /// The line's number, from 1.
    pub line: usize,
    /// The line.
    pub text: String,
    /// Findings that it has silenced; 0 for a line that may be deleted.
    pub findings: u64,
    /// Bytes outstanding at their sites.
    pub bytes: u64,
    /// Blocks outstanding at their sites.
    pub blocks: u64,
}

/// A file of suppressions.
pub(super) struct Suppressions {
    path: PathBuf,
    entries: Vec<Entry>,
}

impl fmt::Debug for Suppressions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} lines)", self.path.display(), self.entries.len())
    }
}

impl Suppressions {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, is too large, or has a line that is none: with file and line.
    pub(super) fn load(path: &Path) -> Result<Suppressions> {
        let shown = path.display();
        let failed = |e| Error::io(format!("failed to read the suppressions {shown}"), e);
        let mut text = String::new();
        let file = File::open(path).map_err(failed)?;
        file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(failed)?;
        if text.len() as u64 > MAX_FILE {
            return Err(Error::config(format!("{shown}: the file is larger than {MAX_FILE} bytes")));
        }
        let mut entries = Vec::new();
        let mut problems = Vec::new();
        for (i, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            match CodePattern::parse(line) {
                Ok(code) => {
                    entries.push(Entry { line: i + 1, text: line.to_owned(), code, silenced: HashMap::new() });
                }
                Err(why) => problems.push(format!("{shown}:{}: {why}", i + 1)),
            }
        }
        if entries.len() > MAX_ENTRIES {
            problems.push(format!("{shown}: there are {} patterns, more than {MAX_ENTRIES}", entries.len()));
        }
        if !problems.is_empty() {
            return Err(Error::config(problems.join("\n")));
        }
        Ok(Suppressions { path: path.to_owned(), entries })
    }

    /// Whether a finding is silenced: the first line that fits, as the reason. The site must have been symbolized.
    pub(super) fn silence(&mut self, finding: &Finding, bytes: u64, blocks: u64) -> Option<String> {
        let entry = self.entries.iter_mut().find(|e| e.code.matches(finding.site.frames()))?;
        entry.silenced.insert((finding.id.clone(), finding.site.key.instance), (bytes, blocks));
        Some(format!("{}:{}: {}", self.path.display(), entry.line, entry.text))
    }

    /// What every line has done so far, in the order of the file.
    pub(super) fn uses(&self) -> Vec<SuppressionUse> {
        let sum = |e: &Entry| e.silenced.values().fold((0, 0), |(b, n), (bytes, blocks)| (b + bytes, n + blocks));
        let used = |e: &Entry| {
            let (bytes, blocks) = sum(e);
            SuppressionUse { line: e.line, text: e.text.clone(), findings: e.silenced.len() as u64, bytes, blocks }
        };
        self.entries.iter().map(used).collect()
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files written for LeakSanitizer must silence here what they silence there, and no more.
    #[test]
    fn patterns_match_as_leak_sanitizer_has_it() {
        let cases = [
            ("cache", "my_cache_insert", true),
            ("Cache", "my_cache_insert", false),
            ("^cache", "my_cache_insert", false),
            ("^my_", "my_cache_insert", true),
            ("insert$", "my_cache_insert", true),
            ("cache$", "my_cache_insert", false),
            ("^my_cache_insert$", "my_cache_insert", true),
            ("^my_cache$", "my_cache_insert", false),
            ("my*insert", "my_cache_insert", true),
            ("insert*my", "my_cache_insert", false),
            ("^*cache*$", "my_cache_insert", true),
            ("^my*_insert$", "my_insert", true),
            ("^my_*_insert$", "my_insert", false),
            ("aba$", "ababa", true),
            ("a*a", "a", false),
            ("x", "", false),
            ("libfoo.so", "/usr/lib/libfoo.so.1", true),
        ];
        for (pattern, text, expected) in cases {
            assert_eq!(Pattern::new(pattern).matches(text), expected, "{pattern} on {text}");
        }
    }

    fn load(text: &str) -> Result<Suppressions> {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("known.supp");
        std::fs::write(&path, text).expect("written");
        Suppressions::load(&path)
    }

    /// Every mistake is told at once, each with its line and the way out.
    #[test]
    fn mistakes_are_told_with_file_and_line() {
        let error =
            load("# fine\nleak:foo\nlaek:bar\nno kind\nleak:*\n\nmodule:^$\n").expect_err("mistakes").to_string();
        let lines: Vec<&str> = error.lines().collect();
        assert_eq!(lines.len(), 4, "{error}");
        assert!(lines[0].contains("known.supp:3: there is no kind \"laek\"") && lines[0].contains("leak"), "{error}");
        assert!(lines[1].contains("known.supp:4: \"no kind\" is no pattern for code"), "{error}");
        assert!(lines[2].contains("known.supp:5: the pattern \"*\" fits everything"), "{error}");
        assert!(lines[3].contains("known.supp:7:"), "{error}");
    }

    /// A kind looks at its own part of the frames only.
    #[test]
    fn each_kind_looks_at_its_part_of_the_stack() {
        let frame = |function: &str, module: &str, file: &str| Frame {
            function: Some(function.to_owned()),
            module: Some(module.to_owned()),
            file: Some(file.to_owned()),
            ..Frame::default()
        };
        let frames = [frame("insert", "/lib/liba.so", "/src/x.c"), frame("main", "/bin/app", "/src/y.c")];
        let fits = |line: &str| load(line).expect("sound").entries[0].code.matches(&frames);
        assert!(fits("leak:insert") && fits("leak:liba") && fits("leak:y.c"));
        assert!(fits("function:^main$") && !fits("function:liba"));
        assert!(fits("module:liba.so$") && !fits("module:insert"));
        assert!(fits("file:/src/x.c") && !fits("file:main"));
        assert!(fits("stack:^main;insert$") && !fits("stack:^insert;main$"));
    }
}
