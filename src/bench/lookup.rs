//! `kvcellar bench lookup`: nanoseconds a block for lookups and for allocation with eviction.
//!
//! Measured: the tier engine's block table and eviction order (no shared memory, no copies), beside
//! a bare hash-map probe of the same keys in the same run. Interleaved, so that a noisy neighbour
//! hits all alike. Cold: after walking memory larger than the caches. Not measured: hashing of
//! tokens, which vLLM does. `python -m kvcellar bench lookup` adds the way through Python and
//! vLLM's own manager.

use std::hint::black_box;
use std::time::Instant;

use clap::Args;
use hashbrown::HashMap;
use indicatif::{ProgressBar, ProgressStyle};

use super::report::{Goal, GoalBound, Measured, measured, report};
use kvcellar_block::BlockHash;
use kvcellar_block::error::{Error, Result};
use kvcellar_engine::tier::warm_table::WarmTable;

/// Sizes of the benchmark.
#[derive(Debug, Clone, Args)]
pub struct LookupBench {
    /// Blocks in the table.
    #[arg(long, default_value_t = 1 << 20)]
    pub blocks: u32,
    /// Blocks of one request.
    #[arg(long, default_value_t = 32_768)]
    pub request: u32,
    /// Repetitions of each measurement.
    #[arg(long, default_value_t = 15)]
    pub repetitions: usize,
    /// JSON on standard output.
    #[arg(long)]
    pub json: bool,
}

/// The `n`-th of an endless row of distinct hashes.
pub(super) fn hash(number: u64) -> BlockHash {
    let mut bytes = [0; 32];
    for (part, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&xxhash_rust::xxh3::xxh3_64_with_seed(&number.to_le_bytes(), part as u64).to_le_bytes());
    }
    // 32 bytes are a length every hash may have.
    BlockHash::new(&bytes).unwrap_or_else(|| unreachable!("32 bytes"))
}

/// Walks through more memory than the caches hold.
fn cool_caches(scratch: &mut [u64]) {
    for value in scratch.iter_mut().step_by(8) {
        *value = value.wrapping_add(1);
    }
    black_box(&scratch);
}

/// Nanoseconds for each of `count` blocks; `work` must find or evict `expected` of them, or it
/// measured something else.
fn nanoseconds_each(count: usize, expected: usize, work: impl FnOnce() -> usize) -> f64 {
    let started = Instant::now();
    let found = black_box(work());
    let elapsed = started.elapsed().as_secs_f64() * 1e9 / count as f64;
    assert_eq!(found, expected, "the benchmark measured something else");
    elapsed
}

