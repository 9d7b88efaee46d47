//! Pointers that were XOR-ed with a constant before they were stored.
//!
//! The addresses of a heap share their upper half. XOR-ed with one key they still share one, which is no longer that of an
//! address. So the first scan of a series counts the upper halves of words that are no addresses, the next ones keep the
//! words with frequent ones, and at the end it is tried whether there is one key that turns kept words into the lost blocks
//! of a site. Such blocks are not lost, and their site is unknown. Keys that leave the upper 17 bits as they are, and other
//! codes, are not recognised: they show when the program frees what was called lost.

use std::collections::{HashMap, HashSet};

/// Upper halves are counted by a hash of so many bits.
const HASH_BITS: u32 = 16;
/// An upper half that is rarer hides nothing that could be called definitely lost.
const MIN_COUNT: u32 = 4;
/// Most upper halves, and words of each and of all, that are kept.
const MAX_UPPERS: usize = 1 << 16;
const MAX_OF_ONE: usize = 1 << 18;
const MAX_WORDS: usize = 1 << 20;
/// Blocks of a site that are tried, and how many of them may be no key's first witness.
const TRIED: usize = 64;
const SEEDS: usize = 4;
/// Share of the tried blocks that one key must explain.
const EXPLAINED: f64 = 0.8;

/// Words that may be coded pointers.
#[derive(Debug, Default)]
pub struct Coded {
    /// How often each hash of an upper half was seen in the first scan; empty without one.
    counts: Vec<u32>,
    /// This is the first of several scans: it only counts.
    counting: bool,
    /// By hash: words with such an upper half are kept.
    open: Vec<bool>,
    uppers: HashMap<u32, Upper>,
    kept: usize,
    /// Memory is full of repetitions.
    last: u64,
}

/// Words with the same upper half.
#[derive(Debug, Default)]
struct Upper {
    seen: u64,
    lower: Vec<u32>,
}

impl Coded {
    /// A new scan begins; the `only` one of its series has nothing to go by and keeps whatever fits.
    pub fn begin(&mut self, only: bool) {
        self.counting = self.counts.is_empty() && !only;
        self.uppers.clear();
        self.kept = 0;
        if self.counting {
            self.counts = vec![0; 1 << HASH_BITS];
            return;
        }
        let all: u64 = self.counts.iter().map(|n| u64::from(*n)).sum();
        // Random words collide.
        let least = u64::from(MIN_COUNT) + ((2 * all) >> HASH_BITS);
        self.open = match only {
            true => vec![true; 1 << HASH_BITS],
            false => self.counts.iter().map(|n| u64::from(*n) >= least).collect(),
        };
    }

    /// A word that is no address. Called for much of the memory of many programs: most must leave early.
    #[inline]
    pub fn see(&mut self, word: u64) {
        let upper = (word >> 32) as u32;
        // Repetitions, and negative numbers.
        if word == self.last || upper == u32::MAX {
            return;
        }
        self.last = word;
        let hash = (upper.wrapping_mul(0x9e37_79b1) >> (32 - HASH_BITS)) as usize;
        if self.counting {
            self.counts[hash] = self.counts[hash].saturating_add(1);
        } else if self.open.get(hash) == Some(&true) {
            self.keep(upper, word as u32, hash);
        }
    }

    fn keep(&mut self, upper: u32, lower: u32, hash: usize) {
        let full = self.uppers.len() >= MAX_UPPERS;
        let entry = match self.uppers.get_mut(&upper) {
            Some(entry) => entry,
            None if full => return,
            None => self.uppers.entry(upper).or_default(),
        };
        entry.seen += 1;
        entry.lower.push(lower);
        self.kept += 1;
        if entry.lower.len() >= MAX_OF_ONE {
            self.open[hash] = false;
            // About how many there are in all.
            let counted = self.counts.get(hash).map_or(entry.seen, |n| u64::from(*n));
            entry.seen = entry.seen.max(counted);
        }
        if self.kept >= MAX_WORDS {
            self.open.fill(false);
        }
    }

