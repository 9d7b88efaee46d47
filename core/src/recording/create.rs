//! Makes the file of a recording: new, private, and nobody else's.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags};

use super::schema;
use crate::output::text::visible;
use crate::{Error, ErrorKind, Result};

/// Call stacks, paths and command lines of other users' processes: nobody else's business.
const MODE: u32 = 0o600;

/// A new recording. The lock ends with the file, which therefore lives as long as the connection.
pub(super) struct Created {
    // Before the file: closing any descriptor of the file would drop the locks of SQLite.
    pub(super) db: Connection,
    /// For messages.
    pub(super) shown: String,
    _lock: File,
}

/// Makes and locks the file, and the tables in it.
///
/// # Errors
/// Something has that name already, the folder is missing or not writable, or the disk is full.
pub(super) fn create(path: &Path) -> Result<Created> {
    let shown = visible(&path.to_string_lossy()).into_owned();
    let refuse = |why: String| Error::new(ErrorKind::Io, format!("failed to create the recording {shown}: {why}"));
    let failed = |e: io::Error| refuse_io(&shown, path, e);
    let Some(name) = path.file_name() else { return Err(refuse("it names no file".into())) };
    // SQLite follows no links when told so, not even in the path of the folder.
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let path = folder.canonicalize().map_err(failed)?.join(name);
    let file = match OpenOptions::new().read(true).write(true).create_new(true).mode(MODE).open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Err(refuse(exists(&path))),
        Err(e) => return Err(failed(e)),
    };
    let made = set_up(&path, &file, &shown);
    match made {
        Ok(db) => Ok(Created { db, shown, _lock: file }),
        Err(e) => {
            // Nothing is in it yet.
            for path in [path.clone(), beside(&path, "-wal"), beside(&path, "-shm")] {
                let _ = fs::remove_file(path);
            }
            Err(e)
        }
    }
}

/// Why a name that is taken is not written to.
fn exists(path: &Path) -> String {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_symlink() => "there is a symbolic link of that name, which is not followed".into(),
        Ok(meta) if meta.is_dir() => "it is a folder".into(),
        Ok(meta) if !meta.is_file() => "it is not a regular file".into(),
        _ if is_locked(path) => "another memleak is writing it: each run needs a file of its own".into(),
        _ => "the file exists, and each run needs a file of its own: remove it or choose another name".into(),
    }
}

/// Whether a writer has the file open.
pub(super) fn is_locked(path: &Path) -> bool {
    let options = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    options.is_ok_and(|file| !lock(&file))
}

/// Takes the lock of a writer; false when somebody has it.
fn lock(file: &File) -> bool {
    // SAFETY: the descriptor is open as long as `file` lives.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}

fn set_up(path: &Path, file: &File, shown: &str) -> Result<Connection> {
    let refuse = |why: &str| Error::new(ErrorKind::Io, format!("failed to create the recording {shown}: {why}"));
    if !lock(file) {
        return Err(refuse("another memleak is writing it"));
    }
    // SQLite would take what it finds there for a part of the new file.
    for suffix in ["-wal", "-shm", "-journal"] {
        if fs::symlink_metadata(beside(path, suffix)).is_ok() {
            return Err(refuse(&format!("there is a file of that name with {suffix} at its end: remove it first")));
        }
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let db = Connection::open_with_flags(path, flags).map_err(|e| schema::failed(shown, e))?;
    let ours = file.metadata().map_err(|e| refuse_io(shown, path, e))?;
    if !fs::symlink_metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (ours.dev(), ours.ino())) {
        return Err(refuse("the file was replaced while it was made"));
    }
    prepare(&db).map_err(|e| schema::failed(shown, e))?;
    Ok(db)
}

fn prepare(db: &Connection) -> rusqlite::Result<()> {
    schema::create(db)?;
    // What is committed survives the end of the process at any moment; only a crash of the whole machine may take the
    // newest snapshots, and never more than them.
    db.pragma_update(None, "journal_mode", "WAL")?;
    db.pragma_update(None, "synchronous", "NORMAL")?;
    db.pragma_update(None, "cache_size", -4096)?;
    db.pragma_update(None, "temp_store", "MEMORY")?;
    db.set_prepared_statement_cache_capacity(64);
    Ok(())
}

/// What SQLite keeps beside the file of that name.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn refuse_io(shown: &str, path: &Path, error: io::Error) -> Error {
    let folder = visible(&path.parent().unwrap_or(Path::new(".")).to_string_lossy()).into_owned();
    let hint = match error.kind() {
        io::ErrorKind::NotFound => format!("; the folder {folder} does not exist"),
        io::ErrorKind::PermissionDenied => format!("; the folder {folder} is not writable for this user"),
        io::ErrorKind::ReadOnlyFilesystem => format!("; {folder} is on a read-only file system"),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; the disk is full".to_owned(),
        _ => String::new(),
    };
    Error::io(format!("failed to create the recording {shown}{hint}"), error)
}
