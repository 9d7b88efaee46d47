//! Pure statistics over time series: what rules, alerts and reports call a trend.
//!
//! All functions take points `(time in seconds, value)` or values in order of time, cost a bounded number of steps
//! however long the series is, and return a finite number for finite input: a series that is too short for a
//! statement gives the value that says "no trend".

/// Most points that the statistics look at: 30 points make 435 pairs, a few microseconds.
///
/// A longer series is subsampled evenly, both ends included. For a trend that costs little power: the end
/// points carry most of it.
pub const MAX_POINTS: usize = 30;

/// Indices of at most [`MAX_POINTS`] of `len` points, evenly spread, first and last included.
fn spread(len: usize) -> impl Iterator<Item = usize> {
    let kept = len.min(MAX_POINTS);
    (0..kept).map(move |i| if kept < 2 { i } else { i * (len - 1) / (kept - 1) })
}

/// Puts an even subsample of a series of `len` points into `kept` and returns the part that it fills.
///
/// What the subsample of a subsample is: itself. So a caller whose points are elsewhere can take it with this function
/// and pass it on to the statistics below, with the same result as for all points.
pub fn subsample<T: Copy>(len: usize, at: impl Fn(usize) -> T, kept: &mut [T; MAX_POINTS]) -> &[T] {
    let mut n = 0;
    for i in spread(len) {
        kept[n] = at(i);
        n += 1;
    }
    &kept[..n]
}

/// Theil-Sen slope: the median of the slopes between all pairs of points, in units of value per second.
///
/// Robust: up to 29 % of the points may be outliers. 0 for fewer than two points with different times. Series of
/// more than [`MAX_POINTS`] points are subsampled evenly first.
pub fn theil_sen_slope(points: &[(f64, f64)]) -> f64 {
    let mut kept = [(0.0, 0.0); MAX_POINTS];
    let points = subsample(points.len(), |i| points[i], &mut kept);
    let mut slopes = [0.0; MAX_POINTS * (MAX_POINTS - 1) / 2];
    let mut pairs = 0;
    for (i, a) in points.iter().enumerate() {
        for b in &points[..i] {
            let slope = (a.1 - b.1) / (a.0 - b.0);
            // Equal times say nothing about a slope; differences may overflow for absurd values.
            if slope.is_finite() {
                slopes[pairs] = slope;
                pairs += 1;
            }
        }
    }
    median(&mut slopes[..pairs])
}

/// Spread of the values around their Theil-Sen line: the median absolute deviation times 1.4826, which is the standard
/// deviation if the noise is normal. Of more than [`MAX_POINTS`] points an even subsample is taken. 0 for fewer than
/// three points. `slope` is their [`theil_sen_slope`], which the caller usually has already.
pub fn noise(points: &[(f64, f64)], slope: f64) -> f64 {
    if points.len() < 3 {
        return 0.0;
    }
    let mut residuals = [0.0; MAX_POINTS];
    let mut n = 0;
    for i in spread(points.len()) {
        residuals[n] = points[i].1 - slope * (points[i].0 - points[0].0);
        n += 1;
    }
    let middle = median(&mut residuals[..n]);
    residuals[..n].iter_mut().for_each(|r| *r = (*r - middle).abs());
    let noise = 1.4826 * median(&mut residuals[..n]);
    if noise.is_finite() { noise } else { 0.0 }
}

/// Median; the mean of the two middle ones for an even count, 0 for none.
fn median(values: &mut [f64]) -> f64 {
    let middle = values.len() / 2;
    if values.is_empty() {
        return 0.0;
    }
    let even = values.len().is_multiple_of(2);
    let (below, upper, _) = values.select_nth_unstable_by(middle, f64::total_cmp);
    let upper = *upper;
    if !even {
        return upper;
    }
    let lower = below.iter().copied().max_by(f64::total_cmp).unwrap_or(upper);
    lower / 2.0 + upper / 2.0
}

/// Share of the steps between neighbours that rise, 0 to 1. 0 for fewer than two values.
pub fn rising_fraction(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values = values.into_iter();
    let Some(mut previous) = values.next() else { return 0.0 };
    let (mut rising, mut steps) = (0_u32, 0_u32);
    for value in values {
        rising += u32::from(value > previous);
        steps += 1;
        previous = value;
    }
    if steps == 0 { 0.0 } else { f64::from(rising) / f64::from(steps) }
}

