//! `kvcellar route`: sends each request to the engine that saves the most work.

use std::collections::BTreeMap;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use axum::http::HeaderName;
use clap::{Args, ValueEnum};

use super::clients::{ClientOptions, SECONDS_MAX};
use super::descriptors;
use super::health;
use kvcellar_block::error::{Error, Result};
use kvcellar_discovery::Places;
use kvcellar_engine::config::size;
use kvcellar_index::Index;
use kvcellar_index::api::clients::ClientLimits;
use kvcellar_index::api::serving::{self, Server};
use kvcellar_index::fleet::Fleet;
use kvcellar_index::tiers::Weights;
use kvcellar_route::aliases::Aliases;
use kvcellar_route::choose::Policy;
use kvcellar_route::engines::Engines;
use kvcellar_route::gate::{Gate, GateSettings};
use kvcellar_route::peers::exchange;
use kvcellar_route::peers::options::PeerOptions;
use kvcellar_route::peers::standing::Peers;
use kvcellar_route::picker_config::{PickerConfig, QueueWish};
use kvcellar_route::prompt::{Checked, Models};
use kvcellar_route::proxy::{self, ProxyLimits};
use kvcellar_route::queue::QueueBounds;
use kvcellar_route::router::{Mode, Router, Setup};
use kvcellar_route::scorers::Scorer;
use kvcellar_route::source::{HintsFor, SourceHints};
use kvcellar_route::spec::Spec;
use kvcellar_route::tokens::TokenModel;
use kvcellar_route::traces::Traces;
use kvcellar_route::two_steps::{PrefillBy, TwoSteps};
use kvcellar_route::upstream::{Upstream, UpstreamOptions};
use kvcellar_route::urgency::Objectives;
use kvcellar_route::{admin, ext_proc, scrape, self_check, streams};

/// Connections to the admin address that may be open at a time: few ask there, and they are not to
/// wait for clients.
const ADMIN_CONNECTIONS: usize = 256;

/// Requests that may wait where a file asks for flow control and names no bound, as in the field.
const QUEUE_OF_FILES: usize = 5000;

/// How engines are weighed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Weighing {
    /// Weighted scorers, see --scorers.
    Scorers,
    /// The least predicted time to the first token.
    Cost,
    /// One after the other.
    RoundRobin,
    /// Any.
    Random,
}

