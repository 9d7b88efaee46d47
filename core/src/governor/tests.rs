//! The governor against targets that are made up.

use super::*;

const PRICE: f64 = 0.7e-6;

fn settings() -> BudgetSettings {
    BudgetSettings::default()
}

/// A target that makes `calls` hits per second of its own CPU time and runs on one core; tracing takes its time.
struct Target {
    governor: Governor,
    now_s: f64,
    hits: u64,
    cpu_s: f64,
    /// Of the collector.
    waited_s: f64,
    useful_s: f64,
    actions: Vec<(f64, Action)>,
}

impl Target {
    fn new() -> Self {
        Target {
            governor: Governor::new(settings(), 7),
            now_s: 0.0,
            hits: 0,
            cpu_s: 0.0,
            waited_s: 0.0,
            useful_s: 0.0,
            actions: Vec::new(),
        }
    }

    fn reading(&self) -> Reading {
        let cost_s = self.hits as f64 * PRICE;
        Reading { now_s: self.now_s, hits: self.hits, cost_s, cpu_s: self.cpu_s, waited_s: self.waited_s }
    }

    /// Runs for a time at `rate` hits per second wanted, using at most one core, of which `work` for itself.
    fn run(&mut self, seconds: f64, rate: f64, work: f64) {
        let step = 0.01;
        for _ in 0..(seconds / step) as usize {
            self.now_s += step;
            let cost = if self.governor.is_attached() { rate * PRICE } else { 0.0 };
            // What it wants to do takes 1 + cost/work of the time.
            let speed = (1.0 / (work + cost)).min(1.0);
            if self.governor.is_attached() {
                self.hits += (rate * speed * step) as u64;
            }
            self.cpu_s += (work + cost) * speed * step;
            self.useful_s += work * speed * step;
            let reading = self.reading();
            let action = self.governor.tick(reading, 1.0);
            if matches!(action, Action::EnterWindows | Action::LeaveWindows) {
                self.hits = 0;
                self.governor.restarted(Reading { hits: 0, cost_s: 0.0, ..reading });
            }
            if action != Action::Stay {
                self.actions.push((self.now_s, action));
            }
        }
    }
}

/// Most targets: what they do is cheap to trace, so everything is.
#[test]
fn a_quiet_target_is_traced_exactly() {
    let mut target = Target::new();
    target.run(60.0, 30_000.0, 0.2);
    assert!(target.governor.is_exact(), "{:?}", target.actions);
    assert_eq!(target.actions, []);
}

/// Whatever the rate of calls, the target keeps at least 95 % of its speed in the long run.
#[test]
fn a_saturated_target_keeps_its_speed() {
    let mut target = Target::new();
    target.run(120.0, 30e6, 1.0);
    assert!(!target.governor.is_exact());
    let kept = target.useful_s / 120.0;
    assert!(kept >= 0.95, "{kept}");
    let (windows, discarded) = target.governor.windows();
    assert!(windows >= 10, "{windows} windows");
    assert_eq!(discarded, 0);
}

/// A jump by a factor of a thousand is noticed within a fraction of a second, and paid back before more is spent.
#[test]
fn a_jump_of_the_rate_is_paid_back() {
    let mut target = Target::new();
    target.run(20.0, 3_000.0, 1.0);
    assert!(target.governor.is_exact());
    let before = target.useful_s;
    target.run(10.0, 9e6, 1.0);
    let (at, action) = target.actions[0];
    assert_eq!(action, Action::EnterWindows);
    assert!(at < 20.3, "noticed after {} s", at - 20.0);
    let kept = (target.useful_s - before) / 10.0;
    assert!(kept >= 0.95, "{kept}");
}

