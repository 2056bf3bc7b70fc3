//! Transfers between slots and disk: what one consists of, and how it can fail.

use std::time::Instant;

use crate::nvme::space::SegmentLayout;
use kvcellar_block::descriptor::{Lineage, Seal};
use kvcellar_block::{BlockKey, ExtentIndex, Generation, SlotIndex};

/// One block of a read.
#[derive(Debug, Clone)]
pub struct ReadPart {
    /// The slot that its bytes go to.
    pub slot: SlotIndex,
    /// The slot's generation, which copy orders name.
    pub generation: Generation,
    /// The extent that its bytes come from.
    pub extent: ExtentIndex,
    /// The block that the extent must hold.
    pub key: BlockKey,
    /// The slot belongs to the window.
    pub window: bool,
    /// The request that asked first.
    pub request: String,
    /// The first token of the block.
    pub token: u32,
}

/// A read under way: adjacent slots from adjacent extents.
#[derive(Debug)]
pub struct Read {
    /// The blocks, in order.
    pub parts: Vec<ReadPart>,
    /// When it was handed to the disk.
    pub started: Instant,
    /// Its followers were told that it failed, because it took too long.
    pub given_up: bool,
    /// A reset came in between: what it brings is worthless.
    pub stale: bool,
}

/// One block of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WritePart {
    /// The slot that holds its bytes.
    pub slot: SlotIndex,
    /// The extent that they go to.
    pub extent: ExtentIndex,
    /// The block.
    pub key: BlockKey,
}

/// A write under way.
#[derive(Debug)]
pub struct Write {
    /// The blocks, in order.
    pub parts: Vec<WritePart>,
    /// A reset came in between: the extents are freed.
    pub stale: bool,
}

/// One block to be sealed and written.
#[derive(Debug, Clone)]
pub struct SealOrder {
    /// The slot whose image is sealed.
    pub slot: SlotIndex,
    /// The slot's generation.
    pub generation: Generation,
    /// The block in it.
    pub key: BlockKey,
    /// What to write into its descriptor.
    pub seal: Seal,
}

/// What an extent's own descriptor says it holds, or why it says nothing.
pub type DescriptorRead = std::result::Result<(BlockKey, Lineage), Trouble>;

/// Why a transfer was of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// The device refused or cut it short.
    Device,
    /// The bytes are not what was stored.
    Corrupt,
    /// The block's descriptor cannot be an extent's (it did not fit).
    Undescribed,
}

/// Where a block of a transfer lies, in memory and on disk.
type Spot = (SlotIndex, ExtentIndex);

/// Cuts `parts` into runs that one transfer each can cover: neighbours in memory and on disk, in
/// one file, at most `most` of them.
pub(super) fn runs<T>(parts: Vec<T>, layout: SegmentLayout, most: usize, spot: impl Fn(&T) -> Spot) -> Vec<Vec<T>> {
    let follows = |(slot, extent): Spot, (next_slot, next_extent): Spot| {
        next_slot.0 == slot.0 + 1
            && next_extent.0 == extent.0 + 1
            && layout.place(extent).0 == layout.place(next_extent).0
    };
    let mut runs: Vec<Vec<T>> = Vec::new();
    for part in parts {
        match runs.last_mut() {
            Some(run) if run.len() < most && run.last().is_some_and(|last| follows(spot(last), spot(&part))) => {
                run.push(part);
            }
            _ => runs.push(vec![part]),
        }
    }
    runs
}
