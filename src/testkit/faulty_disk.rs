//! A disk in memory that does what a test tells it: fails, transfers too little, loses, tears,
//! holds, reorders, dies.
//!
//! It starts with the bytes of the files it is given and never writes to them;
//! [`FaultyDisk::write_back`] does. Automatic: a thread of its own completes operations. Manual:
//! nothing happens until the test calls [`FaultyDisk::step`]. An operation takes effect when it is
//! completed. Stands alone, so that other tests can include it by path.

#![allow(dead_code, reason = "each test that includes this uses other faults")]

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use kvcellar_block::error::{Error, Result};
use kvcellar_engine::nvme::disk::{Completion, Completions, Description, Disk, DiskError, Kind, Operation};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// What goes wrong with an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this errno and changes nothing.
    Errno(i32),
    /// Only so many bytes are transferred, and it says so.
    Short(usize),
    /// A write that is acknowledged and never happens; a read that brings nothing.
    Lost,
    /// A write of which only so many first bytes happen, acknowledged.
    Torn(usize),
}

/// Which operations a fault is for: by default all of them.
#[derive(Debug, Clone)]
pub struct Rule {
    fault: Fault,
    kind: Option<Kind>,
    place: Option<(u32, Range<u64>)>,
    skip: usize,
    times: usize,
}

impl Rule {
    pub fn new(fault: Fault) -> Self {
        Self { fault, kind: None, place: None, skip: 0, times: usize::MAX }
    }

    /// Only operations of this kind.
    #[must_use]
    pub fn of(mut self, kind: Kind) -> Self {
        self.kind = Some(kind);
        self
    }

    /// Only operations that begin in these bytes of a segment.
    #[must_use]
    pub fn at(mut self, segment: u32, offsets: Range<u64>) -> Self {
        self.place = Some((segment, offsets));
        self
    }

    /// Only from the `nth` operation it is for on, counted from 0.
    #[must_use]
    pub fn nth(mut self, nth: usize) -> Self {
        self.skip = nth;
        self
    }

    /// Only so often.
    #[must_use]
    pub fn times(mut self, times: usize) -> Self {
        self.times = times;
        self
    }

    fn hits(&mut self, operation: &Operation) -> bool {
        let here = |(segment, offsets): &(u32, Range<u64>)| {
            *segment == operation.segment && offsets.contains(&operation.offset)
        };
        let is_for = self.kind.is_none_or(|kind| kind == operation.kind) && self.place.as_ref().is_none_or(here);
        if !is_for || self.times == 0 {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        self.times -= 1;
        true
    }
}

struct Segment {
    file: File,
    bytes: Vec<u8>,
    readable: bool,
    writable: bool,
}

struct State {
    segments: Vec<Segment>,
    waiting: Vec<Operation>,
    rules: Vec<Rule>,
    random: u64,
    reorders: bool,
    held: bool,
    dead: Option<i32>,
    closing: bool,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    completions: Arc<dyn Completions>,
}

pub struct FaultyDisk {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl FaultyDisk {
    /// Completes by itself, on a thread of its own.
    pub fn automatic(completions: Arc<dyn Completions>, seed: u64) -> Self {
        let mut disk = Self::manual(completions, seed);
        let shared = Arc::clone(&disk.shared);
        disk.thread = Some(std::thread::spawn(move || shared.serve()));
        disk
    }

    /// Completes only in [`Self::step`], on the caller's thread.
    pub fn manual(completions: Arc<dyn Completions>, seed: u64) -> Self {
        let state = State {
            segments: Vec::new(),
            waiting: Vec::new(),
            rules: Vec::new(),
            random: seed,
            reorders: false,
            held: false,
            dead: None,
            closing: false,
        };
        Self { shared: Arc::new(Shared { state: Mutex::new(state), work: Condvar::new(), completions }), thread: None }
    }

    /// From now on operations that the rule is for go wrong. The first rule that hits counts.
    pub fn add_rule(&self, rule: Rule) {
        self.lock().rules.push(rule);
    }

    pub fn clear_rules(&self) {
        self.lock().rules.clear();
    }

    /// From now on operations of a kind end in any order.
    pub fn reorder(&self) {
        self.lock().reorders = true;
    }

    /// From now on nothing is completed, until [`Self::release`].
    pub fn hold(&self) {
        self.lock().held = true;
    }

    pub fn release(&self) {
        self.lock().held = false;
        self.shared.work.notify_all();
    }

    /// The device is gone: everything fails with this errno, and no segment is taken.
    pub fn kill(&self, errno: i32) {
        self.lock().dead = Some(errno);
    }

    /// Completes one operation, if one waits. For the manual disk.
    pub fn step(&self) -> bool {
        let mut state = self.lock();
        let Some(completion) = state.complete_one() else { return false };
        drop(state);
        self.shared.completions.complete(vec![completion]);
        true
    }

    /// Operations that wait: token, kind, segment and offset, in the order in which they were
    /// submitted.
    pub fn pending(&self) -> Vec<(u64, Kind, u32, u64)> {
        let facts = |operation: &Operation| (operation.token, operation.kind, operation.segment, operation.offset);
        self.lock().waiting.iter().map(facts).collect()
    }

    /// What is on the disk.
    pub fn image(&self, segment: u32) -> Vec<u8> {
        self.lock().segments[segment as usize].bytes.clone()
    }

