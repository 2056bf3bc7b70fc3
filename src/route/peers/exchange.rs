//! The way between routers: each asks every other one for its news, and answers when it is asked.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use serde::Deserialize;
use tokio::task::JoinSet;

use super::follower::{Follower, Heard, PeerFault, Wanted, shown, tell};
use super::hear::{Listener, hear};
use super::news::{Aged, News, PeerNews, VERSION};
use super::standing::{PeerState, Peers};
use crate::books::Books;
use crate::decider::Decider;
use crate::limits;
use crate::router::Router;
use crate::upstream::Upstream;

/// Models that a router's engines serve.
fn models(router: &Router) -> Vec<String> {
    let mut models: Vec<String> = router.engines.all().iter().map(|engine| engine.base_model()).collect();
    models.retain(|model| !model.is_empty());
    models.sort();
    models.dedup();
    models.truncate(limits::PEER_MODELS_MAX);
    models
}

/// All that a router knows, for one that knows nothing.
fn all(router: &Router) -> Vec<Aged> {
    let mut news = Vec::new();
    let engines = router.engines.all();
    let blocks = limits::SNAPSHOT_BLOCKS_MAX / engines.len().max(1);
    for engine in engines.iter() {
        let name: Arc<str> = engine.spec.name.as_str().into();
        let hashes = engine.recent().last(blocks);
        if !hashes.is_empty() {
            news.push(Aged::new(0.0, News::Given { engine: Arc::clone(&name), hashes }));
        }
        let (now_s, ours) = (engine.now_s(), engine.books().ours());
        for open in ours {
            let ago_s = now_s - open.booked_s;
            news.push(Aged::new(ago_s, News::booked(&name, open.number, open.promise)));
            if open.is_answered {
                let engine = Arc::clone(&name);
                news.push(Aged::new(0.0, News::Answered { engine, number: open.number }));
            }
        }
    }
    let sessions = router.sessions.last(limits::SNAPSHOT_ENTRIES_MAX);
    news.extend(sessions.into_iter().map(|(session, engine)| Aged::new(0.0, News::Session { session, engine })));
    let credits = router.decider().0.credits(limits::SNAPSHOT_ENTRIES_MAX);
    news.extend(credits.into_iter().map(|(prefix, credit_s)| Aged::new(0.0, News::CreditIs { prefix, credit_s })));
    news
}

/// Takes what a peer has told.
fn take(mut router: &Router, heard: &Heard) {
    heard.forget.into_iter().for_each(|peer| forget(router, peer));
    for aged in &heard.news {
        hear(&mut router, heard.instance, aged.ago_s(), &aged.1);
    }
    router.setup.gate.iter().for_each(|gate| gate.wake());
}

impl Listener for &Router {
    fn books(&mut self, engine: &str, change: impl FnOnce(&mut Books, f64)) {
        if let Some(engine) = self.engines.find(engine) {
            change(&mut engine.books(), engine.now_s());
        }
    }

    fn given(&mut self, engine: &str, hashes: &[u64]) {
        if let Some(engine) = self.engines.find(engine) {
            engine.recent().used(hashes);
        }
    }

    fn session(&mut self, session: u64, engine: &Arc<str>) {
        self.sessions.put(session, Arc::clone(engine));
    }

    fn decider(&mut self, change: impl FnOnce(&mut Decider)) {
        change(&mut Router::decider(self).0);
    }
}

/// Nothing that this peer has in flight counts any more.
fn forget(router: &Router, peer: u64) {
    router.engines.all().iter().for_each(|engine| engine.books().forget(engine.now_s(), peer));
    router.setup.gate.iter().for_each(|gate| gate.wake());
}

/// Follows one peer. Dropped, it takes back what it told.
struct PeerLine {
    router: Arc<Router>,
    url: String,
    follower: Follower,
    /// When it began, for the time in its follower.
    since: Instant,
    /// The engines that were known when everything was asked for.
    engines: Vec<String>,
}

impl Drop for PeerLine {
    fn drop(&mut self) {
        self.follower.give_up().into_iter().for_each(|peer| forget(&self.router, peer));
        self.router.setup.peers.iter().for_each(|peers| peers.leaves(&self.url));
    }
}

impl PeerLine {
    fn new(router: Arc<Router>, url: String) -> Self {
        Self { router, url, follower: Follower::default(), since: Instant::now(), engines: Vec::new() }
    }

    async fn keep(mut self) {
        let router = Arc::clone(&self.router);
        let Some(peers) = &router.setup.peers else { return };
        loop {
            let answer = self.ask(&peers.upstream).await;
            // Long answers are read beside what requests wait for.
            let router = Arc::clone(&self.router);
            let heard = tokio::task::spawn_blocking(move || {
                let pause = router.setup.peers.as_ref().map_or(limits::PEER_PAUSE, |peers| self.hear(peers, answer));
                (self, pause)
            });
            // Unless the runtime ends.
            let Ok((line, pause)) = heard.await else { return };
            self = line;
            tokio::time::sleep(pause).await;
        }
    }

    async fn ask(&mut self, upstream: &Upstream) -> std::result::Result<(StatusCode, Bytes), String> {
        let engines: Vec<String> = self.router.engines.all().iter().map(|engine| engine.spec.name.clone()).collect();
        if engines != self.engines {
            // What was told of those that were not known is not known.
            self.follower.start_over();
            self.engines = engines;
        }
        let known = self.follower.wanted().map(|Wanted { instance, next }| format!("?instance={instance}&next={next}"));
        let url = format!("{}/peers/v{VERSION}{}", self.url, known.unwrap_or_default());
        upstream.ask(Method::GET, &url, Bytes::new(), (limits::PEER_TIMEOUT, limits::PEER_BYTES_MAX)).await
    }

