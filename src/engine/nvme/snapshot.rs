//! The snapshot: which block lies in which extent, written at a clean close so that the next start
//! needs no scan.
//!
//! A header, then one 64-byte record an extent; the header has a checksum over the whole file. The
//! superblock names that checksum, so that an older snapshot is never taken for the present one.
//! Version 1 is read, too: where a record has the salt's tag, it had a checksum of its own.

use std::io::Read;
use std::path::Path;

use bytemuck::{Pod, Zeroable};
use xxhash_rust::xxh3::Xxh3Default;

use super::directory::{self, How};
use kvcellar_block::error::{Error, Result};
use kvcellar_block::{BlockHash, BlockKey, ExtentIndex, GroupIndex, SaltTag};

/// The file's name.
pub const NAME: &str = "snapshot";

/// Bytes of the header.
pub const HEADER_BYTES: u64 = 64;

/// Bytes of a record.
pub const RECORD_BYTES: u64 = 64;

const MAGIC: [u8; 8] = *b"KVCSNAPS";
const VERSION: u32 = 2;
/// Its records have no tags.
const VERSION_UNTAGGED: u32 = 1;

/// What lies in one extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotEntry {
    /// Where.
    pub extent: ExtentIndex,
    /// Which block.
    pub key: BlockKey,
    /// The extent's sequence number, from its seal.
    pub sequence: u64,
    /// When it was written, in seconds since 1970.
    pub written_s: u64,
    /// Whose block it is.
    pub salt: SaltTag,
}

/// What a snapshot is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subject {
    /// The store's id.
    pub store: u64,
    /// The generation of contents that it lists.
    pub cache_generation: u64,
    /// The sequence number of the next extent.
    pub next_sequence: u64,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SnapshotHeader {
    magic: [u8; 8],
    version: u32,
    record_bytes: u32,
    store: u64,
    cache_generation: u64,
    next_sequence: u64,
    count: u64,
    reserved: u64,
    checksum: u64,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SnapshotRecord {
    extent: u32,
    group: u16,
    hash_len: u8,
    reserved: u8,
    hash: [u8; 32],
    sequence: u64,
    written_s: u64,
    salt: SaltTag,
}

const _: () =
    assert!(size_of::<SnapshotHeader>() as u64 == HEADER_BYTES && size_of::<SnapshotRecord>() as u64 == RECORD_BYTES);

fn damaged(problem: impl Into<String>) -> Error {
    Error::lost("snapshot", problem)
}

/// The file's bytes, and its checksum.
pub fn encode(subject: &Subject, entries: &[SnapshotEntry]) -> (Vec<u8>, u64) {
    let mut header = SnapshotHeader {
        magic: MAGIC,
        version: VERSION,
        record_bytes: RECORD_BYTES as u32,
        store: subject.store,
        cache_generation: subject.cache_generation,
        next_sequence: subject.next_sequence,
        count: entries.len() as u64,
        reserved: 0,
        checksum: 0,
    };
    let mut bytes = Vec::with_capacity(size_of::<SnapshotHeader>() + size_of_val(entries));
    bytes.extend_from_slice(bytemuck::bytes_of(&header));
    for entry in entries {
        let record = SnapshotRecord {
            extent: entry.extent.0,
            group: entry.key.group.0,
            hash_len: entry.key.hash.as_bytes().len() as u8,
            reserved: 0,
            hash: *entry.key.hash.padded(),
            sequence: entry.sequence,
            written_s: entry.written_s,
            salt: entry.salt,
        };
        bytes.extend_from_slice(bytemuck::bytes_of(&record));
    }
    header.checksum = file_sum(&header, &bytes[size_of::<SnapshotHeader>()..]);
    bytes[..size_of::<SnapshotHeader>()].copy_from_slice(bytemuck::bytes_of(&header));
    (bytes, header.checksum)
}

/// Reads a snapshot, trusting nothing in it. Returns what it is of, its entries in the order in
/// which they were written, and its checksum.
///
/// # Errors
/// [`Error::DataLost`] when it is not a whole snapshot of this version.
pub fn decode(bytes: &[u8]) -> Result<(Subject, Vec<SnapshotEntry>, u64)> {
    let (head, body) = bytes.split_at_checked(size_of::<SnapshotHeader>()).ok_or_else(|| damaged("it is too short"))?;
    let header: SnapshotHeader = bytemuck::pod_read_unaligned(head);
    let known = [VERSION, VERSION_UNTAGGED].contains(&header.version);
    if header.magic != MAGIC || !known || u64::from(header.record_bytes) != RECORD_BYTES {
        return Err(damaged("it is no snapshot of this version"));
    }
    if header.count.checked_mul(RECORD_BYTES) != Some(body.len() as u64) {
        return Err(damaged("its length does not fit its count"));
    }
    if file_sum(&SnapshotHeader { checksum: 0, ..header }, body) != header.checksum {
        return Err(damaged("checksum mismatch"));
    }
    let subject =
        Subject { store: header.store, cache_generation: header.cache_generation, next_sequence: header.next_sequence };
    let tagged = header.version == VERSION;
    let entries: Result<Vec<SnapshotEntry>> =
        body.chunks_exact(size_of::<SnapshotRecord>()).map(|bytes| entry(bytes, tagged)).collect();
    Ok((subject, entries?, header.checksum))
}

fn entry(bytes: &[u8], tagged: bool) -> Result<SnapshotEntry> {
    let record: SnapshotRecord = bytemuck::pod_read_unaligned(bytes);
    let hash = record.hash.get(..usize::from(record.hash_len)).and_then(BlockHash::new);
    let hash = hash.ok_or_else(|| damaged("hash length"))?;
    Ok(SnapshotEntry {
        extent: ExtentIndex(record.extent),
        key: BlockKey { hash, group: GroupIndex(record.group) },
        sequence: record.sequence,
        written_s: record.written_s,
        salt: if tagged { record.salt } else { SaltTag::UNKNOWN },
    })
}

/// Reads the snapshot of the store in `dir`, which lists at most `entries_max` extents.
///
/// # Errors
/// [`Error::DataLost`], [`Error::Io`], or [`Error::Config`] when others may write it.
pub fn load(dir: &Path, entries_max: u32) -> Result<(Subject, Vec<SnapshotEntry>, u64)> {
    let path = dir.join(NAME);
    let fail = |error| Error::io("reading", &path, error, directory::REMEDY);
    let file = directory::open(&path, How::Existing)?;
    let bytes_max = HEADER_BYTES + RECORD_BYTES * u64::from(entries_max);
    let len = file.metadata().map_err(fail)?.len();
    if len > bytes_max {
        return Err(damaged("it is longer than its store allows"));
    }
    let mut bytes = Vec::with_capacity(len as usize + 1);
    file.take(bytes_max).read_to_end(&mut bytes).map_err(fail)?;
    decode(&bytes)
}

fn file_sum(header: &SnapshotHeader, records: &[u8]) -> u64 {
    let mut hasher = Xxh3Default::new();
    hasher.update(bytemuck::bytes_of(header));
    hasher.update(records);
    hasher.digest()
}
