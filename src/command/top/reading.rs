//! Reads a fleet's state from what its router and its index serve over HTTP.
//!
//! Nothing that comes is trusted: answers are bounded, and what cannot be read is said by address.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::StatusCode;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use kvcellar_block::error::{Error, Result};
use kvcellar_route::scrape::{count, label, sample};

use super::super::answer::{self, UnreadBody, causes};
use super::fleet::{ClientState, EngineState, FleetState, HitTokens, QueueState, SeenDecision, TierBlocks};

/// How long an answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// Bytes of an answer.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// Where a fleet's state is read.
#[derive(Debug)]
pub(super) struct Sources {
    client: reqwest::Client,
    router: String,
    index: Option<(String, Option<String>)>,
    decisions: usize,
}

/// An answer of the index to `/v1/engines`.
#[derive(Debug, Deserialize)]
struct IndexRows {
    engines: Vec<IndexRow>,
}

#[derive(Debug, Deserialize)]
struct IndexRow {
    #[serde(default)]
    tiers: BTreeMap<String, u64>,
}

fn away(address: &str, problem: impl std::fmt::Display) -> Error {
    Error::TryLater { what: address.to_owned(), holder: problem.to_string() }
}

impl Sources {
    /// A router's admin address, the address of an index with its token, and how many decisions to
    /// keep.
    ///
    /// # Errors
    /// [`Error::Config`] where an address is none of HTTP.
    pub(super) fn new(router: &str, index: Option<(String, Option<String>)>, decisions: usize) -> Result<Self> {
        let address = |field: &'static str, text: &str| {
            if text.starts_with("http://") {
                return Ok(text.trim_end_matches('/').to_owned());
            }
            Err(Error::config(field, format!("`{text}` is no address of HTTP"), "Write e.g. http://127.0.0.1:8092"))
        };
        let client = reqwest::Client::builder().connect_timeout(ANSWER_WITHIN).timeout(ANSWER_WITHIN).build();
        let router = address("router", router)?;
        let index = index.map(|(at, token)| Ok::<_, Error>((address("index", &at)?, token))).transpose()?;
        Ok(Self { client: client.map_err(|error| away(&router, error))?, router, index, decisions })
    }

    /// The router's address.
    pub(super) fn router(&self) -> &str {
        &self.router
    }

    /// The fleet now.
    ///
    /// # Errors
    /// [`Error::TryLater`] where the router does not answer as it should. An index that does not is
    /// said in the state.
    pub(super) async fn read(&self) -> Result<FleetState> {
        let (ready, engines, decisions, metrics, indexed) = tokio::join!(
            self.get(&self.router, "/readyz", None),
            self.json::<Vec<EngineState>>("/debug/engines"),
            self.json::<Vec<SeenDecision>>("/debug/decisions"),
            self.get(&self.router, "/metrics", None),
            self.indexed(),
        );
        let (status, _) = ready?;
        let engines = engines?;
        let (_, metrics) = metrics?;
        let mut decisions = decisions?;
        decisions.reverse();
        decisions.truncate(self.decisions);
        let (indexed, index_problem) = match indexed {
            Some(Ok(engines)) => (Some(engines), None),
            Some(Err(error)) => (None, Some(error.to_string())),
            None => (None, None),
        };
        let tiers = indexed.map_or_else(|| tiers_of_engines(&engines), |indexed| tiers_of_index(&indexed));
        let mut state = FleetState {
            ready: status.is_success(),
            engines,
            tiers,
            decisions,
            index_problem,
            ..FleetState::default()
        };
        (state.hits, state.queue, state.clients) = counts(&String::from_utf8_lossy(&metrics));
        Ok(state)
    }

    async fn indexed(&self) -> Option<Result<IndexRows>> {
        let (address, token) = self.index.as_ref()?;
        let read = async {
            let (status, body) = self.get(address, "/v1/engines", token.as_deref()).await?;
            if status == StatusCode::UNAUTHORIZED {
                return Err(away(address, "it wants a token: see --index-token-file"));
            }
            parsed(address, "/v1/engines", status, &body)
        };
        Some(read.await)
    }

    async fn json<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let (status, body) = self.get(&self.router, path, None).await?;
        parsed(&self.router, path, status, &body)
    }

    async fn get(&self, address: &str, path: &str, token: Option<&str>) -> Result<(StatusCode, Vec<u8>)> {
        let mut request = self.client.get(format!("{address}{path}"));
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let broken = |error: reqwest::Error| away(address, causes(&error));
        let answer = request.send().await.map_err(broken)?;
        let status = answer.status();
        let body = answer::body(answer, ANSWER_BYTES_MAX).await.map_err(|unread| match unread {
            UnreadBody::TooLong => away(address, format!("{path} answers more than {ANSWER_BYTES_MAX} bytes")),
            UnreadBody::Broken(error) => broken(error),
        })?;
        Ok((status, body))
    }
}

