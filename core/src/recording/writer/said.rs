//! What was said of the snapshots: findings with their beginning and end, and alerts.

use std::collections::HashMap;

use rusqlite::params;

use super::{ALERTS_PER_PUSH, Standing, Step, Writer};
use crate::Result;
use crate::alert::{Alert, Status};
use crate::finding::Finding;
use crate::recording::{Event, EventKind};
use crate::snapshot::{SiteKey, Snapshot};

impl Writer {
    /// Stores which findings begin and end with a snapshot.
    pub(super) fn store_findings(&mut self, step: &Step<'_>) -> Result<()> {
        let snapshot = step.snapshot;
        let mut next = HashMap::with_capacity(step.findings.len());
        for finding in step.findings {
            let key = (finding.id.clone(), finding.site.key);
            let known = self.standing.get(&key).filter(|s| s.last.severity == finding.severity).map(|s| s.row);
            let row = match known {
                Some(row) => row,
                None => self.open_finding(finding, snapshot)?,
            };
            let (last_snapshot, last_s) = (snapshot.number, snapshot.time_s);
            next.insert(key, Standing { row, last: finding.clone(), last_snapshot, last_s });
        }
        let goes_on = |(key, s): &(&(String, SiteKey), &Standing)| next.get(*key).is_some_and(|n| n.row == s.row);
        for (_, ended) in self.standing.iter().filter(|s| !goes_on(s)) {
            self.close_finding(ended, false)?;
        }
        self.next_standing = next;
        Ok(())
    }

    fn open_finding(&self, finding: &Finding, snapshot: &Snapshot) -> Result<i64> {
        let site = self.sites.get(&finding.site.key).map(|k| k.id);
        self.run_sql(
            "INSERT INTO findings (finding, rule, site, severity, confidence, reason, first_snapshot, first_s) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            params![
                finding.id,
                &*finding.rule,
                site,
                finding.severity.as_str(),
                finding.confidence,
                finding.reason,
                snapshot.number.cast_signed(),
                snapshot.time_s
            ],
        )
    }

    /// Stores the end of a finding. One that still stands at the end of the run keeps an open end, but its last words
    /// are stored all the same.
    pub(super) fn close_finding(&self, standing: &Standing, stands: bool) -> Result<()> {
        let end = (!stands).then_some((standing.last_snapshot.cast_signed(), standing.last_s));
        self.run_sql(
            "UPDATE findings SET last_snapshot = ?, last_s = ?, confidence = ?, reason = ? WHERE id = ?",
            params![end.map(|e| e.0), end.map(|e| e.1), standing.last.confidence, standing.last.reason, standing.row],
        )
        .map(drop)
    }

    pub(super) fn store_alerts(&mut self, step: &Step<'_>) -> Result<()> {
        let snapshot = step.snapshot;
        for alert in step.changed {
            let what = match alert.status {
                Status::Firing => alert.severity.as_str(),
                Status::Resolved => "resolved",
            };
            let text = format!("{what}: {} ({})", alert.rule, alert.id);
            let instance = Some(alert.site.key.instance);
            let (time_s, wall_s) = (snapshot.time_s, snapshot.wall_s);
            self.event(Event { time_s, wall_s, kind: EventKind::Alert, instance, text });
            self.store_alert(alert)?;
        }
        let count = step.active.len();
        let start = if count > ALERTS_PER_PUSH { self.next_alert % count } else { 0 };
        self.next_alert = start + ALERTS_PER_PUSH;
        for alert in step.active.iter().cycle().skip(start).take(count.min(ALERTS_PER_PUSH)) {
            self.store_alert(alert)?;
        }
        Ok(())
    }

    pub(super) fn store_alert(&mut self, alert: &Alert) -> Result<()> {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let site = self.sites.get(&alert.site.key).map(|k| k.id);
        let mut hash = DefaultHasher::new();
        (&alert.reason, alert.severity, alert.confidence.to_bits(), site, alert.processes, alert.ended).hash(&mut hash);
        (alert.totals.outstanding_bytes(), alert.resolved_s.map(f64::to_bits)).hash(&mut hash);
        let hash = hash.finish();
        if self.caches.alerts.insert((alert.id.clone(), alert.fired_s.to_bits()), hash) == Some(hash) {
            return Ok(());
        }
        self.run_sql(
            "INSERT INTO alerts (finding, fired_s, first_seen_s, resolved_s, rule, severity, confidence, reason, site, \
             processes, ended, outstanding_bytes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) \
             ON CONFLICT DO UPDATE SET resolved_s = excluded.resolved_s, severity = excluded.severity, \
             confidence = excluded.confidence, reason = excluded.reason, site = coalesce(excluded.site, site), \
             processes = excluded.processes, ended = excluded.ended, outstanding_bytes = excluded.outstanding_bytes",
            params![
                alert.id,
                alert.fired_s,
                alert.first_seen_s,
                alert.resolved_s,
                &*alert.rule,
                alert.severity.as_str(),
                alert.confidence,
                alert.reason,
                site,
                alert.processes as i64,
                alert.ended,
                alert.totals.outstanding_bytes().cast_signed()
            ],
        )
        .map(drop)
    }
}
