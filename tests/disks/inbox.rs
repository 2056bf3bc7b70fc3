//! A receiver of completions that tests wait on, and small makers of operations.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use kvcellar_engine::nvme::buffer::Buffer;
use kvcellar_engine::nvme::directory::{How, open};
use kvcellar_engine::nvme::disk::{Completion, Completions, DiskError, Kind, Operation};

pub(crate) const PAGE: usize = 4096;

/// Longer than any test takes: only a lost completion reaches it.
const LOST: Duration = Duration::from_secs(30);

#[derive(Default)]
pub(crate) struct Inbox {
    got: Mutex<Got>,
    more: Condvar,
}

#[derive(Default)]
struct Got {
    completions: Vec<Completion>,
    seen: usize,
    /// Threads that delivered, by the system's number.
    threads: BTreeSet<i32>,
}

impl Completions for Inbox {
    fn complete(&self, completions: Vec<Completion>) {
        assert!(!completions.is_empty(), "an empty batch");
        let mut got = self.got.lock().expect("inbox");
        got.seen += completions.len();
        got.completions.extend(completions);
        got.threads.insert(nix::unistd::gettid().as_raw());
        self.more.notify_all();
    }
}

impl Inbox {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Waits until `count` completions wait here, and takes all.
    pub(crate) fn take(&self, count: usize) -> Vec<Completion> {
        let got = self.got.lock().expect("inbox");
        let waits = |got: &mut Got| got.completions.len() < count;
        let (mut got, time) = self.more.wait_timeout_while(got, LOST, waits).expect("inbox");
        assert!(!time.timed_out(), "{} of {count} completions came", got.completions.len());
        std::mem::take(&mut got.completions)
    }

    /// The one completion that comes.
    pub(crate) fn one(&self) -> Completion {
        let mut all = self.take(1);
        assert_eq!(all.len(), 1, "completions");
        all.remove(0)
    }

    /// Completions that came ever.
    pub(crate) fn seen(&self) -> usize {
        self.got.lock().expect("inbox").seen
    }

    pub(crate) fn threads(&self) -> Vec<i32> {
        self.got.lock().expect("inbox").threads.iter().copied().collect()
    }
}

pub(crate) fn read(token: u64, segment: u32, page: usize, pages: usize) -> Operation {
    let buffer = Buffer::pages(pages * PAGE);
    Operation { token, kind: Kind::Read, segment, offset: (page * PAGE) as u64, buffer }
}

pub(crate) fn write(token: u64, segment: u32, page: usize, pages: usize, byte: u8) -> Operation {
    let mut operation = read(token, segment, page, pages);
    operation.kind = Kind::Write;
    operation.buffer.bytes_mut().fill(byte);
    operation
}

pub(crate) fn error_of(completion: &Completion) -> DiskError {
    completion.outcome.expect_err("a failed transfer")
}

/// A folder on the file system of the build, which is a real one.
pub(crate) fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder")
}

/// A segment of zeroes.
pub(crate) fn segment(folder: &Path, name: &str, pages: usize) -> File {
    drop(open(&folder.join(name), How::OrNew).expect("made"));
    let file = open(&folder.join(name), How::Direct).expect("a segment");
    file.set_len((pages * PAGE) as u64).expect("its length");
    file
}
