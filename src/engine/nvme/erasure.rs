//! Forgetting a salt in a store that no engine serves from, for `kvcellar forget`.
//!
//! Goes by the tags in descriptors. What cannot say whose it is goes as well: an extent that was
//! never written or that lost its descriptor, an image that is damaged, or one of a version without
//! tags. Everything is durable when it returns.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::buffer::Buffer;
use super::directory::{self, How, REMEDY};
use super::superblock::{self, Superblock};
use super::{inspection, recovery, registry, segments, snapshot};
use crate::owned::erased::Erased;
use kvcellar_block::error::{Error, Result};
use kvcellar_block::{SaltTag, descriptor};

/// Overwrites everything in a store that is of a salt, or may be.
///
/// # Errors
/// [`Error::TryLater`] when an engine owns it; [`Error::DataLost`] without a whole superblock;
/// [`Error::Io`], after which some of it may still be there.
pub fn forget(path: &Path, salt: SaltTag, progress: inspection::InspectionProgress<'_>) -> Result<Erased> {
    let _owned = registry::own(path)?;
    let superblock = Superblock::load(path)?;
    // A snapshot lists the names of blocks, and a start would believe it.
    let dirty = Superblock { clean: None, ..superblock.clone() };
    directory::replace(path, superblock::NAME, &dirty.encode()?)?;
    directory::remove(&path.join(snapshot::NAME))?;
    let slot_bytes = superblock.geometry.slot_bytes;
    let files = inspection::files(path, slot_bytes)?;
    let all = files.iter().map(|(_, _, extents)| extents).sum();
    let mut page = Buffer::pages(superblock.geometry.descriptor_bytes as usize);
    let mut erased = Erased::default();
    let mut done = 0;
    for (number, direct, extents) in files {
        let segment_path = segments::path(path, number);
        let segment = directory::open(&segment_path, How::Existing)?;
        for offset in (0..extents).map(|extent| extent * slot_bytes) {
            // What cannot be read is nobody's to say whose it is.
            let tag = direct
                .read_exact_at(page.bytes_mut(), offset)
                .map_or(SaltTag::UNKNOWN, |()| descriptor::salt(page.bytes()));
            if tag.may_be_of(salt) {
                let held_a_block = !recovery::is_empty(page.bytes());
                segments::zero(&segment, &segment_path, offset, slot_bytes)?;
                erased.add(tag == salt, held_a_block, slot_bytes);
            }
            done += 1;
            progress(done, all);
        }
        sync(&segment, &segment_path)?;
    }
    Ok(erased)
}

fn sync(file: &File, path: &Path) -> Result<()> {
    file.sync_all().map_err(|error| Error::io("making durable", path, error, REMEDY))
}
