//! The order of copies and steps, one rule at a time: kept by the copier, and missed by the
//! checker's leave when the rule is taken away.

use std::time::{Duration, Instant};

use kvcellar_block::Generation;
use kvcellar_block::plan::{BlockCopy, FOLLOW, StepPlan};
use kvcellar_engine::limits::JOBS_IN_FLIGHT_MAX;
use kvcellar_engine::pool::slot_table::Fill;

use crate::maker::assumed;
use crate::vllm::{Vllm, at_once, load};
use kvcellar_testkit::copies::cache::Shape;
use kvcellar_testkit::copies::ledger::until;
use kvcellar_testkit::copies::scene::Scene;
use kvcellar_testkit::stub_cuda::{Mutation, Stub};

fn stores_after(copies: &[BlockCopy]) -> StepPlan {
    StepPlan { stores_after: copies.to_vec(), ..StepPlan::default() }
}

/// Plays with everything as it is meant to be, then with the copier changed: the checker is quiet
/// first and speaks then. Bytes are right in an intact run; in the other they need not be.
fn checked(mutation: Mutation, play: impl Fn(&mut Vllm<'_>, bool)) {
    for mutation in [Mutation::None, mutation] {
        let stub = Stub::take(5);
        let scene = Scene::simple(8);
        let mut vllm = Vllm::pinned(&stub, &scene);
        stub.mutate(mutation);
        play(&mut vllm, mutation == Mutation::None);
        stub.mutate(Mutation::None);
        stub.finish();
        drop(vllm);
        let (count, first) = stub.wrongs();
        assert_eq!(count > 0, mutation != Mutation::None, "{mutation:?}: {count} found, first: {first}");
    }
}

#[test]
fn a_block_is_offloaded_after_the_step_that_computes_it() {
    checked(Mutation::CopiesWaitForNothing, |vllm, intact| {
        let copy = vllm.scene.begin(0, 0, 3);
        vllm.stub.hold(true);
        vllm.step(&stores_after(&[copy]), &[], &[(3, 7)]);
        vllm.stub.hold(false);
        assert_eq!(vllm.wait_for(&copy), Fill::Done);
        assert!(!intact || vllm.slot_is(0, 7));
    });
}

/// Blocks that a step completed are offloaded before the next one: their step may still be running
/// then.
#[test]
fn an_early_offload_comes_after_the_step_before() {
    checked(Mutation::CopiesWaitForNothing, |vllm, _| {
        let copy = vllm.scene.begin(0, 0, 3);
        vllm.stub.hold(true);
        vllm.step(&StepPlan::default(), &[], &[(3, 7)]);
        vllm.step(&StepPlan { stores_before: vec![copy], ..StepPlan::default() }, &[], &[(4, 8)]);
        vllm.stub.hold(false);
        assert_eq!(vllm.wait_for(&copy), Fill::Done);
    });
}

#[test]
fn a_load_comes_after_the_steps_before_its_allocation() {
    checked(Mutation::CopiesWaitForNothing, |vllm, intact| {
        let copy = vllm.scene.begin(0, 0, 3);
        vllm.step(&stores_after(&[copy]), &[], &[(3, 7)]);
        vllm.wait_for(&copy);
        vllm.scene.line(0).publish();
        // Block 5 belongs to a request whose last step has not run yet when the block is given to
        // the load.
        vllm.stub.hold(true);
        vllm.step(&StepPlan::default(), &[], &[(5, 9)]);
        let plan = StepPlan { loads: vec![load("a", &[BlockCopy { block: 5, ..copy }])], ..StepPlan::default() };
        vllm.step(&plan, &[], &[(6, 1)]);
        vllm.stub.hold(false);
        until("the load ends", || vllm.worker.take_results().finished == ["a"]);
        vllm.touch_slot(0, true);
        assert!(!intact || vllm.block_is(5, 7));
    });
}

/// A restore that ends while later steps run: its load still comes after the step before it was
/// given the block.
#[test]
fn a_followed_load_comes_after_the_steps_before_its_allocation() {
    checked(Mutation::CopiesWaitForNothing, |vllm, intact| {
        // A slot that is being filled from disk, with zeros.
        let copy = BlockCopy { flags: FOLLOW, ..vllm.scene.begin(0, 0, 5) };
        vllm.stub.hold(true);
        vllm.step(&StepPlan::default(), &[], &[(5, 9)]);
        let plan = StepPlan { loads: vec![load("a", &[copy])], ..StepPlan::default() };
        vllm.step(&plan, &[], &[(6, 1)]);
        vllm.scene.line(0).publish();
        vllm.scene.line(0).end_restore(Generation(copy.generation), true);
        vllm.step(&StepPlan::default(), &[], &[(6, 2)]);
        until("the load is handed over", || {
            vllm.stub.calls("cuMemcpyHtoDAsync_v2") + vllm.stub.calls("cuMemcpyBatchAsync") > 0
        });
        vllm.stub.hold(false);
        until("the load ends", || vllm.worker.take_results().finished == ["a"]);
        vllm.touch_slot(0, true);
        assert!(!intact || vllm.block_is(5, 0));
    });
}

#[test]
fn a_fence_makes_the_stream_wait_and_not_the_processor() {
    checked(Mutation::ComputeWaitsForNothing, |vllm, intact| {
        let copies = [0, 1, 2].map(|slot| vllm.scene.begin(slot, 0, slot));
        vllm.stub.hold(true);
        vllm.step(&stores_after(&copies), &[], &[(0, 7), (1, 7), (2, 7)]);
        let fence = StepPlan { waits: copies[..2].to_vec(), ..StepPlan::default() };
        at_once("a fence", || vllm.step(&fence, &[], &[(0, 8), (1, 8)]));
        assert!(copies.iter().all(|copy| vllm.scene.line(copy.slot).fill(1) == Fill::Pending));
        vllm.stub.hold(false);
        for copy in &copies {
            assert_eq!(vllm.wait_for(copy), Fill::Done);
            assert!(!intact || vllm.slot_is(copy.slot, 7));
        }
    });
}

/// vLLM's step waits for the fenced block, and not for all that was to be offloaded before it.
#[test]
fn a_fence_goes_before_what_else_is_queued() {
    let stub = Stub::take(6);
    let scene = Scene::new(&[(Shape { blocks: 40, ..Shape::plain(1) }, None)], 40);
    let mut vllm = Vllm::pinned(&stub, &scene);
    stub.hold(true);
    // Each step has its own mark, so each offload is a job of its own.
    let copies: Vec<BlockCopy> = (0..40)
        .map(|at| {
            let copy = scene.begin(at, 0, at);
            vllm.step(&stores_after(&[copy]), &[], &[(at, 7)]);
            copy
        })
        .collect();
    at_once("a fence", || vllm.step(&StepPlan { waits: vec![copies[39]], ..StepPlan::default() }, &[], &[(39, 8)]));
    let given = stub.calls("cuMemcpyDtoHAsync_v2");
    let bound = i32::try_from(JOBS_IN_FLIGHT_MAX + 1).expect("a small bound");
    assert!(given <= bound, "{given} copies were given to the device before the fenced one");
    stub.hold(false);
    for copy in &copies {
        assert_eq!(vllm.wait_for(copy), Fill::Done);
        assert!(vllm.slot_is(copy.slot, 7));
    }
    drop(vllm);
    stub.is_clean();
}

/// An offload of block 3 on a device that stands still. A copier that answers early has had all the
/// time to do so.
fn offload_that_may_be_answered_early(vllm: &mut Vllm<'_>) -> BlockCopy {
    let copy = vllm.scene.begin(0, 0, 3);
    vllm.stub.hold(true);
    vllm.step(&stores_after(&[copy]), &[], &[(3, 7)]);
    let deadline = Instant::now() + Duration::from_millis(100);
    while vllm.scene.line(0).fill(1) == Fill::Pending && Instant::now() < deadline {
        std::thread::yield_now();
    }
    copy
}

#[test]
fn a_slot_is_given_back_only_when_its_copy_is_over() {
    checked(Mutation::EventsAreOverAtOnce, |vllm, _| {
        let copy = offload_that_may_be_answered_early(vllm);
        if vllm.scene.line(0).fill(1) == Fill::Pending {
            vllm.stub.hold(false);
        }
        vllm.wait_for(&copy);
    });
}

/// A fence whose order was answered is over: released too early, the next step writes into a block
/// that is still being read.
#[test]
fn a_fence_is_released_only_when_its_copy_is_over() {
    checked(Mutation::EventsAreOverAtOnce, |vllm, _| {
        let copy = offload_that_may_be_answered_early(vllm);
        // The engine names the fence, and the worker skips what is answered.
        vllm.step(&StepPlan { waits: vec![copy], ..StepPlan::default() }, &[], &[(3, 8)]);
        vllm.stub.hold(false);
    });
}

/// Without the stream's name no order can be kept: what is given then is refused.
#[test]
fn without_a_stream_nothing_is_copied() {
    let stub = Stub::take(5);
    let scene = Scene::simple(4);
    let mut vllm = Vllm::new(&stub, &scene, assumed());
    let copy = scene.begin(0, 0, 3);
    vllm.worker.begin_step(&stores_after(&[copy]).encode()).expect("a plan");
    vllm.worker.finish_step();
    assert_eq!(scene.line(0).fill(1), Fill::Failed);
    stub.is_clean();
}
