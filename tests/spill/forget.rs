//! The right to erasure: what was of a salt is not found, not announced, and its bytes are nowhere,
//! whatever was going on and whatever comes after; what was of others stays as it was.

use std::collections::{BTreeSet, HashSet};

use kvcellar_block::error::Error;
use kvcellar_block::{BlockKey, SaltTag, Tier};
use kvcellar_engine::nvme::disk::Kind;
use kvcellar_engine::owned::erased::Erased;
use kvcellar_engine::tier::Arrival;
use kvcellar_engine::tier::offload::{GroupOffer, Offer, Start};
use kvcellar_engine::{nvme, pool};
use kvcellar_testkit::faulty_disk::{Fault, Rule};
use kvcellar_testkit::random::Random;

use crate::rig::{BLOCK_TOKENS, Places, Rig, content, hash};

const SLOTS: u64 = 34;
const SIZE: &str = "4MiB";
const MORE: &str = r#", "write_through": true"#;
const BLOCKS: u32 = 8;

fn ada() -> SaltTag {
    SaltTag::of(b"ada")
}

fn bob() -> SaltTag {
    SaltTag::of(b"bob")
}

/// What is left of these chains in memory and on disk, by their blocks' names and by their bytes.
fn places_of(places: &Places, chains: &[u32]) -> (usize, usize) {
    let hashes = chains.iter().flat_map(|chain| (0..BLOCKS).map(|index| hash(*chain, index)));
    let needles = hashes.flat_map(|hash| {
        let bytes = content(&hash);
        [hash.as_bytes().to_vec(), bytes[..64].to_vec(), bytes[16_000..16_064].to_vec()]
    });
    places.count(&needles.collect::<Vec<_>>())
}

fn traces(places: &Places, chains: &[u32]) -> usize {
    let (in_memory, on_disk) = places_of(places, chains);
    in_memory + on_disk
}

fn held(rig: &Rig) -> HashSet<(Tier, BlockKey)> {
    rig.lock().held().into_iter().collect()
}

fn is_of(key: &BlockKey, chains: &[u32]) -> bool {
    chains.iter().any(|chain| (0..BLOCKS).any(|index| hash(*chain, index) == key.hash))
}

/// Chains 0 and 1 of one salt, 2 of another, 3 of none.
fn filled(places: &Places, more: &str) -> Rig {
    let mut rig = Rig::open(places, SLOTS, SIZE, more);
    salt(&mut rig);
    for chain in 0..4 {
        rig.compute(chain, BLOCKS);
    }
    rig
}

fn salt(rig: &mut Rig) {
    for (chain, salt) in [(0, ada()), (1, ada()), (2, bob())] {
        rig.salt(chain, salt);
    }
}

/// Others get all of them, and none twice.
fn every_slot_is_free_once(rig: &mut Rig) {
    for chain in 10..18 {
        rig.compute(chain, BLOCKS);
    }
    for chain in 10..18 {
        assert_eq!(rig.fetch(chain, BLOCKS), Ok(BLOCKS));
        rig.settle();
    }
    let gauges = rig.gauges();
    assert_eq!(rig.announced(Tier::Dram).len() as u64, gauges.filled_slots);
    assert_eq!((gauges.free_slots, gauges.filled_slots), (0, gauges.total_slots), "{gauges:?}");
}

/// The next engine finds nothing of hers, and all of the others'.
fn only_hers_are_gone(places: &Places) {
    let mut again = Rig::open(places, SLOTS, SIZE, MORE);
    salt(&mut again);
    assert_eq!((again.fetch(0, BLOCKS), again.fetch(1, BLOCKS)), (Ok(0), Ok(0)));
    assert_eq!((again.fetch(2, BLOCKS), again.fetch(3, BLOCKS)), (Ok(BLOCKS), Ok(BLOCKS)));
    again.settle();
}

