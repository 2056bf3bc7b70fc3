//! Pools are private: nobody else may read them, and nothing foreign is followed or opened.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use kvcellar_engine::pool::directory;

use crate::place::{Place, Purpose};
use crate::stock::Stock;

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("it is there").permissions().mode() & 0o7777
}

/// The refusal names the setting to change, and nothing was made.
fn refused(place: &Path, why: &str) {
    let error = Purpose::small().open(place).expect_err(why).to_string();
    assert!(error.contains("pool_dir"), "{why}: {error}");
}

#[test]
fn files_and_directory_are_for_this_user_alone() {
    let place = Place::new();
    let opened = place.open(&Purpose::small());
    assert_eq!(mode(opened.pool.path()), 0o600);
    assert_eq!(mode(&directory::path(place.path())), 0o700);
}

#[test]
fn a_directory_that_is_not_private_is_refused() {
    for bits in [0o755, 0o770, 0o701, 0o720] {
        let place = Place::new();
        let dir = directory::path(place.path());
        fs::create_dir(&dir).expect("made");
        fs::set_permissions(&dir, Permissions::from_mode(bits)).expect("set");
        refused(place.path(), "others may look into it");
        assert_eq!(fs::read_dir(&dir).expect("listed").count(), 0);
        assert_eq!(mode(&dir), bits, "it was changed");
    }
}

#[test]
fn links_and_strange_things_in_the_place_of_the_directory_are_refused() {
    let place = Place::new();
    let elsewhere = place.path().join("elsewhere");
    fs::create_dir(&elsewhere).expect("made");
    fs::set_permissions(&elsewhere, Permissions::from_mode(0o700)).expect("set");
    symlink(&elsewhere, directory::path(place.path())).expect("linked");
    refused(place.path(), "a link");
    assert_eq!(fs::read_dir(&elsewhere).expect("listed").count(), 0, "the link was followed");
    let place = Place::new();
    fs::write(directory::path(place.path()), b"").expect("written");
    refused(place.path(), "a file");
    let place = Place::new();
    refused(&place.path().join("nowhere"), "no directory");
}

#[test]
fn links_and_foreign_files_in_the_place_of_a_pool_are_refused() {
    let purpose = Purpose::small();
    let bystander = b"somebody's file, which has nothing to do with pools".as_slice();
    let made = || {
        let place = Place::new();
        drop(place.open(&purpose));
        let file = purpose.file(place.path(), 0);
        (place, file)
    };
    let (place, file) = made();
    let target = place.path().join("target");
    fs::write(&target, bystander).expect("written");
    fs::set_permissions(&target, Permissions::from_mode(0o600)).expect("set");
    fs::remove_file(&file).expect("removed");
    symlink(&target, &file).expect("linked");
    refused(place.path(), "a link");
    assert_eq!(fs::read(&target).expect("read"), bystander, "the link was followed");
    for bits in [0o644, 0o660, 0o604, 0o622] {
        let (place, file) = made();
        fs::set_permissions(&file, Permissions::from_mode(bits)).expect("set");
        refused(place.path(), "others may read or write it");
        assert_eq!(mode(&file), bits);
    }
    let (place, file) = made();
    fs::remove_file(&file).expect("removed");
    fs::create_dir(&file).expect("made");
    refused(place.path(), "a directory");
}

#[test]
fn a_worker_follows_no_link() {
    let place = Place::new();
    let mut stock = Stock::of(place.open(&Purpose::small()));
    stock.store(&[1], |_| true);
    let mut ticket = stock.pool().ticket();
    let link = place.path().join("link.pool");
    symlink(&ticket.path, &link).expect("linked");
    ticket.path = link;
    assert!(kvcellar_engine::pool::Pool::attach(&ticket).is_err());
}
