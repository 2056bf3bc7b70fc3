//! All size arithmetic: groups, rank parts, and where each part lies in a slot.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::key::GroupIndex;
use crate::kinds::GroupKind;
use crate::limits;

/// One KV cache group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupSpec {
    /// See [`GroupKind`].
    pub kind: GroupKind,
    /// vLLM's name of the kind, for events.
    pub kind_name: String,
    /// Tokens of one block.
    pub block_tokens: u32,
    /// The group belongs to a draft model: the block after a hit's end must be there too.
    pub eagle: bool,
}

impl GroupSpec {
    /// The first block that a request needs which resumes at `end` tokens.
    #[inline]
    pub fn first_needed(&self, end: u32) -> u32 {
        self.kind.rule().first_needed(end, self.block_tokens)
    }

    /// A request needs every block before its end.
    #[inline]
    pub fn needs_whole_prefix(&self) -> bool {
        self.kind.rule().needs_whole_prefix()
    }

    /// Whether any hit needs this block. Hits end at multiples of `hit_tokens`, and what a kind
    /// needs begins ever later as ends grow: the first end that the block lies before decides.
    #[inline]
    pub fn is_ever_needed(&self, block: u32, hit_tokens: u32) -> bool {
        let (start, end) = (block * self.block_tokens, (block + 1) * self.block_tokens);
        block >= self.first_needed(end.next_multiple_of(hit_tokens)) || (self.eagle && start.is_multiple_of(hit_tokens))
    }

    /// Blocks that a request needs which goes on at `end` tokens and has what is before `from`.
    pub fn blocks_needed(&self, from: u32, end: u32) -> u32 {
        (end / self.block_tokens).saturating_sub(self.first_needed(end).max(from / self.block_tokens))
    }
}

/// All groups of the model, with the granularity of hashes and hits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grouping {
    /// The groups, in vLLM's order.
    pub groups: Vec<GroupSpec>,
    /// Tokens one element of `request.block_hashes` covers.
    pub hash_tokens: u32,
    /// Granularity of a hit: a multiple of every group's block size.
    pub hit_tokens: u32,
}

impl Grouping {
    /// Checks the relations everything else relies on.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when sizes do not divide, or a bound of [`limits`] is passed.
    pub fn check(&self) -> Result<()> {
        let refuse = |why: String| {
            Err(Error::Unsupported {
                what: "this model's KV cache layout".to_owned(),
                why,
                remedy: "Set \"unsupported_groups\": \"bypass\" to serve without KV Cellar".to_owned(),
            })
        };
        if self.groups.is_empty() || self.groups.len() > limits::GROUPS_MAX {
            return refuse(format!("it has {} KV cache groups", self.groups.len()));
        }
        for (index, group) in self.groups.iter().enumerate() {
            let tokens = group.block_tokens;
            let fits = tokens > 0
                && tokens <= limits::BLOCK_TOKENS_MAX
                && self.hash_tokens > 0
                && tokens.is_multiple_of(self.hash_tokens)
                && self.hit_tokens.is_multiple_of(tokens);
            if !fits {
                return refuse(format!(
                    "group {index} has blocks of {tokens} tokens, hashes cover {} and hits end at multiples of {}",
                    self.hash_tokens, self.hit_tokens
                ));
            }
        }
        Ok(())
    }

    /// Index into `request.block_hashes` of the hash that names block `block` of `group`.
    #[inline]
    pub fn hash_index(&self, group: usize, block: u32) -> usize {
        let per_block = (self.groups[group].block_tokens / self.hash_tokens) as usize;
        (block as usize + 1) * per_block - 1
    }

    /// The last token at which a hit of a request of `tokens` tokens may end: at least one token
    /// stays to compute.
    pub fn hit_limit(&self, tokens: u32) -> u32 {
        let below = tokens.saturating_sub(1);
        below - below % self.hit_tokens
    }
}

/// Where one rank's bytes of a block lie in a slot's payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankPart {
    /// Per group: writes its part when a block is offloaded. Of ranks with identical bytes only the
    /// first does, and a rank without bytes does not.
    pub writes: Vec<bool>,
    /// Per group: offset of the part in the payload and its length, in bytes.
    pub spans: Vec<(u64, u64)>,
}

impl RankPart {
    /// Whether this rank writes a part of the group's blocks.
    #[inline]
    pub fn writes(&self, group: GroupIndex) -> bool {
        self.writes.get(usize::from(group.0)).is_some_and(|writes| *writes)
    }

    /// Whether this rank writes a part of any group's blocks.
    pub fn writes_any(&self) -> bool {
        self.writes.contains(&true)
    }
}

