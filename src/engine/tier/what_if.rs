//! What other capacities would find of the requests that are being served: the present one, twice
//! as much, and one without end.
//!
//! Blocks are sampled by their hashes, so that every use of a sampled block is seen (spatial
//! sampling, as in SHARDS). The sample of each ended request goes through two miniatures: the
//! engine's own eviction policy over as small a part of the places. What a miniature missed stands
//! for as many blocks as there are different ones for each different sampled one: `distinct`
//! counts both. So a sample that happens to hold too many blocks is set right. Blocks that are
//! looked up are counted, not sampled; and a cache without end misses each different block once,
//! which is counted over all of them.
//!
//! The error is that of the sampled misses, and of the miniature's own size: with `p` places its
//! capacity is up to 1 / sqrt(p) wrong, and the adaptive policy learns from few blocks less than
//! from many. Bound: at the rate that is chosen ([`rate_for`]), over an hour, 1.5 percentage points
//! for all three, and 0.3 typically; 0.5 for the cache without end. So it was for a recorded hour
//! and six made-up ones, LRU and adaptive, at 2% to 25% of their blocks, beside replays at full
//! size. It does not hold at a cliff: where a few more places begin to hold a whole circle of texts
//! it was up to 3. At a rate of 1%, with 180 places or more, the recorded hour is met within 1.2
//! points; with 20 to 90 places errors are 2 to 6, and larger at a cliff.
//!
//! Counted as looked up are the blocks of a prompt that a hit could have given and that vLLM's own
//! cache did not have; those that it had count as used. Where there is a disk, the capacity is that
//! of the larger tier: what memory holds lies on disk, too, a moment later, so that both together
//! find hardly more. Not modelled: requests beside each other, which find here what the first of
//! them is still computing; failures; which blocks are written to disk at all. Of several groups
//! the first that needs its whole prefix is looked at, with its share of the places.

