//! The decision core that both front ends share: from a request to an engine, and what becomes of
//! it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use lru::LruCache;
use tokio::sync::mpsc;
use xxhash_rust::xxh3::xxh3_64;

use super::aliases::Aliases;
use super::answer::Usage;
use super::booking::{Booking, Verdict};
use super::books::Promise;
use super::choose::{Policy, choose};
use super::decider::Decider;
use super::engine::Engine;
use super::engines::{Engines, trusted};
use super::estimate;
use super::gate::Gate;
use super::metrics::Metrics;
use super::prefix::{self, Found, PrefixSource};
use super::prompt::{Models, Prompt};
use super::remote::Remote;
use super::request::{Kind, Refusal, Request};
use super::retry_budget::RetryBudget;
use super::see::{Decision, Outcome, Ring};
use super::spec::EngineRole;
use super::tokens::Inexact;
use super::traces::{Trace, Traces};
use super::two_steps::{self, PrefillBy, TwoSteps};
use super::upstream::Upstream;
use super::urgency::Objectives;
use super::view::View;
use crate::limits;
use kvcellar_index::Index;
use kvcellar_index::fleet::FleetView;
use kvcellar_index::roster::EngineId;
use kvcellar_index::tiers::Weights;

/// Where prefixes are looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Nowhere: load alone.
    None,
    /// In a guess from earlier decisions.
    Approximate,
    /// In the index that engines' events feed.
    Precise,
}

/// How a router is set up.
#[derive(Debug)]
pub struct Setup {
    /// Where prefixes are looked up.
    pub mode: Mode,
    /// How engines are weighed.
    pub policy: Policy,
    /// What blocks are worth in each tier.
    pub weights: Weights,
    /// The index, in precise mode.
    pub index: Option<Arc<Index>>,
    /// How the events that feed it come.
    pub fleet: Option<FleetView>,
    /// Tokenizers.
    pub models: Models,
    /// Requests in flight at most; 0: no bound.
    pub in_flight_max: usize,
    /// Where requests wait for engines to have room, if they do.
    pub gate: Option<Gate>,
    /// Priorities of objectives.
    pub objectives: Objectives,
    /// Names that clients may use for models.
    pub aliases: Aliases,
    /// When prompts are computed by another engine than the one that goes on with them.
    pub two_steps: TwoSteps,
    /// Of the random numbers that settle ties.
    pub seed: u64,
    /// Where traces go.
    pub traces: Option<Traces>,
}

type Expectation = (EngineId, Vec<u64>);

/// The router.
#[derive(Debug)]
pub struct Router {
    /// The engines.
    pub engines: Arc<Engines>,
    /// Its numbers.
    pub metrics: Metrics,
    /// Its last decisions.
    pub ring: Ring,
    /// How it is set up.
    pub setup: Setup,
    /// The way to engines.
    pub upstream: Upstream,
    /// Asks engines for ids.
    pub remote: Remote,
    /// Bounds what is sent a second time.
    pub retries: RetryBudget,
    sessions: Mutex<LruCache<String, String>>,
    decider: Mutex<(Decider, fastrand::Rng)>,
    in_flight: AtomicU64,
    expect: Option<mpsc::Sender<Expectation>>,
}

impl Router {
    /// A router. To be made within a runtime: in precise mode it starts the task that tells the
    /// index what to expect.
    pub fn new(engines: Arc<Engines>, upstream: Upstream, setup: Setup) -> Arc<Self> {
        let expect = setup.index.clone().map(|index| {
            let (sender, receiver) = mpsc::channel(limits::EXPECT_QUEUE);
            tokio::spawn(tell(index, receiver));
            sender
        });
        let sessions = std::num::NonZeroUsize::new(limits::SESSIONS_MAX).unwrap_or(std::num::NonZeroUsize::MIN);
        Arc::new(Self {
            engines,
            metrics: Metrics::default(),
            ring: Ring::default(),
            remote: Remote::new(upstream.clone()),
            upstream,
            retries: RetryBudget::default(),
            sessions: Mutex::new(LruCache::new(sessions)),
            decider: Mutex::new((Decider::new(setup.policy.clone()), fastrand::Rng::with_seed(setup.seed))),
            in_flight: AtomicU64::new(0),
            expect,
            setup,
        })
    }

