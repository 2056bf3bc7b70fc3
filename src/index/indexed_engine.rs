//! An engine as the writer keeps it.

use hashbrown::HashMap;
use serde::{Deserialize, Serialize};

use super::roster::EngineView;
use super::tiers::Column;
use kvcellar_events::follow::Position;

/// Where an engine's events stand: the stream and its last batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventMark {
    /// The stream's topic.
    pub topic: String,
    /// Its data-parallel rank.
    pub rank: Option<u32>,
    /// The last batch applied.
    pub last: Position,
}

/// An engine: what readers see of it, and its columns by group.
#[derive(Debug)]
pub(super) struct IndexedEngine {
    pub(super) view: EngineView,
    /// The last batch applied, as its follower wants it to be kept.
    pub(super) mark: Option<EventMark>,
    pub(super) by_group: HashMap<u32, Column>,
}
