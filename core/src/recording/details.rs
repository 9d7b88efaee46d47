//! What a snapshot knows of a site besides its totals: last allocation, cohorts, lifetimes, what scans said.
//!
//! Written as differences, like the totals, and with what these predict left out: when a block is freed, its cohort's
//! outstanding bytes change by what the totals have changed by already. Rules and reports need the details of few
//! snapshots, so they are a blob of their own that can be skipped.

use std::sync::Arc;

use super::codec::{In, damaged, put, put_delta, put_f64, put_section};
use super::totals::{Change, Decoder as TotalsDecoder};
use super::{kernel, reach};
use crate::Result;
use crate::snapshot::{Cohort, LIFETIME_CLASSES, StandardErrors, Totals};

const BOUNDS: u64 = 1;
const IDS: u64 = 2;
const FLAGS: u64 = 3;
const LAST: u64 = 4;
const COHORTS: u64 = 5;
const LIFETIMES: u64 = 6;
const ERRORS: u64 = 7;
const REACH: u64 = 8;
const KERNEL: u64 = 9;

/// The last allocation, as milliseconds before the snapshot.
const LAST_MS: u16 = 1;
/// The last allocation, as it is.
const LAST_RAW: u16 = 2;
/// Cohorts anew.
const COHORTS_FULL: u16 = 4;
/// Outstanding blocks of some cohorts have changed, the rest follows from the totals.
const COHORTS_CHANGED: u16 = 8;
/// Lifetimes have changed.
const LIFETIMES_CHANGED: u16 = 16;
/// The last of their changes follows from the totals.
const LIFETIMES_PREDICTED: u16 = 32;

/// Standard errors have changed.
const ERRORS_CHANGED: u16 = 64;
/// What scans say has changed.
const REACH_CHANGED: u16 = 128;
/// What is known of a site of the kernel has changed.
const KERNEL_CHANGED: u16 = 256;

/// Stands for the snapshot's own time as the end of a cohort, which then need not be written for every snapshot.
const NOW: f64 = f64::INFINITY;

/// Details of one site.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Details {
    pub(super) last_allocation_s: f64,
    pub(super) cohorts: Vec<Cohort>,
    pub(super) lifetimes: [u64; LIFETIME_CLASSES],
    pub(super) stderr: StandardErrors,
    pub(super) reach: Option<Arc<reach::Stored>>,
    pub(super) kernel: Option<Arc<kernel::Stored>>,
}

impl Details {
    /// Whether the last cohort goes on until the next change.
    pub(super) fn is_last_open(&self) -> bool {
        self.cohorts.last().is_some_and(|c| c.end_s == NOW)
    }

    /// The cohorts as of a snapshot.
    pub(super) fn cohorts_at(&self, time_s: f64) -> impl Iterator<Item = Cohort> {
        self.cohorts.iter().map(move |c| Cohort { end_s: if c.end_s == NOW { time_s } else { c.end_s }, ..*c })
    }

    /// Takes over the cohorts of a snapshot; an end that is its time is written as such.
    fn set_cohorts(&mut self, cohorts: &[Cohort], time_s: f64) {
        self.cohorts.clear();
        let end = |c: &Cohort| Cohort { end_s: if c.end_s == time_s { NOW } else { c.end_s }, ..*c };
        self.cohorts.extend(cohorts.iter().map(end));
    }
}

/// One site of a snapshot, to be written.
pub(super) struct Row<'a> {
    pub(super) id: u32,
    pub(super) totals: Totals,
    pub(super) last_allocation_s: f64,
    pub(super) cohorts: &'a [Cohort],
    pub(super) lifetimes: &'a [u64; LIFETIME_CLASSES],
    pub(super) stderr: StandardErrors,
    pub(super) reach: Option<Arc<reach::Stored>>,
    pub(super) kernel: Option<Arc<kernel::Stored>>,
}

