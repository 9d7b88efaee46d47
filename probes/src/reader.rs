//! Totals, stacks and counters out of the maps.
//!
//! Reading costs O(sites), never O(outstanding allocations). Hash maps are read in batches into one buffer.

use std::os::fd::AsRawFd;

use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::types::{
    COHORTS, LIFETIME_CLASSES, Plain, bytes_of, from_bytes, memleak_block, memleak_block_bits as bits,
    memleak_block_key, memleak_counter as counter, memleak_counters, memleak_python_code_key, memleak_share,
    memleak_site, memleak_site_key, memleak_stack, memleak_stack_end as stack_end, text,
};
use crate::{Error, ErrorKind, Result, sampler};

/// Elements read by one system call.
const BATCH: u32 = 4096;

/// What the kernel side counts by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SiteKey {
    /// Number of the process instance.
    pub instance: u32,
    /// Number of the probe set.
    pub probe_set: u32,
    /// Hash of the stack.
    pub stack: u64,
}

impl SiteKey {
    pub(crate) fn to_raw(self) -> memleak_site_key {
        memleak_site_key { stack: self.stack, instance: self.instance, probe_set: self.probe_set }
    }

    fn from_raw(raw: memleak_site_key) -> Self {
        SiteKey { instance: raw.instance, probe_set: raw.probe_set, stack: raw.stack }
    }
}

/// Running totals of a site. Counters only grow. With sampling all are estimates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SiteTotals {
    /// Bytes allocated.
    pub allocated_bytes: u64,
    /// Blocks allocated.
    pub allocated_count: u64,
    /// Bytes freed.
    pub freed_bytes: u64,
    /// Blocks freed.
    pub freed_count: u64,
    /// Time of the newest allocation, nanoseconds of CLOCK_MONOTONIC.
    pub last_allocation_ns: u64,
    /// Bytes freed of generations that had left the ring of cohorts.
    pub older_freed_bytes: u64,
    /// Blocks freed of generations that had left the ring of cohorts.
    pub older_freed_count: u64,
    /// Blocks whose address was handed out again without a free that was seen; they count as freed.
    pub unseen_frees: u64,
    /// Per slot: bytes and blocks born minus died. Slot g % COHORTS belongs to generation g; what an earlier
    /// generation left in it stays in it (subtract the value read when the slot was taken over).
    pub cohorts: [(i64, i64); COHORTS],
    /// Variance of the estimated outstanding bytes; 0 without sampling.
    pub bytes_variance: f64,
    /// Variance of the estimated number of outstanding blocks; 0 without sampling.
    pub count_variance: f64,
    /// Frees by lifetime class.
    pub lifetimes: [u64; LIFETIME_CLASSES],
}

/// Why a stack ends where it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StackEnd {
    /// Frame pointers led no further.
    Walked,
    /// The limit of frames was reached.
    Cut,
    /// The stack could not be read further.
    Unreadable,
    /// Frame pointers led to an address that is no code.
    Strayed,
    /// The outermost frame: where the program or the thread starts.
    Complete,
    /// Code without unwind tables, and frame pointers led no further.
    NoTable,
    /// An unwind rule that needs more than stack and frame pointer.
    Unsupported,
    /// Another tracer's return probe hides the caller.
    Trampoline,
    /// A register that a frame needs is not known.
    Lost,
}

/// A call stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stack {
    /// Return addresses, innermost first. The first one is the allocator's caller.
    pub addresses: Vec<u64>,
    /// How it ended.
    pub end: StackEnd,
    /// Number of the allocator function's name.
    pub name: u32,
    /// Id of the thread that allocated there first; 0 when it cannot be seen from the collector's pid namespace.
    pub tid: u32,
    /// Name of that thread. Hostile text.
    pub comm: String,
}

/// An outstanding allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its address.
    pub address: u64,
    /// Its size in bytes.
    pub size: u64,
    /// When it was allocated, nanoseconds of CLOCK_MONOTONIC.
    pub birth_ns: u64,
    /// The group of probe sets it belongs to.
    pub(crate) domain: u32,
    /// Number of its probe set.
    pub probe_set: u32,
    /// Hash of its stack: with instance and probe set, its site.
    pub stack: u64,
}

/// Looks at outstanding allocations apart from the tracker: in another thread, while that goes on.
#[derive(Debug)]
pub struct BlockReader {
    map: MapHandle,
    domains: u32,
}

