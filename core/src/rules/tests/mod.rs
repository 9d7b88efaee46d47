//! Tests of the rule engine and of the shipped rules.

mod engine;
mod hostile;
mod readme;
mod reload;
mod shapes;
mod reachability;
mod shipped;
mod support;
