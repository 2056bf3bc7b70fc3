//! The last decisions, for people: what was asked, who could have taken it, why it went where it
//! went, and what became of it.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use serde::{Serialize, Serializer};

use super::prefix::PrefixSource;
use crate::limits::DECISIONS_SHOWN;

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

/// One engine within a decision.
#[derive(Debug, Clone, Serialize)]
pub struct Considered {
    /// Its name.
    pub engine: String,
    /// Tokens of the prompt that it was taken to hold.
    pub held_tokens: u32,
    /// What the scorers made of it.
    pub total: f64,
    /// Each scorer's part.
    pub parts: Vec<(&'static str, f64)>,
}

/// One decision.
#[derive(Debug, Clone, Serialize)]
pub struct Decision {
    /// Its number.
    pub id: u64,
    /// When, in ms since 1970.
    pub at_ms: u64,
    /// The model asked for.
    pub model: Option<String>,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Where their number is from: `given`, `local`, `remote` or `estimate`.
    pub tokens_from: &'static str,
    /// Why not `local`.
    pub inexact: Option<&'static str>,
    /// How prefixes were looked up.
    pub prefix_from: PrefixSource,
    /// The engine it went to (after retries: the last one).
    pub engine: String,
    /// Tokens that it was expected not to compute.
    pub predicted_cached: u32,
    /// Everyone, best first.
    pub considered: Vec<Considered>,
    /// Microseconds from the whole request to the decision.
    pub took_us: u64,
    /// What became of it.
    pub outcome: Outcome,
    /// Tokens of the prompt, as the engine counted.
    pub reported_prompt: Option<u32>,
    /// Tokens that it did not compute, as it said.
    pub reported_cached: Option<u32>,
}

/// The last decisions.
#[derive(Debug, Default)]
pub struct Ring {
    last: Mutex<VecDeque<Decision>>,
}

impl Ring {
    /// One more.
    pub fn push(&self, decision: Decision) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() == DECISIONS_SHOWN {
            last.pop_front();
        }
        last.push_back(decision);
    }

    /// All, the newest last.
    pub fn all(&self) -> Vec<Decision> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}