impl BlockReader {
    /// A reader of the tracker's map of blocks, which holds blocks of so many domains.
    pub(crate) fn new(map: &libbpf_rs::MapMut<'_>, domains: u32) -> Result<Self> {
        let map = MapHandle::try_from(map).map_err(|e| Error::bpf("open the map of blocks", &e))?;
        Ok(BlockReader { map, domains })
    }

    /// Calls `visit` with every outstanding allocation of an instance, in no order. Costs O(outstanding allocations of
    /// all instances).
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn for_each(&self, instance: u32, mut visit: impl FnMut(Block)) -> Result<()> {
        for_each_block(&self.map, |owner, block| {
            if owner == instance {
                visit(block);
            }
        })
    }

    /// Whether the block that was allocated at an address at a time is still outstanding.
    pub fn is_outstanding(&self, instance: u32, address: u64, birth_ns: u64) -> bool {
        (0..self.domains).any(|domain| {
            let key = memleak_block_key { address, instance, domain };
            let found = self.map.lookup(bytes_of(&key), MapFlags::ANY).ok().flatten();
            found.and_then(|bytes| from_bytes::<memleak_block>(&bytes)).is_some_and(|b| b.birth_ns() == birth_ns)
        })
    }
}

/// The fields that are packed, see `enum memleak_block_bits`.
impl memleak_block {
    fn size(&self) -> u64 {
        low(self.size_cohort, bits::BLOCK_SIZE_BITS)
    }

    fn cohort(&self) -> u32 {
        low(self.size_cohort >> bits::BLOCK_SIZE_BITS.0, bits::BLOCK_COHORT_BITS) as u32
    }

    /// Generations that have begun after this block's, of which `now` is the newest.
    fn generations_since(&self, now: u32) -> u32 {
        low(now.wrapping_sub(self.cohort()).into(), bits::BLOCK_COHORT_BITS) as u32
    }

    fn birth_ns(&self) -> u64 {
        low(self.birth_set, bits::BLOCK_BIRTH_BITS) << bits::BLOCK_BIRTH_SHIFT.0
    }

    /// As share_of() in track.bpf.h.
    fn share(&self, sample_bytes: u64) -> memleak_share {
        let exact = |count| memleak_share { bytes: self.size(), count, ..memleak_share::default() };
        if sample_bytes == 0 {
            exact(1)
        } else if self.size_cohort >> bits::BLOCK_SAMPLED_BIT.0 == 0 {
            exact(sampler::count_in_share(1))
        } else {
            sampler::share(self.size(), sample_bytes)
        }
    }

    fn probe_set(&self) -> u32 {
        (self.birth_set >> bits::BLOCK_BIRTH_BITS.0) as u32
    }
}

fn low(word: u64, kept: bits) -> u64 {
    word & ((1 << kept.0) - 1)
}

/// Counters of one process instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // each is documented at enum memleak_counter in bpf/memleak_types.h
pub struct Counters {
    pub hits: u64,
    pub hits_stepped: u64,
    pub hits_cool: u64,
    pub hits_cold: u64,
    pub timed_ns: u64,
    pub unmatched_frees: u64,
    pub outstanding_full: u64,
    pub sites_full: u64,
    pub stacks_full: u64,
    pub stacks_failed: u64,
    pub threads_full: u64,
    pub missed_returns: u64,
    pub implicit_frees: u64,
    pub partial_ranges: u64,
    pub pointers_unreadable: u64,
    pub events_dropped: u64,
    pub python_lost: u64,
    pub allocated_count: u64,
    pub allocated_bytes: u64,
}

/// All sites. `sample_bytes` is what they were counted with.
pub(crate) fn read_sites(map: &dyn MapCore, sample_bytes: u64) -> Result<Vec<(SiteKey, SiteTotals)>> {
    let mut out = Vec::new();
    for_each::<memleak_site_key, memleak_site>(map, |key, site| {
        out.push((SiteKey::from_raw(*key), site.totals(sample_bytes)));
    })?;
    Ok(out)
}

