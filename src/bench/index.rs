//! `kvcellar bench index`: block events a second on one core, and questions while events pour in.
//!
//! Measured: published bytes to holders (decoding, keys, links, sets, table), and tokens to scores
//! (keys, table, sets), each beside an index of a hash map from key to a hash set of (engine, tier)
//! that gets the same bytes through the same decoder. Not measured: sockets. The fleet:
//! conversations of which a part is shared by many engines; batches as vLLM makes them, one event
//! with the new blocks of a step, and evictions from time to time.

mod beside;

use std::hint::black_box;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clap::Args;
use hashbrown::{HashMap, HashSet};
use indicatif::{ProgressBar, ProgressStyle};

use super::report::{self, Goal, GoalBound, Measured, measured, percentile};
use kvcellar_block::error::{Error, Result};
use kvcellar_events::decode::decode;
use kvcellar_events::encode::encode;
use kvcellar_events::wire::{Batch, BatchArena, Event, Hashes, Parent, Removed, Stored};
use kvcellar_index::Index;
use kvcellar_index::keys::{self, Extras};
use kvcellar_index::query::PrefixScorer;
use kvcellar_index::roster::EngineId;
use kvcellar_index::tiers::{FleetTier, Weights};

const BLOCK: usize = 16;
const MODEL: &str = "model";
/// Blocks of one stored event.
const RUN: usize = 32;

/// Sizes of the benchmark.
#[derive(Debug, Clone, Args)]
pub struct IndexBench {
    /// Block events applied in each repetition.
    #[arg(long, default_value_t = 1 << 20)]
    pub events: usize,
    /// Questions in each repetition.
    #[arg(long, default_value_t = 400)]
    pub questions: usize,
    /// Repetitions of each measurement.
    #[arg(long, default_value_t = 5)]
    pub repetitions: usize,
    /// JSON on standard output.
    #[arg(long)]
    pub json: bool,
    /// Measures another index instead of the naive one: a program as in `benches/llmd_index`.
    #[arg(long, value_name = "PROGRAM")]
    pub beside: Option<PathBuf>,
}

/// A prompt that many engines hold a part of.
struct PromptShape {
    name: &'static str,
    blocks: usize,
    engines: usize,
}

const SHAPES: [PromptShape; 2] = [
    PromptShape { name: "3750x96", blocks: 3750, engines: 96 },
    PromptShape { name: "8192x512", blocks: 8192, engines: 512 },
];

fn token(whose: u64, at: usize) -> u32 {
    // Most vocabularies have between 32,000 and 256,000 tokens: two bytes for some, four for
    // others, as they travel.
    xxhash_rust::xxh3::xxh3_64_with_seed(&whose.to_le_bytes(), at as u64) as u32 % 128_000
}

/// Payloads that store `blocks` blocks of one prompt and, if asked, remove them again.
fn payloads(whose: u64, blocks: usize, medium: &str, removed: bool) -> Vec<Vec<u8>> {
    let mut made = Vec::new();
    let mut arena = BatchArena::default();
    let name = |number: usize| xxhash_rust::xxh3::xxh3_64_with_seed(&whose.to_le_bytes(), number as u64 + (1 << 40));
    let mut push = |event: Event<'_>, arena: &BatchArena| {
        let batch = Batch { at_s: 1.5, rank: Some(0), events: vec![event], skipped: 0 };
        let mut payload = Vec::new();
        encode(&batch, arena, &mut payload);
        made.push(payload);
    };
    for first in (0..blocks).step_by(RUN) {
        let count = RUN.min(blocks - first);
        arena.clear();
        arena.hashes.extend((first..first + count).map(name));
        arena.tokens.extend((first * BLOCK..(first + count) * BLOCK).map(|at| token(whose, at)));
        let stored = Stored {
            hashes: Hashes { range: 0..count, digests: None },
            parent: first.checked_sub(1).map(|before| Parent::Number(name(before))),
            tokens: 0..count * BLOCK,
            block_size: BLOCK as u32,
            medium: Some(medium),
            group: Some(0),
            kind: Some("full_attention"),
            ..Stored::default()
        };
        push(Event::Stored(Box::new(stored)), &arena);
    }
    for first in (0..if removed { blocks } else { 0 }).step_by(RUN) {
        arena.clear();
        arena.hashes.extend((first..blocks.min(first + RUN)).map(name));
        let hashes = Hashes { range: 0..arena.hashes.len(), digests: None };
        push(Event::Removed(Removed { hashes, medium: Some(medium), group: Some(0), ..Removed::default() }), &arena);
    }
    made
}

