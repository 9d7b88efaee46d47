//! Survival by age of birth.
//!
//! The kernel side adds births and deaths of a generation up in one of a few slots per site and sends deaths of
//! generations that have left this ring to a separate counter. This module knows which generation owns which slot,
//! and turns the raw sums into [`Cohort`]s.
//!
//! A slot's owner goes through three stages: it is current or recent (its deaths reach the slot); then, for exactly
//! one generation, it is closed (nothing reaches the slot any more, so what is left in it is final and is moved to
//! `older`); then the slot belongs to the next generation, which counts from the value found at the move. Because of
//! the closed stage no lock is needed.

use std::collections::VecDeque;

use memleak_probes::{COHORTS, SiteTotals};

use crate::snapshot::Cohort;

/// Generations that a run's length is divided into, at the most (two slots are never visible, some are spare).
const PARTS: f64 = 12.0;

/// Times of the generations in the ring.
#[derive(Clone, Debug)]
pub struct Generations {
    /// Number of the current one.
    current: u32,
    /// Start of each generation in the ring, the current one last.
    starts: VecDeque<(u32, f64)>,
    /// Shortest length of a generation, seconds.
    min_length_s: f64,
}

impl Generations {
    /// Begins with generation 0 at time 0.
    pub fn new(min_length_s: f64) -> Self {
        Generations { current: 0, starts: VecDeque::from([(0, 0.0)]), min_length_s }
    }

    /// True when the current generation has lasted long enough at `now_s`: longer the longer the run, so that the
    /// ring covers most of it.
    pub fn is_due(&self, now_s: f64) -> bool {
        let start = self.starts.back().map_or(0.0, |(_, s)| *s);
        now_s - start >= self.min_length_s.max(now_s / PARTS) * 0.99
    }

    /// Begins the next generation.
    pub fn advance(&mut self, now_s: f64) {
        self.current = self.current.wrapping_add(1);
        self.starts.push_back((self.current, now_s));
        while self.starts.len() >= COHORTS {
            self.starts.pop_front();
        }
    }

    /// Generations whose slots are live, oldest first.
    fn visible(&self) -> impl Iterator<Item = u32> + '_ {
        self.starts.iter().map(|(g, _)| *g)
    }
}

/// What one site had at generation changes.
#[derive(Clone, Debug, Default)]
pub struct SiteCohorts {
    /// Per slot: the sums that were there when its present owner took it over.
    base: [(i64, i64); COHORTS],
    /// Generations of which nothing has been moved to `older` yet, oldest first: number, bytes and blocks born.
    closed: VecDeque<(u32, u64, u64)>,
    /// Bytes and blocks allocated when the current generation began.
    allocated: (u64, u64),
    /// Bytes and blocks born in generations that have left the ring.
    older_born: (u64, u64),
    /// Bytes and blocks of them that were alive when they left it.
    older_left: (i64, i64),
}

impl SiteCohorts {
    /// Cohorts at `now_s`, oldest first. The first one sums up all that has left the ring, if anything has.
    pub fn read(&mut self, generations: &Generations, totals: &SiteTotals, now_s: f64) -> Vec<Cohort> {
        self.move_to_older(generations, totals);
        // Not as long as it may get: most sites have a few, and there are many sites.
        let mut cohorts = Vec::new();
        let ring_start = generations.starts.front().map_or(0.0, |(_, s)| *s);
        if self.older_born.1 > 0 {
            let left_bytes = self.older_left.0.saturating_sub_unsigned(totals.older_freed_bytes).max(0).cast_unsigned();
            let left_count = self.older_left.1.saturating_sub_unsigned(totals.older_freed_count).max(0).cast_unsigned();
            cohorts.push(cohort(0.0, ring_start, self.older_born, (left_bytes, left_count)));
        }
        let starts = &generations.starts;
        for (at, (generation, start_s)) in starts.iter().enumerate() {
            let born = if *generation == generations.current {
                (
                    totals.allocated_bytes.saturating_sub(self.allocated.0),
                    totals.allocated_count.saturating_sub(self.allocated.1),
                )
            } else {
                let closed = self.closed.iter().find(|(g, ..)| g == generation);
                closed.map_or((0, 0), |(_, bytes, count)| (*bytes, *count))
            };
            let slot = *generation as usize % COHORTS;
            let (base, sum) = (self.base[slot], totals.cohorts[slot]);
            let left = ((sum.0 - base.0).max(0).cast_unsigned(), (sum.1 - base.1).max(0).cast_unsigned());
            if born.1 > 0 || left.1 > 0 {
                let end_s = starts.get(at + 1).map_or(now_s, |(_, s)| *s);
                cohorts.push(cohort(*start_s, end_s, born, left));
            }
        }
        cohorts
    }

    /// To be called right before the generation changes, with the totals that were just read.
    pub fn close_generation(&mut self, generations: &Generations, totals: &SiteTotals) {
        let born = (
            totals.allocated_bytes.saturating_sub(self.allocated.0),
            totals.allocated_count.saturating_sub(self.allocated.1),
        );
        self.closed.push_back((generations.current, born.0, born.1));
        self.allocated = (totals.allocated_bytes, totals.allocated_count);
    }

