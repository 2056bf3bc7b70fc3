//! The way of a block from a tier back into vLLM's KV cache.
//!
//! A lookup counts what could be loaded. An admission first plans the whole load from what the
//! tiers hold, and only then holds blocks, makes room, orders reads and copies, and counts.

use std::time::{Duration, Instant};

use hashbrown::HashMap;
use serde_json::Value;

use super::hit::{self, Sources};
use super::offload::Offloads;
use super::requests::{Asked, FirstHit, RequestState, Requests};
use super::reservation::{Provenance, User};
use super::restore::{LostBlock, Wanted};
use super::savings::LoadedTokens;
use super::session::Session;
use super::tiers::{Source, Tiers};
use super::trace::{self, names};
use super::transfer::ReadPart;
use crate::limits;
use crate::metrics::{Counters, DropReason};
use crate::policy::LoadPolicy;
use kvcellar_block::plan::{BlockCopy, FOLLOW, Load, VERIFY};
use kvcellar_block::{BlockKey, GroupSpec, Grouping, SlotIndex};

/// The answer to a lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hit {
    /// This many tokens beyond vLLM's own can be loaded.
    Tokens(u32),
    /// Another request is loading the same blocks right now: ask again, and vLLM's own cache will
    /// have them.
    AskAgain,
}

/// A running load and the blocks it holds.
#[derive(Debug)]
struct Lease {
    /// Tokens vLLM held when it began.
    local: u32,
    /// Every held slot, with the first token of its block.
    held: Vec<(SlotIndex, u32)>,
    /// A block was gone when it was planned.
    doomed: bool,
    /// What it loads.
    tokens: LoadedTokens,
    /// The first token of the first block that could not be restored.
    lost_at: Option<u32>,
}

/// What vLLM admitted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Admission<'a> {
    /// The request.
    pub(super) id: &'a str,
    /// Tokens that are to come from us, after those that vLLM has.
    pub(super) external: u32,
    /// For each group, vLLM's blocks from that of the first such token on.
    pub(super) destinations: &'a [Vec<u32>],
}

/// One block of a planned load.
#[derive(Debug)]
struct PlannedBlock {
    key: BlockKey,
    /// The vLLM block that it is copied to.
    destination: u32,
    first_token: u32,
    source: Source,
}

/// A load as it could go, from what the tiers hold now. Nothing is held for it yet.
#[derive(Debug)]
struct LoadPlan {
    /// In the order in which blocks are held, read and copied.
    blocks: Vec<PlannedBlock>,
    /// A block cannot be had: nothing is held or read for a load that cannot work.
    doomed: bool,
}

/// What became of a plan.
#[derive(Debug, Default)]
struct Committed {
    copies: Vec<BlockCopy>,
    held: Vec<(SlotIndex, u32)>,
    /// Blocks on disk that got a slot of their own.
    own: Vec<BlockKey>,
    /// Blocks on disk that stream through the window.
    window: Vec<BlockKey>,
    /// Blocks evicted for them.
    evicted: Vec<BlockKey>,
    doomed: bool,
}

/// Running loads, by vLLM's request id.
#[derive(Default)]
pub(super) struct Loads {
    leases: HashMap<String, Lease>,
}

impl Loads {
    /// No load is running.
    pub(super) fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    /// Running loads.
    pub(super) fn running(&self) -> usize {
        self.leases.len()
    }

    /// A load of this request is running.
    pub(super) fn is_running(&self, id: &str) -> bool {
        self.leases.contains_key(id)
    }

    /// Blocks that loads wait for do not come. A load that has ended needs them no longer.
    pub(super) fn on_lost_blocks(&mut self, lost: &[LostBlock]) {
        for LostBlock { request, token } in lost {
            if let Some(lease) = self.leases.get_mut(request) {
                lease.lost_at = Some(lease.lost_at.map_or(*token, |first| first.min(*token)));
            }
        }
    }

