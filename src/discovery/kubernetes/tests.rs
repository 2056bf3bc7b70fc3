//! Watching an API server that fails in the ways in which real ones do.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use super::troubles::{Troubles, Watched};
use super::*;
use crate::engine::tests::Plain;

const PODS: &str = "/api/v1/namespaces/llm/pods";
const POOLS: &str = "/apis/inference.networking.k8s.io/v1/namespaces/llm/inferencepools";
const OBJECTIVES: &str = "/apis/inference.networking.x-k8s.io/v1alpha2/namespaces/llm/inferenceobjectives";

#[derive(Default)]
struct Script {
    /// What a list of a path answers: status, and its items or the message of the refusal. Others
    /// do not exist.
    lists: HashMap<&'static str, (u16, Value)>,
    /// Watches that are open. An event of `null` breaks one off in the middle of a line.
    watches: Vec<(String, UnboundedSender<Value>)>,
    /// What was asked for: path and query.
    asked: Vec<String>,
    /// Nobody is answered.
    is_away: bool,
}

/// An API server that does what its test says.
#[derive(Clone)]
struct FakeApi {
    script: Arc<Mutex<Script>>,
    config: Config,
}

impl FakeApi {
    async fn open() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let mut config =
            Config::new(format!("http://{}", listener.local_addr().expect("bound")).parse().expect("a URL"));
        config.default_namespace = "llm".to_owned();
        let api = Self { script: Arc::default(), config };
        let server = api.clone();
        tokio::spawn(async move {
            while let Ok((line, _)) = listener.accept().await {
                let server = server.clone();
                // A client that leaves is none of its business.
                tokio::spawn(async move { server.answer(line).await.ok() });
            }
        });
        api
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().expect("not poisoned")
    }

    fn lists(&self, path: &'static str, items: Value) {
        self.script().lists.insert(path, (200, items));
    }

    fn refuses(&self, path: &'static str, status: u16, message: &str) {
        self.script().lists.insert(path, (status, message.into()));
    }

    fn asked(&self, path: &str, part: &str) -> usize {
        self.script().asked.iter().filter(|asked| asked.starts_with(path) && asked.contains(part)).count()
    }

    /// Returns when somebody watches.
    async fn watched(&self, path: &str) {
        let is_open = |(watched, to): &(String, UnboundedSender<Value>)| watched == path && !to.is_closed();
        eventually("a watch", || self.script().watches.iter().any(is_open)).await;
    }

    /// Sends an event to everybody who watches.
    async fn tell(&self, path: &str, event: Value) {
        self.watched(path).await;
        for (_, to) in self.script().watches.iter().filter(|(watched, _)| watched == path) {
            // One that has ended hears nothing.
            drop(to.send(event.clone()));
        }
    }

    async fn answer(&self, mut line: TcpStream) -> std::io::Result<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(line.read_u8().await?);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let target = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        if self.script().is_away {
            return Ok(());
        }
        self.script().asked.push(target.clone());
        if query.contains("watch=true") {
            return self.stream(line, path).await;
        }
        let (status, found) = self.script().lists.get(path).cloned().unwrap_or((404, "page not found".into()));
        let body = match status {
            200 => json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "10"}, "items": found}),
            _ => json!({"kind": "Status", "status": "Failure", "code": status, "reason": "R", "message": found}),
        }
        .to_string();
        let len = body.len();
        let answer = format!(
            "HTTP/1.1 {status} S\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {len}\r\n\r\n{body}"
        );
        line.write_all(answer.as_bytes()).await
    }

    async fn stream(&self, mut line: TcpStream, path: &str) -> std::io::Result<()> {
        let (to, mut events) = unbounded_channel();
        line.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
            .await?;
        self.script().watches.push((path.to_owned(), to));
        while let Some(event) = events.recv().await {
            let text = if event.is_null() { "{\"type\": \"MODIF".to_owned() } else { format!("{event}\n") };
            line.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).await?;
            if event.is_null() {
                break;
            }
        }
        events.close();
        Ok(())
    }
}

async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let waiting = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(1), waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

fn pod(name: &str, version: u32) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "llm", "resourceVersion": version.to_string()},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

fn pool(app: &str, ports: &[u16], version: u32) -> Value {
    let ports: Vec<_> = ports.iter().map(|number| json!({"number": number})).collect();
    json!({
        "apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool",
        "metadata": {"name": "p", "namespace": "llm", "resourceVersion": version.to_string()},
        "spec": {"selector": {"matchLabels": {"app": app}}, "targetPorts": ports},
    })
}

