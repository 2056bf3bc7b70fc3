//! What a hit is: how far a request can resume from the dram tier.

use super::residency::Residency;
use crate::block::{BlockHash, GroupIndex, Grouping};

/// The token at which a request may resume, at most `limit`; `local` when the tier adds nothing to vLLM's own hit.
///
/// `hashes`: the request's block hashes. `local`: tokens vLLM holds itself, a multiple of every group's block size. Full-attention groups need every
/// block in `[local, n)`, sliding-window groups the blocks their window before n touches, draft-model groups one block more. Shrinking
/// n for one group is checked again for all sliding-window groups; full groups stay satisfied when n shrinks.
pub fn resume_at(residency: &Residency, grouping: &Grouping, hashes: &[BlockHash], local: u32, limit: u32) -> u32 {
    let covered = (hashes.len() as u64 * u64::from(grouping.hash_tokens)).min(u64::from(u32::MAX)) as u32;
    let mut end = align(limit.min(covered), grouping);
    for (index, group) in grouping.groups.iter().enumerate() {
        if group.tail_blocks().is_some() || end <= local {
            continue;
        }
        let tokens = group.block_tokens;
        let (first, last) = (local / tokens, end / tokens);
        let wanted = last - first + u32::from(group.eagle);
        let run = run_from(residency, grouping, hashes, index, first, wanted);
        let usable = run.min(wanted).saturating_sub(u32::from(group.eagle));
        end = end.min(align((first + usable) * tokens, grouping));
    }
    loop {
        let before = end;
        for (index, group) in grouping.groups.iter().enumerate() {
            if let Some(tail) = group.tail_blocks() {
                end = shrink_to_window(residency, grouping, hashes, index, tail, local, end);
            }
        }
        if end == before || end <= local {
            return end.max(local);
        }
    }
}

fn align(tokens: u32, grouping: &Grouping) -> u32 {
    tokens - tokens % grouping.hit_tokens
}

fn run_from(
    residency: &Residency,
    grouping: &Grouping,
    hashes: &[BlockHash],
    group: usize,
    first: u32,
    count: u32,
) -> u32 {
    let step = (grouping.groups[group].block_tokens / grouping.hash_tokens) as usize;
    let start = grouping.hash_index(group, first);
    let end = hashes.len().min(start + (count as usize).saturating_sub(1) * step + 1);
    if count == 0 || start >= end {
        return 0;
    }
    residency.visible_run(&hashes[start..end], step, GroupIndex(group as u16)) as u32
}

/// The largest end at or below `end` whose window is there for this group; `local` when there is none above it.
fn shrink_to_window(
    residency: &Residency,
    grouping: &Grouping,
    hashes: &[BlockHash],
    group: usize,
    tail: u32,
    local: u32,
    mut end: u32,
) -> u32 {
    let spec = &grouping.groups[group];
    let tokens = spec.block_tokens;
    while end > local {
        let last = end / tokens + u32::from(spec.eagle);
        // Blocks below vLLM's own hit are in vLLM's window already.
        let first = (end / tokens).saturating_sub(tail).max(local / tokens);
        // From the right: the first gap found is the one that moves the end furthest.
        let gap = (first..last).rev().find(|block| {
            let hash = hashes.get(grouping.hash_index(group, *block));
            hash.is_none_or(|hash| residency.visible_run(std::slice::from_ref(hash), 1, GroupIndex(group as u16)) == 0)
        });
        match gap {
            None => return end,
            // The window must not contain the gap; for a draft group neither may the block after the end.
            Some(block) => {
                let below = align((block.saturating_sub(u32::from(spec.eagle))) * tokens, grouping);
                end = below.min(end - grouping.hit_tokens);
            }
        }
    }
    local
}
