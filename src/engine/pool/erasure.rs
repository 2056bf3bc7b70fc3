//! Forgetting a salt in a pool that no engine uses, for `kvcellar forget`.
//!
//! Goes by the tags in descriptors, whatever the slot table says: slots that hold no block any more
//! may hold bytes. What cannot say whose it is goes as well; a slot that was never used has none.

use std::time::Duration;

use super::header::{self, Purpose};
use super::mapping::Mapping;
use super::registry::Entry;
use super::slot_table::SlotState;
use super::{Pool, directory, io};
use crate::owned::erased::Erased;
use crate::owned::listing::in_use;
use crate::owned::lock::FileLocks;
use kvcellar_block::error::{Error, Result};
use kvcellar_block::{Generation, SaltTag, SlotIndex, descriptor};

/// Overwrites everything in a pool that is of a salt, or may be.
///
/// # Errors
/// [`Error::TryLater`] when an engine owns it or processes of one still map it; [`Error::DataLost`]
/// without a whole header; [`Error::Io`].
pub fn forget(entry: &Entry, salt: SaltTag) -> Result<Erased> {
    let path = &entry.path;
    let file = directory::open_private(path)?;
    let busy = || in_use(entry.name.clone(), entry.owner_pid);
    let again = file.try_clone().map_err(|error| io(path, error))?;
    let locks = FileLocks::own(again, path).ok_or_else(busy)?;
    if !locks.drain_mappers(Duration::ZERO) {
        return Err(busy());
    }
    let head = header::head(path).map_err(|error| io(path, error))?;
    let purpose = Purpose::read(&head)?;
    let damaged = |problem: &str| Error::lost("pool header", problem);
    let layout = purpose.layout().ok_or_else(|| damaged("its sizes contradict each other"))?;
    let map = Mapping::of(&file, path)?;
    if map.len() as u64 != layout.file_bytes(map.page_bytes()) || purpose.descriptor_bytes > purpose.slot_bytes {
        return Err(damaged("the file is not as long as it says"));
    }
    let mut erased = Erased::default();
    let (slot_bytes, page_bytes) = (purpose.slot_bytes as usize, purpose.descriptor_bytes as usize);
    for slot in 0..layout.slots {
        let line = Pool::line_in(&map, SlotIndex(slot as u32));
        if line.remains().1 == Generation(0) {
            // Never used: looking at its bytes would only give them memory.
            continue;
        }
        let start = map.at((layout.slots_offset() + slot * purpose.slot_bytes) as usize, slot_bytes);
        // SAFETY: the slot lies inside the mapping, which lives to the end of this function; both
        // locks are held, so that no other process reads or writes it.
        let image = unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), slot_bytes) };
        // Of one that was being filled, the descriptor tells of the block that was to come.
        let was_filling = line.remains().0 == Some(SlotState::Filling);
        let tag = if was_filling { SaltTag::UNKNOWN } else { descriptor::salt(&image[..page_bytes]) };
        if tag.may_be_of(salt) {
            let held_a_block = image[..descriptor::FIXED_BYTES as usize].iter().any(|byte| *byte != 0);
            line.clear();
            image.fill(0);
            erased.add(tag == salt, held_a_block, purpose.slot_bytes);
        }
    }
    Ok(erased)
}
