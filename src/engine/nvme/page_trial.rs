//! Whether this disk is faster with memory in huge pages: tried out with a file of no name.
//!
//! Interleaved, so that a noisy neighbour hits both kinds of memory alike. Takes a moment, writes
//! [`PAGE_TRIAL_BYTES`] twice and reads them a few times. Leaves nothing behind, whatever happens,
//! and does not touch space that is to stay free.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::buffer::{Arena, Buffer, Region};
use super::disk::{Disk, Kind, Operation};
use super::probe;
use super::recovery::{self, Arrivals};
use super::space;
use crate::config::nvme::DiskEngine;
use crate::limits::{PAGE_TRIAL_BYTES, PAGE_TRIAL_GAIN, PAGE_TRIAL_PATIENCE_MS, PAGE_TRIAL_ROUNDS, TRANSFER_BYTES_MAX};

/// What the trial found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PageTrial {
    /// Reads into huge pages are so many times as fast as into small ones.
    Gain(f64),
    /// The disk is too slow for its pages to matter.
    SlowDisk,
    /// The system did not let us try.
    NotTried,
}

impl PageTrial {
    /// Huge pages pay, so that a copy more is worth it.
    pub fn pays(self) -> bool {
        matches!(self, Self::Gain(gain) if gain >= PAGE_TRIAL_GAIN)
    }
}

/// Tries the disk that `dir` lies on, as `engine` would use it. Not if less than `reserve_bytes`
/// would be free meanwhile.
///
/// `small`: the memory whose pages are in question, at least [`PAGE_TRIAL_BYTES`] of it. Without
/// it other memory in small pages stands for it, and may do it too well: pages that were never used
/// before tend to lie one after the other.
pub fn run(engine: DiskEngine, dir: &Path, reserve_bytes: u64, small: Option<Arc<dyn Region>>) -> PageTrial {
    if !space::free_bytes(dir).is_ok_and(|free| free >= reserve_bytes.saturating_add(PAGE_TRIAL_BYTES)) {
        return PageTrial::NotTried;
    }
    Trial::begin(engine, dir, small).and_then(Trial::run).unwrap_or(PageTrial::NotTried)
}

struct Trial {
    disk: Arc<dyn Disk>,
    arrivals: Arrivals,
    small: Arc<dyn Region>,
    huge: Arc<dyn Region>,
}

impl Trial {
    fn begin(engine: DiskEngine, dir: &Path, small: Option<Arc<dyn Region>>) -> Option<Self> {
        let file = nameless(dir)?;
        let small = match small.filter(|it| it.len() >= PAGE_TRIAL_BYTES as usize) {
            Some(small) => small,
            None => Arena::in_small_pages(PAGE_TRIAL_BYTES as usize)?,
        };
        let huge: Arc<dyn Region> = Arena::in_huge_pages(PAGE_TRIAL_BYTES as usize)?;
        let (completions, arrivals) = recovery::channel();
        let disk = probe::open(engine, vec![Arc::clone(&small), Arc::clone(&huge)], &completions, dir).ok()?;
        disk.add_segment(file).ok()?;
        Some(Self { disk, arrivals, small, huge })
    }

    fn run(self) -> Option<PageTrial> {
        // Also gives the file its blocks: what was never written is not read from the disk.
        if self.seconds(Kind::Write, &self.huge)? > PAGE_TRIAL_PATIENCE_MS as f64 / 1e3 {
            return Some(PageTrial::SlowDisk);
        }
        self.seconds(Kind::Write, &self.small)?;
        let mut gains = Vec::with_capacity(PAGE_TRIAL_ROUNDS);
        for round in 0..PAGE_TRIAL_ROUNDS {
            let (first, second) =
                if round.is_multiple_of(2) { (&self.small, &self.huge) } else { (&self.huge, &self.small) };
            let (first, second) = (self.seconds(Kind::Read, first)?, self.seconds(Kind::Read, second)?);
            gains.push(if round.is_multiple_of(2) { first / second } else { second / first });
        }
        gains.sort_by(f64::total_cmp);
        Some(PageTrial::Gain(gains[gains.len() / 2]))
    }

    /// Seconds to move all of the file from or to this memory; `None` when a transfer failed.
    fn seconds(&self, kind: Kind, memory: &Arc<dyn Region>) -> Option<f64> {
        let step = TRANSFER_BYTES_MAX as usize;
        let operations: Vec<Operation> = (0..PAGE_TRIAL_BYTES as usize / step)
            .map(|index| {
                let offset = index * step;
                // SAFETY: the pieces do not overlap, and nobody else uses the memory: it is ours,
                // or that is what the maker of a part of a pool has promised.
                let buffer = unsafe { Buffer::of_region(Arc::clone(memory), offset, step) };
                Operation { token: index as u64, kind, segment: 0, offset: offset as u64, buffer }
            })
            .collect();
        let mut waiting = operations.len();
        let started = Instant::now();
        self.disk.submit(operations);
        while waiting > 0 {
            // A disk that hangs here is the mover's to find out.
            let ended = self.arrivals.recv_timeout(Duration::from_millis(10 * PAGE_TRIAL_PATIENCE_MS)).ok()?;
            if ended.iter().any(|completion| completion.outcome.is_err()) {
                return None;
            }
            waiting -= ended.len();
        }
        Some(started.elapsed().as_secs_f64())
    }
}

/// A file that is gone when it is closed, read and written past the page cache.
fn nameless(dir: &Path) -> Option<File> {
    let flags = libc::O_TMPFILE | libc::O_DIRECT | libc::O_CLOEXEC;
    OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(flags).open(dir).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_leaves_nothing_and_tells_a_ratio() {
        let binary = std::env::current_exe().expect("a binary");
        let dir = tempfile::tempdir_in(binary.parent().expect("a directory")).expect("a directory");
        match run(DiskEngine::Auto, dir.path(), 0, None) {
            PageTrial::Gain(gain) => assert!(gain.is_finite() && gain > 0.0),
            // A machine whose disk, or whose system, does not let us.
            PageTrial::SlowDisk | PageTrial::NotTried => {}
        }
        assert_eq!(std::fs::read_dir(dir.path()).expect("a directory").count(), 0);
    }

    #[test]
    fn where_nothing_can_be_tried_nothing_pays() {
        assert_eq!(run(DiskEngine::Auto, Path::new("/proc/self/no-such"), 0, None), PageTrial::NotTried);
        assert_eq!(run(DiskEngine::Auto, &std::env::temp_dir(), u64::MAX - 1, None), PageTrial::NotTried);
        assert_eq!(
            [PageTrial::NotTried, PageTrial::SlowDisk, PageTrial::Gain(1.0), PageTrial::Gain(3.7)].map(PageTrial::pays),
            [false, false, false, true]
        );
    }
}
