//! Transfers that wait for a place in staging: reads first, writes in half of it at most.
//!
//! A transfer is here until it has a place; then it is the disk's. The queue has no bound of its
//! own: reads are bounded by the slots they fill, writes by what may be written at once.

use std::collections::VecDeque;

use super::transfer::SealOrder;
use crate::nvme::buffer::Buffer;
use crate::nvme::disk::Kind;
use crate::nvme::staging::HugeStaging;
use kvcellar_block::ExtentIndex;

/// A transfer that passes through staging.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Names it.
    pub(super) token: u64,
    /// The first extent.
    pub(super) extent: ExtentIndex,
    /// Which way, and what a write is made of.
    pub(super) work: StagedWork,
}

/// What is to be done with the place.
#[derive(Debug)]
pub(super) enum StagedWork {
    /// To be read into: so many extents.
    Read(usize),
    /// To be filled with the sealed images of these blocks, and written.
    Write(Vec<SealOrder>),
}

impl Waiting {
    fn extents(&self) -> usize {
        match &self.work {
            StagedWork::Read(extents) => *extents,
            StagedWork::Write(orders) => orders.len(),
        }
    }
}

/// Staging, and who waits for it.
#[derive(Debug)]
pub(super) struct StagingQueue {
    staging: HugeStaging,
    reads: VecDeque<Waiting>,
    writes: VecDeque<Waiting>,
    /// Places that writes have.
    writing: usize,
}

impl StagingQueue {
    /// Nobody waits yet.
    pub(super) fn new(staging: HugeStaging) -> Self {
        Self { staging, reads: VecDeque::new(), writes: VecDeque::new(), writing: 0 }
    }

    /// Takes a transfer. It comes out of [`Self::next`] when there is room.
    pub(super) fn push(&mut self, waiting: Waiting) {
        match waiting.work {
            StagedWork::Read(_) => self.reads.push_back(waiting),
            StagedWork::Write(_) => self.writes.push_back(waiting),
        }
    }

    /// A transfer that can go to the disk now, with its place.
    pub(super) fn next(&mut self) -> Option<(Waiting, Buffer)> {
        if let Some(buffer) = self.reads.front().and_then(|read| self.staging.take(read.extents())) {
            return self.reads.pop_front().map(|read| (read, buffer));
        }
        let extents = self.writes.front()?.extents();
        // While reads wait for room, writes take none of it, but one of them always goes.
        let may = self.writing == 0 || (self.reads.is_empty() && 2 * (self.writing + extents) <= self.staging.places());
        let buffer = may.then(|| self.staging.take(extents)).flatten()?;
        self.writing += extents;
        self.writes.pop_front().map(|write| (write, buffer))
    }

    /// The end of a transfer's buffer.
    pub(super) fn end(&mut self, kind: Kind, buffer: Buffer) {
        let places = self.staging.give_back(buffer);
        if kind == Kind::Write {
            self.writing -= places;
        }
    }

    /// Whether a buffer is a place in staging.
    pub(super) fn owns(&self, buffer: &Buffer) -> bool {
        self.staging.owns(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::STAGING_BYTES;
    use kvcellar_block::descriptor::Seal;
    use kvcellar_block::{BlockHash, BlockKey, Generation, GroupIndex, SlotIndex};

    fn queue() -> StagingQueue {
        // Eight places.
        StagingQueue::new(HugeStaging::new(STAGING_BYTES / 8).expect("memory"))
    }

    fn read(token: u64, extents: usize) -> Waiting {
        Waiting { token, extent: ExtentIndex(0), work: StagedWork::Read(extents) }
    }

    fn write(token: u64, extents: usize) -> Waiting {
        let order = SealOrder {
            slot: SlotIndex(0),
            generation: Generation(1),
            key: BlockKey { hash: BlockHash::new(&[7; 32]).expect("a hash"), group: GroupIndex(0) },
            seal: Seal::default(),
        };
        Waiting { token, extent: ExtentIndex(0), work: StagedWork::Write(vec![order; extents]) }
    }

    fn tokens(queue: &mut StagingQueue) -> (Vec<u64>, Vec<Buffer>) {
        std::iter::from_fn(|| queue.next()).map(|(waiting, buffer)| (waiting.token, buffer)).unzip()
    }

    #[test]
    fn reads_go_first_and_writes_have_half() {
        let mut queue = queue();
        for token in 0..6 {
            queue.push(write(token, 1));
        }
        queue.push(read(10, 3));
        let (first, mut held) = tokens(&mut queue);
        assert_eq!(first, [10, 0, 1, 2, 3], "a read, and writes in four of eight places");
        queue.end(Kind::Write, held.remove(1));
        assert_eq!(tokens(&mut queue).0, [4]);
    }

    #[test]
    fn one_write_goes_beside_reads_that_wait() {
        let mut queue = queue();
        for token in 0..4 {
            queue.push(read(token, 2));
        }
        for token in 10..13 {
            queue.push(write(token, 1));
        }
        let (first, mut held) = tokens(&mut queue);
        assert_eq!(first, [0, 1, 2, 3], "no room is left");
        queue.push(read(4, 8));
        queue.end(Kind::Read, held.remove(0));
        let (second, written) = tokens(&mut queue);
        assert_eq!(second, [10], "the read that waits for all the room keeps further writes out");
        for buffer in held {
            queue.end(Kind::Read, buffer);
        }
        assert_eq!(tokens(&mut queue).0, [0_u64; 0]);
        for buffer in written {
            queue.end(Kind::Write, buffer);
        }
        assert_eq!(tokens(&mut queue).0, [4]);
    }
}
