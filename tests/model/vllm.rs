//! A simulated vLLM: requests, block tables, a memory of contents, and one worker that copies late
//! and out of order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use kvcellar_block::kinds::{ChunkedLocal, SlidingWindow};
use kvcellar_block::plan::{BlockCopy, StepPlan};
use kvcellar_block::{BlockHash, BlockKey, GroupIndex, GroupKind, GroupSpec, Grouping, SlotIndex};
use kvcellar_engine::config::Config;
use kvcellar_engine::event_log::Run;
use kvcellar_engine::pool::memory::{HeapSlots, SlotMemory};
use kvcellar_engine::tier::load::Hit;
use kvcellar_engine::tier::offload::{GroupOffer, Offer, Start};
use kvcellar_engine::tier::{Arrival, TierEngine};
use proptest::prelude::*;

use super::dram::{Dram, Life, Name, is_ever_needed, is_needed, name};

type Check = Result<(), TestCaseError>;

#[derive(Debug, Clone)]
pub(crate) enum Op {
    Arrive { family: u8, blocks: u8, tail: u8 },
    Admit(u8),
    Step(u8),
    Copy { which: u8, fail: bool },
    Finish(u8),
    Preempt(u8),
    Reset,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting,
    Loading,
    Running,
    /// Finished while its load is under way: vLLM keeps its blocks until that ends.
    Abandoned,
}

#[derive(Debug)]
struct Request {
    id: String,
    serial: u32,
    family: u8,
    tokens: u32,
    phase: Phase,
    computed: u32,
    local: u32,
    tables: Vec<Vec<u32>>,
    offered: Vec<u32>,
    barrier: u32,
    tainted: bool,
}

/// The model's view of an offload batch.
#[derive(Debug)]
struct Batch {
    request: String,
    lives: Vec<Life>,
    waiting: BTreeSet<(u32, u32)>,
    failed: BTreeSet<usize>,
    order: Vec<(u32, u32)>,
    stale: bool,
}

#[derive(Debug)]
struct Load {
    request: String,
    copies: Vec<BlockCopy>,
    lives: Vec<(Life, u32)>,
    expected: Vec<Name>,
}

pub(crate) struct Simulation {
    engine: TierEngine,
    grouping: Grouping,
    memory: Arc<HeapSlots>,
    dram: Dram,
    requests: Vec<Request>,
    finished: BTreeMap<String, (u8, u32, u32)>,
    serial: u32,
    free_blocks: Vec<u32>,
    blocks: BTreeMap<u32, Name>,
    slots: BTreeMap<u32, Name>,
    /// Offloads the worker has not carried out, with the content they must find.
    stores: Vec<(BlockCopy, Name)>,
    loads: Vec<Load>,
    batches: VecDeque<Batch>,
    handed_out: Vec<u32>,
    /// Contents that the next forward pass writes.
    writes: Vec<(u32, Name)>,
    announced: BTreeSet<Name>,
    /// The model runner writes what it was handed before it waits for anybody.
    writes_early: bool,
}

/// What an early write leaves in a block.
const ZEROES: &str = "zeroes";

/// The first block that vLLM has memory for, when it makes room up to `tokens`. `computed`: tokens
/// from which it goes on.
fn first_real(spec: &GroupSpec, computed: u32, tokens: u32) -> u32 {
    let first_token = match spec.kind {
        GroupKind::Full => 0,
        GroupKind::SlidingWindow(SlidingWindow { window, extra }) => (computed + 1).saturating_sub(window + extra),
        GroupKind::ChunkedLocal(ChunkedLocal { chunk }) => computed - computed % chunk,
        // The state goes from block to block.
        GroupKind::State => tokens.saturating_sub(1),
    };
    first_token / spec.block_tokens
}

