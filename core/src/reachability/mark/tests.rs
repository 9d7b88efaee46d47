use super::super::index::Block;
use super::*;

const HEAP: u64 = 0x10_0000;
const GLOBALS: u64 = 0x1000;

/// A made-up process: blocks 64 bytes and more apart in a heap, and globals that hold roots.
pub(crate) struct Simulated {
    blocks: Vec<Block>,
    heap: Vec<u64>,
    globals: Vec<u64>,
}

impl Simulated {
    /// Blocks by site and size.
    pub(crate) fn new(blocks: &[(u32, u64)]) -> Self {
        let mut at = HEAP;
        let place = |&(site, size): &(u32, u64)| {
            let block = Block { address: at, size, birth_ns: 1, site, glibc: false };
            at += size.next_multiple_of(64) + 64;
            block
        };
        let blocks: Vec<Block> = blocks.iter().map(place).collect();
        Simulated { blocks, heap: vec![0; ((at - HEAP) / 8) as usize], globals: Vec::new() }
    }

    pub(crate) fn start(&self, block: usize) -> u64 {
        self.blocks[block].address
    }

    pub(crate) fn root(&mut self, value: u64) {
        self.globals.push(value);
    }

    pub(crate) fn clear(&mut self) {
        self.globals.clear();
        self.heap.fill(0);
    }

    /// Stores `value` in word `word` of a block.
    fn store(&mut self, block: usize, word: u64, value: u64) {
        let at = (self.blocks[block].address - HEAP) / 8 + word;
        self.heap[at as usize] = value;
    }

    fn scan_with(&self, learned: &Learned, cap: Option<usize>) -> (Index, Marked) {
        let index = Index::new(self.blocks.clone());
        let mut scan = Scan::new(&index, learned);
        scan.most_edges = cap.unwrap_or(scan.most_edges);
        let bytes = |words: &[u64]| words.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
        // The heap first: nothing is known to be reached when its references are seen.
        for (n, chunk) in bytes(&self.heap).chunks(192).enumerate() {
            scan.visit(HEAP + 192 * n as u64, chunk);
        }
        scan.visit(GLOBALS, &bytes(&self.globals));
        let marked = scan.finish(&mut Replay(&self.heap));
        (index, marked)
    }

    pub(crate) fn scan(&self) -> (Index, Marked) {
        self.scan_with(&Learned::default(), None)
    }

    fn reaches(&self) -> Vec<Reach> {
        let (index, marked) = self.scan();
        let reaches: Vec<Reach> = (0..index.blocks().len() as u32).map(|n| marked.reach(n)).collect();
        // Nothing may depend on how many references fit.
        let (_, again) = self.scan_with(&Learned::default(), Some(0));
        assert_eq!(reaches, (0..reaches.len() as u32).map(|n| again.reach(n)).collect::<Vec<_>>());
        reaches
    }
}

/// The heap of a simulated process, to be read again.
struct Replay<'a>(&'a [u64]);

impl Memory for Replay<'_> {
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> usize {
        let first = ((address - HEAP) / 8) as usize;
        let words = buffer.len().div_ceil(8).min(self.0.len() - first);
        for (to, from) in buffer.chunks_mut(8).zip(&self.0[first..first + words]) {
            to.copy_from_slice(&from.to_ne_bytes()[..to.len()]);
        }
        buffer.len().min(8 * words)
    }
}

use Reach::{Disguised, IndirectlyLost, Lost, Possible, Reachable};

// A global points at a list's head: the whole list is reachable, what nothing points at is lost.
#[test]
fn a_list_is_reachable_from_its_head() {
    let mut memory = Simulated::new(&[(1, 32), (1, 32), (1, 32), (1, 32)]);
    memory.root(memory.start(1));
    memory.store(1, 0, memory.start(0));
    memory.store(0, 1, memory.start(2));
    assert_eq!(memory.reaches(), [Reachable, Reachable, Reachable, Lost]);
    let (_, marked) = memory.scan();
    assert_eq!(marked.chain(2, 9), [Referrer::Block(0), Referrer::Block(1), Referrer::Root(GLOBALS)]);
    assert_eq!(marked.chain(3, 9), []);
    assert_eq!(marked.chain(2, 1), [Referrer::Block(0)]);
}

