//! How fast an engine is, learned from its answers.
//!
//! Time to the first token is taken as an overhead plus the tokens that were to be computed before it, at some rate: a straight line through what was seen
//! lately. The slope is learned slowly, since it is the hardware's; the overhead quickly, since it is the load's. An engine that was not asked for a
//! while is taken to be less loaded again.

use super::view::Rates;

/// What is remembered of an answer after the next one.
const KEPT: f64 = 0.99;

/// As many answers as the default speed counts for.
const PRIOR: f64 = 8.0;

/// Tokens of those.
const PRIOR_TOKENS: f64 = 2000.0;

/// An engine's speed.
#[derive(Debug, Clone, Copy)]
pub struct Speed {
    /// Weighted sums of answers: count, tokens, seconds, tokens squared, tokens times seconds.
    sums: [f64; 5],
    rates: Rates,
}

impl Default for Speed {
    fn default() -> Self {
        Self::new(Rates::default())
    }
}

impl Speed {
    /// That of an engine of which nothing is known but these.
    pub fn new(rates: Rates) -> Self {
        Self { sums: [0.0; 5], rates }
    }

    /// Its speeds.
    pub fn rates(&self) -> Rates {
        self.rates
    }

    /// A first token came `seconds` after the decision, with so many tokens to be computed before it.
    pub fn answered(&mut self, tokens: u64, seconds: f64) {
        let x = tokens as f64;
        let sample = [1.0, x, seconds, x * x, x * seconds];
        self.sums.iter_mut().zip(sample).for_each(|(sum, part)| *sum = *sum * KEPT + part);
        let [n, sx, sy, sxx, sxy] = self.sums;
        // The spread of tokens around their mean says the slope; the default slope counts as some answers with a spread of their own.
        let spread = sxx - sx * sx / n + PRIOR * PRIOR_TOKENS * PRIOR_TOKENS;
        let with = sxy - sx * sy / n + PRIOR * PRIOR_TOKENS * PRIOR_TOKENS / Rates::default().prefill;
        let slope = (with / spread).clamp(1e-7, 1e-1);
        self.rates.prefill = 1.0 / slope;
        let beyond = (seconds - x * slope).max(0.0);
        self.rates.overhead_s += 0.2 * (beyond - self.rates.overhead_s);
    }

    /// A request ended so long after its first token.
    pub fn ended(&mut self, seconds: f64) {
        self.rates.residence_s += 0.05 * (seconds - self.rates.residence_s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found() {
        let mut speed = Speed::default();
        for number in 0..500_u64 {
            let tokens = number * 37 % 8000;
            speed.answered(tokens, 0.03 + tokens as f64 / 20_000.0);
        }
        let rates = speed.rates();
        assert!((rates.prefill / 20_000.0 - 1.0).abs() < 0.1, "{rates:?}");
        assert!((rates.overhead_s - 0.03).abs() < 0.02, "{rates:?}");
    }

    #[test]
    fn equal_answers_say_nothing_of_the_rate() {
        let mut speed = Speed::default();
        (0..100).for_each(|_| speed.answered(100, 5.0));
        let rates = speed.rates();
        assert!((rates.prefill / Rates::default().prefill - 1.0).abs() < 0.01, "{rates:?}");
        assert!(rates.overhead_s > 4.0);
    }
}
