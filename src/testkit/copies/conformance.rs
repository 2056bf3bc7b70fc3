//! What every copier must do.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use kvcellar_block::plan::{BlockCopy, VERIFY};
use kvcellar_block::{GroupIndex, SlotIndex};
use kvcellar_engine::gpu::{After, Answers, Copier, CopyError, Direction, Order};

use crate::copies::cache::{Layout, Shape, block_of, put_block};
use crate::copies::ledger::{Ledger, PATIENCE, until};
use crate::copies::scene::{Maker, Scene};
use crate::random::Random;

/// Runs each function of this file with one copier.
#[macro_export]
macro_rules! copier_conformance {
    ($module:ident, $maker:ty) => {
        $crate::copier_conformance!(@each $module, $maker,
            every_layout_survives_the_round_trip,
            overlaid_groups_do_not_mix,
            ranks_write_their_parts_and_replicas_only_read,
            a_rank_without_layers_of_a_group_answers_and_touches_nothing,
            every_order_is_answered_exactly_once,
            submitting_does_not_wait,
            loads_overtake_queued_offloads,
            dropping_carries_out_what_was_submitted,
            what_must_not_be_copied_touches_nothing,
            adopted_bytes_are_used_only_with_their_checksum,
            debug_mode_compares_what_arrives,
        );
    };
    (@each $module:ident, $maker:ty, $($name:ident),+ $(,)?) => {
        mod $module {
            $(#[test] fn $name() {
                let _turn = <$maker as $crate::copies::scene::Maker>::turn(stringify!($name));
                $crate::copies::conformance::$name::<$maker>();
            })+
        }
    };
}
fn orders(copies: &[BlockCopy], direction: Direction) -> Vec<Order> {
    copies.iter().zip(1..).map(|(copy, ticket)| Order { copy: *copy, direction, ticket }).collect()
}

fn copier<M: Maker>(scene: &Scene, rank: usize, threads: usize) -> (Box<dyn Copier>, Arc<Ledger>) {
    let ledger = Arc::new(Ledger::default());
    let answers = Arc::clone(&ledger) as Arc<dyn Answers>;
    (M::make(scene.side(rank, false), answers, threads), ledger)
}

/// Has one rank carry out copies that must work.
fn carry_out<M: Maker>(scene: &Scene, rank: usize, copies: &[BlockCopy], direction: Direction) {
    let (copier, ledger) = copier::<M>(scene, rank, 3);
    copier.submit(&orders(copies, direction), &After::default()).expect("a copier that lives");
    let answers = ledger.wait_for(copies.len());
    assert!(answers.iter().all(|(_, outcome)| outcome.is_ok()), "rank {rank} {direction:?}: {answers:?}");
    drop(copier);
    assert_eq!(ledger.answers().len(), copies.len());
}

/// Offloads random blocks of every group from all ranks, then loads them into other blocks of
/// caches that hold other bytes. Every byte of the slots and of all caches is compared.
fn round_trip<M: Maker>(scene: &Scene, random: &mut Random) {
    let shape = &scene.ranks[0].cache.shape;
    let (groups, blocks) = (shape.groups.len(), shape.blocks);
    for group in 0..groups {
        scene.scramble(random);
        let before: Vec<Vec<u8>> = scene.ranks.iter().map(|rank| rank.cache.bytes()).collect();
        let count = (blocks / 2).min(scene.pool.slot_count() as usize);
        let (mut slots, mut sources, mut targets): (Vec<u32>, Vec<usize>, Vec<usize>) =
            ((0..scene.pool.slot_count()).collect(), (0..blocks).collect(), (0..blocks).collect());
        random.shuffle(&mut slots);
        random.shuffle(&mut sources);
        random.shuffle(&mut targets);
        let stores: Vec<BlockCopy> = slots
            .iter()
            .zip(&sources)
            .take(count)
            .map(|(slot, block)| scene.begin(*slot, group as u16, *block as u32))
            .collect();
        for (number, rank) in scene.ranks.iter().enumerate().filter(|(_, rank)| rank.replica_of.is_none()) {
            carry_out::<M>(scene, number, &stores, Direction::Offload);
            assert_eq!(rank.cache.bytes(), before[number], "an offload changed the KV cache");
        }
        for copy in &stores {
            for (number, rank) in scene.ranks.iter().enumerate() {
                let wanted = block_of(&before[number], &rank.cache.shape, group, copy.block as usize);
                assert_eq!(scene.part(copy.slot, group, number), wanted, "{shape:?}: {copy:?} rank {number}");
            }
            scene.line(copy.slot).publish();
        }
        scene.scramble(random);
        let loads: Vec<BlockCopy> =
            stores.iter().zip(&targets).map(|(copy, block)| BlockCopy { block: *block as u32, ..*copy }).collect();
        for (number, rank) in scene.ranks.iter().enumerate() {
            let mut wanted = rank.cache.bytes();
            for (load, store) in loads.iter().zip(&stores) {
                let bytes = block_of(&before[number], &rank.cache.shape, group, store.block as usize);
                put_block(&mut wanted, &rank.cache.shape, group, load.block as usize, &bytes);
            }
            carry_out::<M>(scene, number, &loads, Direction::Load);
            assert!(rank.cache.bytes() == wanted, "{shape:?}: group {group} rank {number} loaded other bytes");
        }
        for copy in &stores {
            scene.line(copy.slot).clear();
        }
    }
}

