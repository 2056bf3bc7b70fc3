//! The cost model: what sending a request to each engine costs everybody, in seconds of waiting.
//!
//! A request's own time to the first token is wait + load + prefill. The wait is what was booked to
//! the engine and is not computed yet, at its measured speed, plus other routers' requests that it
//! says it holds, plus the time until enough KV cache is free. Load is what comes from lower tiers,
//! at their speeds; prefill what nobody has.
//!
//! Its work also delays those who come to the engine before it is idle again. As many come as its
//! rate of requests says, in the time that it takes to do what is booked beside what goes on
//! coming. So an engine that many ask gets no long prompts, and a session leaves it before it is
//! drowned.
//!
//! Who must wait for the one engine that has its prefix, though another would be free, loses that
//! time. The losses of a prefix are its credit ([`super::credit`]): as soon as they would have paid
//! for computing it once more, it is. So what is asked for often spreads, what is not does not, and
//! neither waiting nor computing can exceed twice what was necessary by much.

use super::view::{Held, Look, View};

/// The share of an engine's time from which on it is not taken to be busier: it would never be
/// idle.
const BUSY_MAX: f64 = 0.9;

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

/// What one engine costs, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// As it is.
    pub cost_s: f64,
    /// As it would be if it had the longest prefix that any engine has.
    pub spread_s: f64,
}

impl Cost {
    /// With a credit for computing the prefix here as well.
    pub fn with(&self, credit_s: f64) -> f64 {
        self.spread_s + (self.cost_s - self.spread_s - credit_s).max(0.0)
    }
}

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
        let wanted = engine.our_uncomputed as f64 + uncached;
        let excess = (engine.kv_usage + wanted / engine.kv_tokens as f64 - 1.0).max(0.0);
        wait_s += excess * rates.residence_s;
    }
    Predicted { wait_s, load_s, prefill_s: uncached / rates.prefill }
}

/// What a request costs at one engine: its own time, and the delay of others.
fn everybodys(prompt_tokens: u32, engine: &Look) -> f64 {
    let it = predict(prompt_tokens, engine);
    let work_s = it.load_s + it.prefill_s;
    let busy = (engine.our_work / engine.rates.prefill).min(BUSY_MAX);
    // Those who come while it works are delayed by half of it, on average.
    let delayed = engine.our_rate * (it.wait_s + work_s / 2.0) / (1.0 - busy);
    it.ttft_s() + work_s * delayed
}

/// What each engine costs.
pub fn of(view: &View<'_>) -> Vec<Cost> {
    let longest = view.engines.iter().map(|engine| engine.held.tokens).max().unwrap_or(0);
    let cost = |engine: &Look| {
        let cost_s = everybodys(view.prompt_tokens, engine);
        if engine.held.tokens == longest {
            return Cost { cost_s, spread_s: cost_s };
        }
        let held = Held { tokens: longest, ..Held::default() };
        let spread_s = everybodys(view.prompt_tokens, &Look { held, ..*engine }).min(cost_s);
        Cost { cost_s, spread_s }
    };
    view.engines.iter().map(cost).collect()
}

/// A prefix's credit after a decision: what computing it once more took of it, or what waiting for
/// it added.
pub fn credit_after(costs: &[Cost], chosen: usize, credit_s: f64) -> f64 {
    let Cost { cost_s, spread_s } = costs[chosen];
    if cost_s > spread_s {
        return (credit_s - (cost_s - spread_s)).max(0.0);
    }
    let least = costs.iter().map(|cost| cost.spread_s).fold(cost_s, f64::min);
    credit_s + cost_s - least
}

#[cfg(test)]
mod tests {
    use super::super::view::Rates;
    use super::*;

    fn engine(held: u32, uncomputed: u64) -> Look {
        let rates = Rates { prefill: 1000.0, ..Rates::default() };
        Look { held: Held { tokens: held, ..Held::default() }, our_uncomputed: uncomputed, rates, ..Look::default() }
    }

    fn seconds(engines: &[Look]) -> Vec<f64> {
        of(&View { prompt_tokens: 1000, credit_s: 0.0, engines }).iter().map(|cost| cost.cost_s).collect()
    }

    #[test]
    fn a_hot_engine_is_not_drowned() {
        let costs = seconds(&[engine(900, 500), engine(0, 0)]);
        assert!(costs[0] < costs[1], "half a second of queue is worth 0.9 s of computing: {costs:?}");
        let costs = seconds(&[engine(900, 5000), engine(0, 0)]);
        assert!(costs[0] > costs[1], "five seconds are not: {costs:?}");
    }

    #[test]
    fn those_who_come_later_count() {
        let asked = Look { our_rate: 10.0, our_work: 800.0, ..engine(900, 500) };
        let costs = seconds(&[asked, engine(0, 0)]);
        assert!(costs[0] > costs[1], "0.1 s of work delays some 27 requests: {costs:?}");
        let quiet = Look { our_uncomputed: 0, ..asked };
        let costs = seconds(&[quiet, engine(0, 0)]);
        assert!(costs[0] < costs[1], "without a queue it delays few: {costs:?}");
    }

    #[test]
    fn a_prefix_that_makes_wait_is_spread() {
        let engines = [engine(900, 500), engine(0, 0)];
        let costs = of(&View { prompt_tokens: 1000, credit_s: 0.0, engines: &engines });
        let mut credit_s = 0.0;
        let mut waited = 0;
        while costs[0].with(credit_s) <= costs[1].with(credit_s) {
            credit_s = credit_after(&costs, 0, credit_s);
            waited += 1;
        }
        assert!((1..=2).contains(&waited), "0.9 s of computing for 0.5 s of waiting: {waited}");
        assert!(credit_after(&costs, 1, credit_s) < credit_s, "it is paid for");
        let held = [engine(900, 500), engine(900, 0)];
        let costs = of(&View { prompt_tokens: 1000, credit_s: 0.0, engines: &held });
        assert!(credit_after(&costs, 1, 0.3) < 0.3 + 1e-9, "nothing is lost any more");
    }

    #[test]
    fn a_lower_tier_costs_its_load() {
        let mut disk = engine(900, 0);
        disk.held.tiers[2] = 900;
        let predicted = predict(1000, &disk);
        assert!((predicted.load_s - 900.0 / 50_000.0).abs() < 1e-9 && (predicted.prefill_s - 0.1).abs() < 1e-9);
    }

    #[test]
    fn a_full_cache_makes_wait() {
        let full = Look { kv_tokens: 1000, kv_usage: 0.9, ..engine(0, 0) };
        assert!(predict(500, &full).wait_s > 1.5, "0.4 of the cache is freed in 0.4 of a residence");
        let shared = Look { kv_tokens: 1000, kv_usage: 0.9, our_tokens: 5000, ..engine(450, 0) };
        assert!(predict(500, &shared).wait_s < 0.1, "prompts that share what is cached do not add up");
    }
}
