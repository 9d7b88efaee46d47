//! What can be believed of the kernel's sites: compares them with the kernel's own statistics.
//!
//! Where frees by RCU or of many blocks at a time are not seen, a freed block looks outstanding until its address is handed
//! out again. Two things give that away: addresses that are handed out again without a free, by site, and a cache that
//! has not grown by what its sites claim.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::statistics::{Cache, Statistics};
use super::{CacheLine, KernelSample, KernelSummary};
use crate::snapshot::{SiteSample, Totals};

/// A site of which more frees than this part were not seen is unverifiable ...
const UNSEEN_SHARE: f64 = 0.05;
/// ... if they were at least so many: a single one may have been missed in any way.
const UNSEEN_MIN: u64 = 3;
/// So much of what the sites of a cache claim must be in the cache's own growth.
const CONFIRMED: f64 = 0.5;
/// Fewer blocks say nothing: a cache's own count is off by what lies on lists of the CPUs.
const CLAIMED_MIN: u64 = 64;
/// Most caches in a summary.
const MAX_CACHES: usize = 20;

/// What was claimed and counted at an earlier time.
#[derive(Clone, Debug, Default)]
pub struct Earlier {
    /// Outstanding blocks by cache.
    pub claims: HashMap<String, u64>,
    /// What the kernel said.
    pub statistics: Statistics,
}

impl Earlier {
    /// How many more blocks of a cache are claimed by now, and how many more objects it has.
    fn change(&self, cache: &str, claims: &HashMap<String, u64>, now: &Statistics) -> Option<(i64, i64)> {
        let count = |claims: &HashMap<String, u64>| claims.get(cache).copied().unwrap_or(0).cast_signed();
        Some((count(claims) - count(&self.claims), growth(cache, &self.statistics, now)?.0))
    }
}

/// Outstanding blocks by cache.
pub fn claims(sites: &[SiteSample]) -> HashMap<String, u64> {
    let mut claims: HashMap<String, u64> = HashMap::new();
    for sample in sites {
        if let Some(cache) = sample.kernel.as_ref().and_then(|k| k.origin.cache.as_ref()) {
            *claims.entry(cache.clone()).or_default() += sample.totals.outstanding_count();
        }
    }
    claims
}

/// Says of every site whether it can be believed, and sums up. `blind`: frees that no tracepoint tells of are not seen.
/// `recently` is a minute ago or so: objects from before the start may still have been freed until then.
pub fn judge(
    sites: &mut [SiteSample],
    at_start: &Statistics,
    recently: Option<&Earlier>,
    now: &Statistics,
    blind: bool,
    is_reclaimable: &mut dyn FnMut(&str) -> bool,
) -> KernelSummary {
    let claims = claims(sites);
    let mut summary = KernelSummary {
        slab_growth_bytes: now.growth(at_start, "Slab"),
        vmalloc_growth_bytes: now.growth(at_start, "VmallocUsed"),
        percpu_growth_bytes: now.growth(at_start, "Percpu"),
        ..KernelSummary::default()
    };
    for sample in sites.iter_mut() {
        let Some(known) = &sample.kernel else { continue };
        let mut kernel = KernelSample::clone(known);
        if let Some(cache) = &kernel.origin.cache {
            kernel.reclaimable = is_reclaimable(cache);
            let grown = growth(cache, at_start, now);
            kernel.cache_growth_bytes = grown.map(|(n, c)| n.saturating_mul(c.object_bytes.cast_signed()));
            let claimed = claims.get(cache).copied().unwrap_or(0);
            let confirmed = recently.and_then(|r| r.change(cache, &claims, now)).is_some_and(is_confirmed);
            let grown = grown.map(|g| g.0).filter(|_| blind && !confirmed);
            kernel.unverifiable = why_unverifiable(&kernel, &sample.totals, claimed, grown);
        }
        if kernel.unverifiable.is_some() {
            summary.unverifiable_sites += 1;
            summary.unverifiable_bytes += sample.totals.outstanding_bytes();
        }
        sample.kernel = Some(Arc::new(kernel));
    }
    add_caches(&mut summary, &claims, at_start, now);
    summary
}

fn growth(name: &str, at_start: &Statistics, now: &Statistics) -> Option<(i64, Cache)> {
    let cache = *now.caches.as_ref()?.get(name)?;
    let before = at_start.caches.as_ref()?.get(name).map_or(0, |c| c.active);
    Some((cache.active.cast_signed() - before.cast_signed(), cache))
}

/// Whether a cache has grown by enough of what its sites claim, and the claim is large enough to say so.
fn is_confirmed((claimed, grown): (i64, i64)) -> bool {
    claimed >= CLAIMED_MIN.cast_signed() && grown as f64 >= CONFIRMED * claimed as f64
}

fn why_unverifiable(kernel: &KernelSample, totals: &Totals, claimed: u64, grown: Option<i64>) -> Option<Arc<str>> {
    let unseen = kernel.unseen_frees;
    if unseen >= UNSEEN_MIN && unseen as f64 > UNSEEN_SHARE * totals.freed_count as f64 {
        let text = format!(
            "{unseen} of its {} frees were not seen: its blocks are freed by RCU or many at a time, which cannot be \
             followed here",
            totals.freed_count
        );
        return Some(text.into());
    }
    let cache = kernel.origin.cache.as_deref().unwrap_or_default();
    let grown = grown.filter(|_| claimed >= CLAIMED_MIN)?;
    ((grown as f64) < CONFIRMED * claimed as f64).then(|| {
        let text = format!(
            "{claimed} blocks of {cache} look outstanding, but the cache has grown by {grown} objects only: some were freed \
             in a way that cannot be followed here"
        );
        text.into()
    })
}

