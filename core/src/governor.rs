//! Keeps the cost of tracing within the budget.
//!
//! A trap is paid on every hit, whatever the programs do with it, so only detaching can bound the cost. Each target has
//! a purse that fills at the rate of its budget and pays for every hit at the calibrated price. While the purse holds,
//! everything is traced (exact mode). When it is empty, tracing is cut back to windows: short periods with probes
//! attached, each opened only once the purse holds what it will probably cost. This bounds the average cost whatever the
//! rate of calls does. Should it fail to, because the price was wrong or the collector got no CPU time to close a window,
//! a hard stop detaches everything for a while. Pure: it is told the time and the counters, and says what to do.
//!
//! ```text
//!          purse empty                     purse recovered
//!  Exact --------------> Waiting ------------------------------> Open
//!    ^ |                  ^ ^   window over, or its hits used up   | |
//!    | |                  | +--------------------------------------+ |
//!    | |                  +---- Stopped <----------------------------+
//!    | |   cool-down over          ^       closed far too late, or the target slowed down too much
//!    | +---------------------------+
//!    +-- windows were cheap for a while
//! ```

use std::collections::VecDeque;
use std::time::Duration;

use crate::config::{BudgetSettings, Latency};

/// The purse holds at most the budget of this long: a burst that may be paid at once.
const PURSE_S: f64 = 1.0;
/// Only this part of the budget is planned for windows; the rest is reserve against a rise of the price, and for what the
/// prices do not know: a trap throws the program's own code and data out of the nearest caches. Under nginx a window costs up to
/// 1.6 times its price, and a tenth more in the 30 ms after it.
const PLANNED: f64 = 0.35;
/// What attaching and detaching cost the target, per window: about 0.5 % of one second, as measured.
const WINDOW_FIXED_S: f64 = 0.005;
/// Windows are not opened more often than this, seconds; those of a target that is sensitive to latency, and others.
const MIN_PERIOD_S: (f64, f64) = (2.0, 1.0);
/// Waiting times are spread by this much in both directions, so that windows do not beat with the target's own rhythm.
const JITTER: f64 = 0.15;
/// Time constant of the average of the target's CPU use, seconds.
const CPU_AVERAGE_S: f64 = 2.0;
/// Windows in a row that must have been cheap before everything is traced again.
const CHEAP_WINDOWS: usize = 3;
/// Shortest and longest stay in window mode before everything is traced again, seconds. Doubles each time.
const STAY_S: (f64, f64) = (30.0, 900.0);
/// A window counts only if the target made at least this part of the calls in the guard that its earlier rate promised:
/// otherwise it was not running, and what it would have freed looks as if it survived.
const GUARD_PROGRESS: f64 = 0.3;
/// The slow-down is looked at over this time, seconds.
const SLOWDOWN_S: f64 = 1.0;
/// A window that is still open so long after its end shows that the collector gets no CPU time, seconds.
const LATE_WINDOW_S: f64 = 0.5;
/// So does such a pause in exact mode, seconds. A single one does harm only when the budget is exceeded meanwhile. Shorter
/// than what passes before the watchdog wakes a collector that was stopped (0.9 s at least): that one is always late.
const LATE_EXACT_S: f64 = 0.8;
/// So many pauses within so many seconds, in which the collector waited for a CPU for at least half of the time, show that it
/// could not act if it had to.
const STARVED_TIMES: usize = 3;
const STARVED_WITHIN_S: f64 = 60.0;
/// First and longest time without any probes after a hard stop, seconds. Doubles each time.
const COOL_DOWN_S: (f64, f64) = (10.0, 600.0);
/// After so many windows in a row without a hard stop, the next cool-down is the first again.
const FORGIVEN_AFTER: u64 = 10;

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Action {
    /// Nothing.
    Stay,
    /// Detach and start the books anew: from now on there are windows.
    EnterWindows,
    /// Attach; allocations are recorded until the given time, frees until the window closes.
    OpenWindow {
        /// Seconds on the collector's clock.
        record_until_s: f64,
    },
    /// Detach. What the window saw counts, or it does not.
    CloseWindow {
        /// False: the target made too little progress in the guard.
        counts: bool,
    },
    /// Attach for good and start the books anew.
    LeaveWindows,
    /// Detach at once; nothing is attached until the cool-down is over.
    Stop {
        /// Why.
        why: StopReason,
        /// Everything was traced: start the books anew. Otherwise a window was open, and does not count.
        exact: bool,
        /// How long, seconds.
        cool_down_s: f64,
    },
}

/// Why all tracing of a target was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StopReason {
    /// The collector got too little CPU time to keep tracing within its bounds.
    Starved,
    /// Tracing took more of the target's time than it ever may.
    Slowdown,
}

