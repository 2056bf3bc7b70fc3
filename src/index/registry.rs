//! Engines and their columns as the writer keeps them: who is there, under which number, with which
//! groups.

use std::sync::Arc;

use hashbrown::HashMap;

use super::column::{ColumnState, Ratio};
use super::indexed_engine::{EventMark, IndexedEngine};
use super::keys;
use super::roster::{EngineId, EngineView, Need, Roster};
use super::tiers::Column;
use super::writer::IndexWriter;
use crate::limits;
use kvcellar_block::error::{Error, Result};
use kvcellar_events::wire::Stored;

impl IndexWriter {
    /// Registers an engine, or finds it.
    ///
    /// # Errors
    /// [`Error::TryLater`] when there are too many.
    pub fn engine(&mut self, name: &str, model: &str) -> Result<EngineId> {
        if let Some(found) = self.engines.iter().flatten().find(|engine| engine.view.name == name) {
            return Ok(found.view.id);
        }
        let number = self.engines.iter().position(Option::is_none).unwrap_or(self.engines.len());
        if number >= limits::ENGINES_MAX {
            return Err(Error::TryLater {
                what: "the index".to_owned(),
                holder: format!("{number} engines are known"),
            });
        }
        let id = EngineId(number as u32);
        let view = EngineView { id, name: name.to_owned(), model: model.to_owned(), columns: Vec::new(), step: 1 };
        let engine = Some(IndexedEngine { view, mark: None, by_group: HashMap::new() });
        if number == self.engines.len() {
            self.engines.push(engine);
        } else {
            self.engines[number] = engine;
        }
        self.publish();
        Ok(id)
    }

    /// Keeps where an engine's events stand; to be called with the batch still being the last one.
    pub fn set_mark(&mut self, id: EngineId, mark: EventMark) {
        if let Some(Some(engine)) = self.engines.get_mut(id.0 as usize) {
            engine.mark = Some(mark);
        }
    }

    /// Forgets an engine.
    pub fn remove_engine(&mut self, id: EngineId) {
        self.forget(id);
        for column in self.columns_of(id) {
            self.uncount(column);
            self.columns[column.0 as usize] = None;
        }
        if let Some(engine) = self.engines.get_mut(id.0 as usize) {
            *engine = None;
        }
        self.publish();
    }

    pub(super) fn publish(&self) {
        let engines = self.engines.iter().map(|engine| engine.as_ref().map(|engine| engine.view.clone())).collect();
        let columns =
            self.columns.iter().map(|column| column.as_ref().map(|state| (state.engine, state.need))).collect();
        self.roster.store(Arc::new(Roster { block_tokens: self.block_tokens, engines, columns }));
    }

    pub(super) fn columns_of(&self, id: EngineId) -> Vec<Column> {
        let engine = self.engines.get(id.0 as usize).and_then(Option::as_ref);
        engine.map_or_else(Vec::new, |engine| engine.view.columns.iter().map(|(column, _)| *column).collect())
    }

    pub(super) fn column(&self, column: Column) -> Option<&ColumnState> {
        self.columns.get(column.0 as usize)?.as_ref()
    }

    pub(super) fn state(&mut self, column: Column) -> Option<&mut ColumnState> {
        self.columns.get_mut(column.0 as usize)?.as_mut()
    }

    /// The column of an engine's group, if an event has told of blocks in it.
    pub(super) fn known_column(&self, id: EngineId, group: u32) -> Option<Column> {
        self.engines.get(id.0 as usize)?.as_ref()?.by_group.get(&group).copied()
    }

    /// Whether an event tells of a part of a block: one hash, fewer tokens than the group's blocks
    /// have, and no block before it that would make it the first of an engine with smaller blocks.
    pub(super) fn is_partial(&self, column: Column, stored: &Stored<'_>) -> bool {
        let Some(state) = self.column(column) else { return false };
        // After a restart nothing is held, and blocks may have become smaller.
        let alone = stored.hashes.range.len() == 1 && !stored.tokens.is_empty() && state.links.held() > 0;
        let smaller = stored.block_size > 0 && stored.block_size < state.block_tokens;
        let follows = stored.parent.is_none_or(|parent| state.links.get(parent.name()).is_some());
        alone && smaller && follows
    }

    /// The column of an engine's group, made if need be. `None`: there is no such engine, or it has
    /// too many groups.
    pub(super) fn column_of(&mut self, id: EngineId, group: u32) -> Option<Column> {
        let engine = self.engines.get(id.0 as usize)?.as_ref()?;
        if let Some(column) = engine.by_group.get(&group) {
            return Some(*column);
        }
        if engine.by_group.len() >= limits::GROUPS_MAX {
            return None;
        }
        let number = self.columns.iter().position(Option::is_none).unwrap_or(self.columns.len());
        let column = Column(number as u32);
        let state = Some(ColumnState::new(id, group));
        if number == self.columns.len() {
            self.columns.push(state);
        } else {
            self.columns[number] = state;
        }
        let engine = self.engines.get_mut(id.0 as usize)?.as_mut()?;
        engine.by_group.insert(group, column);
        engine.view.columns.push((column, Need::Whole));
        self.shares |= engine.view.columns.len() > 1;
        self.publish();
        Some(column)
    }

    /// Learns from an event how large a group's blocks are and what it needs.
    pub(super) fn describe(&mut self, column: Column, stored: &Stored<'_>) {
        if !stored.tokens.is_empty() {
            self.learn_size(column, stored.block_size);
        }
        if let Some(need) = Need::of(stored.kind, stored.window, self.block_tokens) {
            self.learn_need(column, need);
        }
    }

    /// Learns how large a group's blocks are; 0 says nothing.
    pub(super) fn learn_size(&mut self, column: Column, block_tokens: u32) {
        let Some(known) = self.column(column).map(|state| state.block_tokens) else { return };
        if block_tokens == 0 || known == block_tokens {
            return;
        }
        // Another size means other blocks: whatever was known is of another engine life.
        if known != 0 {
            self.clear_column(column, u8::MAX);
        }
        if self.block_tokens == 0 {
            self.block_tokens = block_tokens;
        }
        let ratio = Ratio::of(block_tokens, self.block_tokens);
        let Some(state) = self.state(column) else { return };
        (state.block_tokens, state.ratio) = (block_tokens, ratio);
        let id = state.engine;
        if let (Ratio::Split(parts), Some(Some(engine))) = (ratio, self.engines.get_mut(id.0 as usize)) {
            engine.view.step = common_multiple(engine.view.step, parts as u32);
        }
        self.publish();
    }

    /// Learns what a group needs of a prefix.
    pub(super) fn learn_need(&mut self, column: Column, need: Need) {
        let Some(state) = self.state(column).filter(|state| state.need != need) else { return };
        state.need = need;
        let id = state.engine;
        if let Some(Some(engine)) = self.engines.get_mut(id.0 as usize) {
            for (of, known) in &mut engine.view.columns {
                if *of == column {
                    *known = need;
                }
            }
            engine.view.columns.sort_by_key(|(column, need)| (*need != Need::Whole, *column));
        }
        self.publish();
    }

    pub(super) fn root(&self, column: Column, stored: &Stored<'_>) -> u64 {
        let engine = self.column(column).and_then(|state| self.engines.get(state.engine.0 as usize)?.as_ref());
        keys::root(engine.map_or("", |engine| &engine.view.model), stored.lora_name)
    }
}

/// The least common multiple; the larger one where it would not fit.
fn common_multiple(a: u32, b: u32) -> u32 {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    (a / x.max(1)).checked_mul(b).unwrap_or(a.max(b))
}
