//! A fleet of a thousand engines shrinks to one: a router and an index keep nothing of the others.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::fleet::{Server, Work, engine, eventually};

const MANY: usize = 1000;

/// Writes a file of engines in one piece: one that answers, and others that nobody is at.
fn write(path: &Path, first: &Value, others: usize, other: impl Fn(usize) -> Value) {
    let all: Vec<Value> = std::iter::once(first.clone()).chain((0..others).map(other)).collect();
    let next = path.with_extension("next");
    std::fs::write(&next, Value::Array(all).to_string()).expect("written");
    std::fs::rename(&next, path).expect("in its place");
}

/// Values of a label in the metrics at an address.
async fn labels(address: &str, label: &str) -> Option<BTreeSet<String>> {
    let text = reqwest::get(format!("{address}/metrics")).await.ok()?.text().await.ok()?;
    let start = format!("{label}=\"");
    let values = text.lines().filter_map(|line| line.split_once(&start)?.1.split('"').next());
    Some(values.map(str::to_owned).collect())
}

async fn until_there_are(address: &str, label: &str, count: usize) -> BTreeSet<String> {
    let look = || async { labels(address, label).await.filter(|found| found.len() == count) };
    eventually(&format!("{count} values of {label}"), look).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_forgets_engines_that_left() {
    let folder = tempfile::tempdir().expect("a directory");
    let file = folder.path().join("engines.json");
    let at = engine(&Arc::new(Work::default())).await;
    let stays = json!({"name": "stays", "url": at, "events": "tcp://127.0.0.1:1"});
    let other = |number| json!({"name": format!("e{number}"), "url": format!("http://127.0.0.1:1/{number}"), "events": "tcp://127.0.0.1:1"});
    write(&file, &stays, MANY, other);
    let path = file.display().to_string();
    let router = Server::start(&[
        "route",
        "--http",
        "127.0.0.1:0",
        "--admin",
        "127.0.0.1:0",
        "--engines-file",
        &path,
        "--mode",
        "precise",
        "--scrape-ms",
        "5000",
    ]);
    let admin = format!("http://{}", router.address("admin at http://").await);
    until_there_are(&admin, "engine", MANY + 1).await;
    write(&file, &stays, 0, other);
    assert_eq!(until_there_are(&admin, "engine", 1).await, BTreeSet::from(["stays".to_owned()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_forgets_sources_that_left() {
    let folder = tempfile::tempdir().expect("a directory");
    let file = folder.path().join("engines.json");
    let other = |number| json!({"name": format!("e{number}"), "endpoint": "tcp://127.0.0.1:1"});
    let stays = json!({"name": "stays", "endpoint": "tcp://127.0.0.1:1"});
    write(&file, &stays, MANY, other);
    let path = file.display().to_string();
    let index = Server::start(&["index", "serve", "--listen", "127.0.0.1:0", "--engines-file", &path]);
    let address = format!("http://{}", index.address("index at http://").await);
    until_there_are(&address, "source", MANY + 1).await;
    write(&file, &stays, 0, other);
    assert_eq!(until_there_are(&address, "source", 1).await, BTreeSet::from(["stays".to_owned()]));
}
