//! Tests of the rule engine and of the shipped rules.

mod engine;
mod hostile;
mod reachability;
mod readme;
mod reload;
mod shapes;
mod shipped;
mod support;
