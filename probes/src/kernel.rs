//! The kernel's own allocations: programs loaded, attached, and read.
//!
//! A tracker of its own beside [`crate::Tracker`]: its programs run in interrupts, so all its tables are allocated
//! beforehand, and it has one books for the whole machine. Dropped, it leaves nothing behind.

use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

use libbpf_rs::skel::{OpenSkel, Skel, SkelBuilder};
use libbpf_rs::{Link, MapCore, MapFlags, Program};

use crate::events::{Event, Rings};
use crate::features;
use crate::reader::{self, Counters, SiteKey, SiteTotals, Stack};
use crate::skeleton::kernel_alloc::{KernelAllocSkel, KernelAllocSkelBuilder, OpenKernelAllocSkel};
use crate::tracker::{TRACE_RING_BYTES, pid_namespace, seed};
use crate::types::{
    MAX_FRAMES, bytes_of, from_bytes, memleak_kernel_limits as limits, memleak_kernel_origin, memleak_kernel_range,
    text,
};
use crate::{Error, ErrorKind, Result};

mod functions;
mod layout;
mod tracepoints;

use functions::{Attacher, Names};
use layout::Layouts;
pub use layout::gfp_flags;
pub use tracepoints::is_known as is_known_tracepoint;

/// A way to catch the kernel's calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum KernelBackend {
    /// Raw tracepoints.
    Tracepoint,
    /// Trampolines at the entry and return of functions (fentry, fexit).
    Fentry,
    /// Breakpoints at the entry and return of functions.
    Kprobe,
}

impl KernelBackend {
    /// All ways, best first.
    pub const ALL: [KernelBackend; 3] = [KernelBackend::Tracepoint, KernelBackend::Fentry, KernelBackend::Kprobe];

    /// Name used in settings and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            KernelBackend::Tracepoint => "tracepoint",
            KernelBackend::Fentry => "fentry",
            KernelBackend::Kprobe => "kprobe",
        }
    }
}

impl std::fmt::Display for KernelBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A tracepoint of a probe set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelTracepoint {
    /// Its name, `system:event`.
    pub name: String,
    /// The set attaches without it.
    pub optional: bool,
}

/// What a function of the kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelRole {
    /// Hands out a block.
    Alloc,
    /// Takes one back.
    Free,
    /// Takes several back.
    FreeBulk,
    /// Takes one to be freed later, when no reader of RCU can see it any more.
    FreeRcu,
}

impl KernelRole {
    /// Frees that no tracepoint tells of: followed whatever way in is used, where functions can be probed.
    pub fn is_unseen_by_tracepoints(self) -> bool {
        matches!(self, KernelRole::FreeBulk | KernelRole::FreeRcu)
    }
}

/// A function of a probe set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelFunction {
    /// What it is called, by kernel; the first that there is counts.
    pub symbols: Vec<String>,
    /// What it does.
    pub role: KernelRole,
    /// The set attaches without it.
    pub optional: bool,
}

/// What kind of addresses a set's blocks have: those of different kinds do not mix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum KernelDomain {
    /// Objects of slab caches.
    Slab = 0,
    /// Pages.
    Pages = 1,
    /// Per-CPU memory.
    Percpu = 2,
    /// Virtually contiguous memory.
    Vmalloc = 3,
}

/// A probe set of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelSetSpec {
    /// Number within the run.
    pub number: u32,
    /// Name, for messages.
    pub name: String,
    /// What its blocks are.
    pub domain: KernelDomain,
    /// Tracepoints, for [`KernelBackend::Tracepoint`].
    pub tracepoints: Vec<KernelTracepoint>,
    /// Functions, for the other ways, and for what no tracepoint tells.
    pub functions: Vec<KernelFunction>,
}

/// Code below which allocations of pages or per-CPU memory are counted elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InnerCode {
    /// First address.
    pub start: u64,
    /// The first address behind it.
    pub end: u64,
    /// The probe set whose allocations there are left out.
    pub probe_set: u32,
}

/// Which allocations are recorded; all frees are followed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelFilter {
    /// Only by these processes; none: by all.
    pub pids: Vec<u32>,
    /// Only in the cgroup of this id and depth, and below.
    pub cgroup: Option<(u64, u32)>,
    /// Only with all of these flags.
    pub gfp: u64,
    /// Smaller ones are not recorded, bytes.
    pub min_size: u64,
    /// Only what comes from slab caches whose name is known. The caller chooses among them; a way in that does not tell the
    /// cache is refused.
    pub by_cache: bool,
}