/// The streams of a blob.
#[derive(Default)]
struct Streams {
    bounds: Vec<u64>,
    ids: Vec<u8>,
    flags: Vec<u8>,
    last: Vec<u8>,
    cohorts: Vec<u8>,
    lifetimes: Vec<u8>,
    errors: Vec<u8>,
    reach: Vec<u8>,
    kernel: Vec<u8>,
}

impl Streams {
    /// Number of a bound of cohorts; there are a few dozen, which all sites share.
    fn bound(&mut self, at: f64) -> u64 {
        let bits = at.to_bits();
        let place = self.bounds.iter().rposition(|b| *b == bits).unwrap_or_else(|| {
            self.bounds.push(bits);
            self.bounds.len() - 1
        });
        place as u64
    }
}

/// What was written last.
#[derive(Clone, Debug, Default)]
pub(super) struct Encoder {
    /// By number of the site, ascending.
    sites: Vec<(u32, Totals, Details)>,
}

impl Encoder {
    /// The sections for a snapshot; `rows` are in ascending order of their numbers.
    pub(super) fn encode(&mut self, rows: &[Row<'_>], time_s: f64) -> Vec<u8> {
        let mut streams = Streams::default();
        let mut last_id = 0;
        let mut before = std::mem::take(&mut self.sites).into_iter().peekable();
        self.sites.reserve(rows.len());
        for row in rows {
            while before.next_if(|(id, ..)| *id < row.id).is_some() {}
            let (_, totals, mut details) = before.next_if(|(id, ..)| *id == row.id).unwrap_or_default();
            let flags = encode_site(&mut streams, row, &totals, &mut details, time_s);
            if flags != 0 {
                put(&mut streams.ids, u64::from(row.id - last_id));
                last_id = row.id;
                put(&mut streams.flags, u64::from(flags));
            }
            self.sites.push((row.id, row.totals, details));
        }
        let mut bounds = Vec::with_capacity(streams.bounds.len() * 8);
        streams.bounds.iter().for_each(|b| put_f64(&mut bounds, f64::from_bits(*b)));
        let mut out = Vec::new();
        for (tag, contents) in [
            (BOUNDS, bounds),
            (IDS, streams.ids),
            (FLAGS, streams.flags),
            (LAST, streams.last),
            (COHORTS, streams.cohorts),
            (LIFETIMES, streams.lifetimes),
            (ERRORS, streams.errors),
            (REACH, streams.reach),
            (KERNEL, streams.kernel),
        ] {
            put_section(&mut out, tag, &contents);
        }
        out
    }
}

/// Writes what has changed at one site, and updates `old`.
fn encode_site(streams: &mut Streams, row: &Row<'_>, totals: &Totals, old: &mut Details, time_s: f64) -> u16 {
    let mut flags = 0;
    if row.last_allocation_s.to_bits() != old.last_allocation_s.to_bits() {
        let ms = milliseconds(row.last_allocation_s);
        if seconds(ms).to_bits() == row.last_allocation_s.to_bits() {
            put_delta(&mut streams.last, milliseconds(time_s), ms);
            flags |= LAST_MS;
        } else {
            put_f64(&mut streams.last, row.last_allocation_s);
            flags |= LAST_RAW;
        }
        old.last_allocation_s = row.last_allocation_s;
    }
    flags |= encode_cohorts(streams, row, totals, old, time_s);
    if *row.lifetimes != old.lifetimes {
        flags |= encode_lifetimes(&mut streams.lifetimes, row, totals, &old.lifetimes);
        old.lifetimes = *row.lifetimes;
    }
    if row.stderr != old.stderr {
        put_f64(&mut streams.errors, row.stderr.bytes);
        put_f64(&mut streams.errors, row.stderr.count);
        flags |= ERRORS_CHANGED;
        old.stderr = row.stderr;
    }
    if row.reach != old.reach {
        reach::encode(&mut streams.reach, old.reach.as_deref(), row.reach.as_deref());
        flags |= REACH_CHANGED;
        old.reach = row.reach.clone();
    }
    if row.kernel != old.kernel {
        kernel::encode(&mut streams.kernel, old.kernel.as_deref(), row.kernel.as_deref());
        flags |= KERNEL_CHANGED;
        old.kernel = row.kernel.clone();
    }
    flags
}

/// Milliseconds since the start; what does not fit is caught by the way back giving another number.
fn milliseconds(time_s: f64) -> u64 {
    (time_s * 1e3).round() as i64 as u64
}

fn seconds(ms: u64) -> f64 {
    ms as i64 as f64 / 1e3
}

fn encode_cohorts(streams: &mut Streams, row: &Row<'_>, totals: &Totals, old: &mut Details, time_s: f64) -> u16 {
    let before = old.cohorts.clone();
    old.set_cohorts(row.cohorts, time_s);
    let now = &old.cohorts;
    if before == *now {
        return 0;
    }
    if let Some(same) = predicted_cohorts(&before, totals, &row.totals)
        && same.len() == now.len()
        && births_match(&same, now)
    {
        let others = || before.iter().zip(now).enumerate().take(now.len() - 1);
        let changed = || others().filter(|(_, (b, n))| outstanding(b) != outstanding(n));
        let left = last_outstanding(&before, totals, &row.totals, others().map(|(_, (b, n))| (b, n)));
        if left == outstanding(&now[now.len() - 1]) {
            let out = &mut streams.cohorts;
            put(out, changed().count() as u64);
            for (place, (b, n)) in changed() {
                put(out, place as u64);
                put_delta(out, b.outstanding_count, n.outstanding_count);
                put_delta(out, b.outstanding_bytes, n.outstanding_bytes);
            }
            return COHORTS_CHANGED;
        }
    }
    put(&mut streams.cohorts, now.len() as u64);
    for cohort in now {
        let bounds = [streams.bound(cohort.start_s), streams.bound(cohort.end_s)];
        let numbers = [cohort.born_bytes, cohort.born_count, cohort.outstanding_bytes, cohort.outstanding_count];
        bounds.into_iter().chain(numbers).for_each(|n| put(&mut streams.cohorts, n));
    }
    COHORTS_FULL
}

fn outstanding(cohort: &Cohort) -> (u64, u64) {
    (cohort.outstanding_bytes, cohort.outstanding_count)
}

/// The cohorts with the births that the totals predict: all in the last one, which is still open.
fn predicted_cohorts(before: &[Cohort], old: &Totals, new: &Totals) -> Option<Vec<Cohort>> {
    let mut predicted = before.to_vec();
    let last = predicted.last_mut()?;
    let born = |total: u64, before: u64, now: u64| total.wrapping_add(now.wrapping_sub(before));
    last.born_bytes = born(last.born_bytes, old.allocated_bytes, new.allocated_bytes);
    last.born_count = born(last.born_count, old.allocated_count, new.allocated_count);
    Some(predicted)
}

/// True when both have the same periods and births.
fn births_match(a: &[Cohort], b: &[Cohort]) -> bool {
    let births = |c: &Cohort| (c.start_s.to_bits(), c.end_s.to_bits(), c.born_bytes, c.born_count);
    a.iter().map(births).eq(b.iter().map(births))
}

/// What is left of the last cohort when the `others` have changed so much and the totals say how much all have.
fn last_outstanding<'a>(
    before: &[Cohort],
    old: &Totals,
    new: &Totals,
    others: impl Iterator<Item = (&'a Cohort, &'a Cohort)>,
) -> (u64, u64) {
    let Some(last) = before.last() else { return (0, 0) };
    let change = |from: u64, to: u64| to.wrapping_sub(from);
    let mut bytes = change(old.outstanding_bytes(), new.outstanding_bytes());
    let mut count = change(old.outstanding_count(), new.outstanding_count());
    for (b, n) in others {
        bytes = bytes.wrapping_sub(change(b.outstanding_bytes, n.outstanding_bytes));
        count = count.wrapping_sub(change(b.outstanding_count, n.outstanding_count));
    }
    (last.outstanding_bytes.wrapping_add(bytes), last.outstanding_count.wrapping_add(count))
}

