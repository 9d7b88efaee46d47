//! The loaded kernel side: watched processes, attached probe sets, and what they counted.
//!
//! Owns the BPF object and every link. A [`Tracker`] that is dropped, or whose process dies however it dies, leaves
//! nothing behind: all links are file descriptors.

use std::collections::HashMap;
use std::time::Duration;

use libbpf_rs::skel::OpenSkel;
use libbpf_rs::{Link, MapCore, MapFlags, ProgramMut};

use crate::calibration::{self, Prices, TIMED_ONE_IN};
use crate::elf::Symbols;
use crate::events::{Event, ProcessEvent, Rings};
use crate::features::{self, Backend, Features};
use crate::python::{self, PythonCode, PythonFrame};
use crate::reader::{self, Block, BlockReader, Counters, SiteKey, SiteTotals, Stack};
use crate::skeleton::userspace_alloc::UserspaceAllocSkel;
use crate::sweep::Witness;
use crate::types::{CODE_RANGES, MAX_TARGETS, bytes_of, memleak_range, memleak_target};
use crate::unwind::{Code, Row, TableId, UnwindTables};
use crate::{Error, ErrorKind, Result};

mod attach;
mod open;

use attach::Plan;
use open::open;
pub(crate) use open::{pid_namespace, seed};

/// Size of the ring buffer of a trace, bytes.
pub(crate) const TRACE_RING_BYTES: u32 = 32 << 20;

/// Bounds and behaviour of the kernel side.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How to attach; `None` takes the best that works.
    pub backend: Option<Backend>,
    /// Most outstanding allocations.
    pub max_outstanding: u32,
    /// Most sites, and most stacks.
    pub max_sites: u32,
    /// Most threads with a call under way.
    pub max_threads: u32,
    /// Most frames of a stack, 1 to [`crate::MAX_FRAMES`].
    pub max_frames: u32,
    /// Smaller allocations are not recorded, bytes.
    pub min_size: u64,
    /// Mean bytes between two allocations that are recorded, at most [`crate::MAX_SAMPLE_BYTES`]; 0 records all.
    pub sample_bytes: u64,
    /// Emit every allocation and free, see [`Tracker::next_event`].
    pub trace_events: bool,
    /// Probe the first instruction of each function, whatever it costs: to compare.
    pub at_entry: bool,
    /// Stop (SIGSTOP) every child of a watched process before its first instruction, and after every exec, as
    /// [`Tracker::launch`] does; see [`Tracker::stops_children`].
    pub stop_children: bool,
}

/// Identity of a mapped file.
type FileId = (u64, u64);

/// A watched process.
struct Target {
    pid: u32,
    slot: u32,
    stop_on_load: bool,
    /// Probes on functions that say something about the process, by file and function.
    hooks: HashMap<(FileId, &'static str), Link>,
    /// What is to be attached, by file and probe set.
    plans: HashMap<(FileId, u32), Plan>,
    /// Probes are attached; else they wait for a window.
    attached: bool,
    window: u32,
    runs_python: bool,
    record_until_ns: u64,
    code: [memleak_range; CODE_RANGES],
}

/// The loaded kernel side.
pub struct Tracker {
    skel: UserspaceAllocSkel<'static>,
    settings: Settings,
    backend: Backend,
    rings: Rings,
    targets: HashMap<u32, Target>,
    free_slots: Vec<u32>,
    names: Vec<String>,
    domains: Vec<String>,
    next_function: u32,
    /// Functions that were set up before, by file, probe set, symbol and file offset of the probe: their index.
    functions: HashMap<(FileId, u32, String, u64), u32>,
    symbols: HashMap<(FileId, u32), Symbols>,
    unwind: UnwindTables,
    cohort: u32,
    prices: Prices,
    stops_children: bool,
    witness: Option<Box<dyn Witness>>,
}

impl Tracker {
    /// Finds the way to attach and loads the programs; nothing is attached to any process yet.
    ///
    /// # Errors
    /// Missing privilege, missing kernel feature, or a refused program; the message names the fix where there is one.
    pub fn load(settings: Settings) -> Result<Tracker> {
        features::check_kernel()?;
        // Where the best way works, calibration is proof enough, and a test of its own would only take time.
        if settings.backend.is_none_or(|wanted| wanted == Backend::Session) {
            match Tracker::load_for(settings.clone(), Backend::Session) {
                Ok(tracker) => return Ok(tracker),
                Err(e) => tracing::debug!("no sessions, or not for this: {e}"),
            }
        }
        let backend = Features::choose(settings.backend)?;
        Tracker::load_for(settings, backend)
    }

