//! What scans of a process's memory said of a site: numbers, and the way to one of its blocks.
//!
//! A verdict stays the same until the next scan, so it is written once, as differences from the one before. Sites on the
//! way are numbers of the file.

use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use super::codec::{In, damaged, put_facts};
use crate::reachability::roots::Root;
use crate::reachability::verdict::Tally;
use crate::reachability::{SiteVerdict, Verdict};
use crate::snapshot::{ReachStep, ReachWay, Site, SiteReach};
use crate::{Error, ErrorKind, Result};

/// Numbers of a verdict; a later version appends.
const NUMBERS: usize = 22;

/// A verdict as it lies in the file.
#[derive(Debug, Default)]
pub(super) struct Stored {
    numbers: [u64; NUMBERS],
    /// JSON of a [`Way`]; empty without one.
    way: String,
    /// What it was made into, once somebody has asked.
    made: OnceLock<Arc<SiteReach>>,
}

impl PartialEq for Stored {
    fn eq(&self, other: &Stored) -> bool {
        (&self.numbers, &self.way) == (&other.numbers, &other.way)
    }
}

/// A [`ReachWay`] with numbers for its sites.
#[derive(Serialize, Deserialize)]
struct Way {
    root: Root,
    steps: Vec<Step>,
}

#[derive(Serialize, Deserialize)]
enum Step {
    /// Number of the site, and of the blocks.
    Blocks(u32, usize),
    Skipped(usize),
}

impl Stored {
    /// For the file; `number` gives that of a site. Every field is named, so that one that is added cannot be forgotten.
    ///
    /// # Errors
    /// A site cannot be stored.
    pub(super) fn new(reach: &SiteReach, number: &mut dyn FnMut(&Arc<Site>) -> Result<u32>) -> Result<Stored> {
        let SiteReach { verdict, counts, time_s, way } = reach;
        let SiteVerdict {
            scans,
            lost,
            indirectly_lost,
            possible,
            reachable,
            disguised,
            young,
            called_lost,
            refuted,
            still,
            gone,
            in_requests,
            device_bytes,
        } = counts;
        let word = match verdict {
            Verdict::Unknown => 0,
            Verdict::Reachable => 1,
            Verdict::Possible => 2,
            Verdict::Definite => 3,
        };
        let numbers = [
            word,
            time_s.to_bits(),
            u64::from(*scans),
            lost.blocks,
            lost.bytes,
            indirectly_lost.blocks,
            indirectly_lost.bytes,
            possible.blocks,
            possible.bytes,
            reachable.blocks,
            reachable.bytes,
            disguised.blocks,
            disguised.bytes,
            young.blocks,
            young.bytes,
            *called_lost,
            *refuted,
            u64::from(*still),
            gone.blocks,
            gone.bytes,
            *in_requests,
            *device_bytes,
        ];
        let way = match way {
            None => String::new(),
            Some(ReachWay { root, steps }) => {
                let step = |step: &ReachStep| match step {
                    ReachStep::Blocks(site, count) => Ok(Step::Blocks(number(site)?, *count)),
                    ReachStep::Skipped(count) => Ok(Step::Skipped(*count)),
                };
                let way = Way { root: root.clone(), steps: steps.iter().map(step).collect::<Result<_>>()? };
                let failed = |e| Error::with_source(ErrorKind::Io, "failed to record the way to a block", e);
                serde_json::to_string(&way).map_err(failed)?
            }
        };
        Ok(Stored { numbers, way, made: OnceLock::new() })
    }

    /// The verdict; `site` finds a site by its number.
    ///
    /// # Errors
    /// The recording is damaged.
    pub(super) fn reach(&self, site: &mut dyn FnMut(u32) -> Result<Arc<Site>>) -> Result<Arc<SiteReach>> {
        if let Some(made) = self.made.get() {
            return Ok(Arc::clone(made));
        }
        let n = &self.numbers;
        let tally = |at: usize| Tally { blocks: n[at], bytes: n[at + 1] };
        let counts = SiteVerdict {
            scans: u32::try_from(n[2]).unwrap_or(u32::MAX),
            lost: tally(3),
            indirectly_lost: tally(5),
            possible: tally(7),
            reachable: tally(9),
            disguised: tally(11),
            young: tally(13),
            called_lost: n[15],
            refuted: n[16],
            still: n[17] != 0,
            gone: tally(18),
            in_requests: n[20],
            device_bytes: n[21],
        };
        let verdict = match n[0] {
            1 => Verdict::Reachable,
            2 => Verdict::Possible,
            3 => Verdict::Definite,
            _ => Verdict::Unknown,
        };
        let way = if self.way.is_empty() { None } else { Some(self.read_way(site)?) };
        let made = Arc::new(SiteReach { verdict, counts, time_s: f64::from_bits(n[1]), way });
        Ok(Arc::clone(self.made.get_or_init(|| made)))
    }

    fn read_way(&self, site: &mut dyn FnMut(u32) -> Result<Arc<Site>>) -> Result<ReachWay> {
        let way: Way =
            serde_json::from_str(&self.way).map_err(|_| damaged("the way to a block cannot be understood"))?;
        let mut step = |step: Step| match step {
            Step::Blocks(number, count) => Ok(ReachStep::Blocks(site(number)?, count)),
            Step::Skipped(count) => Ok(ReachStep::Skipped(count)),
        };
        Ok(ReachWay { root: way.root, steps: way.steps.into_iter().map(&mut step).collect::<Result<_>>()? })
    }
}

/// Appends what has changed.
pub(super) fn encode(out: &mut Vec<u8>, old: Option<&Stored>, new: Option<&Stored>) {
    let none = Stored::default();
    let old = old.unwrap_or(&none);
    put_facts(out, (&old.numbers, &old.way), new.map(|n| (n.numbers.as_slice(), n.way.as_str())));
}

/// The other way round.
///
/// # Errors
/// The bytes are damaged.
pub(super) fn decode(input: &mut In<'_>, old: Option<&Stored>) -> Result<Option<Stored>> {
    let (mut numbers, mut way) = old.map(|o| (o.numbers, o.way.clone())).unwrap_or_default();
    let there = input.get_facts(&mut numbers, &mut way)?;
    Ok(there.then_some(Stored { numbers, way, made: OnceLock::new() }))
}