/// What one would write first.
#[derive(Default)]
struct NaiveIndex {
    holders: HashMap<u64, HashSet<(u32, FleetTier)>>,
    links: HashMap<(u32, u64), u64>,
}

impl NaiveIndex {
    fn apply(&mut self, engine: u32, batch: &Batch<'_>, arena: &BatchArena) {
        for event in &batch.events {
            match event {
                Event::Stored(it) => {
                    let tier = FleetTier::of(it.medium, it.locality);
                    let mut parent = it.parent.map_or_else(
                        || keys::root(MODEL, it.lora_name),
                        |parent| self.links.get(&(engine, parent.name())).copied().unwrap_or(0),
                    );
                    let tokens = arena.tokens[it.tokens.clone()].chunks_exact(BLOCK);
                    for (hash, tokens) in arena.hashes[it.hashes.range.clone()].iter().zip(tokens) {
                        parent = keys::next(parent, tokens, keys::PLAIN);
                        self.links.insert((engine, *hash), parent);
                        self.holders.entry(parent).or_default().insert((engine, tier));
                    }
                }
                Event::Removed(it) => {
                    let tier = FleetTier::of(it.medium, it.locality);
                    for hash in &arena.hashes[it.hashes.range.clone()] {
                        let Some(key) = self.links.get(&(engine, *hash)) else { continue };
                        if let Some(set) = self.holders.get_mut(key) {
                            set.remove(&(engine, tier));
                            if set.is_empty() {
                                self.holders.remove(key);
                            }
                        }
                    }
                }
                Event::Cleared { .. } | Event::TierCleared { .. } => {}
            }
        }
    }

    /// Longest prefix of each engine.
    fn score(&self, keys: &[u64]) -> HashMap<u32, u32> {
        let mut prefixes: HashMap<u32, u32> = HashMap::new();
        for (block, key) in keys.iter().enumerate() {
            let Some(holders) = self.holders.get(key) else { break };
            for (engine, _) in holders {
                let prefix = prefixes.entry(*engine).or_default();
                if *prefix == block as u32 {
                    *prefix += 1;
                }
            }
        }
        prefixes
    }
}

fn tokens_of(whose: u64, blocks: usize) -> Vec<u32> {
    (0..blocks * BLOCK).map(|at| token(whose, at)).collect()
}

/// Runs the measurements.
pub fn measure(options: &IndexBench) -> (Vec<Measured>, Vec<Goal>) {
    let bar = ProgressBar::new(3 * options.repetitions as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg:24} {bar:30} {pos}/{len} {elapsed}") {
        bar.set_style(style);
    }
    let (mut results, mut goals) = (Vec::new(), Vec::new());
    bar.set_message("events");
    events(options, &bar, &mut results, &mut goals);
    for shape in &SHAPES {
        bar.set_message(shape.name);
        questions(options, shape, &bar, &mut results, &mut goals);
    }
    bar.finish_and_clear();
    (results, goals)
}

/// Bytes of a fleet's batches: (engine, payload), and how many block events they hold.
fn traffic(events: usize) -> (Vec<(u32, Vec<u8>)>, usize) {
    const ENGINES: u32 = 32;
    const BLOCKS: usize = 512;
    let (mut made, mut count, mut number) = (Vec::new(), 0, 0_u64);
    while count < events {
        // A third of the prompts is stored by four engines, and a third leaves again.
        for copy in 0..if number.is_multiple_of(3) { 4 } else { 1 } {
            let removed = number % 3 == 1;
            let engine = (number as u32 * 7 + copy * 5) % ENGINES;
            let medium = if number.is_multiple_of(5) { "CPU" } else { "GPU" };
            made.extend(payloads(number, BLOCKS, medium, removed).into_iter().map(|payload| (engine, payload)));
            count += BLOCKS * (1 + usize::from(removed));
        }
        number += 1;
    }
    (made, count)
}

