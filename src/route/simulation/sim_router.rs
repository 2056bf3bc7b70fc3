//! A router of the simulated world: the real one's books, guesses, index, decider, flow control and
//! news, without the network around them.

#![expect(clippy::cast_sign_loss, reason = "simulated times are never below zero")]

use std::sync::Arc;

use super::cache::Change;
use super::engine::Model;
use super::load::BLOCK;
use super::{Plan, Way};
use crate::approximate::Recent;
use crate::books::{Books, Promise};
use crate::breaker::Breaker;
use crate::choose::choose;
use crate::decider::Decider;
use crate::engines::trusted_by;
use crate::hall::{EngineRoom, Hall, HallSettings};
use crate::limits;
use crate::peers::follower::{Follower, tell};
use crate::peers::hear::{Listener, hear};
use crate::peers::journal::Journal;
use crate::peers::news::{Aged, News, PeerNews};
use crate::queue::QueueBounds;
use crate::retry_budget::RetryBudget;
use crate::two_steps::{PrefillBy, TwoSteps};
use crate::view::{Held, Look, View};
use kvcellar_block::error::Result;
use kvcellar_events::wire::{Batch, BatchArena, Event as Told, Hashes, Parent, Removed, Stored};
use kvcellar_index::Index;
use kvcellar_index::query::PrefixScorer;
use kvcellar_index::roster::EngineId;
use kvcellar_index::tiers::{TIERS, Weights};

/// Flow control as `kvcellar route --queue 5000` sets it up.
const HALL: HallSettings = HallSettings {
    bounds: QueueBounds { requests: 5000, bytes: usize::MAX },
    backlog_s: 0.1,
    concurrency: 0,
    starved_s: 5.0,
};

/// As `--prefill-tokens` is by default.
const TWO_STEPS: TwoSteps = TwoSteps { by: PrefillBy::Router, tokens_min: 512 };

/// A prompt as a router knows it.
#[derive(Debug, Clone)]
pub(super) struct SimPrompt {
    /// Hashes of its blocks.
    pub(super) hashes: Vec<u64>,
    /// The index's names of them.
    pub(super) keys: Vec<u64>,
    /// Its tokens.
    pub(super) tokens: u32,
}

/// Where a request goes.
#[derive(Debug, Clone)]
pub(super) struct Routed {
    /// Engines with what each holds, best first.
    pub(super) order: Vec<(usize, Held)>,
    /// The engine that computes its prompt for the first of them.
    pub(super) prefill: Option<(usize, Held)>,
}

/// A request in an engine's books.
#[derive(Debug, Clone, Copy)]
pub(super) struct Promised {
    /// Its number there.
    pub(super) number: u64,
    /// How old the prompt was in the guess, in blocks.
    pub(super) age: u64,
    /// The engine is on trial.
    pub(super) is_trial: bool,
}

/// What a router knows of an engine.
#[derive(Debug)]
struct Known {
    name: Arc<str>,
    told: Look,
    books: Books,
    recent: Recent,
    breaker: Breaker,
    is_usable: bool,
}

/// A router.
#[derive(Debug)]
pub(super) struct SimRouter {
    way: Way,
    prefill: usize,
    known: Vec<Known>,
    index: Option<(Arc<Index>, Vec<EngineId>)>,
    scorer: PrefixScorer,
    arena: BatchArena,
    decider: Decider,
    ties: fastrand::Rng,
    /// What it tells others, where they share.
    journal: Option<Journal>,
    /// Where requests wait, if they do.
    pub(super) hall: Option<Hall>,
    /// What it may send a second time.
    pub(super) retries: RetryBudget,
    /// The time of what is heard now.
    now_s: f64,
}

impl SimRouter {
    pub(super) fn new(plan: &Plan, way: Way, number: u64) -> Result<Self> {
        let model = Model::of(plan.load);
        let index = way.asks_index().then(|| {
            let index = Arc::new(Index::new(1, 1 << 30)?);
            let engine = |at: usize| index.write().engine(&at.to_string(), "");
            let ids = (0..plan.engines).map(engine).collect::<Result<Vec<_>>>()?;
            Ok((index, ids))
        });
        let told = Look { kv_tokens: model.gpu_blocks as u64 * u64::from(BLOCK), ..Look::default() };
        let known = |at: usize| Known {
            name: at.to_string().into(),
            told,
            books: Books::default(),
            recent: Recent::new(model.gpu_blocks),
            breaker: Breaker::default(),
            is_usable: true,
        };
        Ok(Self {
            way,
            prefill: plan.scene.prefill,
            known: (0..plan.engines).map(known).collect(),
            index: index.transpose()?,
            scorer: PrefixScorer::default(),
            arena: BatchArena::default(),
            decider: Decider::new(way.policy()),
            ties: fastrand::Rng::with_seed(plan.seed ^ 0x7e5 ^ (number << 32)),
            journal: plan.scene.shares.then(|| Journal::new(number + 1)),
            hall: plan.scene.priorities.filter(|flow| flow.queue).map(|_| Hall::new(HALL)),
            retries: RetryBudget::default(),
            now_s: 0.0,
        })
    }

