//! One scan: references in, reachability of every block out.
//!
//! Memory is shown to a [`Scan`] piece by piece. A reference from a root or from a block that is already known to be
//! reached marks its block at once; one from any other block is kept until the walk at the end. What is kept is
//! bounded: blocks whose references do not fit are read a second time if the walk comes to them.
//!
//! References differ in strength. One to a block's start is strong. So is one to an offset at which most blocks of the
//! site are referenced ([`Learned`]): allocators' and strings' headers, members of intrusive lists. Any other reference
//! into a block is weak: uninitialised memory is full of stale ones.

use std::collections::{HashMap, VecDeque};

use super::coded::Coded;
use super::index::Index;
use super::memory::Memory;

/// References are kept for so many per block, on average, and this many more.
const KEPT_PER_BLOCK: usize = 1;
const KEPT_MORE: usize = 2 << 20;
/// Blocks from this size on are read again rather than have their references kept, bytes.
const LARGE: u64 = 64 << 10;
/// Bytes read at once in the walk.
const CHUNK: usize = 1 << 20;
/// Bits of an address that hold the address: the rest may be a tag (`NaN` boxing, top-byte tags).
const UNTAGGED: u64 = (1 << 47) - 1;

/// Blocks of each site whose offsets are looked at.
const SAMPLED_PER_SITE: u32 = 128;
/// Offsets that are kept for each of them.
const OFFSETS_PER_BLOCK: usize = 8;
/// Fewest sampled blocks that say something about their site.
const MIN_SAMPLED: u32 = 5;
/// Share of a site's sampled blocks that must be referenced at an offset for it to be the site's habit. Stale
/// references spread over many offsets: at 20 % some pass for a habit.
const HABIT: f64 = 0.8;

const STRONG: u8 = 1;
const WEAK: u8 = 2;
/// A tagged pointer to its start was seen.
const TAGGED: u8 = 4;
/// Its references are not kept: it is read again when the walk comes to it.
const REREAD: u8 = 8;
const SAMPLED: u8 = 16;
/// Referenced by a block that is lost itself.
const INDIRECT: u8 = 32;

/// In a kept reference: it is weak.
const WEAK_EDGE: u64 = 1 << 31;
const TARGET: u64 = WEAK_EDGE - 1;
/// In `parents`: the reference came from the block with this number, not from an address.
const FROM_BLOCK: u64 = 1 << 63;

/// How a block can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reach {
    /// From a root, through strong references only.
    Reachable,
    /// From a root, but only with a weak reference on the way.
    Possible,
    /// Not by any plain pointer, but a tagged pointer to it was seen.
    Disguised,
    /// Nothing refers to it, or only blocks of a lost ring that it was chosen to stand for.
    Lost,
    /// Only lost blocks refer to it.
    IndirectlyLost,
}

/// Per site: offsets behind a block's start at which most of its blocks are referenced, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Learned(HashMap<u32, Vec<u64>>);

impl Learned {
    /// Whether blocks of a site are habitually referenced at an offset.
    fn knows(&self, site: u32, offset: u64) -> bool {
        self.0.get(&site).is_some_and(|offsets| offsets.binary_search(&offset).is_ok())
    }

    /// The offsets of a site, ascending; empty when none is known.
    pub fn offsets(&self, site: u32) -> &[u64] {
        self.0.get(&site).map_or(&[], Vec::as_slice)
    }
}

/// Where a reference is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Referrer {
    /// In the tracked block with this number.
    Block(u32),
    /// At this address, in memory that is not tracked.
    Root(u64),
}

impl Referrer {
    fn to_bits(self) -> u64 {
        match self {
            Referrer::Block(number) => FROM_BLOCK | u64::from(number),
            Referrer::Root(address) => address & !FROM_BLOCK,
        }
    }

    fn from_bits(bits: u64) -> Self {
        if bits & FROM_BLOCK == 0 { Referrer::Root(bits) } else { Referrer::Block(bits as u32) }
    }
}

