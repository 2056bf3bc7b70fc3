//! The idle hasher: which slots get a checksum, and which never do.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use kvcellar_block::SlotIndex;
use kvcellar_block::plan::BlockCopy;
use kvcellar_engine::gpu::hasher::{BusyProbe, IdleHasher};
use kvcellar_engine::gpu::worker::CopyWorker;
use kvcellar_engine::gpu::{After, Answers, Direction, Order};
use kvcellar_engine::pool::slot_table::Fill;
use xxhash_rust::xxh3::xxh3_64;

use crate::worker::{attached, filled, step, stores};
use kvcellar_testkit::copies::cache::Shape;
use kvcellar_testkit::copies::ledger::{Ledger, until};
use kvcellar_testkit::copies::scene::{Host, Maker, Scene};
use kvcellar_testkit::random::Random;

fn checksum(scene: &Scene, copy: &BlockCopy) -> Option<u64> {
    scene.pool.checksum(SlotIndex(copy.slot), 0, copy.generation)
}

fn fill(scene: &Scene, worker: &mut CopyWorker, copy: BlockCopy) {
    step(worker, &stores(&[copy]));
    until("the offload is answered", || scene.line(copy.slot).fill(1) == Fill::Done);
}

#[test]
fn filled_slots_get_the_checksum_of_their_bytes() {
    let mut random = Random::of_test();
    let scene = Scene::simple(8);
    scene.scramble(&mut random);
    let (mut worker, _) = attached(&scene, 0);
    let held = filled(&scene, &mut worker, 0..8);
    for copy in &held {
        until("the slot is hashed", || checksum(&scene, copy).is_some());
        assert_eq!(checksum(&scene, copy), Some(xxh3_64(&scene.part(copy.slot, 0, 0))), "{copy:?}");
        assert_eq!(scene.pool.checksum(SlotIndex(copy.slot), 0, copy.generation + 1), None);
    }
    until("nothing waits", || worker.unhashed() == 0);
}

/// Sums that are made while bytes are copied need nobody to read them again.
#[test]
fn the_host_copier_has_summed_what_it_answers() {
    // Pieces that are no whole cache lines, and whole ones.
    for page in [1000, 4096] {
        let scene = Scene::new(&[(Shape { page, ..Shape::plain(3) }, None)], 4);
        scene.scramble(&mut Random::of_test());
        let ledger = Arc::new(Ledger::default());
        let copier = Host::make(scene.side(0, false), Arc::clone(&ledger) as Arc<dyn Answers>, 1);
        let copies: Vec<BlockCopy> = (0..4).map(|slot| scene.begin(slot, 0, 3 - slot)).collect();
        let order = |copy: &BlockCopy| Order { copy: *copy, direction: Direction::Offload, ticket: 0 };
        copier.submit(&copies.iter().map(order).collect::<Vec<_>>(), &After::default()).expect("threads that live");
        ledger.wait_for(copies.len());
        for copy in &copies {
            assert_eq!(checksum(&scene, copy), Some(xxh3_64(&scene.part(copy.slot, 0, 0))), "{copy:?}");
        }
    }
}

/// The engine publishes a block at its next step, which may be long after the hasher's turn.
#[test]
fn a_slot_that_is_published_late_is_hashed_all_the_same() {
    let scene = Scene::simple(4);
    let (mut worker, _) = attached(&scene, 0);
    let copy = scene.begin(0, 0, 3);
    fill(&scene, &mut worker, copy);
    until("nothing waits", || worker.unhashed() == 0 && worker.in_flight() == 0);
    scene.line(0).publish();
    until("the slot is hashed", || checksum(&scene, &copy).is_some());
}

