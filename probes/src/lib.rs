//! The kernel side of the memory-leak detector, and the only crate that talks to it.
//!
//! Owns the BPF programs (`bpf/`), their maps, where probes are placed, how they are attached, and how totals are
//! read back. Knows nothing of settings files, rules or output; function names and roles are handed in as
//! [`FunctionSpec`]s.
//!
//! ```text
//! features   what works here, found out by attaching
//! elf        symbols of a mapped file -> file offsets
//! placement  the cheapest safe instruction of a function
//! spec       what is to be probed
//! tracker    load, add a process, attach, forget
//! reader     totals, stacks and counters in batches
//! calibration what a hit costs here
//! python     frames of Python functions
//! sweep      breakpoints that a killed tracker has left
//! unwind     unwind tables: rows in pages, and which code of a process has them
//! kernel     the kernel's own allocations
//! events     exec, exit, fork, load; every allocation and free for `trace`
//! ```

mod calibration;
pub mod elf;
mod error;
pub mod events;
pub mod features;
pub mod kernel;
mod operand;
mod own_code;
pub mod placement;
pub mod python;
pub mod reader;
mod sampler;
mod skeleton;
mod spec;
pub mod sweep;
pub mod tracker;
mod types;
pub mod unwind;
pub mod usdt;

pub use calibration::Prices;
pub use error::{Error, ErrorKind, Result};
pub use events::{Event, EventKind, ProcessEvent};
pub use features::{Backend, Features};
pub use reader::{Block, BlockReader, Counters, SiteKey, SiteTotals, Stack, StackEnd};
pub use sampler::MAX_SAMPLE_BYTES;
pub use spec::{Attached, FunctionSpec, Library, ProbeSetSpec, Returns, Role, SetKind, Size};
pub use tracker::{Settings, Tracker};
pub use types::{COHORTS, LIFETIME_CLASSES, MAX_DOMAINS, MAX_FRAMES, MAX_TARGETS};

/// Sends libbpf's own messages to `tracing` instead of standard error: its explanations of a refused program are for
/// those who ask for them.
pub fn forward_libbpf_messages() {
    fn forward(_level: libbpf_rs::PrintLevel, message: String) {
        tracing::debug!(target: "libbpf", "{}", message.trim_end());
    }
    libbpf_rs::set_print(Some((libbpf_rs::PrintLevel::Info, forward)));
}
