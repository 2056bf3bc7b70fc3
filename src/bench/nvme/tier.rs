//! The whole tier, driven as vLLM drives it, without a KV cache: slots are answered by hand, so
//! that no copy is timed.
//!
//! A *chain* is one request's blocks. Writing chain `n` evicts chain `n - 1` from the slots, so
//! that reading it comes from disk.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::bare;
use kvcellar_block::error::{Error, Result};
use kvcellar_block::plan::{BlockCopy, StepPlan};
use kvcellar_block::{BlockHash, Grouping, SlotIndex};
use kvcellar_engine::config::Config;
use kvcellar_engine::nvme::disk::Description;
use kvcellar_engine::pool::{Pool, futex};
use kvcellar_engine::tier::load::Hit;
use kvcellar_engine::tier::mover::Mover;
use kvcellar_engine::tier::offload::{GroupOffer, Offer, Start};
use kvcellar_engine::tier::opening::{self, Identity};
use kvcellar_engine::tier::{Arrival, TierEngine};

/// How long one chain may take before the benchmark gives up.
const PATIENCE: Duration = Duration::from_mins(2);
/// How often writes are looked after: rarely enough to cost nothing.
const LOOK: Duration = Duration::from_millis(1);

/// Stores that are open below one directory at a time: three tiers, and one that is driven barely.
pub const TOGETHER: u32 = 4;

/// An engine with a pool and an nvme tier.
pub struct WholeTier {
    engine: Arc<Mutex<TierEngine>>,
    pool: Arc<Pool>,
    device: Description,
    block_tokens: u32,
    chain_blocks: u32,
    // Dropped with the rest; the mover needs the engine no longer then.
    _mover: Mover,
}

fn wrong(problem: impl Into<String>) -> Error {
    Error::lost("benchmark", problem)
}

/// Block `index` of chain `chain`.
fn hash(chain: u32, index: u32) -> BlockHash {
    let mixed = u64::from(chain) << 32 | u64::from(index);
    let mut bytes = [0; 32];
    for (part, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&xxhash_rust::xxh3::xxh3_64_with_seed(&mixed.to_le_bytes(), part as u64).to_le_bytes());
    }
    // 32 bytes are a length every hash may have.
    BlockHash::new(&bytes).unwrap_or_else(|| unreachable!("32 bytes"))
}

impl WholeTier {
    /// A tier over an empty pool, whose chains have `chain_blocks` blocks.
    ///
    /// # Errors
    /// Those of the store and of the disk.
    pub fn open(config: &Config, pool: Pool, grouping: Grouping, chain_blocks: u32, namespace: u8) -> Result<Self> {
        let block_tokens = grouping.groups[0].block_tokens;
        let engine = Arc::new(Mutex::new(TierEngine::new(config, grouping)?));
        lock(&engine).open_pool(pool, false);
        let identity = Identity { namespace: [namespace; 16], facts: "{}", stable: false };
        let pool = lock(&engine).pool().cloned().ok_or_else(|| wrong("the engine has no pool"))?;
        bare::fill(&pool);
        let (mover, report) = opening::open_disk(&engine, config, identity, TOGETHER, &mut |_, _| ())?
            .ok_or_else(|| wrong("the engine has no nvme tier"))?;
        let mover = mover.ok_or_else(|| wrong("the disk has no room for its nvme tier"))?;
        Ok(Self { engine, pool, device: report.disk, block_tokens, chain_blocks, _mover: mover })
    }

    /// What the disk is.
    pub fn describe(&self) -> &Description {
        &self.device
    }

    /// Extents that exist on disk by now.
    pub fn extents(&self) -> u64 {
        lock(&self.engine).gauges().nvme_extents
    }

    fn tokens(&self) -> u32 {
        self.chain_blocks * self.block_tokens
    }

    fn start(&self, chain: u32, what: &str) -> String {
        let id = format!("{what}-{chain}");
        let hashes: Vec<BlockHash> = (0..self.chain_blocks).map(|index| hash(chain, index)).collect();
        let mut engine = lock(&self.engine);
        engine.add_request(&id, Arrival::default());
        engine.add_hashes(&id, &hashes);
        id
    }

