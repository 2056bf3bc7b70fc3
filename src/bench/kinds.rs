//! `kvcellar bench kinds`: what keeping and finding blocks costs for a hybrid model of eight KV
//! cache groups, beside a plain model, in one run.
//!
//! Measured: the tier engine with its real slot table and nothing to copy. A request is offered
//! step by step, as vLLM computes it; its copies are answered at once; then the same prompt is
//! looked up and loaded. Not measured: copies, the way through Python, vLLM.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::lookup::hash;
use super::report::{Goal, GoalBound, Measured, measured, report};
use kvcellar_block::error::{Error, Result};
use kvcellar_block::kinds::{ChunkedLocal, SlidingWindow};
use kvcellar_block::plan::StepPlan;
use kvcellar_block::{BlockHash, GroupKind, GroupSpec, Grouping, SlotIndex};
use kvcellar_engine::config::Config;
use kvcellar_engine::pool::memory::{HeapSlots, SlotMemory};
use kvcellar_engine::tier::load::Hit;
use kvcellar_engine::tier::offload::{GroupOffer, Offer, Start};
use kvcellar_engine::tier::{Arrival, TierEngine};

/// Sizes of the benchmark.
#[derive(Debug, Clone, Args)]
pub struct KindsBench {
    /// Tokens of one request.
    #[arg(long, default_value_t = 32_768)]
    pub tokens: u32,
    /// Tokens that one step computes.
    #[arg(long, default_value_t = 2048)]
    pub step: u32,
    /// Repetitions of each measurement.
    #[arg(long, default_value_t = 30)]
    pub repetitions: usize,
    /// JSON on standard output.
    #[arg(long)]
    pub json: bool,
}

const BLOCK_TOKENS: u32 = 16;
const NANOSECONDS: f64 = 1e9;
/// Groups of the largest model.
const GROUPS_MAX: u32 = 8;
/// Requests that fill the pool of any of the models, and use each place of it again.
const FILLING: u32 = 2 * 3 * GROUPS_MAX;

struct GroupMix {
    name: &'static str,
    grouping: Grouping,
}

fn grouping(kinds: &[GroupKind]) -> Grouping {
    let spec = |kind: &GroupKind| GroupSpec {
        kind: *kind,
        kind_name: String::new(),
        block_tokens: BLOCK_TOKENS,
        eagle: false,
    };
    Grouping { groups: kinds.iter().map(spec).collect(), hash_tokens: BLOCK_TOKENS, hit_tokens: BLOCK_TOKENS }
}

fn models() -> [GroupMix; 2] {
    let window = GroupKind::SlidingWindow(SlidingWindow { window: 1024, extra: 0 });
    let chunks = GroupKind::ChunkedLocal(ChunkedLocal { chunk: 2048 });
    let hybrid = [
        GroupKind::Full,
        GroupKind::Full,
        window,
        window,
        chunks,
        GroupKind::State,
        GroupKind::State,
        GroupKind::State,
    ];
    [
        GroupMix { name: "plain", grouping: grouping(&[GroupKind::Full]) },
        GroupMix { name: "hybrid", grouping: grouping(&hybrid) },
    ]
}

/// What one request cost.
#[derive(Debug, Default, Clone, Copy)]
struct RequestCost {
    offer_ns: f64,
    lookup_ns: f64,
    load_ns: f64,
    slots_per_1000_tokens: f64,
}

struct HybridRun {
    engine: TierEngine,
    memory: Arc<HeapSlots>,
    grouping: Grouping,
    options: KindsBench,
    next: u64,
}

impl HybridRun {
    fn new(model: &GroupMix, options: &KindsBench) -> Result<Self> {
        // Pools of one size for all models: what a block costs depends on how much memory its books
        // are spread over. Older requests make room for the newest, as in a pool that is full.
        let slots = 3 * options.tokens / BLOCK_TOKENS * GROUPS_MAX;
        let memory = Arc::new(HeapSlots::new(slots, 1));
        let mut engine = TierEngine::new(&Config::default(), model.grouping.clone())?;
        engine.open(Arc::clone(&memory) as Arc<dyn SlotMemory>);
        Ok(Self { engine, memory, grouping: model.grouping.clone(), options: options.clone(), next: 0 })
    }

    /// The blocks that a step completes: all of attention's, and the state at its end.
    fn offered(&self, first: u32, last: u32) -> Vec<GroupOffer> {
        let of_group = |(group, spec): (usize, &GroupSpec)| {
            let ids = (first..last).map(|block| 1 + block + group as u32 * self.options.tokens);
            let state = spec.kind == GroupKind::State;
            let blocks = ids.map(|id| if state && (id - 1) % self.options.tokens != last - 1 { 0 } else { id });
            GroupOffer { first, blocks: blocks.collect(), extra: Vec::new() }
        };
        self.grouping.groups.iter().enumerate().map(of_group).collect()
    }

    fn answer(&mut self) -> Result<u64> {
        let plan = StepPlan::decode(&self.engine.take_plan())?;
        for copy in &plan.stores_after {
            self.memory.line(SlotIndex(copy.slot)).answer(0, true);
        }
        Ok(plan.stores_after.len() as u64)
    }

