//! Token ids from an engine, where this process cannot say them: vLLM's render endpoints, and where
//! those are not served (vLLM 0.32 does so only when it is started with `--enable-scale-out`) its
//! tokenizer.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::http::Method;
use bytes::Bytes;
use serde_json::Value as Json;

use super::engine::Engine;
use super::request::{Kind, Request};
use super::upstream::Upstream;
use crate::limits;

/// How long an engine may take when nobody waits for it, and how much it may say.
const ANSWER: (Duration, usize) = (Duration::from_secs(5), 64 << 20);

/// Asks engines for the ids that a request becomes there.
#[derive(Debug, Clone)]
pub struct Remote {
    upstream: Upstream,
}

impl Remote {
    /// Over these connections.
    pub fn new(upstream: Upstream) -> Self {
        Self { upstream }
    }

    /// Posts JSON to an engine; `None` when it cannot answer.
    pub async fn post(&self, engine: &Engine, path: &str, body: Bytes) -> Option<Json> {
        let (status, answer) =
            self.upstream.ask(Method::POST, &format!("{}{path}", engine.spec.url), body, ANSWER).await.ok()?;
        status.is_success().then(|| serde_json::from_slice(&answer).ok())?
    }

    /// The ids of a request, from any of these engines, soon or not at all; of several prompts the
    /// first's. `is_plain`: nothing in it changes its tokens but what the engine's tokenizer knows
    /// as well.
    pub async fn ids(&self, engines: &[Arc<Engine>], request: &Request, is_plain: bool) -> Option<Vec<u32>> {
        let path = match request.kind {
            Kind::Chat | Kind::Messages | Kind::Responses => "/v1/chat/completions/render",
            Kind::Completion => "/v1/completions/render",
            Kind::Generate | Kind::Other => return None,
        };
        let body = match request.kind {
            Kind::Messages | Kind::Responses => {
                let mut chat = request.as_chat().ok()?.into_owned();
                chat.extend(request.model.clone().map(|model| ("model".to_owned(), Json::String(model))));
                Json::Object(chat).to_string().into()
            }
            _ => request.raw.clone(),
        };
        let answering: Vec<_> = engines.iter().filter(|engine| !engine.is_silent()).collect();
        let engine = answering.get(fastrand::usize(..answering.len().max(1)))?;
        let asked = tokio::time::timeout(limits::IDS_WITHIN, self.ask(engine, path, body, is_plain)).await;
        if asked.is_err() {
            engine.fell_silent();
            log::warn!(
                "{}: no token ids within {} ms: it is not asked again for {} s",
                engine.spec.name,
                limits::IDS_WITHIN.as_millis(),
                limits::IDS_SILENCE.as_secs()
            );
        }
        asked.ok().flatten()
    }

    async fn ask(&self, engine: &Engine, path: &str, body: Bytes, is_plain: bool) -> Option<Vec<u32>> {
        let in_vain = is_plain && engine.renders_not.load(Ordering::Relaxed);
        if !in_vain && let Some(answer) = self.post(engine, path, body.clone()).await {
            return ids_of(answer.get(0).unwrap_or(&answer).get("token_ids")?);
        }
        if !is_plain {
            return None;
        }
        let tokens = self.post(engine, "/tokenize", body).await?;
        // It answers this and not that: the next request need not ask in vain.
        engine.renders_not.store(true, Ordering::Relaxed);
        ids_of(tokens.get("tokens")?)
    }
}

/// A JSON list of token ids.
pub fn ids_of(list: &Json) -> Option<Vec<u32>> {
    let id = |value: &Json| value.as_u64().and_then(|id| u32::try_from(id).ok());
    list.as_array()?.iter().map(id).collect()
}
