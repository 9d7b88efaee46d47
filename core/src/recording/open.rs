//! Opens the file of a recording for reading, in whatever state its writer has left it.
//!
//! A writer that was killed leaves its newest snapshots in the `-wal` file beside the recording. SQLite reads the two
//! together only where it may write beside them (or finds the `-shm` file there), so from a folder that is read-only
//! both are copied first. A recording without its `-wal` file is read as it is: nothing is ever made beside it.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rusqlite::{Connection, OpenFlags};
use tempfile::TempDir;

use super::create::{beside, is_locked};
use super::schema;
use crate::output::text::visible;
use crate::{Error, ErrorKind, Result};

/// An open file.
pub(super) struct Opened {
    // Before the folder: the copy goes with it.
    pub(super) db: Connection,
    /// For messages.
    pub(super) shown: String,
    /// The run was broken off, and what it wrote last is not there.
    pub(super) lacks_wal: bool,
    _copy: Option<TempDir>,
}

/// Opens a file and begins the one transaction in which it is read.
///
/// # Errors
/// There is no such file, or it is no database.
pub(super) fn open(path: &Path) -> Result<Opened> {
    let shown = visible(&path.to_string_lossy()).into_owned();
    let refuse = |why: &str| Error::new(ErrorKind::Io, format!("failed to open {shown}: {why}"));
    let meta = fs::metadata(path).map_err(|e| Error::io(format!("failed to open {shown}"), e))?;
    if !meta.is_file() {
        return Err(refuse(if meta.is_dir() { "it is a folder" } else { "it is not a regular file" }));
    }
    if meta.len() == 0 {
        return Err(refuse("it is empty: the run ended before it was written"));
    }
    let in_order = !uses_wal(path).map_err(|e| Error::io(format!("failed to open {shown}"), e))?;
    if in_order {
        return connect(path, "", &shown).map(|db| Opened { db, shown, lacks_wal: false, _copy: None });
    }
    if fs::metadata(beside(path, "-wal")).map_or(0, |m| m.len()) == 0 {
        // Between a writer's first and second step there is nothing in it either.
        let lacks_wal = !is_locked(path);
        let how = if lacks_wal { "?immutable=1" } else { "" };
        return connect(path, how, &shown).map(|db| Opened { db, shown, lacks_wal, _copy: None });
    }
    match connect(path, "", &shown) {
        Ok(db) => Ok(Opened { db, shown, lacks_wal: false, _copy: None }),
        Err(e) if may_not_write(&e) && !is_locked(path) => {
            let failed =
                |e| Error::io(format!("failed to copy {shown} and its -wal file to where they can be read"), e);
            let copy = tempfile::Builder::new().prefix("memleak-").tempdir().map_err(failed)?;
            let to = copy.path().join("recording");
            for suffix in ["", "-wal"] {
                copy_file(&beside(path, suffix), &beside(&to, suffix)).map_err(failed)?;
            }
            connect(&to, "", &shown).map(|db| Opened { db, shown, lacks_wal: false, _copy: Some(copy) })
        }
        Err(e) => Err(e),
    }
}

/// Whether SQLite would have had to write beside the recording.
fn may_not_write(error: &Error) -> bool {
    use rusqlite::ErrorCode::{CannotOpen, PermissionDenied, ReadOnly};
    let first: &(dyn std::error::Error + 'static) = error;
    std::iter::successors(Some(first), |e| e.source()).any(|e| {
        let code = e.downcast_ref::<rusqlite::Error>().and_then(rusqlite::Error::sqlite_error_code);
        matches!(code, Some(CannotOpen | PermissionDenied | ReadOnly))
    })
}

fn connect(path: &Path, how: &str, shown: &str) -> Result<Connection> {
    let failed = |e| schema::failed(shown, e);
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
    let absolute = path.canonicalize().map_err(|e| Error::io(format!("failed to open {shown}"), e))?;
    let db = Connection::open_with_flags(uri(&absolute) + how, flags).map_err(failed)?;
    db.busy_timeout(std::time::Duration::from_secs(5)).map_err(failed)?;
    db.pragma_update(None, "cache_size", -4096).map_err(failed)?;
    // Names in the schema of a hostile file must not run functions.
    db.pragma_update(None, "trusted_schema", false).map_err(failed)?;
    db.set_prepared_statement_cache_capacity(32);
    // One view of the file until the connection is dropped; the first look is what takes it.
    db.execute_batch("BEGIN; SELECT count(*) FROM sqlite_schema").map_err(failed)?;
    Ok(db)
}

/// A path as SQLite takes it when there is something to say about how it is opened.
fn uri(path: &Path) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/-._~".contains(&b);
    let byte = |b: &u8| if plain(*b) { char::from(*b).to_string() } else { format!("%{b:02X}") };
    format!("file:{}", path.as_os_str().as_bytes().iter().map(byte).collect::<String>())
}

/// Whether the header says that there is more in a `-wal` file. An ended recording says that there is not.
fn uses_wal(path: &Path) -> std::io::Result<bool> {
    let mut header = Vec::new();
    File::open(path)?.take(20).read_to_end(&mut header)?;
    Ok(header.get(18..20).is_some_and(|versions| versions.contains(&2)))
}

/// As private as the recording.
fn copy_file(from: &Path, to: &Path) -> std::io::Result<()> {
    let mut target = File::options().write(true).create_new(true).mode(0o600).open(to)?;
    std::io::copy(&mut File::open(from)?, &mut target).map(drop)
}
