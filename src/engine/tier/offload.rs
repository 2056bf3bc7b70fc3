//! The way of a block from vLLM's KV cache into a slot.

use serde_json::Value;

use super::engine::TierEngine;
use super::trace::{self, names};
use crate::limits;
use crate::metrics::DropReason;
use crate::pool::slot_table::Fill;
use kvcellar_block::descriptor::Lineage;
use kvcellar_block::plan::BlockCopy;
use kvcellar_block::{BlockKey, ExtentIndex, GroupIndex, SlotIndex};

/// Blocks of one group that a step completes.
#[derive(Debug, Clone, Default)]
pub struct GroupOffer {
    /// The request's number of the first block.
    pub first: u32,
    /// vLLM's block ids from there on; 0 is the null block.
    pub blocks: Vec<u32>,
    /// Encoded extra hash keys of each block; empty when the request has none.
    pub extra: Vec<Box<[u8]>>,
}

/// Complete blocks of one request.
#[derive(Debug, Clone, Default)]
pub struct Offer<'a> {
    /// vLLM's request id.
    pub request: &'a str,
    /// The first token in `tokens`.
    pub tokens_from: u32,
    /// Token ids that cover the offered blocks.
    pub tokens: Vec<u32>,
    /// One element a group.
    pub groups: Vec<GroupOffer>,
}

/// When the workers may start to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Before the step's forward pass: the blocks are complete already.
    BeforeStep,
    /// After it: the step completes them.
    AfterStep,
}

/// One request's offloads of one step, which become visible together.
#[derive(Debug)]
pub struct Batch {
    number: u64,
    request: String,
    slots: Vec<SlotIndex>,
    copies: Vec<BlockCopy>,
    lineages: Vec<Lineage>,
    /// A reset came in between: the slots are freed and nothing becomes visible.
    pub(super) stale: bool,
}

/// Offered blocks by where they are.
#[derive(Default)]
struct Sorted {
    resident: Vec<SlotIndex>,
    on_disk: Vec<ExtentIndex>,
    missing: Vec<Candidate>,
}

/// A block that may be kept.
struct Candidate {
    key: BlockKey,
    parent: Option<kvcellar_block::BlockHash>,
    block: u32,
    group: usize,
    index: usize,
}

impl TierEngine {
    /// Offers complete blocks. Those the tier holds are touched; the others get slots, as far as
    /// there are any, and copy orders.
    pub fn offer(&mut self, offer: &Offer<'_>, start: Start) {
        let Some(request) = self.requests.get(offer.request) else { return };
        if self.residency.is_none()
            || request.tainted
            || !request.controls.store
            || self.leases.contains_key(offer.request)
        {
            return;
        }
        let serial = request.serial;
        let Sorted { resident, on_disk, missing } = self.sort_out(offer);
        if let Some(disk) = &mut self.disk {
            on_disk.iter().rev().for_each(|extent| disk.extents.touch(*extent));
        }
        if resident.is_empty() && missing.is_empty() {
            return;
        }
        let Some(residency) = &mut self.residency else { return };
        residency.touch(&resident, serial);
        self.store(offer, &resident, &missing, serial, start);
    }

    /// Splits the offered blocks into those the dram tier holds, those that only the disk holds
    /// (they are not copied again: vLLM has them now, and the disk when it has not), and those
    /// nobody holds; blocks that are being filled are none of them.
    fn sort_out(&self, offer: &Offer<'_>) -> Sorted {
        let mut sorted = Sorted::default();
        let (Some(residency), Some(request)) = (&self.residency, self.requests.get(offer.request)) else {
            return sorted;
        };
        let mut found = Vec::new();
        for (group, blocks) in offer.groups.iter().enumerate().take(self.grouping.groups.len()) {
            let step = (self.grouping.groups[group].block_tokens / self.grouping.hash_tokens) as usize;
            let start = self.grouping.hash_index(group, blocks.first);
            let end = request.hashes.len().min(start + blocks.blocks.len().saturating_sub(1) * step + 1);
            if blocks.blocks.is_empty() || start >= end {
                continue;
            }
            found.clear();
            residency.find_all(&request.hashes[start..end], step, GroupIndex(group as u16), &mut found);
            for (index, (held, block)) in found.iter().zip(&blocks.blocks).enumerate() {
                match held {
                    // The null block stands for a block that slid out of its window: its bytes are
                    // not there.
                    _ if *block == 0 => {}
                    Some((slot, true)) => sorted.resident.push(*slot),
                    Some((_, false)) => {}
                    None => {
                        let at = start + index * step;
                        let key = BlockKey { hash: request.hashes[at], group: GroupIndex(group as u16) };
                        if let Some(extent) = self.disk.as_ref().and_then(|disk| disk.extents.find(&key)) {
                            sorted.on_disk.push(extent);
                            continue;
                        }
                        let parent = at.checked_sub(step).map(|before| request.hashes[before]);
                        sorted.missing.push(Candidate { key, parent, block: *block, group, index });
                    }
                }
            }
        }
        sorted
    }

