//! What a rule returns: a [`Finding`] about one allocation site.
//!
//! Findings are made by `rules`, consumed by `alert` and the reports. A finding is a statement of one rule at
//! one snapshot; whether anybody is told is the business of `alert`.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::snapshot::Site;

/// How bad it is. Ordered: `Info < Warning < Critical`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// Probably a leak; look at it.
    Warning,
    /// A leak that will hurt.
    Critical,
}

impl Severity {
    /// Lower-case name, as used in rules, alerts and templates.
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Critical => "critical",
        }
    }
}

/// One rule's suspicion about one site at one snapshot.
#[derive(Clone, Debug)]
pub struct Finding {
    /// Stable id: 16 hex digits over rule name and [`Site::id`]; the same after a restart of either side.
    pub id: String,
    /// Name of the rule.
    pub rule: Arc<str>,
    /// How bad it is.
    pub severity: Severity,
    /// How sure the rule is, 0 to 1.
    pub confidence: f64,
    /// One sentence for people.
    pub reason: String,
    /// The site.
    pub site: Arc<Site>,
}
