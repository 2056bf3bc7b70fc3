//! Whose pool it is: first and second engines, other purposes, processes that still map it.

use std::sync::Barrier;
use std::time::Duration;

use kvcellar_block::SlotIndex;
use kvcellar_block::error::Error;
use kvcellar_engine::pool::Pool;

use crate::place::{Place, Purpose};
use crate::stock::{Stock, read};

#[test]
fn a_fresh_pool_holds_nothing() {
    let place = Place::new();
    let purpose = Purpose::small();
    let mut last = (0, 0);
    let opened = purpose.open_with(place.path(), &mut |done, total| last = (done, total)).expect("a pool");
    assert!(!opened.adopted && opened.taken.is_empty() && opened.budget.is_some());
    assert_eq!((opened.pool.slot_count(), opened.pool.path()), (8, &*purpose.file(place.path(), 0)));
    assert_eq!(last, (opened.pool.bytes(), opened.pool.bytes()), "populated to the end");
    assert_eq!((opened.pool.header().owner_pid(), opened.pool.header().cache_generation()), (std::process::id(), 0));
    assert_eq!((0..8).map(|slot| opened.pool.line(SlotIndex(slot)).remains().1.0).sum::<u32>(), 0);
    let mut stock = Stock::of(opened);
    assert_eq!((stock.adopted, stock.hit(&[1])), (0, 0));
}

#[test]
fn a_second_engine_gets_its_own_pool_and_learns_who_has_the_first() {
    let place = Place::new();
    let purpose = Purpose::small();
    let first = place.open(&purpose);
    let second = place.open(&purpose);
    assert_eq!(second.pool.path(), purpose.file(place.path(), 1));
    assert!(!second.adopted);
    let pid = format!("process {}", std::process::id());
    assert!(
        second.taken.len() == 1 && second.taken[0].contains(&pid) && second.taken[0].contains("-0.pool"),
        "{:?}",
        second.taken
    );
    let mut third = Stock::of(place.open(&purpose));
    third.store(&[1], |_| true);
    assert_eq!(Stock::of(second).hit(&[1]), 0, "two engines share a pool");
    drop((first, third));
    // Both indices are free again: the first is taken, the third's contents stay where they are.
    assert_eq!(place.open(&purpose).pool.path(), purpose.file(place.path(), 0));
}

/// Threads of one process as starts of several: each open has its own file description, which is
/// what the locks belong to.
#[test]
fn engines_that_start_at_the_same_moment_all_get_a_pool_of_their_own() {
    let place = Place::new();
    let purpose = Purpose::small();
    for round in 0..30 {
        let barrier = Barrier::new(4);
        let opened: Vec<_> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        barrier.wait();
                        purpose.open(place.path())
                    })
                })
                .collect();
            starts.into_iter().map(|start| start.join().expect("no panic")).collect()
        });
        let mut paths = Vec::new();
        for start in &opened {
            let pool = &start.as_ref().unwrap_or_else(|error| panic!("round {round}: {error}")).pool;
            paths.push(pool.path().to_owned());
            let here = std::fs::metadata(pool.path()).expect("its file has its name").len();
            assert_eq!(here, pool.bytes());
        }
        paths.sort();
        paths.dedup();
        assert_eq!(paths.len(), 4, "round {round}: two engines own one pool");
        if round % 2 == 0 {
            opened.iter().flatten().for_each(|start| start.pool.unlink().expect("removed"));
        }
    }
}