    /// Goes on with the model that a request's alias stands for. Requests of one session, or else
    /// of one fairness id, get the same model of those that share a name.
    pub fn resolve(&self, request: &mut Request) {
        let aliases = &self.setup.aliases;
        let Some(name) = request.model.clone().filter(|_| !aliases.is_empty()) else { return };
        let who = request.session.as_deref().or(Some(request.urgency.id.as_str()).filter(|id| !id.is_empty()));
        let key = who.map_or_else(|| fastrand::u64(..), |who| xxh3_64(who.as_bytes()));
        let all = self.engines.all();
        let is_served = |model: &str| all.iter().any(|engine| engine.takes(Some(model)));
        let Some(model) = aliases.model(&name, key, is_served) else { return };
        request.rename(model);
        self.metrics.aliased(&name, model);
    }

    /// Decides where a request goes, and books it there.
    ///
    /// # Errors
    /// [`Refusal`], which is counted.
    pub async fn route(self: &Arc<Self>, request: &Request) -> Result<Ticket, Refusal> {
        let started = Instant::now();
        let trace = self.setup.traces.as_ref().map(|traces| traces.begin(&request.trace, SystemTime::now()));
        match self.decide(request, started).await {
            Ok(mut ticket) => {
                ticket.trace = trace;
                Ok(ticket)
            }
            Err(refusal) => {
                self.metrics.refused(refusal.name());
                if let Some(trace) = trace {
                    trace.refused(refusal.name());
                }
                Err(refusal)
            }
        }
    }

    async fn decide(self: &Arc<Self>, request: &Request, started: Instant) -> Result<Ticket, Refusal> {
        self.shed()?;
        // Refused before it waits, if it would be after.
        let mut engines = self.candidates(request)?;
        let adapter = request.model.as_deref().filter(|model| engines.iter().any(|engine| engine.is_adapter(model)));
        let prompt = self.prompt(request, adapter, &engines).await;
        let pass = match &self.setup.gate {
            Some(gate) if request.kind != Kind::Other || request.model.is_some() => {
                // Models of one engine wait for the same.
                let lane = engines.first().map(|engine| engine.base_model()).unwrap_or_default();
                let pass = gate.enter(&lane, &request.urgency, request.memory()).await?;
                self.metrics.waited(pass.waited);
                engines = self.candidates(request)?;
                self.shed()?;
                Some(pass)
            }
            _ => None,
        };
        let (found, prefix_from) = self.found(&prompt, &engines);
        let session = request.session.as_ref().and_then(|name| self.lock_sessions().get(name).cloned());
        let looks: Vec<_> = engines
            .iter()
            .zip(&found)
            .map(|(engine, found)| engine.look(found.held, adapter, session.as_deref() == Some(&engine.spec.name)))
            .collect();
        let prefix = prefix::longest(&prompt, prefix_from, &found, self.block_tokens());
        let decided = {
            let (decider, random) = &mut *self.decider.lock().unwrap_or_else(PoisonError::into_inner);
            decider.decide(prompt.tokens, prefix, &looks, random)
        };
        let decided = decided.ok_or(Refusal::NoEngine("none is known"))?;
        let choice = decided.choice;
        let chosen = &engines[choice.chosen];
        if let Some(turn) = decided.cold_turn {
            chosen.cold_turn.store(turn, Ordering::Relaxed);
        }
        if let Some(name) = &request.session {
            self.lock_sessions().put(name.clone(), chosen.spec.name.clone());
        }
        let prefill = self.prefill(request, &prompt, adapter, found[choice.chosen], decided.number);
        let took = started.elapsed();
        self.metrics.decided(&chosen.spec.name, prefix_from, took);
        let mut decision =
            Decision::new(decided.number, request, &prompt, prefix_from, &engines, &found, &choice, took);
        decision.prefill.clone_from(&prefill.as_ref().map(|(engine, _)| engine.spec.name.clone()));
        let order = choice.order.iter().map(|at| (Arc::clone(&engines[*at]), found[*at])).collect();
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        self.retries.earn();
        let mut ticket = Ticket {
            router: Arc::clone(self),
            order,
            at: 0,
            booking: None,
            prefill: prefill.map(|(engine, found)| {
                // Its answer, of one token, comes when the prompt is computed.
                let streams = self.setup.two_steps.by == PrefillBy::Router;
                let promise = Promise { tokens: prompt.tokens, held: found.held.tokens, streams };
                Booking::new(engine, promise)
            }),
            prompt,
            age: 0,
            streams: request.streams(),
            decision,
            decided: Instant::now(),
            first_byte: OnceLock::new(),
            due: request.urgency.ttft.and_then(|ttft| started.checked_add(ttft)),
            trace: None,
        };
        ticket.promise();
        drop(pass);
        Ok(ticket)
    }

