//! What a slot says about the block it holds, so that a re-adopted slot can explain itself.
//!
//! Layout, little-endian: fixed part ([`FIXED_BYTES`]), one `(generation, checksum)` pair of 64-bit words a rank, token ids
//! (32 bits each), lora name, extra keys. The fixed part carries a checksum over everything but the pairs, which the
//! ranks' hashers write later and on their own.

use bytemuck::{Pod, Zeroable};
use xxhash_rust::xxh3::Xxh3Default;

use super::key::{BlockHash, BlockKey, Generation, GroupIndex};
use crate::error::{Error, Result};
use crate::limits;

/// Bytes of the fixed part.
pub const FIXED_BYTES: u64 = 128;

const MAGIC: u32 = 0x4256_434b; // "KCVB" read as little-endian
const HAS_PARENT: u8 = 1;
const TRUNCATED: u8 = 2;

/// What is known of a block beyond its key.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lineage {
    /// Hash of the block before it in the same group; `None` for the first.
    pub parent: Option<BlockHash>,
    /// Token ids of the block.
    pub tokens: Box<[u32]>,
    /// Name of the LoRA adapter, empty for none.
    pub lora: Box<str>,
    /// Extra hash keys, as the connector encoded them; empty for none.
    pub extra: Box<[u8]>,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Fixed {
    magic: u32,
    version: u16,
    group: u16,
    generation: u32,
    tokens: u32,
    lora_bytes: u32,
    extra_bytes: u32,
    ranks: u32,
    flags: u8,
    hash_len: u8,
    reserved: [u8; 2],
    hash: [u8; 32],
    parent: [u8; 32],
    checksum: u64,
    reserved_tail: [u8; 24],
}

const _: () = assert!(size_of::<Fixed>() as u64 == FIXED_BYTES);

/// Byte offset, from the slot's start, of rank `rank`'s `(generation, checksum)` pair.
pub const fn checksum_offset(rank: usize) -> usize {
    FIXED_BYTES as usize + 16 * rank
}

