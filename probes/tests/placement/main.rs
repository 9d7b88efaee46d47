//! Probe placement against the machine's own libraries: by an oracle that knows nothing of the code under test, and by
//! attaching to programs and counting.
#![cfg(target_arch = "x86_64")]

mod disassembly;
mod libraries;
mod live;
mod oracle;
mod programs;
