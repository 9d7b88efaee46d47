//! Lines of a bcc `memleak` log put together into snapshots.
//!
//! Such a log says less than memleak's own snapshots, and this module decides what to make of the gaps:
//!
//! - It gives what is outstanding, not what was allocated and freed. Totals rise by what the outstanding bytes rise and
//!   free what they fall: the least that must have happened.
//! - It lists only the largest stacks. One that is missing from a list that is full has at most as much as the smallest
//!   that is listed, and is taken to have kept what it had, up to that. One that is missing from a list with room left
//!   has nothing.
//! - It gives no ages: blocks of a site are as old as the site at most.
//! - It has the time of day alone: one that jumps back by more than half a day is the next day, a smaller jump is a
//!   clock that was set.
//!
//! Memory is bounded: a site that does not fit any more is counted as lost. Every interval is handed out as soon as the
//! next one begins.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use super::bcc::{KERNEL, Line};
use crate::snapshot::{
    Cohort, LIFETIME_CLASSES, Losses, Mode, Process, ProcessSample, Site, SiteKey, SiteSample, Snapshot,
    StandardErrors, Totals,
};
use crate::symbolize::{Frame, ModuleName, NormalizedFrame, site_id};

/// Seconds of a day.
const DAY_S: u32 = 86_400;
/// Most frames of one stack; the tools stop at 127.
const MAX_STACK: usize = 512;
/// Most frames of all sites together, at about 300 bytes each.
const MAX_FRAMES: usize = 500_000;
/// Least time between two snapshots: intervals can be shorter than the second that the log's times have.
const LEAST_STEP_S: f64 = 0.125;

/// What is known of the log from outside.
#[derive(Clone, Debug, Default)]
pub(super) struct Setting {
    /// Midnight before the first line, seconds since 1970.
    pub(super) day_wall_s: f64,
    /// The process id to go by when the log does not give one.
    pub(super) pid: Option<u32>,
    /// The name of the process; without it that of the file that holds `main`.
    pub(super) comm: Option<String>,
    /// How many stacks the tool was told to show; without it the largest number in the log's headings.
    pub(super) top: Option<usize>,
}

/// Puts lines together; see the module.
#[derive(Debug)]
pub(super) struct Assembler {
    setting: Setting,
    /// From the line that the tool begins with; `Some(None)` is the kernel.
    attached: Option<Option<u32>>,
    process: Option<Arc<Process>>,
    interval: Option<Interval>,
    sites: HashMap<u64, State>,
    /// Frames of all sites.
    frames: usize,
    /// Most blocks of an interval whose stacks found no room.
    lost: u64,
    /// Largest number in a heading.
    top: usize,
    /// Seconds since midnight of the first interval, and days and seconds of the newest.
    first_s: Option<f64>,
    days: u32,
    day_s: u32,
    time_s: f64,
    number: u64,
}

/// An interval that is being read.
#[derive(Debug)]
struct Interval {
    time_s: f64,
    /// When the one before it was, or 0.
    before_s: f64,
    listed: HashMap<u64, (u64, u64)>,
    stacks: usize,
    smallest: u64,
    /// Blocks of stacks that found no room.
    lost: u64,
    open: Option<Stack>,
}

/// A stack that is being read.
#[derive(Debug, Default)]
struct Stack {
    bytes: u64,
    count: u64,
    frames: Vec<Frame>,
    lost: bool,
}

/// What is known of a site.
#[derive(Debug)]
struct State {
    site: Arc<Site>,
    totals: Totals,
    /// Nothing of it is older than this.
    born_s: f64,
    last_rise_s: f64,
}

/// What does not fit where it stands.
pub(super) const NO_INTERVAL: &str = "it belongs to no interval: `[TIME] Top N stacks ...` is expected before it";
const NO_STACK: &str = "it belongs to no stack: `N bytes in M allocations from stack` is expected before it";
const TOO_DEEP: &str = "the stack has more frames than the tool can print";

