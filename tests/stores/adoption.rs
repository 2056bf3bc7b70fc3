//! What a later engine finds: everything after a clean close, everything whole after a crash,
//! nothing of an earlier generation.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};

use kvcellar_block::error::Error;
use kvcellar_engine::nvme::recovery;
use kvcellar_engine::nvme::registry::list;
use kvcellar_engine::nvme::store::{Recovery, Store, Wish};

use kvcellar_testkit::stores::blocks::{is_block, key};
use kvcellar_testkit::stores::place::{Engine, Place, SMALL};

fn filled(place: &Place, blocks: u64) -> Engine {
    let mut engine = place.open();
    assert_eq!(engine.recovery, Recovery::Fresh);
    for number in 0..blocks {
        engine.put(number as u32, number);
    }
    engine
}

fn all_readable(engine: &Engine, blocks: u64) {
    let wanted: Vec<_> = (0..blocks).map(|number| (number as u32, key(number))).collect();
    assert_eq!(engine.known(), wanted);
    for number in 0..blocks {
        assert_eq!(engine.check(number as u32, Some(key(number))).expect("whole"), key(number));
        assert!(is_block(&engine.bytes(number as u32), engine.store.geometry(), number));
    }
}

#[test]
fn a_clean_close_needs_no_scan() {
    let place = Place::new();
    let engine = filled(&place, 10);
    let (id, next) = (engine.store.id(), engine.sequence);
    engine.close();
    let mut engine = place.open();
    assert!(matches!(&engine.recovery, Recovery::Snapshot(entries, found) if entries.len() == 10 && *found == next));
    assert_eq!((engine.store.id(), engine.why.as_str()), (id, ""));
    engine.recover();
    all_readable(&engine, 10);
    assert!(!place.file(0, "snapshot").exists(), "it describes what may change now");
    drop(engine);
    assert_eq!(place.open().recovery, Recovery::Scan, "opening marked it");
}

#[test]
fn an_older_snapshot_is_not_taken_for_the_present_one() {
    let place = Place::new();
    filled(&place, 10).close();
    let snapshot = place.file(0, "snapshot");
    let older = fs::read(&snapshot).expect("read");
    let mut engine = place.open();
    engine.recover();
    // Nothing is written, so that even the next sequence number is the same.
    engine.store.erase(kvcellar_block::ExtentIndex(3)).expect("erased");
    engine.entries.retain(|entry| entry.extent.0 != 3);
    engine.close();
    let file = fs::OpenOptions::new().write(true).truncate(true).open(&snapshot).expect("opened");
    std::os::unix::fs::FileExt::write_all_at(&file, &older, 0).expect("written");
    let mut engine = place.open();
    assert_eq!((&engine.recovery, engine.why.as_str()), (&Recovery::Scan, "its snapshot belongs to another close"));
    engine.recover();
    assert_eq!(engine.known().len(), 9);
}

#[test]
fn a_crash_is_scanned() {
    let place = Place::new();
    let engine = filled(&place, 10);
    let next = engine.sequence;
    drop(engine);
    let mut engine = place.open();
    assert_eq!((&engine.recovery, engine.why.as_str()), (&Recovery::Scan, "it was not closed"));
    let scanned = engine.scan();
    assert_eq!((scanned.damaged, scanned.empty, scanned.next_sequence), (0, 2, next));
    engine.recover();
    all_readable(&engine, 10);
    let mut heard = Vec::new();
    let (completions, arrivals) = recovery::channel();
    let segments = place.file(0, "");
    let files = (0..3).map(|number| fs::File::open(segments.join(format!("segment-{number:05}"))).expect("there"));
    let disk = kvcellar_testkit::stores::disk::PlainDisk::new(files.collect(), completions);
    let buffers = recovery::buffers(&engine.store);
    let same = recovery::scan(&engine.store, &disk, &arrivals, buffers, &mut |done, all| heard.push((done, all)));
    assert_eq!(same.expect("scanned"), scanned);
    assert_eq!(heard.last(), Some(&(12, 12)));
    assert_eq!(*disk.deepest.lock().expect("unpoisoned"), 12, "reads go in batches");
}

#[test]
fn few_buffers_read_all_extents() {
    let place = Place::new();
    drop(filled(&place, 16));
    let engine = place.open();
    let (completions, arrivals) = recovery::channel();
    let files =
        (0..4).map(|number| fs::File::open(place.file(0, &format!("segment-{number:05}"))).expect("there")).collect();
    let disk = kvcellar_testkit::stores::disk::PlainDisk::new(files, completions);
    let mut buffers = recovery::buffers(&engine.store);
    buffers.truncate(3);
    let scanned = recovery::scan(&engine.store, &disk, &arrivals, buffers, &mut |_, _| {}).expect("scanned");
    assert_eq!(scanned.entries.len(), 16);
    let none = recovery::scan(&engine.store, &disk, &arrivals, Vec::new(), &mut |_, _| {});
    assert!(matches!(none, Err(Error::Config { .. })));
}

