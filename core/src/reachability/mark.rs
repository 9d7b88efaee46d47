//! One scan: references in, reachability of every block out.
//!
//! Memory is shown to a [`Scan`] piece by piece. A reference from a root or from a block that is already known to be
//! reached marks its block at once; one from any other block is kept until the walk at the end. What is kept is
//! bounded: blocks whose references do not fit are read a second time if the walk comes to them. The walk can be given up,
//! and told to rest, like the reading.
//!
//! References differ in strength. One to a block's start is strong. So is one to an offset at which most blocks of the
//! site are referenced ([`Learned`]): allocators' and strings' headers, members of intrusive lists. Any other reference
//! into a block is weak: uninitialised memory is full of stale ones.

use std::collections::{HashMap, VecDeque};

use super::coded::Coded;
use super::index::{ADDRESS_BITS, Hit, Index, fetch};
use super::memory::Memory;
use crate::error::Result;

/// References are kept for so many per block, on average, and this many more.
const KEPT_PER_BLOCK: usize = 1;
const KEPT_MORE: usize = 2 << 20;
/// Blocks from this size on are read again rather than have their references kept, bytes.
const LARGE: u64 = 64 << 10;
/// Bytes read at once in the walk.
const CHUNK: usize = 1 << 20;
/// Bits of an address that hold the address: the rest may be a tag (`NaN` boxing, top-byte tags).
const UNTAGGED: u64 = (1 << ADDRESS_BITS) - 1;
/// Blocks of the walk between two rests.
const STEPS: u32 = 1024;
/// So many blocks ahead of the walk what it needs is fetched.
const AHEAD: usize = 8;

/// Blocks of each site whose offsets are looked at, and of all sites together.
const SAMPLED_PER_SITE: u32 = 128;
const SAMPLED: usize = 1 << 17;
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
const IN_SAMPLE: u8 = 16;
/// Referenced by a block that is lost itself.
const INDIRECT: u8 = 32;

/// In a kept reference: it is weak; it is the last of its source.
const WEAK_EDGE: u32 = 1 << 31;
const LAST_EDGE: u32 = 1 << 30;
const TARGET: u32 = LAST_EDGE - 1;
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
pub struct Learned(Vec<Vec<u64>>);

impl Learned {
    /// Whether blocks of a site are habitually referenced at an offset.
    fn knows(&self, site: u32, offset: u64) -> bool {
        self.offsets(site).binary_search(&offset).is_ok()
    }

    /// The offsets of a site, ascending; empty when none is known.
    pub fn offsets(&self, site: u32) -> &[u64] {
        self.0.get(site as usize).map_or(&[], Vec::as_slice)
    }

    fn add(&mut self, site: u32, offset: u64) {
        let offsets = at(&mut self.0, site);
        if let Err(place) = offsets.binary_search(&offset) {
            offsets.insert(place, offset);
        }
    }
}

/// The entry of a site in a table that grows as needed.
fn at<T: Clone + Default>(table: &mut Vec<T>, site: u32) -> &mut T {
    if table.len() <= site as usize {
        table.resize(site as usize + 1, T::default());
    }
    &mut table[site as usize]
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
    /// Kept references: target, strength, and whether another one of the same source follows.
    edges: Vec<u32>,
    /// Per block: one more than the place of its first kept reference; 0 when none is kept.
    first_edges: Vec<u32>,
    /// The block whose references were kept last: they lie together.
    newest_source: u32,
    most_edges: usize,
    /// All memory has been seen: the walk goes on from whatever is reached.
    is_walking: bool,
    /// Reached in the walk, and not yet walked from.
    queue: VecDeque<u32>,
    offsets: HashMap<u32, Vec<u64>>,
    /// Looks for pointers that were XOR-ed.
    coded: Option<&'a mut Coded>,
    /// Blocks in glibc's lists of free blocks; see [`Scan::with_free_lists`].
    linked: Option<Vec<u32>>,
}

/// What the walk at the end of a scan needs beside the scan.
struct Walk<'w> {
    memory: &'w mut dyn Memory,
    buffer: Vec<u8>,
    go_on: &'w mut dyn FnMut() -> Result<()>,
    steps: u32,
}