#[test]
fn both_tiers_forget_a_salt_durably_and_keep_everything_else() {
    let mut places = Places::new();
    let mut rig = filled(&places, MORE);
    let (in_memory, on_disk) = places_of(&places, &[0, 1]);
    assert!(in_memory > 0 && on_disk >= 3 * 16, "{in_memory} {on_disk}: they were there");
    let before = held(&rig);
    let report = rig.forget(ada());
    let on_disk = before.iter().filter(|(tier, key)| *tier == Tier::Nvme && is_of(key, &[0, 1])).count() as u64;
    let in_memory = before.iter().filter(|(tier, key)| *tier == Tier::Dram && is_of(key, &[0, 1])).count() as u64;
    assert_eq!((report.dram_blocks, report.nvme_blocks, report.failed), (in_memory, on_disk, 0));
    assert_eq!(on_disk, 16, "all of them were there");
    assert_eq!(report.extents_erased, 16);
    assert!(report.slots_erased >= report.dram_blocks, "{report:?}");
    let rest: HashSet<_> = before.into_iter().filter(|(_, key)| !is_of(key, &[0, 1])).collect();
    assert_eq!(held(&rig), rest);
    assert_eq!(traces(&places, &[0, 1]), 0);
    rig.settle();
    for tier in [Tier::Dram, Tier::Nvme] {
        let told = rig.announced(tier);
        let kept = rest.iter().filter(|(of, _)| *of == tier).map(|(_, key)| key.hash.low_u64());
        assert_eq!(told, kept.collect(), "subscribers of {tier:?}");
    }
    assert_eq!((rig.fetch(0, BLOCKS), rig.fetch(1, BLOCKS)), (Ok(0), Ok(0)));
    assert_eq!((rig.fetch(2, BLOCKS), rig.fetch(3, BLOCKS)), (Ok(BLOCKS), Ok(BLOCKS)));
    rig.settle();
    // The machine fails at once: the descriptors on disk tell, and what lies in shared memory.
    drop(rig);
    for keeps_memory in [true, false] {
        if !keeps_memory {
            places.forget_pool();
        }
        only_hers_are_gone(&places);
    }
}

#[test]
fn what_comes_after_is_kept_as_ever_until_it_is_forgotten_too() {
    let places = Places::new();
    let mut rig = filled(&places, MORE);
    for _ in 0..3 {
        rig.forget(ada());
        assert_eq!(rig.fetch(0, BLOCKS), Ok(0));
        rig.compute(0, BLOCKS);
        assert_eq!(rig.fetch(0, BLOCKS), Ok(BLOCKS));
        rig.settle();
        let gauges = rig.gauges();
        assert_eq!(gauges.free_slots + gauges.filled_slots, gauges.total_slots, "{gauges:?}");
        assert_eq!(gauges.nvme_retired, 0, "erased extents are used again");
    }
    rig.forget(ada());
    every_slot_is_free_once(&mut rig);
}

#[test]
fn a_snapshot_knows_whose_blocks_it_lists() {
    let mut places = Places::new();
    filled(&places, "").stop();
    places.forget_pool();
    let mut again = Rig::open(&places, SLOTS, SIZE, "");
    assert_eq!((again.report().recovery, again.report().blocks), ("snapshot", 32));
    let report = again.forget(ada());
    assert_eq!((report.dram_blocks, report.nvme_blocks), (0, 16));
    assert_eq!(traces(&places, &[0, 1]), 0);
    again.settle();
    again.stop();
    let mut last = Rig::open(&places, SLOTS, SIZE, "");
    assert_eq!((last.report().recovery, last.report().blocks), ("snapshot", 16));
    assert_eq!((last.fetch(1, BLOCKS), last.fetch(2, BLOCKS), last.fetch(3, BLOCKS)), (Ok(0), Ok(BLOCKS), Ok(BLOCKS)));
    last.settle();
}

#[test]
fn blocks_of_which_nobody_knows_whose_they_are_go_as_well() {
    // As an earlier version kept them: its descriptors have zeros where the tag is.
    let places = Places::new();
    let mut rig = Rig::open(&places, SLOTS, SIZE, MORE);
    rig.salt(0, SaltTag::UNKNOWN);
    rig.salt(2, bob());
    rig.compute(0, BLOCKS);
    rig.compute(2, BLOCKS);
    drop(rig);
    let mut again = Rig::open(&places, SLOTS, SIZE, MORE);
    again.settle();
    let report = again.forget(ada());
    assert_eq!((report.dram_blocks, report.nvme_blocks), (8, 8));
    assert_eq!((traces(&places, &[0]), again.fetch(0, BLOCKS), again.fetch(2, BLOCKS)), (0, Ok(0), Ok(BLOCKS)));
    again.settle();
}

