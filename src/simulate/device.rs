//! The modelled device: what computing and moving blocks costs.

use clap::Args;
use serde::Serialize;

use kvcellar_engine::policy::load::Rates;

/// Rates and times. The defaults are those of an 8-billion-parameter model in 16 bits on one fast
/// GPU with one NVMe drive.
#[derive(Debug, Clone, Copy, PartialEq, Args, Serialize)]
pub struct DeviceModel {
    /// Tokens that a prefill computes in a second, at the beginning of a prompt.
    #[arg(long, default_value_t = 17_500.0, value_name = "TOKENS/S", value_parser = above_zero)]
    pub prefill_rate: f64,
    /// Tokens before a token that make computing it cost twice as much, because of attention.
    #[arg(long, default_value_t = 64_000.0, value_name = "TOKENS", value_parser = above_zero)]
    pub attention_tokens: f64,
    /// Rate from memory to the GPU, in GB/s.
    #[arg(long, default_value_t = 50.0, value_name = "GB/S", value_parser = above_zero)]
    pub dram_rate: f64,
    /// Rate from disk, in GB/s.
    #[arg(long, default_value_t = 7.0, value_name = "GB/S", value_parser = above_zero)]
    pub nvme_rate: f64,
    /// Time before the first byte comes from memory, in ms.
    #[arg(long, default_value_t = 0.5, value_name = "MS", value_parser = zero_or_more)]
    pub dram_latency: f64,
    /// Time before the first byte comes from disk, in ms.
    #[arg(long, default_value_t = 2.0, value_name = "MS", value_parser = zero_or_more)]
    pub nvme_latency: f64,
}

fn above_zero(text: &str) -> Result<f64, String> {
    zero_or_more(text).ok().filter(|value| *value > 0.0).ok_or_else(|| "write a number above 0".to_owned())
}

fn zero_or_more(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|value: &f64| value.is_finite() && *value >= 0.0);
    value.ok_or_else(|| "write a number of 0 or more".to_owned())
}

impl DeviceModel {
    /// Seconds to compute the tokens `from..to` of a prompt.
    pub fn prefill_s(&self, from: u32, to: u32) -> f64 {
        let (from, to) = (f64::from(from), f64::from(to));
        let attention = (to * to - from * from) / (2.0 * self.attention_tokens);
        (to - from + attention) / self.prefill_rate
    }

    /// Seconds to load so many bytes from memory and from disk. Both go at once, and what comes
    /// from disk passes through memory.
    pub fn load_s(&self, dram_bytes: u64, nvme_bytes: u64) -> f64 {
        let of = |bytes: u64, latency_ms: f64, rate: f64| {
            if bytes == 0 { 0.0 } else { latency_ms / 1e3 + bytes as f64 / (rate * 1e9) }
        };
        let up = of(dram_bytes + nvme_bytes, self.dram_latency, self.dram_rate);
        f64::max(up, of(nvme_bytes, self.nvme_latency, self.nvme_rate))
    }

    /// What the tiers decide with whether to load or to compute.
    pub fn rates(&self) -> Rates {
        Rates { restore_bytes_per_s: self.nvme_rate * 1e9, prefill_tokens_per_s: self.prefill_rate }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: DeviceModel = DeviceModel {
        prefill_rate: 1000.0,
        attention_tokens: 1000.0,
        dram_rate: 10.0,
        nvme_rate: 1.0,
        dram_latency: 1.0,
        nvme_latency: 5.0,
    };

    #[test]
    fn what_is_no_rate_is_refused() {
        assert_eq!((above_zero("5e3"), zero_or_more("0")), (Ok(5e3), Ok(0.0)));
        for nonsense in ["0", "-5", "nan", "inf", ""] {
            assert!(above_zero(nonsense).is_err(), "{nonsense}");
        }
        assert!(zero_or_more("-1").is_err());
    }

    #[test]
    fn late_tokens_cost_more_than_early_ones() {
        assert!((DEVICE.prefill_s(0, 1000) - 1.5).abs() < 1e-9);
        assert!((DEVICE.prefill_s(1000, 2000) - 2.5).abs() < 1e-9);
        let parts = DEVICE.prefill_s(0, 700) + DEVICE.prefill_s(700, 2000);
        assert!((parts - DEVICE.prefill_s(0, 2000)).abs() < 1e-9);
    }

    #[test]
    fn the_slower_way_counts() {
        assert!((DEVICE.load_s(10_000_000_000, 0) - 1.001).abs() < 1e-9);
        assert!((DEVICE.load_s(0, 2_000_000_000) - 2.005).abs() < 1e-9);
        assert!(DEVICE.load_s(0, 0).abs() < 1e-12);
    }
}