impl Assembler {
    pub(super) fn new(setting: Setting) -> Self {
        Assembler {
            setting,
            attached: None,
            process: None,
            interval: None,
            sites: HashMap::new(),
            frames: 0,
            lost: 0,
            top: 0,
            first_s: None,
            days: 0,
            day_s: 0,
            time_s: 0.0,
            number: 0,
        }
    }

    /// Takes the next line in; returns a snapshot when the line has ended an interval.
    ///
    /// # Errors
    /// Why the line cannot stand here; it is left out.
    pub(super) fn push(&mut self, line: Line) -> Result<Option<Snapshot>, &'static str> {
        match line {
            Line::Nothing => {}
            Line::Attached(whom) => {
                if self.number == 0 && self.interval.is_none() {
                    self.attached = Some(whom);
                } else if self.attached != Some(whom) {
                    return Err("another log begins here; only the first process of a log is told apart");
                }
            }
            Line::Interval { day_s, top } => {
                let done = self.finish();
                self.begin(day_s, top);
                return Ok(done);
            }
            Line::Stack { bytes, count } => {
                self.close();
                let interval = self.interval.as_mut().ok_or(NO_INTERVAL)?;
                interval.stacks += 1;
                interval.smallest = interval.smallest.min(bytes);
                interval.open = Some(Stack { bytes, count, ..Stack::default() });
            }
            Line::Frame(frame) => {
                let stack = self.interval.as_mut().and_then(|i| i.open.as_mut()).ok_or(NO_STACK)?;
                if stack.frames.len() == MAX_STACK {
                    return Err(TOO_DEEP);
                }
                stack.frames.push(*frame);
            }
            Line::Lost => self.interval.as_mut().and_then(|i| i.open.as_mut()).ok_or(NO_STACK)?.lost = true,
            // The python tool lists blocks before all stacks, that of libbpf-tools after the head of theirs.
            Line::Block => drop(self.interval.as_ref().ok_or(NO_INTERVAL)?),
        }
        Ok(None)
    }

    /// The end of the log: ends the interval that is being read. `None` without one.
    ///
    /// Of a log that was `cut` in the middle of a line the last stack is left out, and so is what its absence from the
    /// last list would say about others.
    pub(super) fn end(&mut self, cut: bool) -> Option<Snapshot> {
        if cut && let Some(interval) = &mut self.interval {
            interval.open = None;
            (interval.stacks, interval.smallest) = (usize::MAX, u64::MAX);
        }
        self.finish()
    }

    fn finish(&mut self) -> Option<Snapshot> {
        self.close();
        let interval = self.interval.take()?;
        self.number += 1;
        self.time_s = interval.time_s;
        self.lost = self.lost.max(interval.lost);
        let limit = self.setting.top.unwrap_or(self.top);
        let full = interval.stacks >= limit.max(1);
        let now_s = interval.time_s;
        for (hash, state) in &mut self.sites {
            let held = (state.totals.outstanding_bytes(), state.totals.outstanding_count());
            let (bytes, count) = match interval.listed.get(hash) {
                Some(listed) => *listed,
                None if !full => (0, 0),
                None if held.0 <= interval.smallest => held,
                // As many of its blocks as fit into what it can have at most.
                None => (interval.smallest, scaled(held.1, interval.smallest, held.0)),
            };
            let totals = &mut state.totals;
            totals.allocated_bytes += bytes.saturating_sub(held.0);
            totals.freed_bytes += held.0.saturating_sub(bytes);
            totals.allocated_count += count.saturating_sub(held.1);
            totals.freed_count += held.1.saturating_sub(count);
            if bytes > held.0 {
                state.last_rise_s = now_s;
            }
        }
        let mut sites: Vec<SiteSample> = self.sites.values().map(|state| state.sample(now_s)).collect();
        sites.sort_by_key(|s| (std::cmp::Reverse(s.totals.outstanding_bytes()), s.site.key));
        let process = self.process();
        Some(Snapshot {
            number: self.number,
            time_s: now_s,
            wall_s: self.setting.day_wall_s + self.first_s.unwrap_or(0.0) + now_s,
            processes: vec![ProcessSample {
                process,
                alive: true,
                mode: Mode::Exact,
                losses: Losses { sites_full: self.lost, ..Losses::default() },
                ..ProcessSample::default()
            }],
            sites,
            ..Snapshot::default()
        })
    }

    /// Number of sites seen so far.
    pub(super) fn sites(&self) -> usize {
        self.sites.len()
    }

    /// Number of snapshots handed out so far.
    pub(super) fn snapshots(&self) -> u64 {
        self.number
    }

    fn begin(&mut self, day_s: u32, top: usize) {
        let first = *self.first_s.get_or_insert(f64::from(day_s));
        if day_s + DAY_S / 2 < self.day_s {
            self.days += 1;
        }
        self.day_s = day_s;
        let time_s = f64::from(self.days) * f64::from(DAY_S) + f64::from(day_s) - first;
        let least = if self.number == 0 { 0.0 } else { self.time_s + LEAST_STEP_S };
        self.top = self.top.max(top);
        self.interval = Some(Interval {
            time_s: time_s.max(least),
            before_s: self.time_s,
            listed: HashMap::new(),
            stacks: 0,
            smallest: u64::MAX,
            lost: 0,
            open: None,
        });
    }

    /// Files the stack away that is being read.
    fn close(&mut self) {
        let Some((stack, born_s)) = self.interval.as_mut().and_then(|i| Some((i.open.take()?, i.before_s))) else {
            return;
        };
        let mut hasher = DefaultHasher::new();
        for f in &stack.frames {
            // Not where it lies: after a restart the same call has another address.
            let place = if f.function.is_some() { f.offset } else { f.address };
            (&f.function, &f.module, place, &f.file, f.line).hash(&mut hasher);
        }
        let hash = hasher.finish();
        if !self.sites.contains_key(&hash) {
            if self.frames + stack.frames.len() >= MAX_FRAMES {
                if let Some(interval) = &mut self.interval {
                    interval.lost = interval.lost.saturating_add(stack.count);
                }
                return;
            }
            self.frames += stack.frames.len().max(1);
            let process = self.process_for(&stack);
            self.sites.insert(hash, State::new(hash, process, stack.frames, stack.lost, born_s));
        }
        if let Some(interval) = &mut self.interval {
            let (bytes, count) = interval.listed.entry(hash).or_default();
            *bytes = bytes.saturating_add(stack.bytes);
            *count = count.saturating_add(stack.count);
        }
    }

    /// The process, made from the first stack and what is known by then.
    fn process_for(&mut self, stack: &Stack) -> Arc<Process> {
        if self.process.is_none() {
            let in_kernel = |f: &Frame| f.module.as_deref() == Some(KERNEL) || f.address >> 63 == 1;
            let guessed = || stack.frames.first().is_some_and(in_kernel);
            let is_kernel = self.attached.map_or_else(guessed, |whom| whom.is_none());
            let main = stack.frames.iter().find(|f| f.function.as_deref() == Some("main"));
            let exe = main.and_then(|f| f.module.clone()).filter(|_| !is_kernel);
            self.process = Some(Arc::new(self.made(is_kernel, exe)));
        }
        self.process()
    }

    fn process(&mut self) -> Arc<Process> {
        let is_kernel = matches!(self.attached, Some(None));
        if self.process.is_none() {
            return Arc::new(self.made(is_kernel, None));
        }
        self.process.clone().unwrap_or_default()
    }

    fn made(&self, is_kernel: bool, exe: Option<String>) -> Process {
        let exe = exe.unwrap_or_default();
        let file_name = exe.rsplit('/').next().unwrap_or_default();
        let unknown = || if file_name.is_empty() { "unknown".to_owned() } else { file_name.to_owned() };
        match is_kernel {
            true => Process { comm: "kernel".to_owned(), ..Process::default() },
            false => Process {
                instance: 1,
                pid: self.attached.flatten().or(self.setting.pid).unwrap_or(0),
                comm: self.setting.comm.clone().unwrap_or_else(unknown),
                exe,
                ..Process::default()
            },
        }
    }
}

