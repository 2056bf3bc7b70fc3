//! Pinning in pieces and in the background: what waits, what is copied meanwhile, and what happens
//! when the system has had enough.

use std::path::Path;

use kvcellar_block::plan::StepPlan;
use kvcellar_engine::gpu::cuda::copier::CopierOptions;
use kvcellar_engine::gpu::cuda::pinning::settle;
use kvcellar_engine::pool::slot_table::Fill;

use crate::maker::assumed;
use crate::vllm::{Vllm, at_once};
use kvcellar_testkit::copies::ledger::until;
use kvcellar_testkit::copies::scene::Scene;
use kvcellar_testkit::stub_cuda::Stub;

/// Pieces of two slots.
fn options(scene: &Scene) -> CopierOptions {
    CopierOptions { pin_chunk_bytes: 2 * scene.pool.geometry().slot_bytes, ..assumed() }
}

#[test]
fn every_slot_is_pinned_in_the_end_and_unpinned_after() {
    let stub = Stub::take(1);
    stub.strict();
    let scene = Scene::simple(9);
    let vllm = Vllm::new(&stub, &scene, options(&scene));
    until("all pieces are pinned", || stub.calls("cuMemHostRegister_v2") == 5);
    let mut notes = Vec::new();
    until("the end is told", || {
        notes.extend(vllm.worker.take_notes());
        notes.iter().any(|note| note.starts_with("pinned"))
    });
    drop(vllm);
    stub.is_clean();
    assert_eq!(stub.calls("cuMemHostUnregister"), 5);
}

/// A driver that pins no more than two slots at once: eight, four, and then two at a time.
#[test]
fn what_is_refused_is_tried_in_halves() {
    let stub = Stub::take(5);
    stub.strict();
    let scene = Scene::simple(9);
    let slot_bytes = scene.pool.geometry().slot_bytes;
    stub.limit_calls(2 * slot_bytes);
    let options = CopierOptions { pin_chunk_bytes: 8 * slot_bytes, pin_piece_bytes: slot_bytes, ..assumed() };
    let vllm = Vllm::new(&stub, &scene, options);
    let mut notes = Vec::new();
    until("everything is pinned", || {
        notes.extend(vllm.worker.take_notes());
        notes.iter().filter(|note| note.starts_with("pinned")).count() == 4
    });
    assert!(!notes.iter().any(|note| note.contains("memlock")), "{notes:?}");
    drop(vllm);
    stub.is_clean();
    assert_eq!(stub.calls("cuMemHostUnregister"), 5);
}

#[test]
fn copies_start_before_the_pool_is_pinned_and_wait_for_their_own_piece() {
    let stub = Stub::take(2);
    stub.strict();
    let scene = Scene::simple(9);
    stub.hold_pinning(true);
    let mut vllm = Vllm::new(&stub, &scene, options(&scene));
    let copy = scene.begin(8, 0, 3);
    // The hooks return, although nothing is pinned.
    vllm.step(&StepPlan { stores_after: vec![copy], ..StepPlan::default() }, &[], &[(3, 7)]);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(scene.line(8).fill(1), Fill::Pending, "a slot was copied before its memory was pinned");
    stub.hold_pinning(false);
    assert_eq!(vllm.wait_for(&copy), Fill::Done);
    assert!(vllm.slot_is(8, 7));
    drop(vllm);
    stub.is_clean();
}

/// vLLM's next step needs the block now: the copy goes as ordinary memory.
#[test]
fn a_fence_does_not_wait_for_pinning() {
    let stub = Stub::take(3);
    let scene = Scene::simple(9);
    stub.hold_pinning(true);
    let mut vllm = Vllm::new(&stub, &scene, options(&scene));
    let copy = scene.begin(8, 0, 3);
    vllm.step(&StepPlan { stores_after: vec![copy], ..StepPlan::default() }, &[], &[(3, 7)]);
    at_once("a fence", || vllm.step(&StepPlan { waits: vec![copy], ..StepPlan::default() }, &[], &[(3, 8)]));
    assert_eq!(vllm.wait_for(&copy), Fill::Done);
    assert!(vllm.slot_is(8, 7));
    stub.hold_pinning(false);
    drop(vllm);
    stub.is_clean();
}