#![expect(clippy::cast_sign_loss, reason = "counts and shares are not negative")]

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
    /// Different blocks: all, and sampled ones.
    all: Distinct,
    sampled: Distinct,
    request: SampledRequest,
    /// Blocks that both miniatures missed.
    missed: [u64; 2],
    /// Blocks that were looked up for the first time.
    new: f64,
    counts: WhatIfCounts,
    /// The counts when the caches were last emptied.
    before: WhatIfCounts,
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
            missed: [0; 2],
            new: 0.0,
            counts: WhatIfCounts::default(),
            before: WhatIfCounts::default(),
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
        let limit = match &request.controls {
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
        let (mut first, mut last) = (0, 0);
        for (key, at) in keys.zip(0_u32..) {
            let fingerprint = key.fingerprint();
            let is_asked = asked.contains(&at);
            let is_sampled = key.sampling_number() <= sampled_below;
            self.counts.blocks += u64::from(is_asked);
            // What is neither kept nor looked up is seen by no cache.
            if is_asked || uses.is_kept {
                let growth = all.add(fingerprint);
                self.new += if is_asked { growth } else { 0.0 };
                if is_sampled {
                    sampled.add(fingerprint);
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
            let asked = request.asked.len() as u64;
            let hits = [self.now.serve(request), self.double.serve(request)];
            for (missed, hits) in self.missed.iter_mut().zip(hits) {
                *missed += asked - u64::from(hits);
            }
        }
        self.count();
    }

    /// Brings the counts up to date. They never fall, whatever the estimates do.
    fn count(&mut self) {
        let weight = self.weight();
        let [now, double] = self.missed.map(|missed| missed as f64 * weight);
        let Self { counts, before, .. } = self;
        let raise = |count: &mut u64, before: u64, estimate: f64| *count = (*count).max(before + estimate as u64);
        raise(&mut counts.now_misses, before.now_misses, now);
        raise(&mut counts.double_misses, before.double_misses, double);
        raise(&mut counts.infinite_misses, before.infinite_misses, self.new);
    }

    /// Blocks for which a sampled one stands: as the sample has turned out, not as it was meant.
    fn weight(&self) -> f64 {
        // The first few blocks say nothing about that.
        let meant = 1.0 / self.rate;
        (self.all.count() / self.sampled.count().max(1.0)).clamp(meant / 2.0, (meant * 2.0).max(1.0))
    }

    /// All blocks became worthless: what was counted stays.
    pub(super) fn reset(&mut self) {
        let Self { group, share, counts, .. } = *self;
        let empty = Self::sampling(self.policy, self.places, self.rate);
        *self = Self { group, share, counts, before: counts, ..empty };
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::Controls;
    use crate::policy::load::Rates;
    use crate::policy::{Admission, LoadPolicy};
    use crate::tier::replay::{ReplaySettings, TierReplay};
    use crate::tier::requests::FirstHit;
    use crate::tier::reservation::User;
    use kvcellar_block::{BlockHash, GroupIndex, GroupKind};

    const TOKENS: u32 = 16;

    /// A hash whose bytes are as evenly spread as real ones.
    fn hash(number: u64) -> BlockHash {
        let mut bytes = [0; 32];
        let mut state = number + 1;
        for part in bytes.chunks_exact_mut(8) {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mixed = (state ^ state >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
            part.copy_from_slice(&(mixed ^ mixed >> 31).to_le_bytes());
        }
        BlockHash::new(&bytes).expect("32 bytes")
    }

    /// Blocks of the `text`-th text, which shares its first ones with others of its family.
    fn prompt(family: u64, text: u64, shared: u64, own: u64) -> Vec<BlockHash> {
        let begin = (0..shared).map(move |at| hash(family << 32 | at));
        begin.chain((0..own).map(move |at| hash((family << 16 | (text + 1)) << 32 | at))).collect()
    }

    fn keys(hashes: &[BlockHash]) -> impl Iterator<Item = BlockKey> + '_ {
        hashes.iter().map(|hash| BlockKey { hash: *hash, group: GroupIndex(0) })
    }

    fn whole(hashes: &[BlockHash]) -> BlockUses {
        let reach = hashes.len() as u32;
        BlockUses { local: 0, reach, prompt_tokens: reach * TOKENS, is_kept: true }
    }

    fn tier(policy: PolicyName, slots: u32) -> TierReplay {
        TierReplay::new(ReplaySettings {
            slots,
            extents: 0,
            block_tokens: TOKENS,
            block_bytes: 1,
            policy,
            admission: Admission::All,
            load_policy: LoadPolicy::Always,
            rates: Rates::default(),
            clean_percent: 0,
            write_budget: None,
        })
    }

    fn policies() -> impl Strategy<Value = PolicyName> {
        proptest::sample::select(PolicyName::ALL.to_vec())
    }

    proptest! {
        #[test]
        fn with_all_blocks_sampled_it_is_the_tiers_themselves(
            policy in policies(),
            places in 1_u32..24,
            requests in prop::collection::vec((0_u64..4, 0_u64..4, 0_u64..4, 0_u64..6), 1..120),
        ) {
            let mut what_if = WhatIf::sampling(policy, places, 1.0);
            let mut tiers = [tier(policy, places), tier(policy, places * 2)];
            let mut seen = std::collections::HashSet::new();
            let mut truth = WhatIfCounts::default();
            for (family, text, shared, own) in requests {
                let hashes = prompt(family, text, shared, own);
                what_if.serve(keys(&hashes), whole(&hashes));
                let blocks = hashes.len() as u64;
                let missed = |tier: &mut TierReplay| blocks - u64::from(tier.serve(&hashes, blocks as u32 * TOKENS).hits());
                let [now, double] = &mut tiers;
                truth.blocks += blocks;
                truth.now_misses += missed(now);
                truth.double_misses += missed(double);
                truth.infinite_misses += hashes.iter().filter(|hash| seen.insert(**hash)).count() as u64;
                let found = what_if.counts();
                // First uses are counted approximately, from a few thousand on.
                prop_assert!(found.infinite_misses.abs_diff(truth.infinite_misses) <= 1);
                prop_assert_eq!(WhatIfCounts { infinite_misses: truth.infinite_misses, ..found }, truth);
            }
        }
    }

    #[test]
    fn memory_is_bounded_and_small_tiers_are_sampled_whole() {
        for policy in PolicyName::ALL {
            for places in [1, 100, limits::WHAT_IF_PLACES_MIN, 10_000, 400_000, 1 << 30] {
                let rate = rate_for(places);
                let what_if = WhatIf::sampling(policy, places, rate);
                let bytes = what_if.bytes();
                assert!(bytes < 10 << 20, "{policy:?}, {places} places: {bytes} bytes");
                assert!(rate >= limits::WHAT_IF_RATE || places > 1_600_000, "{places} places: {rate}");
                assert!(places > limits::WHAT_IF_PLACES_MIN || rate >= 1.0);
            }
        }
    }

    fn grouping(sizes: &[(GroupKind, u32)]) -> Grouping {
        let spec = |(kind, block_tokens): &(GroupKind, u32)| GroupSpec {
            kind: *kind,
            kind_name: String::new(),
            block_tokens: *block_tokens,
            eagle: false,
        };
        Grouping { groups: sizes.iter().map(spec).collect(), hash_tokens: TOKENS, hit_tokens: 4 * TOKENS }
    }

    fn request(controls: Controls, blocks: u64, local: u32) -> RequestState {
        let mut request = RequestState::new(User { serial: 1, ..User::default() }, controls, "".into(), None);
        request.add_hashes(&prompt(1, 1, 0, blocks));
        request.first_hit = FirstHit { local, dram: 0, nvme: 0 };
        request.counted = true;
        request
    }

    /// Blocks looked up and missed of the second of two equal requests.
    fn again(controls: Controls, local: u32, change: impl Fn(&mut RequestState)) -> (u64, u64) {
        let grouping = grouping(&[(GroupKind::Full, TOKENS)]);
        let mut what_if = WhatIf::new(PolicyName::Lru, 64, &grouping);
        let finished = Finished { prompt: 9 * TOKENS, total: 12 * TOKENS };
        let mut first = request(controls, 12, 0);
        change(&mut first);
        what_if.on_finished(&grouping, &first, finished);
        let before = what_if.counts();
        what_if.on_finished(&grouping, &request(Controls::default(), 12, local), finished);
        let after = what_if.counts();
        (after.blocks - before.blocks, after.now_misses - before.now_misses)
    }

    #[test]
    fn what_a_hit_could_give_is_looked_up() {
        let usual = Controls::default;
        assert_eq!(again(usual(), 0, |_| ()), (8, 0), "a hit ends before the prompt, at a multiple of four blocks");
        assert_eq!(again(usual(), 4 * TOKENS, |_| ()), (4, 0), "vLLM had the first four blocks itself");
        assert_eq!(again(Controls { store: false, ..usual() }, 0, |_| ()), (8, 8), "the first one is not kept");
        assert_eq!(again(usual(), 0, |first| first.tainted = true), (8, 8));
        assert_eq!(again(usual(), 0, |first| first.counted = false), (8, 8), "the first one was never admitted");
        let grouping = grouping(&[(GroupKind::Full, TOKENS)]);
        let mut what_if = WhatIf::new(PolicyName::Lru, 64, &grouping);
        let finished = Finished { prompt: 9 * TOKENS, total: 12 * TOKENS };
        what_if.on_finished(&grouping, &request(Controls { load: false, ..usual() }, 12, 0), finished);
        assert_eq!(what_if.counts().blocks, 0, "it wants nothing of us");
        what_if.on_finished(&grouping, &request(Controls { max_load_tokens: Some(70), ..usual() }, 12, 0), finished);
        assert_eq!(what_if.counts().blocks, 4);
        // The answer of the one is the prompt of the next.
        what_if.on_finished(&grouping, &request(usual(), 12, 0), Finished { prompt: 13 * TOKENS, total: 13 * TOKENS });
        assert_eq!((what_if.counts().blocks, what_if.counts().now_misses), (16, 0));
    }

    #[test]
    fn one_group_has_its_share_of_the_places() {
        let window = GroupKind::SlidingWindow(kvcellar_block::kinds::SlidingWindow { window: 32, extra: 0 });
        let grouping = grouping(&[(window, TOKENS), (GroupKind::Full, TOKENS), (window, TOKENS * 2)]);
        let mut what_if = WhatIf::new(PolicyName::Lru, 1000, &grouping);
        assert_eq!((what_if.group, what_if.places), (1, 400));
        what_if.add_disk(5000);
        assert_eq!((what_if.group, what_if.places, what_if.rate), (1, 2000, 1.0));
        what_if.add_disk(10);
        assert_eq!(what_if.places, 2000, "the larger tier counts");
    }

    #[test]
    fn a_reset_empties_the_caches_and_keeps_the_counts() {
        let hashes = prompt(1, 1, 0, 10);
        let mut what_if = WhatIf::sampling(PolicyName::Adaptive, 100, 1.0);
        what_if.serve(keys(&hashes), whole(&hashes));
        what_if.serve(keys(&hashes), whole(&hashes));
        let all = |blocks, misses| WhatIfCounts {
            blocks,
            now_misses: misses,
            double_misses: misses,
            infinite_misses: misses,
        };
        assert_eq!(what_if.counts(), all(20, 10));
        what_if.reset();
        assert_eq!(what_if.counts(), all(20, 10));
        what_if.serve(keys(&hashes), whole(&hashes));
        assert_eq!(what_if.counts(), all(30, 20), "nothing is found after a reset");
    }

    #[test]
    fn counts_never_fall() {
        let mut what_if = WhatIf::sampling(PolicyName::Lru, 20_000, 0.01);
        let mut before = what_if.counts();
        for text in 0..400 {
            let hashes = prompt(text % 50, text % 120, 10, 20);
            what_if.serve(keys(&hashes), whole(&hashes));
            let now = what_if.counts();
            assert!(now.now_misses >= before.now_misses && now.double_misses >= before.double_misses);
            assert!(now.infinite_misses >= before.infinite_misses && now.blocks == before.blocks + 30);
            before = now;
        }
        assert!(before.now_misses > 0 && before.infinite_misses > 0);
    }
}
