//! End-to-end tests of memleak: real programs, the real binary, exact numbers.
//!
//! One module per topic; the harness is the library of this package. Tests that need root or a program that is not
//! installed are skipped with a note, except in CI.

mod bad_files;
mod bad_input;
mod bars;
mod cli;
mod containers;
mod coverage;
mod demo;
mod diff;
mod export;
mod governor;
mod import;
mod interpreted;
mod kernel_live;
mod leakmod;
mod reachability;
mod recording;
mod report;
mod run;
mod servers;
mod stacks;
mod symbols;
mod userspace;
