//! Signals that end a run, or ask for a report or a scan.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1, SIGUSR2};

use crate::{Error, Result};

/// What signals have asked for.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    requested: Arc<AtomicBool>,
    report: Arc<AtomicBool>,
    scan: Arc<AtomicBool>,
}

impl Stop {
    /// Listens from now on: SIGINT and SIGTERM ask for an orderly end, a second one ends at once; SIGUSR1 asks for a
    /// report, SIGUSR2 for a scan of the targets' memory.
    ///
    /// # Errors
    /// When a handler cannot be installed.
    pub fn listen() -> Result<Stop> {
        let stop = Stop::default();
        let failed = |e| Error::io("failed to install signal handlers", e);
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag unset and sets it, the second finds it set.
            signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&stop.requested))
                .map_err(failed)?;
            signal_hook::flag::register(signal, Arc::clone(&stop.requested)).map_err(failed)?;
        }
        signal_hook::flag::register(SIGUSR1, Arc::clone(&stop.report)).map_err(failed)?;
        signal_hook::flag::register(SIGUSR2, Arc::clone(&stop.scan)).map_err(failed)?;
        Ok(stop)
    }

    /// True when the run is to end.
    pub fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Relaxed)
    }

    /// Asks for the end, as a signal does.
    pub fn request(&self) {
        self.requested.store(true, Ordering::Relaxed);
    }

    /// True once for each time that a scan was asked for.
    pub fn take_scan_request(&self) -> bool {
        self.scan.swap(false, Ordering::Relaxed)
    }

    /// True once for each time that a report was asked for.
    pub fn take_report_request(&self) -> bool {
        self.report.swap(false, Ordering::Relaxed)
    }
}
