//! A disk that fails: a miss, a count, an event; and the engine goes on.

use std::time::{Duration, Instant};

use kvcellar_block::Tier;
use kvcellar_engine::nvme::disk::Kind;

use crate::rig::{BLOCK_TOKENS, Places, Rig, hash};
use kvcellar_testkit::faulty_disk::{Fault, Rule};

const CHAINS: u32 = 8;
const SLOTS: u64 = 34;
const MORE: &str = r#", "write_through": true"#;
/// The errno of a medium that cannot be read.
const EIO: i32 = 5;

/// Everything a slot can be, adds up, and nothing is held.
fn accounts(rig: &mut Rig) {
    rig.settle();
    let gauges = rig.gauges();
    assert_eq!(gauges.free_slots + gauges.filled_slots, gauges.total_slots, "{gauges:?}");
    assert_eq!(rig.announced(Tier::Dram).len() as u64, gauges.filled_slots);
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "{what} never happened");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_block_that_cannot_be_read_fails_its_load_once() {
    let places = Places::new();
    let (mut rig, disk) = Rig::with_faults(&places, SLOTS, 1, MORE);
    for chain in 0..CHAINS {
        rig.compute(chain, 8);
    }
    disk.add_rule(Rule::new(Fault::Errno(EIO)).of(Kind::Read).nth(0).times(1));
    let id = rig.ask(0, 8);
    let first = rig.fetch_as(&id, 0, 8);
    assert!(first.is_err(), "{first:?}");
    let again = rig.fetch_as(&id, 0, 8).expect("the healthy part");
    assert!(again < 8, "the part that failed is not asked for again");
    let counters = rig.counters();
    assert!(counters.disk_errors > 0 && counters.load_failures == 1, "{counters:?}");
    accounts(&mut rig);
    assert_eq!(rig.announced(Tier::Nvme).len() as u64, rig.gauges().nvme_blocks);
}

#[test]
fn short_lost_and_torn_transfers_never_become_bytes() {
    for fault in [Fault::Short(4096), Fault::Lost, Fault::Torn(8192)] {
        for kind in [Kind::Read, Kind::Write] {
            let places = Places::new();
            let (mut rig, disk) = Rig::with_faults(&places, SLOTS, 2, MORE);
            disk.add_rule(Rule::new(fault).of(kind).nth(3).times(2));
            for chain in 0..CHAINS {
                rig.compute(chain, 8);
            }
            for chain in 0..CHAINS {
                // The rig compares every byte that comes back; a load that fails is as good.
                let _served = rig.fetch(chain, 8);
                rig.settle();
            }
            let counters = rig.counters();
            assert!(counters.disk_errors + counters.corrupt_extents > 0, "{fault:?} {kind:?}: {counters:?}");
            accounts(&mut rig);
        }
    }
}

#[test]
fn a_dead_disk_is_left_alone_and_a_healed_one_comes_back() {
    let places = Places::new();
    let (mut rig, disk) = Rig::with_faults(&places, SLOTS, 3, MORE);
    for chain in 0..CHAINS {
        rig.compute(chain, 8);
    }
    let stored = rig.announced(Tier::Nvme).len();
    assert_eq!(stored, 8 * CHAINS as usize);
    disk.add_rule(Rule::new(Fault::Errno(EIO)));
    for chain in 20..20 + CHAINS {
        rig.compute(chain, 2);
    }
    until("going out of service", || rig.gauges().nvme_in_service == 0);
    rig.settle();
    assert!(rig.announced(Tier::Nvme).is_empty(), "everybody was told");
    assert_eq!(rig.fetch(0, 8), Ok(0), "not even tried");
    assert_eq!(rig.fetch(20 + CHAINS - 1, 2), Ok(2), "the dram tier goes on");
    disk.clear_rules();
    until("coming back", || rig.gauges().nvme_in_service == 1);
    until("announcing", || {
        rig.settle();
        rig.announced(Tier::Nvme).len() as u64 >= rig.gauges().nvme_blocks
    });
    assert!(rig.announced(Tier::Nvme).contains(&hash(0, 0).low_u64()));
    assert_eq!(rig.fetch(0, 8), Ok(8));
    assert_eq!(rig.counters().nvme_outages, 1);
    accounts(&mut rig);
}

#[test]
fn completions_in_any_order_are_all_the_same() {
    let places = Places::new();
    let (mut rig, disk) = Rig::with_faults(&places, SLOTS, 4, MORE);
    disk.reorder();
    for chain in 0..CHAINS {
        rig.compute(chain, 8);
    }
    for round in 0..3 {
        for chain in 0..CHAINS {
            assert_eq!(rig.fetch(chain, 8), Ok(8), "round {round}");
            rig.settle();
        }
    }
    accounts(&mut rig);
}

#[test]
fn a_read_that_takes_too_long_fails_its_load_and_keeps_its_slots() {
    let places = Places::new();
    let (mut rig, disk) = Rig::with_faults(&places, SLOTS, 5, MORE);
    for chain in 0..CHAINS {
        rig.compute(chain, 8);
    }
    disk.hold();
    let held = rig.fetch(0, 8);
    assert!(held.is_err(), "{held:?}");
    let gauges = rig.gauges();
    assert!(gauges.filling_slots > 0 || gauges.filled_slots < gauges.total_slots, "{gauges:?}");
    assert!(gauges.nvme_reading > 0, "the device still has the buffers");
    disk.release();
    accounts(&mut rig);
    assert_eq!(rig.gauges().nvme_reading, 0);
    assert_eq!(rig.fetch(CHAINS - 1, 8), Ok(8));
}

#[test]
fn a_reset_makes_reads_under_way_worthless() {
    let places = Places::new();
    let (mut rig, disk) = Rig::with_faults(&places, SLOTS, 7, MORE);
    for chain in 0..CHAINS {
        rig.compute(chain, 8);
    }
    disk.hold();
    let id = rig.ask(0, 8);
    assert_eq!(rig.begin_fetch(&id, 8), 8);
    until("reading", || rig.gauges().nvme_reading > 0);
    rig.lock().reset();
    disk.release();
    assert!(rig.wait_for_load(&id), "what was read is of before the reset");
    rig.lock().finish(&id, 8 * BLOCK_TOKENS, 8 * BLOCK_TOKENS);
    rig.settle();
    for chain in 0..CHAINS {
        assert_eq!(rig.fetch(chain, 8), Ok(0), "chain {chain}");
    }
    accounts(&mut rig);
}

#[test]
fn an_extent_whose_read_failed_is_not_written_again() {
    let places = Places::new();
    let (mut rig, disk) = Rig::with_faults(&places, SLOTS, 6, MORE);
    for chain in 0..CHAINS {
        rig.compute(chain, 8);
    }
    disk.add_rule(Rule::new(Fault::Errno(EIO)).of(Kind::Read).nth(0).times(1));
    let lost = rig.fetch(0, 8);
    assert!(lost.is_err(), "{lost:?}");
    rig.settle();
    let (retired, extents) = (rig.gauges().nvme_retired, rig.gauges().nvme_extents);
    assert!(retired > 0, "{:?}", rig.gauges());
    // Many more blocks than there are extents: whatever may be handed out is.
    for chain in 20..20 + extents as u32 / 8 + 8 {
        rig.compute(chain, 8);
    }
    let gauges = rig.gauges();
    assert_eq!((gauges.nvme_retired, gauges.nvme_extents), (retired, extents));
    assert_eq!(gauges.nvme_blocks, extents - retired, "all the others hold blocks, and those none");
}
