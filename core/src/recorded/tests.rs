//! Recorded runs of made-up heaps.

use std::sync::{Arc, OnceLock};

use super::replay::run_rules;
use super::report::alerts;
use crate::alert::Alert;
use crate::alert::AlertManager;
use crate::config::Config;
use crate::history::History;
use crate::output::report::RunInfo;
use crate::output::report::{AlertStatus, AlertView, Report};
use crate::output::templates::Templates;
use crate::recording::{Filter, Reader};
use crate::recording::{Host, Limits, Settings, Step, Writer};
use crate::rules::RuleEngine;
use crate::snapshot::SiteKey;
use crate::snapshot::{LIFETIME_CLASSES, Process, ProcessSample, Site, SiteSample, Snapshot, StandardErrors, Totals};
use crate::symbolize::Frame;

/// Forty sites, of which every tenth leaks; one a second.
fn snapshot(number: u64, sites: &[Arc<Site>]) -> Snapshot {
    let sample = |(i, site): (u64, &Arc<Site>)| {
        let held = if i.is_multiple_of(10) { number * 300 } else { 500 + (number * 7 + i) % 23 };
        SiteSample {
            site: Arc::clone(site),
            totals: Totals {
                allocated_bytes: (held + number * i) * 96,
                allocated_count: held + number * i,
                freed_bytes: number * i * 96,
                freed_count: number * i,
            },
            stderr: StandardErrors::default(),
            last_allocation_s: number as f64,
            cohorts: Vec::new(),
            lifetimes: [0; LIFETIME_CLASSES],
            reachability: None,
            kernel: None,
        }
    };
    let process = Arc::clone(&sites[0].process);
    let mut sites: Vec<SiteSample> = (0..).zip(sites).map(sample).collect();
    sites.sort_by_key(|s| (std::cmp::Reverse(s.totals.outstanding_bytes()), s.site.key));
    Snapshot {
        number,
        time_s: number as f64,
        wall_s: 1e9 + number as f64,
        processes: vec![ProcessSample { process, alive: true, hits: number * 1000, ..Default::default() }],
        sites,
        collect_cpu_s: 0.0,
    }
}

fn sites() -> Vec<Arc<Site>> {
    let process = Arc::new(Process { instance: 1, pid: 4711, comm: "app".into(), ..Process::default() });
    let site = |i: u64| {
        let function = Some(format!("function_{i}"));
        let frame = Frame { function, address: i + 1, ..Frame::default() };
        Arc::new(Site {
            key: SiteKey { instance: 1, probe_set: 1, stack: i },
            id: i.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            process: Arc::clone(&process),
            probe_set: "glibc".into(),
            function: "malloc".into(),
            addresses: vec![i + 1],
            truncated: None,
            first_thread: None,
            frames: OnceLock::from(vec![frame]),
        })
    };
    (0..40).map(site).collect()
}

/// The report's page without what is drawn at random for each page.
fn page(history: &History, alerts: &[AlertView]) -> String {
    let templates = Templates::new(None).expect("templates");
    let html = Report::new(history, alerts, &RunInfo::default(), 100).html(&templates).expect("page");
    let nonce = html.split("nonce-").nth(1).and_then(|rest| rest.get(..32)).expect("nonce").to_owned();
    html.replace(&nonce, "")
}

/// The promise of a recording: rules find the same at the same times with the same ids as they did live, and the
/// report shows the same numbers.
#[test]
fn replay_and_report_are_as_live() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("run.memleak");
    let config = Config::default();
    let settings = Settings::of(&config).to_text();
    let run = RunInfo::default();
    let mut writer = Writer::create(&path, Limits::default(), &Host::default(), &run, &settings).expect("file");
    let mut rules = RuleEngine::new(&config.rules).expect("rules");
    let (mut history, mut manager) = (History::new(config.history), AlertManager::new(&config.alerts));
    let sites = sites();
    // More than a series keeps, so that thinning counts too.
    for number in 1..=700 {
        let snapshot = snapshot(number, &sites);
        history.push(&snapshot);
        let evaluation = rules.evaluate(&history, &mut |_| {});
        let events = manager.update(&evaluation.findings, &history, snapshot.time_s, snapshot.wall_s);
        let changed: Vec<&Alert> = events.iter().map(|e| &e.alert).collect();
        let (active, findings) = (manager.active(), &evaluation.findings);
        let step = Step { snapshot: &snapshot, findings, active: &active, changed: &changed, run: None };
        writer.push(&step, &mut |_| Vec::new()).expect("stored");
    }
    writer.finish(None, &manager.active()).expect("finished");
    let reader = Reader::open(&path).expect("opens");
    let replayed = run_rules(&reader, &config, &mut || {}).expect("replays");
    let live = reader.findings().expect("reads").into_iter().map(|f| {
        (f.id, f.severity, f.confidence, f.reason, f.first_snapshot, f.last_snapshot, f.first_s, f.last_s, f.standing)
    });
    let mut live: Vec<_> = live.collect();
    let mut again: Vec<_> = (replayed.findings.into_iter())
        .map(|f| {
            (
                f.id,
                f.severity,
                f.confidence,
                f.reason,
                f.first_snapshot,
                f.last_snapshot,
                f.first_s,
                f.last_s,
                f.standing,
            )
        })
        .collect();
    live.sort_by(|a, b| (&a.0, a.4).cmp(&(&b.0, b.4)));
    again.sort_by(|a, b| (&a.0, a.4).cmp(&(&b.0, b.4)));
    assert!(live.len() >= 4, "{live:?}");
    assert_eq!(live, again);
    assert_eq!((replayed.snapshots, replayed.raised), (700, manager.raised()));
    let filter = Filter::default();
    let recorded = reader.history(config.history, &filter, &mut || {}).expect("reads");
    recorded.sites().for_each(|h| reader.name(h.site()).expect("names"));
    let live_views: Vec<AlertView> = (manager.active().into_iter())
        .map(|a| AlertView {
            id: a.id.clone(),
            status: AlertStatus::Firing,
            since_s: a.fired_s,
            rule: a.rule.to_string(),
            severity: a.severity,
            confidence: a.confidence,
            reason: a.reason.clone(),
            site: a.site.key,
            processes: a.processes,
        })
        .collect();
    let views = alerts(&reader, &recorded, &filter).expect("alerts");
    assert!(!views.is_empty());
    assert!(page(&history, &live_views) == page(&recorded, &views), "the pages differ");
}
