//! Capacity and reserve, in bytes that the disk really gives.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use kvcellar_block::error::Error;
use kvcellar_engine::nvme::space;
use kvcellar_engine::nvme::store::Store;

use kvcellar_testkit::stores::blocks::key;
use kvcellar_testkit::stores::place::{Engine, Place, SMALL};

/// Bytes on disk of everything in a store's directory, the directory included.
fn on_disk(dir: &Path) -> u64 {
    let files = fs::read_dir(dir).expect("listed").map(|file| file.expect("listed").path());
    files.chain([dir.to_owned()]).map(|path| fs::symlink_metadata(path).expect("there").blocks() * 512).sum()
}

#[test]
fn no_moment_passes_the_capacity() {
    for capacity in [60_000, 100_000, SMALL, 3_000_000, 10_000_000] {
        let place = Place::new();
        let mut wish = place.wish();
        wish.capacity_bytes = capacity;
        wish.segment_bytes_max = Some(capacity / 7);
        let mut engine = Engine::open(&wish).expect("a store");
        let dir = engine.store.path().to_owned();
        let within = |what: &str| assert!(on_disk(&dir) <= capacity, "{what}: {} of {capacity}", on_disk(&dir));
        within("opened");
        while engine.grow() {
            within("grown");
        }
        let extents = engine.store.extents_max();
        assert_eq!(engine.store.extents_ready(), extents);
        assert!(!engine.grow());
        // Every second extent first: that splits the filesystem's own extents the most.
        for extent in (0..extents).step_by(2).chain((1..extents).step_by(2)) {
            engine.put(extent, extent.into());
        }
        within("written");
        for file in fs::read_dir(&dir).expect("listed").map(|file| file.expect("listed").path()) {
            let found = fs::metadata(&file).expect("there");
            assert!(found.blocks() * 512 >= found.len(), "{} is sparse", file.display());
        }
        engine.close();
        within("closed");
        let engine = Engine::open(&wish).expect("a store");
        within("reopened");
        assert_eq!(engine.store.extents_ready(), extents);
    }
}

#[test]
fn segments_come_one_at_a_time_as_they_are_needed() {
    let place = Place::new();
    let mut engine = place.open();
    assert_eq!((engine.store.extents_ready(), engine.store.extents_max()), (0, 16));
    assert!(!place.file(0, "segment-00000").exists());
    assert!(engine.grow());
    assert_eq!(engine.store.extents_ready(), 4);
    assert_eq!(engine.store.place(kvcellar_block::ExtentIndex(6)), (1, 2 * 8192));
}

#[test]
fn the_reserve_stays_free() {
    let place = Place::new();
    let mut wish = place.wish();
    wish.reserve_bytes = u64::MAX;
    let mut engine = Engine::open(&wish).expect("a store");
    assert!(!engine.grow());
    assert!(!place.file(0, "segment-00000").exists());
    drop(engine);
    place.open().put(5, 5);
    let mut engine = Engine::open(&wish).expect("contents may stay");
    engine.recover();
    assert_eq!(engine.known(), [(5, key(5))]);
    assert!(!engine.grow());
}

#[test]
fn a_file_with_holes_is_filled_or_given_up() {
    let place = Place::new();
    place.open().put(5, 5);
    let second = place.file(0, "segment-00001");
    fs::OpenOptions::new().write(true).open(&second).expect("opened").set_len(0).expect("cut");
    fs::OpenOptions::new().write(true).open(&second).expect("opened").set_len(4 * 8192).expect("a hole");
    let mut wish = place.wish();
    wish.reserve_bytes = u64::MAX;
    let engine = Engine::open(&wish).expect("a store");
    assert_eq!(engine.store.extents_ready(), 4);
    assert!(!second.exists());
    drop(engine);
    fs::remove_file(place.file(0, "segment-00000")).expect("removed");
    let mut engine = place.open();
    assert_eq!(engine.store.extents_ready(), 0, "nothing follows a missing segment here");
    engine.put(9, 9);
    drop(engine);
    fs::remove_file(place.file(0, "segment-00000")).expect("removed");
    let mut engine = place.open();
    assert_eq!(engine.store.extents_ready(), 12, "the missing one was made anew");
    engine.recover();
    assert_eq!(engine.known(), [(9, key(9))]);
    for number in 0..3 {
        let found = fs::metadata(place.file(0, &format!("segment-{number:05}"))).expect("there");
        assert!(found.blocks() * 512 >= found.len(), "segment {number} is sparse");
    }
}

