//! Bounds: what no policy can exceed.
//!
//! *Belady* knows the future. It keeps the blocks that are used again soonest, and does not take a
//! block that is used again later than all of them or never (bypass). A prefix never goes before
//! its suffix: of blocks that are used again by the same request the later ones in a prompt go
//! first, and a suffix is never used again before its prefix. It is the best single tier for hits
//! in blocks without regard to prefixes; with them, close to it. *Infinite* keeps everything.

use std::collections::BTreeSet;

use hashbrown::HashMap;

use super::account::{Account, Totals};
use super::trace::WorkloadSource;
use kvcellar_block::error::Result;

/// Never used again.
const NEVER: u32 = u32::MAX;

/// For each use of a block, in the order of the trace, the request that uses it next.
fn next_uses(source: &WorkloadSource) -> Result<Vec<u32>> {
    let mut next = Vec::new();
    let mut last: HashMap<u64, usize> = HashMap::new();
    let mut number = 0;
    source.each(&mut |request| {
        for block in &request.blocks {
            if let Some(before) = last.insert(*block, next.len()) {
                next[before] = number;
            }
            next.push(NEVER);
        }
        number += 1;
        Ok(())
    })?;
    Ok(next)
}

/// What a clairvoyant cache of so many blocks hits; `None`: an infinite one.
///
/// # Errors
/// Those of the source.
pub fn replay(source: &WorkloadSource, account: &Account, capacity: Option<u64>) -> Result<Totals> {
    let next = next_uses(source)?;
    let mut totals = Totals::default();
    // By next use and number in the prompt.
    let mut order: BTreeSet<(u32, u32, u64)> = BTreeSet::new();
    let mut held: HashMap<u64, (u32, u32)> = HashMap::new();
    let mut use_number = 0;
    source.each(&mut |request| {
        let hits = request.blocks.iter().take_while(|block| held.contains_key(*block)).count();
        account.add(&mut totals, request, hits as u32, 0);
        let before = held.len();
        for (block, number) in request.blocks.iter().zip(0_u32..) {
            let soon = next[use_number];
            use_number += 1;
            if let Some((soon, number)) = held.remove(block) {
                order.remove(&(soon, number, *block));
            }
            if soon == NEVER && capacity.is_some() {
                continue;
            }
            held.insert(*block, (soon, number));
            order.insert((soon, number, *block));
            if capacity.is_some_and(|capacity| order.len() as u64 > capacity)
                && let Some((_, _, gone)) = order.pop_last()
            {
                held.remove(&gone);
            }
        }
        totals.stored += (held.len() as u64).saturating_sub(before as u64);
        Ok(())
    })?;
    Ok(totals)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceModel;

    const DEVICE: DeviceModel = DeviceModel {
        prefill_rate: 1e4,
        attention_tokens: 1e5,
        dram_rate: 50.0,
        nvme_rate: 7.0,
        dram_latency: 0.5,
        nvme_latency: 2.0,
    };

    /// Blocks found by a cache of so many.
    fn hits(prompts: &[&[u64]], capacity: Option<u64>) -> u64 {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let line = |blocks: &&[u64]| {
            let tokens = 512 * blocks.len();
            format!("{{\"timestamp\":0,\"input_length\":{tokens},\"output_length\":1,\"hash_ids\":{blocks:?}}}\n")
        };
        std::fs::write(file.path(), prompts.iter().map(line).collect::<String>()).expect("written");
        let source = WorkloadSource::File { path: file.path().to_owned(), block_tokens: 512 };
        let account = Account { device: DEVICE, block_tokens: 512, block_bytes: 1 };
        replay(&source, &account, capacity).expect("a trace").dram_blocks
    }

    #[test]
    fn a_circle_that_does_not_fit_is_kept_in_part() {
        let circle: [&[u64]; 9] = [&[1], &[2], &[3], &[1], &[2], &[3], &[1], &[2], &[3]];
        assert_eq!(hits(&circle, None), 6);
        assert_eq!(hits(&circle, Some(3)), 6);
        assert_eq!(hits(&circle, Some(2)), 4);
        assert_eq!(hits(&circle, Some(1)), 2);
    }

    #[test]
    fn a_prefix_outlives_its_suffix() {
        // Both prompts come again, but there is room for two of three blocks.
        assert_eq!(hits(&[&[1, 2, 3], &[1, 2, 3]], Some(2)), 2);
        assert_eq!(hits(&[&[1, 2], &[9], &[1, 2]], Some(1)), 1);
    }
}