/// Number of steps between neighbours that rise.
pub fn rises(values: impl IntoIterator<Item = f64>) -> usize {
    let mut values = values.into_iter();
    let Some(mut previous) = values.next() else { return 0 };
    values.filter(|&value| value > std::mem::replace(&mut previous, value)).count()
}

/// Mann-Kendall: how sure one may be that the values trend *upwards*, 0 to 1.
///
/// It is 1 minus the two-sided p-value of the test against "no trend", with correction for ties, and 0 when the
/// trend is flat or downwards. Series of more than [`MAX_POINTS`] values are subsampled evenly first.
///
/// Two cautions. The p-value comes from the normal approximation, which is within 0.04 of the exact one from
/// n = 4 on; below 4 values no trend can be significant and the result stays below 0.8. The test takes values as independent,
/// while outstanding bytes are a sum over time: a random walk looks more certain than it is, so a rule must ask for
/// more than significance alone (a slope, a duration, no levelling off).
pub fn trend_confidence(values: &[f64]) -> f64 {
    let mut kept = [0.0; MAX_POINTS];
    let mut n = 0;
    for i in spread(values.len()) {
        kept[n] = values[i];
        n += 1;
    }
    let kept = &mut kept[..n];
    let mut s = 0_i64;
    for i in 1..n {
        for j in 0..i {
            s += i64::from(kept[i] > kept[j]) - i64::from(kept[i] < kept[j]);
        }
    }
    if s <= 0 {
        return 0.0;
    }
    kept.sort_unstable_by(f64::total_cmp);
    let pairs_times = |t: f64| t * (t - 1.0) * (2.0 * t + 5.0);
    let ties: f64 = kept.chunk_by(|a, b| a == b).map(|group| pairs_times(group.len() as f64)).sum();
    let variance = (pairs_times(n as f64) - ties) / 18.0;
    if variance <= 0.0 {
        return 0.0;
    }
    // Minus one: continuity correction.
    let z = (s - 1) as f64 / variance.sqrt();
    erf(z / std::f64::consts::SQRT_2).clamp(0.0, 1.0)
}

/// Error function for `x >= 0`, within 1.5e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26).
fn erf(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.327_591_1 * x);
    let polynomial =
        t * (0.254_829_592 + t * (-0.284_496_736 + t * (1.421_413_741 + t * (-1.453_152_027 + t * 1.061_405_429))));
    1.0 - polynomial * (-x * x).exp()
}

/// How far a rise has levelled off, 0 to 1: 0 still grows as fast as it ever did, 1 has stopped (or falls).
///
/// It compares the Theil-Sen slope of the last third with the steeper one of the first and the middle third. 0 when
/// there are fewer than six points; 1 when nothing rises in any third. Series of more than [`MAX_POINTS`] points are
/// subsampled evenly first.
pub fn level_off(points: &[(f64, f64)]) -> f64 {
    let mut kept = [(0.0, 0.0); MAX_POINTS];
    let points = subsample(points.len(), |i| points[i], &mut kept);
    let third = points.len() / 3;
    if third < 2 {
        return 0.0;
    }
    // Neighbouring thirds share a point, so that a step exactly between two of them is not lost.
    let first = theil_sen_slope(&points[..=third]);
    let middle = theil_sen_slope(&points[third..=2 * third]);
    let last = theil_sen_slope(&points[points.len() - third - 1..]);
    let before = first.max(middle);
    match (before > 0.0, last > 0.0) {
        (_, false) => 1.0,
        (false, true) => 0.0,
        (true, true) => (1.0 - last / before).clamp(0.0, 1.0),
    }
}

/// The deepest fall from an earlier peak to a later value. 0 when the values never fall.
pub fn largest_drop(values: impl IntoIterator<Item = f64>) -> f64 {
    let (mut peak, mut drop) = (f64::NEG_INFINITY, 0.0_f64);
    for value in values {
        peak = peak.max(value);
        drop = drop.max(peak - value);
    }
    if drop.is_finite() { drop } else { 0.0 }
}

/// Change per second between the first and the last point. 0 for fewer than two points or no time between them.
pub fn rate(points: &[(f64, f64)]) -> f64 {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return 0.0 };
    let rate = (last.1 - first.1) / (last.0 - first.0);
    if rate.is_finite() { rate } else { 0.0 }
}

