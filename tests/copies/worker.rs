//! The copy worker: plans, fences, failed loads, letting go.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use kvcellar_block::plan::{BlockCopy, Load, StepPlan, VERIFY};
use kvcellar_block::{GroupIndex, SlotIndex};
use kvcellar_engine::gpu::worker::{CopyWorker, LoadResults};
use kvcellar_engine::gpu::{CopyError, Direction};
use kvcellar_engine::pool::slot_table::Fill;

use kvcellar_testkit::copies::cache::Shape;
use kvcellar_testkit::copies::fake::{Control, FakeCopier};
use kvcellar_testkit::copies::ledger::{PATIENCE, until};
use kvcellar_testkit::copies::scene::{Scene, Side};
use kvcellar_testkit::random::Random;

/// A worker of one rank over the fake, not attached yet.
pub(crate) fn worker(scene: &Scene, rank: usize, control: &Arc<Control>) -> CopyWorker {
    let (groups, control) = (Arc::clone(&scene.ranks[rank].groups), Arc::clone(control));
    CopyWorker::new(
        rank,
        false,
        Box::new(move |pool, answers, guard| {
            let side = Side { pool, groups: Arc::clone(&groups), rank, verify_loads: false, guard };
            Ok(Box::new(FakeCopier::start(side, answers, Arc::clone(&control))))
        }),
    )
}

pub(crate) fn attached(scene: &Scene, rank: usize) -> (CopyWorker, Arc<Control>) {
    let control = Arc::new(Control::new(5));
    let mut worker = worker(scene, rank, &control);
    worker.attach(&scene.pool.ticket()).expect("the pool is there");
    assert!(worker.is_attached());
    (worker, control)
}

/// One step without anything in between.
pub(crate) fn step(worker: &mut CopyWorker, plan: &StepPlan) {
    worker.begin_step(&plan.encode()).expect("a plan");
    worker.start_loads();
    worker.finish_step();
}

pub(crate) fn stores(copies: &[BlockCopy]) -> StepPlan {
    StepPlan { stores_before: copies.to_vec(), ..StepPlan::default() }
}

fn load(request: &str, copies: &[BlockCopy]) -> Load {
    Load { request: request.to_owned(), doomed: false, copies: copies.to_vec() }
}

fn loads(loads: Vec<Load>) -> StepPlan {
    StepPlan { loads, ..StepPlan::default() }
}

/// Slots that hold a whole block of this generation, by the worker itself.
pub(crate) fn filled(scene: &Scene, worker: &mut CopyWorker, slots: std::ops::Range<u32>) -> Vec<BlockCopy> {
    let copies: Vec<BlockCopy> = slots.map(|slot| scene.begin(slot, 0, slot % 8)).collect();
    step(worker, &stores(&copies));
    for copy in &copies {
        until("the offload is answered", || scene.line(copy.slot).fill(1) == Fill::Done);
        scene.line(copy.slot).publish();
    }
    copies
}

