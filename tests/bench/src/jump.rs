//! What a program sees of memleak whose rate of calls jumps a thousandfold: how soon tracing costs it no more than its budget,
//! and how much it loses meanwhile.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::measure::Spread;
use crate::memleak::Memleak;
use crate::slices::{Mark, Slices, Speed};

/// How long the program's own speed is measured, before and after.
const ALONE: Duration = Duration::from_secs(4);
/// How long it is slow with memleak attached: long enough to be taken for a quiet one.
const QUIET: Duration = Duration::from_secs(3);
/// How long it is looked at after the jump.
const AFTER: Duration = Duration::from_secs(25);
/// Losses are averaged over any so many seconds.
const AVERAGE_S: f64 = 10.0;
/// From this part of its speed on the program is not being traced: what it falls short by is the machine's doing.
const FULL_SPEED: f64 = 0.7;

/// One jump.
#[derive(Clone, Debug, Serialize)]
pub struct Jump {
    /// From the jump until the program had its speed for the first time, in seconds.
    pub back_s: f64,
    /// The largest loss over any ten seconds, of what it gets done per CPU second, against the median of the slices of these
    /// ten seconds, of which tracing slows down a few; 0.05 is 5 %.
    pub worst_loss: f64,
    /// The same per second of the clock: other work on the machine is in it, too.
    pub worst_loss_clock: f64,
}

/// All jumps.
#[derive(Debug, Serialize)]
pub struct Jumps {
    /// As measured.
    pub rounds: Vec<Jump>,
    /// See [`Jump::back_s`].
    pub back_s: Spread,
    /// See [`Jump::worst_loss`].
    pub worst_loss: Spread,
    /// See [`Jump::worst_loss_clock`].
    pub worst_loss_clock: Spread,
}

/// Measures it.
///
/// # Errors
/// The program or memleak cannot be run.
pub fn measure(memleak: &Memleak, rounds: usize, folder: &Path) -> Result<Jumps> {
    let rounds: Vec<Jump> = (0..rounds).map(|_| jump(memleak, folder)).collect::<Result<_>>()?;
    let spread = |of: fn(&Jump) -> f64| Spread::of(rounds.iter().map(of)).context("nothing was measured");
    let (back_s, worst_loss) = (spread(|jump| jump.back_s)?, spread(|jump| jump.worst_loss)?);
    Ok(Jumps { back_s, worst_loss, worst_loss_clock: spread(|jump| jump.worst_loss_clock)?, rounds })
}

fn jump(memleak: &Memleak, folder: &Path) -> Result<Jump> {
    let mut slices = Slices::start(folder)?;
    slices.change()?;
    let before = marks_alone(&mut slices)?;
    slices.change()?;
    let session = memleak.attach(slices.pid(), &[], folder)?;
    slices.marks_for(QUIET)?;
    let first = slices.change()?;
    let mut marks = vec![first];
    marks.extend(slices.marks_for(AFTER)?);
    session.detach()?;
    let after = marks_alone(&mut slices)?;
    judge(&marks, &[before, after]).context("the program said too little")
}

fn marks_alone(slices: &mut Slices) -> Result<Vec<Mark>> {
    slices.marks_for(Duration::ZERO)?;
    slices.marks_for(ALONE)
}

/// Speed over some time.
#[derive(Clone, Copy)]
struct Measured {
    mean: f64,
    /// Of the slices.
    median: f64,
}

impl Measured {
    fn of(marks: &[Mark], speed: fn(&Mark, &Mark) -> f64) -> Option<Self> {
        let (first, last) = marks.first().zip(marks.last())?;
        let slices = marks.windows(2).map(|pair| speed(&pair[0], &pair[1]));
        Some(Measured { mean: speed(first, last), median: Spread::of(slices)?.median })
    }
}

