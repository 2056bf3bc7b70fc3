//! How many slots of the dram tier are in each state.

use super::slot_state::SlotState;

/// Number of slots in each state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    /// Holding nothing.
    pub free: u64,
    /// Being filled.
    pub filling: u64,
    /// Holding a block, doomed ones included.
    pub filled: u64,
    /// Holds on blocks.
    pub pins: u64,
    /// Blocks that the disk holds too.
    pub clean: u64,
    /// Blocks being written to disk.
    pub writing: u64,
}

impl Census {
    /// All slots of the tier.
    pub fn slots(&self) -> u64 {
        self.free + self.filling + self.filled
    }

    /// The count of slots in this state.
    fn count_of(&mut self, state: SlotState) -> &mut u64 {
        match state {
            SlotState::Empty => &mut self.free,
            SlotState::Filling { .. } => &mut self.filling,
            SlotState::Filled { .. } | SlotState::Doomed => &mut self.filled,
        }
    }

    /// A slot's state changed.
    pub(super) fn recount(&mut self, before: SlotState, after: SlotState) {
        *self.count_of(before) -= 1;
        *self.count_of(after) += 1;
        let clean = |state: SlotState| u64::from(matches!(state, SlotState::Filled { clean: true, .. }));
        self.clean = self.clean + clean(after) - clean(before);
    }
}
