//! The simulated world: requests arrive, the router's own code decides, engines step, their events
//! reach the index, scrapes tell of them.

#![expect(clippy::cast_sign_loss, reason = "simulated times are never below zero")]

use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::cache::Change;
use super::engine::{Job, Model, SimEngine, Step};
use super::load::{self, BLOCK, Maker, Session};
use super::outcome::{Outcome, Served};
use super::schedule::Schedule;
use super::{Plan, Way};
use crate::approximate::Recent;
use crate::books::{Books, Promise};
use crate::decider::Decider;
use crate::limits;
use crate::view::{Held, Look};
use kvcellar_block::error::Result;
use kvcellar_events::wire::{Batch, BatchArena, Event as Told, Hashes, Parent, Removed, Stored};
use kvcellar_index::Index;
use kvcellar_index::keys::{self, Extras};
use kvcellar_index::query::PrefixScorer;
use kvcellar_index::roster::EngineId;
use kvcellar_index::tiers::{TIERS, Weights};

/// How long an engine's events take to the index; between two scrapes on average; between two looks
/// for what did not come. In s, as in a router.
const EVENTS_S: f64 = 0.02;
const SCRAPE_S: f64 = 0.5;
const EXPIRE_S: f64 = 0.05;

#[derive(Debug)]
enum Happening {
    Arrival,
    Turn(Session),
    /// A step ends.
    Stepped(usize, Step),
    Events(usize, Vec<Change>),
    Scrape(usize),
    /// The index drops what was expected and did not come.
    Expire,
}

/// A request that was routed.
#[derive(Debug)]
struct Open {
    session: Option<Session>,
    began_s: f64,
    first_s: Option<f64>,
    /// Where it is booked.
    number: u64,
    tokens: u32,
    cached: u32,
    /// What was expected to be cached, and how old that was, in blocks.
    expected: (usize, u64),
}

/// What the router knows of an engine.
#[derive(Debug)]
struct Known {
    told: Look,
    books: Books,
    recent: Recent,
}

pub(super) struct World {
    plan: Plan,
    way: Way,
    schedule: Schedule<Happening>,
    engines: Vec<SimEngine>,
    known: Vec<Known>,
    ids: Vec<EngineId>,
    index: Arc<Index>,
    scorer: PrefixScorer,
    arena: BatchArena,
    maker: Maker,
    traffic: fastrand::Rng,
    ties: fastrand::Rng,
    open: Vec<Open>,
    decider: Decider,
}

impl World {
    pub(super) fn new(plan: Plan, way: Way) -> Result<Self> {
        let index = Arc::new(Index::new(1, 1 << 30)?);
        let ids = (0..plan.engines)
            .map(|number| index.write().engine(&number.to_string(), ""))
            .collect::<Result<Vec<_>>>()?;
        let model = Model::default();
        let told = Look { kv_tokens: model.gpu_blocks as u64 * u64::from(BLOCK), ..Look::default() };
        let known = || Known { told, books: Books::default(), recent: Recent::new(model.gpu_blocks) };
        Ok(Self {
            plan,
            way,
            schedule: Schedule::new(),
            engines: (0..plan.engines).map(|_| SimEngine::new(model)).collect(),
            known: (0..plan.engines).map(|_| known()).collect(),
            ids,
            index,
            scorer: PrefixScorer::default(),
            arena: BatchArena::default(),
            maker: Maker::new(plan.load, plan.engines),
            traffic: fastrand::Rng::with_seed(plan.seed),
            ties: fastrand::Rng::with_seed(plan.seed ^ 0x7e5),
            open: Vec::new(),
            decider: Decider::new(way.policy()),
        })
    }