#[test]
fn another_purpose_never_gets_the_bytes() {
    let small = Purpose::small();
    let other_geometry = Purpose::of(8, 2, 5000);
    let others = [
        ("namespace", Purpose { namespace: [0xcd; 16], ..small.clone() }, 2),
        ("geometry", Purpose { bytes: small.bytes, ..other_geometry }, 1),
        ("ranks", Purpose::of(8, 3, 1000), 1),
        ("will to adopt", Purpose { adopt: false, ..small.clone() }, 1),
    ];
    for (what, other, files) in others {
        let place = Place::new();
        let mut stock = Stock::of(place.open(&small));
        stock.store(&[1, 2], |_| true);
        // While the first lives they coexist.
        let beside = place.open(&other);
        assert!(!beside.adopted, "{what}");
        beside.pool.unlink().expect("removed");
        drop((stock, beside));
        let opened = place.open(&other);
        assert!(!opened.adopted, "another {what} was adopted");
        let pool_files = kvcellar_engine::pool::registry::list(place.path()).expect("listed").len();
        assert_eq!(pool_files, files, "{what}");
        let mut stock = Stock::of(opened);
        assert_eq!((stock.adopted, stock.hit(&[1, 2])), (0, 0), "{what}");
    }
}

#[test]
fn a_pool_whose_name_was_removed_is_gone() {
    let place = Place::new();
    let mut stock = Stock::of(place.open(&Purpose::small()));
    stock.store(&[1], |_| true);
    stock.pool().unlink().expect("removed");
    let beside = place.open(&Purpose::small());
    assert!(!beside.adopted && beside.taken.is_empty());
    // Its name belongs to another file now.
    stock.pool().unlink().expect("nothing to do");
    assert!(beside.pool.path().exists(), "a pool removed another pool's name");
}

/// A worker of a dead engine may still write: nobody may share its memory. Takes
/// `limits::ADOPTION_WAIT_MS`.
#[test]
fn a_pool_that_others_still_map_is_not_shared() {
    let place = Place::new();
    let mut stock = Stock::of(place.open(&Purpose::small()));
    stock.store(&[1], |_| true);
    let worker = Pool::attach(&stock.pool().ticket()).expect("the owner lives");
    let before = read(&worker, 0, 0);
    drop(stock);
    let opened = place.open(&Purpose::small());
    assert!(!opened.adopted, "adopted while a worker of the dead engine maps it");
    assert_eq!(opened.pool.path(), worker.path());
    let mut stock = Stock::of(opened);
    assert_eq!(stock.hit(&[1]), 0);
    // The late worker writes into memory that is nobody's.
    worker.line(SlotIndex(0)).answer(0, true);
    // SAFETY: the payload is at least one byte long and this mapping is the old file's.
    unsafe { *worker.payload(SlotIndex(0)).as_ptr() ^= 0xff };
    stock.store(&[2], |_| true);
    let pool = stock.pool();
    assert_eq!(read(&pool, 0, 0), crate::blocks::part(2, 0, before.len()));
}

#[test]
fn a_start_waits_for_the_last_process_that_maps_it() {
    let place = Place::new();
    let mut stock = Stock::of(place.open(&Purpose::small()));
    stock.store(&[1], |_| true);
    let worker = Pool::attach(&stock.pool().ticket()).expect("the owner lives");
    drop(stock);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            drop(worker);
        });
        let opened = place.open(&Purpose::small());
        assert!(opened.adopted);
        assert_eq!(Stock::of(opened).hit(&[1]), 16);
    });
}

#[test]
fn a_ticket_of_an_earlier_owner_is_refused() {
    let place = Place::new();
    let first = place.open(&Purpose::small());
    let ticket = first.pool.ticket();
    drop(Pool::attach(&ticket).expect("the owner lives"));
    drop(first);
    // Adopted: the same file, another epoch.
    let second = place.open(&Purpose::small());
    assert!(second.adopted);
    assert!(matches!(Pool::attach(&ticket), Err(Error::DataLost { .. })));
    drop(Pool::attach(&second.pool.ticket()).expect("the new owner's ticket"));
    let ticket = second.pool.ticket();
    drop(second);
    // Replaced: another file, of another size.
    let third = place.open(&Purpose::of(5, 2, 1000));
    assert!(matches!(Pool::attach(&ticket), Err(Error::DataLost { .. })));
    third.pool.unlink().expect("removed");
    assert!(matches!(Pool::attach(&third.pool.ticket()), Err(Error::Io { .. })));
}
