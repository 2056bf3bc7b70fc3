//! Shared memory mapped from a file. How its pages come to be there is in [`super::pages`].

use std::fs::File;
use std::path::Path;
use std::ptr::NonNull;

use memmap2::{MmapOptions, MmapRaw};

use super::file_system::FileSystem;
use super::placement;
use crate::limits;
use kvcellar_block::error::{Error, Result};

const REMEDY: &str = "Lower dram_size, or give /dev/shm and the container more memory";

/// A shared, writable mapping of a whole file.
#[derive(Debug)]
pub struct Mapping {
    raw: MmapRaw,
    page_bytes: u64,
}

impl Mapping {
    /// Maps all of `file`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::DataLost`] for a file that does not even hold a header.
    pub fn of(file: &File, path: &Path) -> Result<Self> {
        let raw =
            MmapOptions::new().map_raw(file).map_err(|error| Error::io("mapping the pool", path, error, REMEDY))?;
        if (raw.len() as u64) < limits::HEADER_BYTES {
            return Err(Error::lost("pool file", format!("{} is too short", path.display())));
        }
        let page_bytes = FileSystem::of_file(file).map_or(limits::SLOT_ALIGN, |found| found.page_bytes);
        Ok(Self { raw, page_bytes })
    }

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.raw.len()
    }

    /// The file's length is a multiple of this.
    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Never true: a mapping holds at least a header.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Address of `len` bytes at `offset`.
    ///
    /// # Panics
    /// When the range passes the mapping's end: that is a bug of the caller, and going on would
    /// corrupt memory.
    #[inline]
    #[expect(clippy::panic, reason = "an address outside the pool must never be handed out")]
    pub fn at(&self, offset: usize, len: usize) -> NonNull<u8> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.raw.len());
        match NonNull::new(self.raw.as_mut_ptr().wrapping_add(offset)) {
            Some(address) if inside => address,
            _ => panic!("pool offset {offset} + {len} passes its end {}", self.raw.len()),
        }
    }

    /// Says where pages of the file that are not there yet shall lie: near these memory nodes, or
    /// everywhere if none is named.
    pub fn place(&self, near: &[u32]) {
        placement::place(self.at(0, self.len()), self.len(), near);
    }
}