    /// Moves what generations that have left the ring have left behind, and gives their slots free.
    fn move_to_older(&mut self, generations: &Generations, totals: &SiteTotals) {
        while let Some((generation, bytes, count)) = self.closed.front().copied() {
            if generations.visible().any(|g| g == generation) {
                break;
            }
            let slot = generation as usize % COHORTS;
            self.older_left.0 += totals.cohorts[slot].0 - self.base[slot].0;
            self.older_left.1 += totals.cohorts[slot].1 - self.base[slot].1;
            self.base[slot] = totals.cohorts[slot];
            self.older_born.0 += bytes;
            self.older_born.1 += count;
            self.closed.pop_front();
        }
    }
}

/// A cohort; blocks born between the reading and the change of generations may be counted with either, so survivors
/// count as born.
fn cohort(start_s: f64, end_s: f64, born: (u64, u64), left: (u64, u64)) -> Cohort {
    Cohort {
        start_s,
        end_s,
        born_bytes: born.0.max(left.0),
        born_count: born.1.max(left.1),
        outstanding_bytes: left.0,
        outstanding_count: left.1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel side's arithmetic, see settle() and track_alloc() in bpf/track.bpf.h.
    struct Kernel {
        totals: SiteTotals,
        current: u32,
    }

    impl Kernel {
        fn alloc(&mut self, bytes: i64) -> u32 {
            self.totals.allocated_bytes += bytes as u64;
            self.totals.allocated_count += 1;
            let slot = &mut self.totals.cohorts[self.current as usize % COHORTS];
            *slot = (slot.0 + bytes, slot.1 + 1);
            self.current
        }

        fn free(&mut self, bytes: i64, birth: u32) {
            if (self.current - birth) < COHORTS as u32 - 1 {
                let slot = &mut self.totals.cohorts[birth as usize % COHORTS];
                *slot = (slot.0 - bytes, slot.1 - 1);
            } else {
                self.totals.older_freed_bytes += bytes as u64;
                self.totals.older_freed_count += 1;
            }
            self.totals.freed_bytes += bytes as u64;
            self.totals.freed_count += 1;
        }
    }

    /// Whatever the ages at which blocks die, the cohorts must add up to what is outstanding, for ever.
    #[test]
    fn cohorts_add_up_through_many_turns_of_the_ring() {
        let zero = SiteTotals {
            allocated_bytes: 0,
            allocated_count: 0,
            freed_bytes: 0,
            freed_count: 0,
            last_allocation_ns: 0,
            older_freed_bytes: 0,
            older_freed_count: 0,
            unseen_frees: 0,
            bytes_variance: 0.0,
            count_variance: 0.0,
            cohorts: [(0, 0); COHORTS],
            lifetimes: [0; memleak_probes::LIFETIME_CLASSES],
        };
        let mut kernel = Kernel { totals: zero, current: 0 };
        let mut generations = Generations::new(1.0);
        let mut site = SiteCohorts::default();
        let mut alive: VecDeque<(u32, i64)> = VecDeque::new();
        for step in 0..200_u32 {
            for n in 0..7_u32 {
                let bytes = i64::from(13 + (step * 7 + n) % 50);
                alive.push_back((kernel.alloc(bytes), bytes));
            }
            // Every generation loses some of its youngest, and some much older ones die too.
            for n in 0..5_u32 {
                let old = (step * 31 + n * 17) % 40 == 0;
                let dead = if old { alive.pop_front() } else { alive.pop_back() };
                if let Some((birth, bytes)) = dead {
                    kernel.free(bytes, birth);
                }
            }
            let now = f64::from(step + 1);
            let cohorts = site.read(&generations, &kernel.totals, now);
            let bytes: u64 = cohorts.iter().map(|c| c.outstanding_bytes).sum();
            let count: u64 = cohorts.iter().map(|c| c.outstanding_count).sum();
            let born: u64 = cohorts.iter().map(|c| c.born_count).sum();
            let expected: i64 = alive.iter().map(|(_, b)| *b).sum();
            assert_eq!((bytes, count), (expected as u64, alive.len() as u64), "step {step}");
            assert_eq!(born, kernel.totals.allocated_count, "step {step}");
            assert!(cohorts.windows(2).all(|w| w[0].end_s <= w[1].start_s), "{cohorts:?}");
            let last = cohorts.last().unwrap();
            assert_eq!(
                (last.end_s, last.outstanding_count),
                (now, alive.iter().filter(|(g, _)| *g == kernel.current).count() as u64)
            );
            site.close_generation(&generations, &kernel.totals);
            generations.advance(now);
            kernel.current += 1;
        }
    }

    /// The longer the run, the longer a generation: the ring must go on covering most of it.
    #[test]
    fn generations_grow_with_the_run() {
        let mut generations = Generations::new(1.0);
        let mut now = 0.0;
        for _ in 0..36_000 {
            now += 1.0;
            if generations.is_due(now) {
                generations.advance(now);
            }
        }
        let start = generations.starts.front().unwrap().1;
        assert!(start < now * 0.4, "the ring covers only the time since {start} of {now}");
    }
}