/// Families share their first hashes in pairs and then go apart.
fn hash(family: u8, index: u32) -> BlockHash {
    let mut bytes = [0; 32];
    bytes[0] = if index < 3 { family % 2 } else { 10 + family };
    bytes[1] = index as u8;
    // Mixed, as real hashes are.
    bytes[8] = bytes[0].wrapping_mul(31) ^ bytes[1];
    BlockHash::new(&bytes).expect("32 bytes")
}

impl Simulation {
    pub(crate) fn new(grouping: Grouping, slots: u32) -> Self {
        Self::with_rules(grouping.clone(), grouping, slots)
    }

    /// With other rules for the engine than for vLLM and the model: to see that wrong ones are
    /// noticed.
    pub(crate) fn with_rules(grouping: Grouping, engine_rules: Grouping, slots: u32) -> Self {
        let memory = Arc::new(HeapSlots::new(slots, 1));
        let mut engine = TierEngine::new(&Config::default(), engine_rules).expect("valid groups");
        engine.open(Arc::clone(&memory) as Arc<dyn SlotMemory>);
        Self {
            engine,
            grouping,
            memory,
            dram: Dram::new(slots),
            requests: Vec::new(),
            finished: BTreeMap::new(),
            serial: 0,
            free_blocks: (1..4000).rev().collect(),
            blocks: BTreeMap::new(),
            slots: BTreeMap::new(),
            stores: Vec::new(),
            loads: Vec::new(),
            batches: VecDeque::new(),
            handed_out: Vec::new(),
            writes: Vec::new(),
            announced: BTreeSet::new(),
            writes_early: false,
        }
    }

    /// With a model runner that writes blocks before copies of them can be waited for.
    pub(crate) fn writing_early(self) -> Self {
        Self { writes_early: true, ..self }
    }

    fn key(&self, family: u8, group: usize, block: u32) -> BlockKey {
        let index = self.grouping.hash_index(group, block) as u32;
        BlockKey { hash: hash(family, index), group: GroupIndex(group as u16) }
    }

    pub(crate) fn apply(&mut self, op: &Op) -> Check {
        match *op {
            Op::Arrive { family, blocks, tail } => self.arrive(family, u32::from(blocks) * 4 + u32::from(tail)),
            Op::Admit(which) => self.admit(which)?,
            Op::Step(tokens) => self.step(u32::from(tokens) * 3)?,
            Op::Copy { which, fail } => self.copy(which, fail)?,
            Op::Finish(which) => self.finish(which),
            Op::Preempt(which) => self.preempt(which),
            Op::Reset => self.reset(),
        }
        Ok(())
    }

    fn arrive(&mut self, family: u8, tokens: u32) {
        self.serial += 1;
        let id = format!("request-{}", self.serial);
        self.engine.add_request(&id, Arrival::default());
        let hashes: Vec<BlockHash> = (0..tokens / self.grouping.hash_tokens).map(|index| hash(family, index)).collect();
        self.engine.add_hashes(&id, &hashes);
        let groups = self.grouping.groups.len();
        self.requests.push(Request {
            id,
            serial: self.serial,
            family,
            tokens,
            phase: Phase::Waiting,
            computed: 0,
            local: 0,
            tables: vec![Vec::new(); groups],
            offered: vec![0; groups],
            barrier: u32::MAX,
            tainted: false,
        });
    }

    fn pick(&self, phase: Phase, which: u8) -> Option<usize> {
        let fitting: Vec<usize> =
            (0..self.requests.len()).filter(|index| self.requests[*index].phase == phase).collect();
        (!fitting.is_empty()).then(|| fitting[which as usize % fitting.len()])
    }

