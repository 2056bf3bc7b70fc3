//! What operators see of a router: health, metrics, the last decisions, engines, and the token ids
//! of a request.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value as Json_, json};

use super::metrics::MetricSources;
use super::prompt::Prompt;
use super::request::{Kind, Request};
use super::router::Router;
use super::streams;
use kvcellar_index::api::METRICS_TYPE;

/// The routes.
pub fn routes(router: Arc<Router>) -> axum::Router {
    axum::Router::new()
        .route("/healthz", get(async || "ok"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/debug/decisions", get(decisions))
        .route("/debug/engines", get(engines))
        .route("/debug/tokens/{kind}", post(tokens))
        .layer(axum::extract::DefaultBodyLimit::max(64 << 20))
        .with_state(router)
}

async fn ready(State(router): State<Arc<Router>>) -> Response {
    let usable = router.engines.all().iter().filter(|engine| engine.is_usable()).count();
    let status = if usable > 0 { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let faults = router.setup.fleet.as_ref().map(|fleet| streams::faults(&router.engines, fleet));
    let faults: BTreeMap<String, &str> =
        faults.into_iter().flatten().map(|(name, fault)| (name, fault.as_str())).collect();
    let mut told = json!({"usable_engines": usable, "events_missing": faults});
    if let Some(peers) = &router.setup.peers {
        told["peers"] = json!(peers.states());
    }
    (status, Json(told)).into_response()
}

async fn metrics(State(router): State<Arc<Router>>) -> Response {
    match router.metrics.text(&MetricSources {
        engines: &router.engines,
        fleet: router.setup.fleet.as_ref(),
        gate: router.setup.gate.as_deref(),
        peers: router.setup.peers.as_ref(),
    }) {
        Some(text) => ([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response(),
        None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn decisions(State(router): State<Arc<Router>>) -> Response {
    Json(router.ring.all()).into_response()
}

async fn engines(State(router): State<Arc<Router>>) -> Response {
    let sources = router.setup.fleet.as_ref().map(kvcellar_index::fleet::FleetView::sources);
    let faults = router.setup.fleet.as_ref().map(|fleet| streams::faults(&router.engines, fleet)).unwrap_or_default();
    let row = |engine: &Arc<super::engine::Engine>| {
        let told = engine.told.load();
        let models: Vec<String> = engine.models.load().iter().map(|model| model.id.clone()).collect();
        let (blocks, capacity) = engine.recent().sizes();
        let backlog_s = engine.backlog().seconds;
        let (requests, tokens) = {
            let books = engine.books();
            (books.requests(), books.tokens())
        };
        let events = sources.as_ref().and_then(|sources| sources.get(&engine.spec.name)).map(|source| {
            json!({
                "connected": source.connected, "age_s": source.heard.map(|heard| heard.elapsed().as_secs_f64()),
                "fault": faults.get(&engine.spec.name).map(|fault| fault.as_str()),
            })
        });
        json!({
            "name": engine.spec.name, "url": engine.spec.url, "health": engine.health(), "models": models,
            "running": told.running, "waiting": told.waiting, "kv_usage": told.kv_usage, "kv_tokens": told.kv_tokens,
            "in_flight": requests, "in_flight_tokens": tokens, "backlog_s": backlog_s,
            "role": engine.spec.role.name(), "events": events, "dram_blocks": told.offloaded.dram, "nvme_blocks": told.offloaded.nvme,
            "remembered_blocks": blocks, "remembered_blocks_max": capacity, "prefill_tokens_per_second": engine.rates().prefill,
        })
    };
    Json(router.engines.all().iter().map(row).collect::<Vec<_>>()).into_response()
}

/// The ids that a request becomes here, or why they are not known here; for chats the text as well.
async fn tokens(State(router): State<Arc<Router>>, Path(kind): Path<String>, body: Bytes) -> Response {
    let kind = match kind.as_str() {
        "completion" => Kind::Completion,
        "chat" => Kind::Chat,
        _ => return (StatusCode::NOT_FOUND, "write /debug/tokens/completion or /debug/tokens/chat").into_response(),
    };
    let request = match Request::read(kind, body) {
        Ok(request) => request,
        Err(refusal) => return (StatusCode::BAD_REQUEST, refusal.body()).into_response(),
    };
    let models = &router.setup.models;
    let text = match kind {
        Kind::Chat => models.of(request.model.as_deref()).and_then(|model| model.chat_text(&request.body)).ok(),
        _ => None,
    };
    let answer: Json_ = match Prompt::ids(&request, models) {
        Ok((ids, from)) => json!({"ids": ids, "from": from, "text": text}),
        Err(inexact) => json!({"inexact": inexact.name(), "problem": inexact.to_string(), "text": text}),
    };
    Json(answer).into_response()
}
