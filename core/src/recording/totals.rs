//! Totals of sites and samples of processes, as differences from the snapshot before.
//!
//! Most of a recording is this. A site whose totals are as before is not written at all. Of the others, counts are
//! written as differences, and bytes as what the counts and the mean size so far do not predict: nothing for sites that
//! allocate blocks of one size. The numbers of one kind lie together, which is what makes them compress. A *keyframe* is
//! written against nothing, so that reading can begin there.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::codec::{In, damaged, put, put_delta, put_section, put_text};
use crate::coverage::{Coverage, share};
use crate::governor::StopReason;
use crate::kernel::KernelSummary;
use crate::snapshot::{Losses, Mode, Process, ProcessSample, Sampling, StackCounts, Totals};
use crate::{Error, ErrorKind, Result};

const GONE: u64 = 1;
const IDS: u64 = 2;
const ALLOCATED_COUNT: u64 = 3;
const ALLOCATED_BYTES: u64 = 4;
const FREED_COUNT: u64 = 5;
const FREED_BYTES: u64 = 6;
const PROCESSES: u64 = 7;
const PROCESSES_GONE: u64 = 8;
const KERNEL: u64 = 9;

/// Numbers in a [`ProcessSample`]; a later version appends.
const COLUMNS: usize = 40;
/// Stands for a number that is not known.
const UNKNOWN: u64 = u64::MAX;

/// A sample of a process as numbers. Every field is named, so that one that is added cannot be forgotten here.
fn columns(sample: &ProcessSample) -> [u64; COLUMNS] {
    let ProcessSample {
        process: _,
        alive,
        mode,
        sampling,
        hits,
        unmatched_frees,
        losses,
        stacks: StackCounts { taken, complete, by_tables },
        rss_bytes,
        cpu_s,
        overhead_s,
        budget,
        windows,
        windows_discarded,
        open_s,
        rss_anon_bytes,
        coverage,
        window_s,
        hard_stops,
        kernel: _,
        stopped,
    } = sample;
    let Losses {
        outstanding_full,
        sites_full,
        stacks_full,
        stacks_failed,
        threads_full,
        missed_returns,
        implicit_frees,
        partial_ranges,
        pointers_unreadable,
        events_dropped,
        missed_events,
        python_lost,
    } = losses;
    let grown = |of: fn(&Coverage) -> Option<u64>| coverage.as_ref().and_then(of).unwrap_or(UNKNOWN);
    [
        u64::from(*alive),
        match mode {
            Mode::Exact => 0,
            Mode::Estimated => 1,
            Mode::Sampled => 2,
        },
        *hits,
        *unmatched_frees,
        rss_bytes.unwrap_or(UNKNOWN),
        cpu_s.map_or(UNKNOWN, f64::to_bits),
        overhead_s.to_bits(),
        budget.map_or(UNKNOWN, f64::to_bits),
        *windows,
        *windows_discarded,
        open_s.to_bits(),
        *outstanding_full,
        *sites_full,
        *stacks_full,
        *stacks_failed,
        *threads_full,
        *missed_returns,
        *implicit_frees,
        *partial_ranges,
        *pointers_unreadable,
        *events_dropped,
        sampling.map_or(UNKNOWN, |s| s.mean_bytes),
        sampling.map_or(0, |s| s.allocated_bytes),
        sampling.map_or(0, |s| s.allocated_count),
        rss_anon_bytes.unwrap_or(UNKNOWN),
        window_s.map_or(UNKNOWN, f64::to_bits),
        *hard_stops,
        match stopped {
            None => 0,
            Some(StopReason::Starved) => 1,
            Some(StopReason::Slowdown) => 2,
        },
        grown(|c| Some(c.since_s.to_bits())),
        grown(|c| Some(c.before_bytes)),
        grown(|c| Some(c.heap_before_bytes)),
        grown(|c| Some(c.growth_bytes.cast_unsigned())),
        grown(|c| c.explained_bytes),
        grown(|c| c.mapped_bytes),
        grown(|c| c.other_bytes),
        *taken,
        *complete,
        u64::from(*by_tables),
        *missed_events,
        *python_lost,
    ]
}

