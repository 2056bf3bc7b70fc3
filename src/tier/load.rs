//! The way of a block from a slot back into vLLM's KV cache.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::engine::TierEngine;
use super::hit;
use super::requests::Lease;
use super::trace::{self, names};
use crate::block::plan::{BlockCopy, Load, VERIFY};
use crate::block::{BlockKey, GroupIndex};
use crate::limits;
use crate::metrics::DropReason;

/// The answer to a lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hit {
    /// This many tokens beyond vLLM's own can be loaded.
    Tokens(u32),
    /// Another request is loading the same blocks right now: ask again, and vLLM's own cache will have them.
    AskAgain,
}

impl TierEngine {
    /// How many tokens beyond `local` the tier can load for a request of `tokens` tokens. Changes nothing that another lookup can see.
    pub fn lookup(&mut self, id: &str, tokens: u32, local: u32) -> Hit {
        self.poll();
        let Some(request) = self.requests.get_mut(id) else { return Hit::Tokens(0) };
        request.local = local;
        request.counted = false;
        // vLLM looks up only what it has not computed: whatever a reset tainted is computed anew.
        request.tainted = false;
        let Some(residency) = &self.residency else { return Hit::Tokens(0) };
        let mut limit = self.grouping.hit_limit(tokens).min(request.barrier.unwrap_or(u32::MAX));
        if let Some(most) = request.controls.max_load_tokens {
            limit = limit.min(local.saturating_add(most));
        }
        if !request.controls.load {
            return Hit::Tokens(0);
        }
        let end = hit::resume_at(residency, &self.grouping, &request.hashes, local, limit);
        let shared = end > local && self.is_being_loaded(id, end);
        let answer = self.answer(id, end - local.min(end), shared);
        self.record(|engine| {
            let groups = 0..engine.grouping.groups.len();
            let keys = |group: usize| {
                let blocks = tokens / engine.grouping.groups[group].block_tokens;
                names(
                    engine
                        .requests
                        .get(id)
                        .into_iter()
                        .flat_map(|request| request.keys(&engine.grouping, group, 0, blocks)),
                )
            };
            trace::line(
                "lookup",
                &[
                    ("req", id.into()),
                    ("local", local.into()),
                    ("num_tokens", tokens.into()),
                    ("max_hit", limit.into()),
                    ("keys", groups.map(keys).collect()),
                    (
                        "hit",
                        match answer {
                            Hit::Tokens(tokens) => tokens.into(),
                            Hit::AskAgain => Value::Null,
                        },
                    ),
                ],
            )
        });
        answer
    }

    /// Is the hit's last block held by another request's running load?
    fn is_being_loaded(&self, id: &str, end: u32) -> bool {
        if self.leases.is_empty() || self.leases.contains_key(id) {
            return false;
        }
        let (Some(residency), Some(request)) = (&self.residency, self.requests.get(id)) else { return false };
        let last_block = end / self.grouping.groups[0].block_tokens - 1;
        request
            .keys(&self.grouping, 0, last_block, last_block + 1)
            .any(|key| residency.find(&key).is_some_and(|slot| residency.pins(slot) > 0))
    }

    fn answer(&mut self, id: &str, tokens: u32, shared: bool) -> Hit {
        let Some(request) = self.requests.get_mut(id) else { return Hit::Tokens(0) };
        if !shared {
            request.waiting_since = None;
            return Hit::Tokens(tokens);
        }
        let since = *request.waiting_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= Duration::from_millis(limits::SHARED_LOAD_WAIT_MS) {
            return Hit::Tokens(tokens);
        }
        if let Some(residency) = &mut self.residency {
            residency.counters.shared_load_waits += 1;
        }
        Hit::AskAgain
    }

