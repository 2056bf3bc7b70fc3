//! Bringing a fleet's events into the index: which engines there are, a subscription for each, and
//! what is known of their state.

mod source;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::Serialize;
use tokio::task::JoinHandle;

use super::Index;
use super::indexed_engine::EventMark;
use super::roster::EngineId;
use super::writer::IndexWriter;
use kvcellar_block::error::Result;
use kvcellar_events::decode::decode;
use kvcellar_events::follow::{BatchCounts, Position, Why};
use kvcellar_events::subscriber::{self, PublisherStream, Sink};
use kvcellar_events::wire::BatchArena;
use kvcellar_events::zmtp::LineFault;

pub use source::Source;

/// What is known of one stream.
#[derive(Debug, Clone, Serialize)]
pub struct StreamState {
    /// Its engine's name in the index.
    pub engine: String,
    /// Number of the next batch.
    pub next: Option<u64>,
    /// Nothing is missing.
    pub live: bool,
    /// What has become of its batches.
    #[serde(flatten)]
    pub counts: BatchCounts,
}

/// What is known of one source.
#[derive(Debug, Clone, Serialize)]
pub struct SourceState {
    /// Its address.
    pub endpoint: String,
    /// The line is up.
    pub connected: bool,
    /// Messages that were none of this protocol.
    pub garbage: u64,
    /// Its streams.
    pub streams: Vec<StreamState>,
    /// When its last batch came.
    #[serde(skip)]
    pub heard: Option<Instant>,
    /// Since when the line is as it is.
    #[serde(skip)]
    pub since: Instant,
}

type States = Arc<Mutex<BTreeMap<String, SourceState>>>;

fn lock(states: &States) -> MutexGuard<'_, BTreeMap<String, SourceState>> {
    states.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One source while it is followed, as its task and the fleet share it.
#[derive(Debug, Default)]
struct Followed {
    /// It has left the fleet: what still comes is no longer told to anybody. Set under the writer's
    /// lock, and before its state is removed.
    has_left: AtomicBool,
    /// Its engines in the index. Changed under the writer's lock.
    engines: Mutex<Vec<EngineId>>,
}

impl Followed {
    fn lock_engines(&self) -> MutexGuard<'_, Vec<EngineId>> {
        self.engines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A source with its task.
#[derive(Debug)]
struct SourceTask {
    source: Source,
    followed: Arc<Followed>,
    task: JoinHandle<()>,
}

/// All subscriptions of one index.
#[derive(Debug)]
pub struct Fleet {
    index: Arc<Index>,
    states: States,
    tasks: HashMap<String, SourceTask>,
    /// Where engines' events stand that came with a snapshot, by engine.
    marks: HashMap<String, EventMark>,
}

impl Fleet {
    /// Nobody yet.
    pub fn new(index: Arc<Index>) -> Self {
        Self { index, states: States::default(), tasks: HashMap::new(), marks: HashMap::new() }
    }

    /// Goes on from another index's snapshot. To be called before any engine is followed.
    ///
    /// # Errors
    /// [`kvcellar_block::error::Error::DataLost`]; engines that were not taken over are followed
    /// from their replays.
    pub fn resume(&mut self, snapshot: &[u8]) -> Result<usize> {
        let marks = self.index.write().restore(snapshot)?;
        self.marks = marks.into_iter().collect();
        Ok(self.marks.len())
    }

    /// What others may look at while engines come and go.
    pub fn states(&self) -> FleetView {
        FleetView { states: Arc::clone(&self.states) }
    }

