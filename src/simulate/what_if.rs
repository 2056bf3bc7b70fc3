//! What the live what-if of an engine would say of a workload, and how far that is from the truth.

use serde::Serialize;

use super::replay::{Keeper, Row, Sizes, hash};
use super::trace::WorkloadSource;
use kvcellar_block::error::Result;
use kvcellar_block::{BlockKey, GroupIndex};
use kvcellar_engine::metrics::WhatIfCounts;
use kvcellar_engine::policy::PolicyName;
use kvcellar_engine::tier::what_if::{BlockUses, WhatIf, rate_for};

/// What an engine with one policy would say after a whole workload, as shares.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Estimate {
    /// Its policy.
    pub policy: &'static str,
    /// Blocks that it samples.
    pub rate: f64,
    /// Blocks found with the present capacity.
    pub now: f64,
    /// With twice as much.
    pub double: f64,
    /// Without end.
    pub infinite: f64,
}

/// What engines would say that sample as ours do, with each policy among these results.
///
/// # Errors
/// Those of the source.
pub fn estimates(source: &WorkloadSource, rows: &[Row], sizes: Sizes) -> Result<Vec<Estimate>> {
    let rate = rate_for(sizes.dram_blocks.max(sizes.nvme_blocks));
    let policies = rows.iter().filter_map(|row| match row.keeper {
        Keeper::Policy(policy) => Some(policy),
        Keeper::Belady | Keeper::Infinite => None,
    });
    let of = |policy: PolicyName| {
        let [now, double, infinite] = shares(estimate(source, policy, sizes, rate, 0)?);
        Ok(Estimate { policy: policy.name(), rate, now, double, infinite })
    };
    policies.map(of).collect()
}

/// What was found after a whole workload. `rate`: the share of blocks that is sampled; `seed`:
/// which blocks these are.
///
/// # Errors
/// Those of the source.
pub fn estimate(
    source: &WorkloadSource,
    policy: PolicyName,
    sizes: Sizes,
    rate: f64,
    seed: u64,
) -> Result<WhatIfCounts> {
    let mut what_if = WhatIf::sampling(policy, sizes.dram_blocks.max(sizes.nvme_blocks), rate);
    source.each(&mut |request| {
        // As the tiers are replayed: a partial block is one, too.
        let reach = request.blocks.len() as u32;
        let uses = BlockUses { local: 0, reach, prompt_tokens: request.prompt_tokens, is_kept: true };
        let named = |id: &u64| BlockKey { hash: hash(*id ^ seed), group: GroupIndex(0) };
        what_if.serve(request.blocks.iter().map(named), uses);
        Ok(())
    })?;
    Ok(what_if.counts())
}

