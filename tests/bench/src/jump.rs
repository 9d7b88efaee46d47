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
/// From this part of its speed on the program is not being traced.
const FULL_SPEED: f64 = 0.7;

/// One jump.
#[derive(Clone, Debug, Serialize)]
pub struct Jump {
    /// From the jump until the program had its speed for the first time, in seconds.
    pub back_s: f64,
    /// The largest loss over any ten seconds, of what it gets done per CPU second; 0.05 is 5 %.
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
    let before = slices.speed_for(ALONE)?;
    slices.change()?;
    let session = memleak.attach(slices.pid(), &[], folder)?;
    slices.marks_for(QUIET)?;
    let first = slices.change()?;
    let mut marks = vec![first];
    marks.extend(slices.marks_for(AFTER)?);
    session.detach()?;
    let after = slices.speed_for(ALONE)?;
    let alone = Speed {
        per_s: f64::midpoint(before.per_s, after.per_s),
        per_cpu_s: f64::midpoint(before.per_cpu_s, after.per_cpu_s),
    };
    judge(&marks, alone).context("the program said too little")
}

/// `marks` begin at the jump; `None` when they do not cover the time.
fn judge(marks: &[Mark], alone: Speed) -> Option<Jump> {
    let first = marks.first()?;
    let back =
        marks.windows(2).find(|pair| Speed::between(&pair[0], &pair[1]).per_cpu_s >= FULL_SPEED * alone.per_cpu_s);
    let worst = |lost: &dyn Fn(Speed) -> f64| {
        let mut end = 0;
        let mut worst: Option<f64> = None;
        for (at, from) in marks.iter().enumerate() {
            end = end.max(at);
            while marks.get(end).is_some_and(|to| to.at_s - from.at_s < AVERAGE_S) {
                end += 1;
            }
            let Some(to) = marks.get(end) else { break };
            let loss = lost(Speed::between(from, to));
            worst = Some(worst.map_or(loss, |worst| worst.max(loss)));
        }
        worst
    };
    Some(Jump {
        back_s: back.map_or(f64::INFINITY, |pair| pair[0].at_s - first.at_s),
        worst_loss: worst(&|speed| 1.0 - speed.per_cpu_s / alone.per_cpu_s)?,
        worst_loss_clock: worst(&|speed| 1.0 - speed.per_s / alone.per_s)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    // A loss that is over when ten seconds are half over counts with half its size, wherever it lies.
    #[test]
    fn losses_are_averaged_over_the_worst_ten_seconds() {
        let mut marks = Vec::new();
        let mut pairs = 0.0;
        for n in 0..=150 {
            let at_s = f64::from(n) / 10.0;
            marks.push(Mark { arrived: Instant::now(), at_s, pairs, cpu_s: at_s, fast: true });
            // A tenth of the speed for half a second, and again for a second at the end.
            pairs += if (5..140).contains(&n) { 100.0 } else { 10.0 };
        }
        let alone = Speed { per_s: 1000.0, per_cpu_s: 1000.0 };
        let jump = judge(&marks, alone).unwrap();
        assert!((jump.back_s - 0.5).abs() < 1e-9, "{jump:?}");
        assert!((jump.worst_loss - 0.09).abs() < 1e-3, "{jump:?}");
        assert!((jump.worst_loss_clock - 0.09).abs() < 1e-3, "{jump:?}");
        assert!(judge(&marks[..50], alone).is_none(), "five seconds say nothing of ten");
    }
}
