//! Errors of this crate.

use std::fmt;

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, coarsely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A privilege is missing.
    Permission,
    /// The kernel lacks something or refused a call.
    Kernel,
    /// The process has ended or cannot be read.
    Target,
    /// A file could not be read as ELF, or lacks a symbol.
    Elf,
    /// A bound of this crate was reached.
    Limit,
}

/// What was attempted, on which object, and why it failed.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into() }
    }

    /// An error of a libbpf call; missing privileges are told apart.
    pub(crate) fn bpf(what: impl fmt::Display, source: &libbpf_rs::Error) -> Self {
        let kind = match source.kind() {
            libbpf_rs::ErrorKind::PermissionDenied => ErrorKind::Permission,
            _ => ErrorKind::Kernel,
        };
        Error::new(kind, format!("failed to {what}: {source:#}"))
    }

    /// The coarse kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
