//! The router's numbers, in Prometheus's text format.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

use super::answer::Usage;
use super::engine::Engine;
use super::engines::Engines;
use super::gate::Gate;
use super::outcome::Outcome;
use super::peers::standing::{PEER_STATES, Peers};
use super::prefix_source::PrefixSource;
use kvcellar_index::api::clients::ClientCounts;
use kvcellar_index::fleet::FleetView;

type Counts = Family<Vec<(String, String)>, Counter>;
type PerEngine = Family<Vec<(String, String)>, Gauge<f64, AtomicU64>>;

/// Everything that is counted.
#[derive(Debug)]
pub struct Metrics {
    /// What there is of the front end's clients.
    pub clients: Arc<ClientCounts>,
    /// Written by one reader at a time: series of engines are made anew for each.
    registry: Mutex<Registry>,
    of_engines: EngineMetrics,
    refused: Counts,
    inexact: Counts,
    aliased: Counts,
    requests: Counts,
    retried: Counter,
    predictions: Counts,
    mismatched: Counter,
    predicted: Counter,
    reported: Counter,
    reported_prompt: Counter,
    dropped: Counter,
    decide_seconds: Histogram,
    ttft_seconds: Histogram,
    queue: QueueMetrics,
    of_clients: ClientMetrics,
    of_peers: PeerMetrics,
}

/// Where numbers are read when they are shown.
#[derive(Debug, Clone, Copy)]
pub struct MetricSources<'r> {
    /// The engines.
    pub engines: &'r Engines,
    /// Their events.
    pub fleet: Option<&'r FleetView>,
    /// What waits.
    pub gate: Option<&'r Gate>,
    /// Other routers.
    pub peers: Option<&'r Peers>,
}

/// What is told of each engine, for as long as it is in the fleet.
#[derive(Debug)]
struct EngineMetrics {
    decisions: Counts,
    outcomes: Counts,
    retries: Counts,
    prefills: Counts,
    sources: Counts,
    gauges: [PerEngine; 6],
    events: [PerEngine; 2],
}

/// What is told of clients.
#[derive(Debug)]
struct ClientMetrics {
    cut: Counts,
    open: Gauge<u64, AtomicU64>,
}

/// What is told of requests that wait.
#[derive(Debug)]
struct QueueMetrics {
    seconds: Histogram,
    requests: PerEngine,
    bytes: Gauge<u64, AtomicU64>,
}

fn labels<const N: usize>(pairs: [(&str, &str); N]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

impl Default for Metrics {
    fn default() -> Self {
        let mut all = Registry::with_prefix("kvcellar_route");
        let registry = &mut all;
        let decide = [2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5, 2.0];
        let ttft = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0];
        Self {
            of_engines: EngineMetrics::new(registry),
            queue: QueueMetrics::new(registry),
            of_clients: ClientMetrics::new(registry),
            clients: Arc::default(),
            refused: counts(registry, "refused", "Requests that were not passed on, by reason"),
            inexact: counts(registry, "inexact", "Prompts whose ids this process could not say, by reason"),
            of_peers: PeerMetrics::new(registry),
            aliased: counts(
                registry,
                "aliased",
                "Requests that named an alias, by alias and the model that they went on to",
            ),
            requests: counts(
                registry,
                "requests",
                "Requests that were passed on, by end; of all engines, those that left included",
            ),
            retried: add(
                registry,
                "requests_retried",
                "Times that another engine got a request, of all engines, those that left included",
                Counter::default(),
            ),
            predictions: counts(registry, "predictions", "Predicted cached tokens against those reported"),
            mismatched: add(
                registry,
                "prompts_mismatched",
                "Prompts with another number of tokens than predicted exactly",
                Counter::default(),
            ),
            predicted: add(
                registry,
                "predicted_cached_tokens",
                "Cached tokens that were predicted, where the engine reported",
                Counter::default(),
            ),
            reported: add(
                registry,
                "reported_cached_tokens",
                "Cached tokens that engines reported",
                Counter::default(),
            ),
            reported_prompt: add(
                registry,
                "reported_prompt_tokens",
                "Tokens of the prompts whose cached tokens engines reported",
                Counter::default(),
            ),
            dropped: add(
                registry,
                "expectations_dropped",
                "Expectations that the index's writer was too busy for",
                Counter::default(),
            ),
            decide_seconds: add(
                registry,
                "decide_seconds",
                "From the whole request to the decision",
                Histogram::new(decide),
            ),
            ttft_seconds: add(
                registry,
                "ttft_seconds",
                "From the decision to the first byte of the answer's body",
                Histogram::new(ttft),
            ),
            registry: Mutex::new(all),
        }
    }
}

