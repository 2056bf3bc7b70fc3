//! `kvcellar events`: watch live streams, record them, play them again, and publish made-up ones
//! for load tests.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, BufWriter, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::task::JoinSet;

use super::index::Sources;
use kvcellar_block::error::{Error, Result};
use kvcellar_events::decode::decode;
use kvcellar_events::encode::encode;
use kvcellar_events::follow::{BatchCounts, Why};
use kvcellar_events::publisher::Publisher;
use kvcellar_events::recording::{RecordedBatch, RecordingEntry};
use kvcellar_events::subscriber::{PublisherStream, Sink, follow};
use kvcellar_events::wire::{Batch, BatchArena, Event, Hashes, Parent, Removed, Stored};
use kvcellar_events::zmtp::LineFault;
use kvcellar_index::api::serving;
use kvcellar_index::tiers::{ALL, FleetTier, TIERS};

/// What to do with events.
#[derive(Debug, Subcommand)]
pub enum EventsCommand {
    /// Shows what engines publish: rates, tiers, gaps. JSON lines when the output is no terminal.
    Tail(TailOptions),
    /// Writes what engines publish into a file: hashes and counts, never tokens.
    Record(RecordOptions),
    /// Publishes a recording again.
    Replay(ReplayOptions),
    /// Publishes a made-up fleet, for load tests.
    Publish(PublishOptions),
}

/// Options of `tail`.
#[derive(Debug, Args)]
pub struct TailOptions {
    /// Where engines are found.
    #[command(flatten)]
    sources: Sources,
    /// Ends after so many seconds.
    #[arg(long)]
    seconds: Option<f64>,
    /// JSON lines also on a terminal.
    #[arg(long)]
    json: bool,
}

/// Options of `record`.
#[derive(Debug, Args)]
pub struct RecordOptions {
    /// Where engines are found.
    #[command(flatten)]
    sources: Sources,
    /// The file to write.
    #[arg(long)]
    output: PathBuf,
    /// Ends after so many seconds.
    #[arg(long)]
    seconds: Option<f64>,
}

/// Options of `replay`.
#[derive(Debug, Args)]
pub struct ReplayOptions {
    /// A recording.
    file: PathBuf,
    /// Port of the first engine's PUB socket; its replay socket gets the next one, and each further
    /// engine the next two.
    #[arg(long, default_value_t = 5600)]
    port: u16,
    /// Times as fast as it was; 0: as fast as it goes.
    #[arg(long, default_value_t = 1.0)]
    speed: f64,
    /// Waits so long for subscribers before the first batch, in seconds, and after the last.
    #[arg(long, default_value_t = 2.0)]
    linger: f64,
}

/// Options of `publish`.
#[derive(Debug, Args)]
pub struct PublishOptions {
    /// Engines.
    #[arg(long, default_value_t = 4)]
    engines: u16,
    /// Port of the first engine's PUB socket; its replay socket gets the next one, and each further
    /// engine the next two.
    #[arg(long, default_value_t = 5600)]
    port: u16,
    /// Block events a second of all engines together.
    #[arg(long, default_value_t = 10_000)]
    rate: u32,
    /// Blocks that an engine holds before it evicts its oldest.
    #[arg(long, default_value_t = 100_000)]
    blocks: usize,
    /// Ends after so many seconds.
    #[arg(long)]
    seconds: Option<f64>,
}

/// Runs one of the commands.
pub fn run(command: &EventsCommand) -> i32 {
    let outcome = serving::block_on(async {
        match command {
            EventsCommand::Tail(options) => tail(options).await,
            EventsCommand::Record(options) => record(options).await,
            EventsCommand::Replay(options) => replay(options).await,
            EventsCommand::Publish(options) => publish(options).await,
        }
    });
    match outcome {
        Ok(()) => 0,
        Err(error) => super::refused(&error),
    }
}

/// What one engine has told.
#[derive(Debug, Clone, Default)]
struct EventTally {
    connected: bool,
    batches: u64,
    stored: [u64; TIERS],
    removed: [u64; TIERS],
    cleared: u64,
    skipped: u64,
    garbage: u64,
    counts: BatchCounts,
}

