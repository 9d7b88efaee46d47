//! A small report in which every field of the context has a value: what templates are tried on before they are used.

use std::sync::{Arc, OnceLock};

use super::{AlertStatus, AlertView, PluginState, PluginStatus, Report, RuleStatus, RunInfo};
use crate::coverage::{Baseline, Coverage};
use crate::finding::Severity;
use crate::history::{Bounds, History};
use crate::labels::Labels;
use crate::output::reach;
use crate::snapshot::{
    Cohort, LIFETIME_CLASSES, Losses, Mode, Process, ProcessSample, Site, SiteKey, SiteSample, Snapshot, Totals,
};
use crate::symbolize::Frame;

/// Number of snapshots: enough for every trend to be known.
const SNAPSHOTS: u32 = 30;

/// The sample.
pub(super) fn report() -> Report {
    let process = Arc::new(Process {
        instance: 1,
        pid: 4711,
        start_ticks: 1,
        comm: "server".into(),
        exe: "/opt/server".into(),
        cmdline: "/opt/server --port 80".into(),
        labels: Labels::from_cgroup(&format!("/system.slice/docker-{}.scope", "0a".repeat(32))),
    });
    // The third has no alert and does not fit into the report.
    let sites = [site(&process, 1, false), site(&process, 2, true), site(&process, 3, false)];
    let mut history = History::new(Bounds::default());
    for i in 1..=SNAPSHOTS {
        history.push(&snapshot(i, &process, &sites));
    }
    let alert = |status, severity, site: &Site| AlertView {
        id: "0123456789abcdef".into(),
        status,
        since_s: 5.0,
        rule: "growth".into(),
        severity,
        confidence: 0.9,
        reason: "grew in all 30 snapshots".into(),
        site: site.key,
        processes: 2,
    };
    let alerts = [
        alert(AlertStatus::Firing, Severity::Critical, &sites[0]),
        alert(AlertStatus::Resolved, Severity::Warning, &sites[1]),
    ];
    let rule = |error: Option<&str>| RuleStatus {
        name: "growth".into(),
        description: "outstanding bytes rise".into(),
        error: error.map(str::to_owned),
    };
    let plugin = |state, detail: &str| PluginStatus {
        probe_set: "glibc".into(),
        target: "4711 server".into(),
        state,
        probes: 18,
        detail: detail.into(),
    };
    let run = RunInfo {
        gaps: vec!["The recording has a gap at 12s: 3 snapshots are missing.".into()],
        title: "sample".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        host: "host".into(),
        kernel: "6.12.0".into(),
        started_wall_s: 1.7e9,
        targets: vec!["pid 4711".into()],
        interval_s: 1.0,
        backend: "session".into(),
        rules: vec![rule(None), rule(Some("rules/growth.lua:3: attempt to index a nil value"))],
        plugins: vec![plugin(PluginState::Attached, "libc.so.6"), plugin(PluginState::Failed, "no such symbol")],
        budget: Some("5 % of the target's CPU time, kept".into()),
        own_cpu_s: Some(0.5),
        own_rss_bytes: Some(20 << 20),
        own_map_bytes: Some(30 << 20),
        own_snapshot_cpu_s: Some(0.001),
        report_path: Some("memleak-report.html".into()),
        alerts_path: Some("memleak-alerts.ndjson".into()),
    };
    Report::new(&history, &alerts, &run, 1)
}

fn site(process: &Arc<Process>, number: u64, truncated: bool) -> Arc<Site> {
    let frames = vec![
        Frame {
            function: Some("Session::open()".into()),
            module: Some("/opt/server".into()),
            offset: 0x1a,
            file: Some("session.cc".into()),
            line: Some(42),
            inlined: true,
            address: 0x1000,
            ..Frame::default()
        },
        Frame { offset: 0x2000, reason: Some("no symbols".into()), address: 0x2000, ..Frame::default() },
    ];
    Arc::new(Site {
        key: SiteKey { instance: 1, probe_set: 1, stack: number },
        id: number,
        process: Arc::clone(process),
        probe_set: "glibc".into(),
        function: "malloc".into(),
        addresses: vec![0x1000, 0x2000],
        truncated: truncated.then(|| "no unwind information".into()),
        first_thread: None,
        frames: OnceLock::from(frames),
    })
}

fn snapshot(number: u32, process: &Arc<Process>, sites: &[Arc<Site>]) -> Snapshot {
    let time_s = f64::from(number);
    let n = u64::from(number);
    let totals = Totals { allocated_bytes: 3000 * n, allocated_count: 3 * n, freed_bytes: 1000 * n, freed_count: n };
    let cohort = Cohort {
        start_s: 0.0,
        end_s: time_s,
        born_bytes: totals.allocated_bytes,
        born_count: totals.allocated_count,
        outstanding_bytes: totals.outstanding_bytes(),
        outstanding_count: totals.outstanding_count(),
    };
    let mut lifetimes = [0; LIFETIME_CLASSES];
    lifetimes[10] = n;
    let reach = Arc::new(reach::sample());
    let sample = |site: &Arc<Site>| SiteSample {
        site: Arc::clone(site),
        totals,
        stderr: Default::default(),
        last_allocation_s: time_s,
        cohorts: vec![cohort],
        lifetimes,
        reachability: Some(reach.clone()),
        kernel: None,
    };
    Snapshot {
        number: n,
        time_s,
        wall_s: 1.7e9 + time_s,
        processes: vec![ProcessSample {
            process: Arc::clone(process),
            alive: true,
            mode: Mode::Exact,
            hits: 8 * n,
            unmatched_frees: 7,
            losses: Losses { missed_returns: 3, ..Losses::default() },
            rss_bytes: Some(50 << 20),
            rss_anon_bytes: Some(40 << 20),
            coverage: Some(Coverage::new(0.1, &Baseline::default(), 40 << 20, Some(30 << 20), 5 << 20)),
            hard_stops: 1,
            cpu_s: Some(time_s),
            overhead_s: 0.01 * time_s,
            ..ProcessSample::default()
        }],
        sites: sites.iter().map(sample).collect(),
        collect_cpu_s: 0.001,
    }
}
