//! What a replay counts.

use std::collections::BTreeMap;

use serde::Serialize;

use super::device::DeviceModel;
use super::request::TracedRequest;

/// What every request is priced with.
#[derive(Debug, Clone, Copy)]
pub struct Account {
    /// The device.
    pub device: DeviceModel,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Bytes of a block.
    pub block_bytes: u64,
}

/// Sums over a workload.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    /// Requests.
    pub requests: u64,
    /// Blocks of all prompts.
    pub blocks: u64,
    /// Tokens of all prompts.
    pub tokens: u64,
    /// Blocks found in memory and on disk.
    pub dram_blocks: u64,
    /// Blocks found on disk only.
    pub nvme_blocks: u64,
    /// Tokens found in memory.
    pub dram_tokens: u64,
    /// Tokens found on disk only.
    pub nvme_tokens: u64,
    /// Blocks put into memory.
    pub stored: u64,
    /// Blocks written to disk.
    pub written: u64,
    /// Seconds of prefill that the hits replace.
    pub saved_s: f64,
    /// Seconds of prefill without any cache.
    pub prefill_s: f64,
    /// When the last request came, in ms.
    pub last_ms: u64,
    /// Predicted times to first token, in seconds.
    pub first_token_s: Vec<f32>,
    /// By tenant, where requests have one: tokens of its prompts, and those found.
    pub tenants: BTreeMap<String, (u64, u64)>,
}

impl Account {
    /// Adds a request of which so many blocks are in memory, and so many after or between them on
    /// disk only.
    pub fn add(&self, totals: &mut Totals, request: &TracedRequest, dram: u32, nvme: u32) {
        let device = &self.device;
        let hit_tokens = request.tokens_of(dram + nvme, self.block_tokens);
        let nvme_tokens = nvme.saturating_mul(self.block_tokens).min(hit_tokens);
        let computed_s = device.prefill_s(hit_tokens, request.prompt_tokens);
        let load_s = device.load_s(u64::from(dram) * self.block_bytes, u64::from(nvme) * self.block_bytes);
        totals.requests += 1;
        totals.blocks += request.blocks.len() as u64;
        totals.tokens += u64::from(request.prompt_tokens);
        totals.dram_blocks += u64::from(dram);
        totals.nvme_blocks += u64::from(nvme);
        totals.dram_tokens += u64::from(hit_tokens - nvme_tokens);
        totals.nvme_tokens += u64::from(nvme_tokens);
        totals.saved_s += device.prefill_s(0, hit_tokens);
        totals.prefill_s += device.prefill_s(0, request.prompt_tokens);
        totals.last_ms = request.at_ms;
        totals.first_token_s.push((computed_s + load_s) as f32);
        if let Some(tenant) = &request.tenant {
            let (tokens, found) = totals.tenants.entry(tenant.clone()).or_default();
            *tokens += u64::from(request.prompt_tokens);
            *found += u64::from(hit_tokens);
        }
    }
}

/// A replay's result for people and reports.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Share of the prompts' blocks that were found.
    pub hit_blocks_share: f64,
    /// Share of the prompts' tokens that were found.
    pub hit_tokens_share: f64,
    /// Blocks found in memory.
    pub dram_hit_blocks: u64,
    /// Tokens found in memory.
    pub dram_hit_tokens: u64,
    /// Blocks found on disk only.
    pub nvme_hit_blocks: u64,
    /// Tokens found on disk only.
    pub nvme_hit_tokens: u64,
    /// Bytes copied from the GPU to memory.
    pub stored_bytes: u64,
    /// Bytes copied from memory to the GPU, those from disk included.
    pub loaded_bytes: u64,
    /// Bytes written to disk.
    pub nvme_written_bytes: u64,
    /// Bytes read from disk.
    pub nvme_read_bytes: u64,
    /// Bytes that a day of this workload writes to disk.
    pub nvme_written_bytes_per_day: u64,
    /// Predicted time to first token of an idle engine, in ms: median.
    pub ttft_p50_ms: f64,
    /// The same: 90th percentile.
    pub ttft_p90_ms: f64,
    /// The same: mean.
    pub ttft_mean_ms: f64,
    /// Seconds of prefill saved.
    pub prefill_saved_s: f64,
    /// Their share of all.
    pub prefill_saved_share: f64,
    /// By tenant, where requests have one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tenants: Vec<TenantSummary>,
}

/// One tenant's part.
#[derive(Debug, Clone, Serialize)]
pub struct TenantSummary {
    /// As the trace names it.
    pub name: String,
    /// Share of its prompts' tokens that were found.
    pub hit_tokens_share: f64,
}

impl Totals {
    /// The result, for blocks of so many bytes.
    pub fn summary(&self, block_bytes: u64) -> Summary {
        let share = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
        let mut times = self.first_token_s.clone();
        times.sort_by(f32::total_cmp);
        let at = |percent: usize| {
            f64::from(times.get(times.len().saturating_sub(1) * percent / 100).copied().unwrap_or(0.0)) * 1e3
        };
        let mean = times.iter().map(|time| f64::from(*time)).sum::<f64>() / times.len().max(1) as f64 * 1e3;
        let written = self.written * block_bytes;
        Summary {
            hit_blocks_share: share(self.dram_blocks + self.nvme_blocks, self.blocks),
            hit_tokens_share: share(self.dram_tokens + self.nvme_tokens, self.tokens),
            dram_hit_blocks: self.dram_blocks,
            dram_hit_tokens: self.dram_tokens,
            nvme_hit_blocks: self.nvme_blocks,
            nvme_hit_tokens: self.nvme_tokens,
            stored_bytes: self.stored * block_bytes,
            loaded_bytes: (self.dram_blocks + self.nvme_blocks) * block_bytes,
            nvme_written_bytes: written,
            nvme_read_bytes: self.nvme_blocks * block_bytes,
            nvme_written_bytes_per_day: (u128::from(written) * 86_400_000 / u128::from(self.last_ms.max(1))) as u64,
            ttft_p50_ms: at(50),
            ttft_p90_ms: at(90),
            ttft_mean_ms: mean,
            prefill_saved_s: self.saved_s,
            tenants: (self.tenants.iter())
                .map(|(name, (tokens, found))| TenantSummary {
                    name: name.clone(),
                    hit_tokens_share: share(*found, *tokens),
                })
                .collect(),
            prefill_saved_share: if self.prefill_s > 0.0 { self.saved_s / self.prefill_s } else { 0.0 },
        }
    }
}
