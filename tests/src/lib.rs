//! The harness of the end-to-end tests: starts a program that leaks a known amount, starts memleak on it, and
//! gives the test typed snapshots to compare with.
//!
//! ```text
//! Program::start("kinds")          a test program, waiting to be told to work
//! Memleak::watch(program.pid())    memleak with --json, until its first snapshot: everything is attached
//! program.step("done")             let it work
//! memleak.settled()                a snapshot that was begun after the work was done
//! snapshot.at("leak_malloc")       what was counted at one function
//! ```
//!
//! Everything that is started is ended by its handle when it goes out of scope; every wait has a time limit.

pub mod features;
pub mod memleak;
pub mod program;
pub mod snapshot;
pub mod webdriver;

pub use features::{Feature, library_path, missing, skip};
pub use memleak::{Memleak, Outcome, memleak_command, output_within};
pub use program::{Program, image, program_path};
pub use snapshot::{Counts, KernelView, ProcessView, Reachability, SiteView, Snapshot, Tally};

/// Leaves the test, with a note, when this machine lacks one of the features; see [`features`].
#[macro_export]
macro_rules! needs {
    ($($feature:expr),+ $(,)?) => {
        if let Some(reason) = $crate::missing(&[$($feature),+]) {
            $crate::skip(&reason);
            return;
        }
    };
}
