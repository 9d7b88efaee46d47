//! The page's data: everything that its scripts draw from, small enough for thousands of sites.
//!
//! Names are interned, because stacks of one program share most of their frames; series are thinned to a number of
//! points that depends on how many sites share the page, and written as base64 over variable-length deltas. The
//! reader is `templates/report_data.js`: change both together.

use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use serde::Serialize;

use super::AlertStatus;
use super::context::Report;
use super::site::{FrameView, SiteView};
use super::trend::thinned;
use crate::finding::Severity;
use crate::history::Sample;
use crate::output::reach::ReachView;
use crate::output::text::visible;
use crate::reachability::Verdict;
use crate::snapshot::Cohort;

/// Sites that keep every point: those at the top are looked at first.
const FULL_SITES: usize = 50;
/// Points that the other sites share, about 6 bytes each.
const SHARED_POINTS: usize = 160_000;
/// Bounds of the points of one of them; a sparkline is not wider.
const MIN_POINTS: usize = 48;
const MAX_POINTS: usize = 500;
/// Ticks per second in an encoded series.
const TICKS_PER_S: f64 = 100.0;

/// Numbers of a frame.
const FRAME: usize = 9;

/// Data of the page. Indexes are into `strings`, `frames`, `processes` or `alerts`; -1 is *none*.
#[derive(Debug, Serialize)]
pub(super) struct Page {
    /// Wall-clock time of second 0, seconds since 1970.
    zero_wall_s: f64,
    /// Time of the newest snapshot.
    now_s: f64,
    /// Since when the total grows without a break.
    growing_since_s: Option<f64>,
    strings: Vec<String>,
    /// `[function, module, offset, file, line, inlined, reason, build_id, file_address]`, strings by index.
    frames: Vec<[i64; FRAME]>,
    processes: Vec<PageProcess>,
    alerts: Vec<PageAlert>,
    sites: Vec<PageSite>,
    /// The series of all sites together.
    series: String,
    /// Lists of `[start_s, end_s]`: most sites share the periods of their cohorts.
    periods: Vec<Vec<(f64, f64)>>,
}

#[derive(Debug, Serialize)]
struct PageProcess {
    pid: u32,
    comm: i64,
    instance: u32,
}

#[derive(Debug, Serialize)]
struct PageAlert {
    rule: i64,
    severity: Severity,
    status: AlertStatus,
    reason: i64,
}

/// One site; the order of the list is the ranking.
#[derive(Debug, Serialize)]
struct PageSite {
    id: String,
    process: i64,
    probe_set: i64,
    function: i64,
    /// 3 critical, 2 warning, 1 info, 0 none.
    severity: u8,
    alerts: Vec<usize>,
    bytes: u64,
    count: u64,
    /// Allocated bytes and count, freed bytes and count.
    totals: [u64; 4],
    /// Standard errors of bytes and count; absent where nothing is sampled.
    #[serde(skip_serializing_if = "Option::is_none")]
    stderr: Option<[f64; 2]>,
    growth: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    growing_since: Option<f64>,
    age: f64,
    last: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    ended: Option<f64>,
    /// The frame of the heading within `stack`; -1 uses `name`.
    head: i64,
    name: i64,
    stack: Vec<usize>,
    truncated: i64,
    /// Which of `periods` its cohorts cover.
    periods: usize,
    /// Born count, outstanding count and outstanding bytes of every cohort, encoded like a series.
    cohorts: String,
    /// What scans of the process's memory say; absent before there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    reach: Option<PageReach>,
    /// `[class, frees]` for classes that are not empty.
    lifetimes: Vec<(usize, u64)>,
    series: String,
}

/// Whether the process can still reach a site's blocks.
#[derive(Debug, Serialize)]
struct PageReach {
    verdict: Verdict,
    evidence: i64,
    way: i64,
    /// Blocks and bytes: lost, lost with other blocks, possibly lost, reachable, disguised, too young, gone.
    tallies: [[u64; 2]; 7],
    /// Lost fraction with its interval; absent when nothing could be judged.
    #[serde(skip_serializing_if = "Option::is_none")]
    fraction: Option<[f64; 3]>,
    scans: u32,
    time: f64,
}

