//! Events to holders: the one place that changes the index.
//!
//! Promises: what readers see of a block is what its engine's events say, tier by tier; nothing is
//! taken for a holder whose key is not known for certain; memory stays within the bound. Where that
//! is reached, new blocks are left out and counted: misses.

use std::sync::Arc;

use super::column::{ColumnState, Ratio};
use super::indexed_engine::IndexedEngine;
use super::joined::{Before, Piece};
use super::keys;
use super::links::UNKNOWN;
use super::orphans::Orphans;
use super::roster::{EngineId, Roster};
use super::sets::SetWriter;
use super::table::TableWriter;
use super::tiers::{Column, FleetTier, TOLD_TIERS};
use crate::limits;
use arc_swap::ArcSwap;
use kvcellar_block::error::{Error, Result};
use kvcellar_events::wire::{Batch, BatchArena, Event, Hashes, Removed, Stored};

/// What has happened so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IndexCounts {
    /// Batches applied.
    pub batches: u64,
    /// Events that were not understood.
    pub skipped: u64,
    /// Blocks stored.
    pub stored: u64,
    /// Blocks removed.
    pub removed: u64,
    /// Clears of engines, by themselves or after a restart or a gap.
    pub cleared: u64,
    /// Removals of blocks that were not held.
    pub unmatched: u64,
    /// Blocks that came before their parent.
    pub orphaned: u64,
    /// Of those, how many found it.
    pub adopted: u64,
    /// Of those, how many were dropped at the bound.
    pub orphans_dropped: u64,
    /// Blocks left out at the memory bound.
    pub refused: u64,
    /// Blocks whose size does not go with the index's.
    pub unbridged: u64,
}

/// The writer.
#[derive(Debug)]
pub struct IndexWriter {
    pub(super) table: TableWriter,
    pub(super) sets: SetWriter,
    pub(super) engines: Vec<Option<IndexedEngine>>,
    pub(super) columns: Vec<Option<ColumnState>>,
    pub(super) roster: Arc<ArcSwap<Roster>>,
    pub(super) orphans: Orphans,
    /// Tokens of an index block; 0 until the first engine has told its own.
    pub(super) block_tokens: u32,
    pub(super) bytes_max: usize,
    pub(super) columns_bytes: usize,
    pub(super) counts: IndexCounts,
    /// Some engine has several groups, in which a hash may mean the same block.
    pub(super) shares: bool,
    /// When the next expectation ends, in ms.
    pub(super) soonest_ms: u64,
    scratch: WriterScratch,
}

#[derive(Debug, Default)]
struct WriterScratch {
    extras: Vec<u64>,
    keys: Vec<u64>,
    buried: Vec<u64>,
}

impl IndexWriter {
    /// Empty. `block_tokens` 0: that of the first engine that tells.
    ///
    /// # Errors
    /// [`Error::Config`] when the bound is too low.
    pub fn new(block_tokens: u32, bytes_max: usize, roster: Arc<ArcSwap<Roster>>) -> Result<Self> {
        if bytes_max < limits::INDEX_BYTES_MIN {
            let least = kvcellar_block::size::show(limits::INDEX_BYTES_MIN as u64);
            return Err(Error::config("memory", "too small for an index", format!("Give it at least {least}")));
        }
        let writer = Self {
            table: TableWriter::new(),
            sets: SetWriter::new(),
            engines: Vec::new(),
            columns: Vec::new(),
            roster,
            orphans: Orphans::default(),
            block_tokens,
            bytes_max,
            columns_bytes: 0,
            counts: IndexCounts::default(),
            shares: false,
            soonest_ms: u64::MAX,
            scratch: WriterScratch::default(),
        };
        writer.publish();
        Ok(writer)
    }

    /// The two structures that readers look into.
    pub fn shared(&self) -> (Arc<super::table::HolderTable>, Arc<super::sets::Sets>) {
        (self.table.shared(), self.sets.shared())
    }

    /// What has happened so far.
    pub fn counts(&self) -> IndexCounts {
        self.counts
    }

    /// Bytes of everything that grows with blocks.
    pub fn bytes(&self) -> usize {
        self.table.bytes() + self.sets.bytes() + self.orphans.bytes() + self.columns_bytes
    }

