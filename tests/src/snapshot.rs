//! memleak's JSON snapshots as values that tests compare.

use std::fmt;

use serde::Deserialize;

/// Running totals, as printed for a site or a whole snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Counts {
    /// Bytes allocated.
    pub allocated_bytes: u64,
    /// Blocks allocated.
    pub allocated_count: u64,
    /// Bytes freed.
    pub freed_bytes: u64,
    /// Blocks freed.
    pub freed_count: u64,
    /// Bytes allocated and not freed.
    pub outstanding_bytes: u64,
    /// Blocks allocated and not freed.
    pub outstanding_count: u64,
}

impl Counts {
    /// `count` blocks of `size` bytes, none of them freed.
    pub fn kept(count: u64, size: u64) -> Self {
        Counts {
            allocated_bytes: count * size,
            allocated_count: count,
            outstanding_bytes: count * size,
            outstanding_count: count,
            ..Counts::default()
        }
    }

    /// `count` blocks of `size` bytes, all of them freed.
    pub fn freed(count: u64, size: u64) -> Self {
        Counts {
            allocated_bytes: count * size,
            allocated_count: count,
            freed_bytes: count * size,
            freed_count: count,
            ..Counts::default()
        }
    }

    /// The sum of both.
    #[must_use]
    pub fn plus(self, other: Counts) -> Self {
        Counts {
            allocated_bytes: self.allocated_bytes + other.allocated_bytes,
            allocated_count: self.allocated_count + other.allocated_count,
            freed_bytes: self.freed_bytes + other.freed_bytes,
            freed_count: self.freed_count + other.freed_count,
            outstanding_bytes: self.outstanding_bytes + other.outstanding_bytes,
            outstanding_count: self.outstanding_count + other.outstanding_count,
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} blocks of {} B, {} of {} B freed, {} of {} B outstanding",
            self.allocated_count,
            self.allocated_bytes,
            self.freed_count,
            self.freed_bytes,
            self.outstanding_count,
            self.outstanding_bytes
        )
    }
}

/// One frame of a call stack.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct FrameView {
    /// Function name; `None` when unknown.
    pub function: Option<String>,
    /// Mapped file.
    pub module: Option<String>,
    /// Source file.
    pub file: Option<String>,
    /// Line in `file`.
    pub line: Option<u32>,
    /// True for an inlined call.
    #[serde(default)]
    pub inlined: bool,
    /// Return address.
    pub address: u64,
}

/// One allocation site.
#[derive(Clone, Debug, Deserialize)]
pub struct SiteView {
    /// Stable identity, 16 hexadecimal digits.
    pub id: String,
    /// The process.
    pub pid: u32,
    /// Probe set.
    pub probe_set: String,
    /// Allocator function.
    pub function: String,
    /// What was counted.
    #[serde(flatten)]
    pub counts: Counts,
    /// Standard error of the outstanding bytes.
    pub outstanding_bytes_stderr: f64,
    /// Standard error of the number of outstanding blocks.
    pub outstanding_count_stderr: f64,
    /// Call stack, innermost frame first.
    pub frames: Vec<FrameView>,
    /// Why the stack ends early.
    pub truncated: Option<String>,
    /// What scans of the process's memory say; `None` before there was one.
    pub reachability: Option<Reachability>,
    /// What is known of a site of the kernel; `None` for those of processes.
    pub kernel: Option<KernelView>,
}

/// What is known of a site of the kernel.
#[derive(Clone, Debug, Deserialize)]
pub struct KernelView {
    /// Slab cache.
    pub cache: Option<String>,
    /// Bytes that are handed out for each block.
    pub object_bytes: u64,
    /// What is handed out beyond what was asked for.
    pub slack_bytes: u64,
    /// Flags of the allocation.
    pub gfp: String,
    /// Name of the process that allocated first.
    pub first_comm: String,
    /// Blocks whose free was not seen.
    pub unseen_frees: u64,
    /// Why it cannot be told whether its blocks were freed.
    pub unverifiable: Option<String>,
}

/// What scans say of a site.
#[derive(Clone, Debug, Deserialize)]
pub struct Reachability {
    /// `definite`, `possible`, `reachable` or `unknown`.
    pub verdict: String,
    /// Blocks that nothing refers to.
    pub lost: Tally,
    /// Blocks that only lost blocks refer to.
    pub indirectly_lost: Tally,
    /// Blocks that can be reached.
    pub reachable: Tally,
    /// Blocks that were called lost.
    pub called_lost: u64,
    /// Of these, those that were freed later.
    pub refuted: u64,
    /// From a root to one of the blocks.
    pub way: Option<String>,
}

/// Blocks and their bytes.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Tally {
    /// Blocks.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Tally {
    /// The sum of both.
    #[must_use]
    pub fn plus(self, other: Tally) -> Self {
        Tally { blocks: self.blocks + other.blocks, bytes: self.bytes + other.bytes }
    }
}

impl SiteView {
    /// Function name of the innermost frame: the one that called the allocator.
    pub fn caller(&self) -> Option<&str> {
        self.frames.first()?.function.as_deref()
    }

