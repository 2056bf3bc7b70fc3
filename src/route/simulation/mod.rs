//! A fleet in a computer's head: the router's real scorers, cost model, guesses and index against modelled engines. Seeded, so that a run repeats.

#![expect(clippy::cast_sign_loss, reason = "simulated times and shares are never below zero")]

pub mod engine;
pub mod load;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::approximate::Recent;
use super::choose::{Policy, choose};
use super::cost::Cost;
use super::speed::Speed;
use super::view::{Held, Look, Rates, View};
use crate::error::Result;
use crate::events::wire::{Arena, Batch, Event as Told, Hashes, Parent, Removed, Stored};
use crate::index::Index;
use crate::index::keys::{self, Extras};
use crate::index::query::Scorer;
use crate::index::roster::EngineId;
use crate::index::tiers::{TIERS, Weights};
use engine::{Change, Job, Model, SimEngine};
use load::{BLOCK, Load, Maker, Session};

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

    fn policy(self, cost: Cost) -> Policy {
        match self {
            Self::Random => Policy::random(),
            Self::RoundRobin => Policy::RoundRobin,
            Self::LoadOnly => Policy::load(),
            Self::Approximate | Self::Precise => Policy::field(),
            Self::CostModel => Policy::Cost(cost),
        }
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
    /// The cost model's weights.
    pub cost: Cost,
}

/// What came out.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// Requests that counted.
    pub requests: usize,
    /// Of those, how many had not begun to be answered at the end.
    pub unanswered: usize,
    /// Time to the first token, in s.
    pub ttft_p50_s: f64,
    /// Nine of ten are below.
    pub ttft_p90_s: f64,
    /// Ninety-nine of a hundred are below.
    pub ttft_p99_s: f64,
    /// Share of prompt tokens that were cached.
    pub cached: f64,
    /// Busiest engine's time in steps over the mean.
    pub imbalance: f64,
    /// Mean share of time in which an engine was busy.
    pub busy: f64,
}

/// How long an engine's events take to the index, and between two scrapes, in s.
const EVENTS_S: f64 = 0.02;
const SCRAPE_S: f64 = 0.5;

#[derive(Debug)]
enum Happening {
    Arrival,
    Turn(Session),
    Step(usize),
    Events(usize, Vec<Change>),
    Scrape,
}

struct Scheduled(f64, u64, Happening);

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0).then(self.1.cmp(&other.1))
    }
}

/// A request's books.
#[derive(Debug)]
struct Open {
    session: Session,
    began_s: f64,
    first_s: Option<f64>,
    tokens: u32,
    uncomputed: u32,
    ahead: u64,
    cached: u32,
}

/// What the router knows of an engine.
#[derive(Debug, Default)]
struct Known {
    look: Look,
    speed: Speed,
    recent: Recent,
}

struct World {
    plan: Plan,
    way: Way,
    policy: Policy,
    now_s: f64,
    count: u64,
    queue: BinaryHeap<Reverse<Scheduled>>,
    engines: Vec<SimEngine>,
    known: Vec<Known>,
    ids: Vec<EngineId>,
    index: Arc<Index>,
    scorer: Scorer,
    arena: Arena,
    maker: Maker,
    traffic: fastrand::Rng,
    ties: fastrand::Rng,
    open: Vec<Open>,
    turn: u64,
}

/// Simulates one way through one plan.
///
/// # Errors
/// Those of the index.
pub fn run(plan: Plan, way: Way) -> Result<Outcome> {
    let index = Arc::new(Index::new(1, 1 << 30)?);
    let ids =
        (0..plan.engines).map(|number| index.write().engine(&number.to_string(), "")).collect::<Result<Vec<_>>>()?;
    let model = Model::default();
    let rates = Rates { load: [1e9, model.load, 1e5, 1e4, 1e4, 1e9], ..Rates::default() };
    let look = Look { kv_tokens: model.gpu_blocks as u64 * u64::from(BLOCK), ..Look::default() };
    let known = || Known { look, speed: Speed::new(rates), recent: Recent::new(model.gpu_blocks) };
    let mut world = World {
        plan,
        way,
        policy: way.policy(plan.cost),
        now_s: 0.0,
        count: 0,
        queue: BinaryHeap::new(),
        engines: (0..plan.engines).map(|_| SimEngine::new(model)).collect(),
        known: (0..plan.engines).map(|_| known()).collect(),
        ids,
        index,
        scorer: Scorer::default(),
        arena: Arena::default(),
        maker: Maker::new(plan.load, plan.engines),
        traffic: fastrand::Rng::with_seed(plan.seed),
        ties: fastrand::Rng::with_seed(plan.seed ^ 0x7e5),
        open: Vec::new(),
        turn: 0,
    };
    world.schedule(0.0, Happening::Arrival);
    world.schedule(0.0, Happening::Scrape);
    Ok(world.go())
}

