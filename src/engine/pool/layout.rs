//! Where a pool file's parts lie: header, slot table, slots.
//!
//! Arithmetic only. The slot table may have more lines than there are slots, so that a pool which
//! was capped can later get more slots while the ones it has stay where they are.

use super::slot_table::SlotLine;
use crate::limits::{HEADER_BYTES, SLOT_ALIGN, SLOTS_MAX, TABLE_HEADROOM};

const LINE_BYTES: u64 = size_of::<SlotLine>() as u64;

/// How a pool file is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Slots.
    pub slots: u64,
    /// Lines of the slot table: at least one a slot.
    pub table_slots: u64,
    /// Bytes from one slot to the next.
    pub slot_bytes: u64,
}

impl Layout {
    /// The largest pool within `bytes`, whose table leaves room for one of `wanted` bytes as far as
    /// that costs little. There may be no slot at all.
    pub fn within(bytes: u64, wanted: u64, slot_bytes: u64) -> Self {
        let alone = Self::slots_in(bytes, slot_bytes);
        let table_slots = Self::slots_in(wanted, slot_bytes).min(alone.saturating_mul(TABLE_HEADROOM)).max(alone);
        let slots = Self { slots: 0, table_slots, slot_bytes }.slots_within(bytes);
        if slots == 0 {
            Self { slots: alone, table_slots: alone, slot_bytes }
        } else {
            Self { slots, table_slots, slot_bytes }
        }
    }

    /// Slots of a file of `bytes` whose table has a line for each and no more.
    fn slots_in(bytes: u64, slot_bytes: u64) -> u64 {
        (bytes.saturating_sub(HEADER_BYTES + slots_align()) / (slot_bytes + LINE_BYTES)).min(SLOTS_MAX)
    }

    /// How many slots this table could serve in a file of so many bytes.
    pub fn slots_within(&self, bytes: u64) -> u64 {
        (bytes.saturating_sub(self.slots_offset()) / self.slot_bytes).min(self.table_slots)
    }

    /// Where the first slot begins.
    pub fn slots_offset(&self) -> u64 {
        (HEADER_BYTES + self.table_slots * LINE_BYTES).next_multiple_of(slots_align())
    }

    /// Bytes of the file, on a file system whose files are multiples of `page_bytes`.
    pub fn file_bytes(&self, page_bytes: u64) -> u64 {
        (self.slots_offset() + self.slots * self.slot_bytes).next_multiple_of(page_bytes.max(1))
    }
}

/// Slots begin on a page of the system, which may be larger than what `O_DIRECT` needs.
fn slots_align() -> u64 {
    super::system_page_bytes().max(SLOT_ALIGN)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn no_layout_passes_its_bytes() {
        for slot_bytes in [8192, 20_480, MIB, 5 * MIB] {
            for bytes in (0..300).map(|step| step * 77_777) {
                for wanted in [bytes, 2 * bytes, 100 * bytes] {
                    let layout = Layout::within(bytes, wanted, slot_bytes);
                    assert!(layout.slots == 0 || layout.file_bytes(1) <= bytes, "{layout:?} in {bytes}");
                    assert!(layout.slots <= layout.table_slots);
                    let fitting = Layout::slots_in(bytes, slot_bytes);
                    assert!(layout.slots > 0 || fitting == 0, "{layout:?} in {bytes}");
                    assert!(layout.slots >= fitting * 9 / 10, "{layout:?}: the table took the room of slots");
                }
            }
        }
    }

    #[test]
    fn a_pool_as_large_as_wished_has_no_spare_lines_and_a_capped_one_has() {
        let whole = Layout::within(64 * MIB, 64 * MIB, MIB);
        assert_eq!(whole.table_slots, whole.slots);
        let capped = Layout::within(8 * MIB, 32 * MIB, MIB);
        assert!(capped.table_slots >= 4 * capped.slots && capped.table_slots <= 32, "{capped:?}");
        assert_eq!(capped.slots_within(32 * MIB), capped.table_slots, "it can become as large as was wished");
        let far = Layout::within(8 * MIB, 1 << 50, MIB);
        assert_eq!(far.table_slots, TABLE_HEADROOM * 7, "lines cost memory too");
    }

    #[test]
    fn files_are_multiples_of_the_file_systems_pages() {
        let layout = Layout::within(5 * MIB, 5 * MIB, 8192);
        assert_eq!(layout.file_bytes(2 * MIB) % (2 * MIB), 0);
        assert!(layout.file_bytes(2 * MIB) - layout.file_bytes(1) < 2 * MIB);
        assert_eq!(layout.slots_offset() % super::super::system_page_bytes(), 0);
    }
}
