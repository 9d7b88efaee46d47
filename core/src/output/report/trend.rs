//! Trends as a report shows them: growth, since when it goes on, and series thinned for drawing.

use crate::history::Sample;
use crate::stats;

/// Most points that a slope is computed from: its cost grows with the square.
const SLOPE_POINTS: usize = 96;
/// Windows in which the floor of a series must rise one after the other to count as continuous growth. Six in a row
/// happen by chance once in 720 series that only fluctuate.
const RISING_WINDOWS: usize = 6;
/// Most windows that a series is cut into.
const MAX_WINDOWS: usize = 12;

/// Growth of the outstanding bytes over the whole series, bytes per second, robust against outliers (Theil-Sen).
/// 0 for fewer than two samples.
pub(super) fn growth_bytes_per_s(samples: &[Sample]) -> f64 {
    let step = samples.len().div_ceil(SLOPE_POINTS).max(1);
    // From the end, so that the newest sample always counts.
    let mut points: Vec<(f64, f64)> = samples.iter().rev().step_by(step).map(point).collect();
    points.reverse();
    if points.len() < 2 {
        return 0.0;
    }
    let slope = stats::theil_sen_slope(&points);
    if slope.is_finite() { slope } else { 0.0 }
}

/// Since when the outstanding bytes have grown without a break, seconds since the collector started; `None` when they
/// do not, or when there is too little to tell.
///
/// The series is cut into windows of equal time, and what must rise from window to window is the *smallest* value:
/// a saw-tooth on top of a leak does not hide it, and a queue that drains does not show it. Growth must also keep its
/// pace: a start-up before it is left out, and a cache that is about to be full is not marked.
pub(super) fn growing_since_s(samples: &[Sample]) -> Option<f64> {
    let floors = floors(samples);
    let rising = floors.windows(2).rev().take_while(|w| bytes(&w[1]) > bytes(&w[0])).count() + 1;
    let from = floors.len().checked_sub(rising)?;
    let last_start = floors.len().checked_sub(RISING_WINDOWS)?;
    let start = (from..=last_start).find(|start| keeps_pace(&floors[*start..]))?;
    // A rise of less than 2 % is not worth a mark.
    let (low, high) = (bytes(&floors[start]), bytes(floors.last()?));
    (high - low >= 0.02 * high).then_some(floors[start].time_s)
}

/// The sample with the smallest value of every window; empty when there are too few samples for a trend.
fn floors(samples: &[Sample]) -> Vec<Sample> {
    let (Some(first), Some(last)) = (samples.first(), samples.last()) else {
        return Vec::new();
    };
    let windows = (samples.len() / 2).min(MAX_WINDOWS);
    let span_s = last.time_s - first.time_s;
    if windows < RISING_WINDOWS || span_s <= 0.0 {
        return Vec::new();
    }
    let mut floors: Vec<Option<Sample>> = vec![None; windows];
    for s in samples {
        let window = ((s.time_s - first.time_s) / span_s * windows as f64) as usize;
        let floor = floors[window.min(windows - 1)].get_or_insert(*s);
        if bytes(s) < bytes(floor) {
            *floor = *s;
        }
    }
    floors.into_iter().flatten().collect()
}

/// True when the second half rises at least half as fast as the first.
fn keeps_pace(floors: &[Sample]) -> bool {
    let middle = floors.len() / 2;
    let (Some(first), Some(last), Some(middle)) = (floors.first(), floors.last(), floors.get(middle)) else {
        return false;
    };
    let pace = |from: &Sample, to: &Sample| (bytes(to) - bytes(from)) / (to.time_s - from.time_s);
    pace(middle, last) >= 0.5 * pace(first, middle)
}

/// At most `cap` (at least 4) samples that keep both ends and, of every stretch between, the lowest and the highest.
pub(super) fn thinned(samples: &[Sample], cap: usize) -> Vec<Sample> {
    let cap = cap.max(4);
    if samples.len() <= cap {
        return samples.to_vec();
    }
    let (Some((first, rest)), Some(last)) = (samples.split_first(), samples.last()) else {
        return Vec::new();
    };
    let inner = &rest[..rest.len() - 1];
    let mut out = vec![*first];
    for stretch in inner.chunks(inner.len().div_ceil((cap - 2) / 2)) {
        let by_bytes = |a: &&Sample, b: &&Sample| bytes(a).total_cmp(&bytes(b));
        if let (Some(low), Some(high)) = (stretch.iter().min_by(by_bytes), stretch.iter().max_by(by_bytes)) {
            let (a, b) = if low.time_s <= high.time_s { (low, high) } else { (high, low) };
            out.push(*a);
            if b.time_s > a.time_s {
                out.push(*b);
            }
        }
    }
    out.push(*last);
    out
}