impl KernelFilter {
    /// Refuses what hands out blocks and does not tell what is asked for: nothing would be shown.
    fn check(&self, what: &str, tells_cache: bool, tells_gfp: bool) -> Result<(), String> {
        let untold = match (self.by_cache && !tells_cache, self.gfp != 0 && !tells_gfp) {
            (true, _) => "the slab cache (kernel.caches)",
            (_, true) => "the allocation flags (kernel.gfp)",
            _ => return Ok(()),
        };
        Err(format!(
            "{what} does not tell {untold} on this kernel; use another kernel.backend, or leave the filter out"
        ))
    }
}

/// Most processes in a [`KernelFilter`].
pub const MAX_KERNEL_PIDS: usize = limits::KERNEL_TGIDS.0 as usize;
/// Most pieces of [`InnerCode`].
pub const MAX_INNER: usize = limits::KERNEL_INNER.0 as usize;

/// Bounds and behaviour of a [`KernelTracker`].
#[derive(Clone, Debug)]
pub struct KernelSettings {
    /// How to attach; `None` takes for each set the best that works.
    pub backend: Option<KernelBackend>,
    /// Addresses of the kernel's functions that a set names, by name.
    pub symbols: Vec<(String, u64)>,
    /// What is probed.
    pub sets: Vec<KernelSetSpec>,
    /// Most outstanding allocations.
    pub max_outstanding: u32,
    /// Most sites, and most stacks.
    pub max_sites: u32,
    /// Most frames of a stack.
    pub max_frames: u32,
    /// Mean bytes between two allocations that are recorded; 0 records all.
    pub sample_bytes: u64,
    /// Which allocations are recorded.
    pub filter: KernelFilter,
    /// Code whose allocations count elsewhere; at most [`MAX_INNER`] pieces.
    pub inner: Vec<InnerCode>,
    /// Record movable pages, too: those of programs and of the page cache.
    pub movable_pages: bool,
    /// Birth generation to begin with.
    pub cohort: u32,
    /// Hand on every allocation and free that is recorded, see [`KernelTracker::next_event`].
    pub trace_events: bool,
}

/// What became of a probe set of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelSetStatus {
    /// Number of the set.
    pub number: u32,
    /// How it is attached, and to what; or why it is not.
    pub state: Result<(KernelBackend, Vec<String>), String>,
    /// Why frees by RCU and of many blocks at a time are not seen; `None` when they are, or there are none.
    pub blind: Option<String>,
}

/// What is known of a site of the kernel: of its first allocation, where they may differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelOrigin {
    /// What is handed out for each block, bytes: the same for all blocks of the site.
    pub object_bytes: u64,
    /// Flags of the allocation.
    pub gfp: u64,
    /// The cgroup of the process, by id.
    pub cgroup: u64,
    /// The process.
    pub pid: u32,
    /// The thread.
    pub tid: u32,
    /// Its name. Hostile text.
    pub comm: String,
    /// Name of the slab cache; empty when it is not known.
    pub cache: String,
    /// Of pages: 2^order of them, of this migrate type.
    pub order: u32,
    /// See `order`.
    pub migrate_type: u32,
}

/// Programs that follow the kernel's allocations, and their books.
pub struct KernelTracker {
    /// Before `skel` is dropped nothing may be attached any more; order of fields is order of dropping.
    _links: Vec<Link>,
    skel: KernelAllocSkel<'static>,
    /// Copies of the programs for single functions.
    copies: Vec<KernelAllocSkel<'static>>,
    names: Names,
    status: Vec<KernelSetStatus>,
    sample_bytes: u64,
    cohort: u32,
    /// Only of a trace.
    rings: Option<Rings>,
}

