//! What every disk must do. Each test runs once for each of the disks at the end of this file.

use std::fs::{self, File};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvcellar_engine::nvme::buffer::{Arena, Buffer, Region};
use kvcellar_engine::nvme::disk::{Completion, Completions, Disk, DiskError, Kind, Operation};
use kvcellar_engine::nvme::ring::RingDisk;
use kvcellar_engine::nvme::threads::ThreadDisk;

use crate::inbox::{Inbox, PAGE, error_of, folder, read, segment, write};
use kvcellar_testkit::faulty_disk::FaultyDisk;
use kvcellar_testkit::random::Random;

/// Makes a disk of at most 1 MiB in flight, where that can be said.
type Make = fn(Arc<dyn Region>, Arc<dyn Completions>) -> Arc<dyn Disk>;

const IN_FLIGHT: u64 = 1 << 20;

fn start(make: Make) -> (Arc<dyn Disk>, Arc<Inbox>) {
    let inbox = Inbox::new();
    (make(Arena::new(PAGE), Arc::clone(&inbox) as Arc<dyn Completions>), inbox)
}

fn what_is_written_is_read_across_segments(make: Make) {
    let (folder, (disk, inbox)) = (folder(), start(make));
    for number in 0..3 {
        assert_eq!(disk.add_segment(segment(folder.path(), &format!("s{number}"), 64)).expect("a segment"), number);
    }
    disk.submit((0..3).map(|at| write(u64::from(at), at, 2, 3, 10 + at as u8)).collect());
    for completion in inbox.take(3) {
        assert_eq!((completion.kind, completion.outcome), (Kind::Write, Ok(())));
    }
    disk.submit((0..3).map(|at| read(u64::from(at), at, 1, 5)).collect());
    for completion in inbox.take(3) {
        assert_eq!((completion.kind, completion.outcome), (Kind::Read, Ok(())));
        let filled = 10 + completion.token as u8;
        let bytes: Vec<u8> = completion.buffer.bytes().chunks(PAGE).map(|page| page[PAGE - 1]).collect();
        assert_eq!(bytes, [0, filled, filled, filled, 0]);
    }
    assert_eq!(disk.in_flight(), 0);
}

/// Random reads and writes of the pages of four segments, each page in use by one operation at a
/// time, against a model of their bytes.
fn storm(make: Make) {
    const SEGMENTS: usize = 4;
    const PLACES: usize = 64;
    const OPERATIONS: usize = 4000;
    let mut random = Random::of_test();
    let inbox = Inbox::new();
    let arena: Arc<dyn Region> = Arena::new(PLACES * SEGMENTS * PAGE);
    let disk = make(Arc::clone(&arena), Arc::clone(&inbox) as Arc<dyn Completions>);
    let folder = folder();
    for number in 0..SEGMENTS {
        disk.add_segment(segment(folder.path(), &format!("s{number}"), PLACES)).expect("a segment");
    }
    let mut model = vec![0u8; SEGMENTS * PLACES];
    let mut buffers: Vec<Option<Buffer>> = (0..SEGMENTS * PLACES)
        // SAFETY: each page of the arena is one buffer's.
        .map(|place| Some(unsafe { Buffer::of_region(Arc::clone(&arena), place * PAGE, PAGE) }))
        .collect();
    let (mut submitted, mut ended) = (0, 0);
    while ended < OPERATIONS {
        let mut batch = Vec::new();
        for _ in 0..random.below(40) {
            let place = random.below(SEGMENTS * PLACES);
            let Some(mut buffer) = buffers[place].take() else { continue };
            let kind = if random.below(3) == 0 { Kind::Write } else { Kind::Read };
            if kind == Kind::Write {
                model[place] = random.next() as u8;
            }
            buffer.bytes_mut().fill(if kind == Kind::Write { model[place] } else { !model[place] });
            let (segment, offset) = ((place / PLACES) as u32, (place % PLACES * PAGE) as u64);
            batch.push(Operation { token: place as u64, kind, segment, offset, buffer });
        }
        submitted += batch.len();
        disk.submit(batch);
        let wanted = if submitted < OPERATIONS { usize::from(submitted > ended) } else { submitted - ended };
        for completion in inbox.take(wanted) {
            let place = completion.token as usize;
            assert_eq!(completion.outcome, Ok(()), "{:?} of place {place}", completion.kind);
            assert!(completion.buffer.bytes().iter().all(|&byte| byte == model[place]), "bytes of place {place}");
            assert!(buffers[place].replace(completion.buffer).is_none(), "place {place} ended twice");
            ended += 1;
        }
    }
    assert_eq!((ended, disk.in_flight()), (submitted, 0));
    assert_eq!(inbox.seen(), submitted);
}

