//! What people should know of while it runs.

use std::sync::Arc;

use super::PluginStatus;
use crate::governor::StopReason;
use crate::reachability::scanner::Cost;
use crate::snapshot::Process;

/// Something about a process that people should know, once.
#[derive(Clone, Debug)]
pub enum Notice {
    /// A process is watched now.
    Watching(Arc<Process>, Vec<PluginStatus>),
    /// Part of what was asked for cannot be followed, or has no name.
    Limited {
        /// Of what process.
        process: Arc<Process>,
        /// What, why, and what to do.
        what: String,
    },
    /// A process has ended or runs another program.
    Ended(Arc<Process>),
    /// A process makes too many calls for its budget, or few enough again: its books were started anew.
    Mode {
        /// The process, under its new instance number.
        process: Arc<Process>,
        /// True: everything is traced again. False: it is watched through windows.
        exact: bool,
    },
    /// The memory of a process is being scanned, and that will take a while.
    Scanning {
        /// The process.
        process: Arc<Process>,
        /// Its resident memory: about what a scan reads.
        bytes: u64,
        /// How many scans are planned.
        scans: u32,
        /// How long they take together by plan, seconds.
        about_s: f64,
    },
    /// Another sample of what the kernel allocates is recorded from here on: its books were started anew.
    Sampled {
        /// The kernel, under its new instance number.
        process: Arc<Process>,
        /// Mean bytes between two allocations that are recorded; 0: all are.
        mean_bytes: u64,
        /// True: what was recorded so far exceeds the budget. False: more is affordable again.
        too_costly: bool,
    },
    /// The memory of a process has been scanned for references.
    Scanned {
        /// The process.
        process: Arc<Process>,
        /// What it took.
        cost: Cost,
    },
    /// The memory of a process could not be scanned.
    NotScanned {
        /// The process.
        process: Arc<Process>,
        /// Why.
        reason: String,
    },
    /// All tracing of a process was stopped at once, and is not tried again before the cool-down is over.
    Stopped {
        /// The process.
        process: Arc<Process>,
        /// Why.
        why: StopReason,
        /// How long, seconds.
        cool_down_s: f64,
    },
    /// A process cannot be watched.
    Failed {
        /// Its process id.
        pid: u32,
        /// Why.
        reason: String,
    },
}
