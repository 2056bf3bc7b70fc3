//! Where it was looked up what engines hold of a prompt.

use serde::{Serialize, Serializer};

/// Where it is known from what engines have of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefixSource {
    /// The index.
    Index,
    /// The guess from earlier decisions.
    Guess,
    /// Nobody was asked.
    None,
}

impl PrefixSource {
    /// All of them, in their order.
    pub const ALL: [Self; 3] = [Self::Index, Self::Guess, Self::None];

    /// As metrics, traces and shown decisions name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Index => "precise",
            Self::Guess => "approximate",
            Self::None => "none",
        }
    }
}

impl Serialize for PrefixSource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}
