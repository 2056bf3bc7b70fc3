//! What is written is read, and nothing else is.

use kvcellar_block::{ExtentIndex, SaltTag, SlotGeometry};
use kvcellar_engine::nvme::extent::{self, Expected};
use kvcellar_engine::nvme::snapshot::{self, SnapshotEntry, Subject};
use kvcellar_engine::nvme::superblock::{Clean, Superblock};

use kvcellar_testkit::stores::blocks::{geometry, image, key};

fn superblock() -> Superblock {
    let geometry = geometry();
    Superblock {
        store: 7,
        namespace: [3; 16],
        capacity_bytes: 1 << 30,
        segment_bytes: 4 * geometry.slot_bytes,
        cache_generation: 5,
        private: false,
        created_s: 1_700_000_000,
        clean: Some(Clean { next_sequence: 9, snapshot_sum: 11 }),
        facts: r#"{"model":"tiny"}"#.to_owned(),
        geometry,
    }
}

#[test]
fn a_superblock_is_read_as_it_was_written() {
    for (clean, private) in [(None, false), (superblock().clean, false), (superblock().clean, true), (None, true)] {
        let block = Superblock { clean, private, ..superblock() };
        assert_eq!(Superblock::decode(&block.encode().expect("encoded")).expect("whole"), block);
    }
}

#[test]
fn every_flipped_bit_of_a_superblock_is_noticed() {
    let bytes = superblock().encode().expect("encoded");
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(Superblock::decode(&bad).is_err(), "bit {bit}");
    }
    for len in 0..bytes.len() {
        assert!(Superblock::decode(&bytes[..len]).is_err(), "{len} bytes");
    }
    assert!(Superblock::decode(&[&bytes[..], &[0]].concat()).is_err(), "a byte too many");
}

#[test]
fn long_facts_are_cut_at_a_character() {
    let block = Superblock { facts: "ä".repeat(40_000), ..superblock() };
    let facts = Superblock::decode(&block.encode().expect("encoded")).expect("whole").facts;
    assert_eq!(facts, "ä".repeat(16_384));
}

#[test]
fn sizes_that_contradict_each_other_are_refused() {
    type Change = fn(&mut SlotGeometry);
    let changes: [Change; 8] = [
        |geometry| geometry.slot_bytes = 0,
        |geometry| geometry.slot_bytes = 4096,
        |geometry| geometry.slot_bytes += 1,
        |geometry| geometry.descriptor_bytes = 1 << 41,
        |geometry| geometry.payload_bytes[1] = 5000,
        |geometry| geometry.parts[0].spans[0].0 = u64::MAX,
        |geometry| geometry.parts[2].spans.truncate(1),
        |geometry| geometry.parts.clear(),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut block = superblock();
        change(&mut block.geometry);
        assert!(Superblock::decode(&block.encode().expect("encoded")).is_err(), "change {number}");
    }
    for segment_bytes in [0, 8191, 8193] {
        let block = Superblock { segment_bytes, ..superblock() };
        assert!(Superblock::decode(&block.encode().expect("encoded")).is_err(), "{segment_bytes}");
    }
}

fn entries(count: u64) -> Vec<SnapshotEntry> {
    let entry = |number: u64| SnapshotEntry {
        extent: ExtentIndex(number as u32 * 2),
        key: key(number),
        sequence: number * 3,
        written_s: 1_700_000_000 + number,
        salt: SaltTag::of(&number.to_le_bytes()),
    };
    (0..count).map(entry).collect()
}

const SUBJECT: Subject = Subject { store: 7, cache_generation: 5, next_sequence: 9 };

#[test]
fn a_snapshot_is_read_as_it_was_written() {
    for count in [0, 1, 1000] {
        let (bytes, sum) = snapshot::encode(&SUBJECT, &entries(count));
        assert_eq!(bytes.len() as u64, 64 + 64 * count);
        assert_eq!(snapshot::decode(&bytes).expect("whole"), (SUBJECT, entries(count), sum));
    }
}

#[test]
fn a_snapshot_without_tags_is_read_and_nobody_knows_whose_its_blocks_are() {
    let (mut bytes, _) = snapshot::encode(&SUBJECT, &entries(3));
    bytes[8..12].copy_from_slice(&1_u32.to_le_bytes());
    bytes[56..64].fill(0);
    let sum = xxhash_rust::xxh3::xxh3_64(&bytes);
    bytes[56..64].copy_from_slice(&sum.to_le_bytes());
    let (subject, found, found_sum) = snapshot::decode(&bytes).expect("version 1");
    let untagged = entries(3).into_iter().map(|entry| SnapshotEntry { salt: SaltTag::UNKNOWN, ..entry });
    assert_eq!((subject, found, found_sum), (SUBJECT, untagged.collect(), sum));
}

#[test]
fn every_flipped_bit_of_a_snapshot_is_noticed() {
    let (bytes, _) = snapshot::encode(&SUBJECT, &entries(5));
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(snapshot::decode(&bad).is_err(), "bit {bit}");
    }
    for len in 0..bytes.len() {
        assert!(snapshot::decode(&bytes[..len]).is_err(), "{len} bytes");
    }
    assert!(snapshot::decode(&[&bytes[..], &bytes[64..128]].concat()).is_err(), "a record too many");
}

#[test]
fn an_extent_is_what_was_sealed_and_nothing_else() {
    let geometry = geometry();
    let expected = Expected { store: 1, cache_generation: 2, key: None };
    for number in [4, 5] {
        let bytes = image(number, &geometry, 1, 2, 3);
        let check = |expected| extent::check(&bytes, &geometry, &expected);
        assert_eq!(check(expected).expect("whole"), key(number));
        assert_eq!(check(Expected { key: Some(key(number)), ..expected }).expect("whole"), key(number));
        for (wrong, why) in [
            (Expected { store: 9, ..expected }, "belongs to store"),
            (Expected { cache_generation: 1, ..expected }, "generation"),
            (Expected { key: Some(key(number + 2)), ..expected }, "holds block"),
        ] {
            let error = check(wrong).expect_err(why).to_string();
            assert!(error.contains(why), "{error}");
        }
        assert!(extent::check(&bytes[..4096], &geometry, &expected).is_err());
    }
}

#[test]
#[cfg(not(feature = "mutant-unchecked"))]
fn every_changed_payload_byte_is_noticed() {
    let geometry = geometry();
    let expected = Expected { store: 1, cache_generation: 2, key: None };
    for (number, payload) in [(4, 4000), (5, 1600)] {
        let bytes = image(number, &geometry, 1, 2, 3);
        for at in (0..payload).map(|at| 4096 + at) {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert!(extent::check(&bad, &geometry, &expected).is_err(), "byte {at} of block {number}");
        }
    }
}

#[test]
fn groups_and_lengths_that_do_not_fit_are_noticed() {
    let geometry = geometry();
    let expected = Expected { store: 1, cache_generation: 2, key: None };
    let bytes = image(5, &geometry, 1, 2, 3);
    let mut fewer = geometry.clone();
    fewer.payload_bytes.truncate(1);
    let error = extent::check(&bytes, &fewer, &expected).expect_err("no such group").to_string();
    assert!(error.contains("no group 1"), "{error}");
    let mut longer = geometry;
    longer.payload_bytes[1] += 1;
    assert!(extent::check(&bytes, &longer, &expected).is_err());
}