pub fn every_layout_survives_the_round_trip<M: Maker>() {
    let mut random = Random::of_test();
    for layout in [Layout::LayerMajor, Layout::BlockMajor] {
        for layers in [1, 2, 3, 17, 80] {
            for ratio in [1, 2, 4] {
                for (padding, aliased) in [(0, false), (24, true)] {
                    let page = 8 + random.below(60);
                    let shape = Shape { layout, groups: vec![layers], ratio, page, padding, blocks: 6, aliased };
                    round_trip::<M>(&Scene::new(&[(shape, None)], 4), &mut random);
                }
            }
        }
    }
}

pub fn overlaid_groups_do_not_mix<M: Maker>() {
    let mut random = Random::of_test();
    for layout in [Layout::LayerMajor, Layout::BlockMajor] {
        let shape =
            Shape { layout, groups: vec![5, 3, 5, 1], ratio: 2, page: 48, padding: 0, blocks: 10, aliased: false };
        let scene = Scene::new(&[(shape.clone(), None)], 8);
        round_trip::<M>(&scene, &mut random);
        // Different groups at once, each with its own blocks of the same memory.
        scene.scramble(&mut random);
        let stores: Vec<BlockCopy> = (0..8).map(|slot| scene.begin(slot, (slot % 4) as u16, slot)).collect();
        carry_out::<M>(&scene, 0, &stores, Direction::Offload);
        for copy in &stores {
            let wanted = scene.ranks[0].cache.block(copy.group.into(), copy.block as usize);
            assert_eq!(scene.part(copy.slot, copy.group.into(), 0), wanted, "{copy:?}");
        }
    }
}

pub fn ranks_write_their_parts_and_replicas_only_read<M: Maker>() {
    let mut random = Random::of_test();
    let shape = |page: usize, layout| Shape {
        layout,
        page,
        groups: vec![4, 2],
        ratio: 2,
        padding: 0,
        blocks: 8,
        aliased: false,
    };
    let scene = Scene::new(
        &[
            (shape(48, Layout::LayerMajor), None),
            (shape(24, Layout::BlockMajor), None),
            (shape(48, Layout::LayerMajor), Some(0)),
            (shape(100, Layout::BlockMajor), None),
        ],
        5,
    );
    assert_eq!(scene.pool.geometry().writers(GroupIndex(0)), 0b1011);
    for _ in 0..4 {
        round_trip::<M>(&scene, &mut random);
    }
}

