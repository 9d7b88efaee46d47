//! Unwind tables in the kernel's maps: rows in pages, and per process where its code has rows.
//!
//! [`Row`] and [`Rule`] are what `bpf/unwind.bpf.h` understands; whoever makes the rows (from `.eh_frame`) need not know
//! how they are packed. `UnwindTables` owns the pages: a table lies in one or more of them, small ones share one, and
//! a page goes when its last table is removed. Memory is bounded by the number of pages.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd};

use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};

use crate::types::{
    memleak_unwind_cfa as cfa_kind, memleak_unwind_map, memleak_unwind_rbp as rbp_kind, memleak_unwind_row,
    memleak_unwind_segment,
};
use crate::{Error, ErrorKind, Result};

/// Rows of one page: MEMLEAK_UNWIND_PAGE_ROWS.
const PAGE_ROWS: usize = 65_536;
/// Bytes of one row.
const ROW_BYTES: usize = size_of::<memleak_unwind_row>();
/// Most rows of a table that lie together: their number must fit 16 bits and a table fills a page at most.
const CHUNK_ROWS: usize = PAGE_ROWS - 1;
/// Most pages: MEMLEAK_UNWIND_PAGES.
const MAX_PAGES: usize = 512;
/// Most pieces of code of a process; one place stays free, so that the search ends in the array.
pub const MAX_SEGMENTS: usize = segments(|m| &m.segments) - 1;

const fn segments<const N: usize>(_: fn(&memleak_unwind_map) -> &[memleak_unwind_segment; N]) -> usize {
    N
}

/// Where a frame's canonical frame address is (the stack pointer before the call); offsets in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cfa {
    /// rsp + offset.
    Rsp(i64),
    /// rbp + offset.
    Rbp(i64),
    /// What lies at rbp + offset.
    RbpDeref(i64),
    /// rsp + 8, and 8 more from this byte of a 16-byte stub on.
    Plt(u8),
}

/// Where the caller's rbp is; offsets in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rbp {
    /// In the register.
    Same,
    /// At the canonical frame address + offset.
    AtCfa(i64),
    /// At rbp + offset.
    Aligned(i64),
    /// Not known.
    Lost,
}

/// How to get from a frame to its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Nothing is known of this code.
    Unknown,
    /// An ordinary frame: the return address is right below the canonical frame address.
    Frame(Cfa, Rbp),
    /// The kernel's signal frame.
    Signal,
    /// There is no caller.
    Outermost,
    /// A rule that needs more than rsp and rbp.
    Unsupported,
}

/// A rule and the address from which on it holds. Its 8 bytes, little-endian, are `struct memleak_unwind_row`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Row(u64);

impl Row {
    /// A row; rules whose offsets do not fit become [`Rule::Unsupported`].
    pub fn new(pc: u32, rule: Rule) -> Row {
        let (cfa, rbp, kind) = pack(rule).unwrap_or((0, 0, cfa_kind::UNWIND_UNSUPPORTED.0));
        let (cfa, rbp) = (u64::from(cfa.cast_unsigned()), u64::from(rbp.cast_unsigned()));
        Row(u64::from(pc) | cfa << 32 | u64::from(kind as u8) << 48 | rbp << 56)
    }

    /// First address, counted from the file's first loaded address.
    pub fn pc(self) -> u32 {
        self.0 as u32
    }

    /// True when both say the same of different addresses.
    pub fn same_rule(self, other: Row) -> bool {
        self.0 >> 32 == other.0 >> 32
    }

    /// The row as 8 little-endian bytes.
    pub fn to_le_bytes(self) -> [u8; 8] {
        self.0.to_le_bytes()
    }

    /// A row from what [`Row::to_le_bytes`] has made; any bytes are a row, and harmless.
    pub fn from_le_bytes(bytes: [u8; 8]) -> Row {
        Row(u64::from_le_bytes(bytes))
    }
}

