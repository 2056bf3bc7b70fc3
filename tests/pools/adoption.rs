//! What comes back after a restart, and what does not.

use kvcellar_block::SlotIndex;
use kvcellar_block::plan::BlockCopy;
use kvcellar_engine::config::Config;
use kvcellar_engine::pool::memory::SlotMemory;
use kvcellar_engine::pool::slot_table::SlotState;
use kvcellar_engine::tier::engine::{ResetReport, TierEngine};

use crate::place::{Place, Purpose, grouping};
use crate::stock::{Stock, all_verified, is_whole, left_behind, put_checksum, state, verifies, write};

#[test]
fn whole_hashed_blocks_come_back_and_others_are_cleared() {
    let place = Place::new();
    let mut stock = Stock::of(place.open(&Purpose::small()));
    stock.store(&[1, 2, 3, 4], |number| number != 3);
    stock.store(&[7], |_| false);
    // A block that is still being filled when the engine ends.
    let under_way = stock.offer(&[9])[0];
    write(&stock.pool(), &under_way.0, 9, 0);
    assert_eq!(stock.hit(&[1, 2, 3, 4]), 64);
    drop(stock);
    let opened = place.open(&Purpose::small());
    assert!(opened.adopted && opened.budget.is_none());
    let mut stock = Stock::of(opened);
    assert_eq!(stock.adopted, 3);
    assert_eq!([[1], [2], [3], [4], [7], [9]].map(|number| stock.hit(&number)), [16, 16, 0, 16, 0, 0]);
    assert_eq!(stock.hit(&[1, 2, 3, 4]), 32, "a hit ends at the first block that is missing");
    let pool = stock.pool();
    let found = left_behind(&pool);
    assert!(found.len() == 3 && found.iter().all(|found| is_whole(&pool, *found) && verifies(&pool, *found)));
    let filled = (0..8).filter(|slot| state(&pool, *slot) == Some(SlotState::Filled)).count();
    let empty = (0..8).filter(|slot| state(&pool, *slot) == Some(SlotState::Empty)).count();
    assert_eq!((filled, empty), (3, 5), "what was not adopted is empty in shared memory too");
}

#[test]
fn adopted_bytes_are_compared_until_they_were_good_once() {
    let place = Place::new();
    let mut stock = Stock::of(place.open(&Purpose::small()));
    stock.store(&[1, 2], |_| true);
    let own = stock.load(&[1, 2]);
    assert!(own.len() == 2 && own.iter().all(|copy| copy.flags == 0), "bytes of this engine need no comparison");
    drop(stock);
    let mut stock = Stock::of(place.open(&Purpose::small()));
    let loads = stock.load(&[1, 2]);
    assert!(loads.len() == 2 && all_verified(&loads));
    assert!(stock.load(&[1, 2]).iter().all(|copy| copy.flags == 0), "they were good");
}

#[test]
fn contents_survive_many_restarts() {
    let place = Place::new();
    for life in 0..6_u64 {
        let mut stock = Stock::of(place.open(&Purpose::small()));
        assert_eq!(stock.adopted, life.min(8));
        for earlier in 0..life {
            assert_eq!(stock.hit(&[earlier]), 16, "life {life}: block {earlier} is lost");
        }
        stock.store(&[life], |_| true);
    }
}

#[test]
fn every_writing_rank_must_have_hashed_its_part() {
    let place = Place::new();
    let mut stock = Stock::of(place.open(&Purpose::small()));
    let pool = stock.pool();
    for (number, ranks) in [(1, vec![0, 1]), (2, vec![0]), (3, vec![1])] {
        let (copy, _) = stock.offer(&[number])[0];
        for rank in [0, 1] {
            write(&pool, &copy, number, rank);
            pool.line(SlotIndex(copy.slot)).answer(rank, true);
        }
        ranks.iter().for_each(|rank| put_checksum(&pool, &copy, *rank));
        stock.engine.poll();
    }
    drop((stock, pool));
    let mut stock = Stock::of(place.open(&Purpose::small()));
    assert_eq!([[1], [2], [3]].map(|number| stock.hit(&number)), [16, 0, 0]);
}

/// An evicted block's slot is empty or refilled; its old checksum must not make the new block
/// adoptable.
#[test]
fn a_checksum_of_an_earlier_generation_does_not_count() {
    let place = Place::new();
    let purpose = Purpose::of(2, 2, 1000);
    let mut stock = Stock::of(place.open(&purpose));
    stock.store(&[1], |_| true);
    stock.store(&[2], |_| true);
    // Both are evicted.
    stock.store(&[3], |_| false);
    stock.store(&[4], |_| true);
    drop(stock);
    let mut stock = Stock::of(place.open(&purpose));
    assert_eq!([[1], [2], [3], [4]].map(|number| stock.hit(&number)), [0, 0, 0, 16]);
}