    fn push(&self, now_s: f64, news: News) {
        if let Some(journal) = &self.journal {
            journal.push_at(now_s, news);
        }
    }

    fn may(&self, at: usize, now_s: f64) -> bool {
        self.known[at].is_usable && self.known[at].breaker.admits(now_s)
    }

    /// Engines that may take a request, of those that are there for it.
    fn candidates(&self, engines: std::ops::Range<usize>, now_s: f64) -> Vec<usize> {
        let usable: Vec<usize> = engines.filter(|at| self.known[*at].is_usable).collect();
        trusted_by(usable, |at| self.known[*at].breaker.admits(now_s))
    }

    fn looks(&self, now_s: f64, engines: &[usize], held: &[Held]) -> Vec<Look> {
        let look = |at: &usize| {
            let known = &self.known[*at];
            Look { held: held[*at], ..known.books.look(now_s, known.told) }
        };
        engines.iter().map(look).collect()
    }

    /// The decision, as the router makes it. `None`: nobody can take the request.
    pub(super) fn decide(&mut self, now_s: f64, asked: &SimPrompt) -> Option<Routed> {
        let engines = self.candidates(self.prefill..self.known.len(), now_s);
        let held = self.held(asked);
        let looks = self.looks(now_s, &engines, &held);
        let best = looks.iter().map(|look| look.held.tokens).max().unwrap_or(0);
        let prefix = (best / BLOCK).checked_sub(1).map(|last| asked.hashes[last as usize]);
        let decided = self.decider.decide(asked.tokens, prefix, &looks, &mut self.ties)?;
        let chosen = engines[decided.choice.chosen];
        if let Some(turn) = decided.cold_turn {
            self.known[chosen].told.cold_turn = turn;
        }
        if let Some((prefix, change_s)) = decided.credit {
            self.push(now_s, News::Credit { prefix, change_s });
        }
        let order = decided.choice.order.iter().map(|at| (engines[*at], held[engines[*at]])).collect();
        self.retries.earn();
        let prefill = self.first_step(now_s, asked, &held, chosen, decided.number);
        Some(Routed { order, prefill })
    }

    /// The engine that computes the prompt for the chosen one, if that pays.
    fn first_step(
        &mut self,
        now_s: f64,
        asked: &SimPrompt,
        held: &[Held],
        chosen: usize,
        turn: u64,
    ) -> Option<(usize, Held)> {
        if self.prefill == 0 || !TWO_STEPS.pay(asked.tokens, held[chosen].tokens) {
            return None;
        }
        let engines: Vec<usize> = (0..self.prefill).filter(|at| self.may(*at, now_s)).collect();
        let looks = self.looks(now_s, &engines, held);
        let view = View { prompt_tokens: asked.tokens, credit_s: 0.0, engines: &looks };
        let at = engines[choose(&self.way.policy(), &view, turn, &mut self.ties)?.chosen];
        Some((at, held[at]))
    }

    /// Books a request at an engine, and takes the engine to hold its prompt from now on.
    pub(super) fn promise(&mut self, now_s: f64, at: usize, held: u32, asked: &SimPrompt) -> Promised {
        let promise = Promise { tokens: asked.tokens, held, streams: true };
        let known = &mut self.known[at];
        let number = known.books.book(now_s, promise);
        let is_trial = known.breaker.begin(now_s);
        let age = known.recent.give(&asked.hashes);
        let name = Arc::clone(&known.name);
        self.push(now_s, News::booked(&name, number, promise));
        match &self.index {
            Some((index, ids)) => {
                index.write().expect(ids[at], &asked.keys, (now_s * 1e3) as u64 + limits::EXPECT_MS);
            }
            None if self.way.guesses() => self.push(now_s, News::Given { engine: name, hashes: asked.hashes.clone() }),
            None => {}
        }
        Promised { number, age, is_trial }
    }

    /// A request's first token has come.
    pub(super) fn answered(&mut self, now_s: f64, at: usize, number: u64) {
        let known = &mut self.known[at];
        known.books.answered(now_s, number);
        known.breaker.succeeded();
        let engine = Arc::clone(&known.name);
        self.push(now_s, News::Answered { engine, number });
    }

    /// A request has ended.
    pub(super) fn ended(&mut self, now_s: f64, at: usize, number: u64) {
        let known = &mut self.known[at];
        known.books.end(now_s, number);
        let engine = Arc::clone(&known.name);
        self.push(now_s, News::Ended { engine, number });
    }

    /// A request has failed, and its engine with it.
    pub(super) fn failed(&mut self, now_s: f64, at: usize, promised: Promised) {
        self.ended(now_s, at, promised.number);
        self.known[at].breaker.failed(now_s, promised.is_trial);
    }

