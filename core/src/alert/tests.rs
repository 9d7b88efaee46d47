use super::*;
use crate::snapshot::{Cohort, Process, ProcessSample, SiteSample, Snapshot};

/// A run of one-second snapshots with processes that each have one site.
struct Run {
    manager: AlertManager,
    history: History,
    time: u32,
    processes: Vec<(Arc<Process>, bool)>,
}

/// What one rule says of the site of one process.
struct Says {
    instance: u32,
    rule: &'static str,
    severity: Severity,
}

fn says(instance: u32) -> Says {
    Says { instance, rule: "growth", severity: Severity::Warning }
}

fn key(instance: u32) -> SiteKey {
    SiteKey { instance, probe_set: 0, stack: 7 }
}

impl Run {
    /// Hold 3 s, cool-down 10 s, warnings and above.
    fn new(processes: u32) -> Run {
        let settings = AlertSettings {
            hold: Duration::from_secs(3),
            cooldown: Duration::from_secs(10),
            ..AlertSettings::default()
        };
        let process = |instance| Arc::new(Process { instance, pid: 100 + instance, ..Process::default() });
        Run {
            manager: AlertManager::new(&settings),
            history: History::default(),
            time: 0,
            processes: (1..=processes).map(|i| (process(i), true)).collect(),
        }
    }

    /// Process `i` has `1000 * i` bytes more in each snapshot while it runs.
    fn snapshot(&self) -> Snapshot {
        let time_s = f64::from(self.time);
        let sites = self.processes.iter().filter(|(_, alive)| *alive).map(|(process, _)| {
            let bytes = u64::from(process.instance) * u64::from(self.time) * 1000;
            let cohort = Cohort { end_s: time_s, outstanding_count: 1, ..Cohort::default() };
            SiteSample {
                site: site(process),
                totals: Totals { allocated_bytes: bytes, allocated_count: 9, ..Totals::default() },
                stderr: Default::default(),
                last_allocation_s: time_s,
                cohorts: vec![cohort],
                lifetimes: Default::default(),
                reachability: None,
                kernel: None,
            }
        });
        let processes = self.processes.iter().map(|(process, alive)| ProcessSample {
            process: process.clone(),
            alive: *alive,
            losses: Losses { stacks_failed: 5, ..Losses::default() },
            ..ProcessSample::default()
        });
        Snapshot {
            time_s,
            wall_s: 1e9 + time_s,
            processes: processes.collect(),
            sites: sites.collect(),
            ..Snapshot::default()
        }
    }

    /// One second passes; returns what is told, as `time status rule severity`.
    fn tick(&mut self, findings: &[Says]) -> Vec<String> {
        self.time += 1;
        self.history.push(&self.snapshot());
        let findings: Vec<Finding> = findings.iter().map(|f| self.finding(f)).collect();
        let now_s = f64::from(self.time);
        let events = self.manager.update(&findings, &self.history, now_s, 1e9 + now_s);
        events.iter().map(|e| self.describe(e)).collect()
    }

    /// Several seconds with the same findings.
    fn ticks(&mut self, seconds: u32, findings: &[Says]) -> Vec<String> {
        (0..seconds).flat_map(|_| self.tick(findings)).collect()
    }

    fn describe(&self, e: &AlertEvent) -> String {
        let status = if e.alert.status == Status::Firing { "firing" } else { "resolved" };
        format!("{} {status} {} {}", self.time, e.alert.rule, e.alert.severity.as_str())
    }

    fn finding(&self, f: &Says) -> Finding {
        let process = &self.processes[f.instance as usize - 1].0;
        Finding {
            id: format!("id of {}", f.rule),
            rule: f.rule.into(),
            severity: f.severity,
            confidence: 0.5,
            reason: format!("of process {}", f.instance),
            site: site(process),
        }
    }

    fn end(&mut self, instance: u32) {
        self.processes[instance as usize - 1].1 = false;
    }
}

fn site(process: &Arc<Process>) -> Arc<Site> {
    Arc::new(Site {
        key: key(process.instance),
        id: 7,
        process: process.clone(),
        probe_set: "glibc".into(),
        function: "malloc".into(),
        addresses: vec![1],
        truncated: None,
        first_thread: None,
        frames: Default::default(),
    })
}

