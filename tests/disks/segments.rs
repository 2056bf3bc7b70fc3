//! How segments are opened, and what a disk says about them.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::Arc;

use kvcellar_block::error::Error;
use kvcellar_engine::config::nvme::DiskEngine;
use kvcellar_engine::limits::DISK_SEGMENTS_MAX;
use kvcellar_engine::nvme::directory::{How, is_direct, open};
use kvcellar_engine::nvme::disk::{Completions, Disk};
use kvcellar_engine::nvme::probe;
use kvcellar_engine::nvme::threads::ThreadDisk;

use crate::inbox::{Inbox, folder, segment};

fn completions() -> Arc<dyn Completions> {
    Inbox::new()
}

#[test]
fn a_segment_is_private_and_no_link_is_followed() {
    let folder = folder();
    let path = folder.path().join("s");
    assert!(matches!(open(&path, How::Direct), Err(Error::Io { .. })), "there is none");
    let file = open(&path, How::New).expect("a segment");
    assert_eq!(file.metadata().expect("facts").permissions().mode() & 0o777, 0o600);
    symlink(&path, folder.path().join("link")).expect("a link");
    assert!(open(&folder.path().join("link"), How::Direct).is_err());
    assert!(open(folder.path(), How::Direct).is_err(), "a folder");
}

#[test]
fn memory_file_systems_are_buffered() {
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else {
        return println!("skipped: there is no /dev/shm");
    };
    let path = folder.path().join("s");
    std::os::unix::fs::FileExt::write_all_at(&open(&path, How::New).expect("a file"), &[0; 8192], 0).expect("written");
    let file = open(&path, How::Direct).expect("a segment");
    assert!(!is_direct(&file), "as an engine and as doctor opens it");
    let disk = ThreadDisk::start(completions(), 1).expect("a disk");
    disk.add_segment(file).expect("a segment");
    let description = disk.describe();
    assert!(!description.direct && description.why.contains("O_DIRECT"), "{description:?}");
}

#[test]
fn a_disk_is_direct_only_if_all_its_segments_are() {
    let folder = folder();
    drop(open(&folder.path().join("s"), How::New).expect("made"));
    let file = open(&folder.path().join("s"), How::Direct).expect("a segment");
    let direct = is_direct(&file);
    let disk = ThreadDisk::start(completions(), 1).expect("a disk");
    assert!(!disk.describe().direct, "no segment yet");
    disk.add_segment(file).expect("a segment");
    assert_eq!(disk.describe().direct, direct);
    disk.add_segment(std::fs::File::open(folder.path().join("s")).expect("buffered")).expect("a segment");
    assert!(!disk.describe().direct);
}

#[test]
fn no_more_segments_than_the_bound() {
    let folder = folder();
    let disk = ThreadDisk::start(completions(), 1).expect("a disk");
    let file = segment(folder.path(), "s", 1);
    let mut taken = 0;
    // The limit of open files may be below ours: the system's refusal ends the test early, and says
    // so.
    while let Ok(again) = file.try_clone() {
        match disk.add_segment(again) {
            Ok(number) => taken = number as usize + 1,
            Err(error) => {
                assert!(matches!(error, Error::DeviceDead { .. }), "{error}");
                return assert_eq!(taken, DISK_SEGMENTS_MAX);
            }
        }
    }
    println!("skipped after {taken} files: the limit of open files is lower");
}

#[test]
fn the_engine_is_the_one_that_was_asked_for() {
    let folder = folder();
    let disk = probe::open(DiskEngine::Threads, Vec::new(), &completions(), folder.path()).expect("a disk");
    assert_eq!((disk.describe().engine, disk.describe().why.is_empty()), ("threads", false));
    assert!(probe::open(DiskEngine::Auto, Vec::new(), &completions(), &folder.path().join("none")).is_err());
}
