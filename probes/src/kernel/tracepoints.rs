//! The tracepoints that there are programs for, and how they are attached.

use libbpf_rs::Link;
use libbpf_rs::skel::{OpenSkel, Skel};

use super::layout::Layouts;
use super::{KernelBackend, KernelSetSpec, KernelSetStatus, KernelSettings};
use crate::skeleton::kernel_alloc::{KernelAllocSkel, OpenKernelAllocSkel};
use crate::types::{memleak_kernel_layout, memleak_kernel_probe as probe_kind};

/// A tracepoint with a program for it.
pub(super) struct Known {
    /// `system:event`.
    pub(super) name: &'static str,
    program: &'static str,
    probe: probe_kind,
    /// Addresses of its blocks are told apart from those of other domains, see kernel_domain().
    domain: u64,
    allocates: bool,
}

impl Known {
    pub(super) fn number(&self) -> usize {
        self.probe.0 as usize
    }

    /// The name without its system.
    pub(super) fn event(&self) -> &'static str {
        self.name.split_once(':').map_or(self.name, |(_, event)| event)
    }
}

const fn known(name: &'static str, program: &'static str, probe: probe_kind, domain: u64, allocates: bool) -> Known {
    Known { name, program, probe, domain, allocates }
}

pub(super) const KNOWN: [Known; 12] = [
    known("kmem:kmalloc", "tp_kmalloc", probe_kind::KERNEL_KMALLOC, 0, true),
    known("kmem:kmalloc_node", "tp_kmalloc_node", probe_kind::KERNEL_KMALLOC_NODE, 0, true),
    known("kmem:kmem_cache_alloc", "tp_kmem_cache_alloc", probe_kind::KERNEL_CACHE_ALLOC, 0, true),
    known("kmem:kmem_cache_alloc_node", "tp_kmem_cache_alloc_node", probe_kind::KERNEL_CACHE_ALLOC_NODE, 0, true),
    known("kmem:kfree", "tp_kfree", probe_kind::KERNEL_KFREE, 0, false),
    known("kmem:kmem_cache_free", "tp_kmem_cache_free", probe_kind::KERNEL_CACHE_FREE, 0, false),
    known("kmem:mm_page_alloc", "tp_mm_page_alloc", probe_kind::KERNEL_PAGE_ALLOC, 1, true),
    known("kmem:mm_page_free", "tp_mm_page_free", probe_kind::KERNEL_PAGE_FREE, 1, false),
    known("percpu:percpu_alloc_percpu", "tp_percpu_alloc", probe_kind::KERNEL_PERCPU_ALLOC, 2, true),
    known("percpu:percpu_free_percpu", "tp_percpu_free", probe_kind::KERNEL_PERCPU_FREE, 2, false),
    known("vmalloc:alloc_vmap_area", "tp_vmap_alloc", probe_kind::KERNEL_VMAP_ALLOC, 3, true),
    known("vmalloc:free_vmap_area_noflush", "tp_vmap_free", probe_kind::KERNEL_VMAP_FREE, 3, false),
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

/// Domains of a set's blocks.
pub(super) fn domains(set: &KernelSetSpec) -> impl Iterator<Item = u64> + '_ {
    set.tracepoints.iter().filter_map(|t| find(&t.name)).map(|k| k.domain)
}

/// A tracepoint of this kernel, and where it has what.
type Point = (&'static Known, memleak_kernel_layout);

/// What is to be attached.
pub(super) struct Plan {
    sets: Vec<(u32, Result<Vec<Point>, String>)>,
}

impl Plan {
    /// Finds where each tracepoint has what.
    pub(super) fn new(settings: &KernelSettings) -> Self {
        let layouts = Layouts::read();
        let wanted = settings.backend.is_none_or(|b| b == KernelBackend::Tracepoint);
        let sets = settings.sets.iter().map(|set| {
            let found = match (&layouts, wanted) {
                (_, false) => Err("tracepoints are not wanted (kernel.backend)".to_owned()),
                (Err(why), _) => Err(why.clone()),
                (Ok(layouts), _) => plan(set, layouts),
            };
            (set.number, found)
        });
        Plan { sets: sets.collect() }
    }

    /// Has the programs loaded that will be attached.
    pub(super) fn select(&mut self, open: &mut OpenKernelAllocSkel<'static>) {
        let points: Vec<_> = self.sets.iter().filter_map(|(_, f)| f.as_ref().ok()).flatten().collect();
        if let Some(rodata) = open.maps.rodata_data.as_deref_mut() {
            for (known, layout) in &points {
                rodata.layouts[known.number()] = *layout;
            }
        }
        for mut prog in open.open_object_mut().progs_mut() {
            let load = points.iter().any(|(known, _)| prog.name() == known.program);
            prog.set_autoload(load);
        }
    }

    /// Attaches; first what frees, so that nothing is recorded whose free is not seen.
    pub(super) fn attach(self, skel: &mut KernelAllocSkel<'static>, links: &mut Vec<Link>) -> Vec<KernelSetStatus> {
        let mut status = Vec::new();
        for (number, points) in self.sets {
            let state = points.and_then(|mut points| {
                points.sort_by_key(|(known, _)| known.allocates);
                let mut attached = Vec::new();
                for (known, _) in points {
                    let prog = skel.object_mut().progs_mut().find(|p| p.name() == known.program);
                    let prog = prog.ok_or_else(|| format!("there is no program {}", known.program))?;
                    let link = prog.attach_raw_tracepoint(known.event());
                    links.push(link.map_err(|e| format!("failed to attach to tracepoint {}: {e:#}", known.name))?);
                    attached.push(known.name.to_owned());
                }
                Ok((KernelBackend::Tracepoint, attached))
            });
            status.push(KernelSetStatus { number, state });
        }
        status
    }
}

fn plan(set: &KernelSetSpec, layouts: &Layouts) -> Result<Vec<Point>, String> {
    let mut points = Vec::new();
    for point in &set.tracepoints {
        let known = find(&point.name).ok_or_else(|| format!("there is no program for tracepoint {}", point.name))?;
        match layouts.of(known) {
            Ok(layout) => points.push((known, layout)),
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
