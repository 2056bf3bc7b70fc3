//! `kvcellar forget` before an engine that notes what it is asked, and over files.

use serde_json::{Value, json};

use kvcellar_testkit::stores::place::Place;

use crate::api_engine::{ApiEngine, json_of, run};

const ONE: &str = "vllm:kvcellar_pins{engine=\"0\",model_name=\"m\"} 0.0\n";
const TWO: &str = "vllm:kvcellar_pins{engine=\"0\",model_name=\"m\"} 0.0\n\
                   vllm:kvcellar_pins{engine=\"1\",model_name=\"m\"} 0.0\n";

fn told(failed: u64) -> Value {
    let report = json!({
        "dram_blocks": 3, "nvme_blocks": 5, "slots_erased": 4, "extents_erased": 5, "bytes_erased": 900, "failed": failed
    });
    json!({"choices": [], "kv_transfer_params": {"kvcellar": {"forgotten": report}}})
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_is_asked_by_a_request_with_the_salt() {
    let engine = ApiEngine::start(told(0), ONE, 1).await;
    let done = run(&["forget", "--salt-file", "-", "--url", &engine.url, "--json"], "ada\n").await;
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    assert_eq!(json_of(&done)[0]["engine"]["nvme_blocks"], 5);
    let body = json!({
        "model": "first", "prompt": [1], "max_tokens": 1, "cache_salt": "ada",
        "kv_transfer_params": {"kvcellar": {"forget": true}},
    });
    assert_eq!(engine.asked(), [("/v1/completions".to_owned(), body, None)]);
    let table = run(&["forget", "--salt", "ada", "--model", "m", "--url", &engine.url], "").await;
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(table.contains(&engine.url) && table.contains("not reached: vLLM's own KV cache"), "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_data_parallel_engine_behind_an_address_is_asked() {
    let (engine, other) = (ApiEngine::start(told(0), TWO, 1).await, ApiEngine::start(told(0), ONE, 1).await);
    let words = ["forget", "--salt", "ada", "--url", &engine.url, "--url", &other.url, "--json"];
    let done = run(&words, "").await;
    assert_eq!((done.status.code(), json_of(&done).as_array().map(Vec::len)), (Some(0), Some(3)), "{done:?}");
    let ranks: Vec<Option<String>> = engine.asked().into_iter().map(|(_, _, rank)| rank).collect();
    assert_eq!(ranks, [Some("0".to_owned()), Some("1".to_owned())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_confirmed_is_not_called_done() {
    let silent = ApiEngine::start(json!({"choices": []}), ONE, 1).await;
    let failing = ApiEngine::start(told(2), ONE, 1).await;
    for (url, said) in [(&silent.url, "did not say that it forgot"), (&failing.url, "not all is forgotten")] {
        let done = run(&["forget", "--salt", "ada", "--url", url], "").await;
        assert!(done.status.code() == Some(1) && String::from_utf8_lossy(&done.stderr).contains(said), "{done:?}");
    }
    let refused = run(&["forget", "--salt", "refuse", "--url", &silent.url], "").await;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("400: this is too long"), "{refused:?}");
    let gone = run(&["forget", "--salt", "ada", "--url", "http://127.0.0.1:1"], "").await;
    assert!(gone.status.code() == Some(1) && String::from_utf8_lossy(&gone.stderr).contains("--ranks"), "{gone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_metrics_the_engines_have_to_be_counted() {
    let engine = ApiEngine::start(told(0), ONE, 1).await;
    let words = ["forget", "--salt", "ada", "--url", &engine.url, "--ranks", "3"];
    let done = run(&words, "").await;
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    let ranks: Vec<Option<String>> = engine.asked().into_iter().map(|(_, _, rank)| rank).collect();
    assert_eq!(ranks, ["0", "1", "2"].map(|rank| Some(rank.to_owned())));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_salt_and_a_place_have_to_be_named() {
    for words in [&["forget", "--url", "http://e"][..], &["forget", "--salt", "a"]] {
        assert_eq!(run(words, "").await.status.code(), Some(2), "{words:?}");
    }
    let both = ["forget", "--salt", "a", "--url", "http://e", "--nvme-dir", "/tmp"];
    assert_eq!(run(&both, "").await.status.code(), Some(2));
    for empty in ["", "\n", "a\nb\n"] {
        let done = run(&["forget", "--salt-file", "-", "--url", "http://e"], empty).await;
        assert!(done.status.code() == Some(1) && String::from_utf8_lossy(&done.stderr).contains("salt"), "{done:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stores_that_are_used_or_damaged_are_named_with_what_to_do() {
    let place = Place::new();
    let mut used = place.open();
    used.put(0, 0);
    let mut left = place.open();
    for number in 0..4 {
        left.put(number as u32, number);
    }
    let damaged = place.open();
    left.close();
    drop(damaged);
    std::fs::write(place.file(2, "superblock"), b"no superblock").expect("written");
    let dir = place.path().to_str().expect("text").to_owned();
    let done = run(&["forget", "--salt", "ada", "--nvme-dir", &dir, "--json"], "").await;
    let rows = json_of(&done);
    assert_eq!(done.status.code(), Some(1), "{rows}");
    assert!(rows[0]["error"].as_str().is_some_and(|why| why.contains("--url http://")), "{rows}");
    assert_eq!(rows[1]["store"]["unknown"], 4, "they have no tags: {rows}");
    assert!(rows[2]["error"].as_str().is_some_and(|why| why.contains("kvcellar store drop")), "{rows}");
    drop(used);
    std::fs::remove_dir_all(place.file(2, "")).expect("removed");
    let done = run(&["forget", "--salt", "ada", "--nvme-dir", &dir], "").await;
    assert_eq!(done.status.code(), Some(0), "{done:?}");
}
