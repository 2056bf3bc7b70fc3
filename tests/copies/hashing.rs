//! The idle hasher: which slots get a checksum, and which never do.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::JoinHandle;
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

/// Keeps all processors busy until dropped, so that the hasher, at its low priority, is interrupted in the middle of a block.
struct Rush {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Rush {
    fn begin() -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let threads = (0..std::thread::available_parallelism().map_or(2, usize::from))
            .map(|_| {
                let over = Arc::clone(&over);
                std::thread::spawn(move || while !over.load(SeqCst) {})
            })
            .collect();
        Self { over, threads }
    }
}

impl Drop for Rush {
    fn drop(&mut self) {
        self.over.store(true, SeqCst);
        self.threads.drain(..).for_each(|thread| thread.join().expect("it only turned"));
    }
}

/// One slot is filled with new bytes again and again while the hasher is at work on it. A checksum that stands there names the generation whose bytes
/// it was made of, also when that generation is over.
#[test]
fn no_checksum_ever_belongs_to_other_bytes() {
    let mut random = Random::of_test();
    // Blocks so large that hashing one takes longer than the engine needs to give the slot to the next.
    let shape = Shape { page: 2_000_000, blocks: 2, ..Shape::plain(4) };
    let scene = Scene::new(&[(shape, None)], 1);
    let mut memory = scene.ranks[0].cache.bytes();
    for (block, byte) in [3, 141].into_iter().enumerate() {
        put_block(&mut memory, &scene.ranks[0].cache.shape, 0, block, &vec![byte; 8_000_000]);
    }
    scene.ranks[0].cache.set(&memory);
    let sums = [3, 141].map(|byte| xxh3_64(&vec![byte; 8_000_000]));
    let (mut worker, _) = attached(&scene, 0);
    let rush = Rush::begin();
    let mut hashed = 0;
    let mut before: Option<BlockCopy> = None;
    for round in 0..60_u32 {
        scene.line(0).clear();
        let copy = scene.begin(0, 0, round % 2);
        step(&mut worker, &stores(&[copy]));
        // Without a nap: the hasher starts with the answer, and the next fill shall meet it.
        while scene.line(0).fill(1) == Fill::Pending {
            std::thread::yield_now();
        }
        scene.line(0).publish();
        // By now the hasher has left the block before: this one was written after it.
        for copy in before.iter().chain([&copy]) {
            if let Some(sum) = checksum(&scene, copy) {
                assert_eq!(sum, sums[copy.block as usize], "round {round}: {copy:?}");
                hashed += 1;
            }
        }
        before = Some(copy);
        std::thread::sleep(Duration::from_micros(random.below(6000) as u64));
    }
    drop(rush);
    println!("{hashed} checksums compared");
    let last = before.expect("the last round's");
    until("the slot is hashed", || checksum(&scene, &last).is_some());
    assert_eq!(checksum(&scene, &last), Some(sums[last.block as usize]));
}