    /// Blocks up to `tokens`, null before the window as vLLM does it.
    fn extend_tables(&mut self, index: usize, tokens: u32) -> Vec<(usize, u32, u32)> {
        let mut fresh = Vec::new();
        for group in 0..self.grouping.groups.len() {
            let spec = self.grouping.groups[group].clone();
            let fresh_table = self.requests[index].tables[group].is_empty();
            let computed = if fresh_table { tokens } else { self.requests[index].computed };
            let real_from = first_real(&spec, computed, tokens);
            for block in self.requests[index].tables[group].iter_mut().take(real_from as usize) {
                if *block != 0 {
                    self.free_blocks.push(std::mem::take(block));
                }
            }
            let wanted = tokens.div_ceil(spec.block_tokens);
            while (self.requests[index].tables[group].len() as u32) < wanted {
                let number = self.requests[index].tables[group].len() as u32;
                let block = if number < real_from { 0 } else { self.free_blocks.pop().expect("enough blocks") };
                self.requests[index].tables[group].push(block);
                if block != 0 {
                    self.handed_out.push(block);
                    fresh.push((group, number, block));
                }
            }
        }
        fresh
    }

    fn free_tables(&mut self, index: usize) {
        for table in &mut self.requests[index].tables {
            // The last blocks are freed first, and reused last.
            self.free_blocks.extend(table.drain(..).rev().filter(|block| *block != 0));
        }
    }

    fn admit(&mut self, which: u8) -> Check {
        let Some(index) = self.pick(Phase::Waiting, which) else { return Ok(()) };
        let (id, family, tokens) = {
            let request = &mut self.requests[index];
            request.tainted = false;
            request.offered.fill(0);
            (request.id.clone(), request.family, request.tokens)
        };
        let most = self.grouping.hit_limit(tokens);
        let local = (u32::from(which) * 5 % (most + 1)) / self.grouping.hit_tokens * self.grouping.hit_tokens;
        let local = if which % 3 == 0 { local } else { 0 };
        self.requests[index].local = local;
        let hashes = tokens / self.grouping.hash_tokens;
        let keys = |group: usize, block: u32| {
            ((self.grouping.hash_index(group, block) as u32) < hashes).then(|| self.key(family, group, block))
        };
        let limit = most.min(self.requests[index].barrier);
        let expected = self.dram.resume_at(&self.grouping, &keys, local, limit).max(local) - local;
        let external = match self.engine.lookup(&id, tokens, local) {
            Hit::Tokens(found) => found,
            Hit::AskAgain => {
                let last = (local + expected) / self.grouping.groups[0].block_tokens - 1;
                let life = self.dram.visible(&self.key(family, 0, last));
                prop_assert!(life.is_some_and(|life| self.dram.is_pinned(life)), "asked to wait for nobody");
                return Ok(());
            }
        };
        prop_assert_eq!(external, expected, "hit of {} ({} tokens, local {})", id, tokens, local);
        if which % 4 == 1 {
            // vLLM has no blocks for it: it asks again, in the next step and whenever it likes.
            prop_assert_eq!(self.engine.lookup(&id, tokens, local), Hit::Tokens(expected), "hit of {} again", id);
            return Ok(());
        }
        let end = local + external;
        let fresh = self.extend_tables(index, end);
        for (group, number, block) in fresh {
            if number < local / self.grouping.groups[group].block_tokens {
                self.writes.push((block, name(&self.key(family, group, number))));
            }
        }
        let tables: Vec<Vec<u32>> = (0..self.grouping.groups.len())
            .map(|group| {
                self.requests[index].tables[group][(local / self.grouping.groups[group].block_tokens) as usize..]
                    .to_vec()
            })
            .collect();
        self.engine.admit(&id, external, &tables);
        self.requests[index].computed = end;
        if external == 0 {
            self.requests[index].phase = Phase::Running;
            return self.step(0);
        }
        self.requests[index].phase = Phase::Loading;
        let serial = self.requests[index].serial;
        let mut load = Load { request: id, copies: Vec::new(), lives: Vec::new(), expected: Vec::new() };
        for (group, table) in tables.iter().enumerate() {
            let block_tokens = self.grouping.groups[group].block_tokens;
            for (offset, block) in table.iter().enumerate().filter(|(_, block)| **block != 0) {
                let number = local / block_tokens + offset as u32;
                let key = self.key(family, group, number);
                let life = self.dram.visible(&key).expect("a hit's blocks are visible");
                self.dram.pin(life, serial);
                load.lives.push((life, number * block_tokens));
                load.expected.push(name(&key));
                prop_assert_eq!(*block != 0, true);
            }
        }
        self.loads.push(load);
        self.step(0)
    }