fn bytes(sample: &Sample) -> f64 {
    sample.totals.outstanding_bytes() as f64
}

fn point(sample: &Sample) -> (f64, f64) {
    (sample.time_s, bytes(sample))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Totals;

    fn series(n: u32, f: impl Fn(u32) -> u64) -> Vec<Sample> {
        let sample = |i| Sample {
            time_s: f64::from(i),
            totals: Totals { allocated_bytes: f(i), allocated_count: 1, ..Totals::default() },
        };
        (0..n).map(sample).collect()
    }

    /// The ranking depends on it: a steady leak of 100 bytes a second grows by 100 bytes a second.
    #[test]
    fn growth_of_a_line_is_its_slope_at_any_length() {
        for n in [2, 50, 500] {
            let growth = growth_bytes_per_s(&series(n, |i| 1_000 + 100 * u64::from(i)));
            assert!((growth - 100.0).abs() < 1e-9, "{n}: {growth}");
        }
        assert_eq!(growth_bytes_per_s(&series(1, |_| 5)), 0.0);
        assert_eq!(growth_bytes_per_s(&[]), 0.0);
    }

    /// A leak under a saw-tooth of churn is marked from its beginning on.
    #[test]
    fn a_leak_below_churn_is_growing_since_it_began() {
        let since = growing_since_s(&series(300, |i| {
            let leak = u64::from(i.saturating_sub(100)) * 50;
            10_000 + leak + u64::from(i % 7) * 3_000
        }));
        let since = since.expect("growing");
        assert!((75.0..=126.0).contains(&since), "{since}");
    }

    /// What a program allocates while it starts is no growth; the leak after it is.
    #[test]
    fn a_leak_after_a_start_up_is_growing_since_the_start_up() {
        let since = growing_since_s(&series(120, |i| 100_000 * u64::from(i.min(10)) + 900 * u64::from(i)));
        let since = since.expect("growing");
        assert!((10.0..=20.0).contains(&since), "{since}");
    }

    /// What levels off, fluctuates, falls or has hardly been watched must not be marked.
    #[test]
    fn caches_churn_and_short_series_are_not_growing() {
        assert_eq!(growing_since_s(&series(300, |i| 1_000 * u64::from(i.min(150)))), None, "cache that is full");
        let filling = |i: u32| (1e6 * (1.0 - (-f64::from(i) / 60.0).exp())) as u64;
        assert_eq!(growing_since_s(&series(300, filling)), None, "cache that is about to be full");
        assert_eq!(growing_since_s(&series(300, |i| u64::from(i % 10) * 1_000)), None, "saw-tooth");
        assert_eq!(growing_since_s(&series(300, |i| 1_000_000 - u64::from(i))), None, "falling");
        assert_eq!(growing_since_s(&series(300, |i| 1_000_000 + u64::from(i))), None, "less than 2 %");
        assert_eq!(growing_since_s(&series(11, |i| 1_000 * u64::from(i))), None, "too short");
        assert_eq!(growing_since_s(&[]), None);
    }

    /// A peak of one sample is what a reader looks for; thinning must not lose it, nor the ends, nor the order.
    #[test]
    fn thinning_keeps_ends_and_extremes_in_order() {
        let full = series(500, |i| if i == 123 { 1_000_000 } else { 1_000 + u64::from(i) });
        let thin = thinned(&full, 48);
        assert!(thin.len() <= 48, "{}", thin.len());
        assert_eq!((thin[0].time_s, thin[thin.len() - 1].time_s), (0.0, 499.0));
        assert!(thin.iter().any(|s| s.totals.allocated_bytes == 1_000_000));
        assert!(thin.windows(2).all(|w| w[0].time_s < w[1].time_s));
        assert_eq!(thinned(&full, 500).len(), 500);
        assert_eq!(thinned(&[], 4).len(), 0);
    }
}