type RateBoard = Arc<Mutex<BTreeMap<String, EventTally>>>;

/// Counts what comes.
struct Counter {
    source: String,
    board: RateBoard,
    arena: BatchArena,
}

impl Counter {
    fn change(&self, engine: &str, what: impl FnOnce(&mut EventTally)) {
        what(self.board.lock().unwrap_or_else(PoisonError::into_inner).entry(engine.to_owned()).or_default());
    }
}

impl Sink for Counter {
    fn connected(&mut self, up: bool) {
        self.change(&self.source, |told| told.connected = up);
    }

    fn apply(&mut self, stream: &PublisherStream, _number: u64, payload: &[u8]) {
        let Ok(batch) = decode(payload, &mut self.arena) else { return self.garbage() };
        self.change(&stream.engine(&self.source), |told| {
            told.connected = true;
            told.batches += 1;
            told.skipped += u64::from(batch.skipped);
            for event in &batch.events {
                match event {
                    Event::Stored(it) => {
                        told.stored[FleetTier::of(it.medium, it.locality) as usize] += it.hashes.range.len() as u64;
                    }
                    Event::Removed(it) => {
                        told.removed[FleetTier::of(it.medium, it.locality) as usize] += it.hashes.range.len() as u64;
                    }
                    Event::Cleared { .. } | Event::TierCleared { .. } => told.cleared += 1,
                }
            }
        });
    }

    fn forget(&mut self, _stream: &PublisherStream, _why: Why) {}

    fn state(&mut self, stream: &PublisherStream, counts: BatchCounts, _next: Option<u64>, _live: bool) {
        self.change(&stream.engine(&self.source), |told| told.counts = counts);
    }

    fn garbage(&mut self) {
        self.change(&self.source, |told| told.garbage += 1);
    }

    fn breach(&mut self, fault: &LineFault) {
        log::warn!("{}: {fault}: the line is dropped, and made again", self.source);
        self.garbage();
    }
}

/// Waits until it is time, or told to stop.
async fn until(seconds: Option<f64>) {
    match seconds {
        Some(seconds) => {
            let time = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
            tokio::select! {
                () = serving::told_to_stop() => {}
                () = tokio::time::sleep(time) => {}
            }
        }
        None => serving::told_to_stop().await,
    }
}

async fn engines(sources: &Sources) -> Result<Vec<kvcellar_index::fleet::Source>> {
    let found = sources.look().await?;
    if found.is_empty() {
        return Err(kvcellar_discovery::nobody());
    }
    Ok(found)
}

async fn tail(options: &TailOptions) -> Result<()> {
    let board = RateBoard::default();
    let mut tasks = JoinSet::new();
    for source in engines(&options.sources).await? {
        let address = source.address();
        let counter = Counter { source: source.name, board: Arc::clone(&board), arena: BatchArena::default() };
        tasks.spawn(follow(address, Vec::new(), counter));
    }
    let lines = options.json || !std::io::stdout().is_terminal();
    let show = async {
        let (screen, mut bars, mut before) = (MultiProgress::new(), BTreeMap::new(), BTreeMap::new());
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let now = board.lock().unwrap_or_else(PoisonError::into_inner).clone();
            for (engine, told) in &now {
                let past = before.get(engine).cloned().unwrap_or_default();
                if lines {
                    println!("{}", line(engine, told, &past));
                } else {
                    let bar = bars.entry(engine.clone()).or_insert_with(|| screen.add(row_bar()));
                    bar.set_message(row(engine, told, &past));
                }
            }
            before = now;
        }
    };
    tokio::select! {
        () = until(options.seconds) => {}
        () = show => {}
    }
    Ok(())
}

fn row_bar() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}

fn tiers(now: &[u64; TIERS], past: &[u64; TIERS]) -> BTreeMap<&'static str, u64> {
    let differences = ALL.iter().zip(now.iter().zip(past)).map(|(tier, (now, past))| (tier.name(), now - past));
    differences.filter(|(_, count)| *count > 0).collect()
}

