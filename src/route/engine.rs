//! One engine: where it is, what it said last, what was promised to it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use serde::Deserialize;

use super::approximate::Recent;
use super::books::{Backlog, Books};
use super::breaker::Breaker;
use super::estimate;
use super::peers::journal::Journal;
use super::peers::news::News;
use super::spec::Spec;
use super::tally::Tally;
use super::view::{Adapter, Held, Look, Rates};
use crate::limits;

/// A model that an engine serves.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Model {
    /// Its name in requests.
    pub id: String,
    /// Of an adapter: its base model.
    pub parent: Option<String>,
}

/// Blocks in an engine's offload tiers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OffloadedBlocks {
    /// In the dram tier.
    pub dram: Option<u64>,
    /// In the nvme tier.
    pub nvme: Option<u64>,
}

/// What an engine said last.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Told {
    /// Requests that wait.
    pub waiting: f64,
    /// Requests that run.
    pub running: f64,
    /// Share of the KV cache in use.
    pub kv_usage: f64,
    /// Tokens that the KV cache holds; 0: not said.
    pub kv_tokens: u64,
    /// When its process began, in seconds since 1970.
    pub started_s: f64,
    /// Adapters: how many may be loaded, which run, which wait.
    pub adapters: Option<(usize, Vec<String>, Vec<String>)>,
    /// It was put to sleep, and computes nothing until it is woken.
    pub asleep: bool,
    /// Blocks in its offload tiers, as KV Cellar in it counts them, fastest first; `None`: it has
    /// no such tier, or does not say.
    pub offloaded: OffloadedBlocks,
}

/// An engine.
#[derive(Debug)]
pub struct Engine {
    /// Where it is.
    pub spec: Spec,
    /// What it said last.
    pub told: ArcSwap<Told>,
    /// What its name was last resolved to; empty where it has an address instead of a name.
    addresses: ArcSwap<Vec<SocketAddr>>,
    /// What it serves; empty: not known.
    pub models: ArcSwap<Vec<Model>>,
    /// What is counted of its requests.
    pub tally: Tally,
    /// When it got its last cold request.
    pub cold_turn: AtomicU64,
    /// It tokenizes, but does not render.
    pub renders_not: AtomicBool,
    /// That it has no metrics has been said.
    pub metrics_missed: AtomicBool,
    /// That it wants a key has been said.
    pub key_missed: AtomicBool,
    draining: AtomicBool,
    recent: Mutex<Recent>,
    books: Mutex<Books>,
    /// When its books begin.
    since: Instant,
    /// Scrapes failed in a row; it is well at 0, and has not been seen yet at [`UNSEEN`].
    failures: AtomicU32,
    breaker: Mutex<Breaker>,
    /// Until when it is not asked for token ids.
    silent_until: Mutex<Option<Instant>>,
    first_answer: OnceLock<Instant>,
    /// Where this router's peers are told of it, under its name.
    journal: Option<(Arc<Journal>, Arc<str>)>,
}

const UNSEEN: u32 = u32::MAX;

/// Scrapes that may fail in a row before an engine gets no more requests.
const FAILURES_MAX: u32 = 2;

impl Engine {
    /// One that has not been seen yet.
    pub fn new(spec: Spec) -> Self {
        Self {
            draining: AtomicBool::new(spec.draining),
            spec,
            told: ArcSwap::default(),
            addresses: ArcSwap::default(),
            models: ArcSwap::default(),
            tally: Tally::default(),
            cold_turn: AtomicU64::new(0),
            renders_not: AtomicBool::new(false),
            metrics_missed: AtomicBool::new(false),
            key_missed: AtomicBool::new(false),
            recent: Mutex::default(),
            books: Mutex::default(),
            since: Instant::now(),
            failures: AtomicU32::new(UNSEEN),
            breaker: Mutex::default(),
            silent_until: Mutex::default(),
            first_answer: OnceLock::new(),
            journal: None,
        }
    }

    /// The same, of which the router's peers are told.
    #[must_use]
    pub fn told_to_peers(mut self, journal: &Arc<Journal>) -> Self {
        self.journal = Some((Arc::clone(journal), self.spec.name.as_str().into()));
        self
    }

    /// Tells the router's peers, if it has any, what happened here.
    pub fn tell(&self, news: impl FnOnce(&Arc<str>) -> News) {
        if let Some((journal, name)) = &self.journal {
            journal.push(news(name));
        }
    }

    /// Its address as a gateway wants it: numbers. A name is resolved every time.
    pub async fn endpoint(&self) -> Option<String> {
        let authority = self.spec.authority();
        if authority.parse::<SocketAddr>().is_ok() {
            return Some(authority.to_owned());
        }
        let found: Vec<_> = tokio::net::lookup_host(authority).await.ok()?.collect();
        let first = found.first().map(SocketAddr::to_string);
        self.addresses.store(Arc::new(found));
        first
    }

    /// A gateway means this engine by a place: its authority, or an address of its name.
    pub fn is_at(&self, place: &str) -> bool {
        let is_one_of = |address: SocketAddr| self.addresses.load().contains(&address);
        place == self.spec.authority() || place.parse().is_ok_and(is_one_of)
    }

