//! The decision core that both front ends share: from a request to an engine, and what becomes of
//! it.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Instant, SystemTime};

use super::aliases::Aliases;
use super::booking::Booking;
use super::books::Promise;
use super::choose::{Policy, choose};
use super::decider::Decider;
use super::engine::Engine;
use super::engines::{Engines, trusted};
use super::expectations::Expectations;
use super::gate::{Gate, Pass};
use super::metrics::Metrics;
use super::peers::news::News;
use super::peers::standing::Peers;
use super::prefix::{self, Found};
use super::prefix_source::PrefixSource;
use super::prompt::{Models, Prompt};
use super::remote::Remote;
use super::request::{Kind, Refusal, Request};
use super::retry_budget::RetryBudget;
use super::see::{Decision, Ring};
use super::sessions::{self, Sessions};
use super::source::{HintsFor, KvSource, SourceHints};
use super::spec::{EngineRole, Spec};
use super::ticket::{Ticket, TicketOffice};
use super::tokens::Inexact;
use super::traces::Traces;
use super::two_steps::{self, PrefillBy, TwoSteps};
use super::upstream::Upstream;
use super::urgency::Objectives;
use super::view::View;
use kvcellar_index::Index;
use kvcellar_index::fleet::FleetView;
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
    pub gate: Option<Arc<Gate>>,
    /// Priorities of objectives.
    pub objectives: Objectives,
    /// Names that clients may use for models.
    pub aliases: Aliases,
    /// When prompts are computed by another engine than the one that goes on with them.
    pub two_steps: TwoSteps,
    /// How engines that compute prompts for others are weighed, if otherwise.
    pub prefill_policy: Option<Policy>,
    /// Whether engines are told who else holds a prompt.
    pub source_hints: SourceHints,
    /// Of the random numbers that settle ties.
    pub seed: u64,
    /// Where traces go.
    pub traces: Option<Traces>,
    /// Other routers before the same engines.
    pub peers: Option<Peers>,
}

impl Setup {
    /// One that weighs engines in this way, and does nothing else that has to be asked for.
    pub fn new(mode: Mode, policy: Policy) -> Self {
        Self {
            mode,
            policy,
            weights: Weights::default(),
            index: None,
            fleet: None,
            models: Models::default(),
            in_flight_max: 0,
            gate: None,
            objectives: Objectives::default(),
            aliases: Aliases::default(),
            two_steps: TwoSteps { by: PrefillBy::Router, tokens_min: u32::MAX },
            prefill_policy: None,
            source_hints: SourceHints::default(),
            seed: 1,
            traces: None,
            peers: None,
        }
    }
}

/// The router.
#[derive(Debug)]
pub struct Router {
    /// The engines.
    pub engines: Arc<Engines>,
    /// Its numbers.
    pub metrics: Arc<Metrics>,
    /// Its last decisions.
    pub ring: Arc<Ring>,
    /// How it is set up.
    pub setup: Setup,
    /// The way to engines.
    pub upstream: Upstream,
    /// Asks engines for ids.
    pub remote: Remote,
    /// Bounds what is sent a second time.
    pub retries: RetryBudget,
    /// Where sessions went.
    pub sessions: Sessions,
    decider: Mutex<(Decider, fastrand::Rng)>,
    office: Arc<TicketOffice>,
}

impl Router {
    /// A router. To be made within a runtime: in precise mode it starts the task that tells the
    /// index what to expect.
    pub fn new(engines: Arc<Engines>, upstream: Upstream, setup: Setup) -> Arc<Self> {
        setup.peers.iter().for_each(|peers| engines.tell(&peers.journal));
        let office = Arc::new(TicketOffice {
            metrics: Arc::default(),
            ring: Arc::default(),
            gate: setup.gate.clone(),
            in_flight: AtomicU64::new(0),
            expectations: setup.index.clone().map(Expectations::of),
            hints_for: setup.source_hints.to,
        });
        Arc::new(Self {
            engines,
            metrics: Arc::clone(&office.metrics),
            ring: Arc::clone(&office.ring),
            remote: Remote::new(upstream.clone()),
            upstream,
            retries: RetryBudget::default(),
            sessions: Sessions::default(),
            decider: Mutex::new((Decider::new(setup.policy.clone()), fastrand::Rng::with_seed(setup.seed))),
            office,
            setup,
        })
    }