impl StopReason {
    /// For people: what was the case.
    pub fn as_str(self) -> &'static str {
        match self {
            StopReason::Starved => "memleak got too little CPU time to keep tracing within its bounds",
            StopReason::Slowdown => "tracing took more of its time than max_slowdown allows",
        }
    }
}

/// What is known of the target at one time.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// Seconds on the collector's clock.
    pub now_s: f64,
    /// Probes hit so far under the present books.
    pub hits: u64,
    /// What these have cost the target, CPU seconds (estimate).
    pub cost_s: f64,
    /// CPU time used so far by the target, the cost of tracing included, seconds.
    pub cpu_s: f64,
    /// Time so far in which the collector was ready to run and had no CPU, seconds.
    pub waited_s: f64,
}

/// Where a target stands.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Exact,
    /// `unsaved_s` of the budget, CPU seconds, are still to pass before there is a window.
    Waiting {
        not_before_s: f64,
        unsaved_s: f64,
    },
    Open {
        start: Start,
        recorded: Option<u64>,
    },
    Stopped {
        until_s: f64,
        why: StopReason,
    },
}

/// How a window began.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Start {
    at_s: f64,
    hits: u64,
    cost_s: f64,
    cpu_s: f64,
    record_until_s: f64,
    end_s: f64,
}

/// The books of one target's cost.
#[derive(Clone, Debug)]
pub struct Governor {
    settings: BudgetSettings,
    phase: Phase,
    purse_s: f64,
    last: Option<Reading>,
    /// CPU seconds per second that the target uses for itself.
    own_cpu: Option<f64>,
    spent_s: f64,
    open_s: f64,
    windows: u64,
    discarded: u64,
    /// What the next window will probably cost, seconds.
    expected_s: f64,
    /// Price per second of each of the last windows.
    recent: VecDeque<f64>,
    entered_s: f64,
    stay_s: f64,
    /// The last second: time that passed, what tracing has cost in it, what CPU time the target has used, in seconds.
    second: VecDeque<[f64; 3]>,
    /// When the collector was starved of CPU time lately.
    starved_s: VecDeque<f64>,
    stops: u64,
    /// Number of windows at the last hard stop.
    windows_at_stop: u64,
    cool_down_s: f64,
    random: fastrand::Rng,
}

impl Governor {
    /// A governor for a target that is traced exactly now.
    pub fn new(settings: BudgetSettings, seed: u64) -> Self {
        Governor {
            purse_s: settings.floor * PURSE_S,
            phase: Phase::Exact,
            last: None,
            own_cpu: None,
            spent_s: 0.0,
            open_s: 0.0,
            windows: 0,
            discarded: 0,
            // As long as nothing is known: that the target does nothing but allocate while it is open.
            expected_s: settings.max_window.as_secs_f64(),
            recent: VecDeque::new(),
            entered_s: 0.0,
            stay_s: STAY_S.0,
            second: VecDeque::new(),
            starved_s: VecDeque::new(),
            stops: 0,
            windows_at_stop: 0,
            cool_down_s: COOL_DOWN_S.0,
            random: fastrand::Rng::with_seed(seed),
            settings,
        }
    }

    /// CPU seconds per second that tracing may cost now.
    pub fn budget(&self) -> f64 {
        self.settings
            .share
            .map_or(f64::INFINITY, |share| (share * self.own_cpu.unwrap_or(0.0)).max(self.settings.floor))
    }

    /// True while everything is traced.
    pub fn is_exact(&self) -> bool {
        self.phase == Phase::Exact
    }

    /// True while probes are attached.
    pub fn is_attached(&self) -> bool {
        matches!(self.phase, Phase::Exact | Phase::Open { .. })
    }

    /// Why nothing is attached although a window would be due; `None` unless a hard stop is being sat out.
    pub fn stopped(&self) -> Option<StopReason> {
        match self.phase {
            Phase::Stopped { why, .. } => Some(why),
            _ => None,
        }
    }

    /// Hard stops so far.
    pub fn stops(&self) -> u64 {
        self.stops
    }

    /// What the target's budget is made from.
    pub fn settings(&self) -> &BudgetSettings {
        &self.settings
    }

    /// CPU seconds that tracing has cost the target so far (estimate).
    pub fn spent_s(&self) -> f64 {
        self.spent_s
    }

    /// Windows opened so far, and how many of them were discarded.
    pub fn windows(&self) -> (u64, u64) {
        (self.windows, self.discarded)
    }

    /// Seconds with an open window so far.
    pub fn open_s(&self) -> f64 {
        self.open_s
    }

    /// When this wants to be asked again at the latest, seconds on the collector's clock.
    pub fn wakeup_s(&self) -> Option<f64> {
        match self.phase {
            Phase::Exact | Phase::Waiting { .. } => None,
            Phase::Open { start, recorded: None } => Some(start.record_until_s),
            Phase::Open { start, .. } => Some(start.end_s),
            Phase::Stopped { until_s, .. } => Some(until_s),
        }
    }

