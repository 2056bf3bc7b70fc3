//! `kvcellar bench fleet`: ways of routing side by side, over modelled engines.
//!
//! Measured: time to the first token, cached share and balance in simulated time, for the same
//! traffic in every way; the decisions are the router's own code, and so are what several routers
//! tell each other, the queue, and the rules of two steps and of retries ([`scenes`]). Not
//! measured: networks, and the speed of the decisions themselves (`bench route`).

pub mod scenes;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use clap::Args;
use serde::Serialize;
use serde_json::json;

use self::scenes::{Comparison, FleetTrial};
use super::report;
use kvcellar_block::error::Result;
use kvcellar_route::simulation::load::Load;
use kvcellar_route::simulation::outcome::Outcome;
use kvcellar_route::simulation::{Plan, Way, run as simulate};

/// Options.
#[derive(Debug, Clone, Args)]
pub struct FleetBench {
    /// Sizes of fleets.
    #[arg(long, value_delimiter = ',', default_value = "8,64")]
    pub engines: Vec<usize>,
    /// Kinds of traffic; all unless given.
    #[arg(long, value_enum)]
    pub load: Vec<Load>,
    /// Simulated seconds that count.
    #[arg(long, default_value_t = 60.0)]
    pub seconds: f64,
    /// Simulated seconds before that.
    #[arg(long, default_value_t = 40.0)]
    pub warm: f64,
    /// Share of each load's own rate.
    #[arg(long, default_value_t = 1.0)]
    pub rate: f64,
    /// Seeds: as many runs of each kind.
    #[arg(long, value_delimiter = ',', default_value = "1,2,3")]
    pub seeds: Vec<u64>,
    /// What is compared; all unless given.
    #[arg(long, value_enum)]
    pub compare: Vec<Comparison>,
    /// JSON on standard output.
    #[arg(long)]
    pub json: bool,
}

/// A number over all seeds.
#[derive(Debug, Clone, Copy, Serialize)]
struct Over {
    median: f64,
    /// Half the distance between the quartiles.
    spread: f64,
}

/// One way through one load.
#[derive(Debug, Clone, Serialize)]
pub struct FleetRow {
    #[serde(skip)]
    comparison: Comparison,
    /// What is not as in the simplest fleet.
    scene: &'static str,
    load: &'static str,
    engines: usize,
    way: &'static str,
    requests: Over,
    unanswered: Over,
    ttft_p50_s: Over,
    ttft_p90_s: Over,
    ttft_p99_s: Over,
    between_p90_s: Over,
    cached: Over,
    imbalance: Over,
    busy: Over,
    lost: Over,
    lower: Over,
    /// The nine-tenths of each seed.
    #[serde(skip)]
    p90s: Vec<f64>,
}

impl FleetRow {
    fn of(trial: &FleetTrial, outcomes: &[Outcome]) -> Self {
        let over = |of: fn(&Outcome) -> f64| {
            let it = report::measured("", "", outcomes.iter().map(of).collect());
            Over { median: it.value, spread: it.spread }
        };
        Self {
            comparison: trial.comparison,
            scene: trial.scene,
            load: trial.plan.load.name(),
            engines: trial.plan.engines,
            way: trial.way.name(),
            requests: over(|it| it.requests as f64),
            unanswered: over(|it| it.unanswered as f64),
            ttft_p50_s: over(|it| it.ttft_p50_s),
            ttft_p90_s: over(|it| it.ttft_p90_s),
            ttft_p99_s: over(|it| it.ttft_p99_s),
            between_p90_s: over(|it| it.between_p90_s),
            cached: over(|it| it.cached),
            imbalance: over(|it| it.imbalance),
            busy: over(|it| it.busy),
            lost: over(|it| it.lost as f64),
            lower: over(|it| it.lower as f64),
            p90s: outcomes.iter().map(|it| it.ttft_p90_s).collect(),
        }
    }
}