    /// One scheduler step in which every running request computes up to `tokens` tokens.
    fn step(&mut self, tokens: u32) -> Check {
        let mut offers = Vec::new();
        for index in 0..self.requests.len() {
            if self.requests[index].phase != Phase::Running {
                continue;
            }
            let ready = self.end_of_step(self.requests[index].computed, tokens, self.requests[index].tokens);
            self.extend_tables(index, ready);
            if let Some(offer) = self.offer(index, ready) {
                offers.push((index, ready, offer));
            }
            self.write_computed(index, ready);
            self.requests[index].computed = ready;
        }
        self.engine.poll();
        self.poll();
        let handed_out = std::mem::take(&mut self.handed_out);
        if self.writes_early {
            self.engine.overwrite(handed_out.iter().copied());
        } else {
            self.engine.reallocate(handed_out.iter().copied());
        }
        for (index, _, groups) in offers {
            self.make_offer(index, groups, Start::AfterStep);
        }
        self.work(&handed_out)
    }

    /// Where a step of at most `tokens` tokens ends. With states it ends where a block does, unless
    /// it stays within one.
    fn end_of_step(&self, computed: u32, tokens: u32, all: u32) -> u32 {
        let ready = (computed + tokens).min(all);
        let unit = self.grouping.hit_tokens;
        let has_states = self.grouping.groups.iter().any(|group| group.kind == GroupKind::State);
        if has_states && ready / unit > computed / unit { ready - ready % unit } else { ready }
    }

    fn write_computed(&mut self, index: usize, ready: u32) {
        let family = self.requests[index].family;
        for group in 0..self.grouping.groups.len() {
            let block_tokens = self.grouping.groups[group].block_tokens;
            for number in self.requests[index].computed / block_tokens..ready.div_ceil(block_tokens) {
                let block = self.requests[index].tables[group][number as usize];
                if block != 0 {
                    let whole = (number + 1) * block_tokens <= ready;
                    let content =
                        if whole { name(&self.key(family, group, number)) } else { format!("part of {index}") };
                    self.writes.push((block, content));
                }
            }
        }
    }

    fn offer(&mut self, index: usize, ready: u32) -> Option<Vec<GroupOffer>> {
        let request = &mut self.requests[index];
        let mut groups = Vec::new();
        for (group, spec) in self.grouping.groups.iter().enumerate() {
            let (first, last) = (request.offered[group], ready / spec.block_tokens);
            let blocks = request.tables[group].get(first as usize..last as usize).map_or(Vec::new(), <[u32]>::to_vec);
            request.offered[group] = first + blocks.len() as u32;
            groups.push(GroupOffer { first, blocks, extra: Vec::new() });
        }
        groups.iter().any(|group| !group.blocks.is_empty()).then_some(groups)
    }

    /// Hands an offer to the engine, and lets the model do what is documented.
    fn make_offer(&mut self, index: usize, groups: Vec<GroupOffer>, start: Start) {
        let request = &self.requests[index];
        let (id, serial, family, tainted) = (request.id.clone(), request.serial, request.family, request.tainted);
        let loading = self.loads.iter().any(|load| load.request == id);
        self.engine.offer(&Offer { request: &id, tokens_from: 0, tokens: Vec::new(), groups: groups.clone() }, start);
        if tainted || loading {
            return;
        }
        let mut touched = Vec::new();
        let mut missing = Vec::new();
        for (group, offered) in groups.iter().enumerate() {
            for (number, block) in (offered.first..).zip(&offered.blocks).filter(|(_, block)| **block != 0) {
                let key = self.key(family, group, number);
                match self.dram.visible(&key) {
                    Some(life) => touched.push(life),
                    None if self.dram.knows(&key) => {}
                    None if !is_ever_needed(&self.grouping, group, number) => {}
                    None => missing.push((key, *block)),
                }
            }
        }
        self.dram.touch(&touched, serial);
        let mut lives = Vec::new();
        for (key, _) in &missing {
            match self.dram.reserve(key, serial) {
                Some(life) => lives.push(life),
                None => break,
            }
        }
        if !lives.is_empty() {
            let batch = Batch {
                request: id,
                lives,
                waiting: BTreeSet::new(),
                failed: BTreeSet::new(),
                order: Vec::new(),
                stale: false,
            };
            self.batches.push_back(batch);
        }
    }