    /// What it probably holds.
    pub fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it gets no new requests from now on. What it has goes on, and what is known of it
    /// stays.
    pub fn drain(&self, draining: bool) {
        self.draining.store(draining, Ordering::Relaxed);
    }

    /// It may get requests.
    pub fn is_usable(&self) -> bool {
        let is_well = self.failures.load(Ordering::Relaxed) < FAILURES_MAX && !self.told.load().asleep;
        is_well && !self.draining.load(Ordering::Relaxed)
    }

    /// What its last requests say of it.
    pub fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its last requests went well, or it is time to try another one.
    pub fn is_trusted(&self) -> bool {
        self.breaker().admits(self.now_s())
    }

    /// One of its requests ended or began to be answered.
    pub fn judged(&self, well: bool, is_trial: bool) {
        let name = &self.spec.name;
        if well {
            if self.breaker().succeeded() {
                log::info!("{name}: answers requests again");
            }
        } else if let Some(wait_s) = self.breaker().failed(self.now_s(), is_trial) {
            log::warn!("{name}: its requests fail: it gets none for {wait_s} s, then one to try");
        }
    }

    /// It gave no token ids: nobody asks for some time.
    pub fn fell_silent(&self) {
        *self.silent_until.lock().unwrap_or_else(PoisonError::into_inner) =
            Instant::now().checked_add(limits::IDS_SILENCE);
    }

    /// It gave no token ids a short while ago.
    pub fn is_silent(&self) -> bool {
        let until = *self.silent_until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    /// It has answered a prompt.
    pub fn answered_a_prompt(&self) {
        self.first_answer.get_or_init(Instant::now);
    }

    /// How long ago it answered a prompt for the first time.
    pub fn first_answer(&self) -> Option<Duration> {
        self.first_answer.get().map(Instant::elapsed)
    }

    /// `healthy`, `failing`, `unseen`, `asleep`, `draining`, or `broken`: it answers scrapes, but
    /// its requests failed, and it is not yet time to try another one.
    pub fn health(&self) -> &'static str {
        match self.failures.load(Ordering::Relaxed) {
            _ if self.draining.load(Ordering::Relaxed) => "draining",
            UNSEEN => "unseen",
            failures if failures < FAILURES_MAX && self.told.load().asleep => "asleep",
            failures if failures < FAILURES_MAX && !self.is_trusted() => "broken",
            failures if failures < FAILURES_MAX => "healthy",
            _ => "failing",
        }
    }

    /// A scrape has failed. Returns whether it has just become unusable.
    pub fn failed(&self) -> bool {
        let before = self.failures.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |failures| {
            (failures != UNSEEN).then(|| (failures + 1).min(FAILURES_MAX))
        });
        before == Ok(FAILURES_MAX - 1)
    }

    /// A connection was refused: no more requests until it answers a scrape.
    pub fn refused(&self) {
        self.failures.fetch_max(FAILURES_MAX, Ordering::Relaxed);
    }

    /// What it says now is said by another process than the last time, or after a time in which it
    /// was not well.
    pub fn is_back(&self, told: &Told) -> bool {
        self.failures.load(Ordering::Relaxed) >= FAILURES_MAX || self.has_restarted(told)
    }

    fn has_restarted(&self, told: &Told) -> bool {
        let before = self.told.load().started_s;
        before > 0.0 && told.started_s > before + 0.5
    }

    /// It has answered a scrape. Returns whether it was unusable before.
    pub fn heard(&self, mut told: Told) -> bool {
        if self.has_restarted(&told) {
            self.recent().clear();
            self.renders_not.store(false, Ordering::Relaxed);
            *self.breaker() = Breaker::default();
        }
        if told.started_s <= 0.0 {
            // Nonsense between two lives must not hide that there are two.
            told.started_s = self.told.load().started_s;
        }
        if told.kv_tokens > 0 {
            self.recent().resize(told.kv_tokens as usize / estimate::BLOCK_TOKENS);
        }
        self.told.store(Arc::new(told));
        self.failures.swap(0, Ordering::Relaxed) >= FAILURES_MAX
    }

    /// What was promised to it.
    pub fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it was given and has not done.
    pub fn backlog(&self) -> Backlog {
        let now_s = self.now_s();
        self.books().backlog(now_s)
    }

    /// The time in its books.
    pub fn now_s(&self) -> f64 {
        self.since.elapsed().as_secs_f64()
    }

    /// Its speeds.
    pub fn rates(&self) -> Rates {
        self.books().speed.rates(self.now_s())
    }

    /// Whether it serves a model; `true` where it has not said.
    pub fn serves(&self, model: &str) -> bool {
        let models = self.models.load();
        models.is_empty() || models.iter().any(|it| it.id == model)
    }

    /// Whether it may get requests for a model, or for any.
    pub fn takes(&self, model: Option<&str>) -> bool {
        self.is_usable() && model.is_none_or(|model| self.serves(model))
    }

    /// The first model that it serves and that is no adapter; empty where it has not said.
    pub fn base_model(&self) -> String {
        let models = self.models.load();
        models.iter().find(|model| model.parent.is_none()).map_or_else(String::new, |model| model.id.clone())
    }

    /// Whether a model is an adapter here.
    pub fn is_adapter(&self, model: &str) -> bool {
        self.models.load().iter().any(|it| it.id == model && it.parent.is_some())
    }

    /// How it is now, for a request of which it has so much.
    pub fn look(&self, held: Held, adapter: Option<&str>, session: bool) -> Look {
        let told = self.told.load();
        let look = Look {
            waiting: told.waiting,
            running: told.running,
            kv_usage: told.kv_usage,
            kv_tokens: told.kv_tokens,
            held,
            adapter: adapter.map_or(Adapter::Unasked, |name| told.adapter(name)),
            session,
            cold_turn: self.cold_turn.load(Ordering::Relaxed),
            ..Look::default()
        };
        self.books().look(self.now_s(), look)
    }
}