    /// Refuses what is more than may be in flight.
    fn shed(&self) -> Result<(), Refusal> {
        let open = self.in_flight.load(Ordering::Relaxed) as usize;
        let may = self.setup.in_flight_max == 0 || open < self.setup.in_flight_max;
        if may { Ok(()) } else { Err(Refusal::Shed(open)) }
    }

    /// The engine that is to compute a prompt for the one that goes on with it, if that pays.
    fn prefill(
        &self,
        request: &Request,
        prompt: &Prompt,
        adapter: Option<&str>,
        held: Found,
        turn: u64,
    ) -> Option<(Arc<Engine>, Found)> {
        let uncached = prompt.tokens.saturating_sub(held.held.tokens);
        let is_text = matches!(request.kind, Kind::Completion | Kind::Chat);
        if !request.may_split || !is_text || uncached < self.setup.two_steps.tokens_min {
            return None;
        }
        let all = self.engines.all();
        let model = request.model.as_deref();
        let may = |engine: &&Arc<Engine>| {
            engine.spec.role == EngineRole::Prefill && engine.is_trusted() && engine.takes(model)
        };
        let engines: Vec<_> = all.iter().filter(may).cloned().collect();
        if engines.is_empty() || !two_steps::can_be_split(&request.body) {
            return None;
        }
        let (found, _) = self.found(prompt, &engines);
        let looks: Vec<_> =
            engines.iter().zip(&found).map(|(engine, found)| engine.look(found.held, adapter, false)).collect();
        let view = View { prompt_tokens: prompt.tokens, credit_s: 0.0, engines: &looks };
        let (_, random) = &mut *self.decider.lock().unwrap_or_else(PoisonError::into_inner);
        let chosen = choose(&self.setup.policy, &view, turn, random)?.chosen;
        if !prompt.hashes.is_empty() {
            engines[chosen].recent().used(&prompt.hashes);
        }
        Some((Arc::clone(&engines[chosen]), found[chosen]))
    }

    /// Tokens of the index's blocks.
    fn block_tokens(&self) -> u32 {
        self.setup.index.as_ref().map_or(0, |index| index.roster().block_tokens)
    }