impl Page {
    pub(super) fn new(report: &Report) -> Page {
        let mut names = Names::default();
        let instances: HashMap<u32, i64> = report.processes.iter().zip(0..).map(|(p, i)| (p.instance, i)).collect();
        let shared = SHARED_POINTS / report.sites.len().max(1);
        let mut site_alerts: HashMap<usize, Vec<usize>> = HashMap::new();
        for (i, alert) in report.alerts.iter().enumerate() {
            if let Some(site) = &alert.site {
                site_alerts.entry(site.index).or_default().push(i);
            }
        }
        let sites = (report.sites.iter().enumerate())
            .map(|(i, s)| {
                let points = if i < FULL_SITES { MAX_POINTS } else { shared.clamp(MIN_POINTS, MAX_POINTS) };
                let process = instances.get(&s.instance).copied().unwrap_or(-1);
                PageSite::new(s, process, site_alerts.remove(&i).unwrap_or_default(), points, &mut names)
            })
            .collect();
        let processes = (report.processes.iter())
            .map(|p| PageProcess { pid: p.pid, comm: names.string(&p.comm), instance: p.instance })
            .collect();
        let alerts = (report.alerts.iter())
            .map(|a| PageAlert {
                rule: names.string(&a.rule),
                severity: a.severity,
                status: a.status,
                reason: names.string(&a.reason),
            })
            .collect();
        Page {
            zero_wall_s: report.zero_wall_s,
            now_s: report.now_s,
            growing_since_s: report.growing_since_s(),
            series: encode(thinned(&report.series, 2 * MAX_POINTS).iter().map(row)),
            periods: names.periods,
            strings: names.strings,
            frames: names.frames,
            processes,
            alerts,
            sites,
        }
    }
}

impl PageSite {
    fn new(s: &SiteView, process: i64, alerts: Vec<usize>, points: usize, names: &mut Names) -> Self {
        let severity = match s.severity {
            None => 0,
            Some(Severity::Info) => 1,
            Some(Severity::Warning) => 2,
            Some(Severity::Critical) => 3,
        };
        PageSite {
            id: s.id.clone(),
            process,
            probe_set: names.string(&s.probe_set),
            function: names.string(&s.function),
            severity,
            alerts,
            bytes: s.outstanding_bytes,
            count: s.outstanding_count,
            totals: [s.totals.allocated_bytes, s.totals.allocated_count, s.totals.freed_bytes, s.totals.freed_count],
            stderr: (s.stderr.bytes > 0.0).then(|| [short(s.stderr.bytes), short(s.stderr.count)]),
            growth: short(s.growth_bytes_per_s),
            growing_since: s.growing_since_s.map(short),
            age: short(s.oldest_age_s),
            last: short(s.last_allocation_s),
            ended: s.ended_s.map(short),
            head: s.heading.frame.map_or(-1, |i| i as i64),
            name: names.string(&s.heading.name),
            stack: s.frames.iter().map(|f| names.frame(f)).collect(),
            truncated: names.optional(s.truncated.as_deref()),
            periods: names.periods(&s.cohorts),
            cohorts: encode(
                s.cohorts
                    .iter()
                    .map(|c| [signed(c.born_count), signed(c.outstanding_count), signed(c.outstanding_bytes)]),
            ),
            reach: s.reachability.as_ref().map(|r| PageReach::new(r, names)),
            lifetimes: s.lifetimes.iter().copied().enumerate().filter(|(_, n)| *n > 0).collect(),
            series: encode(thinned(&s.series, points).iter().map(row)),
        }
    }
}

impl PageReach {
    fn new(r: &ReachView, names: &mut Names) -> Self {
        let c = &r.counts;
        let tallies = [c.lost, c.indirectly_lost, c.possible, c.reachable, c.disguised, c.young, c.gone];
        PageReach {
            verdict: r.verdict,
            evidence: names.string(&r.evidence),
            way: names.optional(r.way.as_deref()),
            tallies: tallies.map(|t| [t.blocks, t.bytes]),
            fraction: c.lost_fraction().map(|(p, low, high)| [short(p), short(low), short(high)]),
            scans: c.scans,
            time: short(r.time_s),
        }
    }
}

/// Strings, frames and lists of periods that have a number.
#[derive(Default)]
struct Names {
    strings: Vec<String>,
    string_numbers: HashMap<String, i64>,
    frames: Vec<[i64; FRAME]>,
    frame_numbers: HashMap<[i64; FRAME], usize>,
    periods: Vec<Vec<(f64, f64)>>,
}

