//! Systems that refuse: `io_uring` forbidden by seccomp, a low limit of locked memory, a ring that
//! stops working.
//!
//! Each scene runs in a process of its own (this test binary again, with one test and an
//! environment variable), because its restrictions last.

use std::sync::Arc;

use kvcellar_block::error::Error;
use kvcellar_engine::config::nvme::DiskEngine;
use kvcellar_engine::nvme::buffer::{Arena, Region};
use kvcellar_engine::nvme::disk::{Completions, Disk, DiskError};
use kvcellar_engine::nvme::probe;
use kvcellar_engine::nvme::ring::RingDisk;

use kvcellar_testkit::confined::{forbid, in_own_process};

use crate::conformance::has_ring;
use crate::inbox::{Inbox, error_of, folder, read, segment};

#[test]
fn a_refused_ring_becomes_threads_and_says_why() {
    in_own_process("refusal::a_refused_ring_becomes_threads_and_says_why", || {
        forbid(libc::SYS_io_uring_setup);
        let (folder, inbox) = (folder(), Inbox::new());
        let completions = Arc::clone(&inbox) as Arc<dyn Completions>;
        let open = |engine| probe::open(engine, Vec::new(), &completions, folder.path());
        let disk = open(DiskEngine::Auto).expect("a disk");
        let description = disk.describe();
        assert_eq!(description.engine, "threads");
        assert!(description.why.contains("io_uring is refused"), "{}", description.why);
        assert!(!probe::refusal().expect("a reason").is_empty());
        disk.add_segment(segment(folder.path(), "s", 1)).expect("a segment");
        disk.submit(vec![read(1, 0, 0, 1)]);
        assert_eq!(inbox.one().outcome, Ok(()));
        let error = open(DiskEngine::IoUring).err().expect("a refusal");
        let Error::Unsupported { remedy, .. } = &error else { panic!("{error}") };
        assert!(remedy.contains("seccomp") && remedy.contains("threads"), "{remedy}");
    });
}

#[test]
fn a_ring_that_stops_working_fails_its_operations() {
    in_own_process("refusal::a_ring_that_stops_working_fails_its_operations", || {
        if !has_ring() {
            return;
        }
        let (folder, inbox) = (folder(), Inbox::new());
        let completions = Arc::clone(&inbox) as Arc<dyn Completions>;
        let (disk, _) = RingDisk::start(Vec::new(), completions, 1 << 20).expect("a disk");
        disk.add_segment(segment(folder.path(), "s", 1)).expect("a segment");
        disk.submit(vec![read(0, 0, 0, 1)]);
        assert_eq!(inbox.one().outcome, Ok(()));
        forbid(libc::SYS_io_uring_enter);
        for round in 0..3 {
            disk.submit((0..500).map(|at| read(round * 500 + at, 0, 0, 1)).collect());
            let ended = inbox.take(500);
            assert!(ended.iter().all(|ended| error_of(ended) == DiskError::Os(libc::EPERM)), "round {round}");
        }
        assert!(matches!(disk.add_segment(segment(folder.path(), "t", 1)), Err(Error::DeviceDead { .. })));
        assert_eq!(disk.in_flight(), 0);
        drop(disk);
    });
}

/// Gives up the right to lock any amount of memory; false if the system does not let us.
fn drop_lock_right() -> bool {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    const IPC_LOCK: u32 = 14;
    let header = Header { version: VERSION_3, pid: 0 };
    let mut sets = [[0u32; 3]; 2];
    // SAFETY: both structures have the layout of version 3 and live until the calls return.
    let got = unsafe { libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()) };
    sets[0].iter_mut().for_each(|set| *set &= !(1 << IPC_LOCK));
    // SAFETY: as above.
    got == 0 && unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) } == 0
}

#[test]
fn memory_that_may_not_be_locked_stays_unregistered() {
    in_own_process("refusal::memory_that_may_not_be_locked_stays_unregistered", || {
        let limit = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK, 8 << 20, 8 << 20);
        if !has_ring() || limit.is_err() || !drop_lock_right() {
            return println!("skipped: the right to lock memory cannot be given up here");
        }
        let (folder, inbox) = (folder(), Inbox::new());
        let region: Arc<dyn Region> = Arena::new(32 << 20);
        let completions = Arc::clone(&inbox) as Arc<dyn Completions>;
        let (disk, registered) = RingDisk::start(vec![region], completions, 1 << 20).expect("a disk");
        let description = disk.describe();
        assert!(!registered && !description.registered);
        assert!(
            description.why.contains("32 MiB") && description.why.contains("RLIMIT_MEMLOCK"),
            "{}",
            description.why
        );
        disk.add_segment(segment(folder.path(), "s", 1)).expect("a segment");
        disk.submit(vec![read(1, 0, 0, 1)]);
        assert_eq!(inbox.one().outcome, Ok(()));
    });
}