/// Shares of blocks found: now, with twice the capacity, and without end.
pub fn shares(counts: WhatIfCounts) -> [f64; 3] {
    let WhatIfCounts { blocks, now_misses, double_misses, infinite_misses } = counts;
    [now_misses, double_misses, infinite_misses].map(|misses| 1.0 - misses as f64 / blocks.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;

    use super::*;
    use crate::account::Account;
    use crate::device::DeviceModel;
    use crate::replay::{Choices, replay};
    use crate::synthetic::{BLOCK_TOKENS, Synthetic, Workload};
    use kvcellar_engine::config::TenantList;
    use kvcellar_engine::policy::{Admission, LoadPolicy};

    const POLICIES: [PolicyName; 2] = [PolicyName::Lru, PolicyName::Adaptive];

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        device: DeviceModel,
    }

    /// Blocks of all prompts, and different ones.
    fn size(source: &WorkloadSource) -> (u64, u64) {
        let (mut all, mut different) = (0, hashbrown::HashSet::new());
        let counted = source.each(&mut |request| {
            all += request.blocks.len() as u64;
            different.extend(request.blocks.iter().copied());
            Ok(())
        });
        counted.expect("a workload");
        (all, different.len() as u64)
    }

    /// Percent of blocks that tiers at full size find.
    fn whole(source: &WorkloadSource, keeper: Keeper, sizes: Sizes) -> f64 {
        let device = Line::parse_from(["device"]).device;
        let account = Account { device, block_tokens: BLOCK_TOKENS, block_bytes: 1 << 20 };
        let choices = Choices {
            admission: Admission::All,
            load_policy: LoadPolicy::Always,
            clean_percent: 50,
            write_budget: None,
            tenants: TenantList::default(),
        };
        let totals = replay(source, &account, keeper, sizes, &choices).expect("a workload");
        (totals.dram_blocks + totals.nvme_blocks) as f64 / totals.blocks as f64 * 100.0
    }

    fn dram(blocks: u64) -> Sizes {
        Sizes { dram_blocks: blocks as u32, nvme_blocks: 0 }
    }

    /// By how many percentage points the what-if is off for one capacity, over samples of a rate:
    /// the root of the mean square and the largest, of now, double and infinite together.
    fn errors(source: &WorkloadSource, policy: PolicyName, sizes: Sizes, truth: [f64; 3], rate: f64) -> (f64, f64) {
        let samples = (0..6_u64).map(|sample| estimate(source, policy, sizes, rate, sample << 40).expect("a workload"));
        let off = |counts: WhatIfCounts| {
            shares(counts).into_iter().zip(truth).map(|(share, truth)| share * 100.0 - truth).collect::<Vec<f64>>()
        };
        let all: Vec<f64> = samples.flat_map(off).collect();
        let mean_square = all.iter().map(|error| error * error).sum::<f64>() / all.len() as f64;
        (mean_square.sqrt(), all.iter().fold(0.0, |most, error| error.abs().max(most)))
    }

    #[test]
    fn at_one_percent_it_is_within_two_points_of_a_recorded_hour() {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/traces/mooncake_conversation_trace.jsonl");
        if !path.is_file() {
            eprintln!("skipped: there is no {}", path.display());
            return;
        }
        let source = WorkloadSource::File { path, block_tokens: BLOCK_TOKENS };
        let (_, different) = size(&source);
        let infinite = whole(&source, Keeper::Infinite, dram(1));
        for policy in POLICIES {
            // 10%, 20% and 40% of the different blocks: 182, 365 and 731 places in the miniatures.
            let found = [10, 20, 40].map(|percent| {
                let sizes = dram(different * percent / 100);
                (sizes, whole(&source, Keeper::Policy(policy), sizes))
            });
            for pair in found.windows(2) {
                let ((sizes, now), (_, double)) = (pair[0], pair[1]);
                let (typical, most) = errors(&source, policy, sizes, [now, double, infinite], 0.01);
                eprintln!("{} {sizes:?}: {typical:.2} points, {most:.2} at most", policy.name());
                assert!(most <= 2.0 && typical <= 0.8, "{}: {typical} points, at most {most}", policy.name());
            }
        }
    }

    #[test]
    fn made_up_conversations_are_estimated_as_well_as_the_sample_allows() {
        let source = WorkloadSource::Made(Synthetic { workload: Workload::Chat, seed: 1, load_percent: 25 });
        let (_, different) = size(&source);
        let infinite = whole(&source, Keeper::Infinite, dram(1));
        for policy in POLICIES {
            let sizes = dram(different / 4);
            let now = whole(&source, Keeper::Policy(policy), sizes);
            let double = whole(&source, Keeper::Policy(policy), dram(u64::from(sizes.dram_blocks) * 2));
            let truth = [now, double, infinite];
            for (rate, bound) in [(0.01, 2.0), (0.1, 1.0)] {
                let (typical, most) = errors(&source, policy, sizes, truth, rate);
                eprintln!("{} {sizes:?} at {rate}: {typical:.2} points, {most:.2} at most", policy.name());
                assert!(most <= bound, "{} at {rate}: {most} points", policy.name());
            }
            // All blocks: both miniatures are whole tiers.
            let counts = estimate(&source, policy, sizes, 1.0, 0).expect("a workload");
            let [same_now, same_double, near_infinite] = shares(counts).map(|share| share * 100.0);
            assert!((same_now - now).abs() < 0.01 && (same_double - double).abs() < 0.01, "{counts:?}: {truth:?}");
            assert!((near_infinite - infinite).abs() < 0.5);
        }
    }

    #[test]
    fn a_disk_counts_as_the_capacity_of_the_larger_tier() {
        let source = WorkloadSource::Made(Synthetic { workload: Workload::Chat, seed: 2, load_percent: 10 });
        let (_, different) = size(&source);
        let tiers = |percent: u64| Sizes {
            dram_blocks: (different / 20) as u32,
            nvme_blocks: (different * percent / 100) as u32,
        };
        let [now, double] = [20, 40].map(|percent| whole(&source, Keeper::Policy(PolicyName::Lru), tiers(percent)));
        let counts = estimate(&source, PolicyName::Lru, tiers(20), 1.0, 0).expect("a workload");
        let found = shares(counts).map(|share| share * 100.0);
        assert!((found[0] - now).abs() < 1.5 && (found[1] - double).abs() < 1.5, "{found:?}: {now}, {double}");
    }
}