    /// Goes on with the model that a request's alias stands for. Requests of one session, or else
    /// of one fairness id, get the same model of those that share a name.
    pub fn resolve(&self, request: &mut Request) {
        let aliases = &self.setup.aliases;
        let Some(name) = request.model.clone().filter(|_| !aliases.is_empty()) else { return };
        let who = request.session.as_deref().or(Some(request.urgency.id.as_str()).filter(|id| !id.is_empty()));
        let key = who.map_or_else(|| fastrand::u64(..), sessions::key);
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
        let pass = self.wait(request, &engines).await?;
        if pass.is_some() {
            engines = self.candidates(request)?;
            self.shed()?;
        }
        let (found, prefix_from) = self.found(&prompt, &engines);
        let session = request.session.as_deref().map(sessions::key);
        let session_engine = session.and_then(|session| self.sessions.of(session));
        let looks: Vec<_> = engines
            .iter()
            .zip(&found)
            .map(|(engine, found)| {
                engine.look(found.held, adapter, session_engine.as_deref() == Some(&engine.spec.name))
            })
            .collect();
        let prefix = prefix::longest(&prompt, prefix_from, &found, self.block_tokens());
        let decided = {
            let (decider, random) = &mut *self.decider();
            decider.decide(prompt.tokens, prefix, &looks, random)
        };
        let decided = decided.ok_or(Refusal::NoEngine("none is known"))?;
        let choice = decided.choice;
        let chosen = &engines[choice.chosen];
        if let Some(turn) = decided.cold_turn {
            chosen.cold_turn.store(turn, Ordering::Relaxed);
        }
        if let (Some((prefix, change_s)), Some(peers)) = (decided.credit, &self.setup.peers) {
            peers.journal.push(News::Credit { prefix, change_s });
        }
        if let Some(session) = session {
            self.sessions.put(session, chosen.spec.name.as_str().into());
            chosen.tell(|name| News::Session { session, engine: Arc::clone(name) });
        }
        let prefill = self.prefill(request, &prompt, adapter, found[choice.chosen], decided.number);
        let took = started.elapsed();
        chosen.tally.decided(prefix_from);
        self.metrics.decided(took);
        let mut decision =
            Decision::new(decided.number, request, &prompt, prefix_from, &engines, &looks, &choice, took);
        decision.prefill.clone_from(&prefill.as_ref().map(|(engine, _)| engine.spec.name.clone()));
        let source = self.source(request, &prompt, (chosen, found[choice.chosen]), prefill.as_ref());
        decision.source = source.as_ref().map(|source| source.engine.spec.name.clone());
        let order = choice.order.iter().map(|at| (Arc::clone(&engines[*at]), found[*at])).collect();
        self.office.in_flight.fetch_add(1, Ordering::Relaxed);
        self.retries.earn();
        let mut ticket = Ticket {
            office: Arc::clone(&self.office),
            order,
            at: 0,
            booking: None,
            prefill: prefill.map(|(engine, found)| {
                // Its answer, of one token, comes when the prompt is computed.
                let streams = self.setup.two_steps.by == PrefillBy::Router;
                let promise = Promise { tokens: prompt.tokens, held: found.held.tokens, streams };
                Booking::new(engine, promise)
            }),
            source,
            prompt,
            age: 0,
            streams: request.streams(),
            decision,
            decided: Instant::now(),
            first_byte: OnceLock::new(),
            due: request.urgency.ttft.and_then(|ttft| started.checked_add(ttft)),
            trace: None,
        };
        ticket.source.iter().for_each(|source| source.engine.tally.sourced());
        ticket.promise();
        drop(pass);
        Ok(ticket)
    }