/// A scan under way.
#[derive(Debug)]
pub struct Scan<'a> {
    index: &'a Index,
    learned: &'a Learned,
    flags: Vec<u8>,
    parents: Vec<u64>,
    /// Kept references: source in the upper half, strength and target in the lower.
    edges: Vec<u64>,
    most_edges: usize,
    /// Reached, and not yet walked from.
    queue: VecDeque<u32>,
    offsets: HashMap<u32, Vec<u64>>,
    words: u64,
    /// Looks for pointers that were XOR-ed.
    coded: Option<&'a mut Coded>,
    /// Looks for free lists; see [`Scan::with_free_lists`].
    free_lists: Option<FreeLists>,
}

/// glibc's lists of free blocks: their links are XOR-ed with where they lie, shifted by 12 ("safe linking", glibc 2.32).
#[derive(Debug, Default)]
struct FreeLists {
    /// Upper bits of the addresses of blocks, from and to.
    span: (u64, u64),
    /// Blocks that such a link leads to.
    linked: Vec<u32>,
}

/// A link differs from an address in fewer low bits than this.
const LINK_BITS: u32 = 36;
/// Most blocks in free lists that are kept.
const MAX_LINKED: usize = 1 << 20;
/// Links of fast bins lead to the header, which lies so many bytes before the block.
const HEADER: u64 = 16;

impl<'a> Scan<'a> {
    /// A scan over the blocks of `index`. `learned` comes from an earlier scan of the same sites; without it every
    /// reference that is not to a start is weak.
    pub fn new(index: &'a Index, learned: &'a Learned) -> Self {
        let count = index.blocks().len();
        let mut scan = Scan {
            index,
            learned,
            flags: vec![0; count],
            parents: vec![0; count],
            edges: Vec::new(),
            most_edges: count * KEPT_PER_BLOCK + KEPT_MORE,
            queue: VecDeque::new(),
            offsets: HashMap::new(),
            words: 0,
            coded: None,
            free_lists: None,
        };
        scan.choose_samples();
        scan
    }

    /// Also collects words that may be pointers XOR-ed with a constant.
    pub fn with_coded(mut self, coded: &'a mut Coded) -> Self {
        self.coded = Some(coded);
        self
    }

    /// Also looks for blocks in glibc's free lists: they have been freed, and nobody saw it.
    pub fn with_free_lists(mut self) -> Self {
        let blocks = self.index.blocks();
        let upper = |block: Option<&super::Block>| block.map_or(0, |b| b.address >> LINK_BITS);
        self.free_lists = Some(FreeLists { span: (upper(blocks.first()), upper(blocks.last())), linked: Vec::new() });
        self
    }

    /// Looks whether the word at the start of a free block is a link to another one.
    fn look_at_link(&mut self, at: u64, word: u64) {
        let Some(lists) = &mut self.free_lists else { return };
        let upper = word >> LINK_BITS;
        if upper < lists.span.0 || upper > lists.span.1 || lists.linked.len() >= MAX_LINKED {
            return;
        }
        let address = word ^ (at >> 12);
        for start in [address, address.wrapping_add(HEADER)] {
            if let Some((target, 0)) = self.index.find(start) {
                lists.linked.push(target);
            }
        }
    }

    /// Blocks spread evenly over each site's.
    fn choose_samples(&mut self) {
        let mut sizes: HashMap<u32, u32> = HashMap::new();
        for block in self.index.blocks() {
            *sizes.entry(block.site).or_default() += 1;
        }
        let mut seen: HashMap<u32, u32> = HashMap::new();
        for (block, flags) in self.index.blocks().iter().zip(&mut self.flags) {
            let stride = sizes[&block.site].div_ceil(SAMPLED_PER_SITE);
            let number = seen.entry(block.site).or_default();
            if number.is_multiple_of(stride) {
                *flags |= SAMPLED;
            }
            *number += 1;
        }
    }

