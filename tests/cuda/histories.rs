//! Random histories of steps, offloads, fences and loads, on a device that does things late and out
//! of order.

use kvcellar_block::plan::{BlockCopy, StepPlan};
use kvcellar_engine::pool::slot_table::Fill;

use crate::maker::{assumed, with_kernel};
use crate::vllm::{Vllm, load};
use kvcellar_testkit::copies::cache::Shape;
use kvcellar_testkit::copies::ledger::until;
use kvcellar_testkit::copies::scene::Scene;
use kvcellar_testkit::random::Random;
use kvcellar_testkit::stub_cuda::{Mutation, Stub};

const BLOCKS: u32 = 12;
const SLOTS: u32 = 10;

#[derive(Clone, Copy)]
enum Slot {
    Free,
    Filling(BlockCopy, u8),
    Filled(BlockCopy, u8),
    Loading(BlockCopy, u8),
}

pub(crate) struct History<'a> {
    pub(crate) vllm: Vllm<'a>,
    random: Random,
    /// What the last step wrote to each block; none: not known.
    blocks: Vec<Option<u8>>,
    slots: Vec<Slot>,
    byte: u8,
    requests: u32,
    /// Bytes that were not what was written.
    pub(crate) mismatches: u32,
    pub(crate) failed: u32,
    pub(crate) loaded: u32,
}

impl<'a> History<'a> {
    pub(crate) fn new(vllm: Vllm<'a>, random: Random) -> Self {
        Self {
            vllm,
            random,
            blocks: vec![None; BLOCKS as usize],
            slots: vec![Slot::Free; SLOTS as usize],
            byte: 0,
            requests: 0,
            mismatches: 0,
            failed: 0,
            loaded: 0,
        }
    }

    /// What the engine would notice before its next step.
    pub(crate) fn notice(&mut self) {
        let results = self.vllm.worker.take_results();
        for slot in 0..SLOTS {
            let line = self.vllm.scene.line(slot);
            match self.slots[slot as usize] {
                Slot::Filling(copy, byte) if line.fill(1) == Fill::Done => {
                    self.vllm.touch_slot(slot, false);
                    self.mismatches += u32::from(!self.vllm.slot_is(slot, byte));
                    line.publish();
                    self.slots[slot as usize] = Slot::Filled(copy, byte);
                }
                Slot::Filling(..) if line.fill(1) == Fill::Failed => {
                    self.failed += 1;
                    self.vllm.touch_slot(slot, true);
                    line.clear();
                    self.slots[slot as usize] = Slot::Free;
                }
                Slot::Loading(copy, byte) if results.finished.contains(&name(&copy)) => {
                    let failed = results.failed.contains(&name(&copy));
                    self.failed += u32::from(failed);
                    self.loaded += u32::from(!failed);
                    self.mismatches += u32::from(!failed && !self.vllm.block_is(copy.block, byte));
                    self.blocks[copy.block as usize] = (!failed).then_some(byte);
                    self.vllm.touch_slot(slot, true);
                    line.clear();
                    self.slots[slot as usize] = Slot::Free;
                }
                _ => {}
            }
        }
    }

    fn is_loading(&self, block: u32) -> bool {
        self.slots.iter().any(|slot| matches!(slot, Slot::Loading(copy, _) if copy.block == block))
    }

