//! How much of a process's growth its sites explain, and what the rest is.
//!
//! The kernel says how much anonymous memory of a process is resident (`RssAnon`); sites say what was allocated and not
//! freed since the attach. The difference has names: memory mapped directly, which no probe set that is on has traced, and
//! what the allocator keeps on top (headers, rounding, free blocks between used ones). Pure: decides from numbers that the
//! collector has read, and says "not known" where windows have shown only a part.

use serde::Serialize;

/// Blocks of at least this many bytes may have a mapping of their own; where smaller ones lie, the allocator has divided
/// the mapping up.
const OWN_MAPPING: u64 = 64 << 10;
/// What an allocator writes in front of a block that has a mapping of its own, bytes.
const HEADER: u64 = 16;
const PAGE: u64 = 4096;
/// A smaller growth says nothing: the kernel counts pages in batches, and allocators grow in steps.
const LEAST_GROWTH: u64 = 1 << 20;

/// What a process used when its books were opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Baseline {
    /// Resident anonymous memory, bytes.
    pub resident_bytes: u64,
    /// Size of the heap (brk), bytes.
    pub heap_bytes: u64,
    /// Its private writable mappings without a file, by address.
    pub regions: Vec<(u64, u64)>,
}

/// A private writable mapping without a file, as it is now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// It is the heap (brk).
    pub heap: bool,
    /// Traced blocks that begin in it, in whole pages, bytes.
    traced_bytes: u64,
    /// A small block begins in it.
    divided: bool,
}

impl Region {
    /// A mapping in which no traced block is known yet.
    pub fn new(start: u64, end: u64, heap: bool) -> Self {
        Region { start, end, heap, traced_bytes: 0, divided: false }
    }

    /// A traced block of `size` bytes begins in it.
    pub fn add_block(&mut self, size: u64) {
        self.divided |= size < OWN_MAPPING;
        self.traced_bytes = self.traced_bytes.saturating_add(pages(size.saturating_add(HEADER)));
    }
}

fn pages(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE).saturating_mul(PAGE)
}

/// Bytes of mappings that are new since the baseline and hold no traced block: an upper bound of what the process has
/// mapped directly, because not every page of it need be resident.
pub fn untraced_bytes(regions: &[Region], before: &[(u64, u64)]) -> u64 {
    let untraced = |region: &Region| {
        if region.heap || region.divided {
            return 0;
        }
        let first = before.partition_point(|(_, end)| *end <= region.start);
        let old: u64 = (before[first..].iter())
            .take_while(|(start, _)| *start < region.end)
            .map(|(start, end)| (*end).min(region.end).saturating_sub((*start).max(region.start)))
            .sum();
        (region.end - region.start).saturating_sub(old).saturating_sub(region.traced_bytes)
    };
    regions.iter().map(untraced).sum()
}

/// A process's growth since its books were opened, and its parts, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Coverage {
    /// When the books were opened, seconds since the collector started.
    pub since_s: f64,
    /// Resident anonymous memory then: allocated before, and not part of any site.
    pub before_bytes: u64,
    /// Size of the heap (brk) then; part of it may have been free.
    pub heap_before_bytes: u64,
    /// By how much the resident anonymous memory has grown.
    pub growth_bytes: i64,
    /// Outstanding at the sites, as far as the growth goes; `None` through windows.
    pub explained_bytes: Option<u64>,
    /// The rest that mappings without traced blocks can be; `None` through windows.
    pub mapped_bytes: Option<u64>,
    /// What is left: the allocator's overhead and fragmentation; `None` through windows.
    pub other_bytes: Option<u64>,
    /// Explained part of the growth, 0 to 1; `None` when that is not known or the growth is too small to say.
    pub share: Option<f64>,
}

/// The explained part of a growth; `None` when that is not known or the growth is too small to say.
pub fn share(growth_bytes: u64, explained_bytes: Option<u64>) -> Option<f64> {
    explained_bytes.filter(|_| growth_bytes >= LEAST_GROWTH).map(|e| e as f64 / growth_bytes as f64)
}

