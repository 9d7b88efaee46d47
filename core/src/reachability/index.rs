//! Which outstanding block does an address point into?
//!
//! Most words of a process's memory are no pointers. They fail the first test: a map with one bit per GiB of the address
//! space that says where blocks are. Blocks are sorted by address and cut into clusters of neighbours; each cluster has a
//! table of granules, about one per block, that says where to begin to look.

/// Bits of an address of a process.
pub(super) const ADDRESS_BITS: u32 = if cfg!(target_arch = "x86_64") { 47 } else { 48 };
/// Address space that has a bit in the map of regions, as a power of two.
const REGION_BITS: u32 = 30;
const REGIONS: usize = 1 << (ADDRESS_BITS - REGION_BITS);
/// Gap between neighbours that starts a new cluster, in bytes: bounds how uneven a cluster is.
const GAP: u64 = 4 << 20;
/// A block from this size on is a cluster of its own: reserved address space may be terabytes.
const BIG: u64 = 16 << 20;
/// Most blocks of an index: a block's number must leave the top two bits of 32 free.
pub const MAX_BLOCKS: usize = (1 << 30) - 1;
/// Words that are looked at together, and of these the ones whose blocks are.
const BATCH: usize = 2048;
const GROUP: usize = 64;

/// An outstanding allocation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// Its address.
    pub address: u64,
    /// Its size in bytes.
    pub size: u64,
    /// When it was allocated, nanoseconds; with the address it names the block.
    pub birth_ns: u64,
    /// Its allocation site: a number that the caller gives a meaning.
    pub site: u32,
    /// It is glibc's, whose books can be looked at.
    pub glibc: bool,
}

impl Block {
    /// First address behind the block. A block of no bytes still has an address that a pointer may hold.
    pub fn end(&self) -> u64 {
        self.address.saturating_add(self.size.max(1))
    }
}

/// A word that points into a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hit {
    /// Place of the word among those that were looked at.
    pub place: usize,
    /// Number of the block.
    pub block: u32,
    /// How far behind the block's start it points.
    pub offset: u64,
}

/// Asks for an entry of a table that will be needed soon, so that it need not be waited for then.
#[inline]
pub(super) fn fetch<T>(table: &[T], at: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(entry) = table.get(at) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint that changes nothing, and every x86-64 processor knows it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(entry).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (table, at);
}

/// Neighbouring blocks.
#[derive(Debug)]
struct Cluster {
    start: u64,
    end: u64,
    /// Size of its granules, as a power of two.
    granule_bits: u32,
    /// Where they begin in `Index::granules`.
    granules: usize,
}

/// Blocks that do not overlap, findable by address.
#[derive(Debug, Default)]
pub struct Index {
    blocks: Vec<Block>,
    clusters: Vec<Cluster>,
    /// Per granule of a cluster: number of the first block that ends behind the granule's start. One more entry per
    /// cluster closes it.
    granules: Vec<u32>,
    /// One bit per region: a block reaches into it.
    occupied: Vec<u64>,
    /// Per region, and for all that lies behind the last: number of the first cluster that ends behind its start.
    regions: Vec<u32>,
}

impl Index {
    /// Makes an index. Blocks may come in any order; of blocks that overlap the youngest is kept, since two live blocks
    /// cannot share a byte. Only the first [`MAX_BLOCKS`] are taken.
    pub fn new(mut blocks: Vec<Block>) -> Self {
        blocks.truncate(MAX_BLOCKS);
        blocks.sort_unstable_by_key(|b| (b.address, b.birth_ns));
        drop_overlaps(&mut blocks);
        let mut index = Index { blocks, occupied: vec![0; REGIONS / 64], ..Index::default() };
        let mut first = 0;
        while first < index.blocks.len() {
            first = index.add_cluster(first);
        }
        let mut cluster = 0;
        for region in 0..=REGIONS as u64 {
            while index.clusters.get(cluster).is_some_and(|c| c.end <= region << REGION_BITS) {
                cluster += 1;
            }
            index.regions.push(cluster as u32);
        }
        index
    }

    /// Blocks in order of address.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Makes the cluster that begins with block `first`; returns the first block behind it.
    fn add_cluster(&mut self, first: usize) -> usize {
        let start = self.blocks[first].address;
        let (mut next, mut end) = (first, start);
        while let Some(block) = self.blocks.get(next)
            && (next == first || block.size < BIG && block.address - end < GAP)
        {
            end = block.end();
            next += 1;
            if block.size >= BIG {
                break;
            }
        }
        let count = (next - first) as u64;
        let granule_bits = (3..u64::BITS - 1).find(|bits| (end - start) >> bits < count).unwrap_or(u64::BITS - 1);
        let granules = self.granules.len();
        for number in first..next {
            let block = self.blocks[number];
            // Granules that no block before reaches into begin with this one.
            let last = ((block.end() - 1 - start) >> granule_bits) as usize;
            while self.granules.len() - granules <= last {
                self.granules.push(number as u32);
            }
            let regions = block.address >> REGION_BITS..=(block.end() - 1) >> REGION_BITS;
            for region in regions.take_while(|r| *r < REGIONS as u64) {
                self.occupied[region as usize / 64] |= 1 << (region % 64);
            }
        }
        self.granules.push(next as u32);
        self.clusters.push(Cluster { start, end, granule_bits, granules });
        next
    }