    /// The worker's part of a step: early offloads, fences, forward pass, loads, offloads.
    fn work(&mut self, handed_out: &[u32]) -> Check {
        let plan = StepPlan::decode(&self.engine.take_plan()).expect("a plan is readable");
        let mut open = self.batches.iter().position(|batch| batch.order.is_empty()).unwrap_or(self.batches.len());
        for copy in plan.stores_before.iter().chain(&plan.stores_after) {
            prop_assert!(open < self.batches.len(), "the engine stores a block that the model does not: {:?}", copy);
            while self.batches[open].order.len() == self.batches[open].lives.len() {
                open += 1;
                prop_assert!(
                    open < self.batches.len(),
                    "the engine stores a block that the model does not: {:?}",
                    copy
                );
            }
            self.batches[open].order.push((copy.slot, copy.generation));
            self.batches[open].waiting.insert((copy.slot, copy.generation));
        }
        for copy in plan.stores_before {
            let content = self.blocks.get(&copy.block).cloned().unwrap_or_default();
            self.stores.push((copy, content));
        }
        if self.writes_early {
            self.write_early(handed_out);
        }
        for wait in plan.waits {
            if let Some(at) = self.stores.iter().position(|(copy, _)| *copy == wait) {
                self.store(at, false)?;
            }
        }
        for (block, content) in std::mem::take(&mut self.writes) {
            self.blocks.insert(block, content);
        }
        for planned in plan.loads {
            prop_assert!(!planned.doomed, "a load of visible blocks is never doomed");
            let load = self.loads.iter_mut().find(|load| load.request == planned.request).expect("planned by us");
            prop_assert_eq!(planned.copies.len(), load.expected.len());
            load.copies = planned.copies;
        }
        for copy in plan.stores_after {
            let content = self.blocks.get(&copy.block).cloned().unwrap_or_default();
            self.stores.push((copy, content));
        }
        Ok(())
    }

    /// Whoever still has to read one of these blocks reads zeroes, and must come to nothing.
    fn write_early(&mut self, handed_out: &[u32]) {
        for (copy, content) in self.stores.iter_mut().filter(|(copy, _)| handed_out.contains(&copy.block)) {
            ZEROES.clone_into(content);
            let order = (copy.slot, copy.generation);
            let batch = self.batches.iter_mut().find(|batch| batch.waiting.contains(&order));
            let batch = batch.expect("every order belongs to a batch");
            batch.failed.insert(batch.order.iter().position(|other| *other == order).expect("in it"));
        }
        for block in handed_out {
            self.blocks.insert(*block, ZEROES.to_owned());
        }
    }

    fn store(&mut self, at: usize, fail: bool) -> Check {
        let (copy, expected) = self.stores.remove(at);
        let line = self.memory.line(SlotIndex(copy.slot));
        prop_assert!(line.may_write(copy.generation), "an order came too late: its slot is somebody else's");
        let content = self.blocks.get(&copy.block).cloned().unwrap_or_default();
        // What was written early may have been written again.
        if expected != ZEROES {
            prop_assert_eq!(&content, &expected, "block {} was overwritten before it was copied", copy.block);
        }
        self.slots.insert(copy.slot, content);
        line.answer(0, !fail);
        let order = (copy.slot, copy.generation);
        let batch = self.batches.iter_mut().find(|batch| batch.waiting.contains(&order));
        let batch = batch.expect("every order belongs to a batch");
        batch.waiting.remove(&order);
        if fail {
            let position = batch.order.iter().position(|order| *order == (copy.slot, copy.generation)).expect("in it");
            batch.failed.insert(position);
        }
        Ok(())
    }

