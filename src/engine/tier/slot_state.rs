//! The states of a slot, and the one function that says what follows from what.
//!
//! A block that is dropped while somebody holds its slot (a load copies from it, a write reads it)
//! leaves the slot *doomed*: no lookup finds the block any more, and the slot is empty again with
//! the last hold.

use super::transition::IllegalTransition;

/// Where the bytes of a slot that is being filled come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// vLLM's KV cache.
    Offload,
    /// The disk: requests may hold the slot already.
    Disk,
}

/// Where a slot stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SlotState {
    /// Holds nothing, and waits in the free list.
    #[default]
    Empty,
    /// The bytes of a block are on their way.
    Filling {
        /// From where.
        origin: Origin,
    },
    /// Holds a block that lookups find.
    Filled {
        /// The disk holds the same block.
        clean: bool,
        /// The bytes are known to match their checksum. Those of an adopted block were not compared
        /// yet.
        verified: bool,
    },
    /// Its block was dropped or lost while the slot was held.
    Doomed,
}

/// What happens to a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotChange {
    /// A block is to be put into it.
    Reserve {
        /// From where.
        origin: Origin,
    },
    /// It holds what an earlier engine left there.
    Adopt,
    /// All bytes have come.
    Fill,
    /// Not all bytes have come.
    Lose {
        /// Somebody holds the slot.
        held: bool,
    },
    /// Its block is dropped.
    Remove {
        /// Somebody holds the slot.
        held: bool,
    },
    /// The last hold is gone.
    Free,
    /// The disk holds the same block now, or no longer.
    SetClean(bool),
    /// Its bytes were compared with their checksum.
    Verify,
}

/// A change that a slot's state does not allow.
pub type IllegalSlotChange = IllegalTransition<SlotState, SlotChange>;

impl SlotState {
    /// The slot holds a block that lookups find.
    pub fn is_filled(self) -> bool {
        matches!(self, Self::Filled { .. })
    }

    /// What a change makes of this state.
    ///
    /// # Errors
    /// [`IllegalTransition`] where it cannot happen.
    pub fn apply(self, change: SlotChange) -> Result<Self, IllegalSlotChange> {
        use SlotChange::{Adopt, Fill, Free, Lose, Remove, Reserve, SetClean, Verify};
        Ok(match (self, change) {
            (Self::Empty, Reserve { origin }) => Self::Filling { origin },
            (Self::Empty, Adopt) => Self::Filled { clean: false, verified: false },
            // What came from disk is there still, and was compared on its way.
            (Self::Filling { origin }, Fill) => Self::Filled { clean: origin == Origin::Disk, verified: true },
            (Self::Filling { .. }, Lose { held }) | (Self::Filled { .. }, Remove { held }) => {
                if held {
                    Self::Doomed
                } else {
                    Self::Empty
                }
            }
            (Self::Doomed, Free) => Self::Empty,
            (Self::Filled { verified, .. }, SetClean(clean)) => Self::Filled { clean, verified },
            (Self::Filled { clean, .. }, Verify) => Self::Filled { clean, verified: true },
            (state, change) => return Err(IllegalTransition { state, change }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [SlotState; 8] = [
        SlotState::Empty,
        SlotState::Filling { origin: Origin::Offload },
        SlotState::Filling { origin: Origin::Disk },
        SlotState::Filled { clean: false, verified: false },
        SlotState::Filled { clean: false, verified: true },
        SlotState::Filled { clean: true, verified: false },
        SlotState::Filled { clean: true, verified: true },
        SlotState::Doomed,
    ];
    const CHANGES: [SlotChange; 12] = [
        SlotChange::Reserve { origin: Origin::Offload },
        SlotChange::Reserve { origin: Origin::Disk },
        SlotChange::Adopt,
        SlotChange::Fill,
        SlotChange::Lose { held: false },
        SlotChange::Lose { held: true },
        SlotChange::Remove { held: false },
        SlotChange::Remove { held: true },
        SlotChange::Free,
        SlotChange::SetClean(false),
        SlotChange::SetClean(true),
        SlotChange::Verify,
    ];

    /// One row a state, one column a change, each state by its place in `STATES`, `.` where the
    /// change cannot happen.
    #[test]
    fn the_whole_table() {
        let number = |state: SlotState| STATES.iter().position(|known| *known == state).expect("a known state");
        let cell = |state: SlotState, change| state.apply(change).map_or(".".to_owned(), |to| number(to).to_string());
        let table = STATES.map(|state| CHANGES.map(|change| cell(state, change)).concat());
        assert_eq!(
            table,
            [
                "123.........",
                "...407......",
                "...607......",
                "......07.354",
                "......07.464",
                "......07.356",
                "......07.466",
                "........0...",
            ]
        );
    }

    #[test]
    fn a_refusal_names_state_and_change() {
        let refused = SlotState::Empty.apply(SlotChange::Fill).expect_err("nothing is on its way");
        assert_eq!(refused.to_string(), "Empty cannot take Fill");
    }
}
