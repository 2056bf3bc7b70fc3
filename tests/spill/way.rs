//! Blocks that left memory come back from disk, and nothing else does.

use kvcellar_block::Tier;

use crate::rig::{Places, Rig, hash};

/// Chains of eight blocks, many more than the pool holds.
const CHAINS: u32 = 20;

#[test]
fn what_was_evicted_from_memory_comes_back_from_disk() {
    let places = Places::new();
    let mut rig = Rig::open(&places, 34, "64MiB", "");
    for chain in 0..CHAINS {
        rig.compute(chain, 8);
    }
    let counters = rig.counters();
    assert!(counters.spilled_blocks >= u64::from(CHAINS) * 8 - 34, "{counters:?}");
    for chain in 0..CHAINS {
        assert_eq!(rig.fetch(chain, 8), Ok(8), "chain {chain}");
        rig.settle();
    }
    let after = rig.counters();
    assert!(
        after.nvme_hit_blocks > 0 && after.hit_blocks + after.nvme_hit_blocks == u64::from(CHAINS) * 8,
        "{after:?}"
    );
    assert_eq!((after.load_failures, after.corrupt_extents, after.disk_errors), (0, 0, 0));
    assert_eq!(rig.fetch(CHAINS + 1, 8), Ok(0), "a chain that was never computed");
}