impl KernelTracker {
    /// Loads the programs and attaches them.
    ///
    /// # Errors
    /// A missing privilege or kernel feature, or no set can be attached: the message says why and what to do.
    pub fn start(settings: &KernelSettings) -> Result<KernelTracker> {
        features::check_kernel()?;
        let layouts = Layouts::read().map_err(|e| Error::new(ErrorKind::Kernel, e))?;
        let plan = tracepoints::Plan::new(settings, &layouts);
        let mut open = open(settings)?;
        plan.select(&mut open);
        let mut skel = open.load().map_err(|e| Error::bpf("load the BPF programs for the kernel", &e))?;
        if let Some(bss) = skel.maps.bss_data.as_deref_mut() {
            bss.cohort_now = settings.cohort;
        }
        let (mut links, mut copies, mut names) = (Vec::new(), Vec::new(), Names::default());
        let (mut status, mut kprobes) = (Vec::new(), None);
        for set in &settings.sets {
            let mut attacher = Attacher {
                settings,
                layouts: &layouts,
                skel: &skel,
                names: &mut names,
                kprobes: &mut kprobes,
                copies: &mut copies,
            };
            status.push(attach(set, &plan, &mut attacher, &mut links));
        }
        if status.iter().all(|s| s.state.is_err()) {
            let why: Vec<String> = (status.iter().zip(&settings.sets))
                .filter_map(|(s, set)| Some(format!("{}: {}", set.name, s.state.as_ref().err()?)))
                .collect();
            let message = format!("nothing of the kernel can be followed: {}", why.join("; "));
            return Err(Error::new(ErrorKind::Kernel, message));
        }
        let rings = settings.trace_events.then(|| Rings::new(None, Some(&skel.maps.events))).transpose()?;
        let (sample_bytes, cohort) = (settings.sample_bytes, settings.cohort);
        Ok(KernelTracker { _links: links, skel, copies, names, status, sample_bytes, cohort, rings })
    }

    /// What became of each probe set.
    pub fn status(&self) -> &[KernelSetStatus] {
        &self.status
    }

    /// Mean bytes between two allocations that are recorded; 0: all are.
    pub fn sample_bytes(&self) -> u64 {
        self.sample_bytes
    }

    /// Name of what was probed, by the number in a [`Stack`].
    pub fn function_name(&self, number: u32) -> &str {
        self.names.get(number).unwrap_or_else(|| tracepoints::name_of(number))
    }

    /// Waits for events, at most `timeout`; a signal ends the wait early. Without [`KernelSettings::trace_events`] there are
    /// none, and it waits for as long.
    ///
    /// # Errors
    /// When polling fails.
    pub fn poll(&self, timeout: Duration) -> Result<()> {
        match &self.rings {
            Some(rings) => rings.poll(timeout),
            None => {
                std::thread::sleep(timeout);
                Ok(())
            }
        }
    }

    /// The next allocation or free that [`KernelTracker::poll`] has brought. Its stack is that of the allocation.
    pub fn next_event(&self) -> Option<Event> {
        self.rings.as_ref()?.next_event()
    }

    /// Totals of every site; their instance is 0.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn read_sites(&self) -> Result<Vec<(SiteKey, SiteTotals)>> {
        reader::read_sites(&self.skel.maps.sites, self.sample_bytes)
    }

    /// What happened so far.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn read_counters(&self) -> Result<Counters> {
        reader::read_counters(&self.skel.maps.counters, 0)
    }

    /// Takes the call stack of a site and what else is known of it out of the kernel's memory: once per site.
    ///
    /// # Errors
    /// When the maps cannot be read.
    pub fn take_origin(&self, key: SiteKey) -> Result<(Option<Stack>, Option<KernelOrigin>)> {
        let maps = &self.skel.maps;
        let stack = reader::read_stack(&maps.stacks, key)?;
        reader::remove_stack(&maps.stacks, key);
        let raw_key = key.to_raw();
        let raw = (maps.origins.lookup(bytes_of(&raw_key), MapFlags::ANY))
            .map_err(|e| Error::bpf("read what is known of a site", &e))?;
        let _ = maps.origins.delete(bytes_of(&raw_key));
        Ok((stack, raw.and_then(|bytes| from_bytes::<memleak_kernel_origin>(&bytes)).map(KernelOrigin::from)))
    }

    /// As [`crate::Tracker::next_cohort`].
    pub fn next_cohort(&mut self) {
        self.cohort = self.cohort.wrapping_add(1);
        if let Some(bss) = self.skel.maps.bss_data.as_deref_mut() {
            bss.cohort_now = self.cohort;
        }
    }

    /// What the programs have used since the kernel began to measure them, and events that the kernel kept from them
    /// because they came while the same program ran.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn run_stats(&self) -> Result<RunStats> {
        let mut sum = RunStats::default();
        let all = std::iter::once(&self.skel).chain(&self.copies).flat_map(|skel| skel.object().progs());
        for prog in all.filter(Program::autoload) {
            let info = info_of(&prog).map_err(|e| Error::bpf("ask what the programs cost", &e))?;
            sum.time_ns += info.run_time_ns;
            sum.runs += info.run_cnt;
            sum.misses += info.recursion_misses;
        }
        Ok(sum)
    }

    /// Bytes of kernel memory that the tables take, about.
    pub fn map_bytes(&self) -> u64 {
        let maps = &self.skel.maps;
        let of = |m: &dyn MapCore| u64::from(m.max_entries()) * u64::from(m.key_size() + m.value_size() + 48);
        of(&maps.blocks) + of(&maps.sites) + of(&maps.stacks) + of(&maps.origins)
    }
}