fn line(engine: &str, told: &EventTally, past: &EventTally) -> serde_json::Value {
    json!({
        "engine": engine,
        "connected": told.connected,
        "batches_per_second": told.batches - past.batches,
        "stored_per_second": tiers(&told.stored, &past.stored),
        "removed_per_second": tiers(&told.removed, &past.removed),
        "cleared": told.cleared,
        "skipped": told.skipped,
        "garbage": told.garbage,
        "restarts": told.counts.restarts,
        "holes": told.counts.holes,
        "gaps": told.counts.gaps,
    })
}

fn row(engine: &str, told: &EventTally, past: &EventTally) -> String {
    let show = |counts: BTreeMap<&str, u64>| {
        let parts: Vec<String> = counts.iter().map(|(tier, count)| format!("{tier} {count}")).collect();
        if parts.is_empty() { "-".to_owned() } else { parts.join(", ") }
    };
    format!(
        "{engine:24} {:4} {:>6} batches/s   stored/s: {:32} removed/s: {:24} restarts {} gaps {}",
        if told.connected { "up" } else { "DOWN" },
        told.batches - past.batches,
        show(tiers(&told.stored, &past.stored)),
        show(tiers(&told.removed, &past.removed)),
        told.counts.restarts,
        told.counts.gaps,
    )
}

/// Writes what comes.
struct Recorder {
    source: String,
    started: Instant,
    file: Arc<Mutex<BufWriter<std::fs::File>>>,
    failed: Arc<Mutex<Option<std::io::Error>>>,
    arena: BatchArena,
}

impl Recorder {
    fn write(&self, line: &RecordedBatch) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let written =
            serde_json::to_writer(&mut *file, line).map_err(std::io::Error::from).and_then(|()| writeln!(file));
        if let Err(error) = written {
            self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }
}

impl Sink for Recorder {
    fn connected(&mut self, _up: bool) {}

    fn apply(&mut self, stream: &PublisherStream, _number: u64, payload: &[u8]) {
        let at_ms = self.now_ms();
        let line = match decode(payload, &mut self.arena) {
            Ok(batch) => RecordedBatch::of(at_ms, &stream.engine(&self.source), &batch, &self.arena),
            Err(_) => return,
        };
        self.write(&line);
    }

    fn forget(&mut self, stream: &PublisherStream, _why: Why) {
        let engine = stream.engine(&self.source);
        self.write(&RecordedBatch {
            at_ms: self.now_ms(),
            engine,
            rank: stream.rank,
            events: vec![RecordingEntry::Forgotten],
        });
    }

    fn state(&mut self, _stream: &PublisherStream, _counts: BatchCounts, _next: Option<u64>, _live: bool) {}

    fn garbage(&mut self) {}

    fn breach(&mut self, fault: &LineFault) {
        log::warn!("{}: {fault}: the line is dropped, and made again", self.source);
    }
}

async fn record(options: &RecordOptions) -> Result<()> {
    let fail = |error| Error::io("writing", &options.output, error, "Name a file on a disk with room");
    let file = std::fs::File::options().write(true).create_new(true).open(&options.output).map_err(fail)?;
    let file = Arc::new(Mutex::new(BufWriter::new(file)));
    let failed = Arc::new(Mutex::new(None));
    let mut tasks = JoinSet::new();
    let started = Instant::now();
    for source in engines(&options.sources).await? {
        let address = source.address();
        let recorder = Recorder {
            source: source.name,
            started,
            file: Arc::clone(&file),
            failed: Arc::clone(&failed),
            arena: BatchArena::default(),
        };
        tasks.spawn(follow(address, Vec::new(), recorder));
    }
    until(options.seconds).await;
    tasks.shutdown().await;
    let flushed = file.lock().unwrap_or_else(PoisonError::into_inner).flush();
    match failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) => Err(fail(error)),
        None => flushed.map_err(fail),
    }
}

fn now_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

async fn open_publisher(first: u16, number: usize, kept: usize) -> Result<Publisher> {
    let port = usize::from(first) + 2 * number;
    let endpoint = |port: usize| format!("tcp://127.0.0.1:{port}");
    if port + 1 > usize::from(u16::MAX) {
        return Err(Error::config("port", format!("{port} is no port"), "Begin lower, or take fewer engines"));
    }
    Publisher::bind(&endpoint(port), Some(&endpoint(port + 1)), "", kept).await
}