    /// Follows exactly these engines from now on. One whose address has changed is another one.
    pub fn set(&mut self, sources: Vec<Source>) {
        let wanted: HashMap<String, Source> = sources.into_iter().map(|source| (source.name.clone(), source)).collect();
        let gone: Vec<String> = self
            .tasks
            .iter()
            .filter(|(name, known)| wanted.get(*name) != Some(&known.source))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            if let Some(known) = self.tasks.remove(&name) {
                // The task may be at work this moment: it looks before it writes.
                known.task.abort();
                let mut writer = self.index.write();
                known.followed.has_left.store(true, Ordering::Release);
                known.followed.lock_engines().drain(..).for_each(|id| writer.remove_engine(id));
            }
            lock(&self.states).remove(&name);
        }
        for (name, source) in wanted {
            if self.tasks.contains_key(&name) {
                continue;
            }
            let state = SourceState {
                endpoint: source.endpoint.clone(),
                connected: false,
                garbage: 0,
                streams: Vec::new(),
                heard: None,
                since: Instant::now(),
            };
            lock(&self.states).insert(name.clone(), state);
            let known = self.known(&source);
            let roster = self.index.roster();
            let found = known.iter().filter_map(|(stream, _)| Some(roster.find(&engine_name(&source, stream))?.id));
            let followed = Arc::new(Followed { engines: Mutex::new(found.collect()), ..Followed::default() });
            let sink = self.sink(&source, &followed);
            let task = tokio::spawn(subscriber::follow(source.address(), known, sink));
            self.tasks.insert(name, SourceTask { source, followed, task });
        }
        // A snapshot's engines that nobody follows here would never change again.
        for name in std::mem::take(&mut self.marks).into_keys() {
            let found = self.index.roster().find(&name).map(|engine| engine.id);
            if let Some(id) = found {
                self.index.write().remove_engine(id);
            }
        }
    }

    fn sink(&self, source: &Source, followed: &Arc<Followed>) -> IndexSink {
        IndexSink {
            index: Arc::clone(&self.index),
            states: Arc::clone(&self.states),
            source: source.clone(),
            followed: Arc::clone(followed),
            engines: HashMap::new(),
            arena: BatchArena::default(),
            breach: None,
        }
    }

    /// Streams of a source that came with a snapshot.
    fn known(&mut self, source: &Source) -> Vec<(PublisherStream, Position)> {
        let of_source = |name: &str, mark: &EventMark| {
            let stream = PublisherStream { topic: mark.topic.clone(), rank: mark.rank };
            (engine_name(source, &stream) == name).then_some((stream, mark.last))
        };
        let found: Vec<(String, (PublisherStream, Position))> =
            self.marks.iter().filter_map(|(name, mark)| Some((name.clone(), of_source(name, mark)?))).collect();
        found.into_iter().map(|(name, known)| (self.marks.remove(&name), known).1).collect()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.tasks.values().for_each(|known| known.task.abort());
    }
}

/// A look at the state of all subscriptions.
#[derive(Debug, Clone)]
pub struct FleetView {
    states: States,
}

impl FleetView {
    /// All sources, by name.
    pub fn sources(&self) -> BTreeMap<String, SourceState> {
        lock(&self.states).clone()
    }

    /// Every source is connected, and none of its streams lacks anything.
    pub fn is_caught_up(&self) -> bool {
        lock(&self.states).values().all(|source| source.connected && source.streams.iter().all(|stream| stream.live))
    }
}

/// A stream's engine.
fn engine_name(source: &Source, stream: &PublisherStream) -> String {
    let base = match (source.bind, stream.topic.as_str()) {
        (true, topic) if !topic.is_empty() => topic,
        _ => &source.name,
    };
    stream.engine(base)
}

/// One source's way into the index.
struct IndexSink {
    index: Arc<Index>,
    states: States,
    source: Source,
    followed: Arc<Followed>,
    engines: HashMap<PublisherStream, Option<EngineId>>,
    arena: BatchArena,
    /// The last breach of the protocol that was said, until a batch comes.
    breach: Option<String>,
}

impl IndexSink {
    fn name(&self, stream: &PublisherStream) -> String {
        engine_name(&self.source, stream)
    }