    /// Whether a word may point into a block: false of nearly every word that does not.
    #[inline]
    pub fn may_find(&self, word: u64) -> bool {
        let region = word >> REGION_BITS;
        self.occupied.get((region / 64) as usize).is_some_and(|bits| bits >> (region % 64) & 1 != 0)
    }

    /// The block that `address` points into, and how far behind its start.
    pub fn find(&self, address: u64) -> Option<(u32, u64)> {
        let (first, last) = self.whereabouts(address)?;
        self.find_between(address, first, last)
    }

    /// Numbers of the first and the last block that `address` may point into.
    fn whereabouts(&self, address: u64) -> Option<(u32, u32)> {
        let granule = self.granule(address)?;
        Some((*self.granules.get(granule)?, *self.granules.get(granule + 1)?))
    }

    /// Place in the table of granules.
    #[inline]
    fn granule(&self, address: u64) -> Option<usize> {
        let region = ((address >> REGION_BITS) as usize).min(REGIONS);
        let from = *self.regions.get(region)? as usize;
        let to = self.regions.get(region + 1).map_or(self.clusters.len(), |to| *to as usize + 1);
        let clusters = self.clusters.get(from..to.min(self.clusters.len()))?;
        let cluster = clusters.get(clusters.partition_point(|c| c.end <= address))?;
        Some(cluster.granules + (address.checked_sub(cluster.start)? >> cluster.granule_bits) as usize)
    }

    #[inline]
    fn find_between(&self, address: u64, first: u32, last: u32) -> Option<(u32, u64)> {
        let some = self.blocks.get(first as usize..=(last as usize).min(self.blocks.len().saturating_sub(1)))?;
        let at = some.partition_point(|b| b.end() <= address);
        let block = some.get(at)?;
        Some((first + at as u32, address.checked_sub(block.address)?))
    }

    /// Calls `visit` with every word that points into a block, several at a time. The same as asking [`Index::find`] for
    /// each, but they wait for memory together.
    pub fn find_all(&self, words: &[[u8; 8]], mut visit: impl FnMut(&[Hit])) {
        let mut places = [0_u16; BATCH];
        let mut granules = [0; GROUP];
        let mut between = [(0_u32, 0_u32); GROUP];
        let mut hits = [Hit::default(); GROUP];
        for (number, batch) in words.chunks(BATCH).enumerate() {
            let mut count = 0;
            for (place, word) in batch.iter().enumerate() {
                places[count] = place as u16;
                count += usize::from(self.may_find(u64::from_ne_bytes(*word)));
            }
            for group in places[..count].chunks(GROUP) {
                let word = |place: &u16| u64::from_ne_bytes(batch[usize::from(*place)]);
                for (granule, place) in granules.iter_mut().zip(group) {
                    *granule = self.granule(word(place)).unwrap_or(usize::MAX);
                    fetch(&self.granules, *granule);
                }
                for (between, granule) in between.iter_mut().zip(&granules[..group.len()]) {
                    // An empty stretch where there is none.
                    let entry = |at: Option<usize>| at.and_then(|at| self.granules.get(at)).copied();
                    *between = match (entry(Some(*granule)), entry(granule.checked_add(1))) {
                        (Some(first), Some(last)) => (first, last),
                        _ => (1, 0),
                    };
                    // Blocks lie across the boundaries of cache lines.
                    fetch(&self.blocks, between.0 as usize);
                    fetch(&self.blocks, between.0.max(between.1) as usize);
                }
                let mut found = 0;
                for ((first, last), place) in between.iter().zip(group) {
                    if let Some((block, offset)) = self.find_between(word(place), *first, *last) {
                        hits[found] = Hit { place: number * BATCH + usize::from(*place), block, offset };
                        found += 1;
                    }
                }
                visit(&hits[..found]);
            }
        }
    }

    /// Number of the first block that ends behind `address`, in any cluster; the number of blocks when there is none.
    pub fn first_ending_behind(&self, address: u64) -> u32 {
        self.blocks.partition_point(|b| b.end() <= address) as u32
    }
}

