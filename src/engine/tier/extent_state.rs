//! The states of an extent, and the one function that says what follows from what.
//!
//! An extent whose read or write failed is *retired*: no block gets it before the next start, which
//! looks at the disk anew, or before it was erased. One that is dropped while it is read waits for
//! the last reader, *doomed* to become free or *condemned* to be retired; a reader that fails
//! condemns what another change had doomed.

use super::transition::IllegalTransition;

/// Where an extent stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ExtentState {
    /// Holds nothing, and waits in the free list.
    #[default]
    Free,
    /// Its bytes are on their way.
    Writing,
    /// Holds a block.
    Committed {
        /// Subscribers know of the block, and are told when it is gone.
        announced: bool,
    },
    /// Dropped while it is read; free when the last reader is done.
    Doomed,
    /// As doomed, but retired then.
    Condemned,
    /// Not to be used.
    Retired,
}

/// What happens to an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentChange {
    /// A block is to be written to it.
    Reserve,
    /// It holds a block of a reopened store.
    Adopt,
    /// The write ended well.
    Commit,
    /// The write failed.
    Fail {
        /// By the device.
        retire: bool,
    },
    /// Subscribers are told that its block is there, or not to be had.
    Announce(bool),
    /// Its block is dropped.
    Drop {
        /// It must not be used again.
        retire: bool,
        /// Somebody reads it.
        read: bool,
    },
    /// The last reader is done.
    Release,
    /// It was erased: it may be used again.
    Reinstate,
    /// It holds no block, and waits to be erased all the same.
    Withhold,
}

/// A change that an extent's state does not allow.
pub type IllegalExtentChange = IllegalTransition<ExtentState, ExtentChange>;

impl ExtentState {
    /// What a change makes of this state.
    ///
    /// # Errors
    /// [`IllegalTransition`] where it cannot happen.
    pub fn apply(self, change: ExtentChange) -> Result<Self, IllegalExtentChange> {
        use ExtentChange::{Adopt, Announce, Commit, Drop, Fail, Reinstate, Release, Reserve, Withhold};
        Ok(match (self, change) {
            (Self::Free, Reserve) => Self::Writing,
            (Self::Free, Adopt) => Self::Committed { announced: false },
            (Self::Writing, Commit) => Self::Committed { announced: true },
            (Self::Committed { .. }, Announce(announced)) => Self::Committed { announced },
            (Self::Committed { .. }, Drop { retire, read: true }) | (Self::Doomed, Drop { retire, .. }) => {
                if retire {
                    Self::Condemned
                } else {
                    Self::Doomed
                }
            }
            (Self::Committed { .. }, Drop { retire, read: false }) | (Self::Writing, Fail { retire }) => {
                if retire {
                    Self::Retired
                } else {
                    Self::Free
                }
            }
            (Self::Condemned, Drop { .. }) => Self::Condemned,
            (Self::Doomed, Release) | (Self::Retired, Reinstate) => Self::Free,
            (Self::Condemned, Release) | (Self::Free, Withhold) => Self::Retired,
            (state, change) => return Err(IllegalTransition { state, change }),
        })
    }

    /// Holds a block that could be read.
    pub fn is_committed(self) -> bool {
        matches!(self, Self::Committed { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [(char, ExtentState); 7] = [
        ('F', ExtentState::Free),
        ('W', ExtentState::Writing),
        ('c', ExtentState::Committed { announced: false }),
        ('C', ExtentState::Committed { announced: true }),
        ('D', ExtentState::Doomed),
        ('X', ExtentState::Condemned),
        ('R', ExtentState::Retired),
    ];
    const CHANGES: [ExtentChange; 14] = [
        ExtentChange::Reserve,
        ExtentChange::Adopt,
        ExtentChange::Commit,
        ExtentChange::Fail { retire: false },
        ExtentChange::Fail { retire: true },
        ExtentChange::Announce(false),
        ExtentChange::Announce(true),
        ExtentChange::Drop { retire: false, read: false },
        ExtentChange::Drop { retire: true, read: false },
        ExtentChange::Drop { retire: false, read: true },
        ExtentChange::Drop { retire: true, read: true },
        ExtentChange::Release,
        ExtentChange::Reinstate,
        ExtentChange::Withhold,
    ];

    /// One row a state, one column a change, `.` where it cannot happen.
    #[test]
    fn the_whole_table() {
        let letter = |state: ExtentState| STATES.iter().find(|(_, known)| *known == state).expect("a known state").0;
        let row = |(_, state): (char, ExtentState)| {
            CHANGES.map(|change| state.apply(change).map_or('.', letter)).into_iter().collect::<String>()
        };
        assert_eq!(
            STATES.map(row),
            [
                "Wc...........R",
                "..CFR.........",
                ".....cCFRDX...",
                ".....cCFRDX...",
                ".......DXDXF..",
                ".......XXXXR..",
                "............F.",
            ]
        );
    }

    #[test]
    fn a_refusal_names_state_and_change() {
        let refused = ExtentState::Free.apply(ExtentChange::Commit).expect_err("nothing is being written");
        assert_eq!(refused.to_string(), "Free cannot take Commit");
    }
}