/// Options of the router.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Address of the HTTP front end: a reverse proxy for the `OpenAI` API.
    #[arg(long)]
    pub http: Option<SocketAddr>,
    /// Address of the Envoy front end: an endpoint picker for the filter `ext_proc`, over gRPC.
    #[arg(long)]
    pub ext_proc: Option<SocketAddr>,
    /// Engines beside the chosen one in the header that names it, for gateways that try them in
    /// turn.
    #[arg(long, default_value_t = 0)]
    pub ext_proc_fallbacks: usize,
    /// Certificate chain of the Envoy front end, PEM.
    #[arg(long, requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key, PEM.
    #[arg(long, requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Address of metrics, health and /debug.
    #[arg(long, default_value = "127.0.0.1:8092")]
    pub admin: SocketAddr,
    /// Where engines are found.
    #[command(flatten)]
    pub places: Places<Spec>,
    /// Certificates of authorities beside the system's, PEM, for engines at https:// addresses.
    #[arg(long, value_name = "FILE")]
    pub engine_ca: Option<PathBuf>,
    /// File with the engines' API key, for what the router itself asks them (models, token ids).
    /// Clients' keys go on as they come.
    #[arg(long, value_name = "FILE")]
    pub engine_key: Option<PathBuf>,
    /// Where prefixes are looked up. Precise needs engines' events, and a tokenizer for prompts
    /// that come as text.
    #[arg(long, value_enum, default_value = "approximate")]
    pub mode: Mode,
    /// How engines are weighed.
    #[arg(long, value_enum, default_value = "cost")]
    pub policy: Weighing,
    /// Weights of scorers, e.g. prefix=3,queue=2,kv-usage=2. Unless given, the field's usual ones.
    #[arg(long, value_delimiter = ',')]
    pub scorers: Vec<String>,
    /// A file of kind `EndpointPickerConfig`, instead of --mode, --policy, --scorers,
    /// --ext-proc-fallbacks and --session-header.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["mode", "policy", "scorers", "ext_proc_fallbacks", "session_header"])]
    pub picker_config: Option<PathBuf>,
    /// Directory with a model's `tokenizer.json` and chat template; MODEL=DIRECTORY where engines
    /// serve several. May be repeated.
    #[arg(long = "tokenizer", value_name = "[MODEL=]DIRECTORY")]
    pub tokenizers: Vec<String>,
    /// Bound of the index's memory.
    #[arg(long, default_value = "1GiB")]
    pub memory: String,
    /// Bound of the memory for texts that were tokenized lately, for each tokenizer.
    #[arg(long, default_value = "256MiB")]
    pub tokenizer_memory: String,
    /// Largest body of a request.
    #[arg(long, default_value = "32MiB")]
    pub body: String,
    /// What clients of the HTTP front end may do.
    #[command(flatten)]
    pub clients: ClientOptions,
    /// Requests in flight at most; 0: no bound. Further ones are refused with 429.
    #[arg(long, default_value_t = 0)]
    pub in_flight: usize,
    /// Requests that may wait for engines to have room; 0: none waits, every request goes to an
    /// engine at once.
    #[arg(long, default_value_t = 0)]
    pub queue: usize,
    /// Bound of the memory for them, estimated from their bodies.
    #[arg(long, default_value = "256MiB")]
    pub queue_memory: String,
    /// How long a request waits that names no shorter time itself, in s.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=SECONDS_MAX))]
    pub queue_s: u64,
    /// An engine has room while the prompts it was given take less time than this, in ms.
    #[arg(long, default_value_t = 100)]
    pub queue_backlog_ms: u64,
    /// Requests that an engine is given at most while others wait; 0: no bound.
    #[arg(long, default_value_t = 0)]
    pub queue_concurrency: usize,
    /// Priority of requests whose header x-llm-d-inference-objective names it, e.g. chat=10. Others
    /// have 0, or what an `InferenceObjective` of --inference-pool says. May be repeated.
    #[arg(long = "objective", value_name = "NAME=PRIORITY")]
    pub objectives: Vec<String>,
    /// Another name of a model, under which clients may ask for it. May be repeated. Several models
    /// with one name share its requests by weight: chat=MODEL@9 chat=OTHER@1.
    #[arg(long = "alias", value_name = "NAME=MODEL[@WEIGHT]")]
    pub aliases: Vec<String>,
    /// Who has prompts computed by engines with role=prefill: this router, or a sidecar of the
    /// engine that decodes, which finds the other one in the header x-prefiller-host-port. The
    /// router, unless a --picker-config has a disagg-profile-handler.
    #[arg(long, value_enum)]
    pub prefill_by: Option<PrefillBy>,
    /// Tokens that an engine would have to compute for another one to do it.
    #[arg(long, default_value_t = 512)]
    pub prefill_tokens: u32,
    /// Who is told which other engine holds a prompt's KV in host memory, to fetch it there: a
    /// sidecar, in the header x-kv-cache-source-host-port, or vLLM's tier p2p, in the body. With
    /// --mode precise.
    #[arg(long, value_enum, default_value = "nobody")]
    pub source_hints: HintsFor,
    /// Tokens that the other engine must hold beyond those of the chosen one.
    #[arg(long, default_value_t = 512)]
    pub source_tokens: u32,
    /// Time between two scrapes of an engine, in ms.
    #[arg(long, default_value_t = 500)]
    pub scrape_ms: u64,
    /// How long an engine may send nothing, in s.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=SECONDS_MAX))]
    pub silence_s: u64,
    /// Engines that a request may try before its first byte.
    #[arg(long, default_value_t = 3)]
    pub tries: usize,
    /// Header that names a session, for the scorer `session`.
    #[arg(long, default_value = "x-session-id")]
    pub session_header: String,
    /// Seed of the random numbers that settle ties.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// A collector's gRPC endpoint for traces, e.g. `http://127.0.0.1:4317`. Sampled as
    /// `OTEL_TRACES_SAMPLER` says.
    #[arg(long)]
    pub otlp: Option<String>,
    /// Other routers before the same engines.
    #[command(flatten)]
    pub peers: PeerOptions,
}