    /// The bound.
    pub fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// Different blocks with a holder, and different sets of holders.
    pub fn sizes(&self) -> (usize, usize) {
        (self.table.len(), self.sets.len())
    }

    /// Blocks that wait for their parent.
    pub fn orphans(&self) -> usize {
        self.orphans.len()
    }

    /// An engine's blocks: (held in any tier, remembered without a holder).
    pub fn blocks_of(&self, id: EngineId) -> (usize, usize) {
        self.columns_of(id)
            .iter()
            .filter_map(|column| self.column(*column))
            .fold((0, 0), |(held, ghosts), state| (held + state.links.held(), ghosts + state.links.ghosts()))
    }

    /// An engine's blocks in each tier that events tell of, of its own size.
    pub fn blocks_in_tiers(&self, id: EngineId) -> [usize; TOLD_TIERS] {
        let mut sum = [0; TOLD_TIERS];
        for state in self.columns_of(id).iter().filter_map(|column| self.column(*column)) {
            sum.iter_mut().zip(state.links.in_tiers()).for_each(|(sum, count)| *sum += count);
        }
        sum
    }

    /// Applies a batch of an engine's events.
    pub fn apply(&mut self, id: EngineId, batch: &Batch<'_>, arena: &BatchArena) {
        self.counts.batches += 1;
        self.counts.skipped += u64::from(batch.skipped);
        for event in &batch.events {
            match event {
                Event::Stored(stored) => self.stored(id, stored, arena),
                Event::Removed(removed) => self.removed(id, removed, arena),
                Event::Cleared { map_form: true } => self.clear(id, FleetTier::Gpu.bit()),
                // Where a tier is not said, it may be any.
                Event::Cleared { map_form: false } | Event::TierCleared { medium: None, .. } => {
                    self.clear(id, u8::MAX);
                }
                Event::TierCleared { medium, locality } => self.clear(id, FleetTier::of(*medium, *locality).bit()),
            }
        }
        self.sets.allow(usize::MAX);
    }

    fn stored(&mut self, id: EngineId, stored: &Stored<'_>, arena: &BatchArena) {
        let Some(column) = self.column_of(id, stored.group.unwrap_or(0)) else {
            self.counts.skipped += 1;
            return;
        };
        if self.is_partial(column, stored) {
            // What a request left behind in the middle of a block.
            self.counts.skipped += 1;
            return;
        }
        self.describe(column, stored);
        let hashes = &arena.hashes[stored.hashes.range.clone()];
        self.counts.stored += hashes.len() as u64;
        let room = self.make_room(column, hashes.len());
        self.counts.refused += (hashes.len() - room) as u64;
        let hashes = &hashes[..room];
        let tier = FleetTier::of(stored.medium, stored.locality);
        let ratio = self.column(column).map_or(Ratio::Odd, |state| state.ratio);
        if stored.tokens.is_empty() || ratio == Ratio::Odd {
            self.counts.unbridged += if stored.tokens.is_empty() { 0 } else { hashes.len() as u64 };
            for hash in hashes {
                self.store_unnamed(column, *hash, tier);
            }
        } else {
            self.store_named(column, stored, hashes, &arena.tokens[stored.tokens.clone()], tier, ratio);
        }
        self.recount(column);
    }

    /// Blocks that came without tokens, or with useless ones: they mean what is known of their
    /// hash.
    fn store_unnamed(&mut self, column: Column, hash: u64, tier: FleetTier) {
        let key = self.key_of(column, hash).unwrap_or(UNKNOWN);
        let Some(state) = self.state(column) else { return };
        let (link, is_new) = state.links.store(hash, key, tier);
        if is_new {
            self.show(column, hash, link.key, link.mask());
        }
    }