#[test]
fn nothing_is_hashed_while_copies_wait() {
    let scene = Scene::simple(4);
    let (mut worker, control) = attached(&scene, 0);
    control.hold(1);
    let busy = scene.begin(1, 0, 1);
    step(&mut worker, &stores(&[busy]));
    let copy = scene.begin(0, 0, 0);
    fill(&scene, &mut worker, copy);
    scene.line(0).publish();
    assert!(worker.unhashed() > 0);
    // Many times the hasher's nap; a hasher that minds nothing is done long before.
    std::thread::sleep(Duration::from_millis(60));
    assert_eq!(checksum(&scene, &copy), None, "hashed although a copy waits");
    control.let_go();
    until("the slot is hashed", || checksum(&scene, &copy).is_some());
}

#[test]
fn a_slot_that_was_taken_again_is_left_alone() {
    let scene = Scene::simple(4);
    let (mut worker, control) = attached(&scene, 0);
    control.hold(3);
    let busy = scene.begin(3, 0, 3);
    step(&mut worker, &stores(&[busy]));
    // In the hasher's queue one after another: taken again, emptied, kept.
    let [again, emptied, kept] = [0, 1, 2].map(|slot| scene.begin(slot, 0, slot));
    for copy in [again, emptied, kept] {
        fill(&scene, &mut worker, copy);
        scene.line(copy.slot).publish();
    }
    scene.line(0).clear();
    let now = scene.begin(0, 0, 5);
    scene.line(1).clear();
    control.let_go();
    until("the last in the queue is hashed", || checksum(&scene, &kept).is_some() && checksum(&scene, &busy).is_some());
    for copy in [again, now, emptied] {
        assert_eq!(checksum(&scene, &copy), None, "{copy:?}");
    }
    assert_eq!(scene.pool.checksum_pair(SlotIndex(0), 0).each_ref().map(|word| word.load(SeqCst)), [0, 0]);
}

/// Tells when the hasher is about to read a block.
#[derive(Debug)]
struct Begins(Arc<AtomicBool>);

impl BusyProbe for Begins {
    fn busy(&self) -> bool {
        self.0.store(true, SeqCst);
        false
    }
}

/// A slot is taken again while the hasher reads it: the copier writes it only when the hasher has
/// left it. A hash that ended after the copy would have read bytes that were being written.
#[test]
fn a_copier_waits_for_the_hasher_to_leave_its_slot() {
    // A large block is hashed while a small one is copied: without the guard the copy is done first
    // by far.
    let shape = Shape { page: 400_000, blocks: 2, groups: vec![40, 1], ..Shape::plain(1) };
    let scene = Scene::new(&[(shape, None)], 2);
    let side = scene.side(0, false);
    let (guard, begins) = (Arc::clone(&side.guard), Arc::new(AtomicBool::new(false)));
    let ledger = Arc::new(Ledger::default());
    let copier = Host::make(side, Arc::clone(&ledger) as Arc<dyn Answers>, 1);
    let hasher =
        IdleHasher::start(Arc::clone(&scene.pool), 0, Arc::clone(&guard), Box::new(Begins(Arc::clone(&begins))));
    let pair = || scene.pool.checksum_pair(SlotIndex(0), 0).each_ref().map(|word| word.load(SeqCst));
    let mut met = 0;
    for round in 1..=20 {
        let large = scene.begin(0, 0, 0);
        begins.store(false, SeqCst);
        hasher.push(large);
        while !begins.load(SeqCst) {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_micros(100));
        scene.line(0).clear();
        let small = scene.begin(0, 1, 1);
        met += usize::from(guard.is_reading(SlotIndex(0)));
        copier
            .submit(&[Order { copy: small, direction: Direction::Offload, ticket: 0 }], &After::default())
            .expect("a copier that lives");
        ledger.wait_for(round);
        let then = pair();
        let next = scene.begin(1, 1, 0);
        hasher.push(next);
        until("the hasher got on", || checksum(&scene, &next).is_some());
        assert_eq!(pair(), then, "round {round}: the slot was written while it was read");
    }
    println!("the copier met the hasher in {met} of 20 rounds");
    assert!(met > 0, "the hasher was never at work when the copier came");
}
