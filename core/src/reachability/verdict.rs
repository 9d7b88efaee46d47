//! From scans to a site's verdict.
//!
//! A [`Series`] keeps the blocks that no scan of it could reach. What is left after enough scans is lost. A [`Ledger`]
//! remembers blocks that were called lost and counts those that the program frees after all: each is a refutation,
//! since a program cannot free what it has no pointer to. It hides its pointers then, and nothing that was said of the
//! site can be trusted.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::index::{Block, Index};
use super::mark::{Marked, Reach};

/// When a scan series is long enough, and a site's loss definite.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Scans in a row in which a block must be unreachable.
    pub scans: u32,
    /// Most scans, while the set of unreachable blocks still shrinks.
    pub most_scans: u32,
    /// Fewest lost blocks of a definite site ...
    pub min_lost: u64,
    /// ... and least share of them among all that could be judged, possibly lost ones included.
    pub min_fraction: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { scans: 3, most_scans: 8, min_lost: 5, min_fraction: 0.5 }
    }
}

/// Refutations per block called lost from which on a site is unknown.
const REFUTED: f64 = 0.05;
/// Most blocks of a site that a ledger remembers.
const REMEMBERED: usize = 256;

/// What names a block: its address and its time of birth.
pub type BlockName = (u64, u64);

/// Blocks and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Blocks.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Tally {
    fn add(&mut self, bytes: u64) {
        self.blocks += 1;
        self.bytes += bytes;
    }
}

/// In one word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Enough blocks are lost, and most of those that could be judged.
    Definite,
    /// Some blocks are lost, or referenced only in unusual ways.
    Possible,
    /// The process can still reach its blocks: a cache, or a container that grows.
    Reachable,
    /// Pointers are hidden, or nothing could be judged.
    #[default]
    Unknown,
}

impl Verdict {
    /// The word that people and rules see.
    pub fn as_str(self) -> &'static str {
        match self {
            Verdict::Definite => "definite",
            Verdict::Possible => "possible",
            Verdict::Reachable => "reachable",
            Verdict::Unknown => "unknown",
        }
    }
}

/// What scans say of a site's outstanding blocks. Each block is in one of the tallies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SiteVerdict {
    /// Scans that it rests on.
    pub scans: u32,
    /// The last of them was made while the process stood still, so that nothing could move out of its way.
    pub still: bool,
    /// Nothing refers to them.
    pub lost: Tally,
    /// Only lost blocks refer to them.
    pub indirectly_lost: Tally,
    /// Referenced, but not at their start nor where blocks of the site usually are. Or not at all, but their free may not
    /// have been seen, and the allocator has no books that would tell.
    pub possible: Tally,
    /// Reachable from a root.
    pub reachable: Tally,
    /// Only pointers that are tagged or coded refer to them.
    pub disguised: Tally,
    /// Not reached, but too young to be judged.
    pub young: Tally,
    /// The allocator's own books say that they are free, or another block by now: the free was not seen. Or there were too
    /// many to look at them all. Not judged.
    pub gone: Tally,
    /// Blocks of the process that the kernel may hold the only pointer to, in requests under way (`io_uring`, AIO).
    pub in_requests: u64,
    /// Memory of the process that was not read, because it belongs to a device or cannot be read: it may hold pointers.
    pub device_bytes: u64,
    /// Blocks that were called lost, and of these those that the program has freed since.
    pub called_lost: u64,
    /// See `called_lost`.
    pub refuted: u64,
}

impl SiteVerdict {
    /// Blocks that are lost, directly or indirectly.
    pub fn lost_blocks(&self) -> u64 {
        self.lost.blocks + self.indirectly_lost.blocks
    }

    /// Bytes that are lost, directly or indirectly.
    pub fn lost_bytes(&self) -> u64 {
        self.lost.bytes + self.indirectly_lost.bytes
    }

    /// Share of lost blocks among those that are lost or reachable, with its 95 % confidence interval (Wilson, 1927);
    /// `None` when there are neither.
    pub fn lost_fraction(&self) -> Option<(f64, f64, f64)> {
        let n = (self.lost_blocks() + self.reachable.blocks) as f64;
        if n == 0.0 {
            return None;
        }
        let p = self.lost_blocks() as f64 / n;
        let z2 = 1.96_f64 * 1.96;
        let middle = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
        let half = 1.96 / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
        Some((p, (middle - half).max(0.0), (middle + half).min(1.0)))
    }

