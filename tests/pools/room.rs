//! Too little memory: a pool is capped, or refused with the name of the setting; never a SIGBUS
//! later.
//!
//! Uses own small tmpfs mounts. Where they cannot be made (no root, no mounts in this container)
//! the tests say so and end.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use kvcellar_block::error::Error;
use kvcellar_engine::pool::Pool;
use kvcellar_engine::pool::budget::Bound;

use crate::mounts::{Tmpfs, touch_all};
use crate::place::{Place, Purpose, bytes_for};
use crate::stock::{Stock, left_behind};

/// Nothing of a pool that could not be made is left.
fn assert_no_pools(dir: &Path) {
    let left: Vec<_> =
        kvcellar_engine::pool::registry::list(dir).expect("listed").into_iter().map(|entry| entry.name).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_pool_is_capped_to_the_file_system() {
    let Some(tmpfs) = Tmpfs::mount(1 << 20) else { return };
    let purpose = Purpose::of(1000, 2, 4096);
    let opened = purpose.open(&tmpfs.path).expect("a smaller pool");
    assert_eq!(opened.budget.expect("a fresh pool").bound, Bound::SharedMemory);
    assert!(opened.pool.bytes() <= 1 << 20 && opened.pool.slot_count() > 50, "{} slots", opened.pool.slot_count());
    touch_all(&opened.pool);
    // Adopted as it is: the wish is the same although the size is not.
    let slots = opened.pool.slot_count();
    drop(opened);
    let again = purpose.open(&tmpfs.path).expect("the same pool");
    assert!(again.adopted && again.pool.slot_count() == slots);
}

#[test]
fn a_file_system_without_room_for_one_block_is_an_error_that_names_dram_size() {
    let Some(tmpfs) = Tmpfs::mount(1 << 20) else { return };
    tmpfs.fill_up(40 << 10);
    let error = Purpose::of(100, 2, 4096).open(&tmpfs.path).expect_err("no room").to_string();
    assert!(error.starts_with("dram_size") && error.contains("free shared memory"), "{error}");
    assert_no_pools(&tmpfs.path);
}

#[test]
fn more_than_the_machine_has_is_an_error_that_names_dram_size() {
    let place = Place::new();
    let error = Purpose { bytes: 1 << 60, total: 1 << 60, ..Purpose::small() }
        .open(place.path())
        .expect_err("too much")
        .to_string();
    assert!(error.starts_with("dram_size") && error.contains("whole memory"), "{error}");
    assert_no_pools(place.path());
    let error = Purpose { bytes: 4096, ..Purpose::small() }.open(place.path()).expect_err("too little").to_string();
    assert!(error.starts_with("dram_size") && error.contains("does not hold one block"), "{error}");
    assert_no_pools(place.path());
}

/// The old pool's memory is counted once: it is free by the time the new pool is measured, or
/// somebody still maps it.
#[test]
fn a_replaced_pool_is_capped_like_a_fresh_one() {
    let Some(tmpfs) = Tmpfs::mount(1 << 20) else { return };
    drop(Purpose::of(1000, 2, 4096).open(&tmpfs.path).expect("a smaller pool"));
    let opened = Purpose::of(900, 2, 9000).open(&tmpfs.path).expect("the other pool's room");
    assert!(!opened.adopted);
    assert!(opened.pool.bytes() <= 1 << 20, "{} bytes", opened.pool.bytes());
    touch_all(&opened.pool);
}

/// A start that finds the memory taken by the workers of a dead engine. Takes
/// `limits::ADOPTION_WAIT_MS`.
#[test]
fn memory_that_others_still_map_is_not_counted() {
    let Some(tmpfs) = Tmpfs::mount(1 << 20) else { return };
    let purpose = Purpose::of(1000, 2, 4096);
    let first = purpose.open(&tmpfs.path).expect("a smaller pool");
    let worker = Pool::attach(&first.pool.ticket()).expect("the owner lives");
    drop(first);
    match purpose.open(&tmpfs.path) {
        Ok(opened) => touch_all(&opened.pool),
        Err(error) => assert!(matches!(error, Error::Config { ref field, .. } if field == "dram_size"), "{error}"),
    }
    touch_all(&worker);
}

/// A pool file with holes, as a restored copy may have, where no page can be had for them any more.
#[test]
fn holes_that_cannot_be_filled_are_noticed_at_start() {
    let Some(tmpfs) = Tmpfs::mount(1 << 20) else { return };
    let purpose = Purpose::of(20, 2, 4096);
    let mut stock = Stock::of(purpose.open(&tmpfs.path).expect("a pool"));
    stock.store(&[1], |_| true);
    drop(stock);
    let file = fs::OpenOptions::new().write(true).open(purpose.file(&tmpfs.path, 0)).expect("opened");
    // The last ten slots become holes.
    let len = file.metadata().expect("looked at").len();
    let holes = 10 * purpose.geometry.slot_bytes;
    file.set_len(len - holes).expect("cut");
    file.set_len(len).expect("grown");
    drop(file);
    tmpfs.fill_up(0);
    match purpose.open(&tmpfs.path) {
        Ok(opened) => touch_all(&opened.pool),
        Err(error) => assert!(error.to_string().contains("dram_size"), "{error}"),
    }
}

#[test]
fn a_pool_as_large_as_wished_is_not_called_bounded() {
    let started = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    let place = Place::new();
    let purpose = Purpose::small();
    let opened = place.open(&purpose);
    let budget = opened.budget.expect("a fresh pool");
    assert_eq!((budget.bound, budget.bytes), (Bound::Configured, bytes_for(8, &purpose.geometry)));
    let entry = kvcellar_engine::pool::registry::list(place.path()).expect("listed").remove(0);
    assert!(entry.created_s.is_some_and(|seconds| seconds >= started));
    assert!(left_behind(&std::sync::Arc::new(opened.pool)).is_empty());
}

#[test]
fn a_wish_above_the_whole_file_system_is_told_before_the_start() {
    let Some(tmpfs) = Tmpfs::mount(1 << 20) else { return };
    let check = |size: &str| {
        let json = format!(r#"{{"dram_size": "{size}", "pool_dir": "{}"}}"#, tmpfs.path.display());
        kvcellar_engine::tier::machine::check(&kvcellar_engine::config::Config::parse(&json).expect("valid"))
            .expect("it can start")
    };
    let warnings = check("64MiB");
    assert!(warnings.len() == 1 && warnings[0].starts_with("dram_size: 64.0 MiB cannot be had"), "{warnings:?}");
    assert!(warnings[0].contains("1.0 MiB in all") && warnings[0].contains("--shm-size"), "{warnings:?}");
    assert!(check("512KiB").is_empty());
}
