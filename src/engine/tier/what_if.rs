//! What other capacities would find of the requests that are being served: the present one, one
//! with twice the memory, and one without end.
//!
//! Blocks are sampled by their hashes, so that every use of a sampled block is seen (spatial
//! sampling, as in SHARDS). The sample of each ended request goes through two miniatures: the
//! engine's own eviction policy over as small a part of the places. Three parts are counted
//! differently, each as exactly as it can be in little memory:
//!
//! - blocks that are looked up: all of them, not only the sampled ones;
//! - blocks that no cache can have, because they come for the first time: [`Distinct`] counts them
//!   over all blocks. A cache without end misses just these;
//! - blocks that were there before and are missed because the cache is too small: a sampled one
//!   stands for 1 / rate.
//!
//! So the error is that of the sampled misses of the last kind. Where a share `c` of the blocks that
//! are looked up is missed for lack of places, and `s` sampled ones are looked up, its standard
//! deviation is about sqrt(c / s): with 3,000 of them, and a tenth missed so, 0.6 percentage points.
//! That of first uses is 0.4 points at most. A miniature of `p` places has its capacity up to about
//! 1 / sqrt(p) wrong, and the adaptive policy learns from few blocks less than from many:
//! [`rate_for`] gives it thousands. `src/simulate/what_if.rs` compares all of it with replays at
//! full size.
//!
//! Counted as looked up are the blocks of a prompt that a hit could have given and that vLLM's own
//! cache did not have; those that it had count as used. Where there is a disk, the capacity is that
//! of the larger tier: what memory holds lies on disk, too, a moment later, so that both together
//! find hardly more. Not modelled: requests beside each other, which find here what the first of
//! them is still computing; failures; which blocks are written to disk at all. Of several groups
//! the first that needs its whole prefix is looked at, with its share of the places.

use super::distinct::Distinct;
use super::miniature::{Miniature, SampledRequest};
use super::requests::{Finished, RequestState};
use crate::limits;
use crate::metrics::WhatIfCounts;
use crate::policy::PolicyName;
use kvcellar_block::{BlockKey, GroupSpec, Grouping};

/// How a request uses its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockUses {
    /// The first blocks, which vLLM's own cache has.
    pub local: u32,
    /// The block behind the last one that a hit could give.
    pub reach: u32,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// The blocks are kept.
    pub is_kept: bool,
}

/// The miniatures, and what they found.
pub struct WhatIf {
    policy: PolicyName,
    places: u32,
    rate: f64,
    /// The group that is looked at, and its share of all places.
    group: usize,
    share: f64,
    now: Miniature,
    double: Miniature,
    /// First uses: of all blocks, and of sampled ones.
    all: Distinct,
    sampled: Distinct,
    request: SampledRequest,
    blocks: u64,
    first_uses: f64,
    /// Misses of both miniatures that were no first uses, each for as many as it stands for.
    repeated: [f64; 2],
    counts: WhatIfCounts,
}

/// The share of blocks that is sampled for so many places: a hundredth, more where the miniature
/// would have fewer than [`limits::WHAT_IF_PLACES_MIN`] places, less where it would have more than
/// [`limits::WHAT_IF_PLACES_MAX`].
pub fn rate_for(places: u32) -> f64 {
    let places = f64::from(places.max(1));
    let least = f64::from(limits::WHAT_IF_PLACES_MIN) / places;
    least.max(limits::WHAT_IF_RATE).min(f64::from(limits::WHAT_IF_PLACES_MAX) / places).min(1.0)
}

impl WhatIf {
    /// Nothing was seen yet of a model with these groups, whose tier has so many places.
    pub fn new(policy: PolicyName, places: u32, grouping: &Grouping) -> Self {
        let group = grouping.groups.iter().position(GroupSpec::needs_whole_prefix).unwrap_or(0);
        let per_token = |spec: &GroupSpec| 1.0 / f64::from(spec.block_tokens.max(1));
        let all: f64 = grouping.groups.iter().map(per_token).sum();
        let share = grouping.groups.get(group).map_or(1.0, |spec| per_token(spec) / all);
        let of_group = part(places, share);
        Self { group, share, ..Self::sampling(policy, of_group, rate_for(of_group)) }
    }

    /// As [`Self::new`], of one group, with a rate that is given.
    pub fn sampling(policy: PolicyName, places: u32, rate: f64) -> Self {
        let miniature = |of: u32| Miniature::new(policy, part(of, rate).max(1), of);
        Self {
            policy,
            places,
            rate,
            group: 0,
            share: 1.0,
            now: miniature(places),
            double: miniature(places.saturating_mul(2)),
            all: Distinct::new(limits::WHAT_IF_REGISTER_BITS),
            sampled: Distinct::new(limits::WHAT_IF_REGISTER_BITS),
            request: SampledRequest::default(),
            blocks: 0,
            first_uses: 0.0,
            repeated: [0.0; 2],
            counts: WhatIfCounts::default(),
        }
    }