fn encode_lifetimes(out: &mut Vec<u8>, row: &Row<'_>, totals: &Totals, old: &[u64; LIFETIME_CLASSES]) -> u16 {
    let changed: Vec<usize> = (0..LIFETIME_CLASSES).filter(|i| old[*i] != row.lifetimes[*i]).collect();
    let sum = changed.iter().fold(0_u64, |sum, i| sum.wrapping_add(row.lifetimes[*i].wrapping_sub(old[*i])));
    let predicted = sum == row.totals.freed_count.wrapping_sub(totals.freed_count);
    put(out, changed.len() as u64);
    for (n, i) in changed.iter().enumerate() {
        put(out, *i as u64);
        if !predicted || n + 1 < changed.len() {
            put_delta(out, old[*i], row.lifetimes[*i]);
        }
    }
    if predicted { LIFETIMES_CHANGED | LIFETIMES_PREDICTED } else { LIFETIMES_CHANGED }
}

/// What has been read so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Decoder {
    /// By number of the site.
    sites: Vec<Details>,
    /// Sites that are not empty.
    used: Vec<u32>,
    /// Sites that the last snapshot has changed, ascending.
    pub(super) changes: Vec<u32>,
}

impl Decoder {
    /// For sites with numbers up to `max_id`.
    pub(super) fn new(max_id: u32) -> Self {
        Decoder { sites: vec![Details::default(); max_id as usize + 1], ..Decoder::default() }
    }

