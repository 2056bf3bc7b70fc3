//! `kvcellar bench policy`: nanoseconds that a policy takes for a decision, and its memory for each
//! block.
//!
//! Measured: the policies alone, at their full size. A *decision* is what a tier asks of a policy
//! for one block that a request brings or finds: a block that is found is touched twice, as when
//! its load is admitted and when the request ends; for one that is not a victim is chosen, released
//! and assigned anew. Requests of 64 blocks continue conversations chosen at random, of which about
//! half are still there; places are scattered, so that the processor's caches help as little as
//! they do in a tier. Not measured: the tier's own table.

use std::hint::black_box;
use std::time::Instant;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::report::{Goal, GoalBound, Measured, measured, report};
use kvcellar_block::SlotIndex;
use kvcellar_block::error::{Error, Result};
use kvcellar_engine::policy::{self, Block, Departure, Eviction, Heat, PolicyName, Touch};

/// Sizes of the benchmark.
#[derive(Debug, Clone, Args)]
pub struct PolicyBench {
    /// Blocks that are kept; several numbers with commas between.
    #[arg(long, value_delimiter = ',', default_values_t = [1_000_000, 10_000_000])]
    pub blocks: Vec<u32>,
    /// Decisions of each measurement.
    #[arg(long, default_value_t = 2_000_000)]
    pub decisions: u32,
    /// Repetitions of each measurement.
    #[arg(long, default_value_t = 5)]
    pub repetitions: usize,
    /// JSON on standard output.
    #[arg(long)]
    pub json: bool,
}

/// Blocks of a request.
const REQUEST: u32 = 64;

/// A decision may take so long with a million blocks, in ns.
const DECISION_NS: f64 = 200.0;

/// A tier with nothing but its policy.
struct BareTier {
    policy: Box<dyn Eviction<SlotIndex>>,
    /// Where each conversation's blocks are, if they are.
    places: Vec<Option<SlotIndex>>,
    /// The block of each place.
    blocks: Vec<u32>,
    free: Vec<SlotIndex>,
    random: fastrand::Rng,
}

impl BareTier {
    fn new(name: PolicyName, blocks: u32) -> Self {
        let mut random = fastrand::Rng::with_seed(1);
        let mut free: Vec<SlotIndex> = (0..blocks).map(SlotIndex).collect();
        random.shuffle(&mut free);
        Self {
            policy: policy::build(name, blocks),
            places: vec![None; 2 * blocks as usize],
            blocks: vec![0; blocks as usize],
            free,
            random,
        }
    }

    /// A request for one conversation's blocks. Returns how many were found.
    fn request(&mut self) -> u32 {
        let conversations = self.places.len() as u32 / REQUEST;
        let first = self.random.u32(..conversations) * REQUEST;
        let (mut found, mut parent) = (0, None);
        let mut fresh = [false; REQUEST as usize];
        for (block, fresh) in (first..first + REQUEST).zip(&mut fresh) {
            let place = if let Some(place) = self.places[block as usize] {
                self.policy.touch(place, Touch::Fresh);
                found += 1;
                Some(place)
            } else {
                *fresh = true;
                self.keep(block, parent)
            };
            parent = place;
        }
        for (block, fresh) in (first..first + REQUEST).zip(fresh).rev() {
            let Some(place) = self.places[block as usize] else { continue };
            if fresh {
                self.policy.insert(place, Heat::Hot);
            } else {
                self.policy.touch(place, Touch::Again);
            }
        }
        found
    }

    fn keep(&mut self, block: u32, parent: Option<SlotIndex>) -> Option<SlotIndex> {
        let place = if let Some(place) = self.free.pop() {
            place
        } else {
            let victim = self.policy.victim(&|_| true)?;
            self.policy.release(victim, Departure::Evicted);
            self.places[self.blocks[victim.0 as usize] as usize] = None;
            victim
        };
        let fingerprint = u64::from(block).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        // The parent may just have made room.
        let parent = parent.filter(|parent| self.places[self.blocks[parent.0 as usize] as usize] == Some(*parent));
        let facts = Block { parent, prompt_tokens: REQUEST * 16, ..Block::unknown(fingerprint) };
        self.policy.assign(place, &facts);
        self.places[block as usize] = Some(place);
        self.blocks[place.0 as usize] = block;
        Some(place)
    }
}

/// Runs the measurements.
///
/// # Errors
/// [`Error::Config`] for fewer blocks than a request has.
pub fn measure(options: &PolicyBench) -> Result<(Vec<Measured>, Vec<Goal>)> {
    let bar = ProgressBar::new((options.blocks.len() * PolicyName::ALL.len()) as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg:24} {bar:30} {pos}/{len} {elapsed}") {
        bar.set_style(style);
    }
    let (mut results, mut goals) = (Vec::new(), Vec::new());
    for blocks in &options.blocks {
        if *blocks < REQUEST {
            return Err(Error::config("--blocks", format!("{blocks} are too few"), format!("Write {REQUEST} or more")));
        }
        for name in PolicyName::ALL {
            bar.set_message(format!("{} {blocks}", name.name()));
            let mut tier = BareTier::new(name, *blocks);
            // Until every place was taken twice.
            for _ in 0..4 * blocks / REQUEST {
                black_box(tier.request());
            }
            let requests = (options.decisions / REQUEST).max(1);
            let times = (0..options.repetitions).map(|_| {
                let started = Instant::now();
                for _ in 0..requests {
                    black_box(tier.request());
                }
                started.elapsed().as_secs_f64() * 1e9 / f64::from(requests * REQUEST)
            });
            let decision = measured(&format!("{} decision, {blocks} blocks", name.name()), "ns", times.collect());
            if *blocks <= 1_000_000 {
                goals.push(Goal::of(decision.name.clone(), GoalBound::AtMost(DECISION_NS), decision.value));
            }
            results.push(decision);
            let bytes = tier.policy.bytes() as f64 / f64::from(*blocks);
            results.push(measured(&format!("{} memory, {blocks} blocks", name.name()), "bytes/block", vec![bytes]));
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok((results, goals))
}

/// Runs it and prints what it found.
///
/// # Errors
/// Those of [`measure`].
pub fn run(options: &PolicyBench) -> Result<()> {
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
    fn every_policy_is_measured() {
        let options = PolicyBench { blocks: vec![256], decisions: 1024, repetitions: 2, json: true };
        let (results, goals) = measure(&options).expect("enough blocks");
        assert_eq!((results.len(), goals.len()), (2 * PolicyName::ALL.len(), PolicyName::ALL.len()));
        assert!(results.iter().all(|result| result.value > 0.0));
        assert!(measure(&PolicyBench { blocks: vec![10], ..options }).is_err());
    }

    #[test]
    fn a_bare_tier_finds_what_it_keeps() {
        for name in PolicyName::ALL {
            let mut tier = BareTier::new(name, 1024);
            let found: u32 = (0..2000).map(|_| tier.request()).sum();
            let kept = tier.places.iter().flatten().count();
            assert_eq!(kept, 1024, "{name:?}");
            assert!(found > 2000 * REQUEST / 10, "{name:?}: {found}");
        }
    }
}