fn failures_have_their_reasons(make: Make) {
    let (folder, (disk, inbox)) = (folder(), start(make));
    disk.add_segment(segment(folder.path(), "s", 4)).expect("a segment");
    let readable = File::open(folder.path().join("s")).expect("the segment, to be read only");
    disk.add_segment(readable).expect("a segment");
    disk.submit(vec![read(0, 0, 3, 2)]);
    assert_eq!(error_of(&inbox.one()), DiskError::Short { wanted: 2 * PAGE, done: PAGE });
    disk.submit(vec![read(1, 0, 9, 1)]);
    assert_eq!(error_of(&inbox.one()), DiskError::Short { wanted: PAGE, done: 0 });
    disk.submit(vec![write(2, 1, 0, 1, 7)]);
    assert_eq!(error_of(&inbox.one()), DiskError::Os(libc::EBADF));
    disk.submit(vec![read(3, 2, 0, 1)]);
    let completion = inbox.one();
    assert_eq!((completion.token, error_of(&completion)), (3, DiskError::NoSegment));
    disk.submit(vec![read(4, 1, 0, 1)]);
    assert_eq!(inbox.one().outcome, Ok(()), "a failure stops nothing");
    disk.submit(Vec::new());
    assert_eq!(disk.in_flight(), 0);
}

fn many_threads_submit_at_once(make: Make) {
    let (folder, (disk, inbox)) = (folder(), start(make));
    disk.add_segment(segment(folder.path(), "s", 64)).expect("a segment");
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let disk = &disk;
            scope.spawn(move || {
                for number in 0..100 {
                    disk.submit(vec![read(thread * 100 + number, 0, number as usize % 64, 1)]);
                }
            });
        }
    });
    let mut tokens: Vec<u64> = inbox.take(800).iter().map(|completion| completion.token).collect();
    tokens.sort_unstable();
    assert_eq!(tokens, (0..800).collect::<Vec<_>>());
}

/// Two hundred writes and then eight reads in one go: bounded writes cannot be ahead of all reads.
fn reads_overtake_queued_writes(make: Make) {
    let (folder, (disk, inbox)) = (folder(), start(make));
    disk.add_segment(segment(folder.path(), "s", 256 * 16)).expect("a segment");
    let writes = (0..200).map(|at| write(at, 0, at as usize * 16, 16, 1));
    disk.submit(writes.chain((200..208).map(|at| read(at, 0, 255 * 16, 1))).collect());
    let ended = inbox.take(208);
    let last_read = ended.iter().rposition(|completion| completion.kind == Kind::Read).expect("reads");
    assert!(last_read < 104, "the last read ended as number {last_read}");
}

fn a_drop_completes_everything(make: Make) {
    let folder = folder();
    for round in 0..20 {
        let (disk, inbox) = start(make);
        disk.add_segment(segment(folder.path(), "s", 64)).expect("a segment");
        disk.submit((0..300).map(|at| write(at, 0, at as usize % 64, 1, 1)).collect());
        drop(disk);
        let ended = inbox.take(300);
        let good = |completion: &&Completion| matches!(completion.outcome, Ok(()) | Err(DiskError::Closed));
        assert_eq!((ended.len(), ended.iter().filter(good).count()), (300, 300), "round {round}");
    }
}

/// Several owners submit and let go; whoever is last closes the disk under the others' operations.
fn nothing_is_lost_when_the_last_owner_goes(make: Make) {
    let folder = folder();
    for _ in 0..50 {
        let (disk, inbox) = start(make);
        disk.add_segment(segment(folder.path(), "s", 64)).expect("a segment");
        let owners: Vec<_> = (0..4)
            .map(|owner| {
                let disk = Arc::clone(&disk);
                std::thread::spawn(move || disk.submit((0..25).map(|at| read(owner * 25 + at, 0, 1, 1)).collect()))
            })
            .collect();
        drop(disk);
        owners.into_iter().for_each(|owner| owner.join().expect("an owner"));
        let mut tokens: Vec<u64> = inbox.take(100).iter().map(|completion| completion.token).collect();
        tokens.sort_unstable();
        assert_eq!(tokens, (0..100).collect::<Vec<_>>());
    }
}

/// A receiver that owns the disk: its last reference goes on the disk's own thread.
#[derive(Default)]
struct Owner {
    disk: Mutex<Option<Arc<dyn Disk>>>,
    inbox: Inbox,
}

