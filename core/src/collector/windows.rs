//! Carries out what the governor decides: windows instead of exact tracing, and back.
//!
//! Numbers from before and after such a change cannot be compared, so the books are started anew: the process gets a new
//! instance number. Between windows frees are unseen. What survived a window is a candidate, until a later free, an
//! allocation that gets its address, an overlapping block, or an unmapped page proves that it is gone.

use std::sync::Arc;
use std::time::Duration;

use memleak_probes::Block;

use super::{Collector, Life, Notice, clock_ns, coverage};
use crate::Result;
use crate::governor::{self, Action, Reading, StopReason};
use crate::maps::Maps;
use crate::process::{self, ProcDir};

/// A collector that has been stopped is woken this long after its last look at a target that is traced exactly.
const LOOK: Duration = Duration::from_secs(1);
/// So many targets are looked at in each tick; with more, each is looked at less often.
const TARGETS_PER_TICK: f64 = 16.0;

impl Collector {
    /// How long the collector may sleep before the governor must look again.
    pub(super) fn until_governed(&self) -> Duration {
        let now_s = self.now_s();
        let running = || self.watched.values().filter(|w| w.life == Life::Running);
        let tick = governor::TICK.as_secs_f64() * (running().count() as f64 / TARGETS_PER_TICK).max(1.0);
        let wakeups = running().filter_map(|w| w.governor.wakeup_s()).map(|at| at - now_s);
        Duration::from_secs_f64(wakeups.fold(tick, f64::min).clamp(0.001, 1.0))
    }

    /// Charges every target for its hits and acts; true when that was to end a window or all tracing of a target.
    pub(super) fn govern(&mut self) -> Result<bool> {
        let now_s = self.now_s();
        let running = self.watched.values().filter(|w| w.life == Life::Running);
        let scale = governor::scale(running.map(|w| w.governor.budget()), self.total_budget);
        let Some(tracker) = self.tracker.loaded() else { return Ok(false) };
        let prices = tracker.prices();
        let waited_s = process::waited_s();
        let mut actions = Vec::new();
        for (instance, watched) in self.watched.iter_mut().filter(|(_, w)| w.life == Life::Running) {
            // It is stopped, and another mode would throw away what its scan is about. A window must be closed all the same.
            if watched.governor.is_exact() && self.scans.is_exiting(*instance) {
                continue;
            }
            let counters = tracker.read_counters(*instance)?;
            let reading = Reading {
                now_s,
                hits: counters.hits,
                cost_s: prices.cost_s(&counters),
                cpu_s: process_cpu_s(watched.process.pid),
                waited_s,
            };
            match watched.governor.tick(reading, scale) {
                Action::Stay => {}
                action => actions.push((*instance, action)),
            }
        }
        let opened = actions.iter().filter(|(_, a)| matches!(a, Action::OpenWindow { .. }));
        let longest = opened.filter_map(|(i, _)| self.watched.get(i)).map(|w| w.governor.settings().max_window).max();
        if let (Some(watchdog), Some(longest)) = (self.watchdog.as_mut(), longest) {
            watchdog.arm(longest);
        }
        let closed = actions.iter().any(|(_, a)| matches!(a, Action::CloseWindow { .. } | Action::Stop { .. }));
        for (instance, action) in actions {
            match action {
                Action::Stay => {}
                Action::EnterWindows => self.restart_books(instance, false),
                Action::LeaveWindows => self.restart_books(instance, true),
                Action::OpenWindow { record_until_s } => {
                    let until_ns = self.started_ns + (record_until_s * 1e9) as u64;
                    if let Some(watched) = self.watched.get_mut(&instance) {
                        watched.window_opened_ns = clock_ns(libc::CLOCK_MONOTONIC);
                    }
                    if let Err(e) = self.tracker.get_mut().and_then(|t| Ok(t.open_window(instance, until_ns)?)) {
                        tracing::debug!(instance, "window not opened: {e}");
                    }
                }
                Action::CloseWindow { counts } => {
                    self.tracker.get_mut()?.close_window(instance);
                    self.resolve_candidates(instance, counts)?;
                }
                Action::Stop { why, exact, cool_down_s } => self.stop_tracing(instance, why, exact, cool_down_s)?,
            }
        }
        Ok(closed)
    }

    /// Whether a target is being traced through a window.
    pub(super) fn has_open_window(&self) -> bool {
        let mut running = self.watched.values().filter(|w| w.life == Life::Running);
        running.any(|w| w.governor.is_attached() && !w.governor.is_exact())
    }

    /// Takes all probes off a target.
    fn stop_tracing(&mut self, instance: u32, why: StopReason, exact: bool, cool_down_s: f64) -> Result<()> {
        if let Some(watched) = self.watched.get(&instance) {
            let process = Arc::clone(&watched.process);
            self.notices.push(Notice::Stopped { process, why, cool_down_s });
        }
        if exact {
            self.restart_books(instance, false);
            return Ok(());
        }
        self.tracker.get_mut()?.close_window(instance);
        self.resolve_candidates(instance, false)
    }

