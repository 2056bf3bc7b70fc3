//! What loads saved: seconds of prefill, by the tier that gave the tokens.
//!
//! Tokens of a load that has ended well, over the rate at which this engine computes prompts. That
//! is time of the model, which other requests get. What the load itself took is not subtracted: it
//! passes beside the model's steps and is counted by the copy workers. The rate is linear, and so
//! too kind to computing: attention makes late tokens of a long prompt dearer than early ones, so
//! that the seconds are rather understated. While no rate is known, tokens wait for one.

/// Share that older steps keep in the rate with each new one.
const OLDER: f64 = 0.95;

/// Tokens of one load, by tier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct LoadedTokens {
    /// From memory.
    pub(super) dram: u32,
    /// From disk.
    pub(super) nvme: u32,
}

/// The sums, and the rate that they are made with.
#[derive(Debug, Default)]
pub(super) struct Savings {
    /// Microseconds of prefill that the dram tier saved.
    pub(super) dram_us: u64,
    /// The same, of the nvme tier.
    pub(super) nvme_us: u64,
    /// Tokens and seconds of recent steps, the newest with the most weight. As sums, so that a
    /// large step counts for more than a small one, which takes longer for each token: a load
    /// replaces large ones.
    tokens: f64,
    seconds: f64,
    /// Tokens of each tier that were loaded before the first step was measured.
    unpriced: [u64; 2],
}

impl Savings {
    /// A step computed so many tokens in so many seconds.
    pub(super) fn prefilled(&mut self, tokens: u64, seconds: f64) {
        if tokens == 0 || !seconds.is_finite() || seconds <= 0.0 {
            return;
        }
        self.tokens = self.tokens * OLDER + tokens as f64;
        self.seconds = self.seconds * OLDER + seconds;
        let [dram, nvme] = std::mem::take(&mut self.unpriced);
        self.add(dram, nvme);
    }

    /// A load has ended well.
    pub(super) fn loaded(&mut self, LoadedTokens { dram, nvme }: LoadedTokens) {
        self.add(dram.into(), nvme.into());
    }

    fn add(&mut self, dram: u64, nvme: u64) {
        if self.seconds > 0.0 {
            self.dram_us += self.microseconds(dram);
            self.nvme_us += self.microseconds(nvme);
        } else {
            self.unpriced = [self.unpriced[0] + dram, self.unpriced[1] + nvme];
        }
    }

    /// How long these tokens would have taken.
    #[expect(clippy::cast_sign_loss, reason = "times and counts are not negative")]
    fn microseconds(&self, tokens: u64) -> u64 {
        (tokens as f64 * self.seconds / self.tokens * 1e6).round() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(savings: &Savings) -> (u64, u64) {
        (savings.dram_us, savings.nvme_us)
    }

    #[test]
    fn tokens_cost_what_steps_of_prefill_took() {
        let mut savings = Savings::default();
        savings.loaded(LoadedTokens { dram: 500, nvme: 100 });
        assert_eq!(sums(&savings), (0, 0), "nobody knows yet how long they would have taken");
        savings.prefilled(1000, 0.5);
        assert_eq!(sums(&savings), (250_000, 50_000), "those that waited are counted now");
        savings.loaded(LoadedTokens { dram: 100, nvme: 0 });
        assert_eq!(sums(&savings), (300_000, 50_000));
        for (tokens, seconds) in [(0, 1.0), (100, 0.0), (100, -1.0), (100, f64::NAN), (100, f64::INFINITY)] {
            savings.prefilled(tokens, seconds);
        }
        savings.loaded(LoadedTokens { dram: 0, nvme: 100 });
        assert_eq!(sums(&savings), (300_000, 100_000), "what is no measurement changes no rate");
    }

    #[test]
    fn the_rate_follows_the_engine_and_large_steps_count_for_more() {
        let mut savings = Savings::default();
        (0..200).for_each(|_| savings.prefilled(1000, 1.0));
        (0..200).for_each(|_| savings.prefilled(1000, 0.1));
        savings.loaded(LoadedTokens { dram: 1000, nvme: 0 });
        assert!((100_000..101_000).contains(&savings.dram_us), "{}", savings.dram_us);
        let mut mixed = Savings::default();
        (0..200).for_each(|_| {
            mixed.prefilled(8000, 1.0);
            mixed.prefilled(130, 0.1);
        });
        mixed.loaded(LoadedTokens { dram: 8130, nvme: 0 });
        assert!((1_080_000..1_120_000).contains(&mixed.dram_us), "{}", mixed.dram_us);
    }
}
