//! Whole fleets on bad lines: when the noise is over, the index is what a naive one is, and never
//! says more than the truth.

use std::collections::HashMap;

use kvcellar_events::decode::decode;
use kvcellar_events::follow::FollowStep;
use kvcellar_events::wire::BatchArena;
use kvcellar_index::Index;
use kvcellar_index::limits::INDEX_BYTES_MIN;
use kvcellar_index::query::PrefixScorer;
use kvcellar_index::roster::EngineId;
use kvcellar_index::tiers::Weights;

use crate::engine::{Second, Shape, SimEngine};
use crate::naive::{Naive, holds, masked};
use crate::prompts::{BLOCK, MODEL, TOKENS, hash, keys, same_until, tokens};
use kvcellar_testkit::random::{Random, Seed};

/// Second groups that engines may have.
const SECONDS: [Second; 4] = [Second::Window(7), Second::Chunk(12), Second::Chunk(32), Second::State];

struct Fleet {
    index: Index,
    engines: Vec<(EngineId, SimEngine, Naive)>,
    arena: BatchArena,
    applied: u64,
}

impl Fleet {
    fn new(count: u64, choices: &mut Random) -> Self {
        let index = Index::new(BLOCK as u32, INDEX_BYTES_MIN).expect("an index");
        let engines = (0..count)
            .map(|number| {
                let id = index.write().engine(&format!("engine-{number}"), MODEL).expect("room");
                let block = *choices.pick(&[4, 4, 4, 8, 16, 2, 1]);
                let shape = Shape {
                    block,
                    second: (block == BLOCK && choices.chance(60)).then(|| *choices.pick(&SECONDS)),
                    replay: *choices.pick(&[0, 3, 1000, 100_000]),
                };
                (id, SimEngine::new(shape, number), Naive::new(shape))
            })
            .collect();
        Self { index, engines, arena: BatchArena::default(), applied: 0 }
    }

    fn step(&mut self, at: usize, choices: &mut Random, prompts: u64, noisy: bool) {
        let (id, engine, naive) = &mut self.engines[at];
        let (index, arena, applied) = (&self.index, &mut self.arena, &mut self.applied);
        if noisy && choices.chance(1) {
            engine.restart();
        }
        if noisy && choices.chance(2) {
            engine.cut();
        }
        let payload = engine.work(choices, prompts);
        let (lost, twice) = (noisy && choices.chance(8), noisy && choices.chance(20));
        engine.publish(&payload, lost, twice, &mut |step| {
            naive.run(&step);
            match step {
                FollowStep::Apply(_, payload) => {
                    let batch = decode(&payload, arena).expect("a batch");
                    *applied += arena.hashes.len() as u64;
                    index.write().apply(*id, &batch, arena);
                }
                FollowStep::Forget(_) => index.write().forget(*id),
                FollowStep::Replay(_) => unreachable!("answered by the engine"),
            }
        });
    }