/// A pipeline stage may hold no layer of a group.
pub fn a_rank_without_layers_of_a_group_answers_and_touches_nothing<M: Maker>() {
    let mut random = Random::of_test();
    let stage = |second| Shape { groups: vec![2, second], ..Shape::plain(2) };
    let scene = Scene::new(&[(stage(0), None), (stage(1), None)], 4);
    assert_eq!([0, 1].map(|group| scene.pool.geometry().writers(GroupIndex(group))), [0b11, 0b10]);
    scene.scramble(&mut random);
    let copies = [scene.begin(0, 0, 3), scene.begin(1, 1, 5)];
    carry_out::<M>(&scene, 0, &copies[..1], Direction::Offload);
    carry_out::<M>(&scene, 1, &copies, Direction::Offload);
    for slot in 0..2 {
        scene.line(slot).publish();
    }
    for (slot, copy) in (0..).zip(&copies) {
        for rank in 0..2 {
            let sum = xxhash_rust::xxh3::xxh3_64(&scene.part(slot, usize::from(copy.group), rank));
            if scene.pool.geometry().parts[rank].writes(GroupIndex(copy.group)) {
                scene.pool.set_checksum(SlotIndex(slot), rank, copy.generation, sum);
            }
        }
    }
    let before: Vec<Vec<u8>> = scene.ranks.iter().map(|rank| rank.cache.bytes()).collect();
    let adopted = copies.map(|copy| BlockCopy { flags: VERIFY, ..copy });
    for (rank, before) in before.iter().enumerate() {
        carry_out::<M>(&scene, rank, &copies, Direction::Load);
        carry_out::<M>(&scene, rank, &adopted, Direction::Load);
        assert_eq!(&scene.ranks[rank].cache.bytes(), before, "rank {rank} got back what it had");
    }
}

pub fn every_order_is_answered_exactly_once<M: Maker>() {
    let mut random = Random::of_test();
    let scene = Scene::new(&[(Shape { blocks: 64, ..Shape::plain(4) }, None)], 40);
    scene.scramble(&mut random);
    let (copier, ledger) = copier::<M>(&scene, 0, 4);
    // 20 slots to be filled, 20 slots to be loaded from, and orders that cannot be carried out in
    // between.
    let mut all: Vec<Order> = Vec::new();
    let mut wanted = Vec::new();
    let mut give = |copy: BlockCopy, direction, outcome: Result<(), CopyError>| {
        let ticket = all.len() as u64;
        all.push(Order { copy, direction, ticket });
        wanted.push(outcome);
    };
    for slot in 0..40 {
        let copy = scene.begin(slot, 0, slot);
        let direction = if slot < 20 {
            Direction::Offload
        } else {
            scene.line(slot).publish();
            Direction::Load
        };
        give(copy, direction, Ok(()));
        give(BlockCopy { generation: copy.generation + 1, ..copy }, direction, Err(CopyError::Stale));
        give(BlockCopy { group: 1, ..copy }, direction, Err(CopyError::OutOfRange));
        give(BlockCopy { block: 64 + slot, ..copy }, direction, Err(CopyError::OutOfRange));
        give(BlockCopy { slot: 40 + slot, ..copy }, direction, Err(CopyError::OutOfRange));
        give(BlockCopy { slot: u32::MAX - slot, ..copy }, direction, Err(CopyError::OutOfRange));
    }
    let mut shuffled = all.clone();
    random.shuffle(&mut shuffled);
    std::thread::scope(|scope| {
        for part in shuffled.chunks(shuffled.len().div_ceil(3)) {
            let copier = &copier;
            scope.spawn(move || {
                for orders in part.chunks(7) {
                    copier.submit(orders, &After::default()).expect("a copier that lives");
                }
            });
        }
    });
    ledger.wait_for(all.len());
    until("nothing is in flight", || copier.in_flight() == 0);
    drop(copier);
    let mut answers = ledger.answers();
    answers.sort_by_key(|(order, _)| order.ticket);
    assert_eq!(answers.len(), all.len());
    for ((order, outcome), (given, wanted)) in answers.iter().zip(all.iter().zip(&wanted)) {
        assert_eq!((order.ticket, order.copy, order.direction), (given.ticket, given.copy, given.direction));
        assert_eq!(outcome, wanted, "{order:?}");
    }
}

