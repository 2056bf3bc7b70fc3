//! An engine's API as commands that are its clients meet it: it notes what it is asked, and refuses
//! what it is told to refuse.

use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use axum::Json;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Barrier;

/// What an engine was asked: path, body, `x-data-parallel-rank`.
pub(crate) type Asked = Arc<Mutex<Vec<(String, Value, Option<String>)>>>;

/// How an engine answers.
pub(crate) struct ApiEngine {
    /// Its address.
    pub(crate) url: String,
    /// What it was asked so far.
    pub(crate) asked: Asked,
}

impl ApiEngine {
    /// One that answers with `answer`, whose metrics are `metrics`. It refuses prompts with the
    /// word `refuse`. `together`: so many requests are answered at once, and not before.
    pub(crate) async fn start(answer: Value, metrics: &'static str, together: usize) -> Self {
        let asked: Asked = Arc::default();
        let barrier = Arc::new(Barrier::new(together));
        let noted = Arc::clone(&asked);
        let complete = move |path: &'static str| {
            let (noted, barrier, answer) = (Arc::clone(&noted), Arc::clone(&barrier), answer.clone());
            post(async move |headers: HeaderMap, Json(body): Json<Value>| {
                let rank = headers.get("x-data-parallel-rank").map(|rank| rank.to_str().expect("text").to_owned());
                let is_refused = body.to_string().contains("refuse");
                noted.lock().expect("whole").push((path.to_owned(), body, rank));
                barrier.wait().await;
                if is_refused { refused() } else { Json(answer).into_response() }
            })
        };
        let routes = axum::Router::new()
            .route("/metrics", get(async move || metrics))
            .route("/v1/models", get(async || Json(json!({"object": "list", "data": [{"id": "first"}, {"id": "m"}]}))))
            .route("/v1/completions", complete("/v1/completions"))
            .route("/v1/chat/completions", complete("/v1/chat/completions"));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        Self { url, asked }
    }

    /// What it was asked, in any order.
    pub(crate) fn asked(&self) -> Vec<(String, Value, Option<String>)> {
        self.asked.lock().expect("whole").clone()
    }
}

fn refused() -> Response {
    let error = json!({"error": {"message": "this is too long", "code": 400}});
    (StatusCode::BAD_REQUEST, Json(error)).into_response()
}

/// Runs the program with these arguments and this standard input.
pub(crate) async fn run(arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvcellar"));
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let input = input.to_owned();
    let work = tokio::task::spawn_blocking(move || {
        let mut child = command.spawn().expect("it starts");
        let mut stdin = child.stdin.take().expect("its input");
        // It may end without reading.
        let _written = std::io::Write::write_all(&mut stdin, input.as_bytes());
        drop(stdin);
        child.wait_with_output().expect("it ends")
    });
    work.await.expect("no panic")
}

/// Its standard output as JSON.
pub(crate) fn json_of(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}