impl Names {
    /// The number of a text, made visible: the page's scripts put it into text nodes as it is.
    fn string(&mut self, text: &str) -> i64 {
        let text = visible(text);
        if let Some(n) = self.string_numbers.get(text.as_ref()) {
            return *n;
        }
        let number = self.strings.len() as i64;
        self.strings.push(text.to_string());
        self.string_numbers.insert(text.into_owned(), number);
        number
    }

    fn optional(&mut self, text: Option<&str>) -> i64 {
        text.map_or(-1, |t| self.string(t))
    }

    fn frame(&mut self, f: &FrameView) -> usize {
        let frame = [
            self.optional(f.function.as_deref()),
            self.optional(f.module.as_deref()),
            self.string(&f.offset),
            self.optional(f.file.as_deref()),
            f.line.map_or(-1, i64::from),
            i64::from(f.inlined),
            self.optional(f.reason.as_deref()),
            self.optional(f.build_id.as_deref()),
            f.file_address.and_then(|a| i64::try_from(a).ok()).unwrap_or(-1),
        ];
        let frames = &mut self.frames;
        *self.frame_numbers.entry(frame).or_insert_with(|| {
            frames.push(frame);
            frames.len() - 1
        })
    }
}

impl Names {
    /// The number of the cohorts' list of periods. There are few different ones, and neighbours in the ranking tend to
    /// share theirs, so the search begins at the newest.
    fn periods(&mut self, cohorts: &[Cohort]) -> usize {
        let periods: Vec<(f64, f64)> = cohorts.iter().map(|c| (short(c.start_s), short(c.end_s))).collect();
        match self.periods.iter().rposition(|p| *p == periods) {
            Some(i) => i,
            None => {
                self.periods.push(periods);
                self.periods.len() - 1
            }
        }
    }
}

/// Milliseconds are enough for a reader, and shorter to write.
fn short(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Time (ticks), outstanding bytes and outstanding count of a sample.
fn row(s: &Sample) -> [i64; 3] {
    let ticks = (s.time_s * TICKS_PER_S).round() as i64;
    [ticks, signed(s.totals.outstanding_bytes()), signed(s.totals.outstanding_count())]
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Rows of three numbers, each as the difference from the row before in zigzag LEB128, all in base64.
fn encode(rows: impl Iterator<Item = [i64; 3]>) -> String {
    let mut bytes = Vec::new();
    let mut previous = [0_i64; 3];
    for now in rows {
        for (value, before) in now.into_iter().zip(previous) {
            let delta = value.wrapping_sub(before);
            let mut zigzag = ((delta << 1) ^ (delta >> 63)) as u64;
            while zigzag >= 0x80 {
                bytes.push((zigzag & 0x7f) as u8 | 0x80);
                zigzag >>= 7;
            }
            bytes.push(zigzag as u8);
        }
        previous = now;
    }
    STANDARD_NO_PAD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Totals;

    fn sample(time_s: f64, bytes: u64, count: u64) -> Sample {
        let totals = Totals { allocated_bytes: bytes, allocated_count: count, ..Totals::default() };
        Sample { time_s, totals }
    }

    /// The script decodes exactly this form; the bytes are worked out by hand.
    #[test]
    fn a_series_is_zigzag_deltas_in_base64() {
        // 1.00 s, 64 bytes, 1 block: 200 (0xc8 0x01), 128 (0x80 0x01), 2; then +0, -64, -1: 0, 127, 1.
        let text = encode([sample(1.0, 64, 1), sample(1.0, 0, 0)].iter().map(row));
        let bytes = STANDARD_NO_PAD.decode(text).expect("base64");
        assert_eq!(bytes, [0xc8, 0x01, 0x80, 0x01, 0x02, 0x00, 0x7f, 0x01]);
    }

    /// Interned names must be visible: scripts insert them as they are, and a reversed name would still mislead.
    #[test]
    fn interned_names_are_visible_and_shared() {
        let mut names = Names::default();
        assert_eq!((names.string("a\u{202e}"), names.string("b"), names.string("a\u{202e}")), (0, 1, 0));
        assert_eq!(names.strings, [r"a\u{202e}", "b"]);
        assert_eq!(names.optional(None), -1);
    }
}