    /// An engine takes no connection: it gets nothing before it answers a scrape.
    pub(super) fn refused(&mut self, now_s: f64, at: usize, promised: Promised) {
        self.failed(now_s, at, promised);
        self.known[at].is_usable = false;
    }

    /// Where a request goes on that failed at one of its engines.
    pub(super) fn next_of(&self, now_s: f64, order: &[(usize, Held)], failed: usize) -> Option<usize> {
        (failed + 1..order.len()).find(|place| self.may(order[*place].0, now_s))
    }

    /// An engine said how much of a prompt it had.
    pub(super) fn reported(&mut self, at: usize, expected: usize, found: usize, age: u64) {
        if self.way.guesses() {
            self.known[at].recent.learn(expected, found, age);
        }
    }

    /// What an engine says of itself; `None`: it does not answer.
    pub(super) fn scraped(&mut self, at: usize, told: Option<(usize, usize, f64)>) {
        let known = &mut self.known[at];
        let Some((waiting, running, usage)) = told else {
            known.is_usable = false;
            return;
        };
        (known.told.waiting, known.told.running, known.told.kv_usage) = (waiting as f64, running as f64, usage);
        known.is_usable = true;
    }

    /// An engine is another process now, which holds nothing.
    pub(super) fn restarted(&mut self, at: usize) {
        let known = &mut self.known[at];
        known.recent.clear();
        known.breaker = Breaker::default();
        if let Some((index, ids)) = &self.index {
            index.write().forget(ids[at]);
        }
    }

    /// What engines have room for.
    pub(super) fn room(&self, now_s: f64) -> EngineRoom {
        let room_at = |engines: Vec<usize>| {
            let mut room = EngineRoom::default();
            for known in engines.into_iter().map(|at| &self.known[at]) {
                room.add(&HALL, &known.books.backlog(now_s), known.told.waiting);
            }
            room
        };
        let room = room_at(self.candidates(self.prefill..self.known.len(), now_s));
        match self.prefill {
            0 => room.or_refusal(),
            count => room.and(room_at(self.candidates(0..count, now_s))).or_refusal(),
        }
    }

    fn held(&mut self, asked: &SimPrompt) -> Vec<Held> {
        // The last block of a prompt is always computed.
        let most = asked.tokens - BLOCK;
        let mut held = vec![Held::default(); self.known.len()];
        if let Some((index, _)) = &self.index {
            for score in index.score(&mut self.scorer, &asked.keys, None, &Weights::default()) {
                let tiers = score.tiers.map(|blocks| blocks * BLOCK);
                held[score.engine.0 as usize] =
                    Held { tokens: (score.blocks * BLOCK).min(most), tiers, share: score.score };
            }
        } else if self.way.guesses() {
            for (held, known) in held.iter_mut().zip(&self.known) {
                let found = (known.recent.held(&asked.hashes) as u32 * BLOCK).min(most);
                let mut tiers = [0; TIERS];
                tiers[0] = found;
                *held = Held { tokens: found, tiers, share: f64::from(found) / f64::from(asked.tokens) };
            }
        }
        held
    }

    /// The index drops what was expected and did not come.
    pub(super) fn expire(&mut self, now_s: f64) {
        if let Some((index, _)) = &self.index {
            index.write().expire((now_s * 1e3) as u64);
        }
    }

    /// An engine's events arrive at the index.
    pub(super) fn events(&mut self, at: usize, changes: &[Change]) {
        let Some((index, ids)) = &self.index else { return };
        let mut writer = index.write();
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
            writer.apply(ids[at], &Batch { events, ..Batch::default() }, &self.arena);
        }
    }

    /// Answers another router, which follows this one so.
    pub(super) fn tells(&self, now_s: f64, follower: &Follower) -> Option<PeerNews> {
        let journal = self.journal.as_ref()?;
        // At the beginning of a run there is nothing.
        Some(tell(journal, now_s, follower.wanted(), Vec::new(), Vec::new))
    }

    /// Hears what another router told.
    pub(super) fn hears(&mut self, now_s: f64, instance: u64, news: &[Aged]) {
        self.now_s = now_s;
        for aged in news {
            hear(self, instance, aged.ago_s(), &aged.1);
        }
    }

    fn find(&mut self, engine: &str) -> Option<&mut Known> {
        self.known.get_mut(engine.parse::<usize>().ok()?)
    }
}

impl Listener for SimRouter {
    fn books(&mut self, engine: &str, change: impl FnOnce(&mut Books, f64)) {
        let now_s = self.now_s;
        if let Some(known) = self.find(engine) {
            change(&mut known.books, now_s);
        }
    }

    fn given(&mut self, engine: &str, hashes: &[u64]) {
        if let Some(known) = self.find(engine) {
            known.recent.used(hashes);
        }
    }

    fn session(&mut self, _session: u64, _engine: &Arc<str>) {
        // No simulated way looks at sessions.
    }

    fn decider(&mut self, change: impl FnOnce(&mut Decider)) {
        change(&mut self.decider);
    }
}
