//! What the live what-if of an engine would say of a workload.

use super::replay::{Sizes, hash};
use super::trace::WorkloadSource;
use kvcellar_block::error::Result;
use kvcellar_block::{BlockKey, GroupIndex};
use kvcellar_engine::metrics::WhatIfCounts;
use kvcellar_engine::policy::PolicyName;
use kvcellar_engine::tier::what_if::{BlockUses, WhatIf};

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

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::account::Account;
    use crate::device::DeviceModel;
    use crate::replay::{Choices, Keeper, replay};
    use crate::synthetic::{BLOCK_TOKENS, Synthetic, Workload};
    use kvcellar_engine::policy::{Admission, LoadPolicy};

    #[test]
    #[ignore]
    fn experiment() {
        let trace = Path::new(env!("CARGO_MANIFEST_DIR")).join("/work/shared/traces/mooncake_conversation_trace.jsonl");
        let mut sources = vec![WorkloadSource::File { path: trace, block_tokens: 512 }];
        for w in Workload::ALL { sources.push(WorkloadSource::Made(Synthetic { workload: w, seed: 1, load_percent: 100 })); }
        let choices = Choices { admission: Admission::All, load_policy: LoadPolicy::Always, clean_percent: 50 };
        #[derive(Debug, clap::Parser)]
        struct Line { #[command(flatten)] device: DeviceModel }
        let device = <Line as clap::Parser>::parse_from(["x"]).device;
        let account = Account { device, block_tokens: 512, block_bytes: 1 << 20 };
        for source in &sources {
            let mut set = std::collections::HashSet::new();
            let mut n = 0u64;
            source.each(&mut |r| { n += r.blocks.len() as u64; set.extend(r.blocks.iter().copied()); Ok(()) }).unwrap();
            let d = set.len() as u64;
            println!("{} blocks {n} different {d}", source.name());
            let full = |keeper, dram: u32, nvme: u32| {
                let t = replay(source, &account, keeper, Sizes { dram_blocks: dram, nvme_blocks: nvme }, choices).unwrap();
                (t.dram_blocks + t.nvme_blocks) as f64 / t.blocks as f64 * 100.0
            };
            let inf = full(Keeper::Infinite, 1, 0);
            let mut cases = vec![];
            for pc in [2u64, 5, 10, 25] { cases.push(((d * pc / 100) as u32, 0u32)); }
            cases.push(((d * 5 / 100) as u32, (d * 20 / 100) as u32));
            cases.push(((d * 2 / 100) as u32, (d * 5 / 100) as u32));
            for policy in [PolicyName::Lru, PolicyName::Adaptive] {
                for (dram, nvme) in &cases {
                    let now = full(Keeper::Policy(policy), *dram, *nvme);
                    let double = full(Keeper::Policy(policy), *dram * if *nvme == 0 { 2 } else { 1 }, *nvme * 2);
                    for rate in [0.01, kvcellar_engine::tier::what_if::rate_for((*dram).max(*nvme)), 1.0] {
                        let mut e = [vec![], vec![], vec![], vec![]];
                        for seed in 0..(if rate == 1.0 { 1 } else { 12u64 }) {
                            let c = estimate(source, policy, Sizes { dram_blocks: *dram, nvme_blocks: *nvme }, rate, seed << 40).unwrap();
                            let h = |m: u64| 100.0 - m as f64 / c.blocks as f64 * 100.0;
                            e[0].push(h(c.now_misses) - now);
                            e[1].push(h(c.double_misses) - double);
                            e[2].push(h(c.infinite_misses) - inf);
                            e[3].push(h(c.double_misses) - h(c.now_misses) - double + now);
                        }
                        let f = |v: &Vec<f64>| { let m = v.iter().sum::<f64>() / v.len() as f64; let r = (v.iter().map(|x| x * x).sum::<f64>() / v.len() as f64).sqrt(); let w = v.iter().map(|x| x.abs()).fold(0.0, f64::max); format!("mean {m:+.2} rms {r:.2} max {w:.2}") };
                        println!("  {} {dram}+{nvme} ({now:.1}/{double:.1}/{inf:.1}) rate {rate}: now {} | double {} | inf {} | gain {}", policy.name(), f(&e[0]), f(&e[1]), f(&e[2]), f(&e[3]));
                    }
                }
            }
        }
    }
}
