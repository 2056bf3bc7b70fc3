//! The way of a block from vLLM's KV cache into a slot.

use std::collections::VecDeque;

use hashbrown::{HashMap, HashSet};
use serde_json::Value;

use super::requests::RequestState;
use super::reservation::Provenance;
use super::residency::Residency;
use super::session::Session;
use super::tiers::Tiers;
use super::trace::{self, names};
use crate::limits;
use crate::metrics::DropReason;
use crate::pool::slot_table::Fill;
use crate::violated;
use kvcellar_block::descriptor::Lineage;
use kvcellar_block::plan::{BlockCopy, StepPlan};
use kvcellar_block::{BlockHash, BlockKey, ExtentIndex, Generation, GroupIndex, Grouping, SlotIndex};

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
struct Batch {
    number: u64,
    request: String,
    slots: Vec<SlotIndex>,
    copies: Vec<BlockCopy>,
    lineages: Vec<Lineage>,
    /// A reset came in between: the slots are freed and nothing becomes visible.
    stale: bool,
}

impl Batch {
    /// Whether every writing rank has copied every block, or failed to.
    fn is_answered(&self, dram: &Residency) -> bool {
        self.copies.iter().all(|copy| fill(dram, copy) != Fill::Pending)
    }
}

/// What the ranks that write a block of this group have answered.
fn fill(dram: &Residency, copy: &BlockCopy) -> Fill {
    let memory = dram.memory();
    memory.line(SlotIndex(copy.slot)).fill(memory.writers(GroupIndex(copy.group)))
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
    parent: Option<BlockHash>,
    block: u32,
    group: usize,
    index: usize,
}

/// Copies into slots that were ordered and have not been answered.
#[derive(Default)]
pub(super) struct Offloads {
    /// Batches in the order in which they were planned; they become visible in this order.
    batches: VecDeque<Batch>,
    /// Blocks of all batches.
    blocks: usize,
    /// vLLM block -> the offload that still reads it.
    fences: HashMap<u32, BlockCopy>,
    /// Slot and generation of offloads whose source was written over: what they copy is worthless.
    overwritten: HashSet<(u32, u32)>,
    /// The number of the batch that was planned last.
    last_number: u64,
}

impl Offloads {
    /// Nothing is being copied.
    pub(super) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// vLLM blocks that must not be overwritten before they were copied.
    pub(super) fn fences(&self) -> usize {
        self.fences.len()
    }

    /// The number of the batch that was planned last.
    pub(super) fn last_number(&self) -> u64 {
        self.last_number
    }

    /// A reset came: what is being copied is worthless.
    pub(super) fn on_reset(&mut self) {
        for batch in &mut self.batches {
            batch.stale = true;
        }
    }

    /// Somebody will write this vLLM block in this step: the workers wait for whoever still reads
    /// it. `flags`: added to those of the copy that is waited for.
    pub(super) fn wait_for(&self, block: u32, flags: u16, plan: &mut StepPlan) {
        if let Some(copy) = self.fences.get(&block) {
            plan.waits.push(BlockCopy { flags: copy.flags | flags, ..*copy });
        }
    }

    /// Somebody writes this vLLM block before the workers can be told to wait: a copy that has not
    /// been answered by now may have read something else.
    pub(super) fn overwrite(&mut self, block: u32, dram: &Residency) {
        if let Some(copy) = self.fences.get(&block).filter(|copy| fill(dram, copy) == Fill::Pending) {
            self.overwritten.insert((copy.slot, copy.generation));
        }
    }

    /// Offers complete blocks. Those the tier holds are touched; the others get slots, as far as
    /// there are any, and copy orders.
    pub(super) fn offer(&mut self, tiers: &mut Tiers, session: &mut Session, offer: &Offer<'_>, start: Start) {
        // A request that is not known was left out.
        let Some(request) = session.requests.get(offer.request) else { return };
        if request.tainted || request.forgotten || !request.controls.store {
            return;
        }
        let user = request.user();
        let sorted = sort_out(tiers, session.requests.grouping(), request, offer);
        tiers.touch_on_disk(&sorted.on_disk);
        if sorted.resident.is_empty() && sorted.missing.is_empty() {
            return;
        }
        tiers.dram.touch(&sorted.resident, user);
        self.store(&mut tiers.dram, session, offer, &sorted, start);
    }