impl State {
    fn new(hash: u64, process: Arc<Process>, mut frames: Vec<Frame>, lost: bool, born_s: f64) -> State {
        let in_kernel = process.instance == 0;
        for f in frames.iter_mut().filter(|f| in_kernel && f.module.is_none()) {
            f.module = Some(KERNEL.to_owned());
        }
        let normalized: Vec<NormalizedFrame> = frames.iter().map(normalized).collect();
        let probe_set: Arc<str> = if in_kernel { "bcc-kernel" } else { "bcc" }.into();
        // The log does not say which function was called.
        let function: Arc<str> = "alloc".into();
        let truncated = match (lost, frames.is_empty()) {
            (true, _) => Some("bcc had no room for the stack"),
            (false, true) => Some("the log has no frames for it"),
            (false, false) => None,
        };
        let site = Site {
            key: SiteKey { instance: process.instance, probe_set: 1, stack: hash },
            // Logs do not name the executable: its place in the identity stays empty.
            id: site_id("", &probe_set, &function, &normalized),
            process,
            probe_set,
            function,
            addresses: frames.iter().map(|f| f.address).collect(),
            truncated: truncated.map(Arc::from),
            first_thread: None,
            frames: frames.into(),
        };
        State { site: Arc::new(site), totals: Totals::default(), born_s, last_rise_s: born_s }
    }