/// When the calls become rare again, everything is traced again, but not at once.
#[test]
fn a_target_that_calms_down_is_traced_exactly_again() {
    let mut target = Target::new();
    target.run(40.0, 9e6, 1.0);
    assert!(!target.governor.is_exact());
    target.run(60.0, 1_000.0, 0.5);
    assert!(target.governor.is_exact(), "{:?}", target.actions);
    let left = target.actions.iter().find(|(_, a)| *a == Action::LeaveWindows).unwrap().0;
    assert!(left > 40.0 + CHEAP_WINDOWS as f64 - 1.0, "{left}");
}

/// A window in which the target did not run would call everything a survivor.
#[test]
fn a_window_without_progress_in_the_guard_is_discarded() {
    let start = Start { at_s: 0.0, hits: 0, cost_s: 0.0, cpu_s: 0.0, record_until_s: 0.1, end_s: 0.2 };
    assert!(progressed(&start, 2_000, Some(1_000), 0.2));
    assert!(!progressed(&start, 1_100, Some(1_000), 0.2));
    assert!(!progressed(&start, 1_100, None, 0.2));
}

/// Many cheap targets together must not exceed what the machine may lose.
#[test]
fn the_total_is_shared_out() {
    assert_eq!(scale([0.03, 0.03].into_iter(), 0.1), 1.0);
    assert_eq!(scale([0.1, 0.3].into_iter(), 0.1), 0.25);
    assert_eq!(scale([f64::INFINITY, 0.05].into_iter(), 0.1), 1.0);
}

/// Without a budget nothing is ever cut back.
#[test]
fn without_a_budget_everything_is_traced() {
    let mut target = Target::new();
    target.governor = Governor::new(BudgetSettings { share: None, ..settings() }, 7);
    target.run(20.0, 9e6, 1.0);
    assert_eq!(target.actions, []);
}

/// Where latency matters windows are short and far apart, whatever the budget would pay for.
#[test]
fn a_latency_sensitive_target_gets_short_windows_far_apart() {
    let own = crate::config::TargetSpec { latency: Latency::Sensitive, ..crate::config::TargetSpec::default() };
    let generous = BudgetSettings { share: Some(0.4), ..settings() };
    let mut target = Target::new();
    target.governor = Governor::new(generous.of(&own), 7);
    target.run(60.0, 30e6, 1.0);
    let times = |wanted: fn(&Action) -> bool| -> Vec<f64> {
        target.actions.iter().filter(|(_, a)| wanted(a)).map(|(at, _)| *at).collect()
    };
    let opened = times(|a| matches!(a, Action::OpenWindow { .. }));
    let closed = times(|a| matches!(a, Action::CloseWindow { .. }));
    assert!(opened.len() >= 20, "{} windows", opened.len());
    assert!(opened.iter().zip(&closed).all(|(open, close)| close - open <= 0.061), "{opened:?} {closed:?}");
    assert!(closed.iter().zip(&opened[1..]).all(|(close, open)| open - close >= 1.99), "{opened:?} {closed:?}");
}

/// What the budget should have prevented is stopped at once, sat out, and tried again through windows.
#[test]
fn a_slow_down_beyond_the_cap_is_stopped_and_sat_out() {
    let mut target = Target::new();
    // The purse of a budget of 40 % would pay for 0.4 s in one go; the cap is a tenth of a second.
    let wrong =
        BudgetSettings { share: Some(0.4), max_slowdown: 0.1, max_window: Duration::from_millis(50), ..settings() };
    target.governor = Governor::new(wrong, 7);
    target.run(5.0, 3_000.0, 1.0);
    assert!(target.governor.is_exact());
    target.run(5.0, 9e6, 1.0);
    let (at, action) = target.actions[0];
    assert_eq!(action, Action::Stop { why: StopReason::Slowdown, exact: true, cool_down_s: 10.0 });
    assert!((5.09..5.2).contains(&at), "stopped at {at}");
    assert_eq!(target.governor.stopped(), Some(StopReason::Slowdown));
    assert!(!target.governor.is_attached());
    let before = target.useful_s;
    target.run(4.0, 9e6, 1.0);
    assert!(target.useful_s - before > 3.99, "nothing is attached in the cool-down");
    target.run(20.0, 9e6, 1.0);
    assert_eq!(target.governor.stopped(), None);
    let next = target.actions.iter().find(|(_, a)| matches!(a, Action::OpenWindow { .. })).unwrap().0;
    assert!((at + 10.0..at + 14.0).contains(&next), "next window at {next}");
    assert_eq!(target.governor.stops(), 1);
}