    /// The verdict in one word.
    pub fn verdict(&self, limits: &Limits) -> Verdict {
        let lost = self.lost_blocks();
        let rest = self.possible.blocks + self.disguised.blocks;
        let all = lost + self.reachable.blocks + rest;
        // What one scan has reached is reachable.
        let needed = if self.still || lost + rest == 0 { 1 } else { limits.scans };
        if self.scans < needed || self.refuted as f64 > REFUTED * self.called_lost as f64 {
            return Verdict::Unknown;
        }
        let most = |n: u64| n > 0 && n as f64 >= limits.min_fraction * all as f64;
        // What is not in the process's memory may be where the scan cannot look.
        let sure = if self.device_bytes > 0 { 0 } else { lost.saturating_sub(self.in_requests) };
        if sure >= limits.min_lost && most(lost) {
            Verdict::Definite
        } else if most(self.disguised.blocks) || all == 0 {
            Verdict::Unknown
        } else if most(self.possible.blocks + lost) {
            Verdict::Possible
        } else {
            Verdict::Reachable
        }
    }
}

/// Scans of one process in a row.
#[derive(Clone, Debug, Default)]
pub struct Series {
    scans: u32,
    /// Blocks born later are not judged, nanoseconds on the clock of their births.
    judged_until_ns: u64,
    /// Addresses of the judged blocks that no scan has reached, in order. A judged block is older than the first scan, so its
    /// address names it in all of them.
    unreached: Vec<u64>,
    shrinking: bool,
    /// Frees may have been missed.
    unseen_frees: bool,
}

impl Series {
    /// No scan yet.
    pub fn new() -> Self {
        Series::default()
    }

    /// Frees may have been missed: what nothing refers to is lost only if the allocator's own books can be asked.
    pub fn with_unseen_frees(mut self, unseen_frees: bool) -> Self {
        self.unseen_frees = unseen_frees;
        self
    }

    /// Whether nothing but a lost block can be what nothing refers to.
    fn is_certain(&self, block: &Block) -> bool {
        block.glibc || !self.unseen_frees
    }

    /// Scans so far.
    pub fn scans(&self) -> u32 {
        self.scans
    }

    /// Blocks that no scan has reached.
    pub fn unreached(&self) -> usize {
        self.unreached.len()
    }

    /// Takes a scan in. Blocks born after the `judged_until_ns` of the first scan are not judged: what has just been
    /// allocated may still be on its way to its owner.
    pub fn push(&mut self, index: &Index, marked: &Marked, judged_until_ns: u64) {
        if self.scans == 0 {
            self.judged_until_ns = judged_until_ns;
        }
        let judged_until_ns = self.judged_until_ns;
        let unreached = |(number, block): &(u32, &Block)| {
            block.birth_ns < judged_until_ns && marked.reach(*number) != Reach::Reachable
        };
        let mut addresses = (0_u32..).zip(index.blocks()).filter(unreached).map(|(_, block)| block.address).peekable();
        if self.scans == 0 {
            self.unreached = addresses.collect();
        } else {
            // Both are in order.
            let before = self.unreached.len();
            self.unreached.retain(|address| {
                while addresses.next_if(|a| a < address).is_some() {}
                addresses.peek() == Some(address)
            });
            self.shrinking = self.unreached.len() < before;
        }
        self.scans += 1;
    }

    /// Whether another scan is needed.
    pub fn wants_more(&self, limits: &Limits) -> bool {
        !self.unreached.is_empty() && (self.scans < limits.scans || (self.shrinking && self.scans < limits.most_scans))
            || self.scans == 0
    }

    /// Whether a block is old enough to be judged.
    fn is_judged(&self, block: &Block) -> bool {
        block.birth_ns < self.judged_until_ns
    }

    /// Whether a block that is judged was unreachable in every scan.
    fn is_unreached(&self, block: &Block) -> bool {
        self.unreached.binary_search(&block.address).is_ok()
    }

    /// Whether a block is lost by all scans. `marked` is the last one's, `gone` as for [`Series::verdicts`].
    pub fn is_lost(&self, number: u32, block: &Block, marked: &Marked, gone: &[u32]) -> bool {
        matches!(marked.reach(number), Reach::Lost | Reach::IndirectlyLost)
            && gone.binary_search(&number).is_err()
            && self.is_judged(block)
            && self.is_certain(block)
            && self.is_unreached(block)
    }

    /// What is to be said of each site. `index` and `marked` are those of the last scan; `gone` are the blocks, ascending,
    /// that are not what the table says.
    pub fn verdicts(&self, index: &Index, marked: &Marked, gone: &[u32]) -> HashMap<u32, SiteVerdict> {
        let mut sites: HashMap<u32, SiteVerdict> = HashMap::new();
        for (number, block) in (0_u32..).zip(index.blocks()) {
            let site = sites.entry(block.site).or_default();
            site.scans = self.scans;
            let reached = marked.reach(number) == Reach::Reachable;
            let tally = if reached {
                &mut site.reachable
            } else if !self.is_judged(block) {
                &mut site.young
            } else if !self.is_unreached(block) {
                &mut site.reachable
            } else if gone.binary_search(&number).is_ok() {
                &mut site.gone
            } else {
                match marked.reach(number) {
                    Reach::Reachable => &mut site.reachable,
                    Reach::Possible => &mut site.possible,
                    Reach::Lost | Reach::IndirectlyLost if !self.is_certain(block) => &mut site.possible,
                    Reach::Disguised => &mut site.disguised,
                    Reach::Lost => &mut site.lost,
                    Reach::IndirectlyLost => &mut site.indirectly_lost,
                }
            };
            tally.add(block.size);
        }
        sites
    }

