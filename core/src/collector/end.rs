//! Ends of processes: how they came, and what was outstanding before exit handlers ran.
//!
//! Only with [`super::Purpose::Run`]. A process that calls `exit()` is stopped at its entry for as long as it takes to read its
//! totals, and to scan its memory for what it can still reach; a global that a handler or destructor frees afterwards is then known to be no leak.

use std::collections::HashMap;

use super::Collector;
use super::read::to_totals;
use crate::Result;
use crate::snapshot::{SiteKey, Totals};

/// How a process ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum End {
    /// It has not, or nobody saw how.
    #[default]
    Unknown,
    /// By itself, with this exit code.
    Exited(i32),
    /// By this signal.
    Killed(i32),
    /// It runs another program: its memory was thrown away.
    Exec,
}

impl End {
    /// Reads a status as wait(2) gives it.
    pub(super) fn of_status(status: i32) -> End {
        match status & 0x7f {
            0 => End::Exited(status >> 8 & 0xff),
            signal => End::Killed(signal),
        }
    }
}

/// What is known of a process that has ended, beside its last totals.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// How.
    pub how: End,
    /// Totals by site when it called `exit()`, before any exit handler ran; `None` when it did not.
    pub before_handlers: Option<HashMap<SiteKey, Totals>>,
}

impl Collector {
    /// How a process has ended whose last totals were in a snapshot; told once, and only with [`super::Purpose::Run`].
    pub fn take_ended(&mut self, instance: u32) -> Option<Ended> {
        self.ended.remove(&instance)
    }

    /// A process has called `exit()` and is stopped. Whatever goes wrong, it must not stay so.
    pub(super) fn exiting(&mut self, pid: u32, instance: u32) {
        let waits = self.look_at_exit(instance).unwrap_or_else(|e| {
            tracing::warn!(pid, "what the process held at its exit is not known in full: {e:#}");
            false
        });
        if !waits {
            self.go_on(pid);
        }
    }

    /// Takes note of what a process holds that has called `exit()`; true when it must wait for a scan.
    fn look_at_exit(&mut self, instance: u32) -> Result<bool> {
        // A handler that calls exit() again changes nothing: the first call is the one.
        if self.watched.get(&instance).is_none_or(|w| w.ended.before_handlers.is_some()) {
            return Ok(false);
        }
        let mine = self.tracker.get()?.read_sites()?.into_iter().filter(|(key, _)| key.instance == instance);
        let totals: HashMap<SiteKey, Totals> = mine
            .map(|(key, totals)| {
                let key = SiteKey { instance, probe_set: key.probe_set, stack: key.stack };
                (key, to_totals(&totals))
            })
            .filter(|(_, totals)| totals.outstanding_count() > 0)
            .collect();
        let holds = !totals.is_empty();
        if let Some(watched) = self.watched.get_mut(&instance) {
            watched.ended.before_handlers = Some(totals);
        }
        if holds { self.scan_exiting(instance) } else { Ok(false) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel packs code and signal into one word; mixing them up would call a crash a success.
    #[test]
    fn a_status_is_an_exit_code_or_a_signal() {
        assert_eq!(End::of_status(0), End::Exited(0));
        assert_eq!(End::of_status(3 << 8), End::Exited(3));
        assert_eq!(End::of_status(11 | 0x80), End::Killed(11));
        assert_eq!(End::of_status(9), End::Killed(9));
    }
}
