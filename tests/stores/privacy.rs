//! Stores are private: nobody else may read them, and nothing foreign is followed or opened.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use kvcellar_engine::nvme::directory;
use kvcellar_engine::nvme::store::{Recovery, Store};

use kvcellar_testkit::stores::place::Place;

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("it is there").permissions().mode() & 0o7777
}

/// A store that was closed with two blocks.
fn closed() -> Place {
    let place = Place::new();
    let mut engine = place.open();
    engine.put(0, 1);
    engine.put(1, 2);
    engine.close();
    place
}

fn refused(place: &Place, why: &str) -> String {
    Store::open(&place.wish()).expect_err(why).to_string()
}

#[test]
fn files_and_directories_are_for_this_user_alone() {
    let place = closed();
    let dir = place.file(0, "");
    assert_eq!(mode(&directory::path(place.path())), 0o700);
    assert_eq!(mode(&dir), 0o700);
    let mut names: Vec<_> = fs::read_dir(&dir).expect("listed").map(|file| file.expect("listed").path()).collect();
    names.sort();
    assert!(names.iter().all(|path| mode(path) == 0o600), "{names:?}");
    let names: Vec<_> = names.iter().map(|path| path.file_name().expect("named").to_string_lossy()).collect();
    assert_eq!(names, ["lock", "segment-00000", "snapshot", "superblock"]);
}

#[test]
fn directories_that_are_not_private_are_refused() {
    for bits in [0o755, 0o770, 0o701, 0o720] {
        for name in ["..", ""] {
            let place = closed();
            let dir = place.file(0, name);
            fs::set_permissions(&dir, Permissions::from_mode(bits)).expect("set");
            let error = refused(&place, "others may look into it");
            assert!(error.contains("nvme_dir"), "{error}");
            assert_eq!(mode(&dir), bits, "it was changed");
        }
    }
    let place = closed();
    let dir = place.file(0, "").components().as_path().to_owned();
    let elsewhere = place.path().join("elsewhere");
    fs::rename(&dir, &elsewhere).expect("moved");
    symlink(&elsewhere, &dir).expect("linked");
    refused(&place, "a link");
    assert!(
        Store::open(&{
            let mut wish = place.wish();
            wish.namespace = [1; 16];
            wish
        })
        .is_ok()
    );
}

#[test]
fn files_that_are_not_private_are_refused() {
    for name in ["lock", "superblock", "segment-00000"] {
        for bits in [0o644, 0o660, 0o604, 0o622] {
            let place = closed();
            let file = place.file(0, name);
            fs::set_permissions(&file, Permissions::from_mode(bits)).expect("set");
            let error = refused(&place, "others may read or write it");
            assert!(error.contains(name) && error.contains("nvme_dir"), "{error}");
            assert_eq!(mode(&file), bits);
        }
        let place = closed();
        let (file, target) = (place.file(0, name), place.path().join("target"));
        fs::rename(&file, &target).expect("moved");
        symlink(&target, &file).expect("linked");
        let before = fs::read(&target).expect("read");
        let error = refused(&place, "a link");
        assert!(error.contains(name), "{error}");
        assert_eq!(fs::read(&target).expect("read"), before, "the link was followed");
        let place = closed();
        let file = place.file(0, name);
        fs::remove_file(&file).expect("removed");
        fs::create_dir(&file).expect("made");
        refused(&place, "a directory");
    }
}

#[test]
fn a_snapshot_that_is_not_private_is_not_believed() {
    let place = closed();
    fs::set_permissions(place.file(0, "snapshot"), Permissions::from_mode(0o646)).expect("set");
    let engine = place.open();
    assert_eq!((&engine.recovery, engine.scan().entries.len()), (&Recovery::Scan, 2));
    drop(engine);
    let place = closed();
    let (file, target) = (place.file(0, "snapshot"), place.path().join("target"));
    fs::rename(&file, &target).expect("moved");
    symlink(&target, &file).expect("linked");
    assert_eq!(place.open().recovery, Recovery::Scan);
    assert!(target.exists() && !file.exists(), "the link was followed");
}

#[test]
#[cfg(target_os = "linux")]
fn files_of_other_users_are_refused() {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("skipped: only root can give files away");
        return;
    }
    for name in ["", "lock", "superblock", "segment-00000"] {
        let place = closed();
        std::os::unix::fs::chown(place.file(0, name), Some(12_345), None).expect("given away");
        let error = refused(&place, "another user's");
        assert!(error.contains("nvme_dir"), "{error}");
    }
}
