//! The way of a block from a slot back into vLLM's KV cache.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::disk_tier::ReadPart;
use super::engine::TierEngine;
use super::hit::{self, Sources};
use super::requests::Lease;
use super::restore::Source;
use super::trace::{self, names};
use crate::limits;
use crate::metrics::DropReason;
use crate::policy::LoadPolicy;
use kvcellar_block::plan::{BlockCopy, FOLLOW, Load, VERIFY};
use kvcellar_block::{BlockKey, SlotIndex};

/// The answer to a lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hit {
    /// This many tokens beyond vLLM's own can be loaded.
    Tokens(u32),
    /// Another request is loading the same blocks right now: ask again, and vLLM's own cache will
    /// have them.
    AskAgain,
}

/// Where the blocks of one load come from, beside slots that hold them.
#[derive(Debug, Default)]
struct Parts {
    /// Blocks on disk that get a slot of their own.
    own: Vec<BlockKey>,
    /// Blocks on disk that stream through the window.
    window: Vec<BlockKey>,
    /// Reads into slots of their own.
    reads: Vec<ReadPart>,
    /// Blocks evicted for them.
    evicted: Vec<BlockKey>,
}

impl TierEngine {
    /// How many tokens beyond `local` the tier can load for a request of `tokens` tokens. Changes
    /// nothing that another lookup can see.
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
        let dram = Sources { residency, extents: None };
        let below = self.disk.as_ref().filter(|disk| disk.settings.load_policy != LoadPolicy::Never);
        let both = Sources { residency, extents: below.map(|disk| &disk.extents) };
        let mut end = hit::resume_at(both, &self.grouping, &request.hashes, local, limit);
        request.decision = None;
        if let Some(disk) = below.filter(|_| end > local) {
            let without = hit::resume_at(dram, &self.grouping, &request.hashes, local, limit);
            if without < end {
                let tokens = end - without;
                let blocks: u64 =
                    self.grouping.groups.iter().map(|group| u64::from(tokens.div_ceil(group.block_tokens))).sum();
                let bytes = blocks * disk.layout.extent_bytes;
                let loads = disk.settings.load_policy.loads(&disk.rates, tokens, bytes, disk.queued_bytes());
                request.decision = Some(loads);
                end = if loads { end } else { without };
            }
        }
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