/// Sizes of a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotGeometry {
    /// Bytes of the descriptor pages at the slot's start, a multiple of [`limits::SLOT_ALIGN`].
    pub descriptor_bytes: u64,
    /// Bytes from one slot to the next, a multiple of [`limits::SLOT_ALIGN`].
    pub slot_bytes: u64,
    /// Per group: payload bytes of a block over all ranks.
    pub payload_bytes: Vec<u64>,
    /// Per rank, in rank order.
    pub parts: Vec<RankPart>,
}

/// What one rank says about its part of a block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankBytes {
    /// Per group: bytes of one block on this rank; 0 where it has none of the group's layers.
    pub block_bytes: Vec<u64>,
    /// Per group: an earlier rank whose bytes are identical, if any.
    pub replica_of: Vec<Option<u32>>,
}

impl SlotGeometry {
    /// Lays rank parts one after another, and sizes the descriptor for the largest block.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for too many ranks, ranks that disagree about groups, or a replica of
    /// a later rank.
    pub fn lay_out(grouping: &Grouping, ranks: &[RankBytes]) -> Result<Self> {
        let refuse = |why: String| Error::Unsupported {
            what: "this set of ranks".to_owned(),
            why,
            remedy: "Run fewer ranks for each engine, or serve without KV Cellar".to_owned(),
        };
        if ranks.is_empty() || ranks.len() > limits::RANKS_MAX {
            return Err(refuse(format!("it has {} ranks and at most {} are possible", ranks.len(), limits::RANKS_MAX)));
        }
        let group_count = grouping.groups.len();
        let mut ends = vec![0_u64; group_count];
        let mut parts: Vec<RankPart> = Vec::with_capacity(ranks.len());
        for (rank, bytes) in ranks.iter().enumerate() {
            if bytes.block_bytes.len() != group_count || bytes.replica_of.len() != group_count {
                return Err(refuse(format!(
                    "rank {rank} has {} KV cache groups, not {group_count}",
                    bytes.block_bytes.len()
                )));
            }
            let mut part = RankPart { writes: Vec::with_capacity(group_count), spans: Vec::with_capacity(group_count) };
            for (group, (len, twin)) in bytes.block_bytes.iter().zip(&bytes.replica_of).enumerate() {
                let Some(twin) = twin else {
                    part.writes.push(*len > 0);
                    part.spans.push((ends[group], *len));
                    ends[group] += len;
                    continue;
                };
                let first =
                    parts.get(*twin as usize).ok_or_else(|| refuse(format!("rank {rank} copies rank {twin}")))?;
                if first.spans[group].1 != *len {
                    return Err(refuse(format!(
                        "rank {rank} should hold the bytes of rank {twin} in group {group} but their sizes differ"
                    )));
                }
                part.writes.push(false);
                part.spans.push(first.spans[group]);
            }
            parts.push(part);
        }
        if let Some(group) = ends.iter().position(|end| *end == 0) {
            return Err(refuse(format!("no rank has layers of KV cache group {group}")));
        }
        let tokens = grouping.groups.iter().map(|group| u64::from(group.block_tokens)).max().unwrap_or(0);
        let descriptor =
            super::descriptor::body_offset(ranks.len()) as u64 + 4 * tokens + limits::DESCRIPTOR_EXTRA_BYTES;
        let descriptor_bytes = descriptor.next_multiple_of(limits::SLOT_ALIGN);
        let payload = ends.iter().copied().max().unwrap_or(0);
        Ok(Self {
            descriptor_bytes,
            slot_bytes: descriptor_bytes + payload.next_multiple_of(limits::SLOT_ALIGN),
            payload_bytes: ends,
            parts,
        })
    }