/// Collects results until `count` loads ended, and a while longer, so that a second report would
/// show.
fn collect(worker: &mut CopyWorker, count: usize) -> LoadResults {
    let mut all = LoadResults::default();
    let mut take = |all: &mut LoadResults| {
        let mut results = worker.take_results();
        all.finished.append(&mut results.finished);
        all.failed.append(&mut results.failed);
    };
    until("all loads ended", || {
        take(&mut all);
        all.finished.len() >= count
    });
    until("nothing is in flight", || worker.in_flight() == 0);
    let mut results = worker.take_results();
    all.finished.append(&mut results.finished);
    all.failed.append(&mut results.failed);
    all.finished.sort();
    all.failed.sort();
    all
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn a_plan_is_executed_in_its_order() {
    let scene = Scene::simple(6);
    let mut random = Random::of_test();
    scene.scramble(&mut random);
    let (mut worker, control) = attached(&scene, 0);
    let held = filled(&scene, &mut worker, 0..2);
    let [before, after] = [2, 3].map(|slot| scene.begin(slot, 0, slot));
    let target = BlockCopy { block: 7, ..held[1] };
    let plan = StepPlan {
        stores_before: vec![before],
        stores_after: vec![after],
        waits: vec![],
        loads: vec![load("a", &[target])],
    };
    let started =
        |direction, slot| control.started().iter().any(|order| order.direction == direction && order.copy.slot == slot);
    worker.begin_step(&plan.encode()).expect("a plan");
    until("the early offload is answered", || scene.line(2).fill(1) == Fill::Done);
    assert!(!started(Direction::Load, 1), "a load was started before vLLM had prepared its blocks");
    worker.start_loads();
    assert_eq!(collect(&mut worker, 1), LoadResults { finished: names(&["a"]), failed: vec![] });
    assert_eq!(scene.ranks[0].cache.block(0, 7), scene.part(1, 0, 0));
    assert!(!started(Direction::Offload, 3), "an offload was started before the forward pass that computes it");
    worker.finish_step();
    until("the late offload is answered", || scene.line(3).fill(1) == Fill::Done);
    assert_eq!(scene.part(3, 0, 0), scene.ranks[0].cache.block(0, 3));
    worker.start_loads();
    worker.finish_step();
    assert_eq!(control.started().len(), 5, "an order was executed twice");
    let stats = worker.take_stats();
    let block = scene.pool.geometry().payload_bytes[0];
    assert_eq!((stats.offload_bytes, stats.load_bytes), (4 * block, block));
}

#[test]
fn a_fence_waits_for_its_order_and_for_no_other() {
    let scene = Scene::simple(6);
    let (mut worker, control) = attached(&scene, 0);
    let [fenced, other, third] = [0, 1, 2].map(|slot| scene.begin(slot, 0, slot));
    control.hold(fenced.slot);
    control.hold(other.slot);
    step(&mut worker, &stores(&[fenced, other, third]));
    let fence = StepPlan { waits: vec![fenced, third], ..StepPlan::default() }.encode();
    let (sender, returned) = mpsc::channel();
    std::thread::scope(|scope| {
        let (worker, line) = (&mut worker, scene.line(fenced.slot));
        scope.spawn(move || {
            worker.begin_step(&fence).expect("a plan");
            sender.send(line.answered(0, fenced.generation)).expect("the test waits");
        });
        // A fence that does not wait has all the time to show it; one that does is not measured.
        let early = returned.recv_timeout(Duration::from_millis(100));
        // Everything goes on before anything is asserted, so that a failure ends.
        control.let_go();
        assert!(early.is_err(), "the fence did not wait");
        assert!(returned.recv_timeout(PATIENCE).expect("the fence ended"), "it ended before its order was answered");
    });
    until("all is answered", || scene.line(other.slot).fill(1) == Fill::Done);
}

#[test]
fn a_fence_ends_while_other_orders_are_held() {
    let scene = Scene::simple(6);
    let (mut worker, control) = attached(&scene, 0);
    let [fenced, other] = [0, 1].map(|slot| scene.begin(slot, 0, slot));
    control.hold(other.slot);
    step(&mut worker, &stores(&[other, fenced]));
    let (sender, returned) = mpsc::channel();
    std::thread::scope(|scope| {
        let worker = &mut worker;
        scope.spawn(move || {
            let fence = StepPlan { waits: vec![fenced], ..StepPlan::default() };
            sender.send(worker.begin_step(&fence.encode())).expect("the test waits");
        });
        let result = returned.recv_timeout(PATIENCE);
        // Before the assertion, so that a fence that waits for both ends with the test.
        let held = scene.line(other.slot).fill(1);
        control.let_go();
        assert_eq!(held, Fill::Pending);
        result.expect("the fence waited for an order it does not name").expect("a plan");
    });
    assert!(scene.line(fenced.slot).answered(0, fenced.generation));
}

#[test]
fn a_fence_ends_also_when_its_order_failed_or_is_long_over() {
    let scene = Scene::simple(6);
    let (mut worker, control) = attached(&scene, 0);
    let over = filled(&scene, &mut worker, 0..1)[0];
    scene.line(0).clear();
    let now = scene.begin(0, 0, 4);
    let failing = scene.begin(1, 0, 1);
    control.fail(1, CopyError::Device);
    let never_sent = scene.begin(2, 0, 2);
    let nowhere = [BlockCopy { slot: 6, ..over }, BlockCopy { slot: u32::MAX, ..over }];
    let plan = StepPlan { waits: vec![nowhere[0], nowhere[1], over, failing, never_sent], ..stores(&[failing]) };
    worker.begin_step(&plan.encode()).expect("the fences end");
    assert_eq!(scene.line(1).fill(1), Fill::Failed);
    assert_eq!(scene.line(now.slot).fill(1), Fill::Pending);
}

#[test]
fn a_failed_load_is_reported_once_and_marks_its_slot() {
    let scene = Scene::simple(8);
    let mut random = Random::of_test();
    scene.scramble(&mut random);
    let (mut worker, control) = attached(&scene, 0);
    let held = filled(&scene, &mut worker, 0..6);
    until("the hasher is done", || {
        worker.unhashed() == 0
            && held.iter().all(|copy| scene.pool.checksum(SlotIndex(copy.slot), 0, copy.generation).is_some())
    });
    control.fail(1, CopyError::Device);
    scene.flip(3, 17);
    let verified = |copy: &BlockCopy| BlockCopy { flags: VERIFY, ..*copy };
    let stale = BlockCopy { generation: held[5].generation + 1, ..held[5] };
    step(
        &mut worker,
        &loads(vec![
            load("device", &[held[0], held[1]]),
            load("mismatch", &[verified(&held[2]), verified(&held[3]), verified(&held[4])]),
            load("good", &[verified(&held[0]), verified(&held[4])]),
            load("unchecked", &[held[3]]),
            load("stale", &[stale]),
        ]),
    );
    let results = collect(&mut worker, 5);
    assert_eq!(results.finished, names(&["device", "good", "mismatch", "stale", "unchecked"]));
    assert_eq!(results.failed, names(&["device", "mismatch", "stale"]));
    let refused: Vec<u32> = (0..8).filter(|slot| scene.line(*slot).load_refused()).collect();
    assert_eq!(refused, [1, 3, 5]);
    let stats = worker.take_stats();
    assert_eq!(stats.mismatched_blocks, 1);
}

/// The slot of an order that was refused belongs to somebody else: its answers are not this rank's.
#[test]
fn a_refused_offload_leaves_no_bit() {
    let scene = Scene::simple(4);
    let (mut worker, control) = attached(&scene, 0);
    let over = filled(&scene, &mut worker, 0..1)[0];
    scene.line(0).clear();
    let now = scene.begin(0, 0, 1);
    let nowhere = BlockCopy { slot: 4, ..over };
    step(&mut worker, &stores(&[over, nowhere]));
    until("both are answered", || control.started().len() == 3 && worker.in_flight() == 0);
    let line = scene.line(0);
    assert!(
        line.fill(1) == Fill::Pending && !line.answered(0, now.generation),
        "a stale order answered for a new block"
    );
    step(&mut worker, &stores(&[now]));
    until("the right order is answered", || line.fill(1) == Fill::Done);
}

#[test]
fn doomed_empty_and_impossible_loads_are_reported_at_once() {
    let scene = Scene::simple(4);
    let (mut worker, control) = attached(&scene, 0);
    let held = filled(&scene, &mut worker, 0..1)[0];
    let before = control.started().len();
    let doomed = Load { doomed: true, ..load("doomed", &[held]) };
    step(&mut worker, &loads(vec![doomed, load("empty", &[])]));
    assert_eq!(
        collect(&mut worker, 2),
        LoadResults { finished: names(&["doomed", "empty"]), failed: names(&["doomed"]) }
    );
    assert_eq!(control.started().len(), before, "a doomed load was started");
    let nowhere = [
        BlockCopy { slot: 4, ..held },
        BlockCopy { slot: u32::MAX, ..held },
        BlockCopy { group: 9, ..held },
        BlockCopy { block: 8, ..held },
    ];
    step(&mut worker, &loads(nowhere.iter().map(|copy| load(&format!("{copy:?}"), &[*copy])).collect()));
    let results = collect(&mut worker, 4);
    assert_eq!((results.finished.len(), results.failed.len()), (4, 4));
}

#[test]
fn the_same_request_may_load_again() {
    let scene = Scene::simple(4);
    let (mut worker, control) = attached(&scene, 0);
    let held = filled(&scene, &mut worker, 0..2);
    control.hold_all();
    step(&mut worker, &loads(vec![load("twice", &[held[0]])]));
    step(&mut worker, &loads(vec![load("twice", &[held[1]])]));
    control.let_go();
    assert_eq!(collect(&mut worker, 2).finished, names(&["twice", "twice"]));
}

#[test]
fn loads_of_a_step_without_a_forward_pass_are_started_with_the_next() {
    let scene = Scene::simple(4);
    let (mut worker, _) = attached(&scene, 0);
    let held = filled(&scene, &mut worker, 0..2);
    worker.begin_step(&loads(vec![load("first", &held[..1])]).encode()).expect("a plan");
    worker.begin_step(&loads(vec![load("second", &held[1..])]).encode()).expect("a plan");
    worker.start_loads();
    assert_eq!(collect(&mut worker, 2), LoadResults { finished: names(&["first", "second"]), failed: vec![] });
}

#[test]
fn without_a_pool_every_load_fails_and_nothing_else_happens() {
    let scene = Scene::simple(4);
    let control = Arc::new(Control::new(1));
    let mut worker = worker(&scene, 0, &control);
    let copy = scene.begin(0, 0, 0);
    let plan = StepPlan { waits: vec![copy], loads: vec![load("a", &[copy]), load("b", &[])], ..stores(&[copy]) };
    step(&mut worker, &plan);
    assert_eq!(collect(&mut worker, 2), LoadResults { finished: names(&["a", "b"]), failed: names(&["a", "b"]) });
    assert!(control.started().is_empty() && !worker.is_attached());
    let mut stale = scene.pool.ticket();
    stale.epoch ^= 1;
    let error = worker.attach(&stale).expect_err("another epoch").to_string();
    assert!(error.contains("epoch") && !worker.is_attached(), "{error}");
    step(&mut worker, &loads(vec![load("c", &[copy])]));
    assert_eq!(collect(&mut worker, 1).failed, names(&["c"]));
    worker.attach(&scene.pool.ticket()).expect("the right epoch");
    assert_eq!(filled(&scene, &mut worker, 1..2).len(), 1);
}

#[test]
fn nonsense_is_an_error_and_executes_nothing() {
    let scene = Scene::simple(6);
    let (mut worker, control) = attached(&scene, 0);
    let held = filled(&scene, &mut worker, 0..1)[0];
    let before = control.started().len();
    let [early, late] = [1, 2].map(|slot| scene.begin(slot, 0, slot));
    let plan = StepPlan {
        stores_before: vec![early],
        stores_after: vec![late],
        waits: vec![],
        loads: vec![load("a", &[held])],
    };
    let whole = plan.encode();
    let mut random = Random::of_test();
    let mut attempts: Vec<Vec<u8>> = (1..whole.len()).map(|len| whole[..len].to_vec()).collect();
    attempts.extend((0..200).map(|_| {
        let len = 1 + random.below(120);
        random.bytes(len)
    }));
    attempts.extend((0..200).map(|_| {
        // The right start, then noise.
        let len = random.below(120);
        [&whole[..4], &random.bytes(len)].concat()
    }));
    attempts.push([&whole[..], &[0]].concat());
    for attempt in attempts {
        assert!(worker.begin_step(&attempt).is_err(), "{attempt:?}");
        worker.start_loads();
        worker.finish_step();
    }
    assert_eq!(worker.take_results(), LoadResults::default());
    assert_eq!((control.started().len(), worker.in_flight()), (before, 0));
    step(&mut worker, &plan);
    assert_eq!(collect(&mut worker, 1).failed, names(&[]));
}

#[test]
fn a_dead_device_fails_what_it_is_given() {
    let scene = Scene::simple(4);
    let (mut worker, control) = attached(&scene, 0);
    let held = filled(&scene, &mut worker, 0..2);
    control.refuse(true);
    let copy = scene.begin(2, 0, 2);
    let plan = StepPlan { waits: vec![copy], loads: vec![load("a", &held)], ..stores(&[copy]) };
    step(&mut worker, &plan);
    assert_eq!(scene.line(2).fill(1), Fill::Failed);
    assert_eq!(worker.take_results(), LoadResults { finished: names(&["a"]), failed: names(&["a"]) });
    assert!(scene.line(0).load_refused() && scene.line(1).load_refused());
    control.refuse(false);
    scene.line(2).clear();
    assert_eq!(filled(&scene, &mut worker, 2..3).len(), 1);
}

#[test]
fn letting_go_finishes_what_is_in_flight() {
    let scene = Scene::simple(8);
    let mut random = Random::of_test();
    scene.scramble(&mut random);
    let (mut worker, control) = attached(&scene, 0);
    let held = filled(&scene, &mut worker, 0..3);
    control.hold_all();
    control.fail(2, CopyError::Device);
    let copies: Vec<BlockCopy> = (3..6).map(|slot| scene.begin(slot, 0, slot)).collect();
    let targets = [BlockCopy { block: 6, ..held[0] }, BlockCopy { block: 7, ..held[1] }];
    let plan = StepPlan { loads: vec![load("a", &targets), load("b", &held[2..])], ..stores(&copies) };
    step(&mut worker, &plan);
    // A file description of its own: the owner's scene keeps the pool, the worker's must be gone at
    // the end.
    std::thread::scope(|scope| {
        let worker = &mut worker;
        let released = scope.spawn(move || worker.release());
        control.let_go();
        released.join().expect("released");
    });
    assert!(!worker.is_attached());
    for copy in &copies {
        assert_eq!(scene.line(copy.slot).fill(1), Fill::Done);
        assert_eq!(scene.part(copy.slot, 0, 0), scene.ranks[0].cache.block(0, copy.block as usize));
    }
    assert_eq!(scene.ranks[0].cache.block(0, 7), scene.part(1, 0, 0));
    assert_eq!(collect(&mut worker, 2), LoadResults { finished: names(&["a", "b"]), failed: names(&["b"]) });
    // Released is for good.
    worker.attach(&scene.pool.ticket()).expect("nothing happens");
    step(&mut worker, &loads(vec![load("late", &held)]));
    assert!(!worker.is_attached());
    assert_eq!(collect(&mut worker, 1).failed, names(&["late"]));
}

#[test]
fn loads_remembered_before_letting_go_are_not_lost() {
    let scene = Scene::simple(4);
    let (mut worker, _control) = attached(&scene, 0);
    let held = filled(&scene, &mut worker, 0..1);
    worker.begin_step(&loads(vec![load("a", &held)]).encode()).expect("a plan");
    worker.release();
    worker.start_loads();
    assert_eq!(collect(&mut worker, 1), LoadResults { finished: names(&["a"]), failed: names(&["a"]) });
}

#[test]
fn a_replica_loads_but_never_writes() {
    let mut random = Random::of_test();
    let scene = Scene::new(&[(Shape::plain(3), None), (Shape::plain(3), Some(0))], 4);
    scene.scramble(&mut random);
    let (mut writer, _) = attached(&scene, 0);
    let (mut replica, control) = attached(&scene, 1);
    let copy = scene.begin(0, 0, 2);
    let plan = StepPlan { waits: vec![copy], ..stores(&[copy]) };
    step(&mut replica, &plan);
    assert!(control.started().is_empty(), "a replica wrote");
    step(&mut writer, &plan);
    assert_eq!(scene.line(0).fill(scene.pool.geometry().writers(GroupIndex(0))), Fill::Done);
    scene.line(0).publish();
    until("the writer hashed it", || scene.pool.checksum(SlotIndex(0), 0, copy.generation).is_some());
    let target = BlockCopy { block: 5, flags: VERIFY, ..copy };
    step(&mut replica, &loads(vec![load("a", &[target])]));
    assert_eq!(collect(&mut replica, 1), LoadResults { finished: names(&["a"]), failed: vec![] });
    assert_eq!(scene.ranks[1].cache.block(0, 5), scene.ranks[0].cache.block(0, 2));
}