    fn copy(&mut self, which: u8, fail: bool) -> Check {
        if which % 2 == 0 && !self.stores.is_empty() {
            self.store(which as usize / 2 % self.stores.len(), fail)?;
        } else if !self.loads.is_empty() {
            self.load(which as usize / 2 % self.loads.len(), fail)?;
        }
        self.engine.poll();
        self.poll();
        Ok(())
    }

    fn load(&mut self, at: usize, fail: bool) -> Check {
        let load = self.loads.remove(at);
        for (copy, expected) in load.copies.iter().zip(&load.expected) {
            prop_assert!(self.memory.line(SlotIndex(copy.slot)).may_read(copy.generation), "a held slot was taken");
            let content = self.slots.get(&copy.slot).cloned().unwrap_or_default();
            prop_assert_eq!(&content, expected, "a block was served under another's key");
            self.blocks.insert(copy.block, content);
        }
        // What needs no block cannot fail: a hit that ends with a chunk.
        let fail = fail && !load.copies.is_empty();
        let bad = load.copies.len() / 2;
        if fail {
            self.memory.line(SlotIndex(load.copies[bad].slot)).refuse_load(0);
        }
        // As the connector does: what was answered before the load ended is settled before it.
        self.engine.poll();
        self.engine.load_ended(&load.request, fail);
        self.poll();
        let lives: Vec<Life> = load.lives.iter().map(|(life, _)| *life).collect();
        if fail {
            // Every block in the slot whose bytes were refused goes.
            self.dram.discard(load.lives[bad].0);
        }
        self.dram.unpin(&lives);
        let index = self.requests.iter().position(|request| request.id == load.request).expect("known");
        if self.requests[index].phase == Phase::Abandoned {
            self.free_tables(index);
            self.requests.remove(index);
        } else if fail {
            let end = load.lives[bad].1;
            self.requests[index].barrier = end - end % self.grouping.hit_tokens;
            self.free_tables(index);
            self.requests[index].phase = Phase::Waiting;
            self.requests[index].computed = 0;
        } else {
            self.requests[index].phase = Phase::Running;
        }
        Ok(())
    }

    fn finish(&mut self, which: u8) {
        let phase = if which % 4 == 0 { Phase::Loading } else { Phase::Running };
        let Some(index) = self.pick(phase, which) else { return };
        self.engine.poll();
        self.poll();
        let ready = self.requests[index].computed;
        if let Some(groups) = self.offer(index, ready) {
            self.make_offer(index, groups, Start::BeforeStep);
        }
        let request = &self.requests[index];
        let (id, family, tokens, serial) = (request.id.clone(), request.family, request.tokens, request.serial);
        self.finished.insert(id.clone(), (family, tokens, serial));
        self.engine.finish(&id, tokens, tokens);
        self.retire_if_done(&id);
        if phase == Phase::Loading {
            self.requests[index].phase = Phase::Abandoned;
        } else {
            self.free_tables(index);
            self.requests.remove(index);
        }
    }

    fn preempt(&mut self, which: u8) {
        let Some(index) = self.pick(Phase::Running, which) else { return };
        self.free_tables(index);
        self.requests[index].phase = Phase::Waiting;
        self.requests[index].computed = 0;
    }

    fn reset(&mut self) {
        self.engine.reset();
        self.poll();
        self.dram.reset();
        for batch in &mut self.batches {
            batch.stale = true;
        }
        for request in &mut self.requests {
            request.tainted = true;
        }
    }

