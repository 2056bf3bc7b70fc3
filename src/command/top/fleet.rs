//! A fleet at one moment, as its router and its index tell.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Everything that is shown.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct FleetState {
    /// An engine can take requests.
    pub(super) ready: bool,
    /// The engines, by name.
    pub(super) engines: Vec<EngineState>,
    /// Blocks in each tier of all engines.
    pub(super) tiers: TierBlocks,
    /// Tokens that engines need not compute.
    pub(super) hits: HitTokens,
    /// Requests that wait or were turned away.
    pub(super) queue: QueueState,
    /// Clients of the router.
    pub(super) clients: ClientState,
    /// The last decisions, the newest first.
    pub(super) decisions: Vec<SeenDecision>,
    /// Why the index does not tell, where it was asked.
    pub(super) index_problem: Option<String>,
}

/// One engine, as `/debug/engines` of the router tells. What an older router lacks is at its
/// default.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct EngineState {
    /// Its name.
    pub(super) name: String,
    /// Where it is.
    pub(super) url: String,
    /// `healthy`, `broken`, `failing`, `unseen`, `asleep` or `draining`.
    pub(super) health: String,
    /// Which steps of a request it takes.
    pub(super) role: String,
    /// Models that it serves.
    pub(super) models: Vec<String>,
    /// Requests that run in it.
    pub(super) running: f64,
    /// Requests that wait in it.
    pub(super) waiting: f64,
    /// Share of its KV cache in use.
    pub(super) kv_usage: f64,
    /// Requests of this router that have not ended.
    pub(super) in_flight: u64,
    /// Their prompts' tokens.
    pub(super) in_flight_tokens: u64,
    /// Seconds that what it was given and has not computed will take.
    pub(super) backlog_s: f64,
    /// Prompt tokens that it computes a second.
    pub(super) prefill_tokens_per_second: f64,
    /// How its events come; nothing where nobody follows them.
    pub(super) events: Option<EventState>,
    /// Blocks in its dram tier.
    pub(super) dram_blocks: Option<u64>,
    /// Blocks in its nvme tier.
    pub(super) nvme_blocks: Option<u64>,
}

/// How an engine's events come.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct EventState {
    /// The line is up.
    pub(super) connected: bool,
    /// Seconds since the last ones; nothing before the first.
    pub(super) age_s: Option<f64>,
    /// `down` or `silent`, where they should come and do not.
    pub(super) fault: Option<String>,
}

/// Blocks in each tier.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct TierBlocks {
    /// Who counts them: `index`, or `engines` themselves.
    pub(super) from: &'static str,
    /// Blocks, by tier.
    pub(super) blocks: BTreeMap<String, u64>,
}

/// Tokens that engines need not compute, since the router began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct HitTokens {
    /// Tokens of the prompts whose engines reported.
    pub(super) prompt: u64,
    /// Of those, how many the router expected to be cached.
    pub(super) predicted: u64,
    /// Of those, how many were, as engines reported.
    pub(super) reported: u64,
}

impl HitTokens {
    /// Predicted and reported shares; nothing where no engine has reported.
    pub(super) fn shares(&self) -> Option<(f64, f64)> {
        let of = |tokens: u64| tokens as f64 / self.prompt as f64;
        (self.prompt > 0).then(|| (of(self.predicted), of(self.reported)))
    }

    /// What came since `before`; nothing where the router has begun anew meanwhile.
    pub(super) fn since(&self, before: &Self) -> Option<Self> {
        Some(Self {
            prompt: self.prompt.checked_sub(before.prompt)?,
            predicted: self.predicted.checked_sub(before.predicted)?,
            reported: self.reported.checked_sub(before.reported)?,
        })
    }
}

/// Requests that wait in the router or were turned away.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct QueueState {
    /// Waiting requests, by priority.
    pub(super) waiting: BTreeMap<i64, u64>,
    /// Bytes of their bodies.
    pub(super) bytes: u64,
    /// Requests that were not passed on since the router began, by reason.
    pub(super) dropped: BTreeMap<String, u64>,
}

/// Clients of the router.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct ClientState {
    /// Open connections.
    pub(super) open: u64,
    /// Connections ended because of their client since the router began, by reason.
    pub(super) cut: BTreeMap<String, u64>,
}

/// A decision, as `/debug/decisions` of the router tells.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct SeenDecision {
    /// Its number.
    pub(super) id: u64,
    /// When, in ms since 1970.
    pub(super) at_ms: u64,
    /// The model asked for.
    pub(super) model: Option<String>,
    /// Tokens of the prompt.
    pub(super) prompt_tokens: u32,
    /// Where it went.
    pub(super) engine: String,
    /// Why: `only`, `cold`, `prefix`, `load` or `fallback`.
    pub(super) why: String,
    /// Tokens that were expected to be cached there.
    pub(super) predicted_cached: u32,
    /// Seconds that it was expected to wait there.
    pub(super) predicted_wait_s: f64,
    /// Seconds to its first token, as expected.
    pub(super) predicted_ttft_s: f64,
    /// What became of it.
    pub(super) outcome: String,
    /// Tokens that were cached, as the engine reported.
    pub(super) reported_cached: Option<u32>,
}