impl Told {
    fn adapter(&self, name: &str) -> Adapter {
        let Some((most, running, waiting)) = &self.adapters else { return Adapter::Room };
        if running.iter().any(|it| it == name) {
            Adapter::Loaded
        } else if waiting.iter().any(|it| it == name) {
            Adapter::Waiting
        } else if running.len() + waiting.len() < *most {
            Adapter::Room
        } else {
            Adapter::Full
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::booking::{Booking, Verdict};
    use super::super::books::Promise;
    use super::super::breaker::FAILURES_MAX as FAILURES_MAX_OF_REQUESTS;
    use super::*;
    use kvcellar_discovery::parse;

    #[tokio::test]
    async fn a_gateway_means_an_engine_by_its_name_or_by_an_address_of_it() {
        let engine = Engine::new(parse("http://localhost:1").expect("an engine"));
        let endpoint = engine.endpoint().await.expect("it resolves");
        assert!(endpoint.parse::<SocketAddr>().is_ok() && engine.is_at(&endpoint), "{endpoint}");
        assert!(engine.is_at("localhost:1") && !engine.is_at("localhost:2"));
        assert!(!engine.is_at("10.0.0.1:1") && !engine.is_at(""));
    }

    #[test]
    fn health_follows_scrapes() {
        let engine = Engine::new(parse("http://h:1").expect("an engine"));
        assert!(!engine.is_usable(), "not seen yet");
        assert!(!engine.failed() && !engine.is_usable());
        assert!(engine.heard(Told::default()) && engine.is_usable());
        assert!(!engine.failed() && engine.is_usable(), "one may fail");
        assert!(engine.failed() && !engine.is_usable());
        assert!(!engine.failed(), "said once");
        assert!(engine.heard(Told::default()));
        engine.refused();
        assert_eq!(engine.health(), "failing");
        engine.heard(Told { asleep: true, ..Told::default() });
        assert_eq!((engine.is_usable(), engine.health()), (false, "asleep"));
        engine.heard(Told::default());
        assert_eq!((engine.is_usable(), engine.health()), (true, "healthy"));
    }

    #[test]
    fn an_engine_whose_requests_fail_is_not_trusted() {
        let engine = Arc::new(Engine::new(parse("http://h:1").expect("an engine")));
        engine.heard(Told::default());
        for _ in 0..FAILURES_MAX_OF_REQUESTS {
            assert!(engine.is_trusted());
            let booking = Booking::new(Arc::clone(&engine), Promise::default());
            booking.judged(Verdict::Ill);
            booking.judged(Verdict::Ill);
        }
        assert_eq!((engine.is_trusted(), engine.is_usable(), engine.health()), (false, true, "broken"));
        engine.heard(Told::default());
        assert!(!engine.is_trusted(), "a scrape is no request");
        let booking = Booking::new(Arc::clone(&engine), Promise::default());
        booking.judged(Verdict::Unsaid);
        assert!(!engine.is_trusted());
        booking.judged(Verdict::Well);
        assert!(engine.is_trusted());
    }

    #[test]
    fn a_restarted_engine_holds_nothing() {
        let engine = Engine::new(parse("http://h:1").expect("an engine"));
        engine.heard(Told { started_s: 100.0, ..Told::default() });
        engine.recent().used(&[1, 2, 3]);
        engine.heard(Told { started_s: 100.0, ..Told::default() });
        assert_eq!(engine.recent().held(&[1, 2, 3]), 3);
        engine.heard(Told::default());
        let now = Told { started_s: 200.0, ..Told::default() };
        assert!(engine.is_back(&now), "its models may be others");
        engine.heard(now.clone());
        assert_eq!(engine.recent().held(&[1, 2, 3]), 0);
        assert!(!engine.is_back(&now));
        engine.refused();
        assert!(engine.is_back(&now));
    }

    #[test]
    fn adapters() {
        let told = Told { adapters: Some((2, vec!["a".to_owned()], vec!["b".to_owned()])), ..Told::default() };
        assert_eq!(["a", "b", "c"].map(|name| told.adapter(name)), [Adapter::Loaded, Adapter::Waiting, Adapter::Full]);
        assert_eq!(Told::default().adapter("a"), Adapter::Room);
    }
}
