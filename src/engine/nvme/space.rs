//! Where extents lie in segments, and how many a capacity holds: in bytes that the disk really
//! gives, bookkeeping included.
//!
//! Arithmetic only, but for [`free_bytes`]. Promises: superblock (twice, for it is replaced by a
//! second one), worst-case snapshot, lock and all segments with what the filesystem keeps about
//! them stay within the capacity.

use std::path::Path;

use crate::limits::{self, SLOT_ALIGN};
use kvcellar_block::ExtentIndex;
use kvcellar_block::error::{Error, Result};

use super::snapshot;

/// What the filesystem may keep about a segment beside its bytes: extents of a preallocated file
/// are split as they are written, into as many as it has slots. 24 bytes are usual for each, in
/// pages that may be half empty.
const SPLIT_BYTES: u64 = 48;

/// Pages of a segment's own bookkeeping: its place in the directory and a tree's inner node.
const SEGMENT_PAGES: u64 = 2 * SLOT_ALIGN;

/// Lock, directory, the snapshot's header, its last page and its bookkeeping.
const FIXED_PAGES: u64 = 5 * SLOT_ALIGN;

/// How a capacity is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentLayout {
    /// Bytes of an extent.
    pub extent_bytes: u64,
    /// Extents of every segment but the last one.
    pub per_segment: u32,
    /// Extents that fit.
    pub extents_max: u32,
}

/// The size of segments for a capacity.
pub fn segment_bytes(capacity_bytes: u64, bytes_max: Option<u64>) -> u64 {
    let share = capacity_bytes / limits::SEGMENT_SHARES;
    share.clamp(limits::SEGMENT_BYTES_MIN, limits::SEGMENT_BYTES_MAX).min(bytes_max.unwrap_or(u64::MAX))
}

fn bookkeeping(extents: u64) -> u64 {
    SEGMENT_PAGES + (extents * SPLIT_BYTES).next_multiple_of(SLOT_ALIGN)
}

/// Bytes on disk that a segment of so many extents may take, without its records in the snapshot.
pub fn segment_cost(extents: u32, extent_bytes: u64) -> u64 {
    u64::from(extents) * extent_bytes + bookkeeping(extents.into())
}

impl SegmentLayout {
    /// Divides a capacity. `segment_bytes` is a wish for a new store; [`SegmentLayout::with`] takes
    /// what an existing one has.
    pub fn new(capacity_bytes: u64, superblock_bytes: u64, extent_bytes: u64, segment_bytes: u64) -> Self {
        let available = available(capacity_bytes, superblock_bytes);
        let wanted = (segment_bytes / extent_bytes).clamp(1, limits::EXTENTS_MAX.into());
        let per_segment = wanted.min(fitting(available, extent_bytes)).max(1) as u32;
        Self::with(capacity_bytes, superblock_bytes, extent_bytes, per_segment)
    }

    /// Divides a capacity into segments of a given size; the last one may be smaller. `extents_max`
    /// is 0 when not even one fits.
    pub fn with(capacity_bytes: u64, superblock_bytes: u64, extent_bytes: u64, per_segment: u32) -> Self {
        let available = available(capacity_bytes, superblock_bytes);
        let cost = segment_cost(per_segment, extent_bytes) + snapshot::RECORD_BYTES * u64::from(per_segment);
        let full = available / cost;
        let tail = fitting(available % cost, extent_bytes).min(u64::from(per_segment) - 1);
        let bound = u64::from(limits::SEGMENTS_MAX) * u64::from(per_segment);
        let extents = full.saturating_mul(per_segment.into()).saturating_add(tail);
        Self { extent_bytes, per_segment, extents_max: extents.min(bound).min(limits::EXTENTS_MAX.into()) as u32 }
    }

    /// Segments, the last one included.
    pub fn segments(&self) -> u32 {
        self.extents_max.div_ceil(self.per_segment)
    }

    /// Extents of a segment; 0 past the last one.
    pub fn extents_in(&self, segment: u32) -> u32 {
        let before = u64::from(segment) * u64::from(self.per_segment);
        u64::from(self.extents_max).saturating_sub(before).min(self.per_segment.into()) as u32
    }

    /// Segment and byte offset of an extent.
    pub fn place(&self, extent: ExtentIndex) -> (u32, u64) {
        (extent.0 / self.per_segment, u64::from(extent.0 % self.per_segment) * self.extent_bytes)
    }
}

fn available(capacity_bytes: u64, superblock_bytes: u64) -> u64 {
    capacity_bytes.saturating_sub(FIXED_PAGES + 2 * superblock_bytes.next_multiple_of(SLOT_ALIGN))
}

/// Extents of one segment, with their records, that fit into so many bytes: never too many.
fn fitting(bytes: u64, extent_bytes: u64) -> u64 {
    bytes.saturating_sub(SEGMENT_PAGES + SLOT_ALIGN) / (extent_bytes + SPLIT_BYTES + snapshot::RECORD_BYTES)
}

/// Bytes that this user may still write to the filesystem that `path` lies on.
///
/// # Errors
/// [`Error::Io`].
pub fn free_bytes(path: &Path) -> Result<u64> {
    let found = nix::sys::statvfs::statvfs(path)
        .map_err(|error| Error::io("measuring free space of", path, error.into(), super::directory::REMEDY))?;
    Ok(found.blocks_available().saturating_mul(found.fragment_size()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_layout_passes_its_capacity() {
        for extent_bytes in [8192, 12_288, 1 << 20, 5 << 20] {
            for capacity in (0..400).map(|step| step * 77_777) {
                for segment_bytes in [1, 20_000, 1 << 21, 1 << 30] {
                    let layout = SegmentLayout::new(capacity, 5000, extent_bytes, segment_bytes);
                    let segments = (0..layout.segments()).map(|segment| layout.extents_in(segment));
                    assert_eq!(segments.clone().sum::<u32>(), layout.extents_max);
                    let cost: u64 = segments.map(|extents| segment_cost(extents, extent_bytes)).sum();
                    let snapshot = (64 + 64 * u64::from(layout.extents_max)).next_multiple_of(4096);
                    let total = cost + snapshot + 2 * 8192 + 4096 + 4096;
                    assert!(layout.extents_max == 0 || total <= capacity, "{layout:?} in {capacity}: {total}");
                }
            }
        }
    }

    #[test]
    fn little_of_a_capacity_is_lost() {
        for capacity in [1_u64 << 30, 100 << 30, 7 << 40] {
            for extent_bytes in [65_536, 1 << 20, 20 << 20] {
                let layout = SegmentLayout::new(capacity, 5000, extent_bytes, segment_bytes(capacity, None));
                let used = u64::from(layout.extents_max) * extent_bytes;
                assert!(used + 2 * extent_bytes > capacity / 1000 * 995, "{layout:?} in {capacity}");
            }
        }
    }

    #[test]
    fn segments_have_bounded_sizes() {
        assert_eq!(segment_bytes(1 << 30, None), limits::SEGMENT_BYTES_MIN);
        assert_eq!(segment_bytes(64 << 30, None), 1 << 30);
        assert_eq!(segment_bytes(1 << 50, None), limits::SEGMENT_BYTES_MAX);
        assert_eq!(segment_bytes(64 << 30, Some(5)), 5);
        let layout = SegmentLayout { extent_bytes: 4096, per_segment: 3, extents_max: 7 };
        assert_eq!((layout.segments(), layout.extents_in(2), layout.extents_in(3)), (3, 1, 0));
        assert_eq!(layout.place(ExtentIndex(5)), (1, 8192));
    }
}