/// Attaches one set in the first way that works of those that are wanted.
fn attach(
    set: &KernelSetSpec,
    plan: &tracepoints::Plan,
    attacher: &mut Attacher<'_>,
    links: &mut Vec<Link>,
) -> KernelSetStatus {
    let mut reasons = Vec::new();
    let mut state = None;
    for backend in KernelBackend::ALL {
        if attacher.settings.backend.is_some_and(|wanted| wanted != backend) {
            continue;
        }
        let attached = match backend {
            KernelBackend::Tracepoint => plan.attach(set, attacher.skel, links),
            _ => attacher.attach(set, |f| !f.role.is_unseen_by_tracepoints(), backend, links),
        };
        match attached {
            Ok(points) => {
                state = Some((backend, points));
                break;
            }
            Err(why) => reasons.push(format!("{backend}: {why}")),
        }
    }
    let mut blind = None;
    let unseen = |f: &KernelFunction| f.role.is_unseen_by_tracepoints();
    if let Some((_, points)) = state.as_mut().filter(|_| set.functions.iter().any(unseen)) {
        let mut tried = Vec::new();
        for backend in [KernelBackend::Fentry, KernelBackend::Kprobe] {
            match attacher.attach(set, unseen, backend, links) {
                Ok(mut more) => {
                    points.append(&mut more);
                    tried.clear();
                    break;
                }
                Err(why) => tried.push(format!("{backend}: {why}")),
            }
        }
        blind = (!tried.is_empty()).then(|| tried.join("; "));
    }
    KernelSetStatus { number: set.number, state: state.ok_or_else(|| reasons.join("; ")), blind }
}

/// See [`KernelTracker::run_stats`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunStats {
    /// CPU time while it was measured, nanoseconds.
    pub time_ns: u64,
    /// Runs while they were measured.
    pub runs: u64,
    /// Events that were kept from the programs (Linux 5.12+).
    pub misses: u64,
}

fn info_of(prog: &Program<'_>) -> libbpf_rs::Result<libbpf_sys::bpf_prog_info> {
    use std::os::fd::{AsFd, AsRawFd};
    let mut info = libbpf_sys::bpf_prog_info::default();
    let mut len = size_of::<libbpf_sys::bpf_prog_info>() as u32;
    // SAFETY: `info` is a zeroed structure of `len` bytes that the kernel fills; its pointers are NULL with lengths 0.
    let result = unsafe { libbpf_sys::bpf_prog_get_info_by_fd(prog.as_fd().as_raw_fd(), &raw mut info, &raw mut len) };
    if result < 0 { Err(libbpf_rs::Error::from_raw_os_error(-result)) } else { Ok(info) }
}

/// Has the kernel measure what all BPF programs cost, for as long as it lives.
#[derive(Debug)]
pub struct Measuring {
    /// The kernel measures while this is open.
    _enabled: OwnedFd,
}

impl Measuring {
    /// Begins; costs some 30 ns per run of any program.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn begin() -> Result<Self> {
        // SAFETY: no pointers are passed.
        let fd = unsafe { libbpf_sys::bpf_enable_stats(libbpf_sys::BPF_STATS_RUN_TIME) };
        if fd < 0 {
            let cause = std::io::Error::from_raw_os_error(-fd);
            return Err(Error::new(ErrorKind::Kernel, format!("failed to measure BPF programs: {cause}")));
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(Measuring { _enabled: unsafe { OwnedFd::from_raw_fd(fd) } })
    }
}

