//! How a request ended that was decided on.

use serde::{Serialize, Serializer};

/// What became of a request that was decided on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It has not ended.
    Open,
    /// It was answered.
    Done,
    /// Its client left, or nobody said how it ended.
    Aborted,
    /// No engine could be reached.
    Failed,
    /// The engine said nothing for too long.
    Timeout,
    /// The answer broke off.
    Broken,
    /// The engine answered with an error of its own.
    EngineError,
}

impl Outcome {
    /// All of them, in their order.
    pub const ALL: [Self; 7] =
        [Self::Open, Self::Done, Self::Aborted, Self::Failed, Self::Timeout, Self::Broken, Self::EngineError];

    /// As metrics, traces and shown decisions name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Done => "done",
            Self::Aborted => "aborted",
            Self::Failed => "failed",
            Self::Timeout => "timeout",
            Self::Broken => "broken",
            Self::EngineError => "engine_error",
        }
    }
}

impl Serialize for Outcome {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}