fn parsed<T: DeserializeOwned>(address: &str, path: &str, status: StatusCode, body: &[u8]) -> Result<T> {
    if !status.is_success() {
        return Err(away(address, format!("{path} answers {status}: is that its address?")));
    }
    serde_json::from_slice(body).map_err(|error| away(address, format!("{path} cannot be read: {error}")))
}

fn tiers_of_index(indexed: &IndexRows) -> TierBlocks {
    let mut blocks = BTreeMap::new();
    for (tier, count) in indexed.engines.iter().flat_map(|engine| &engine.tiers) {
        *blocks.entry(tier.clone()).or_insert(0) += count;
    }
    TierBlocks { from: "index", blocks }
}

fn tiers_of_engines(engines: &[EngineState]) -> TierBlocks {
    let mut blocks = BTreeMap::new();
    for engine in engines {
        for (tier, count) in [("dram", engine.dram_blocks), ("nvme", engine.nvme_blocks)] {
            if let Some(count) = count {
                *blocks.entry(tier.to_owned()).or_insert(0) += count;
            }
        }
    }
    TierBlocks { from: "engines", blocks }
}

/// What the router's metrics say.
fn counts(text: &str) -> (HitTokens, QueueState, ClientState) {
    let (mut hits, mut queue, mut clients) = (HitTokens::default(), QueueState::default(), ClientState::default());
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, labels, value)) = sample(line) else { continue };
        let count = count(value);
        let named = |name| label(labels, name).unwrap_or_default().to_owned();
        match name.strip_prefix("kvcellar_route_").unwrap_or_default() {
            "reported_prompt_tokens_total" => hits.prompt = count,
            "predicted_cached_tokens_total" => hits.predicted = count,
            "reported_cached_tokens_total" => hits.reported = count,
            "queue_requests" => {
                let priority = label(labels, "priority").and_then(|text| text.parse().ok()).unwrap_or(0);
                *queue.waiting.entry(priority).or_insert(0) += count;
            }
            "queue_bytes" => queue.bytes = count,
            "refused_total" => *queue.dropped.entry(named("reason")).or_insert(0) += count,
            "client_connections" => clients.open = count,
            "clients_cut_total" => *clients.cut.entry(named("reason")).or_insert(0) += count,
            _ => {}
        }
    }
    (hits, queue, clients)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_routers_metrics_are_read() {
        let text = r#"# TYPE kvcellar_route_refused counter
kvcellar_route_refused_total{reason="shed"} 3
kvcellar_route_refused_total{reason="queue_full"} 2
kvcellar_route_queue_requests{priority="-1"} 4.0
kvcellar_route_queue_requests{priority="10"} 1.0
kvcellar_route_queue_bytes 900
kvcellar_route_reported_prompt_tokens_total 200
kvcellar_route_predicted_cached_tokens_total 150
kvcellar_route_reported_cached_tokens_total 100
kvcellar_route_clients_cut_total{reason="slow_body"} 5
kvcellar_route_client_connections 12
nonsense
# EOF
"#;
        let (hits, queue, clients) = counts(text);
        assert_eq!(hits.shares(), Some((0.75, 0.5)));
        assert_eq!(queue.waiting.into_iter().collect::<Vec<_>>(), [(-1, 4), (10, 1)]);
        assert_eq!((queue.bytes, queue.dropped["shed"], queue.dropped["queue_full"]), (900, 3, 2));
        assert_eq!((clients.open, clients.cut["slow_body"]), (12, 5));
        assert_eq!(HitTokens::default().shares(), None, "nobody has reported");
    }

    #[test]
    fn blocks_are_counted_over_all_engines() {
        let engine = |dram_blocks, nvme_blocks| EngineState { dram_blocks, nvme_blocks, ..EngineState::default() };
        let tiers = tiers_of_engines(&[engine(Some(3), None), engine(Some(4), Some(5)), engine(None, None)]);
        assert_eq!(tiers.blocks.into_iter().collect::<Vec<_>>(), [("dram".to_owned(), 7), ("nvme".to_owned(), 5)]);
        let text = r#"{"engines": [{"engine": "a", "tiers": {"gpu": 2}}, {"engine": "b", "tiers": {"gpu": 1, "cpu": 8}}], "sources": {}}"#;
        let tiers = tiers_of_index(&serde_json::from_str(text).expect("an answer"));
        assert_eq!((tiers.blocks["gpu"], tiers.blocks["cpu"], tiers.from), (3, 8, "index"));
    }

    #[test]
    fn addresses_that_are_none_are_refused_by_option() {
        let wrong = |router: &str, index: Option<&str>| {
            let index = index.map(|index| (index.to_owned(), None));
            Sources::new(router, index, 1).expect_err("no address").to_string()
        };
        assert!(wrong("127.0.0.1:8092", None).contains("router"));
        assert!(wrong("http://127.0.0.1:8092", Some("8090")).contains("index"));
    }
}
