//! `kvcellar bench index --beside PROGRAM`: the same events and questions for another index, in
//! rounds that alternate.
//!
//! The program (`benches/llmd_index`) gets everything decoded, in a file, and answers with its
//! times as JSON. Both count what every engine holds of the prompts, and must agree.

use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use indicatif::ProgressBar;
use serde::Deserialize;
use serde_json::Value;

use super::{BLOCK, IndexBench, MODEL, PromptShape, RUN, ask, fill, lies_in_cpu, prefix_blocks, traffic};
use crate::report::{self, Measured, measured, percentile};
use kvcellar_block::error::{Error, Result};
use kvcellar_events::decode::decode;
use kvcellar_events::wire::{Batch, BatchArena, Event};
use kvcellar_index::Index;
use kvcellar_index::keys::{self, Extras};
use kvcellar_index::query::PrefixScorer;
use kvcellar_index::roster::EngineId;
use kvcellar_index::tiers::Weights;

/// The larger prompt of the benchmark did not end there within eight minutes and 5 GB.
const SHAPES: &[PromptShape] = super::SHAPES.split_at(1).0;

/// Blocks of the prompts in the traffic.
const FIRST_PROMPT_BLOCKS: usize = 512;

/// What the program says of one prompt.
#[derive(Debug, Deserialize)]
struct Asked {
    keys_ms: f64,
    lookup_ms: f64,
    all_ms: f64,
    all_p99_ms: f64,
    engines: usize,
    blocks: u64,
}

/// What the program says of one round.
#[derive(Debug, Deserialize)]
struct Round {
    index: String,
    go: String,
    applied_per_s: f64,
    bytes_a_holder: f64,
    blocks_of_first_prompt: u64,
    scenes: Vec<Asked>,
}

/// Decoded events, each of one engine.
type Decoded<'a> = Vec<(u32, Batch<'a>, BatchArena)>;

fn decoded(payloads: &[(u32, Vec<u8>)]) -> Result<Decoded<'_>> {
    payloads
        .iter()
        .map(|(engine, payload)| {
            let mut arena = BatchArena::default();
            Ok((*engine, decode(payload, &mut arena)?, arena))
        })
        .collect()
}

/// Numbers in little-endian order.
struct NumberFile<W: Write>(W);

impl<W: Write> NumberFile<W> {
    fn number(&mut self, number: usize) -> std::io::Result<()> {
        self.0.write_all(&(number as u32).to_le_bytes())
    }

    fn tokens(&mut self, tokens: &[u32]) -> std::io::Result<()> {
        self.number(tokens.len())?;
        tokens.iter().try_for_each(|token| self.0.write_all(&token.to_le_bytes()))
    }

    /// One event: head, hashes, tokens.
    fn event(&mut self, engine: u32, event: &Event<'_>, arena: &BatchArena) -> std::io::Result<()> {
        let (removed, medium, parent, hashes, tokens) = match event {
            Event::Stored(it) => (false, it.medium, it.parent, &it.hashes, it.tokens.clone()),
            Event::Removed(it) => (true, it.medium, None, &it.hashes, 0..0),
            Event::Cleared { .. } | Event::TierCleared { .. } => return Ok(()),
        };
        let in_cpu = medium == Some("CPU");
        self.0.write_all(&[u8::from(removed), u8::from(in_cpu), u8::from(parent.is_some()), 0])?;
        self.number(engine as usize)?;
        self.0.write_all(&parent.map_or(0, |parent| parent.name()).to_le_bytes())?;
        let hashes = &arena.hashes[hashes.range.clone()];
        self.number(hashes.len())?;
        hashes.iter().try_for_each(|hash| self.0.write_all(&hash.to_le_bytes()))?;
        self.tokens(&arena.tokens[tokens])
    }

    /// A prompt, and who holds which part of it where.
    fn scene(&mut self, shape: &PromptShape) -> std::io::Result<()> {
        self.tokens(&super::tokens_of(u64::MAX, shape.blocks))?;
        let parts: Vec<[usize; 4]> = (0..shape.engines)
            .flat_map(|engine| {
                let blocks = prefix_blocks(shape, engine);
                (0..blocks).step_by(RUN).map(move |first| {
                    let in_cpu = usize::from(lies_in_cpu(engine, first / RUN));
                    [engine, first, RUN.min(blocks - first), in_cpu]
                })
            })
            .collect();
        self.number(parts.len())?;
        parts.iter().flatten().try_for_each(|number| self.number(*number))
    }
}