    /// The orders that may still read a block.
    fn fences(&self, block: u32) -> impl Iterator<Item = BlockCopy> + '_ {
        self.slots.iter().filter_map(move |slot| match slot {
            Slot::Filling(copy, _) if copy.block == block => Some(*copy),
            _ => None,
        })
    }

    fn free_slot(&self) -> Option<u32> {
        (0..SLOTS).find(|slot| matches!(self.slots[*slot as usize], Slot::Free))
    }

    fn store(&mut self, block: u32, byte: u8) -> Option<BlockCopy> {
        let slot = self.free_slot()?;
        let copy = self.vllm.scene.begin(slot, 0, block);
        self.slots[slot as usize] = Slot::Filling(copy, byte);
        Some(copy)
    }

    pub(crate) fn step(&mut self) {
        self.notice();
        let mut plan = StepPlan::default();
        let mut blocks: Vec<u32> = (0..BLOCKS).filter(|block| !self.is_loading(*block)).collect();
        self.random.shuffle(&mut blocks);
        let written: Vec<u32> = blocks.split_off(blocks.len() - blocks.len().min(3));
        plan.waits.extend(written.iter().flat_map(|block| self.fences(*block)));
        // A load into a block that nobody writes in this step.
        if let Some(target) = blocks.pop()
            && let Some(slot) = (0..SLOTS).find(|slot| matches!(self.slots[*slot as usize], Slot::Filled(..)))
            && let Slot::Filled(copy, byte) = self.slots[slot as usize]
        {
            plan.waits.extend(self.fences(target));
            self.requests += 1;
            let copy = BlockCopy { block: target, ..copy };
            plan.loads.push(load(&name(&copy), &[copy]));
            self.slots[slot as usize] = Slot::Loading(copy, byte);
            self.blocks[target as usize] = None;
        }
        // Blocks of an earlier step, read by this one.
        let reads: Vec<u32> =
            blocks.iter().copied().filter(|block| self.blocks[*block as usize].is_some()).take(2).collect();
        if let Some(block) = blocks.iter().copied().find(|block| self.fences(*block).next().is_none())
            && let Some(byte) = self.blocks[block as usize]
        {
            plan.stores_before.extend(self.store(block, byte));
        }
        let mut writes = Vec::new();
        for block in written {
            self.byte = self.byte.wrapping_add(1).max(1);
            writes.push((block, self.byte));
            self.blocks[block as usize] = Some(self.byte);
            if self.random.below(2) == 0 {
                plan.stores_after.extend(self.store(block, self.byte));
            }
        }
        self.vllm.step(&plan, &reads, &writes);
    }

    /// Runs to where everything is answered.
    pub(crate) fn end(&mut self) {
        until("everything is answered", || {
            self.notice();
            !self.slots.iter().any(|slot| matches!(slot, Slot::Filling(..) | Slot::Loading(..)))
        });
        until("nothing is in flight", || self.vllm.worker.in_flight() == 0);
    }
}

/// A slot is loaded once in each of its generations.
fn name(copy: &BlockCopy) -> String {
    format!("{}-{}", copy.slot, copy.generation)
}

pub(crate) fn scene() -> Scene {
    Scene::new(&[(Shape { blocks: BLOCKS as usize, page: 48, ..Shape::plain(3) }, None)], SLOTS.into())
}

/// How much the checker found, how many bytes were wrong, and how many loads worked. `by_kernel`:
/// all fragments go by the kernel, both ways.
fn play(seed: u64, steps: u32, mutation: Mutation, by_kernel: bool) -> (i32, String, u32, u32) {
    let stub = Stub::take(seed);
    let scene = scene();
    let options = if by_kernel { with_kernel(4096, 4096) } else { assumed() };
    let mut history = History::new(Vllm::pinned_with(&stub, &scene, options), Random::new(seed));
    stub.mutate(mutation);
    for _ in 0..steps {
        history.step();
    }
    history.end();
    stub.finish();
    let (mismatches, loaded) = (history.mismatches, history.loaded);
    drop(history);
    let (count, first) = stub.wrongs();
    (count, first, mismatches, loaded)
}

#[test]
fn whatever_the_device_does_first_the_bytes_are_right() {
    let mut random = Random::of_test();
    let mut loads = 0;
    for at in 0..16 {
        let seed = random.next();
        let (count, first, mismatches, loaded) = play(seed, 60, Mutation::None, at % 2 == 0);
        assert_eq!((count, mismatches), (0, 0), "history {seed}: {first}");
        loads += loaded;
    }
    assert!(loads > 50, "only {loads} loads: the histories show little");
}

#[test]
fn histories_find_each_missing_rule() {
    let mut random = Random::of_test();
    let seed = random.next();
    for mutation in [Mutation::CopiesWaitForNothing, Mutation::EventsAreOverAtOnce, Mutation::ComputeWaitsForNothing] {
        for by_kernel in [false, true] {
            let found = (0..10).any(|at| play(seed + at, 60, mutation, by_kernel).0 > 0);
            assert!(found, "{mutation:?} was not found in 10 histories from {seed}");
        }
    }
    // Where fragments are packed first, two of our own streams have to wait for each other.
    let mutation = Mutation::CopiesIgnoreEachOther;
    let found = |by_kernel: bool| (0..10).any(|at| play(seed + at, 60, mutation, by_kernel).0 > 0);
    assert!(found(true) && !found(false), "histories from {seed}");
}