impl Coverage {
    /// Divides the growth up. `outstanding_bytes` at the sites of memory; `None` through windows. `untraced_bytes` as
    /// [`untraced_bytes`] says.
    pub fn new(
        since_s: f64,
        before: &Baseline,
        resident_bytes: u64,
        outstanding_bytes: Option<u64>,
        untraced_bytes: u64,
    ) -> Self {
        let growth = resident_bytes.saturating_sub(before.resident_bytes);
        let explained = outstanding_bytes.map(|bytes| bytes.min(growth));
        let mapped = explained.map(|explained| untraced_bytes.min(growth - explained));
        Coverage {
            since_s,
            before_bytes: before.resident_bytes,
            heap_before_bytes: before.heap_bytes,
            growth_bytes: resident_bytes.cast_signed().saturating_sub(before.resident_bytes.cast_signed()),
            explained_bytes: explained,
            mapped_bytes: mapped,
            other_bytes: explained.zip(mapped).map(|(explained, mapped)| growth - explained - mapped),
            share: share(growth, explained),
        }
    }

    /// True when the parts are worth a look at the mappings.
    pub fn has_rest(&self) -> bool {
        self.share.is_some() && self.mapped_bytes.unwrap_or(0) + self.other_bytes.unwrap_or(0) >= LEAST_GROWTH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn before() -> Baseline {
        Baseline { resident_bytes: 100 * MIB, heap_bytes: 80 * MIB, regions: vec![(0x1000_0000, 0x1100_0000)] }
    }

    /// The parts must add up to the growth, whatever the numbers: a report that explains 130 % explains nothing.
    #[test]
    fn the_parts_add_up_to_the_growth() {
        let parts = |resident: u64, outstanding: u64, untraced: u64| {
            let c = Coverage::new(0.0, &before(), resident * MIB, Some(outstanding * MIB), untraced * MIB);
            let sum = [c.explained_bytes, c.mapped_bytes, c.other_bytes].map(|part| part.unwrap() / MIB);
            assert_eq!(sum.iter().sum::<u64>(), u64::try_from(c.growth_bytes.max(0)).unwrap() / MIB);
            (sum, c.share)
        };
        assert_eq!(parts(150, 20, 25), ([20, 25, 5], Some(0.4)));
        assert_eq!(parts(150, 20, 0), ([20, 0, 30], Some(0.4)));
        // Mapped and not touched: more than there is to explain.
        assert_eq!(parts(150, 20, 1_000), ([20, 30, 0], Some(0.4)));
        // Outstanding and not touched, or at the place of what was freed.
        assert_eq!(parts(150, 90, 25), ([50, 0, 0], Some(1.0)));
        assert_eq!(parts(100, 90, 25), ([0, 0, 0], None));
        assert_eq!(parts(90, 90, 25), ([0, 0, 0], None));
    }

    /// Through windows only a part of the blocks is seen: "not known" is the truth.
    #[test]
    fn windows_leave_the_parts_unknown() {
        let c = Coverage::new(3.0, &before(), 150 * MIB, None, 25 * MIB);
        assert_eq!((c.growth_bytes, c.explained_bytes, c.mapped_bytes, c.other_bytes), (50 << 20, None, None, None));
        assert_eq!((c.share, c.since_s, c.before_bytes, c.heap_before_bytes), (None, 3.0, 100 * MIB, 80 * MIB));
        assert!(!c.has_rest());
        let small = Coverage::new(0.0, &before(), 100 * MIB + 4096, Some(0), 0);
        assert_eq!((small.other_bytes, small.share), (Some(4096), None));
    }

    /// Only what is new and holds nothing that was traced may be called mapped directly.
    #[test]
    fn untraced_mappings_are_new_and_hold_no_traced_block() {
        let old = [(0x1000, 0x3000), (0x8000, 0x9000)];
        let region = |start, end| Region::new(start, end, false);
        assert_eq!(untraced_bytes(&[region(0x1000, 0x3000)], &old), 0, "it was there");
        assert_eq!(untraced_bytes(&[region(0x1000, 0x9000)], &old), 0x5000, "grown in between");
        assert_eq!(untraced_bytes(&[region(0x2000, 0x4000), region(0x5000, 0x6000)], &old), 0x2000);
        assert_eq!(untraced_bytes(&[Region::new(0x5000, 0x6000, true)], &old), 0, "the heap");
        let mut divided = region(0x10_0000, 0x20_0000);
        divided.add_block(64);
        assert_eq!(untraced_bytes(&[divided], &old), 0, "the allocator keeps small blocks there");
        let mut shared = region(0x10_0000, 0x40_0000);
        shared.add_block(0x10_0000);
        assert_eq!(untraced_bytes(&[shared], &old), 0x1f_f000, "one block and its header, a page more");
        shared.add_block(u64::MAX);
        assert_eq!(untraced_bytes(&[shared], &old), 0, "a hostile size");
    }
}
