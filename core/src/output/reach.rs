//! What scans say of a site, as snapshot lines, alert lines and reports show it.

use std::sync::Arc;

use serde::Serialize;

use crate::output::text::clip;
use crate::reachability::roots::Root;
use crate::reachability::verdict::Tally;
use crate::reachability::{SiteVerdict, Verdict};
use crate::snapshot::{ReachStep, ReachWay, Site, SiteKey, SiteReach};
use crate::symbolize::Frame;

/// Most characters of a way: each of its steps may have a very long name.
const MAX_WAY: usize = 2_000;

/// The verdict with its evidence. Names in it are hostile text.
#[derive(Clone, Debug, Serialize)]
pub struct ReachView {
    /// In one word.
    pub verdict: Verdict,
    /// In numbers.
    #[serde(flatten)]
    pub counts: SiteVerdict,
    /// Lost among the blocks that are lost or reachable; `None` when there are neither.
    pub lost_fraction: Option<f64>,
    /// Its 95 % confidence interval.
    pub lost_fraction_low: Option<f64>,
    /// See `lost_fraction_low`.
    pub lost_fraction_high: Option<f64>,
    /// When the last scan ended, seconds since the collector started.
    pub time_s: f64,
    /// All of it as a sentence.
    pub evidence: String,
    /// What holds on to an example of the reachable blocks; `None` when none is.
    pub root: Option<Root>,
    /// The way from there to the block.
    pub way: Option<String>,
}

impl From<&SiteReach> for ReachView {
    fn from(reach: &SiteReach) -> Self {
        let fraction = reach.counts.lost_fraction();
        ReachView {
            verdict: reach.verdict,
            counts: reach.counts,
            lost_fraction: fraction.map(|f| f.0),
            lost_fraction_low: fraction.map(|f| f.1),
            lost_fraction_high: fraction.map(|f| f.2),
            time_s: reach.time_s,
            evidence: reach.describe(),
            root: reach.way.as_ref().map(|w| w.root.clone()),
            way: reach.way.as_ref().map(ReachWay::describe).map(|way| clip(&way, MAX_WAY).into_owned()),
        }
    }
}

/// A site that was scanned: for checks of templates.
pub(super) fn sample() -> SiteReach {
    let of = |blocks| Tally { blocks, bytes: 100 * blocks };
    let counts = SiteVerdict {
        scans: 3,
        lost: of(3),
        indirectly_lost: of(2),
        reachable: of(95),
        possible: of(1),
        ..SiteVerdict::default()
    };
    let root = Root::Global { module: "/opt/server".to_owned(), name: Some("sessions".to_owned()), offset: 16 };
    let frames = vec![Frame { function: Some("Session::\"open\"()".to_owned()), ..Frame::default() }];
    let site = Site {
        key: SiteKey { instance: 1, probe_set: 1, stack: 7 },
        id: 7,
        process: Arc::default(),
        probe_set: "glibc".into(),
        function: "malloc".into(),
        addresses: vec![1],
        truncated: None,
        first_thread: None,
        frames: frames.into(),
    };
    let steps = vec![ReachStep::Blocks(Arc::new(site), 3)];
    let way = Some(ReachWay { root, steps });
    SiteReach { verdict: Verdict::Reachable, counts, time_s: 11.5, way }
}
