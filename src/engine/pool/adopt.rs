//! Adopting what an earlier engine left: as it is, or with more or fewer slots.
//!
//! The slot table lies before the slots and may have spare lines, so a pool changes its size
//! without moving a block. While it does, both locks are held exclusively; a start that dies midway
//! leaves a file that nobody adopts.

use std::fs::File;
use std::path::Path;

use super::header::{Header, Purpose};
use super::layout::Layout;
use super::mapping::Mapping;
use super::wish::{Wish, new_epoch};
use super::{Pool, io, pages};
use crate::owned::lock::FileLocks;
use kvcellar_block::SlotIndex;
use kvcellar_block::error::{Error, Result};

/// What becomes of a pool that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It has about the size that this start gets.
    Keep,
    /// It gets this number of slots.
    Resize(u64),
    /// It cannot become nearly as large as this start gets.
    Replace,
}

/// A pool that an earlier engine left, as its header describes it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Left {
    purpose: Purpose,
    /// How its file is divided.
    pub(super) layout: Layout,
    /// Bytes of the file.
    pub(super) bytes: u64,
    page_bytes: u64,
}

impl Left {
    /// `None`: the file is not as long as its header says.
    pub(super) fn look(purpose: Purpose, file: &File, page_bytes: u64) -> Option<Self> {
        let layout = purpose.layout()?;
        let bytes = layout.file_bytes(page_bytes);
        (file.metadata().ok()?.len() == bytes).then_some(Self { purpose, layout, bytes, page_bytes })
    }

    /// `most`: bytes it may have. `possible`: bytes that the machine gives it, those it has
    /// included.
    pub(super) fn fate(&self, most: u64, possible: u64) -> Fate {
        let slots = self.layout.slots;
        let allowed = self.layout.slots_within(most);
        if allowed == 0 {
            return Fate::Replace;
        }
        if slots > allowed {
            return Fate::Resize(allowed);
        }
        let fresh = Layout::within(possible, possible, self.layout.slot_bytes).slots;
        if is_most_of(slots, fresh) {
            return Fate::Keep;
        }
        let grown = self.layout.slots_within(possible);
        if is_most_of(grown, fresh) { Fate::Resize(grown) } else { Fate::Replace }
    }
}

/// Nine tenths or more.
fn is_most_of(slots: u64, of: u64) -> bool {
    slots.saturating_mul(10) >= of.saturating_mul(9)
}

/// Takes the pool over. Returns it with locks that hold nothing the caller's do not, and its number
/// of slots.
///
/// # Errors
/// [`Error::Io`], [`Error::DataLost`]: it is to be replaced.
pub(super) fn adopt(
    wish: &Wish<'_>,
    path: &Path,
    file: &File,
    left: Left,
    fate: Fate,
    locks: &FileLocks,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(Pool, u64)> {
    let slots = match fate {
        Fate::Resize(slots) if slots < left.layout.slots => shrink(file, path, &left, slots)?,
        Fate::Resize(slots) => grow(wish, file, path, &left, slots, progress)?,
        Fate::Keep | Fate::Replace => left.layout.slots,
    };
    locks.share_mapping(path)?;
    locks.mark_used();
    // The assembled pool gets the caller's locks; these stand in until then and hold nothing the
    // caller does not.
    let stand_in = FileLocks::attach(file.try_clone().map_err(|error| io(path, error))?, path)?;
    let count = |slots: u64| u32::try_from(slots).map_err(|_| Error::lost("pool header", "slot count"));
    let counts = (count(slots)?, count(left.layout.table_slots)?);
    let map = Mapping::of(file, path)?;
    map.place(wish.near);
    if slots <= left.layout.slots {
        // What grew is filled already.
        pages::fill(&map, file, path, progress)?;
    }
    let pool = Pool::assemble(map, path.to_owned(), counts, wish.geometry.clone(), stand_in)?;
    pool.header().take_over(new_epoch());
    Ok((pool, slots))
}

fn with_slots(left: &Left, slots: u64) -> Layout {
    Layout { slots, ..left.layout }
}

fn set_len(file: &File, path: &Path, left: &Left, slots: u64) -> Result<()> {
    file.set_len(with_slots(left, slots).file_bytes(left.page_bytes)).map_err(|error| io(path, error))
}

/// Gives up the last slots.
fn shrink(file: &File, path: &Path, left: &Left, slots: u64) -> Result<u64> {
    let map = Mapping::of(file, path)?;
    clear(&map, slots..left.layout.slots);
    Header::of(&map).rewrite(left.purpose.with_slots(slots));
    drop(map);
    set_len(file, path, left, slots)?;
    Ok(slots)
}

/// Adds empty slots. Where there is no memory for them after all the pool stays as it was.
fn grow(
    wish: &Wish<'_>,
    file: &File,
    path: &Path,
    left: &Left,
    slots: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64> {
    set_len(file, path, left, slots)?;
    let grown = Mapping::of(file, path).and_then(|map| {
        map.place(wish.near);
        pages::fill(&map, file, path, progress)?;
        clear(&map, left.layout.slots..slots);
        Header::of(&map).rewrite(left.purpose.with_slots(slots));
        Ok(slots)
    });
    if grown.is_err() {
        set_len(file, path, left, left.layout.slots)?;
    }
    Ok(grown.unwrap_or(left.layout.slots))
}

/// Empties the lines of these slots. Their generations go on, so that what a page may still hold
/// vouches for nothing.
fn clear(map: &Mapping, slots: std::ops::Range<u64>) {
    slots.for_each(|slot| Pool::line_in(map, SlotIndex(slot as u32)).clear());
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOT: u64 = 1 << 20;

    fn left(slots: u64, table_slots: u64) -> Left {
        let layout = Layout { slots, table_slots, slot_bytes: SLOT };
        let purpose = Purpose::new([1; 16], 1, layout, 4096);
        Left { purpose, layout, bytes: layout.file_bytes(4096), page_bytes: 4096 }
    }

    #[test]
    fn a_pool_is_kept_resized_or_replaced_by_what_this_start_gets() {
        let bytes = |slots: u64| Layout { slots, table_slots: slots, slot_bytes: SLOT }.file_bytes(4096) + 4096;
        let cases = [
            ("as large as possible", left(100, 100), (100, 100), Fate::Keep),
            ("nearly as large", left(91, 91), (100, 100), Fate::Keep),
            ("grows within its table", left(50, 100), (100, 100), Fate::Resize(100)),
            ("grows as far as the machine lets it", left(50, 100), (100, 70), Fate::Resize(70)),
            ("its table is too small", left(50, 60), (100, 100), Fate::Replace),
            ("larger than it may be", left(100, 100), (60, 100), Fate::Resize(60)),
            ("the machine is full, but it is there already", left(100, 100), (100, 100), Fate::Keep),
            ("not one slot is allowed", left(100, 100), (0, 0), Fate::Replace),
        ];
        for (what, left, (most, possible), fate) in cases {
            assert_eq!(left.fate(bytes(most), bytes(possible)), fate, "{what}");
        }
    }
}
