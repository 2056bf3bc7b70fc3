//! The superblock: what a store was made for, which generation of contents counts, and whether it
//! was closed cleanly.
//!
//! A small file of its own: fixed part, facts as JSON, slot geometry as JSON; one checksum over
//! everything. It is only ever replaced as a whole, so that a reader finds the old one or the new
//! one. Nothing in it is trusted before the checksum was compared.

use std::io::Read;
use std::path::Path;

use bytemuck::{Pod, Zeroable};
use xxhash_rust::xxh3::Xxh3Default;

use super::directory::{self, How};
use crate::limits::{self, FACTS_BYTES_MAX, GEOMETRY_BYTES_MAX, SLOT_ALIGN};
use kvcellar_block::SlotGeometry;
use kvcellar_block::error::{Error, Result};

/// Version of everything in a store's directory.
pub const FORMAT_VERSION: u32 = 3;

/// The file's name.
pub const NAME: &str = "superblock";

const MAGIC: [u8; 8] = *b"KVCSTORE";
const CLEAN: u32 = 1;
const PRIVATE: u32 = 2;

/// What a store says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Random id: extents of another store are none of this one.
    pub store: u64,
    /// Fingerprint of everything that makes bytes interchangeable.
    pub namespace: [u8; 16],
    /// Bound of all files together, in bytes on disk.
    pub capacity_bytes: u64,
    /// Bytes of a whole segment.
    pub segment_bytes: u64,
    /// Extents of another generation are worthless.
    pub cache_generation: u64,
    /// The contents are of weights that were changed in the process that stored them, and are worth
    /// nothing to another one.
    pub private: bool,
    /// When the store was made, in seconds since 1970.
    pub created_s: u64,
    /// The snapshot that describes the contents; `None` while somebody may write, and after a
    /// crash.
    pub clean: Option<Clean>,
    /// The facts behind the namespace, as JSON.
    pub facts: String,
    /// Sizes of an extent.
    pub geometry: SlotGeometry,
}

/// Which snapshot belongs to a clean superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clean {
    /// The sequence number of the next extent.
    pub next_sequence: u64,
    /// The snapshot's checksum: an older snapshot does not count.
    pub snapshot_sum: u64,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SuperblockFields {
    magic: [u8; 8],
    version: u32,
    flags: u32,
    store: u64,
    namespace: [u8; 16],
    capacity_bytes: u64,
    segment_bytes: u64,
    cache_generation: u64,
    created_s: u64,
    next_sequence: u64,
    snapshot_sum: u64,
    facts_bytes: u64,
    geometry_bytes: u64,
    checksum: u64,
}

/// Longest superblock, in bytes.
const BYTES_MAX: usize = size_of::<SuperblockFields>() + FACTS_BYTES_MAX + GEOMETRY_BYTES_MAX;

fn damaged(problem: impl Into<String>) -> Error {
    Error::lost("superblock", problem)
}

