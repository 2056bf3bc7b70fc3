//! A router as a process of its own, and an engine for it.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// Looks again and again until there is something; fails after a minute.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    for _ in 0..3_000 {
        if let Some(found) = look().await {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("it never happened: {what}");
}

/// What an engine has done.
#[derive(Debug, Default)]
pub(crate) struct Work {
    /// Endless answers that go on.
    pub(crate) open: AtomicU64,
    /// Bytes of endless answers.
    pub(crate) bytes: AtomicU64,
}

/// One endless answer.
struct Endless(Arc<Work>);

impl Endless {
    fn next(&self) -> Bytes {
        const PART: usize = 16 << 10;
        self.0.bytes.fetch_add(PART as u64, Ordering::Relaxed);
        Bytes::from_static(&[b'x'; PART])
    }
}

impl Drop for Endless {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An engine that answers at once, and without an end where a stream is asked for. Its address.
pub(crate) async fn engine(work: &Arc<Work>) -> String {
    const METRICS: &str = "vllm:num_requests_running 2.0\nvllm:kv_cache_usage_perc 0.25\n\
        vllm:kvcellar_pool_slots{state=\"filled\"} 40.0\nvllm:kvcellar_nvme_blocks 7.0\n";
    let work = Arc::clone(work);
    let complete = move |Json(request): Json<Value>| async move { answer(&work, &request) };
    let routes = axum::Router::new()
        .route("/metrics", get(async || METRICS))
        .route("/v1/models", get(async || Json(json!({"object": "list", "data": [{"id": "m", "parent": null}]}))))
        .route("/v1/completions", post(complete));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move { axum::serve(listener, routes).await });
    format!("http://{address}")
}

fn answer(work: &Arc<Work>, request: &Value) -> Response {
    if request["stream"] == json!(true) {
        work.open.fetch_add(1, Ordering::Relaxed);
        let endless = Endless(Arc::clone(work));
        let parts = std::iter::repeat_with(move || Ok::<_, std::io::Error>(endless.next()));
        return Body::from_stream(tokio_stream::iter(parts)).into_response();
    }
    let usage = json!({"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101, "prompt_tokens_details": {"cached_tokens": 60}});
    Json(json!({"id": "1", "object": "text_completion", "model": "m", "choices": [], "usage": usage})).into_response()
}

/// A command that serves.
pub(crate) struct Server {
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Server {
    /// Starts it.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvcellar"));
        let mut child = command.args(arguments).stderr(Stdio::piped()).spawn().expect("it starts");
        let log = Arc::new(Mutex::new(String::new()));
        let (lines, kept) = (BufReader::new(child.stderr.take().expect("its log")), Arc::clone(&log));
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                let mut log = kept.lock().unwrap_or_else(PoisonError::into_inner);
                log.push_str(&line);
                log.push('\n');
            }
        });
        Self { child, log }
    }

    /// Its number.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has said.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The address that it says after these words.
    pub(crate) async fn address(&self, after: &str) -> SocketAddr {
        eventually(after, || async {
            let log = self.log();
            let (_, rest) = log.split_once(after)?;
            rest.split_whitespace().next()?.parse().ok()
        })
        .await
    }

    /// Ends it.
    pub(crate) fn kill(&mut self) {
        // It may have ended itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A router with its addresses.
pub(crate) struct RouterProcess {
    /// Its process.
    pub(crate) server: Server,
    /// Where clients ask.
    pub(crate) http: SocketAddr,
    /// Where operators ask.
    pub(crate) admin: String,
}

impl RouterProcess {
    /// Starts one for an engine, and waits until that can take requests.
    pub(crate) async fn start(engine: &str, options: &[&str]) -> Self {
        let named = format!("url={engine},name=a");
        let mut all = vec!["route", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--engine", &named];
        all.extend(["--scrape-ms", "50"]);
        all.extend(options);
        let server = Server::start(&all);
        let http = server.address("router at http://").await;
        let admin = format!("http://{}", server.address("admin at http://").await);
        let router = Self { server, http, admin };
        let ready = || async { reqwest::get(format!("{}/readyz", router.admin)).await.ok()?.error_for_status().ok() };
        eventually("the router is ready", ready).await;
        router
    }

    /// A sample of its metrics; 0 where there is none.
    pub(crate) async fn metric(&self, name: &str) -> u64 {
        let text = reqwest::get(format!("{}/metrics", self.admin)).await.expect("metrics").text().await.expect("text");
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0, |value| kvcellar_route::scrape::count(value.parse().expect("a number")))
    }

    /// Waits for a sample of its metrics.
    pub(crate) async fn reaches(&self, name: &str, wanted: u64) {
        eventually(&format!("{name} is {wanted}"), || async { (self.metric(name).await == wanted).then_some(()) })
            .await;
    }
}