fn events(options: &IndexBench, bar: &ProgressBar, results: &mut Vec<Measured>, goals: &mut Vec<Goal>) {
    let (traffic, count) = traffic(options.events);
    let [mut ours, mut naive, mut decoded, mut bytes, mut naive_ratio] = [const { Vec::new() }; 5];
    for _ in 0..options.repetitions {
        let mut arena = BatchArena::default();
        let started = Instant::now();
        for (_, payload) in &traffic {
            black_box(decode(payload, &mut arena).is_ok());
        }
        decoded.push(count as f64 / started.elapsed().as_secs_f64() / 1e6);

        let Ok(index) = Index::new(BLOCK as u32, 8 << 30) else { return };
        let ids: Vec<EngineId> = (0..32).filter_map(|it| index.write().engine(&format!("{it}"), MODEL).ok()).collect();
        let started = Instant::now();
        for (engine, payload) in &traffic {
            if let Ok(batch) = decode(payload, &mut arena) {
                index.write().apply(ids[*engine as usize], &batch, &arena);
            }
        }
        let rate = count as f64 / started.elapsed().as_secs_f64() / 1e6;
        ours.push(rate);
        let writer = index.write();
        let holders: usize = ids.iter().map(|id| writer.blocks_of(*id).0).sum();
        bytes.push(writer.bytes() as f64 / holders as f64);
        drop(writer);
        drop(index);

        let mut plain = NaiveIndex::default();
        let started = Instant::now();
        for (engine, payload) in &traffic {
            if let Ok(batch) = decode(payload, &mut arena) {
                plain.apply(*engine, &batch, &arena);
            }
        }
        let naive_rate = count as f64 / started.elapsed().as_secs_f64() / 1e6;
        naive.push(naive_rate);
        naive_ratio.push(rate / naive_rate);
        bar.inc(1);
    }
    results.push(measured("events applied", "M blocks/s", ours));
    results.push(measured("events applied, naive", "M blocks/s", naive));
    results.push(measured("events applied over naive", "ratio", naive_ratio));
    results.push(measured("events decoded only", "M blocks/s", decoded));
    results.push(measured("memory", "bytes/holder", bytes));
    let reached = results[results.len() - 5].value;
    goals.push(Goal::of("block events applied on one core, millions a second", GoalBound::AtLeast(2.0), reached));
}

