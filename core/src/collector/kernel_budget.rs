//! What tracing the kernel costs, and whether that is within the budget.
//!
//! The kernel measures what the programs use; for a moment now and then, because measuring costs time, too. In between
//! every event is charged the price that was measured last.

use memleak_probes::kernel::{KernelTracker, Measuring, RunStats};

use crate::Result;

/// What the kernel does not measure: getting to a program and back, nanoseconds.
const DISPATCH_NS: f64 = 40.0;
/// The price before anything was measured, nanoseconds.
const FIRST_PRICE_NS: f64 = 800.0;
/// How long, and how long apart, is measured, seconds.
const MEASURE_S: (f64, f64) = (0.2, 10.0);
/// The purse holds at most the budget of this long.
const PURSE_S: f64 = 2.0;
/// Fewer runs are no measurement.
const MIN_RUNS: u64 = 100;
/// A finer sample is tried again when it would have cost no more than this part of the budget ...
const AMPLE: f64 = 0.5;
/// ... for so long, seconds.
const CALM_S: f64 = 300.0;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing.
    Within,
    /// It costs too much.
    Above,
    /// What was given up last because of its cost has been affordable for a while.
    Ample,
}

/// Fills at the rate of the budget, and pays for every event.
pub(super) struct Purse {
    /// CPU seconds per second; `None`: whatever it costs.
    budget: Option<f64>,
    held_s: f64,
    last_s: Option<f64>,
    hits: u64,
    price_ns: f64,
    spent_s: f64,
    stops: u64,
    measuring: Option<(Measuring, RunStats, f64)>,
    next_measure_s: f64,
    /// What an event cost at each finer step that was given up, nanoseconds.
    given_up: Vec<f64>,
    /// Since when it is looked at how many events there are, seconds, and how many there have been.
    calm: (f64, u64),
}

