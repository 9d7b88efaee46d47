//! The tables of a recording, its version, and how older versions become the present one.
//!
//! A recording is an SQLite database with the application id [`APPLICATION_ID`] and the number of the schema in
//! `user_version`. Readers take every version up to [`VERSION`]: a missing table or column of an older one reads as its
//! default. A recording is never changed by reading it. A new field gets a new version, a step in [`UPGRADES`], which
//! runs on an empty database too, and a line in `docs/recordings.md`.

use rusqlite::Connection;

use crate::{Error, ErrorKind, Result};

/// `mlek`, in the header of the file.
pub(super) const APPLICATION_ID: i32 = 0x6d6c_656b;

/// Number of the schema that this version writes, the newest that it reads.
pub const VERSION: i32 = UPGRADES.len() as i32;

/// The step to version 1, to version 2, ...
const UPGRADES: &[&str] = &[
    "
    -- What is known of the run as a whole: name and value.
    CREATE TABLE session (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
    CREATE TABLE hosts (id INTEGER PRIMARY KEY, name TEXT, kernel TEXT, machine TEXT, boot_id TEXT);
    CREATE TABLE processes (
        instance INTEGER PRIMARY KEY, host INTEGER, pid INTEGER, start_ticks INTEGER, comm TEXT, exe TEXT, cmdline TEXT,
        labels TEXT
    );
    CREATE TABLE modules (id INTEGER PRIMARY KEY, path TEXT, build_id TEXT);
    -- A name for a place in code. `offset` is what a frame has: from the start of the function, or in the file.
    CREATE TABLE frames (
        id INTEGER PRIMARY KEY, module INTEGER, function TEXT, offset INTEGER, file TEXT, line INTEGER, inlined INTEGER,
        reason TEXT, file_address INTEGER
    );
    -- locations: module and file offset of every return address, innermost first. frames: their names once known.
    CREATE TABLE stacks (id INTEGER PRIMARY KEY, locations BLOB, frames BLOB);
    CREATE TABLE sites (
        id INTEGER PRIMARY KEY, site_id INTEGER, instance INTEGER, probe_set_number INTEGER, stack_hash INTEGER,
        probe_set TEXT, function TEXT, stack INTEGER, addresses BLOB, truncated TEXT
    );
    -- A keyframe can be read without those before it. `pinned` ones say something that no other one says.
    CREATE TABLE snapshots (
        number INTEGER PRIMARY KEY, time_s REAL, wall_s REAL, collect_cpu_s REAL, keyframe INTEGER, pinned INTEGER,
        sites INTEGER, allocated_bytes INTEGER, allocated_count INTEGER, freed_bytes INTEGER, freed_count INTEGER
    );
    CREATE TABLE totals (snapshot INTEGER PRIMARY KEY, data BLOB);
    CREATE TABLE details (snapshot INTEGER PRIMARY KEY, data BLOB);
    -- How often the snapshots from a keyframe to the next have been halved.
    CREATE TABLE thinned (keyframe INTEGER PRIMARY KEY, times INTEGER);
    -- One row per time that a finding stood without a break and with one severity; the last_ columns are empty while it
    -- stands.
    CREATE TABLE findings (
        id INTEGER PRIMARY KEY, finding TEXT, rule TEXT, site INTEGER, severity TEXT, confidence REAL, reason TEXT,
        first_snapshot INTEGER, last_snapshot INTEGER, first_s REAL, last_s REAL
    );
    CREATE TABLE alerts (
        finding TEXT, fired_s REAL, first_seen_s REAL, resolved_s REAL, rule TEXT, severity TEXT, confidence REAL,
        reason TEXT, site INTEGER, processes INTEGER, ended INTEGER, outstanding_bytes INTEGER,
        PRIMARY KEY (finding, fired_s)
    ) WITHOUT ROWID;
    CREATE INDEX sites_by_key ON sites (instance, stack_hash);
    CREATE TABLE events (
        id INTEGER PRIMARY KEY, time_s REAL, wall_s REAL, kind TEXT, instance INTEGER, text TEXT
    );
",
    "
    -- The thread that allocated there first.
    ALTER TABLE sites ADD COLUMN first_tid INTEGER;
    ALTER TABLE sites ADD COLUMN first_thread TEXT;
",
];

/// Makes the tables of a new recording.
pub(super) fn create(db: &Connection) -> rusqlite::Result<()> {
    // Before the first table, or it has no effect.
    db.pragma_update(None, "page_size", 4096)?;
    db.pragma_update(None, "application_id", APPLICATION_ID)?;
    db.execute_batch("BEGIN")?;
    for step in UPGRADES {
        db.execute_batch(step)?;
    }
    db.pragma_update(None, "user_version", VERSION)?;
    db.execute_batch("COMMIT")
}

/// Checks that a database is a recording that this version can read, and returns its version.
///
/// # Errors
/// It is not a recording, or one of a newer version.
pub(super) fn check(db: &Connection, shown: &str) -> Result<i32> {
    let number = |pragma: &str| db.pragma_query_value(None, pragma, |row| row.get::<_, i32>(0));
    let id = number("application_id").map_err(|e| failed(shown, e))?;
    if id != APPLICATION_ID {
        let what = format!("failed to open {shown}: it is an SQLite database, but not a recording of memleak");
        return Err(Error::new(ErrorKind::Io, what));
    }
    let version = number("user_version").map_err(|e| failed(shown, e))?;
    if version > VERSION {
        let what = format!(
            "failed to open {shown}: it was written by a newer memleak (format {version}; this one, {}, reads up to \
             {VERSION}): use that version or a newer one",
            env!("CARGO_PKG_VERSION")
        );
        return Err(Error::new(ErrorKind::Io, what));
    }
    if version < 1 {
        return Err(Error::new(
            ErrorKind::Io,
            format!("failed to open {shown}: its writing ended before it had begun"),
        ));
    }
    Ok(version)
}

/// An error of SQLite in words.
pub(super) fn failed(shown: &str, error: rusqlite::Error) -> Error {
    use rusqlite::ErrorCode;
    let what = match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => "it is not a recording, or its beginning is damaged".to_owned(),
        Some(ErrorCode::DatabaseCorrupt) => "the recording is damaged".to_owned(),
        Some(ErrorCode::CannotOpen) => {
            "it cannot be opened (a recording whose writer was killed needs its -wal file beside it and a folder that \
             is writable or has its -shm file)"
                .to_owned()
        }
        // SQLite has nothing to add, and says it twice.
        Some(ErrorCode::DiskFull) => {
            return Error::new(ErrorKind::Io, format!("failed to write {shown}: the disk is full"));
        }
        _ => return Error::with_source(ErrorKind::Io, format!("failed to use {shown}"), error),
    };
    Error::with_source(ErrorKind::Io, format!("failed to use {shown}: {what}"), error)
}
