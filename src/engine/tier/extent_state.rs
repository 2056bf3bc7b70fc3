//! The states of an extent, and the one function that says what follows from what.
//!
//! An extent whose read or write failed is *retired*: no block gets it before the next start, which
//! looks at the disk anew. One that is dropped while it is read waits for the last reader, *doomed*
//! to become free or *condemned* to be retired; a reader that fails condemns what another change
//! had doomed.

/// Where an extent stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    /// Holds nothing, and waits in the free list.
    Free = 0,
    /// Its bytes are on their way.
    Writing = 1,
    /// Holds a block.
    Committed = 2,
    /// Dropped while it is read; free when the last reader is done.
    Doomed = 3,
    /// As doomed, but retired then.
    Condemned = 4,
    /// Not to be used.
    Retired = 5,
}

/// What happens to an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// A block is to be written to it.
    Reserve,
    /// The write ended well.
    Commit,
    /// The write failed.
    Fail {
        /// By the device.
        retire: bool,
    },
    /// Its block is dropped.
    Drop {
        /// It must not be used again.
        retire: bool,
    },
    /// The last reader is done.
    Release,
    /// It was erased: it may be used again.
    Reinstate,
}

impl State {
    /// The state that a record keeps as a number.
    pub(super) fn of(number: u8) -> Self {
        const ALL: [State; 6] =
            [State::Free, State::Writing, State::Committed, State::Doomed, State::Condemned, State::Retired];
        ALL.get(usize::from(number)).copied().unwrap_or(State::Retired)
    }

    /// What a change makes of this state; `None` where it cannot happen. `read`: somebody reads the
    /// extent.
    pub(super) fn after(self, change: Change, read: bool) -> Option<Self> {
        Some(match (self, change) {
            (Self::Free, Change::Reserve) => Self::Writing,
            (Self::Writing, Change::Commit) => Self::Committed,
            (Self::Committed, Change::Drop { retire }) if read => Self::waiting(retire),
            (Self::Writing, Change::Fail { retire }) | (Self::Committed, Change::Drop { retire }) => {
                Self::ended(retire)
            }
            (Self::Doomed, Change::Drop { retire }) => Self::waiting(retire),
            (Self::Condemned, Change::Drop { .. }) => Self::Condemned,
            (Self::Doomed, Change::Release) | (Self::Retired, Change::Reinstate) => Self::Free,
            (Self::Condemned, Change::Release) => Self::Retired,
            _ => return None,
        })
    }

    fn ended(retire: bool) -> Self {
        if retire { Self::Retired } else { Self::Free }
    }

    fn waiting(retire: bool) -> Self {
        if retire { Self::Condemned } else { Self::Doomed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 6] =
        [State::Free, State::Writing, State::Committed, State::Doomed, State::Condemned, State::Retired];
    const CHANGES: [Change; 8] = [
        Change::Reserve,
        Change::Commit,
        Change::Fail { retire: false },
        Change::Fail { retire: true },
        Change::Drop { retire: false },
        Change::Drop { retire: true },
        Change::Release,
        Change::Reinstate,
    ];

    /// One row a state, one column a change, `.` where it cannot happen: unread, then read.
    #[test]
    fn the_whole_table() {
        let letter = |state: Option<State>| state.map_or('.', |state| "FWCDXR".as_bytes()[state as usize] as char);
        let table = |read: bool| {
            STATES.map(|state| CHANGES.map(|change| letter(state.after(change, read))).into_iter().collect::<String>())
        };
        assert_eq!(table(false), ["W.......", ".CFR....", "....FR..", "....DXF.", "....XXR.", ".......F"]);
        assert_eq!(table(true), ["W.......", ".CFR....", "....DX..", "....DXF.", "....XXR.", ".......F"]);
        assert!(STATES.iter().all(|state| State::of(*state as u8) == *state));
    }
}