fn objective(name: &str, pool: &str, priority: i32) -> Value {
    json!({
        "apiVersion": "inference.networking.x-k8s.io/v1alpha2", "kind": "InferenceObjective",
        "metadata": {"name": name, "namespace": "llm", "resourceVersion": "11"},
        "spec": {"priority": priority, "poolRef": {"name": pool}},
    })
}

fn event(kind: &str, object: &Value) -> Value {
    json!({"type": kind, "object": object})
}

fn by_labels() -> ClusterOptions {
    ClusterOptions {
        labels: Some("app=vllm".to_owned()),
        inference_pool: None,
        namespace: None,
        inference_pool_events: None,
    }
}

fn by_pool() -> ClusterOptions {
    ClusterOptions { labels: None, inference_pool: Some("p".to_owned()), ..by_labels() }
}

fn names(cluster: &Cluster) -> Vec<String> {
    let ports = Ports::parse::<Plain>("kubernetes-ports", "1").expect("a port");
    let engines = cluster.engines::<Plain>(&ports).expect("engines");
    engines.iter().map(|engine| engine.name().to_owned()).collect()
}

async fn refusal(options: &ClusterOptions, api: &FakeApi) -> String {
    options.watch_at(api.config.clone(), true).await.expect_err("refused").to_string()
}

#[tokio::test]
async fn pods_with_labels_come_and_go() {
    let api = FakeApi::open().await;
    api.lists(PODS, json!([pod("a", 1), pod("b", 2)]));
    let cluster = by_labels().watch_at(api.config.clone(), true).await.expect("watched");
    assert_eq!(names(&cluster), ["a", "b"]);
    assert!(api.asked(PODS, "labelSelector=app%3Dvllm") > 0);
    let mut waiter = cluster.waiter();
    api.tell(PODS, event("DELETED", &pod("a", 11))).await;
    waiter.changed().await;
    assert_eq!(names(&cluster), ["b"]);
    api.tell(PODS, event("ADDED", &pod("c", 12))).await;
    waiter.changed().await;
    assert_eq!(names(&cluster), ["b", "c"]);
    assert_eq!(api.asked(PODS, ""), 2, "one list and one watch");
}

#[tokio::test]
async fn a_pool_leads_to_its_pods_and_changes_with_them() {
    let api = FakeApi::open().await;
    api.lists(POOLS, json!([pool("old", &[8000], 1)]));
    api.lists(PODS, json!([pod("a", 1)]));
    let cluster = by_pool().watch_at(api.config.clone(), false).await.expect("watched");
    assert_eq!(names(&cluster), ["a"]);
    assert!(api.asked(POOLS, "fieldSelector=metadata.name%3Dp") > 0 && api.asked(OBJECTIVES, "") == 0);
    api.lists(PODS, json!([pod("b", 2)]));
    api.tell(POOLS, event("MODIFIED", &pool("new", &[8000, 8001], 11))).await;
    eventually("the other pods", || names(&cluster) == ["b-rank-0", "b-rank-1"]).await;
    assert!(api.asked(PODS, "labelSelector=app%3Dnew") > 0);
    api.tell(POOLS, event("DELETED", &pool("new", &[8000], 12))).await;
    eventually("nobody", || names(&cluster).is_empty()).await;
    api.tell(POOLS, event("ADDED", &pool("new", &[8000], 13))).await;
    eventually("its pods", || names(&cluster) == ["b"]).await;
}

#[tokio::test]
async fn a_pool_may_come_later() {
    let api = FakeApi::open().await;
    api.lists(POOLS, json!([]));
    api.lists(PODS, json!([pod("a", 1)]));
    let cluster = by_pool().watch_at(api.config.clone(), true).await.expect("watched");
    assert!(names(&cluster).is_empty());
    api.tell(POOLS, event("ADDED", &pool("vllm", &[8000], 11))).await;
    eventually("its pods", || names(&cluster) == ["a"]).await;
}

#[tokio::test]
async fn objectives_of_the_pool_are_followed() {
    let api = FakeApi::open().await;
    api.lists(POOLS, json!([pool("vllm", &[8000], 1)]));
    api.lists(PODS, json!([]));
    api.lists(OBJECTIVES, json!([objective("chat", "p", 10), objective("other", "q", 5)]));
    let cluster = by_pool().watch_at(api.config.clone(), true).await.expect("watched");
    let of = |pairs: &[(&str, i32)]| pairs.iter().map(|(name, priority)| ((*name).to_owned(), *priority)).collect();
    let is = |pairs: &[(&str, i32)]| *cluster.objectives() == of(pairs);
    eventually("an objective", || is(&[("chat", 10)])).await;
    api.tell(OBJECTIVES, event("MODIFIED", &objective("chat", "p", 7))).await;
    api.tell(OBJECTIVES, event("ADDED", &objective("batch", "p", -1))).await;
    eventually("two objectives", || is(&[("batch", -1), ("chat", 7)])).await;
    api.tell(OBJECTIVES, event("MODIFIED", &objective("chat", "q", 7))).await;
    eventually("it has moved to another pool", || is(&[("batch", -1)])).await;
}

