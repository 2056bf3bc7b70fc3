//! A tier engine with this test in the place of its ranks' copy workers.

use std::sync::Arc;

use kvcellar_block::plan::{BlockCopy, StepPlan, VERIFY};
use kvcellar_block::{AdapterId, GroupIndex, SlotIndex};
use kvcellar_engine::config::Config;
use kvcellar_engine::pool::Pool;
use kvcellar_engine::pool::memory::SlotMemory;
use kvcellar_engine::pool::open::Opened;
use kvcellar_engine::pool::slot_table::SlotState;
use kvcellar_engine::tier::Arrival;
use kvcellar_engine::tier::engine::TierEngine;
use kvcellar_engine::tier::load::Hit;
use kvcellar_engine::tier::offload::{GroupOffer, Offer, Start};
use xxhash_rust::xxh3::xxh3_64;

use crate::blocks::{TOKENS, hash, number, part, tokens};
use crate::place::grouping;

/// One engine's life with a pool.
pub(crate) struct Stock {
    pub(crate) engine: TierEngine,
    /// Blocks that were adopted.
    pub(crate) adopted: u64,
    requests: u64,
    /// What the adapter of the next requests consists of; all have one name.
    pub(crate) adapter: Option<AdapterId>,
}

/// What a slot would be adopted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) slot: u32,
    pub(crate) generation: u32,
    pub(crate) number: u64,
}

impl Stock {
    /// Gives an engine the pool, as a start does.
    pub(crate) fn of(opened: Opened) -> Self {
        Self::with(&Config::default(), opened)
    }

    /// The same for an engine that is configured.
    pub(crate) fn with(config: &Config, opened: Opened) -> Self {
        let mut engine = TierEngine::new(config, grouping()).expect("an engine");
        let adopted = engine.open_pool(opened.pool, opened.adopted);
        Self { engine, adopted, requests: 0, adapter: None }
    }

    pub(crate) fn pool(&self) -> Arc<Pool> {
        Arc::clone(self.engine.pool().expect("an open pool"))
    }

    fn request(&mut self, hashes: &[u64]) -> String {
        self.requests += 1;
        let id = format!("request-{}", self.requests);
        let name = self.adapter.map_or("", |_| "sql");
        self.engine.add_request(&id, Arrival { lora: name, adapter: self.adapter, ..Arrival::default() });
        self.engine.add_hashes(&id, &hashes.iter().map(|number| hash(*number)).collect::<Vec<_>>());
        id
    }

    /// Offers consecutive blocks of one request, which then ends. Returns the copy orders, with the
    /// number of the block of each.
    pub(crate) fn offer(&mut self, numbers: &[u64]) -> Vec<(BlockCopy, u64)> {
        let id = self.request(numbers);
        let group = GroupOffer { first: 0, blocks: (1..=numbers.len() as u32).collect(), extra: Vec::new() };
        let offer = Offer {
            request: &id,
            tokens_from: 0,
            tokens: numbers.iter().flat_map(|number| tokens(*number)).collect(),
            groups: vec![group],
        };
        self.engine.offer(&offer, Start::BeforeStep);
        let plan = StepPlan::decode(&self.engine.take_plan()).expect("an engine's plan");
        let all = numbers.len() as u32 * TOKENS;
        self.engine.finish(&id, all, all);
        plan.stores_before.iter().map(|copy| (*copy, numbers[copy.block as usize - 1])).collect()
    }

    /// Stores consecutive blocks and hashes those that `hashed` chooses, on all ranks.
    pub(crate) fn store(&mut self, numbers: &[u64], hashed: impl Fn(u64) -> bool) {
        let pool = self.pool();
        let orders = self.offer(numbers);
        for (copy, number) in &orders {
            for rank in 0..pool.geometry().parts.len() {
                write(&pool, copy, *number, rank);
                pool.line(SlotIndex(copy.slot)).answer(rank, true);
                if hashed(*number) {
                    put_checksum(&pool, copy, rank);
                }
            }
        }
        self.engine.poll();
    }

    /// Tokens that a new request of these blocks (and one token more) would find.
    pub(crate) fn hit(&mut self, numbers: &[u64]) -> u32 {
        let id = self.request(numbers);
        let answer = self.engine.lookup(&id, numbers.len() as u32 * TOKENS + 1, 0);
        self.engine.finish(&id, 0, 0);
        match answer {
            Hit::Tokens(tokens) => tokens,
            Hit::AskAgain => panic!("nobody else is loading"),
        }
    }