    /// vLLM admitted the request, with `external` tokens to come from us after `local` own ones.
    /// `blocks`: per group, vLLM's block ids from the block of token `local` on. Holds the blocks
    /// and orders the copies; what cannot be found any more makes the load fail, never a wrong
    /// byte.
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
        let mut wanted: Vec<(BlockKey, u32, u32)> = Vec::new();
        for (group, spec) in self.grouping.groups.iter().enumerate() {
            let (first, last) = (local / spec.block_tokens, (local + external) / spec.block_tokens);
            let ids = blocks.get(group).map_or(&[][..], Vec::as_slice);
            let keys: Vec<BlockKey> = request.keys(&self.grouping, group, first, last).collect();
            load.doomed |= keys.len() != (last - first) as usize || ids.len() < keys.len();
            let named = keys.into_iter().zip(ids).zip(first..);
            // vLLM gives no block to what lies before a window.
            let real = named.filter(|((_, block), _)| **block != 0);
            wanted.extend(real.map(|((key, block), number)| (key, *block, number * spec.block_tokens)));
        }
        if self.disk.is_some() {
            // In prefix order over all groups: the first bytes that are needed are the first that
            // are read.
            wanted.sort_by_key(|(_, _, token)| *token);
        }
        // Nothing is held or read for a load that cannot work.
        load.doomed |= wanted.iter().any(|(key, _, _)| self.source(key).is_none());
        let mut held = Vec::new();
        let mut parts = Parts::default();
        if !load.doomed {
            // First what is here, so that making room for the rest cannot evict it.
            self.hold(&wanted, serial, &mut held);
            parts.evicted = self.make_room(&wanted, serial);
            for (key, block, token) in &wanted {
                match self.take(key, *token, id, serial, &held, &mut parts) {
                    Some((slot, generation, flags)) => {
                        if flags & FOLLOW != 0 && parts.own.last() == Some(key) {
                            held.push((slot, *token));
                        }
                        load.copies.push(BlockCopy {
                            slot: slot.0,
                            generation,
                            block: *block,
                            group: key.group.0,
                            flags,
                        });
                    }
                    None => load.doomed = true,
                }
                if let Some(fence) = self.fences.get(block) {
                    self.plan.waits.push(*fence);
                }
            }
        }
        self.count_sources(id, external, &parts);
        let restores = !parts.own.is_empty() || !parts.window.is_empty();
        self.record(|engine| {
            let mut fields = vec![
                ("req", Value::from(id)),
                ("local", local.into()),
                ("external", external.into()),
                ("keys", names(wanted.iter().filter(|_| !held.is_empty() || restores).map(|(key, _, _)| *key))),
            ];
            if engine.disk.is_some() {
                fields.extend(TierEngine::restore_fields(
                    &parts.own,
                    &parts.window,
                    std::mem::take(&mut parts.evicted),
                ));
            }
            trace::line("load", &fields)
        });
        let doomed = load.doomed;
        self.plan.loads.push(load);
        self.leases.insert(id.to_owned(), Lease { local, held, doomed, lost_at: None, restores });
        if let Some(disk) = &mut self.disk {
            disk.read(std::mem::take(&mut parts.reads));
        }
        self.advance_window();
    }

    /// Holds the blocks that the dram tier has or is getting.
    fn hold(&mut self, wanted: &[(BlockKey, u32, u32)], serial: u32, held: &mut Vec<(SlotIndex, u32)>) {
        for (key, _, token) in wanted {
            let Some(Source::Slot(slot) | Source::Restoring(slot)) = self.source(key) else { continue };
            let Some(residency) = &mut self.residency else { return };
            residency.pin(slot, serial);
            held.push((slot, *token));
        }
    }

    /// Empties slots for the blocks that only the disk has. What is gone from here is as recent on
    /// disk as it was here.
    fn make_room(&mut self, wanted: &[(BlockKey, u32, u32)], serial: u32) -> Vec<BlockKey> {
        let (Some(residency), Some(disk)) = (&self.residency, &self.disk) else { return Vec::new() };
        let only_on_disk = |key: &BlockKey| residency.find_any(key).is_none() && disk.extents.find(key).is_some();
        let of_disk = wanted.iter().filter(|(key, _, _)| only_on_disk(key)).count();
        let (Some(residency), Some(disk)) = (&mut self.residency, &mut self.disk) else { return Vec::new() };
        let evicted = residency.make_room(of_disk, serial);
        for extent in evicted.iter().filter_map(|gone| disk.extents.find(gone)).collect::<Vec<_>>() {
            disk.extents.touch(extent);
        }
        evicted
    }

    /// The slot, generation and flags of one block's copy order; plans its read when it lies on
    /// disk.
    fn take(
        &mut self,
        key: &BlockKey,
        token: u32,
        id: &str,
        serial: u32,
        held: &[(SlotIndex, u32)],
        parts: &mut Parts,
    ) -> Option<(SlotIndex, u32, u16)> {
        let source = self.source(key)?;
        if let Source::Slot(slot) | Source::Restoring(slot) = source {
            debug_assert!(held.iter().any(|(other, _)| *other == slot));
            let residency = self.residency.as_ref()?;
            let follow = if matches!(source, Source::Restoring(_)) { FOLLOW } else { 0 };
            let verify = if residency.unverified(slot) { VERIFY } else { 0 };
            return Some((slot, residency.generation(slot).0, follow | verify));
        }
        let Source::Extent(extent) = source else { return None };
        let part = self.plan_read(key, extent, serial, id, token)?;
        let (slot, generation) = (part.slot, part.generation.0);
        if part.window {
            parts.window.push(*key);
        } else {
            parts.own.push(*key);
            parts.reads.push(part);
        }
        Some((slot, generation, FOLLOW))
    }

    /// Counts what came from disk.
    fn count_sources(&mut self, id: &str, external: u32, parts: &Parts) {
        let Some(residency) = &mut self.residency else { return };
        let blocks = (parts.own.len() + parts.window.len()) as u64;
        // Tokens are counted in the first group that needs its whole prefix, else in the first.
        let group = self.grouping.groups.iter().position(|group| group.tail_blocks().is_none()).unwrap_or(0);
        let of_group = parts.own.iter().chain(&parts.window).filter(|key| usize::from(key.group.0) == group).count();
        let tokens = (of_group as u32 * self.grouping.groups[group].block_tokens).min(external);
        if let Some(request) = self.requests.get_mut(id) {
            request.disk_tokens = tokens;
        }
        residency.counters.nvme_hit_blocks += blocks;
        residency.counters.nvme_hit_tokens += u64::from(tokens);
        residency.counters.hit_blocks = residency.counters.hit_blocks.saturating_sub(blocks);
        residency.counters.hit_tokens = residency.counters.hit_tokens.saturating_sub(u64::from(tokens));
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
        match request.decision {
            Some(true) => residency.counters.load_decisions += 1,
            Some(false) => residency.counters.recompute_decisions += 1,
            None => {}
        }
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
        let mut barrier = lease.lost_at;
        let mut dropped = Vec::new();
        for (slot, token) in &lease.held {
            if residency.memory().line(*slot).load_refused() {
                barrier = Some(barrier.map_or(*token, |first: u32| first.min(*token)));
                // A block that could not be restored was dropped already, and is no block of the
                // tier.
                if let Some(key) = residency.key(*slot).filter(|key| residency.find(key) == Some(*slot)) {
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
