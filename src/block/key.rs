//! Names of things: block hash, block key, slot and generation numbers.

use std::fmt;

/// A tier of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// The host pool.
    Dram,
    /// The store on a local disk.
    Nvme,
}

/// A KV cache group of the model, by vLLM's numbering.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupIndex(pub u16);

/// A slot of the host pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotIndex(pub u32);

/// An extent of the NVMe store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExtentIndex(pub u32);

/// How often a slot has been taken: tells a late writer from the present owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Generation(pub u32);

/// A LoRA adapter by the content of its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AdapterId([u8; 16]);

impl AdapterId {
    /// Takes a digest of an adapter's files. Returns `None` for another length, and for all zeros:
    /// no digest is that.
    pub fn new(digest: &[u8]) -> Option<Self> {
        digest.try_into().ok().filter(|digest| *digest != [0; 16]).map(Self)
    }
}

/// vLLM's hash of a block and all blocks before it: 16 or 32 bytes, opaque.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash {
    bytes: [u8; 32],
    len: u8,
}

impl BlockHash {
    /// Takes a hash as vLLM hands it out.
    ///
    /// Returns `None` for a length that no supported hash algorithm makes.
    #[inline]
    pub fn new(hash: &[u8]) -> Option<Self> {
        let mut bytes = [0; 32];
        match hash.len() {
            // Constant lengths, so that each copy is two or one vector moves.
            32 => bytes.copy_from_slice(hash),
            16 => bytes[..16].copy_from_slice(hash),
            _ => return None,
        }
        Some(Self { bytes, len: hash.len() as u8 })
    }

    /// The hash under which KV is kept that was computed with this adapter.
    ///
    /// vLLM's hash names an adapter by name and path only; what lies there may have been exchanged.
    /// Both numbers are digests, so their sum without carry is as unlike any other as they are.
    #[inline]
    #[must_use]
    pub fn for_adapter(mut self, adapter: &AdapterId) -> Self {
        let own = &mut self.bytes[..self.len as usize];
        own.iter_mut().zip(adapter.0.iter().cycle()).for_each(|(byte, of_adapter)| *byte ^= of_adapter);
        self
    }

    /// The hash's own bytes.
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len as usize]
    }

    /// The hash padded with zeros to 32 bytes.
    #[inline]
    pub fn padded(&self) -> &[u8; 32] {
        &self.bytes
    }

    /// The low 64 bits, big-endian: vLLM's integer form of a hash in events.
    pub fn low_u64(&self) -> u64 {
        let tail = &self.as_bytes()[self.len as usize - 8..];
        tail.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for BlockHash {
    /// The first 16 hex digits: enough to recognise a block in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bytes[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The name of a block's bytes inside one namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockKey {
    /// vLLM's block hash.
    pub hash: BlockHash,
    /// The group whose layers the bytes belong to.
    pub group: GroupIndex,
}

impl BlockKey {
    /// A number that tells this key from others, and is evenly spread because block hashes are.
    #[inline]
    pub fn fingerprint(&self) -> u64 {
        let first = self.hash.bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        first.wrapping_add(u64::from(self.group.0) << 32)
    }

    /// A number that says whether a sample holds this key: as evenly spread as the fingerprint, and
    /// independent of it.
    #[inline]
    pub fn sampling_number(&self) -> u64 {
        // Every hash has at least 16 bytes.
        self.hash.bytes[8..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }
}

impl fmt::Display for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.hash, self.group.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lengths_of_supported_algorithms_are_hashes() {
        assert!(BlockHash::new(&[1; 32]).is_some() && BlockHash::new(&[1; 16]).is_some());
        assert!(BlockHash::new(&[1; 8]).is_none() && BlockHash::new(&[]).is_none());
    }

    #[test]
    fn an_adapter_changes_a_hash_of_either_length_and_leaves_its_length() {
        let adapters = [[1; 16], [2; 16]].map(|digest| AdapterId::new(&digest).expect("16 bytes"));
        for len in [16, 32] {
            let plain = BlockHash::new(&vec![7; len]).expect("a hash");
            let [one, other] = adapters.map(|adapter| plain.for_adapter(&adapter));
            assert!(one != plain && other != plain && one != other, "{len} bytes");
            assert!(one.as_bytes().len() == len && one == plain.for_adapter(&adapters[0]), "{len} bytes");
            assert_ne!(one.low_u64(), other.low_u64(), "events in integer form tell them apart, too");
            assert_eq!(one.padded()[len..], [0; 32][len..], "padding stays padding");
        }
    }

    #[test]
    fn an_adapter_is_named_by_sixteen_bytes_that_say_something() {
        assert!(AdapterId::new(&[1; 16]).is_some());
        assert!(
            AdapterId::new(&[0; 16]).is_none() && AdapterId::new(&[1; 15]).is_none() && AdapterId::new(&[]).is_none()
        );
    }

    #[test]
    fn integer_form_is_the_low_64_bits_big_endian() {
        let mut bytes = [0_u8; 32];
        bytes[24..].copy_from_slice(&0x1122_3344_5566_7788_u64.to_be_bytes());
        assert_eq!(BlockHash::new(&bytes).map(|hash| hash.low_u64()), Some(0x1122_3344_5566_7788));
    }
}