impl World {
    fn schedule(&mut self, after_s: f64, what: Happening) {
        self.count += 1;
        self.queue.push(Reverse(Scheduled(self.now_s + after_s, self.count, what)));
    }

    fn go(mut self) -> Outcome {
        let end_s = self.plan.warm_s + self.plan.seconds;
        let mut busy_before = Vec::new();
        while let Some(Reverse(Scheduled(at_s, _, what))) = self.queue.pop() {
            if at_s > end_s {
                break;
            }
            self.now_s = at_s;
            if busy_before.is_empty() && at_s >= self.plan.warm_s {
                busy_before = self.engines.iter().map(|engine| engine.busy_s).collect();
            }
            match what {
                Happening::Arrival => {
                    let rate = self.plan.load.shape().rate * self.plan.rate * self.plan.engines as f64;
                    let next = load::pause(&mut self.traffic, 1.0 / rate);
                    self.schedule(next, Happening::Arrival);
                    let session = self.maker.begin(&mut self.traffic);
                    self.ask(session);
                }
                Happening::Turn(mut session) => {
                    self.maker.go_on(&mut session, &mut self.traffic);
                    self.ask(session);
                }
                Happening::Step(at) => self.step(at),
                Happening::Events(at, changes) => self.tell(at, &changes),
                Happening::Scrape => self.scrape(),
            }
        }
        self.outcome(&busy_before)
    }

    /// A request comes: the decision, as the router makes it.
    fn ask(&mut self, session: Session) {
        let tokens = session.prompt.len() as u32 * BLOCK;
        let mut parent = 1;
        let next = |content: &u32| {
            parent = xxh3_64_with_seed(&content.to_le_bytes(), parent);
            parent
        };
        let hashes: Vec<u64> = session.prompt.iter().map(next).collect();
        let held = self.held(&session.prompt, &hashes, tokens);
        let looks: Vec<Look> = self
            .known
            .iter()
            .zip(&held)
            .map(|(known, held)| Look { held: *held, rates: known.speed.rates(), ..known.look })
            .collect();
        let view = View { prompt_tokens: tokens, engines: &looks };
        let Some(choice) = choose(&self.policy, &view, self.turn, &mut self.ties) else { return };
        self.turn += 1;
        let at = choice.chosen;
        let uncomputed = tokens - held[at].tokens.min(tokens);
        let known = &mut self.known[at];
        if held.iter().all(|it| it.tokens == 0) {
            known.look.cold_turn = self.turn;
        }
        known.look.our_requests += 1;
        known.look.our_unanswered += 1;
        known.look.our_tokens += u64::from(tokens);
        known.look.our_uncomputed += u64::from(uncomputed);
        let ahead = known.look.our_uncomputed;
        known.recent.used(&hashes);
        if matches!(self.way, Way::Precise | Way::CostModel) {
            let keys = keys_of(&session.prompt);
            self.index.write().expect(self.ids[at], &keys, (self.now_s * 1e3) as u64 + crate::limits::EXPECT_MS);
        }
        let job = Job::new(self.open.len(), hashes, session.prompt.clone(), session.answer);
        self.open.push(Open { session, began_s: self.now_s, first_s: None, tokens, uncomputed, ahead, cached: 0 });
        self.engines[at].push(job);
        if !self.engines[at].is_stepping {
            self.engines[at].is_stepping = true;
            self.schedule(0.0, Happening::Step(at));
        }
    }

    fn held(&mut self, prompt: &[u32], hashes: &[u64], tokens: u32) -> Vec<Held> {
        let count = self.engines.len();
        match self.way {
            Way::Random | Way::RoundRobin | Way::LoadOnly => vec![Held::default(); count],
            Way::Approximate => {
                let held = |known: &Known| {
                    let held = (known.recent.held(hashes) as u32 * BLOCK).min(tokens - BLOCK);
                    let mut tiers = [0; TIERS];
                    tiers[0] = held;
                    Held { tokens: held, tiers, share: f64::from(held) / f64::from(tokens) }
                };
                self.known.iter().map(held).collect()
            }
            Way::Precise | Way::CostModel => {
                self.index.write().expire((self.now_s * 1e3) as u64);
                let mut held = vec![Held::default(); count];
                let keys = keys_of(prompt);
                for score in self.index.score(&mut self.scorer, &keys, None, &Weights::default()) {
                    let at = score.engine.0 as usize;
                    let found = (score.blocks * BLOCK).min(tokens - BLOCK);
                    held[at] =
                        Held { tokens: found, tiers: score.tiers.map(|blocks| blocks * BLOCK), share: score.score };
                }
                held
            }
        }
    }

