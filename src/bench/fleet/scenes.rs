//! What is simulated: ways of routing side by side, and fleets that are not as simple.

use clap::ValueEnum;
use serde::Serialize;

use super::{FleetBench, FleetRow};
use crate::report::{self, Goal, GoalBound};
use kvcellar_route::simulation::load::Load;
use kvcellar_route::simulation::{Churn, Plan, Priorities, Scene, Way};

/// A kind of comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Comparison {
    /// All ways of routing, in the simplest fleet.
    Ways,
    /// One router, two that know nothing of each other, and two that share.
    Routers,
    /// Three times the requests that engines can do, with a queue in the router and without.
    Overload,
    /// Engines that go and come back.
    Churn,
    /// Some engines compute prompts for the others.
    Prefill,
    /// Two engines on one processor.
    Processor,
}

/// Fleets of more engines are compared in the simplest scene only.
const ENGINES_MAX: usize = 64;

/// Of the load's own rate: about three times what engines can do; and the share that is urgent, as
/// many requests as there are at the load's own rate.
const OVERLOAD: f64 = 7.5;

/// One engine goes every ten seconds, for five.
const CHURN: Churn = Churn { every_s: 10.0, away_s: 5.0 };

/// One simulation, but for its seed.
#[derive(Debug, Clone)]
pub(super) struct FleetTrial {
    pub(super) comparison: Comparison,
    /// What is not as in the simplest fleet, in words.
    pub(super) scene: &'static str,
    pub(super) plan: Plan,
    pub(super) way: Way,
    pub(super) seeds: Vec<u64>,
}

/// Everything that options ask for.
pub(super) fn trials(options: &FleetBench) -> Vec<FleetTrial> {
    let comparisons =
        if options.compare.is_empty() { Comparison::value_variants().to_vec() } else { options.compare.clone() };
    comparisons.into_iter().flat_map(|comparison| of(comparison, options)).collect()
}

fn of(comparison: Comparison, options: &FleetBench) -> Vec<FleetTrial> {
    let (seconds, warm_s, rate) = (options.seconds, options.warm, options.rate);
    let plan = |load, engines| Plan { load, engines, seconds, warm_s, rate, seed: 0, scene: Scene::default() };
    let trial = |scene, plan, way| FleetTrial { comparison, scene, plan, way, seeds: options.seeds.clone() };
    let loads = if options.load.is_empty() { Load::ALL.to_vec() } else { options.load.clone() };
    let sizes = || options.engines.iter().copied().filter(|engines| *engines <= ENGINES_MAX);
    let fewest = options.engines.iter().copied().min().unwrap_or(1);
    let mut trials = Vec::new();
    match comparison {
        Comparison::Ways => {
            for load in loads {
                for engines in &options.engines {
                    trials.extend(Way::ALL.map(|way| trial("", plan(load, *engines), way)));
                }
            }
        }
        Comparison::Routers => {
            let scenes = [("one router", 1, false), ("two routers apart", 2, false), ("two routers sharing", 2, true)];
            for (load, engines) in loads.into_iter().flat_map(|load| sizes().map(move |engines| (load, engines))) {
                for way in [Way::CostModel, Way::CostGuessed] {
                    trials.extend(scenes.map(|(name, routers, shares)| {
                        let scene = Scene { routers, shares, ..Scene::default() };
                        trial(name, Plan { scene, ..plan(load, engines) }, way)
                    }));
                }
            }
        }
        Comparison::Overload => {
            let scenes = [
                ("urgent ones alone", 1.0, false),
                ("overload, no queue", OVERLOAD, false),
                ("overload, queue", OVERLOAD, true),
            ];
            trials.extend(scenes.map(|(name, times, queue)| {
                let scene = Scene { priorities: Some(Priorities { urgent: 1.0 / times, queue }), ..Scene::default() };
                trial(name, Plan { rate: rate * times, scene, ..plan(Load::SharedPrefix, fewest) }, Way::CostModel)
            }));
        }
        Comparison::Churn => {
            let scene = Scene { churn: Some(CHURN), ..Scene::default() };
            for load in loads {
                let ways = [Way::RoundRobin, Way::LoadOnly, Way::Approximate, Way::Precise, Way::CostModel];
                trials.extend(ways.map(|way| trial("engines go", Plan { scene, ..plan(load, fewest) }, way)));
            }
        }
        Comparison::Prefill => {
            let apart = Scene { prefill: (fewest / 2).max(1), ..Scene::default() };
            for load in loads {
                let both = [("both on all engines", Scene::default()), ("prefill apart", apart)];
                trials.extend(
                    both.map(|(name, scene)| trial(name, Plan { scene, ..plan(load, fewest) }, Way::CostModel)),
                );
            }
        }
        Comparison::Processor => {
            let scenes = [("a core each", None), ("1.3 cores for two", Some(1.3)), ("a core for two", Some(1.0))];
            for (name, processor) in scenes {
                let scene = Scene { processor, ..Scene::default() };
                // It ends by itself.
                let plan = Plan { seconds: 1e5, warm_s: 0.0, scene, ..plan(Load::Notebooks, 2) };
                let ways = [Way::RoundRobin, Way::CostGuessed, Way::CostModel];
                trials.extend(ways.map(|way| FleetTrial { seeds: (1..=60).collect(), ..trial(name, plan, way) }));
            }
        }
    }
    trials
}