    /// Names of the lost blocks of each site, at most `REMEMBERED` of each: for a [`Ledger`].
    pub fn lost_names(&self, index: &Index, marked: &Marked, gone: &[u32]) -> HashMap<u32, Vec<BlockName>> {
        let mut names: HashMap<u32, Vec<BlockName>> = HashMap::new();
        for (number, block) in (0_u32..).zip(index.blocks()) {
            if self.is_lost(number, block, marked, gone) {
                let of_site = names.entry(block.site).or_default();
                if of_site.len() < REMEMBERED {
                    of_site.push((block.address, block.birth_ns));
                }
            }
        }
        names
    }
}

/// Blocks that were called lost.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    sites: HashMap<u32, Called>,
}

#[derive(Clone, Debug, Default)]
struct Called {
    /// Still outstanding when last looked at, in order.
    names: Vec<BlockName>,
    called: u64,
    refuted: u64,
}

impl Ledger {
    /// Remembers the lost blocks of a finished series, by site. A site's number must mean the same in every series.
    pub fn call(&mut self, lost: HashMap<u32, Vec<BlockName>>) {
        for (site, names) in lost {
            let called = self.sites.entry(site).or_default();
            for name in names {
                let Err(at) = called.names.binary_search(&name) else { continue };
                if called.names.len() < REMEMBERED {
                    called.names.insert(at, name);
                    called.called += 1;
                }
            }
        }
    }

    /// Looks at every remembered block again. `outstanding` is told address and birth.
    pub fn check(&mut self, mut outstanding: impl FnMut(u64, u64) -> bool) {
        for called in self.sites.values_mut() {
            let before = called.names.len();
            called.names.retain(|(address, birth_ns)| outstanding(*address, *birth_ns));
            called.refuted += (before - called.names.len()) as u64;
        }
    }

    /// Puts what is known of a site into its verdict.
    pub fn apply(&self, site: u32, verdict: &mut SiteVerdict) {
        if let Some(called) = self.sites.get(&site) {
            (verdict.called_lost, verdict.refuted) = (called.called, called.refuted);
        }
    }

    /// Of each site: its number, blocks called lost, and refutations.
    pub fn counts(&self) -> impl Iterator<Item = (u32, u64, u64)> {
        self.sites.iter().map(|(site, called)| (*site, called.called, called.refuted))
    }

    /// Blocks that are remembered.
    pub fn len(&self) -> usize {
        self.sites.values().map(|called| called.names.len()).sum()
    }

    /// True when none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::super::mark::tests::Simulated;
    use super::*;

    fn verdict(lost: u64, reachable: u64, possible: u64) -> SiteVerdict {
        let of = |blocks| Tally { blocks, bytes: blocks * 100 };
        SiteVerdict {
            scans: 3,
            lost: of(lost),
            reachable: of(reachable),
            possible: of(possible),
            ..SiteVerdict::default()
        }
    }

    // Half of what can be judged, and at least five blocks.
    #[test]
    fn a_site_is_definite_when_most_of_it_is_lost() {
        let limits = Limits::default();
        assert_eq!(verdict(5, 5, 0).verdict(&limits), Verdict::Definite);
        assert_eq!(verdict(5, 6, 0).verdict(&limits), Verdict::Reachable);
        assert_eq!(verdict(4, 0, 0).verdict(&limits), Verdict::Possible);
        assert_eq!(verdict(0, 3, 9).verdict(&limits), Verdict::Possible);
        // What may be reachable counts as if it were.
        assert_eq!(verdict(5, 2, 3).verdict(&limits), Verdict::Definite);
        assert_eq!(verdict(5, 0, 6).verdict(&limits), Verdict::Possible);
        assert_eq!(verdict(40, 20, 41).verdict(&limits), Verdict::Possible);
        let disguised = SiteVerdict { disguised: Tally { blocks: 6, bytes: 600 }, ..verdict(5, 0, 0) };
        assert_eq!(disguised.verdict(&limits), Verdict::Unknown);
        assert_eq!(verdict(0, 0, 0).verdict(&limits), Verdict::Unknown);
        assert_eq!(SiteVerdict { scans: 2, ..verdict(50, 0, 0) }.verdict(&limits), Verdict::Unknown);
    }

