//! What a decision is made from: a request and every engine that may take it, at one moment. Plain
//! data, so that deciding is a pure function.

use kvcellar_index::tiers::TIERS;

/// How an engine stands to the adapter that a request wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Adapter {
    /// The request wants none, or nothing is known.
    #[default]
    Unasked,
    /// Loaded.
    Loaded,
    /// Not loaded; there is room.
    Room,
    /// Waiting to be loaded.
    Waiting,
    /// Not loaded, and another one would have to go.
    Full,
}

/// What an engine has of the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Held {
    /// Tokens it need not compute.
    pub tokens: u32,
    /// Of those, by the tier they would come from.
    pub tiers: [u32; TIERS],
    /// Weighted share of the prompt, between 0 and 1.
    pub share: f64,
}

/// Measured speeds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Prompt tokens computed a second.
    pub prefill: f64,
    /// Seconds to the first token beyond that: steps under way, other requests' decoding.
    pub overhead_s: f64,
    /// Tokens a second that come from each tier.
    pub load: [f64; TIERS],
    /// Seconds from a request's first token to its end, on average.
    pub residence_s: f64,
}

impl Default for Rates {
    fn default() -> Self {
        // A mid-sized model on one GPU; replaced by what is seen.
        Self {
            prefill: 8_000.0,
            overhead_s: 0.0,
            load: [1e9, 400_000.0, 50_000.0, 10_000.0, 10_000.0, 1e9],
            residence_s: 5.0,
        }
    }
}

/// One engine.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Look {
    /// Requests that wait in the engine.
    pub waiting: f64,
    /// Requests that run in it.
    pub running: f64,
    /// Share of its KV cache in use.
    pub kv_usage: f64,
    /// Tokens that its KV cache holds; 0: not known.
    pub kv_tokens: u64,
    /// Requests of ours that have not ended.
    pub our_requests: u32,
    /// Of those, how many have no first token yet.
    pub our_unanswered: u32,
    /// Prompt tokens of ours that have not ended.
    pub our_tokens: u64,
    /// Tokens of ours that it has yet to compute before the next prompt's turn.
    pub our_uncomputed: u64,
    /// Requests of ours that it got lately, each second.
    pub our_rate: f64,
    /// Tokens of ours that it was to compute lately, each second.
    pub our_work: f64,
    /// What it has of the prompt.
    pub held: Held,
    /// How it stands to the request's adapter.
    pub adapter: Adapter,
    /// It had the session's last request.
    pub session: bool,
    /// When it got its last request that nobody had anything of: a count.
    pub cold_turn: u64,
    /// Its speeds.
    pub rates: Rates,
}

/// A request and the engines that may take it.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// Tokens of the prompt, exact or estimated.
    pub prompt_tokens: u32,
    /// What requests for the longest prefix that any engine has of it have lost by waiting, in s
    /// ([`super::credit`]).
    pub credit_s: f64,
    /// The engines.
    pub engines: &'a [Look],
}
