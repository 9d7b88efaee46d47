//! What becomes of a program in whose window memleak is killed or stopped: how long it takes to have its speed again.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::measure::Spread;
use crate::memleak::Memleak;
use crate::process::send;
use crate::slices::{Mark, Slices, Speed};

/// How long the program's own speed is measured.
const ALONE: Duration = Duration::from_secs(2);
/// How long a window may be waited for.
const WINDOW: Duration = Duration::from_secs(60);
/// How long the program may take to have its speed again.
const RECOVERY: Duration = Duration::from_secs(30);
/// Below the first part of its speed a window is open, from the second on none is: with probes it has a tenth, and shared
/// machines have been seen to lose a third of their speed for minutes.
const SLOW: f64 = 0.3;
const FULL_SPEED: f64 = 0.5;
/// Where it has had its speed for so long, it has it again, and not only between two halves of a window.
const STEADY: Duration = Duration::from_millis(100);

/// The figures, in seconds from the signal until the program had its speed again.
#[derive(Debug, Serialize)]
pub struct Interrupted {
    /// After SIGKILL.
    pub killed_s: Spread,
    /// After SIGSTOP.
    pub stopped_s: Spread,
}

/// Measures it.
///
/// # Errors
/// The program or memleak cannot be run, or no window is opened.
pub fn measure(memleak: &Memleak, rounds: usize, folder: &Path) -> Result<Interrupted> {
    let all = |signal| -> Result<Spread> {
        let times: Vec<f64> = (0..rounds).map(|_| interrupt(memleak, signal, folder)).collect::<Result<_>>()?;
        Spread::of(times).context("nothing was measured")
    };
    Ok(Interrupted { killed_s: all(libc::SIGKILL)?, stopped_s: all(libc::SIGSTOP)? })
}

fn interrupt(memleak: &Memleak, signal: libc::c_int, folder: &Path) -> Result<f64> {
    let mut slices = Slices::start(folder)?;
    slices.change()?;
    let alone = slices.speed_for(ALONE)?;
    let session = memleak.attach(slices.pid(), &[], folder)?;
    // What it did meanwhile has been said, too. Exact tracing comes first, and has to be given up before there are windows.
    slices.marks_for(Duration::ZERO)?;
    let mut marks = Marks { newest: slices.next()?, slices: &mut slices, alone };
    marks.wait_for_speed(WINDOW)?;
    let deadline = Instant::now() + WINDOW;
    while marks.next()?.0 >= SLOW {
        if Instant::now() >= deadline {
            bail!("no window was opened within {WINDOW:?}");
        }
    }
    let sent = Instant::now();
    send(session.pid(), signal);
    let since = marks.wait_for_speed(RECOVERY)?;
    // One that is stopped could not end.
    send(session.pid(), libc::SIGCONT);
    Ok(since.saturating_duration_since(sent).as_secs_f64())
}

/// The program's marks, one after the other.
struct Marks<'a> {
    slices: &'a mut Slices,
    newest: Mark,
    alone: Speed,
}

impl Marks<'_> {
    /// The program's part of its own speed in the next slice, and when that began.
    fn next(&mut self) -> Result<(f64, Instant)> {
        let last = std::mem::replace(&mut self.newest, self.slices.next()?);
        Ok((Speed::between(&last, &self.newest).per_cpu_s / self.alone.per_cpu_s, last.arrived))
    }

    /// Waits until the program has its speed and keeps it; returns since when.
    fn wait_for_speed(&mut self, limit: Duration) -> Result<Instant> {
        let deadline = Instant::now() + limit;
        let mut since: Option<Instant> = None;
        loop {
            let (speed, from) = self.next()?;
            since = (speed >= FULL_SPEED).then(|| since.unwrap_or(from));
            if let Some(since) = since
                && self.newest.arrived.saturating_duration_since(since) >= STEADY
            {
                return Ok(since);
            }
            if Instant::now() >= deadline {
                bail!("the program does not get its speed back within {limit:?}: it has {speed:.2} of it at last");
            }
        }
    }
}
