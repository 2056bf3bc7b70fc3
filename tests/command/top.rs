//! `kvcellar top` over a router and an index that are processes of their own.

use std::process::{Command, Output};
use std::sync::Arc;

use kvcellar_events::encode::encode;
use kvcellar_events::publisher::Publisher;
use kvcellar_events::wire::{Batch, BatchArena, Event, Hashes, Stored};
use serde_json::{Value, json};

use crate::fleet::{RouterProcess, Server, Work, engine, eventually};

async fn top(arguments: Vec<String>) -> Output {
    let run = move || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvcellar"));
        command.arg("top").args(&arguments).output().expect("it runs")
    };
    tokio::task::spawn_blocking(run).await.expect("it ends")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_is_read_and_shown() {
    let work = Arc::new(Work::default());
    let mut router = RouterProcess::start(&engine(&work).await, &[]).await;
    let client = reqwest::Client::new();
    for _ in 0..2 {
        let request = client
            .post(format!("http://{}/v1/completions", router.http))
            .header("content-type", "application/json")
            .body(json!({"model": "m", "prompt": "x".repeat(4_000)}).to_string());
        assert!(request.send().await.expect("an answer").text().await.is_ok());
    }
    router.reaches(r#"kvcellar_route_outcomes_total{engine="a",outcome="done"}"#, 2).await;
    let read = || async {
        let done = top(vec!["--json".to_owned(), "--router".to_owned(), router.admin.clone()]).await;
        let state: Value = serde_json::from_slice(&done.stdout).unwrap_or_else(|_| panic!("{}", text(&done.stderr)));
        (state["engines"][0]["running"] == json!(2.0)).then_some(state)
    };
    let state = eventually("its engine was scraped", read).await;
    let engine = &state["engines"][0];
    assert_eq!((&engine["name"], &engine["health"], &engine["role"]), (&json!("a"), &json!("healthy"), &json!("both")));
    assert_eq!(
        (&engine["models"], &engine["kv_usage"], &engine["events"]),
        (&json!(["m"]), &json!(0.25), &Value::Null)
    );
    assert_eq!(state["tiers"], json!({"from": "engines", "blocks": {"dram": 40, "nvme": 7}}));
    assert_eq!((&state["hits"]["prompt"], &state["hits"]["reported"]), (&json!(200), &json!(120)));
    let decisions = state["decisions"].as_array().expect("a list");
    assert_eq!(
        (decisions.len(), &decisions[0]["id"], &decisions[1]["id"]),
        (2, &json!(1), &json!(0)),
        "the newest first"
    );
    assert_eq!((&decisions[0]["why"], &decisions[0]["reported_cached"]), (&json!("only"), &json!(60)));
    assert!(decisions[0]["predicted_cached"].as_u64() > Some(0), "the same prompt again: {decisions:?}");
    assert!(decisions[1]["predicted_ttft_s"].as_f64() > Some(0.0), "{decisions:?}");

    let done = top(vec!["--once".to_owned(), "--router".to_owned(), router.admin.clone()]).await;
    let frame = text(&done.stdout);
    assert!(done.status.success() && frame.contains("ready, 1 of 1 engines healthy"), "{frame}");
    assert!(frame.lines().all(|line| line.chars().count() <= 100), "{frame}");
    assert!(!frame.contains('\u{1b}'), "no escape sequences");

    router.server.kill();
    let done = top(vec!["--once".to_owned(), "--router".to_owned(), router.admin.clone()]).await;
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains(&router.admin), "{}", text(&done.stderr));
    let done = top(vec!["--router".to_owned(), router.admin.clone()]).await;
    assert!(text(&done.stderr).contains("--once"), "no terminal: {}", text(&done.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_counts_blocks_in_each_tier() {
    let mut publisher = Publisher::bind("tcp://127.0.0.1:0", Some("tcp://127.0.0.1:0"), "", 16).await.expect("sockets");
    let source =
        format!("endpoint={},replay={},name=a", publisher.endpoint(), publisher.replay_endpoint().expect("one"));
    let index = Server::start(&["index", "serve", "--listen", "127.0.0.1:0", "--engine", &source]);
    let index = format!("http://{}", index_address(&index).await);
    for (medium, blocks) in [("GPU", 3), ("CPU", 5)] {
        publisher.publish(stored(medium, blocks)).await.expect("published");
    }
    let router = RouterProcess::start(&engine(&Arc::default()).await, &[]).await;
    let arguments: Vec<String> =
        ["--json", "--router", &router.admin, "--index", &index].into_iter().map(str::to_owned).collect();
    let read = || async {
        let done = top(arguments.clone()).await;
        let state: Value = serde_json::from_slice(&done.stdout).unwrap_or_else(|_| panic!("{}", text(&done.stderr)));
        (state["tiers"]["blocks"]["cpu"] == json!(5)).then_some(state)
    };
    let state = eventually("the index has the blocks", read).await;
    assert_eq!(state["tiers"], json!({"from": "index", "blocks": {"cpu": 5, "gpu": 3}}));
    let away = ["--json", "--router", &router.admin, "--index", "http://127.0.0.1:9"].map(str::to_owned);
    let state: Value = serde_json::from_slice(&top(away.to_vec()).await.stdout).expect("the router's part");
    assert_eq!((&state["tiers"]["from"], &state["engines"][0]["name"]), (&json!("engines"), &json!("a")));
    assert!(state["index_problem"].as_str().is_some_and(|text| text.contains("127.0.0.1:9")), "{state}");
}

/// A batch that says that so many blocks are there.
fn stored(medium: &str, blocks: usize) -> Vec<u8> {
    let arena = BatchArena { hashes: (1..=blocks as u64).collect(), tokens: (0..2 * blocks as u32).collect() };
    let event = Stored {
        hashes: Hashes { range: 0..blocks, digests: None },
        tokens: 0..2 * blocks,
        block_size: 2,
        medium: Some(medium),
        ..Stored::default()
    };
    let batch = Batch { events: vec![Event::Stored(Box::new(event))], ..Batch::default() };
    let mut payload = Vec::new();
    encode(&batch, &arena, &mut payload);
    payload
}

async fn index_address(index: &Server) -> std::net::SocketAddr {
    index.address("index at http://").await
}
