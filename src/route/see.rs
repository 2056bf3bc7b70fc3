//! The last decisions, for people: what was asked, who could have taken it, why it went where it
//! went, and what became of it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::choose::Choice;
use super::cost;
use super::engine::Engine;
use super::outcome::Outcome;
use super::prefix_source::PrefixSource;
use super::prompt::Prompt;
use super::request::Request;
use super::view::Look;
use crate::limits::DECISIONS_SHOWN;

/// Why a request went where it went, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ChoiceReason {
    /// No other engine could take it.
    Only,
    /// Nobody holds anything of it, or nothing is known of its prompt: it went by load.
    Cold,
    /// No engine holds more of it.
    Prefix,
    /// Another engine holds more of it, and had more to do.
    Load,
    /// The engine that was chosen first failed, or a gateway took another one.
    Fallback,
}

impl ChoiceReason {
    fn of(looks: &[Look], chosen: usize) -> Self {
        let longest = looks.iter().map(|look| look.held.tokens).max().unwrap_or(0);
        match looks[chosen].held.tokens {
            _ if looks.len() == 1 => Self::Only,
            _ if longest == 0 => Self::Cold,
            held if held == longest => Self::Prefix,
            _ => Self::Load,
        }
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
    /// The engine that computed its prompt for that one.
    pub prefill: Option<String>,
    /// The engine that it may fetch KV from.
    pub source: Option<String>,
    /// Why it went there.
    pub why: ChoiceReason,
    /// Tokens that it was expected not to compute.
    pub predicted_cached: u32,
    /// Seconds that it was expected to wait there for its turn.
    pub predicted_wait_s: f64,
    /// Seconds until its first token, as expected: the wait, what comes from lower tiers, and what
    /// had to be computed.
    pub predicted_ttft_s: f64,
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

impl Decision {
    /// A decision that was made just now. `looks`: each of the engines, as it was weighed.
    #[expect(clippy::too_many_arguments, reason = "everything that a decision was made from")]
    pub fn new(
        id: u64,
        request: &Request,
        prompt: &Prompt,
        prefix_from: PrefixSource,
        engines: &[Arc<Engine>],
        looks: &[Look],
        choice: &Choice,
        took: Duration,
    ) -> Self {
        let predicted = cost::predict(prompt.tokens, &looks[choice.chosen]);
        // Of a large fleet the first few say enough.
        let considered = choice.order.iter().take(16).map(|at| Considered {
            engine: engines[*at].spec.name.clone(),
            held_tokens: looks[*at].held.tokens,
            total: choice.totals[*at],
            parts: choice.parts.iter().map(|(name, scores)| (*name, scores[*at])).collect(),
        });
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self {
            id,
            at_ms: now.map_or(0, |since| since.as_millis() as u64),
            model: request.model.clone(),
            prompt_tokens: prompt.tokens,
            tokens_from: prompt.from,
            inexact: prompt.inexact,
            prefix_from,
            engine: engines[choice.chosen].spec.name.clone(),
            prefill: None,
            source: None,
            why: ChoiceReason::of(looks, choice.chosen),
            predicted_cached: looks[choice.chosen].held.tokens,
            predicted_wait_s: predicted.wait_s,
            predicted_ttft_s: predicted.ttft_s(),
            considered: considered.collect(),
            took_us: took.as_micros() as u64,
            outcome: Outcome::Open,
            reported_prompt: None,
            reported_cached: None,
        }
    }
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

#[cfg(test)]
mod tests {
    use super::super::view::Held;
    use super::*;

    #[test]
    fn why_says_what_told_engines_apart() {
        let holding = |tokens| Look { held: Held { tokens, ..Held::default() }, ..Look::default() };
        assert_eq!(ChoiceReason::of(&[holding(7)], 0), ChoiceReason::Only);
        assert_eq!(ChoiceReason::of(&[holding(0), holding(0)], 1), ChoiceReason::Cold);
        assert_eq!(ChoiceReason::of(&[holding(3), holding(7)], 1), ChoiceReason::Prefix);
        assert_eq!(ChoiceReason::of(&[holding(3), holding(7)], 0), ChoiceReason::Load);
    }
}