    /// Every engine's tiers of every block of these prompts: the index against the naive one and
    /// against the truth.
    fn compare(&self, prompts: u64) {
        let names: Vec<_> = self.engines.iter().map(|(_, engine, _)| engine.names()).collect();
        let mut scorer = PrefixScorer::default();
        for prompt in 0..prompts {
            let keys = keys(prompt);
            let family: HashMap<u64, Vec<u32>> = same_until(prompt, 0).map(|it| (it, tokens(it))).collect();
            let mut expected: HashMap<EngineId, Vec<Vec<u8>>> = HashMap::new();
            for (number, key) in keys.iter().enumerate() {
                let end = (number + 1) * BLOCK;
                let mut held: HashMap<EngineId, Vec<u8>> = HashMap::new();
                for (engine, tiers) in self.index.holders(*key) {
                    held.entry(engine).or_default().push(tiers.iter().fold(0, |mask, tier| mask | tier.bit()));
                }
                for ((id, engine, naive), life) in self.engines.iter().zip(&names) {
                    let name = |prompt: u64, end: usize| hash(*life, &family[&prompt], end);
                    let groups = engine.truth.len();
                    let wanted: Vec<u8> = (0..groups).map(|group| naive.holds(group, prompt, end, &name)).collect();
                    let mut found = held.remove(id).unwrap_or_default();
                    let mut shown: Vec<u8> = wanted.iter().copied().filter(|mask| *mask != 0).collect();
                    found.sort_unstable();
                    shown.sort_unstable();
                    assert_eq!(found, shown, "{id:?} {:?}: prompt {prompt}, block {number}", engine.shape);
                    for (group, mask) in wanted.iter().enumerate() {
                        let truth = |prompt: u64, end: usize| masked(engine.truth[group].get(&name(prompt, end)));
                        let true_mask = holds(engine.shape.block, prompt, end, &truth);
                        let joined = engine.shape.block < BLOCK;
                        assert!(joined && true_mask != 0 || mask & !true_mask == 0, "{id:?} holds less than is said");
                    }
                    expected.entry(*id).or_default().push(wanted);
                }
                assert!(held.is_empty(), "holders that are no engines: {held:?}");
            }
            let scores = self.index.score(&mut scorer, &keys, None, &Weights::default());
            for (id, engine, _) in &self.engines {
                let usable = usable(&expected[id], engine.shape);
                let found = scores.iter().find(|score| score.engine == *id).map_or(0, |score| score.blocks as usize);
                assert_eq!(found, usable, "{id:?} {:?}: prompt {prompt}", engine.shape);
            }
        }
        let writer = self.index.write();
        assert!(writer.bytes() <= writer.bytes_max());
        assert_eq!(writer.counts().refused, 0);
    }
}

/// The longest usable prefix, tried from the longest down.
fn usable(masks: &[Vec<u8>], shape: Shape) -> usize {
    let whole = |end: usize| masks[..end].iter().all(|groups| groups[0] != 0);
    let windowed = |end: usize| {
        let first = match shape.second {
            None => end,
            Some(Second::Window(tokens)) => end.saturating_sub((tokens as usize - 1).div_ceil(BLOCK)),
            Some(Second::Chunk(tokens)) => end * BLOCK / tokens as usize * tokens as usize / BLOCK,
            Some(Second::State) => end - 1,
        };
        masks[first..end].iter().all(|groups| groups.get(1).is_none_or(|mask| *mask != 0))
    };
    // A group of which nothing was ever told does not exist for the index.
    let second = masks.iter().any(|groups| groups.len() > 1);
    let step = shape.block.div_ceil(BLOCK);
    let mut points = (1..=masks.len()).rev().filter(|end| end.is_multiple_of(step));
    points.find(|end| whole(*end) && (!second || windowed(*end))).unwrap_or(0)
}

fn run(seed: u64, engines: u64, steps: u64, prompts: u64) -> u64 {
    let _printed = Seed(seed);
    let mut choices = Random::new(seed);
    let mut fleet = Fleet::new(engines, &mut choices);
    for _ in 0..steps * engines {
        let at = choices.of(0..engines) as usize;
        fleet.step(at, &mut choices, prompts, true);
    }
    // Quiet: every engine publishes twice more, and both arrive.
    for at in 0..fleet.engines.len() {
        (0..3).for_each(|_| fleet.step(at, &mut choices, prompts, false));
    }
    fleet.compare(prompts);
    fleet.applied
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

#[test]
fn small_fleets_equal_a_naive_index() {
    let seeds = match number("KVCELLAR_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("KVCELLAR_SEEDS").unwrap_or(40),
    };
    for seed in seeds {
        run(seed, 1 + seed % 6, number("KVCELLAR_FLEET_STEPS").unwrap_or(120), 12);
    }
}

#[test]
fn a_fleet_of_256_engines_equals_a_naive_index() {
    let seed = number("KVCELLAR_SEED").unwrap_or(7);
    let applied = run(seed, 256, number("KVCELLAR_FLEET_STEPS").unwrap_or(60), 20);
    eprintln!("{applied} block events applied, seed {seed}");
    assert!(applied > 100_000);
    assert_eq!(TOKENS % BLOCK, 0);
}