    pub(super) fn run(mut self) -> Outcome {
        let end_s = self.plan.warm_s + self.plan.seconds;
        let mut work_before = Vec::new();
        self.schedule.after(0.0, Happening::Arrival);
        for at in 0..self.engines.len() {
            self.schedule.after(self.ties.f64() * SCRAPE_S, Happening::Scrape(at));
        }
        self.schedule.after(EXPIRE_S, Happening::Expire);
        while let Some(what) = self.schedule.next() {
            let now_s = self.schedule.now_s();
            if now_s > end_s {
                break;
            }
            if work_before.is_empty() && now_s >= self.plan.warm_s {
                work_before = self.engines.iter().map(|engine| engine.work_s).collect();
            }
            match what {
                Happening::Arrival => {
                    let rate = self.plan.load.shape().rate * self.plan.rate * self.plan.engines as f64;
                    let next_s = load::pause(&mut self.traffic, 1.0 / rate);
                    self.schedule.after(next_s, Happening::Arrival);
                    let session = self.maker.begin(&mut self.traffic);
                    self.ask(session);
                }
                Happening::Turn(mut session) => {
                    self.maker.go_on(&mut session);
                    self.ask(session);
                }
                Happening::Stepped(at, step) => {
                    self.stepped(at, step);
                    self.step(at);
                }
                Happening::Events(at, changes) => self.tell(at, &changes),
                Happening::Scrape(at) => self.scrape(at),
                Happening::Expire => {
                    self.index.write().expire((now_s * 1e3) as u64);
                    self.schedule.after(EXPIRE_S, Happening::Expire);
                }
            }
        }
        self.outcome(&work_before, end_s)
    }

    /// A request comes: the decision, as the router makes it.
    fn ask(&mut self, session: Session) {
        let now_s = self.schedule.now_s();
        let tokens = session.prompt.len() as u32 * BLOCK;
        let contents: Vec<u32> = session.prompt.iter().chain(&session.said).copied().collect();
        let mut parent = 1;
        let next = |content: &u32| {
            parent = xxh3_64_with_seed(&content.to_le_bytes(), parent);
            parent
        };
        let hashes: Vec<u64> = contents.iter().map(next).collect();
        let prompt = session.prompt.len();
        let keys = if self.way.asks_index() { keys_of(&session.prompt) } else { Vec::new() };
        let held = self.held(&keys, &hashes[..prompt], tokens);
        let look = |(known, held): (&Known, &Held)| Look { held: *held, ..known.books.look(now_s, known.told) };
        let looks: Vec<Look> = self.known.iter().zip(&held).map(look).collect();
        let best = held.iter().map(|e| e.tokens).max().unwrap_or(0);
        let prefix = (best / BLOCK).checked_sub(1).map(|last| hashes[last as usize]);
        let Some(decided) = self.decider.decide(tokens, prefix, &looks, &mut self.ties) else { return };
        let at = decided.choice.chosen;
        let known = &mut self.known[at];
        known.told.cold_turn = decided.cold_turn.unwrap_or(known.told.cold_turn);
        let number = known.books.book(now_s, Promise { tokens, held: held[at].tokens, streams: true });
        let age = known.recent.give(&hashes[..prompt]);
        if self.way.asks_index() {
            self.index.write().expect(self.ids[at], &keys, (now_s * 1e3) as u64 + limits::EXPECT_MS);
        }
        self.engines[at].push(Job::new(self.open.len(), hashes, contents, prompt, session.answer));
        let expected = ((held[at].tokens / BLOCK) as usize, age);
        self.open.push(Open {
            session: Some(session),
            began_s: now_s,
            first_s: None,
            number,
            tokens,
            cached: 0,
            expected,
        });
        if !self.engines[at].is_stepping {
            self.step(at);
        }
    }

    fn held(&mut self, keys: &[u64], hashes: &[u64], tokens: u32) -> Vec<Held> {
        // The last block of a prompt is always computed.
        let most = tokens - BLOCK;
        let mut held = vec![Held::default(); self.engines.len()];
        match self.way {
            Way::Random | Way::RoundRobin | Way::LoadOnly => {}
            Way::Approximate => {
                for (held, known) in held.iter_mut().zip(&self.known) {
                    let found = (known.recent.held(hashes) as u32 * BLOCK).min(most);
                    let mut tiers = [0; TIERS];
                    tiers[0] = found;
                    *held = Held { tokens: found, tiers, share: f64::from(found) / f64::from(tokens) };
                }
            }
            Way::Precise | Way::CostModel => {
                for score in self.index.score(&mut self.scorer, keys, None, &Weights::default()) {
                    let tiers = score.tiers.map(|blocks| blocks * BLOCK);
                    held[score.engine.0 as usize] =
                        Held { tokens: (score.blocks * BLOCK).min(most), tiers, share: score.score };
                }
            }
        }
        held
    }