/// Of each seed one row's nine-tenths over another's or the least of others': the median.
fn ratio(of: &FleetRow, others: &[&FleetRow]) -> f64 {
    let ratio = |(at, p90): (usize, &f64)| p90 / others.iter().map(|row| row.p90s[at]).fold(f64::INFINITY, f64::min);
    let ratio = report::measured("", "", of.p90s.iter().enumerate().map(ratio).collect()).value;
    // To the two places that are shown.
    (ratio * 100.0).round() / 100.0
}

fn same(one: &FleetRow, other: &FleetRow) -> bool {
    (one.comparison, one.load, one.engines) == (other.comparison, other.load, other.engines)
}

/// What rows are held against.
pub(super) fn goals(rows: &[FleetRow]) -> Vec<Goal> {
    rows.iter().filter_map(|row| goal(row, rows)).collect()
}

fn goal(row: &FleetRow, rows: &[FleetRow]) -> Option<Goal> {
    let beside = |is: &dyn Fn(&FleetRow) -> bool| rows.iter().filter(|it| same(row, it) && is(it)).collect::<Vec<_>>();
    let place = format!("{}, {} engines", row.load, row.engines);
    let is_cost = row.way == Way::CostModel.name();
    match row.comparison {
        Comparison::Ways if is_cost => {
            let others = beside(&|it| it.way != row.way);
            let name = format!("{place}: cost model's p90 over the best other's");
            Some(Goal::of(name, GoalBound::AtMost(1.0), ratio(row, &others)))
        }
        Comparison::Routers if row.scene == "two routers sharing" => {
            let one = beside(&|it| it.way == row.way && it.scene == "one router");
            let name = format!("{place}, {}: two sharing routers' p90 over one's", row.way);
            Some(Goal::of(name, GoalBound::AtMost(1.05), ratio(row, &one)))
        }
        Comparison::Overload if row.scene == "overload, queue" => {
            let alone = beside(&|it| it.scene == "urgent ones alone");
            let name = format!("{place}, three times their load: urgent requests' p90 with a queue over alone");
            Some(Goal::of(name, GoalBound::AtMost(1.2), ratio(row, &alone)))
        }
        Comparison::Churn if is_cost => {
            let others = beside(&|it| it.way != row.way);
            let name = format!("{place} that go and come back: cost model's p90 over the best other's");
            Some(Goal::of(name, GoalBound::AtMost(1.0), ratio(row, &others)))
        }
        Comparison::Prefill if row.scene == "prefill apart" => {
            let both = beside(&|it| it.scene != row.scene);
            let over = row.between_p90_s.median / both.first()?.between_p90_s.median;
            let name = format!("{place}: p90 between tokens with prefill apart over without");
            Some(Goal::of(name, GoalBound::AtMost(1.0), (over * 100.0).round() / 100.0))
        }
        _ => None,
    }
}

/// The cost model's slow requests beside those of round robin, by what the engines compute on.
#[derive(Debug, Clone, Serialize)]
pub struct OnProcessor {
    scene: &'static str,
    way: &'static str,
    /// Its p90 over round robin's with the same seed: the median of all seeds.
    p90_over: f64,
    /// Share of seeds with which it is above 1, and above 1.1.
    above: [f64; 2],
}

/// All of them.
pub(super) fn processors(rows: &[FleetRow]) -> Vec<OnProcessor> {
    let is_ours = |row: &&FleetRow| row.comparison == Comparison::Processor && row.way != Way::RoundRobin.name();
    let over = |row: &FleetRow| {
        let is_round = |it: &&FleetRow| same(row, it) && it.scene == row.scene && it.way == Way::RoundRobin.name();
        let round = rows.iter().find(is_round)?;
        let above = |most: f64| {
            let pairs = row.p90s.iter().zip(&round.p90s);
            pairs.filter(|(ours, theirs)| **ours > most * **theirs).count() as f64 / row.p90s.len().max(1) as f64
        };
        let p90_over = ratio(row, &[round]);
        Some(OnProcessor { scene: row.scene, way: row.way, p90_over, above: [above(1.0), above(1.1)] })
    };
    rows.iter().filter(is_ours).filter_map(over).collect()
}

impl std::fmt::Display for OnProcessor {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { scene, way, p90_over, above: [above, far_above] } = self;
        write!(
            formatter,
            "{scene}, {way}: p90 {p90_over} times that of round robin; above it with {:.0}% of seeds, by a tenth with {:.0}%",
            above * 100.0,
            far_above * 100.0
        )
    }
}