    /// The orders of a step. Events are thrown away, as vLLM does without subscribers.
    fn step(engine: &mut TierEngine) -> Result<StepPlan> {
        engine.poll();
        drop(engine.take_events());
        StepPlan::decode(&engine.take_plan())
    }

    /// Offers a new chain and waits until all of it is on disk.
    ///
    /// # Errors
    /// [`Error::DataLost`] when that does not come true.
    pub fn write(&self, chain: u32) -> Result<()> {
        let id = self.start(chain, "write");
        let tokens = (0..self.tokens()).collect();
        let group = GroupOffer { first: 0, blocks: (1..=self.chain_blocks).collect(), extra: Vec::new() };
        let offer = Offer { request: &id, tokens_from: 0, tokens, groups: vec![group] };
        let mut engine = lock(&self.engine);
        let wanted = engine.counters().spilled_blocks + u64::from(self.chain_blocks);
        engine.admit(&id, 0, &[]);
        engine.offer(&offer, Start::AfterStep);
        engine.finish(&id, self.tokens(), self.tokens());
        let plan = Self::step(&mut engine)?;
        if plan.stores_after.len() != self.chain_blocks as usize {
            return Err(wrong(format!("{} of {} blocks got a slot", plan.stores_after.len(), self.chain_blocks)));
        }
        for copy in &plan.stores_after {
            self.pool.line(SlotIndex(copy.slot)).answer(0, true);
        }
        // Sees the answers, and begins to write.
        engine.poll();
        drop(engine);
        let end = Instant::now() + PATIENCE;
        loop {
            sleep(LOOK);
            let engine = lock(&self.engine);
            let (counters, gauges) = (engine.counters(), engine.gauges());
            if counters.spilled_blocks >= wanted && engine.disk_is_idle() {
                return Ok(());
            }
            if Instant::now() > end || gauges.nvme_in_service == 0 {
                return Err(wrong(format!("blocks were not written: {gauges:?}, {counters:?}")));
            }
        }
    }

    /// Loads a chain that only the disk has, up to the moment when its last block lies in its slot.
    ///
    /// # Errors
    /// [`Error::DataLost`] when a block is not there, or does not come from disk.
    pub fn read(&self, chain: u32) -> Result<()> {
        let id = self.start(chain, "read");
        let mut engine = lock(&self.engine);
        let before = engine.counters().nvme_hit_blocks;
        // One token more than the blocks hold, so that all of them may be hit.
        let hit = engine.lookup(&id, self.tokens() + 1, 0);
        if hit != Hit::Tokens(self.tokens()) {
            return Err(wrong(format!("a lookup of {} tokens said {hit:?}", self.tokens())));
        }
        engine.admit(&id, self.tokens(), &[(1..=self.chain_blocks).collect()]);
        let plan = Self::step(&mut engine)?;
        let from_disk = engine.counters().nvme_hit_blocks - before;
        drop(engine);
        if from_disk != u64::from(self.chain_blocks) || plan.loads.len() != 1 || plan.loads[0].doomed {
            return Err(wrong(format!("{from_disk} of {} blocks come from disk", self.chain_blocks)));
        }
        for copy in &plan.loads[0].copies {
            self.follow(*copy)?;
        }
        let mut engine = lock(&self.engine);
        engine.load_ended(&id, false);
        engine.finish(&id, self.tokens(), self.tokens());
        Ok(())
    }

    /// Waits for one restore, as a copy worker's follower does.
    fn follow(&self, copy: BlockCopy) -> Result<()> {
        let line = self.pool.line(SlotIndex(copy.slot));
        let end = Instant::now() + PATIENCE;
        loop {
            match line.restore_ended(copy.generation) {
                (Some(true), _) => {
                    line.release_restored(0);
                    return Ok(());
                }
                (Some(false), _) => return Err(wrong("a block could not be read back")),
                (None, _) if Instant::now() > end => return Err(wrong("a block was never read back")),
                (None, seen) => futex::wait(line.restored_word(), seen, Duration::from_millis(100)),
            }
        }
    }
}

fn lock(engine: &Mutex<TierEngine>) -> MutexGuard<'_, TierEngine> {
    // Whoever panicked with it reported that; the benchmark then finds wrong numbers of blocks.
    engine.lock().unwrap_or_else(PoisonError::into_inner)
}