    /// True when the function is anywhere in the call stack.
    pub fn passes(&self, function: &str) -> bool {
        self.frames.iter().any(|frame| frame.function.as_deref() == Some(function))
    }
}

/// What is counted of every call of a sampled process.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct SamplingView {
    /// Mean bytes between two samples.
    pub mean_bytes: u64,
    /// Bytes allocated, recorded or not.
    pub allocated_bytes: u64,
    /// Blocks allocated, recorded or not.
    pub allocated_count: u64,
}

/// How much of a process's growth its sites explain, in bytes.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Coverage {
    /// Growth of the resident anonymous memory.
    pub growth_bytes: i64,
    /// The part that is outstanding at sites.
    pub explained_bytes: Option<u64>,
    /// At most this much of the rest is in mappings without traced blocks.
    pub mapped_bytes: Option<u64>,
    /// What is left.
    pub other_bytes: Option<u64>,
    /// The explained part, 0 to 1.
    pub share: Option<f64>,
}

/// One watched process.
#[derive(Clone, Debug, Deserialize)]
pub struct ProcessView {
    /// Process id.
    pub pid: u32,
    /// Short name.
    pub comm: String,
    /// Container, runtime, pod, unit and slice, those that are known.
    pub labels: std::collections::BTreeMap<String, Option<String>>,
    /// False once it has exited or called exec.
    pub alive: bool,
    /// `exact`, `sampled` or `estimated`.
    pub mode: String,
    /// What was counted in whole; `None` when every allocation is recorded.
    pub sampling: Option<SamplingView>,
    /// Traced calls.
    pub hits: u64,
    /// Frees of blocks that were not in the table.
    pub unmatched_frees: u64,
    /// Windows opened so far.
    pub windows: u64,
    /// Those of them that do not count.
    pub windows_discarded: u64,
    /// Seconds for which windows were open.
    pub open_s: f64,
    /// Share of complete stacks, 0 to 1.
    pub complete_stacks: Option<f64>,
    /// How often all tracing was stopped for a while.
    pub hard_stops: u64,
    /// Why nothing is attached now.
    pub stopped: Option<String>,
    /// Resident anonymous memory.
    pub rss_anon_bytes: Option<u64>,
    /// How much of the growth the sites explain.
    pub coverage: Option<Coverage>,
    /// What was lost, by kind.
    pub losses: std::collections::BTreeMap<String, u64>,
}

impl ProcessView {
    /// The losses of one kind.
    ///
    /// # Panics
    /// When memleak does not report that kind: a renamed field must not read as zero.
    pub fn lost(&self, kind: &str) -> u64 {
        *self.losses.get(kind).unwrap_or_else(|| panic!("no losses of kind {kind} in {:?}", self.losses))
    }
}

/// Everything that memleak says of one instant.
#[derive(Clone, Debug, Deserialize)]
pub struct Snapshot {
    /// Number, from 1.
    pub number: u64,
    /// Seconds since the collector started.
    pub time_s: f64,
    /// Watched processes.
    pub processes: Vec<ProcessView>,
    /// Sum over all sites.
    pub totals: Counts,
    /// All sites.
    pub sites: Vec<SiteView>,
}

impl Snapshot {
    /// The sum over all sites of all processes whose innermost function is `function`; zero when there is none.
    pub fn at(&self, function: &str) -> Counts {
        self.sum(|site| site.caller() == Some(function))
    }

    /// The sum over all sites with `function` somewhere in the stack.
    pub fn through(&self, function: &str) -> Counts {
        self.sum(|site| site.passes(function))
    }

    /// The sum over all sites that satisfy `wanted`.
    pub fn sum(&self, wanted: impl Fn(&SiteView) -> bool) -> Counts {
        self.sites.iter().filter(|site| wanted(site)).fold(Counts::default(), |sum, site| sum.plus(site.counts))
    }

    /// The only site whose innermost function is `function`.
    ///
    /// # Panics
    /// When there is none or more than one.
    pub fn site(&self, function: &str) -> &SiteView {
        let found: Vec<_> = self.sites.iter().filter(|site| site.caller() == Some(function)).collect();
        assert_eq!(found.len(), 1, "sites at {function}; all: {:#?}", self.callers());
        found[0]
    }

    /// The newest instance of a process.
    ///
    /// # Panics
    /// When it is not watched.
    pub fn process(&self, pid: u32) -> &ProcessView {
        self.processes
            .iter()
            .rev()
            .find(|process| process.pid == pid)
            .unwrap_or_else(|| panic!("process {pid} is not among {:?}", self.processes))
    }

    /// True when a process of that id is watched and alive.
    pub fn watches(&self, pid: u32) -> bool {
        self.processes.iter().any(|process| process.pid == pid && process.alive)
    }

    /// One line per site, for messages of failed tests.
    pub fn callers(&self) -> Vec<String> {
        self.sites
            .iter()
            .map(|site| {
                let stack: Vec<_> =
                    site.frames.iter().take(4).map(|frame| frame.function.as_deref().unwrap_or("?")).collect();
                format!("{} {} {} <- {}: {}", site.pid, site.probe_set, site.function, stack.join(" <- "), site.counts)
            })
            .collect()
    }
}
