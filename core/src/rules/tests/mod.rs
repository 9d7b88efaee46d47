//! Tests of the rule engine and of the shipped rules.

mod shapes;
mod shipped;
mod support;
