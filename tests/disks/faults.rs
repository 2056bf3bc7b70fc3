//! The fake's faults do what they say, or tests that build on them would prove nothing.

use std::sync::Arc;

use kvcellar_engine::nvme::disk::{Completions, Disk, DiskError, Kind};

use crate::inbox::{Inbox, PAGE, error_of, folder, read, segment, write};
use kvcellar_testkit::faulty_disk::{Fault, FaultyDisk, Rule};

fn fake(seed: u64) -> (FaultyDisk, Arc<Inbox>, tempfile::TempDir) {
    let (folder, inbox) = (folder(), Inbox::new());
    let disk = FaultyDisk::manual(Arc::clone(&inbox) as Arc<dyn Completions>, seed);
    disk.add_segment(segment(folder.path(), "s", 8)).expect("a segment");
    (disk, inbox, folder)
}

#[test]
fn rules_choose_operations() {
    let (disk, inbox, _folder) = fake(1);
    disk.add_rule(Rule::new(Fault::Errno(libc::EIO)).of(Kind::Read).at(0, 4096..8192).nth(1).times(1));
    let reads = [(0, 1), (1, 0), (2, 1), (3, 1)].map(|(token, page)| read(token, 0, page, 1));
    disk.submit(reads.into_iter().collect());
    while disk.step() {}
    let failed: Vec<u64> =
        inbox.take(4).iter().filter(|ended| ended.outcome.is_err()).map(|ended| ended.token).collect();
    assert_eq!(failed, [2]);
}

#[test]
fn writes_are_lost_torn_and_short() {
    let (disk, inbox, folder) = fake(1);
    for (fault, outcome, kept) in [
        (Fault::Lost, Ok(()), 0),
        (Fault::Torn(PAGE + 512), Ok(()), PAGE + 512),
        (Fault::Short(512), Err(DiskError::Short { wanted: 2 * PAGE, done: 512 }), 512),
        (Fault::Errno(libc::ENOSPC), Err(DiskError::Os(libc::ENOSPC)), 0),
    ] {
        disk.clear_rules();
        disk.submit(vec![write(0, 0, 0, 2, 0)]);
        assert!(disk.step());
        inbox.one();
        disk.add_rule(Rule::new(fault).of(Kind::Write));
        disk.submit(vec![write(1, 0, 0, 2, 9)]);
        assert!(disk.step() && !disk.step());
        assert_eq!(inbox.one().outcome, outcome, "{fault:?}");
        assert_eq!(disk.image(0).iter().filter(|&&byte| byte == 9).count(), kept, "{fault:?}");
    }
    disk.clear_rules();
    disk.submit(vec![write(2, 0, 7, 1, 5)]);
    assert!(disk.step());
    disk.write_back();
    let file = std::fs::read(folder.path().join("s")).expect("the segment");
    assert_eq!((file.len(), file[7 * PAGE], file[6 * PAGE]), (8 * PAGE, 5, 0));
}

#[test]
fn steps_end_one_operation_each_in_an_order_of_the_seed() {
    let order = |seed| {
        let (disk, inbox, _folder) = fake(seed);
        disk.reorder();
        disk.submit((0..8).map(|token| read(token, 0, 0, 1)).collect());
        assert_eq!(disk.pending().len(), 8);
        assert!(disk.step());
        assert_eq!((inbox.seen(), disk.in_flight()), (1, 7));
        while disk.step() {}
        inbox.take(8).iter().map(|ended| ended.token).collect::<Vec<_>>()
    };
    assert_eq!(order(3), order(3));
    assert_ne!(order(3), order(4));
}

#[test]
fn a_held_disk_ends_nothing_and_a_dead_one_everything() {
    let (folder, inbox) = (folder(), Inbox::new());
    let disk = FaultyDisk::automatic(Arc::clone(&inbox) as Arc<dyn Completions>, 1);
    disk.add_segment(segment(folder.path(), "s", 8)).expect("a segment");
    disk.hold();
    disk.submit(vec![read(0, 0, 0, 1)]);
    assert_eq!((disk.pending().len(), inbox.seen()), (1, 0));
    disk.kill(libc::EIO);
    disk.release();
    assert_eq!(error_of(&inbox.one()), DiskError::Os(libc::EIO));
    assert!(disk.add_segment(segment(folder.path(), "t", 1)).is_err());
}