    fn load_for(settings: Settings, backend: Backend) -> Result<Tracker> {
        let mut open = open(&settings, backend)?;
        let progs = &mut open.progs;
        progs.alloc_session.set_autoload(backend == Backend::Session);
        progs.alloc_multi_enter.set_autoload(backend == Backend::Multi);
        progs.alloc_multi_return.set_autoload(backend == Backend::Multi);
        progs.alloc_perf_enter.set_autoload(backend == Backend::Perf);
        progs.alloc_perf_return.set_autoload(backend == Backend::Perf);
        let stops_children = settings.stop_children && features::can_signal_others();
        progs.process_fork.set_autoload(!stops_children);
        progs.process_fork_stop.set_autoload(stops_children);
        let mut skel = open.load().map_err(|e| Error::bpf("load the BPF programs", &e))?;
        let events: Option<&dyn MapCore> = settings.trace_events.then_some(&skel.maps.events);
        let rings = Rings::new(Some(&skel.maps.process_events), events)?;
        let attach = |prog: &mut ProgramMut<'_>, name: &str| {
            prog.attach().map_err(|e| Error::bpf(format!("attach to tracepoint {name}"), &e))
        };
        skel.links.process_exec = Some(attach(&mut skel.progs.process_exec, "sched_process_exec")?);
        skel.links.process_exit = Some(attach(&mut skel.progs.process_exit, "sched_process_exit")?);
        if stops_children {
            skel.links.process_fork_stop = Some(attach(&mut skel.progs.process_fork_stop, "sched_process_fork")?);
        } else {
            skel.links.process_fork = Some(attach(&mut skel.progs.process_fork, "sched_process_fork")?);
        }
        let mut tracker = Tracker {
            skel,
            settings,
            backend,
            rings,
            targets: HashMap::new(),
            free_slots: (0..u32::try_from(MAX_TARGETS).unwrap_or(u32::MAX)).rev().collect(),
            names: Vec::new(),
            domains: Vec::new(),
            next_function: 0,
            functions: HashMap::new(),
            symbols: HashMap::new(),
            unwind: UnwindTables::default(),
            cohort: 0,
            prices: Prices::default(),
            stops_children,
            witness: None,
        };
        tracker.prices = calibration::measure(&mut tracker)?;
        tracker.time_one_hit_in(TIMED_ONE_IN);
        tracker.rings.discard()?;
        Ok(tracker)
    }

    /// Has the programs time one in so many hits of theirs.
    pub(crate) fn time_one_hit_in(&mut self, n: u32) {
        if let Some(bss) = self.skel.maps.bss_data.as_deref_mut() {
            bss.meter_untimed = u32::MAX - u32::MAX / n.max(1);
        }
    }

    /// Has somebody told of all attachments from now on, see [`crate::sweep`].
    pub fn set_witness(&mut self, witness: Box<dyn Witness>) {
        self.witness = Some(witness);
    }

    /// What hits cost the target, as measured when the programs were loaded.
    pub fn prices(&self) -> Prices {
        self.prices
    }

    /// Mean bytes between two allocations that are recorded; 0: all are.
    pub fn sample_bytes(&self) -> u64 {
        self.settings.sample_bytes
    }

    /// How uprobes are attached.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Whether children of watched processes are stopped until probes are attached; else the first allocations of a
    /// child may go unseen.
    pub fn stops_children(&self) -> bool {
        self.stops_children
    }

    /// Name of an allocator function by the number in a [`Stack`] or an [`Event`]; empty when there is none.
    pub fn function_name(&self, number: u32) -> &str {
        self.names.get(number as usize).map_or("", String::as_str)
    }

    /// Announces a child that we have forked and that has not called exec yet: it is stopped (SIGSTOP) after every exec
    /// until [`Tracker::launch_done`], so that probes can be attached before its first instruction.
    ///
    /// # Errors
    /// When the map refuses.
    pub fn launch(&mut self, pid: u32) -> Result<()> {
        (self.skel.maps.launched)
            .update(&pid.to_ne_bytes(), &1_u32.to_ne_bytes(), MapFlags::ANY)
            .map_err(|e| Error::bpf(format!("announce process {pid}"), &e))
    }

    /// Ends what [`Tracker::launch`] began.
    pub fn launch_done(&mut self, pid: u32) {
        // It may never have been there; nothing depends on it.
        let _ = self.skel.maps.launched.delete(&pid.to_ne_bytes());
    }