/// Runs the router until it is told to stop.
pub fn serve(options: &Options) -> i32 {
    match serving::block_on(run(options)) {
        Ok(()) => 0,
        Err(error) => super::refused(&error),
    }
}

impl Options {
    fn policy(&self) -> Result<Policy> {
        let weights = self.scorers.iter().map(|text| weight(text)).collect::<Result<Vec<_>>>()?;
        if !weights.is_empty() && self.policy != Weighing::Scorers {
            return Err(Error::config("scorers", "they are used by --policy scorers only", "Add --policy scorers"));
        }
        Ok(match self.policy {
            Weighing::Cost => Policy::Cost,
            Weighing::RoundRobin => Policy::RoundRobin,
            Weighing::Random => Policy::random(),
            Weighing::Scorers if weights.is_empty() => Policy::field(),
            Weighing::Scorers => Policy::Scorers(weights, kvcellar_route::choose::Pick::Best),
        })
    }

    /// Where requests wait, if they do: by flags, or as far as those do not say, by a file.
    fn gate(&self, wish: Option<&QueueWish>, engines: &Arc<Engines>) -> Result<Option<Gate>> {
        if self.queue == 0 && wish.is_none() {
            return Ok(None);
        }
        let wish = wish.cloned().unwrap_or_default();
        let wished = wish.requests.unwrap_or(QUEUE_OF_FILES);
        let bytes = wish.bytes.as_ref().unwrap_or(&self.queue_memory).as_str();
        let bytes = size::parse("queue-memory", &bytes.into())? as usize;
        let settings = GateSettings {
            bounds: QueueBounds { requests: if self.queue == 0 { wished } else { self.queue }, bytes },
            patience: Duration::from_secs(wish.seconds.unwrap_or(self.queue_s).clamp(1, SECONDS_MAX)),
            backlog: Duration::from_millis(self.queue_backlog_ms.max(1)),
            concurrency: self.queue_concurrency,
            starved: Duration::from_secs(5),
        };
        Ok(Some(Gate::new(settings, Arc::clone(engines))))
    }

    fn sources(&self, weighing: &PickerConfig) -> Result<SourceHints> {
        if let Some(tokens_min) = weighing.source_tokens.filter(|_| self.source_hints == HintsFor::Nobody) {
            return Ok(SourceHints { to: HintsFor::Sidecar, tokens_min });
        }
        if self.source_hints != HintsFor::Nobody && weighing.mode != Mode::Precise {
            let problem = "only an index knows who holds what in which tier";
            return Err(Error::config("source-hints", problem.to_owned(), "Add --mode precise"));
        }
        Ok(SourceHints { to: self.source_hints, tokens_min: self.source_tokens.max(1) })
    }

    fn two_steps(&self, weighing: &PickerConfig) -> TwoSteps {
        let of_file = weighing.prefill.as_ref();
        let unless_said = if of_file.is_some() { PrefillBy::Sidecar } else { PrefillBy::Router };
        let tokens = of_file.map_or(self.prefill_tokens.max(1), |prefill| prefill.tokens_min);
        TwoSteps { by: self.prefill_by.unwrap_or(unless_said), tokens_min: tokens }
    }