#[test]
fn the_later_of_two_extents_counts() {
    let place = Place::new();
    let mut engine = place.open();
    for (extent, number) in [(5, 1), (2, 1), (3, 2), (1, 2)] {
        engine.put(extent, number);
    }
    drop(engine);
    let mut engine = place.open();
    engine.recover();
    assert_eq!(engine.known(), [(1, key(2)), (2, key(1))]);
}

#[test]
fn an_earlier_generation_is_worthless() {
    let place = Place::new();
    let mut engine = filled(&place, 4);
    assert_eq!(engine.store.bump_cache_generation().expect("bumped"), 1);
    engine.put(4, 4);
    assert!(engine.check(0, None).is_err() && engine.check(4, None).is_ok());
    assert_eq!(engine.store.cache_generation(), 1);
    let scanned = engine.scan();
    assert_eq!((scanned.entries.len(), scanned.empty, scanned.next_sequence), (1, 7, engine.sequence));
}

#[test]
fn what_follows_a_reset_is_nobody_elses() {
    for clean in [false, true] {
        let place = Place::new();
        let mut engine = filled(&place, 4);
        let id = engine.store.id();
        engine.store.bump_cache_generation().expect("bumped");
        engine.entries.clear();
        engine.put(4, 4);
        if clean {
            engine.close();
        } else {
            drop(engine);
        }
        assert!(list(place.path()).expect("listed")[0].private);
        let engine = place.open();
        assert_eq!((&engine.recovery, engine.store.extents_ready()), (&Recovery::Fresh, 0), "closed: {clean}");
        assert!(engine.why.contains("weights") && engine.store.id() != id, "{}", engine.why);
        drop(engine);
        // The mark went with what it was on.
        let mut engine = place.open();
        assert_eq!(engine.recovery, Recovery::Scan);
        engine.put(0, 1);
        engine.close();
        assert!(matches!(place.open().recovery, Recovery::Snapshot(..)));
    }
}

#[test]
fn a_kill_right_after_a_reset_brings_nothing_back() {
    let place = Place::new();
    let (mut child, _input) = owner(&place, true);
    child.kill().expect("killed");
    child.wait().expect("ended");
    let engine = place.open();
    assert_eq!((&engine.recovery, engine.taken.len()), (&Recovery::Fresh, 0));
    assert!(engine.why.contains("weights"), "{}", engine.why);
}

#[test]
fn a_generation_that_cannot_be_written_ends_the_store() {
    let place = Place::new();
    filled(&place, 4).close();
    let mut engine = place.open();
    fs::create_dir(place.file(0, "superblock.new")).expect("in the way");
    assert!(engine.store.bump_cache_generation().is_err());
    assert!(!engine.store.still_there());
    drop(engine);
    fs::remove_dir(place.file(0, "superblock.new")).expect("removed");
    let engine = place.open();
    assert_eq!((&engine.recovery, engine.store.extents_ready()), (&Recovery::Fresh, 0), "contents came back");
    assert_eq!(engine.why, "its superblock is missing");
}

#[test]
fn unreadable_extents_are_damaged_and_no_more() {
    let place = Place::new();
    drop(filled(&place, 12));
    let engine = place.open();
    *engine.disk.broken.lock().expect("unpoisoned") = Some(1);
    let scanned = engine.scan();
    assert_eq!((scanned.entries.len(), scanned.damaged), (8, 4));
}

#[test]
fn erased_extents_are_gone_and_keep_their_room() {
    let place = Place::new();
    let mut engine = filled(&place, 4);
    engine.store.erase(kvcellar_block::ExtentIndex(2)).expect("erased");
    assert!(engine.bytes(2).iter().all(|byte| *byte == 0));
    assert!(engine.store.erase(kvcellar_block::ExtentIndex(4)).is_err());
    engine.sequence = 50;
    drop(engine);
    let mut engine = place.open();
    engine.recover();
    assert_eq!(engine.known(), [0, 1, 3].map(|number| (number as u32, key(number))));
    engine.put(2, 9);
}