    fn store(&mut self, offer: &Offer<'_>, resident: &[SlotIndex], missing: &[Candidate], serial: u32, start: Start) {
        let mut batch = Batch {
            number: self.batch_number + 1,
            request: offer.request.to_owned(),
            slots: Vec::with_capacity(missing.len()),
            copies: Vec::with_capacity(missing.len()),
            lineages: Vec::with_capacity(missing.len()),
            stale: false,
        };
        let mut refused = None;
        let Some(residency) = &mut self.residency else { return };
        let wanted = missing.len().min(limits::INFLIGHT_STORES_MAX.saturating_sub(self.inflight_stores));
        let mut evicted = residency.make_room(wanted, serial);
        for candidate in missing {
            if self.inflight_stores + batch.slots.len() >= limits::INFLIGHT_STORES_MAX {
                refused = Some(DropReason::QueueFull);
                break;
            }
            match residency.reserve(&candidate.key, serial) {
                Ok(reserved) => {
                    evicted.extend(reserved.evicted);
                    batch.slots.push(reserved.slot);
                    batch.copies.push(BlockCopy {
                        slot: reserved.slot.0,
                        generation: reserved.generation.0,
                        block: candidate.block,
                        group: candidate.key.group.0,
                        flags: 0,
                    });
                }
                Err(reason) => {
                    refused = Some(reason);
                    break;
                }
            }
        }
        if let Some(reason) = refused {
            residency.counters.dropped(reason, (missing.len() - batch.slots.len()) as u64);
        }
        // A second pass, so that the descriptors' memory has been fetched meanwhile.
        let lora = self.requests.get(offer.request).map_or_else(Box::default, |request| request.lora.clone());
        for (candidate, copy) in missing.iter().zip(&batch.copies) {
            let lineage = self.grouping.groups.get(candidate.group).map_or_else(Lineage::default, |group| Lineage {
                parent: candidate.parent,
                tokens: tokens_of(offer, candidate, group.block_tokens),
                lora: lora.clone(),
                extra: offer.groups[candidate.group].extra.get(candidate.index).cloned().unwrap_or_default(),
            });
            let generation = kvcellar_block::Generation(copy.generation);
            let fits = residency.memory().describe(SlotIndex(copy.slot), &candidate.key, generation, &lineage);
            residency.counters.undescribed_blocks += u64::from(!fits);
            batch.lineages.push(lineage);
            self.fences.insert(copy.block, *copy);
        }
        if self.trace.is_some() {
            self.record_store(&batch, resident, missing, evicted, refused);
        }
        if batch.slots.is_empty() {
            return;
        }
        match start {
            Start::BeforeStep => self.plan.stores_before.extend_from_slice(&batch.copies),
            Start::AfterStep => self.plan.stores_after.extend_from_slice(&batch.copies),
        }
        if let Some(request) = self.requests.get_mut(offer.request) {
            request.batches += 1;
        }
        self.inflight_stores += batch.slots.len();
        self.batch_number += 1;
        self.batches.push_back(batch);
    }

    fn record_store(
        &mut self,
        batch: &Batch,
        resident: &[SlotIndex],
        missing: &[Candidate],
        evicted: Vec<BlockKey>,
        refused: Option<DropReason>,
    ) {
        let kept = batch.slots.len();
        let fields = [
            ("req", Value::from(batch.request.as_str())),
            ("batch", batch.number.into()),
            // Pinned blocks are not in the order of eviction and are not moved in it.
            (
                "touch",
                names(
                    resident
                        .iter()
                        .filter(|slot| self.residency.as_ref().is_some_and(|r| r.pins(**slot) == 0))
                        .filter_map(|slot| self.key_of(*slot)),
                ),
            ),
            ("keys", names(missing[..kept].iter().map(|candidate| candidate.key))),
            ("evicted", names(evicted)),
            ("dropped", names(missing[kept..].iter().map(|candidate| candidate.key))),
            ("reason", refused.map_or("", DropReason::name).into()),
        ];
        self.record(|_| trace::line("store", &fields));
    }

    pub(super) fn is_answered(&self, batch: &Batch) -> bool {
        let Some(residency) = &self.residency else { return true };
        let writers = residency.memory().writers();
        batch.slots.iter().all(|slot| residency.memory().line(*slot).fill(writers) != Fill::Pending)
    }