impl Completions for Owner {
    fn complete(&self, completions: Vec<Completion>) {
        // Not under the lock: the drop waits for the disk's other threads, which come here too.
        let disk = self.disk.lock().expect("the disk").take();
        drop(disk);
        self.inbox.complete(completions);
    }
}

fn a_receiver_may_drop_the_disk(make: Make) {
    let (folder, owner) = (folder(), Arc::new(Owner::default()));
    let disk = make(Arena::new(PAGE), Arc::clone(&owner) as Arc<dyn Completions>);
    disk.add_segment(segment(folder.path(), "s", 8)).expect("a segment");
    // Held until the receiver's own reference is the last one.
    let mut place = owner.disk.lock().expect("the disk");
    disk.submit((0..3).map(|at| read(at, 0, 0, 1)).collect());
    *place = Some(disk);
    drop(place);
    assert_eq!(owner.inbox.take(3).len(), 3);
}

/// CPU ticks and context switches of a thread so far.
fn activity(thread: i32) -> (u64, u64) {
    let stat = fs::read_to_string(format!("/proc/self/task/{thread}/stat")).expect("a thread");
    let after_name = stat.rsplit(')').next().expect("fields");
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let number = |text: &str| text.parse::<u64>().expect("a number");
    let status = fs::read_to_string(format!("/proc/self/task/{thread}/status")).expect("a thread");
    let switches = status.lines().filter(|line| line.contains("ctxt_switches"));
    let switches = switches.map(|line| number(line.rsplit('\t').next().expect("a value"))).sum();
    (number(fields[11]) + number(fields[12]), switches)
}

fn an_idle_disk_sleeps(make: Make) {
    let (folder, (disk, inbox)) = (folder(), start(make));
    disk.add_segment(segment(folder.path(), "s", 64)).expect("a segment");
    disk.submit((0..200).map(|at| read(at, 0, at as usize % 64, 1)).collect());
    inbox.take(200);
    // Lets the threads go to sleep; a slow machine only makes the measured time shorter.
    std::thread::sleep(Duration::from_millis(200));
    let threads = inbox.threads();
    let before: Vec<_> = threads.iter().map(|&thread| activity(thread)).collect();
    std::thread::sleep(Duration::from_millis(800));
    for (&thread, (ticks, switches)) in threads.iter().zip(before) {
        let (ticks_now, switches_now) = activity(thread);
        assert!(ticks_now - ticks <= 1, "{} ticks of CPU time", ticks_now - ticks);
        assert!(switches_now - switches <= 8, "{} context switches", switches_now - switches);
    }
}

fn registered_ring(region: Arc<dyn Region>, completions: Arc<dyn Completions>) -> Arc<dyn Disk> {
    let (disk, _) = RingDisk::start(vec![region], completions, IN_FLIGHT).expect("io_uring");
    Arc::new(disk)
}

fn plain_ring(_: Arc<dyn Region>, completions: Arc<dyn Completions>) -> Arc<dyn Disk> {
    let (disk, registered) = RingDisk::start(Vec::new(), completions, IN_FLIGHT).expect("io_uring");
    assert!(!registered);
    Arc::new(disk)
}

fn threads(_: Arc<dyn Region>, completions: Arc<dyn Completions>) -> Arc<dyn Disk> {
    Arc::new(ThreadDisk::start(completions, 4).expect("threads"))
}

fn fake(_: Arc<dyn Region>, completions: Arc<dyn Completions>) -> Arc<dyn Disk> {
    Arc::new(FaultyDisk::automatic(completions, 7))
}

/// Whether this machine has `io_uring`; says so when it has not.
pub(crate) fn has_ring() -> bool {
    let refusal = kvcellar_engine::nvme::probe::refusal();
    if let Some(why) = &refusal {
        println!("skipped: io_uring does not work here: {why}");
    }
    refusal.is_none()
}

fn always() -> bool {
    true
}

macro_rules! conform {
    ($($disk:ident if $works:ident => $make:ident),*) => { $(conform!(@ $disk, $works, $make,
        what_is_written_is_read_across_segments storm failures_have_their_reasons many_threads_submit_at_once reads_overtake_queued_writes
        a_drop_completes_everything nothing_is_lost_when_the_last_owner_goes a_receiver_may_drop_the_disk an_idle_disk_sleeps);)* };
    (@ $disk:ident, $works:ident, $make:ident, $($test:ident)*) => {
        mod $disk {
            $(#[test]
            fn $test() {
                if super::$works() {
                    super::$test(super::$make);
                }
            })*
        }
    };
}
conform!(
    ring_with_registered_memory if has_ring => registered_ring,
    ring if has_ring => plain_ring,
    pool_of_threads if always => threads,
    faulty_without_faults if always => fake
);
