//! Synthetic processes: heaps whose blocks are born and die by a shape, sampled at an interval.
//!
//! For the examples of rules (`memleak rules test`) and for tests of rules. The same seed gives the same numbers.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};

use crate::history::{Bounds, History};
use crate::kernel::KernelSample;
use crate::snapshot::{
    Cohort, LIFETIME_CLASSES, Process, ProcessSample, Site, SiteKey, SiteReach, SiteSample, Snapshot, StandardErrors,
    Totals,
};
use crate::symbolize::Frame;

pub mod shapes;

/// Births that a site keeps apart, as the collector does.
const RING: usize = 15;

/// Random numbers from a fixed seed (SplitMix64).
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 (included) to 1 (excluded).
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Exponentially distributed with this mean: the time to the next event, or a lifetime.
    pub fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }

    /// Number of events in a time with this mean.
    pub fn poisson(&mut self, mean: f64) -> u64 {
        let mut n = 0;
        let mut t = self.exponential(1.0);
        while t < mean {
            n += 1;
            t += self.exponential(1.0);
        }
        n
    }
}

#[derive(Clone, Copy)]
struct Block {
    size: u64,
    born_s: f64,
    dies_s: f64,
}

/// The blocks of one site.
pub struct Heap {
    blocks: VecDeque<Block>,
    totals: Totals,
    starts: VecDeque<f64>,
    lifetimes: [u64; LIFETIME_CLASSES],
    born: VecDeque<(u64, u64)>,
    older: (u64, u64),
    last_s: f64,
    pub now_s: f64,
}

impl Heap {
    fn new() -> Self {
        Heap {
            blocks: VecDeque::new(),
            totals: Totals::default(),
            starts: VecDeque::from([0.0]),
            lifetimes: [0; LIFETIME_CLASSES],
            born: VecDeque::from([(0, 0)]),
            older: (0, 0),
            last_s: 0.0,
            now_s: 0.0,
        }
    }

    /// A block that lives until it is freed by hand.
    pub fn alloc(&mut self, size: u64) {
        self.alloc_for(size, f64::INFINITY);
    }

    /// A block that is freed by itself.
    pub fn alloc_for(&mut self, size: u64, lifetime_s: f64) {
        let (now_s, born) = (self.now_s, self.born.back_mut().expect("current cohort"));
        *born = (born.0 + size, born.1 + 1);
        self.last_s = now_s;
        self.totals.allocated_bytes += size;
        self.totals.allocated_count += 1;
        self.blocks.push_back(Block { size, born_s: now_s, dies_s: now_s + lifetime_s });
    }

    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    pub fn free_oldest(&mut self) {
        if let Some(block) = self.blocks.pop_front() {
            self.freed(block);
        }
    }

    pub fn free_at(&mut self, index: usize) {
        if let Some(block) = self.blocks.swap_remove_back(index) {
            self.freed(block);
        }
    }

    pub fn free_all(&mut self) {
        while !self.blocks.is_empty() {
            self.free_oldest();
        }
    }

    fn freed(&mut self, block: Block) {
        self.totals.freed_bytes += block.size;
        self.totals.freed_count += 1;
        let us = ((self.now_s.min(block.dies_s) - block.born_s) * 1e6) as u64;
        let class = (64 - us.leading_zeros() as usize).min(LIFETIME_CLASSES - 1);
        self.lifetimes[class] += 1;
    }

    fn reap(&mut self) {
        let now_s = self.now_s;
        let (dead, live): (Vec<_>, Vec<_>) = self.blocks.drain(..).partition(|b| b.dies_s <= now_s);
        self.blocks = live.into();
        for block in dead {
            self.freed(block);
        }
    }

    /// Cohorts as the collector cuts them: their length grows with the run.
    fn advance(&mut self, interval_s: f64) {
        let start = self.starts.back().copied().unwrap_or(0.0);
        if self.now_s - start >= interval_s.max(self.now_s / 12.0) * 0.99 {
            self.starts.push_back(self.now_s);
            self.born.push_back((0, 0));
            while self.starts.len() > RING {
                self.starts.pop_front();
                let gone = self.born.pop_front().expect("one per start");
                self.older = (self.older.0 + gone.0, self.older.1 + gone.1);
            }
        }
    }