    /// Watches a process under a new instance number (unique in the run, not 0). With `stop_on_load` the process stops
    /// itself (SIGSTOP) each time its dynamic linker has mapped something.
    ///
    /// # Errors
    /// When [`MAX_TARGETS`] processes are watched already.
    pub fn add_target(&mut self, pid: u32, instance: u32, stop_on_load: bool) -> Result<()> {
        let slot = self.free_slots.pop().ok_or_else(|| {
            Error::new(
                ErrorKind::Limit,
                format!("failed to watch process {pid}: {MAX_TARGETS} processes are watched already"),
            )
        })?;
        reader::reset_counters(&self.skel.maps.counters, slot)?;
        let target = Target {
            pid,
            slot,
            stop_on_load,
            hooks: HashMap::new(),
            plans: HashMap::new(),
            attached: true,
            window: 0,
            runs_python: false,
            record_until_ns: 0,
            code: [memleak_range::default(); CODE_RANGES],
        };
        let result = self.write_target(instance, &target, MapFlags::ANY);
        self.targets.insert(instance, target);
        result
    }

    /// Changes whether the process stops on loads, see [`Tracker::add_target`].
    ///
    /// # Errors
    /// When the map refuses.
    pub fn set_stop_on_load(&mut self, instance: u32, stop_on_load: bool) -> Result<()> {
        if let Some(target) = self.targets.get_mut(&instance) {
            target.stop_on_load = stop_on_load;
        }
        self.update_target(instance)
    }

    /// Tells where the process has code: `mappings` are its executable mappings (start, end), by address. Call stacks
    /// are cut off where they leave it.
    ///
    /// # Errors
    /// When the map refuses.
    pub fn set_code(&mut self, instance: u32, mappings: &[(u64, u64)]) -> Result<()> {
        let code = code_ranges(mappings);
        match self.targets.get_mut(&instance) {
            Some(target) if target.code.map(|r| (r.start, r.end)) != code.map(|r| (r.start, r.end)) => {
                target.code = code
            }
            _ => return Ok(()),
        }
        self.update_target(instance)
    }

    /// Puts an unwind table into the kernel; `rows` are sorted by address.
    ///
    /// # Errors
    /// [`ErrorKind::Limit`] when there is no room, or the kernel refuses.
    pub fn add_unwind_table(&mut self, rows: &[Row]) -> Result<TableId> {
        self.unwind.add(&self.skel.maps.unwind_pages, rows)
    }

    /// Removes an unwind table that no process uses any more.
    pub fn remove_unwind_table(&mut self, id: TableId) {
        self.unwind.remove(&self.skel.maps.unwind_pages, id);
    }

    /// Bytes of kernel memory that unwind tables take.
    pub fn unwind_bytes(&self) -> u64 {
        self.unwind.bytes()
    }

    /// Has the stacks of a process unwound by tables from now on: `code`, sorted by address, is what has one. Returns
    /// how many pieces of code had no room; their frames are walked by frame pointers.
    ///
    /// # Errors
    /// When the map refuses.
    pub fn set_unwind_code(&mut self, instance: u32, code: &[Code]) -> Result<usize> {
        let (map, left_out) = self.unwind.map_of(code, seed());
        (self.skel.maps.unwind_maps)
            .update(&instance.to_ne_bytes(), bytes_of(&*map), MapFlags::ANY)
            .map_err(|e| Error::bpf("say which code has unwind tables", &e))?;
        Ok(left_out)
    }

    /// Has the Python frames of a process read from now on.
    ///
    /// # Errors
    /// When the map refuses.
    pub fn set_python(&mut self, instance: u32, layout: &python::Layout) -> Result<()> {
        (self.skel.maps.python_targets)
            .update(&instance.to_ne_bytes(), bytes_of(&layout.to_raw()), MapFlags::ANY)
            .map_err(|e| Error::bpf("say where Python keeps its frames", &e))?;
        if let Some(target) = self.targets.get_mut(&instance) {
            target.runs_python = true;
        }
        self.update_target(instance)
    }