    fn sample(&self, now_s: f64) -> SiteSample {
        SiteSample {
            site: Arc::clone(&self.site),
            totals: self.totals,
            stderr: StandardErrors::default(),
            last_allocation_s: self.last_rise_s,
            cohorts: vec![Cohort {
                start_s: self.born_s,
                end_s: now_s,
                born_bytes: self.totals.allocated_bytes,
                born_count: self.totals.allocated_count,
                outstanding_bytes: self.totals.outstanding_bytes(),
                outstanding_count: self.totals.outstanding_count(),
            }],
            lifetimes: [0; LIFETIME_CLASSES],
            reachability: None,
            kernel: None,
        }
    }
}

/// The frame without what differs between two runs of the program. There is no build id in a log: a function is known by
/// its name, the rest by the page.
fn normalized(f: &Frame) -> NormalizedFrame {
    let module = f.module.as_deref().unwrap_or_default();
    match &f.function {
        Some(function) => {
            NormalizedFrame { module: ModuleName::Path(format!("{module}:{function}").into()), offset: f.offset }
        }
        None if f.module.is_some() => {
            NormalizedFrame { module: ModuleName::Path(module.into()), offset: f.address & 0xfff }
        }
        None => NormalizedFrame { module: ModuleName::Unmapped, offset: f.address & 0xfff },
    }
}