    fn store_named(
        &mut self,
        column: Column,
        stored: &Stored<'_>,
        hashes: &[u64],
        tokens: &[u32],
        tier: FleetTier,
        ratio: Ratio,
    ) {
        let mut extras = std::mem::take(&mut self.scratch.extras);
        extras.clear();
        let readable = stored.extra_keys.is_none_or(|raw| keys::of_event(raw, stored.lora_name, &mut extras).is_ok());
        if stored.extra_keys.is_none() {
            extras.resize(hashes.len(), keys::PLAIN);
        }
        let size = stored.block_size as usize;
        if !readable || extras.len() < hashes.len() {
            // Without its extra keys a block's key would be another block's.
            self.counts.skipped += 1;
            for hash in hashes {
                self.store_unnamed(column, *hash, tier);
            }
        } else {
            let blocks = hashes.iter().zip(tokens.chunks_exact(size)).zip(&extras);
            let blocks = blocks.map(|((hash, tokens), extra)| (*hash, tokens, *extra));
            let before = match stored.parent {
                None => Some(Before::Key(self.root(column, stored))),
                Some(parent) => self.before(column, parent.name(), ratio),
            };
            match (before, ratio) {
                (None, _) => self.store_orphans(column, stored, blocks, tier),
                (Some(Before::Key(parent)), Ratio::Same) => self.store_same(column, parent, blocks, tier),
                (Some(before), _) => self.store_bridged(column, before, blocks, tier, ratio),
            }
        }
        self.scratch.extras = extras;
    }

    fn store_same<'b>(
        &mut self,
        column: Column,
        mut parent: u64,
        blocks: impl Iterator<Item = (u64, &'b [u32], u64)> + Clone,
        tier: FleetTier,
    ) {
        let mut keys = std::mem::take(&mut self.scratch.keys);
        keys.clear();
        for (_, tokens, extra) in blocks.clone() {
            parent = keys::next(parent, tokens, extra);
            self.table.announce(parent);
            keys.push(parent);
        }
        for ((hash, _, _), key) in blocks.zip(&keys) {
            self.store_key(column, hash, *key, tier);
        }
        self.scratch.keys = keys;
    }

    /// A block whose key is known.
    #[inline]
    fn store_key(&mut self, column: Column, hash: u64, key: u64, tier: FleetTier) {
        let Some(Some(state)) = self.columns.get_mut(column.0 as usize) else { return };
        let (link, is_new) = state.links.store(hash, key, tier);
        if is_new {
            self.show(column, hash, link.key, link.mask());
        }
        if !self.orphans.is_empty() || is_new && self.shares {
            self.adopt_children(column, hash);
        }
    }

    fn store_bridged<'b>(
        &mut self,
        column: Column,
        mut before: Before,
        blocks: impl Iterator<Item = (u64, &'b [u32], u64)>,
        tier: FleetTier,
        ratio: Ratio,
    ) {
        for (hash, tokens, extra) in blocks {
            match self.name_block(column, before, hash, tokens, extra, ratio) {
                Some(after) => before = after,
                None => return,
            }
            let key = if let Before::Key(key) = before { key } else { UNKNOWN };
            self.store_key(column, hash, key, tier);
        }
    }

    /// Learns an engine block's place in the chain of index blocks, and says what comes after it.
    fn name_block(
        &mut self,
        column: Column,
        before: Before,
        hash: u64,
        tokens: &[u32],
        extra: u64,
        ratio: Ratio,
    ) -> Option<Before> {
        let index_block = self.block_tokens as usize;
        let state = self.state(column)?;
        match (ratio, before) {
            (Ratio::Same, Before::Key(parent)) => Some(Before::Key(keys::next(parent, tokens, extra))),
            (Ratio::Split(_), Before::Key(parent)) => {
                let mut key = parent;
                let mut span = Vec::new();
                for (number, tokens) in tokens.chunks_exact(index_block).enumerate() {
                    // A salt belongs to the first token's block. Where other extra keys lie within
                    // a larger block is not said: those of no known place make keys that nobody
                    // asks for.
                    key = keys::next(key, tokens, if number == 0 { extra } else { keys::PLAIN });
                    span.push(key);
                }
                span.pop();
                state.split.name(hash, span);
                Some(Before::Key(key))
            }
            (Ratio::Join(pieces), _) => match state.joined.add(before, hash, tokens, extra, pieces)? {
                Piece::Partial => Some(Before::Piece(hash)),
                Piece::Whole(base, tokens, extra) => {
                    let key = keys::next(base, &tokens, extra);
                    state.joined.name(key, before, hash);
                    Some(Before::Key(key))
                }
            },
            _ => None,
        }
    }

