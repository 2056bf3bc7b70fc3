//! The index over HTTP: questions and what an operator wants to see. JSON in, JSON out; the
//! contract is `api/openapi.json`.
//!
//! Nothing that comes in is trusted: bodies are bounded before they are read, numbers before they
//! are used, and whatever is wrong with a request is said in a 4xx answer. Answers take no lock
//! that a writer holds for longer than a batch.

pub mod clients;
mod connection;
mod limits;
mod metrics;
pub mod paced;
pub mod serving;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use serde::{Deserialize, Serialize};

use super::Index;
use super::fleet::{FleetView, SourceState};
use super::keys::{self, Extras, Multimodal};
use super::query::PrefixScorer;
use super::roster::EngineId;
use super::tiers::{ALL, TIERS, Weights};
use clients::ClientCounts;
pub use limits::ServiceLimits;

/// The content type of `/metrics`.
pub const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What handlers share.
#[derive(Debug)]
pub struct Service {
    /// The index.
    pub index: Arc<Index>,
    /// The state of its subscriptions.
    pub fleet: FleetView,
    /// What each tier is worth unless a question says otherwise.
    pub weights: Weights,
    /// When the service began.
    pub started: Instant,
    /// Questions asked and how long they took.
    pub asked: metrics::Asked,
    /// What there is of its clients.
    pub clients: Arc<ClientCounts>,
}

