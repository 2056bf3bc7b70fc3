//! Seconds and CPU seconds of a piece of work, and what is made of many of them.
//!
//! CPU time is that of the whole process, all its threads, user and system: the copying thread, the
//! mover, the ring and the kernel's own workers for it.

use std::time::Instant;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use crate::report::{Goal, GoalBound, Measured, measured};
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

    /// Every row as rate and CPU time; passes over memory have no rate of their own.
    pub fn results(&self) -> Vec<Measured> {
        let mut results = Vec::new();
        for MeasuredRow { who, way, size, bytes, readings } in &self.rows {
            let name = |what: &str| format!("{who}_{}_{}_{what}", way.name(), label(*size));
            let rate = readings.iter().map(|reading| *bytes as f64 / 1e9 / reading.seconds).collect();
            let cpu = readings.iter().map(|reading| reading.cpu_s / (*bytes as f64 / GIB)).collect();
            if *who != CHECKSUM && *who != PASS {
                results.push(measured(&name("rate"), "GB/s", rate));
            }
            results.push(measured(&name("cpu"), "CPU s/GiB", cpu));
        }
        results
    }

    /// The median over repetitions of a quotient of sums of contenders' readings in the same
    /// repetition. `None`: one of them took no part.
    fn quotient(
        &self,
        way: DiskWay,
        size: u64,
        over: &[&str],
        under: &[&str],
        what: fn(&Reading) -> f64,
    ) -> Option<f64> {
        let sums = |whose: &[&str]| -> Option<Vec<f64>> {
            let rows: Vec<_> = whose.iter().map(|who| self.row(who, way, size)).collect::<Option<_>>()?;
            let repetitions = rows.iter().map(|row| row.readings.len()).min()?;
            Some((0..repetitions).map(|at| rows.iter().map(|row| what(&row.readings[at])).sum()).collect())
        };
        let each = sums(over)?.into_iter().zip(sums(under)?).map(|(over, under)| over / under).collect();
        Some(measured("", "", each).value)
    }

    /// The goals of the nvme tier at one size; `tier` is the row of the way that it would choose.
    pub fn goals(&self, size: u64, tier: &'static str) -> Vec<Goal> {
        let mut goals = Vec::new();
        for way in [DiskWay::Write, DiskWay::Read] {
            let name = |what: &str| format!("{what}, {} {}", way.name(), label(size));
            let (seconds, cpu) = (|it: &Reading| it.seconds, |it: &Reading| it.cpu_s);
            let (least, most) = if size < LARGE { (0.95, 1.5) } else { (0.9, 1.2) };
            // Time quotients the other way round are rate quotients.
            let rate = |over: &'static str| self.quotient(way, size, &[over], &[tier], seconds);
            let beside = |under: &[&str]| self.quotient(way, size, &[tier], under, cpu);
            let wanted = [
                ("tier's rate over a bare ring's in huge pages", GoalBound::AtLeast(least), rate(BARE_HUGE)),
                ("tier's rate over vLLM's fs tier's", GoalBound::AtLeast(1.0), rate(RIVAL)),
                (
                    "tier's CPU time over a bare ring's and one pass",
                    GoalBound::AtMost(most),
                    beside(&[BARE_HUGE, PASS]),
                ),
                ("tier's CPU time over vLLM's fs tier's", GoalBound::AtMost(1.0), beside(&[RIVAL])),
            ];
            goals.extend(
                wanted.into_iter().filter_map(|(what, bound, value)| Some(Goal::of(name(what), bound, value?))),
            );
        }
        goals
    }
}

/// The whole tier.
pub const TIER: &str = "tier";
/// The whole tier, with transfers that pass through staging.
pub const STAGED: &str = "tier_staged";
/// The whole tier over threads.
pub const THREADS: &str = "tier_threads";
/// A ring that moves private memory in huge pages, and nothing else.
pub const BARE_HUGE: &str = "bare_huge";
/// A ring that moves a pool's slots, and nothing else.
pub const BARE: &str = "bare";
/// vLLM's own tier of files.
pub const RIVAL: &str = "vllm_fs";
/// The checksums of the same bytes, without any transfer.
pub const CHECKSUM: &str = "checksum";

/// A copy of the same bytes out of huge pages, which sums them meanwhile, without any transfer.
pub const PASS: &str = "pass";

/// Blocks of this size are held against the rate of the disk, smaller ones against its operations.
const LARGE: u64 = 1 << 20;

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
            put(&mut table, BARE_HUGE, slow, 0.5 * slow);
            put(&mut table, PASS, slow, 0.25 * slow);
            put(&mut table, RIVAL, 2.0 * slow, slow);
        }
        let goals = table.goals(65_536, TIER);
        let values: Vec<(f64, bool)> = goals.iter().map(|goal| (goal.value, goal.met)).collect();
        // Rates: the bare ring's, the other's. CPU times: of ring and pass together, the other's.
        for ((value, met), wanted) in
            values.into_iter().zip([(1.0 / 1.1, false), (2.0 / 1.1, true), (1.2 / 0.75, false), (1.2, false)])
        {
            assert!((value - wanted.0).abs() < 1e-9 && met == wanted.1, "{goals:?}");
        }
        assert_eq!(goals.len(), 4);
    }

    #[test]
    fn work_costs_time() {
        let (sum, reading) =
            metered(|| Ok((0..2_000_000_u64).fold(0, |sum, n| std::hint::black_box(sum ^ n)))).expect("readable");
        assert!(sum < u64::MAX && reading.seconds > 0.0 && reading.cpu_s >= 0.0);
    }
}