    fn lock_sessions(&self) -> MutexGuard<'_, LruCache<String, String>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Engines that may take a request.
    fn candidates(&self, request: &Request) -> Result<Vec<Arc<Engine>>, Refusal> {
        let all = self.engines.all();
        let in_subset = |engine: &Engine| {
            request
                .subset
                .as_ref()
                .is_none_or(|subset| subset.iter().any(|it| it == engine.spec.authority() || *it == engine.spec.name))
        };
        let goes_on = |engine: &Engine| engine.spec.role != EngineRole::Prefill;
        let may = |engine: &&Arc<Engine>| engine.is_usable() && goes_on(engine) && in_subset(engine);
        let usable: Vec<_> = all.iter().filter(may).cloned().collect();
        if usable.is_empty() {
            let why = match (all.is_empty(), request.subset.is_some()) {
                (true, _) => "none is known",
                (_, true) => "none of the wanted subset is healthy",
                _ if all.iter().any(|engine| engine.is_usable()) => {
                    "those that are healthy compute prompts for others only"
                }
                _ => "none is healthy",
            };
            return Err(Refusal::NoEngine(why));
        }
        let Some(model) = &request.model else { return Ok(trusted(usable)) };
        let serving: Vec<_> = usable.iter().filter(|engine| engine.serves(model)).cloned().collect();
        if !serving.is_empty() {
            return Ok(trusted(serving));
        }
        if request.kind == Kind::Other {
            // What is asked may be none of a model that is listed; the engine will say.
            return Ok(trusted(usable));
        }
        if all.iter().any(|engine| !engine.is_usable() && engine.serves(model)) {
            return Err(Refusal::NoEngine("those that serve the model are not healthy"));
        }
        Err(Refusal::ModelNotFound(model.clone()))
    }

    /// Reads the prompt as exactly as the mode needs.
    async fn prompt(&self, request: &Request, adapter: Option<&str>, engines: &[Arc<Engine>]) -> Prompt {
        if request.kind == Kind::Other {
            return Prompt::default();
        }
        if self.setup.mode != Mode::Precise {
            return Prompt::estimate(request);
        }
        let ids = Prompt::ids(request, &self.setup.models);
        let (ids, from, inexact) = match ids {
            Ok((ids, from)) => (Some(ids), from, None),
            Err(reason) => {
                self.metrics.inexact(reason.name());
                let is_plain = !matches!(reason, Inexact::Option(_) | Inexact::Multimodal);
                let ids = self.remote.ids(engines, request, is_plain).await;
                (ids, "remote", Some(reason.name()))
            }
        };
        let Some(ids) = ids else { return Prompt { inexact, ..Prompt::estimate(request) } };
        Prompt { inexact, ..Prompt::exact(request, &ids, from, adapter, self.block_tokens()) }
    }

    /// What every engine has of a prompt.
    fn found(&self, prompt: &Prompt, engines: &[Arc<Engine>]) -> (Vec<Found>, PrefixSource) {
        match (&self.setup.index, self.setup.mode) {
            (_, Mode::None) => (vec![Found::default(); engines.len()], PrefixSource::None),
            _ if prompt.tokens == 0 => (vec![Found::default(); engines.len()], PrefixSource::None),
            (Some(index), Mode::Precise) if prompt.is_exact => {
                let found = prefix::precise(index, &prompt.keys, prompt.tokens, engines, &self.setup.weights);
                let nothing = found.iter().all(|found| found.stream.is_none());
                let from = if nothing && !prefix::knows_any(index, engines) {
                    PrefixSource::None
                } else {
                    PrefixSource::Index
                };
                (found, from)
            }
            _ => {
                let guess = |engine: &Arc<Engine>| prefix::approximate(&engine.recent(), &prompt.hashes, prompt.tokens);
                (engines.iter().map(guess).collect(), PrefixSource::Guess)
            }
        }
    }
}

/// Tells the index what to expect, beside decisions: its writer may be busy.
async fn tell(index: Arc<Index>, mut receiver: mpsc::Receiver<Expectation>) {
    let started = Instant::now();
    let now_ms = || started.elapsed().as_millis() as u64;
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    loop {
        tokio::select! {
            told = receiver.recv() => match told {
                Some((engine, keys)) => index.write().expect(engine, &keys, now_ms() + limits::EXPECT_MS),
                None => return,
            },
            _ = tick.tick() => index.write().expire(now_ms()),
        }
    }
}

