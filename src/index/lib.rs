//! Which engine holds which prefix, in which tier, right now.
//!
//! An event's way: a subscriber hands a decoded batch to [`writer::IndexWriter::apply`]; the
//! [`writer`] finds the request keys ([`keys`]) of the engine's hashes ([`links`]), waits for
//! parents that have not come ([`orphans`]), bridges block sizes ([`joined`]), and changes the
//! block's holder set ([`sets`]) in the [`table`]. A question's way: [`Index::score`] turns tokens
//! into keys and walks the table once ([`query`]), beside the writer and never behind it.
//!
//! Promises: no answer waits for a writer; every structure is bounded; what cannot be placed for
//! certain is a miss. Knows nothing of sockets: [`fleet`] brings the events, [`api`] the questions.

pub mod api;
pub mod chunked;
pub mod column;
pub mod expected;
pub mod fleet;
pub mod indexed_engine;
pub mod joined;
pub mod keys;
pub mod limits;
pub mod links;
pub mod orphans;
pub mod query;
pub mod registry;
pub mod roster;
pub mod sets;
pub mod snapshot;
pub mod split;
pub mod table;
pub mod tiers;
mod visible;
pub mod writer;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;

use kvcellar_block::error::Result;
use query::{PrefixScorer, Score};
use roster::{EngineId, Roster};
use sets::Sets;
use table::HolderTable;
use tiers::{FleetTier, TIERS, Weights, unpack};
use writer::IndexWriter;

/// The index. Cheap to share: readers and writers use it at the same time.
#[derive(Debug)]
pub struct Index {
    table: Arc<HolderTable>,
    sets: Arc<Sets>,
    roster: Arc<ArcSwap<Roster>>,
    writer: Mutex<IndexWriter>,
}

impl Index {
    /// An empty index. `block_tokens`: tokens of a block of the index, 0 for those of the first
    /// engine that tells; `bytes_max`: bound of its memory.
    ///
    /// # Errors
    /// [`kvcellar_block::error::Error::Config`] when the bound is too low.
    pub fn new(block_tokens: u32, bytes_max: usize) -> Result<Self> {
        let roster = Arc::new(ArcSwap::default());
        let writer = IndexWriter::new(block_tokens, bytes_max, Arc::clone(&roster))?;
        let (table, sets) = writer.shared();
        Ok(Self { table, sets, roster, writer: Mutex::new(writer) })
    }

    /// The writer, alone. Readers do not wait for it.
    pub fn write(&self) -> MutexGuard<'_, IndexWriter> {
        // A panic within a batch leaves counts behind that are a little off, and blocks that are
        // misses: better than no index.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The engines as they are now.
    pub fn roster(&self) -> Arc<Roster> {
        self.roster.load_full()
    }

    /// Scores engines by what they have of blocks with these keys; see [`PrefixScorer::score`].
    pub fn score<'s>(
        &self,
        scorer: &'s mut PrefixScorer,
        keys: &[u64],
        candidates: Option<&[EngineId]>,
        weights: &Weights,
    ) -> &'s [Score] {
        let roster = self.roster.load();
        scorer.score((&self.table, &self.sets, &roster), keys, candidates, weights)
    }

    /// Who holds one block: engines with their groups' tiers.
    pub fn holders(&self, key: u64) -> Vec<(EngineId, Vec<FleetTier>)> {
        let roster = self.roster.load();
        let mut holders = Vec::new();
        for _ in 0..8 {
            let set = self.table.view().get(key).unwrap_or(sets::SetRef::NONE);
            if self.sets.read(set, &mut holders) {
                break;
            }
            holders.clear();
        }
        let tiers_of = |mask: u8| tiers::ALL[..TIERS].iter().copied().filter(|tier| mask & tier.bit() != 0).collect();
        let engine_of = |holder: &u32| {
            let (column, mask) = unpack(*holder);
            let (engine, _) = (*roster.columns.get(column.0 as usize)?)?;
            Some((engine, tiers_of(mask)))
        };
        holders.iter().filter_map(engine_of).collect()
    }
}
