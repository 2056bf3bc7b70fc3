//! A fleet in a computer's head: the router's real scorers, cost model, books, guesses and index
//! against modelled engines. Seeded, so that a run repeats.
//!
//! A [`Plan`] names the traffic ([`load`]) and the [`Scene`]: how many routers there are, whether
//! they share, whether requests wait in them, whether some engines compute prompts for others,
//! whether engines go and come back, whether they share a processor. A world of [`engine`]s serves
//! it, routed in one [`Way`]; the [`outcome`] sums up. Not modelled: networks but for the time of
//! events and of news between routers, tokens that are only estimated.

pub mod cache;
pub mod engine;
pub mod load;
pub mod outcome;
mod processor;
mod request;
mod schedule;
mod sim_router;
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
    /// The cost model over guesses: what a router does unless it is told otherwise.
    CostGuessed,
}

impl Way {
    /// The ways that are compared with each other.
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
            Self::CostGuessed => "cost, guesses",
        }
    }

    fn policy(self) -> Policy {
        match self {
            Self::Random => Policy::random(),
            Self::RoundRobin => Policy::RoundRobin,
            Self::LoadOnly => Policy::load(),
            Self::Approximate | Self::Precise => Policy::field(),
            Self::CostModel | Self::CostGuessed => Policy::Cost,
        }
    }

    fn asks_index(self) -> bool {
        matches!(self, Self::Precise | Self::CostModel)
    }

    fn guesses(self) -> bool {
        matches!(self, Self::Approximate | Self::CostGuessed)
    }
}

/// Two priorities, and more requests than engines can do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Priorities {
    /// Share of requests of the higher priority. What is measured is of these.
    pub urgent: f64,
    /// Requests wait in the router for engines to have room, as with `--queue`.
    pub queue: bool,
}

/// Engines go, one after the other, with all they have, and come back with nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Churn {
    /// Time between two that go, in s.
    pub every_s: f64,
    /// Time for which one is away, in s.
    pub away_s: f64,
}

/// What is not as in the simplest fleet.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scene {
    /// Routers; each request comes to any of them.
    pub routers: usize,
    /// They tell each other what they do.
    pub shares: bool,
    /// Priorities.
    pub priorities: Option<Priorities>,
    /// Engines that compute prompts for the others.
    pub prefill: usize,
    /// Engines go and come back.
    pub churn: Option<Churn>,
    /// All engines compute on one processor, which serves so many of them at full speed.
    pub processor: Option<f64>,
}

impl Default for Scene {
    fn default() -> Self {
        Self { routers: 1, shares: false, priorities: None, prefill: 0, churn: None, processor: None }
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
    /// What is not as in the simplest fleet.
    pub scene: Scene,
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
        let plan = Plan {
            load: Load::MultiTurn,
            engines: 3,
            seconds: 10.0,
            warm_s: 5.0,
            rate: 0.5,
            seed: 4,
            scene: Scene::default(),
        };
        for way in Way::ALL {
            let (one, two) = (run(plan, way).expect("a run"), run(plan, way).expect("a run"));
            assert!(one.requests > 5 && one.ttft_p50_s > 0.0, "{way:?}: {one:?}");
            assert_eq!(format!("{one:?}"), format!("{two:?}"));
        }
        let random = run(plan, Way::Random).expect("a run");
        let precise = run(plan, Way::Precise).expect("a run");
        assert!(precise.cached > random.cached);
    }

    const PLAN: Plan = Plan {
        load: Load::MultiTurn,
        engines: 4,
        seconds: 20.0,
        warm_s: 10.0,
        rate: 1.0,
        seed: 4,
        scene: Scene { routers: 1, shares: false, priorities: None, prefill: 0, churn: None, processor: None },
    };

    fn guessed(scene: Scene) -> Outcome {
        run(Plan { scene, ..PLAN }, Way::CostGuessed).expect("a run")
    }

    #[test]
    fn routers_that_share_know_what_one_does() {
        let of = |routers, shares| guessed(Scene { routers, shares, ..Scene::default() });
        let (one, apart, sharing) = (of(1, false), of(2, false), of(2, true));
        assert!(apart.cached < one.cached - 0.05, "{apart:?} {one:?}");
        assert!(sharing.cached > one.cached - 0.02, "{sharing:?} {one:?}");
        assert!(sharing.ttft_p90_s < apart.ttft_p90_s);
    }

    #[test]
    fn urgent_requests_overtake_in_the_queue_alone() {
        let of = |queue| {
            let scene = Scene { priorities: Some(Priorities { urgent: 0.1, queue }), ..Scene::default() };
            run(Plan { load: Load::SharedPrefix, rate: 8.0, scene, ..PLAN }, Way::CostGuessed).expect("a run")
        };
        let (queue, none) = (of(true), of(false));
        assert!(queue.ttft_p90_s * 5.0 < none.ttft_p90_s, "{queue:?} {none:?}");
        assert!(queue.lower > queue.requests, "the others are not forgotten: {queue:?}");
    }

    #[test]
    fn engines_that_go_take_their_requests_with_them() {
        let calm = guessed(Scene::default());
        let stormy = guessed(Scene { churn: Some(Churn { every_s: 3.0, away_s: 2.0 }), ..Scene::default() });
        assert_eq!(calm.lost, 0);
        assert!(stormy.lost > 0 && stormy.lost < stormy.requests / 2, "{stormy:?}");
        assert!(stormy.cached < calm.cached, "they come back with nothing");
    }

    #[test]
    fn prompts_that_are_computed_elsewhere_disturb_nobody() {
        let scene = Scene { prefill: 2, ..Scene::default() };
        let of = |scene| run(Plan { rate: 0.5, scene, ..PLAN }, Way::CostModel).expect("a run");
        let (apart, both) = (of(scene), of(Scene::default()));
        assert!(apart.between_p90_s < both.between_p90_s, "{apart:?} {both:?}");
        assert!(apart.cached > 0.5 && apart.unanswered < apart.requests / 20, "{apart:?}");
    }

    #[test]
    fn a_processor_for_two_is_half_of_one_each() {
        let of = |processor| {
            let scene = Scene { processor, ..Scene::default() };
            let plan = Plan { load: Load::Notebooks, engines: 2, seconds: 1e5, warm_s: 0.0, scene, ..PLAN };
            run(plan, Way::RoundRobin).expect("a run")
        };
        let (each, two, shared) = (of(None), of(Some(2.0)), of(Some(1.0)));
        assert_eq!((each.requests, each.unanswered), (96, 0));
        assert!((two.ttft_p50_s / each.ttft_p50_s - 1.0).abs() < 0.05, "but for ties: {each:?} {two:?}");
        assert!(shared.ttft_p50_s > 1.3 * each.ttft_p50_s, "{shared:?}");
    }
}