    /// How many tokens beyond `local` the tiers can load for a request of `tokens` tokens.
    pub(super) fn lookup(&self, tiers: &mut Tiers, session: &mut Session, id: &str, tokens: u32, local: u32) -> Hit {
        let grouping = session.requests.grouping();
        // A request that is not known was left out.
        let Some(request) = session.requests.get(id) else { return Hit::Tokens(0) };
        if !request.controls.load {
            return Hit::Tokens(0);
        }
        let mut limit = grouping.hit_limit(tokens).min(request.barrier.unwrap_or(u32::MAX));
        if let Some(most) = request.controls.max_load_tokens {
            limit = limit.min(local.saturating_add(most));
        }
        // A request that waits asks in every step.
        let asked = Asked { local, limit, hashes: request.hashes.len(), changes: tiers.changes() };
        let known = request.answered.filter(|(before, _)| *before == asked);
        let (end, decision, shared) = if let Some((_, end)) = known {
            (end, None, false)
        } else {
            let (end, decision) = reach(tiers, grouping, request, local, limit);
            (end, decision, end > local && self.is_being_loaded(tiers, grouping, request, (id, end)))
        };
        let found = end - local.min(end);
        let mut answer = Hit::Tokens(found);
        if let Some(request) = session.requests.get_mut(id) {
            request.decision = decision;
            // What time or a device's speed had a part in is asked anew.
            request.answered = (decision.is_none() && !shared).then_some((asked, end));
            if !shared {
                request.waiting_since = None;
            } else if request.waiting_since.get_or_insert_with(Instant::now).elapsed()
                < Duration::from_millis(limits::SHARED_LOAD_WAIT_MS)
            {
                tiers.dram.counters.shared_load_waits += 1;
                answer = Hit::AskAgain;
            }
        }
        let Session { requests, log, .. } = session;
        log.record(|| lookup_line(requests, id, [local, tokens, limit], answer));
        answer
    }

    /// Is the hit's last block held by another request's running load?
    fn is_being_loaded(
        &self,
        tiers: &Tiers,
        grouping: &Grouping,
        request: &RequestState,
        (id, end): (&str, u32),
    ) -> bool {
        if self.leases.is_empty() || self.leases.contains_key(id) {
            return false;
        }
        let last_block = end / grouping.groups[0].block_tokens - 1;
        request
            .keys(grouping, 0, last_block, last_block + 1)
            .any(|key| tiers.dram.find(&key).is_some_and(|slot| tiers.dram.pins(slot) > 0))
    }

    /// Holds the blocks that vLLM wants and orders the copies; what cannot be found any more makes
    /// the load fail, never a wrong byte.
    pub(super) fn admit(
        &mut self,
        tiers: &mut Tiers,
        session: &mut Session,
        offloads: &Offloads,
        admission: Admission<'_>,
    ) {
        let Admission { id, external, .. } = admission;
        let Some(request) = session.requests.get(id) else {
            session.plan.loads.push(doomed(id));
            return;
        };
        let (local, user) = (request.local, request.user());
        let prompt_tokens = request.known_tokens(session.requests.grouping());
        let plan = plan(tiers, session.requests.grouping(), request, admission);
        let committed = commit(tiers, &plan, id, (user, prompt_tokens));
        for block in plan.blocks.iter().filter(|_| !plan.doomed) {
            offloads.wait_for(block.destination, 0, &mut session.plan);
        }
        let on_disk = count(&mut tiers.dram.counters, &mut session.requests, id, external, &committed);
        let tokens = LoadedTokens { dram: external - on_disk, nvme: on_disk };
        let with_disk = tiers.disk.is_some();
        session.log.record(|| load_line(id, [local, external], &plan, &committed, with_disk));
        let Committed { copies, held, doomed, .. } = committed;
        session.plan.loads.push(Load { request: id.to_owned(), doomed, copies });
        self.leases.insert(id.to_owned(), Lease { local, held, doomed, tokens, lost_at: None });
    }