    fn store(&mut self, dram: &mut Residency, session: &mut Session, offer: &Offer<'_>, sorted: &Sorted, start: Start) {
        let prompt_tokens =
            session.requests.get(offer.request).map_or(0, |request| request.known_tokens(session.requests.grouping()));
        let Some(request) = session.requests.get_mut(offer.request) else {
            violated!("{} offers blocks but is not known", offer.request);
            return;
        };
        let (user, missing) = (request.user(), &sorted.missing);
        let mut batch = Batch {
            number: self.last_number + 1,
            request: offer.request.to_owned(),
            slots: Vec::with_capacity(missing.len()),
            copies: Vec::with_capacity(missing.len()),
            lineages: Vec::with_capacity(missing.len()),
            stale: false,
        };
        let mut refused = None;
        let wanted = missing.len().min(limits::INFLIGHT_STORES_MAX.saturating_sub(self.blocks));
        let mut evicted = dram.make_room(wanted, user);
        let mut last: Option<(BlockKey, SlotIndex)> = None;
        for candidate in missing {
            if self.blocks + batch.slots.len() >= limits::INFLIGHT_STORES_MAX {
                refused = Some(DropReason::QueueFull);
                break;
            }
            let provenance = Provenance { parent: parent_of(dram, candidate, last), prompt_tokens };
            match dram.reserve(&candidate.key, user, provenance) {
                Ok(reserved) => {
                    last = Some((candidate.key, reserved.slot));
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
            dram.counters.dropped(reason, (missing.len() - batch.slots.len()) as u64);
        }
        request.batches += u32::from(!batch.slots.is_empty());
        let (lora, salt) = (request.lora.clone(), request.salt);
        // A second pass, so that the descriptors' memory has been fetched meanwhile.
        let grouping = session.requests.grouping();
        for (candidate, copy) in missing.iter().zip(&batch.copies) {
            let lineage = Lineage {
                parent: candidate.parent,
                tokens: tokens_of(offer, candidate, grouping.groups[candidate.group].block_tokens),
                lora: lora.clone(),
                extra: offer.groups[candidate.group].extra.get(candidate.index).cloned().unwrap_or_default(),
                salt,
            };
            if dram.remains.expect(SlotIndex(copy.slot), salt) {
                dram.memory().erase_tail(SlotIndex(copy.slot), candidate.key.group);
            }
            let generation = Generation(copy.generation);
            let fits = dram.memory().describe(SlotIndex(copy.slot), &candidate.key, generation, &lineage);
            dram.counters.undescribed_blocks += u64::from(!fits);
            batch.lineages.push(lineage);
            self.fences.insert(copy.block, *copy);
        }
        session.log.record(|| store_line(dram, &batch, sorted, evicted, refused));
        if batch.slots.is_empty() {
            return;
        }
        match start {
            Start::BeforeStep => session.plan.stores_before.extend_from_slice(&batch.copies),
            Start::AfterStep => session.plan.stores_after.extend_from_slice(&batch.copies),
        }
        self.blocks += batch.slots.len();
        self.last_number += 1;
        self.batches.push_back(batch);
    }

    /// Makes the blocks of the oldest batch visible, once all its copies are answered. Returns the
    /// request that it was of; `None`: it is not answered, or there is none.
    pub(super) fn complete_next(&mut self, tiers: &mut Tiers, session: &mut Session) -> Option<String> {
        let batch = self.batches.pop_front_if(|batch| batch.is_answered(&tiers.dram))?;
        let Batch { number, request, slots, copies, lineages, stale } = batch;
        self.blocks -= slots.len();
        for copy in &copies {
            // The same vLLM block may have been fenced again for a later order.
            if self.fences.get(&copy.block) == Some(copy) {
                self.fences.remove(&copy.block);
            }
        }
        let (mut filled, mut filled_lineages) = (Vec::with_capacity(slots.len()), Vec::with_capacity(slots.len()));
        let (mut filled_keys, mut lost_keys) = (Vec::new(), Vec::new());
        for ((slot, copy), lineage) in slots.into_iter().zip(&copies).zip(lineages) {
            let key = tiers.dram.key(slot);
            let whole = fill(&tiers.dram, copy) == Fill::Done;
            let overwritten = self.overwritten.remove(&(copy.slot, copy.generation));
            let forgotten = tiers.dram.remains.is_due(slot);
            if whole && !stale && !overwritten && !forgotten {
                filled.push(slot);
                filled_lineages.push(lineage);
                filled_keys.extend(key);
            } else {
                tiers.dram.lose(slot);
                let reason = match (stale, forgotten, whole) {
                    (true, ..) => DropReason::Reset,
                    (_, true, _) => DropReason::Forgotten,
                    (_, _, true) => DropReason::Overwritten,
                    (_, _, false) => DropReason::CopyFailed,
                };
                tiers.dram.counters.dropped(reason, 1);
                lost_keys.extend(key);
            }
        }
        tiers.dram.publish_all(&filled, filled_lineages);
        let mut on_disk = Vec::new();
        for slot in &filled {
            if let Some(extent) = tiers.dram.key(*slot).and_then(|key| tiers.on_disk(&key)) {
                // The disk has the block already.
                tiers.dram.set_clean(*slot, true);
                on_disk.push(extent);
            }
        }
        tiers.touch_on_disk(&on_disk);
        if !filled_keys.is_empty() {
            session.log.record(|| trace::line("filled", &[("batch", number.into()), ("keys", names(filled_keys))]));
        }
        if !lost_keys.is_empty() {
            session.log.record(|| trace::line("lost", &[("batch", number.into()), ("keys", names(lost_keys))]));
        }
        if let Some(known) = session.requests.get_mut(&request) {
            known.batches = known.batches.saturating_sub(1);
        }
        Some(request)
    }
}

/// Splits the offered blocks into those the dram tier holds, those that only the disk holds (they
/// are not copied again: vLLM has them now, and the disk when it has not), and those nobody holds;
/// blocks that are being filled are none of them, and neither are those that no hit needs.
fn sort_out(tiers: &Tiers, grouping: &Grouping, request: &RequestState, offer: &Offer<'_>) -> Sorted {
    let mut sorted = Sorted::default();
    let mut found = Vec::new();
    for (group, blocks) in offer.groups.iter().enumerate().take(grouping.groups.len()) {
        let spec = &grouping.groups[group];
        let all_needed = spec.needs_whole_prefix();
        let step = (spec.block_tokens / grouping.hash_tokens) as usize;
        let start = grouping.hash_index(group, blocks.first);
        let end = request.hashes.len().min(start + blocks.blocks.len().saturating_sub(1) * step + 1);
        if blocks.blocks.is_empty() || start >= end {
            continue;
        }
        found.clear();
        tiers.dram.find_all(&request.hashes[start..end], step, GroupIndex(group as u16), &mut found);
        for (index, (held, block)) in found.iter().zip(&blocks.blocks).enumerate() {
            match held {
                // The null block stands for a block that slid out of its window: its bytes are
                // not there.
                _ if *block == 0 => {}
                None if !all_needed && !spec.is_ever_needed(blocks.first + index as u32, grouping.hit_tokens) => {}
                Some((slot, true)) => sorted.resident.push(*slot),
                Some((_, false)) => {}
                None => {
                    let at = start + index * step;
                    let key = BlockKey { hash: request.hashes[at], group: GroupIndex(group as u16) };
                    if let Some(extent) = tiers.on_disk(&key) {
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

/// The operation log's line of a batch.
fn store_line(
    dram: &Residency,
    batch: &Batch,
    sorted: &Sorted,
    evicted: Vec<BlockKey>,
    refused: Option<DropReason>,
) -> Value {
    let kept = batch.slots.len();
    // Pinned blocks are not in the order of eviction and are not moved in it.
    let touched = sorted.resident.iter().filter(|slot| dram.pins(**slot) == 0).filter_map(|slot| dram.key(*slot));
    trace::line(
        "store",
        &[
            ("req", Value::from(batch.request.as_str())),
            ("batch", batch.number.into()),
            ("touch", names(touched)),
            ("keys", names(sorted.missing[..kept].iter().map(|candidate| candidate.key))),
            ("evicted", names(evicted)),
            ("dropped", names(sorted.missing[kept..].iter().map(|candidate| candidate.key))),
            ("reason", refused.map_or("", DropReason::name).into()),
        ],
    )
}

/// The slot of the block before a candidate. `last`: the candidate before it, and its slot.
fn parent_of(dram: &Residency, candidate: &Candidate, last: Option<(BlockKey, SlotIndex)>) -> Option<SlotIndex> {
    let parent = BlockKey { hash: candidate.parent?, ..candidate.key };
    match last {
        Some((key, slot)) if key == parent => Some(slot),
        _ => dram.find_any(&parent).map(|(slot, _)| slot),
    }
}

fn tokens_of(offer: &Offer<'_>, candidate: &Candidate, block_tokens: u32) -> Box<[u32]> {
    let block = offer.groups[candidate.group].first + candidate.index as u32;
    let from = (block * block_tokens).checked_sub(offer.tokens_from).map(|from| from as usize);
    // A block whose tokens were not sent along is kept, but its event would not be self-describing:
    // no tokens at all is what consumers know.
    from.and_then(|from| offer.tokens.get(from..from + block_tokens as usize)).unwrap_or_default().into()
}