    /// Bits of all ranks that write a block of `group`.
    #[inline]
    pub fn writers(&self, group: GroupIndex) -> u64 {
        let writing = self.parts.iter().enumerate().filter(|(_, part)| part.writes(group));
        writing.fold(0, |mask, (rank, _)| mask | 1 << rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::{ChunkedLocal, SlidingWindow};

    fn grouping(kinds: &[GroupKind], block_tokens: u32) -> Grouping {
        let groups =
            kinds.iter().map(|kind| GroupSpec { kind: *kind, kind_name: String::new(), block_tokens, eagle: false });
        Grouping { groups: groups.collect(), hash_tokens: block_tokens, hit_tokens: block_tokens }
    }

    #[test]
    fn a_hit_leaves_at_least_one_token() {
        let full = grouping(&[GroupKind::Full], 16);
        assert_eq!([0, 1, 16, 17, 32, 33].map(|tokens| full.hit_limit(tokens)), [0, 0, 0, 16, 16, 32]);
    }

    #[test]
    fn blocks_that_no_hit_needs_are_known() {
        let needed = |kind, block_tokens, eagle| {
            let spec = GroupSpec { kind, kind_name: String::new(), block_tokens, eagle };
            (0..8).filter(|block| spec.is_ever_needed(*block, 16)).collect::<Vec<u32>>()
        };
        let window = |window| GroupKind::SlidingWindow(SlidingWindow { window, extra: 0 });
        assert_eq!(needed(GroupKind::Full, 4, false), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(needed(window(6), 4, false), [2, 3, 6, 7], "the last two of each four");
        assert_eq!(needed(window(6), 4, true), [0, 2, 3, 4, 6, 7], "and the one after an end");
        assert_eq!(needed(GroupKind::State, 4, false), [3, 7]);
        let chunks = GroupKind::ChunkedLocal(ChunkedLocal { chunk: 48 });
        assert_eq!(needed(chunks, 16, false), [0, 1, 3, 4, 6, 7], "a chunk's last block is behind it");
    }

    #[test]
    fn parts_lie_one_after_another_and_replicas_share() {
        let full = grouping(&[GroupKind::Full, GroupKind::State], 16);
        let own = |bytes| RankBytes { block_bytes: vec![bytes, 8], replica_of: vec![None; 2] };
        let twin = RankBytes { block_bytes: vec![100, 8], replica_of: vec![Some(0), Some(0)] };
        let slots = SlotGeometry::lay_out(&full, &[own(100), twin, own(50)]).expect("fits");
        assert_eq!(slots.parts[0].spans, [(0, 100), (0, 8)]);
        assert_eq!(slots.parts[1], RankPart { writes: vec![false; 2], spans: vec![(0, 100), (0, 8)] });
        assert_eq!(slots.parts[2].spans, [(100, 50), (8, 8)]);
        assert_eq!(slots.payload_bytes, [150, 16]);
        assert_eq!([0, 1].map(|group| slots.writers(GroupIndex(group))), [0b101; 2]);
        assert!(slots.slot_bytes.is_multiple_of(limits::SLOT_ALIGN) && slots.descriptor_bytes >= 2048);
    }

    #[test]
    fn ranks_may_hold_copies_of_one_group_and_shards_of_another() {
        let mixed = grouping(&[GroupKind::Full, GroupKind::State], 16);
        let first = RankBytes { block_bytes: vec![100, 8], replica_of: vec![None; 2] };
        let second = RankBytes { block_bytes: vec![100, 8], replica_of: vec![Some(0), None] };
        let slots = SlotGeometry::lay_out(&mixed, &[first, second]).expect("fits");
        assert_eq!(slots.payload_bytes, [100, 16], "the copy is stored once, both shards are");
        assert_eq!([0, 1].map(|group| slots.writers(GroupIndex(group))), [0b01, 0b11]);
        assert_eq!(slots.parts[1].spans, [(0, 100), (8, 8)]);
    }

    #[test]
    fn a_rank_without_layers_of_a_group_writes_none_of_its_blocks() {
        let mixed = grouping(&[GroupKind::Full, GroupKind::Full], 16);
        let stage = |block_bytes: [u64; 2]| RankBytes { block_bytes: block_bytes.into(), replica_of: vec![None; 2] };
        let slots = SlotGeometry::lay_out(&mixed, &[stage([100, 0]), stage([50, 8])]).expect("fits");
        assert_eq!([0, 1].map(|group| slots.writers(GroupIndex(group))), [0b11, 0b10]);
        assert!(slots.parts[0].writes_any() && !slots.parts[0].writes(GroupIndex(1)));
        assert!(SlotGeometry::lay_out(&mixed, &[stage([100, 0])]).is_err(), "nobody has the second group");
    }

    #[test]
    fn impossible_rank_sets_are_refused() {
        let full = grouping(&[GroupKind::Full], 16);
        let wrong_groups = RankBytes { block_bytes: vec![1, 2], replica_of: vec![None; 2] };
        assert!(SlotGeometry::lay_out(&full, &[wrong_groups]).is_err());
        assert!(SlotGeometry::lay_out(&full, &[]).is_err());
        let own = RankBytes { block_bytes: vec![1], replica_of: vec![None] };
        assert!(SlotGeometry::lay_out(&full, &vec![own.clone(); 65]).is_err());
        let later = RankBytes { replica_of: vec![Some(1)], ..own.clone() };
        assert!(SlotGeometry::lay_out(&full, &[later, own]).is_err());
    }
}
