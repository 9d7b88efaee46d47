//! What a rule may use up: instructions per call, CPU time per snapshot, memory per state.
//!
//! Instructions are the limit that users set and that gives the same verdict on every machine. CPU time is a net
//! below it: a single Lua instruction may copy megabytes, so counting alone does not bound time.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::time::Duration;

/// CPU time that one rule may use for all sites of one snapshot.
pub(super) const SNAPSHOT_CPU: Duration = Duration::from_secs(2);

/// A limit that a rule ran into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Limit {
    /// Instructions of one call.
    Instructions(u64),
    /// Memory of the rule's state, in bytes.
    Memory(u64),
    /// CPU time over one snapshot.
    Cpu,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Limit::Instructions(n) => {
                write!(f, "used more than {n} instructions in one call (endless loop? or raise rules.max_instructions)")
            }
            Limit::Memory(n) => {
                write!(f, "used more than {} of memory (or raise rules.max_memory)", crate::units::format_bytes(*n))
            }
            Limit::Cpu => {
                write!(f, "used more than {} s of CPU time in one snapshot", SNAPSHOT_CPU.as_secs())
            }
        }
    }
}

impl std::error::Error for Limit {}

/// Counts down while a rule runs. Shared by the instruction hook and by host functions that loop.
#[derive(Debug)]
pub(super) struct Budget {
    max_instructions: u64,
    max_memory: u64,
    left: Cell<u64>,
    /// CPU time of this thread at which the rule's time for this snapshot is over.
    cpu_end: Cell<Duration>,
    exceeded: RefCell<Option<Limit>>,
    /// Chunk and line at which the hook found a limit exceeded: errors of hooks carry no place themselves.
    place: RefCell<Option<(String, u32)>>,
}

impl Budget {
    pub(super) fn new(max_instructions: u64, max_memory: u64) -> Self {
        Budget {
            max_instructions,
            max_memory,
            left: Cell::new(max_instructions),
            cpu_end: Cell::new(Duration::MAX),
            exceeded: RefCell::new(None),
            place: RefCell::new(None),
        }
    }

    /// Grants the CPU time of one snapshot, from now on.
    pub(super) fn start_snapshot(&self) {
        self.cpu_end.set(thread_cpu() + SNAPSHOT_CPU);
    }

    /// Grants the instructions of one call and forgets an exceeded limit.
    pub(super) fn start_call(&self) {
        self.left.set(self.max_instructions);
        if self.exceeded.borrow().is_some() {
            self.exceeded.replace(None);
            self.place.replace(None);
        }
    }

    /// Runs work that is not the rule's own, such as symbolizing, without charging its CPU time.
    pub(super) fn exempt<R>(&self, work: impl FnOnce() -> R) -> R {
        let before = thread_cpu();
        let result = work();
        let spent = thread_cpu().saturating_sub(before);
        self.cpu_end.set(self.cpu_end.get().saturating_add(spent));
        result
    }

    /// Takes `instructions` off; once a limit is exceeded every further call fails too.
    pub(super) fn charge(&self, instructions: u64) -> mlua::Result<()> {
        match self.left.get().checked_sub(instructions) {
            Some(left) => {
                self.left.set(left);
                Ok(())
            }
            None => {
                self.left.set(0);
                Err(self.exceed(Limit::Instructions(self.max_instructions)))
            }
        }
    }

    /// Fails when the CPU time of the snapshot is used up.
    pub(super) fn check_cpu(&self) -> mlua::Result<()> {
        if thread_cpu() > self.cpu_end.get() { Err(self.exceed(Limit::Cpu)) } else { Ok(()) }
    }

    /// Memory that the state may use, in bytes.
    pub(super) fn max_memory(&self) -> usize {
        usize::try_from(self.max_memory).unwrap_or(usize::MAX)
    }

    /// Notes where the rule was when the hook stopped it; the first place counts.
    pub(super) fn stopped_at(&self, place: impl FnOnce() -> Option<(String, u32)>) {
        let mut noted = self.place.borrow_mut();
        if noted.is_none() {
            *noted = place();
        }
    }

    /// Where the hook stopped the rule, if it did.
    pub(super) fn place(&self) -> Option<(String, u32)> {
        self.place.borrow().clone()
    }

    /// Notes that the memory limit was hit.
    pub(super) fn exceed_memory(&self) -> mlua::Error {
        self.exceed(Limit::Memory(self.max_memory))
    }

    /// The limit that was exceeded in this call.
    pub(super) fn exceeded(&self) -> Option<Limit> {
        self.exceeded.borrow().clone()
    }

    /// Keeps the first limit that was exceeded: what comes after it is its consequence.
    fn exceed(&self, limit: Limit) -> mlua::Error {
        let mut exceeded = self.exceeded.borrow_mut();
        mlua::Error::external(exceeded.get_or_insert(limit).clone())
    }
}

/// CPU time that this thread has used.
fn thread_cpu() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec that outlives the call; the clock exists on every Linux.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) } != 0;
    if failed {
        return Duration::ZERO;
    }
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}