    pub(super) fn complete(&mut self, batch: Batch) {
        let Batch { number, request, slots, copies, lineages, stale } = batch;
        self.inflight_stores -= slots.len();
        for copy in &copies {
            // The same vLLM block may have been fenced again for a later order.
            if self.fences.get(&copy.block) == Some(copy) {
                self.fences.remove(&copy.block);
            }
        }
        let Some(residency) = &mut self.residency else { return };
        let writers = residency.memory().writers();
        let (mut filled, mut lost) = (Vec::new(), Vec::new());
        let mut on_disk = Vec::new();
        let (mut filled_keys, mut lost_keys) = (Vec::new(), Vec::new());
        for (slot, lineage) in slots.into_iter().zip(lineages) {
            let key = residency.key(slot);
            let whole = residency.memory().line(slot).fill(writers) == Fill::Done;
            if whole && !stale {
                residency.publish(slot, lineage);
                if let Some(extent) = key.and_then(|key| self.disk.as_ref()?.extents.find(&key)) {
                    // The disk has the block already.
                    residency.set_clean(slot, true);
                    on_disk.push(extent);
                }
                filled.push(slot);
                filled_keys.extend(key);
            } else {
                residency.lose(slot);
                residency.counters.dropped(if stale { DropReason::Reset } else { DropReason::CopyFailed }, 1);
                lost.push(slot);
                lost_keys.extend(key);
            }
        }
        residency.settle(&filled);
        if let Some(disk) = &mut self.disk {
            on_disk.iter().rev().for_each(|extent| disk.extents.touch(*extent));
        }
        if !filled_keys.is_empty() {
            self.record(|_| trace::line("filled", &[("batch", number.into()), ("keys", names(filled_keys))]));
        }
        if !lost_keys.is_empty() {
            self.record(|_| trace::line("lost", &[("batch", number.into()), ("keys", names(lost_keys))]));
        }
        if let Some(known) = self.requests.get_mut(&request) {
            known.batches = known.batches.saturating_sub(1);
            self.retire_if_done(&request);
        }
        if self.batches.is_empty() {
            self.record_state();
        }
    }

    /// vLLM finished a request of `prompt` and altogether `total` tokens. Its last blocks should
    /// have been offered before.
    pub fn finish(&mut self, id: &str, prompt: u32, total: u32) {
        if let Some(request) = self.requests.get_mut(id) {
            request.finished = Some((prompt, total));
            self.retire_if_done(id);
        }
    }

    /// Once nothing of a finished request is under way, its prefix is made to outlive its suffix,
    /// and what no future hit is likely to need goes first.
    fn retire_if_done(&mut self, id: &str) {
        let done = self.requests.get(id).is_some_and(|request| request.finished.is_some() && request.batches == 0);
        if !done {
            return;
        }
        let Some(request) = self.requests.remove(id) else { return };
        let (Some(residency), Some((prompt, total))) = (&mut self.residency, request.finished) else { return };
        let (mut warm, mut cold) = (Vec::new(), Vec::new());
        let mut found = Vec::new();
        for (group, spec) in self.grouping.groups.iter().enumerate() {
            let blocks = total / spec.block_tokens;
            let step = (spec.block_tokens / self.grouping.hash_tokens) as usize;
            let start = self.grouping.hash_index(group, 0);
            let end = request.hashes.len().min(start + (blocks as usize).saturating_sub(1) * step + 1);
            if blocks == 0 || start >= end {
                continue;
            }
            found.clear();
            residency.find_all(&request.hashes[start..end], step, GroupIndex(group as u16), &mut found);
            for (block, held) in found.iter().enumerate() {
                let Some((slot, true)) = held else { continue };
                let needed = spec.tail_blocks().is_none_or(|tail| {
                    // Future prompts most likely continue this one, from the end of its prompt or
                    // of its answer.
                    [prompt, total].into_iter().any(|tokens| {
                        let last = self.grouping.hit_limit(tokens) / spec.block_tokens + u32::from(spec.eagle);
                        (last.saturating_sub(tail + u32::from(spec.eagle))..last).contains(&(block as u32))
                    })
                });
                if needed { warm.push(*slot) } else { cold.push(*slot) }
            }
        }
        let unpinned = |slot: &&SlotIndex| residency.pins(**slot) == 0;
        let (warm_keys, cold_keys): (Vec<_>, Vec<_>) = (
            warm.iter().filter(unpinned).filter_map(|slot| residency.key(*slot)).collect(),
            cold.iter().filter(unpinned).filter_map(|slot| residency.key(*slot)).collect(),
        );
        residency.touch(&warm, request.serial);
        for slot in cold.iter().rev() {
            residency.cool(*slot);
        }
        let fields = [("req", Value::from(id)), ("keys", names(warm_keys)), ("cold", names(cold_keys))];
        self.record(|_| trace::line("retire", &fields));
        self.record_state();
    }
}

fn tokens_of(offer: &Offer<'_>, candidate: &Candidate, block_tokens: u32) -> Box<[u32]> {
    let block = offer.groups[candidate.group].first + candidate.index as u32;
    let from = (block * block_tokens).checked_sub(offer.tokens_from).map(|from| from as usize);
    // A block whose tokens were not sent along is kept, but its event would not be self-describing:
    // no tokens at all is what consumers know.
    from.and_then(|from| offer.tokens.get(from..from + block_tokens as usize)).unwrap_or_default().into()
}
