//! What a slot says about the block it holds, so that a re-adopted slot can explain itself.
//!
//! Layout, little-endian: fixed part ([`FIXED_BYTES`]), one `(generation, checksum)` pair of 64-bit
//! words a rank, the [`Seal`] with one checksum a rank, token ids (32 bits each), lora name, extra
//! keys. The fixed part carries a checksum over itself and what follows the seal; the pairs are
//! written later by the ranks' hashers, on their own, and the seal when the slot's image is
//! spilled: a sealed image is an extent.

use bytemuck::{Pod, Zeroable};
use xxhash_rust::xxh3::Xxh3Default;

use super::key::{BlockHash, BlockKey, Generation, GroupIndex};
use crate::error::{Error, Result};
use crate::limits;
use crate::salt::SaltTag;

/// Bytes of the fixed part.
pub const FIXED_BYTES: u64 = 128;

const MAGIC: u32 = 0x4256_434b; // "KCVB" read as little-endian
const VERSION: u16 = 2;
const SEAL_MAGIC: u32 = 0x5356_434b; // "KCVS"
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
    /// Whose block it is.
    pub salt: SaltTag,
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
    salt: SaltTag,
    reserved_tail: [u8; 16],
}

const _: () = assert!(size_of::<Fixed>() as u64 == FIXED_BYTES);

/// What makes a slot's image an extent of one store. It vouches for the descriptor (by its
/// checksum) and for every rank's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seal {
    /// The store's random id: an image of another store is none.
    pub store: u64,
    /// Grows with every extent that the store writes: of two extents with one key the later one
    /// counts.
    pub sequence: u64,
    /// The store's generation of contents when it was written.
    pub cache_generation: u64,
    /// When it was written, in seconds since 1970.
    pub written_s: u64,
    /// Payload bytes as they lie on disk.
    pub stored_bytes: u64,
    /// How the payload lies on disk: 0 as it is, 1 compressed.
    pub encoding: u16,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct RawSeal {
    magic: u32,
    version: u16,
    encoding: u16,
    store: u64,
    sequence: u64,
    cache_generation: u64,
    written_s: u64,
    stored_bytes: u64,
    descriptor_sum: u64,
    checksum: u64,
}

/// Bytes of the seal without the ranks' checksums.
pub const SEAL_BYTES: u64 = 64;

const _: () = assert!(size_of::<RawSeal>() as u64 == SEAL_BYTES);

const fn seal_offset(ranks: usize) -> usize {
    checksum_offset(ranks)
}

/// Where token ids begin.
pub const fn body_offset(ranks: usize) -> usize {
    seal_offset(ranks) + SEAL_BYTES as usize + 8 * ranks
}

/// Byte offset, from the slot's start, of rank `rank`'s `(generation, checksum)` pair.
pub const fn checksum_offset(rank: usize) -> usize {
    FIXED_BYTES as usize + 16 * rank
}

/// Writes a descriptor into the start of a slot. Checksum pairs and seal are left alone; of what an
/// earlier one said, which may be another's, nothing is left behind it.
///
/// Lora name and extra keys that do not fit are left out and the descriptor says so: the block is
/// served as ever but a later start does not adopt it. Returns whether everything fitted.
pub fn write(page: &mut [u8], key: &BlockKey, generation: Generation, ranks: usize, lineage: &Lineage) -> bool {
    let start = body_offset(ranks);
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
    if let Some(rest) = page.get_mut(at..) {
        rest.fill(0);
    }
    let mut fixed = Fixed {
        magic: MAGIC,
        version: VERSION,
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
        salt: lineage.salt,
        reserved_tail: [0; 16],
    };
    fixed.checksum = checksum(&fixed, &page[start..at]);
    page[..size_of::<Fixed>()].copy_from_slice(bytemuck::bytes_of(&fixed));
    whole
}

/// Reads a descriptor back, trusting nothing in it.
///
/// # Errors
/// [`Error::DataLost`] when anything does not add up, or the descriptor was truncated when it was
/// written.
pub fn read(page: &[u8], ranks: usize) -> Result<(BlockKey, Generation, Lineage)> {
    let (fixed, key, body) = checked(page, ranks)?;
    let damaged = |problem: &str| Error::lost("slot descriptor", problem);
    let parent = if fixed.flags & HAS_PARENT == 0 { None } else { hash_of(&fixed, &fixed.parent) };
    let (token_bytes, rest) = body.split_at(fixed.tokens as usize * 4);
    let (lora, extra) = rest.split_at(fixed.lora_bytes as usize);
    let lineage = Lineage {
        parent,
        tokens: token_bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect(),
        lora: std::str::from_utf8(lora).map_err(|_| damaged("lora name is not UTF-8"))?.into(),
        extra: extra.into(),
        salt: fixed.salt,
    };
    Ok((key, Generation(fixed.generation), lineage))
}

