//! How fast an engine is, learned from its answers.
//!
//! Time to the first token is taken as an overhead plus the tokens that were to be computed before
//! it, at some rate: a straight line through what was seen lately. The slope is learned slowly,
//! since it is the hardware's; the overhead quickly, since it is the load's; it fades, so that an
//! engine that was slow once is asked again.

use super::view::Rates;

/// What is remembered of an answer after the next one.
const KEPT: f64 = 0.99;

/// Answers that the default speed counts for, of tokens like those that were seen: neither long nor
/// short prompts make it count for more.
const PRIOR: f64 = 1.0;

/// Seconds a token: no engine computes prompts faster or slower, whatever a few answers seem to
/// say.
const SLOPES: (f64, f64) = (2e-6, 0.1);

/// Time in which an overhead that is not seen again fades, in s.
const OVERHEAD_S: f64 = 30.0;

/// An engine's speed.
#[derive(Debug, Clone, Copy)]
pub struct Speed {
    /// Weighted sums of answers: count, tokens, seconds, tokens squared, tokens times seconds.
    sums: [f64; 5],
    /// The overhead may seem to be below zero for a while: answers scatter on both sides of the
    /// line.
    overhead_s: f64,
    /// When it was learned.
    at_s: f64,
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
        Self { sums: [0.0; 5], overhead_s: 0.0, at_s: 0.0, rates }
    }

    /// Its speeds.
    pub fn rates(&self, now_s: f64) -> Rates {
        let faded = (-(now_s - self.at_s).max(0.0) / OVERHEAD_S).exp();
        Rates { overhead_s: (self.overhead_s * faded).max(0.0), ..self.rates }
    }

    /// A first token came now, `seconds` after the decision, with so many tokens to be computed
    /// before it.
    pub fn answered(&mut self, now_s: f64, tokens: u64, seconds: f64) {
        let x = tokens as f64;
        let sample = [1.0, x, seconds, x * x, x * seconds];
        self.sums.iter_mut().zip(sample).for_each(|(sum, part)| *sum = *sum * KEPT + part);
        let [n, sx, sy, sxx, sxy] = self.sums;
        // The spread of tokens around their mean says the slope; the default slope counts as one
        // answer more.
        let prior = PRIOR * (sxx / n).max(1.0);
        let spread = sxx - sx * sx / n + prior;
        let with = sxy - sx * sy / n + prior / Rates::default().prefill;
        let slope = (with / spread).clamp(SLOPES.0, SLOPES.1);
        self.rates.prefill = 1.0 / slope;
        self.overhead_s += 0.2 * (seconds - x * slope - self.overhead_s);
        self.at_s = now_s;
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
            speed.answered(0.0, tokens, 0.03 + tokens as f64 / 20_000.0);
        }
        let rates = speed.rates(0.0);
        assert!((rates.prefill / 20_000.0 - 1.0).abs() < 0.1, "{rates:?}");
        assert!((rates.overhead_s - 0.03).abs() < 0.02, "{rates:?}");
    }

    #[test]
    fn a_slow_engine_is_known_by_short_prompts() {
        let mut speed = Speed::default();
        for number in 0..40_u64 {
            let tokens = number * 37 % 900;
            speed.answered(0.0, tokens, 0.05 + tokens as f64 / 420.0);
        }
        let rates = speed.rates(0.0);
        assert!((350.0..700.0).contains(&rates.prefill), "{rates:?}");
        assert!(rates.overhead_s < 0.5, "{rates:?}");
    }

    #[test]
    fn equal_answers_say_nothing_of_the_rate() {
        let mut speed = Speed::default();
        (0..100).for_each(|_| speed.answered(0.0, 100, 5.0));
        let rates = speed.rates(0.0);
        assert!((rates.prefill / Rates::default().prefill - 1.0).abs() < 0.01, "{rates:?}");
        assert!(rates.overhead_s > 4.0);
        assert!(speed.rates(60.0).overhead_s < 1.0, "it is asked again");
    }
}