    fn objectives(&self) -> Result<Objectives> {
        let read = |text: &String| {
            let read =
                text.rsplit_once('=').and_then(|(name, priority)| Some((name.trim(), priority.trim().parse().ok()?)));
            read.map(|(name, priority)| (name.to_owned(), priority)).ok_or_else(|| {
                Error::config("objective", format!("`{text}` names no priority"), "Write NAME=PRIORITY, e.g. chat=10")
            })
        };
        Ok(Objectives::new(self.objectives.iter().map(read).collect::<Result<_>>()?))
    }

    fn models(&self) -> Result<Models> {
        let memory = size::parse("tokenizer-memory", &self.tokenizer_memory.as_str().into())? as usize;
        let mut named = BTreeMap::new();
        for text in &self.tokenizers {
            let (name, dir) = text.split_once('=').unwrap_or(("", text));
            let model = TokenModel::open(Path::new(dir), memory)?;
            let checked = Arc::new(Checked { model, differs: AtomicBool::new(false) });
            if named.insert(name.to_owned(), checked).is_some() {
                return Err(Error::config("tokenizer", format!("`{name}` has two"), "Write MODEL=DIRECTORY"));
            }
        }
        Ok(Models { named })
    }
}

fn weight(text: &str) -> Result<(Scorer, f64)> {
    let names = || kvcellar_route::scorers::ALL.map(Scorer::name).join(", ");
    let wrong =
        |problem: String| Error::config("scorers", problem, format!("Write NAME=WEIGHT with names of {}", names()));
    let (name, value) = text.split_once('=').ok_or_else(|| wrong(format!("`{text}` has no `=`")))?;
    let scorer = Scorer::named(name.trim()).ok_or_else(|| wrong(format!("there is no scorer `{name}`")))?;
    let value = value.trim().parse::<f64>().ok().filter(|value| value.is_finite() && *value >= 0.0);
    Ok((scorer, value.ok_or_else(|| wrong(format!("the weight of `{name}` is no number of 0 or more")))?))
}

/// Routes to exactly these engines from now on, and follows their events where an index needs them.
fn settle(router: &Router, fleet: &mut Option<Fleet>, found: Vec<Spec>) {
    if let Err(problem) = check_names(&found) {
        log::warn!("{problem}. The engines stay as they were");
        return;
    }
    if let Some(fleet) = fleet {
        fleet.set(found.iter().filter_map(Spec::source).collect());
    }
    router.set_engines(found);
}

/// Each engine has a name of its own: of two with one name the second would get nothing.
fn check_names(found: &[Spec]) -> Result<()> {
    let mut names = HashSet::new();
    let again = found.iter().find(|spec| !names.insert(spec.name.as_str()));
    again.map_or(Ok(()), |spec| {
        let problem = format!("two engines are called `{}`", spec.name);
        Err(Error::config("engine", problem, "Give each a name of its own (name=...)"))
    })
}

/// What is weighed how: from a file, else from flags.
fn weighing(options: &Options) -> Result<PickerConfig> {
    let Some(path) = &options.picker_config else {
        return Ok(PickerConfig {
            policy: options.policy()?,
            prefill: None,
            source_tokens: None,
            queue: None,
            mode: options.mode,
            fallbacks: options.ext_proc_fallbacks,
            session_header: None,
            notes: Vec::new(),
        });
    };
    let made = PickerConfig::open(path)?;
    for note in &made.notes {
        log::warn!("{}: {note}", path.display());
    }
    Ok(made)
}

