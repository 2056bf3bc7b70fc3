//! `kvcellar warm` before an engine that notes what it is asked, and through a router.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::api_engine::{ApiEngine, json_of, run};
use crate::fleet::{RouterProcess, Work, engine};

const METRICS: &str = "";

fn usage(prompt: u64, cached: u64) -> Value {
    json!({"usage": {"prompt_tokens": prompt, "prompt_tokens_details": {"cached_tokens": cached}}})
}

#[tokio::test(flavor = "multi_thread")]
async fn every_line_is_sent_as_a_request_for_one_token() {
    let engine = ApiEngine::start(usage(10, 4), METRICS, 1).await;
    let lines = "\"a text\"\n\n{\"prompt\": [1, 2], \"model\": \"m\", \"max_tokens\": 500}\n\
                 {\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"cache_salt\": \"own\", \"stream\": true}\n";
    let done = run(&["warm", "-", "--url", &engine.url, "--cache-salt", "common", "--json"], lines).await;
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    let told = json_of(&done);
    assert_eq!((&told["prompts"], &told["tokens"], &told["cached_tokens"]), (&json!(3), &json!(30), &json!(12)));
    assert_eq!(told["failed"], json!([]));
    let mut asked: Vec<(String, Value)> = engine.asked().into_iter().map(|(path, body, _)| (path, body)).collect();
    asked.sort_by_key(|(path, body)| (path.clone(), body["model"].to_string()));
    let messages = json!([{"role": "user", "content": "hi"}]);
    assert_eq!(
        asked,
        [
            (
                "/v1/chat/completions".to_owned(),
                json!({"model": "first", "messages": messages, "cache_salt": "own", "max_tokens": 1})
            ),
            (
                "/v1/completions".to_owned(),
                json!({"model": "first", "prompt": "a text", "cache_salt": "common", "max_tokens": 1})
            ),
            (
                "/v1/completions".to_owned(),
                json!({"model": "m", "prompt": [1, 2], "cache_salt": "common", "max_tokens": 1})
            ),
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn so_many_are_under_way_at_once_as_are_allowed() {
    // The engine answers when four have come, and never to three.
    let engine = ApiEngine::start(usage(1, 0), METRICS, 4).await;
    let lines = "\"x\"\n".repeat(12);
    let done = run(&["warm", "-", "--url", &engine.url, "--concurrency", "4", "--json"], &lines).await;
    assert_eq!((done.status.code(), engine.asked().len()), (Some(0), 12), "{done:?}");
    let stuck = ["warm", "-", "--url", &engine.url, "--concurrency", "3", "--timeout-s", "1", "--json"];
    let done = run(&stuck, &"\"x\"\n".repeat(3)).await;
    assert_eq!(done.status.code(), Some(1));
    assert_eq!(json_of(&done)["failed"].as_array().map(Vec::len), Some(3), "{done:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_is_counted_and_named_by_its_line() {
    let engine = ApiEngine::start(usage(10, 0), METRICS, 1).await;
    let lines = "\"well\"\n\n\"refuse me\"\n\"well, too\"\n\"refuse me as well\"\n";
    let done = run(&["warm", "-", "--url", &engine.url, "--json"], lines).await;
    assert_eq!(done.status.code(), Some(1));
    let told = json_of(&done);
    let named: Vec<u64> =
        told["failed"].as_array().expect("a list").iter().filter_map(|it| it["line"].as_u64()).collect();
    assert_eq!((named, &told["tokens"]), (vec![3, 5], &json!(20)));
    assert_eq!(told["failed"][0]["problem"], "it answers 400: this is too long");
    let done = run(&["warm", "-", "--url", &engine.url], lines).await;
    let (said, table) = (String::from_utf8_lossy(&done.stderr), String::from_utf8_lossy(&done.stdout));
    assert!(said.contains("line 3: it answers 400") && said.contains("line 5:"), "{said}");
    assert!(table.contains("cached already"), "{table}");
    let gone = run(&["warm", "-", "--url", "http://127.0.0.1:1", "--model", "m", "--json"], "\"x\"\n").await;
    assert_eq!(gone.status.code(), Some(1));
    assert!(json_of(&gone)["failed"][0]["problem"].as_str().is_some_and(|why| why.contains("does not answer")));
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_that_are_no_prompts_are_named_before_anything_is_sent() {
    let engine = ApiEngine::start(usage(10, 0), METRICS, 1).await;
    let done = run(&["warm", "-", "--url", &engine.url], "\"well\"\n{\"text\": \"x\"}\nnot JSON\n").await;
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!((done.status.code(), engine.asked().len()), (Some(1), 0), "{said}");
    for part in ["line 2: it has neither `prompt` nor `messages`", "line 3: no JSON", "nothing was sent"] {
        assert!(said.contains(part), "{said}");
    }
    let nowhere = run(&["warm", "/nowhere", "--url", &engine.url], "").await;
    assert_eq!(nowhere.status.code(), Some(1));
    let https = run(&["warm", "-", "--url", "https://engine"], "\"x\"\n").await;
    assert!(String::from_utf8_lossy(&https.stderr).contains("http://127.0.0.1:8000"), "{https:?}");
    let nothing = run(&["warm", "-", "--url", &engine.url, "--json"], "\n\n").await;
    assert_eq!((nothing.status.code(), json_of(&nothing)["prompts"].clone()), (Some(0), json!(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_takes_the_prompts_as_it_takes_requests() {
    let router = RouterProcess::start(&engine(&Arc::new(Work::default())).await, &[]).await;
    let url = format!("http://{}", router.http);
    let done = run(&["warm", "-", "--url", &url, "--json"], "\"one\"\n\"two\"\n").await;
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    assert_eq!((&json_of(&done)["tokens"], &json_of(&done)["cached_tokens"]), (&json!(200), &json!(120)));
}