/// Runs the measurements.
pub fn measure(options: &LookupBench) -> (Vec<Measured>, Vec<Goal>) {
    let bar = ProgressBar::new(options.repetitions as u64 + 1).with_message("filling the table");
    if let Ok(style) = ProgressStyle::with_template("{msg:24} {bar:30} {pos}/{len} {elapsed}") {
        bar.set_style(style);
    }
    let total = u64::from(options.blocks);
    let request = options.request.min(options.blocks) as usize;
    let known: Vec<BlockHash> = (0..total).map(hash).collect();
    let mut table = WarmTable::new(&known);
    let mut bare: HashMap<BlockHash, u32> = HashMap::with_capacity(known.len());
    bare.extend(known.iter().zip(0_u32..).map(|(hash, slot)| (*hash, slot)));
    let mut scratch = vec![0_u64; 16 << 20];
    bar.inc(1);
    bar.set_message("measuring");

    let names = [
        "core_hit_cold",
        "bare_hit_cold",
        "core_hit_warm",
        "bare_hit_warm",
        "core_miss_cold",
        "bare_miss_cold",
        "core_miss_warm",
        "bare_miss_warm",
        "core_allocate_evict",
    ];
    let mut values: Vec<Vec<f64>> = vec![Vec::new(); names.len()];
    let mut next_unknown = total;
    for repetition in 0..options.repetitions {
        let start = repetition * request % (known.len() - request + 1);
        let hits = &known[start..start + request];
        let unknown: Vec<BlockHash> = (next_unknown..next_unknown + request as u64).map(hash).collect();
        next_unknown += request as u64;
        let mut put = |which: usize, value: f64| values[which].push(value);
        let bare_run = |hashes: &[BlockHash]| hashes.iter().take_while(|hash| bare.contains_key(*hash)).count();
        // A miss ends a run at once; to time misses every hash is a run of its own.
        let bare_misses = |hashes: &[BlockHash]| hashes.iter().filter(|hash| bare.contains_key(*hash)).count();
        let core_misses = |hashes: &[BlockHash]| table.known(hashes);
        cool_caches(&mut scratch);
        put(0, nanoseconds_each(request, request, || table.lookup(hits)));
        put(2, nanoseconds_each(request, request, || table.lookup(hits)));
        cool_caches(&mut scratch);
        put(1, nanoseconds_each(request, request, || bare_run(hits)));
        put(3, nanoseconds_each(request, request, || bare_run(hits)));
        cool_caches(&mut scratch);
        put(4, nanoseconds_each(request, 0, || core_misses(&unknown)));
        put(6, nanoseconds_each(request, 0, || core_misses(&unknown)));
        cool_caches(&mut scratch);
        put(5, nanoseconds_each(request, 0, || bare_misses(&unknown)));
        put(7, nanoseconds_each(request, 0, || bare_misses(&unknown)));
        bar.inc(1);
    }
    for repetition in 0..options.repetitions as u64 {
        let first = next_unknown + repetition * request as u64;
        let fresh: Vec<BlockHash> = (first..first + request as u64).map(hash).collect();
        cool_caches(&mut scratch);
        values[8].push(nanoseconds_each(request, request, || table.allocate(&fresh)));
    }
    bar.finish_and_clear();
    let results: Vec<Measured> =
        names.iter().zip(values).map(|(name, values)| measured(name, "ns/block", values)).collect();
    let goals = lookup_goals(&results);
    (results, goals)
}

fn lookup_goals(results: &[Measured]) -> Vec<Goal> {
    let value = |name: &str| results.iter().find(|result| result.name == name).map_or(f64::NAN, |result| result.value);
    let ratio = |kind: &str| value(&format!("core_{kind}")) / value(&format!("bare_{kind}"));
    ["hit_cold", "hit_warm", "miss_cold", "miss_warm"]
        .map(|kind| Goal::of(format!("core lookup over bare probe, {kind}"), GoalBound::AtMost(2.0), ratio(kind)))
        .into()
}

/// Runs the benchmark and prints it.
///
/// # Errors
/// [`Error::Config`] where there is nothing to measure.
pub fn run(options: &LookupBench) -> Result<()> {
    if options.blocks == 0 || options.request == 0 || options.repetitions == 0 {
        return Err(Error::config("--blocks, --request, --repetitions", "there is a 0 among them", "Write at least 1"));
    }
    let (results, goals) = measure(options);
    if options.json {
        println!("{:#}", report(&results, &goals));
    } else {
        super::report::print(&results, &goals, 1);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tiny_run_works() {
        let options = LookupBench { blocks: 512, request: 64, repetitions: 2, json: true };
        let (results, goals) = measure(&options);
        assert!(results.iter().all(|result| result.value > 0.0 && result.n == 2) && goals.len() == 4);
    }

    #[test]
    fn the_table_really_finds_and_evicts() {
        let known: Vec<BlockHash> = (0..100).map(hash).collect();
        let mut table = WarmTable::new(&known);
        assert_eq!(table.lookup(&known), 100);
        let fresh: Vec<BlockHash> = (100..110).map(hash).collect();
        assert_eq!((table.lookup(&fresh), table.allocate(&fresh), table.lookup(&fresh)), (0, 10, 10));
    }
}
