//! A change that cannot happen to a state.

use std::fmt;

/// What a state machine answers to a change that its state does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IllegalTransition<S, C> {
    /// The state, which stays as it is.
    pub state: S,
    /// The change.
    pub change: C,
}

impl<S: fmt::Debug, C: fmt::Debug> fmt::Display for IllegalTransition<S, C> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?} cannot take {:?}", self.state, self.change)
    }
}