impl Service {
    /// A service over an index and its subscriptions.
    pub fn new(index: Arc<Index>, fleet: FleetView, weights: Weights) -> Self {
        Self {
            index,
            fleet,
            weights,
            started: Instant::now(),
            asked: metrics::Asked::default(),
            clients: Arc::default(),
        }
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Ends expectations whose time is over. To be called now and then.
    pub fn expire(&self) {
        self.index.write().expire(self.now_ms());
    }
}

/// The routes, with their bounds.
pub fn routes(service: Arc<Service>, limits: ServiceLimits) -> Router {
    let open = Router::new().route("/healthz", get(health)).route("/openapi.json", get(openapi));
    let body = DefaultBodyLimit::max(limits.body_bytes_max);
    let guard = Arc::new(limits::Guard::new(limits));
    let guarded = Router::new()
        .route("/v1/score", post(score))
        .route("/v1/expect", post(expect))
        .route("/v1/keys", post(keys_of))
        .route("/v1/engines", get(engines))
        .route("/v1/blocks/{key}", get(block))
        .route("/v1/snapshot", get(snapshot))
        .route("/metrics", get(metrics::show))
        .layer(middleware::from_fn_with_state(guard, limits::check));
    open.merge(guarded).layer(body).with_state(service)
}

/// An answer that says what is wrong.
fn refuse(status: StatusCode, problem: impl Into<String>) -> Response {
    (status, Json(serde_json::json!({ "error": problem.into() }))).into_response()
}

type Body<T> = Result<Json<T>, JsonRejection>;

/// What a prompt is, in every question.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScorePrompt {
    tokens: Vec<u32>,
    #[serde(default)]
    model: String,
    lora: Option<String>,
    cache_salt: Option<String>,
    #[serde(default)]
    multimodal: Vec<Input>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Input {
    hash: String,
    offset: u32,
    length: u32,
}

impl ScorePrompt {
    fn keys(self, block: u32) -> Vec<u64> {
        let root = keys::root(&self.model, self.lora.as_deref().filter(|name| !name.is_empty()));
        let input = |it: Input| Multimodal { hash: it.hash, offset: it.offset.into(), length: it.length.into() };
        let mut multimodal: Vec<Multimodal> = self.multimodal.into_iter().map(input).collect();
        multimodal.sort_by_key(|input| input.offset);
        let extras = Extras { cache_salt: self.cache_salt, multimodal };
        let mut keys = Vec::new();
        if block > 0 {
            keys::of_prompt(root, &self.tokens, block as usize, &extras, &mut keys);
        }
        keys
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    prompt: ScorePrompt,
    engines: Option<Vec<String>>,
    #[serde(default)]
    weights: BTreeMap<String, f64>,
}

#[derive(Debug, Serialize)]
struct EngineScore {
    engine: String,
    blocks: u32,
    tokens: u64,
    tiers: BTreeMap<&'static str, u32>,
    usable: &'static str,
    score: f64,
}

#[derive(Debug, Serialize)]
struct ScoreAnswer {
    block_tokens: u32,
    blocks: usize,
    engines: Vec<EngineScore>,
}

fn weights(defaults: Weights, wanted: &BTreeMap<String, f64>) -> Result<Weights, String> {
    let mut weights = defaults;
    for (name, weight) in wanted {
        let Some(tier) = ALL.iter().find(|tier| tier.name() == name) else {
            return Err(format!(
                "weights.{name}: there is no such tier. Write one of {}",
                ALL.map(super::tiers::FleetTier::name).join(", ")
            ));
        };
        if !(0.0..=1.0).contains(weight) {
            return Err(format!("weights.{name}: {weight} is not between 0 and 1"));
        }
        weights.0[*tier as usize] = *weight;
    }
    Ok(weights)
}

async fn score(State(service): State<Arc<Service>>, body: Body<Question>) -> Response {
    let started = Instant::now();
    let question = match body {
        Ok(Json(question)) => question,
        Err(error) => return refuse(error.status(), error.body_text()),
    };
    let weights = match weights(service.weights, &question.weights) {
        Ok(weights) => weights,
        Err(problem) => return refuse(StatusCode::BAD_REQUEST, problem),
    };
    let roster = service.index.roster();
    let candidates = question.engines.map(|names| {
        let by_name: HashMap<&str, EngineId> =
            roster.engines.iter().flatten().map(|engine| (engine.name.as_str(), engine.id)).collect();
        // An engine that the index does not know holds nothing.
        names.iter().filter_map(|name| by_name.get(name.as_str()).copied()).collect::<Vec<_>>()
    });
    let block_tokens = roster.block_tokens;
    let keys = question.prompt.keys(block_tokens);
    let mut scorer = PrefixScorer::default();
    let scores = service.index.score(&mut scorer, &keys, candidates.as_deref(), &weights);
    let row = |score: &super::query::Score| {
        let engine = roster.get(score.engine)?.name.clone();
        let tiers = ALL[..TIERS].iter().zip(score.tiers).filter(|(_, blocks)| *blocks > 0);
        Some(EngineScore {
            engine,
            blocks: score.blocks,
            tokens: u64::from(score.blocks) * u64::from(block_tokens),
            tiers: tiers.map(|(tier, blocks)| (tier.name(), blocks)).collect(),
            usable: score.usable.name(),
            score: score.score,
        })
    };
    let answer = ScoreAnswer { block_tokens, blocks: keys.len(), engines: scores.iter().filter_map(row).collect() };
    service.asked.add(started.elapsed());
    Json(answer).into_response()
}

async fn keys_of(State(service): State<Arc<Service>>, body: Body<ScorePrompt>) -> Response {
    let prompt = match body {
        Ok(Json(prompt)) => prompt,
        Err(error) => return refuse(error.status(), error.body_text()),
    };
    let block_tokens = service.index.roster().block_tokens;
    // As text: JSON's numbers lose 64 bits in many a reader.
    let keys: Vec<String> = prompt.keys(block_tokens).iter().map(u64::to_string).collect();
    Json(serde_json::json!({ "block_tokens": block_tokens, "keys": keys })).into_response()
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExpectedBlocks {
    prompt: ScorePrompt,
    engine: String,
    ttl_ms: Option<u32>,
}

/// Longest time that something may be expected.
const TTL_MS_MAX: u32 = 60_000;

async fn expect(State(service): State<Arc<Service>>, body: Body<ExpectedBlocks>) -> Response {
    let wanted = match body {
        Ok(Json(wanted)) => wanted,
        Err(error) => return refuse(error.status(), error.body_text()),
    };
    let ttl_ms = wanted.ttl_ms.unwrap_or(2_000);
    if ttl_ms > TTL_MS_MAX {
        return refuse(StatusCode::BAD_REQUEST, format!("ttl_ms: {ttl_ms} is more than {TTL_MS_MAX}"));
    }
    let roster = service.index.roster();
    let Some(id) = roster.find(&wanted.engine).map(|engine| engine.id) else {
        return refuse(StatusCode::NOT_FOUND, format!("engine: `{}` is not known. See /v1/engines", wanted.engine));
    };
    let keys = wanted.prompt.keys(roster.block_tokens);
    service.index.write().expect(id, &keys, service.now_ms() + u64::from(ttl_ms));
    Json(serde_json::json!({ "blocks": keys.len() })).into_response()
}

#[derive(Debug, Serialize)]
struct EngineRow {
    engine: String,
    model: String,
    blocks: usize,
    remembered: usize,
    tiers: BTreeMap<&'static str, usize>,
}

async fn engines(State(service): State<Arc<Service>>) -> Response {
    let roster = service.index.roster();
    let writer = service.index.write();
    let row = |engine: &super::roster::EngineView| {
        let (blocks, remembered) = writer.blocks_of(engine.id);
        let tiers = ALL.iter().zip(writer.blocks_in_tiers(engine.id)).filter(|(_, count)| *count > 0);
        EngineRow {
            engine: engine.name.clone(),
            model: engine.model.clone(),
            blocks,
            remembered,
            tiers: tiers.map(|(tier, count)| (tier.name(), count)).collect(),
        }
    };
    let engines: Vec<EngineRow> = roster.engines.iter().flatten().map(row).collect();
    drop(writer);
    let sources: BTreeMap<String, SourceState> = service.fleet.sources();
    Json(serde_json::json!({ "engines": engines, "sources": sources })).into_response()
}

async fn block(State(service): State<Arc<Service>>, Path(key): Path<String>) -> Response {
    let number = key.strip_prefix("0x").map_or_else(|| key.parse(), |digits| u64::from_str_radix(digits, 16));
    let Ok(number) = number else {
        let problem = format!("`{key}` is no block key. Write a number of 64 bits, decimal or with 0x");
        return refuse(StatusCode::BAD_REQUEST, problem);
    };
    let roster = service.index.roster();
    let holders: Vec<_> = service
        .index
        .holders(number)
        .into_iter()
        .filter_map(|(engine, tiers)| Some(serde_json::json!({ "engine": roster.get(engine)?.name, "tiers": tiers })))
        .collect();
    Json(serde_json::json!({ "key": number.to_string(), "holders": holders })).into_response()
}

async fn snapshot(State(service): State<Arc<Service>>) -> Response {
    let head = match service.index.write().snapshot_head() {
        Ok(head) => head,
        Err(error) => return refuse(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    };
    let ids: Vec<EngineId> = service.index.roster().engines.iter().flatten().map(|engine| engine.id).collect();
    // One engine at a time: events of the others are applied meanwhile.
    let parts = ids.into_iter().filter_map(move |id| service.index.write().snapshot_engine(id).transpose());
    let body = futures_util::stream::iter(std::iter::once(Ok(head)).chain(parts));
    ([(axum::http::header::CONTENT_TYPE, "application/octet-stream")], axum::body::Body::from_stream(body))
        .into_response()
}

async fn health(State(service): State<Arc<Service>>) -> Response {
    let caught_up = service.fleet.is_caught_up();
    let status = if caught_up { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(serde_json::json!({ "caught_up": caught_up }))).into_response()
}

async fn openapi() -> Response {
    let text = include_str!("api/openapi.json");
    ([(axum::http::header::CONTENT_TYPE, "application/json")], text).into_response()
}
