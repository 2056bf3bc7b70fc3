//! What every disk does alike: which operation starts next, which segments there are, how
//! completions are handed out.
//!
//! Promises: waiting reads start before waiting writes; bytes and operations in flight are bounded,
//! writes to a part of that. One write may always be in flight, so that a stream of reads never
//! starves writes for good. Does no I/O and takes no locks. The waiting side has no bound of its
//! own: each waiting operation owns a buffer, and buffers are bounded by who makes them.

use std::collections::VecDeque;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::directory::is_direct;
use super::disk::{Completion, Completions, DiskError, Kind, Operation};
use crate::limits::{DISK_SEGMENTS_MAX, DISK_WRITES_SHARE};
use kvcellar_block::error::{Error, Result};

/// What may be in flight at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Depth {
    /// Operations.
    pub(super) operations_max: usize,
    /// Bytes. A larger operation goes when no other of its kind is in flight.
    pub(super) bytes_max: u64,
}

impl Depth {
    fn writes_max(self) -> usize {
        (self.operations_max / DISK_WRITES_SHARE).max(1)
    }

    fn write_bytes_max(self) -> u64 {
        self.bytes_max / DISK_WRITES_SHARE as u64
    }

    /// One place stays for a write, unless there are too few to share.
    fn reads_max(self) -> usize {
        if self.operations_max < DISK_WRITES_SHARE { self.operations_max } else { self.operations_max - 1 }
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct Started {
    operations: usize,
    bytes: u64,
}

/// Operations that wait, and the measure of those that were started.
#[derive(Debug)]
pub(super) struct Queue {
    depth: Depth,
    reads: VecDeque<Operation>,
    writes: VecDeque<Operation>,
    reading: Started,
    writing: Started,
}

impl Queue {
    pub(super) fn new(depth: Depth) -> Self {
        let none = Started::default();
        Self { depth, reads: VecDeque::new(), writes: VecDeque::new(), reading: none, writing: none }
    }

    pub(super) fn push_all(&mut self, operations: Vec<Operation>) {
        for operation in operations {
            self.push(operation);
        }
    }

    fn push(&mut self, operation: Operation) {
        match operation.kind {
            Kind::Read => self.reads.push_back(operation),
            Kind::Write => self.writes.push_back(operation),
        }
    }

    /// The operation to start now, if one may. It counts as in flight until [`Self::ended`].
    pub(super) fn next(&mut self) -> Option<Operation> {
        let operation = if self.read_may_start() {
            self.reads.pop_front()
        } else if self.write_may_start() {
            self.writes.pop_front()
        } else {
            None
        }?;
        let started = self.started(operation.kind);
        started.operations += 1;
        started.bytes += operation.buffer.len() as u64;
        Some(operation)
    }

    /// An operation that [`Self::next`] gave is no longer in flight.
    pub(super) fn ended(&mut self, kind: Kind, bytes: usize) {
        let started = self.started(kind);
        started.operations -= 1;
        started.bytes -= bytes as u64;
    }

    /// Everything that waits, in order.
    pub(super) fn drain(&mut self) -> Vec<Operation> {
        self.reads.drain(..).chain(self.writes.drain(..)).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.reads.is_empty() && self.writes.is_empty()
    }

    fn started(&mut self, kind: Kind) -> &mut Started {
        match kind {
            Kind::Read => &mut self.reading,
            Kind::Write => &mut self.writing,
        }
    }

    fn has_room(&self, bytes: u64) -> bool {
        self.reading.operations + self.writing.operations < self.depth.operations_max
            && self.reading.bytes + self.writing.bytes + bytes <= self.depth.bytes_max
    }

    fn read_may_start(&self) -> bool {
        let Some(read) = self.reads.front() else { return false };
        if self.reading.operations == 0 {
            return self.writing.operations < self.depth.operations_max;
        }
        self.reading.operations < self.depth.reads_max() && self.has_room(read.buffer.len() as u64)
    }

    fn write_may_start(&self) -> bool {
        let Some(write) = self.writes.front() else { return false };
        if self.writing.operations == 0 {
            return self.reading.operations < self.depth.operations_max;
        }
        let bytes = write.buffer.len() as u64;
        self.reads.is_empty()
            && self.writing.operations < self.depth.writes_max()
            && self.writing.bytes + bytes <= self.depth.write_bytes_max()
            && self.has_room(bytes)
    }
}

/// The segment files, by number.
#[derive(Debug, Default)]
pub(super) struct SegmentTable {
    files: Vec<Arc<File>>,
    buffered: bool,
}

impl SegmentTable {
    /// Takes the next file and gives its number.
    pub(super) fn add(&mut self, file: File) -> Result<u32> {
        let number = self.files.len();
        if number == DISK_SEGMENTS_MAX {
            return Err(refused(
                format!("it has {DISK_SEGMENTS_MAX} segments already"),
                "Use larger segments, so that fewer are needed",
            ));
        }
        self.buffered |= !is_direct(&file);
        self.files.push(Arc::new(file));
        Ok(number as u32)
    }

    pub(super) fn get(&self, segment: u32) -> Option<&Arc<File>> {
        self.files.get(segment as usize)
    }

    /// The files from number `first` on.
    pub(super) fn from(&self, first: usize) -> &[Arc<File>] {
        self.files.get(first..).unwrap_or_default()
    }

    /// There are segments, and all of them are open with `O_DIRECT`.
    pub(super) fn are_direct(&self) -> bool {
        !self.files.is_empty() && !self.buffered
    }

    /// `why` of an engine, with what is to be said of its files.
    pub(super) fn explain(&self, why: &str) -> String {
        let files = if self.buffered { "segment files are buffered: they are open without O_DIRECT" } else { "" };
        [why, files].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
    }
}

/// The error of a disk that takes no segment.
pub(super) fn refused(problem: String, remedy: &str) -> Error {
    Error::DeviceDead { device: "the NVMe tier's disk".to_owned(), problem, remedy: remedy.to_owned() }
}

/// The end of `operation`.
pub(super) fn completion(operation: Operation, outcome: std::result::Result<(), DiskError>) -> Completion {
    Completion { token: operation.token, kind: operation.kind, buffer: operation.buffer, outcome }
}

/// What a transfer's count or negative errno means.
pub(super) fn outcome(wanted: usize, result: i64) -> std::result::Result<(), DiskError> {
    match usize::try_from(result) {
        Ok(done) if done == wanted => Ok(()),
        Ok(done) => Err(DiskError::Short { wanted, done }),
        Err(_) => Err(DiskError::Os(result.unsigned_abs() as i32)),
    }
}

/// The way out: who gets completions, and how many are owed.
pub(super) struct Outbox {
    completions: Arc<dyn Completions>,
    owed: AtomicUsize,
}

impl Outbox {
    pub(super) fn new(completions: Arc<dyn Completions>) -> Self {
        Self { completions, owed: AtomicUsize::new(0) }
    }

    /// So many more operations were submitted.
    pub(super) fn owe(&self, operations: usize) {
        self.owed.fetch_add(operations, Ordering::Relaxed);
    }

    pub(super) fn owed(&self) -> usize {
        self.owed.load(Ordering::Relaxed)
    }

    /// Hands completions over. They no longer count as in flight when the receiver sees them.
    pub(super) fn deliver(&self, batch: Vec<Completion>) {
        if batch.is_empty() {
            return;
        }
        self.owed.fetch_sub(batch.len(), Ordering::Relaxed);
        // A receiver that panics has lost its own completions, and the panic hook has said so. The
        // disk serves its other operations on: unwinding from here would free memory that the
        // kernel is still writing to.
        let _ = catch_unwind(AssertUnwindSafe(|| self.completions.complete(batch)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvme::buffer::Buffer;

    const PAGE: usize = 4096;

    fn operation(kind: Kind, token: u64, pages: usize) -> Operation {
        Operation { token, kind, segment: 0, offset: 0, buffer: Buffer::pages(pages * PAGE) }
    }

    fn queue(operations_max: usize, pages: u64) -> Queue {
        Queue::new(Depth { operations_max, bytes_max: pages * PAGE as u64 })
    }

    fn started(queue: &mut Queue) -> Vec<u64> {
        std::iter::from_fn(|| queue.next()).map(|operation| operation.token).collect()
    }

    #[test]
    fn waiting_reads_start_before_waiting_writes() {
        let mut queue = queue(8, 8);
        for token in 0..3 {
            queue.push(operation(Kind::Write, token, 1));
            queue.push(operation(Kind::Read, 10 + token, 1));
        }
        assert_eq!(started(&mut queue), [10, 11, 12, 0, 1]);
        queue.ended(Kind::Write, PAGE);
        assert_eq!(started(&mut queue), [2]);
        assert!(queue.is_empty());
    }

    #[test]
    fn writes_get_a_quarter_and_reads_the_rest() {
        let mut queue = queue(8, 100);
        for token in 0..20 {
            queue.push(operation(Kind::Write, token, 1));
        }
        assert_eq!(started(&mut queue), [0, 1], "a quarter of the places");
        for token in 100..120 {
            queue.push(operation(Kind::Read, token, 1));
        }
        assert_eq!(started(&mut queue).len(), 6, "reads take what is left");
    }

    #[test]
    fn bytes_bound_what_is_in_flight() {
        let mut queue = queue(100, 16);
        for token in 0..5 {
            queue.push(operation(Kind::Read, token, 5));
            queue.push(operation(Kind::Write, 10 + token, 3));
        }
        assert_eq!(started(&mut queue), [0, 1, 2, 10], "fifteen pages of reads, and one write that may always go");
        queue.ended(Kind::Read, 5 * PAGE);
        assert_eq!(started(&mut queue), [0; 0], "thirteen pages are in flight, three are not enough for a read");
        queue.ended(Kind::Write, 3 * PAGE);
        assert_eq!(started(&mut queue), [3, 11]);
    }

    #[test]
    fn an_operation_larger_than_the_bound_goes_alone_of_its_kind() {
        let mut queue = queue(8, 4);
        queue.push(operation(Kind::Read, 0, 9));
        queue.push(operation(Kind::Read, 1, 9));
        queue.push(operation(Kind::Write, 2, 9));
        queue.push(operation(Kind::Write, 3, 1));
        assert_eq!(started(&mut queue), [0, 2]);
        queue.ended(Kind::Read, 9 * PAGE);
        assert_eq!(started(&mut queue), [1]);
    }

    #[test]
    fn reads_never_starve_writes() {
        let mut queue = queue(4, 100);
        for token in 0..10 {
            queue.push(operation(Kind::Read, token, 1));
        }
        queue.push(operation(Kind::Write, 99, 1));
        assert_eq!(started(&mut queue), [0, 1, 2, 99]);
    }

    #[test]
    fn one_place_serves_reads_and_then_writes() {
        let mut queue = queue(1, 1);
        queue.push(operation(Kind::Write, 0, 1));
        queue.push(operation(Kind::Read, 1, 1));
        assert_eq!(started(&mut queue), [1]);
        queue.ended(Kind::Read, PAGE);
        assert_eq!(started(&mut queue), [0]);
    }

    #[test]
    fn counts_and_errnos_are_told_apart() {
        assert_eq!(outcome(4096, 4096), Ok(()));
        assert_eq!(outcome(4096, 512), Err(DiskError::Short { wanted: 4096, done: 512 }));
        assert_eq!(outcome(4096, 0), Err(DiskError::Short { wanted: 4096, done: 0 }));
        assert_eq!(outcome(4096, -9), Err(DiskError::Os(9)));
    }
}