/// The other way round.
fn process_sample(process: &Arc<Process>, c: &[u64; COLUMNS]) -> ProcessSample {
    let known = |n: u64| Some(n).filter(|n| *n != UNKNOWN);
    ProcessSample {
        process: Arc::clone(process),
        alive: c[0] != 0,
        mode: match c[1] {
            0 => Mode::Exact,
            1 => Mode::Estimated,
            _ => Mode::Sampled,
        },
        sampling: known(c[21]).map(|mean_bytes| Sampling {
            mean_bytes,
            allocated_bytes: c[22],
            allocated_count: c[23],
        }),
        stacks: StackCounts { taken: c[35], complete: c[36], by_tables: c[37] != 0 },
        hits: c[2],
        unmatched_frees: c[3],
        rss_bytes: known(c[4]),
        cpu_s: known(c[5]).map(f64::from_bits),
        overhead_s: f64::from_bits(c[6]),
        budget: known(c[7]).map(f64::from_bits),
        windows: c[8],
        windows_discarded: c[9],
        open_s: f64::from_bits(c[10]),
        losses: Losses {
            outstanding_full: c[11],
            sites_full: c[12],
            stacks_full: c[13],
            stacks_failed: c[14],
            threads_full: c[15],
            missed_returns: c[16],
            implicit_frees: c[17],
            partial_ranges: c[18],
            pointers_unreadable: c[19],
            events_dropped: c[20],
            missed_events: c[38],
            python_lost: c[39],
        },
        rss_anon_bytes: known(c[24]),
        window_s: known(c[25]).map(f64::from_bits),
        hard_stops: c[26],
        kernel: None,
        stopped: match c[27] {
            1 => Some(StopReason::Starved),
            2 => Some(StopReason::Slowdown),
            _ => None,
        },
        coverage: known(c[28]).map(|since_s| Coverage {
            since_s: f64::from_bits(since_s),
            before_bytes: c[29],
            heap_before_bytes: c[30],
            growth_bytes: c[31].cast_signed(),
            explained_bytes: known(c[32]),
            mapped_bytes: known(c[33]),
            other_bytes: known(c[34]),
            share: share(c[31].cast_signed().max(0).unsigned_abs(), known(c[32])),
        }),
    }
}

/// Bytes that so many blocks more have, when they are as large as those before; of the first ones freed, as large as
/// those allocated.
#[inline]
fn predicted(blocks: u64, bytes_before: u64, count_before: u64) -> u64 {
    if blocks == 0 { 0 } else { blocks.wrapping_mul(bytes_before.checked_div(count_before).unwrap_or(0)) }
}

#[inline]
fn predicted_freed(blocks: u64, old: &Totals) -> u64 {
    if old.freed_count > 0 {
        predicted(blocks, old.freed_bytes, old.freed_count)
    } else {
        predicted(blocks, old.allocated_bytes, old.allocated_count)
    }
}

/// Moves a sum from one summand to another.
#[inline]
fn replace(sum: &mut Totals, old: &Totals, new: &Totals) {
    let moved = |sum: u64, old: u64, new: u64| sum.wrapping_sub(old).wrapping_add(new);
    *sum = Totals {
        allocated_bytes: moved(sum.allocated_bytes, old.allocated_bytes, new.allocated_bytes),
        allocated_count: moved(sum.allocated_count, old.allocated_count, new.allocated_count),
        freed_bytes: moved(sum.freed_bytes, old.freed_bytes, new.freed_bytes),
        freed_count: moved(sum.freed_count, old.freed_count, new.freed_count),
    };
}

/// Instance and numbers of a process.
pub(super) type ProcessRow = (u32, [u64; COLUMNS]);

/// The processes of a snapshot, to be written.
pub(super) fn process_rows(processes: &[ProcessSample]) -> Vec<ProcessRow> {
    let mut rows: Vec<ProcessRow> = processes.iter().map(|p| (p.process.instance, columns(p))).collect();
    rows.sort_by_key(|(instance, _)| *instance);
    rows.dedup_by_key(|(instance, _)| *instance);
    rows
}