    /// The key that turns words into most of these addresses, if there is one. `addresses` are some of a site's lost blocks.
    pub fn key(&self, addresses: &[u64]) -> Option<u64> {
        let step = addresses.len().div_ceil(TRIED).max(1);
        let tried: Vec<u64> = addresses.iter().copied().step_by(step).collect();
        if tried.len() < MIN_COUNT as usize {
            return None;
        }
        self.uppers.iter().find_map(|(upper, entry)| self.key_of(*upper, entry, &tried))
    }

    fn key_of(&self, upper: u32, entry: &Upper, tried: &[u64]) -> Option<u64> {
        if entry.lower.len() < MIN_COUNT as usize {
            return None;
        }
        let lower: HashSet<u32> = entry.lower.iter().copied().collect();
        // Of the words only a part may have been kept.
        let kept = entry.lower.len() as f64 / entry.seen as f64;
        let needed = (EXPLAINED * kept * tried.len() as f64).max(f64::from(MIN_COUNT));
        let explains = |key: u64| {
            let mut found = 0;
            for (n, address) in tried.iter().enumerate() {
                let word = address ^ key;
                found += usize::from((word >> 32) as u32 == upper && lower.contains(&(word as u32)));
                // Nearly every key fails with the first few blocks.
                if found + tried.len() - n - 1 < needed as usize {
                    return false;
                }
            }
            found as f64 >= needed
        };
        tried.iter().take(SEEDS).find_map(|seed| {
            let keys = lower.iter().map(|lower| (u64::from(upper) << 32 | u64::from(*lower)) ^ seed);
            keys.into_iter().find(|key| explains(*key))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: u64 = 0x5a5a_1234_9e37_79b9;

    /// Addresses as an allocator hands them out, and other words.
    fn addresses(count: u64) -> Vec<u64> {
        (0..count).map(|n| 0x55d0_c2a0_14f0 + n * 48 + n % 7 * 4096).collect()
    }

    fn noise(count: u64) -> impl Iterator<Item = u64> {
        (1..=count).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 << 63).filter(|w| *w >> 32 != 0xffff_ffff)
    }

    fn after_two_scans(words: &[u64]) -> Coded {
        let mut coded = Coded::default();
        for _ in 0..2 {
            coded.begin(false);
            words.iter().for_each(|w| coded.see(*w));
        }
        coded
    }

    #[test]
    fn one_key_for_all_is_found_among_noise() {
        let lost = addresses(31);
        let words: Vec<u64> = noise(100_000).chain(lost.iter().map(|a| a ^ KEY)).collect();
        assert_eq!(after_two_scans(&words).key(&lost), Some(KEY));
        // In the only scan of its series as well, where there is no noise.
        let mut once = Coded::default();
        once.begin(true);
        lost.iter().for_each(|a| once.see(a ^ KEY));
        assert_eq!(once.key(&lost), Some(KEY));
    }

    // Random words, counters and text explain nothing: a leak must stay one.
    #[test]
    fn other_words_are_no_coded_pointers() {
        let lost = addresses(31);
        assert_eq!(after_two_scans(&noise(200_000).collect::<Vec<_>>()).key(&lost), None);
        let times: Vec<u64> = (0..10_000).map(|n| 0x17f0_5a3c_0000_0000 + n * 1000).collect();
        assert_eq!(after_two_scans(&times).key(&lost), None);
        let doubles: Vec<u64> = (0..10_000).map(|n| f64::from(n).to_bits()).filter(|w| *w > 1 << 47).collect();
        assert_eq!(after_two_scans(&doubles).key(&lost), None);
    }

    // Half of the blocks are referenced in code, the others are lost: that is a leak.
    #[test]
    fn a_key_must_explain_most_blocks() {
        let lost = addresses(40);
        let words: Vec<u64> = lost.iter().step_by(2).map(|a| a ^ KEY).collect();
        assert_eq!(after_two_scans(&words).key(&lost), None);
    }

    #[test]
    fn more_words_than_fit_are_judged_by_those_kept() {
        let lost = addresses(2 * MAX_OF_ONE as u64);
        let words: Vec<u64> = lost.iter().map(|a| a ^ KEY).collect();
        // Of addresses in even steps more than one key explains many.
        assert!(after_two_scans(&words).key(&lost).is_some());
    }
}
