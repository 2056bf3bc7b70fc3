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
    for Goal { name, goal, value, met } in goals {
        println!("{} {name}: {value:.2} ({goal})", if *met { "met     " } else { "NOT MET " });
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