/// A quantile of a histogram whose class 0 ends at `first_end` and each further class at twice the one before.
///
/// Returns the end of the class that holds the quantile `q` (0 to 1), so an upper bound; for the last, open-ended
/// class its start, so a lower bound. `None` for an empty histogram.
pub fn log2_quantile(counts: &[u64], first_end: f64, q: f64) -> Option<f64> {
    let total: u128 = counts.iter().map(|&n| u128::from(n)).sum();
    if total == 0 {
        return None;
    }
    let wanted = (q.clamp(0.0, 1.0) * total as f64).max(1.0);
    let mut seen = 0_u128;
    let class = counts.iter().position(|&n| {
        seen += u128::from(n);
        seen as f64 >= wanted
    });
    // Rounding may leave the sum a hair below the total.
    let class = class.unwrap_or(counts.len() - 1).min(counts.len().saturating_sub(2));
    Some(first_end * (class as f64).exp2())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(values: &[f64]) -> Vec<(f64, f64)> {
        values.iter().enumerate().map(|(i, &v)| (i as f64, v)).collect()
    }

    /// Against a case worked out by hand: slopes 1, 2, 3, 1.5, 2.5, 2 have the median 2.
    #[test]
    fn theil_sen_is_the_median_of_pairwise_slopes() {
        assert_eq!(theil_sen_slope(&[(0.0, 0.0), (1.0, 1.0), (2.0, 3.0), (3.0, 6.0)]), 2.0);
        assert_eq!(theil_sen_slope(&[(0.0, 5.0), (10.0, 25.0)]), 2.0);
    }

    /// One wild value must not change the verdict: that is why the median is taken.
    #[test]
    fn theil_sen_ignores_outliers() {
        let mut p = points(&(0..20).map(|i| 3.0 * f64::from(i)).collect::<Vec<_>>());
        p[7].1 = 1e12;
        p[15].1 = -1e12;
        assert!((theil_sen_slope(&p) - 3.0).abs() < 1e-9);
    }

    /// A long series costs as much as a short one and gives the same slope.
    #[test]
    fn theil_sen_of_a_long_line_is_its_slope() {
        let p: Vec<_> = (0..100_000).map(|i| (f64::from(i) * 0.5, f64::from(i) * 2.0)).collect();
        assert!((theil_sen_slope(&p) - 4.0).abs() < 1e-9);
    }

    /// Subsampling keeps both ends and never repeats a point.
    #[test]
    fn spread_keeps_both_ends_in_order() {
        for len in [0, 1, 2, 29, 30, 31, 59, 500, 100_000] {
            let kept: Vec<_> = spread(len).collect();
            assert_eq!(kept.len(), len.min(MAX_POINTS));
            assert!(kept.windows(2).all(|w| w[0] < w[1]), "{len}");
            if len > 0 {
                assert_eq!((kept[0], kept[kept.len() - 1]), (0, len - 1));
            }
        }
    }

    /// Around a line of slope 3 the deviations are 0, 1 and 2 in turn around their median 1: the median absolute one is 1.
    #[test]
    fn noise_is_the_spread_around_the_trend() {
        let p = points(&(0..30).map(|i| 3.0 * f64::from(i) + f64::from(i % 3)).collect::<Vec<_>>());
        let spread = noise(&p, theil_sen_slope(&p));
        assert!((spread - 1.4826).abs() < 0.1, "{spread}");
        assert_eq!(noise(&points(&[1.0, 2.0, 3.0, 4.0]), 1.0), 0.0);
    }

    /// Equal neighbours do not rise.
    #[test]
    fn rising_fraction_counts_strict_rises() {
        assert_eq!(rising_fraction([1.0, 2.0, 2.0, 3.0, 1.0]), 0.5);
        assert_eq!(rises([1.0, 2.0, 2.0, 3.0, 1.0]), 2);
        assert_eq!(rising_fraction([1.0, 2.0, 3.0]), 1.0);
    }

    /// Against worked cases. n = 10, all rising: S = 45, variance 125, z = 44/11.1803 = 3.93548, p = 8.30e-5.
    /// n = 4: S = 6, variance 26/3, z = 1.69842, p = 0.08943.
    #[test]
    fn trend_confidence_matches_worked_cases() {
        let ten: Vec<f64> = (0..10).map(f64::from).collect();
        assert!((trend_confidence(&ten) - (1.0 - 8.30e-5)).abs() < 1e-6);
        assert!((trend_confidence(&[1.0, 2.0, 3.0, 4.0]) - (1.0 - 0.08943)).abs() < 1e-4);
    }

    /// Ties shrink the variance: for 1, 2, 2, 3, 4 S = 9, variance (300 - 18) / 18 = 15.6667, z = 8/3.95811 = 2.02117,
    /// p = 0.04326.
    #[test]
    fn trend_confidence_corrects_for_ties() {
        assert!((trend_confidence(&[1.0, 2.0, 2.0, 3.0, 4.0]) - (1.0 - 0.04326)).abs() < 1e-4);
    }

    /// Flat and falling series have no upward trend at all.
    #[test]
    fn trend_confidence_of_flat_and_falling_is_zero() {
        assert_eq!(trend_confidence(&[5.0; 30]), 0.0);
        assert_eq!(trend_confidence(&[5.0, 4.0, 3.0, 2.0, 1.0]), 0.0);
    }

    /// A straight line has not levelled off, a line that stopped has, and 1 - exp(-t) is in between.
    #[test]
    fn level_off_separates_lines_from_plateaus() {
        let line: Vec<f64> = (0..30).map(f64::from).collect();
        let stopped: Vec<f64> = (0..30).map(|i| f64::from(i.min(15))).collect();
        let curve: Vec<f64> = (0..30).map(|i| 1.0 - (-f64::from(i) / 20.0).exp()).collect();
        assert!(level_off(&points(&line)).abs() < 1e-9);
        assert_eq!(level_off(&points(&stopped)), 1.0);
        let curve = level_off(&points(&curve));
        assert!((0.5..0.8).contains(&curve), "{curve}");
    }

    /// A late start of growth is growth, not a plateau.
    #[test]
    fn level_off_of_a_late_start_is_zero() {
        let late: Vec<f64> = (0..30).map(|i| f64::from((i - 15).max(0))).collect();
        assert_eq!(level_off(&points(&late)), 0.0);
    }

    /// The deepest fall counts, not the last one.
    #[test]
    fn largest_drop_is_peak_to_trough() {
        assert_eq!(largest_drop([1.0, 9.0, 4.0, 10.0, 8.0]), 5.0);
        assert_eq!(largest_drop([1.0, 2.0, 3.0]), 0.0);
    }

    /// Upper ends of the classes 1, 2, 4, 8; the last class is open.
    #[test]
    fn log2_quantile_is_the_end_of_its_class() {
        let counts = [10, 0, 80, 5, 5];
        assert_eq!(log2_quantile(&counts, 1.0, 0.05), Some(1.0));
        assert_eq!(log2_quantile(&counts, 1.0, 0.5), Some(4.0));
        assert_eq!(log2_quantile(&counts, 1.0, 0.95), Some(8.0));
        assert_eq!(log2_quantile(&counts, 1.0, 1.0), Some(8.0));
        assert_eq!(log2_quantile(&[0, 0], 1.0, 0.5), None);
    }

    /// No statistic may turn finite input into NaN or infinity, whatever the length, times or magnitude.
    #[test]
    fn results_are_finite_for_all_short_and_degenerate_series() {
        let shapes: [&[(f64, f64)]; 8] = [
            &[],
            &[(1.0, 2.0)],
            &[(1.0, 2.0), (1.0, 3.0)],
            &[(0.0, 0.0), (0.0, 0.0), (0.0, 0.0)],
            &[(0.0, f64::MAX), (1e-300, f64::MIN)],
            &[(0.0, f64::MIN), (1.0, f64::MAX), (2.0, f64::MIN)],
            &[(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (2.0, 9.0), (2.0, 1.0), (2.0, 1.0), (2.0, 5.0)],
            &[(5.0, 1.0), (4.0, 2.0), (3.0, 3.0)],
        ];
        for p in shapes {
            let values: Vec<f64> = p.iter().map(|p| p.1).collect();
            let all = [
                theil_sen_slope(p),
                rising_fraction(values.iter().copied()),
                trend_confidence(&values),
                level_off(p),
                largest_drop(values.iter().copied()),
                noise(p, theil_sen_slope(p)),
                rate(p),
            ];
            assert!(all.iter().all(|v| v.is_finite()), "{p:?} gave {all:?}");
        }
    }
}
