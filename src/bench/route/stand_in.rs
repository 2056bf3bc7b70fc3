//! Stands in for engines: answers at once, so that what is measured is the way to them. Speaks as
//! much of vLLM as the router asks for.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::http::header::CONTENT_TYPE;
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use kvcellar_block::error::{Error, Result};
use kvcellar_events::publisher::Publisher;
use kvcellar_index::api::clients::ClientLimits;
use kvcellar_index::api::serving::Server;

const METRICS: &str = "vllm:num_requests_running{engine=\"0\"} 0.0\nvllm:num_requests_waiting{engine=\"0\"} 0.0\n\
    vllm:kv_cache_usage_perc{engine=\"0\"} 0.1\nvllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"65536\"} 1.0\n";
const MODELS: &str = r#"{"object":"list","data":[{"id":"m","object":"model","parent":null}]}"#;
const ANSWER: &str = r#"{"id":"cmpl-1","object":"text_completion","model":"m","choices":[{"index":0,"text":" x","finish_reason":"length"}],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}"#;

/// One engine.
pub(super) struct StandIn {
    /// As the router's option `--engine` names it.
    pub(super) spec: String,
    /// Its port on 127.0.0.1.
    pub(super) port: u16,
    serving: JoinHandle<()>,
    /// Publishes nothing; it is there to be followed.
    _events: Publisher,
}

impl StandIn {
    /// Starts one.
    ///
    /// # Errors
    /// [`Error::Io`]; those of [`Publisher::bind`].
    pub(super) async fn start(number: usize) -> Result<Self> {
        let refused = |error| Error::io("listening at", "127.0.0.1", error, "Allow this process more open files");
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(refused)?;
        let port = listener.local_addr().map_err(refused)?.port();
        let json = |text: &'static str| ([(CONTENT_TYPE, "application/json")], text);
        let routes = Router::new()
            .route("/metrics", get(|| async { METRICS }))
            .route("/v1/models", get(move || async move { json(MODELS) }))
            .route("/v1/completions", post(move |_: Bytes| async move { json(ANSWER) }))
            .layer(axum::extract::DefaultBodyLimit::disable());
        let server = Server { listener, router: routes, limits: ClientLimits::default(), counts: Arc::default() };
        // Ends with the benchmark.
        let serving = tokio::spawn(server.serve(std::future::pending()));
        let events = Publisher::bind("tcp://127.0.0.1:0", Some("tcp://127.0.0.1:0"), "", 16).await?;
        let replay = events.replay_endpoint().unwrap_or_default();
        let spec = format!("name=e{number},url=http://127.0.0.1:{port},events={},replay={replay}", events.endpoint());
        Ok(Self { spec, port, serving, _events: events })
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.serving.abort();
    }
}
