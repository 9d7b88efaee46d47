//! Pointers that were XOR-ed with a constant before they were stored.
//!
//! The addresses of a heap share their upper half. XOR-ed with one key they still share one, which is no longer that of an
//! address. So the first scan of a series counts the upper halves of words that are no addresses, those that may be the last
//! keep the words with frequent ones, and at the end it is tried whether there is one key that turns kept words into the lost blocks
//! of a site. Such blocks are not lost, and their site is unknown. Keys that leave the upper 17 bits as they are, and other
//! codes, are not recognised: they show when the program frees what was called lost.

use std::collections::HashMap;

use foldhash::fast::RandomState;

/// Upper halves are counted by a hash of so many bits.
const HASH_BITS: u32 = 16;
/// Words are remembered under a hash of so many bits, to know them again: what is searched all the time fits into the fastest
/// cache.
const RECENT_BITS: u32 = 11;
/// An upper half that is rarer hides nothing that could be called definitely lost.
const MIN_COUNT: u32 = 4;
/// Most upper halves, and words of each and of all, that are kept. Of more words those stay whose hash says so: a sample
/// from everywhere.
const MAX_UPPERS: usize = 1 << 16;
const MAX_OF_ONE: usize = 1 << 18;
const MAX_WORDS: usize = 1 << 20;
/// Words of an upper half that are not kept.
const CLOSED: u8 = u8::MAX;
/// A sample is no smaller than one of two to this.
const MAX_HALVED: u8 = 31;
/// Blocks of a site that are tried, and how many of them may be no key's first witness while all words are kept.
pub const TRIED: usize = 64;
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
    /// By hash of an upper half: how often the sample of its words was halved, or [`CLOSED`].
    halved: Vec<u8>,
    /// Lower halves of the words that are kept, by upper half.
    uppers: HashMap<u32, Vec<u32>, RandomState>,
    kept: usize,
    /// An upper half with so many words is thinned out.
    most_of_one: usize,
    /// Words of this scan, by a hash. Memory is full of repetitions, which tell nothing.
    recent: Vec<u64>,
}

impl Coded {
    /// A new scan begins; the `only` one of its series has nothing to go by and keeps whatever fits.
    pub fn begin(&mut self, only: bool) {
        self.counting = self.counts.is_empty() && !only;
        self.uppers.clear();
        self.kept = 0;
        self.most_of_one = MAX_OF_ONE;
        // None of what is shown is 0.
        self.recent = vec![0; 1 << RECENT_BITS];
        if self.counting {
            self.counts = vec![0; 1 << HASH_BITS];
            return;
        }
        let all: u64 = self.counts.iter().map(|n| u64::from(*n)).sum();
        // Random words collide.
        let least = u64::from(MIN_COUNT) + ((2 * all) >> HASH_BITS);
        self.halved = match only {
            true => vec![0; 1 << HASH_BITS],
            false => self.counts.iter().map(|n| if u64::from(*n) >= least { 0 } else { CLOSED }).collect(),
        };
    }

    /// A word that is no address. Called for much of the memory of many programs: most must leave early.
    #[inline]
    pub fn see(&mut self, word: u64) {
        let upper = (word >> 32) as u32;
        let Some(recent) = self.recent.get_mut((mixed(word) >> (64 - RECENT_BITS)) as usize) else { return };
        // Repetitions, and negative numbers.
        if *recent == word || upper == u32::MAX {
            return;
        }
        *recent = word;
        let hash = hash_of(upper);
        if self.counting {
            self.counts[hash] = self.counts[hash].saturating_add(1);
        } else if self.halved.get(hash).is_some_and(|halved| is_in_sample(upper, word as u32, *halved)) {
            self.keep(upper, word as u32);
        }
    }