/// Offsets in words and the kind; `None` when an offset does not fit.
fn pack(rule: Rule) -> Option<(i16, i8, u32)> {
    fn words<T: TryFrom<i64>>(bytes: i64) -> Option<T> {
        (bytes % 8 == 0).then(|| T::try_from(bytes / 8).ok()).flatten()
    }
    let (cfa, rbp) = match rule {
        Rule::Unknown => return Some((0, 0, cfa_kind::UNWIND_NONE.0)),
        Rule::Signal => return Some((0, 0, cfa_kind::UNWIND_SIGNAL.0)),
        Rule::Outermost => return Some((0, 0, cfa_kind::UNWIND_OUTERMOST.0)),
        Rule::Unsupported => return Some((0, 0, cfa_kind::UNWIND_UNSUPPORTED.0)),
        Rule::Frame(cfa, rbp) => (cfa, rbp),
    };
    let (offset, kind) = match cfa {
        Cfa::Rsp(bytes) => (words(bytes)?, cfa_kind::UNWIND_RSP),
        Cfa::Rbp(bytes) => (words(bytes)?, cfa_kind::UNWIND_RBP),
        Cfa::RbpDeref(bytes) => (words(bytes)?, cfa_kind::UNWIND_RBP_DEREF),
        Cfa::Plt(from) => (i16::from(from), cfa_kind::UNWIND_PLT),
    };
    let (rbp_offset, rbp) = match rbp {
        Rbp::Same => (Some(0), rbp_kind::UNWIND_RBP_SAME),
        Rbp::AtCfa(bytes) => (words(bytes), rbp_kind::UNWIND_RBP_AT_CFA),
        Rbp::Aligned(bytes) => (words(bytes), rbp_kind::UNWIND_RBP_AT_RBP),
        Rbp::Lost => (Some(0), rbp_kind::UNWIND_RBP_LOST),
    };
    match rbp_offset {
        Some(rbp_offset) => Some((offset, rbp_offset, kind.0 | rbp.0)),
        // The caller's frame is still found if it does not need rbp.
        None => Some((offset, 0, kind.0 | rbp_kind::UNWIND_RBP_LOST.0)),
    }
}

/// A table in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableId(u32);

/// Code of a process that a table covers: addresses `start..end`, of which `start` is `pc` in the table's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code {
    /// First address in the process.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// What `start` is in the table's terms.
    pub pc: u32,
    /// The table.
    pub table: TableId,
}

/// Rows of a table that lie in one page.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    /// First address of the first row.
    pc: u32,
    page: u16,
    first: u16,
    count: u32,
}

/// A page and how many tables have rows in it.
struct Page {
    map: MapHandle,
    tables: usize,
}

/// The page that is being filled: its contents so far.
struct Filling {
    page: u16,
    rows: Vec<u8>,
    used: usize,
}

/// All tables in the kernel.
#[derive(Default)]
pub(crate) struct UnwindTables {
    tables: HashMap<TableId, Vec<Chunk>>,
    pages: HashMap<u16, Page>,
    filling: Option<Filling>,
    next: u32,
}

impl UnwindTables {
    /// Bytes of kernel memory that the pages take.
    pub(crate) fn bytes(&self) -> u64 {
        (self.pages.len() * PAGE_ROWS * ROW_BYTES) as u64
    }

    /// Puts a table into the kernel. `outer` is the map of pages; rows are sorted by pc.
    pub(crate) fn add(&mut self, outer: &dyn MapCore, rows: &[Row]) -> Result<TableId> {
        let id = TableId(self.next);
        self.next = self.next.wrapping_add(1);
        let mut chunks: Vec<Chunk> = Vec::new();
        let mut rest = rows;
        while let Some(head) = rest.first() {
            // A table that fits one page is not split.
            let room = self.filling.as_ref().map_or(0, |f| CHUNK_ROWS.saturating_sub(f.used));
            if room < rest.len().min(CHUNK_ROWS)
                && let Err(e) = self.new_page(outer)
            {
                self.tables.insert(id, chunks);
                self.remove(outer, id);
                return Err(e);
            }
            let Some(filling) = self.filling.as_mut() else { break };
            let count = rest.len().min(CHUNK_ROWS - filling.used);
            let room = filling.rows.chunks_exact_mut(ROW_BYTES).skip(filling.used);
            for (to, row) in room.zip(&rest[..count]) {
                to.copy_from_slice(&row.to_le_bytes());
            }
            let (page, first) = (filling.page, filling.used as u16);
            chunks.push(Chunk { pc: head.pc(), page, first, count: count as u32 });
            filling.used += count;
            if let Some(page) = self.pages.get_mut(&page) {
                page.tables += 1;
            }
            rest = &rest[count..];
        }
        let written = chunks.iter().try_for_each(|chunk| self.write(chunk.page));
        self.tables.insert(id, chunks);
        if let Err(e) = written {
            self.remove(outer, id);
            return Err(e);
        }
        Ok(id)
    }