fn questions(
    options: &IndexBench,
    shape: &PromptShape,
    bar: &ProgressBar,
    results: &mut Vec<Measured>,
    goals: &mut Vec<Goal>,
) {
    let Ok(index) = Index::new(BLOCK as u32, 8 << 30) else { return };
    let mut naive = NaiveIndex::default();
    let ids: Vec<EngineId> =
        (0..shape.engines).filter_map(|it| index.write().engine(&format!("{it}"), MODEL).ok()).collect();
    fill(shape, |engine, batch, arena| {
        index.write().apply(ids[engine], batch, arena);
        naive.apply(engine as u32, batch, arena);
    });
    let tokens = tokens_of(u64::MAX, shape.blocks);
    let noise: Vec<Vec<u8>> = (0..64).flat_map(|whose| payloads(whose, 512, "GPU", true)).collect();
    let [mut p50, mut p99, mut naive_p50, mut alone] = [const { Vec::new() }; 4];
    for _ in 0..options.repetitions {
        alone.push(percentile(&ask(&index, &tokens, options.questions), 50));
        let done = AtomicBool::new(false);
        let times = std::thread::scope(|scope| {
            // A thread of its own, as in a server: events pour in as fast as they can be applied.
            scope.spawn(|| {
                let mut arena = BatchArena::default();
                for (number, payload) in noise.iter().cycle().enumerate() {
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                    if let Ok(batch) = decode(payload, &mut arena) {
                        index.write().apply(ids[number / 32 % ids.len()], &batch, &arena);
                    }
                }
            });
            let times = ask(&index, &tokens, options.questions);
            done.store(true, Ordering::Relaxed);
            times
        });
        p50.push(percentile(&times, 50));
        p99.push(percentile(&times, 99));
        let mut times = Vec::new();
        for _ in 0..options.questions.div_ceil(40) {
            let mut found = Vec::new();
            let started = Instant::now();
            keys::of_prompt(keys::root(MODEL, None), &tokens, BLOCK, &Extras::default(), &mut found);
            black_box(naive.score(&found));
            times.push(started.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        naive_p50.push(percentile(&times, 50));
        bar.inc(1);
    }
    let name = shape.name;
    results.push(measured(&format!("{name} alone, p50"), "ms", alone));
    results.push(measured(&format!("{name} beside a writer, p50"), "ms", p50));
    results.push(measured(&format!("{name} beside a writer, p99"), "ms", p99));
    results.push(measured(&format!("{name} naive, no writer, p50"), "ms", naive_p50));
    let reached = results[results.len() - 2].value;
    if shape.blocks == SHAPES[0].blocks {
        goals.push(Goal::of(format!("{name} beside a writer, p99 in ms"), GoalBound::AtMost(0.5), reached));
    }
}

/// Blocks of the prompt that an engine holds: prefixes of different lengths.
fn prefix_blocks(shape: &PromptShape, engine: usize) -> usize {
    shape.blocks - engine * shape.blocks / (2 * shape.engines)
}

/// Whether a run of blocks is in the second tier.
fn lies_in_cpu(engine: usize, run: usize) -> bool {
    (run + engine).is_multiple_of(4)
}

/// Tells what every engine holds of a prompt.
fn fill(shape: &PromptShape, mut apply: impl FnMut(usize, &Batch<'_>, &BatchArena)) {
    let mut arena = BatchArena::default();
    for engine in 0..shape.engines {
        for (run, payload) in payloads(u64::MAX, prefix_blocks(shape, engine), "GPU", false).iter().enumerate() {
            let moved = if lies_in_cpu(engine, run) { payloads_as(payload, "CPU") } else { payload.clone() };
            if let Ok(batch) = decode(&moved, &mut arena) {
                apply(engine, &batch, &arena);
            }
        }
    }
}

/// The same payload with another medium of the same length.
fn payloads_as(payload: &[u8], medium: &str) -> Vec<u8> {
    let mut changed = payload.to_vec();
    if let Some(at) = changed.windows(3).rposition(|window| window == b"GPU") {
        changed[at..at + 3].copy_from_slice(medium.as_bytes());
    }
    changed
}

/// Milliseconds of each question, sorted: from tokens to scores.
fn ask(index: &Index, tokens: &[u32], questions: usize) -> Vec<f64> {
    let (mut scorer, mut found) = (PrefixScorer::default(), Vec::new());
    let weights = Weights::default();
    let mut times: Vec<f64> = (0..questions)
        .map(|_| {
            let started = Instant::now();
            found.clear();
            keys::of_prompt(keys::root(MODEL, None), tokens, BLOCK, &Extras::default(), &mut found);
            black_box(index.score(&mut scorer, &found, None, &weights).len());
            started.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times
}

/// Runs the benchmark and prints it.
///
/// # Errors
/// [`Error::Config`] where there is nothing to measure.
pub fn run(options: &IndexBench) -> Result<()> {
    if options.events == 0 || options.questions == 0 || options.repetitions == 0 {
        return Err(Error::config(
            "--events, --questions, --repetitions",
            "there is a 0 among them",
            "Write at least 1",
        ));
    }
    if let Some(program) = &options.beside {
        let (results, whole) = beside::measure(options, program, &ProgressBar::new(options.repetitions as u64))?;
        if options.json {
            println!("{whole:#}");
        } else {
            report::print(&results, &[], 3);
        }
        return Ok(());
    }
    let (results, goals) = measure(options);
    if options.json {
        println!("{:#}", report::report(&results, &goals));
    } else {
        report::print(&results, &goals, 3);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tiny_run_works_and_both_indexes_agree() {
        let options = IndexBench { events: 4096, questions: 2, repetitions: 1, json: true, beside: None };
        let (results, goals) = measure(&options);
        assert!(results.iter().all(|result| result.value > 0.0) && results.len() == 13 && goals.len() == 2);
        let (index, mut naive, mut arena) =
            (Index::new(16, 1 << 30).expect("room"), NaiveIndex::default(), BatchArena::default());
        let ids: Vec<EngineId> =
            (0..32).map(|it| index.write().engine(&format!("{it}"), MODEL).expect("room")).collect();
        for (engine, payload) in traffic(8192).0 {
            let batch = decode(&payload, &mut arena).expect("a batch");
            index.write().apply(ids[engine as usize], &batch, &arena);
            naive.apply(engine, &batch, &arena);
        }
        assert_eq!(index.write().sizes().0, naive.holders.len());
        let mut keys = Vec::new();
        keys::of_prompt(keys::root(MODEL, None), &tokens_of(0, 512), BLOCK, &Extras::default(), &mut keys);
        let mut scorer = PrefixScorer::default();
        let scores = index.score(&mut scorer, &keys, None, &Weights::default());
        let prefixes: HashMap<u32, u32> = scores.iter().map(|score| (score.engine.0, score.blocks)).collect();
        assert_eq!(prefixes, naive.score(&keys));
        assert_eq!(prefixes.len(), 4);
    }
}
