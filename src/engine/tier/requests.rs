//! What the engine knows of vLLM's requests.

use std::time::Instant;

use crate::config::Controls;
use kvcellar_block::{AdapterId, BlockHash, BlockKey, GroupIndex, Grouping, SlotIndex};

/// One request, from its arrival until its last offload is done.
#[derive(Debug)]
pub struct Request {
    /// Tells this request's touches from others'.
    pub serial: u32,
    /// What the user asked of the cache.
    pub controls: Controls,
    /// Block hashes so far, at the granularity of `request.block_hashes`, with the adapter mixed
    /// in.
    pub hashes: Vec<BlockHash>,
    /// Name of the LoRA adapter, empty for none.
    pub lora: Box<str>,
    /// What its LoRA adapter consists of; `None` without one.
    adapter: Option<AdapterId>,
    /// Tokens vLLM held at the last lookup.
    pub local: u32,
    /// Tokens no hit may pass any more, because a load up to there failed.
    pub barrier: Option<u32>,
    /// Its blocks may stem from before a `reset_cache`: none is kept.
    pub tainted: bool,
    /// Tokens of the last admission that come from disk.
    pub disk_tokens: u32,
    /// What was decided about the part of the hit that lies on disk: load it, or compute it.
    pub decision: Option<bool>,
    /// Hits and misses were counted since the last lookup.
    pub counted: bool,
    /// When it was first asked to wait for another request's load.
    pub waiting_since: Option<Instant>,
    /// Offload batches under way.
    pub batches: u32,
    /// vLLM finished it, at this number of prompt and of all tokens.
    pub finished: Option<(u32, u32)>,
}

impl Request {
    /// A request that just arrived.
    pub fn new(serial: u32, controls: Controls, lora: Box<str>, adapter: Option<AdapterId>) -> Self {
        Self {
            serial,
            controls,
            hashes: Vec::new(),
            lora,
            adapter,
            local: 0,
            barrier: None,
            tainted: false,
            disk_tokens: 0,
            decision: None,
            counted: false,
            waiting_since: None,
            batches: 0,
            finished: None,
        }
    }

    /// Appends hashes as vLLM made them. The only place where they enter: keys, parents, both tiers
    /// and events carry the adapter from here.
    pub fn add_hashes(&mut self, hashes: &[BlockHash]) {
        match self.adapter {
            None => self.hashes.extend_from_slice(hashes),
            Some(adapter) => self.hashes.extend(hashes.iter().map(|hash| hash.for_adapter(&adapter))),
        }
    }

    /// Keys of this group's blocks `first..last`, as far as hashes are known.
    pub fn keys<'a>(
        &'a self,
        grouping: &'a Grouping,
        group: usize,
        first: u32,
        last: u32,
    ) -> impl Iterator<Item = BlockKey> + 'a {
        (first..last).map_while(move |block| {
            let hash = *self.hashes.get(grouping.hash_index(group, block))?;
            Some(BlockKey { hash, group: GroupIndex(group as u16) })
        })
    }
}

/// A running load and the blocks it holds.
#[derive(Debug)]
pub struct Lease {
    /// Tokens vLLM held when it began.
    pub local: u32,
    /// Every held slot, with the first token of its block.
    pub held: Vec<(SlotIndex, u32)>,
    /// A block was gone when it was planned.
    pub doomed: bool,
    /// The first token of the first block that could not be restored.
    pub lost_at: Option<u32>,
    /// Loads blocks from disk.
    pub restores: bool,
}