fn add_caches(summary: &mut KernelSummary, claims: &HashMap<String, u64>, at_start: &Statistics, now: &Statistics) {
    let none = BTreeMap::new();
    let caches = now.caches.as_ref().unwrap_or(&none);
    let (mut grown_bytes, mut explained_bytes) = (0_u64, 0_u64);
    for (name, cache) in caches {
        let outstanding = claims.get(name).copied().unwrap_or(0);
        let growth = growth(name, at_start, now).map_or(0, |g| g.0);
        if let Ok(grown) = u64::try_from(growth) {
            grown_bytes += grown * cache.object_bytes;
            explained_bytes += grown.min(outstanding) * cache.object_bytes;
        }
        if growth != 0 || outstanding > 0 {
            summary.caches.push(CacheLine {
                name: name.clone(),
                object_bytes: cache.object_bytes,
                active: cache.active,
                growth,
                outstanding,
            });
        }
    }
    let size = |c: &CacheLine| c.object_bytes.saturating_mul(c.growth.unsigned_abs().max(c.outstanding));
    summary.caches.sort_by_key(|c| std::cmp::Reverse(size(c)));
    summary.caches.truncate(MAX_CACHES);
    if now.caches.is_some() && at_start.caches.is_some() {
        summary.cache_growth_bytes = Some(grown_bytes);
        summary.explained_bytes = Some(explained_bytes);
        summary.explained_share = (grown_bytes > 0).then(|| explained_bytes as f64 / grown_bytes as f64);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use super::super::Origin;
    use super::*;
    use crate::snapshot::{LIFETIME_CLASSES, Process, Site, SiteKey, StandardErrors};

    fn statistics(active: u64) -> Statistics {
        let caches = BTreeMap::from([("kmalloc-64".to_owned(), Cache { active, object_bytes: 64 })]);
        Statistics { caches: Some(caches), ..Statistics::default() }
    }

    fn site(allocated: u64, freed: u64, unseen_frees: u64) -> SiteSample {
        let origin = Origin { cache: Some("kmalloc-64".into()), object_bytes: 64, ..Origin::default() };
        SiteSample {
            site: Arc::new(Site {
                key: SiteKey { instance: 1, probe_set: 0, stack: allocated },
                id: 0,
                process: Arc::new(Process::default()),
                probe_set: "kernel-slab".into(),
                function: "kmalloc".into(),
                addresses: Vec::new(),
                truncated: None,
                first_thread: None,
                frames: OnceLock::new(),
            }),
            totals: Totals {
                allocated_bytes: allocated * 64,
                allocated_count: allocated,
                freed_bytes: freed * 64,
                freed_count: freed,
            },
            stderr: StandardErrors::default(),
            last_allocation_s: 0.0,
            cohorts: Vec::new(),
            lifetimes: [0; LIFETIME_CLASSES],
            reachability: None,
            kernel: Some(Arc::new(KernelSample { origin: Arc::new(origin), unseen_frees, ..KernelSample::default() })),
        }
    }

    fn verdicts(sites: &mut [SiteSample], grown: u64, blind: bool) -> Vec<bool> {
        let summary = judge(sites, &statistics(1000), None, &statistics(1000 + grown), blind, &mut |_| false);
        let verdicts: Vec<bool> =
            sites.iter().map(|s| s.kernel.as_ref().is_some_and(|k| k.unverifiable.is_some())).collect();
        assert_eq!(summary.unverifiable_sites, verdicts.iter().filter(|v| **v).count() as u64);
        verdicts
    }

    /// 10,000 objects given to kfree_rcu look like a leak of 10,000: the cache knows better.
    #[test]
    fn what_the_cache_does_not_confirm_is_unverifiable() {
        assert_eq!(verdicts(&mut [site(10_000, 0, 0)], 300, true), [true]);
        assert_eq!(verdicts(&mut [site(10_000, 0, 0)], 9_900, true), [false]);
        // Where every free is seen, a cache may shrink for other reasons.
        assert_eq!(verdicts(&mut [site(10_000, 0, 0)], 300, false), [false]);
    }

    /// Objects from before the start are freed meanwhile, so the cache has not grown; but it has within the last minute.
    #[test]
    fn recent_growth_confirms_a_site() {
        let earlier = |claimed, active| Earlier {
            claims: HashMap::from([("kmalloc-64".to_owned(), claimed)]),
            statistics: statistics(active),
        };
        let is_unverifiable = |recently: Earlier| {
            let mut sites = [site(5_000, 0, 0)];
            let summary =
                judge(&mut sites, &statistics(9_000), Some(&recently), &statistics(9_100), true, &mut |_| false);
            summary.unverifiable_sites == 1
        };
        assert!(!is_unverifiable(earlier(4_000, 8_150)));
        assert!(is_unverifiable(earlier(4_000, 9_000)));
        assert!(is_unverifiable(earlier(4_990, 9_000)));
    }

    /// A site whose addresses come back without a free tells of itself; its neighbour in the same cache is not touched.
    #[test]
    fn unseen_frees_make_their_own_site_unverifiable() {
        assert_eq!(verdicts(&mut [site(5_000, 400, 400), site(6_000, 0, 0)], 9_000, true), [true, false]);
        assert_eq!(verdicts(&mut [site(5_000, 4_000, 2)], 1_000, true), [false]);
    }

    /// The report says what part of the growth it explains.
    #[test]
    fn growth_is_explained_by_what_is_outstanding() {
        let summary = judge(&mut [site(600, 0, 0)], &statistics(1000), None, &statistics(2000), true, &mut |_| false);
        assert_eq!(summary.cache_growth_bytes, Some(64_000));
        assert_eq!(summary.explained_share, Some(0.6));
        assert_eq!(summary.caches[0].growth, 1000);
    }
}