#[tokio::test]
async fn refusals_at_the_start_name_what_is_missing() {
    let api = FakeApi::open().await;
    api.refuses(PODS, 403, "no pods for you");
    let error = refusal(&by_labels(), &api).await;
    for part in
        ["kubernetes-labels", "not allowed to list pods in the namespace llm", "no pods for you", "list and watch"]
    {
        assert!(error.contains(part), "{part}: {error}");
    }
    let error = refusal(&by_pool(), &api).await;
    assert!(error.contains("inferencepools.inference.networking.k8s.io") && error.contains("CRDs"), "{error}");
    api.refuses(POOLS, 403, "no");
    let error = refusal(&by_pool(), &api).await;
    assert!(error.contains("inferencepools in the apiGroup \"inference.networking.k8s.io\""), "{error}");
    api.refuses(PODS, 401, "who are you");
    assert!(refusal(&by_labels(), &api).await.contains("credentials"));
    api.script().is_away = true;
    assert!(refusal(&by_labels(), &api).await.contains("pods"));
    let wrong = ClusterOptions { inference_pool_events: Some("x".to_owned()), ..by_pool() };
    assert!(refusal(&wrong, &api).await.contains("inference-pool-events"));
}

#[tokio::test]
async fn a_watch_that_breaks_off_goes_on_where_it_was() {
    let api = FakeApi::open().await;
    api.lists(PODS, json!([pod("a", 1)]));
    let cluster = by_labels().watch_at(api.config.clone(), true).await.expect("watched");
    let bookmark = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"resourceVersion": "77"}});
    api.tell(PODS, event("BOOKMARK", &bookmark)).await;
    api.tell(PODS, Value::Null).await;
    eventually("a watch from the bookmark", || api.asked(PODS, "resourceVersion=77") > 0).await;
    assert_eq!(names(&cluster), ["a"]);
    api.tell(PODS, event("ADDED", &pod("b", 78))).await;
    eventually("the next event", || names(&cluster) == ["a", "b"]).await;
    assert_eq!(api.asked(PODS, "") - api.asked(PODS, "watch=true"), 1, "nothing is listed again");
}

#[tokio::test]
async fn a_version_that_is_gone_leads_to_a_new_list() {
    let api = FakeApi::open().await;
    api.lists(PODS, json!([pod("a", 1), pod("b", 2)]));
    let cluster = by_labels().watch_at(api.config.clone(), true).await.expect("watched");
    api.lists(PODS, json!([pod("b", 2), pod("c", 3)]));
    let gone = json!({"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired", "message": "too old"});
    api.tell(PODS, event("ERROR", &gone)).await;
    eventually("what has changed unseen", || names(&cluster) == ["b", "c"]).await;
}

#[tokio::test]
async fn what_is_known_stays_while_the_api_server_is_away_or_refuses() {
    let api = FakeApi::open().await;
    api.lists(PODS, json!([pod("a", 1)]));
    let cluster = by_labels().watch_at(api.config.clone(), true).await.expect("watched");
    let lists = |api: &FakeApi| api.asked(PODS, "") - api.asked(PODS, "watch=true");
    let gone = json!({"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired", "message": "too old"});
    api.watched(PODS).await;
    api.script().is_away = true;
    api.tell(PODS, event("ERROR", &gone)).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!((names(&cluster), lists(&api)), (vec!["a".to_owned()], 1));
    api.refuses(PODS, 403, "not any more");
    api.script().is_away = false;
    eventually("it asks again", || lists(&api) > 1).await;
    assert_eq!(names(&cluster), ["a"]);
    api.lists(PODS, json!([pod("b", 2)]));
    eventually("it is back", || names(&cluster) == ["b"]).await;
}

#[test]
fn a_trouble_is_logged_once() {
    let watched = Watched { kind: pools::pools(), namespace: "llm".to_owned(), flag: "inference-pool" };
    let mut troubles = Troubles::default();
    let away = |text: &str| Error::TryLater { what: "it".to_owned(), holder: text.to_owned() };
    let refused = |text: &str| Error::config("inference-pool", text, "Do");
    assert!(troubles.on_trouble(&watched, &away("refused")));
    assert!(!troubles.on_trouble(&watched, &away("timed out")), "the same outage");
    assert!(troubles.on_trouble(&watched, &refused("403")) && !troubles.on_trouble(&watched, &refused("403")));
    troubles.on_event(&watched);
    assert!(troubles.on_trouble(&watched, &refused("403")), "it has happened again");
}
