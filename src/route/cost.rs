//! The cost model: what time to first token each engine would give, and the work it would do for it.
//!
//! TTFT = wait + load + prefill. The wait is what was booked to the engine and not answered yet, at its measured speed, plus other routers' requests
//! that it says it holds, plus the time until enough KV cache is free. Load is what comes from lower tiers, at their speeds; prefill what nobody has.
//! A share of the work itself is added: computing again what another engine has delays everybody who comes later.

use super::view::{Look, View};

/// What the model may be told.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// How much a second of computing counts beside a second of waiting.
    pub work_weight: f64,
    /// Seconds that each of our unfinished requests on an engine counts for: it takes a part of every step.
    pub request_s: f64,
    /// Seconds that a KV cache full of our unfinished requests counts for: what else it holds will be evicted.
    pub memory_s: f64,
}

impl Default for Cost {
    fn default() -> Self {
        Self { work_weight: 0.2, request_s: 0.01, memory_s: 0.0 }
    }
}

/// A prediction for one engine, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Predicted {
    /// Until the prompt's turn.
    pub wait_s: f64,
    /// Until held blocks are in GPU memory.
    pub load_s: f64,
    /// Until the rest is computed.
    pub prefill_s: f64,
}

impl Predicted {
    /// Time to the first token.
    pub fn ttft_s(&self) -> f64 {
        self.wait_s + self.load_s + self.prefill_s
    }
}

impl Cost {
    /// Predicts for one engine.
    pub fn predict(prompt_tokens: u32, engine: &Look) -> Predicted {
        let rates = &engine.rates;
        let uncached = f64::from(prompt_tokens.saturating_sub(engine.held.tokens));
        let load_s = engine.held.tiers.iter().zip(rates.load).map(|(tokens, rate)| f64::from(*tokens) / rate).sum();
        let strangers = (engine.waiting - f64::from(engine.our_unanswered)).max(0.0);
        // Another router's request is taken to be like this one.
        let ahead = engine.our_uncomputed as f64 + strangers * uncached;
        let mut wait_s = ahead / rates.prefill + rates.overhead_s;
        if engine.kv_tokens > 0 {
            let wanted = engine.our_tokens as f64 + f64::from(prompt_tokens);
            let excess = (wanted / engine.kv_tokens as f64 - 1.0).max(0.0);
            wait_s += excess * rates.residence_s;
        }
        Predicted { wait_s, load_s, prefill_s: uncached / rates.prefill }
    }

    /// What each engine costs, in seconds.
    pub fn of(&self, view: &View<'_>) -> Vec<f64> {
        let cost = |engine: &Look| {
            let predicted = Self::predict(view.prompt_tokens, engine);
            let memory = engine.our_tokens as f64 / engine.kv_tokens.max(1) as f64;
            let memory = if engine.kv_tokens > 0 { memory } else { 0.0 };
            predicted.ttft_s()
                + self.work_weight * predicted.prefill_s
                + self.request_s * f64::from(engine.our_requests)
                + self.memory_s * memory
        };
        view.engines.iter().map(cost).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::view::{Held, Rates};
    use super::*;

    fn engine(held: u32, uncomputed: u64) -> Look {
        let rates = Rates { prefill: 1000.0, ..Rates::default() };
        Look { held: Held { tokens: held, ..Held::default() }, our_uncomputed: uncomputed, rates, ..Look::default() }
    }

    #[test]
    fn a_hot_engine_is_not_drowned() {
        let cost = Cost::default();
        let costs = cost.of(&View { prompt_tokens: 1000, engines: &[engine(900, 500), engine(0, 0)] });
        assert!(costs[0] < costs[1], "half a second of queue is worth 0.9 s of computing: {costs:?}");
        let costs = cost.of(&View { prompt_tokens: 1000, engines: &[engine(900, 5000), engine(0, 0)] });
        assert!(costs[0] > costs[1], "five seconds are not: {costs:?}");
    }

    #[test]
    fn a_lower_tier_costs_its_load() {
        let mut disk = engine(900, 0);
        disk.held.tiers[2] = 900;
        let predicted = Cost::predict(1000, &disk);
        assert!((predicted.load_s - 900.0 / 50_000.0).abs() < 1e-9 && (predicted.prefill_s - 0.1).abs() < 1e-9);
    }

    #[test]
    fn a_full_cache_makes_wait() {
        let full = Look { kv_tokens: 1000, our_tokens: 1500, ..engine(0, 0) };
        assert!(Cost::predict(500, &full).wait_s > 4.0);
    }
}
