//! Speculative holders: an engine that was just chosen will have the prompt's blocks before its
//! events say so.
//!
//! They close the gap between a decision and the events that follow from it, for a short time, as a
//! tier of their own.

use super::roster::{EngineId, Need};
use super::sets::SetRef;
use super::tiers::{Column, FleetTier};
use super::writer::IndexWriter;

impl IndexWriter {
    /// Expects blocks with these keys on an engine until `until_ms`.
    pub fn expect(&mut self, id: EngineId, keys: &[u64], until_ms: u64) {
        // Groups that need whole prefixes; an engine that has told of none yet gets its first.
        let columns: Vec<Column> = self.columns_of(id);
        let whole = |column: &Column| self.column(*column).is_some_and(|state| state.need == Need::Whole);
        let mut wanted: Vec<Column> = columns.into_iter().filter(whole).collect();
        if wanted.is_empty() {
            wanted.extend(self.column_of(id, 0));
        }
        for column in wanted {
            self.sets.allow(self.bytes_max.saturating_sub(self.bytes()));
            for key in keys {
                let Some(state) = self.state(column) else { continue };
                if state.expected.insert(*key, until_ms).is_none() {
                    self.remark(column, *key);
                }
            }
            self.soonest_ms = self.soonest_ms.min(until_ms);
            self.recount(column);
        }
    }

    /// Ends what was expected until now.
    pub fn expire(&mut self, now_ms: u64) {
        if now_ms < self.soonest_ms {
            return;
        }
        self.soonest_ms = u64::MAX;
        for number in 0..self.columns.len() as u32 {
            let column = Column(number);
            let Some(state) = self.state(column) else { continue };
            let mut over = Vec::new();
            state.expected.retain(|key, until_ms| {
                if *until_ms <= now_ms {
                    over.push(*key);
                }
                *until_ms > now_ms
            });
            let soonest = state.expected.values().copied().min().unwrap_or(u64::MAX);
            self.soonest_ms = self.soonest_ms.min(soonest);
            for key in &over {
                self.remark(column, *key);
            }
            if !over.is_empty() {
                self.recount(column);
            }
        }
    }

    /// Writes what is told and what is expected of a block.
    pub(super) fn remark(&mut self, column: Column, key: u64) {
        let set = self.table.spot(key).found.unwrap_or(SetRef::NONE);
        let told = self.sets.mask(set, column) & !FleetTier::Speculative.bit();
        self.mark(column, key, told);
    }
}