    /// Every rank reported the end of a load. Returns whether it was one of ours.
    pub(super) fn end(&mut self, tiers: &mut Tiers, session: &mut Session, id: &str, failed: bool) -> bool {
        // Workers also report loads of other connectors, and ones that were doomed from the start.
        let Some(lease) = self.leases.remove(id) else { return false };
        let dram = &mut tiers.dram;
        let keys: Vec<BlockKey> = lease.held.iter().filter_map(|(slot, _)| dram.key(*slot)).collect();
        let mut barrier = lease.lost_at;
        let mut dropped = Vec::new();
        for (slot, token) in &lease.held {
            if dram.memory().line(*slot).load_refused() {
                barrier = Some(barrier.map_or(*token, |first: u32| first.min(*token)));
                // A block that could not be restored was dropped already, and is no block of the
                // tier.
                if let Some(key) = dram.key(*slot).filter(|key| dram.find(key) == Some(*slot)) {
                    dram.drop_block(*slot, DropReason::Corrupt);
                    dropped.push(key);
                }
            } else if !failed {
                dram.verified(*slot);
            }
        }
        for (slot, _) in lease.held.iter().rev() {
            dram.unpin(*slot);
        }
        if failed {
            dram.counters.load_failures += 1;
            let hit_tokens = session.requests.grouping().hit_tokens;
            if let Some(request) = session.requests.get_mut(id) {
                // Nobody said which block is bad: this request loads nothing beyond what vLLM had.
                let end = barrier.unwrap_or(lease.local);
                request.barrier = Some(end - end % hit_tokens);
            }
        } else {
            session.savings.loaded(lease.tokens);
        }
        if !dropped.is_empty() {
            session.log.record(|| trace::line("drop", &[("keys", names(dropped)), ("reason", "corrupt".into())]));
        }
        session.log.record(|| {
            let ok = !failed && !lease.doomed;
            trace::line("load_done", &[("req", Value::from(id)), ("ok", ok.into()), ("keys", names(keys))])
        });
        true
    }
}

/// The order for a load that cannot work: the workers report that it failed.
pub(super) fn doomed(id: &str) -> Load {
    Load { request: id.to_owned(), doomed: true, copies: Vec::new() }
}

/// Where a hit ends, and whether its part on disk is to be loaded; `None`: it has none.
fn reach(tiers: &Tiers, grouping: &Grouping, request: &RequestState, local: u32, limit: u32) -> (u32, Option<bool>) {
    let residency = &tiers.dram;
    let below = tiers.disk.as_ref().filter(|disk| disk.medium.settings.load_policy != LoadPolicy::Never);
    let both = Sources { residency, extents: below.map(|disk| &disk.medium.extents) };
    let end = hit::resume_at(both, grouping, &request.hashes, local, limit);
    let Some(disk) = below.filter(|_| end > local) else { return (end, None) };
    let without = hit::resume_at(Sources { residency, extents: None }, grouping, &request.hashes, local, limit);
    if without >= end {
        return (end, None);
    }
    let tokens = end - without;
    let blocks: u64 = grouping.groups.iter().map(|group| u64::from(group.blocks_needed(without, end))).sum();
    let bytes = blocks * disk.medium.extent_bytes();
    let loads = disk.medium.settings.load_policy.loads(&disk.medium.rates, tokens, bytes, disk.queued_bytes());
    (if loads { end } else { without }, Some(loads))
}

/// Decides where each block of an admitted request comes from. Reads only.
fn plan(tiers: &Tiers, grouping: &Grouping, request: &RequestState, admission: Admission<'_>) -> LoadPlan {
    let (local, external) = (request.local, admission.external);
    let (mut blocks, mut doomed) = (Vec::new(), false);
    for (group, spec) in grouping.groups.iter().enumerate() {
        let (first, last) = (local / spec.block_tokens, (local + external) / spec.block_tokens);
        let destinations = admission.destinations.get(group).map_or(&[][..], Vec::as_slice);
        // vLLM gives no block to what lies before a window: null blocks lead the way.
        let mut known = destinations.iter().take_while(|block| **block == 0).count().min((last - first) as usize);
        let from = first + known as u32;
        for (key, number) in request.keys(grouping, group, from, last).zip(from..) {
            let destination = destinations.get(known);
            known += 1;
            let Some(destination) = destination.filter(|block| **block != 0) else { continue };
            match tiers.source(&key) {
                Some(source) => blocks.push(PlannedBlock {
                    key,
                    destination: *destination,
                    first_token: number * spec.block_tokens,
                    source,
                }),
                None => doomed = true,
            }
        }
        doomed |= known != (last - first) as usize || destinations.len() < known;
    }
    if tiers.disk.is_some() {
        // In prefix order over all groups: the first bytes that are needed are the first that are
        // read.
        blocks.sort_by_key(|block| block.first_token);
    }
    LoadPlan { blocks, doomed }
}