    /// Shows the scan what lies at `address` (a multiple of 8; a rest of less than 8 bytes is left out).
    pub fn visit(&mut self, address: u64, bytes: &[u8]) {
        let mut at = address;
        let mut rest = bytes;
        let mut next = self.index.first_ending_behind(address);
        while rest.len() >= 8 {
            // A stretch of memory within one block, or between blocks.
            let (source, until) = match self.index.blocks().get(next as usize) {
                Some(b) if b.address <= at => (Some(next), b.end()),
                Some(b) => (None, b.address),
                None => (None, u64::MAX),
            };
            let length = (until - at).next_multiple_of(8).min((rest.len() & !7) as u64) as usize;
            let (stretch, behind) = rest.split_at(length);
            match source {
                Some(number) => self.visit_block(number, at, stretch),
                None => self.visit_root(at, stretch),
            }
            at += length as u64;
            rest = behind;
            while self.index.blocks().get(next as usize).is_some_and(|b| b.end() <= at) {
                next += 1;
            }
        }
    }

    /// A root that is no memory: a register's value. `address` says in [`Marked::referrer`] where it came from.
    pub fn visit_register(&mut self, address: u64, value: u64) {
        self.visit_root(address, &value.to_ne_bytes());
    }

    fn visit_root(&mut self, address: u64, bytes: &[u8]) {
        for (i, word) in words(bytes).enumerate() {
            let at = address + 8 * i as u64;
            if let Some((target, strong)) = self.target(word) {
                self.reach(target, strong, Referrer::Root(at));
            }
            if self.free_lists.is_some() && at.is_multiple_of(16) {
                self.look_at_link(at, word);
            }
        }
    }

    fn visit_block(&mut self, source: u32, at: u64, bytes: &[u8]) {
        if self.free_lists.is_some()
            && self.index.blocks()[source as usize].address == at
            && let Some(word) = words(bytes).next()
        {
            self.look_at_link(at, word);
        }
        let flags = self.flags[source as usize];
        if flags & STRONG != 0 {
            return self.follow(source, true, bytes);
        }
        if self.index.blocks()[source as usize].size >= LARGE {
            self.flags[source as usize] |= REREAD;
        }
        // Its references are needed in any case to learn offsets.
        for word in words(bytes) {
            let Some((target, strong)) = self.target(word) else { continue };
            if target == source || self.flags[source as usize] & REREAD != 0 {
                continue;
            }
            let edge = u64::from(source) << 32 | u64::from(target) | if strong { 0 } else { WEAK_EDGE };
            if self.edges.last() == Some(&edge) {
                continue;
            }
            if self.edges.len() == self.most_edges {
                self.flags[source as usize] |= REREAD;
            } else {
                self.edges.push(edge);
            }
        }
    }

    /// Marks what the content of a reached block refers to.
    fn follow(&mut self, source: u32, strongly: bool, bytes: &[u8]) {
        for word in words(bytes) {
            if let Some((target, strong)) = self.target(word) {
                self.reach(target, strong && strongly, Referrer::Block(source));
            }
        }
    }

    /// The block that a word refers to, and whether strongly.
    #[inline]
    fn target(&mut self, word: u64) -> Option<(u32, bool)> {
        self.words += 1;
        let Some((target, offset)) = self.index.find(word) else {
            if word > UNTAGGED {
                self.look_behind_tag(word);
            }
            return None;
        };
        if offset == 0 {
            return Some((target, true));
        }
        if self.flags[target as usize] & SAMPLED != 0 {
            self.note_offset(target, offset);
        }
        Some((target, self.learned.knows(self.index.blocks()[target as usize].site, offset)))
    }

    #[cold]
    fn note_offset(&mut self, target: u32, offset: u64) {
        let offsets = self.offsets.entry(target).or_default();
        if offsets.len() < OFFSETS_PER_BLOCK && !offsets.contains(&offset) {
            offsets.push(offset);
        }
    }

    /// A word whose upper bits are set is no address, but may be one with a tag.
    fn look_behind_tag(&mut self, word: u64) {
        if let Some(coded) = &mut self.coded {
            coded.see(word);
        }
        if let Some((target, 0)) = self.index.find(word & UNTAGGED) {
            self.flags[target as usize] |= TAGGED;
        }
    }

    fn reach(&mut self, target: u32, strong: bool, from: Referrer) {
        let flags = &mut self.flags[target as usize];
        let mark = if strong { STRONG } else { WEAK };
        if *flags & (STRONG | mark) != 0 {
            return;
        }
        *flags |= mark;
        self.parents[target as usize] = from.to_bits();
        if strong {
            self.queue.push_back(target);
        }
    }