    // As many blocks as the kernel may hold in requests, or any number beside a device's memory, prove nothing.
    #[test]
    fn what_may_be_held_out_of_sight_is_not_definitely_lost() {
        let limits = Limits::default();
        let of = |in_requests, device_bytes| SiteVerdict { in_requests, device_bytes, ..verdict(50, 0, 0) };
        assert_eq!(of(45, 0).verdict(&limits), Verdict::Definite);
        assert_eq!(of(46, 0).verdict(&limits), Verdict::Possible);
        assert_eq!(of(0, 4096).verdict(&limits), Verdict::Possible);
    }

    // A process that stands still moves nothing out of the way of the one scan that there is.
    #[test]
    fn one_scan_is_enough_of_a_process_that_stands_still() {
        let once = SiteVerdict { scans: 1, ..verdict(50, 0, 0) };
        assert_eq!(once.verdict(&Limits::default()), Verdict::Unknown);
        assert_eq!(SiteVerdict { still: true, ..once }.verdict(&Limits::default()), Verdict::Definite);
    }

    // A program that frees what was called lost hides its pointers.
    #[test]
    fn refutations_make_a_site_unknown() {
        let limits = Limits::default();
        let refuted = |n| SiteVerdict { called_lost: 100, refuted: n, ..verdict(50, 0, 0) }.verdict(&limits);
        assert_eq!(refuted(5), Verdict::Definite);
        assert_eq!(refuted(6), Verdict::Unknown);
    }

    // Wilson's interval for 8 of 10 is 0.490 to 0.943 (table in Newcombe, 1998).
    #[test]
    fn the_lost_fraction_has_wilsons_interval() {
        let (p, low, high) = verdict(8, 2, 0).lost_fraction().unwrap();
        assert_eq!(p, 0.8);
        assert!((low - 0.490).abs() < 0.001 && (high - 0.943).abs() < 0.001, "{low} {high}");
        assert_eq!(verdict(0, 0, 4).lost_fraction(), None);
    }

    // A block that moves between lists while the memory is being read is missed by one scan, not by all.
    #[test]
    fn only_what_every_scan_misses_is_lost() {
        let limits = Limits::default();
        let mut memory = Simulated::new(&[(1, 32), (1, 32), (1, 32)]);
        let mut series = Series::new();
        for hidden in [Some(0), None, Some(1)] {
            memory.clear();
            for block in [0, 1].into_iter().filter(|b| Some(*b) != hidden) {
                memory.root(memory.start(block));
            }
            assert!(series.wants_more(&limits));
            let (index, marked) = memory.scan();
            series.push(&index, &marked, 100);
        }
        assert!(!series.wants_more(&limits));
        let (index, marked) = memory.scan();
        let verdict = series.verdicts(&index, &marked, &[])[&1];
        assert_eq!((verdict.lost.blocks, verdict.reachable.blocks), (1, 2));
        let mut ledger = Ledger::default();
        ledger.call(series.lost_names(&index, &marked, &[]));
        ledger.call(series.lost_names(&index, &marked, &[]));
        assert_eq!(ledger.len(), 1);
        let gone = memory.start(2);
        ledger.check(|address, _| address != gone);
        let mut after = verdict;
        ledger.apply(1, &mut after);
        assert_eq!((after.called_lost, after.refuted, ledger.is_empty()), (1, 1, true));
    }

    // Through windows most frees are unseen. glibc's books tell what is free by now; without such books a block that nothing
    // refers to may have been freed.
    #[test]
    fn without_books_unseen_frees_leave_a_loss_uncertain() {
        let memory = Simulated::new(&[(1, 32); 9]);
        let (index, marked) = memory.scan();
        for (unseen_frees, expected) in [(false, Verdict::Definite), (true, Verdict::Possible)] {
            let mut series = Series::new().with_unseen_frees(unseen_frees);
            for _ in 0..3 {
                series.push(&index, &marked, 100);
            }
            let verdict = series.verdicts(&index, &marked, &[])[&1];
            assert_eq!(verdict.verdict(&Limits::default()), expected);
            assert_eq!(series.lost_names(&index, &marked, &[]).is_empty(), unseen_frees);
            assert_eq!(verdict.lost_blocks() + verdict.possible.blocks, 9);
        }
    }

    // What was born after the first scan has not been in all of them.
    #[test]
    fn blocks_born_after_the_first_scan_are_not_judged() {
        let memory = Simulated::new(&[(1, 32)]);
        let (index, marked) = memory.scan();
        let mut series = Series::new();
        for _ in 0..3 {
            series.push(&index, &marked, 0);
        }
        let verdict = series.verdicts(&index, &marked, &[])[&1];
        assert_eq!((verdict.young.blocks, verdict.lost.blocks), (1, 0));
    }
}