/// Removes of each pair of overlapping neighbours the older one.
fn drop_overlaps(blocks: &mut Vec<Block>) {
    let mut kept = 0;
    for next in 0..blocks.len() {
        let block = blocks[next];
        // It may cover several before it; it loses to any younger one.
        let mut drop = false;
        while kept > 0 && blocks[kept - 1].end() > block.address {
            if blocks[kept - 1].birth_ns > block.birth_ns {
                drop = true;
                break;
            }
            kept -= 1;
        }
        if !drop {
            blocks[kept] = block;
            kept += 1;
        }
    }
    blocks.truncate(kept);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block(address: u64, size: u64) -> Block {
        Block { address, size, ..Block::default() }
    }

    fn slow_find(blocks: &[Block], address: u64) -> Option<(u32, u64)> {
        let at = blocks.iter().position(|b| b.address <= address && address < b.end())?;
        Some((at as u32, address - blocks[at].address))
    }

    // Start, inside and last byte belong to a block, the byte behind it does not.
    #[test]
    fn a_pointer_finds_the_block_it_points_into() {
        let index = Index::new(vec![block(0x1000, 24), block(0x1020, 8), block(0x2000_0000, 0x5000)]);
        assert_eq!(index.find(0x1000), Some((0, 0)));
        assert_eq!(index.find(0x1017), Some((0, 23)));
        assert_eq!(index.find(0x1018), None);
        assert_eq!(index.find(0x1020), Some((1, 0)));
        assert_eq!(index.find(0x2000_4fff), Some((2, 0x4fff)));
        assert_eq!(index.find(0x2000_5000), None);
        assert_eq!(index.find(0x1000_0000), None);
        assert_eq!(index.find(0), None);
        assert_eq!(index.find(u64::MAX), None);
    }

    // A free was missed: the address belongs to the younger block.
    #[test]
    fn of_overlapping_blocks_the_youngest_stays() {
        let old = Block { birth_ns: 1, ..block(0x1000, 64) };
        let young = Block { birth_ns: 2, ..block(0x1020, 64) };
        assert_eq!(Index::new(vec![old, young]).blocks(), [young]);
        let covering = Block { birth_ns: 3, ..block(0x0ff0, 256) };
        assert_eq!(Index::new(vec![old, young, covering]).blocks(), [covering]);
        let older = Block { birth_ns: 0, ..covering };
        assert_eq!(Index::new(vec![older, young]).blocks(), [young]);
    }

    // Hostile tables must not panic.
    #[test]
    fn blocks_at_the_ends_of_the_address_space_are_found() {
        let index = Index::new(vec![block(0, 0), block(u64::MAX - 8, u64::MAX)]);
        assert_eq!(index.find(0), Some((0, 0)));
        assert_eq!(index.find(u64::MAX - 8), Some((1, 0)));
        assert_eq!(Index::new(Vec::new()).find(5), None);
    }

    proptest! {
        // The page tables change nothing but the time it takes.
        #[test]
        fn finds_what_a_slow_search_finds(
            raw in proptest::collection::vec((0_u64..3_000_000, 0_u64..20_000, 0_u64..5, 0_u64..3), 0..60),
            words in proptest::collection::vec(0_u64..40_000_000, 200)
        ) {
            // Some lie in other regions, or reach into them.
            let away = |region: u64| region * ((1 << REGION_BITS) - 20_000_000);
            let blocks = raw.iter().map(|&(a, size, birth_ns, region)| {
                Block { address: a * 13 + away(region), size, birth_ns, ..Block::default() }
            });
            let index = Index::new(blocks.collect());
            for pair in index.blocks().windows(2) {
                prop_assert!(pair[0].end() <= pair[1].address);
            }
            let edges = index.blocks().iter().flat_map(|b| [b.address, b.end() - 1, b.end()]);
            for word in words.iter().copied().chain(edges.clone()) {
                let found = slow_find(index.blocks(), word);
                prop_assert_eq!(index.find(word), found);
                prop_assert!(found.is_none() || index.may_find(word));
                let first = index.blocks().iter().position(|b| b.end() > word).unwrap_or(index.blocks().len());
                prop_assert_eq!(index.first_ending_behind(word) as usize, first);
            }
            let all: Vec<u64> = words.iter().copied().chain(edges).cycle().take(5000).collect();
            let bytes: Vec<[u8; 8]> = all.iter().map(|word| word.to_ne_bytes()).collect();
            let mut found = Vec::new();
            index.find_all(&bytes, |hits| found.extend(hits.iter().map(|h| (h.place, h.block, h.offset))));
            let slow = all.iter().enumerate().filter_map(|(n, word)| slow_find(index.blocks(), *word).map(|(b, o)| (n, b, o)));
            prop_assert_eq!(found, slow.collect::<Vec<_>>());
        }
    }
}