    /// Walks from what was reached and says how each block can be. `memory` is read again for blocks whose references
    /// were not kept.
    pub fn finish(mut self, memory: &mut dyn Memory) -> Marked {
        self.edges.sort_unstable();
        self.edges.dedup();
        let mut buffer = vec![0; CHUNK];
        // Breadth first, so that the way back to the root is short.
        while let Some(block) = self.queue.pop_front() {
            self.walk_from(block, true, memory, &mut buffer);
        }
        // Then onwards from what only a weak reference or a tagged pointer reaches: all that follows is only possible.
        self.queue = numbers(&self.flags, |f| f & STRONG == 0 && f & (WEAK | TAGGED) != 0).into();
        while let Some(block) = self.queue.pop_front() {
            self.walk_from(block, false, memory, &mut buffer);
        }
        self.tell_indirect(memory, &mut buffer);
        let learned = self.learn();
        let mut linked = self.free_lists.map(|lists| lists.linked).unwrap_or_default();
        linked.sort_unstable();
        linked.dedup();
        Marked { flags: self.flags, parents: self.parents, learned, words: self.words, linked }
    }

    fn walk_from(&mut self, block: u32, strongly: bool, memory: &mut dyn Memory, buffer: &mut [u8]) {
        let first = self.edges.partition_point(|e| e >> 32 < u64::from(block));
        for at in first..self.edges.len() {
            let edge = self.edges[at];
            if edge >> 32 != u64::from(block) {
                break;
            }
            let target = (edge & TARGET) as u32;
            self.reach_onwards(target, strongly, edge & WEAK_EDGE == 0, block);
        }
        if self.flags[block as usize] & REREAD != 0 {
            self.read_again(block, memory, buffer, &mut |scan, target, strong| {
                scan.reach_onwards(target, strongly, strong, block);
            });
        }
    }

    /// As [`Scan::reach`], from a block in the walk. In the second walk, which is not `strongly`, what is newly reached
    /// is walked from as well.
    fn reach_onwards(&mut self, target: u32, strongly: bool, strong: bool, from: u32) {
        let before = self.flags[target as usize];
        self.reach(target, strongly && strong, Referrer::Block(from));
        if !strongly && before & (STRONG | WEAK | TAGGED) == 0 {
            self.queue.push_back(target);
        }
    }

    /// Calls `visit` with every block that the content of `block` refers to.
    fn read_again(
        &mut self,
        block: u32,
        memory: &mut dyn Memory,
        buffer: &mut [u8],
        visit: &mut dyn FnMut(&mut Self, u32, bool),
    ) {
        let b = self.index.blocks()[block as usize];
        let mut at = b.address.next_multiple_of(8);
        while at < b.end() {
            let want = ((b.end() - at) as usize).min(buffer.len());
            let got = memory.read(at, &mut buffer[..want]);
            for word in words(&buffer[..got]) {
                if let Some((target, strong)) = self.target(word) {
                    visit(self, target, strong);
                }
            }
            // What cannot be read refers to nothing.
            at = match got {
                0 => memory.behind_gap(at),
                _ => at.saturating_add(got.next_multiple_of(8) as u64),
            };
        }
    }

    /// Of the lost blocks, those that others of them refer to. Of a ring that nothing else refers to, the first block
    /// stands for all.
    fn tell_indirect(&mut self, memory: &mut dyn Memory, buffer: &mut [u8]) {
        let lost: Vec<bool> = self.flags.iter().map(|f| f & (STRONG | WEAK | TAGGED) == 0).collect();
        if !lost.contains(&true) {
            return;
        }
        let numbers = 0..lost.len() as u32;
        let mut referenced = vec![false; lost.len()];
        for block in numbers.clone().filter(|b| lost[*b as usize]) {
            self.for_each_target(block, memory, buffer, &mut |target| {
                if target != block && lost[target as usize] {
                    referenced[target as usize] = true;
                }
            });
        }
        let mut walked = vec![false; lost.len()];
        let (mut queue, mut found) = (Vec::new(), Vec::new());
        // First from those that nothing refers to; then what is left are rings.
        for only_heads in [true, false] {
            for head in numbers.clone() {
                if !lost[head as usize] || walked[head as usize] || only_heads == referenced[head as usize] {
                    continue;
                }
                walked[head as usize] = true;
                queue.push(head);
                while let Some(block) = queue.pop() {
                    self.for_each_target(block, memory, buffer, &mut |target| {
                        if lost[target as usize] && !walked[target as usize] {
                            walked[target as usize] = true;
                            found.push(target);
                        }
                    });
                    for target in found.drain(..) {
                        self.flags[target as usize] |= INDIRECT;
                        queue.push(target);
                    }
                }
            }
        }
    }

