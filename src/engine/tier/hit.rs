//! What a hit is: how far a request can resume from our tiers.

use super::extents::Extents;
use super::residency::Residency;
use kvcellar_block::{BlockHash, GroupIndex, Grouping};

/// Where blocks may be found.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// The dram tier.
    pub residency: &'a Residency,
    /// The nvme tier, when it counts.
    pub extents: Option<&'a Extents>,
}

impl Sources<'_> {
    /// Number of consecutive blocks that either tier holds: every `step`-th hash, starting with the
    /// first.
    fn run(self, hashes: &[BlockHash], step: usize, group: GroupIndex) -> usize {
        let wanted = hashes.len().div_ceil(step);
        let mut run = self.residency.visible_run(hashes, step, group);
        let Some(extents) = self.extents else { return run };
        while run < wanted {
            let below = extents.run(&hashes[run * step..], step, group);
            if below == 0 {
                break;
            }
            run += below;
            if run < wanted {
                run += self.residency.visible_run(&hashes[run * step..], step, group);
            }
        }
        run
    }
}

/// The token at which a request may resume, at most `limit`; `local` when the tiers add nothing to
/// vLLM's own hit.
///
/// `hashes`: the request's block hashes. `local`: tokens vLLM holds itself, a multiple of every
/// group's block size. A group needs the blocks in `[local, n)` that its kind names, and one of a
/// draft model one block more. Groups that need the whole prefix stay satisfied when n shrinks; all
/// others are looked at again.
pub fn resume_at(sources: Sources<'_>, grouping: &Grouping, hashes: &[BlockHash], local: u32, limit: u32) -> u32 {
    let covered = (hashes.len() as u64 * u64::from(grouping.hash_tokens)).min(u64::from(u32::MAX)) as u32;
    let mut end = align(limit.min(covered), grouping);
    for (index, group) in grouping.groups.iter().enumerate() {
        if !group.needs_whole_prefix() || end <= local {
            continue;
        }
        let tokens = group.block_tokens;
        let (first, last) = (local / tokens, end / tokens);
        let wanted = last - first + u32::from(group.eagle);
        let run = run_from(sources, grouping, hashes, index, first, wanted);
        let usable = run.min(wanted).saturating_sub(u32::from(group.eagle));
        end = end.min(align((first + usable) * tokens, grouping));
    }
    loop {
        let before = end;
        for (index, group) in grouping.groups.iter().enumerate() {
            if !group.needs_whole_prefix() {
                end = shrink_to_what_is_there(sources, grouping, hashes, index, local, end);
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
    sources: Sources<'_>,
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
    sources.run(&hashes[start..end], step, GroupIndex(group as u16)) as u32
}

/// The largest end at or below `end` for which this group's blocks are there; `local` when there is
/// none above it.
fn shrink_to_what_is_there(
    sources: Sources<'_>,
    grouping: &Grouping,
    hashes: &[BlockHash],
    group: usize,
    local: u32,
    mut end: u32,
) -> u32 {
    let spec = &grouping.groups[group];
    let tokens = spec.block_tokens;
    while end > local {
        let last = end / tokens + u32::from(spec.eagle);
        // What lies below its own hit vLLM has already.
        let first = spec.first_needed(end).max(local / tokens);
        // From the right: the first gap found is the one that moves the end furthest.
        let gap = (first..last).rev().find(|block| {
            let hash = hashes.get(grouping.hash_index(group, *block));
            hash.is_none_or(|hash| sources.run(std::slice::from_ref(hash), 1, GroupIndex(group as u16)) == 0)
        });
        match gap {
            None => return end,
            // No end between the gap and this one can do without the block: what a kind needs
            // begins ever later as ends grow. For a draft group, the block after the end must be
            // there, too.
            Some(block) => {
                let below = align((block.saturating_sub(u32::from(spec.eagle))) * tokens, grouping);
                end = below.min(end - grouping.hit_tokens);
            }
        }
    }
    local
}
