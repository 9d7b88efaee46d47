//! Notices what changes in a recording after its end.
//!
//! Samples carry checksums of their own. For everything else (names, processes, findings, events) the writer notes one
//! hash when it ends; a recording that was broken off has none.

use rusqlite::Connection;
use rusqlite::types::ValueRef;
use sha2::{Digest, Sha256};

/// Where the hash is among the facts of the run.
pub(super) const KEY: &str = "digest";

/// Every table without checksums of its own, in an order that does not depend on where its rows lie.
const TABLES: [(&str, &str); 11] = [
    ("session WHERE key <> 'digest'", "key"),
    ("hosts", "id"),
    ("processes", "instance"),
    ("modules", "id"),
    ("frames", "id"),
    ("stacks", "id"),
    ("sites", "id"),
    ("snapshots", "number"),
    ("findings", "id"),
    ("alerts", "finding, fired_s"),
    ("events", "id"),
];

/// The hash of what a recording says now, hexadecimal.
pub(super) fn of(db: &Connection) -> rusqlite::Result<String> {
    let mut hash = Sha256::new();
    for (table, order) in TABLES {
        let mut statement = db.prepare(&format!("SELECT * FROM {table} ORDER BY {order}"))?;
        let columns = statement.column_count();
        hash.update(table.as_bytes());
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            for column in 0..columns {
                add(&mut hash, row.get_ref(column)?);
            }
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A value with its kind, and its length where that varies.
fn add(hash: &mut Sha256, value: ValueRef<'_>) {
    match value {
        ValueRef::Null => hash.update([0]),
        ValueRef::Integer(n) => {
            hash.update([1]);
            hash.update(n.to_le_bytes());
        }
        ValueRef::Real(n) => {
            hash.update([2]);
            hash.update(n.to_bits().to_le_bytes());
        }
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => {
            hash.update([if matches!(value, ValueRef::Text(_)) { 3 } else { 4 }]);
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        }
    }
}
