//! What came out of a run.

#![expect(clippy::cast_sign_loss, reason = "a rank is never below zero")]

use serde::Serialize;

/// What came out.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// Requests that counted.
    pub requests: usize,
    /// Of those, how many had not begun to be answered at the end.
    pub unanswered: usize,
    /// Time to the first token, in s.
    pub ttft_p50_s: f64,
    /// Nine of ten are below.
    pub ttft_p90_s: f64,
    /// Ninety-nine of a hundred are below.
    pub ttft_p99_s: f64,
    /// Time between two tokens of an answer: of nine of ten it is shorter, in s.
    pub between_p90_s: f64,
    /// Share of prompt tokens that were cached.
    pub cached: f64,
    /// Busiest engine's work over the mean.
    pub imbalance: f64,
    /// Mean share of time that an engine worked: computed, decoded or loaded, without what a step
    /// takes in any case.
    pub busy: f64,
    /// Requests that count and were not answered to their end, because their engine went.
    pub lost: usize,
    /// Requests of a lower priority that were answered to their end in the time that counts.
    pub lower: usize,
}

/// One request that counts.
#[derive(Debug, Clone, Copy)]
pub struct Served {
    /// Time to its first token, in s; of one that has none, the time up to now.
    pub ttft_s: f64,
    /// Its prompt's tokens and how many were cached; none if it was not answered.
    pub tokens: Option<(u32, u32)>,
    /// Time between its answer's tokens, in s, if it has ended.
    pub between_s: Option<f64>,
}

impl Outcome {
    /// From what was served, and the seconds that each engine worked of those that count.
    pub fn of(served: &[Served], work_s: &[f64], seconds: f64) -> Self {
        let ttft = sorted(served.iter().map(|it| it.ttft_s));
        let percentile = |share: f64| percentile(&ttft, share);
        let answered = || served.iter().filter_map(|it| it.tokens);
        let tokens: f64 = answered().map(|(tokens, _)| f64::from(tokens)).sum();
        let cached: f64 = answered().map(|(_, cached)| f64::from(cached)).sum();
        let mean = work_s.iter().sum::<f64>() / work_s.len().max(1) as f64;
        Self {
            requests: served.len(),
            unanswered: served.len() - answered().count(),
            ttft_p50_s: percentile(0.5),
            ttft_p90_s: percentile(0.9),
            ttft_p99_s: percentile(0.99),
            between_p90_s: self::percentile(&sorted(served.iter().filter_map(|it| it.between_s)), 0.9),
            cached: cached / tokens.max(1.0),
            imbalance: work_s.iter().copied().fold(0.0, f64::max) / mean.max(1e-9),
            busy: mean / seconds,
            lost: 0,
            lower: 0,
        }
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn percentile(sorted: &[f64], share: f64) -> f64 {
    let at = (sorted.len() as f64 * share) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0)
}