    /// Details of a site of the last snapshot.
    pub(super) fn details(&self, id: u32) -> &Details {
        &self.sites[id as usize]
    }

    /// Forgets everything, before a keyframe.
    pub(super) fn reset(&mut self) {
        for id in self.used.drain(..) {
            self.sites[id as usize] = Details::default();
        }
    }

    /// Takes the next snapshot in; `totals` has taken it in already.
    ///
    /// # Errors
    /// The bytes are damaged.
    pub(super) fn apply(&mut self, input: In<'_>, totals: &TotalsDecoder, time_s: f64) -> Result<()> {
        let [_, bound_list, ids, flags, last, cohorts, lifetimes, errors, reach, of_kernel] = input.sections::<10>()?;
        let (mut bound_list, mut ids, mut flags, mut last) = (bound_list, ids, flags, last);
        let (mut cohorts, mut lifetimes, mut errors) = (cohorts, lifetimes, errors);
        let (mut reach, mut of_kernel) = (reach, of_kernel);
        let mut bounds = Vec::with_capacity(bound_list.left() / 8);
        while !bound_list.is_empty() {
            bounds.push(bound_list.get_f64()?);
        }
        self.changes.clear();
        for id in &totals.gone {
            self.sites[*id as usize] = Details::default();
        }
        // Both lists are in the order of the sites.
        let mut changes = totals.changes.iter().peekable();
        let mut id = 0_u64;
        while !ids.is_empty() {
            let step = ids.get()?;
            id = id.saturating_add(step);
            let at = usize::try_from(id).unwrap_or(usize::MAX);
            let Some(site) = self.sites.get_mut(at).filter(|_| step > 0) else {
                return Err(damaged("the details of a snapshot speak of a site that is missing"));
            };
            let number = at as u32;
            while changes.next_if(|c| c.id < number).is_some() {}
            let new = totals.totals(number);
            let old = changes.peek().filter(|c: &&&Change| c.id == number).map_or(new, |c| c.old);
            let flag = u16::try_from(flags.get()?).map_err(|_| damaged("a site has unknown flags"))?;
            self.used.push(number);
            self.changes.push(number);
            if flag & LAST_MS != 0 {
                site.last_allocation_s = seconds(last.get_delta(milliseconds(time_s))?);
            }
            if flag & LAST_RAW != 0 {
                site.last_allocation_s = last.get_f64()?;
            }
            if flag & COHORTS_FULL != 0 {
                decode_cohorts(&mut cohorts, &bounds, site)?;
            }
            if flag & COHORTS_CHANGED != 0 {
                decode_changes(&mut cohorts, site, &old, &new)?;
            }
            if flag & LIFETIMES_CHANGED != 0 {
                let freed = new.freed_count.wrapping_sub(old.freed_count);
                decode_lifetimes(&mut lifetimes, site, (flag & LIFETIMES_PREDICTED != 0).then_some(freed))?;
            }
            if flag & ERRORS_CHANGED != 0 {
                site.stderr = StandardErrors { bytes: errors.get_f64()?, count: errors.get_f64()? };
            }
            if flag & KERNEL_CHANGED != 0 {
                site.kernel = kernel::decode(&mut of_kernel, site.kernel.as_deref())?.map(Arc::new);
            }
            if flag & REACH_CHANGED != 0 {
                site.reach = reach::decode(&mut reach, site.reach.as_deref())?.map(Arc::new);
            }
        }
        // A keyframe resets what is in this list: it must not grow with the snapshots.
        if self.used.len() > self.sites.len() * 2 {
            self.used.sort_unstable();
            self.used.dedup();
        }
        Ok(())
    }
}