    fn keep(&mut self, upper: u32, lower: u32) {
        let full = self.uppers.len() >= MAX_UPPERS;
        let words = match self.uppers.get_mut(&upper) {
            Some(words) => words,
            None if full => return,
            None => self.uppers.entry(upper).or_default(),
        };
        words.push(lower);
        self.kept += 1;
        if words.len() >= self.most_of_one {
            self.kept -= thin_out(upper, words, self.most_of_one / 2, &mut self.halved);
        }
        // The most frequent ones make room; words of the others all stay. So many upper halves fit with a few words each.
        if self.kept >= MAX_WORDS {
            while self.kept >= MAX_WORDS / 4 * 3 && self.most_of_one > MAX_WORDS / MAX_UPPERS / 4 {
                self.most_of_one /= 2;
                for (upper, words) in &mut self.uppers {
                    if words.len() > self.most_of_one {
                        self.kept -= thin_out(*upper, words, self.most_of_one, &mut self.halved);
                    }
                }
            }
        }
    }

    /// The last scan has ended. To be called before [`Coded::key`].
    pub fn close(&mut self) {
        for (upper, words) in &mut self.uppers {
            let halved = self.halved.get(hash_of(*upper)).copied().unwrap_or(CLOSED);
            words.retain(|lower| is_in_sample(*upper, *lower, halved));
            words.sort_unstable();
            words.dedup();
        }
    }

    /// The key that turns words into most of these addresses, if there is one. `addresses` are some of a site's lost blocks.
    /// `give_up` is asked often; when it says so none is found.
    pub fn key(&self, addresses: &[u64], give_up: &dyn Fn() -> bool) -> Option<u64> {
        let step = addresses.len().div_ceil(TRIED).max(1);
        let tried: Vec<u64> = addresses.iter().copied().step_by(step).collect();
        if tried.len() < MIN_COUNT as usize {
            return None;
        }
        let frequent = self.uppers.iter().filter(|(_, words)| words.len() >= MIN_COUNT as usize);
        let mut tries = frequent.take_while(|_| !give_up());
        tries.find_map(|(upper, words)| self.key_of(*upper, words, &tried, give_up))
    }

    fn key_of(&self, upper: u32, lower: &[u32], tried: &[u64], give_up: &dyn Fn() -> bool) -> Option<u64> {
        let halved = self.halved.get(hash_of(upper)).copied().unwrap_or(CLOSED);
        let kept = 0.5_f64.powi(i32::from(halved));
        let needed = (EXPLAINED * kept * tried.len() as f64).max(f64::from(MIN_COUNT));
        let explains = |key: u64| {
            let mut found = 0;
            for (n, address) in tried.iter().enumerate() {
                let word = address ^ key;
                found += usize::from((word >> 32) as u32 == upper && lower.binary_search(&(word as u32)).is_ok());
                // Nearly every key fails with the first few blocks.
                if found + tried.len() - n - 1 < needed as usize {
                    return false;
                }
            }
            found as f64 >= needed
        };
        // A seed is of use if its word was kept.
        let seeds = SEEDS << halved.min(4);
        tried.iter().take(seeds).take_while(|_| !give_up()).find_map(|seed| {
            let keys = lower.iter().map(|lower| (u64::from(upper) << 32 | u64::from(*lower)) ^ seed);
            keys.into_iter().find(|key| explains(*key))
        })
    }
}

fn hash_of(upper: u32) -> usize {
    (upper.wrapping_mul(0x9e37_79b1) >> (32 - HASH_BITS)) as usize
}