#[test]
fn contents_are_left_alone_only_where_they_fit() {
    type Change = fn(&mut Wish<'_>);
    let changes: [(&str, Change); 3] = [
        ("", |wish| wish.facts = "{}"),
        ("not wanted", |wish| wish.reuse = false),
        ("another model", |wish| wish.geometry = Box::leak(Box::new(other()))),
    ];
    for (why, change) in changes {
        let place = Place::new();
        filled(&place, 5).close();
        let mut wish = place.wish();
        change(&mut wish);
        let engine = Engine::open(&wish).expect("a store");
        assert!(engine.why.contains(why), "{}", engine.why);
        assert_eq!(matches!(engine.recovery, Recovery::Snapshot(..)), why.is_empty(), "{why}");
        assert_eq!(place.file(0, "segment-00000").exists(), why.is_empty(), "{why}");
    }
}

fn other() -> kvcellar_block::SlotGeometry {
    // The same sizes, differently divided among the ranks.
    let mut geometry = kvcellar_testkit::stores::blocks::geometry();
    geometry.parts[1].spans[0] = (1500, 2499);
    geometry
}

#[test]
fn capacity_may_change_between_engines() {
    let place = Place::new();
    filled(&place, 16).close();
    let mut small = place.wish();
    small.capacity_bytes = SMALL / 2;
    let mut engine = Engine::open(&small).expect("a store");
    let kept = engine.store.extents_max();
    assert!((4..9).contains(&kept), "{kept}");
    engine.recover();
    all_readable(&engine, kept.into());
    assert_eq!(engine.store.extents_ready(), kept);
    assert!(!engine.grow());
    engine.close();
    let mut engine = place.open();
    engine.recover();
    all_readable(&engine, kept.into());
    assert_eq!(engine.store.extents_max(), 16);
    assert_eq!(engine.store.extents_ready(), kept.next_multiple_of(4), "the short segment was filled up");
    for extent in kept..16 {
        engine.put(extent, extent.into());
    }
    let mut none = place.wish();
    none.capacity_bytes = 30_000;
    drop(engine);
    let error = Store::open(&none).expect_err("too small").to_string();
    assert!(error.contains("nvme_size"), "{error}");
}

#[test]
fn two_engines_have_two_stores() {
    let place = Place::new();
    let mut first = place.open();
    first.put(0, 1);
    let mut second = place.open();
    second.put(0, 2);
    assert_eq!(second.taken.len(), 1);
    assert!(second.taken[0].contains(&std::process::id().to_string()), "{:?}", second.taken);
    assert_ne!(first.store.id(), second.store.id());
    assert_eq!((first.check(0, None).ok(), second.check(0, None).ok()), (Some(key(1)), Some(key(2))));
    drop(first);
    let third = place.open();
    assert_eq!((third.taken.len(), &third.recovery), (0, &Recovery::Scan));
    assert!(third.store.still_there());
}

/// Run as a child of this very binary: owns the store until its input ends.
#[test]
fn owner_child() {
    let Some(dir) = std::env::var_os("KVCELLAR_TEST_STORE") else { return };
    let geometry = kvcellar_testkit::stores::blocks::geometry();
    let mut engine = Engine::open(&kvcellar_testkit::stores::place::wish(dir.as_ref(), &geometry)).expect("a store");
    engine.put(0, 7);
    if std::env::var_os("KVCELLAR_TEST_RESET").is_some() {
        engine.store.bump_cache_generation().expect("bumped");
        engine.put(1, 8);
    }
    println!("\nowned");
    std::io::stdout().flush().expect("told");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("read");
}

/// A process that owns the store, and what keeps it waiting.
fn owner(place: &Place, reset: bool) -> (Child, ChildStdin) {
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    if reset {
        command.env("KVCELLAR_TEST_RESET", "1");
    }
    let mut child = command
        .args(["--exact", "adoption::owner_child", "--nocapture"])
        .env("KVCELLAR_TEST_STORE", place.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    assert!(lines.map_while(std::result::Result::ok).any(|line| line == "owned"), "the child did not get its store");
    let input = child.stdin.take().expect("piped");
    (child, input)
}

#[test]
fn another_process_owns_it_until_it_dies() {
    let place = Place::new();
    let (mut child, _input) = owner(&place, false);
    let beside = place.open();
    assert!(beside.taken[0].ends_with(&format!("(process {})", child.id())), "{:?}", beside.taken);
    drop(beside);
    child.kill().expect("killed");
    child.wait().expect("ended");
    let mut engine = place.open();
    assert_eq!(engine.taken, Vec::<String>::new());
    engine.recover();
    assert_eq!(engine.known(), [(0, key(7))]);
}

#[test]
fn a_removed_or_replaced_store_is_noticed() {
    let place = Place::new();
    let engine = place.open();
    assert!(engine.store.still_there());
    let superblock = place.file(0, "superblock");
    let bytes = fs::read(&superblock).expect("read");
    fs::remove_file(&superblock).expect("removed");
    assert!(!engine.store.still_there());
    fs::write(&superblock, bytes).expect("written");
    assert!(!engine.store.still_there(), "it is another file");
    drop(engine);
    let mut engine = Place::open(&Place::new());
    assert!(!engine.store.still_there(), "its directory is gone");
    let engine_dir = Place::new();
    engine = engine_dir.open();
    fs::rename(engine.store.path(), engine_dir.path().join("moved")).expect("moved");
    assert!(!engine.store.still_there());
}
