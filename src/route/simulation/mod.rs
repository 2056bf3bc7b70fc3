//! A fleet in a computer's head: the router's real scorers, cost model, books, guesses and index
//! against modelled engines. Seeded, so that a run repeats.
//!
//! A [`Plan`] names the traffic ([`load`]); a world of [`engine`]s serves it, routed in one
//! [`Way`]; the [`outcome`] sums up. Not modelled: networks, several routers, engines that come and
//! go, tokens that are only estimated.

pub mod cache;
pub mod engine;
pub mod load;
pub mod outcome;
mod schedule;
mod world;

use super::choose::Policy;
use kvcellar_block::error::Result;
use load::Load;
use outcome::Outcome;

/// How requests are routed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Anywhere.
    Random,
    /// In turn.
    RoundRobin,
    /// By load.
    LoadOnly,
    /// The field's profile over guesses.
    Approximate,
    /// The field's profile over the index.
    Precise,
    /// The cost model over the index.
    CostModel,
}

impl Way {
    /// All ways.
    pub const ALL: [Self; 6] =
        [Self::Random, Self::RoundRobin, Self::LoadOnly, Self::Approximate, Self::Precise, Self::CostModel];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::RoundRobin => "round robin",
            Self::LoadOnly => "load only",
            Self::Approximate => "approximate",
            Self::Precise => "precise",
            Self::CostModel => "cost model",
        }
    }

    fn policy(self) -> Policy {
        match self {
            Self::Random => Policy::random(),
            Self::RoundRobin => Policy::RoundRobin,
            Self::LoadOnly => Policy::load(),
            Self::Approximate | Self::Precise => Policy::field(),
            Self::CostModel => Policy::Cost,
        }
    }

    fn asks_index(self) -> bool {
        matches!(self, Self::Precise | Self::CostModel)
    }
}

/// What is simulated.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Kind of traffic.
    pub load: Load,
    /// Engines.
    pub engines: usize,
    /// Simulated time in which requests count.
    pub seconds: f64,
    /// Simulated time before that.
    pub warm_s: f64,
    /// Share of the load's own rate.
    pub rate: f64,
    /// Seed.
    pub seed: u64,
}

/// Simulates one way through one plan.
///
/// # Errors
/// Those of the index.
pub fn run(plan: Plan, way: Way) -> Result<Outcome> {
    Ok(world::World::new(plan, way)?.run())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_repeats_and_every_way_answers() {
        let plan = Plan { load: Load::MultiTurn, engines: 3, seconds: 10.0, warm_s: 5.0, rate: 0.5, seed: 4 };
        for way in Way::ALL {
            let (one, two) = (run(plan, way).expect("a run"), run(plan, way).expect("a run"));
            assert!(one.requests > 5 && one.ttft_p50_s > 0.0, "{way:?}: {one:?}");
            assert_eq!(format!("{one:?}"), format!("{two:?}"));
        }
        let random = run(plan, Way::Random).expect("a run");
        let precise = run(plan, Way::Precise).expect("a run");
        assert!(precise.cached > random.cached);
    }
}