    /// Calls `visit` with the target of every reference in a block, weak ones included.
    fn for_each_target(&mut self, block: u32, memory: &mut dyn Memory, buffer: &mut [u8], visit: &mut dyn FnMut(u32)) {
        let first = self.edges.partition_point(|e| e >> 32 < u64::from(block));
        for edge in self.edges[first..].iter().take_while(|e| *e >> 32 == u64::from(block)) {
            visit((edge & TARGET) as u32);
        }
        if self.flags[block as usize] & REREAD != 0 {
            self.read_again(block, memory, buffer, &mut |_, target, _| visit(target));
        }
    }

    /// What the sampled blocks say about their sites.
    fn learn(&self) -> Learned {
        let mut sampled: HashMap<u32, u32> = HashMap::new();
        for (block, flags) in self.index.blocks().iter().zip(&self.flags) {
            if flags & SAMPLED != 0 {
                *sampled.entry(block.site).or_default() += 1;
            }
        }
        let mut counts: HashMap<(u32, u64), u32> = HashMap::new();
        for (block, offsets) in &self.offsets {
            for offset in offsets {
                *counts.entry((self.index.blocks()[*block as usize].site, *offset)).or_default() += 1;
            }
        }
        let mut learned = Learned::default();
        for ((site, offset), count) in counts {
            let of = sampled.get(&site).copied().unwrap_or(0);
            if of >= MIN_SAMPLED && f64::from(count) >= HABIT * f64::from(of) {
                learned.0.entry(site).or_default().push(offset);
            }
        }
        learned.0.values_mut().for_each(|offsets| offsets.sort_unstable());
        learned
    }
}

/// The outcome of a scan. Blocks go by their number in the [`Index`].
#[derive(Debug)]
pub struct Marked {
    flags: Vec<u8>,
    parents: Vec<u64>,
    /// Offsets at which blocks are habitually referenced, for the next scan.
    pub learned: Learned,
    /// Words that were looked at.
    pub words: u64,
    /// Blocks in free lists of the allocator, ascending; see [`Scan::with_free_lists`].
    pub linked: Vec<u32>,
}

impl Marked {
    /// How a block can be reached.
    pub fn reach(&self, block: u32) -> Reach {
        let flags = self.flags.get(block as usize).copied().unwrap_or(STRONG);
        match flags {
            f if f & STRONG != 0 => Reach::Reachable,
            f if f & WEAK != 0 => Reach::Possible,
            f if f & TAGGED != 0 => Reach::Disguised,
            f if f & INDIRECT != 0 => Reach::IndirectlyLost,
            _ => Reach::Lost,
        }
    }

    /// Where the reference is through which a block was reached first; `None` for a block that was not reached.
    pub fn referrer(&self, block: u32) -> Option<Referrer> {
        matches!(self.reach(block), Reach::Reachable | Reach::Possible)
            .then(|| Referrer::from_bits(self.parents[block as usize]))
    }

    /// The way from a block to its root: its referrer, that one's, and so on, at most `most` steps.
    pub fn chain(&self, block: u32, most: usize) -> Vec<Referrer> {
        let next = |r: &Referrer| match r {
            Referrer::Block(number) => self.referrer(*number),
            Referrer::Root(_) => None,
        };
        std::iter::successors(self.referrer(block), next).take(most).collect()
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word))
}

fn numbers(flags: &[u8], wanted: impl Fn(u8) -> bool) -> Vec<u32> {
    (0_u32..).zip(flags).filter(|(_, f)| wanted(**f)).map(|(number, _)| number).collect()
}

#[cfg(test)]
pub(super) mod tests;
