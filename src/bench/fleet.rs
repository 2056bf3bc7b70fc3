//! `kvcellar bench fleet`: ways of routing side by side, over modelled engines.
//!
//! Measured: time to the first token, cached share and balance in simulated time, for the same
//! traffic in every way; the decisions are the router's own code. Not measured: networks, and the
//! speed of the decisions themselves (`bench route`).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::report::{self, Goal, GoalBound};
use kvcellar_block::error::Result;
use kvcellar_route::simulation::load::Load;
use kvcellar_route::simulation::outcome::Outcome;
use kvcellar_route::simulation::{Plan, Way, run as simulate};

/// Options.
#[derive(Debug, Clone, Args)]
pub struct FleetBench {
    /// Sizes of fleets.
    #[arg(long, value_delimiter = ',', default_value = "8,64,512")]
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
    load: &'static str,
    engines: usize,
    way: &'static str,
    requests: Over,
    unanswered: Over,
    ttft_p50_s: Over,
    ttft_p90_s: Over,
    ttft_p99_s: Over,
    cached: Over,
    imbalance: Over,
    busy: Over,
    /// The nine-tenths of each seed.
    #[serde(skip)]
    p90s: Vec<f64>,
}

impl FleetRow {
    fn of(plan: Plan, way: Way, outcomes: &[Outcome]) -> Self {
        let over = |of: fn(&Outcome) -> f64| {
            let it = report::measured("", "", outcomes.iter().map(of).collect());
            Over { median: it.value, spread: it.spread }
        };
        Self {
            load: plan.load.name(),
            engines: plan.engines,
            way: way.name(),
            requests: over(|it| it.requests as f64),
            unanswered: over(|it| it.unanswered as f64),
            ttft_p50_s: over(|it| it.ttft_p50_s),
            ttft_p90_s: over(|it| it.ttft_p90_s),
            ttft_p99_s: over(|it| it.ttft_p99_s),
            cached: over(|it| it.cached),
            imbalance: over(|it| it.imbalance),
            busy: over(|it| it.busy),
            p90s: outcomes.iter().map(|it| it.ttft_p90_s).collect(),
        }
    }
}

/// All runs, as many at a time as there are cores.
///
/// # Errors
/// Those of the index.
pub fn measure(options: &FleetBench) -> Result<Vec<FleetRow>> {
    let loads = if options.load.is_empty() { Load::ALL.to_vec() } else { options.load.clone() };
    let mut kinds = Vec::new();
    for load in loads {
        for engines in &options.engines {
            let (seconds, warm_s, rate) = (options.seconds, options.warm, options.rate);
            let plan = Plan { load, engines: *engines, seconds, warm_s, rate, seed: 0 };
            kinds.extend(Way::ALL.map(|way| (plan, way)));
        }
    }
    let runs: Vec<(Plan, Way)> = kinds
        .iter()
        .flat_map(|(plan, way)| options.seeds.iter().map(|seed| (Plan { seed: *seed, ..*plan }, *way)))
        .collect();
    let outcomes = all(&runs)?;
    let rows = kinds.iter().zip(outcomes.chunks(options.seeds.len().max(1)));
    Ok(rows.map(|((plan, way), outcomes)| FleetRow::of(*plan, *way, outcomes)).collect())
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

/// The cost model against the best other way, for each load and size: with the same seed each time,
/// the median of all.
fn goals(rows: &[FleetRow]) -> Vec<Goal> {
    let ours = rows.iter().filter(|row| row.way == Way::CostModel.name());
    let goal = |ours: &FleetRow| {
        let others = || {
            let same = |row: &&FleetRow| (row.load, row.engines) == (ours.load, ours.engines) && row.way != ours.way;
            rows.iter().filter(same)
        };
        let ratio = |(at, p90): (usize, &f64)| p90 / others().map(|row| row.p90s[at]).fold(f64::INFINITY, f64::min);
        let ratio = report::measured("", "", ours.p90s.iter().enumerate().map(ratio).collect()).value;
        // To the two places that are shown.
        let value = (ratio * 100.0).round() / 100.0;
        let name = format!("{}, {} engines: cost model's p90 over the best other's", ours.load, ours.engines);
        Goal::of(name, GoalBound::AtMost(1.0), value)
    };
    ours.map(goal).collect()
}

/// Runs the command.
///
/// # Errors
/// As [`measure`].
pub fn run(options: &FleetBench) -> Result<()> {
    let rows = measure(options)?;
    let goals = goals(&rows);
    if options.json {
        let mut told = report::report(&[], &goals);
        let parameters =
            json!({"seeds": options.seeds, "seconds": options.seconds, "warm_s": options.warm, "rate": options.rate});
        told["parameters"] = parameters;
        told["rows"] = json!(rows);
        println!("{told:#}");
        return Ok(());
    }
    println!(
        "{:<14}{:>8} {:<12}{:>9}{:>10}{:>10}{:>10}{:>9}{:>11}{:>7}",
        "load", "engines", "way", "requests", "p50 s", "p90 s", "p99 s", "cached", "imbalance", "busy"
    );
    for row in &rows {
        println!(
            "{:<14}{:>8} {:<12}{:>9.0}{:>10.3}{:>10.3}{:>10.3}{:>8.1}%{:>11.2}{:>6.0}%",
            row.load,
            row.engines,
            row.way,
            row.requests.median,
            row.ttft_p50_s.median,
            row.ttft_p90_s.median,
            row.ttft_p99_s.median,
            row.cached.median * 100.0,
            row.imbalance.median,
            row.busy.median * 100.0
        );
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
            json: true,
        };
        let rows = measure(&options).expect("runs");
        assert_eq!(rows.len(), Way::ALL.len());
        assert!(rows.iter().all(|row| row.p90s.len() == 2 && row.requests.median > 0.0));
        let goals = goals(&rows);
        assert!(goals.len() == 1 && goals[0].value > 0.0, "{goals:?}");
    }
}
