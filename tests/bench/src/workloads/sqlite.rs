//! The SQLite shell from its Debian package, with a table in memory.

use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Done, Launch, READY, SLACK, Target, Workload, helpers_of, missing_command, worker_of};
use crate::process::Running;
use crate::tools::path_of;

/// Rows that are inserted by one batch, and removed by the one that comes this many rows later.
const ROWS: u64 = 100;
/// Batches whose rows are in the table.
const KEPT: u64 = 50;
/// Statements in a batch: inserts, queries, and what begins, clears and ends it.
const STATEMENTS: u64 = ROWS + QUERIES + 3;
/// Queries in a batch.
const QUERIES: u64 = 20;
/// What the shell prints after a batch.
const MARK: &str = "batch done";

/// Inserts and queries.
pub struct Sqlite;

impl Workload for Sqlite {
    fn id(&self) -> &'static str {
        "sqlite"
    }

    fn title(&self) -> &'static str {
        "SQLite in memory, inserts and queries"
    }

    fn unit(&self) -> &'static str {
        "statements"
    }

    fn missing(&self) -> Option<String> {
        missing_command(&["sqlite3"])
    }

    fn start(&self, launch: &Launch, folder: &Path) -> Result<Box<dyn Target>> {
        let program = path_of("sqlite3").context("sqlite3 is not installed")?;
        let mut command = launch.command(&program);
        command.current_dir(folder).args(["-batch", ":memory:"]);
        let mut running = Running::start(&mut command, folder)?;
        running.write(&format!(
            "CREATE TABLE entries(id INTEGER PRIMARY KEY, name TEXT, payload TEXT);\n.print {MARK}\n"
        ))?;
        running.expect("an answer", READY, |line| (line.text == MARK).then_some(()))?;
        let worker = worker_of(&running, launch, &program)?;
        let mut target = Shell { running, worker, batches: 0 };
        // The table has its size before anything is measured.
        for _ in 0..KEPT {
            target.batch(READY)?;
        }
        Ok(Box::new(target))
    }
}

/// A running shell.
struct Shell {
    running: Running,
    worker: u32,
    batches: u64,
}

impl Shell {
    fn batch(&mut self, limit: Duration) -> Result<()> {
        let text = batch(self.batches);
        self.batches += 1;
        self.running.write(&text)?;
        self.running.expect("the end of a batch", limit, |line| (line.text == MARK).then_some(()))
    }
}

impl Target for Shell {
    fn pid(&self) -> u32 {
        self.worker
    }

    fn helpers(&self) -> Vec<u32> {
        helpers_of(&self.running, self.worker)
    }

    fn load(&mut self, seconds: u64) -> Result<Done> {
        let start = Instant::now();
        let mut batches = 0;
        while start.elapsed() < Duration::from_secs(seconds) {
            self.batch(SLACK)?;
            batches += 1;
        }
        let units = (batches * STATEMENTS) as f64;
        Ok(Done { units, elapsed_s: start.elapsed().as_secs_f64(), p99_ms: None })
    }

    fn stop(&mut self) {
        // The end of its input ends it; if not, it is killed there, and was measured already.
        let _ = self.running.finish();
    }
}

/// The statements of the batch with that number: new rows, queries over some of those in the table, old rows away.
fn batch(number: u64) -> String {
    let mut text = String::from("BEGIN;\n");
    let first = number * ROWS;
    // Writing into a string cannot fail.
    for id in first..first + ROWS {
        let name = id * 7919 % 1000;
        let _ = writeln!(text, "INSERT INTO entries VALUES({id}, 'name {name}', hex(zeroblob({})));", 20 + id % 60);
    }
    for n in 0..QUERIES {
        let from = (first + n * 31).saturating_sub(KEPT / 2 * ROWS);
        let _ = writeln!(
            text,
            "SELECT name, count(*), sum(length(payload)) FROM entries WHERE id BETWEEN {from} AND {} \
             GROUP BY name ORDER BY 2 DESC LIMIT 1;",
            from + 50
        );
    }
    let _ =
        write!(text, "DELETE FROM entries WHERE id < {};\nCOMMIT;\n.print {MARK}\n", first.saturating_sub(KEPT * ROWS));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    // The unit of the result is the statement: the text must have as many as are counted.
    #[test]
    fn a_batch_has_the_statements_that_are_counted() {
        assert_eq!(batch(3).matches(";\n").count() as u64, STATEMENTS);
        assert!(batch(0).contains("WHERE id < 0;"));
        assert!(batch(60).contains("WHERE id < 1000;"));
    }
}