    /// Charges what has happened since the last call and decides. `scale` (0 to 1] is this target's part of its budget
    /// when all targets together would exceed theirs.
    pub fn tick(&mut self, reading: Reading, scale: f64) -> Action {
        let Some(last) = self.last.replace(reading) else { return Action::Stay };
        let elapsed_s = reading.now_s - last.now_s;
        if elapsed_s <= 0.0 {
            self.last = Some(last);
            return Action::Stay;
        }
        let cpu_s = (reading.cpu_s - last.cpu_s).max(0.0);
        // Hits cannot have cost more than the target has used.
        let cost_s = (reading.cost_s - last.cost_s).max(0.0).min(cpu_s.max(elapsed_s * 1e-3));
        self.spent_s += cost_s;
        let own = (cpu_s - cost_s).max(0.0) / elapsed_s;
        // In a window the target is slowed down: what it does for itself says little then.
        if !matches!(self.phase, Phase::Open { .. }) {
            let weight = (elapsed_s / CPU_AVERAGE_S).min(1.0);
            self.own_cpu = Some(self.own_cpu.map_or(own, |average| average + (own - average) * weight));
        }
        let budget = self.budget() * scale;
        if budget.is_infinite() {
            return Action::Stay;
        }
        let slowdown = self.slowdown([elapsed_s, cost_s, cpu_s]);
        let most = if self.is_exact() { budget * PURSE_S } else { (budget * PURSE_S).max(self.expected_s) };
        self.purse_s = (self.purse_s + budget * elapsed_s - cost_s).min(most);
        if self.is_attached() && slowdown > self.settings.max_slowdown {
            return self.stop(reading.now_s, StopReason::Slowdown);
        }
        let late = elapsed_s > LATE_EXACT_S;
        let starved = self.is_starved(reading.now_s, late && reading.waited_s - last.waited_s > elapsed_s / 2.0);
        match self.phase {
            Phase::Exact if starved || late && self.purse_s < 0.0 => self.stop(reading.now_s, StopReason::Starved),
            Phase::Exact if self.purse_s < 0.0 => self.enter_windows(reading.now_s),
            Phase::Exact => Action::Stay,
            Phase::Stopped { until_s, .. } => {
                if reading.now_s >= until_s {
                    self.wait(reading.now_s);
                }
                Action::Stay
            }
            Phase::Open { start, .. } if reading.now_s > start.end_s + LATE_WINDOW_S => {
                self.open_s += reading.now_s - start.at_s;
                self.discarded += 1;
                self.stop(reading.now_s, StopReason::Starved)
            }
            Phase::Waiting { not_before_s, unsaved_s } => {
                let unsaved_s = unsaved_s - budget * elapsed_s;
                if reading.now_s >= not_before_s && unsaved_s <= 0.0 {
                    return self.open_window(reading);
                }
                self.phase = Phase::Waiting { not_before_s, unsaved_s };
                Action::Stay
            }
            Phase::Open { start, recorded } => self.in_window(reading, start, recorded, budget),
        }
    }

    /// The books were started anew: the counters begin at zero, and what was spent stands in the old ones.
    pub fn restarted(&mut self, reading: Reading) {
        self.last = Some(reading);
        self.spent_s = 0.0;
    }

    /// Part of the target's time that tracing took in the last second; of one core's time where the target uses less.
    fn slowdown(&mut self, newest: [f64; 3]) -> f64 {
        self.second.push_back(newest);
        let sum = |n: usize, second: &VecDeque<[f64; 3]>| second.iter().map(|part| part[n]).sum::<f64>();
        while self.second.len() > 1 && sum(0, &self.second) - self.second[0][0] >= SLOWDOWN_S {
            self.second.pop_front();
        }
        let [elapsed_s, cost_s, cpu_s] = [0, 1, 2].map(|n| sum(n, &self.second));
        cost_s / cpu_s.max(elapsed_s).max(SLOWDOWN_S)
    }

    /// Whether the collector has been starved several times lately; `again`: it was just now.
    fn is_starved(&mut self, now_s: f64, again: bool) -> bool {
        self.starved_s.extend(again.then_some(now_s));
        self.starved_s.retain(|at_s| now_s - at_s <= STARVED_WITHIN_S);
        self.starved_s.len() >= STARVED_TIMES
    }

    fn stop(&mut self, now_s: f64, why: StopReason) -> Action {
        if self.windows >= self.windows_at_stop + FORGIVEN_AFTER {
            self.cool_down_s = COOL_DOWN_S.0;
        }
        let (exact, cool_down_s) = (self.is_exact(), self.cool_down_s);
        self.stops += 1;
        self.windows_at_stop = self.windows;
        self.cool_down_s = (cool_down_s * 2.0).min(COOL_DOWN_S.1);
        self.entered_s = now_s;
        self.recent.clear();
        self.second.clear();
        self.starved_s.clear();
        self.phase = Phase::Stopped { until_s: now_s + cool_down_s, why };
        Action::Stop { why, exact, cool_down_s }
    }

