//! What readers see: the holder set of each block, brought up to date when an engine's tiers of it
//! change.

use super::column::Ratio;
use super::links::UNKNOWN;
use super::sets::SetRef;
use super::tiers::{Column, FleetTier};
use super::writer::IndexWriter;

impl IndexWriter {
    /// Brings what readers see of an engine's block up to date.
    #[inline]
    pub(super) fn show(&mut self, column: Column, hash: u64, key: u64, mask: u8) {
        let Some(Some(state)) = self.columns.get(column.0 as usize) else { return };
        match state.ratio {
            Ratio::Same | Ratio::Odd => {
                if key != UNKNOWN {
                    self.mark(column, key, mask);
                }
            }
            Ratio::Split(_) => {
                let mask_of = |hash| state.links.mask(hash);
                let shared = state.split.keys(hash).iter().map(|key| (*key, state.split.mask(*key, mask_of)));
                let marks: Vec<(u64, u8)> = shared.chain((key != UNKNOWN).then_some((key, mask))).collect();
                for (key, mask) in marks {
                    self.mark(column, key, mask);
                }
            }
            Ratio::Join(_) => {
                for key in state.joined.memberships(hash).to_vec() {
                    let Some(state) = self.column(column) else { return };
                    let mask = state.joined.mask(key, |piece| state.links.mask(piece));
                    self.mark(column, key, mask);
                }
            }
        }
    }

    /// Writes a column's tiers of a block.
    #[inline]
    pub(super) fn mark(&mut self, column: Column, key: u64, mut mask: u8) {
        let Some(Some(state)) = self.columns.get(column.0 as usize) else { return };
        if !state.expected.is_empty() && state.expected.contains_key(&key) {
            mask |= FleetTier::Speculative.bit();
        }
        let spot = self.table.spot(key);
        let from = spot.found.unwrap_or(SetRef::NONE);
        if spot.found.is_none() {
            if mask == 0 {
                return;
            }
            let growth = self.table.growth(key);
            if growth > 0 && self.bytes() + growth > self.bytes_max {
                self.counts.refused += 1;
                return;
            }
        }
        let to = match self.sets.change(from, column, mask) {
            Some(to) => to,
            // No room to say in which tiers it is left, or with whom: then with nobody. A block
            // that has come to more tiers than the index can say stays as it was.
            None if self.sets.mask(from, column) & !mask != 0 => SetRef::NONE,
            None => {
                self.counts.refused += 1;
                return;
            }
        };
        self.table.put(key, spot, to);
        self.sets.release(from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits;
    use std::sync::Arc;

    /// More sets than the first chunk of them holds.
    const SETS: u64 = 64;

    #[test]
    fn without_room_for_another_set_a_block_is_never_said_to_be_where_it_no_longer_is() {
        let (gpu, cpu, disk) = (FleetTier::Gpu.bit(), FleetTier::Cpu.bit(), FleetTier::StorageLocal.bit());
        let mut writer = IndexWriter::new(2, limits::INDEX_BYTES_MIN, Arc::default()).expect("an index");
        for number in 1..SETS {
            let id = writer.engine(&format!("{number}"), "model").expect("room");
            let column = writer.column_of(id, 0).expect("room");
            writer.mark(column, key(number), gpu | cpu);
        }
        assert_eq!(writer.sizes(), (63, 63), "the chunk is full");
        let column = Column(0);
        writer.sets.allow(0);
        writer.mark(column, key(1), gpu | cpu | disk);
        assert_eq!((tiers(&writer, column, key(1)), writer.counts().refused), (gpu | cpu, 1));
        writer.mark(column, key(1), gpu);
        assert_eq!((tiers(&writer, column, key(1)), writer.sizes()), (0, (62, 62)));
    }

    fn key(number: u64) -> u64 {
        xxhash_rust::xxh3::xxh3_64(&number.to_le_bytes())
    }

    fn tiers(writer: &IndexWriter, column: Column, key: u64) -> u8 {
        writer.sets.mask(writer.table.spot(key).found.unwrap_or(SetRef::NONE), column)
    }
}
