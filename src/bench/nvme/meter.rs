//! Seconds and CPU seconds of a piece of work, and what is made of many of them.
//!
//! CPU time is that of the whole process, all its threads, user and system: the copying thread, the
//! mover, the ring and the kernel's own workers for it.

use std::time::Instant;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use crate::report::{Goal, Measured, measured};
use kvcellar_block::error::{Error, Result};
use kvcellar_block::size::show;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskWay {
    /// Memory to disk.
    Write,
    /// Disk to memory.
    Read,
}

impl DiskWay {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
        }
    }
}

/// How long something took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    /// Seconds on the clock.
    pub seconds: f64,
    /// Seconds of CPU time.
    pub cpu_s: f64,
}

fn cpu_s() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).map_err(|errno| Error::lost("CPU time", errno.to_string()))?;
    Ok((usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6)
}

/// Times `work`.
///
/// # Errors
/// Those of `work`; [`Error::DataLost`] when the system does not tell CPU time.
pub fn metered<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Reading)> {
    let (cpu, started) = (cpu_s()?, Instant::now());
    let done = work()?;
    let seconds = started.elapsed().as_secs_f64();
    Ok((done, Reading { seconds, cpu_s: cpu_s()? - cpu }))
}

/// Readings of one contender at one size in one direction.
#[derive(Debug)]
struct MeasuredRow {
    who: &'static str,
    way: DiskWay,
    size: u64,
    bytes: u64,
    readings: Vec<Reading>,
}

/// All readings of a run.
#[derive(Debug, Default)]
pub struct Readings {
    rows: Vec<MeasuredRow>,
}

/// A size as people write it on the command line.
fn label(size: u64) -> String {
    show(size).replace(".0 ", "").replace(' ', "")
}

const GIB: f64 = (1_u64 << 30) as f64;

impl Readings {
    /// Notes one repetition: `who` moved `bytes` in extents of `size`.
    pub fn put(&mut self, who: &'static str, way: DiskWay, size: u64, bytes: u64, reading: Reading) {
        let found = self.rows.iter_mut().find(|row| row.who == who && row.way == way && row.size == size);
        match found {
            Some(row) => row.readings.push(reading),
            None => self.rows.push(MeasuredRow { who, way, size, bytes, readings: vec![reading] }),
        }
    }

    fn row(&self, who: &str, way: DiskWay, size: u64) -> Option<&MeasuredRow> {
        self.rows.iter().find(|row| row.who == who && row.way == way && row.size == size)
    }

    /// Every row as rate and CPU time; checksums have no rate of their own.
    pub fn results(&self) -> Vec<Measured> {
        let mut results = Vec::new();
        for MeasuredRow { who, way, size, bytes, readings } in &self.rows {
            let name = |what: &str| format!("{who}_{}_{}_{what}", way.name(), label(*size));
            let rate = readings.iter().map(|reading| *bytes as f64 / 1e9 / reading.seconds).collect();
            let cpu = readings.iter().map(|reading| reading.cpu_s / (*bytes as f64 / GIB)).collect();
            if *who != CHECKSUM {
                results.push(measured(&name("rate"), "GB/s", rate));
            }
            results.push(measured(&name("cpu"), "CPU s/GiB", cpu));
        }
        results
    }

    /// The median over repetitions of a quotient of two contenders' readings in the same
    /// repetition.
    fn quotient(&self, way: DiskWay, size: u64, over: &str, under: &str, what: fn(&Reading) -> f64) -> Option<f64> {
        let (over, under) = (self.row(over, way, size)?, self.row(under, way, size)?);
        let each = over.readings.iter().zip(&under.readings).map(|(a, b)| what(a) / what(b)).collect();
        Some(measured("", "", each).value)
    }

    /// The goals of the nvme tier at one size.
    pub fn goals(&self, size: u64) -> Vec<Goal> {
        let mut goals = Vec::new();
        for way in [DiskWay::Write, DiskWay::Read] {
            let name = |what: &str| format!("{what}, {} {}", way.name(), label(size));
            // Time quotients the other way round are rate quotients.
            if let Some(value) = self.quotient(way, size, BARE, TIER, |reading| reading.seconds) {
                let goal = "at least 0.95".to_owned();
                goals.push(Goal { name: name("tier's rate over bare ring's"), goal, value, met: value >= 0.95 });
            }
            if let Some(value) = self.quotient(way, size, TIER, BARE, |reading| reading.cpu_s) {
                let goal = "at most 1.3".to_owned();
                goals.push(Goal { name: name("tier's CPU time over bare ring's"), goal, value, met: value <= 1.3 });
            }
            if let Some(value) = self.quotient(way, size, TIER, RIVAL, |reading| reading.cpu_s) {
                let goal = "at most 0.5".to_owned();
                goals.push(Goal {
                    name: name("tier's CPU time over vLLM's fs tier's"),
                    goal,
                    value,
                    met: value <= 0.5,
                });
            }
        }
        goals
    }
}

/// The whole tier.
pub const TIER: &str = "tier";
/// The whole tier over threads.
pub const THREADS: &str = "tier_threads";
/// A ring and nothing else.
pub const BARE: &str = "bare";
/// vLLM's own tier of files.
pub const RIVAL: &str = "vllm_fs";
/// The checksums of the same bytes, without any transfer.
pub const CHECKSUM: &str = "checksum";

#[cfg(test)]
mod tests {
    use super::*;

    fn put(table: &mut Readings, who: &'static str, seconds: f64, cpu_s: f64) {
        table.put(who, DiskWay::Read, 65_536, 1 << 30, Reading { seconds, cpu_s });
    }

    #[test]
    fn goals_compare_readings_of_the_same_repetition() {
        let mut table = Readings::default();
        // The machine slows down tenfold between the repetitions; the tier is a tenth slower each
        // time.
        for slow in [1.0, 10.0, 100.0] {
            put(&mut table, TIER, 1.1 * slow, 1.2 * slow);
            put(&mut table, BARE, slow, slow);
            put(&mut table, RIVAL, slow, 2.0 * slow);
        }
        let goals = table.goals(65_536);
        let met: Vec<bool> = goals.iter().map(|goal| goal.met).collect();
        assert_eq!(met, [false, true, false], "{goals:?}");
        assert!((goals[0].value - 1.0 / 1.1).abs() < 1e-9 && (goals[2].value - 0.6).abs() < 1e-9);
    }

    #[test]
    fn work_costs_time() {
        let (sum, reading) =
            metered(|| Ok((0..2_000_000_u64).fold(0, |sum, n| std::hint::black_box(sum ^ n)))).expect("readable");
        assert!(sum < u64::MAX && reading.seconds > 0.0 && reading.cpu_s >= 0.0);
    }
}
