//! `kvcellar bench fleet`: ways of routing side by side, over modelled engines.
//!
//! Measured: time to the first token, cached share and balance in simulated time; the decisions are the router's own code. Not measured: networks,
//! and the speed of the decisions themselves (`bench route`).

use clap::Args;
use serde::Serialize;

use crate::error::Result;
use crate::route::cost::Cost;
use crate::route::simulation::load::Load;
use crate::route::simulation::{Outcome, Plan, Way, run as simulate};

/// Options.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Sizes of fleets.
    #[arg(long, value_delimiter = ',', default_value = "8,64,512")]
    pub engines: Vec<usize>,
    /// Kinds of traffic; all unless given.
    #[arg(long, value_enum)]
    pub load: Vec<Load>,
    /// Simulated seconds that count.
    #[arg(long, default_value_t = 120.0)]
    pub seconds: f64,
    /// Simulated seconds before that.
    #[arg(long, default_value_t = 60.0)]
    pub warm: f64,
    /// Share of each load's own rate.
    #[arg(long, default_value_t = 1.0)]
    pub rate: f64,
    /// Seed.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The cost model's weights: of work, of each request (s), of memory (s).
    #[arg(long, value_delimiter = ',', hide = true)]
    pub cost: Vec<f64>,
    /// Only the cost model.
    #[arg(long, hide = true)]
    pub only_cost: bool,
    /// JSON on standard output.
    #[arg(long)]
    pub json: bool,
}

/// One run.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    load: &'static str,
    engines: usize,
    way: &'static str,
    #[serde(flatten)]
    outcome: Outcome,
}

/// All runs.
///
/// # Errors
/// Those of the index.
pub fn measure(options: &Options) -> Result<Vec<Row>> {
    let loads = if options.load.is_empty() { Load::ALL.to_vec() } else { options.load.clone() };
    let bar = indicatif::ProgressBar::new((loads.len() * options.engines.len() * Way::ALL.len()) as u64);
    let mut rows = Vec::new();
    let cost = match options.cost.as_slice() {
        [work_weight, request_s, memory_s] => {
            Cost { work_weight: *work_weight, request_s: *request_s, memory_s: *memory_s }
        }
        _ => Cost::default(),
    };
    for load in loads {
        for engines in &options.engines {
            for way in Way::ALL.into_iter().filter(|way| !options.only_cost || *way == Way::CostModel) {
                let plan = Plan {
                    load,
                    engines: *engines,
                    seconds: options.seconds,
                    warm_s: options.warm,
                    rate: options.rate,
                    seed: options.seed,
                    cost,
                };
                bar.set_message(format!("{} {engines} {}", load.name(), way.name()));
                rows.push(Row { load: load.name(), engines: *engines, way: way.name(), outcome: simulate(plan, way)? });
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    Ok(rows)
}

/// Runs the command.
pub fn run(options: &Options) -> i32 {
    let rows = match measure(options) {
        Ok(rows) => rows,
        Err(error) => return super::refused(&error),
    };
    if options.json {
        println!(
            "{}",
            serde_json::json!({"seed": options.seed, "seconds": options.seconds, "warm_s": options.warm, "rate": options.rate, "rows": rows})
        );
        return 0;
    }
    println!(
        "{:<14}{:>8} {:<12}{:>9}{:>10}{:>10}{:>10}{:>9}{:>11}{:>7}",
        "load", "engines", "way", "requests", "p50 s", "p90 s", "p99 s", "cached", "imbalance", "busy"
    );
    for row in rows {
        let it = &row.outcome;
        println!(
            "{:<14}{:>8} {:<12}{:>9}{:>10.3}{:>10.3}{:>10.3}{:>8.1}%{:>11.2}{:>6.0}%",
            row.load,
            row.engines,
            row.way,
            it.requests,
            it.ttft_p50_s,
            it.ttft_p90_s,
            it.ttft_p99_s,
            it.cached * 100.0,
            it.imbalance,
            it.busy * 100.0
        );
    }
    0
}