/// How the router is set up, and what follows engines' events in precise mode.
fn setup(
    options: &Options,
    weighing: &PickerConfig,
    engines: &Arc<Engines>,
    upstream: &Upstream,
) -> Result<(Setup, Option<Fleet>)> {
    let memory = size::parse("memory", &options.memory.as_str().into())? as usize;
    let index = (weighing.mode == Mode::Precise).then(|| Index::new(0, memory)).transpose()?.map(Arc::new);
    let fleet = index.as_ref().map(|index| Fleet::new(Arc::clone(index)));
    let setup = Setup {
        mode: weighing.mode,
        policy: weighing.policy.clone(),
        weights: Weights::default(),
        index,
        fleet: fleet.as_ref().map(Fleet::states),
        models: options.models()?,
        in_flight_max: options.in_flight,
        gate: options.gate(weighing.queue.as_ref(), engines)?.map(Arc::new),
        objectives: options.objectives()?,
        aliases: Aliases::parse(&options.aliases)?,
        two_steps: options.two_steps(weighing),
        prefill_policy: weighing.prefill.as_ref().map(|prefill| prefill.policy.clone()),
        source_hints: options.sources(weighing)?,
        seed: options.seed,
        traces: options.otlp.as_deref().map(Traces::open).transpose()?,
        peers: Peers::new(&options.peers, upstream)?,
    };
    Ok((setup, fleet))
}

async fn run(options: &Options) -> Result<()> {
    descriptors::raise(options.clients.connections.into());
    let weighing = weighing(options)?;
    let finder = options.places.open().await?;
    let found = finder.look().await?;
    check_names(&found)?;
    if found.is_empty() && !options.places.may_change() {
        return Err(kvcellar_discovery::nobody());
    }
    if options.http.is_none() && options.ext_proc.is_none() {
        return Err(Error::config(
            "http",
            "no front end is asked for",
            "Give --http 127.0.0.1:8000, --ext-proc 127.0.0.1:9002 or both",
        ));
    }
    if weighing.mode == Mode::Precise && found.iter().all(|spec| spec.events.is_none()) && !found.is_empty() {
        return Err(Error::config(
            "mode",
            "precise needs events, and no engine has any",
            "Write events=tcp://...,replay=tcp://... for every engine, or --mode approximate",
        ));
    }
    let body = size::parse("body", &options.body.as_str().into())? as usize;
    let session_header = weighing.session_header.as_ref().unwrap_or(&options.session_header).to_lowercase();
    let named_header = HeaderName::try_from(&session_header)
        .map_err(|_| Error::config("session-header", "it is no name of a header", "Write e.g. x-session-id"))?;
    let engines = Arc::new(Engines::default());
    let upstream = Upstream::open(&UpstreamOptions {
        connect: Duration::from_secs(2),
        ca: options.engine_ca.clone(),
        key: options.engine_key.clone(),
    })?;
    let (setup, mut fleet) = setup(options, &weighing, &engines, &upstream)?;
    let router = Router::new(Arc::clone(&engines), upstream, setup);
    let limits = ProxyLimits {
        body_bytes_max: body,
        silence: Duration::from_secs(options.silence_s),
        tries: options.tries.max(1),
        session_header: named_header,
    };
    let pick = ext_proc::PickerLimits { body_bytes_max: body, fallbacks: weighing.fallbacks, session_header };
    let shown = serving::listen("admin", options.admin, "admin at http://").await?;
    settle(&router, &mut fleet, found);
    let checks = tokio::spawn(self_check::run(Arc::clone(&router)));
    let back = Server {
        listener: shown,
        router: admin::routes(Arc::clone(&router)),
        limits: ClientLimits { connections: ADMIN_CONNECTIONS, ..options.clients.limits() },
        counts: Arc::default(),
    };
    let outcome = tokio::select! {
        ended = fronts(options, &router, limits, pick) => ended,
        () = finder.keep(|found| settle(&router, &mut fleet, found)) => Ok(()),
        () = finder.keep_priorities(|found| router.setup.objectives.set_objects(&found)) => Ok(()),
        () = back.serve(std::future::pending()) => Ok(()),
        () = scrape::keep(Arc::clone(&engines), router.upstream.clone(), Duration::from_millis(options.scrape_ms.max(10))) => Ok(()),
        () = watch(&router) => Ok(()),
        () = exchange::keep(Arc::clone(&router)) => Ok(()),
        ended = answer_peers(options, &router) => ended,
        () = admit(&router) => Ok(()),
    };
    checks.abort();
    if router.setup.traces.is_some() {
        let close = move || router.setup.traces.iter().for_each(Traces::close);
        // It has said so itself if it could not send.
        let _closed = tokio::task::spawn_blocking(close).await;
    }
    outcome
}

