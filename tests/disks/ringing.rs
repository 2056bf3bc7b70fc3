//! What only the ring does: operations that wait long, registered memory, a ring that fails.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::sync::Arc;

use kvcellar_engine::nvme::buffer::{Arena, Buffer, Region};
use kvcellar_engine::nvme::disk::{Completions, Disk, Kind, Operation};
use kvcellar_engine::nvme::ring::RingDisk;

use crate::conformance::has_ring;
use crate::inbox::{Inbox, PAGE, folder, read, segment};

fn start(regions: Vec<Arc<dyn Region>>) -> (RingDisk, Arc<Inbox>, bool) {
    let inbox = Inbox::new();
    let completions = Arc::clone(&inbox) as Arc<dyn Completions>;
    let (disk, registered) = RingDisk::start(regions, completions, 1 << 20).expect("io_uring");
    (disk, inbox, registered)
}

/// A file whose reads wait until the test writes.
fn pipe(folder: &std::path::Path) -> File {
    let path = folder.join("pipe");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    OpenOptions::new().read(true).write(true).open(path).expect("the pipe")
}

#[test]
fn new_work_passes_a_waiting_operation_and_a_drop_waits_for_it() {
    if !has_ring() {
        return;
    }
    let (folder, (disk, inbox, _)) = (folder(), start(Vec::new()));
    let pipe = pipe(folder.path());
    let mut far_end = pipe.try_clone().expect("the pipe");
    disk.add_segment(pipe).expect("a segment");
    disk.add_segment(segment(folder.path(), "s", 4)).expect("a segment");
    disk.submit(vec![read(0, 0, 0, 1)]);
    for token in 1..20 {
        disk.submit(vec![read(token, 1, 0, 1)]);
        assert_eq!(inbox.one().token, token);
    }
    assert_eq!(disk.in_flight(), 1);
    let closing = std::thread::spawn(move || drop(disk));
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert_eq!((closing.is_finished(), inbox.seen()), (false, 19), "the kernel still holds a buffer");
    far_end.write_all(&[7; PAGE]).expect("bytes into the pipe");
    closing.join().expect("the drop");
    let ended = inbox.one();
    assert_eq!((ended.token, ended.outcome, ended.buffer.bytes()[PAGE - 1]), (0, Ok(()), 7));
}

/// The second submission comes while the ring wakes up for the first, which then waits: nothing but
/// its own wake can bring the second one on.
#[test]
fn work_that_comes_during_a_wake_is_seen() {
    if !has_ring() {
        return;
    }
    let (folder, (disk, inbox, _)) = (folder(), start(Vec::new()));
    // A failure must not wait for the pipe.
    let disk = std::mem::ManuallyDrop::new(disk);
    let pipe = pipe(folder.path());
    let mut far_end = pipe.try_clone().expect("the pipe");
    disk.add_segment(pipe).expect("a segment");
    disk.add_segment(segment(folder.path(), "s", 4)).expect("a segment");
    for round in 0..5000u32 {
        disk.submit(vec![read(0, 0, 0, 1)]);
        for _ in 0..round % 401 * 10 {
            std::hint::spin_loop();
        }
        disk.submit(vec![read(1, 1, 0, 1)]);
        assert_eq!(inbox.one().token, 1, "round {round}");
        far_end.write_all(&[7; PAGE]).expect("bytes into the pipe");
        assert_eq!(inbox.one().token, 0, "round {round}");
    }
    drop(std::mem::ManuallyDrop::into_inner(disk));
}

#[test]
fn memory_of_other_regions_is_transferred_too() {
    if !has_ring() {
        return;
    }
    let region: Arc<dyn Region> = Arena::new(4 * PAGE);
    let (folder, (disk, inbox, registered)) = (folder(), start(vec![Arc::clone(&region)]));
    let description = disk.describe();
    assert_eq!((description.registered, description.engine), (registered, "io_uring"));
    assert_eq!(registered, description.why.is_empty(), "{}", description.why);
    disk.add_segment(segment(folder.path(), "s", 4)).expect("a segment");
    for token in 0..4 {
        // SAFETY: each page is one buffer's.
        let mut buffer = unsafe { Buffer::of_region(Arc::clone(&region), token * PAGE, PAGE) };
        buffer.bytes_mut().fill(token as u8 + 1);
        let offset = (token * PAGE) as u64;
        disk.submit(vec![Operation { token: token as u64, kind: Kind::Write, segment: 0, offset, buffer }]);
        assert_eq!(inbox.one().outcome, Ok(()));
    }
    disk.submit(vec![read(9, 0, 0, 4)]);
    let ended = inbox.one();
    let bytes: Vec<u8> = ended.buffer.bytes().chunks(PAGE).map(|page| page[0]).collect();
    assert_eq!((ended.outcome, bytes), (Ok(()), vec![1, 2, 3, 4]));
}