/// A copier of one thread that is stopped inside the answer of its first offload, with `offloads`
/// and then `loads` submitted after it.
fn stopped<M: Maker>(scene: &Scene, offloads: u32, loads: u32) -> (Box<dyn Copier>, Arc<Ledger>) {
    let (copier, ledger) = copier::<M>(scene, 0, 1);
    ledger.close();
    let order = |slot: u32, direction| {
        let copy = scene.begin(slot, 0, slot % 8);
        if direction == Direction::Load {
            scene.line(slot).publish();
        }
        Order { copy, direction, ticket: slot.into() }
    };
    copier.submit(&[order(0, Direction::Offload)], &After::default()).expect("a copier that lives");
    ledger.wait_for(1);
    let queued: Vec<Order> = (1..=offloads).map(|slot| order(slot, Direction::Offload)).collect();
    let urgent: Vec<Order> = (1..=loads).map(|number| order(offloads + number, Direction::Load)).collect();
    let (sender, submitted) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        copier.submit(&queued, &After::default()).expect("a copier that lives");
        copier.submit(&urgent, &After::default()).expect("a copier that lives");
        sender.send(copier).expect("the test waits");
    });
    // A `submit` that waited for the stopped thread would never come here.
    let copier = submitted.recv_timeout(PATIENCE).expect("submit returns without waiting");
    thread.join().expect("submitted");
    (copier, ledger)
}

pub fn submitting_does_not_wait<M: Maker>() {
    let scene = Scene::simple(401);
    let (copier, ledger) = stopped::<M>(&scene, 300, 100);
    assert_eq!(ledger.tickets(), [0], "an order was answered by a copier that is stopped");
    // Whether the order whose answer is being given still counts is left open.
    assert!(matches!(copier.in_flight(), 400 | 401), "{} in flight", copier.in_flight());
    ledger.open();
    ledger.wait_for(401);
    until("nothing is in flight", || copier.in_flight() == 0);
}

pub fn loads_overtake_queued_offloads<M: Maker>() {
    let scene = Scene::simple(61);
    let (copier, ledger) = stopped::<M>(&scene, 40, 20);
    ledger.open();
    let directions: Vec<Direction> = ledger.wait_for(61).iter().map(|(order, _)| order.direction).collect();
    let mut wanted = vec![Direction::Offload];
    wanted.extend([Direction::Load; 20]);
    wanted.extend([Direction::Offload; 40]);
    assert_eq!(directions, wanted);
    drop(copier);
}

pub fn dropping_carries_out_what_was_submitted<M: Maker>() {
    let mut random = Random::of_test();
    let scene = Scene::simple(50);
    scene.scramble(&mut random);
    let (copier, ledger) = stopped::<M>(&scene, 49, 0);
    let (sender, dropped) = mpsc::channel();
    let dropper = std::thread::spawn(move || {
        drop(copier);
        sender.send(()).expect("the test waits");
    });
    // A copier that abandons its orders has all the time to show it.
    let early = dropped.recv_timeout(Duration::from_millis(50));
    ledger.open();
    assert!(early.is_err(), "dropped with orders under way");
    dropper.join().expect("dropped");
    let mut tickets = ledger.tickets();
    tickets.sort_unstable();
    assert_eq!(tickets, (0..50).collect::<Vec<u64>>());
    for slot in 0..50_u32 {
        assert_eq!(scene.part(slot, 0, 0), scene.ranks[0].cache.block(0, slot as usize % 8), "slot {slot}");
    }
}

pub fn what_must_not_be_copied_touches_nothing<M: Maker>() {
    let mut random = Random::of_test();
    let scene = Scene::simple(4);
    scene.scramble(&mut random);
    // Slot 0 is being filled a second time, slot 1 holds its second block, slot 2 was never used.
    let first: Vec<BlockCopy> = [0, 1].map(|slot| scene.begin(slot, 0, slot)).to_vec();
    carry_out::<M>(&scene, 0, &first, Direction::Offload);
    [0, 1].iter().for_each(|slot| scene.line(*slot).publish());
    [0, 1].iter().for_each(|slot| scene.line(*slot).clear());
    let second: Vec<BlockCopy> = [0, 1].map(|slot| scene.begin(slot, 0, slot + 2)).to_vec();
    scene.line(1).publish();
    let unused = BlockCopy { slot: 2, generation: 0, block: 5, group: 0, flags: 0 };
    scene.scramble(&mut random);
    let (slots, memory) = ((0..4).map(|slot| scene.payload(slot)).collect::<Vec<_>>(), scene.ranks[0].cache.bytes());
    let (copier, ledger) = copier::<M>(&scene, 0, 2);
    let offloads = [first[0], first[1], second[1], unused];
    let loads = [first[0], first[1], second[0], unused];
    copier.submit(&orders(&offloads, Direction::Offload), &After::default()).expect("a copier that lives");
    copier.submit(&orders(&loads, Direction::Load), &After::default()).expect("a copier that lives");
    for (order, outcome) in ledger.wait_for(8) {
        assert_eq!(outcome, Err(CopyError::Stale), "{order:?}");
    }
    drop(copier);
    assert_eq!((0..4).map(|slot| scene.payload(slot)).collect::<Vec<_>>(), slots);
    assert_eq!(scene.ranks[0].cache.bytes(), memory);
}

