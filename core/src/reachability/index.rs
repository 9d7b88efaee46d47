//! Which outstanding block does an address point into?
//!
//! Blocks are sorted by address and cut into clusters of neighbours; each cluster has a table with one entry per page
//! that says where to begin to look. Most words of a process's memory are no pointers: they fail a comparison or two.

/// Gap between neighbours that starts a new cluster, in bytes: bounds what page tables waste on gaps.
const GAP: u64 = 4 << 20;
const PAGE_BITS: u32 = 12;
/// A block from this size on is a cluster of its own, without a page table: reserved address space may be terabytes.
const BIG: u64 = 16 << 20;
/// Most blocks of an index: a block's number must leave the top bit of 32 free.
pub const MAX_BLOCKS: usize = (1 << 31) - 1;

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

/// Neighbouring blocks.
#[derive(Debug)]
struct Cluster {
    start: u64,
    end: u64,
    /// Where its pages begin in `Index::pages`; `None`: it is a single block.
    pages: Option<usize>,
    /// Number of its first block.
    first: u32,
}

/// Blocks that do not overlap, findable by address.
#[derive(Debug, Default)]
pub struct Index {
    blocks: Vec<Block>,
    clusters: Vec<Cluster>,
    /// Per page of a cluster: number of the first block that ends behind the page's start. One more entry per cluster
    /// closes it.
    pages: Vec<u32>,
}

impl Index {
    /// Makes an index. Blocks may come in any order; of blocks that overlap the youngest is kept, since two live blocks
    /// cannot share a byte. Only the first [`MAX_BLOCKS`] are taken.
    pub fn new(mut blocks: Vec<Block>) -> Self {
        blocks.truncate(MAX_BLOCKS);
        blocks.sort_unstable_by_key(|b| (b.address, b.birth_ns));
        drop_overlaps(&mut blocks);
        let mut index = Index { blocks, clusters: Vec::new(), pages: Vec::new() };
        let mut first = 0;
        while first < index.blocks.len() {
            first = index.add_cluster(first);
        }
        index
    }

    /// Blocks in order of address.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Makes the cluster that begins with block `first`; returns the first block behind it.
    fn add_cluster(&mut self, first: usize) -> usize {
        let block = self.blocks[first];
        if block.size >= BIG {
            self.clusters.push(Cluster { start: block.address, end: block.end(), pages: None, first: first as u32 });
            return first + 1;
        }
        let start = block.address >> PAGE_BITS << PAGE_BITS;
        let pages = self.pages.len();
        let mut next = first;
        let mut end = block.address;
        while let Some(block) = self.blocks.get(next)
            && block.size < BIG
            && block.address.saturating_sub(end) < GAP
        {
            end = block.end();
            // Pages that nobody before reaches into begin with this block.
            let last_page = (end - 1 - start) >> PAGE_BITS;
            while self.pages.len() - pages <= last_page as usize {
                self.pages.push(next as u32);
            }
            next += 1;
        }
        self.pages.push(next as u32);
        self.clusters.push(Cluster { start, end, pages: Some(pages), first: first as u32 });
        next
    }

    /// The block that `address` points into, and how far behind its start.
    pub fn find(&self, address: u64) -> Option<(u32, u64)> {
        let number = self.at_or_behind(address)?;
        let block = self.blocks.get(number as usize)?;
        (block.address <= address).then(|| (number, address - block.address))
    }

    /// Number of the first block that ends behind `address`, if one of its cluster does.
    fn at_or_behind(&self, address: u64) -> Option<u32> {
        // Nearly every word fails here.
        if address < self.clusters.first()?.start || address >= self.clusters.last()?.end {
            return None;
        }
        let cluster = self.clusters.get(self.clusters.partition_point(|c| c.end <= address))?;
        if address < cluster.start {
            return None;
        }
        let Some(pages) = cluster.pages else { return Some(cluster.first) };
        let page = pages + ((address - cluster.start) >> PAGE_BITS) as usize;
        let first = *self.pages.get(page)?;
        let last = *self.pages.get(page + 1)?;
        let some = self.blocks.get(first as usize..=(last as usize).min(self.blocks.len() - 1))?;
        Some(first + some.partition_point(|b| b.end() <= address) as u32)
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
            raw in proptest::collection::vec((0_u64..3_000_000, 0_u64..20_000, 0_u64..5), 0..60),
            words in proptest::collection::vec(0_u64..40_000_000, 200)
        ) {
            let blocks = raw.iter().map(|&(a, size, birth_ns)| Block { address: a * 13, size, birth_ns, ..Block::default() });
            let index = Index::new(blocks.collect());
            for pair in index.blocks().windows(2) {
                prop_assert!(pair[0].end() <= pair[1].address);
            }
            let edges = index.blocks().iter().flat_map(|b| [b.address, b.end() - 1, b.end()]);
            for word in words.iter().copied().chain(edges) {
                prop_assert_eq!(index.find(word), slow_find(index.blocks(), word));
                let first = index.blocks().iter().position(|b| b.end() > word).unwrap_or(index.blocks().len());
                prop_assert_eq!(index.first_ending_behind(word) as usize, first);
            }
        }
    }
}
