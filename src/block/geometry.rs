//! All size arithmetic: groups, rank parts, and where each part lies in a slot.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::limits;

/// How a group's blocks are needed by a request that resumes at token n.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupKind {
    /// Every block before n.
    Full,
    /// Every block before n; the bytes are identical on all tensor-parallel ranks.
    Mla,
    /// The last `window - 1 + extra` tokens before n.
    SlidingWindow {
        /// Window in tokens.
        window: u32,
        /// Tokens kept below the window for speculative decoding.
        extra: u32,
    },
}

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
    /// Blocks before a hit's end that must be there; `None`: all of them.
    pub fn tail_blocks(&self) -> Option<u32> {
        match self.kind {
            GroupKind::Full | GroupKind::Mla => None,
            GroupKind::SlidingWindow { window, extra } => {
                Some((window.saturating_sub(1) + extra).div_ceil(self.block_tokens))
            }
        }
    }

    /// Window in tokens, for events.
    pub fn window(&self) -> Option<u32> {
        match self.kind {
            GroupKind::SlidingWindow { window, .. } => Some(window),
            GroupKind::Full | GroupKind::Mla => None,
        }
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
    /// Writes its part when a block is offloaded. Of ranks with identical bytes only the first
    /// does.
    pub writer: bool,
    /// Per group: offset of the part in the payload and its length, in bytes.
    pub spans: Vec<(u64, u64)>,
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
    /// Per group: bytes of one block on this rank.
    pub block_bytes: Vec<u64>,
    /// An earlier rank whose bytes are identical, if any.
    pub replica_of: Option<u32>,
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
            if bytes.block_bytes.len() != group_count {
                return Err(refuse(format!(
                    "rank {rank} has {} KV cache groups, not {group_count}",
                    bytes.block_bytes.len()
                )));
            }
            if let Some(twin) = bytes.replica_of {
                let twin_part =
                    parts.get(twin as usize).ok_or_else(|| refuse(format!("rank {rank} copies rank {twin}")))?;
                if ranks[twin as usize].block_bytes != bytes.block_bytes {
                    return Err(refuse(format!(
                        "rank {rank} should hold the bytes of rank {twin} but their sizes differ"
                    )));
                }
                parts.push(RankPart { writer: false, spans: twin_part.spans.clone() });
                continue;
            }
            let spans = bytes.block_bytes.iter().zip(&mut ends).map(|(len, end)| {
                let start = *end;
                *end += len;
                (start, *len)
            });
            parts.push(RankPart { writer: true, spans: spans.collect() });
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

    /// Bits of all ranks that write a block.
    pub fn writers_mask(&self) -> u64 {
        self.parts.iter().enumerate().filter(|(_, part)| part.writer).fold(0, |mask, (rank, _)| mask | 1 << rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grouping(kinds: &[GroupKind], block_tokens: u32) -> Grouping {
        let groups =
            kinds.iter().map(|kind| GroupSpec { kind: *kind, kind_name: String::new(), block_tokens, eagle: false });
        Grouping { groups: groups.collect(), hash_tokens: block_tokens, hit_tokens: block_tokens }
    }

    #[test]
    fn a_window_needs_the_blocks_its_tokens_touch() {
        let tail = |window, extra, block_tokens| {
            GroupSpec {
                kind: GroupKind::SlidingWindow { window, extra },
                kind_name: String::new(),
                block_tokens,
                eagle: false,
            }
            .tail_blocks()
        };
        assert_eq!(tail(64, 0, 16), Some(4));
        assert_eq!(tail(65, 0, 16), Some(4));
        assert_eq!(tail(66, 0, 16), Some(5));
        assert_eq!(tail(1, 0, 16), Some(0));
        assert_eq!(tail(64, 2, 16), Some(5));
    }

    #[test]
    fn a_hit_leaves_at_least_one_token() {
        let full = grouping(&[GroupKind::Full], 16);
        assert_eq!([0, 1, 16, 17, 32, 33].map(|tokens| full.hit_limit(tokens)), [0, 0, 0, 16, 16, 32]);
    }

    #[test]
    fn parts_lie_one_after_another_and_replicas_share() {
        let full = grouping(&[GroupKind::Full, GroupKind::Full], 16);
        let own = |bytes| RankBytes { block_bytes: vec![bytes, 8], replica_of: None };
        let twin = RankBytes { block_bytes: vec![100, 8], replica_of: Some(0) };
        let slots = SlotGeometry::lay_out(&full, &[own(100), twin, own(50)]).expect("fits");
        assert_eq!(slots.parts[0].spans, [(0, 100), (0, 8)]);
        assert_eq!(slots.parts[1], RankPart { writer: false, spans: vec![(0, 100), (0, 8)] });
        assert_eq!(slots.parts[2].spans, [(100, 50), (8, 8)]);
        assert_eq!(slots.payload_bytes, [150, 16]);
        assert_eq!(slots.writers_mask(), 0b101);
        assert!(slots.slot_bytes.is_multiple_of(limits::SLOT_ALIGN) && slots.descriptor_bytes >= 2048);
    }

    #[test]
    fn impossible_rank_sets_are_refused() {
        let full = grouping(&[GroupKind::Full], 16);
        let wrong_groups = RankBytes { block_bytes: vec![1, 2], replica_of: None };
        assert!(SlotGeometry::lay_out(&full, &[wrong_groups]).is_err());
        assert!(SlotGeometry::lay_out(&full, &[]).is_err());
        let own = RankBytes { block_bytes: vec![1], replica_of: None };
        assert!(SlotGeometry::lay_out(&full, &vec![own.clone(); 65]).is_err());
        assert!(SlotGeometry::lay_out(&full, &[RankBytes { replica_of: Some(1), ..own.clone() }, own]).is_err());
    }
}