impl memleak_site {
    fn totals(&self, sample_bytes: u64) -> SiteTotals {
        let mut totals = SiteTotals {
            allocated_bytes: self.allocated_bytes,
            allocated_count: self.allocated_count,
            freed_bytes: self.freed_bytes,
            freed_count: self.freed_count,
            last_allocation_ns: self.last_allocation_ns,
            older_freed_bytes: self.older_freed_bytes,
            older_freed_count: self.older_freed_count,
            unseen_frees: self.unseen_frees,
            cohorts: self.cohorts.map(|c| (c.bytes, c.count)),
            bytes_variance: 0.0,
            count_variance: 0.0,
            lifetimes: self.lifetimes,
        };
        if sample_bytes > 0 {
            for count in [
                &mut totals.allocated_count,
                &mut totals.freed_count,
                &mut totals.older_freed_count,
                &mut totals.unseen_frees,
            ] {
                *count = sampler::blocks(*count);
            }
            totals.lifetimes.iter_mut().for_each(|count| *count = sampler::blocks(*count));
            totals.cohorts.iter_mut().for_each(|(_, count)| *count = sampler::signed_blocks(*count));
            totals.bytes_variance = sampler::bytes_variance(self.bytes_variance, sample_bytes);
            totals.count_variance = sampler::count_variance(self.count_variance);
        }
        totals
    }
}

/// One stack; `None` when it was not stored.
pub(crate) fn read_stack(map: &dyn MapCore, key: SiteKey) -> Result<Option<Stack>> {
    let found = map.lookup(bytes_of(&key.to_raw()), MapFlags::ANY).map_err(|e| Error::bpf("read a call stack", &e))?;
    let Some(raw) = found.and_then(|bytes| from_bytes::<memleak_stack>(&bytes)) else { return Ok(None) };
    let start = (raw.start as usize).min(raw.addresses.len());
    let end = start.saturating_add(raw.count as usize).min(raw.addresses.len());
    Ok(Some(Stack {
        addresses: raw.addresses[start..end].to_vec(),
        end: match stack_end(raw.end) {
            stack_end::STACK_CUT => StackEnd::Cut,
            stack_end::STACK_UNREADABLE => StackEnd::Unreadable,
            stack_end::STACK_STRAYED => StackEnd::Strayed,
            stack_end::STACK_COMPLETE => StackEnd::Complete,
            stack_end::STACK_NO_TABLE => StackEnd::NoTable,
            stack_end::STACK_UNSUPPORTED => StackEnd::Unsupported,
            stack_end::STACK_TRAMPOLINE => StackEnd::Trampoline,
            stack_end::STACK_LOST => StackEnd::Lost,
            _ => StackEnd::Walked,
        },
        name: raw.name,
        tid: raw.tid,
        comm: text(&raw.comm),
    }))
}

/// Removes one stack, if it is there.
pub(crate) fn remove_stack(map: &dyn MapCore, key: SiteKey) {
    let _ = map.delete(bytes_of(&key.to_raw()));
}

/// Counters of one slot, summed over all CPUs.
pub(crate) fn read_counters(map: &dyn MapCore, slot: u32) -> Result<Counters> {
    let per_cpu = map
        .lookup_percpu(&slot.to_ne_bytes(), MapFlags::ANY)
        .map_err(|e| Error::bpf("read counters", &e))?
        .unwrap_or_default();
    let mut sum = [0_u64; counter::COUNTER_MAX.0 as usize];
    for row in per_cpu.iter().filter_map(|bytes| from_bytes::<memleak_counters>(bytes)) {
        for (total, value) in sum.iter_mut().zip(row.values) {
            *total += value;
        }
    }
    let get = |c: counter| sum[c.0 as usize];
    Ok(Counters {
        hits: get(counter::COUNTER_HITS),
        hits_stepped: get(counter::COUNTER_HITS_STEPPED),
        hits_cool: get(counter::COUNTER_HITS_COOL),
        hits_cold: get(counter::COUNTER_HITS_COLD),
        timed_ns: get(counter::COUNTER_TIMED_NS),
        unmatched_frees: get(counter::COUNTER_UNMATCHED_FREES),
        outstanding_full: get(counter::COUNTER_OUTSTANDING_FULL),
        sites_full: get(counter::COUNTER_SITES_FULL),
        stacks_full: get(counter::COUNTER_STACKS_FULL),
        stacks_failed: get(counter::COUNTER_STACKS_FAILED),
        threads_full: get(counter::COUNTER_THREADS_FULL),
        missed_returns: get(counter::COUNTER_MISSED_RETURNS),
        implicit_frees: get(counter::COUNTER_IMPLICIT_FREES),
        partial_ranges: get(counter::COUNTER_PARTIAL_RANGES),
        pointers_unreadable: get(counter::COUNTER_POINTERS_UNREADABLE),
        events_dropped: get(counter::COUNTER_EVENTS_DROPPED),
        python_lost: get(counter::COUNTER_PYTHON_LOST),
        allocated_count: get(counter::COUNTER_ALLOCATED_COUNT),
        allocated_bytes: get(counter::COUNTER_ALLOCATED_BYTES),
    })
}