    fn store_orphans<'b>(
        &mut self,
        column: Column,
        stored: &Stored<'_>,
        blocks: impl Iterator<Item = (u64, &'b [u32], u64)>,
        tier: FleetTier,
    ) {
        let Some(mut parent) = stored.parent.map(|parent| parent.name()) else { return };
        for (hash, tokens, extra) in blocks {
            self.store_unnamed(column, hash, tier);
            let known = self.column(column).and_then(|state| state.links.get(hash)).is_some_and(|it| it.key != UNKNOWN);
            if !known {
                self.counts.orphaned += 1;
                self.counts.orphans_dropped += self.orphans.keep(column, parent, hash, tokens, extra) as u64;
            }
            parent = hash;
        }
    }

    /// Names the blocks that waited for this one, in any group that shares its hashes, and those
    /// that waited for them.
    fn adopt_children(&mut self, column: Column, hash: u64) {
        let mut parents: Vec<(Column, u64)> = self.sharing(column).into_iter().map(|column| (column, hash)).collect();
        while let Some((column, parent)) = parents.pop() {
            let Some(ratio) = self.column(column).map(|state| state.ratio) else { continue };
            let Some(before) = self.before(column, parent, ratio) else { continue };
            // Another group may have been told of this very block without its tokens.
            if let (Before::Key(key), Some(state)) = (before, self.state(column))
                && state.links.get(parent).is_some_and(|link| link.key == UNKNOWN)
                && let Some(link) = state.links.adopt(parent, key)
            {
                self.show(column, parent, key, link.mask());
            }
            for orphan in self.orphans.take(column, parent) {
                let after = self.name_block(column, before, orphan.hash, &orphan.tokens, orphan.extra, ratio);
                let key = if let Some(Before::Key(key)) = after { key } else { UNKNOWN };
                let Some(state) = self.state(column) else { return };
                // One that was removed meanwhile is no holder; its children may be, so it stays as
                // the ghost that leads to them.
                let link = state.links.adopt(orphan.hash, key);
                let link = link.unwrap_or_else(|| state.links.restore(orphan.hash, key, [0; TOLD_TIERS]));
                self.counts.adopted += 1;
                self.show(column, orphan.hash, key, link.mask());
                parents.extend(self.sharing(column).into_iter().map(|column| (column, orphan.hash)));
            }
        }
    }

    /// Columns of the same engine in which a hash means the same block, this one included.
    fn sharing(&self, column: Column) -> Vec<Column> {
        let Some(state) = self.column(column) else { return Vec::new() };
        let same = |other: &Column| {
            self.column(*other).is_some_and(|it| it.block_tokens == state.block_tokens && it.ratio == Ratio::Same)
        };
        let mut columns = vec![column];
        if state.ratio == Ratio::Same {
            columns.extend(self.columns_of(state.engine).into_iter().filter(|other| *other != column && same(other)));
        }
        columns
    }

    /// What is known of the place after a block.
    fn before(&self, column: Column, hash: u64, ratio: Ratio) -> Option<Before> {
        let state = self.column(column)?;
        if matches!(ratio, Ratio::Join(_)) && state.joined.has_partial(hash) {
            return Some(Before::Piece(hash));
        }
        self.key_of(column, hash).map(Before::Key)
    }

    /// The request key of an engine's hash, from any group in which it means the same block.
    fn key_of(&self, column: Column, hash: u64) -> Option<u64> {
        let named = |state: &ColumnState| state.links.get(hash).map(|link| link.key).filter(|key| *key != UNKNOWN);
        if let Some(key) = named(self.column(column)?) {
            return Some(key);
        }
        self.sharing(column).into_iter().filter_map(|column| self.column(column)).find_map(named)
    }

