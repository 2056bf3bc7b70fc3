//! Segment files: preallocated with real bytes, one at a time, and made whole again when a start
//! finds them short.
//!
//! Owns their names, sizes and allocation. A segment is whole or is the last one. Never sparse:
//! what is promised to the tier is on disk.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::directory::{self, How, REMEDY};
use super::space::{self, SegmentLayout};
use kvcellar_block::ExtentIndex;
use kvcellar_block::error::{Error, Result};

const PREFIX: &str = "segment-";

/// Zeros are written in pieces of so many bytes where the filesystem cannot zero a range.
static ZEROS: [u8; 65_536] = [0; 65_536];

/// The segments of a store.
#[derive(Debug)]
pub struct Segments {
    dir: PathBuf,
    layout: SegmentLayout,
    held: Vec<Segment>,
}

#[derive(Debug)]
struct Segment {
    file: File,
    extents: u32,
}

/// Name of a segment's file.
pub fn path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{PREFIX}{number:05}"))
}

/// Numbers of the segment files in a store's directory, in order.
///
/// # Errors
/// [`Error::Io`].
pub fn present(dir: &Path) -> Result<Vec<u32>> {
    let number = |name: &str| {
        let digits = name.strip_prefix(PREFIX).filter(|digits| digits.len() == 5)?;
        digits.bytes().all(|digit| digit.is_ascii_digit()).then(|| digits.parse::<u32>().ok())?
    };
    let mut found = Vec::new();
    for file in std::fs::read_dir(dir).map_err(|error| Error::io("listing", dir, error, REMEDY))? {
        let file = file.map_err(|error| Error::io("listing", dir, error, REMEDY))?;
        found.extend(file.file_name().to_str().and_then(number));
    }
    found.sort_unstable();
    Ok(found)
}

/// Removes the segments from `first` on.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_from(dir: &Path, first: u32) -> Result<()> {
    present(dir)?
        .into_iter()
        .filter(|number| *number >= first)
        .try_for_each(|number| directory::remove(&path(dir, number)))
}

impl Segments {
    /// Takes the segments that are there: missing ones in between are made anew, short ones filled
    /// up with zeros, surplus ones removed. Where the disk has no room for that, a segment stays
    /// short or goes, and the store ends there.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Config`] for files that are not ours alone.
    pub fn adopt(dir: &Path, layout: SegmentLayout, reserve_bytes: u64) -> Result<Self> {
        let mut segments = Self { dir: dir.to_owned(), layout, held: Vec::new() };
        // First what is too much goes, then what is missing is made: at no moment there is more
        // than the capacity.
        remove_from(dir, layout.segments())?;
        present(dir)?.into_iter().try_for_each(|number| segments.cut(number))?;
        let count = present(dir)?.last().map_or(0, |last| last + 1);
        for number in 0..count {
            let wanted = layout.extents_in(number);
            let segment = segments.mend(number, wanted, reserve_bytes)?;
            let whole = segment.extents == wanted;
            if segment.extents > 0 {
                segments.held.push(segment);
            }
            if !whole {
                break;
            }
        }
        remove_from(dir, segments.held.len() as u32)?;
        Ok(segments)
    }

    /// Gives back what a segment has beyond its size.
    fn cut(&self, number: u32) -> Result<()> {
        let path = path(&self.dir, number);
        let fail = |error| Error::io("sizing", &path, error, REMEDY);
        let file = directory::open(&path, How::Existing)?;
        let bytes = u64::from(self.layout.extents_in(number)) * self.layout.extent_bytes;
        let len = file.metadata().map_err(fail)?.len();
        if len > bytes { file.set_len(bytes).map_err(fail) } else { Ok(()) }
    }

    fn mend(&self, number: u32, wanted: u32, reserve_bytes: u64) -> Result<Segment> {
        let path = path(&self.dir, number);
        let fail = |error| Error::io("sizing", &path, error, REMEDY);
        let file = directory::open(&path, How::OrNew)?;
        let bytes = u64::from(wanted) * self.layout.extent_bytes;
        let found = file.metadata().map_err(fail)?;
        let real = (found.blocks() * 512).min(bytes);
        if found.len() == bytes && real == bytes {
            return Ok(Segment { file, extents: wanted });
        }
        let missing = space::segment_cost(wanted, self.layout.extent_bytes) - real;
        if self.has_room(missing, reserve_bytes)? && allocate(&file, &path, bytes)? {
            return Ok(Segment { file, extents: wanted });
        }
        // What is whole stays; a file with holes cannot promise anything.
        file.set_len(found.len()).map_err(fail)?;
        let dense = real >= found.len();
        let extents = if dense { (found.len() / self.layout.extent_bytes) as u32 } else { 0 };
        file.set_len(u64::from(extents) * self.layout.extent_bytes).map_err(fail)?;
        Ok(Segment { file, extents })
    }