#[test]
fn bytes_that_blocks_left_behind_go_although_no_start_takes_them_over() {
    // Expired blocks are dropped from memory, where their bytes stay.
    let places = Places::new();
    let mut rig = Rig::open(&places, SLOTS, SIZE, r#", "write_through": true, "retention": "1s""#);
    salt(&mut rig);
    rig.compute(0, BLOCKS);
    until(|| rig.gauges().nvme_blocks == 0);
    rig.settle();
    rig.stop();
    assert!(places_of(&places, &[0]).0 > 0, "they are in memory: this test proves something");
    let mut again = Rig::open(&places, SLOTS, SIZE, MORE);
    let report = again.forget(ada());
    assert_eq!((report.dram_blocks, places_of(&places, &[0]).0), (0, 0));
    again.settle();
    // And what has expired while no engine ran is not taken over from disk.
    let mut places = Places::new();
    let mut rig = Rig::open(&places, SLOTS, SIZE, MORE);
    salt(&mut rig);
    rig.compute(0, BLOCKS);
    rig.stop();
    places.forget_pool();
    // Times are whole seconds.
    std::thread::sleep(std::time::Duration::from_millis(2_100));
    let mut again = Rig::open(&places, SLOTS, SIZE, r#", "retention": "1s""#);
    assert_eq!(again.gauges().nvme_blocks, 0);
    assert!(traces(&places, &[0]) > 0, "they lie on disk: this test proves something");
    let report = again.forget(ada());
    assert_eq!((report.nvme_blocks, traces(&places, &[0])), (0, 0));
    again.settle();
}

#[test]
fn a_start_after_a_crash_amid_it_can_be_told_again() {
    let places = Places::new();
    let mut rig = filled(&places, MORE);
    let _unanswered = rig.begin_to_forget(ada());
    drop(rig);
    let mut again = Rig::open(&places, SLOTS, SIZE, MORE);
    again.settle();
    again.forget(ada());
    assert_eq!(traces(&places, &[0, 1]), 0);
    assert_eq!((again.fetch(0, BLOCKS), again.fetch(2, BLOCKS)), (Ok(0), Ok(BLOCKS)));
    again.settle();
}

#[test]
fn a_stop_amid_it_ends_it() {
    let mut places = Places::new();
    let mut rig = filled(&places, MORE);
    let _unanswered = rig.begin_to_forget(ada());
    rig.stop();
    places.forget_pool();
    assert_eq!(traces(&places, &[0, 1]), 0);
}

#[test]
fn files_that_no_engine_uses_forget_a_salt_too() {
    for clean in [true, false] {
        let places = Places::new();
        let rig = filled(&places, MORE);
        let forget = || {
            let mut outcomes = Vec::new();
            for entry in pool::registry::list(places.pool.path()).expect("listed") {
                outcomes.push(pool::erasure::forget(&entry, ada()));
            }
            for entry in nvme::registry::list(places.disk.path()).expect("listed") {
                outcomes.push(nvme::erasure::forget(&entry.path, ada(), &mut |_, _| ()));
            }
            outcomes
        };
        let busy = |outcome: &_| matches!(outcome, Err(Error::TryLater { .. }));
        assert_eq!(forget().iter().filter(|outcome| busy(outcome)).count(), 2, "an engine uses both");
        assert!(traces(&places, &[0, 1]) > 0, "and nothing has happened");
        if clean {
            rig.stop();
        } else {
            drop(rig);
        }
        let erased: Vec<Erased> = forget().into_iter().map(|outcome| outcome.expect("nobody's")).collect();
        assert!(erased[0].blocks > 0 && (erased[1].blocks, erased[1].unknown) == (16, 0), "{erased:?}");
        assert_eq!(traces(&places, &[0, 1]), 0);
        only_hers_are_gone(&places);
    }
}

#[test]
fn nothing_of_a_request_that_was_there_is_kept() {
    let places = Places::new();
    let mut rig = filled(&places, MORE);
    let (hers, his) = (rig.ask(0, BLOCKS), rig.ask(2, BLOCKS));
    rig.forget(ada());
    rig.forget(bob());
    for (chain, id) in [(0, hers), (2, his)] {
        // Preempted, it asks once more; what it computed is of before all the same.
        rig.lock().lookup(&id, BLOCKS * BLOCK_TOKENS + 1, 0);
        let tokens = (0..BLOCKS * BLOCK_TOKENS).collect();
        let group = GroupOffer { first: 0, blocks: (1..=BLOCKS).collect(), extra: Vec::new() };
        let offer = Offer { request: &id, tokens_from: 0, tokens, groups: vec![group] };
        rig.lock().offer(&offer, Start::AfterStep);
        rig.lock().finish(&id, BLOCKS * BLOCK_TOKENS, BLOCKS * BLOCK_TOKENS);
        rig.step();
        rig.settle();
        assert_eq!((rig.fetch(chain, BLOCKS), traces(&places, &[chain])), (Ok(0), 0), "chain {chain}");
    }
}

#[test]
fn blocks_that_are_read_at_that_moment_go_after_it() {
    let places = Places::new();
    let (mut rig, disk) = Rig::with_faults(&places, SLOTS, 5, MORE);
    salt(&mut rig);
    for chain in 0..8 {
        rig.compute(chain, BLOCKS);
    }
    disk.hold();
    let hers = rig.ask(0, BLOCKS);
    assert_eq!(rig.begin_fetch(&hers, BLOCKS), BLOCKS, "it lies on disk");
    assert!(rig.gauges().nvme_reading > 0);
    let id = rig.begin_to_forget(ada());
    assert!(rig.has_forgotten(&id).is_none(), "the device still writes into slots");
    assert_eq!(rig.fetch(0, BLOCKS), Ok(0), "a lookup misses at once");
    disk.release();
    assert!(rig.wait_for_load(&hers), "what it waits for is nobody's any more");
    rig.lock().finish(&hers, BLOCKS * BLOCK_TOKENS, BLOCKS * BLOCK_TOKENS);
    until(|| rig.has_forgotten(&id).is_some());
    rig.lock().finish(&id, 5, 5);
    assert_eq!((rig.fetch(0, BLOCKS), rig.fetch(1, BLOCKS), rig.fetch(2, BLOCKS)), (Ok(0), Ok(0), Ok(BLOCKS)));
    rig.settle();
    assert_eq!(places_of(&places, &[0, 1]).0, 0, "nothing of it lies in memory");
    let gauges = rig.gauges();
    assert_eq!((gauges.free_slots + gauges.filled_slots, gauges.nvme_retired), (gauges.total_slots, 0), "{gauges:?}");
}

#[test]
fn what_streams_through_the_window_lies_nowhere_after_it() {
    const LONG: u32 = 40;
    let needles = |chain: u32| (0..LONG).map(move |index| content(&hash(chain, index))[..64].to_vec());
    for waits in [false, true] {
        let places = Places::new();
        let (mut rig, disk) = Rig::with_faults(&places, 18, 8, MORE);
        (1..5).for_each(|chain| rig.salt(chain, bob()));
        rig.salt(0, ada());
        for first in (8..=LONG).step_by(8) {
            rig.compute(0, first);
        }
        for chain in 1..4 {
            rig.compute(chain, BLOCKS);
        }
        if waits {
            disk.hold();
        }
        let hers = rig.ask(0, LONG);
        let asked = rig.begin_fetch(&hers, LONG);
        assert!(asked > 18, "{asked} blocks are more than there are slots");
        if !waits {
            assert!(!rig.wait_for_load(&hers));
        }
        let id = rig.begin_to_forget(ada());
        if waits {
            assert!(rig.has_forgotten(&id).is_none(), "reads are under way, and others wait for their slots");
            disk.release();
            assert!(rig.wait_for_load(&hers), "what it waits for is nobody's any more");
        }
        rig.lock().finish(&hers, LONG * BLOCK_TOKENS, LONG * BLOCK_TOKENS);
        until(|| rig.has_forgotten(&id).is_some());
        rig.lock().finish(&id, 5, 5);
        rig.settle();
        assert_eq!(places.count(&needles(0).collect::<Vec<_>>()).0, 0, "waits: {waits}");
        // The window serves on, and what it held of others can be found as well.
        rig.compute(4, 16);
        (1..4).for_each(|chain| rig.compute(chain, BLOCKS));
        assert_eq!(rig.fetch(4, 16), Ok(16));
        rig.settle();
        rig.forget(bob());
        assert_eq!(places.count(&needles(4).collect::<Vec<_>>()).0, 0, "waits: {waits}");
    }
}

#[test]
fn blocks_that_are_written_at_that_moment_go_after_it() {
    let places = Places::new();
    let (mut rig, disk) = Rig::with_faults(&places, SLOTS, 6, MORE);
    salt(&mut rig);
    rig.compute(3, BLOCKS);
    disk.hold();
    let ids = [rig.ask(0, BLOCKS), rig.ask(2, BLOCKS)];
    for (id, first) in ids.iter().zip([1, 1 + BLOCKS]) {
        let tokens = (0..BLOCKS * BLOCK_TOKENS).collect();
        let group = GroupOffer { first: 0, blocks: (first..first + BLOCKS).collect(), extra: Vec::new() };
        let mut engine = rig.lock();
        engine.offer(&Offer { request: id, tokens_from: 0, tokens, groups: vec![group] }, Start::AfterStep);
        engine.finish(id, BLOCKS * BLOCK_TOKENS, BLOCKS * BLOCK_TOKENS);
    }
    rig.step();
    until(|| {
        rig.lock().poll();
        disk.pending().iter().any(|(_, kind, ..)| *kind == Kind::Write) && rig.gauges().nvme_writing == 16
    });
    let id = rig.begin_to_forget(ada());
    assert!(rig.has_forgotten(&id).is_none(), "the device still reads its slots");
    assert_eq!(rig.fetch(0, BLOCKS), Ok(0), "a lookup misses at once");
    disk.release();
    until(|| rig.has_forgotten(&id).is_some());
    rig.lock().finish(&id, 5, 5);
    rig.settle();
    assert_eq!(places_of(&places, &[0, 1]).0, 0, "nothing of it lies in memory");
    assert!(!rig.lock().held().iter().any(|(_, key)| is_of(key, &[0])));
    let others = rig.lock().held().iter().filter(|(tier, key)| *tier == Tier::Nvme && is_of(key, &[2, 3])).count();
    assert_eq!(others, 16, "what went in the same writes is there");
}

#[test]
fn blocks_that_are_copied_at_that_moment_go_after_it() {
    let places = Places::new();
    let mut rig = filled(&places, "");
    let hers = rig.ask(0, BLOCKS);
    {
        let mut engine = rig.lock();
        let tokens = (0..BLOCKS * BLOCK_TOKENS).collect();
        engine.add_request("later", Arrival { salt: ada(), ..Arrival::default() });
        engine.add_hashes("later", &(0..BLOCKS).map(|index| hash(9, index)).collect::<Vec<_>>());
        let group = GroupOffer { first: 0, blocks: (1..=BLOCKS).collect(), extra: Vec::new() };
        engine.offer(&Offer { request: "later", tokens_from: 0, tokens, groups: vec![group] }, Start::AfterStep);
        engine.finish("later", BLOCKS * BLOCK_TOKENS, BLOCKS * BLOCK_TOKENS);
    }
    assert_eq!(rig.gauges().filling_slots, u64::from(BLOCKS), "ordered, and not copied");
    let id = rig.begin_to_forget(ada());
    assert!(rig.has_forgotten(&id).is_none(), "the copies are still to come");
    rig.step();
    until(|| rig.has_forgotten(&id).is_some());
    rig.settle();
    assert_eq!(traces(&places, &[0, 1, 9]), 0);
    rig.lock().finish(&hers, BLOCKS * BLOCK_TOKENS, BLOCKS * BLOCK_TOKENS);
    assert_eq!(rig.fetch(2, BLOCKS), Ok(BLOCKS));
    every_slot_is_free_once(&mut rig);
}

#[test]
fn a_block_that_comes_over_what_is_forgotten_meanwhile_stays() {
    let places = Places::new();
    let mut rig = filled(&places, "");
    (4..8).for_each(|chain| rig.salt(chain, ada()));
    (4..8).for_each(|chain| rig.compute(chain, BLOCKS));
    rig.salt(9, bob());
    // In vLLM's cache are somebody else's bytes, whichever.
    rig.compute(3, BLOCKS);
    let his = rig.ask(9, BLOCKS);
    let tokens = (0..BLOCKS * BLOCK_TOKENS).collect();
    let group = GroupOffer { first: 0, blocks: (1..=BLOCKS).collect(), extra: Vec::new() };
    rig.lock().offer(&Offer { request: &his, tokens_from: 0, tokens, groups: vec![group] }, Start::AfterStep);
    rig.lock().finish(&his, BLOCKS * BLOCK_TOKENS, BLOCKS * BLOCK_TOKENS);
    assert_eq!(rig.gauges().filling_slots, u64::from(BLOCKS), "ordered into her slots, and not copied");
    let id = rig.begin_to_forget(ada());
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(rig.has_forgotten(&id).is_none(), "her bytes are there until his have come");
    rig.step();
    until(|| rig.has_forgotten(&id).is_some());
    rig.settle();
    assert!(rig.lock().held().iter().any(|(_, key)| is_of(key, &[9])), "his came");
    assert_eq!(traces(&places, &[0, 1, 4, 5, 6, 7]), 0);
    every_slot_is_free_once(&mut rig);
}

#[test]
fn an_engine_whose_disk_is_still_to_be_opened_confirms_nothing() {
    let places = Places::new();
    filled(&places, MORE).stop();
    let (mut rig, id) = Rig::open_asked(&places, SLOTS, SIZE, MORE, ada());
    assert!(traces(&places, &[0, 1]) > 0, "it has not begun");
    until(|| rig.has_forgotten(&id).is_some());
    assert_eq!(traces(&places, &[0, 1]), 0);
    assert_eq!((rig.fetch(0, BLOCKS), rig.fetch(2, BLOCKS)), (Ok(0), Ok(BLOCKS)));
    rig.settle();
}

#[test]
fn a_disk_that_fails_keeps_nothing_from_being_forgotten() {
    let places = Places::new();
    let (mut rig, disk) = Rig::with_faults(&places, SLOTS, 7, MORE);
    salt(&mut rig);
    disk.add_rule(Rule::new(Fault::Errno(5)).of(Kind::Write).nth(2).times(4));
    for chain in 0..8 {
        rig.compute(chain, BLOCKS);
    }
    rig.forget(ada());
    assert_eq!((rig.fetch(0, BLOCKS), rig.fetch(1, BLOCKS)), (Ok(0), Ok(0)));
    assert!(!rig.lock().held().iter().any(|(_, key)| is_of(key, &[0, 1])));
    assert_eq!(places_of(&places, &[0, 1]).0, 0);
    rig.settle();
}

fn until(mut done: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !done() {
        assert!(std::time::Instant::now() < end, "it never happened");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Random lives against the plain rule: a forgotten salt leaves nothing anywhere, and takes nothing
/// from anybody else. Tiers so small that chains lose their roots and middles.
#[test]
fn random_lives_leave_nothing_of_what_was_forgotten() {
    let seeds = std::env::var("KVCELLAR_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(6);
    for seed in 0..seeds {
        random_life(seed);
    }
}

fn random_life(seed: u64) {
    const CHAINS: u32 = 12;
    let salt_of = |chain: u32| [ada(), bob(), SaltTag::NONE][(chain % 3) as usize];
    let chains_of = |salt: SaltTag| (0..CHAINS).filter(move |chain| salt_of(*chain) == salt).collect::<Vec<u32>>();
    let mut random = Random::new(seed);
    let mut places = Places::new();
    let open = |places: &Places, random: &mut Random| {
        let more = ["", r#", "write_through": true"#, r#", "clean_percent": 60"#][random.below(3)];
        let mut rig = Rig::open(places, 30, "1500KiB", more);
        (0..CHAINS).for_each(|chain| rig.salt(chain, salt_of(chain)));
        rig
    };
    let mut rig = open(&places, &mut random);
    // Chains of which something may be kept.
    let mut stored: BTreeSet<u32> = BTreeSet::new();
    for step in 0..50 {
        let at = format!("seed {seed}, step {step}");
        let chain = random.below(CHAINS as usize) as u32;
        match random.below(12) {
            0..=4 => {
                rig.compute(chain, 1 + random.below(BLOCKS as usize) as u32);
                stored.insert(chain);
            }
            5..=7 => {
                let found = rig.fetch(chain, BLOCKS);
                assert!(stored.contains(&chain) || found == Ok(0), "{at}: chain {chain} came back: {found:?}");
                rig.settle();
            }
            8 | 9 => {
                let (salt, before) = (salt_of(chain), held(&rig));
                if salt == SaltTag::NONE {
                    continue;
                }
                let gone = chains_of(salt);
                let report = rig.forget(salt);
                assert_eq!(report.failed, 0, "{at}");
                let rest: HashSet<_> = before.into_iter().filter(|(_, key)| !is_of(key, &gone)).collect();
                let after = held(&rig);
                assert!(after.iter().all(|(_, key)| !is_of(key, &gone)), "{at}");
                // The cleaner goes on meanwhile: on disk there may be more than before, or others.
                let in_memory = |all: &HashSet<(Tier, BlockKey)>| {
                    all.iter().filter(|(tier, _)| *tier == Tier::Dram).map(|(_, key)| *key).collect::<HashSet<_>>()
                };
                assert_eq!(in_memory(&after), in_memory(&rest), "{at}");
                assert_eq!(traces(&places, &gone), 0, "{at}");
                stored.retain(|chain| !gone.contains(chain));
            }
            10 => {
                rig.settle();
                rig.stop();
                rig = open(&places, &mut random);
            }
            _ => {
                drop(rig);
                if random.below(2) == 0 {
                    places.forget_pool();
                }
                rig = open(&places, &mut random);
                rig.settle();
            }
        }
    }
}
