//! Which disk works here: `io_uring` if the system allows it, threads otherwise.
//!
//! Promises: what is chosen was tried, and why it is not better is said in words.

use std::path::Path;
use std::sync::Arc;

use super::buffer::Region;
use super::disk::{Completions, Disk};
use super::ring::{self, RingDisk};
use super::threads::ThreadDisk;
use crate::config::nvme::DiskEngine;
use crate::limits::{DISK_BYTES_IN_FLIGHT, DISK_THREADS};
use kvcellar_block::error::{Error, Result};

/// Opens a disk whose segments will lie in `segment_dir`.
///
/// # Errors
/// [`Error::Unsupported`] when `io_uring` is insisted on and refused, [`Error::Io`] when the
/// directory cannot be looked at, [`Error::DeviceDead`] when no thread can be started.
pub fn open(
    engine: DiskEngine,
    regions: Vec<Arc<dyn Region>>,
    completions: &Arc<dyn Completions>,
    segment_dir: &Path,
) -> Result<Arc<dyn Disk>> {
    std::fs::metadata(segment_dir).map_err(|error| {
        Error::io("look at", segment_dir, error, "Name a directory that exists and can be written to")
    })?;
    let threads = |why: String| -> Result<Arc<dyn Disk>> {
        Ok(Arc::new(ThreadDisk::start(Arc::clone(completions), DISK_THREADS)?.because(why)))
    };
    if engine == DiskEngine::Threads {
        return threads("the configuration asks for threads".to_owned());
    }
    match RingDisk::start(regions, Arc::clone(completions), DISK_BYTES_IN_FLIGHT) {
        Ok((disk, _)) => Ok(Arc::new(disk)),
        Err(error) if engine == DiskEngine::IoUring => Err(error),
        Err(Error::Unsupported { why, .. }) => threads(format!("io_uring is refused: {why}")),
        Err(error) => threads(format!("io_uring cannot be used: {error}")),
    }
}

/// Why `io_uring` does not work here, if so, for `kvcellar doctor`.
pub fn refusal() -> Option<String> {
    ring::attempt().err().map(|error| ring::why_refused(&error))
}