    /// There is a disk with so many extents for blocks of all groups. Nothing was served yet.
    pub(super) fn add_disk(&mut self, extents: u32) {
        let Self { group, share, .. } = *self;
        let places = self.places.max(part(extents, share));
        *self = Self { group, share, ..Self::sampling(self.policy, places, rate_for(places)) };
    }

    /// A request has ended. One that vLLM never admitted used nothing.
    pub(super) fn on_finished(&mut self, grouping: &Grouping, request: &RequestState, finished: Finished) {
        if !request.counted {
            return;
        }
        let Some(spec) = grouping.groups.get(self.group) else { return };
        let blocks = |tokens: u32| tokens / spec.block_tokens;
        let local = request.first_hit.local;
        let limit = match request.controls {
            controls if !controls.load => local,
            controls => local.saturating_add(controls.max_load_tokens.unwrap_or(u32::MAX)),
        };
        let uses = BlockUses {
            local: blocks(local),
            reach: blocks(grouping.hit_limit(finished.prompt).min(limit)),
            prompt_tokens: finished.prompt,
            is_kept: request.controls.store && !request.tainted,
        };
        self.serve(request.keys(grouping, self.group, 0, blocks(finished.total)), uses);
    }

    /// Serves a request with these blocks, in the order of its tokens.
    pub fn serve(&mut self, keys: impl Iterator<Item = BlockKey>, uses: BlockUses) {
        let sampled_below = if self.rate >= 1.0 { u64::MAX } else { (self.rate * u64::MAX as f64) as u64 };
        let Self { all, sampled, request, .. } = self;
        let asked = uses.local..uses.reach;
        request.fingerprints.clear();
        let (mut first, mut last, mut sampled_first_uses) = (0, 0, 0.0);
        for (key, at) in keys.zip(0_u32..) {
            let fingerprint = key.fingerprint();
            let is_asked = asked.contains(&at);
            let is_sampled = key.sampling_number() <= sampled_below;
            self.blocks += u64::from(is_asked);
            // What is neither kept nor looked up is seen by no cache.
            if is_asked || uses.is_kept {
                let growth = all.add(fingerprint);
                let sampled_growth = if is_sampled { sampled.add(fingerprint) } else { 0.0 };
                if is_asked {
                    self.first_uses += growth;
                    sampled_first_uses += sampled_growth;
                }
            }
            if is_sampled {
                request.fingerprints.push(fingerprint);
                first += usize::from(at < asked.start);
                last += usize::from(at < asked.end);
            }
        }
        request.asked = first.min(last)..last;
        request.serial = request.serial.wrapping_add(1).max(1);
        (request.prompt_tokens, request.is_kept) = (uses.prompt_tokens, uses.is_kept);
        if !request.fingerprints.is_empty() {
            let asked = request.asked.len() as f64;
            let hits = [self.now.serve(request), self.double.serve(request)];
            for (repeated, hits) in self.repeated.iter_mut().zip(hits) {
                *repeated += (asked - f64::from(hits) - sampled_first_uses) / self.rate;
            }
        }
        self.count();
    }

    /// Brings the counts up to date. They never fall, whatever the estimates do.
    fn count(&mut self) {
        let WhatIfCounts { blocks, now_misses, double_misses, infinite_misses } = &mut self.counts;
        *blocks = self.blocks;
        let [now, double] = self.repeated.map(|repeated| self.first_uses + repeated);
        for (count, estimate) in [(now_misses, now), (double_misses, double), (infinite_misses, self.first_uses)] {
            *count = (*count).max(estimate as u64);
        }
    }

    /// All blocks became worthless: what was counted stays.
    pub(super) fn reset(&mut self) {
        let Self { group, share, blocks, first_uses, repeated, counts, .. } = *self;
        let empty = Self::sampling(self.policy, self.places, self.rate);
        *self = Self { group, share, blocks, first_uses, repeated, counts, ..empty };
    }

    /// What was found so far.
    pub fn counts(&self) -> WhatIfCounts {
        self.counts
    }

    /// Bytes of memory taken.
    pub fn bytes(&self) -> usize {
        self.now.bytes() + self.double.bytes() + self.all.bytes() + self.sampled.bytes()
    }
}

/// A share of a number of places.
fn part(places: u32, share: f64) -> u32 {
    (f64::from(places) * share).round() as u32
}