impl From<memleak_kernel_origin> for KernelOrigin {
    fn from(raw: memleak_kernel_origin) -> Self {
        KernelOrigin {
            object_bytes: raw.object_bytes,
            gfp: raw.gfp,
            cgroup: raw.cgroup,
            pid: raw.pid,
            tid: raw.tid,
            comm: text(&raw.comm),
            cache: text(&raw.cache),
            order: raw.order,
            migrate_type: raw.migrate_type,
        }
    }
}

/// Opens the object and writes the settings into it.
fn open(settings: &KernelSettings) -> Result<OpenKernelAllocSkel<'static>> {
    let what = "open the BPF programs for the kernel";
    // The skeleton borrows its storage. One small box per loaded object, for the life of the program.
    let storage = Box::leak(Box::new(MaybeUninit::uninit()));
    let mut open = KernelAllocSkelBuilder::default().open(storage).map_err(|e| Error::bpf(what, &e))?;
    let bound = |e: &libbpf_rs::Error| Error::bpf("set the size of a BPF map", e);
    let maps = &mut open.maps;
    for (map, entries) in [
        (&mut maps.blocks, settings.max_outstanding),
        (&mut maps.sites, settings.max_sites),
        (&mut maps.stacks, settings.max_sites),
        (&mut maps.origins, settings.max_sites),
        (&mut maps.kernel_pending, limits::KERNEL_PENDING.0),
    ] {
        map.set_max_entries(entries).map_err(|e| bound(&e))?;
        // Allocated beforehand: memory cannot be had in an interrupt, and asking for it would trace itself.
        map.set_map_flags(0).map_err(|e| bound(&e))?;
    }
    maps.counters.set_max_entries(1).map_err(|e| bound(&e))?;
    if settings.trace_events {
        maps.events.set_max_entries(TRACE_RING_BYTES).map_err(|e| bound(&e))?;
    }
    for map in [
        &mut maps.targets,
        &mut maps.launched,
        &mut maps.functions,
        &mut maps.threads,
        &mut maps.unwind_maps,
        &mut maps.unwind_pages,
        &mut maps.unwind_memos,
        &mut maps.python_targets,
        &mut maps.python_threads,
        &mut maps.python_stacks,
        &mut maps.python_codes,
        &mut maps.process_events,
    ] {
        map.set_autocreate(false).map_err(|e| bound(&e))?;
    }
    let rodata = (open.maps.rodata_data.as_deref_mut())
        .ok_or_else(|| Error::new(ErrorKind::Kernel, format!("failed to {what}: no settings section")))?;
    rodata.max_frames = settings.max_frames.clamp(1, MAX_FRAMES as u32);
    rodata.min_size = settings.filter.min_size;
    rodata.sample_bytes = settings.sample_bytes.min(crate::MAX_SAMPLE_BYTES);
    rodata.hash_seed = seed();
    rodata.trace_events = settings.trace_events;
    (rodata.pidns_dev, rodata.pidns_ino) = pid_namespace();
    rodata.own_tgid = std::process::id();
    rodata.can_hold_cpu = features::can_hold_cpu();
    for (slot, pid) in rodata.only_tgids.iter_mut().zip(&settings.filter.pids) {
        *slot = *pid;
    }
    if let Some((id, level)) = settings.filter.cgroup {
        (rodata.only_cgroup, rodata.only_cgroup_level) = (id, level);
    }
    rodata.only_gfp = settings.filter.gfp;
    rodata.page_bytes = page_bytes();
    rodata.cpus = libbpf_rs::num_possible_cpus().map_or(1, |n| n as u64);
    rodata.movable_type = if settings.movable_pages { -1 } else { layout::movable_type() };
    for set in &settings.sets {
        for point in &set.tracepoints {
            if let Some(probe) = tracepoints::find(&point.name) {
                rodata.probe_sets[probe.number()] = set.number;
            }
        }
    }
    let mut count = 0;
    for code in &settings.inner {
        let Some(set) = settings.sets.iter().find(|s| s.number == code.probe_set) else { continue };
        if let Some(slot) = rodata.inner.get_mut(count) {
            *slot = memleak_kernel_range { start: code.start, end: code.end, domain: set.domain as u64 };
            count += 1;
        }
    }
    rodata.inner_count = count as u32;
    Ok(open)
}

/// Bytes of a page.
pub fn page_bytes() -> u64 {
    // SAFETY: no pointers are passed.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).unwrap_or(4096)
}