async fn replay(options: &ReplayOptions) -> Result<()> {
    let fail = |error| Error::io("reading", &options.file, error, "Name a file that `kvcellar events record` wrote");
    let file = BufReader::new(std::fs::File::open(&options.file).map_err(fail)?);
    let mut lines = Vec::new();
    for (number, text) in file.lines().enumerate() {
        let line: RecordedBatch = serde_json::from_str(&text.map_err(fail)?).map_err(|error| {
            let remedy = "Name a file that `kvcellar events record` wrote";
            Error::config("file", format!("line {}: {error}", number + 1), remedy)
        })?;
        lines.push(line);
    }
    let mut publishers: BTreeMap<String, Publisher> = BTreeMap::new();
    for line in &lines {
        if !publishers.contains_key(&line.engine) {
            let publisher = open_publisher(options.port, publishers.len(), lines.len()).await?;
            eprintln!("kvcellar: {} at {}", line.engine, publisher.endpoint());
            publishers.insert(line.engine.clone(), publisher);
        }
    }
    let pause = Duration::try_from_secs_f64(options.linger).unwrap_or_default();
    tokio::time::sleep(pause).await;
    let bar = ProgressBar::new(lines.len() as u64);
    let started = Instant::now();
    for line in &lines {
        if options.speed > 0.0 {
            let due = Duration::try_from_secs_f64(line.at_ms as f64 / 1000.0 / options.speed).unwrap_or_default();
            tokio::time::sleep(due.saturating_sub(started.elapsed())).await;
        }
        if let Some(publisher) = publishers.get_mut(&line.engine) {
            publisher.publish(line.payload(now_s())).await?;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    tokio::time::sleep(pause).await;
    Ok(())
}

async fn publish(options: &PublishOptions) -> Result<()> {
    const RUN: usize = 32;
    const BLOCK: usize = 16;
    let mut tasks = JoinSet::new();
    for number in 0..usize::from(options.engines) {
        let mut publisher = open_publisher(options.port, number, 10_000).await?;
        eprintln!("kvcellar: engine {number} at {}", publisher.endpoint());
        let pause = Duration::from_secs_f64(RUN as f64 * f64::from(options.engines) / f64::from(options.rate.max(1)));
        let most = options.blocks;
        tasks.spawn(async move {
            let (mut held, mut prompt) = (std::collections::VecDeque::new(), number as u64);
            let mut ticks = tokio::time::interval(pause);
            let mut arena = BatchArena::default();
            loop {
                ticks.tick().await;
                // Every third prompt is one that all engines get.
                prompt += 1;
                let whose = if prompt.is_multiple_of(3) { prompt } else { prompt << 16 | number as u64 };
                arena.clear();
                let mix = |at: usize| xxhash_rust::xxh3::xxh3_64_with_seed(&whose.to_le_bytes(), at as u64);
                arena.hashes.extend((0..RUN).map(mix));
                arena.tokens.extend((0..RUN * BLOCK).map(|at| mix(at + (1 << 32)) as u32 & 0xffff));
                held.extend(arena.hashes.iter().copied());
                let stored = Stored {
                    hashes: Hashes { range: 0..RUN, digests: None },
                    tokens: 0..RUN * BLOCK,
                    block_size: BLOCK as u32,
                    parent: None::<Parent<'_>>,
                    medium: Some("GPU"),
                    group: Some(0),
                    ..Stored::default()
                };
                let mut events = vec![Event::Stored(Box::new(stored))];
                let surplus = held.len().saturating_sub(most);
                if surplus > 0 {
                    arena.hashes.extend(held.drain(..surplus));
                    let hashes = Hashes { range: RUN..arena.hashes.len(), digests: None };
                    events.push(Event::Removed(Removed {
                        hashes,
                        medium: Some("GPU"),
                        group: Some(0),
                        ..Removed::default()
                    }));
                }
                let mut payload = Vec::new();
                encode(&Batch { at_s: now_s(), rank: Some(0), events, skipped: 0 }, &arena, &mut payload);
                if let Err(error) = publisher.publish(payload).await {
                    eprintln!("kvcellar: {error}");
                    return;
                }
            }
        });
    }
    until(options.seconds).await;
    Ok(())
}
