//! Settings of the kernel as a target (`[kernel]`).

use super::decode::{percent, pids, sample_bytes};
use super::read::{Section, string, wrong_type};
use super::tree::{Node, Value};
use super::{parse_cgroup, parse_glob};
use crate::units::Bytes;

/// How the kernel's own allocations are watched.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelSettings {
    /// The kernel is a target.
    pub enabled: bool,
    /// How to attach.
    pub backend: KernelBackend,
    /// Mean bytes between two allocations that are recorded; 0 records all.
    pub sample_bytes: Bytes,
    /// Part of all CPU time that tracing may cost, 0 to 1; `None`: whatever it costs.
    pub budget: Option<f64>,
    /// Most outstanding allocations that are followed.
    pub max_outstanding: u32,
    /// Most allocation sites.
    pub max_sites: u32,
    /// Smaller allocations are not recorded.
    pub min_size: Bytes,
    /// Only sites of slab caches that match; none: all.
    pub caches: Vec<String>,
    /// Only sites with code of a module that matches; none: all.
    pub modules: Vec<String>,
    /// Only allocations with all of these flags.
    pub gfp: Vec<String>,
    /// Only allocations by these processes; none: all.
    pub pids: Vec<u32>,
    /// Only allocations in this cgroup and below it.
    pub cgroup: Option<String>,
    /// Also pages of programs and files.
    pub movable_pages: bool,
}

impl Default for KernelSettings {
    fn default() -> Self {
        KernelSettings {
            enabled: false,
            backend: KernelBackend::Auto,
            sample_bytes: Bytes(0),
            budget: Some(0.05),
            max_outstanding: 1_000_000,
            max_sites: 32_768,
            min_size: Bytes(0),
            caches: Vec::new(),
            modules: Vec::new(),
            gfp: Vec::new(),
            pids: Vec::new(),
            cgroup: None,
            movable_pages: false,
        }
    }
}

/// How the kernel's allocations are caught.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KernelBackend {
    /// For each probe set the best that works here.
    #[default]
    Auto,
    /// Raw tracepoints.
    Tracepoint,
    /// Trampolines at functions.
    Fentry,
    /// Breakpoints at functions.
    Kprobe,
}

/// Reads the table.
pub(super) fn kernel(mut s: Section<'_>, k: &mut KernelSettings) {
    s.boolean("enabled", &mut k.enabled);
    let backends = [
        ("auto", KernelBackend::Auto),
        ("tracepoint", KernelBackend::Tracepoint),
        ("fentry", KernelBackend::Fentry),
        ("kprobe", KernelBackend::Kprobe),
    ];
    s.choice("backend", &backends, &mut k.backend);
    if let Some(mean) = s.read("sample_bytes", sample_bytes) {
        k.sample_bytes = mean;
    }
    let budget = |node: &Node| match string(node) {
        Ok("off") => Ok(None),
        _ => percent(node).map(Some),
    };
    if let Some(budget) = s.read("budget", budget) {
        k.budget = budget;
    }
    s.integer("max_outstanding", 1..=200_000_000, &mut k.max_outstanding);
    s.integer("max_sites", 1..=4_194_304, &mut k.max_sites);
    s.bytes("min_size", Bytes(0)..=Bytes(1 << 40), &mut k.min_size);
    for (key, out) in [("caches", &mut k.caches), ("modules", &mut k.modules)] {
        if let Some(globs) = s.read(key, |node| texts(node, parse_glob)) {
            *out = globs;
        }
    }
    if let Some(flags) = s.read("gfp", |node| texts(node, |text| Ok(text.to_owned()))) {
        k.gfp = flags;
    }
    let most = memleak_probes::kernel::MAX_KERNEL_PIDS;
    let some_pids = |node: &Node| match pids(node)? {
        list if list.len() > most => Err(format!("{} processes are too many: at most {most}", list.len())),
        list => Ok(list),
    };
    if let Some(list) = s.read("pids", some_pids) {
        k.pids = list;
    }
    s.text("cgroup", &mut k.cgroup, parse_cgroup);
    s.boolean("movable_pages", &mut k.movable_pages);
    s.finish();
}

/// One text or a list of them, each checked.
fn texts(node: &Node, check: impl Fn(&str) -> Result<String, String>) -> Result<Vec<String>, String> {
    match &node.value {
        Value::Array(items) => items.iter().map(|item| check(string(item)?)).collect(),
        Value::String(text) if text.is_empty() => Ok(Vec::new()),
        Value::String(text) => Ok(vec![check(text)?]),
        _ => match &node.raw {
            Some(raw) => Ok(vec![check(raw)?]),
            None => Err(wrong_type("a list of strings", node)),
        },
    }
}
