//! `kvcellar store` on what lies there.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use kvcellar_block::error::Error;
use kvcellar_engine::nvme::inspection::{self, Inspected};
use kvcellar_engine::nvme::registry::{list, remove};

use kvcellar_testkit::stores::place::{Engine, Place};

fn states(place: &Place) -> Vec<(String, &'static str)> {
    list(place.path())
        .expect("listed")
        .into_iter()
        .map(|entry| (entry.name[32..].to_owned(), entry.state.as_str()))
        .collect()
}

fn wanted(entries: &[(&str, &'static str)]) -> Vec<(String, &'static str)> {
    entries.iter().map(|(name, state)| ((*name).to_owned(), *state)).collect()
}

fn run(place: &Place, words: &[&str]) -> i32 {
    let dir = place.path().to_str().expect("text");
    let (part, rest) = words.split_first().expect("a command");
    kvcellar_command::run(["store", part, dir].iter().chain(rest).map(|word| (*word).to_owned()).collect())
}

fn filled(place: &Place, blocks: u64) -> Engine {
    let mut engine = place.open();
    for number in 0..blocks {
        engine.put(number as u32, number);
    }
    engine
}

fn flip(place: &Place, index: u32, file: &str, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(place.file(index, file)).expect("opened");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 1], at).expect("written");
}

#[test]
fn nothing_is_listed_where_nothing_is() {
    let place = Place::new();
    assert!(list(place.path()).expect("listed").is_empty());
    assert!(list(&place.path().join("nowhere")).expect("listed").is_empty());
    for command in [&["ls"][..], &["ls", "--json"], &["stat"], &["verify"], &["drop", "--yes"]] {
        assert_eq!(run(&place, command), 0, "{command:?}");
    }
    assert_eq!(run(&place, &["stat", "nobody"]), 1);
    assert_eq!(fs::read_dir(place.path()).expect("listed").count(), 0, "looking made something");
}

#[test]
fn each_state_is_told_and_removal_minds_it() {
    let place = Place::new();
    let used = filled(&place, 5);
    let [left, damaged] = [(); 2].map(|()| place.open());
    let left_path = left.store.path().to_owned();
    left.close();
    drop(damaged);
    flip(&place, 2, "superblock", 40);
    fs::create_dir(place.file(0, "../not-a-store")).expect("made");
    let entries = list(place.path()).expect("listed");
    assert_eq!(states(&place), wanted(&[("-0", "used"), ("-1", "left"), ("-2", "damaged")]));
    assert_eq!((entries[0].owner_pid, entries[0].extents), (Some(std::process::id()), Some(8)));
    assert_eq!(entries[0].facts.as_ref().expect("facts")["model"], "tiny");
    assert!(entries[0].bytes >= 8 * 8192 && entries[0].bytes <= entries[0].capacity_bytes.expect("known"));
    assert_eq!((entries[2].extents, entries[2].created_s), (None, None));
    let error = remove(&entries[0]).expect_err("it is used");
    assert!(
        matches!(error, Error::TryLater { .. }) && error.to_string().contains(&std::process::id().to_string()),
        "{error}"
    );
    fs::write(left_path.join("notes.txt"), b"somebody's").expect("written");
    assert!(matches!(remove(&entries[1]), Err(Error::Io { .. })), "somebody's file lies there");
    assert!(left_path.join("notes.txt").exists());
    fs::remove_file(left_path.join("notes.txt")).expect("removed");
    assert_eq!(run(&place, &["drop"]), 2, "nobody was asked");
    assert_eq!(states(&place).len(), 3);
    assert_eq!(run(&place, &["drop", "--yes", &entries[0].name]), 1);
    assert_eq!(run(&place, &["drop", "--yes"]), 0);
    assert_eq!(states(&place), wanted(&[("-0", "used")]));
    assert!(used.store.still_there());
    drop(used);
    assert_eq!(run(&place, &["drop", "--yes", &entries[0].name]), 0);
    assert_eq!(states(&place), []);
}

#[test]
fn an_entry_that_vanished_is_not_made_again() {
    let place = Place::new();
    drop(place.open());
    let entry = list(place.path()).expect("listed").remove(0);
    remove(&entry).expect("nobody owns it");
    assert!(matches!(remove(&entry), Err(Error::Io { .. })));
    assert!(!entry.path.exists());
}