/// A copy of ordinary memory makes its caller wait for all that the stream was given before: the
/// copier does that when vLLM's step is over, and serves others meanwhile.
#[test]
fn ordinary_memory_keeps_nobody_waiting() {
    let stub = Stub::take(6);
    let scene = Scene::simple(9);
    stub.limit_pinned(5 * scene.pool.geometry().slot_bytes);
    let mut vllm = Vllm::new(&stub, &scene, options(&scene));
    until("the limit is told", || vllm.worker.take_notes().iter().any(|note| note.contains("memlock")));
    stub.hold(true);
    let (ordinary, pinned) = (scene.begin(8, 0, 3), scene.begin(0, 0, 4));
    vllm.step(&StepPlan { stores_after: vec![ordinary], ..StepPlan::default() }, &[], &[(3, 7)]);
    vllm.step(&StepPlan { stores_after: vec![pinned], ..StepPlan::default() }, &[], &[(4, 8)]);
    std::thread::sleep(std::time::Duration::from_millis(20));
    at_once("a fence", || vllm.step(&StepPlan { waits: vec![pinned], ..StepPlan::default() }, &[], &[(4, 9)]));
    stub.hold(false);
    for (copy, byte) in [(ordinary, 7), (pinned, 8)] {
        assert_eq!(vllm.wait_for(&copy), Fill::Done);
        assert!(vllm.slot_is(copy.slot, byte));
    }
    drop(vllm);
    stub.is_clean();
}

#[test]
fn what_cannot_be_pinned_is_copied_as_ordinary_memory_and_said() {
    let stub = Stub::take(4);
    let scene = Scene::simple(9);
    stub.limit_pinned(5 * scene.pool.geometry().slot_bytes);
    let mut vllm = Vllm::new(&stub, &scene, options(&scene));
    let mut notes = Vec::new();
    until("the limit is told", || {
        notes.extend(vllm.worker.take_notes());
        notes.iter().any(|note| note.contains("memlock"))
    });
    let copies: Vec<_> = (0..8).map(|slot| scene.begin(slot, 0, slot)).collect();
    let writes: Vec<(u32, u8)> = (0..8).map(|block| (block, 10 + block as u8)).collect();
    vllm.step(&StepPlan { stores_after: copies.clone(), ..StepPlan::default() }, &[], &writes);
    for copy in &copies {
        assert_eq!(vllm.wait_for(copy), Fill::Done);
        assert!(vllm.slot_is(copy.slot, 10 + copy.block as u8));
    }
    drop(vllm);
    stub.is_clean();
    let pinned = stub.calls("cuMemHostUnregister");
    assert!(pinned >= 1, "what was pinned did not stay");
}

/// How often this process maps a file.
fn mapped(path: &Path) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("this process's maps");
    maps.lines().filter(|line| line.ends_with(path.to_str().expect("text"))).count()
}

/// A stopping process has 5 s for everything, and TP=1 has flush and snapshot behind it.
#[test]
fn letting_go_waits_for_copies_and_not_for_unpinning() {
    let stub = Stub::take(7);
    stub.strict();
    let scene = Scene::simple(9);
    let before = mapped(scene.pool.path());
    let mut vllm = Vllm::new(&stub, &scene, options(&scene));
    until("all pieces are pinned", || stub.calls("cuMemHostRegister_v2") == 5);
    let copy = scene.begin(8, 0, 3);
    vllm.step(&StepPlan { stores_after: vec![copy], ..StepPlan::default() }, &[], &[(3, 7)]);
    stub.hold_unpinning(true);
    at_once("letting go", || drop(vllm));
    assert_eq!(scene.line(8).fill(1), Fill::Done, "the copy was not waited for");
    assert!(stub.calls("cuMemHostUnregister") <= 1, "it was unpinned on the way");
    assert_eq!(mapped(scene.pool.path()), before + 1, "pinned memory was unmapped");
    stub.hold_unpinning(false);
    settle();
    // The process lives on: all of it is unpinned and unmapped.
    assert_eq!((stub.calls("cuMemHostUnregister"), mapped(scene.pool.path())), (5, before));
    stub.is_clean();
}

#[test]
fn letting_go_does_not_wait_for_a_pinning_under_way() {
    let stub = Stub::take(8);
    let scene = Scene::simple(9);
    stub.hold_pinning(true);
    let vllm = Vllm::new(&stub, &scene, options(&scene));
    until("a piece is being pinned", || stub.calls("cuMemHostRegister_v2") == 1);
    at_once("letting go", || drop(vllm));
    stub.hold_pinning(false);
    settle();
    assert_eq!((stub.calls("cuMemHostRegister_v2"), stub.calls("cuMemHostUnregister")), (1, 1));
    stub.is_clean();
}