/// Windows that end much too late show that nobody keeps the promise: none is opened for a while, and ever longer.
#[test]
fn a_starved_collector_opens_no_windows_for_a_while() {
    let mut target = Target::new();
    target.run(10.0, 30e6, 1.0);
    let mut stops = Vec::new();
    for _ in 0..3 {
        while !matches!(target.governor.phase, Phase::Open { .. }) {
            target.run(0.01, 30e6, 1.0);
        }
        target.now_s += 0.8;
        target.cpu_s += 0.8;
        match target.governor.tick(target.reading(), 1.0) {
            Action::Stop { why: StopReason::Starved, exact: false, cool_down_s } => stops.push(cool_down_s),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(stops, [10.0, 20.0, 40.0]);
    assert_eq!(target.governor.windows().1, 3, "they do not count");
}

/// A pause of the collector that has cost the target nothing is no reason to give exact numbers up.
#[test]
fn a_late_look_at_a_quiet_target_is_harmless() {
    let stop = Action::Stop { why: StopReason::Starved, exact: true, cool_down_s: 10.0 };
    // The watchdog may wake a collector 0.9 s after its last look.
    for (pause_s, rate, expected) in
        [(3.0, 10_000.0, Action::Stay), (3.0, 400_000.0, stop), (0.9, 10_000.0, Action::Stay), (0.9, 400_000.0, stop)]
    {
        let mut target = Target::new();
        target.run(5.0, 3_000.0, 0.5);
        target.now_s += pause_s;
        target.cpu_s += pause_s * 0.7;
        target.hits += (pause_s * rate) as u64;
        assert_eq!(target.governor.tick(target.reading(), 1.0), expected, "{rate} hits/s for {pause_s} s");
    }
}

/// Nobody can promise to watch over a target who gets no CPU time again and again, even if nothing has happened yet. One
/// that was stopped, or busy with a large snapshot, is not starved.
#[test]
fn a_collector_that_is_starved_again_and_again_gives_exact_tracing_up() {
    let late_looks = |waited_s: f64, every_s: f64| {
        let mut target = Target::new();
        let mut stopped = None;
        for n in 1..=5 {
            target.run(every_s, 3_000.0, 0.5);
            target.now_s += 2.0;
            target.cpu_s += 1.0;
            target.waited_s += waited_s;
            let action = target.governor.tick(target.reading(), 1.0);
            if stopped.is_none() && action != Action::Stay {
                assert_eq!(action, Action::Stop { why: StopReason::Starved, exact: true, cool_down_s: 10.0 });
                stopped = Some(n);
            }
        }
        stopped
    };
    assert_eq!(late_looks(1.5, 5.0), Some(3));
    assert_eq!(late_looks(0.5, 5.0), None, "it was not waiting for a CPU");
    assert_eq!(late_looks(1.5, 40.0), None, "once in a while");
}

/// What exact tracing has just cost says what a window will cost: one that does not cost much need not be saved up for.
#[test]
fn the_first_window_comes_as_soon_as_it_can_be_paid_for() {
    let mut target = Target::new();
    // 7 % of a core, and a budget of 3 %.
    target.run(20.0, 100_000.0, 0.1);
    let times = |wanted: fn(&Action) -> bool| target.actions.iter().find(|(_, a)| wanted(a)).unwrap().0;
    let left = times(|a| *a == Action::EnterWindows);
    let opened = times(|a| matches!(a, Action::OpenWindow { .. }));
    assert!((0.8..2.0).contains(&(opened - left)), "{left} {opened}");
}