/// Writes a descriptor into the start of a slot. Checksum pairs are left alone.
///
/// Lora name and extra keys that do not fit are left out and the descriptor says so: the block is served as ever but a later
/// start does not adopt it. Returns whether everything fitted.
pub fn write(page: &mut [u8], key: &BlockKey, generation: Generation, ranks: usize, lineage: &Lineage) -> bool {
    let start = checksum_offset(ranks);
    let token_bytes: &[u8] = bytemuck::cast_slice(&lineage.tokens);
    let wanted = start + token_bytes.len() + lineage.lora.len() + lineage.extra.len();
    let whole = wanted <= page.len() && start + token_bytes.len() <= page.len();
    let (tokens, lora, extra) =
        if whole { (token_bytes, lineage.lora.as_bytes(), &*lineage.extra) } else { (&[][..], &[][..], &[][..]) };
    let mut at = start;
    for bytes in [tokens, lora, extra] {
        page[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    }
    let mut fixed = Fixed {
        magic: MAGIC,
        version: 1,
        group: key.group.0,
        generation: generation.0,
        tokens: (tokens.len() / 4) as u32,
        lora_bytes: lora.len() as u32,
        extra_bytes: extra.len() as u32,
        ranks: ranks as u32,
        flags: if lineage.parent.is_some() { HAS_PARENT } else { 0 } | if whole { 0 } else { TRUNCATED },
        hash_len: key.hash.as_bytes().len() as u8,
        reserved: [0; 2],
        hash: *key.hash.padded(),
        parent: lineage.parent.map_or([0; 32], |parent| *parent.padded()),
        checksum: 0,
        reserved_tail: [0; 24],
    };
    fixed.checksum = checksum(&fixed, &page[start..at]);
    page[..size_of::<Fixed>()].copy_from_slice(bytemuck::bytes_of(&fixed));
    whole
}

/// Reads a descriptor back, trusting nothing in it.
///
/// # Errors
/// [`Error::DataLost`] when anything does not add up, or the descriptor was truncated when it was written.
pub fn read(page: &[u8], ranks: usize) -> Result<(BlockKey, Generation, Lineage)> {
    let damaged = |problem: &str| Error::lost("slot descriptor", problem);
    let fixed: Fixed =
        bytemuck::pod_read_unaligned(page.get(..size_of::<Fixed>()).ok_or_else(|| damaged("too short"))?);
    if fixed.magic != MAGIC || fixed.version != 1 {
        return Err(damaged("no descriptor of this version"));
    }
    if fixed.ranks as usize != ranks || fixed.tokens > limits::BLOCK_TOKENS_MAX {
        return Err(damaged("counts out of range"));
    }
    if fixed.flags & TRUNCATED != 0 {
        return Err(damaged("lora name or extra keys did not fit when it was written"));
    }
    let start = checksum_offset(ranks);
    let lens = [fixed.tokens as usize * 4, fixed.lora_bytes as usize, fixed.extra_bytes as usize];
    let total =
        lens.iter().try_fold(0_usize, |sum, len| sum.checked_add(*len)).ok_or_else(|| damaged("lengths overflow"))?;
    let body =
        start.checked_add(total).and_then(|end| page.get(start..end)).ok_or_else(|| damaged("lengths pass its end"))?;
    if checksum(&Fixed { checksum: 0, ..fixed }, body) != fixed.checksum {
        return Err(damaged("checksum mismatch"));
    }
    let hash_len = fixed.hash_len as usize;
    let hash_of = |bytes: &[u8; 32]| bytes.get(..hash_len).and_then(BlockHash::new);
    let hash = hash_of(&fixed.hash).ok_or_else(|| damaged("hash length"))?;
    let parent = if fixed.flags & HAS_PARENT == 0 { None } else { hash_of(&fixed.parent) };
    let (token_bytes, rest) = body.split_at(lens[0]);
    let (lora, extra) = rest.split_at(lens[1]);
    let lineage = Lineage {
        parent,
        tokens: token_bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect(),
        lora: std::str::from_utf8(lora).map_err(|_| damaged("lora name is not UTF-8"))?.into(),
        extra: extra.into(),
    };
    Ok((BlockKey { hash, group: GroupIndex(fixed.group) }, Generation(fixed.generation), lineage))
}

fn checksum(fixed: &Fixed, body: &[u8]) -> u64 {
    let mut hasher = Xxh3Default::new();
    hasher.update(bytemuck::bytes_of(fixed));
    hasher.update(body);
    hasher.digest()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (BlockKey, Lineage) {
        let hash = BlockHash::new(&[7; 32]).expect("length");
        let lineage = Lineage {
            parent: BlockHash::new(&[6; 32]),
            tokens: (0..16).collect(),
            lora: "adapter".into(),
            extra: [1, 2, 3].into(),
        };
        (BlockKey { hash, group: GroupIndex(3) }, lineage)
    }

    #[test]
    fn what_is_written_is_read() {
        let (key, lineage) = sample();
        let mut page = vec![0xaa; 4096];
        assert!(write(&mut page, &key, Generation(9), 2, &lineage));
        assert_eq!(read(&page, 2).expect("valid"), (key, Generation(9), lineage));
        assert!(page[checksum_offset(0)..checksum_offset(2)].iter().all(|byte| *byte == 0xaa), "pairs are left alone");
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let (key, lineage) = sample();
        let mut page = vec![0; 4096];
        write(&mut page, &key, Generation(9), 2, &lineage);
        let used = checksum_offset(2) + 64 + 7 + 3;
        let covered = (0..FIXED_BYTES as usize).chain(checksum_offset(2)..used);
        for bit in covered.flat_map(|byte| (0..8).map(move |bit| (byte, bit))) {
            let mut bad = page.clone();
            bad[bit.0] ^= 1 << bit.1;
            assert!(read(&bad, 2).is_err(), "bit {bit:?}");
        }
        assert!(read(&page[..100], 2).is_err() && read(&page, 3).is_err());
    }

    #[test]
    fn what_does_not_fit_is_never_adopted() {
        let (key, mut lineage) = sample();
        lineage.extra = vec![1; 5000].into();
        let mut page = vec![0; 4096];
        assert!(!write(&mut page, &key, Generation(1), 2, &lineage));
        assert!(read(&page, 2).is_err());
    }
}
