//! The end of a request: its prefix is made to outlive its suffix.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::requests::{Finished, RequestState};
use super::residency::Residency;
use super::trace::{self, OperationLog, names};
use kvcellar_block::{GroupIndex, Grouping, SlotIndex};

/// Orders the blocks of a request that has ended, once none of its offloads is under way: its
/// prefix outlives its suffix, and what no future hit is likely to need goes first.
pub(super) fn retire(
    dram: &mut Residency,
    log: &mut OperationLog,
    grouping: &Grouping,
    id: &str,
    request: &RequestState,
    Finished { prompt, total }: Finished,
) {
    let (mut warm, mut cold) = (Vec::new(), Vec::new());
    let mut found = Vec::new();
    for (group, spec) in grouping.groups.iter().enumerate() {
        let blocks = total / spec.block_tokens;
        let step = (spec.block_tokens / grouping.hash_tokens) as usize;
        let start = grouping.hash_index(group, 0);
        let end = request.hashes.len().min(start + (blocks as usize).saturating_sub(1) * step + 1);
        if blocks == 0 || start >= end {
            continue;
        }
        found.clear();
        dram.find_all(&request.hashes[start..end], step, GroupIndex(group as u16), &mut found);
        for (block, held) in found.iter().enumerate() {
            let Some((slot, true)) = held else { continue };
            // Future prompts most likely continue this one, from the end of its prompt or of its
            // answer.
            let needed = [prompt, total].into_iter().any(|tokens| {
                let end = grouping.hit_limit(tokens);
                let last = end / spec.block_tokens + u32::from(spec.eagle);
                (spec.first_needed(end)..last).contains(&(block as u32)) || spec.needs_whole_prefix()
            });
            if needed { warm.push(*slot) } else { cold.push(*slot) }
        }
    }
    log.record(|| {
        let unpinned = |slots: &[SlotIndex]| {
            names(slots.iter().filter(|slot| dram.pins(**slot) == 0).filter_map(|slot| dram.key(*slot)))
        };
        trace::line("retire", &[("req", Value::from(id)), ("keys", unpinned(&warm)), ("cold", unpinned(&cold))])
    });
    dram.touch(&warm, request.user());
    if let Some(until) =
        request.controls.pin_s.and_then(|seconds| Instant::now().checked_add(Duration::from_secs(seconds)))
    {
        let kept = dram.keep(&warm, until);
        dram.counters.pins_refused += (warm.len() - kept) as u64;
    }
    for slot in cold.iter().rev() {
        dram.cool(*slot);
    }
}
