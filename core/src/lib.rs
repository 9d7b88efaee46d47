//! The memory-leak detector's engine: probe sets in, snapshots, history, rules, findings, alerts and reports out.
//!
//! ```text
//! read maps -> snapshot -> history -> symbolize -> rules -> alerts -> sinks
//! ```

pub mod alert;
mod cache_folder;
pub mod check;
pub mod cli;
pub mod collector;
pub mod config;
pub mod coverage;
pub mod diff;
pub mod doctor;
pub mod engine;
pub mod error;
pub mod export;
pub mod finding;
pub mod governor;
pub mod history;
pub mod import;
mod kallsyms;
pub mod kernel;
pub mod labels;
pub mod live;
pub mod maps;
pub mod moment;
pub mod output;
pub mod plugin;
pub mod process;
pub mod python;
pub mod reachability;
pub mod recorded;
pub mod recording;
pub mod resymbolize;
pub mod rules;
pub mod run;
pub mod scan;
pub mod selfstats;
pub mod snapshot;
pub mod stats;
pub mod stop;
pub mod symbolize;
mod sys;
pub mod target;
pub mod trace;
pub mod units;
pub mod unwind;
pub mod watchdog;

pub use error::{Error, ErrorKind, Result};