/// `n * part / whole`, rounded down.
fn scaled(n: u64, part: u64, whole: u64) -> u64 {
    (u128::from(n) * u128::from(part) / u128::from(whole.max(1))) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assembled(setting: Setting, log: &str) -> Vec<Snapshot> {
        let mut assembler = Assembler::new(setting);
        let lines = log.lines().map(|l| Line::parse(l).unwrap_or_else(|why| panic!("{l:?}: {why}")));
        let mut out: Vec<Snapshot> = lines.filter_map(|l| assembler.push(l).expect("placed")).collect();
        out.extend(assembler.end(false));
        out
    }

    /// Function of the innermost frame, outstanding bytes and blocks, in order.
    fn outstanding(s: &Snapshot) -> Vec<(String, u64, u64)> {
        let name = |s: &SiteSample| s.site.frames()[0].function.clone().unwrap_or_default();
        s.sites.iter().map(|s| (name(s), s.totals.outstanding_bytes(), s.totals.outstanding_count())).collect()
    }

    fn interval(time: &str, top: usize, stacks: &[(&str, u64, u64)]) -> String {
        let mut out = format!("[{time}] Top {top} stacks with outstanding allocations:\n");
        for (name, bytes, count) in stacks {
            out += &format!("\t{bytes} bytes in {count} allocations from stack\n\t\t{name}+0x1a [shop]\n");
        }
        out
    }

    fn listed(entries: &[(&str, u64, u64)]) -> Vec<(String, u64, u64)> {
        entries.iter().map(|(n, b, c)| ((*n).to_owned(), *b, *c)).collect()
    }

    /// A stack that is missing from a list with room left has nothing outstanding; totals only grow.
    #[test]
    fn a_stack_that_leaves_a_list_with_room_has_been_freed() {
        let log = interval("10:00:00", 10, &[("a", 300, 3), ("b", 200, 2)])
            + &interval("10:00:05", 10, &[("a", 500, 5)])
            + &interval("10:00:10", 10, &[("a", 400, 4), ("b", 100, 1)]);
        let snapshots = assembled(Setting::default(), &log);
        assert_eq!(snapshots.iter().map(|s| s.time_s).collect::<Vec<_>>(), [0.0, 5.0, 10.0]);
        assert_eq!(outstanding(&snapshots[1]), listed(&[("a", 500, 5), ("b", 0, 0)]));
        let a = snapshots[2].sites[0].totals;
        assert_eq!((a.allocated_bytes, a.freed_bytes, a.allocated_count, a.freed_count), (500, 100, 5, 1));
        let b = snapshots[2].sites[1].totals;
        assert_eq!((b.allocated_bytes, b.freed_bytes, b.allocated_count, b.freed_count), (300, 200, 3, 2));
    }

    /// A full list hides what is smaller: it must neither count as freed nor keep more than the smallest listed.
    #[test]
    fn a_stack_that_leaves_a_full_list_keeps_at_most_the_smallest_listed() {
        let log = interval("10:00:00", 2, &[("a", 300, 3), ("b", 200, 2)])
            + &interval("10:00:05", 2, &[("a", 300, 3), ("c", 250, 5)])
            + &interval("10:00:10", 2, &[("a", 300, 3), ("c", 100, 2)]);
        let snapshots = assembled(Setting::default(), &log);
        assert_eq!(outstanding(&snapshots[1]), listed(&[("a", 300, 3), ("c", 250, 5), ("b", 200, 2)]));
        assert_eq!(
            snapshots[2].sites.iter().map(|s| s.totals.outstanding_bytes()).collect::<Vec<_>>(),
            [300, 100, 100]
        );
        // Told how many the tool was to show, a list of two is not full.
        let told = Setting { top: Some(10), ..Setting::default() };
        assert_eq!(outstanding(&assembled(told, &log)[1]), listed(&[("a", 300, 3), ("c", 250, 5), ("b", 0, 0)]));
    }

    /// Midnight is the next day; a clock that was set back, or two intervals in a second, must not turn time around.
    #[test]
    fn time_goes_on_across_midnight_and_never_back() {
        let log: String =
            ["23:59:58", "0:0:3", "0:0:3", "0:0:1", "0:0:9"].map(|t| interval(t, 1, &[("a", 1, 1)])).concat();
        let setting = Setting { day_wall_s: 1e9, ..Setting::default() };
        let snapshots = assembled(setting, &log);
        assert_eq!(snapshots.iter().map(|s| s.time_s).collect::<Vec<_>>(), [0.0, 5.0, 5.125, 5.25, 11.0]);
        assert_eq!(snapshots[4].wall_s, 1e9 + 86_398.0 + 11.0);
    }

    /// The same call in another run of the program lies at another address; it must keep its identity.
    #[test]
    fn identity_does_not_depend_on_addresses() {
        let log = |base: u64| {
            format!(
                "[1:0:0] Top 1 stacks with outstanding allocations:\n8 bytes in 1 allocations from stack\n\
                 \t0 [<{:016x}>] f+0x1a [/opt/shop]\n\t1 [<{:016x}>] [/lib/libc.so.6]\n",
                base + 0x123,
                base + 0x7456
            )
        };
        let id = |base| assembled(Setting::default(), &log(base))[0].sites[0].site.id;
        assert_eq!(id(0x55c2_9ba0_5000), id(0x5601_0000_0000));
    }

    /// Without a name of its own, the process is called after the file that holds `main`; the kernel is the kernel.
    #[test]
    fn the_process_gets_the_name_that_the_log_supports() {
        let stack = "[1:0:0] Top 1 stacks with outstanding allocations:\n8 bytes in 1 allocations from stack\n";
        let user =
            format!("Attaching to pid 77, Ctrl+C to quit.\n{stack}\t0 [<0000000000401000>] main+0x1 [/opt/shop]\n");
        let process = |setting, log: &str| Process::clone(&assembled(setting, log)[0].sites[0].site.process);
        let found = process(Setting::default(), &user);
        assert_eq!((found.instance, found.pid, &*found.comm, &*found.exe), (1, 77, "shop", "/opt/shop"));
        let named = Setting { comm: Some("front".to_owned()), pid: Some(5), ..Setting::default() };
        let found = process(named.clone(), &user);
        assert_eq!((found.pid, &*found.comm), (77, "front"));
        assert_eq!(process(named, &format!("{stack}\t\tf+0x1 [a]\n")).pid, 5);
        for kernel in [
            format!("Attaching to kernel allocators, Ctrl+C to quit.\n{stack}\t0 [<ffffffff8161f78b>] f+0x1\n"),
            format!("{stack}\t\t0xffffffff8161f78b\tf+0x1 [kernel]\n"),
        ] {
            let found = process(Setting::default(), &kernel);
            assert_eq!((found.instance, found.pid, &*found.comm), (0, 0, "kernel"));
        }
    }

    /// What stands in the wrong place is left out with a reason, and what follows is read.
    #[test]
    fn misplaced_lines_are_refused() {
        let mut assembler = Assembler::new(Setting::default());
        let frame = || Line::Frame(Box::default());
        assert_eq!(assembler.push(Line::Stack { bytes: 1, count: 1 }).err(), Some(NO_INTERVAL));
        assert_eq!(assembler.push(Line::Block).err(), Some(NO_INTERVAL));
        assert_eq!(assembler.push(frame()).err(), Some(NO_STACK));
        assert!(assembler.push(Line::Interval { day_s: 0, top: 1 }).expect("placed").is_none());
        assert_eq!(assembler.push(frame()).err(), Some(NO_STACK));
        assert!(assembler.push(Line::Stack { bytes: 1, count: 1 }).is_ok());
        for _ in 0..MAX_STACK {
            assembler.push(frame()).expect("placed");
        }
        assert_eq!(assembler.push(frame()).err(), Some(TOO_DEEP));
        assert_eq!(assembler.end(false).expect("snapshot").sites.len(), 1);
    }

    /// A log that ends in the middle of a list says nothing about the stacks that were to follow.
    #[test]
    fn a_cut_log_frees_nothing() {
        let log =
            interval("10:00:00", 10, &[("a", 300, 3), ("b", 200, 2)]) + &interval("10:00:05", 10, &[("a", 500, 5)]);
        let mut assembler = Assembler::new(Setting::default());
        log.lines().for_each(|l| drop(assembler.push(Line::parse(l).expect("line")).expect("placed")));
        let last = assembler.end(true).expect("snapshot");
        assert_eq!(outstanding(&last), listed(&[("a", 300, 3), ("b", 200, 2)]));
    }
}
