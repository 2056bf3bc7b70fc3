//! How segments are opened, and what a disk says about them.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::Arc;

use kvcellar::error::Error;
use kvcellar::limits::DISK_SEGMENTS_MAX;
use kvcellar::nvme::disk::{Completions, Disk};
use kvcellar::nvme::probe::{self, Engine, open_segment};
use kvcellar::nvme::threads::ThreadDisk;

use crate::inbox::{Inbox, folder, segment};

fn completions() -> Arc<dyn Completions> {
    Inbox::new()
}

#[test]
fn a_segment_is_private_and_no_link_is_followed() {
    let folder = folder();
    let path = folder.path().join("s");
    assert!(matches!(open_segment(&path, false), Err(Error::Io { .. })), "there is none");
    let (file, _) = open_segment(&path, true).expect("a segment");
    assert_eq!(file.metadata().expect("facts").permissions().mode() & 0o777, 0o600);
    symlink(&path, folder.path().join("link")).expect("a link");
    assert!(open_segment(&folder.path().join("link"), false).is_err());
    assert!(open_segment(folder.path(), false).is_err(), "a folder");
}

#[test]
fn memory_file_systems_are_buffered() {
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else {
        return println!("skipped: there is no /dev/shm");
    };
    let path = folder.path().join("s");
    std::fs::write(&path, [0; 8192]).expect("a file");
    let (file, direct) = open_segment(&path, false).expect("a segment");
    assert!(!direct);
    let disk = ThreadDisk::start(completions(), 1).expect("a disk");
    disk.add_segment(file).expect("a segment");
    let description = disk.describe();
    assert!(!description.direct && description.why.contains("O_DIRECT"), "{description:?}");
}

#[test]
fn a_disk_is_direct_only_if_all_its_segments_are() {
    let folder = folder();
    let (file, direct) = open_segment(&folder.path().join("s"), true).expect("a segment");
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
    // The limit of open files may be below ours: the system's refusal ends the test early, and says so.
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
fn engines_have_names() {
    for (name, engine) in [("auto", Engine::Auto), ("io_uring", Engine::IoUring), ("threads", Engine::Threads)] {
        assert_eq!(name.parse::<Engine>().expect("a name"), engine);
    }
    assert!(matches!("uring".parse::<Engine>(), Err(Error::Config { .. })));
    let folder = folder();
    let disk = probe::open(Engine::Threads, Vec::new(), &completions(), folder.path()).expect("a disk");
    assert_eq!((disk.describe().engine, disk.describe().why.is_empty()), ("threads", false));
    assert!(probe::open(Engine::Auto, Vec::new(), &completions(), &folder.path().join("none")).is_err());
}
