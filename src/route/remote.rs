//! Token ids from an engine, where this process cannot say them: vLLM's render endpoints.

use std::time::Duration;

use serde_json::{Map, Value as Json};

use super::engine::Engine;
use super::request::Kind;

/// How long an engine may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Asks engines for the ids that a request becomes there.
#[derive(Debug, Clone)]
pub struct Remote {
    client: reqwest::Client,
}

impl Remote {
    /// A client.
    ///
    /// # Errors
    /// [`crate::error::Error::TryLater`] when there is no HTTP client to be had.
    pub fn new() -> crate::error::Result<Self> {
        let built = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build();
        let client = built.map_err(|error| crate::error::Error::TryLater {
            what: "an HTTP client".to_owned(),
            holder: error.to_string(),
        })?;
        Ok(Self { client })
    }

    /// Posts JSON to an engine; `None` when it cannot answer.
    pub async fn post(&self, engine: &Engine, path: &str, body: &Json) -> Option<Json> {
        let request = self.client.post(format!("{}{path}", engine.spec.url)).header("content-type", "application/json");
        let answer = request.body(body.to_string()).send().await.ok()?.error_for_status().ok()?;
        serde_json::from_slice(&answer.bytes().await.ok()?).ok()
    }

    /// The ids of a request; of several prompts the first's.
    pub async fn ids(&self, engine: &Engine, kind: Kind, body: &Map<String, Json>) -> Option<Vec<u32>> {
        let path = match kind {
            Kind::Chat => "/v1/chat/completions/render",
            Kind::Completion => "/v1/completions/render",
            Kind::Other => return None,
        };
        let answer = self.post(engine, path, &Json::Object(body.clone())).await?;
        let made = answer.get(0).unwrap_or(&answer);
        ids_of(made.get("token_ids")?)
    }
}

/// A JSON list of token ids.
pub fn ids_of(list: &Json) -> Option<Vec<u32>> {
    let id = |value: &Json| value.as_u64().and_then(|id| u32::try_from(id).ok());
    list.as_array()?.iter().map(id).collect()
}