/// A descriptor that was not rewritten for the slot's present block names another one, whose bytes
/// are gone.
#[test]
fn a_descriptor_of_an_earlier_generation_does_not_count() {
    let place = Place::new();
    let purpose = Purpose::of(1, 2, 1000);
    let mut stock = Stock::of(place.open(&purpose));
    stock.store(&[1], |_| true);
    let old = stock.pool().descriptor(SlotIndex(0));
    stock.store(&[2], |_| false);
    let pool = stock.pool();
    pool.with_descriptor_mut(SlotIndex(0), |page| page.copy_from_slice(&old));
    let generation = pool.line(SlotIndex(0)).remains().1.0;
    let copy = BlockCopy { slot: 0, generation, block: 0, group: 0, flags: 0 };
    for rank in [0, 1] {
        put_checksum(&pool, &copy, rank);
        assert!(pool.checksum(SlotIndex(0), rank, generation).is_some());
    }
    assert_eq!(left_behind(&pool), []);
}

#[test]
fn a_block_that_is_there_twice_is_adopted_once() {
    let place = Place::new();
    let mut stock = Stock::of(place.open(&Purpose::small()));
    stock.store(&[1], |_| true);
    stock.store(&[2], |_| true);
    let pool = stock.pool();
    let [first, second] =
        [1, 2].map(|number| left_behind(&pool).into_iter().find(|found| found.number == number).expect("stored"));
    // Slot of block 2 claims to hold block 1, in every respect.
    let bytes = pool.descriptor(SlotIndex(first.slot));
    pool.with_descriptor_mut(SlotIndex(second.slot), |page| page.copy_from_slice(&bytes));
    let copy = BlockCopy { slot: second.slot, generation: second.generation, block: 0, group: 0, flags: 0 };
    for rank in [0, 1] {
        write(&pool, &copy, 1, rank);
        put_checksum(&pool, &copy, rank);
    }
    assert_eq!(left_behind(&pool).iter().filter(|found| found.number == 1).count(), 2);
    drop((stock, pool));
    let mut stock = Stock::of(place.open(&Purpose::small()));
    assert_eq!((stock.adopted, stock.hit(&[1]), stock.hit(&[2])), (1, 16, 0));
    assert_eq!(stock.engine.gauges().free_slots, 7);
    assert_eq!(state(&stock.pool(), second.slot), Some(SlotState::Empty));
}

#[test]
fn after_a_reset_no_later_engine_adopts_anything() {
    for through_engine in [false, true] {
        let place = Place::new();
        let mut stock = Stock::of(place.open(&Purpose::small()));
        stock.store(&[1, 3], |_| true);
        assert_eq!(left_behind(&stock.pool()).len(), 2);
        if through_engine {
            let slot_bytes = stock.pool().geometry().slot_bytes;
            let wanted = ResetReport { blocks_dropped_dram: 2, bytes: 2 * slot_bytes, ..ResetReport::default() };
            assert_eq!(stock.engine.reset(), wanted);
        } else {
            assert_eq!(stock.pool().header().bump_cache_generation(), 1);
        }
        assert_eq!(left_behind(&stock.pool()), []);
        // Of weights that exist in this process only.
        stock.store(&[2], |_| true);
        assert_eq!((stock.hit(&[2]), left_behind(&stock.pool()).len()), (16, 1), "this engine goes on with it");
        drop(stock);
        let opened = place.open(&Purpose::small());
        assert!(!opened.adopted, "through the engine: {through_engine}");
        let mut stock = Stock::of(opened);
        assert_eq!((stock.adopted, stock.hit(&[1]), stock.hit(&[2])), (0, 0, 0));
        assert_eq!(SlotMemory::cache_generation(&stock.pool()), 0);
        stock.store(&[4], |_| true);
        drop(stock);
        assert_eq!(Stock::of(place.open(&Purpose::small())).adopted, 1, "the mark went with its pool");
    }
}

#[test]
fn a_reset_before_there_is_a_pool_counts_as_well() {
    let place = Place::new();
    let mut stock = Stock::of(place.open(&Purpose::small()));
    stock.store(&[1], |_| true);
    drop(stock);
    let mut engine = TierEngine::new(&Config::default(), grouping()).expect("an engine");
    assert_eq!(engine.reset(), ResetReport::default());
    let opened = place.open(&Purpose::small());
    assert!(opened.adopted);
    assert_eq!(engine.open_pool(opened.pool, true), 0);
    assert!(engine.pool().expect("a pool").header().is_private());
}

#[test]
fn who_keeps_on_reset_keeps_everything() {
    let place = Place::new();
    let config = Config::parse(r#"{"on_reset": "keep"}"#).expect("valid");
    let mut stock = Stock::with(&config, place.open(&Purpose::small()));
    stock.store(&[1], |_| true);
    assert_eq!(stock.engine.reset(), ResetReport { kept: true, ..ResetReport::default() });
    assert_eq!(stock.hit(&[1]), 16);
    drop(stock);
    let mut stock = Stock::of(place.open(&Purpose::small()));
    assert_eq!((stock.adopted, stock.hit(&[1])), (1, 16));
}