/// A finding of one lucky snapshot must not wake anybody; one that stands must, once.
#[test]
fn an_alert_fires_once_when_the_finding_has_stood_for_the_hold_time() {
    let mut run = Run::new(1);
    assert_eq!(run.ticks(3, &[says(1)]), [""; 0]);
    assert!(run.manager.active().is_empty());
    assert_eq!(run.tick(&[says(1)]), ["4 firing growth warning"]);
    assert_eq!(run.ticks(20, &[says(1)]), [""; 0]);
    assert_eq!(run.manager.active().len(), 1);
    assert_eq!(run.manager.raised(), 1);
}

/// Hold counts time without a break: what comes and goes starts anew.
#[test]
fn a_finding_that_pauses_before_the_hold_time_starts_anew() {
    let mut run = Run::new(1);
    run.ticks(3, &[says(1)]);
    run.tick(&[]);
    assert_eq!(run.ticks(3, &[says(1)]), [""; 0]);
    assert_eq!(run.tick(&[says(1)]), ["8 firing growth warning"]);
}

/// A pause shorter than the hold time is noise; a longer one is the end.
#[test]
fn an_alert_is_resolved_when_the_finding_has_been_gone_for_the_hold_time() {
    let mut run = Run::new(1);
    run.ticks(4, &[says(1)]);
    assert_eq!(run.ticks(3, &[]), [""; 0], "gone at 5, 6 and 7: two seconds");
    assert_eq!(run.tick(&[says(1)]), [""; 0]);
    assert_eq!(run.ticks(3, &[]), [""; 0]);
    assert_eq!(run.tick(&[]), ["12 resolved growth warning"]);
    assert!(run.manager.active().is_empty());
    let resolved: Vec<_> = run.manager.resolved().collect();
    assert_eq!(resolved.len(), 1);
    assert_eq!((resolved[0].first_seen_s, resolved[0].fired_s, resolved[0].resolved_s), (1.0, 4.0, Some(12.0)));
}

/// The cool-down must silence a finding that comes back, but must not swallow it for good.
#[test]
fn a_finding_that_is_back_is_told_after_the_cooldown_only() {
    let mut run = Run::new(1);
    run.ticks(4, &[says(1)]);
    assert_eq!(run.ticks(4, &[]), ["8 resolved growth warning"]);
    assert_eq!(run.ticks(9, &[says(1)]), [""; 0]);
    assert_eq!(run.tick(&[says(1)]), ["18 firing growth warning"]);
    assert_eq!(run.manager.active()[0].first_seen_s, 9.0);
    assert_eq!(run.manager.raised(), 2);
}

/// After a cool-down in silence the finding is as new, with its hold time.
#[test]
fn after_a_quiet_cooldown_the_hold_time_counts_again() {
    let mut run = Run::new(1);
    run.ticks(4, &[says(1)]);
    run.ticks(15, &[]);
    assert_eq!(run.ticks(3, &[says(1)]), [""; 0]);
    assert_eq!(run.tick(&[says(1)]), ["23 firing growth warning"]);
}

/// A warning that becomes critical is news; the way back, or the same rise twice, is not.
#[test]
fn a_rise_of_severity_is_told_again() {
    let mut run = Run::new(1);
    let critical = || [Says { severity: Severity::Critical, ..says(1) }];
    run.ticks(4, &[says(1)]);
    assert_eq!(run.tick(&critical()), ["5 firing growth critical"]);
    assert_eq!(run.tick(&critical()), [""; 0]);
    assert_eq!(run.tick(&[says(1)]), [""; 0]);
    assert_eq!(run.tick(&critical()), [""; 0]);
    assert_eq!(run.manager.raised(), 1);
}

/// What is below the wanted severity is no alert, and one that sinks below it is gone.
#[test]
fn findings_below_the_minimum_severity_count_as_absent() {
    let mut run = Run::new(1);
    let info = || [Says { severity: Severity::Info, ..says(1) }];
    assert_eq!(run.ticks(9, &info()), [""; 0]);
    run.ticks(4, &[says(1)]);
    assert_eq!(run.ticks(4, &info()), ["17 resolved growth warning"]);
}

/// Twenty workers with one leak are one alert, which speaks of the worst of them.
#[test]
fn findings_of_several_processes_merge_into_one_alert() {
    let mut run = Run::new(3);
    let critical = Says { severity: Severity::Critical, ..says(1) };
    assert_eq!(run.ticks(3, &[says(2), says(1), says(3)]), [""; 0]);
    assert_eq!(run.tick(&[says(3), says(2), critical]), ["4 firing growth critical"]);
    let alert = run.manager.active()[0];
    assert_eq!(alert.processes, 3);
    assert_eq!(alert.site.process.pid, 103);
    assert_eq!(alert.reason, "of process 3");
    assert_eq!(alert.totals.outstanding_bytes(), 12_000);
}