impl Superblock {
    /// The file's bytes. Facts beyond [`FACTS_BYTES_MAX`] are cut off.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a geometry that is too large to be written down.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let unsupported = |why: String| Error::Unsupported {
            what: "a store for this model".to_owned(),
            why,
            remedy: "Run fewer ranks for each engine, or leave nvme_dir out".to_owned(),
        };
        let geometry = serde_json::to_vec(&self.geometry).map_err(|error| unsupported(error.to_string()))?;
        if geometry.len() > GEOMETRY_BYTES_MAX {
            return Err(unsupported(format!("its block layout takes {} bytes to write down", geometry.len())));
        }
        let facts = &self.facts.as_bytes()[..self.facts.floor_char_boundary(FACTS_BYTES_MAX)];
        let mut fixed = SuperblockFields {
            magic: MAGIC,
            version: FORMAT_VERSION,
            flags: self.flags(),
            store: self.store,
            namespace: self.namespace,
            capacity_bytes: self.capacity_bytes,
            segment_bytes: self.segment_bytes,
            cache_generation: self.cache_generation,
            created_s: self.created_s,
            next_sequence: self.clean.map_or(0, |clean| clean.next_sequence),
            snapshot_sum: self.clean.map_or(0, |clean| clean.snapshot_sum),
            facts_bytes: facts.len() as u64,
            geometry_bytes: geometry.len() as u64,
            checksum: 0,
        };
        fixed.checksum = checksum(&fixed, &[facts, &geometry]);
        Ok([bytemuck::bytes_of(&fixed), facts, &geometry].concat())
    }

    fn flags(&self) -> u32 {
        (if self.clean.is_some() { CLEAN } else { 0 }) | (if self.private { PRIVATE } else { 0 })
    }

    /// Reads a superblock, trusting nothing in it.
    ///
    /// # Errors
    /// [`Error::DataLost`] when it is not a whole superblock of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let (head, body) =
            bytes.split_at_checked(size_of::<SuperblockFields>()).ok_or_else(|| damaged("it is too short"))?;
        let fixed: SuperblockFields = bytemuck::pod_read_unaligned(head);
        if fixed.magic != MAGIC || fixed.version != FORMAT_VERSION {
            return Err(damaged("it is no superblock of this version"));
        }
        let lens = [fixed.facts_bytes, fixed.geometry_bytes];
        if lens[0] > FACTS_BYTES_MAX as u64
            || lens[1] > GEOMETRY_BYTES_MAX as u64
            || lens[0] + lens[1] != body.len() as u64
        {
            return Err(damaged("lengths do not add up"));
        }
        if checksum(&SuperblockFields { checksum: 0, ..fixed }, &[body]) != fixed.checksum {
            return Err(damaged("checksum mismatch"));
        }
        let (facts, geometry) = body.split_at(lens[0] as usize);
        let geometry: SlotGeometry = serde_json::from_slice(geometry).map_err(|error| damaged(error.to_string()))?;
        if !is_sound(&geometry) || !is_whole(fixed.segment_bytes, geometry.slot_bytes) {
            return Err(damaged("its sizes contradict each other"));
        }
        Ok(Self {
            store: fixed.store,
            namespace: fixed.namespace,
            capacity_bytes: fixed.capacity_bytes,
            segment_bytes: fixed.segment_bytes,
            cache_generation: fixed.cache_generation,
            private: fixed.flags & PRIVATE != 0,
            created_s: fixed.created_s,
            clean: (fixed.flags & CLEAN != 0)
                .then_some(Clean { next_sequence: fixed.next_sequence, snapshot_sum: fixed.snapshot_sum }),
            facts: String::from_utf8(facts.to_vec()).map_err(|_| damaged("its facts are no text"))?,
            geometry,
        })
    }

    /// Reads the superblock of the store in `dir`.
    ///
    /// # Errors
    /// [`Error::DataLost`]; [`Error::Io`] when it cannot be opened; [`Error::Config`] when others
    /// may write it.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(NAME);
        let mut bytes = Vec::new();
        directory::open(&path, How::Existing)?
            .take(BYTES_MAX as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| damaged(format!("it cannot be read: {error}")))?;
        Self::decode(&bytes)
    }
}

fn is_whole(segment_bytes: u64, slot_bytes: u64) -> bool {
    segment_bytes > 0
        && segment_bytes.is_multiple_of(slot_bytes)
        && segment_bytes / slot_bytes <= limits::EXTENTS_MAX.into()
}

/// Every size is aligned and every part lies inside the payload: nobody who uses the geometry can
/// leave an image.
fn is_sound(geometry: &SlotGeometry) -> bool {
    let aligned = |bytes: u64| bytes > 0 && bytes.is_multiple_of(SLOT_ALIGN) && bytes < 1 << 40;
    if !aligned(geometry.descriptor_bytes) || !aligned(geometry.slot_bytes) {
        return false;
    }
    let Some(room) = geometry.slot_bytes.checked_sub(geometry.descriptor_bytes) else { return false };
    let groups = geometry.payload_bytes.len();
    let inside = |(offset, len): &(u64, u64)| offset.checked_add(*len).is_some_and(|end| end <= room);
    (1..=limits::GROUPS_MAX).contains(&groups)
        && geometry.payload_bytes.iter().all(|bytes| *bytes <= room)
        && (1..=limits::RANKS_MAX).contains(&geometry.parts.len())
        && geometry
            .parts
            .iter()
            .all(|part| (part.spans.len(), part.writes.len()) == (groups, groups) && part.spans.iter().all(inside))
}

fn checksum(fixed: &SuperblockFields, rest: &[&[u8]]) -> u64 {
    let mut hasher = Xxh3Default::new();
    hasher.update(bytemuck::bytes_of(fixed));
    for bytes in rest {
        hasher.update(bytes);
    }
    hasher.digest()
}
