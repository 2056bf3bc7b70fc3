//! All stores below one directory stay within one size, whoever starts, stops and dies.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use kvcellar_block::error::Error;
use kvcellar_engine::limits;
use kvcellar_engine::nvme::directory;
use kvcellar_engine::nvme::ledger::Ledger;
use kvcellar_engine::nvme::registry::list;
use kvcellar_engine::nvme::store::{Recovery, Store, Wish};
use kvcellar_engine::owned::listing::namespace_name;

use kvcellar_testkit::stores::place::{Engine, Place, SMALL};

/// Room for two stores of [`SMALL`] bytes.
const TOTAL: u64 = 2 * SMALL + limits::LEDGER_BYTES;

/// Bytes on disk of everything below a directory, itself included.
fn on_disk(dir: &Path) -> u64 {
    let found = fs::symlink_metadata(dir).expect("there");
    let below = |path: std::path::PathBuf| if path.is_dir() { on_disk(&path) } else { blocks(&path) };
    let files = fs::read_dir(dir).expect("listed").map(|file| file.expect("listed").path());
    found.blocks() * 512 + files.map(below).sum::<u64>()
}

fn blocks(path: &Path) -> u64 {
    // A draft may be renamed meanwhile: it is counted under its new name.
    fs::symlink_metadata(path).map_or(0, |found| found.blocks() * 512)
}

fn within(place: &Place, what: &str) {
    let bytes = on_disk(&directory::path(place.path()));
    assert!(bytes <= TOTAL, "{what}: {bytes} of {TOTAL}");
}

/// A wish of this namespace for this many bytes of `TOTAL`.
fn wish(place: &Place, namespace: u8, capacity_bytes: u64) -> Wish<'_> {
    Wish { namespace: [namespace; 16], capacity_bytes, total_bytes: TOTAL, ..place.wish() }
}

/// An engine with a store that is as large as it may be and full of blocks.
fn full(wish: &Wish<'_>) -> Engine {
    let mut engine = Engine::open(wish).expect("a store");
    while engine.grow() {}
    for extent in 0..engine.store.extents_ready() {
        engine.put(extent, extent.into());
    }
    engine
}

/// What nobody uses any more was last used so many hours ago.
fn age(place: &Place, namespace: u8, hours: u64) {
    let dir = directory::path(place.path()).join(format!("{}-0", namespace_name(&[namespace; 16])));
    for file in fs::read_dir(dir).expect("listed").map(|file| file.expect("listed").path()) {
        let when = SystemTime::now() - Duration::from_secs(3600 * hours);
        File::options().write(true).open(file).expect("opened").set_modified(when).expect("set");
    }
}

fn names(place: &Place) -> Vec<u8> {
    let first = |name: &str| u8::from_str_radix(&name[..2], 16).expect("a namespace");
    list(place.path()).expect("listed").iter().map(|entry| first(&entry.name)).collect()
}

#[test]
fn ten_namespaces_in_a_row_stay_within_the_total_and_get_what_they_ask_for() {
    let place = Place::new();
    let elsewhere = Place::new();
    let alone = Wish { capacity_bytes: TOTAL - limits::LEDGER_BYTES, ..elsewhere.wish() };
    let asked = Engine::open(&alone).expect("a store").store.extents_max();
    for namespace in 0..10 {
        let wish = wish(&place, namespace, TOTAL - limits::LEDGER_BYTES);
        let engine = full(&wish);
        within(&place, "full");
        assert_eq!((&engine.recovery, engine.warnings.len()), (&Recovery::Fresh, 0), "{:?}", engine.warnings);
        assert_eq!(engine.store.extents_ready(), engine.store.extents_max());
        assert_eq!(engine.store.extents_max(), asked, "it got less than it asked for");
        assert_eq!(engine.removed.len(), usize::from(namespace > 0), "{:?}", engine.removed);
        if namespace % 2 == 0 {
            engine.close();
        }
        within(&place, "closed");
    }
    assert_eq!(names(&place), [9]);
}

#[test]
fn a_store_in_use_counts_with_all_it_may_grow_to_and_stays() {
    let place = Place::new();
    // Nothing of it is on disk yet.
    let mut first = Engine::open(&wish(&place, 1, SMALL)).expect("a store");
    let second = full(&wish(&place, 2, TOTAL));
    assert_eq!(second.removed, Vec::<String>::new());
    let told = second.warnings.join("");
    assert!(told.contains("nvme_size") && told.contains(&format!("process {}", std::process::id())), "{told}");
    while first.grow() {}
    assert_eq!(first.store.extents_ready(), first.store.extents_max());
    within(&place, "both are full");
    let third = Store::open(&wish(&place, 3, SMALL)).expect_err("nothing is left");
    assert!(matches!(third, Error::TryLater { .. }) && third.to_string().contains("nvme_size"), "{third}");
    assert_eq!(names(&place), [1, 2], "nothing was left behind, nothing was taken");
    assert!(first.store.still_there() && second.store.still_there());
    within(&place, "refused");
}

#[test]
fn what_was_used_longest_ago_goes_first_and_no_more_than_needed() {
    let place = Place::new();
    for (namespace, hours) in [(1, 2), (2, 5), (3, 1)] {
        full(&wish(&place, namespace, SMALL * 2 / 3)).close();
        age(&place, namespace, hours);
    }
    let turns: Vec<_> = list(place.path()).expect("listed").iter().map(|entry| entry.goes).collect();
    assert_eq!(turns, [Some(2), Some(1), Some(3)], "`store ls` says the same");
    let engine = full(&wish(&place, 4, SMALL));
    assert_eq!(names(&place), [1, 3, 4]);
    assert!(engine.removed.len() == 1 && engine.removed[0].starts_with("0202"), "{:?}", engine.removed);
    within(&place, "one went");
}

