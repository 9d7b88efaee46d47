//! What the kernel side tells as it happens: lives of processes, and, in a trace, every allocation and free.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use libbpf_rs::{MapCore, RingBuffer, RingBufferBuilder};

use crate::reader::SiteKey;
use crate::types::{
    from_bytes, memleak_event, memleak_event_kind as kind, memleak_process_event,
    memleak_process_event_kind as process, text,
};
use crate::{Error, Result};

/// Something happened to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessEvent {
    /// A process of this machine runs a new program. `instance` is the watched instance that this ended, if any.
    Exec {
        /// Process id.
        pid: u32,
        /// The instance that ended.
        instance: Option<u32>,
    },
    /// A watched process has ended.
    Exit {
        /// Process id.
        pid: u32,
        /// The instance that ended.
        instance: u32,
        /// How it ended, as wait(2) gives it: exit code or signal.
        status: i32,
    },
    /// A watched process has forked.
    Fork {
        /// The parent's process id.
        pid: u32,
        /// The parent's instance.
        instance: u32,
        /// The child's process id.
        child: u32,
        /// The child uses its parent's memory until it calls exec (vfork).
        shares_memory: bool,
    },
    /// A watched process has called exit() and is stopped (SIGSTOP) before its exit handlers run, see
    /// [`crate::Tracker::attach_exit`].
    Exiting {
        /// Process id.
        pid: u32,
        /// Its instance.
        instance: u32,
    },
    /// The dynamic linker of a watched process has mapped or unmapped something.
    Load {
        /// Process id.
        pid: u32,
        /// Its instance.
        instance: u32,
    },
}

/// What an [`Event`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A block was handed out.
    Alloc,
    /// A block was given back.
    Free,
    /// A block must have been given back unseen: its address is handed out again.
    ImplicitFree,
}

/// One allocation or free.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Nanoseconds of CLOCK_MONOTONIC.
    pub time_ns: u64,
    /// What it is.
    pub kind: EventKind,
    /// Address of the block.
    pub address: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Frees: nanoseconds since the allocation. Allocations: 0.
    pub lifetime_ns: u64,
    /// Key of the stack of this call, see [`crate::Tracker::take_stack`].
    pub site: SiteKey,
    /// Number of the name of the function that was called, see [`crate::Tracker::function_name`]; no name for an implicit
    /// free.
    pub name: u32,
    /// Process id.
    pub pid: u32,
    /// Thread id.
    pub tid: u32,
    /// The thread's name. Hostile bytes.
    pub comm: String,
    /// Id of its cgroup.
    pub cgroup: u64,
}

/// Reads the ring buffers that there are.
pub(crate) struct Rings {
    ring: RingBuffer<'static>,
    processes: Rc<RefCell<VecDeque<ProcessEvent>>>,
    events: Rc<RefCell<VecDeque<Event>>>,
}

impl Rings {
    pub(crate) fn new(process_events: Option<&dyn MapCore>, events: Option<&dyn MapCore>) -> Result<Rings> {
        let rings = (Rc::new(RefCell::new(VecDeque::new())), Rc::new(RefCell::new(VecDeque::new())));
        let mut builder = RingBufferBuilder::new();
        if let Some(map) = process_events {
            let processes = Rc::clone(&rings.0);
            builder
                .add(map, move |bytes| {
                    processes.borrow_mut().extend(decode_process_event(bytes));
                    0
                })
                .map_err(|e| Error::bpf("read process events", &e))?;
        }
        if let Some(map) = events {
            let queue = Rc::clone(&rings.1);
            builder
                .add(map, move |bytes| {
                    queue.borrow_mut().extend(decode_event(bytes));
                    0
                })
                .map_err(|e| Error::bpf("read allocation events", &e))?;
        }
        let ring = builder.build().map_err(|e| Error::bpf("set up ring buffers", &e))?;
        Ok(Rings { ring, processes: rings.0, events: rings.1 })
    }

    /// Waits until something has happened, at most `timeout`. A signal ends the wait early and is no error.
    pub(crate) fn poll(&self, timeout: Duration) -> Result<()> {
        match self.ring.poll(timeout) {
            Err(e) if e.kind() != libbpf_rs::ErrorKind::Interrupted => Err(Error::bpf("poll ring buffers", &e)),
            _ => Ok(()),
        }
    }

    /// Drops everything that has happened so far.
    pub(crate) fn discard(&self) -> Result<()> {
        self.poll(Duration::ZERO)?;
        self.processes.borrow_mut().clear();
        self.events.borrow_mut().clear();
        Ok(())
    }

    pub(crate) fn next_process_event(&self) -> Option<ProcessEvent> {
        self.processes.borrow_mut().pop_front()
    }

    pub(crate) fn next_event(&self) -> Option<Event> {
        self.events.borrow_mut().pop_front()
    }
}

fn decode_process_event(bytes: &[u8]) -> Option<ProcessEvent> {
    let raw: memleak_process_event = from_bytes(bytes)?;
    let memleak_process_event { pid, instance, child, .. } = raw;
    match process(raw.kind) {
        process::PROCESS_EXEC => Some(ProcessEvent::Exec { pid, instance: (instance != 0).then_some(instance) }),
        process::PROCESS_EXIT => Some(ProcessEvent::Exit { pid, instance, status: child.cast_signed() }),
        process::PROCESS_FORK => Some(ProcessEvent::Fork { pid, instance, child, shares_memory: false }),
        process::PROCESS_VFORK => Some(ProcessEvent::Fork { pid, instance, child, shares_memory: true }),
        process::PROCESS_EXITING => Some(ProcessEvent::Exiting { pid, instance }),
        process::PROCESS_LOAD => Some(ProcessEvent::Load { pid, instance }),
        _ => None,
    }
}

fn decode_event(bytes: &[u8]) -> Option<Event> {
    let raw: memleak_event = from_bytes(bytes)?;
    Some(Event {
        time_ns: raw.time_ns,
        kind: match kind(raw.kind) {
            kind::EVENT_ALLOC => EventKind::Alloc,
            kind::EVENT_FREE => EventKind::Free,
            kind::EVENT_IMPLICIT_FREE => EventKind::ImplicitFree,
            _ => return None,
        },
        address: raw.address,
        size: raw.size,
        lifetime_ns: raw.lifetime_ns,
        site: SiteKey { stack: raw.stack, instance: raw.instance, probe_set: raw.probe_set },
        name: raw.name,
        pid: raw.pid,
        tid: raw.tid,
        comm: text(&raw.comm),
        cgroup: raw.cgroup,
    })
}