/// What processes (one, the kernel) say of the kernel, as JSON; empty when none does.
///
/// # Errors
/// It cannot be written as JSON.
pub(super) fn of_kernel(processes: &[ProcessSample]) -> Result<String> {
    let known: BTreeMap<u32, &KernelSummary> =
        processes.iter().filter_map(|p| Some((p.process.instance, &**p.kernel.as_ref()?))).collect();
    let failed = |e| Error::with_source(ErrorKind::Io, "failed to record what the kernel says of itself", e);
    if known.is_empty() { Ok(String::new()) } else { serde_json::to_string(&known).map_err(failed) }
}

/// What was written last.
#[derive(Clone, Debug, Default)]
pub(super) struct Encoder {
    /// By number of the site, ascending.
    sites: Vec<(u32, Totals)>,
    /// By instance, ascending.
    processes: Vec<ProcessRow>,
    kernel: String,
}

impl Encoder {
    /// The sections for a snapshot; both lists are in ascending order. `kernel` is what [`of_kernel`] says.
    pub(super) fn encode(&mut self, sites: &[(u32, Totals)], processes: Vec<ProcessRow>, kernel: String) -> Vec<u8> {
        let mut out = Vec::new();
        self.encode_sites(sites, &mut out);
        self.encode_processes(processes, &mut out);
        if kernel != self.kernel {
            let mut text = Vec::new();
            put_text(&mut text, &kernel);
            put_section(&mut out, KERNEL, &text);
            self.kernel = kernel;
        }
        out
    }

    fn encode_sites(&mut self, sites: &[(u32, Totals)], out: &mut Vec<u8>) {
        let (mut gone, mut last_gone) = (Vec::new(), 0);
        let (mut ids, mut last_id) = (Vec::new(), 0);
        let [mut ac, mut ab, mut fc, mut fb] = [const { Vec::new() }; 4];
        let mut before = self.sites.iter().peekable();
        for (id, new) in sites {
            while let Some((left, _)) = before.next_if(|(known, _)| known < id) {
                put(&mut gone, u64::from(left - last_gone));
                last_gone = *left;
            }
            let known = before.next_if(|(known, _)| known == id);
            if known.is_some_and(|(_, old)| old == new) {
                continue;
            }
            let old = known.map_or_else(Totals::default, |(_, old)| *old);
            put(&mut ids, u64::from(id - last_id));
            last_id = *id;
            let allocated = new.allocated_count.wrapping_sub(old.allocated_count);
            let freed = new.freed_count.wrapping_sub(old.freed_count);
            put_delta(&mut ac, old.allocated_count, new.allocated_count);
            let expected = predicted(allocated, old.allocated_bytes, old.allocated_count);
            put_delta(&mut ab, old.allocated_bytes.wrapping_add(expected), new.allocated_bytes);
            put_delta(&mut fc, old.freed_count, new.freed_count);
            put_delta(&mut fb, old.freed_bytes.wrapping_add(predicted_freed(freed, &old)), new.freed_bytes);
        }
        for (left, _) in before {
            put(&mut gone, u64::from(left - last_gone));
            last_gone = *left;
        }
        self.sites.clear();
        self.sites.extend_from_slice(sites);
        for (tag, contents) in [
            (GONE, gone),
            (IDS, ids),
            (ALLOCATED_COUNT, ac),
            (ALLOCATED_BYTES, ab),
            (FREED_COUNT, fc),
            (FREED_BYTES, fb),
        ] {
            put_section(out, tag, &contents);
        }
    }