/// Seals a whole descriptor: the slot's image may be written as an extent now. `sums`: the checksum
/// of every rank's part, 0 for ranks that write none.
///
/// # Errors
/// [`Error::DataLost`] when the descriptor is not whole; such an image must not be written.
pub fn seal(page: &mut [u8], seal: &Seal, sums: &[u64]) -> Result<()> {
    let (fixed, _, _) = checked(page, sums.len())?;
    let mut raw = RawSeal {
        magic: SEAL_MAGIC,
        version: VERSION,
        encoding: seal.encoding,
        store: seal.store,
        sequence: seal.sequence,
        cache_generation: seal.cache_generation,
        written_s: seal.written_s,
        stored_bytes: seal.stored_bytes,
        descriptor_sum: fixed.checksum,
        checksum: 0,
    };
    raw.checksum = seal_checksum(&raw, bytemuck::cast_slice(sums));
    let at = seal_offset(sums.len());
    let (head, tail) = page[at..].split_at_mut(size_of::<RawSeal>());
    head.copy_from_slice(bytemuck::bytes_of(&raw));
    tail[..8 * sums.len()].copy_from_slice(bytemuck::cast_slice(sums));
    Ok(())
}

/// Reads an extent's descriptor, trusting nothing in it: its key, its seal, and the checksum of
/// every rank's part.
///
/// # Errors
/// [`Error::DataLost`] when descriptor or seal do not add up, or do not belong together.
pub fn unseal(page: &[u8], ranks: usize) -> Result<(BlockKey, Seal, Vec<u64>)> {
    let damaged = |problem: &str| Error::lost("extent descriptor", problem);
    let (fixed, key, _) = checked(page, ranks)?;
    let at = seal_offset(ranks);
    // `checked` made sure that the body, which comes after the seal, lies inside the page.
    let raw: RawSeal = bytemuck::pod_read_unaligned(&page[at..at + size_of::<RawSeal>()]);
    let sums = &page[at + size_of::<RawSeal>()..body_offset(ranks)];
    if raw.magic != SEAL_MAGIC || raw.version != VERSION {
        return Err(damaged("it was never sealed"));
    }
    if raw.descriptor_sum != fixed.checksum {
        return Err(damaged("its seal belongs to another descriptor"));
    }
    if seal_checksum(&RawSeal { checksum: 0, ..raw }, sums) != raw.checksum {
        return Err(damaged("its seal's checksum does not match"));
    }
    let seal = Seal {
        store: raw.store,
        sequence: raw.sequence,
        cache_generation: raw.cache_generation,
        written_s: raw.written_s,
        stored_bytes: raw.stored_bytes,
        encoding: raw.encoding,
    };
    Ok((key, seal, sums.chunks_exact(8).map(bytemuck::pod_read_unaligned).collect()))
}

/// Whose block a descriptor tells of, whatever else is wrong with it: of one that did not fit, too.
/// A page that was never written, or that cannot be read, leaves it unknown.
pub fn salt(page: &[u8]) -> SaltTag {
    let fixed: Fixed = match page.get(..size_of::<Fixed>()) {
        Some(bytes) => bytemuck::pod_read_unaligned(bytes),
        None => return SaltTag::UNKNOWN,
    };
    let ranks = fixed.ranks as usize;
    let checked = if fixed.flags & TRUNCATED == 0 { checked(page, ranks).is_ok() } else { is_whole_truncated(&fixed) };
    if checked { fixed.salt } else { SaltTag::UNKNOWN }
}

/// A truncated descriptor has no body: its fixed part is vouched for alone.
fn is_whole_truncated(fixed: &Fixed) -> bool {
    fixed.magic == MAGIC
        && fixed.version == VERSION
        && checksum(&Fixed { checksum: 0, ..*fixed }, &[]) == fixed.checksum
}

/// Gives a whole descriptor another generation: its image was restored into another slot.
///
/// # Errors
/// [`Error::DataLost`] when the descriptor is not whole.
pub fn renew(page: &mut [u8], ranks: usize, generation: Generation) -> Result<()> {
    let (fixed, _, body) = checked(page, ranks)?;
    let mut fixed = Fixed { generation: generation.0, checksum: 0, ..fixed };
    fixed.checksum = checksum(&fixed, body);
    page[..size_of::<Fixed>()].copy_from_slice(bytemuck::bytes_of(&fixed));
    Ok(())
}

fn hash_of(fixed: &Fixed, bytes: &[u8; 32]) -> Option<BlockHash> {
    bytes.get(..fixed.hash_len as usize).and_then(BlockHash::new)
}