    /// The orders with which a request would load these blocks; the load then ends well.
    pub(crate) fn load(&mut self, numbers: &[u64]) -> Vec<BlockCopy> {
        let id = self.request(numbers);
        let Hit::Tokens(tokens) = self.engine.lookup(&id, numbers.len() as u32 * TOKENS + 1, 0) else {
            panic!("nobody else is loading")
        };
        self.engine.admit(&id, tokens, &[(1..=tokens / TOKENS).collect()]);
        let plan = StepPlan::decode(&self.engine.take_plan()).expect("an engine's plan");
        self.engine.load_ended(&id, false);
        self.engine.finish(&id, 0, 0);
        plan.loads.into_iter().flat_map(|load| load.copies).collect()
    }
}

/// Writes a rank's part, in pieces: sudden death may come in between.
pub(crate) fn write(pool: &Pool, copy: &BlockCopy, number: u64, rank: usize) {
    let (offset, len) = pool.geometry().parts[rank].spans[copy.group as usize];
    let bytes = part(number, rank, len as usize);
    let start = pool.payload(SlotIndex(copy.slot)).as_ptr().wrapping_add(offset as usize);
    for (piece, bytes) in bytes.chunks(997).enumerate() {
        // SAFETY: the span lies inside the slot's payload; the slot is being filled and this test
        // is its only writer.
        unsafe { start.add(piece * 997).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }
}

/// A rank's bytes in a slot.
pub(crate) fn read(pool: &Pool, slot: u32, rank: usize) -> Vec<u8> {
    let (offset, len) = pool.geometry().parts[rank].spans[0];
    // SAFETY: the span lies inside the slot's payload, the pool is mapped, and no process writes
    // the slot now.
    unsafe { std::slice::from_raw_parts(pool.payload(SlotIndex(slot)).as_ptr().add(offset as usize), len as usize) }
        .to_vec()
}

/// Does what a rank's idle hasher does.
pub(crate) fn put_checksum(pool: &Pool, copy: &BlockCopy, rank: usize) {
    if pool.line(SlotIndex(copy.slot)).may_hash(copy.generation) {
        pool.set_checksum(SlotIndex(copy.slot), rank, copy.generation, xxh3_64(&read(pool, copy.slot, rank)));
    }
}

/// Everything the next engine would take over. Whatever it is, it must be a block that a test
/// stored, with that block's tokens.
pub(crate) fn left_behind(pool: &Arc<Pool>) -> Vec<Found> {
    let find = |slot| {
        let (key, generation, lineage) = pool.left_behind(SlotIndex(slot))?;
        let number = number(&key.hash)
            .unwrap_or_else(|| panic!("slot {slot} would be adopted as {key}, which was never stored"));
        assert_eq!(
            (key.group, lineage.tokens.to_vec()),
            (GroupIndex(0), tokens(number)),
            "slot {slot} number {number}"
        );
        assert!(lineage.lora.is_empty() && lineage.extra.is_empty());
        Some(Found { slot, generation: generation.0, number })
    };
    (0..pool.slot_count()).filter_map(find).collect()
}

/// Would all ranks' workers use this slot's bytes? They compare checksums before the first load.
pub(crate) fn verifies(pool: &Pool, found: Found) -> bool {
    (0..pool.geometry().parts.len()).all(|rank| {
        pool.checksum(SlotIndex(found.slot), rank, found.generation) == Some(xxh3_64(&read(pool, found.slot, rank)))
    })
}

/// Are all ranks' bytes those of the block?
pub(crate) fn is_whole(pool: &Pool, found: Found) -> bool {
    (0..pool.geometry().parts.len()).all(|rank| {
        let bytes = read(pool, found.slot, rank);
        bytes == part(found.number, rank, bytes.len())
    })
}

pub(crate) fn state(pool: &Pool, slot: u32) -> Option<SlotState> {
    pool.line(SlotIndex(slot)).remains().0
}

/// Whether orders carry the mark that their bytes must be compared.
pub(crate) fn all_verified(copies: &[BlockCopy]) -> bool {
    copies.iter().all(|copy| copy.flags & VERIFY != 0)
}