    /// Takes an answer. Returns the pause before the next question.
    fn hear(&mut self, peers: &Peers, answer: std::result::Result<(StatusCode, Bytes), String>) -> Duration {
        let now_s = self.since.elapsed().as_secs_f64();
        let told = match answer {
            Ok((StatusCode::OK, body)) => {
                serde_json::from_slice::<PeerNews>(&body).map_err(|error| PeerFault::Answer(shown(&error.to_string())))
            }
            Ok((StatusCode::UNAUTHORIZED, _)) => Err(PeerFault::Key),
            Ok((status, body)) => {
                let text: String = String::from_utf8_lossy(&body).chars().take(200).collect();
                Err(PeerFault::Answer(shown(&format!("{status} {text}"))))
            }
            Err(why) => {
                if let Some(peer) = self.follower.expire(now_s) {
                    forget(&self.router, peer);
                    self.router.metrics.expired();
                    peers.stands(&self.url, PeerState::Silent(why));
                } else if self.follower.instance().is_none() && now_s > limits::PEER_SILENCE.as_secs_f64() {
                    peers.stands(&self.url, PeerState::Silent(why));
                }
                return limits::PEER_POLL;
            }
        };
        let same = told.as_ref().ok().and_then(|told| {
            let double = || peers.is_followed(&self.url, told.instance);
            let is_self = told.instance == peers.journal.instance();
            if is_self { Some("this router itself") } else { double().then_some("known under another address") }
        });
        if let Some(same) = same {
            self.follower.give_up().into_iter().for_each(|peer| forget(&self.router, peer));
            peers.stands(&self.url, PeerState::Same(same));
            return limits::PEER_PAUSE;
        }
        match told.and_then(|told| self.follower.hear(now_s, &models(&self.router), told)) {
            Ok(heard) => {
                peers.stands(&self.url, PeerState::Sharing(heard.instance));
                take(&self.router, &heard);
                limits::PEER_POLL
            }
            Err(fault) => {
                self.follower.give_up().into_iter().for_each(|peer| forget(&self.router, peer));
                peers.stands(&self.url, PeerState::Refused(fault));
                limits::PEER_PAUSE
            }
        }
    }
}

/// Follows all peers, for ever.
pub async fn keep(router: Arc<Router>) {
    let Some(peers) = &router.setup.peers else { return std::future::pending().await };
    let mut named = JoinSet::new();
    for url in &peers.urls {
        named.spawn(PeerLine::new(Arc::clone(&router), url.clone()).keep());
    }
    let Some(name) = &peers.name else { return std::future::pending().await };
    let mut found: HashMap<String, tokio::task::AbortHandle> = HashMap::new();
    let mut is_lost = false;
    loop {
        match tokio::net::lookup_host(name).await {
            Ok(addresses) => {
                let mut now: Vec<String> = addresses.map(|address| format!("http://{address}")).collect();
                now.sort();
                now.dedup();
                if now.len() > limits::PEERS_MAX {
                    log::warn!("{name}: {} addresses: the first {} are used", now.len(), limits::PEERS_MAX);
                    now.truncate(limits::PEERS_MAX);
                }
                found.retain(|url, line| {
                    now.contains(url) || {
                        line.abort();
                        false
                    }
                });
                for url in now {
                    if !found.contains_key(&url) && !peers.urls.contains(&url) {
                        let line = named.spawn(PeerLine::new(Arc::clone(&router), url.clone()).keep());
                        found.insert(url, line);
                    }
                }
                is_lost = false;
            }
            Err(error) if !is_lost => {
                log::warn!("{name}: {error}: routers that were found before are asked further");
                is_lost = true;
            }
            Err(_) => {}
        }
        while named.try_join_next().is_some() {}
        tokio::time::sleep(limits::PEERS_RESOLVE).await;
    }
}

/// What a peer asks for.
#[derive(Debug, Deserialize)]
struct PeerQuestion {
    instance: Option<u64>,
    next: Option<u64>,
}

/// Where peers ask.
pub fn routes(router: Arc<Router>) -> axum::Router {
    axum::Router::new().route("/peers/{version}", get(answer)).with_state(router)
}

async fn answer(
    State(router): State<Arc<Router>>,
    Path(version): Path<String>,
    Query(PeerQuestion { instance, next }): Query<PeerQuestion>,
    headers: HeaderMap,
) -> Response {
    let is_peer = |peers: &Peers| peers.upstream.knows(headers.get(header::AUTHORIZATION));
    if !router.setup.peers.as_ref().is_some_and(is_peer) {
        return (StatusCode::UNAUTHORIZED, "send the key of --peer-key").into_response();
    }
    if version != format!("v{VERSION}") {
        let problem = format!("this router shares in version {VERSION}: run the same release of both");
        return (StatusCode::NOT_FOUND, problem).into_response();
    }
    let wanted = instance.zip(next).map(|(instance, next)| Wanted { instance, next });
    let written = tokio::task::spawn_blocking(move || {
        let journal = &router.setup.peers.as_ref()?.journal;
        let told = tell(journal, journal.now_s(), wanted, models(&router), || all(&router));
        serde_json::to_vec(&told).ok()
    });
    match written.await {
        Ok(Some(text)) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        _ => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