    fn removed(&mut self, id: EngineId, removed: &Removed<'_>, arena: &BatchArena) {
        // What was never stored here, perhaps because its event was not understood, changes
        // nothing: a group of which nothing is known would keep the engine from every hit.
        let Some(column) = self.known_column(id, removed.group.unwrap_or(0)) else {
            let count = removed.hashes.range.len() as u64;
            (self.counts.removed, self.counts.unmatched) = (self.counts.removed + count, self.counts.unmatched + count);
            return;
        };
        let tier = FleetTier::of(removed.medium, removed.locality);
        let Hashes { range, .. } = &removed.hashes;
        self.sets.allow(self.bytes_max.saturating_sub(self.bytes()));
        for hash in &arena.hashes[range.clone()] {
            self.counts.removed += 1;
            let Some(state) = self.state(column) else { return };
            match state.links.remove(*hash, tier) {
                None => self.counts.unmatched += 1,
                Some((link, before)) if link.mask() != before => {
                    // What the engine says is newer than what was expected of it.
                    if tier == FleetTier::Gpu {
                        state.expected.remove(&link.key);
                    }
                    self.show(column, *hash, link.key, link.mask());
                }
                Some(_) => {}
            }
        }
        self.bury(column);
        self.recount(column);
    }

    /// How many of so many blocks may be added.
    pub(super) fn make_room(&mut self, column: Column, count: usize) -> usize {
        let bytes = self.bytes();
        self.sets.allow(self.bytes_max.saturating_sub(bytes));
        let bytes_max = self.bytes_max;
        let mut buried = std::mem::take(&mut self.scratch.buried);
        let Some(state) = self.state(column) else { return 0 };
        let growth = state.links.growth(count);
        let room = if bytes + growth <= bytes_max {
            count
        } else {
            let wanted = count.saturating_sub(state.links.room());
            state.links.bury_for(wanted, &mut buried);
            count.min(state.links.room())
        };
        self.scratch.buried = buried;
        self.forget_buried(column);
        room
    }

    fn bury(&mut self, column: Column) {
        let mut buried = std::mem::take(&mut self.scratch.buried);
        if let Some(state) = self.state(column) {
            state.links.bury(&mut buried);
        }
        self.scratch.buried = buried;
        self.forget_buried(column);
    }

    fn forget_buried(&mut self, column: Column) {
        let Some(Some(state)) = self.columns.get_mut(column.0 as usize) else { return };
        for hash in self.scratch.buried.drain(..) {
            state.split.forget(hash);
            state.joined.forget(hash);
        }
    }

    /// Forgets everything of an engine, which stays known.
    pub fn forget(&mut self, id: EngineId) {
        if let Some(Some(engine)) = self.engines.get_mut(id.0 as usize) {
            engine.mark = None;
        }
        self.clear(id, u8::MAX);
    }

    /// Takes an engine's blocks out of tiers. Costs as much as the engine has blocks.
    pub(super) fn clear(&mut self, id: EngineId, tiers: u8) {
        self.counts.cleared += 1;
        for column in self.columns_of(id) {
            self.clear_column(column, tiers);
        }
    }

    pub(super) fn clear_column(&mut self, column: Column, tiers: u8) {
        self.sets.allow(self.bytes_max.saturating_sub(self.bytes()));
        let Some(state) = self.state(column) else { return };
        let held: Vec<(u64, u64)> = state
            .links
            .iter()
            .filter(|(_, link)| link.mask() & tiers != 0)
            .map(|(hash, link)| (hash, link.key))
            .collect();
        let expected: Vec<u64> = state.expected.drain().map(|(key, _)| key).collect();
        for (hash, key) in held {
            let Some(state) = self.state(column) else { return };
            state.links.remove_all(hash, tiers);
            let mask = state.links.mask(hash);
            self.show(column, hash, key, mask);
        }
        for key in expected {
            self.remark(column, key);
        }
        if tiers == u8::MAX {
            self.orphans.clear(column);
            if let Some(state) = self.state(column) {
                let (engine, group, need) = (state.engine, state.group, state.need);
                let (block_tokens, ratio, counted) = (state.block_tokens, state.ratio, state.counted);
                *state = ColumnState { need, block_tokens, ratio, counted, ..ColumnState::new(engine, group) };
            }
        }
        self.recount(column);
    }

    pub(super) fn recount(&mut self, column: Column) {
        let Some(Some(state)) = self.columns.get_mut(column.0 as usize) else { return };
        let bytes = state.bytes();
        self.columns_bytes = self.columns_bytes + bytes - state.counted;
        state.counted = bytes;
    }

    pub(super) fn uncount(&mut self, column: Column) {
        let counted = self.column(column).map_or(0, |state| state.counted);
        self.columns_bytes -= counted;
    }
}
