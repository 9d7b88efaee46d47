//! The library's error type: what was attempted, on which object, the cause, and the fix when one is known.

use std::fmt;

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, coarsely: decides the exit code and whether going on makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting, manifest, rule or template that the user wrote is wrong.
    Config,
    /// A file could not be read or written.
    Io,
    /// A privilege is missing.
    Permission,
    /// The kernel lacks something or refused a call.
    Kernel,
    /// No such process, or it has ended.
    Target,
    /// A Lua rule failed.
    Rule,
    /// A template failed to render.
    Template,
}

/// An error with its kind, a message of the form `failed to <do what> <which object>`, and a cause.
///
/// `{}` prints the message alone, `{:#}` the whole chain on one line.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error without a deeper cause.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into(), source: None }
    }

    /// An error caused by another.
    pub fn with_source(
        kind: ErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Error { kind, message: message.into(), source: Some(source.into()) }
    }

    /// A wrong setting, manifest, rule or template.
    pub fn config(message: impl Into<String>) -> Self {
        Error::new(ErrorKind::Config, message)
    }

    /// A failed file operation.
    pub fn io(message: impl Into<String>, source: std::io::Error) -> Self {
        Error::with_source(ErrorKind::Io, message, source)
    }

    /// The coarse kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if f.alternate() {
            let mut source = self.source.as_deref().map(|e| e as &dyn std::error::Error);
            while let Some(e) = source {
                write!(f, ": {e}")?;
                source = e.source();
            }
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}