/// Says whose events do not come, where events are asked for.
async fn watch(router: &Router) {
    match &router.setup.fleet {
        Some(fleet) => streams::keep(Arc::clone(&router.engines), fleet.clone()).await,
        None => std::future::pending().await,
    }
}

/// Answers other routers before the same engines, where there may be some.
async fn answer_peers(options: &Options, router: &Arc<Router>) -> Result<()> {
    let Some(address) = options.peers.peer_listen else { return std::future::pending().await };
    if options.peers.peer_key.is_none() && !address.ip().is_loopback() {
        log::warn!("{address} can be reached from elsewhere and asks for no key: see --peer-key");
    }
    let listener = serving::listen("peer-listen", address, "other routers at http://").await?;
    let server = Server {
        listener,
        router: exchange::routes(Arc::clone(router)),
        limits: ClientLimits { connections: ADMIN_CONNECTIONS, ..options.clients.limits() },
        counts: Arc::default(),
    };
    server.serve(std::future::pending()).await;
    Ok(())
}

/// Lets waiting requests through, where requests may wait.
async fn admit(router: &Router) {
    match &router.setup.gate {
        Some(gate) => gate.keep().await,
        None => std::future::pending().await,
    }
}

/// The front ends that were asked for, until the process is told to stop.
async fn fronts(
    options: &Options,
    router: &Arc<Router>,
    limits: ProxyLimits,
    pick: ext_proc::PickerLimits,
) -> Result<()> {
    let http = async {
        let Some(address) = options.http else { return std::future::pending().await };
        let listener = serving::listen("http", address, "router at http://").await?;
        let server = Server {
            listener,
            router: proxy::routes(Arc::clone(router), limits),
            limits: options.clients.limits(),
            counts: Arc::clone(&router.metrics.clients),
        };
        server.serve(serving::told_to_stop()).await;
        Ok(())
    };
    let picker = async {
        let Some(address) = options.ext_proc else { return std::future::pending().await };
        let listener = serving::listen("ext-proc", address, "ext_proc at ").await?;
        let (reporter, service) = tonic_health::server::health_reporter();
        let is_ready = || router.engines.all().iter().any(|engine| engine.is_usable());
        let told = health::keep(&reporter, is_ready);
        let mut server = tonic::transport::Server::builder();
        if let (Some(cert), Some(key)) = (&options.tls_cert, &options.tls_key) {
            let read = |path: &PathBuf| {
                std::fs::read(path).map_err(|error| Error::io("reading", path, error, "Name a PEM file"))
            };
            let identity = tonic::transport::Identity::from_pem(read(cert)?, read(key)?);
            let tls = tonic::transport::ServerTlsConfig::new().identity(identity);
            server = server
                .tls_config(tls)
                .map_err(|error| Error::config("tls-cert", error.to_string(), "Name a certificate and its key, PEM"))?;
        }
        let picker = ext_proc::service(Arc::clone(router), pick);
        // Each answer leaves at once: Envoy waits for it with a request in hand.
        let at_once =
            |stream: std::io::Result<tokio::net::TcpStream>| stream.and_then(|it| it.set_nodelay(true).map(|()| it));
        let incoming = tokio_stream::StreamExt::map(tokio_stream::wrappers::TcpListenerStream::new(listener), at_once);
        let served = server
            .add_service(service)
            .add_service(picker)
            .serve_with_incoming_shutdown(incoming, serving::told_to_stop());
        let ended = tokio::select! { ended = served => ended, never = told => match never {} };
        ended.map_err(|error| Error::io("serving", "ext_proc", std::io::Error::other(error), "Look at the log"))
    };
    tokio::select! {
        ended = http => ended,
        ended = picker => ended,
    }
}