    fn cohorts(&self) -> Vec<Cohort> {
        let mut bounds: Vec<f64> = self.starts.iter().copied().collect();
        let mut born: Vec<(u64, u64)> = self.born.iter().copied().collect();
        if self.older.1 > 0 {
            bounds.insert(0, 0.0);
            born.insert(0, self.older);
        }
        let mut cohorts: Vec<Cohort> = (bounds.iter().zip(&born).enumerate())
            .map(|(i, (start_s, born))| Cohort {
                start_s: *start_s,
                end_s: bounds.get(i + 1).copied().unwrap_or(self.now_s),
                born_bytes: born.0,
                born_count: born.1,
                ..Cohort::default()
            })
            .collect();
        for block in &self.blocks {
            let index = cohorts.partition_point(|c| c.start_s <= block.born_s).saturating_sub(1);
            cohorts[index].outstanding_bytes += block.size;
            cohorts[index].outstanding_count += 1;
        }
        cohorts.retain(|c| c.born_count > 0);
        cohorts
    }
}

/// What a site does in a step: `now_s` of the heap is the step's end, the number its length in seconds.
pub type Shape = Box<dyn FnMut(&mut Heap, f64, &mut Rng)>;

pub struct Simulated {
    pub name: &'static str,
    pub heap: Heap,
    shape: Shape,
    pub site: Arc<Site>,
}

/// One process with a site per shape.
pub struct Simulation {
    pub history: History,
    pub process: ProcessSample,
    /// Standard errors that each site comes with.
    pub stderr: StandardErrors,
    /// What scans say of each site.
    pub reachability: Option<Arc<SiteReach>>,
    /// What is known of the sites, as if they were the kernel's.
    pub kernel: Option<Arc<KernelSample>>,
    pub number: u64,
    pub sites: Vec<Simulated>,
    interval_s: f64,
    rng: Rng,
}

impl Simulation {
    pub fn new(interval_s: f64, seed: u64, shapes: Vec<(&'static str, Shape)>) -> Self {
        let process = Arc::new(Process { instance: 1, pid: 4242, comm: "server".into(), ..Process::default() });
        let sites = (shapes.into_iter().zip(1..)).map(|((name, shape), id)| Simulated {
            name,
            heap: Heap::new(),
            shape,
            site: site(&process, id, name),
        });
        Simulation {
            history: History::new(Bounds::default()),
            process: ProcessSample {
                process: Arc::clone(&process),
                alive: true,
                hits: 1_000_000,
                ..Default::default()
            },
            stderr: StandardErrors::default(),
            reachability: None,
            kernel: None,
            interval_s,
            number: 0,
            rng: Rng(seed),
            sites: sites.collect(),
        }
    }

    /// Goes on to the next snapshot.
    pub fn step(&mut self) {
        let end_s = self.number as f64 * self.interval_s;
        self.number += 1;
        let steps = if self.number == 1 { 0 } else { 10 };
        let dt = self.interval_s / 10.0;
        for s in &mut self.sites {
            for i in (0..steps).rev() {
                s.heap.now_s = end_s - dt * f64::from(i);
                (s.shape)(&mut s.heap, dt, &mut self.rng);
                s.heap.reap();
            }
        }
        let mut snapshot = Snapshot { number: self.number, time_s: end_s, wall_s: 1e9 + end_s, ..Snapshot::default() };
        snapshot.processes.push(self.process.clone());
        for s in self.sites.iter_mut().filter(|s| s.heap.totals.allocated_count > 0) {
            snapshot.sites.push(SiteSample {
                site: Arc::clone(&s.site),
                totals: s.heap.totals,
                stderr: self.stderr,
                last_allocation_s: s.heap.last_s,
                cohorts: s.heap.cohorts(),
                lifetimes: s.heap.lifetimes,
                reachability: self.reachability.clone(),
                kernel: self.kernel.clone(),
            });
            s.heap.advance(self.interval_s);
        }
        self.history.push(&snapshot);
    }
}

/// A site with three frames; the innermost is named like the shape.
pub fn site(process: &Arc<Process>, id: u64, name: &str) -> Arc<Site> {
    let frame = |function: &str, module: &str| Frame {
        function: Some(function.to_owned()),
        module: Some(module.to_owned()),
        ..Frame::default()
    };
    let frames =
        vec![frame(name, "/usr/lib/libshapes.so.1"), frame("handle_request", "/srv/app"), frame("main", "/srv/app")];
    Arc::new(Site {
        key: SiteKey { instance: process.instance, probe_set: 1, stack: id },
        id,
        process: Arc::clone(process),
        probe_set: Arc::from("glibc"),
        function: Arc::from("malloc"),
        addresses: vec![0x1000 + id, 0x2000, 0x3000],
        truncated: None,
        first_thread: None,
        frames: OnceLock::from(frames),
    })
}