#[test]
fn too_small_a_capacity_is_refused_and_leaves_a_store_alone() {
    let place = Place::new();
    place.open().put(0, 1);
    let mut wish = place.wish();
    wish.capacity_bytes = 20_000;
    assert!(matches!(Store::open(&wish), Err(Error::Config { .. })));
    let mut engine = place.open();
    engine.recover();
    assert_eq!(engine.known(), [(0, key(1))]);
}

/// A filesystem of its own in a file; `None` where this process may not mount.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(bytes: u64) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a directory");
        let image = dir.path().join("image");
        fs::File::create(&image).expect("made").set_len(bytes).expect("sized");
        fs::create_dir(dir.path().join("at")).expect("made");
        let run = |program: &str, arguments: &[&std::ffi::OsStr]| {
            Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
        };
        let at = dir.path().join("at");
        let made = run("mkfs.ext4", &["-q".as_ref(), "-m".as_ref(), "0".as_ref(), image.as_ref()]);
        if made && run("mount", &["-o".as_ref(), "loop".as_ref(), image.as_ref(), at.as_ref()]) {
            return Some(Self(dir));
        }
        None
    }

    fn path(&self) -> std::path::PathBuf {
        self.0.path().join("at")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A mount that stays is seen by whoever looks at the machine; the test has its result.
        drop(Command::new("umount").arg("-l").arg(self.path()).status());
    }
}

#[test]
fn a_full_disk_ends_growth_and_nothing_else() {
    let Some(disk) = Mounted::new(16 << 20) else {
        eprintln!("skipped: this process may not mount a filesystem (mkfs.ext4, loop devices and root are needed)");
        return;
    };
    let geometry = kvcellar_testkit::stores::blocks::geometry();
    let path = disk.path();
    let mut wish = kvcellar_testkit::stores::place::wish(&path, &geometry);
    wish.capacity_bytes = 1 << 30;
    wish.segment_bytes_max = Some(1 << 20);
    let mut engine = Engine::open(&wish).expect("a store");
    while engine.grow() {}
    let ready = engine.store.extents_ready();
    assert!((128..2048).contains(&ready), "{ready}");
    for extent in 0..ready {
        engine.put(extent, extent.into());
    }
    let mut segments = fs::read_dir(engine.store.path())
        .expect("listed")
        .filter(|file| file.as_ref().is_ok_and(|file| file.file_name().to_string_lossy().starts_with("segment")));
    assert_eq!(segments.by_ref().count() as u32, ready / 128, "half a segment stayed");
    // Somebody else takes the rest: the disk is full to the last byte.
    let rest = space::free_bytes(&path).expect("measured");
    drop(fs::write(path.join("other"), vec![1; rest as usize + 4096]));
    assert!(!engine.grow());
    for extent in (0..ready).rev() {
        engine.put(extent, (extent + 1).into());
    }
    let entries = engine.entries.clone();
    let closed = engine.store.close_clean(&entries, engine.sequence);
    assert!(matches!(closed, Err(Error::Io { .. })), "{closed:?}");
    assert!(!engine.store.path().join("snapshot").exists() && !engine.store.path().join("snapshot.new").exists());
    drop(engine);
    fs::remove_file(path.join("other")).expect("removed");
    let mut engine = Engine::open(&wish).expect("a store");
    engine.recover();
    assert_eq!(engine.entries.len() as u32, ready);
    drop(engine);
}