    /// The Python frames of a stack, innermost first, and whether there were more; `None` when it has none. As
    /// [`Tracker::take_stack`], once.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn take_python(&self, key: SiteKey) -> Result<Option<(Vec<PythonFrame>, bool)>> {
        let frames = python::read_frames(&self.skel.maps.python_stacks, key)?;
        if frames.is_some() && !self.settings.trace_events {
            reader::remove_stack(&self.skel.maps.python_stacks, key);
        }
        Ok(frames)
    }

    /// What the code object of a frame says of itself, as it was when it was first seen; `None` when there was no room.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn python_code(&self, instance: u32, frame: &PythonFrame) -> Result<Option<PythonCode>> {
        python::read_code(&self.skel.maps.python_codes, instance, frame)
    }

    /// Tells the kernel side of what has changed; not once it has dropped the process, which has ended or runs another
    /// program: whoever has the process id now must not be counted as it.
    fn update_target(&self, instance: u32) -> Result<()> {
        let Some(target) = self.targets.get(&instance).filter(|t| self.is_watched(instance, t)) else { return Ok(()) };
        match self.write_target(instance, target, MapFlags::EXIST) {
            // It was dropped just now.
            Err(_) if !self.is_watched(instance, target) => Ok(()),
            result => result,
        }
    }

    /// Whether the kernel side watches the process, as this instance.
    fn is_watched(&self, instance: u32, target: &Target) -> bool {
        let entry = self.skel.maps.targets.lookup(&target.pid.to_ne_bytes(), MapFlags::ANY).ok().flatten();
        entry.is_some_and(|entry| entry.starts_with(&instance.to_ne_bytes()))
    }

    fn write_target(&self, instance: u32, target: &Target, flags: MapFlags) -> Result<()> {
        let value = memleak_target {
            instance,
            slot: target.slot,
            stop_on_load: target.stop_on_load.into(),
            window: target.window,
            runs_python: target.runs_python.into(),
            pad: 0,
            record_until_ns: target.record_until_ns,
            code: target.code,
        };
        (self.skel.maps.targets)
            .update(&target.pid.to_ne_bytes(), bytes_of(&value), flags)
            .map_err(|e| Error::bpf(format!("watch process {}", target.pid), &e))
    }

    /// Detaches from a process; its totals stay readable until [`Tracker::forget`].
    pub fn detach(&mut self, instance: u32) {
        // A process that has ended is out of the map already, and its pid may be watched as another instance.
        if let Some(target) = self.targets.get(&instance).filter(|target| self.is_watched(instance, target)) {
            let _ = self.skel.maps.targets.delete(&target.pid.to_ne_bytes());
        }
        if let Some(target) = self.targets.get_mut(&instance) {
            // Only now: probes go one by one, and an allocation whose free is not seen must not be recorded.
            target.hooks.clear();
            if !target.plans.is_empty() {
                target.plans.clear();
                self.witness.iter().for_each(|witness| witness.detached(target.pid));
            }
        }
    }

    /// The probes on a process, which stay for as long as somebody keeps them.
    pub(crate) fn take_links(&mut self, instance: u32) -> Vec<Link> {
        let target = self.targets.get_mut(&instance);
        target.into_iter().flat_map(|t| t.plans.values_mut().flat_map(|plan| plan.links.drain(..))).collect()
    }

    /// Removes all that is known of an instance. Costs time in the order of all outstanding allocations.
    ///
    /// # Errors
    /// When the maps cannot be read.
    pub fn forget(&mut self, instance: u32) -> Result<()> {
        self.detach(instance);
        if let Some(target) = self.targets.remove(&instance) {
            self.free_slots.push(target.slot);
        }
        let maps = &self.skel.maps;
        // It has none when its stacks were walked by frame pointers.
        let _ = maps.unwind_maps.delete(&instance.to_ne_bytes());
        if maps.python_targets.delete(&instance.to_ne_bytes()).is_ok() {
            reader::forget_python(&maps.python_stacks, &maps.python_codes, instance)?;
        }
        reader::forget(&maps.blocks, &maps.sites, &maps.stacks, instance)
    }

    /// Outstanding allocations of a process, by address. Costs time in the order of all outstanding allocations.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn read_blocks(&self, instance: u32) -> Result<Vec<Block>> {
        reader::read_blocks(&self.skel.maps.blocks, instance)
    }

    /// A look at outstanding allocations for another thread.
    ///
    /// # Errors
    /// No more files can be opened.
    pub fn block_reader(&self) -> Result<BlockReader> {
        BlockReader::new(&self.skel.maps.blocks, self.domains.len() as u32)
    }

    /// Shows every outstanding allocation of all instances to `visit`, in no order.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn for_each_block(&self, visit: impl FnMut(u32, Block)) -> Result<()> {
        reader::for_each_block(&self.skel.maps.blocks, visit)
    }

    /// Takes blocks off the books of a process whose probes are detached ([`Tracker::close_window`]): as freed, or, if
    /// they have not `ended`, as if they had never been allocated.
    ///
    /// # Errors
    /// When the maps cannot be changed.
    pub fn remove_blocks(&mut self, instance: u32, blocks: &[Block], ended: bool) -> Result<()> {
        let maps = &self.skel.maps;
        reader::remove_blocks(
            &maps.blocks,
            &maps.sites,
            instance,
            blocks,
            ended,
            self.cohort,
            self.settings.sample_bytes,
        )
    }

    /// Totals of every site.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn read_sites(&self) -> Result<Vec<(SiteKey, SiteTotals)>> {
        reader::read_sites(&self.skel.maps.sites, self.settings.sample_bytes)
    }

    /// Takes the call stack of a site out of the kernel's memory, which has one for each new site only; `None` when there
    /// was no room for it. A trace keeps its stacks: any later event may name them again.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn take_stack(&self, key: SiteKey) -> Result<Option<Stack>> {
        let stack = reader::read_stack(&self.skel.maps.stacks, key)?;
        if !self.settings.trace_events {
            reader::remove_stack(&self.skel.maps.stacks, key);
        }
        Ok(stack)
    }

    /// Counters of a watched process; zero when it is not known.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn read_counters(&self, instance: u32) -> Result<Counters> {
        match self.targets.get(&instance) {
            Some(target) => reader::read_counters(&self.skel.maps.counters, target.slot),
            None => Ok(Counters::default()),
        }
    }

    /// Birth generation of allocations made now; the first is 0.
    pub fn cohort(&self) -> u32 {
        self.cohort
    }

    /// Begins the next birth generation. To be called right after [`Tracker::read_sites`], at least once read per
    /// generation, or survivors of old generations cannot be told apart.
    pub fn next_cohort(&mut self) {
        self.cohort = self.cohort.wrapping_add(1);
        if let Some(bss) = self.skel.maps.bss_data.as_deref_mut() {
            bss.cohort_now = self.cohort;
        }
    }

    /// Waits for events, at most `timeout`; a signal ends the wait early.
    ///
    /// # Errors
    /// When polling fails.
    pub fn poll(&self, timeout: Duration) -> Result<()> {
        self.rings.poll(timeout)
    }

    /// The next event of a process's life that [`Tracker::poll`] has brought.
    pub fn next_process_event(&self) -> Option<ProcessEvent> {
        self.rings.next_process_event()
    }

    /// Stops no process any more that forks, calls exec or exit(), or loads a library. Events of those that were stopped
    /// before can still be had.
    pub fn detach_stops(&mut self) {
        self.skel.links.process_exec = None;
        self.skel.links.process_fork = None;
        self.skel.links.process_fork_stop = None;
        self.targets.values_mut().for_each(|t| t.hooks.clear());
    }

    /// The next allocation or free that [`Tracker::poll`] has brought; only with [`Settings::trace_events`].
    pub fn next_event(&self) -> Option<Event> {
        self.rings.next_event()
    }
}