    /// vLLM admitted the request, with `external` tokens to come from us after `local` own ones. `blocks`: per group, vLLM's block ids from the block of
    /// token `local` on. Holds the blocks and orders the copies; what cannot be found any more makes the load fail, never a wrong byte.
    pub fn admit(&mut self, id: &str, external: u32, blocks: &[Vec<u32>]) {
        self.poll();
        self.count_admission(id, external);
        if external == 0 {
            return;
        }
        let Some(request) = self.requests.get(id) else {
            self.plan.loads.push(Load { request: id.to_owned(), doomed: true, copies: Vec::new() });
            return;
        };
        let (local, serial) = (request.local, request.serial);
        let mut load = Load { request: id.to_owned(), doomed: self.residency.is_none(), copies: Vec::new() };
        let mut held = Vec::new();
        for (group, spec) in self.grouping.groups.iter().enumerate() {
            let first = local / spec.block_tokens;
            let last = (local + external) / spec.block_tokens;
            let ids = blocks.get(group).map_or(&[][..], Vec::as_slice);
            let keys: Vec<BlockKey> = request.keys(&self.grouping, group, first, last).collect();
            load.doomed |= keys.len() != (last - first) as usize || ids.len() < keys.len();
            for ((key, block), number) in keys.iter().zip(ids).zip(first..) {
                // vLLM gives no block to what lies before a window.
                if *block == 0 {
                    continue;
                }
                let Some(residency) = &mut self.residency else { break };
                let Some(slot) = residency.find(key) else {
                    load.doomed = true;
                    continue;
                };
                residency.pin(slot, serial);
                held.push((slot, number * spec.block_tokens));
                load.copies.push(BlockCopy {
                    slot: slot.0,
                    generation: residency.generation(slot).0,
                    block: *block,
                    group: GroupIndex(group as u16).0,
                    flags: if residency.unverified(slot) { VERIFY } else { 0 },
                });
                if let Some(fence) = self.fences.get(block) {
                    self.plan.waits.push(*fence);
                }
            }
        }
        self.record(|engine| {
            let fields = [
                ("req", Value::from(id)),
                ("local", local.into()),
                ("external", external.into()),
                ("keys", names(held.iter().filter_map(|(slot, _)| engine.key_of(*slot)))),
            ];
            trace::line("load", &fields)
        });
        let doomed = load.doomed;
        self.plan.loads.push(load);
        self.leases.insert(id.to_owned(), Lease { local, held, doomed });
    }

    /// Hits and misses are counted once for each admission, when it is known what vLLM took.
    fn count_admission(&mut self, id: &str, external: u32) {
        let (Some(request), Some(residency)) = (self.requests.get_mut(id), &mut self.residency) else { return };
        if std::mem::replace(&mut request.counted, true) {
            return;
        }
        let known = (request.hashes.len() as u64 * u64::from(self.grouping.hash_tokens)) as u32;
        let reached = request.local + external;
        let missed = (known - known % self.grouping.hit_tokens).saturating_sub(reached);
        let blocks =
            |tokens: u32| self.grouping.groups.iter().map(|group| u64::from(tokens / group.block_tokens)).sum::<u64>();
        residency.counters.hit_tokens += u64::from(external);
        residency.counters.hit_blocks += blocks(external);
        residency.counters.miss_tokens += u64::from(missed);
        residency.counters.miss_blocks += blocks(missed);
    }

    /// Every rank reported the end of a load. Ids of loads that are not ours are ignored.
    pub fn load_ended(&mut self, id: &str, failed: bool) {
        let Some(lease) = self.leases.remove(id) else { return };
        let Some(residency) = &mut self.residency else { return };
        let keys: Vec<BlockKey> = lease.held.iter().filter_map(|(slot, _)| residency.key(*slot)).collect();
        let mut barrier = None;
        let mut dropped = Vec::new();
        for (slot, token) in &lease.held {
            if residency.memory().line(*slot).load_refused() {
                barrier = Some(barrier.map_or(*token, |first: u32| first.min(*token)));
                if let Some(key) = residency.key(*slot) {
                    residency.drop_block(*slot, DropReason::Corrupt);
                    dropped.push(key);
                }
            } else if !failed {
                residency.verified(*slot);
            }
        }
        for (slot, _) in lease.held.iter().rev() {
            residency.unpin(*slot);
        }
        if failed {
            residency.counters.load_failures += 1;
            if let Some(request) = self.requests.get_mut(id) {
                // Nobody said which block is bad: this request loads nothing beyond what vLLM had.
                let end = barrier.unwrap_or(lease.local);
                request.barrier = Some(end - end % self.grouping.hit_tokens);
            }
        }
        if !dropped.is_empty() {
            self.record(|_| trace::line("drop", &[("keys", names(dropped)), ("reason", "corrupt".into())]));
        }
        let fields = [("req", Value::from(id)), ("ok", (!failed && !lease.doomed).into()), ("keys", names(keys))];
        self.record(|_| trace::line("load_done", &fields));
        if self.leases.is_empty() && self.batches.is_empty() {
            self.record_state();
        }
    }
}