    /// One request from its first step to its last, then the same prompt again.
    fn once(&mut self) -> Result<RequestCost> {
        self.next += 1;
        let blocks = self.options.tokens / BLOCK_TOKENS;
        let hashes: Vec<BlockHash> = (0..blocks).map(|block| hash(self.next << 32 | u64::from(block))).collect();
        let id = format!("computed-{}", self.next);
        self.engine.add_request(&id, Arrival::default());
        self.engine.add_hashes(&id, &hashes);
        let (mut seconds, mut stored) = (0.0, 0);
        for first in (0..blocks).step_by((self.options.step / BLOCK_TOKENS) as usize) {
            let last = (first + self.options.step / BLOCK_TOKENS).min(blocks);
            let groups = self.offered(first, last);
            let tokens = vec![7; ((last - first) * BLOCK_TOKENS) as usize];
            let offer = Offer { request: &id, tokens_from: first * BLOCK_TOKENS, tokens, groups };
            let begun = Instant::now();
            self.engine.offer(&offer, Start::AfterStep);
            seconds += begun.elapsed().as_secs_f64();
            stored += self.answer()?;
            let begun = Instant::now();
            self.engine.poll();
            seconds += begun.elapsed().as_secs_f64();
        }
        self.engine.finish(&id, self.options.tokens, self.options.tokens);
        black_box(self.engine.take_events());

        let id = format!("again-{}", self.next);
        self.engine.add_request(&id, Arrival::default());
        self.engine.add_hashes(&id, &hashes);
        let begun = Instant::now();
        let hit = self.engine.lookup(&id, self.options.tokens + 1, 0);
        let lookup = begun.elapsed().as_secs_f64();
        assert_eq!(hit, Hit::Tokens(self.options.tokens), "the benchmark measured something else");
        let (mut destinations, mut loaded) = (Vec::new(), 0);
        for (group, spec) in self.grouping.groups.iter().enumerate() {
            let first = spec.first_needed(self.options.tokens);
            loaded += blocks - first;
            let id = |block: u32| if block < first { 0 } else { 1 + block + group as u32 * self.options.tokens };
            destinations.push((0..blocks).map(id).collect::<Vec<u32>>());
        }
        let begun = Instant::now();
        self.engine.admit(&id, self.options.tokens, &destinations);
        let plan = self.engine.take_plan();
        let load = begun.elapsed().as_secs_f64();
        black_box(plan);
        self.engine.load_ended(&id, false);
        self.engine.finish(&id, self.options.tokens, self.options.tokens);
        black_box(self.engine.take_events());
        Ok(RequestCost {
            offer_ns: seconds * NANOSECONDS / stored as f64,
            lookup_ns: lookup * NANOSECONDS / f64::from(blocks),
            load_ns: load * NANOSECONDS / f64::from(loaded),
            slots_per_1000_tokens: stored as f64 * 1000.0 / f64::from(self.options.tokens),
        })
    }
}

/// Runs the measurements, the models in turn.
///
/// # Errors
/// None that a build for this machine has.
pub fn measure(options: &KindsBench) -> Result<(Vec<Measured>, Vec<Goal>)> {
    let bar = ProgressBar::new(options.repetitions as u64).with_message("measuring");
    if let Ok(style) = ProgressStyle::with_template("{msg:24} {bar:30} {pos}/{len} {elapsed}") {
        bar.set_style(style);
    }
    let models = models();
    let mut benches = models.iter().map(|model| HybridRun::new(model, options)).collect::<Result<Vec<HybridRun>>>()?;
    let mut costs: Vec<Vec<RequestCost>> = vec![Vec::new(); benches.len()];
    for bench in &mut benches {
        for _ in 0..FILLING {
            bench.once()?;
        }
    }
    for _ in 0..options.repetitions {
        for (bench, costs) in benches.iter_mut().zip(&mut costs) {
            costs.push(bench.once()?);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let mut results = Vec::new();
    for (model, costs) in models.iter().zip(&costs) {
        let mut add =
            |what: &str, unit, values| results.push(measured(&format!("{}_{what}", model.name), unit, values));
        add("offer", "ns/block stored", costs.iter().map(|cost| cost.offer_ns).collect());
        add("lookup", "ns/16 tokens of the prompt", costs.iter().map(|cost| cost.lookup_ns).collect());
        add("load", "ns/block loaded", costs.iter().map(|cost| cost.load_ns).collect());
        add("slots", "slots/1000 tokens", costs.iter().map(|cost| cost.slots_per_1000_tokens).collect());
    }
    let goals = ["offer", "load"].map(|name| goal(&results, name)).into();
    Ok((results, goals))
}

fn goal(results: &[Measured], name: &str) -> Goal {
    let value = |model: &str| {
        let wanted = format!("{model}_{name}");
        results.iter().find(|result| result.name == wanted).map_or(f64::NAN, |result| result.value)
    };
    let ratio = value("hybrid") / value("plain");
    Goal::of(format!("{name}, a block of the hybrid over one of the plain model"), GoalBound::AtMost(1.5), ratio)
}

/// Runs the benchmark and prints it.
///
/// # Errors
/// [`Error::Config`] where there is nothing to measure.
pub fn run(options: &KindsBench) -> Result<()> {
    if options.repetitions == 0 || options.step < BLOCK_TOKENS || options.tokens < options.step {
        let remedy = "Write at least 1 repetition, steps of at least 16 tokens, and a request of at least one step";
        return Err(Error::config("--tokens, --step, --repetitions", "there is nothing to measure", remedy));
    }
    let (results, goals) = measure(options)?;
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
        let options = KindsBench { tokens: 4096, step: 512, repetitions: 2, json: true };
        let (results, goals) = measure(&options).expect("it runs");
        assert!(results.iter().all(|result| result.value > 0.0 && result.n == 2) && goals.len() == 2);
        let slots = |name: &str| results.iter().find(|result| result.name == name).map_or(0.0, |result| result.value);
        // A state for each step and group, and of attention all blocks that a hit can need.
        assert!(slots("plain_slots") < slots("hybrid_slots") && slots("hybrid_slots") < 8.0 * slots("plain_slots"));
    }
}