impl Walk<'_> {
    /// To be called for every block.
    fn step(&mut self) -> Result<()> {
        self.steps += 1;
        if self.steps < STEPS {
            return Ok(());
        }
        self.steps = 0;
        (self.go_on)()
    }
}

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
            first_edges: vec![0; count],
            newest_source: u32::MAX,
            most_edges: (count * KEPT_PER_BLOCK + KEPT_MORE).min(u32::MAX as usize),
            is_walking: false,
            queue: VecDeque::new(),
            offsets: HashMap::new(),
            coded: None,
            linked: None,
        };
        scan.choose_samples();
        scan
    }

    /// Also collects words that may be pointers XOR-ed with a constant.
    pub fn with_coded(mut self, coded: &'a mut Coded) -> Self {
        self.coded = Some(coded);
        self
    }

    /// Also looks for blocks in glibc's free lists: they have been freed, and nobody saw it. The links of those lists are
    /// XOR-ed with where they lie, shifted by 12 ("safe linking", glibc 2.32).
    pub fn with_free_lists(mut self) -> Self {
        self.linked = Some(Vec::new());
        self
    }

    /// Looks whether the word at a place where a free block may begin is a link to another one.
    fn look_at_link(&mut self, place: u64, word: u64) {
        let address = word ^ (place >> 12);
        let starts = [address, address.wrapping_add(HEADER)];
        if !starts.iter().any(|start| self.index.may_find(*start)) {
            return;
        }
        // Within a block there is only what was left over in it.
        if matches!(self.index.find(place), Some((_, offset)) if offset > 0) {
            return;
        }
        let targets = starts.iter().filter_map(|start| self.index.find(*start));
        for (target, _) in targets.filter(|(_, offset)| *offset == 0) {
            if let Some(linked) = self.linked.as_mut().filter(|linked| linked.len() < MAX_LINKED) {
                linked.push(target);
            }
        }
    }

    /// Blocks spread evenly over each site's.
    fn choose_samples(&mut self) {
        let mut sizes: Vec<u32> = Vec::new();
        for block in self.index.blocks() {
            *at(&mut sizes, block.site) += 1;
        }
        let sites = sizes.iter().filter(|size| **size > 0).count();
        let most = (SAMPLED / sites.max(1)).clamp(MIN_SAMPLED as usize, SAMPLED_PER_SITE as usize) as u32;
        let mut seen = vec![0_u32; sizes.len()];
        for (block, flags) in self.index.blocks().iter().zip(&mut self.flags) {
            let stride = sizes[block.site as usize].div_ceil(most);
            let number = &mut seen[block.site as usize];
            if number.is_multiple_of(stride) {
                *flags |= IN_SAMPLE;
            }
            *number += 1;
        }
    }

    /// Shows the scan what lies at `address` (a multiple of 8; a rest of less than 8 bytes is left out).
    pub fn visit(&mut self, address: u64, bytes: &[u8]) {
        let words = bytes.as_chunks::<8>().0;
        self.look_behind_tags(words);
        if self.linked.is_some() {
            // Blocks begin at multiples of 16.
            let first = usize::from(!address.is_multiple_of(16));
            for (n, word) in words.iter().enumerate().skip(first).step_by(2) {
                self.look_at_link(address + 8 * n as u64, u64::from_ne_bytes(*word));
            }
        }
        let index = self.index;
        let mut next = index.first_ending_behind(address);
        index.find_all(words, |hits| {
            for hit in hits {
                fetch(&self.flags, hit.block as usize);
                fetch(&self.parents, hit.block as usize);
            }
            for hit in hits {
                let place = address + 8 * hit.place as u64;
                while index.blocks().get(next as usize).is_some_and(|b| b.end() <= place) {
                    next += 1;
                }
                let is_within = index.blocks().get(next as usize).is_some_and(|b| b.address <= place);
                let strong = self.is_strong(hit.block, hit.offset);
                if !is_within {
                    self.reach(hit.block, strong, Referrer::Root(place));
                } else if self.flags[next as usize] & STRONG != 0 {
                    self.reach(hit.block, strong, Referrer::Block(next));
                } else {
                    self.keep(next, hit.block, strong);
                }
            }
        });
    }

    /// A root that is no memory: a register's value. `address` says in [`Marked::referrer`] where it came from.
    pub fn visit_register(&mut self, address: u64, value: u64) {
        self.look_behind_tags(&[value.to_ne_bytes()]);
        if let Some((target, offset)) = self.index.find(value) {
            let strong = self.is_strong(target, offset);
            self.reach(target, strong, Referrer::Root(address));
        }
    }

    /// Whether a reference so far behind a block's start is one that counts. Habits are learned from it.
    fn is_strong(&mut self, target: u32, offset: u64) -> bool {
        if offset == 0 {
            return true;
        }
        if self.flags[target as usize] & IN_SAMPLE != 0 {
            self.note_offset(target, offset);
        }
        self.learned.knows(self.index.blocks()[target as usize].site, offset)
    }

    /// Keeps a reference for the walk.
    fn keep(&mut self, source: u32, target: u32, strong: bool) {
        let edge = if strong { target } else { target | WEAK_EDGE };
        let number = source as usize;
        // What is reached strongly already needs no other reference, and will not be lost.
        if target == source || self.flags[number] & REREAD != 0 || self.flags[target as usize] & STRONG != 0 {
            return;
        }
        let is_first = self.first_edges[number] == 0;
        let goes_on = !is_first && self.newest_source == source;
        if goes_on && self.edges.last() == Some(&(edge | LAST_EDGE)) {
            return;
        }
        // A block that is seen in two parts, with others between them, is no exception worth more memory.
        let is_apart = !is_first && !goes_on;
        if is_apart || self.edges.len() >= self.most_edges || self.index.blocks()[number].size >= LARGE {
            self.flags[number] |= REREAD;
            return;
        }
        if is_first {
            self.first_edges[number] = self.edges.len() as u32 + 1;
        } else if let Some(last) = self.edges.last_mut() {
            *last &= !LAST_EDGE;
        }
        self.newest_source = source;
        self.edges.push(edge | LAST_EDGE);
    }

    #[cold]
    fn note_offset(&mut self, target: u32, offset: u64) {
        let offsets = self.offsets.entry(target).or_default();
        if offsets.len() < OFFSETS_PER_BLOCK && !offsets.contains(&offset) {
            offsets.push(offset);
        }
    }

    /// Words whose upper bits are set are no addresses, but may be ones with a tag.
    fn look_behind_tags(&mut self, words: &[[u8; 8]]) {
        let mut last = 0;
        for word in words {
            let word = u64::from_ne_bytes(*word);
            if word <= UNTAGGED || word == last {
                continue;
            }
            last = word;
            if let Some(coded) = &mut self.coded {
                coded.see(word);
            }
            if self.index.may_find(word & UNTAGGED)
                && let Some((target, 0)) = self.index.find(word & UNTAGGED)
            {
                self.flags[target as usize] |= TAGGED;
            }
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
        if strong && self.is_walking {
            self.queue.push_back(target);
        }
    }

    /// Walks from what was reached and says how each block can be. `memory` is read again for blocks whose references
    /// were not kept; `go_on` is called now and then.
    ///
    /// # Errors
    /// Those of `go_on`, which end the walk.
    pub fn finish(mut self, memory: &mut dyn Memory, go_on: &mut dyn FnMut() -> Result<()>) -> Result<Marked> {
        let mut walk = Walk { memory, buffer: vec![0; CHUNK], go_on, steps: 0 };
        self.is_walking = true;
        // Of what was reached while memory was shown, what has been seen before that was not followed.
        let is_open = |(number, flags): &(u32, &u8)| {
            **flags & STRONG != 0 && (**flags & REREAD != 0 || self.first_edges[*number as usize] != 0)
        };
        self.queue = (0..).zip(&self.flags).filter(is_open).map(|(number, _)| number).collect();
        // Breadth first, so that the way back to the root is short.
        while let Some(block) = self.queue.pop_front() {
            self.look_ahead();
            self.walk_from(block, true, &mut walk)?;
        }
        // Then onwards from what only a weak reference or a tagged pointer reaches: all that follows is only possible.
        self.queue = numbers(&self.flags, |f| f & STRONG == 0 && f & (WEAK | TAGGED) != 0).into();
        while let Some(block) = self.queue.pop_front() {
            self.walk_from(block, false, &mut walk)?;
        }
        self.tell_indirect(&mut walk)?;
        let learned = self.learn();
        let mut linked = self.linked.unwrap_or_default();
        linked.sort_unstable();
        linked.dedup();
        Ok(Marked { flags: self.flags, parents: self.parents, learned, linked })
    }

    /// Fetches what the walk will need of the blocks that are next: they lie all over the tables.
    fn look_ahead(&self) {
        let first_edge = |block: &u32| (self.first_edges[*block as usize] as usize).checked_sub(1);
        if let Some(block) = self.queue.get(3 * AHEAD) {
            fetch(&self.first_edges, *block as usize);
        }
        if let Some(edge) = self.queue.get(2 * AHEAD).and_then(first_edge) {
            fetch(&self.edges, edge);
        }
        if let Some(edge) = self.queue.get(AHEAD).and_then(first_edge) {
            let target = (self.edges[edge] & TARGET) as usize;
            fetch(&self.flags, target);
            fetch(&self.parents, target);
        }
    }

    fn walk_from(&mut self, block: u32, strongly: bool, walk: &mut Walk<'_>) -> Result<()> {
        self.for_each_target(block, walk, &mut |scan, target, strong| {
            scan.reach_onwards(target, strongly, strong, block);
        })
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

    /// Calls `visit` with the target of every reference in a block, and whether it is strong.
    fn for_each_target(
        &mut self,
        block: u32,
        walk: &mut Walk<'_>,
        visit: &mut dyn FnMut(&mut Self, u32, bool),
    ) -> Result<()> {
        walk.step()?;
        let mut next = self.first_edges[block as usize] as usize;
        while let Some(edge) = next.checked_sub(1).and_then(|at| self.edges.get(at).copied()) {
            visit(self, edge & TARGET, edge & WEAK_EDGE == 0);
            next = if edge & LAST_EDGE == 0 { next + 1 } else { 0 };
        }
        if self.flags[block as usize] & REREAD == 0 {
            return Ok(());
        }
        let (index, learned) = (self.index, self.learned);
        let b = index.blocks()[block as usize];
        let mut at = b.address.next_multiple_of(8);
        while at < b.end() {
            (walk.go_on)()?;
            let want = ((b.end() - at) as usize).min(walk.buffer.len());
            let got = walk.memory.read(at, &mut walk.buffer[..want]);
            index.find_all(walk.buffer[..got].as_chunks::<8>().0, |hits| {
                hits.iter().for_each(|hit| fetch(&self.flags, hit.block as usize));
                for Hit { block, offset, .. } in hits {
                    let strong = *offset == 0 || learned.knows(index.blocks()[*block as usize].site, *offset);
                    visit(self, *block, strong);
                }
            });
            // What cannot be read refers to nothing.
            at = match got {
                0 => walk.memory.behind_gap(at),
                _ => at.saturating_add(got.next_multiple_of(8) as u64),
            };
        }
        Ok(())
    }

    /// Of the lost blocks, those that others of them refer to. Of a ring that nothing else refers to, the first block
    /// stands for all.
    fn tell_indirect(&mut self, walk: &mut Walk<'_>) -> Result<()> {
        let lost: Vec<bool> = self.flags.iter().map(|f| f & (STRONG | WEAK | TAGGED) == 0).collect();
        if !lost.contains(&true) {
            return Ok(());
        }
        let numbers = 0..lost.len() as u32;
        let mut referenced = vec![false; lost.len()];
        for block in numbers.clone().filter(|b| lost[*b as usize]) {
            self.for_each_target(block, walk, &mut |_, target, _| {
                if target != block && lost[target as usize] {
                    referenced[target as usize] = true;
                }
            })?;
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
                    self.for_each_target(block, walk, &mut |_, target, _| {
                        if lost[target as usize] && !walked[target as usize] {
                            walked[target as usize] = true;
                            found.push(target);
                        }
                    })?;
                    for target in found.drain(..) {
                        self.flags[target as usize] |= INDIRECT;
                        queue.push(target);
                    }
                }
            }
        }
        Ok(())
    }

    /// What the sampled blocks say about their sites.
    fn learn(&self) -> Learned {
        let mut sampled: Vec<u32> = Vec::new();
        for (block, flags) in self.index.blocks().iter().zip(&self.flags) {
            if flags & IN_SAMPLE != 0 {
                *at(&mut sampled, block.site) += 1;
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
            let of = sampled[site as usize];
            if of >= MIN_SAMPLED && f64::from(count) >= HABIT * f64::from(of) {
                learned.add(site, offset);
            }
        }
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

fn numbers(flags: &[u8], wanted: impl Fn(u8) -> bool) -> Vec<u32> {
    (0_u32..).zip(flags).filter(|(_, f)| wanted(**f)).map(|(number, _)| number).collect()
}

#[cfg(test)]
pub(super) mod tests;