impl EngineMetrics {
    fn new(registry: &mut Registry) -> Self {
        Self {
            gauges: gauges(registry),
            events: of_events(registry),
            decisions: counts(registry, "decisions", "Decisions, by engine and by where prefixes were looked up"),
            outcomes: counts(registry, "outcomes", "Requests that were passed on, by engine and end"),
            retries: counts(registry, "retries", "Requests that another engine got, by the engine that failed"),
            prefills: counts(
                registry,
                "prefills",
                "Prompts that an engine computed for another one, by engine and end",
            ),
            sources: counts(registry, "sources", "Requests that were told to fetch KV from an engine, by that engine"),
        }
    }

    /// Tells of exactly these engines.
    fn show(&self, engines: &[Arc<Engine>], fleet: Option<&FleetView>) {
        self.gauges.iter().chain(&self.events).for_each(PerEngine::clear);
        let counted = [&self.decisions, &self.outcomes, &self.retries, &self.prefills, &self.sources];
        counted.into_iter().for_each(Counts::clear);
        for (name, source) in fleet.map(FleetView::sources).unwrap_or_default() {
            let labels = labels([("engine", &name)]);
            self.events[0].get_or_create(&labels).set(f64::from(u8::from(source.connected)));
            if let Some(heard) = source.heard {
                self.events[1].get_or_create(&labels).set(heard.elapsed().as_secs_f64());
            }
        }
        for engine in engines {
            self.show_one(engine);
        }
    }

    fn show_one(&self, engine: &Engine) {
        let name = engine.spec.name.as_str();
        let (requests, tokens) = {
            let books = engine.books();
            (books.requests(), books.tokens())
        };
        let values = [
            f64::from(u8::from(engine.is_usable())),
            f64::from(u8::from(!engine.is_trusted())),
            requests as f64,
            tokens as f64,
            engine.rates().prefill,
            engine.recent().sizes().0 as f64,
        ];
        for (gauge, value) in self.gauges.iter().zip(values) {
            gauge.get_or_create(&labels([("engine", name)])).set(value);
        }
        let tally = &engine.tally;
        for (prefix, count) in tally.decisions() {
            show_count(&self.decisions, [("engine", name), ("prefix", prefix)], count);
        }
        for (outcome, count) in tally.outcomes() {
            show_count(&self.outcomes, [("engine", name), ("outcome", outcome)], count);
        }
        for (outcome, count) in tally.prefills() {
            show_count(&self.prefills, [("engine", name), ("outcome", outcome)], count);
        }
        show_count(&self.retries, [("engine", name)], tally.retries());
        show_count(&self.sources, [("engine", name)], tally.sources());
    }
}

/// Shows a count in a family that was cleared; what never happened has no series.
fn show_count<const N: usize>(family: &Counts, pairs: [(&str, &str); N], count: u64) {
    if count > 0 {
        family.get_or_create(&labels(pairs)).inc_by(count);
    }
}

fn gauges(registry: &mut Registry) -> [PerEngine; 6] {
    [
        add(registry, "engine_usable", "The engine may get requests", PerEngine::default()),
        add(registry, "engine_broken", "The engine's requests fail: it gets one now and then", PerEngine::default()),
        add(registry, "engine_in_flight", "Requests of ours that have not ended", PerEngine::default()),
        add(registry, "engine_in_flight_tokens", "Their prompts' tokens", PerEngine::default()),
        add(registry, "engine_prefill_rate", "Prompt tokens a second, as measured", PerEngine::default()),
        add(registry, "engine_remembered_blocks", "Blocks that the engine is guessed to hold", PerEngine::default()),
    ]
}

/// What is told of each engine's events.
fn of_events(registry: &mut Registry) -> [PerEngine; 2] {
    [
        add(registry, "events_connected", "The line to the engine's events is up", PerEngine::default()),
        add(
            registry,
            "events_age_seconds",
            "Since the engine's last events; missing before the first",
            PerEngine::default(),
        ),
    ]
}

impl ClientMetrics {
    fn new(registry: &mut Registry) -> Self {
        Self {
            cut: counts(registry, "clients_cut", "Connections ended because of their client, by reason"),
            open: add(registry, "client_connections", "Connections of clients that are open", Gauge::default()),
        }
    }

    fn show(&self, counts: &ClientCounts) {
        self.cut.clear();
        for (reason, count) in counts.cuts() {
            show_count(&self.cut, [("reason", reason)], count);
        }
        self.open.set(counts.open());
    }
}

impl QueueMetrics {
    fn new(registry: &mut Registry) -> Self {
        let wait = [0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0];
        Self {
            seconds: add(
                registry,
                "queue_seconds",
                "What requests waited for an engine to have room, where they may wait",
                Histogram::new(wait),
            ),
            requests: add(registry, "queue_requests", "Requests that wait, by priority", PerEngine::default()),
            bytes: add(registry, "queue_bytes", "Bytes of their bodies", Gauge::default()),
        }
    }

