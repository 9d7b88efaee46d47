//! What is known of the kernel as a target: facts about its sites, and how the traced allocations compare with what the
//! kernel says of itself. Attaches nothing; see `collector::kernel`.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::output::filters::{format_count, format_percent};
use crate::output::text::visible;
use crate::units::format_bytes;

pub mod gfp;
pub mod judge;
pub mod statistics;

/// What the kernel is called where a process has a name.
pub const COMM: &str = "kernel";

/// A site of the kernel in one snapshot, beside its totals.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KernelSample {
    /// Facts that do not change.
    pub origin: Arc<Origin>,
    /// Blocks whose free was not seen: their address was handed out again.
    pub unseen_frees: u64,
    /// Why it cannot be told whether what is outstanding was freed; `None` when it can.
    pub unverifiable: Option<Arc<str>>,
    /// What its slab cache has grown by since the start, in objects in use, bytes; `None` when that is not known.
    pub cache_growth_bytes: Option<i64>,
    /// The kernel gives the cache's objects back when memory is short.
    pub reclaimable: bool,
}

/// Facts of a site of the kernel: of its first allocation, where allocations differ.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Slab cache, such as `kmalloc-64`; `None` when there is none or it is not known.
    pub cache: Option<String>,
    /// Bytes that are handed out for each block.
    pub object_bytes: u64,
    /// Flags of the allocation, such as `GFP_KERNEL|__GFP_ZERO`; in hexadecimal where this kernel does not name them.
    pub gfp: String,
    /// Process that allocated first (with interrupts: that was interrupted).
    pub first_pid: u32,
    /// Its thread.
    pub first_tid: u32,
    /// Its name. Hostile text.
    pub first_comm: String,
    /// Id of its cgroup.
    pub cgroup: u64,
    /// Of pages: 2^order of them.
    pub order: u32,
    /// Of pages: migrate type, as the kernel numbers them.
    pub migrate_type: u32,
}

impl KernelSample {
    /// What is handed out beyond what was asked for, of the outstanding blocks, bytes.
    pub fn slack_bytes(&self, outstanding_count: u64, outstanding_bytes: u64) -> u64 {
        self.origin.object_bytes.saturating_mul(outstanding_count).saturating_sub(outstanding_bytes)
    }
}

/// How traced allocations compare with the kernel's own statistics, since the start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KernelSummary {
    /// How each probe set is attached; `None`: not.
    pub probe_sets: Vec<SetState>,
    /// What the kernel's slabs have grown by (`Slab` of /proc/meminfo), bytes.
    pub slab_growth_bytes: Option<i64>,
    /// Growth of vmalloc memory (`VmallocUsed`), bytes.
    pub vmalloc_growth_bytes: Option<i64>,
    /// Growth of per-CPU memory (`Percpu`), bytes.
    pub percpu_growth_bytes: Option<i64>,
    /// What caches that have grown have grown by, in objects in use, bytes; `None` when /proc/slabinfo cannot be read.
    pub cache_growth_bytes: Option<u64>,
    /// How much of that the sites explain, bytes.
    pub explained_bytes: Option<u64>,
    /// The same as a part, 0 to 1; `None` when nothing has grown.
    pub explained_share: Option<f64>,
    /// Caches with the largest growth or the most outstanding.
    pub caches: Vec<CacheLine>,
    /// Events that the kernel kept from the programs, because they came while the same program ran.
    pub missed_events: u64,
    /// Sites that are unverifiable.
    pub unverifiable_sites: u64,
    /// What is outstanding at them, bytes.
    pub unverifiable_bytes: u64,
}

/// Caches that are named in a report.
const NAMED_CACHES: usize = 3;

impl KernelSummary {
    /// What a report says of it, one sentence each.
    pub fn sentences(&self) -> Vec<String> {
        let mut out = Vec::new();
        if let (Some(grown), Some(explained), Some(share)) =
            (self.cache_growth_bytes, self.explained_bytes, self.explained_share)
        {
            let mut largest: Vec<&CacheLine> = self.caches.iter().filter(|c| c.growth > 0).collect();
            largest.sort_by_key(|c| std::cmp::Reverse(c.growth.unsigned_abs().saturating_mul(c.object_bytes)));
            let largest: Vec<String> = (largest.iter().take(NAMED_CACHES))
                .map(|c| {
                    let bytes = format_bytes(c.growth.unsigned_abs().saturating_mul(c.object_bytes));
                    format!("{} by {bytes}", visible(&c.name))
                })
                .collect();
            out.push(format!(
                "Slab caches of the kernel that have grown since the start have grown by {} (/proc/slabinfo): sites explain \
                 {} ({}). The largest: {}.",
                format_bytes(grown),
                format_bytes(explained),
                format_percent(share),
                largest.join(", ")
            ));
        }
        if self.unverifiable_sites > 0 {
            out.push(format!(
                "{} sites of the kernel with {} outstanding are unverifiable, because some of their frees cannot be followed: \
                 they make no finding.",
                format_count(self.unverifiable_sites as f64),
                format_bytes(self.unverifiable_bytes)
            ));
        }
        for set in self.probe_sets.iter().filter(|s| s.blind.is_some()) {
            out.push(format!(
                "{}: objects that are handed to RCU or freed many at a time are not seen being freed on this machine.",
                visible(&set.name)
            ));
        }
        if self.missed_events > 0 {
            out.push(format!(
                "{} events were kept from the programs by the kernel, because they came while the same program ran.",
                format_count(self.missed_events as f64)
            ));
        }
        out
    }
}

/// How a probe set of the kernel is attached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetState {
    /// Name of the probe set.
    pub name: String,
    /// `tracepoint`, `fentry` or `kprobe`; `None`: it is not attached.
    pub backend: Option<String>,
    /// Why it is not.
    pub failed: Option<String>,
    /// Why frees by RCU and of many blocks at a time are not seen.
    pub blind: Option<String>,
}

/// One cache: what it says of itself, and what was traced.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheLine {
    /// Name.
    pub name: String,
    /// Bytes of an object.
    pub object_bytes: u64,
    /// Objects in use now; the kernel counts free ones on the CPUs' own lists as in use.
    pub active: u64,
    /// More than at the start.
    pub growth: i64,
    /// Blocks that were traced and are outstanding.
    pub outstanding: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever reads the report must see how much of the growth it explains, and what it leaves out.
    #[test]
    fn the_report_says_what_is_explained_and_what_is_not() {
        let line = CacheLine { name: "dentry".into(), object_bytes: 192, active: 9000, growth: 1000, outstanding: 500 };
        let summary = KernelSummary {
            cache_growth_bytes: Some(192_000),
            explained_bytes: Some(96_000),
            explained_share: Some(0.5),
            caches: vec![line],
            unverifiable_sites: 2,
            unverifiable_bytes: 2048,
            ..KernelSummary::default()
        };
        let text = summary.sentences().join(" ");
        for part in ["187.5 KiB", "(50 %)", "dentry by 187.5 KiB", "2 sites", "2.0 KiB outstanding"] {
            assert!(text.contains(part), "{part} is missing in {text}");
        }
        assert!(KernelSummary::default().sentences().is_empty());
    }
}
