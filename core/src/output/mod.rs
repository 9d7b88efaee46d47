//! What people and machines get to see: templates, reports, files.

pub mod alerts;
pub mod atomic;
pub mod filters;
pub mod report;
pub mod snapshots;
pub mod templates;
pub mod text;
pub mod webhook;
