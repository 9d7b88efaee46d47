//! Leak or cache: which outstanding blocks can a process still reach?
//!
//! Works from outside on a process that keeps running. Its writable memory is read, and every aligned word that points
//! at an outstanding block is a reference. What is not a tracked block is a root: globals, stacks, thread-local memory,
//! blocks that are not tracked. A walk from the roots finds what is reachable. Because pointers move while the memory is
//! being read, one scan proves nothing: a block is called lost when it was unreachable in several scans in a row
//! ([`Series`]).
//!
//! - [`books`], [`coded`] and [`kernel`] keep blocks from being called lost that only seem so;
//! - [`index`] finds the block that an address points into;
//! - [`mark`] is one scan: references in, reachability of every block out;
//! - [`memory`] is where the words come from, [`roots`] what their places are called;
//! - [`plan`] says beforehand whether a process can be scanned, and what that takes;
//! - [`scanner`] does a series of scans of a live process;
//! - [`service`] does it in the background, for the collector;
//! - [`stop`] is the brief stop that may be asked for: registers, and memory that stands still;
//! - [`verdict`] makes a site's verdict from several scans.

pub mod books;
pub mod coded;
pub mod index;
pub mod kernel;
pub mod mark;
pub mod memory;
pub mod plan;
pub mod roots;
pub mod runtime;
pub mod scanner;
pub mod service;
pub mod stop;
pub mod verdict;

pub use index::{Block, Index};
pub use mark::{Learned, Marked, Reach, Scan};
pub use verdict::{Limits, Series, SiteVerdict, Verdict};