#[test]
fn what_no_start_can_use_goes_before_what_one_can() {
    let place = Place::new();
    full(&wish(&place, 1, SMALL * 2 / 3)).close();
    age(&place, 1, 9);
    let mut private = full(&wish(&place, 2, SMALL * 2 / 3));
    private.store.bump_cache_generation().expect("bumped");
    private.close();
    full(&wish(&place, 3, SMALL * 2 / 3)).close();
    drop(full(&wish(&place, 4, SMALL)));
    assert_eq!(names(&place), [1, 3, 4]);
}

#[test]
fn a_directory_that_cannot_go_is_told_and_counts() {
    let place = Place::new();
    full(&wish(&place, 1, SMALL)).close();
    full(&wish(&place, 2, SMALL)).close();
    age(&place, 1, 1);
    let dir = directory::path(place.path()).join(format!("{}-0", namespace_name(&[1; 16])));
    fs::write(dir.join("notes"), vec![7; SMALL as usize / 2]).expect("written");
    let engine = full(&wish(&place, 3, SMALL));
    assert!(engine.warnings.iter().any(|told| told.contains("could not be removed")), "{:?}", engine.warnings);
    assert!(dir.join("notes").exists(), "somebody's file");
    assert_eq!(names(&place), [1, 3], "its segments were not enough");
    within(&place, "a file of others");
}

#[test]
fn two_engines_that_share_take_over_what_one_had() {
    let place = Place::new();
    full(&wish(&place, 1, TOTAL - limits::LEDGER_BYTES)).close();
    within(&place, "one");
    let first = full(&wish(&place, 1, SMALL));
    within(&place, "its segments came back");
    assert!(matches!(first.recovery, Recovery::Snapshot(..)), "{:?}", first.recovery);
    let second = full(&wish(&place, 1, SMALL));
    assert_eq!((second.taken.len(), second.removed.len(), second.warnings.len()), (1, 0, 0));
    assert_eq!(first.store.extents_max(), second.store.extents_max());
    within(&place, "both");
    drop((first, second));
    // One again: the second one's store is of the same namespace, and in the way.
    let alone = full(&wish(&place, 1, TOTAL - limits::LEDGER_BYTES));
    assert_eq!((alone.removed.len(), names(&place)), (1, vec![1]));
    within(&place, "one again");
}

const DIR: &str = "KVCELLAR_TEST_LEDGER_DIR";
const NUMBER: &str = "KVCELLAR_TEST_LEDGER_NUMBER";
const CHILDREN: u8 = 3;
const LIVES: u8 = 6;

/// Run as a child of this very binary: takes a store of a new namespace again and again, and fills
/// it.
#[test]
fn filler_child() {
    let (Some(dir), Ok(number)) = (std::env::var_os(DIR), std::env::var(NUMBER)) else { return };
    let number: u8 = number.parse().expect("a number");
    let geometry = kvcellar_testkit::stores::blocks::geometry();
    let mut got = 0;
    for life in 0..LIVES {
        let common = kvcellar_testkit::stores::place::wish(dir.as_ref(), &geometry);
        // Any two of them are too much.
        let capacity_bytes = TOTAL / 4 * 3;
        let wish = Wish { namespace: [16 * number + life; 16], capacity_bytes, total_bytes: TOTAL, ..common };
        match Engine::open(&wish) {
            Ok(mut engine) => {
                got += 1;
                // Slowly, so that others start while it has not taken all that it may.
                while engine.grow() {
                    std::thread::sleep(Duration::from_millis(15));
                }
                assert_eq!(engine.store.extents_ready(), engine.store.extents_max(), "what it got was not there");
            }
            Err(error) => assert!(matches!(error, Error::TryLater { .. }), "{error}"),
        }
    }
    println!("\ngot {got}");
    std::io::stdout().flush().expect("told");
}

fn filler(place: &Place, number: u8) -> Child {
    Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", "ledger::filler_child", "--nocapture"])
        .env(DIR, place.path())
        .env(NUMBER, number.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .expect("started")
}

#[test]
fn processes_that_start_at_the_same_time_never_exceed_the_total() {
    let place = Place::new();
    let dir = directory::ensure(place.path()).expect("made");
    let mut children: Vec<Child> = (0..CHILDREN).map(|number| filler(&place, number)).collect();
    let mut looks = 0;
    while children.iter_mut().any(|child| child.try_wait().expect("looked at").is_none()) {
        // While it is held nobody opens or removes a store: what is counted is there at the same
        // time.
        let ledger = Ledger::lock(&dir).expect("locked");
        within(&place, "under way");
        drop(ledger);
        looks += 1;
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut got = 0;
    for mut child in children {
        assert!(child.wait().expect("ended").success());
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines().map_while(Result::ok);
        got += lines.filter_map(|line| line.strip_prefix("got ").and_then(|got| got.parse::<u32>().ok())).sum::<u32>();
    }
    println!("{looks} looks, {got} stores");
    assert!(looks > 0 && got >= u32::from(LIVES), "{looks} looks, {got} stores");
}