fn load_with<M: Maker>(scene: &Scene, rank: usize, verify_loads: bool, copy: BlockCopy) -> Result<(), CopyError> {
    let ledger = Arc::new(Ledger::default());
    let copier = M::make(scene.side(rank, verify_loads), Arc::clone(&ledger) as Arc<dyn Answers>, 1);
    copier.submit(&orders(&[copy], Direction::Load), &After::default()).expect("a copier that lives");
    ledger.wait_for(1)[0].1
}

pub fn adopted_bytes_are_used_only_with_their_checksum<M: Maker>() {
    let mut random = Random::of_test();
    let scene = Scene::new(&[(Shape::plain(3), None), (Shape::plain(5), None), (Shape::plain(3), Some(0))], 3);
    scene.scramble(&mut random);
    let store = scene.begin(1, 0, 4);
    for rank in [0, 1] {
        carry_out::<M>(&scene, rank, &[store], Direction::Offload);
    }
    scene.line(1).publish();
    let load = BlockCopy { block: 6, flags: VERIFY, ..store };
    for rank in 0..3 {
        let untouched = scene.ranks[rank].cache.bytes();
        let refused = |why: &str| {
            assert_eq!(load_with::<M>(&scene, rank, false, load), Err(CopyError::Mismatch), "rank {rank}: {why}");
            assert_eq!(scene.ranks[rank].cache.bytes(), untouched, "rank {rank}: {why}: bytes arrived");
        };
        let writer = if rank == 2 { 0 } else { rank };
        // Some copiers sum what they copy.
        scene.forget_checksum(1, writer);
        let sum = xxhash_rust::xxh3::xxh3_64(&scene.part(1, 0, rank));
        if rank != 2 {
            refused("no checksum");
            scene.pool.set_checksum(SlotIndex(1), writer, store.generation + 1, sum);
            refused("the checksum of another generation");
            scene.pool.set_checksum(SlotIndex(1), writer, store.generation, sum ^ 1);
            refused("another checksum");
        }
        scene.pool.set_checksum(SlotIndex(1), writer, store.generation, sum);
        let start = scene.pool.geometry().parts[rank].spans[0].0 as usize;
        let len = scene.part(1, 0, rank).len();
        for at in [0, len / 2, len - 1] {
            scene.flip(1, start + at);
            refused("a flipped bit");
            scene.flip(1, start + at);
        }
        assert_eq!(load_with::<M>(&scene, rank, false, load), Ok(()), "rank {rank}");
        assert_eq!(scene.ranks[rank].cache.block(0, 6), scene.part(1, 0, rank), "rank {rank}");
    }
}

pub fn debug_mode_compares_what_arrives<M: Maker>() {
    let mut random = Random::of_test();
    let scene = Scene::new(&[(Shape { ratio: 2, padding: 8, ..Shape::plain(4) }, None), (Shape::plain(8), None)], 3);
    scene.scramble(&mut random);
    let store = scene.begin(2, 0, 1);
    for rank in [0, 1] {
        let ledger = Arc::new(Ledger::default());
        let copier = M::make(scene.side(rank, true), Arc::clone(&ledger) as Arc<dyn Answers>, 1);
        copier.submit(&orders(&[store], Direction::Offload), &After::default()).expect("a copier that lives");
        assert_eq!(ledger.wait_for(1)[0].1, Ok(()));
    }
    scene.line(2).publish();
    let load = BlockCopy { block: 3, ..store };
    for rank in [0, 1] {
        assert_eq!(load_with::<M>(&scene, rank, true, load), Ok(()));
        scene.flip(2, scene.pool.geometry().parts[rank].spans[0].0 as usize + 11);
        assert_eq!(load_with::<M>(&scene, rank, true, load), Err(CopyError::Mismatch));
    }
}
