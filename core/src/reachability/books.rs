//! What glibc's own books say of a block whose free nobody saw.
//!
//! Through windows most frees are unseen: the table holds blocks that are free by now, or another allocation's. Free memory
//! is referenced by nothing, so such blocks look lost. In front of every block lies its chunk's size, and the chunk behind
//! it says whether it is in use (glibc `malloc/malloc.c`, `struct malloc_chunk`). This cannot be told of blocks in a
//! thread's cache or in fast bins, which stay marked as in use: see [`super::Scan::with_free_lists`].

use super::Block;
use super::memory::Memory;

/// Most blocks that are looked at.
const MAX_LOOKED_AT: usize = 200_000;

const HEADER: u64 = 8;
const ALIGNMENT: u64 = 16;
const MIN_CHUNK: u64 = 32;
/// Flags in a size: the chunk before is in use; the chunk is a mapping of its own.
const PREV_IN_USE: u64 = 1;
const IS_MAPPED: u64 = 2;
const FLAGS: u64 = 7;

/// Of `lost` blocks, with their numbers, those that nothing can be said of, ascending if they are: glibc says that they
/// are free or another's by now, or there were too many to look at them all. `linked` are those in its free lists,
/// ascending.
pub fn gone<'a>(
    lost: impl Iterator<Item = (u32, &'a Block)>,
    linked: &[u32],
    memory: &mut dyn Memory,
    is_over: &dyn Fn() -> bool,
) -> Vec<u32> {
    let mut looked_at = 0;
    let mut look = |block: &Block| {
        looked_at += 1;
        looked_at > MAX_LOOKED_AT || is_over() || is_gone(block, memory)
    };
    let gone = lost.filter(|(n, b)| b.glibc && (linked.binary_search(n).is_ok() || look(b)));
    gone.map(|(n, _)| n).collect()
}

/// Whether the allocator says that a block is not what the table says any more: free, or of another size.
fn is_gone(block: &Block, memory: &mut dyn Memory) -> bool {
    let mut word = |at: u64| {
        let mut bytes = [0; 8];
        (memory.read(at, &mut bytes) == 8).then(|| u64::from_ne_bytes(bytes))
    };
    let Some(size) = block.address.checked_sub(HEADER).and_then(&mut word) else { return false };
    if size & IS_MAPPED != 0 {
        return false;
    }
    let chunk = size & !FLAGS;
    let needed = (block.size + HEADER).next_multiple_of(ALIGNMENT).max(MIN_CHUNK);
    // What is left over is given to the block when it is too small for a chunk.
    if chunk < needed || chunk >= needed + MIN_CHUNK {
        return true;
    }
    let behind = (block.address - 2 * HEADER).checked_add(chunk).and_then(|next| word(next + HEADER));
    behind.is_some_and(|size| size & PREV_IN_USE == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reachability::memory::ProcessMemory;

    /// Each block a chunk of its own size, in use, with another one in use behind it.
    struct InUse;

    impl Memory for InUse {
        fn read(&mut self, _: u64, buffer: &mut [u8]) -> usize {
            buffer.copy_from_slice(&(32 | PREV_IN_USE).to_ne_bytes());
            8
        }
    }

    // A loss that nobody has looked into is none. Blocks that need no look, or cannot be looked at, do not count.
    #[test]
    fn what_was_not_looked_at_is_not_called_lost() {
        let block = |n: u64, glibc| Block { address: 4096 + 32 * n, size: 24, glibc, ..Block::default() };
        let others = (0..MAX_LOOKED_AT as u64).map(|n| block(n, false));
        let own = (0..MAX_LOOKED_AT as u64 + 2).map(|n| block(n, true));
        let blocks: Vec<Block> = others.chain(own).collect();
        let first = MAX_LOOKED_AT as u32;
        let all = gone((0..).zip(&blocks), &[first], &mut InUse, &|| false);
        assert_eq!(all, [first, 2 * first + 1]);
        assert_eq!(gone((0..).zip(&blocks), &[], &mut InUse, &|| true).len(), blocks.len() - MAX_LOOKED_AT);
    }

    // The C library of this process is asked directly.
    #[test]
    #[cfg(target_env = "gnu")]
    fn glibcs_books_are_read() {
        let mut memory = ProcessMemory::new(std::process::id());
        let block = |pointer: *mut libc::c_void, size| Block { address: pointer as u64, size, ..Block::default() };
        // SAFETY: plain use of malloc and free; freed memory is read by the kernel only. The blocks are too large for a
        // thread's cache.
        unsafe {
            for size in [2000_u64, 2001, 5000, 60_000] {
                let pointer = libc::malloc(size as usize);
                let guard = libc::malloc(2000);
                assert!(!pointer.is_null() && !guard.is_null());
                assert!(!is_gone(&block(pointer, size), &mut memory), "{size}");
                assert!(is_gone(&block(pointer, size + 200), &mut memory), "another, smaller block");
                assert!(is_gone(&block(pointer, size / 2), &mut memory), "another, larger block");
                libc::free(pointer);
                assert!(is_gone(&block(pointer, size), &mut memory), "{size}, free");
                libc::free(guard);
            }
            let mapped = libc::malloc(1 << 20);
            assert!(!is_gone(&block(mapped, 1 << 20), &mut memory));
            libc::free(mapped);
        }
    }
}
