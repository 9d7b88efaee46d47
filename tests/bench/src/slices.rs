//! The program `slices.c`, whose progress is followed from one fiftieth of a second to the next.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::process::{Line, Running};
use crate::workloads::compile;

const SLICES_C: &str = include_str!("../programs/slices.c");

/// How long it may take to say something.
const PATIENCE: Duration = Duration::from_secs(30);

/// What it had done at one time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mark {
    /// When its line arrived.
    pub arrived: Instant,
    /// Its own clock, in seconds.
    pub at_s: f64,
    /// Pairs so far.
    pub pairs: f64,
    /// CPU time so far, in seconds.
    pub cpu_s: f64,
    /// Whether it does as many as it can.
    pub fast: bool,
}

impl Mark {
    fn parse(line: &Line) -> Option<Self> {
        let mut words = line.text.strip_prefix("slice ")?.split(' ');
        let mut number = || words.next()?.parse::<u64>().ok().map(|n| n as f64);
        let (at_ns, pairs, cpu_ns) = (number()?, number()?, number()?);
        Some(Mark {
            arrived: line.arrived,
            at_s: at_ns / 1e9,
            pairs,
            cpu_s: cpu_ns / 1e9,
            fast: words.next()? == "fast",
        })
    }
}

/// Speed between two marks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Pairs per second.
    pub per_s: f64,
    /// Pairs per second of CPU time: what the program gets done with the time that it has.
    pub per_cpu_s: f64,
}

impl Speed {
    /// Between two marks, the second of which is later.
    pub fn between(from: &Mark, to: &Mark) -> Self {
        let pairs = to.pairs - from.pairs;
        Speed { per_s: pairs / (to.at_s - from.at_s), per_cpu_s: pairs / (to.cpu_s - from.cpu_s).max(1e-9) }
    }
}

/// The running program.
pub struct Slices {
    running: Running,
    /// A mark that came and was not asked for yet.
    unread: Option<Mark>,
}

impl Slices {
    /// Compiles and starts it; it is slow at first.
    ///
    /// # Errors
    /// It cannot be compiled, or does not get ready.
    pub fn start(folder: &Path) -> Result<Self> {
        let program = compile("slices", SLICES_C, &["-O2"], folder)?;
        let mut running = Running::start(&mut Command::new(program), folder)?;
        running.expect("`ready`", PATIENCE, |line| (line.text == "ready").then_some(()))?;
        Ok(Slices { running, unread: None })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// Changes between slow and fast; returns the last mark before.
    ///
    /// # Errors
    /// It has ended.
    pub fn change(&mut self) -> Result<Mark> {
        let newest = self.marks_for(Duration::ZERO)?.last().copied();
        let mut before = newest.map_or_else(|| self.next(), Ok)?;
        self.running.write("change\n")?;
        loop {
            let mark = self.next()?;
            if mark.fast != before.fast {
                self.unread = Some(mark);
                return Ok(before);
            }
            before = mark;
        }
    }

    /// The next mark.
    ///
    /// # Errors
    /// It has ended, or hangs.
    pub fn next(&mut self) -> Result<Mark> {
        if let Some(mark) = self.unread.take() {
            return Ok(mark);
        }
        self.running.expect("a slice", PATIENCE, Mark::parse)
    }

    /// All marks that come within a time, and those that were not asked for before.
    ///
    /// # Errors
    /// It has ended.
    pub fn marks_for(&mut self, time: Duration) -> Result<Vec<Mark>> {
        std::thread::sleep(time);
        let arrived = self.running.arrived().filter_map(|line| Mark::parse(&line));
        let marks = self.unread.take().into_iter().chain(arrived).collect();
        anyhow::ensure!(self.running.is_running(), "slices has ended{}", self.running.last_words());
        Ok(marks)
    }

    /// Its speed over a time from now on.
    ///
    /// # Errors
    /// It has ended.
    pub fn speed_for(&mut self, time: Duration) -> Result<Speed> {
        self.marks_for(Duration::ZERO)?;
        let marks = self.marks_for(time)?;
        let (first, last) =
            marks.first().zip(marks.last()).filter(|(first, last)| first != last).context("no slices")?;
        Ok(Speed::between(first, last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Speeds are differences of what its lines say.
    #[test]
    fn speed_is_read_from_two_lines() {
        let mark = |text: &str| Mark::parse(&Line { arrived: Instant::now(), text: text.to_owned() });
        let from = mark("slice 1000000000 500 100000000 slow").unwrap();
        let to = mark("slice 3000000000 1500 600000000 fast").unwrap();
        assert_eq!((from.fast, to.fast), (false, true));
        assert_eq!(Speed::between(&from, &to), Speed { per_s: 500.0, per_cpu_s: 2000.0 });
        assert_eq!(mark("slice 1 2"), None);
        assert_eq!(mark("ready"), None);
    }
}
