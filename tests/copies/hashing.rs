//! The idle hasher: which slots get a checksum, and which never do.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use kvcellar::block::SlotIndex;
use kvcellar::block::plan::BlockCopy;
use kvcellar::gpu::worker::CopyWorker;
use kvcellar::pool::slot_table::Fill;
use xxhash_rust::xxh3::xxh3_64;

use crate::cache::{Shape, put_block};
use crate::ledger::until;
use crate::random::Random;
use crate::scene::Scene;
use crate::worker::{attached, filled, step, stores};

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

/// Two slots are filled with new bytes again and again while the hasher is at work on them. A checksum that stands there names the generation whose
/// bytes it was made of, also when that generation is over.
#[test]
fn no_checksum_ever_belongs_to_other_bytes() {
    let mut random = Random::of_test();
    // Large blocks, so that hashing and copying overlap.
    let shape = Shape { page: 300_000, blocks: 4, ..Shape::plain(5) };
    let scene = Scene::new(&[(shape, None)], 2);
    for (block, byte) in [3, 141, 59, 26].into_iter().enumerate() {
        let mut memory = scene.ranks[0].cache.bytes();
        let len = scene.pool.geometry().payload_bytes[0] as usize;
        put_block(&mut memory, &scene.ranks[0].cache.shape, 0, block, &vec![byte; len]);
        scene.ranks[0].cache.set(&memory);
    }
    let (mut worker, _) = attached(&scene, 0);
    let sums: Vec<u64> = (0..4).map(|block| xxh3_64(&scene.ranks[0].cache.block(0, block))).collect();
    let mut blocks: HashMap<(u32, u64), u32> = HashMap::new();
    let (mut hashed, mut last) = (HashSet::new(), [None; 2]);
    for round in 0..300_u32 {
        let slot = random.below(2) as u32;
        scene.line(slot).clear();
        let copy = scene.begin(slot, 0, random.below(4) as u32);
        blocks.insert((slot, copy.generation.into()), copy.block);
        last[slot as usize] = Some(copy);
        fill(&scene, &mut worker, copy);
        scene.line(slot).publish();
        std::thread::sleep(Duration::from_micros(random.below(2500) as u64));
        for slot in 0..2 {
            let [owner, sum] = scene.pool.checksum_pair(SlotIndex(slot), 0);
            let (before, sum, after) = (owner.load(SeqCst), sum.load(SeqCst), owner.load(SeqCst));
            // 0: none, or just being written.
            if before == after && before != 0 {
                assert_eq!(
                    sum,
                    sums[blocks[&(slot, before)] as usize],
                    "round {round}: slot {slot} generation {before}"
                );
                hashed.insert((slot, before));
            }
        }
    }
    println!("{} of {} fills were seen hashed", hashed.len(), blocks.len());
    for copy in last.iter().flatten() {
        until("the slot is hashed", || checksum(&scene, copy).is_some());
        assert_eq!(checksum(&scene, copy), Some(sums[copy.block as usize]));
    }
}
