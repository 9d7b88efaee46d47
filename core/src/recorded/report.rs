//! `memleak report`: the page of a recorded run.

use std::path::Path;

use super::{gaps, open, progress};
use crate::alert::Status;
use crate::config::Override;
use crate::history::History;
use crate::output::atomic;
use crate::output::filters::format_count;
use crate::output::report::{AlertStatus, AlertView, Report, RunInfo};
use crate::output::templates::Templates;
use crate::output::text::visible;
use crate::recording::{AlertRecord, Filter, Reader, recorded};
use crate::snapshot::SiteKey;
use crate::units::format_duration_s;
use crate::{Error, ErrorKind, Result, cli};

/// Most names that a message lists.
const MAX_NAMED: usize = 20;
/// Most gaps that get a sentence of their own.
const MAX_GAPS: usize = 3;

/// Writes the report of a recording.
///
/// # Errors
/// The recording cannot be read, it has nothing in the part that was asked for, or the page cannot be written.
pub fn report(
    path: &Path,
    output: &Path,
    filter: &Filter,
    overrides: &[Override],
    templates: Option<&Path>,
) -> Result<()> {
    let templates = Templates::new(templates)?;
    let reader = open(path)?;
    check_filter(&reader, filter)?;
    let config = recorded(&reader.session().settings, reader.shown(), overrides)?;
    let bar = progress(reader.contents().len(), "reading");
    let history = reader.history(config.history, filter, &mut || bar.inc(1))?;
    bar.finish_and_clear();
    if history.snapshots() == 0 && !reader.contents().is_empty() {
        let length = reader.contents().last().map_or(0.0, |s| s.time_s);
        let what = format!("nothing of {} is in that part: it lasts {}", reader.shown(), format_duration_s(length));
        return Err(Error::new(ErrorKind::Config, what));
    }
    let alerts = alerts(&reader, &history, filter)?;
    let run = RunInfo { gaps: missing(&reader, filter)?, ..reader.session().run.clone() };
    let mut shown: Vec<_> = history.sites().collect();
    shown.sort_by_key(|h| std::cmp::Reverse(h.latest.totals.outstanding_bytes()));
    // Those that the live report names, and those with an alert; the others are shown by where they lie.
    let named = shown.iter().take(config.report.max_sites).map(|h| h.site());
    named.chain(alerts.iter().filter_map(|a| reader.site(a.site))).try_for_each(|site| reader.name(site))?;
    let html = Report::new(&history, &alerts, &run, config.report.max_sites).html(&templates)?;
    atomic::write(output, html.as_bytes())?;
    cli::print(&format!("report written to {}\n", visible(&output.to_string_lossy())))
}

/// What is missing in a part of a recording, a sentence each.
fn missing(reader: &Reader, filter: &Filter) -> Result<Vec<String>> {
    let (since, until) = (filter.since_s.unwrap_or(f64::NEG_INFINITY), filter.until_s.unwrap_or(f64::INFINITY));
    let gaps = gaps(reader)?.into_iter().filter(|(from_s, _)| (since..=until).contains(from_s));
    let mut out: Vec<String> = gaps.map(|(_, gap)| format!("The recording has {gap}.")).collect();
    if out.len() > MAX_GAPS {
        let more = out.len() - MAX_GAPS;
        out.truncate(MAX_GAPS);
        out.push(format!("It has {more} more gaps."));
    }
    let session = reader.session();
    if session.lacks_wal {
        out.push("The run was broken off, and the file with its newest snapshots is missing.".to_owned());
    }
    match session.thinned {
        0 => {}
        n => {
            out.push(format!("{} older snapshots were taken out to keep the recording small.", format_count(n as f64)))
        }
    }
    Ok(out)
}

/// Refuses a filter that nothing of the recording fits: most likely a typing error.
fn check_filter(reader: &Reader, filter: &Filter) -> Result<()> {
    let unknown = |what: &str, wanted: String, mut known: Vec<String>| {
        known.sort_unstable();
        known.dedup();
        known.truncate(MAX_NAMED);
        let known = known.join(", ");
        Error::config(format!("there is no {what} {wanted} in {}; there are: {known}", reader.shown()))
    };
    for pid in &filter.pids {
        if !reader.processes().any(|p| p.pid == *pid) {
            let known = reader.processes().map(|p| p.pid.to_string()).collect();
            return Err(unknown("process", pid.to_string(), known));
        }
    }
    for name in &filter.probe_sets {
        if !reader.sites().any(|s| *s.probe_set == **name) {
            let known = reader.sites().map(|s| visible(&s.probe_set).into_owned()).collect();
            return Err(unknown("site of the probe set", visible(name).into_owned(), known));
        }
    }
    Ok(())
}

/// The alerts of a recording that belong to a history, as of its end.
pub(super) fn alerts(reader: &Reader, history: &History, filter: &Filter) -> Result<Vec<AlertView>> {
    let until = filter.until_s.unwrap_or(f64::INFINITY);
    let known = |a: &SiteKey| history.site(*a).is_some() || *filter == Filter::default();
    let alerts = reader.alerts()?.into_iter().filter(|a| a.fired_s <= until && known(&a.site));
    let view = |a: AlertRecord| AlertView {
        status: match a.status {
            Status::Resolved if a.resolved_s.is_some_and(|at| at <= until) => AlertStatus::Resolved,
            _ => AlertStatus::Firing,
        },
        id: a.id,
        since_s: a.fired_s,
        rule: a.rule,
        severity: a.severity,
        confidence: a.confidence,
        reason: a.reason,
        site: a.site,
        processes: a.processes,
    };
    Ok(alerts.map(view).collect())
}
