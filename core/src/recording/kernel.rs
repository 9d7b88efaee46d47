//! What is known of the kernel's sites beside their totals: three numbers that change, and facts that seldom do.

use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use super::codec::{In, damaged, put_facts};
use crate::kernel::{KernelSample, Origin};
use crate::{Error, ErrorKind, Result};

/// Numbers of a sample; a later version appends.
const NUMBERS: usize = 4;

/// A sample as it lies in the file.
#[derive(Debug, Default)]
pub(super) struct Stored {
    numbers: [u64; NUMBERS],
    /// JSON of [`Facts`].
    facts: String,
    /// What it was made into, once somebody has asked.
    made: OnceLock<Arc<KernelSample>>,
}

impl PartialEq for Stored {
    fn eq(&self, other: &Stored) -> bool {
        (&self.numbers, &self.facts) == (&other.numbers, &other.facts)
    }
}

#[derive(Serialize, Deserialize)]
struct Facts {
    origin: Origin,
    unverifiable: Option<String>,
}

impl Stored {
    /// For the file. Every field is named, so that one that is added cannot be forgotten here.
    ///
    /// # Errors
    /// It cannot be written as JSON.
    pub(super) fn new(sample: &KernelSample) -> Result<Stored> {
        let KernelSample { origin, unseen_frees, unverifiable, cache_growth_bytes, reclaimable } = sample;
        let known = u64::from(cache_growth_bytes.is_some());
        let grown = cache_growth_bytes.unwrap_or(0).cast_unsigned();
        let facts = Facts { origin: (**origin).clone(), unverifiable: unverifiable.as_deref().map(str::to_owned) };
        let failed = |e| Error::with_source(ErrorKind::Io, "failed to record facts of the kernel", e);
        let facts = serde_json::to_string(&facts).map_err(failed)?;
        Ok(Stored { numbers: [*unseen_frees, known, grown, u64::from(*reclaimable)], facts, made: OnceLock::new() })
    }

    /// The sample.
    ///
    /// # Errors
    /// The recording is damaged.
    pub(super) fn sample(&self) -> Result<Arc<KernelSample>> {
        if let Some(made) = self.made.get() {
            return Ok(Arc::clone(made));
        }
        let facts: Facts =
            serde_json::from_str(&self.facts).map_err(|_| damaged("facts of the kernel cannot be understood"))?;
        let [unseen_frees, known, grown, reclaimable] = self.numbers;
        let made = Arc::new(KernelSample {
            origin: Arc::new(facts.origin),
            unseen_frees,
            unverifiable: facts.unverifiable.map(Arc::from),
            cache_growth_bytes: (known != 0).then_some(grown.cast_signed()),
            reclaimable: reclaimable != 0,
        });
        Ok(Arc::clone(self.made.get_or_init(|| made)))
    }
}

/// Appends what has changed.
pub(super) fn encode(out: &mut Vec<u8>, old: Option<&Stored>, new: Option<&Stored>) {
    let none = Stored::default();
    let old = old.unwrap_or(&none);
    put_facts(out, (&old.numbers, &old.facts), new.map(|n| (n.numbers.as_slice(), n.facts.as_str())));
}

/// The other way round.
///
/// # Errors
/// The bytes are damaged.
pub(super) fn decode(input: &mut In<'_>, old: Option<&Stored>) -> Result<Option<Stored>> {
    let (mut numbers, mut facts) = old.map(|o| (o.numbers, o.facts.clone())).unwrap_or_default();
    let there = input.get_facts(&mut numbers, &mut facts)?;
    Ok(there.then_some(Stored { numbers, facts, made: OnceLock::new() }))
}