// The head of a lost list is lost, its members only with it.
#[test]
fn members_of_a_lost_list_are_indirectly_lost() {
    let mut memory = Simulated::new(&[(1, 32), (1, 32), (1, 32)]);
    memory.store(2, 0, memory.start(0));
    memory.store(0, 3, memory.start(1) + 8);
    assert_eq!(memory.reaches(), [IndirectlyLost, IndirectlyLost, Lost]);
}

// Blocks that refer to one another in a ring keep nothing alive; one stands for all.
#[test]
fn a_ring_is_lost() {
    let mut memory = Simulated::new(&[(1, 32), (1, 32), (1, 32)]);
    for block in 0..3 {
        memory.store(block, 0, memory.start((block + 1) % 3));
    }
    assert_eq!(memory.reaches(), [Lost, IndirectlyLost, IndirectlyLost]);
    memory.store(1, 1, memory.start(1));
    assert_eq!(memory.reaches(), [Lost, IndirectlyLost, IndirectlyLost]);
}

// A single block is referenced in its middle: nothing says that this is no stale word.
#[test]
fn an_unusual_interior_pointer_makes_a_block_possible() {
    let mut memory = Simulated::new(&[(1, 64), (2, 32), (2, 32)]);
    memory.root(memory.start(0) + 40);
    memory.store(0, 0, memory.start(1));
    // A strong reference on the way does not undo a weak one before it.
    memory.store(1, 0, memory.start(2));
    assert_eq!(memory.reaches(), [Possible, Possible, Possible]);
}

// A pointer behind the end belongs to whatever comes next.
#[test]
fn a_pointer_behind_the_end_refers_to_nothing() {
    let mut memory = Simulated::new(&[(1, 64)]);
    memory.root(memory.start(0) + 64);
    assert_eq!(memory.reaches(), [Lost]);
}

// Strings with a header: every block is referenced 16 bytes behind its start. The second scan knows.
#[test]
fn offsets_that_a_site_uses_throughout_are_learned() {
    let mut memory = Simulated::new(&[(7, 48); 20]);
    for block in 0..19 {
        memory.root(memory.start(block) + 16);
    }
    memory.root(memory.start(3) + 24);
    let (_, first) = memory.scan();
    assert_eq!(first.reach(0), Possible);
    assert_eq!((first.learned.offsets(7), first.learned.offsets(8)), (&[16_u64][..], &[][..]));
    let (_, second) = memory.scan_with(&first.learned, None);
    assert_eq!((second.reach(0), second.reach(18), second.reach(19)), (Reachable, Reachable, Lost));
    assert_eq!(second.learned, first.learned);
}

// Too few blocks, or too few of them at the same offset, are no habit.
#[test]
fn a_few_interior_pointers_teach_nothing() {
    let mut memory = Simulated::new(&[(7, 48), (7, 48), (7, 48), (7, 48), (8, 48), (8, 48), (8, 48), (8, 48), (8, 48)]);
    for block in (0..4).chain(4..7) {
        memory.root(memory.start(block) + 16);
    }
    assert_eq!(memory.scan().1.learned, Learned::default());
}

// Script engines box pointers in NaNs; what such a block holds cannot be called lost either.
#[test]
fn a_tagged_pointer_disguises_a_block() {
    let mut memory = Simulated::new(&[(1, 32), (1, 32), (1, 32)]);
    memory.root(0xfffa_0000_0000_0000 | memory.start(0));
    memory.store(0, 0, memory.start(1));
    assert_eq!(memory.reaches(), [Disguised, Possible, Lost]);
}

// A table too large to keep its references is read again when it turns out to be reachable.
#[test]
fn a_large_table_is_read_again() {
    let mut sizes = vec![(1, 2 * LARGE)];
    sizes.extend([(2, 16); 100]);
    let mut memory = Simulated::new(&sizes);
    for n in 0..100 {
        memory.store(0, 150 * n, memory.start(1 + n as usize));
    }
    assert_eq!(memory.reaches()[1..], [IndirectlyLost; 100]);
    memory.root(memory.start(0));
    assert_eq!(memory.reaches(), [Reachable; 101]);
}

// A pointer that only a register holds.
#[test]
fn a_register_is_a_root() {
    let memory = Simulated::new(&[(1, 32)]);
    let index = Index::new(memory.blocks.clone());
    let learned = Learned::default();
    let mut scan = Scan::new(&index, &learned);
    scan.visit_register(0, memory.start(0));
    assert_eq!(scan.finish(&mut Replay(&memory.heap)).reach(0), Reachable);
}