/// `marks` begin at the jump; `alone` are those without memleak, before and after. `None` when they do not cover the time.
fn judge(marks: &[Mark], alone: &[Vec<Mark>; 2]) -> Option<Jump> {
    let per_cpu_s: fn(&Mark, &Mark) -> f64 = |from, to| Speed::between(from, to).per_cpu_s;
    let per_s: fn(&Mark, &Mark) -> f64 = |from, to| Speed::between(from, to).per_s;
    let undisturbed = |speed| {
        let [before, after] = [Measured::of(&alone[0], speed)?, Measured::of(&alone[1], speed)?];
        let middle = |of: fn(&Measured) -> f64| f64::midpoint(of(&before), of(&after));
        Some(Measured { mean: middle(|m| m.mean), median: middle(|m| m.median) })
    };
    let worst = |speed| {
        let alone = undisturbed(speed)?;
        let mut end = 0;
        let mut worst: Option<f64> = None;
        for (at, from) in marks.iter().enumerate() {
            end = end.max(at);
            while marks.get(end).is_some_and(|to| to.at_s - from.at_s < AVERAGE_S) {
                end += 1;
            }
            if end >= marks.len() {
                break;
            }
            let with = Measured::of(&marks[at..=end], speed)?;
            // Speeds drift by more than what is looked for, so these seconds are their own measure; unless all were slow.
            let own = if with.median >= FULL_SPEED * alone.median { with.median } else { alone.median };
            // Alone, too, the mean is below the median.
            let loss = 1.0 - with.mean / own * (alone.median / alone.mean);
            worst = Some(worst.map_or(loss, |worst| worst.max(loss)));
        }
        worst
    };
    let alone_per_cpu_s = undisturbed(per_cpu_s)?.median;
    let back = marks.windows(2).find(|pair| per_cpu_s(&pair[0], &pair[1]) >= FULL_SPEED * alone_per_cpu_s);
    Some(Jump {
        back_s: back.map_or(f64::INFINITY, |pair| pair[0].at_s - marks[0].at_s),
        worst_loss: worst(per_cpu_s)?,
        worst_loss_clock: worst(per_s)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    /// Marks a tenth of a second apart; `speed` is that of each slice.
    fn marks(slices: i32, speed: impl Fn(i32) -> f64) -> Vec<Mark> {
        let mut pairs = 0.0;
        (0..=slices)
            .map(|n| {
                let at_s = f64::from(n) / 10.0;
                let mark = Mark { arrived: Instant::now(), at_s, pairs, cpu_s: at_s, fast: true };
                pairs += speed(n) / 10.0;
                mark
            })
            .collect()
    }

    // A loss that is over when ten seconds are half over counts with half its size, wherever it lies; that the machine has become
    // faster meanwhile makes no difference.
    #[test]
    fn losses_are_averaged_over_the_worst_ten_seconds() {
        let alone = [marks(40, |_| 800.0), marks(40, |_| 1200.0)];
        // A tenth of the speed for half a second, and again for a second at the end.
        let with = marks(150, |n| if (5..140).contains(&n) { 1100.0 } else { 110.0 });
        let jump = judge(&with, &alone).unwrap();
        assert!((jump.back_s - 0.5).abs() < 1e-9, "{jump:?}");
        assert!((jump.worst_loss - 0.09).abs() < 1e-3, "{jump:?}");
        assert!((jump.worst_loss_clock - 0.09).abs() < 1e-3, "{jump:?}");
        assert!(judge(&with[..50], &alone).is_none(), "five seconds say nothing of ten");
    }

    // Who is slowed down all the time has no better seconds to be measured by.
    #[test]
    fn loss_without_an_end_is_a_loss() {
        let alone = [marks(40, |_| 1000.0), marks(40, |_| 1000.0)];
        let jump = judge(&marks(150, |_| 100.0), &alone).unwrap();
        assert!((jump.worst_loss - 0.9).abs() < 1e-3 && jump.back_s.is_infinite(), "{jump:?}");
    }

    // What the machine loses by itself is not memleak's.
    #[test]
    fn unevenness_without_memleak_is_taken_off() {
        let uneven = |n: i32| if n % 10 == 0 { 500.0 } else { 1000.0 };
        let jump = judge(&marks(150, uneven), &[marks(40, uneven), marks(40, uneven)]).unwrap();
        assert!(jump.worst_loss.abs() < 0.01, "{jump:?}");
    }
}
