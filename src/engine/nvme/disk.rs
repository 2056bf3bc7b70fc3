//! The seam between the tier and a device: operations go in, completions come out.
//!
//! Every implementation passes the same conformance suite (`tests/disks`): each submitted operation
//! is completed exactly once, submitting never blocks, a short transfer is an error, reads overtake
//! writes that have not started, writes in flight are bounded.

use std::fs::File;

use super::buffer::Buffer;
use kvcellar_block::error::Result;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Segment to buffer.
    Read,
    /// Buffer to segment.
    Write,
}

/// One transfer. It owns its buffer until it is completed.
#[derive(Debug)]
pub struct Operation {
    /// The submitter's name for it, handed back with the completion.
    pub token: u64,
    /// Which way.
    pub kind: Kind,
    /// The segment file, as numbered by [`Disk::add_segment`].
    pub segment: u32,
    /// Byte offset in the segment, a multiple of 4096.
    pub offset: u64,
    /// The whole buffer is transferred.
    pub buffer: Buffer,
}

/// Why a transfer failed. The buffer may hold anything then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// The system said so: a positive errno.
    #[error("{}", std::io::Error::from_raw_os_error(*.0))]
    Os(i32),
    /// Fewer bytes than asked for.
    #[error("{done} of {wanted} bytes were transferred")]
    Short {
        /// Bytes asked for.
        wanted: usize,
        /// Bytes transferred.
        done: usize,
    },
    /// There is no such segment.
    #[error("no such segment")]
    NoSegment,
    /// The disk was closed before the operation started.
    #[error("the disk was closed")]
    Closed,
}

/// The end of one operation.
#[derive(Debug)]
pub struct Completion {
    /// The operation's token.
    pub token: u64,
    /// Which way.
    pub kind: Kind,
    /// The operation's buffer, the submitter's again.
    pub buffer: Buffer,
    /// How it went.
    pub outcome: std::result::Result<(), DiskError>,
}

/// Where completions go. Called from the disk's own threads; must not block for long.
pub trait Completions: Send + Sync {
    /// Operations ended. Called with each operation exactly once, in any order.
    fn complete(&self, completions: Vec<Completion>);
}

/// What an implementation is and does, for the log, the gauge and reports.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Description {
    /// `io_uring` or `threads`.
    pub engine: &'static str,
    /// `O_DIRECT` is in use.
    pub direct: bool,
    /// Memory is registered with the kernel (fixed I/O).
    pub registered: bool,
    /// Why it is this one and not a better one; empty when it is the best there is.
    pub why: String,
}

/// A device that holds segments.
pub trait Disk: Send + Sync {
    /// Starts transfers. Returns at once; every operation is completed exactly once, whatever
    /// happens.
    fn submit(&self, operations: Vec<Operation>);

    /// Makes a segment file known. Segments are numbered from 0 in the order in which they are
    /// added.
    ///
    /// # Errors
    /// [`kvcellar_block::error::Error::DeviceDead`] when the device takes no more segments.
    fn add_segment(&self, file: File) -> Result<u32>;

    /// What it is.
    fn describe(&self) -> Description;

    /// Operations submitted and not completed.
    fn in_flight(&self) -> usize;
}