fn stat(place: &Place, index: u32) -> Inspected {
    inspection::stat(&place.file(index, ""), &mut |_, _| {}).expect("looked")
}

#[test]
fn contents_are_counted_by_snapshot_or_by_descriptors() {
    let place = Place::new();
    let mut engine = filled(&place, 3);
    engine.store.bump_cache_generation().expect("bumped");
    engine.entries.clear();
    engine.put(5, 5);
    engine.put(6, 6);
    let by_descriptors = stat(&place, 0);
    let expected = Inspected {
        read: "descriptors",
        extents: 8,
        used: 2,
        empty: 3,
        stale: 3,
        used_bytes: 2 * 8192,
        oldest_s: Some(1004),
        newest_s: Some(1005),
        ..Inspected::default()
    };
    assert_eq!(by_descriptors, expected);
    engine.close();
    assert_eq!(stat(&place, 0), Inspected { read: "snapshot", empty: 6, stale: 0, ..expected.clone() });
    flip(&place, 0, "snapshot", 70);
    assert_eq!(stat(&place, 0), expected);
    assert_eq!(run(&place, &["stat"]), 0);
}

#[test]
fn damage_is_found_told_and_dropped() {
    let place = Place::new();
    let engine = filled(&place, 6);
    assert_eq!(run(&place, &["verify"]), 0, "one that an engine owns is passed over");
    engine.close();
    assert_eq!(run(&place, &["verify"]), 0);
    flip(&place, 0, "segment-00000", 8192 + 4096 + 10);
    flip(&place, 0, "segment-00001", 8192 + 3);
    let look = |repair| inspection::verify(&place.file(0, ""), repair, &mut |_, _| {}).expect("looked");
    let found = look(false);
    let places: Vec<_> = found.damaged.iter().map(|damage| (damage.segment, damage.offset)).collect();
    assert_eq!((found.used, found.empty, found.dropped), (4, 2, 0));
    assert_eq!(places, [(0, 8192), (1, 8192)]);
    assert_eq!(run(&place, &["verify", "--json"]), 1);
    assert_eq!(run(&place, &["verify", "--repair"]), 1);
    let found = look(false);
    assert_eq!((found.used, found.empty, found.damaged.len()), (4, 4, 0));
    assert_eq!(run(&place, &["verify"]), 0);
    let mut engine = place.open();
    assert_eq!(engine.recovery, kvcellar_engine::nvme::store::Recovery::Scan, "the snapshot lists what was dropped");
    engine.recover();
    assert_eq!(engine.known().iter().map(|(extent, _)| *extent).collect::<Vec<_>>(), [0, 2, 3, 4]);
    drop(engine);
    flip(&place, 0, "superblock", 9);
    assert_eq!(run(&place, &["verify"]), 1);
}

#[test]
fn payloads_are_those_of_whole_blocks() {
    let place = Place::new();
    let compress = |more: &[&str]| {
        let dir = place.path().to_str().expect("text");
        kvcellar_command::run(["bench", "compression", dir].iter().chain(more).map(|word| (*word).to_owned()).collect())
    };
    assert_eq!(compress(&[]), 1, "there is no block");
    let engine = filled(&place, 6);
    let lengths = |most: usize| {
        let mut seen = Vec::new();
        let looked = inspection::payloads(&place.file(0, ""), &mut |payload| {
            seen.push(payload.len());
            Ok(seen.len() < most)
        });
        looked.map(|()| seen)
    };
    assert!(matches!(lengths(9), Err(Error::TryLater { .. })), "an engine owns it");
    assert_eq!(compress(&[]), 1, "an engine owns it");
    engine.close();
    // The third rank has the first one's bytes and writes none.
    assert_eq!(lengths(9).expect("looked"), [4000, 1600, 4000, 1600, 4000, 1600]);
    assert_eq!(lengths(2).expect("looked"), [4000, 1600]);
    flip(&place, 0, "segment-00000", 8192 + 4096 + 10);
    assert_eq!(lengths(9).expect("looked"), [4000, 4000, 1600, 4000, 1600]);
    assert_eq!(compress(&["--json", "--blocks", "3"]), 0);
    assert_eq!(compress(&["--value-bytes", "0"]), 2);
}