/// Its upper bits are a hash of the word.
fn mixed(word: u64) -> u64 {
    (word ^ word >> 15).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Whether a word stays in a sample that was halved so often.
fn is_in_sample(upper: u32, lower: u32, halved: u8) -> bool {
    let word = u64::from(upper) << 32 | u64::from(lower);
    let hash = (mixed(word) >> 32) as u32;
    halved == 0 || halved <= MAX_HALVED && hash >> (32 - halved) == 0
}

/// Leaves at most `most` of the words of an upper half; returns how many went.
fn thin_out(upper: u32, words: &mut Vec<u32>, most: usize, halved: &mut [u8]) -> usize {
    let before = words.len();
    words.sort_unstable();
    words.dedup();
    if let Some(halved) = halved.get_mut(hash_of(upper)) {
        while words.len() > most && *halved < MAX_HALVED {
            *halved += 1;
            words.retain(|lower| is_in_sample(upper, *lower, *halved));
        }
    }
    words.truncate(most);
    before - words.len()
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
        coded.close();
        coded
    }

    fn key(coded: &Coded, lost: &[u64]) -> Option<u64> {
        coded.key(lost, &|| false)
    }

    #[test]
    fn one_key_for_all_is_found_among_noise() {
        let lost = addresses(31);
        let words: Vec<u64> = noise(100_000).chain(lost.iter().map(|a| a ^ KEY)).collect();
        assert_eq!(key(&after_two_scans(&words), &lost), Some(KEY));
        // In the only scan of its series as well, where there is no noise.
        let mut once = Coded::default();
        once.begin(true);
        lost.iter().for_each(|a| once.see(a ^ KEY));
        once.close();
        assert_eq!(key(&once, &lost), Some(KEY));
        assert_eq!(once.key(&lost, &|| true), None);
    }

    // Random words, counters and text explain nothing: a leak must stay one.
    #[test]
    fn other_words_are_no_coded_pointers() {
        let lost = addresses(31);
        assert_eq!(key(&after_two_scans(&noise(200_000).collect::<Vec<_>>()), &lost), None);
        let times: Vec<u64> = (0..10_000).map(|n| 0x17f0_5a3c_0000_0000 + n * 1000).collect();
        assert_eq!(key(&after_two_scans(&times), &lost), None);
        let doubles: Vec<u64> = (0..10_000).map(|n| f64::from(n).to_bits()).filter(|w| *w > 1 << 47).collect();
        assert_eq!(key(&after_two_scans(&doubles), &lost), None);
    }

    // Half of the blocks are referenced in code, the others are lost: that is a leak.
    #[test]
    fn a_key_must_explain_most_blocks() {
        let lost = addresses(40);
        let words: Vec<u64> = lost.iter().step_by(2).map(|a| a ^ KEY).collect();
        assert_eq!(key(&after_two_scans(&words), &lost), None);
    }

    #[test]
    fn more_words_than_fit_are_judged_by_those_kept() {
        let lost = addresses(2 * MAX_OF_ONE as u64);
        let words: Vec<u64> = lost.iter().map(|a| a ^ KEY).collect();
        // Of addresses in even steps more than one key explains many.
        assert!(key(&after_two_scans(&words), &lost).is_some());
    }

    // Most of memory is something else, and comes first.
    #[test]
    fn words_behind_many_others_are_kept() {
        let others = |upper: u64| (0..200_000).map(move |n: u64| ((0x3ff0_0000 + upper) << 32) | (n * 7919));
        let mut words: Vec<u64> = (0..12).flat_map(others).collect();
        assert!(words.len() > 2 * MAX_WORDS);
        let lost: Vec<u64> = (0..400).map(|n| 0x55d0_c2a0_14f0 + n * 48).collect();
        words.extend(lost.iter().map(|a| a ^ KEY));
        let coded = after_two_scans(&words);
        // A search through all of it would take long here.
        assert_eq!(coded.uppers[&(((lost[0] ^ KEY) >> 32) as u32)].len(), lost.len());
        let kept: usize = coded.uppers.values().map(Vec::len).sum();
        assert!(kept <= coded.kept && coded.kept < MAX_WORDS, "{kept} {}", coded.kept);
        // Repetitions are nothing new, whether they are known at once or not.
        for different in [8, 4 << RECENT_BITS] {
            let same: Vec<u64> = words[..different].iter().copied().cycle().take(3 * MAX_WORDS).collect();
            let coded = after_two_scans(&same);
            assert_eq!(coded.uppers.values().map(Vec::len).sum::<usize>(), different);
        }
        let rare: Vec<u64> = words[..2].iter().copied().cycle().take(1000).collect();
        assert!(after_two_scans(&rare).uppers.is_empty());
    }
}