    /// While no window is open: tells the watchdog what to expect next. A collector that somebody had stopped and the
    /// watchdog had to wake has done what had to be done by now, and stops again. `closed`: that was to close windows.
    pub(super) fn guard(&mut self, closed: bool) {
        let budgeted =
            self.watched.values().filter(|w| w.life == Life::Running && w.governor.settings().share.is_some());
        let attached = || budgeted.clone().filter(|w| w.governor.is_attached());
        if attached().any(|w| !w.governor.is_exact()) {
            return;
        }
        let exact = attached().next().is_some() || self.kernel.as_ref().is_some_and(super::Kernel::is_budgeted);
        let Some(watchdog) = self.watchdog.as_mut() else { return };
        watchdog.expect_looks(exact.then_some(LOOK));
        if watchdog.has_woken_us() {
            if closed {
                tracing::warn!("was stopped while a window was open; the window is closed now");
            }
            // SAFETY: raising a signal involves no memory.
            unsafe { libc::raise(libc::SIGSTOP) };
        }
    }

    /// Ends an instance and watches the same process on as a new one, exactly or through windows.
    fn restart_books(&mut self, old: u32, exact: bool) {
        let Some(watched) = self.watched.get_mut(&old) else { return };
        watched.life = Life::Ended;
        let mut governor = watched.governor.clone();
        let (pid, followed) = (watched.process.pid, watched.followed);
        let Some(tracker) = self.tracker.loaded_mut() else { return };
        tracker.detach(old);
        let instance = self.next_instance;
        if let Err(e) = tracker.add_target(pid, instance, false) {
            self.notices.push(Notice::Failed { pid, reason: e.to_string() });
            return;
        }
        self.next_instance += 1;
        if !exact {
            tracker.close_window(instance);
        }
        let now_s = self.now_s();
        governor.restarted(Reading {
            now_s,
            hits: 0,
            cost_s: 0.0,
            cpu_s: process_cpu_s(pid),
            waited_s: process::waited_s(),
        });
        let Some(watched) = self.watched.get(&old) else { return };
        let mut process = (*watched.process).clone();
        process.instance = instance;
        let process = Arc::new(process);
        let (usage, target) = (watched.usage, watched.target);
        let usage = process::usage(pid, process.start_ticks).unwrap_or(usage);
        let growth = coverage::Growth::begin(&process, usage, now_s);
        if let Err(e) = self.symbolizer.observe(&process) {
            tracing::debug!(pid, "mappings not read: {e:#}");
        }
        let new = super::Watched {
            process: Arc::clone(&process),
            life: Life::Running,
            target,
            followed,
            status: Vec::new(),
            announced: true,
            waits: false,
            since_s: now_s,
            usage,
            growth,
            governor,
            window_opened_ns: 0,
            ended: super::Ended::default(),
        };
        self.watched.insert(instance, new);
        self.attach_to(instance);
        self.notices.push(Notice::Mode { process, exact });
    }

    /// After a window: drops what it saw if it does not count, and candidates that are gone for sure.
    fn resolve_candidates(&mut self, instance: u32, counts: bool) -> Result<()> {
        let Some(watched) = self.watched.get(&instance) else { return Ok(()) };
        let opened_ns = watched.window_opened_ns;
        let process = &watched.process;
        // Without its map nothing can be said of unmapped pages.
        let maps = ProcDir::open_same(process.pid, process.start_ticks).and_then(|dir| Maps::read(&dir)).ok();
        let mut previous: Option<Block> = None;
        let mut gone = Vec::new();
        let mut never = Vec::new();
        let blocks = self.tracker.get()?.read_blocks(instance)?;
        for block in &blocks {
            if !counts && block.birth_ns >= opened_ns {
                never.push(*block);
                continue;
            }
            if maps.as_ref().is_some_and(|m| m.find(block.address).is_none()) {
                gone.push(*block);
                continue;
            }
            // Two blocks cannot share a byte: the older one is gone.
            if let Some(before) = previous
                && before.address + before.size > block.address
            {
                let older = if before.birth_ns < block.birth_ns { before } else { *block };
                gone.push(older);
                if older == *block {
                    continue;
                }
            }
            previous = Some(*block);
        }
        self.tracker.get_mut()?.remove_blocks(instance, &gone, true)?;
        self.tracker.get_mut()?.remove_blocks(instance, &never, false)?;
        Ok(())
    }
}

/// CPU time used by a process so far, all threads, in seconds; 0 when it has ended.
pub(super) fn process_cpu_s(pid: u32) -> f64 {
    // The clock of another process, see MAKE_PROCESS_CPUCLOCK and CPUCLOCK_SCHED in posix-timers_types.h.
    let clock = (!pid << 3 | 2).cast_signed();
    clock_ns(clock) as f64 / 1e9
}