/// The fixed part, the key and the body of a whole descriptor.
fn checked(page: &[u8], ranks: usize) -> Result<(Fixed, BlockKey, &[u8])> {
    let damaged = |problem: &str| Error::lost("slot descriptor", problem);
    let fixed: Fixed =
        bytemuck::pod_read_unaligned(page.get(..size_of::<Fixed>()).ok_or_else(|| damaged("too short"))?);
    if fixed.magic != MAGIC || fixed.version != VERSION {
        return Err(damaged("no descriptor of this version"));
    }
    if fixed.ranks as usize != ranks || fixed.tokens > limits::BLOCK_TOKENS_MAX {
        return Err(damaged("counts out of range"));
    }
    if fixed.flags & TRUNCATED != 0 {
        return Err(damaged("lora name or extra keys did not fit when it was written"));
    }
    let start = body_offset(ranks);
    let lens = [fixed.tokens as usize * 4, fixed.lora_bytes as usize, fixed.extra_bytes as usize];
    let total =
        lens.iter().try_fold(0_usize, |sum, len| sum.checked_add(*len)).ok_or_else(|| damaged("lengths overflow"))?;
    let body =
        start.checked_add(total).and_then(|end| page.get(start..end)).ok_or_else(|| damaged("lengths pass its end"))?;
    if checksum(&Fixed { checksum: 0, ..fixed }, body) != fixed.checksum {
        return Err(damaged("checksum mismatch"));
    }
    let hash = hash_of(&fixed, &fixed.hash).ok_or_else(|| damaged("hash length"))?;
    Ok((fixed, BlockKey { hash, group: GroupIndex(fixed.group) }, body))
}

fn checksum(fixed: &Fixed, body: &[u8]) -> u64 {
    let mut hasher = Xxh3Default::new();
    hasher.update(bytemuck::bytes_of(fixed));
    hasher.update(body);
    hasher.digest()
}

fn seal_checksum(raw: &RawSeal, sums: &[u8]) -> u64 {
    let mut hasher = Xxh3Default::new();
    hasher.update(bytemuck::bytes_of(raw));
    hasher.update(sums);
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
            salt: SaltTag::of(b"ada"),
        };
        (BlockKey { hash, group: GroupIndex(3) }, lineage)
    }

    #[test]
    fn what_is_written_is_read() {
        let (key, lineage) = sample();
        let mut page = vec![0xaa; 4096];
        assert!(write(&mut page, &key, Generation(9), 2, &lineage));
        assert_eq!(read(&page, 2).expect("valid"), (key, Generation(9), lineage));
        assert!(
            page[checksum_offset(0)..body_offset(2)].iter().all(|byte| *byte == 0xaa),
            "pairs and seal are left alone"
        );
    }

    #[test]
    fn nothing_is_left_of_an_earlier_descriptor() {
        let (key, mut lineage) = sample();
        let mut page = vec![0; 4096];
        lineage.extra = b"the salt of ada".repeat(9).into();
        write(&mut page, &key, Generation(9), 2, &lineage);
        for extra in [Vec::new(), vec![1; 5000]] {
            let mut page = page.clone();
            write(&mut page, &key, Generation(10), 2, &Lineage { extra: extra.into(), ..lineage.clone() });
            assert!(!page.windows(11).any(|bytes| bytes == b"salt of ada"));
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let (key, lineage) = sample();
        let mut page = vec![0; 4096];
        write(&mut page, &key, Generation(9), 2, &lineage);
        let used = body_offset(2) + 64 + 7 + 3;
        let covered = (0..FIXED_BYTES as usize).chain(body_offset(2)..used);
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
        assert_eq!(salt(&page), lineage.salt, "but whose it is can be told");
    }

    #[test]
    fn whose_it_is_is_told_by_whole_descriptors_that_have_a_tag() {
        let (key, mut lineage) = sample();
        let mut page = vec![0; 4096];
        assert_eq!(salt(&page), SaltTag::UNKNOWN, "never written");
        write(&mut page, &key, Generation(9), 2, &lineage);
        assert_eq!(salt(&page), SaltTag::of(b"ada"));
        page[200] ^= 1;
        page[300] ^= 1;
        assert_eq!(salt(&page), SaltTag::UNKNOWN, "damaged");
        // An earlier version left zeros where the tag is.
        lineage.salt = SaltTag::UNKNOWN;
        write(&mut page, &key, Generation(9), 2, &lineage);
        assert_eq!((salt(&page), read(&page, 2).expect("valid").2), (SaltTag::UNKNOWN, lineage));
    }

    #[test]
    fn a_seal_vouches_for_descriptor_and_sums() {
        let (key, lineage) = sample();
        let mut page = vec![0; 4096];
        write(&mut page, &key, Generation(9), 2, &lineage);
        assert!(unseal(&page, 2).is_err(), "never sealed");
        let given = Seal { store: 1, sequence: 2, cache_generation: 3, written_s: 4, stored_bytes: 5, encoding: 0 };
        seal(&mut page, &given, &[6, 7]).expect("whole");
        assert_eq!(unseal(&page, 2).expect("sealed"), (key, given, vec![6, 7]));
        for byte in seal_offset(2)..body_offset(2) {
            let mut bad = page.clone();
            bad[byte] ^= 1;
            assert!(unseal(&bad, 2).is_err(), "byte {byte}");
        }
        let mut other = page.clone();
        write(&mut other, &key, Generation(10), 2, &lineage);
        assert!(unseal(&other, 2).is_err(), "the seal of an earlier descriptor");
        renew(&mut page, 2, Generation(11)).expect("whole");
        assert_eq!(read(&page, 2).expect("valid"), (key, Generation(11), lineage));
    }
}