    fn step(&mut self, at: usize) {
        let engine = &mut self.engines[at];
        if engine.is_idle() {
            engine.is_stepping = false;
            return;
        }
        let step = engine.step();
        let changes = std::mem::take(&mut engine.changes);
        if !changes.is_empty() && matches!(self.way, Way::Precise | Way::CostModel) {
            self.schedule(step.seconds + EVENTS_S, Happening::Events(at, changes));
        }
        let end_s = self.now_s + step.seconds;
        for (id, cached) in step.first_tokens {
            let open = &mut self.open[id];
            open.first_s = Some(end_s);
            open.cached = cached;
            let look = &mut self.known[at].look;
            look.our_unanswered -= 1;
            look.our_uncomputed -= u64::from(open.uncomputed);
            let took_s = end_s - open.began_s;
            self.known[at].speed.answered(open.ahead, took_s);
        }
        for id in step.done {
            let open = &self.open[id];
            let residence = end_s - open.first_s.unwrap_or(end_s);
            let look = &mut self.known[at].look;
            look.our_requests -= 1;
            look.our_tokens -= u64::from(open.tokens);
            self.known[at].speed.ended(residence);
            if open.session.left > 0 {
                let session = open.session.clone();
                let pause = load::pause(&mut self.traffic, self.plan.load.shape().pause_s);
                self.schedule(step.seconds + pause, Happening::Turn(session));
            }
        }
        self.schedule(step.seconds, Happening::Step(at));
    }

    /// An engine's events arrive at the index.
    fn tell(&mut self, at: usize, changes: &[Change]) {
        let mut writer = self.index.write();
        for change in changes {
            self.arena.clear();
            let hashes = Hashes { range: 0..1, digests: None };
            let event = match *change {
                Change::Stored(hash, parent, content) => {
                    self.arena.hashes.push(hash);
                    self.arena.tokens.push(content);
                    let parent = parent.map(Parent::Number);
                    vec![Told::Stored(Box::new(Stored {
                        hashes,
                        parent,
                        tokens: 0..1,
                        block_size: 1,
                        medium: Some("GPU"),
                        ..Stored::default()
                    }))]
                }
                Change::Moved(hash) => {
                    self.arena.hashes.push(hash);
                    let stored =
                        Stored { hashes: hashes.clone(), block_size: 1, medium: Some("CPU"), ..Stored::default() };
                    vec![
                        Told::Stored(Box::new(stored)),
                        Told::Removed(Removed { hashes, medium: Some("GPU"), ..Removed::default() }),
                    ]
                }
                Change::Dropped(hash) => {
                    self.arena.hashes.push(hash);
                    vec![Told::Removed(Removed { hashes, medium: Some("CPU"), ..Removed::default() })]
                }
            };
            writer.apply(self.ids[at], &Batch { events: event, ..Batch::default() }, &self.arena);
        }
    }

    fn scrape(&mut self) {
        for (engine, known) in self.engines.iter().zip(&mut self.known) {
            let (waiting, running, usage) = engine.told();
            known.look.waiting = waiting as f64;
            known.look.running = running as f64;
            known.look.kv_usage = usage;
        }
        self.schedule(SCRAPE_S, Happening::Scrape);
    }

    fn outcome(&self, busy_before: &[f64]) -> Outcome {
        let counted: Vec<&Open> = self.open.iter().filter(|open| open.began_s >= self.plan.warm_s).collect();
        // One that was not answered waits at least until now.
        let mut ttft: Vec<f64> = counted.iter().map(|open| open.first_s.unwrap_or(self.now_s) - open.began_s).collect();
        ttft.sort_by(f64::total_cmp);
        let percentile = |share: f64| {
            ttft.get(((ttft.len() as f64 * share) as usize).min(ttft.len().saturating_sub(1))).copied().unwrap_or(0.0)
        };
        let answered = || counted.iter().filter(|open| open.first_s.is_some());
        let tokens: f64 = answered().map(|open| f64::from(open.tokens)).sum();
        let cached: f64 = answered().map(|open| f64::from(open.cached)).sum();
        let busy: Vec<f64> =
            self.engines.iter().zip(busy_before).map(|(engine, before)| engine.busy_s - before).collect();
        let mean = busy.iter().sum::<f64>() / busy.len().max(1) as f64;
        Outcome {
            requests: counted.len(),
            unanswered: counted.len() - answered().count(),
            ttft_p50_s: percentile(0.5),
            ttft_p90_s: percentile(0.9),
            ttft_p99_s: percentile(0.99),
            cached: cached / tokens.max(1.0),
            imbalance: busy.iter().copied().fold(0.0, f64::max) / mean.max(1e-9),
            busy: mean / self.plan.seconds,
        }
    }
}

fn keys_of(prompt: &[u32]) -> Vec<u64> {
    let mut found = Vec::new();
    keys::of_prompt(keys::root("", None), prompt, 1, &Extras::default(), &mut found);
    found
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
            cost: Cost::default(),
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
}