fn write(path: &Path, questions: usize, events: &Decoded<'_>) -> Result<()> {
    let written = || {
        let mut file = NumberFile(BufWriter::new(std::fs::File::create(path)?));
        file.number(questions)?;
        file.number(events.len())?;
        for (engine, batch, arena) in events {
            batch.events.iter().try_for_each(|event| file.event(*engine, event, arena))?;
        }
        file.tokens(&super::tokens_of(0, FIRST_PROMPT_BLOCKS))?;
        file.number(SHAPES.len())?;
        SHAPES.iter().try_for_each(|shape| file.scene(shape))?;
        file.0.flush()
    };
    written().map_err(|source| Error::Io {
        action: "cannot write",
        path: path.to_owned(),
        source,
        remedy: "Set TMPDIR to a directory with 200 MB of room",
    })
}

/// Asks the program for one round.
fn theirs(program: &Path, file: &Path) -> Result<Round> {
    let refuse = |problem: String| {
        Error::config(
            "--beside",
            format!("{}: {problem}", program.display()),
            "Build it with scripts/bench_index_beside",
        )
    };
    let output = Command::new(program).arg(file).output().map_err(|error| refuse(error.to_string()))?;
    if !output.status.success() {
        return Err(refuse(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| refuse(format!("its answer is not understood: {error}")))
}

fn index_of(engines: usize) -> Result<(Index, Vec<EngineId>)> {
    let index = Index::new(BLOCK as u32, 8 << 30)?;
    let ids = (0..engines).map(|it| index.write().engine(&format!("{it}"), MODEL)).collect::<Result<_>>()?;
    Ok((index, ids))
}

/// Engines that hold a part of a prompt, and the blocks of all of them together.
fn held(index: &Index, tokens: &[u32]) -> (usize, u64) {
    let (mut scorer, mut found) = (PrefixScorer::default(), Vec::new());
    keys::of_prompt(keys::root(MODEL, None), tokens, BLOCK, &Extras::default(), &mut found);
    let scores = index.score(&mut scorer, &found, None, &Weights::default());
    (scores.len(), scores.iter().map(|score| u64::from(score.blocks)).sum())
}

/// Times of both, and their ratio: how many times better ours is.
#[derive(Default)]
struct Pair {
    ours: Vec<f64>,
    theirs: Vec<f64>,
    ratio: Vec<f64>,
}

impl Pair {
    fn push(&mut self, ours: f64, theirs: f64, ratio: f64) {
        self.ours.push(ours);
        self.theirs.push(theirs);
        self.ratio.push(ratio);
    }

    fn into_results(self, name: &str, unit: &'static str) -> [Measured; 3] {
        [
            measured(&format!("{name}, ours"), unit, self.ours),
            measured(&format!("{name}, llm-d"), unit, self.theirs),
            measured(&format!("{name}, times better"), "ratio", self.ratio),
        ]
    }
}

/// Runs all rounds, and returns the report.
///
/// # Errors
/// [`Error::Config`] where the program cannot be run; [`Error::DataLost`] where both disagree.
pub(super) fn measure(options: &IndexBench, program: &Path, bar: &ProgressBar) -> Result<(Vec<Measured>, Value)> {
    let (payloads, count) = traffic(options.events);
    let events = decoded(&payloads)?;
    let file = std::env::temp_dir().join(format!("kvcellar-bench-index-{}", std::process::id()));
    write(&file, options.questions, &events)?;
    let rounds = rounds(options, program, &file, &events, count, bar);
    // Also where a round failed.
    let removed = std::fs::remove_file(&file);
    let found = rounds?;
    removed.map_err(|source| Error::Io { action: "cannot remove", path: file, source, remedy: "Remove it by hand" })?;
    Ok(found)
}

fn rounds(
    options: &IndexBench,
    program: &Path,
    file: &Path,
    events: &Decoded<'_>,
    count: usize,
    bar: &ProgressBar,
) -> Result<(Vec<Measured>, Value)> {
    let scenes: Vec<_> = SHAPES
        .iter()
        .map(|shape| {
            let (index, ids) = index_of(shape.engines)?;
            fill(shape, |engine, batch, arena| index.write().apply(ids[engine], batch, arena));
            Ok((shape, index, super::tokens_of(u64::MAX, shape.blocks)))
        })
        .collect::<Result<_>>()?;
    let (mut applied, mut memory) = (Pair::default(), Pair::default());
    let mut medians: Vec<Pair> = scenes.iter().map(|_| Pair::default()).collect();
    let mut tails: Vec<Pair> = scenes.iter().map(|_| Pair::default()).collect();
    let mut parts: Vec<[Vec<f64>; 2]> = scenes.iter().map(|_| Default::default()).collect();
    let mut with = Value::Null;
    for _ in 0..options.repetitions {
        let (index, ids) = index_of(32)?;
        let started = Instant::now();
        for (engine, batch, arena) in events {
            index.write().apply(ids[*engine as usize], batch, arena);
        }
        let rate = count as f64 / started.elapsed().as_secs_f64() / 1e6;
        let writer = index.write();
        let holders: usize = ids.iter().map(|id| writer.blocks_of(*id).0).sum();
        let bytes = writer.bytes() as f64 / holders as f64;
        drop(writer);
        let (_, first_blocks) = held(&index, &super::tokens_of(0, FIRST_PROMPT_BLOCKS));
        drop(index);
        let asked: Vec<_> = scenes.iter().map(|(_, index, tokens)| ask(index, tokens, options.questions)).collect();

        let round = theirs(program, file)?;
        let ours: Vec<_> = scenes.iter().map(|(_, index, tokens)| held(index, tokens)).collect();
        let said: Vec<_> = round.scenes.iter().map(|scene| (scene.engines, scene.blocks)).collect();
        if ours != said || round.blocks_of_first_prompt != first_blocks {
            let why = format!("{ours:?} and {first_blocks} here, {said:?} and {} there", round.blocks_of_first_prompt);
            return Err(Error::lost("blocks that engines hold", why));
        }
        let their_rate = round.applied_per_s / 1e6;
        applied.push(rate, their_rate, rate / their_rate);
        memory.push(bytes, round.bytes_a_holder, round.bytes_a_holder / bytes);
        for (at, (times, scene)) in asked.iter().zip(&round.scenes).enumerate() {
            let (p50, p99) = (percentile(times, 50), percentile(times, 99));
            medians[at].push(p50, scene.all_ms, scene.all_ms / p50);
            tails[at].push(p99, scene.all_p99_ms, scene.all_p99_ms / p99);
            parts[at][0].push(scene.keys_ms);
            parts[at][1].push(scene.lookup_ms);
        }
        with = serde_json::json!({"index": round.index, "go": round.go});
        bar.inc(1);
    }
    let mut results = Vec::new();
    results.extend(applied.into_results("decoded events applied", "M blocks/s"));
    results.extend(memory.into_results("memory", "bytes/holder"));
    let named = SHAPES.iter().zip(medians).zip(tails).zip(parts);
    for (((shape, median), tail), [keyed, looked]) in named {
        results.extend(median.into_results(&format!("{} p50", shape.name), "ms"));
        results.extend(tail.into_results(&format!("{} p99", shape.name), "ms"));
        results.push(measured(&format!("{} p50, llm-d's keys", shape.name), "ms", keyed));
        results.push(measured(&format!("{} p50, llm-d's lookup", shape.name), "ms", looked));
    }
    let mut whole = report::report(&results, &[]);
    whole["beside"] = with;
    Ok((results, whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> IndexBench {
        IndexBench { events: 2048, questions: 2, repetitions: 1, json: true, beside: None }
    }

    #[test]
    fn a_program_that_is_not_there_is_refused_by_name() {
        let refused = measure(&options(), Path::new("/nowhere/llmd_index"), &ProgressBar::hidden());
        let text = refused.expect_err("nobody there").to_string();
        assert!(text.contains("--beside") && text.contains("/nowhere/llmd_index"), "{text}");
    }

    #[test]
    fn the_file_says_how_long_it_is() {
        let (payloads, count) = traffic(2048);
        let events = decoded(&payloads).expect("our own batches");
        let file = tempfile::NamedTempFile::new().expect("room");
        write(file.path(), 7, &events).expect("room");
        let bytes = std::fs::read(file.path()).expect("the file");
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
        assert_eq!((number(0), number(4) as usize), (7, events.len()));
        let hashes = count * 8;
        let tokens: usize = events.iter().map(|(_, _, arena)| arena.tokens.len() * 4).sum();
        let prompts = (FIRST_PROMPT_BLOCKS + SHAPES[0].blocks) * BLOCK * 4;
        let parts: usize = SHAPES
            .iter()
            .map(|shape| (0..shape.engines).map(|it| prefix_blocks(shape, it).div_ceil(RUN)).sum::<usize>() * 16)
            .sum();
        let heads = events.len() * 24 + 8 + 4 * 4;
        assert_eq!(bytes.len(), heads + hashes + tokens + prompts + parts);
    }
}