    /// Puts what is on the disk into the segments' files, as if the machine had stopped now.
    pub fn write_back(&self) {
        for segment in &self.lock().segments {
            segment.file.set_len(segment.bytes.len() as u64).expect("the segment's length");
            segment.file.write_all_at(&segment.bytes, 0).expect("the segment's bytes");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().expect("the disk's state")
    }
}

impl Shared {
    fn serve(&self) {
        let mut state = self.state.lock().expect("the disk's state");
        loop {
            if state.closing {
                let left = std::mem::take(&mut state.waiting);
                drop(state);
                return self.close(left);
            }
            match if state.held { None } else { state.complete_one() } {
                Some(completion) => {
                    drop(state);
                    self.completions.complete(vec![completion]);
                    state = self.state.lock().expect("the disk's state");
                }
                None => state = self.work.wait(state).expect("the disk's state"),
            }
        }
    }

    fn close(&self, left: Vec<Operation>) {
        let closed: Vec<_> = left.into_iter().map(|operation| end(operation, Err(DiskError::Closed))).collect();
        if !closed.is_empty() {
            self.completions.complete(closed);
        }
    }
}

fn end(operation: Operation, outcome: std::result::Result<(), DiskError>) -> Completion {
    Completion { token: operation.token, kind: operation.kind, buffer: operation.buffer, outcome }
}

impl State {
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.random >> 33
    }

    /// Reads first.
    fn choose(&mut self) -> Option<Operation> {
        let of = |kind: Kind| (0..self.waiting.len()).filter(|&at| self.waiting[at].kind == kind).collect::<Vec<_>>();
        let reads = of(Kind::Read);
        let candidates = if reads.is_empty() { of(Kind::Write) } else { reads };
        let &first = candidates.first()?;
        let at = if self.reorders { candidates[self.next_random() as usize % candidates.len()] } else { first };
        Some(self.waiting.remove(at))
    }

    fn complete_one(&mut self) -> Option<Completion> {
        let mut operation = self.choose()?;
        let outcome = match self.dead {
            Some(errno) => Err(DiskError::Os(errno)),
            None => self.perform(&mut operation),
        };
        Some(end(operation, outcome))
    }

    fn perform(&mut self, operation: &mut Operation) -> std::result::Result<(), DiskError> {
        let fault = self.rules.iter_mut().find_map(|rule| rule.hits(operation).then_some(rule.fault));
        let segment = self.segments.get_mut(operation.segment as usize).ok_or(DiskError::NoSegment)?;
        let wanted = operation.buffer.len();
        let (bytes, told) = match fault {
            Some(Fault::Errno(errno)) => return Err(DiskError::Os(errno)),
            Some(Fault::Short(bytes)) => (bytes.min(wanted), bytes.min(wanted)),
            Some(Fault::Lost) => (0, wanted),
            Some(Fault::Torn(bytes)) => (bytes.min(wanted), wanted),
            None => (wanted, wanted),
        };
        let done = segment.transfer(operation, bytes)?;
        let told = if done < bytes { done } else { told };
        if told == wanted { Ok(()) } else { Err(DiskError::Short { wanted, done: told }) }
    }
}

impl Segment {
    fn transfer(&mut self, operation: &mut Operation, bytes: usize) -> std::result::Result<usize, DiskError> {
        let offset = operation.offset as usize;
        let allowed = if operation.kind == Kind::Read { self.readable } else { self.writable };
        if !allowed {
            return Err(DiskError::Os(libc::EBADF));
        }
        if operation.kind == Kind::Read {
            let there = self.bytes.get(offset..).unwrap_or_default();
            let done = bytes.min(there.len());
            operation.buffer.bytes_mut()[..done].copy_from_slice(&there[..done]);
            return Ok(done);
        }
        if bytes > 0 && self.bytes.len() < offset + bytes {
            self.bytes.resize(offset + bytes, 0);
        }
        self.bytes[offset..][..bytes].copy_from_slice(&operation.buffer.bytes()[..bytes]);
        Ok(bytes)
    }
}

impl Disk for FaultyDisk {
    fn submit(&self, operations: Vec<Operation>) {
        self.lock().waiting.extend(operations);
        self.shared.work.notify_all();
    }

    fn add_segment(&self, file: File) -> Result<u32> {
        let mut state = self.lock();
        if state.dead.is_some() {
            return Err(Error::DeviceDead {
                device: "the fake".to_owned(),
                problem: "it was killed".to_owned(),
                remedy: "None".to_owned(),
            });
        }
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).expect("the file's flags"));
        let mode = flags & OFlag::O_ACCMODE;
        let buffered = FcntlArg::F_SETFL(flags - OFlag::O_DIRECT);
        fcntl(&file, buffered).expect("the file's flags");
        let (readable, writable) = (mode != OFlag::O_WRONLY, mode != OFlag::O_RDONLY);
        let mut bytes = vec![0; file.metadata().expect("the file's length").len() as usize];
        if readable {
            file.read_exact_at(&mut bytes, 0).expect("the file's bytes");
        }
        state.segments.push(Segment { file, bytes, readable, writable });
        Ok(state.segments.len() as u32 - 1)
    }

    fn describe(&self) -> Description {
        Description { engine: "fake", direct: false, registered: false, why: "it is a fake".to_owned() }
    }

    fn in_flight(&self) -> usize {
        self.lock().waiting.len()
    }
}

impl Drop for FaultyDisk {
    fn drop(&mut self) {
        let mut state = self.lock();
        state.closing = true;
        let left = if self.thread.is_some() { Vec::new() } else { std::mem::take(&mut state.waiting) };
        drop(state);
        self.shared.close(left);
        self.shared.work.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            thread.join().expect("the disk's thread");
        }
    }
}
