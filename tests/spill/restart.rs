//! What an engine left on disk serves the next one.

use std::time::{Duration, Instant};

use kvcellar_block::Tier;

use crate::rig::{Places, Rig, hash};

fn everything(chains: u32) -> std::collections::BTreeSet<u64> {
    (0..chains).flat_map(|chain| (0..8).map(move |index| hash(chain, index).low_u64())).collect()
}

fn wait_until_announced(rig: &mut Rig, blocks: u64) {
    let end = Instant::now() + Duration::from_secs(30);
    while (rig.announced(Tier::Nvme).len() as u64) < blocks {
        assert!(Instant::now() < end, "{} of {blocks} blocks were announced", rig.announced(Tier::Nvme).len());
        assert!(rig.lock().pending_work(), "an idle engine steps while blocks are not announced");
        std::thread::sleep(Duration::from_millis(1));
        rig.settle();
    }
}

#[test]
fn a_clean_stop_writes_what_is_dirty_and_leaves_a_snapshot() {
    let mut places = Places::new();
    let mut rig = Rig::open(&places, 66, "64MiB", r#", "clean_percent": 0"#);
    for chain in 0..8 {
        rig.compute(chain, 8);
    }
    assert_eq!(rig.gauges().nvme_blocks, 0, "nothing had to be written yet");
    rig.stop();
    places.forget_pool();
    let mut again = Rig::open(&places, 66, "64MiB", "");
    assert_eq!((again.report().recovery, again.report().blocks), ("snapshot", 64));
    wait_until_announced(&mut again, 64);
    assert_eq!(again.announced(Tier::Nvme), everything(8), "without any request");
    for chain in 0..8 {
        assert_eq!(again.fetch(chain, 8), Ok(8));
    }
    assert_eq!(again.counters().nvme_hit_blocks, 64);
}

#[test]
fn after_a_crash_the_descriptors_tell() {
    let mut places = Places::new();
    let mut rig = Rig::open(&places, 34, "64MiB", r#", "write_through": true"#);
    for chain in 0..8 {
        rig.compute(chain, 8);
    }
    // Dropped without being stopped: no flush, no snapshot.
    drop(rig);
    places.forget_pool();
    let mut again = Rig::open(&places, 34, "64MiB", "");
    assert_eq!((again.report().recovery, again.report().blocks, again.report().damaged), ("scan", 64, 0));
    for chain in 0..8 {
        assert_eq!(again.fetch(chain, 8), Ok(8));
    }
}

#[test]
fn a_removed_directory_takes_the_tier_out_of_service_and_nothing_else() {
    let places = Places::new();
    let mut rig = Rig::open(&places, 34, "64MiB", r#", "write_through": true"#);
    for chain in 0..8 {
        rig.compute(chain, 8);
    }
    for entry in std::fs::read_dir(places.disk.path()).expect("a directory").flatten() {
        std::fs::remove_dir_all(entry.path()).expect("removable");
    }
    let end = Instant::now() + Duration::from_secs(30);
    while rig.gauges().nvme_in_service == 1 {
        assert!(Instant::now() < end, "nobody noticed");
        std::thread::sleep(Duration::from_millis(20));
    }
    rig.settle();
    assert!(rig.announced(Tier::Nvme).is_empty(), "everybody was told");
    assert_eq!(rig.fetch(0, 8), Ok(0));
    assert_eq!(rig.fetch(7, 8), Ok(8), "the dram tier goes on");
    rig.compute(9, 8);
    assert_eq!(rig.fetch(9, 8), Ok(8));
}

#[test]
fn expired_blocks_are_erased() {
    let places = Places::new();
    let mut rig = Rig::open(&places, 34, "64MiB", r#", "write_through": true, "retention": "1s""#);
    rig.compute(1, 8);
    let end = Instant::now() + Duration::from_secs(30);
    while rig.gauges().nvme_blocks > 0 {
        assert!(Instant::now() < end, "nothing expired");
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_millis(100));
    rig.settle();
    assert_eq!(rig.fetch(1, 8), Ok(0), "neither tier keeps it");
    assert!(rig.announced(Tier::Nvme).is_empty());
    let needle = hash(1, 0);
    for path in places.segments() {
        let bytes = std::fs::read(path).expect("a segment");
        assert!(!bytes.windows(32).any(|window| window == needle.as_bytes()), "its bytes are gone from disk");
    }
}
