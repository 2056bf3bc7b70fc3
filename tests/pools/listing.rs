//! `kvcellar pool ls` and `rm` on what lies there.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use kvcellar_block::error::Error;
use kvcellar_engine::owned::listing::namespace_name;
use kvcellar_engine::pool::Pool;
use kvcellar_engine::pool::registry::{list, remove};

use crate::place::{Place, Purpose};
use crate::stock::Stock;

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

#[test]
fn nothing_is_listed_where_nothing_is() {
    let place = Place::new();
    assert!(list(place.path()).expect("listed").is_empty());
    assert!(list(&place.path().join("nowhere")).expect("listed").is_empty());
    assert_eq!(fs::read_dir(place.path()).expect("listed").count(), 0, "looking made something");
}

#[test]
fn each_state_is_told_and_removal_minds_it() {
    let place = Place::new();
    let purpose = Purpose::small();
    let [used, held, left, damaged] = [(); 4].map(|()| place.open(&purpose));
    let path = damaged.pool.path().to_owned();
    let worker = Pool::attach(&held.pool.ticket()).expect("the owner lives");
    drop((held, left, damaged));
    let mut bytes = fs::read(&path).expect("read");
    bytes[20] ^= 1;
    fs::write(&path, bytes).expect("written");
    fs::write(path.with_file_name("notes.txt"), b"not a pool").expect("written");
    let entries = list(place.path()).expect("listed");
    assert_eq!(states(&place), wanted(&[("-0", "used"), ("-1", "held"), ("-2", "left"), ("-3", "damaged")]));
    assert_eq!(entries[0].name, format!("{}-0", namespace_name(&purpose.namespace)));
    for entry in &entries[..3] {
        assert_eq!((entry.slots, entry.owner_pid), (Some(8), Some(std::process::id())));
        assert_eq!(entry.facts.as_ref().expect("facts")["model"], "tiny");
        assert_eq!(entry.bytes, used.pool.bytes().next_multiple_of(4096));
        assert!(entry.created_s.is_some_and(|seconds| seconds > 1_600_000_000));
    }
    assert_eq!((entries[3].slots, entries[3].created_s), (None, None));
    let error = remove(&entries[0]).expect_err("it is used");
    assert!(
        matches!(error, Error::TryLater { .. }) && error.to_string().contains(&std::process::id().to_string()),
        "{error}"
    );
    assert_eq!(states(&place).len(), 4, "a used pool was removed");
    for entry in &entries[1..] {
        remove(entry).expect("nobody owns it");
    }
    assert_eq!(states(&place), wanted(&[("-0", "used")]));
    // The held one's memory goes with its last process.
    assert_eq!(worker.slot_count(), 8);
    assert!(!worker.path().exists());
    drop(used);
    assert_eq!(states(&place), wanted(&[("-0", "left")]));
}

#[test]
fn looking_and_failing_to_remove_disturb_no_owner() {
    let place = Place::new();
    let mut stock = Stock::of(place.open(&Purpose::small()));
    stock.store(&[1], |_| true);
    for _ in 0..20 {
        let entries = list(place.path()).expect("listed");
        assert!(remove(&entries[0]).is_err());
    }
    let beside = place.open(&Purpose::small());
    assert_eq!(beside.taken.len(), 1, "the owner lost its lock");
    drop((beside, stock));
    assert_eq!(Stock::of(place.open(&Purpose::small())).hit(&[1]), 16);
}

#[test]
fn an_entry_that_vanished_or_was_replaced_is_not_somebody_elses_loss() {
    let place = Place::new();
    drop(place.open(&Purpose::small()));
    let entry = list(place.path()).expect("listed").remove(0);
    remove(&entry).expect("nobody owns it");
    assert!(matches!(remove(&entry), Err(Error::Io { .. })));
    let opened = place.open(&Purpose::small());
    assert!(remove(&entry).is_err(), "the name is another pool's now");
    assert!(opened.pool.path().exists());
    // A file that others may write is no pool of this user.
    drop(opened);
    fs::set_permissions(&entry.path, Permissions::from_mode(0o666)).expect("set");
    assert!(remove(&entry).is_err());
}