impl Purse {
    /// `share`: part of all CPU time.
    pub(super) fn new(share: Option<f64>) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64);
        let budget = share.map(|share| share * cpus);
        Purse {
            budget,
            held_s: budget.unwrap_or(0.0) * PURSE_S,
            last_s: None,
            hits: 0,
            price_ns: FIRST_PRICE_NS,
            spent_s: 0.0,
            stops: 0,
            measuring: None,
            next_measure_s: 0.0,
            given_up: Vec::new(),
            calm: (0.0, 0),
        }
    }

    /// From now on less is recorded of each event.
    pub(super) fn step_down(&mut self) {
        self.given_up.push(self.price_ns);
    }

    /// And more again.
    pub(super) fn step_up(&mut self) {
        self.given_up.pop();
    }

    pub(super) fn spent_s(&self) -> f64 {
        self.spent_s
    }

    pub(super) fn budget(&self) -> Option<f64> {
        self.budget
    }

    pub(super) fn stops(&self) -> u64 {
        self.stops
    }

    /// The books are closed: what is spent from now on belongs to others.
    pub(super) fn close_books(&mut self) {
        self.spent_s = 0.0;
    }

    /// True when more is owed than the whole purse holds: nothing that takes the cost away can wait.
    pub(super) fn is_deep_in_debt(&self) -> bool {
        self.budget.is_some_and(|budget| self.held_s < -budget * PURSE_S)
    }

    pub(super) fn note_stop(&mut self) {
        self.stops += 1;
        self.measuring = None;
    }

    /// Other programs are loaded from now on.
    pub(super) fn start_anew(&mut self, now_s: f64) {
        self.hits = 0;
        self.last_s = Some(now_s);
        self.held_s = self.budget.unwrap_or(0.0) * PURSE_S;
        self.measuring = None;
        self.next_measure_s = 0.0;
        self.calm = (now_s, 0);
    }

    /// Charges what has happened since the last call.
    pub(super) fn tick(&mut self, now_s: f64, tracker: &KernelTracker) -> Result<Verdict> {
        self.measure(now_s, tracker)?;
        Ok(self.charge(now_s, tracker.read_counters()?.hits))
    }

    fn charge(&mut self, now_s: f64, hits: u64) -> Verdict {
        let events = hits.saturating_sub(self.hits);
        let cost_s = events as f64 * self.price_ns / 1e9;
        self.hits = hits;
        self.spent_s += cost_s;
        let elapsed_s = self.last_s.map_or(0.0, |last| now_s - last);
        self.last_s = Some(now_s);
        let Some(budget) = self.budget else { return Verdict::Within };
        self.held_s = (self.held_s + budget * elapsed_s).min(budget * PURSE_S) - cost_s;
        self.calm.1 += events;
        if self.held_s < 0.0 {
            return Verdict::Above;
        }
        let (Some(price_ns), (since_s, events)) = (self.given_up.last(), self.calm) else { return Verdict::Within };
        let lasted_s = now_s - since_s;
        if lasted_s < CALM_S {
            return Verdict::Within;
        }
        self.calm = (now_s, 0);
        let would_cost = events as f64 * price_ns / 1e9 / lasted_s;
        if would_cost < AMPLE * budget { Verdict::Ample } else { Verdict::Within }
    }

    fn measure(&mut self, now_s: f64, tracker: &KernelTracker) -> Result<()> {
        match &self.measuring {
            None if now_s >= self.next_measure_s => {
                // Without it the last price goes on.
                if let Ok(measuring) = Measuring::begin() {
                    self.measuring = Some((measuring, tracker.run_stats()?, now_s + MEASURE_S.0));
                }
                self.next_measure_s = now_s + MEASURE_S.1;
            }
            Some((_, before, until_s)) if now_s >= *until_s => {
                let now = tracker.run_stats()?;
                let runs = now.runs.saturating_sub(before.runs);
                if runs >= MIN_RUNS {
                    let time_ns = now.time_ns.saturating_sub(before.time_ns);
                    self.price_ns = time_ns as f64 / runs as f64 + DISPATCH_NS;
                    tracing::debug!("an event of the kernel costs {:.0} ns", self.price_ns);
                }
                self.measuring = None;
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A burst is paid out of the purse; what goes on above the budget is noticed.
    #[test]
    fn lasting_cost_above_the_budget_is_noticed() {
        let mut purse = Purse { budget: Some(0.1), held_s: 0.2, ..Purse::new(Some(0.05)) };
        let per_s = |share: f64| (share * 1e9 / FIRST_PRICE_NS) as u64;
        assert_eq!(purse.charge(0.0, 0), Verdict::Within);
        // Half of a core for a tenth of a second.
        assert_eq!(purse.charge(0.1, per_s(0.05)), Verdict::Within);
        // Within the budget for as long as it likes.
        let mut hits = per_s(0.05);
        for tick in 2..200 {
            hits += per_s(0.009);
            assert_eq!(purse.charge(f64::from(tick) / 10.0, hits), Verdict::Within);
        }
        // Three times the budget.
        let above = (200..230).any(|tick| {
            hits += per_s(0.03);
            purse.charge(f64::from(tick) / 10.0, hits) == Verdict::Above
        });
        assert!(above);
        assert!(!purse.is_deep_in_debt());
        purse.charge(23.0, hits + per_s(1.0));
        assert!(purse.is_deep_in_debt());
        // The next books begin at nothing: added up, each second counts once.
        assert!(purse.spent_s() > 0.0);
        purse.close_books();
        assert_eq!(purse.spent_s(), 0.0);
    }

    /// A machine that was busy for a while is traced exactly again when that is affordable, and not before.
    #[test]
    fn what_was_given_up_comes_back_when_there_is_ample_budget() {
        let mut purse = Purse { budget: Some(0.1), held_s: 0.2, ..Purse::new(Some(0.05)) };
        purse.step_down();
        purse.start_anew(0.0);
        // By the new price it is cheap; at the old one, events of this rate cost 60 % of the budget.
        purse.price_ns = FIRST_PRICE_NS / 10.0;
        let per_s = |share: f64| (share * 0.1 * 1e9 / FIRST_PRICE_NS) as u64;
        let mut hits = 0;
        for second in 1..1000 {
            hits += per_s(0.6);
            assert_eq!(purse.charge(f64::from(second), hits), Verdict::Within);
        }
        let mut ample = (1000..2000).filter(|second| {
            hits += per_s(0.4);
            purse.charge(f64::from(*second), hits) == Verdict::Ample
        });
        let first = ample.next().expect("it comes back");
        // The mean of a period counts, and one had begun while there was more to do.
        assert!((1200..=1500).contains(&first), "{first}");
        drop(ample);
        purse.step_up();
        purse.start_anew(2000.0);
        hits = 0;
        for second in 2001..3000 {
            hits += per_s(0.01);
            assert_eq!(purse.charge(f64::from(second), hits), Verdict::Within, "there is nothing finer");
        }
    }
}