    /// Waits until an engine has room, where requests wait for that.
    async fn wait(&self, request: &Request, engines: &[Arc<Engine>]) -> Result<Option<Pass<'_>>, Refusal> {
        let Some(gate) = &self.setup.gate else { return Ok(None) };
        if request.kind == Kind::Other && request.model.is_none() {
            return Ok(None);
        }
        // Models of one engine wait for the same.
        let lane = engines.first().map(|engine| engine.base_model()).unwrap_or_default();
        let pass = gate.enter(&lane, &request.urgency, request.memory()).await?;
        self.metrics.waited(pass.waited);
        Ok(Some(pass))
    }

    /// Refuses what is more than may be in flight.
    fn shed(&self) -> Result<(), Refusal> {
        let open = self.office.in_flight.load(Ordering::Relaxed) as usize;
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
        let pays = self.setup.two_steps.pay(prompt.tokens, held.held.tokens);
        let is_text = matches!(request.kind, Kind::Completion | Kind::Chat);
        if !request.may_split || !is_text || !pays {
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
        let (_, random) = &mut *self.decider();
        let chosen =
            choose(self.setup.prefill_policy.as_ref().unwrap_or(&self.setup.policy), &view, turn, random)?.chosen;
        if !prompt.hashes.is_empty() {
            engines[chosen].recent().used(&prompt.hashes);
            engines[chosen].tell(|name| News::Given { engine: Arc::clone(name), hashes: prompt.hashes.clone() });
        }
        Some((Arc::clone(&engines[chosen]), found[chosen]))
    }

    /// Who else holds a prompt that an engine would have to compute, if engines are told.
    fn source(
        &self,
        request: &Request,
        prompt: &Prompt,
        chosen: (&Arc<Engine>, Found),
        prefill: Option<&(Arc<Engine>, Found)>,
    ) -> Option<KvSource> {
        let hints = self.setup.source_hints;
        let index = self.setup.index.as_ref().filter(|_| prompt.is_exact && !prompt.keys.is_empty())?;
        let is_text = matches!(request.kind, Kind::Completion | Kind::Chat);
        let (computes, held) = match (hints.to, prefill) {
            // What is handed over in two steps leaves no place for another source in a body.
            (HintsFor::Nobody, _) | (HintsFor::Engine, Some(_)) => return None,
            (_, Some((engine, found))) => (engine, found),
            (_, None) => (chosen.0, &chosen.1),
        };
        let may_gain = held.held.tokens.saturating_add(hints.tokens_min) < prompt.tokens;
        if !is_text || !may_gain || !two_steps::can_be_split(&request.body) {
            return None;
        }
        let all = self.engines.all();
        let model = request.model.as_deref();
        let may = |engine: &&Arc<Engine>| engine.takes(model) && engine.is_trusted();
        let engines: Vec<_> = all.iter().filter(may).cloned().collect();
        let beside = (computes.as_ref(), held.held.tokens);
        let (_, random) = &mut *self.decider();
        KvSource::choose(index, &prompt.keys, prompt.tokens, &engines, beside, hints.tokens_min, random)
    }

    /// Tokens of the index's blocks.
    fn block_tokens(&self) -> u32 {
        self.setup.index.as_ref().map_or(0, |index| index.roster().block_tokens)
    }

    /// Routes to exactly these engines from now on. What was remembered of engines that left is
    /// forgotten.
    pub fn set_engines(&self, found: Vec<Spec>) {
        self.engines.set(found);
        let all = self.engines.all();
        let names: HashSet<&str> = all.iter().map(|engine| engine.spec.name.as_str()).collect();
        self.sessions.keep(|engine| names.contains(engine));
    }

    /// What decides, and the random numbers that settle ties.
    pub fn decider(&self) -> MutexGuard<'_, (Decider, fastrand::Rng)> {
        self.decider.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Engines that may take a request.
    fn candidates(&self, request: &Request) -> Result<Vec<Arc<Engine>>, Refusal> {
        let all = self.engines.all();
        let in_subset = |engine: &Engine| {
            request
                .subset
                .as_ref()
                .is_none_or(|subset| subset.iter().any(|it| engine.is_at(it) || *it == engine.spec.name))
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

#[cfg(test)]
mod tests;
