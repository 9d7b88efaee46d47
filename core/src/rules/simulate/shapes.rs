//! What heaps of real programs look like over time. `unit_s` stretches a shape: everything that happens in it takes
//! that many times as long, and fewer blocks per second make up for it.

use super::{Heap, Rng, Shape};

/// Blocks of `size` at `bytes_per_s`, never freed.
pub fn leak(bytes_per_s: f64, size: u64) -> Shape {
    Box::new(move |heap, dt, rng| {
        for _ in 0..rng.poisson(bytes_per_s * dt / size as f64) {
            heap.alloc(size);
        }
    })
}

/// Many blocks that live for `lifetime_s` on average, of which a share is never freed.
pub fn churn(per_s: f64, size: u64, lifetime_s: f64, leaked: f64) -> Shape {
    Box::new(move |heap, dt, rng| {
        for _ in 0..rng.poisson(per_s * dt) {
            let lifetime = if rng.unit() < leaked { f64::INFINITY } else { rng.exponential(lifetime_s) };
            heap.alloc_for(size, lifetime);
        }
    })
}

/// Leaks in bursts: nothing for a while, then many at once.
pub fn bursts(every_s: f64, blocks: u64, size: u64) -> Shape {
    let mut next = every_s;
    Box::new(move |heap, _, _| {
        while heap.now_s >= next {
            (0..blocks).for_each(|_| heap.alloc(size));
            next += every_s;
        }
    })
}

/// A cache over a fixed set of keys, asked for at random: fills like 1 - exp(-t), then replaces what it holds.
pub fn keyed_cache(unit_s: f64) -> Shape {
    Box::new(move |heap, dt, rng| {
        for _ in 0..rng.poisson(500.0 * dt / unit_s) {
            let key = (rng.unit() * 5_000.0) as usize;
            if key < heap.len() {
                heap.free_at(key);
            }
            heap.alloc(1_500 + (rng.unit() * 1_000.0) as u64);
        }
    })
}

/// A cache that is filled at a constant rate up to its bound and then evicts the oldest entry for each new one.
pub fn bounded_cache(unit_s: f64, bytes_per_unit: f64, units_to_fill: f64) -> Shape {
    let size = 4_096;
    let bound = (bytes_per_unit * units_to_fill / size as f64) as usize;
    Box::new(move |heap, dt, rng| {
        for _ in 0..rng.poisson(bytes_per_unit / unit_s * dt / size as f64) {
            heap.alloc(size);
            if heap.len() > bound {
                heap.free_oldest();
            }
        }
    })
}

/// Start-up work that stays, then nothing but a little churn.
pub fn warm_up(unit_s: f64) -> Shape {
    Box::new(move |heap, dt, rng| {
        let starting = heap.now_s < 12.0 * unit_s;
        for _ in 0..rng.poisson(if starting { 100.0 * dt / unit_s } else { 0.0 }) {
            heap.alloc(2_000);
        }
        for _ in 0..rng.poisson(5.0 * dt / unit_s) {
            heap.alloc_for(64, 0.2 * unit_s);
        }
    })
}

/// A buffer that is flushed when it is full.
pub fn sawtooth(unit_s: f64, period_units: f64) -> Shape {
    let mut flush = period_units * unit_s;
    Box::new(move |heap, dt, rng| {
        for _ in 0..rng.poisson(100.0 * dt / unit_s) {
            heap.alloc(1_024);
        }
        if heap.now_s >= flush {
            heap.free_all();
            flush += period_units * unit_s;
        }
    })
}

/// Connections arrive until the load is reached, then some close and others take their place.
pub fn load_ramp(unit_s: f64) -> Shape {
    Box::new(move |heap, dt, rng| {
        if heap.len() < 300 {
            for _ in 0..rng.poisson(20.0 * dt / unit_s) {
                heap.alloc(17_000);
            }
        } else {
            for _ in 0..rng.poisson(4.0 * dt / unit_s) {
                let index = (rng.unit() * heap.len() as f64) as usize;
                heap.free_at(index);
                heap.alloc(17_000);
            }
        }
    })
}

/// A pool that doubles now and then: few large steps, then flat.
pub fn thread_pool(unit_s: f64) -> Shape {
    let mut steps = vec![(3.0, 4), (18.0, 4), (33.0, 8), (48.0, 16), (63.0, 32)];
    Box::new(move |heap, _, _| {
        while let Some((at, threads)) = steps.first().copied().filter(|(at, _)| heap.now_s >= at * unit_s) {
            let _ = at;
            (0..threads).for_each(|_| heap.alloc(135_168));
            steps.remove(0);
        }
    })
}

/// A queue: every block dies, but not before it has waited its time.
pub fn queue(unit_s: f64, waits_units: f64) -> Shape {
    Box::new(move |heap, dt, rng| {
        for _ in 0..rng.poisson(80.0 * dt / unit_s) {
            heap.alloc_for(900, waits_units * unit_s);
        }
    })
}

/// A cache at its bound whose fill level wanders up and down.
pub fn wandering_cache(unit_s: f64) -> Shape {
    Box::new(move |heap: &mut Heap, dt: f64, rng: &mut Rng| {
        while heap.len() < 2_000 && heap.now_s < unit_s {
            heap.alloc(2_048);
        }
        for _ in 0..rng.poisson(60.0 * dt / unit_s) {
            // Pulled back to its bound, as caches are.
            let grow = 0.5 - (heap.len() as f64 - 2_000.0) / 500.0;
            if rng.unit() < grow {
                heap.alloc(2_048);
            } else {
                let index = (rng.unit() * heap.len() as f64) as usize;
                heap.free_at(index);
            }
        }
    })
}
