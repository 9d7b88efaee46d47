//! The tracepoints that there are programs for, and how they are attached.

use libbpf_rs::skel::OpenSkel;
use libbpf_rs::{Link, ProgramMut};

use super::layout::{Layouts, NONE};
use super::{KernelBackend, KernelFilter, KernelSetSpec, KernelSettings};
use crate::skeleton::kernel_alloc::{KernelAllocSkel, OpenKernelAllocSkel};
use crate::types::{memleak_kernel_layout, memleak_kernel_probe as probe_kind};

/// A tracepoint with a program for it.
pub(super) struct Known {
    /// `system:event`.
    pub(super) name: &'static str,
    program: &'static str,
    probe: probe_kind,
    allocates: bool,
}

impl Known {
    pub(super) fn number(&self) -> usize {
        self.probe.0 as usize
    }

    /// Its sizes tell the cache.
    fn is_kmalloc(&self) -> bool {
        matches!(self.probe, probe_kind::KERNEL_KMALLOC | probe_kind::KERNEL_KMALLOC_NODE)
    }

    fn program_in<'a>(&self, skel: &'a KernelAllocSkel<'static>) -> &'a ProgramMut<'a> {
        let progs = &skel.progs;
        match self.probe {
            probe_kind::KERNEL_KMALLOC => &progs.tp_kmalloc,
            probe_kind::KERNEL_KMALLOC_NODE => &progs.tp_kmalloc_node,
            probe_kind::KERNEL_CACHE_ALLOC => &progs.tp_kmem_cache_alloc,
            probe_kind::KERNEL_CACHE_ALLOC_NODE => &progs.tp_kmem_cache_alloc_node,
            probe_kind::KERNEL_KFREE => &progs.tp_kfree,
            probe_kind::KERNEL_CACHE_FREE => &progs.tp_kmem_cache_free,
            probe_kind::KERNEL_PAGE_ALLOC => &progs.tp_mm_page_alloc,
            probe_kind::KERNEL_PAGE_FREE => &progs.tp_mm_page_free,
            probe_kind::KERNEL_PERCPU_ALLOC => &progs.tp_percpu_alloc,
            probe_kind::KERNEL_PERCPU_FREE => &progs.tp_percpu_free,
            probe_kind::KERNEL_VMAP_ALLOC => &progs.tp_vmap_alloc,
            _ => &progs.tp_vmap_free,
        }
    }

    /// The name without its system.
    pub(super) fn event(&self) -> &'static str {
        self.name.split_once(':').map_or(self.name, |(_, event)| event)
    }
}

const fn known(name: &'static str, program: &'static str, probe: probe_kind, allocates: bool) -> Known {
    Known { name, program, probe, allocates }
}

pub(super) const KNOWN: [Known; 12] = [
    known("kmem:kmalloc", "tp_kmalloc", probe_kind::KERNEL_KMALLOC, true),
    known("kmem:kmalloc_node", "tp_kmalloc_node", probe_kind::KERNEL_KMALLOC_NODE, true),
    known("kmem:kmem_cache_alloc", "tp_kmem_cache_alloc", probe_kind::KERNEL_CACHE_ALLOC, true),
    known("kmem:kmem_cache_alloc_node", "tp_kmem_cache_alloc_node", probe_kind::KERNEL_CACHE_ALLOC_NODE, true),
    known("kmem:kfree", "tp_kfree", probe_kind::KERNEL_KFREE, false),
    known("kmem:kmem_cache_free", "tp_kmem_cache_free", probe_kind::KERNEL_CACHE_FREE, false),
    known("kmem:mm_page_alloc", "tp_mm_page_alloc", probe_kind::KERNEL_PAGE_ALLOC, true),
    known("kmem:mm_page_free", "tp_mm_page_free", probe_kind::KERNEL_PAGE_FREE, false),
    known("percpu:percpu_alloc_percpu", "tp_percpu_alloc", probe_kind::KERNEL_PERCPU_ALLOC, true),
    known("percpu:percpu_free_percpu", "tp_percpu_free", probe_kind::KERNEL_PERCPU_FREE, false),
    known("vmalloc:alloc_vmap_area", "tp_vmap_alloc", probe_kind::KERNEL_VMAP_ALLOC, true),
    known("vmalloc:free_vmap_area_noflush", "tp_vmap_free", probe_kind::KERNEL_VMAP_FREE, false),
];