#[test]
fn events_say_what_each_tier_holds() {
    let places = Places::new();
    let mut rig = Rig::open(&places, 34, "64MiB", r#", "write_through": true"#);
    for chain in 0..CHAINS {
        rig.compute(chain, 8);
    }
    assert_eq!(rig.fetch(0, 8), Ok(8));
    rig.settle();
    let everything = (0..CHAINS).flat_map(|chain| (0..8).map(move |index| hash(chain, index).low_u64())).collect();
    assert_eq!(rig.announced(Tier::Nvme), everything);
    let gauges = rig.gauges();
    assert_eq!(rig.announced(Tier::Dram).len() as u64, gauges.filled_slots);
    assert_eq!(gauges.clean_slots, gauges.filled_slots, "everything was written through");
}

#[test]
fn a_prefix_larger_than_the_pool_streams_through_the_window() {
    let places = Places::new();
    let mut rig = Rig::open(&places, 12, "64MiB", r#", "write_through": true"#);
    // Computed in pieces, as chunked prefill does it: the pool never holds all of it.
    for blocks in (4..=40).step_by(4) {
        rig.compute(7, blocks);
    }
    assert_eq!(rig.fetch(7, 40), Ok(40));
    rig.settle();
    let gauges = rig.gauges();
    assert_eq!(gauges.filled_slots + gauges.free_slots, gauges.total_slots);
    assert_eq!(rig.fetch(7, 40), Ok(40), "the window can be used again");
}

#[test]
fn a_full_store_evicts_and_stays_within_its_bound() {
    let places = Places::new();
    let mut rig = Rig::open(&places, 34, "2MiB", r#", "write_through": true"#);
    for chain in 0..CHAINS {
        rig.compute(chain, 8);
        let bytes: u64 = places.segments().iter().map(|path| blocks_of(path)).sum();
        assert!(bytes <= 2 << 20, "{bytes} bytes");
    }
    let counters = rig.counters();
    assert!(counters.nvme_evicted_blocks > 0);
    let found: u32 = (0..CHAINS).map(|chain| rig.fetch(chain, 8).expect("no failure")).sum();
    assert!(found > 34 && found < CHAINS * 8, "{found} blocks were found");
    rig.settle();
    assert_eq!(rig.announced(Tier::Nvme).len() as u64, rig.gauges().nvme_blocks);
}

#[test]
fn damaged_bytes_are_a_miss_and_the_healthy_prefix_is_not() {
    let places = Places::new();
    let mut rig = Rig::open(&places, 34, "64MiB", r#", "write_through": true"#);
    for chain in 0..CHAINS {
        rig.compute(chain, 8);
    }
    flip_a_byte_of_every_extent_but(&places, &[hash(0, 0), hash(0, 1), hash(0, 2)]);
    let id = rig.ask(0, 8);
    assert_eq!(rig.fetch_as(&id, 0, 8), Err(8), "the load fails as a whole");
    assert_eq!(rig.fetch_as(&id, 0, 8), Ok(3), "and the request is given what is healthy");
    rig.settle();
    let counters = rig.counters();
    assert!(counters.corrupt_extents > 0 && counters.load_failures == 1, "{counters:?}");
    assert!(!rig.announced(Tier::Nvme).contains(&hash(0, 3).low_u64()), "its removal was told");
}

#[test]
fn a_reset_leaves_nothing_to_be_found() {
    let mut places = Places::new();
    let mut rig = Rig::open(&places, 34, "64MiB", r#", "write_through": true"#);
    rig.compute(1, 8);
    let report = rig.lock().reset();
    assert_eq!((report.blocks_dropped_dram, report.blocks_dropped_nvme, report.kept), (8, 8, false));
    assert_eq!(rig.fetch(1, 8), Ok(0));
    rig.settle();
    assert!(rig.announced(Tier::Nvme).is_empty() && rig.announced(Tier::Dram).is_empty());
    // Of other weights, which no later start has.
    rig.compute(2, 8);
    assert_eq!((rig.fetch(2, 8), rig.gauges().nvme_blocks), (Ok(8), 8), "this engine goes on with both tiers");
    rig.stop();
    for lost_memory in [false, true] {
        if lost_memory {
            places.forget_pool();
        }
        let mut again = Rig::open(&places, 34, "64MiB", "");
        assert_eq!((again.report().recovery, again.report().blocks), ("fresh", 0));
        assert_eq!([again.fetch(1, 8), again.fetch(2, 8)], [Ok(0), Ok(0)], "nor by the next engine");
        again.lock().reset();
    }
}

#[test]
fn who_keeps_on_reset_keeps_both_tiers() {
    let mut places = Places::new();
    let mut rig = Rig::open(&places, 34, "64MiB", r#", "write_through": true, "on_reset": "keep""#);
    rig.compute(1, 8);
    assert!(rig.lock().reset().kept);
    assert_eq!((rig.fetch(1, 8), rig.gauges().nvme_blocks), (Ok(8), 8));
    rig.stop();
    places.forget_pool();
    assert_eq!(Rig::open(&places, 34, "64MiB", "").fetch(1, 8), Ok(8));
}

#[test]
fn a_disk_without_room_is_told_with_the_reason() {
    let places = Places::new();
    let mut rig = Rig::open(&places, 34, "64MiB", r#", "write_through": true, "nvme_reserve": "4000TiB""#);
    let told = rig.report().warnings.join("");
    assert!(
        told.contains("holds nothing") && told.contains("free, reserve") && told.contains("nvme_reserve"),
        "{told}"
    );
    rig.compute(1, 8);
    assert_eq!(rig.fetch(1, 8), Ok(8), "memory serves");
}

#[test]
fn an_engine_for_which_no_disk_is_left_serves_from_memory() {
    // Memory of its own for each; the disk is one.
    let (places, elsewhere) = (Places::new(), Places::new());
    let mut first = Rig::open(&places, 34, "64MiB", "");
    let mut second =
        Rig::try_open(elsewhere.pool.path(), places.disk.path(), 34, "64MiB", "").expect("an engine with memory alone");
    assert_eq!((first.report().warnings.len(), second.report().extents_max), (0, 0));
    let told = second.report().warnings.join("");
    assert!(told.contains("nvme_size 64.0 MiB") && told.contains(&std::process::id().to_string()), "{told}");
    for rig in [&mut first, &mut second] {
        rig.compute(1, 8);
        assert_eq!(rig.fetch(1, 8), Ok(8));
        // And it waits for no disk to be opened.
        rig.forget(kvcellar_block::SaltTag::of(b"ada"));
    }
}

#[test]
fn load_policy_never_uses_memory_only() {
    let places = Places::new();
    let mut rig = Rig::open(&places, 34, "64MiB", r#", "write_through": true, "load_policy": "never""#);
    for chain in 0..CHAINS {
        rig.compute(chain, 8);
    }
    assert_eq!(rig.fetch(0, 8), Ok(0));
    assert_eq!(rig.fetch(CHAINS - 1, 8), Ok(8));
}

#[test]
fn load_policy_auto_computes_what_is_computed_faster() {
    let places = Places::new();
    let mut rig = Rig::open(&places, 34, "64MiB", r#", "write_through": true, "load_policy": "auto""#);
    for chain in 0..CHAINS {
        rig.compute(chain, 8);
    }
    assert_eq!(rig.fetch(0, 8), Ok(8), "nothing is known yet: loaded, to learn");
    rig.settle();
    rig.lock().prefilled(1 << 40, 1.0);
    assert_eq!(rig.fetch(1, 8), Ok(0), "no disk is faster than that");
    rig.settle();
    let counters = rig.counters();
    assert_eq!((counters.load_decisions, counters.recompute_decisions), (1, 1));
}

#[test]
fn what_each_tier_saved_is_its_tokens_over_the_rate_of_prefill() {
    let places = Places::new();
    let mut rig = Rig::open(&places, 34, "64MiB", r#", "write_through": true"#);
    for chain in 0..CHAINS {
        rig.compute(chain, 8);
    }
    let saved = |rig: &Rig| {
        let counters = rig.counters();
        let tokens = (counters.hit_tokens, counters.nvme_hit_tokens);
        (tokens, (counters.saved_us, counters.nvme_saved_us))
    };
    assert_eq!(rig.fetch(CHAINS - 1, 8), Ok(8));
    assert_eq!(rig.fetch(0, 8), Ok(8));
    rig.settle();
    let ((dram, nvme), nothing) = saved(&rig);
    assert!(dram > 0 && nvme > 0, "one chain from memory, one from disk");
    assert_eq!(nothing, (0, 0), "no step was measured yet");
    rig.lock().prefilled(1000, 0.25);
    assert_eq!(saved(&rig).1, (dram * 250, nvme * 250), "what was loaded before counts, too");
    assert_eq!(rig.fetch(1, 8), Ok(8));
    rig.settle();
    let ((dram, nvme), seconds) = saved(&rig);
    assert_eq!(seconds, (dram * 250, nvme * 250));
    // A load that fails saves nothing.
    flip_a_byte_of_every_extent_but(&places, &[]);
    assert_eq!(rig.fetch(2, 8), Err(8));
    rig.settle();
    assert_eq!(saved(&rig).1, seconds);
    // Of eight blocks of a prompt the last has to be computed. The store holds all of them.
    let found = rig.counters().what_if;
    let (looked_up, first_uses) = ((u64::from(CHAINS) + 4) * 7, u64::from(CHAINS) * 7);
    assert_eq!(found.blocks, looked_up);
    assert!(found.infinite_misses.abs_diff(first_uses) <= 2, "{found:?}");
    assert!(found.now_misses.abs_diff(first_uses) <= first_uses / 5, "a part is sampled: {found:?}");
}

fn blocks_of(path: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    path.metadata().expect("a file").blocks() * 512
}

/// Extents are known by the hash in their descriptor.
fn flip_a_byte_of_every_extent_but(places: &Places, spared: &[kvcellar_block::BlockHash]) {
    for path in places.segments() {
        let mut bytes = std::fs::read(&path).expect("a segment");
        let extent = kvcellar_extent_bytes();
        for image in bytes.chunks_exact_mut(extent) {
            let keep = spared.iter().any(|hash| image[32..64] == *hash.as_bytes());
            if !keep {
                image[extent - 5_000] ^= 1;
            }
        }
        std::fs::write(&path, bytes).expect("a segment");
    }
}

/// One page of descriptor, five of payload.
fn kvcellar_extent_bytes() -> usize {
    4096 + crate::rig::BLOCK_BYTES.next_multiple_of(4096)
}