/// A request that was decided on. Dropped without an end it counts as aborted; what it booked is
/// given back in any case.
#[derive(Debug)]
pub struct Ticket {
    router: Arc<Router>,
    order: Vec<(Arc<Engine>, Found)>,
    at: usize,
    booking: Option<Booking>,
    /// The first step, at the engine that computes the prompt.
    prefill: Option<Booking>,
    prompt: Prompt,
    /// Its answer comes in parts.
    streams: bool,
    /// Age of the prompt's first block on the engine, as guessed.
    age: u64,
    decision: Decision,
    decided: Instant,
    first_byte: OnceLock<Instant>,
    /// When its first token was wanted.
    due: Option<Instant>,
    trace: Option<Trace>,
}

impl Ticket {
    /// The engine it goes to.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.order[self.at].0
    }

    /// Engines to try if that one fails, best first.
    pub fn fallbacks(&self) -> impl Iterator<Item = &Arc<Engine>> {
        self.order[self.at + 1..].iter().map(|(engine, _)| engine)
    }

    /// The data-parallel rank that has the prefix, where the engine has several.
    pub fn rank(&self) -> Option<u32> {
        self.order[self.at].1.rank
    }

    /// Headers that go with the request, so that the engine's trace is a part of its own.
    pub fn trace_headers(&self) -> impl Iterator<Item = (&str, &str)> {
        let headers = self.trace.iter().flat_map(Trace::headers);
        headers.map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The engine that is to compute its prompt before the other one goes on with it.
    pub fn prefill(&self) -> Option<&Arc<Engine>> {
        self.prefill.as_ref().map(Booking::engine)
    }

    /// The first step is over. `handed_over`: the engine that goes on need not compute the prompt;
    /// `verdict`: on the engine that was to compute it.
    pub fn prefilled(&mut self, handed_over: bool, verdict: Verdict) {
        let Some(prefill) = self.prefill.take() else { return };
        self.router.metrics.prefilled(&prefill.engine().spec.name, handed_over);
        prefill.judged(verdict);
        if handed_over {
            prefill.answered();
        } else {
            self.decision.prefill = None;
        }
        drop(prefill);
        // From now on: the time before was the other engine's.
        self.booking = None;
        self.promise();
        self.router.setup.gate.iter().for_each(Gate::wake);
    }

    /// Whoever goes on has to compute the prompt after all.
    pub fn forget_prefill(&mut self) {
        self.decision.prefill = None;
    }

    /// The decision, as it is shown.
    pub fn decision(&self) -> &Decision {
        &self.decision
    }

    /// Books it at its engine, and takes the engine to hold the prompt from now on.
    fn promise(&mut self) {
        let (engine, found) = &self.order[self.at];
        // What another engine computes is not computed here.
        let held = if self.decision.prefill.is_some() { self.prompt.tokens } else { found.held.tokens };
        let promise = Promise { tokens: self.prompt.tokens, held, streams: self.streams };
        self.booking = Some(Booking::new(Arc::clone(engine), promise));
        if !self.prompt.hashes.is_empty() {
            self.age = engine.recent().give(&self.prompt.hashes);
        }
        let (Some(index), Some(expect)) = (&self.router.setup.index, &self.router.expect) else { return };
        let stream = found.stream.or_else(|| prefix::stream_of(index, engine, found.rank));
        if let Some(stream) = stream.filter(|_| !self.prompt.keys.is_empty())
            && expect.try_send((stream, self.prompt.keys.clone())).is_err()
        {
            self.router.metrics.dropped();
        }
    }

    /// Its engine could not be reached, or broke off before its first byte: moves on. `false`:
    /// nobody is left, and it stays where it failed.
    pub fn move_on(&mut self) -> bool {
        let may = |engine: &Engine| engine.is_usable() && engine.is_trusted();
        let Some(at) = (self.at + 1..self.order.len()).find(|at| may(&self.order[*at].0)) else { return false };
        self.router.metrics.retried(&self.engine().spec.name);
        self.booking = None;
        self.move_to(at);
        true
    }

    /// Another engine has it now.
    fn move_to(&mut self, at: usize) {
        self.at = at;
        let (engine, found) = &self.order[at];
        self.decision.engine.clone_from(&engine.spec.name);
        self.decision.predicted_cached = found.held.tokens;
        self.promise();
    }

    /// The first byte of the answer's body has come. Said once or often.
    pub fn answered(&self) {
        if self.first_byte.set(Instant::now()).is_ok() {
            self.router.metrics.answered(self.decided.elapsed());
            self.booking.iter().for_each(Booking::answered);
            self.prefill.iter().for_each(Booking::is_over);
            self.router.setup.gate.iter().for_each(Gate::wake);
        }
    }

    /// By how much the answer comes later than it was wanted.
    pub fn late_by(&self) -> Option<Duration> {
        self.due.map(|due| Instant::now().saturating_duration_since(due)).filter(|late| !late.is_zero())
    }

    /// The gateway says where it went, which may be a fallback.
    pub fn served_by(&mut self, endpoint: &str) {
        let at = self.order.iter().position(|(engine, _)| engine.spec.authority() == endpoint);
        if let Some(at) = at.filter(|at| *at != self.at) {
            self.router.metrics.retried(&self.engine().spec.name);
            self.booking = None;
            self.move_to(at);
        }
    }

    /// What its engine's answer, or the lack of it, says of the engine. Said once or often.
    pub fn judge(&self, verdict: Verdict) {
        self.booking.iter().for_each(|booking| booking.judged(verdict));
    }

    /// It has ended.
    pub fn end(mut self, outcome: Outcome, usage: Option<Usage>) {
        self.decision.outcome = outcome;
        if matches!(outcome, Outcome::Failed | Outcome::Timeout | Outcome::Broken) {
            self.judge(Verdict::Ill);
        }
        if let Some(prefill) = self.prefill.take() {
            // A sidecar has sent it; only the answer tells of it.
            let well = matches!(outcome, Outcome::Done);
            self.router.metrics.prefilled(&prefill.engine().spec.name, well);
        }
        let Some(usage) = usage else { return };
        self.decision.reported_prompt = Some(usage.prompt);
        self.decision.reported_cached = usage.cached;
        if self.decision.prefill.is_some() {
            // What came from the other engine counts as cached.
            return;
        }
        let predicted = self.decision.predicted_cached;
        self.router.metrics.reported(
            self.decision.prefix_from,
            self.prompt.is_exact,
            self.prompt.tokens,
            predicted,
            usage,
        );
        if let (Some(cached), PrefixSource::Guess) = (usage.cached, self.decision.prefix_from) {
            let blocks = |tokens: u32| tokens as usize / estimate::BLOCK_TOKENS;
            // The estimate of tokens is off by some; a third less is an eviction, and half as much
            // again is from a tier that the guess does not know.
            let expected = blocks(predicted);
            let differs = cached * 3 < predicted * 2 || cached * 2 > predicted * 3;
            let found = if differs { blocks(cached) } else { expected };
            self.engine().recent().learn(expected, found, self.age);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.decision.outcome == Outcome::Open {
            self.decision.outcome = Outcome::Aborted;
        }
        self.router.in_flight.fetch_sub(1, Ordering::Relaxed);
        (self.booking, self.prefill) = (None, None);
        self.router.setup.gate.iter().for_each(Gate::wake);
        self.router.metrics.ended(&self.decision.engine, self.decision.outcome);
        if let Some(trace) = &mut self.trace {
            let first = self.first_byte.get().map(|at| SystemTime::now() - at.elapsed());
            trace.end(&self.decision, first);
        }
        self.router.ring.push(self.decision.clone());
    }
}
