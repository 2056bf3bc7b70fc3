//! A pool whose size is no longer what a start gets: its blocks stay as far as they have a place.

use kvcellar_engine::pool::budget::Bound;

use crate::mounts::{Tmpfs, touch_all};
use crate::place::{Place, Purpose, bytes_for};
use crate::stock::Stock;

#[test]
fn a_pool_that_was_capped_grows_back_with_its_blocks() {
    let Some(tmpfs) = Tmpfs::mount(4 << 20) else { return };
    let purpose = Purpose::of(100, 2, 4096);
    tmpfs.fill_up(400 << 10);
    let opened = purpose.open(&tmpfs.path).expect("a smaller pool");
    let small = opened.pool.slot_count();
    assert!(small < 40 && opened.budget.expect("a fresh pool").bound == Bound::SharedMemory, "{small} slots");
    assert!(opened.warnings.len() == 1 && opened.warnings[0].contains("--shm-size"), "{:?}", opened.warnings);
    let mut stock = Stock::of(opened);
    let numbers: Vec<u64> = (0..u64::from(small)).collect();
    stock.store(&numbers, |_| true);
    drop(stock);
    tmpfs.empty();
    let opened = purpose.open(&tmpfs.path).expect("the whole pool");
    assert!(opened.adopted && opened.warnings.is_empty(), "{:?}", opened.warnings);
    assert!(opened.pool.slot_count() >= 95, "{} slots", opened.pool.slot_count());
    assert_eq!(opened.budget.expect("it grew").bound, Bound::Configured);
    let mut stock = Stock::of(opened);
    assert_eq!((stock.adopted, stock.hit(&numbers)), (u64::from(small), 16 * small));
    // The new slots work: together all fit.
    stock.store(&(1000..1000 + 95 - u64::from(small)).collect::<Vec<_>>(), |_| true);
    assert_eq!(stock.hit(&numbers), 16 * small, "a block went although there is room");
    let pool = stock.pool();
    drop(stock);
    touch_all(&pool);
}

#[test]
fn a_pool_that_is_larger_than_wished_shrinks_and_keeps_the_rest() {
    let place = Place::new();
    let large = Purpose::of(8, 2, 1000);
    let mut stock = Stock::of(place.open(&large));
    stock.store(&(0..8).collect::<Vec<_>>(), |_| true);
    drop(stock);
    let small = Purpose { bytes: bytes_for(5, &large.geometry), ..large.clone() };
    let opened = place.open(&small);
    assert!(opened.adopted && opened.pool.bytes() <= small.bytes, "{} of {}", opened.pool.bytes(), small.bytes);
    let slots = opened.pool.slot_count();
    assert!((4..=5).contains(&slots), "{slots}");
    let mut stock = Stock::of(opened);
    assert_eq!(stock.adopted, u64::from(slots));
    let held: Vec<u64> = (0..8).filter(|number| stock.hit(&[*number]) == 16).collect();
    assert_eq!(held.len(), slots as usize);
    drop(stock);
    // It grows back within its table, and what was given up does not return.
    let opened = place.open(&large);
    assert!(opened.adopted && opened.pool.slot_count() == 8);
    let mut stock = Stock::of(opened);
    assert_eq!(stock.adopted, u64::from(slots));
    for number in 0..8 {
        assert_eq!(stock.hit(&[number]) == 16, held.contains(&number), "block {number}");
    }
    stock.store(&(100..108).collect::<Vec<_>>(), |_| true);
    assert_eq!(stock.hit(&(100..108).collect::<Vec<_>>()), 128);
}

#[test]
fn a_pool_that_cannot_grow_so_far_is_replaced_and_that_is_said() {
    let place = Place::new();
    let small = Purpose::of(4, 2, 1000);
    let mut stock = Stock::of(place.open(&small));
    stock.store(&[1], |_| true);
    drop(stock);
    let large = Purpose { bytes: bytes_for(40, &small.geometry), ..small.clone() };
    let opened = place.open(&large);
    assert!(!opened.adopted && opened.pool.slot_count() == 40);
    assert!(opened.removed.len() == 1 && opened.removed[0].contains("its blocks are lost"), "{:?}", opened.removed);
    assert_eq!(Stock::of(opened).hit(&[1]), 0);
}

#[test]
fn about_the_same_size_is_adopted_as_it_is() {
    let place = Place::new();
    let purpose = Purpose::of(100, 1, 1000);
    for slots in [100, 105, 95] {
        let wish = Purpose { bytes: bytes_for(slots, &purpose.geometry), ..purpose.clone() };
        let opened = place.open(&wish);
        assert_eq!(opened.adopted, slots != 100);
        assert!(opened.pool.bytes() <= wish.bytes && opened.removed.is_empty());
        let expected = if slots == 95 { 94..=95 } else { 100..=100 };
        assert!(expected.contains(&opened.pool.slot_count()), "{} slots", opened.pool.slot_count());
    }
}