/// Joins mappings until there are few enough: those with the smallest gaps between them first.
fn code_ranges(mappings: &[(u64, u64)]) -> [memleak_range; CODE_RANGES] {
    let mut ranges: Vec<(u64, u64)> = mappings.to_vec();
    while ranges.len() > CODE_RANGES {
        let gap = |at: &usize| ranges[at + 1].0.saturating_sub(ranges[*at].1);
        let Some(at) = (0..ranges.len() - 1).min_by_key(gap) else { break };
        ranges[at].1 = ranges[at + 1].1;
        ranges.remove(at + 1);
    }
    let mut out = [memleak_range::default(); CODE_RANGES];
    for (range, (start, end)) in out.iter_mut().zip(ranges) {
        *range = memleak_range { start, end };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The program's own code and its libraries lie far apart; joining across that gap would let heap addresses pass.
    #[test]
    fn code_is_joined_across_the_smallest_gaps() {
        let mappings =
            [(0x1000, 0x2000), (0x7000, 0x8000), (0x9000, 0xa000), (0x9_0000, 0xa_0000), (0xf_0000, 0xf_1000)];
        let ranges = code_ranges(&mappings).map(|r| (r.start, r.end));
        assert_eq!(ranges, [(0x1000, 0x2000), (0x7000, 0xa000), (0x9_0000, 0xa_0000), (0xf_0000, 0xf_1000)]);
        assert_eq!(code_ranges(&mappings[..1]).map(|r| r.end), [0x2000, 0, 0, 0]);
        assert_eq!(code_ranges(&[]).map(|r| r.end), [0; 4]);
    }
}