    /// An engine begins a step, if it has anything to do.
    fn step(&mut self, at: usize) {
        let engine = &mut self.engines[at];
        engine.is_stepping = !engine.is_idle();
        if !engine.is_stepping {
            return;
        }
        let step = engine.step();
        let changes = std::mem::take(&mut engine.cache.changes);
        if !changes.is_empty() && self.way.asks_index() {
            self.schedule.after(step.seconds + EVENTS_S, Happening::Events(at, changes));
        }
        self.schedule.after(step.seconds, Happening::Stepped(at, step));
    }

    /// A step has ended: tokens come out.
    fn stepped(&mut self, at: usize, step: Step) {
        let now_s = self.schedule.now_s();
        let known = &mut self.known[at];
        for (id, cached) in step.first_tokens {
            let open = &mut self.open[id];
            open.first_s = Some(now_s);
            open.cached = cached;
            known.books.answered(now_s, open.number);
        }
        for id in step.done {
            let open = &mut self.open[id];
            known.books.end(now_s, open.number);
            if self.way == Way::Approximate {
                let (expected, age) = open.expected;
                known.recent.learn(expected, (open.cached / BLOCK) as usize, age);
            }
            if let Some(mut session) = open.session.take().filter(|session| session.left > 0) {
                let pause_s = load::pause(&mut session.random, self.plan.load.shape().pause_s);
                self.schedule.after(pause_s, Happening::Turn(session));
            }
        }
    }

    /// An engine's events arrive at the index.
    fn tell(&mut self, at: usize, changes: &[Change]) {
        let mut writer = self.index.write();
        for change in changes {
            self.arena.clear();
            let hashes = Hashes { range: 0..1, digests: None };
            let stored = |parent, tokens, medium| {
                let hashes = hashes.clone();
                Stored { hashes, parent, tokens, block_size: 1, medium: Some(medium), ..Stored::default() }
            };
            let removed =
                |medium| Told::Removed(Removed { hashes: hashes.clone(), medium: Some(medium), ..Removed::default() });
            let events = match *change {
                Change::Stored(hash, parent, content) => {
                    self.arena.hashes.push(hash);
                    self.arena.tokens.push(content);
                    vec![Told::Stored(Box::new(stored(parent.map(Parent::Number), 0..1, "GPU")))]
                }
                Change::Moved(hash) => {
                    self.arena.hashes.push(hash);
                    vec![Told::Stored(Box::new(stored(None, 0..0, "CPU"))), removed("GPU")]
                }
                Change::Dropped(hash) => {
                    self.arena.hashes.push(hash);
                    vec![removed("CPU")]
                }
            };
            writer.apply(self.ids[at], &Batch { events, ..Batch::default() }, &self.arena);
        }
    }

    fn scrape(&mut self, at: usize) {
        let (waiting, running, usage) = self.engines[at].told();
        let told = &mut self.known[at].told;
        (told.waiting, told.running, told.kv_usage) = (waiting as f64, running as f64, usage);
        let jitter = 0.8 + 0.4 * self.ties.f64();
        self.schedule.after(SCRAPE_S * jitter, Happening::Scrape(at));
    }

    fn outcome(&self, work_before: &[f64], end_s: f64) -> Outcome {
        let counts = |open: &&Open| open.began_s >= self.plan.warm_s;
        // One that was not answered waits at least until now.
        let served = |open: &Open| Served {
            ttft_s: open.first_s.unwrap_or(end_s) - open.began_s,
            tokens: open.first_s.map(|_| (open.tokens, open.cached)),
        };
        let served: Vec<Served> = self.open.iter().filter(counts).map(served).collect();
        let work = self.engines.iter().zip(work_before).map(|(engine, before)| engine.work_s - before);
        Outcome::of(&served, &work.collect::<Vec<f64>>(), self.plan.seconds)
    }
}

fn keys_of(prompt: &[u32]) -> Vec<u64> {
    let mut found = Vec::new();
    keys::of_prompt(keys::root("", None), prompt, 1, &Extras::default(), &mut found);
    found
}