    /// Removes a table that no process uses any more.
    pub(crate) fn remove(&mut self, outer: &dyn MapCore, id: TableId) {
        for chunk in self.tables.remove(&id).unwrap_or_default() {
            let Some(page) = self.pages.get_mut(&chunk.page) else { continue };
            page.tables = page.tables.saturating_sub(1);
            if page.tables == 0 {
                // Should it fail the page only stays longer.
                let _ = outer.delete(&u32::from(chunk.page).to_ne_bytes());
                self.pages.remove(&chunk.page);
                if self.filling.as_ref().is_some_and(|f| f.page == chunk.page) {
                    self.filling = None;
                }
            }
        }
    }

    /// Begins a page: full ones stay as they are.
    fn new_page(&mut self, outer: &dyn MapCore) -> Result<()> {
        let failed = |e: &libbpf_rs::Error| Error::bpf("make room for unwind tables", e);
        let free = (0..MAX_PAGES as u16).find(|n| !self.pages.contains_key(n)).ok_or_else(|| {
            let mib = (MAX_PAGES * PAGE_ROWS * ROW_BYTES) >> 20;
            Error::new(ErrorKind::Limit, format!("failed to make room for unwind tables: {mib} MiB are in use already"))
        })?;
        if let Some(full) = self.filling.take() {
            // What could not be written then is written with the table that it belongs to, or never.
            self.write_page(&full)?;
        }
        let opts = libbpf_sys::bpf_map_create_opts {
            sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
            ..libbpf_sys::bpf_map_create_opts::default()
        };
        let size = (PAGE_ROWS * ROW_BYTES) as u32;
        let map = MapHandle::create(MapType::Array, Some("unwind_page"), 4, size, 1, &opts).map_err(|e| failed(&e))?;
        outer
            .update(&u32::from(free).to_ne_bytes(), &map.as_fd().as_raw_fd().to_ne_bytes(), MapFlags::ANY)
            .map_err(|e| failed(&e))?;
        self.pages.insert(free, Page { map, tables: 0 });
        self.filling = Some(Filling { page: free, rows: vec![0; PAGE_ROWS * ROW_BYTES], used: 0 });
        Ok(())
    }

    /// Writes the page to the kernel, unless it was full and written before.
    fn write(&self, page: u16) -> Result<()> {
        match &self.filling {
            Some(filling) if filling.page == page => self.write_page(filling),
            _ => Ok(()),
        }
    }

    fn write_page(&self, filling: &Filling) -> Result<()> {
        let Some(page) = self.pages.get(&filling.page) else { return Ok(()) };
        page.map
            .update(&0_u32.to_ne_bytes(), &filling.rows, MapFlags::ANY)
            .map_err(|e| Error::bpf("write unwind tables", &e))
    }

    /// What the kernel side needs to know of a process: `code` sorted by address. Also says how many pieces had no room.
    pub(crate) fn map_of(&self, code: &[Code], salt: u64) -> (Box<memleak_unwind_map>, usize) {
        const UNUSED: memleak_unwind_segment =
            memleak_unwind_segment { start: i64::MAX as u64, size: 0, pc: 0, page: 0, first: 0, count: 0 };
        let mut map: Box<memleak_unwind_map> =
            Box::new(memleak_unwind_map { salt, segments: [UNUSED; MAX_SEGMENTS + 1] });
        let pieces: Vec<memleak_unwind_segment> = code.iter().flat_map(|code| self.segments_of(code)).collect();
        for (to, piece) in map.segments[..MAX_SEGMENTS].iter_mut().zip(&pieces) {
            *to = *piece;
        }
        (map, pieces.len().saturating_sub(MAX_SEGMENTS))
    }