    fn enter_windows(&mut self, now_s: f64) -> Action {
        self.entered_s = now_s;
        self.recent.clear();
        // The busiest moment of the last second says what a window will cost: in one whose rate has just jumped, the newest.
        let length_s = self.settings.max_window.as_secs_f64();
        let price = self.second.iter().map(|[elapsed_s, cost_s, _]| cost_s / elapsed_s).fold(0.0, f64::max);
        self.expected_s = (price * length_s).min(length_s) + WINDOW_FIXED_S;
        self.wait(now_s);
        Action::EnterWindows
    }

    /// Waits until a window can be paid for, and a little more or less. How long that takes shows: of a target that has just been
    /// found, or was traced until now, it is not known yet what it uses.
    fn wait(&mut self, now_s: f64) {
        // What was overdrawn is known, and paid back with the whole budget.
        let (overdrawn_s, held_s) = ((-self.purse_s).max(0.0), self.purse_s.max(0.0));
        let saving_s = (self.expected_s - held_s).max(0.0) / PLANNED;
        let jitter = 1.0 + JITTER * (2.0 * self.random.f64() - 1.0);
        let period_s = if self.settings.latency == Latency::Sensitive {
            // Spreading must not bring them closer together.
            MIN_PERIOD_S.0 / (1.0 - JITTER)
        } else {
            MIN_PERIOD_S.1
        };
        self.phase =
            Phase::Waiting { not_before_s: now_s + period_s * jitter, unsaved_s: (overdrawn_s + saving_s) * jitter };
    }

    fn open_window(&mut self, reading: Reading) -> Action {
        let length_s = self.settings.max_window.as_secs_f64();
        let record_until_s = reading.now_s + length_s / 2.0;
        let start = Start {
            at_s: reading.now_s,
            hits: reading.hits,
            cost_s: reading.cost_s,
            cpu_s: reading.cpu_s,
            record_until_s,
            end_s: reading.now_s + length_s,
        };
        self.phase = Phase::Open { start, recorded: None };
        self.windows += 1;
        Action::OpenWindow { record_until_s }
    }

    fn in_window(&mut self, reading: Reading, start: Start, recorded: Option<u64>, budget: f64) -> Action {
        let hits = reading.hits - start.hits;
        if recorded.is_none() && reading.now_s >= start.record_until_s {
            self.phase = Phase::Open { start, recorded: Some(hits) };
        }
        let used_up = hits >= self.settings.max_window_hits;
        if reading.now_s < start.end_s && !used_up {
            return Action::Stay;
        }
        let open_s = reading.now_s - start.at_s;
        self.open_s += open_s;
        self.purse_s -= WINDOW_FIXED_S;
        let cost_s = (reading.cost_s - start.cost_s).min(open_s.max(reading.cpu_s - start.cpu_s));
        self.expected_s = cost_s + WINDOW_FIXED_S;
        self.recent.push_back(cost_s / open_s);
        if self.recent.len() > CHEAP_WINDOWS {
            self.recent.pop_front();
        }
        let counts = !used_up && progressed(&start, hits, recorded, reading.now_s);
        if !counts {
            self.discarded += 1;
        }
        let cheap = self.recent.len() == CHEAP_WINDOWS && self.recent.iter().all(|price| *price < 0.5 * budget);
        if cheap && reading.now_s - self.entered_s >= self.stay_s {
            self.stay_s = (self.stay_s * 2.0).min(STAY_S.1);
            self.phase = Phase::Exact;
            return Action::LeaveWindows;
        }
        self.wait(reading.now_s);
        Action::CloseWindow { counts }
    }
}

/// Whether the target made the calls in the guard that its rate before promised.
fn progressed(start: &Start, hits: u64, recorded: Option<u64>, now_s: f64) -> bool {
    let Some(recorded) = recorded else { return false };
    let recording_s = start.record_until_s - start.at_s;
    let guard_s = now_s - start.record_until_s;
    let promised = recorded as f64 * guard_s / recording_s;
    (hits - recorded) as f64 >= GUARD_PROGRESS * promised
}

/// The part of their budgets that targets may use when together they would exceed `total` CPU seconds per second.
pub fn scale(budgets: impl Iterator<Item = f64>, total: f64) -> f64 {
    let sum: f64 = budgets.filter(|b| b.is_finite()).sum();
    if sum > total { total / sum } else { 1.0 }
}

/// How often an attached target must be looked at so that a rise of its rate is noticed in time.
pub const TICK: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests;