/// Zeroes one slot's counters on all CPUs.
pub(crate) fn reset_counters(map: &dyn MapCore, slot: u32) -> Result<()> {
    let cpus = libbpf_rs::num_possible_cpus().map_err(|e| Error::bpf("count CPUs", &e))?;
    let zero = vec![vec![0_u8; size_of::<memleak_counters>()]; cpus];
    map.update_percpu(&slot.to_ne_bytes(), &zero, MapFlags::ANY).map_err(|e| Error::bpf("reset counters", &e))
}

/// Outstanding allocations of all instances, in no order. Costs O(outstanding allocations).
pub(crate) fn for_each_block(map: &dyn MapCore, mut visit: impl FnMut(u32, Block)) -> Result<()> {
    for_each::<memleak_block_key, memleak_block>(map, |key, block| {
        let found = Block {
            address: key.address,
            size: block.size(),
            birth_ns: block.birth_ns(),
            domain: key.domain,
            probe_set: block.probe_set(),
            stack: block.stack,
        };
        visit(key.instance, found);
    })
}

/// Outstanding allocations of an instance, by address. Costs O(outstanding allocations of all instances).
pub(crate) fn read_blocks(map: &dyn MapCore, instance: u32) -> Result<Vec<Block>> {
    let mut out = Vec::new();
    for_each_block(map, |owner, block| {
        if owner == instance {
            out.push(block);
        }
    })?;
    out.sort_unstable_by_key(|b| (b.address, b.domain));
    Ok(out)
}

/// Takes blocks off the books of an instance that no probe is attached to: as freed (`ended`), or as if they had never
/// been allocated. `cohort` is the current birth generation.
pub(crate) fn remove_blocks(
    blocks: &dyn MapCore,
    sites: &dyn MapCore,
    instance: u32,
    list: &[Block],
    ended: bool,
    cohort: u32,
    sample_bytes: u64,
) -> Result<()> {
    for block in list {
        let key = memleak_block_key { address: block.address, instance, domain: block.domain };
        let failed = |e: &libbpf_rs::Error| Error::bpf("correct the books", e);
        let found = blocks.lookup(bytes_of(&key), MapFlags::ANY).map_err(|e| failed(&e))?;
        let Some(raw) = found.and_then(|bytes| from_bytes::<memleak_block>(&bytes)) else { continue };
        if blocks.delete(bytes_of(&key)).is_err() {
            continue;
        }
        let site_key = memleak_site_key { stack: raw.stack, instance, probe_set: raw.probe_set() };
        let found = sites.lookup(bytes_of(&site_key), MapFlags::ANY).map_err(|e| failed(&e))?;
        let Some(mut site) = found.and_then(|bytes| from_bytes::<memleak_site>(&bytes)) else { continue };
        // As settle() in track.bpf.h does it.
        let share = raw.share(sample_bytes);
        if ended {
            site.freed_bytes += share.bytes;
            site.freed_count += share.count;
        } else {
            site.allocated_bytes = site.allocated_bytes.saturating_sub(share.bytes);
            site.allocated_count = site.allocated_count.saturating_sub(share.count);
        }
        site.bytes_variance = site.bytes_variance.saturating_sub(share.bytes_variance);
        site.count_variance = site.count_variance.saturating_sub(share.count_variance);
        if raw.generations_since(cohort) < COHORTS as u32 - 1 {
            let slot = &mut site.cohorts[raw.cohort() as usize % COHORTS];
            slot.bytes -= share.bytes.cast_signed();
            slot.count -= share.count.cast_signed();
        } else {
            site.older_freed_bytes += share.bytes;
            site.older_freed_count += share.count;
        }
        sites.update(bytes_of(&site_key), bytes_of(&site), MapFlags::EXIST).map_err(|e| failed(&e))?;
    }
    Ok(())
}