/// Whether there is a program for a tracepoint.
pub fn is_known(name: &str) -> bool {
    find(name).is_some()
}

pub(super) fn find(name: &str) -> Option<&'static Known> {
    KNOWN.iter().find(|k| k.name == name)
}

/// What a stack's `name` stands for.
pub(super) fn name_of(number: u32) -> &'static str {
    KNOWN.iter().find(|k| k.probe.0 == number).map_or("?", Known::event)
}

/// A tracepoint of this kernel, and where it has what.
type Point = (&'static Known, memleak_kernel_layout);

/// What is to be attached.
pub(super) struct Plan {
    sets: Vec<(u32, Result<Vec<Point>, String>)>,
}

impl Plan {
    /// Finds where each tracepoint has what.
    pub(super) fn new(settings: &KernelSettings, layouts: &Layouts) -> Self {
        let wanted = settings.backend.is_none_or(|b| b == KernelBackend::Tracepoint);
        let found = |set| if wanted { plan(set, layouts, &settings.filter) } else { Err("not wanted".to_owned()) };
        Plan { sets: settings.sets.iter().map(|set| (set.number, found(set))).collect() }
    }

    /// Has the programs loaded that will be attached.
    pub(super) fn select(&self, open: &mut OpenKernelAllocSkel<'static>) {
        let points: Vec<&Point> = self.sets.iter().filter_map(|(_, f)| f.as_ref().ok()).flatten().collect();
        if let Some(rodata) = open.maps.rodata_data.as_deref_mut() {
            for (known, layout) in &points {
                rodata.layouts[known.number()] = *layout;
            }
        }
        for mut prog in open.open_object_mut().progs_mut() {
            let planned = points.iter().any(|(known, _)| prog.name() == known.program);
            prog.set_autoload(planned);
        }
    }

    /// Attaches a set; first what frees, so that nothing is recorded whose free is not seen.
    pub(super) fn attach(
        &self,
        set: &KernelSetSpec,
        skel: &KernelAllocSkel<'static>,
        links: &mut Vec<Link>,
    ) -> Result<Vec<String>, String> {
        let planned = self.sets.iter().find(|(number, _)| *number == set.number);
        let mut points = planned.map_or_else(|| Err("not planned".to_owned()), |(_, points)| points.clone())?;
        points.sort_by_key(|(known, _)| known.allocates);
        let mut new = Vec::new();
        for (known, _) in &points {
            let link = known.program_in(skel).attach_raw_tracepoint(known.event());
            new.push(link.map_err(|e| format!("failed to attach to tracepoint {}: {e:#}", known.name))?);
        }
        links.append(&mut new);
        Ok(points.iter().map(|(known, _)| known.name.to_owned()).collect())
    }
}

fn plan(set: &KernelSetSpec, layouts: &Layouts, filter: &KernelFilter) -> Result<Vec<Point>, String> {
    let mut points = Vec::new();
    for point in &set.tracepoints {
        let known = find(&point.name).ok_or_else(|| format!("there is no program for tracepoint {}", point.name))?;
        match layouts.of(known) {
            Ok(layout) => {
                if known.allocates {
                    let what = format!("tracepoint {}", known.name);
                    filter.check(&what, known.is_kmalloc() || layout.cache != NONE, layout.gfp != NONE)?;
                }
                points.push((known, layout));
            }
            Err(_) if point.optional => {}
            Err(why) => return Err(why),
        }
    }
    for (allocates, what) in [(true, "hands out"), (false, "takes back")] {
        if !points.iter().any(|(known, _)| known.allocates == allocates) {
            return Err(format!("this kernel has no tracepoint that {what} blocks"));
        }
    }
    Ok(points)
}
