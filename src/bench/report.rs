//! The one shape of every `--json` report of `kvcellar bench`.

use nix::time::{ClockId, clock_gettime};
use serde::Serialize;
use serde_json::{Value, json};

use kvcellar_block::error::{Error, Result};

/// One measured value.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// What was measured.
    pub name: String,
    /// The median.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
    /// Half the distance between the quartiles.
    pub spread: f64,
    /// Repetitions.
    pub n: usize,
}

/// Which way a goal's value should go, and how far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum GoalBound {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
    /// Less than this.
    Below(f64),
}

impl GoalBound {
    fn words(self) -> String {
        match self {
            Self::AtLeast(least) => format!("at least {least}"),
            Self::AtMost(most) => format!("at most {most}"),
            Self::Below(end) => format!("below {end}"),
        }
    }

    fn admits(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::AtMost(most) => value <= most,
            Self::Below(end) => value < end,
        }
    }

    /// How far it is reached: 1 is just so.
    pub fn share(self, value: f64) -> f64 {
        match self {
            Self::AtLeast(wanted) => value / wanted,
            Self::AtMost(wanted) | Self::Below(wanted) => wanted / value,
        }
    }

    /// How many times worse a value is than an earlier one.
    pub fn worse(self, value: f64, before: f64) -> f64 {
        match self {
            Self::AtLeast(_) => before / value,
            Self::AtMost(_) | Self::Below(_) => value / before,
        }
    }
}

/// One goal of `docs/benchmarks.md`.
#[derive(Debug, Clone, Serialize)]
pub struct Goal {
    /// What should be reached.
    pub name: String,
    /// In words.
    pub goal: String,
    /// What was reached.
    pub value: f64,
    /// Whether it is enough.
    pub met: bool,
    /// What the words say.
    #[serde(skip)]
    pub bound: GoalBound,
}

impl Goal {
    /// A goal that is its bound and no more.
    pub fn of(name: impl Into<String>, bound: GoalBound, value: f64) -> Self {
        Self { name: name.into(), goal: bound.words(), value, met: bound.admits(value), bound }
    }
}

/// Median and spread of repetitions.
pub fn measured(name: &str, unit: &'static str, mut values: Vec<f64>) -> Measured {
    values.sort_by(f64::total_cmp);
    // Quartiles by rank: index of a quarter, half and three quarters of the way.
    let at =
        |quarters: usize| values.get((values.len().saturating_sub(1) * quarters + 2) / 4).copied().unwrap_or(f64::NAN);
    Measured { name: name.to_owned(), value: at(2), unit, spread: (at(3) - at(1)) / 2.0, n: values.len() }
}

/// CPU seconds of the calling thread so far.
///
/// # Errors
/// [`Error::DataLost`] when the system does not tell.
pub fn thread_cpu_s() -> Result<f64> {
    let now = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    let now = now.map_err(|errno| Error::lost("CPU time", errno.to_string()))?;
    Ok(now.tv_sec() as f64 + now.tv_nsec() as f64 / 1e9)
}

/// The value below which so many percent of sorted values lie, by rank.
pub fn percentile(sorted: &[f64], percent: usize) -> f64 {
    sorted.get(sorted.len().saturating_sub(1) * percent / 100).copied().unwrap_or(f64::NAN)
}

/// The whole report.
pub fn report(results: &[Measured], goals: &[Goal]) -> Value {
    json!({ "commit": commit(), "machine": machine(), "results": results, "goals": goals })
}

/// Prints the report for people: a table with `digits` after the point, then the goals.
pub fn print(results: &[Measured], goals: &[Goal], digits: usize) {
    println!("{:<40} {:>12} {:>12} {:>4}", "", "median", "spread", "n");
    for Measured { name, value, unit, spread, n } in results {
        println!("{name:<40} {value:>12.digits$} {spread:>12.digits$} {n:>4} {unit}");
    }
    print_goals(goals, 2);
}

/// Prints how far each goal is reached, with `digits` after the point.
pub fn print_goals(goals: &[Goal], digits: usize) {
    for Goal { name, goal, value, met, .. } in goals {
        println!("{} {name}: {value:.digits$} ({goal})", if *met { "met     " } else { "NOT MET " });
    }
}

fn commit() -> Value {
    let output = std::process::Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12"]).output();
    match output {
        Ok(output) if output.status.success() => Value::from(String::from_utf8_lossy(&output.stdout).trim()),
        // Installed from a wheel: the version is what there is to say.
        _ => Value::from(concat!("v", env!("CARGO_PKG_VERSION"))),
    }
}

/// What the numbers depend on.
pub fn machine() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name.to_owned()));
    let memory_kib =
        read("/proc/meminfo").lines().next().and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    json!({
        "cpu": model,
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "memory_bytes": memory_kib.map(|kib| kib * 1024),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_has_words_and_a_direction() {
        let goals = [
            Goal::of("rate", GoalBound::AtLeast(0.95), 0.95),
            Goal::of("time", GoalBound::AtMost(2.0), 2.1),
            Goal::of("seconds", GoalBound::Below(1.0), 1.0),
        ];
        let told: Vec<(&str, bool)> = goals.iter().map(|goal| (goal.goal.as_str(), goal.met)).collect();
        assert_eq!(told, [("at least 0.95", true), ("at most 2", false), ("below 1", false)]);
        assert!(serde_json::to_value(&goals[0]).is_ok_and(|goal| goal.get("bound").is_none()), "words are enough");
        let shares = [GoalBound::AtLeast(2.0).share(3.0), GoalBound::AtMost(2.0).share(4.0)];
        assert!((shares[0] - 1.5).abs() < 1e-9 && (shares[1] - 0.5).abs() < 1e-9);
    }
}