    fn encode_processes(&mut self, new: Vec<ProcessRow>, out: &mut Vec<u8>) {
        let (mut changed, mut gone) = (Vec::new(), Vec::new());
        for (instance, columns) in &new {
            let place = self.processes.binary_search_by_key(instance, |(known, _)| *known);
            let old = place.ok().map(|at| self.processes[at].1);
            if old == Some(*columns) {
                continue;
            }
            let old = old.unwrap_or([0; COLUMNS]);
            put(&mut changed, u64::from(*instance));
            let differs = |i: &usize| old[*i] != columns[*i];
            put(&mut changed, (0..COLUMNS).filter(differs).fold(0, |mask, i| mask | 1 << i));
            for i in (0..COLUMNS).filter(differs) {
                put_delta(&mut changed, old[i], columns[i]);
            }
        }
        for (instance, _) in &self.processes {
            if new.binary_search_by_key(instance, |(known, _)| *known).is_err() {
                put(&mut gone, u64::from(*instance));
            }
        }
        self.processes = new;
        put_section(out, PROCESSES, &changed);
        put_section(out, PROCESSES_GONE, &gone);
    }
}

/// A site that a snapshot has changed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Change {
    pub(super) id: u32,
    /// As it was in the snapshot before; zeros when it is new.
    pub(super) old: Totals,
}

/// What has been read so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Decoder {
    /// By number of the site.
    totals: Vec<Totals>,
    /// Numbers of the sites of the last snapshot, ascending.
    present: Vec<u32>,
    /// Over all of them.
    sum: Totals,
    /// By instance, ascending.
    processes: Vec<ProcessRow>,
    /// What the last snapshot has changed, ascending.
    pub(super) changes: Vec<Change>,
    /// Sites that the last snapshot does not have any more.
    pub(super) gone: Vec<u32>,
    is_present: Vec<bool>,
    /// See [`of_kernel`]: as text, and by instance.
    kernel: String,
    summaries: BTreeMap<u32, Arc<KernelSummary>>,
}

impl Decoder {
    /// For sites with numbers up to `max_id`.
    pub(super) fn new(max_id: u32) -> Self {
        let len = max_id as usize + 1;
        Decoder { totals: vec![Totals::default(); len], is_present: vec![false; len], ..Decoder::default() }
    }

    /// Numbers of the sites of the last snapshot, ascending.
    pub(super) fn present(&self) -> &[u32] {
        &self.present
    }

    /// Totals of a site of the last snapshot.
    #[inline]
    pub(super) fn totals(&self, id: u32) -> Totals {
        self.totals[id as usize]
    }

