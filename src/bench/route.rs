//! `kvcellar bench route`: what a routing decision costs, and what the router costs in front of
//! engines.
//!
//! Measured: bodies of requests to engines (JSON, ids, keys, index, weighing, books) in this
//! process, as wall time and as CPU time of the deciding thread; requests a second for a core of a
//! router process in front of made-up engines, by its proxy and by Envoy, each beside the same with
//! a fixed target. Not measured: engines; networks between machines.
//!
//! A *seen* text is a conversation's next turn: all but its last hundred tokens were tokenized
//! before. A *new* text was never seen.

mod decide;
mod envoy;
mod front;
mod load;
mod process;
mod prompts;
mod stand_in;

use std::path::PathBuf;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::report::{self, Goal, GoalBound, Measured};
use kvcellar_block::error::{Error, Result};
use kvcellar_route::tokens::TokenModel;

/// Sizes of the benchmark.
#[derive(Debug, Clone, Args)]
pub struct RouteBench {
    /// Directory with a model's `tokenizer.json`.
    #[arg(long)]
    pub tokenizer: PathBuf,
    /// Lengths of prompts, in tokens.
    #[arg(long, value_delimiter = ',', default_value = "1000,10000,100000")]
    pub tokens: Vec<usize>,
    /// Sizes of fleets.
    #[arg(long, value_delimiter = ',', default_value = "8,100")]
    pub engines: Vec<usize>,
    /// Decisions in each repetition, for prompts of up to 10,000 tokens; of longer ones a tenth.
    #[arg(long, default_value_t = 300)]
    pub decisions: usize,
    /// Requests through each front end in each repetition, for prompts of up to 10,000 tokens; of
    /// longer ones a tenth.
    #[arg(long, default_value_t = 1000)]
    pub requests: usize,
    /// Repetitions of each measurement.
    #[arg(long, default_value_t = 5)]
    pub repetitions: usize,
    /// Envoy's binary. Without it the endpoint picker is not measured.
    #[arg(long)]
    pub envoy: Option<PathBuf>,
    /// JSON on standard output.
    #[arg(long)]
    pub json: bool,
}

/// Tokens of a conversation's next turn.
const TURN: usize = 100;

/// How many of a thing are done at a length of prompts.
fn fewer(count: usize, tokens: usize) -> usize {
    if tokens > 10_000 { count.div_ceil(10) } else { count }.max(1)
}

/// What came out.
#[derive(Debug, Default)]
struct RouteFindings {
    results: Vec<Measured>,
    goals: Vec<Goal>,
}

impl RouteFindings {
    fn put(&mut self, name: &str, unit: &'static str, values: Vec<f64>) -> f64 {
        let measured = report::measured(name, unit, values);
        let value = measured.value;
        self.results.push(measured);
        value
    }

    fn goal(&mut self, name: String, bound: GoalBound, value: f64) {
        self.goals.push(Goal::of(name, bound, value));
    }
}

fn check(options: &RouteBench) -> Result<()> {
    let positive =
        [("decisions", options.decisions), ("requests", options.requests), ("repetitions", options.repetitions)];
    for (name, value) in positive {
        if value == 0 {
            return Err(Error::config(name, "it is 0", "Write 1 or more"));
        }
    }
    if options.tokens.iter().any(|tokens| *tokens < 200) {
        return Err(Error::config("tokens", "prompts are shorter than 200 tokens", "Write e.g. 1000,10000"));
    }
    if options.engines.iter().any(|count| !(1..=4096).contains(count)) {
        return Err(Error::config("engines", "a fleet has no or more than 4096 engines", "Write e.g. 8,100"));
    }
    Ok(())
}

fn measure(options: &RouteBench) -> Result<RouteFindings> {
    check(options)?;
    let model = TokenModel::open(&options.tokenizer, 1 << 30)?;
    let fronts = 1 + usize::from(options.envoy.is_some());
    let steps = options.tokens.len() * (options.engines.len() * decide::KINDS.len() + fronts * options.repetitions);
    let bar = ProgressBar::new(steps as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg:36} {bar:30} {pos}/{len} {elapsed}") {
        bar.set_style(style);
    }
    let mut found = RouteFindings::default();
    decide::measure(options, &model, &bar, &mut found)?;
    front::measure(options, &model, &bar, &mut found)?;
    bar.finish_and_clear();
    Ok(found)
}

/// Runs the command.
///
/// # Errors
/// [`Error::Config`] for sizes that cannot be; those of starting the front ends.
pub fn run(options: &RouteBench) -> Result<()> {
    let found = measure(options)?;
    if options.json {
        println!("{}", report::report(&found.results, &found.goals));
    } else {
        report::print(&found.results, &found.goals, 3);
        if options.envoy.is_none() {
            println!("The endpoint picker under Envoy was not measured: see --envoy");
        }
    }
    Ok(())
}