    fn look(&self, gate: Option<&Gate>) {
        self.requests.clear();
        let Some((waiting, bytes)) = gate.map(Gate::waiting) else { return };
        for (priority, count) in waiting {
            self.requests.get_or_create(&labels([("priority", &priority.to_string())])).set(count as f64);
        }
        self.bytes.set(bytes as u64);
    }
}

/// Counters by label that the registry knows, too.
fn counts(registry: &mut Registry, name: &str, help: &str) -> Counts {
    add(registry, name, help, Counts::default())
}

/// What is told of other routers before the same engines.
#[derive(Debug)]
struct PeerMetrics {
    states: PerEngine,
    in_flight: Gauge<u64, AtomicU64>,
    expired: Counter,
}

impl PeerMetrics {
    fn new(registry: &mut Registry) -> Self {
        Self {
            states: add(registry, "peers", "Other routers, by whether they share", PerEngine::default()),
            in_flight: add(
                registry,
                "peers_in_flight",
                "Requests of other routers that count here as they do there",
                Gauge::default(),
            ),
            expired: add(
                registry,
                "peers_expired",
                "Times that a router was silent for too long, and its share was dropped",
                Counter::default(),
            ),
        }
    }

    fn look(&self, engines: &Engines, peers: Option<&Peers>) {
        let Some(peers) = peers else { return };
        let counts = peers.counts();
        for state in PEER_STATES {
            let count = counts.get(state).copied().unwrap_or(0);
            self.states.get_or_create(&labels([("state", state)])).set(count as f64);
        }
        let theirs: usize = engines.all().iter().map(|engine| engine.books().requests_of_peers()).sum();
        self.in_flight.set(theirs as u64);
    }
}

/// A metric that the registry knows, too.
fn add<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

impl Metrics {
    /// A decision was made.
    pub fn decided(&self, took: Duration) {
        self.decide_seconds.observe(took.as_secs_f64());
    }

    /// A request that was passed on has ended.
    pub fn ended(&self, outcome: Outcome) {
        self.requests.get_or_create(&labels([("outcome", outcome.as_str())])).inc();
    }

    /// Another engine got a request after one failed.
    pub fn retried(&self) {
        self.retried.inc();
    }

    /// A request waited for room.
    pub fn waited(&self, time: Duration) {
        self.queue.seconds.observe(time.as_secs_f64());
    }

    /// A request was not passed on.
    pub fn refused(&self, reason: &str) {
        self.refused.get_or_create(&labels([("reason", reason)])).inc();
    }

    /// A prompt's ids could not be said here.
    pub fn inexact(&self, reason: &str) {
        self.inexact.get_or_create(&labels([("reason", reason)])).inc();
    }

    /// A request that named an alias goes on to a model.
    pub fn aliased(&self, alias: &str, model: &str) {
        self.aliased.get_or_create(&labels([("alias", alias), ("model", model)])).inc();
    }

    /// An expectation did not reach the index.
    pub fn dropped(&self) {
        self.dropped.inc();
    }

    /// The first byte has come.
    pub fn answered(&self, took: Duration) {
        self.ttft_seconds.observe(took.as_secs_f64());
    }

    /// An engine has reported its usage. `exact`: the prompt's tokens were known.
    pub fn reported(&self, prefix: PrefixSource, exact: bool, prompt: u32, predicted: u32, usage: Usage) {
        if exact && usage.prompt != prompt {
            self.mismatched.inc();
        }
        let Some(cached) = usage.cached else { return };
        let how = match cached.cmp(&predicted) {
            std::cmp::Ordering::Equal => "equal",
            std::cmp::Ordering::Less => "less_than_predicted",
            std::cmp::Ordering::Greater => "more_than_predicted",
        };
        self.predictions.get_or_create(&labels([("prefix", prefix.as_str()), ("reported", how)])).inc();
        self.predicted.inc_by(predicted.into());
        self.reported.inc_by(cached.into());
        self.reported_prompt.inc_by(usage.prompt.into());
    }

    /// A peer's share was dropped, because it was silent for too long.
    pub fn expired(&self) {
        self.of_peers.expired.inc();
    }

    /// All numbers as text.
    pub fn text(&self, of: &MetricSources<'_>) -> Option<String> {
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        self.queue.look(of.gate);
        self.of_engines.show(&of.engines.all(), of.fleet);
        self.of_peers.look(of.engines, of.peers);
        self.of_clients.show(&self.clients);
        let mut text = String::new();
        encode(&mut text, &registry).ok()?;
        Some(text)
    }
}
