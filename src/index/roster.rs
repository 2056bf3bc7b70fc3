//! The engines of the fleet and their columns, as readers see them. Replaced as a whole when an
//! engine comes, goes, or shows another group.

use serde::{Deserialize, Serialize};

use super::tiers::Column;

/// An engine's number. Numbers of engines that are gone are used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EngineId(pub u32);

/// What a group needs of a prefix to be usable at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Need {
    /// All of it.
    Whole,
    /// So many of its last blocks, in blocks of the index.
    Last(u32),
    /// Of each so many blocks, those that follow the last multiple: nothing at a multiple.
    OwnChunk(u32),
}

impl Need {
    /// From what an event says of a group, in which a kind without its figure says nothing.
    /// `block`: tokens of an index block. Kinds that are not known need the whole prefix.
    pub fn of(kind: Option<&str>, window: Option<u32>, block: u32) -> Option<Self> {
        let need = match (kind?, window) {
            // A token attends to itself and the window - 1 tokens before it.
            ("sliding_window" | "sliding_window_mla", Some(window)) => {
                Self::Last(window.saturating_sub(1).div_ceil(block.max(1)).max(1))
            }
            ("chunked_local_attention", Some(chunk)) if block > 0 && chunk > 0 && chunk % block == 0 => {
                Self::OwnChunk(chunk / block)
            }
            // vLLM's own events do not tell a chunk; those of our tiers, of the same group, do.
            ("sliding_window" | "sliding_window_mla" | "chunked_local_attention", None) => return None,
            ("mamba", _) => Self::Last(1),
            _ => Self::Whole,
        };
        Some(need)
    }
}

impl Need {
    /// Blocks of a chunk.
    pub(super) fn chunk(self) -> Option<u32> {
        if let Self::OwnChunk(blocks) = self { Some(blocks) } else { None }
    }
}

/// One engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineView {
    /// Its number.
    pub id: EngineId,
    /// Its name.
    pub name: String,
    /// The model it serves.
    pub model: String,
    /// Its groups, the one that needs whole prefixes first where there is one.
    pub columns: Vec<(Column, Need)>,
    /// Blocks of the index between two points up to which it can use a prefix: more than one where
    /// its own blocks are larger.
    pub step: u32,
}

impl EngineView {
    /// Its usable prefix is not simply what its one group holds.
    pub fn needs_care(&self) -> bool {
        self.step > 1 || self.columns.len() > 1 || self.columns.iter().any(|(_, need)| *need != Need::Whole)
    }
}

/// All engines.
#[derive(Debug, Clone, Default)]
pub struct Roster {
    /// Tokens of a block of the index; 0 while that is not known.
    pub block_tokens: u32,
    /// By number.
    pub engines: Vec<Option<EngineView>>,
    /// For every column: its engine's number and what it needs. `None` for numbers that are not in
    /// use.
    pub columns: Vec<Option<(EngineId, Need)>>,
}

impl Roster {
    /// An engine by name.
    pub fn find(&self, name: &str) -> Option<&EngineView> {
        self.engines.iter().flatten().find(|engine| engine.name == name)
    }

    /// An engine by number.
    pub fn get(&self, id: EngineId) -> Option<&EngineView> {
        self.engines.get(id.0 as usize)?.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_group_needs() {
        let of = |kind, window| Need::of(Some(kind), window, 16);
        assert_eq!(of("full_attention", None), Some(Need::Whole));
        assert_eq!(of("something new", Some(4)), Some(Need::Whole));
        assert_eq!(of("sliding_window", Some(128)), Some(Need::Last(8)));
        assert_eq!(of("sliding_window", Some(1)), Some(Need::Last(1)));
        assert_eq!(of("mamba", None), Some(Need::Last(1)));
        assert_eq!(of("chunked_local_attention", Some(64)), Some(Need::OwnChunk(4)));
        assert_eq!(of("chunked_local_attention", Some(40)), Some(Need::Whole), "no whole number of blocks");
        for kind in ["chunked_local_attention", "sliding_window", "sliding_window_mla"] {
            assert_eq!(of(kind, None), None, "{kind}");
        }
        assert_eq!(Need::of(None, Some(64), 16), None);
    }
}
