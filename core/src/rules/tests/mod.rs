//! Tests of the rule engine and of the shipped rules.

mod engine;
mod hostile;
mod kit;
mod reachability;
mod readme;
mod recordings;
mod reload;
mod shipped;
mod support;