    fn segments_of(&self, code: &Code) -> impl Iterator<Item = memleak_unwind_segment> {
        let chunks = self.tables.get(&code.table).map_or(&[][..], Vec::as_slice);
        let (pc, start) = (u64::from(code.pc), code.start);
        let end_pc = pc + code.end.saturating_sub(start);
        chunks.iter().enumerate().filter_map(move |(n, chunk)| {
            // A chunk's last row holds up to the next chunk.
            let next = chunks.get(n + 1).map_or(1 << 32, |c| u64::from(c.pc));
            let (from, to) = (u64::from(chunk.pc).max(pc), next.min(end_pc));
            (from < to).then(|| memleak_unwind_segment {
                start: start + (from - pc),
                size: u32::try_from(to - from).unwrap_or(u32::MAX),
                pc: from as u32,
                page: chunk.page,
                first: chunk.first,
                count: chunk.count,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::from_bytes;

    /// The fields as the kernel side takes them apart.
    fn raw(row: Row) -> memleak_unwind_row {
        from_bytes(&row.to_le_bytes()).unwrap()
    }

    /// The kernel side takes rows apart field by field: they must lie where the header says.
    #[test]
    fn rows_keep_offsets_and_kinds() {
        let row = raw(Row::new(0x1234_5678, Rule::Frame(Cfa::Rsp(-16), Rbp::AtCfa(-24))));
        assert_eq!((row.pc, row.cfa, row.rbp), (0x1234_5678, -2, -3));
        assert_eq!(u32::from(row.rule), cfa_kind::UNWIND_RSP.0 | rbp_kind::UNWIND_RBP_AT_CFA.0);
        let deref = raw(Row::new(1, Rule::Frame(Cfa::RbpDeref(-40), Rbp::Aligned(0))));
        assert_eq!(u32::from(deref.rule), cfa_kind::UNWIND_RBP_DEREF.0 | rbp_kind::UNWIND_RBP_AT_RBP.0);
        assert_eq!((deref.cfa, deref.rbp), (-5, 0));
        assert!(Row::new(1, Rule::Signal).same_rule(Row::new(2, Rule::Signal)));
        assert_eq!(Row::from_le_bytes(Row::new(7, Rule::Outermost).to_le_bytes()), Row::new(7, Rule::Outermost));
    }

    /// An offset that is cut off would lead to a wrong caller.
    #[test]
    fn what_does_not_fit_is_unsupported() {
        let kind = |rule| u32::from(raw(Row::new(0, rule)).rule);
        assert_eq!(kind(Rule::Frame(Cfa::Rsp(8 * 40_000), Rbp::Same)), cfa_kind::UNWIND_UNSUPPORTED.0);
        assert_eq!(kind(Rule::Frame(Cfa::Rsp(12), Rbp::Same)), cfa_kind::UNWIND_UNSUPPORTED.0);
        let lost = cfa_kind::UNWIND_RSP.0 | rbp_kind::UNWIND_RBP_LOST.0;
        assert_eq!(kind(Rule::Frame(Cfa::Rsp(16), Rbp::AtCfa(-8 * 200))), lost);
        assert_eq!(kind(Rule::Frame(Cfa::Rsp(16), Rbp::AtCfa(-17))), lost);
    }

    fn with_chunks(chunks: Vec<Chunk>) -> UnwindTables {
        UnwindTables { tables: HashMap::from([(TableId(0), chunks)]), ..UnwindTables::default() }
    }

    /// A mapping may begin in the middle of a table, and its table may lie in several pages.
    #[test]
    fn a_mapping_is_split_where_its_rows_change_pages() {
        let chunk = |pc, page| Chunk { pc, page, first: 3, count: 9 };
        let tables = with_chunks(vec![chunk(0x1000, 1), chunk(0x3000, 2), chunk(0x9000, 3)]);
        let code = Code { start: 0x7000_0000, end: 0x7000_2000, pc: 0x2000, table: TableId(0) };
        let (map, left_out) = tables.map_of(&[code], 5);
        let found: Vec<_> = map.segments[..3].iter().map(|s| (s.start, s.size, s.pc, s.page)).collect();
        let unused = (i64::MAX as u64, 0, 0, 0);
        assert_eq!(found, [(0x7000_0000, 0x1000, 0x2000, 1), (0x7000_1000, 0x1000, 0x3000, 2), unused]);
        assert_eq!((left_out, map.salt), (0, 5));
        // Code before the first row has none.
        let early = Code { start: 0x5000, end: 0x6800, pc: 0, table: TableId(0) };
        let (map, _) = tables.map_of(&[early], 0);
        assert_eq!((map.segments[0].start, map.segments[0].size, map.segments[0].pc), (0x6000, 0x800, 0x1000));
    }

    /// The last place stays free; what has no room is counted.
    #[test]
    fn what_has_no_room_is_counted() {
        let tables = with_chunks(vec![Chunk { pc: 0, page: 0, first: 0, count: 1 }]);
        let code: Vec<Code> = (0..MAX_SEGMENTS as u64 + 2)
            .map(|n| Code { start: n << 12, end: (n + 1) << 12, pc: 0, table: TableId(0) })
            .collect();
        let (map, left_out) = tables.map_of(&code, 0);
        assert_eq!(left_out, 2);
        assert_eq!(map.segments[MAX_SEGMENTS - 1].start, (MAX_SEGMENTS as u64 - 1) << 12);
        assert_eq!(map.segments[MAX_SEGMENTS].start, i64::MAX as u64);
    }
}