fn decode_cohorts(input: &mut In<'_>, bounds: &[f64], site: &mut Details) -> Result<()> {
    let count = input.get_len()?;
    site.cohorts.clear();
    for _ in 0..count {
        let mut bound = || {
            let place = usize::try_from(input.get()?).unwrap_or(usize::MAX);
            bounds.get(place).copied().ok_or_else(|| damaged("a cohort has no period"))
        };
        let (start_s, end_s) = (bound()?, bound()?);
        site.cohorts.push(Cohort {
            start_s,
            end_s,
            born_bytes: input.get()?,
            born_count: input.get()?,
            outstanding_bytes: input.get()?,
            outstanding_count: input.get()?,
        });
    }
    Ok(())
}

fn decode_changes(input: &mut In<'_>, site: &mut Details, old: &Totals, new: &Totals) -> Result<()> {
    let Some((last, others)) = site.cohorts.split_last_mut() else {
        return Err(damaged("cohorts change that are not there"));
    };
    let change = |from: u64, to: u64| to.wrapping_sub(from);
    let mut bytes = change(old.outstanding_bytes(), new.outstanding_bytes());
    let mut count = change(old.outstanding_count(), new.outstanding_count());
    for _ in 0..input.get_len()? {
        let place = usize::try_from(input.get()?).unwrap_or(usize::MAX);
        let Some(cohort) = others.get_mut(place) else {
            return Err(damaged("a cohort changes that is not there"));
        };
        let before = *cohort;
        cohort.outstanding_count = input.get_delta(before.outstanding_count)?;
        cohort.outstanding_bytes = input.get_delta(before.outstanding_bytes)?;
        bytes = bytes.wrapping_sub(change(before.outstanding_bytes, cohort.outstanding_bytes));
        count = count.wrapping_sub(change(before.outstanding_count, cohort.outstanding_count));
    }
    // What the totals have changed by and the others have not: see `predicted_cohorts` and `last_outstanding`.
    last.born_bytes = last.born_bytes.wrapping_add(change(old.allocated_bytes, new.allocated_bytes));
    last.born_count = last.born_count.wrapping_add(change(old.allocated_count, new.allocated_count));
    last.outstanding_bytes = last.outstanding_bytes.wrapping_add(bytes);
    last.outstanding_count = last.outstanding_count.wrapping_add(count);
    Ok(())
}

fn decode_lifetimes(input: &mut In<'_>, site: &mut Details, freed: Option<u64>) -> Result<()> {
    let count = input.get_len()?;
    let mut left = freed;
    for n in 0..count {
        let place = usize::try_from(input.get()?).unwrap_or(usize::MAX);
        let Some(class) = site.lifetimes.get_mut(place) else {
            return Err(damaged("a lifetime has an unknown class"));
        };
        let before = *class;
        *class = match left {
            Some(rest) if n + 1 == count => before.wrapping_add(rest),
            _ => input.get_delta(before)?,
        };
        left = left.map(|rest| rest.wrapping_sub(class.wrapping_sub(before)));
    }
    Ok(())
}