    /// The processes of the last snapshot, by instance; `known` finds a process by it.
    ///
    /// # Errors
    /// A process is not known.
    pub(super) fn processes<'p>(&self, known: impl Fn(u32) -> Option<&'p Arc<Process>>) -> Result<Vec<ProcessSample>> {
        let sample = |(instance, columns): &ProcessRow| {
            let process = known(*instance).ok_or_else(|| damaged("a snapshot speaks of a process that is missing"))?;
            Ok(ProcessSample { kernel: self.summaries.get(instance).cloned(), ..process_sample(process, columns) })
        };
        self.processes.iter().map(sample).collect()
    }

    /// Totals over all sites of the last snapshot.
    pub(super) fn sum(&self) -> &Totals {
        &self.sum
    }

    /// The processes of the last snapshot, as they are written.
    pub(super) fn process_rows(&self) -> &[ProcessRow] {
        &self.processes
    }

    /// What was said of the kernel, as it is written.
    pub(super) fn kernel(&self) -> &str {
        &self.kernel
    }

    /// Forgets everything, before a keyframe.
    pub(super) fn reset(&mut self) {
        for id in self.present.drain(..) {
            self.totals[id as usize] = Totals::default();
            self.is_present[id as usize] = false;
        }
        self.processes.clear();
        self.kernel.clear();
        self.summaries.clear();
        self.sum = Totals::default();
    }

    /// Takes the next snapshot in.
    ///
    /// # Errors
    /// The bytes are damaged.
    pub(super) fn apply(&mut self, input: In<'_>) -> Result<()> {
        let [_, gone, ids, ac, ab, fc, fb, processes, processes_gone, kernel] = input.sections::<10>()?;
        self.apply_kernel(kernel)?;
        self.apply_gone(gone)?;
        self.apply_sites(ids, [ac, ab, fc, fb])?;
        self.apply_processes(processes, processes_gone)
    }

    fn apply_kernel(&mut self, mut kernel: In<'_>) -> Result<()> {
        if kernel.is_empty() {
            return Ok(());
        }
        self.kernel = kernel.get_text()?.to_owned();
        self.summaries.clear();
        if !self.kernel.is_empty() {
            let read: BTreeMap<u32, KernelSummary> = serde_json::from_str(&self.kernel)
                .map_err(|_| damaged("what the kernel says of itself cannot be understood"))?;
            self.summaries = read.into_iter().map(|(instance, summary)| (instance, Arc::new(summary))).collect();
        }
        Ok(())
    }

    fn apply_gone(&mut self, mut gone: In<'_>) -> Result<()> {
        self.gone.clear();
        if gone.is_empty() {
            return Ok(());
        }
        let mut id = 0_u64;
        while !gone.is_empty() {
            id = id.saturating_add(gone.get()?);
            let at = usize::try_from(id).unwrap_or(usize::MAX);
            if !self.is_present.get(at).copied().unwrap_or(false) {
                return Err(damaged("a snapshot ends a site that it does not have"));
            }
            self.is_present[at] = false;
            replace(&mut self.sum, &self.totals[at], &Totals::default());
            self.totals[at] = Totals::default();
            self.gone.push(at as u32);
        }
        let is_present = &self.is_present;
        self.present.retain(|id| is_present[*id as usize]);
        Ok(())
    }

    fn apply_sites(&mut self, mut ids: In<'_>, [mut ac, mut ab, mut fc, mut fb]: [In<'_>; 4]) -> Result<()> {
        self.changes.clear();
        let mut id = 0_u64;
        let mut new = false;
        while !ids.is_empty() {
            let step = ids.get()?;
            id = id.saturating_add(step);
            let at = usize::try_from(id).unwrap_or(usize::MAX);
            let Some(totals) = self.totals.get_mut(at).filter(|_| step > 0) else {
                return Err(damaged("a snapshot speaks of a site that is missing"));
            };
            let old = *totals;
            let allocated_count = ac.get_delta(old.allocated_count)?;
            let freed_count = fc.get_delta(old.freed_count)?;
            let allocated = allocated_count.wrapping_sub(old.allocated_count);
            let freed = freed_count.wrapping_sub(old.freed_count);
            let expected = predicted(allocated, old.allocated_bytes, old.allocated_count);
            *totals = Totals {
                allocated_bytes: ab.get_delta(old.allocated_bytes.wrapping_add(expected))?,
                allocated_count,
                freed_bytes: fb.get_delta(old.freed_bytes.wrapping_add(predicted_freed(freed, &old)))?,
                freed_count,
            };
            replace(&mut self.sum, &old, totals);
            // The number fits: the table is not longer.
            self.changes.push(Change { id: id as u32, old });
            if !self.is_present[at] {
                self.is_present[at] = true;
                self.present.push(id as u32);
                new = true;
            }
        }
        if new {
            // Both parts are in order, which this sort is quick with.
            self.present.sort();
        }
        Ok(())
    }

    fn apply_processes(&mut self, mut changed: In<'_>, mut gone: In<'_>) -> Result<()> {
        while !gone.is_empty() {
            let instance = gone.get()?;
            self.processes.retain(|(known, _)| u64::from(*known) != instance);
        }
        while !changed.is_empty() {
            let instance = u32::try_from(changed.get()?).map_err(|_| damaged("a process has an impossible number"))?;
            let mask = changed.get()?;
            if mask >> COLUMNS != 0 {
                return Err(damaged("a sample of a process has unknown columns"));
            }
            let place = match self.processes.binary_search_by_key(&instance, |(known, _)| *known) {
                Ok(place) => place,
                Err(place) => {
                    self.processes.insert(place, (instance, [0; COLUMNS]));
                    place
                }
            };
            let columns = &mut self.processes[place].1;
            for i in (0..COLUMNS).filter(|i| mask >> i & 1 != 0) {
                columns[i] = changed.get_delta(columns[i])?;
            }
        }
        Ok(())
    }
}