    fn has_room(&self, bytes: u64, reserve_bytes: u64) -> Result<bool> {
        Ok(space::free_bytes(&self.dir)? >= bytes.saturating_add(reserve_bytes))
    }

    /// Preallocates the next segment. `None`: the capacity or the disk has no room for it, or the
    /// reserve would be touched; nothing is left behind.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Unsupported`] when the filesystem cannot preallocate.
    pub fn grow(&mut self, reserve_bytes: u64) -> Result<Option<File>> {
        let number = self.held.len() as u32;
        let extents = self.layout.extents_in(number);
        let ends_short = self.held.last().is_some_and(|last| last.extents < self.layout.per_segment);
        let cost = space::segment_cost(extents, self.layout.extent_bytes);
        if extents == 0 || ends_short || !self.has_room(cost, reserve_bytes)? {
            return Ok(None);
        }
        let path = path(&self.dir, number);
        let file = directory::open(&path, How::New)?;
        let made = allocate(&file, &path, u64::from(extents) * self.layout.extent_bytes).and_then(|room| {
            let found = file.metadata().map_err(|error| Error::io("reading", &path, error, REMEDY))?;
            // A filesystem that keeps more about a file than was reckoned must not break the
            // capacity.
            if !room || found.blocks() * 512 > cost { Ok(None) } else { directory::open(&path, How::Direct).map(Some) }
        });
        if matches!(made, Ok(Some(_))) {
            self.held.push(Segment { file, extents });
        } else {
            directory::remove(&path)?;
        }
        made
    }

    /// Extents in the segments that are there.
    pub fn extents_ready(&self) -> u32 {
        self.held.iter().map(|segment| segment.extents).sum()
    }

    /// The files, in order, for a disk: the page cache is passed by where that is possible.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open_direct(&self) -> Result<Vec<File>> {
        (0..self.held.len() as u32).map(|number| directory::open(&path(&self.dir, number), How::Direct)).collect()
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&self) -> Result<()> {
        for (number, segment) in self.held.iter().enumerate() {
            let fail = |error| Error::io("making durable", path(&self.dir, number as u32), error, REMEDY);
            segment.file.sync_data().map_err(fail)?;
        }
        Ok(())
    }

    /// Makes what was written to these segments durable, and what the filesystem knows of it:
    /// zeroed ranges are told there alone.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync_whole(&self, numbers: impl Iterator<Item = u32>) -> Result<()> {
        for number in numbers {
            let Some(segment) = self.held.get(number as usize) else { continue };
            let fail = |error| Error::io("making durable", path(&self.dir, number), error, REMEDY);
            segment.file.sync_all().map_err(fail)?;
        }
        Ok(())
    }

    /// Zeroes `bytes` from the begin of an extent on, a multiple of 4096, in its segment. Their
    /// room stays allocated.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Config`] for an extent that is not there.
    pub fn erase(&self, extent: ExtentIndex, bytes: u64) -> Result<()> {
        let (number, offset) = self.layout.place(extent);
        let Some(segment) = self.held.get(number as usize).filter(|_| extent.0 < self.extents_ready()) else {
            let remedy = format!("Name one below {}", self.extents_ready());
            return Err(Error::config("extent", format!("there is no extent {}", extent.0), remedy));
        };
        zero(&segment.file, &path(&self.dir, number), offset, bytes)
    }
}

/// Overwrites a piece of a segment with zeros. Its room stays allocated.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn zero(file: &File, path: &Path, offset: u64, bytes: u64) -> Result<()> {
    let fail = |error| Error::io("erasing in", path, error, REMEDY);
    match fallocate(file, FallocateFlags::FALLOC_FL_ZERO_RANGE, offset.cast_signed(), bytes.cast_signed()) {
        Ok(()) => Ok(()),
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {
            let mut at = offset;
            while at < offset + bytes {
                let piece = ZEROS.len().min((offset + bytes - at) as usize);
                file.write_all_at(&ZEROS[..piece], at).map_err(fail)?;
                at += piece as u64;
            }
            Ok(())
        }
        Err(error) => Err(fail(error.into())),
    }
}

/// Gives a file real bytes. `false`: the disk is full.
fn allocate(file: &File, path: &Path, bytes: u64) -> Result<bool> {
    loop {
        return match fallocate(file, FallocateFlags::empty(), 0, bytes.cast_signed()) {
            Ok(()) => Ok(true),
            Err(Errno::EINTR) => continue,
            Err(Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG) => Ok(false),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Err(Error::Unsupported {
                what: format!("a store at {}", path.display()),
                why: "its filesystem cannot preallocate files (fallocate)".to_owned(),
                remedy: "Set nvme_dir to a directory on ext4 or xfs".to_owned(),
            }),
            Err(error) => Err(Error::io("allocating", path, error.into(), REMEDY)),
        };
    }
}
