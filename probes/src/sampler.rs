//! What a sampled block stands for: the arithmetic of `bpf/sampler.h`, the same source that runs in the kernel.
//!
//! The kernel side adds shares up; here they are taken back to bytes and blocks, and to standard errors.

use crate::types::{memleak_sampler as sampler, memleak_share};

/// Largest mean distance between two samples, bytes.
pub const MAX_SAMPLE_BYTES: u64 = sampler::SAMPLER_MAX_MEAN.0 as u64;

unsafe extern "C" {
    fn memleak_sampler_share(size: u64, mean: u64, out: *mut memleak_share);
    #[cfg(test)]
    fn memleak_sampler_distance(random: u32, mean: u64) -> u64;
}

/// What a sampled block of `size` bytes adds to the sums of its site; `mean` is at least 1.
pub(crate) fn share(size: u64, mean: u64) -> memleak_share {
    let mut out = memleak_share::default();
    // SAFETY: the function writes one structure of this layout (generated from the same header) and nothing else; it
    // divides by `mean` and by numbers that are at least 1.
    unsafe { memleak_sampler_share(size, mean.clamp(1, MAX_SAMPLE_BYTES), &raw mut out) };
    out
}

/// A count as the kernel side keeps it with sampling.
pub(crate) fn count_in_share(blocks: u64) -> u64 {
    blocks << sampler::SAMPLER_WEIGHT_BITS.0
}

/// Blocks, of a sum of shares.
pub(crate) fn blocks(count: u64) -> u64 {
    let bits = sampler::SAMPLER_WEIGHT_BITS.0;
    count.saturating_add(1 << (bits - 1)) >> bits
}

/// As [`blocks`], for a sum that may be negative.
pub(crate) fn signed_blocks(count: i64) -> i64 {
    let bits = sampler::SAMPLER_WEIGHT_BITS.0;
    count.saturating_add(1 << (bits - 1)) >> bits
}

/// Variance in bytes^2, of a sum of shares.
pub(crate) fn bytes_variance(sum: u64, mean: u64) -> f64 {
    let unit = mean as f64 / f64::from(1_u32 << sampler::SAMPLER_BYTES_VARIANCE_BITS.0);
    sum as f64 * unit * unit
}

