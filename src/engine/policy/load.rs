//! Load or recompute: is it faster to fetch a prefix from disk than to compute it?

pub use crate::config::nvme::LoadPolicy;

/// Running estimates. Zero: not known yet.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rates {
    /// Bytes that the disk restores in a second.
    pub restore_bytes_per_s: f64,
    /// Tokens that vLLM computes in a second of prefill.
    pub prefill_tokens_per_s: f64,
}

/// Weight of a new sample in a running estimate.
const FRESH: f64 = 0.2;

impl Rates {
    /// Takes in how long a restore took.
    pub fn restored(&mut self, bytes: u64, seconds: f64) {
        blend(&mut self.restore_bytes_per_s, bytes as f64 / seconds);
    }

    /// Takes in how long a step of prefill took.
    pub fn prefilled(&mut self, tokens: u64, seconds: f64) {
        blend(&mut self.prefill_tokens_per_s, tokens as f64 / seconds);
    }
}

fn blend(estimate: &mut f64, sample: f64) {
    if !sample.is_finite() || sample <= 0.0 {
        return;
    }
    *estimate = if *estimate == 0.0 { sample } else { *estimate * (1.0 - FRESH) + sample * FRESH };
}

impl LoadPolicy {
    /// Whether to fetch `tokens` tokens in `bytes` bytes from disk, behind `queued` bytes.
    ///
    /// The restore streams behind everything queued, and the prefill it saves would run at the
    /// estimated rate. While a rate is not known it is loaded: only that makes it known.
    pub fn loads(self, rates: &Rates, tokens: u32, bytes: u64, queued: u64) -> bool {
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Auto => {
                if rates.restore_bytes_per_s == 0.0 || rates.prefill_tokens_per_s == 0.0 {
                    return true;
                }
                let restore_s = (bytes + queued) as f64 / rates.restore_bytes_per_s;
                let compute_s = f64::from(tokens) / rates.prefill_tokens_per_s;
                restore_s < compute_s
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_compares_and_learns() {
        let mut rates = Rates::default();
        assert!(LoadPolicy::Auto.loads(&rates, 1, u64::MAX / 2, 0), "nothing known: load, to learn");
        rates.restored(1_000, 1.0);
        rates.prefilled(10, 1.0);
        assert!(LoadPolicy::Auto.loads(&rates, 100, 5_000, 0));
        assert!(!LoadPolicy::Auto.loads(&rates, 100, 5_000, 6_000), "behind a queue");
        assert!(LoadPolicy::Always.loads(&rates, 1, 5_000, 6_000) && !LoadPolicy::Never.loads(&rates, 100, 1, 0));
        rates.restored(0, 0.0);
        assert!((rates.restore_bytes_per_s - 1_000.0).abs() < 1e-9, "a sample without duration says nothing");
        rates.restored(2_000, 1.0);
        assert!((rates.restore_bytes_per_s - 1_200.0).abs() < 1e-9);
    }
}