    fn engine(&mut self, stream: &PublisherStream) -> Option<EngineId> {
        if let Some(known) = self.engines.get(stream) {
            return *known;
        }
        // llm-d's topics name the model: kv@<ip:port>@<model>.
        let told = stream.topic.strip_prefix("kv@").and_then(|rest| rest.split_once('@')).map(|(_, model)| model);
        let model = self.source.model.as_deref().or(told).unwrap_or_default().to_owned();
        let name = self.name(stream);
        let made = {
            let mut writer = self.writer()?;
            let made = writer.engine(&name, &model);
            if let Ok(id) = made {
                let mut engines = self.followed.lock_engines();
                if !engines.contains(&id) {
                    engines.push(id);
                }
            }
            made
        };
        if let Err(error) = &made {
            log::warn!("{name}: {error}");
        }
        self.engines.insert(stream.clone(), made.as_ref().ok().copied());
        made.ok()
    }

    /// The writer, while the source is in the fleet.
    fn writer(&self) -> Option<MutexGuard<'_, IndexWriter>> {
        let writer = self.index.write();
        (!self.followed.has_left.load(Ordering::Acquire)).then_some(writer)
    }

    fn change(&self, what: impl FnOnce(&mut SourceState)) {
        let mut states = lock(&self.states);
        if self.followed.has_left.load(Ordering::Acquire) {
            return;
        }
        if let Some(state) = states.get_mut(&self.source.name) {
            what(state);
        }
    }
}

impl Sink for IndexSink {
    fn connected(&mut self, up: bool) {
        let name = &self.source.name;
        self.change(|state| {
            if state.connected != up {
                if up {
                    log::info!("{name}: connected");
                } else {
                    log::warn!("{name}: connection lost, trying again");
                }
                state.connected = up;
                state.since = Instant::now();
            }
        });
    }

    fn apply(&mut self, stream: &PublisherStream, number: u64, payload: &[u8]) {
        let Some(id) = self.engine(stream) else { return };
        let decoded = decode(payload, &mut self.arena);
        // Not `writer()`: the arena is borrowed.
        let mut writer = self.index.write();
        if self.followed.has_left.load(Ordering::Acquire) {
            return;
        }
        if let Ok(batch) = &decoded {
            writer.apply(id, batch, &self.arena);
        }
        // Under the same lock: a snapshot must not tell of a batch before or after its blocks.
        let last = Position::of(number, payload);
        writer.set_mark(id, EventMark { topic: stream.topic.clone(), rank: stream.rank, last });
        drop(writer);
        self.breach = None;
        self.change(|state| state.heard = Some(Instant::now()));
        if decoded.is_err() {
            self.garbage();
        }
    }

    fn forget(&mut self, stream: &PublisherStream, why: Why) {
        let Some(id) = self.engine(stream) else { return };
        let what = match why {
            Why::Restart => "it has restarted",
            Why::Gap => "events are lost and cannot be replayed",
            Why::Doubt => "the line was down, and no replay tells whether it has restarted (see replay=)",
        };
        log::warn!("{}: {what}: its blocks are forgotten", self.name(stream));
        if let Some(mut writer) = self.writer() {
            writer.forget(id);
        }
    }

    fn state(&mut self, stream: &PublisherStream, counts: BatchCounts, next: Option<u64>, live: bool) {
        let engine = self.name(stream);
        let now = StreamState { engine, next, live, counts };
        self.change(|state| match state.streams.iter_mut().find(|known| known.engine == now.engine) {
            Some(known) => *known = now,
            None => state.streams.push(now),
        });
    }

    fn garbage(&mut self) {
        self.change(|state| state.garbage += 1);
    }

    fn breach(&mut self, fault: &LineFault) {
        let said = fault.to_string();
        if self.breach.as_ref() != Some(&said) {
            log::warn!("{}: {said}: its line is dropped, and made again", self.source.name);
            self.breach = Some(said);
        }
        self.garbage();
    }
}

#[cfg(test)]
mod tests;