/// Variance in blocks^2, of a sum of shares.
pub(crate) fn count_variance(sum: u64) -> f64 {
    sum as f64 / f64::from(1_u32 << sampler::SAMPLER_COUNT_VARIANCE_BITS.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn distance(random: u32, mean: u64) -> u64 {
        // SAFETY: a function of its arguments that touches no memory.
        unsafe { memleak_sampler_distance(random, mean) }
    }

    /// The estimates are only as unbiased as the logarithm is right.
    #[test]
    fn distances_are_the_logarithm_of_the_random_number() {
        let mean = 1 << 26;
        let exact = |random: u32| -((f64::from(random) + 1.0) / 2_f64.powi(32)).ln() * mean as f64;
        let mut random = fastrand::Rng::with_seed(1);
        let edges = [0, 1, 2, 3, 1 << 15, (1 << 16) - 1, 1 << 16, 1 << 31, u32::MAX - 1, u32::MAX];
        for r in edges.into_iter().chain(std::iter::repeat_with(|| random.u32(..)).take(100_000)) {
            let (got, wanted) = (distance(r, mean) as f64, exact(r));
            assert!((got - wanted).abs() <= 2e-7 * mean as f64 + 1.0, "{r}: {got} instead of {wanted}");
        }
    }

    /// Weight times probability must be 1 for every size, or a mix of sizes is estimated wrongly.
    #[test]
    fn weights_are_the_inverse_of_the_probability() {
        for mean in [64, 1_000, 4_096, 524_288, 1 << 26] {
            for size in (1..200).chain((0..=12 * 64).map(|n| (mean * n / 64).max(1))).chain([12 * mean + 1, 1 << 47]) {
                let x = size as f64 / mean as f64;
                let wanted = -1.0 / (-x).exp_m1();
                let share = share(size, mean);
                let weight = share.count as f64 / 65536.0;
                assert!((weight / wanted - 1.0).abs() < 2e-5, "size {size}, mean {mean}: {weight} instead of {wanted}");
                let bytes = weight * size as f64;
                assert!((share.bytes as f64 - bytes).abs() <= 0.5, "size {size}, mean {mean}: {} bytes", share.bytes);
                let variance = wanted * (wanted - 1.0);
                let count = count_variance(share.count_variance);
                // Rounded down; where one block is as good as sure there is next to nothing to round.
                assert!(
                    (count - variance).abs() < 3e-3 * variance + 5e-3,
                    "size {size}, mean {mean}: {count}, {variance}"
                );
                let (got, wanted) = (bytes_variance(share.bytes_variance, mean), variance * (size as f64).powi(2));
                let unit = (mean as f64).powi(2);
                assert!((got - wanted).abs() < 0.02 * unit, "size {size}, mean {mean}: {got}, {wanted}");
            }
        }
        assert_eq!(share(0, 4_096).bytes, 0);
        assert_eq!(share(0, 4_096).count, share(1, 4_096).count);
    }

    /// One program as the kernel side samples it: sizes are drawn from a mix, some blocks are freed.
    struct Run {
        /// Bytes and blocks outstanding in truth.
        truth: (f64, f64),
        estimate: (f64, f64),
        /// Standard errors that the estimate comes with.
        stderr: (f64, f64),
    }

    fn run(random: &mut fastrand::Rng, mean: u64, mix: &[u64], blocks: usize, kept_of_8: u64) -> Run {
        let mut truth = (0, 0);
        let mut sum = memleak_share::default();
        let mut until = None;
        for _ in 0..blocks {
            let size = mix[random.usize(..mix.len())];
            // As is_recorded() in userspace_alloc.bpf.c does it.
            let left = until.unwrap_or_else(|| distance(random.u32(..), mean));
            let recorded = left < size.max(1);
            until = (!recorded).then(|| left - size.max(1));
            let kept = random.u64(..8) < kept_of_8;
            truth = if kept { (truth.0 + size, truth.1 + 1) } else { truth };
            if !recorded {
                continue;
            }
            let share = share(size, mean);
            sum.bytes += share.bytes;
            sum.count += share.count;
            sum.bytes_variance += share.bytes_variance;
            sum.count_variance += share.count_variance;
            if !kept {
                // A free always finds what was recorded, and works the same share out.
                let share = super::share(size, mean);
                sum.bytes -= share.bytes;
                sum.count -= share.count;
                sum.bytes_variance -= share.bytes_variance;
                sum.count_variance -= share.count_variance;
            }
        }
        Run {
            truth: (truth.0 as f64, truth.1 as f64),
            estimate: (sum.bytes as f64, sum.count as f64 / 65536.0),
            stderr: (bytes_variance(sum.bytes_variance, mean).sqrt(), count_variance(sum.count_variance).sqrt()),
        }
    }

    /// Over many runs the estimates of any mix of sizes must have the truth as their mean, and the standard errors must
    /// cover it as often as standard errors do.
    #[test]
    fn estimates_are_unbiased_and_know_their_error() {
        const RUNS: usize = 400;
        // Where a handful of tiny blocks decides, a standard error says less about the tails: there only its size counts.
        let mixes: [(&str, &[u64], usize, bool); 6] = [
            ("one small size", &[48], 20_000, true),
            ("small sizes", &[16, 24, 100, 333], 20_000, true),
            ("around the mean", &[1_000, 4_096, 10_000], 600, true),
            ("small and huge", &[16, 16, 16, 16, 16, 16, 16, 1_000_000], 12_000, false),
            ("with empty blocks", &[0, 8, 64], 40_000, false),
            ("odd", &[1, 7, 67, 1_021, 65_537], 6_000, false),
        ];
        for mean in [1_021, 4_096] {
            for (name, mix, blocks, well_spread) in mixes {
                let mut random = fastrand::Rng::with_seed(mean * 31 + blocks as u64);
                let runs: Vec<Run> = (0..RUNS).map(|_| run(&mut random, mean, mix, blocks, 5)).collect();
                for (what, value) in [("bytes", 0), ("blocks", 1)] {
                    let pick = |v: (f64, f64)| if value == 0 { v.0 } else { v.1 };
                    let errors: Vec<f64> = runs.iter().map(|r| pick(r.estimate) - pick(r.truth)).collect();
                    let bias = errors.iter().sum::<f64>() / RUNS as f64;
                    let spread = (errors.iter().map(|e| (e - bias).powi(2)).sum::<f64>() / RUNS as f64).sqrt();
                    let about = format!("{what}, mean {mean}, {name}");
                    assert!(spread > 0.0, "{about}: nothing is sampled");
                    assert!(
                        bias.abs() < 3.5 * spread / (RUNS as f64).sqrt(),
                        "{about}: off by {bias} on average, spread {spread}"
                    );
                    let said = (runs.iter().map(|r| pick(r.stderr).powi(2)).sum::<f64>() / RUNS as f64).sqrt();
                    assert!((said / spread - 1.0).abs() < 0.15, "{about}: standard error {said}, spread {spread}");
                    let within = |factor: f64| {
                        let covered =
                            runs.iter().zip(&errors).filter(|(r, e)| e.abs() <= factor * pick(r.stderr)).count();
                        covered as f64 / RUNS as f64
                    };
                    if !well_spread {
                        continue;
                    }
                    let (one, two) = (within(1.0), within(1.96));
                    assert!((0.60..0.77).contains(&one), "{about}: one standard error covers {one}");
                    assert!(two > 0.91, "{about}: two standard errors cover {two}");
                }
            }
        }
    }
}
