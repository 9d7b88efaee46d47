//! What people and machines get to see: templates, reports, files.

pub mod alerts;
pub mod atomic;
pub mod filters;
pub mod junit;
pub mod reach;
pub mod report;
pub mod sarif;
pub mod snapshots;
pub mod templates;
pub mod text;
pub mod webhook;