/// Removes every block, site and stack of an instance. Costs O(outstanding allocations): for ends of processes.
pub(crate) fn forget(blocks: &dyn MapCore, sites: &dyn MapCore, stacks: &dyn MapCore, instance: u32) -> Result<()> {
    delete_where(blocks, |key: &memleak_block_key| key.instance == instance)?;
    delete_where(sites, |key: &memleak_site_key| key.instance == instance)?;
    delete_where(stacks, |key: &memleak_site_key| key.instance == instance)
}

/// Removes everything about Python functions of an instance.
pub(crate) fn forget_python(stacks: &dyn MapCore, codes: &dyn MapCore, instance: u32) -> Result<()> {
    delete_where(stacks, |key: &memleak_site_key| key.instance == instance)?;
    delete_where(codes, |key: &memleak_python_code_key| key.instance == u64::from(instance))
}

/// Removes the entries whose key meets a condition.
fn delete_where<K: Plain>(map: &dyn MapCore, condition: impl Fn(&K) -> bool) -> Result<()> {
    let mut old = Vec::new();
    for_each_key::<K>(map, |key| {
        if condition(key) {
            old.push(*key);
        }
    })?;
    for key in &old {
        // It may have gone meanwhile: that is what was wanted.
        let _ = map.delete(bytes_of(key));
    }
    Ok(())
}

fn for_each_key<K: Plain>(map: &dyn MapCore, mut visit: impl FnMut(&K)) -> Result<()> {
    batches(map, |keys, _values, count| {
        for bytes in keys.chunks_exact(size_of::<K>()).take(count) {
            if let Some(key) = from_bytes::<K>(bytes) {
                visit(&key);
            }
        }
    })
}

fn for_each<K: Plain, V: Plain>(map: &dyn MapCore, mut visit: impl FnMut(&K, &V)) -> Result<()> {
    batches(map, |keys, values, count| {
        let pairs = keys.chunks_exact(size_of::<K>()).zip(values.chunks_exact(size_of::<V>()));
        for (key, value) in pairs.take(count) {
            if let (Some(key), Some(value)) = (from_bytes::<K>(key), from_bytes::<V>(value)) {
                visit(&key, &value);
            }
        }
    })
}

/// Calls `visit` with the keys, the values and the number of elements of each batch of a hash map.
///
/// Not libbpf-rs's iterator: that one ends silently on an error, and a snapshot that is cut short must not pass for a
/// whole one.
fn batches(map: &dyn MapCore, mut visit: impl FnMut(&[u8], &[u8], usize)) -> Result<()> {
    let mut batch = BATCH.min(map.max_entries().max(1));
    // The kernel's position in the map: opaque, at least 4 bytes or a key.
    let mut position = vec![0_u8; (map.key_size() as usize).max(8)];
    let mut keys = Vec::new();
    let mut values = Vec::new();
    let mut first = true;
    loop {
        keys.resize(map.key_size() as usize * batch as usize, 0);
        values.resize(map.value_size() as usize * batch as usize, 0);
        let mut count = batch;
        let input = if first { std::ptr::null_mut() } else { position.as_mut_ptr() };
        // SAFETY: the buffers hold `count` keys and values of the map's sizes; `position` is large enough for the
        // kernel's cursor and may be both input and output; the descriptor is valid while `map` is borrowed.
        let result = unsafe {
            libbpf_sys::bpf_map_lookup_batch(
                map.as_fd().as_raw_fd(),
                input.cast(),
                position.as_mut_ptr().cast(),
                keys.as_mut_ptr().cast(),
                values.as_mut_ptr().cast(),
                &raw mut count,
                std::ptr::null(),
            )
        };
        match -result {
            0 => {
                first = false;
                visit(&keys, &values, count as usize);
            }
            libc::ENOENT => {
                visit(&keys, &values, count as usize);
                return Ok(());
            }
            // One bucket holds more than the whole batch.
            libc::ENOSPC if batch < map.max_entries() => batch = batch.saturating_mul(2),
            errno => {
                let cause = std::io::Error::from_raw_os_error(errno);
                return Err(Error::new(ErrorKind::Kernel, format!("failed to read a BPF map in batches: {cause}")));
            }
        }
    }
}
