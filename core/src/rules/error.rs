//! What went wrong in a rule, where, and for which site.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use mlua::Error as LuaError;

use super::budget::Limit;
use super::sandbox::cut;
use super::source::{LuaFile, Origin};
use crate::snapshot::Site;
use crate::{Error, ErrorKind};

/// Longest message kept, in bytes: rules may put anything into `error()`.
const MAX_MESSAGE: usize = 500;

/// A limit that stopped a rule, and chunk and line where, if that is known.
pub(super) struct Stopped {
    pub(super) limit: Limit,
    pub(super) place: Option<(String, u32)>,
}

/// A rule that failed, with the place in its file.
#[derive(Clone, Debug)]
pub struct RuleError {
    /// Name of the rule; the file's name while its own name is not known yet.
    pub rule: Arc<str>,
    /// The file: a path, or `rules/NAME.lua (built in)`.
    pub file: String,
    /// Line in the file, starting at 1; `None` when the failure has no place.
    pub line: Option<u32>,
    /// What went wrong, one line. May quote names from the traced process: hostile text.
    pub message: String,
    /// The first site at which it failed; `None` when it failed before or apart from any site.
    pub site: Option<Arc<Site>>,
    /// Number of failed calls in this snapshot, this one included.
    pub failures: u64,
}

/// `rule growth: rules/growth.lua:12: message`.
impl fmt::Display for RuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule {}: {}", self.rule, self.file)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {}", self.message)?;
        if self.failures > 1 {
            write!(f, " (and {} more failures in this snapshot)", self.failures - 1)?;
        }
        Ok(())
    }
}

impl std::error::Error for RuleError {}

impl From<RuleError> for Error {
    fn from(error: RuleError) -> Self {
        Error::new(ErrorKind::Rule, format!("failed to load {error}"))
    }
}

impl RuleError {
    /// A failure of the file as such, at a line if one is known.
    pub(super) fn new(rule: &str, file: &LuaFile, line: Option<u32>, message: impl Into<String>) -> RuleError {
        let message: String = message.into();
        RuleError {
            rule: Arc::from(rule),
            file: display_path(&file.name, &file.origin),
            line,
            message: one_line(&message),
            site: None,
            failures: 1,
        }
    }

    /// From an error of Lua, or from a limit: then message and place come from `limit`. `line` is where the called
    /// function starts, for errors without a place of their own.
    pub(super) fn from_lua(
        rule: &str,
        file: &LuaFile,
        line: Option<u32>,
        error: &LuaError,
        limit: Option<Stopped>,
    ) -> RuleError {
        let (place, text) = locate(error);
        let (place, text) = match limit {
            Some(stopped) => (stopped.place.or(place), stopped.limit.to_string()),
            None => (place, text),
        };
        let mut result = RuleError::new(rule, file, line, text);
        if let Some((chunk, line)) = place {
            if chunk != file.name {
                // A shared module; it lies beside the rule when the rule comes from a folder.
                result.file = chunk_path(&chunk, &file.origin);
            }
            result.line = Some(line);
        }
        result
    }
}

fn display_path(name: &str, origin: &Origin) -> String {
    match origin {
        Origin::Embedded => format!("rules/{name} (built in)"),
        Origin::File(path) => path.display().to_string(),
    }
}

fn chunk_path(chunk: &str, rule: &Origin) -> String {
    let beside: Option<PathBuf> = match rule {
        Origin::Embedded => None,
        Origin::File(path) => path.parent().map(|dir| dir.join(chunk)).filter(|p| p.is_file()),
    };
    beside.map_or_else(|| display_path(chunk, &Origin::Embedded), |p| p.display().to_string())
}

/// Whitespace and control characters become spaces, and what is too long is cut.
fn one_line(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let short = cut(text.trim(), MAX_MESSAGE);
    if short.len() < text.trim().len() { format!("{short}...") } else { short.to_owned() }
}

/// The place (chunk and line) of an error and its message without that place.
fn locate(error: &LuaError) -> (Option<(String, u32)>, String) {
    let mut traceback = None;
    let mut innermost = error;
    while let Some(inner) = innermost.parent() {
        if let LuaError::CallbackError { traceback: trace, .. } = innermost {
            traceback.get_or_insert(trace.as_str());
        }
        innermost = inner;
    }
    let text = match innermost {
        LuaError::SyntaxError { message, .. } => message.clone(),
        LuaError::RuntimeError(message) | LuaError::MemoryError(message) => message.clone(),
        other => other.to_string(),
    };
    let (message, own_trace) = text.split_once("\nstack traceback:").unwrap_or((&text, ""));
    if let Some((place, rest)) = split_place(message) {
        return (Some(place), rest.to_owned());
    }
    let trace = traceback.unwrap_or(own_trace);
    let place = trace.lines().find_map(|line| split_place(line.trim()).map(|(place, _)| place));
    (place, message.to_owned())
}

/// Splits `NAME.lua:LINE: rest`.
fn split_place(text: &str) -> Option<((String, u32), &str)> {
    let (chunk, rest) = text.split_once(".lua:")?;
    if chunk.contains(|c: char| c.is_whitespace() || c == ':') {
        return None;
    }
    let (line, rest) = rest.split_once(':')?;
    Some(((format!("{chunk}.lua"), line.parse().ok()?), rest.trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The place is taken off the message only when it is one.
    #[test]
    fn places_are_split_off() {
        assert_eq!(split_place("lib/x.lua:12: went wrong: y"), Some((("lib/x.lua".into(), 12), "went wrong: y")));
        assert_eq!(split_place("no place here"), None);
        assert_eq!(split_place("see growth.lua:12: x"), None);
    }

    /// An error message may hold anything; it must end up short and on one line.
    #[test]
    fn messages_are_short_and_on_one_line() {
        let text = one_line(&format!("a\nb\u{1b}[31m{}", "x".repeat(10_000)));
        assert!(text.starts_with("a b [31mx") && text.ends_with("..."));
        assert_eq!(text.len(), MAX_MESSAGE + 3);
    }
}