/// All runs, as many at a time as there are cores.
///
/// # Errors
/// Those of the index.
pub fn measure(options: &FleetBench) -> Result<Vec<FleetRow>> {
    let trials = scenes::trials(options);
    let of = |trial: &FleetTrial| {
        let (plan, way) = (trial.plan, trial.way);
        trial.seeds.iter().map(|seed| (Plan { seed: *seed, ..plan }, way)).collect::<Vec<_>>()
    };
    let mut outcomes = all(&trials.iter().flat_map(of).collect::<Vec<_>>())?.into_iter();
    let row = |trial: &FleetTrial| {
        let its: Vec<Outcome> = outcomes.by_ref().take(trial.seeds.len()).collect();
        FleetRow::of(trial, &its)
    };
    Ok(trials.iter().map(row).collect())
}

fn all(runs: &[(Plan, Way)]) -> Result<Vec<Outcome>> {
    let bar = indicatif::ProgressBar::new(runs.len() as u64);
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(runs.len()));
    let work = || loop {
        let at = next.fetch_add(1, Ordering::Relaxed);
        let Some((plan, way)) = runs.get(at) else { return };
        let outcome = simulate(*plan, *way);
        done.lock().unwrap_or_else(PoisonError::into_inner).push((at, outcome));
        bar.inc(1);
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from).min(runs.len()) {
            scope.spawn(work);
        }
    });
    bar.finish_and_clear();
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, outcome)| outcome).collect()
}

/// Runs the command.
///
/// # Errors
/// As [`measure`].
pub fn run(options: &FleetBench) -> Result<()> {
    let rows = measure(options)?;
    let goals = scenes::goals(&rows);
    if options.json {
        let mut told = report::report(&[], &goals);
        let parameters =
            json!({"seeds": options.seeds, "seconds": options.seconds, "warm_s": options.warm, "rate": options.rate});
        told["parameters"] = parameters;
        told["rows"] = json!(rows);
        told["processors"] = json!(scenes::processors(&rows));
        println!("{told:#}");
        return Ok(());
    }
    println!(
        "{:<20}{:<14}{:>8} {:<14}{:>9}{:>10}{:>10}{:>10}{:>12}{:>9}{:>11}{:>7}{:>7}{:>7}",
        "scene",
        "load",
        "engines",
        "way",
        "requests",
        "p50 s",
        "p90 s",
        "p99 s",
        "between ms",
        "cached",
        "imbalance",
        "busy",
        "lost",
        "lower"
    );
    for row in &rows {
        println!(
            "{:<20}{:<14}{:>8} {:<14}{:>9.0}{:>10.3}{:>10.3}{:>10.3}{:>12.1}{:>8.1}%{:>11.2}{:>6.0}%{:>7.0}{:>7.0}",
            row.scene,
            row.load,
            row.engines,
            row.way,
            row.requests.median,
            row.ttft_p50_s.median,
            row.ttft_p90_s.median,
            row.ttft_p99_s.median,
            row.between_p90_s.median * 1e3,
            row.cached.median * 100.0,
            row.imbalance.median,
            row.busy.median * 100.0,
            row.lost.median,
            row.lower.median
        );
    }
    for on in scenes::processors(&rows) {
        println!("{on}");
    }
    report::print(&[], &goals, 2);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_goals_come_out() {
        let options = FleetBench {
            engines: vec![2],
            load: vec![Load::Agent],
            seconds: 5.0,
            warm: 2.0,
            rate: 1.0,
            seeds: vec![1, 2],
            compare: Vec::new(),
            json: true,
        };
        let rows = measure(&options).expect("runs");
        let of = |comparison| rows.iter().filter(move |row| row.comparison == comparison);
        assert_eq!(of(Comparison::Ways).count(), Way::ALL.len());
        assert!(rows.iter().all(|row| row.p90s.len() >= 2), "{rows:?}");
        assert!(of(Comparison::Ways).all(|row| row.requests.median > 0.0));
        assert!(of(Comparison::Churn).all(|row| row.lost.median == 0.0), "none goes so soon");
        let goals = scenes::goals(&rows);
        // Ways, two ways with two routers, overload, churn, prefill.
        assert!(goals.len() == 6 && goals.iter().all(|goal| goal.value > 0.0), "{goals:?}");
        assert_eq!(scenes::processors(&rows).len(), 6);
    }
}