/// Holds what a plan names, makes room for what comes from disk, and orders its reads. `user`,
/// `prompt_tokens`: of the request.
fn commit(tiers: &mut Tiers, plan: &LoadPlan, id: &str, (user, prompt_tokens): (User, u32)) -> Committed {
    let mut committed = Committed { doomed: plan.doomed, ..Committed::default() };
    if plan.doomed {
        return committed;
    }
    // First what is here, so that making room for the rest cannot evict it.
    for block in &plan.blocks {
        if let Source::Slot(slot) | Source::Restoring(slot) = block.source {
            tiers.dram.pin(slot, user);
            committed.held.push((slot, block.first_token));
        }
    }
    committed.evicted = make_room(tiers, plan, user);
    let mut reads: Vec<ReadPart> = Vec::new();
    // The slot of each group's last block so far: the next one follows it.
    let mut parents: Vec<Option<SlotIndex>> = Vec::new();
    for PlannedBlock { key, destination, first_token, source } in &plan.blocks {
        let group = usize::from(key.group.0);
        parents.resize(parents.len().max(group + 1), None);
        let provenance = Provenance { parent: parents[group], prompt_tokens };
        let (slot, generation, flags) = match *source {
            Source::Slot(slot) => (slot, tiers.dram.generation(slot), verify_flag(tiers, slot)),
            Source::Restoring(slot) => (slot, tiers.dram.generation(slot), FOLLOW | verify_flag(tiers, slot)),
            Source::Extent(extent) => {
                let wanted = Wanted { key: *key, extent, token: *first_token, request: id, user, provenance };
                let Some(part) = plan_read(tiers, wanted) else {
                    // Neither a slot of its own nor a window.
                    committed.doomed = true;
                    continue;
                };
                let (slot, generation) = (part.slot, part.generation);
                if part.window {
                    committed.window.push(*key);
                } else {
                    committed.own.push(*key);
                    committed.held.push((slot, *first_token));
                    reads.push(part);
                }
                (slot, generation, FOLLOW)
            }
        };
        // A slot of the window is none of the tier's.
        parents[group] = tiers.dram.key(slot).is_some_and(|held| held == *key).then_some(slot);
        committed.copies.push(BlockCopy {
            slot: slot.0,
            generation: generation.0,
            block: *destination,
            group: key.group.0,
            flags,
        });
    }
    if let Some(disk) = &mut tiers.disk {
        disk.restores.submit(&mut disk.medium, reads);
        disk.restores.advance_window(&mut disk.medium, &mut tiers.dram);
    }
    committed
}

fn verify_flag(tiers: &Tiers, slot: SlotIndex) -> u16 {
    if tiers.dram.unverified(slot) { VERIFY } else { 0 }
}

fn plan_read(tiers: &mut Tiers, wanted: Wanted<'_>) -> Option<ReadPart> {
    let disk = tiers.disk.as_mut()?;
    disk.restores.plan_read(&mut disk.medium, &mut tiers.dram, wanted)
}

/// Empties slots for the blocks that only the disk has. What is gone from memory is as recent on
/// disk as it was there.
fn make_room(tiers: &mut Tiers, plan: &LoadPlan, user: User) -> Vec<BlockKey> {
    if tiers.disk.is_none() {
        return Vec::new();
    }
    // A block that is being offloaded has a slot already.
    let needs_slot =
        |block: &&PlannedBlock| matches!(block.source, Source::Extent(_)) && tiers.dram.find_any(&block.key).is_none();
    let count = plan.blocks.iter().filter(needs_slot).count();
    let evicted = tiers.dram.make_room(count, user);
    for key in &evicted {
        if let Some(extent) = tiers.on_disk(key) {
            tiers.touch_on_disk(&[extent]);
        }
    }
    evicted
}