    /// The model's side of `TierEngine::poll`: whole batches, oldest first.
    fn poll(&mut self) {
        while self.batches.front().is_some_and(|batch| !batch.order.is_empty() && batch.waiting.is_empty()) {
            let batch = self.batches.pop_front().expect("there is a front");
            let (mut filled, mut lost) = (Vec::new(), Vec::new());
            for (position, life) in batch.lives.iter().enumerate() {
                if batch.stale || batch.failed.contains(&position) { lost.push(*life) } else { filled.push(*life) }
            }
            for life in lost {
                self.dram.lost(life);
            }
            self.dram.filled(&filled);
            self.retire_if_done(&batch.request);
        }
    }

    fn retire_if_done(&mut self, id: &str) {
        let Some((family, tokens, serial)) = self.finished.get(id).copied() else { return };
        if self.batches.iter().any(|batch| batch.request == id) {
            return;
        }
        self.finished.remove(id);
        let (mut warm, mut cold) = (Vec::new(), Vec::new());
        let end = self.grouping.hit_limit(tokens);
        for (group, spec) in self.grouping.groups.iter().enumerate() {
            for number in 0..tokens / spec.block_tokens {
                let Some(life) = self.dram.visible(&self.key(family, group, number)) else { continue };
                let is_lookahead = spec.eagle && number == end / spec.block_tokens;
                let needed = spec.kind == GroupKind::Full || is_needed(spec, number, end) || is_lookahead;
                if needed { warm.push(life) } else { cold.push(life) }
            }
        }
        self.dram.touch(&warm, serial);
        self.dram.cool(&cold);
    }

    pub(crate) fn check(&mut self) -> Check {
        self.engine.poll();
        self.poll();
        let order: Vec<_> = self.engine.eviction_order().iter().map(|(key, toucher)| (name(key), *toucher)).collect();
        prop_assert_eq!(order, self.dram.eviction_order(), "the order of eviction, and who used each block last");
        let gauges = self.engine.gauges();
        prop_assert_eq!(gauges.free_slots as usize, self.dram.free(), "free slots");
        prop_assert_eq!(gauges.filling_slots as usize, self.dram.filling(), "filling slots");
        prop_assert_eq!(gauges.pins as usize, self.dram.pins(), "pins");
        prop_assert_eq!(gauges.leases as usize, self.loads.len(), "leases");
        prop_assert_eq!(gauges.free_slots + gauges.filling_slots + gauges.filled_slots, gauges.total_slots);
        for run in self.engine.take_events() {
            match run {
                Run::Stored { group, hashes, .. } => {
                    for hash in hashes {
                        prop_assert!(self.announced.insert(name(&BlockKey { hash, group })), "stored twice");
                    }
                }
                Run::Removed { group, hashes, .. } => {
                    for hash in hashes {
                        prop_assert!(
                            self.announced.remove(&name(&BlockKey { hash, group })),
                            "removed but never stored"
                        );
                    }
                }
            }
        }
        prop_assert_eq!(&self.announced, &self.dram.visible_names(), "events tell another story than the tier");
        Ok(())
    }

    /// Everything ends: nothing may be held, fenced or half full afterwards.
    pub(crate) fn settle(&mut self) -> Check {
        self.step(0)?;
        while !self.stores.is_empty() {
            self.store(0, false)?;
        }
        while !self.loads.is_empty() {
            self.load(0, false)?;
        }
        while self.pick(Phase::Running, 1).is_some() {
            self.finish(1);
        }
        self.step(0)?;
        while !self.stores.is_empty() {
            self.store(0, false)?;
        }
        self.step(0)?;
        self.check()?;
        let gauges = self.engine.gauges();
        prop_assert_eq!((gauges.pins, gauges.leases, gauges.fences, gauges.filling_slots), (0, 0, 0, 0));
        prop_assert!(!self.engine.pending_work(), "an idle engine would step forever");
        Ok(())
    }
}