/// Rules see different things at the same site: each keeps its own alert, side by side.
#[test]
fn rules_at_the_same_site_are_separate_alerts_the_most_severe_first() {
    let mut run = Run::new(1);
    let age = || Says { rule: "survival", severity: Severity::Critical, ..says(1) };
    run.ticks(3, &[says(1), age()]);
    assert_eq!(run.tick(&[says(1), age()]), ["4 firing survival critical", "4 firing growth warning"]);
    let rules: Vec<&str> = run.manager.active().iter().map(|a| &*a.rule).collect();
    assert_eq!(rules, ["survival", "growth"]);
}

/// A crash does not repair a leak: the alert stays, and says that its process is gone.
#[test]
fn a_process_that_ends_resolves_nothing() {
    let mut run = Run::new(1);
    run.ticks(4, &[says(1)]);
    assert!(!run.manager.active()[0].ended);
    run.end(1);
    assert_eq!(run.ticks(30, &[]), [""; 0]);
    let alert = run.manager.active()[0];
    assert!(alert.ended);
    assert_eq!(alert.totals.outstanding_bytes(), 4_000, "as it was last seen");
    assert_eq!(run.manager.resolved().count(), 0);
}

/// A service that was restarted and leaks again is the same alert, not a second one.
#[test]
fn a_restarted_process_takes_the_alert_over() {
    let mut run = Run::new(2);
    run.ticks(4, &[says(1)]);
    run.end(1);
    run.ticks(5, &[]);
    assert_eq!(run.ticks(5, &[says(2)]), [""; 0]);
    let alert = run.manager.active()[0];
    assert_eq!((alert.site.process.pid, alert.ended, alert.processes), (102, false, 2));
    assert_eq!(run.ticks(4, &[]), ["18 resolved growth warning"]);
}

/// An event carries the figures of its time: sinks have nothing else to go by.
#[test]
fn an_event_carries_growth_age_mode_and_losses() {
    let mut run = Run::new(2);
    run.ticks(4, &[says(2)]);
    let alert = run.manager.active()[0].clone();
    let event = AlertEvent::new(alert, &run.history, 4.0, 1e9);
    assert_eq!(event.growth_bytes_per_s, 2000.0);
    assert_eq!(event.oldest_age_s, 4.0);
    assert_eq!(event.mode, Mode::Exact);
    assert_eq!(event.losses.stacks_failed, 5);
}

/// Without hold and cool-down everything is told at once: the settings of a test in CI.
#[test]
fn zero_hold_and_cooldown_tell_at_once() {
    let settings = AlertSettings { hold: Duration::ZERO, cooldown: Duration::ZERO, ..AlertSettings::default() };
    let mut run = Run { manager: AlertManager::new(&settings), ..Run::new(1) };
    assert_eq!(run.tick(&[says(1)]), ["1 firing growth warning"]);
    assert_eq!(run.tick(&[]), ["2 resolved growth warning"]);
    assert_eq!(run.tick(&[says(1)]), ["3 firing growth warning"]);
}

/// Months of restarting targets must not fill the memory.
#[test]
fn what_is_remembered_is_bounded() {
    let mut run = Run::new(1);
    run.tick(&[]);
    let settings = AlertSettings { hold: Duration::ZERO, cooldown: Duration::ZERO, ..AlertSettings::default() };
    run.manager = AlertManager::new(&settings);
    let finding = |n: usize| Finding { id: format!("{n}"), ..run.finding(&says(1)) };
    let findings: Vec<Finding> = (0..MAX_REMEMBERED + 3).map(finding).collect();
    run.manager.update(&findings, &run.history, 1.0, 0.0);
    assert_eq!(run.manager.active().len(), MAX_REMEMBERED + 3, "live ones are all kept");
    run.manager.update(&[], &run.history, 2.0, 0.0);
    assert_eq!(run.manager.resolved().count(), MAX_REMEMBERED);
    run.manager.update(&findings, &run.history, 3.0, 0.0);
    run.end(1);
    run.history.push(&run.snapshot());
    run.manager.update(&[], &run.history, 4.0, 0.0);
    assert_eq!(run.manager.active().len(), MAX_REMEMBERED);
}
