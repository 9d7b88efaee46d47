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
        let marked = scan.finish(&mut Replay(&self.heap), &mut || Ok(())).unwrap();
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
    let marked = scan.finish(&mut Replay(&memory.heap), &mut || Ok(())).unwrap();
    assert_eq!(marked.reach(0), Reachable);
}

// The walk of a scan that is told to stop ends within so many blocks, wherever it is: among what is reachable, what is lost,
// or in the middle of a large block.
#[test]
fn the_walk_can_be_given_up() {
    let stop = || Err(crate::Error::new(crate::ErrorKind::Target, "stop"));
    for (is_held, is_large) in [(true, false), (false, false), (true, true)] {
        let count = if is_large { 1 } else { STEPS as usize + 1 };
        let mut memory = Simulated::new(&vec![(1, if is_large { LARGE } else { 16 }); count]);
        for block in 1..count {
            memory.store(block - 1, 0, memory.start(block));
        }
        if is_held {
            memory.root(memory.start(0));
        }
        let index = Index::new(memory.blocks.clone());
        let learned = Learned::default();
        let run = |go_on: &mut dyn FnMut() -> Result<()>| {
            let mut scan = Scan::new(&index, &learned);
            let bytes = |words: &[u64]| words.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
            scan.visit(HEAP, &bytes(&memory.heap));
            scan.flags[0] |= if is_large { REREAD } else { 0 };
            scan.visit(GLOBALS, &bytes(&memory.globals));
            scan.finish(&mut Replay(&memory.heap), go_on)
        };
        assert!(run(&mut || Ok(())).is_ok());
        assert!(run(&mut { stop }).is_err(), "{is_held} {is_large}");
    }
}

// Both parts of a block count, whatever is seen between them.
#[test]
fn a_block_may_be_seen_in_parts() {
    let mut memory = Simulated::new(&[(1, 64), (1, 32), (1, 32), (1, 32)]);
    memory.store(0, 0, memory.start(1));
    memory.store(0, 5, memory.start(2));
    memory.store(3, 0, memory.start(1));
    let index = Index::new(memory.blocks.clone());
    let learned = Learned::default();
    let mut scan = Scan::new(&index, &learned);
    let bytes = |words: &[u64]| words.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
    scan.visit(memory.start(0), &bytes(&memory.heap[..4]));
    let third = ((memory.start(3) - HEAP) / 8) as usize;
    scan.visit(memory.start(3), &bytes(&memory.heap[third..third + 4]));
    scan.visit(memory.start(0) + 32, &bytes(&memory.heap[4..8]));
    scan.visit(GLOBALS, &bytes(&[memory.start(0)]));
    let marked = scan.finish(&mut Replay(&memory.heap), &mut || Ok(())).unwrap();
    assert_eq!([0, 1, 2, 3].map(|n| marked.reach(n)), [Reachable, Reachable, Reachable, Lost]);
}

// Blocks freed unseen lie in glibc's thread caches and fast bins: links from one to the next are XOR-ed with their place, and
// lead to the block (caches) or to its header (bins). What was left over inside of a block is no such link.
#[test]
fn links_of_free_lists_are_found() {
    let mut memory = Simulated::new(&[(1, 32), (1, 32), (1, 32), (1, 32)]);
    let link = |place: u64, to: u64| (place >> 12) ^ to;
    memory.store(0, 0, link(memory.start(0), memory.start(1)));
    memory.store(1, 0, link(memory.start(1), memory.start(2) - HEADER));
    memory.store(2, 2, link(memory.start(2) + 16, memory.start(3)));
    let index = Index::new(memory.blocks.clone());
    let learned = Learned::default();
    let mut scan = Scan::new(&index, &learned).with_free_lists();
    let bytes: Vec<u8> = memory.heap.iter().flat_map(|w| w.to_ne_bytes()).collect();
    scan.visit(HEAP, &bytes);
    let marked = scan.finish(&mut Replay(&memory.heap), &mut || Ok(())).unwrap();
    assert_eq!(marked.linked, [1, 2]);
}

// The same of the C library that this runs with: as many blocks as fit into a thread's cache.
#[test]
#[cfg(target_env = "gnu")]
fn glibcs_thread_cache_is_found() {
    use crate::reachability::memory::ProcessMemory;
    const CACHED: usize = 7;
    const SIZE: u64 = 1000;
    // SAFETY: plain use of malloc and free; freed memory is read by the kernel only.
    let (blocks, freed) = unsafe {
        let blocks: Vec<u64> = (0..2 * CACHED).map(|_| libc::malloc(SIZE as usize) as u64).collect();
        let freed: Vec<u64> = blocks[..CACHED].to_vec();
        freed.iter().for_each(|b| libc::free(*b as *mut libc::c_void));
        (blocks, freed)
    };
    let of = |address: &u64| Block { address: *address, size: SIZE, ..Block::default() };
    let index = Index::new(blocks.iter().map(of).collect());
    let learned = Learned::default();
    let mut scan = Scan::new(&index, &learned).with_free_lists();
    let mut memory = ProcessMemory::new(std::process::id());
    let mut bytes = [0; SIZE as usize];
    for address in &blocks {
        assert_eq!(memory.read(*address, &mut bytes), bytes.len());
        scan.visit(*address, &bytes);
    }
    let linked = scan.finish(&mut memory, &mut || Ok(())).unwrap().linked;
    let is_linked = |address: &&u64| index.find(**address).is_some_and(|(n, _)| linked.binary_search(&n).is_ok());
    // To the one freed last the list itself leads, which is elsewhere.
    assert_eq!(freed.iter().filter(is_linked).count(), CACHED - 1);
    assert_eq!(blocks[CACHED..].iter().filter(is_linked).count(), 0);
    // SAFETY: allocated above, and not freed yet.
    blocks[CACHED..].iter().for_each(|b| unsafe { libc::free(*b as *mut libc::c_void) });
}