/// Counts an admitted load: what comes from disk each time, hits and misses once for each lookup,
/// when it is known what vLLM took. Returns the tokens that come from disk.
fn count(counters: &mut Counters, requests: &mut Requests, id: &str, external: u32, committed: &Committed) -> u32 {
    let grouping = requests.grouping();
    let on_disk = || committed.own.iter().chain(&committed.window);
    // Tokens are counted in the first group that needs its whole prefix, else in the first.
    let group = grouping.groups.iter().position(GroupSpec::needs_whole_prefix).unwrap_or(0);
    let of_group = on_disk().filter(|key| usize::from(key.group.0) == group).count() as u32;
    let tokens = (of_group * grouping.groups[group].block_tokens).min(external);
    let blocks = on_disk().count() as u64;
    counters.nvme_hit_blocks += blocks;
    counters.nvme_hit_tokens += u64::from(tokens);
    if let Some(request) = requests.get_mut(id) {
        request.disk_tokens = tokens;
        counters.of_mut(request.owner.0).nvme_hit_tokens += u64::from(tokens);
    }
    count_lookup(counters, requests, id, external, (blocks, tokens));
    tokens
}

/// Counts hits and misses, once for each lookup. `on_disk`: blocks and tokens of `external` that
/// come from disk and are counted there.
pub(super) fn count_lookup(
    counters: &mut Counters,
    requests: &mut Requests,
    id: &str,
    external: u32,
    on_disk: (u64, u32),
) {
    // A request that is not known was left out, and is counted as such.
    let Some(request) = requests.get_mut(id) else { return };
    if std::mem::replace(&mut request.counted, true) {
        return;
    }
    request.first_hit = FirstHit { local: request.local, dram: external - on_disk.1, nvme: on_disk.1 };
    let (decision, reached, hashes) = (request.decision, request.local + external, request.hashes.len() as u64);
    let owner = request.owner;
    let grouping = requests.grouping();
    let known = (hashes * u64::from(grouping.hash_tokens)) as u32;
    let whole = (known - known % grouping.hit_tokens).max(reached);
    let blocks = |from, to| grouping.groups.iter().map(|group| u64::from(group.blocks_needed(from, to))).sum::<u64>();
    match decision {
        Some(true) => counters.load_decisions += 1,
        Some(false) => counters.recompute_decisions += 1,
        None => {}
    }
    counters.hit_tokens += u64::from(external - on_disk.1);
    counters.hit_blocks += blocks(reached - external, reached).saturating_sub(on_disk.0);
    counters.miss_tokens += u64::from(whole - reached);
    counters.miss_blocks += blocks(reached, whole);
    let of_owner = counters.of_mut(owner.0);
    of_owner.hit_tokens += u64::from(external - on_disk.1);
    of_owner.miss_tokens += u64::from(whole - reached);
}

/// The operation log's line of a lookup.
fn lookup_line(requests: &Requests, id: &str, [local, tokens, limit]: [u32; 3], answer: Hit) -> Value {
    let grouping = requests.grouping();
    let keys = |group: usize| {
        let blocks = tokens / grouping.groups[group].block_tokens;
        names(requests.get(id).into_iter().flat_map(|request| request.keys(grouping, group, 0, blocks)))
    };
    let hit = match answer {
        Hit::Tokens(tokens) => tokens.into(),
        Hit::AskAgain => Value::Null,
    };
    trace::line(
        "lookup",
        &[
            ("req", id.into()),
            ("local", local.into()),
            ("num_tokens", tokens.into()),
            ("max_hit", limit.into()),
            ("keys", (0..grouping.groups.len()).map(keys).collect()),
            ("hit", hit),
        ],
    )
}

/// The operation log's line of a load; of one that holds and reads nothing, without keys.
fn load_line(id: &str, [local, external]: [u32; 2], plan: &LoadPlan, committed: &Committed, with_disk: bool) -> Value {
    let Committed { held, own, window, evicted, .. } = committed;
    let does_anything = !held.is_empty() || !own.is_empty() || !window.is_empty();
    let keys = names(plan.blocks.iter().filter(|_| does_anything).map(|block| block.key));
    let mut fields =
        vec![("req", Value::from(id)), ("local", local.into()), ("external", external.into()), ("keys", keys)];
    if with_disk {
        fields.push(("restore", names(own.iter().copied())));
        fields.push(("window", names(window.iter().copied())));
        fields.push(("evicted", names(evicted.iter().copied())));
    }
    trace::line("load", &fields)
}
