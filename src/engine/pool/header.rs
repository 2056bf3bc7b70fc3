//! The header of a pool file: what it was made for, and who owns it now.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use bytemuck::{Pod, Zeroable};
use xxhash_rust::xxh3::xxh3_64;

use super::layout::Layout;
use super::mapping::Mapping;
use crate::limits;
use kvcellar_block::error::{Error, Result};

/// Version of everything in a pool file.
pub const FORMAT_VERSION: u32 = 4;

const MAGIC: [u8; 8] = *b"KVCELLAR";
const OWNER_OFFSET: usize = 1024;
const FACTS_OFFSET: usize = limits::HEADER_BYTES as usize / 2;

/// What a pool was made for; never changes after creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Purpose {
    magic: [u8; 8],
    version: u32,
    /// Ranks whose parts a slot holds.
    pub ranks: u32,
    /// Slots in the file.
    pub slot_count: u64,
    /// Bytes from one slot to the next.
    pub slot_bytes: u64,
    /// Bytes of a slot's descriptor pages.
    pub descriptor_bytes: u64,
    /// Lines of the slot table, of which `slot_count` are in use.
    pub table_slots: u64,
    /// Fingerprint of everything that makes bytes interchangeable.
    pub namespace: [u8; 16],
    /// When it was made, in seconds since 1970.
    pub created_s: u64,
    facts_bytes: u64,
    checksum: u64,
}

impl Purpose {
    /// Describes a new pool.
    pub fn new(namespace: [u8; 16], ranks: u32, layout: Layout, descriptor_bytes: u64) -> Self {
        let created_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self {
            magic: MAGIC,
            version: FORMAT_VERSION,
            ranks,
            slot_count: layout.slots,
            slot_bytes: layout.slot_bytes,
            descriptor_bytes,
            table_slots: layout.table_slots,
            namespace,
            created_s,
            facts_bytes: 0,
            checksum: 0,
        }
    }

    /// Same purpose: the pool of another start may be adopted, whatever its size.
    pub fn fits(&self, other: &Self) -> bool {
        (self.namespace, self.ranks, self.slot_bytes, self.descriptor_bytes)
            == (other.namespace, other.ranks, other.slot_bytes, other.descriptor_bytes)
    }

    /// How the file is divided. `None`: into more than a pool can have.
    pub fn layout(&self) -> Option<Layout> {
        let Self { slot_count: slots, table_slots, slot_bytes, .. } = *self;
        let sane = slots >= 1 && slots <= table_slots && table_slots <= limits::SLOTS_MAX && slot_bytes > 0;
        sane.then_some(Layout { slots, table_slots, slot_bytes })
    }

    /// The same with another number of slots.
    pub(super) fn with_slots(&self, slot_count: u64) -> Self {
        Self { slot_count, ..*self }
    }

    fn sum(&self) -> u64 {
        xxh3_64(bytemuck::bytes_of(&Self { checksum: 0, ..*self }))
    }

    /// Reads the start of a pool file, trusting nothing in it.
    ///
    /// # Errors
    /// [`Error::DataLost`] when it is not a whole header of this version.
    pub fn read(bytes: &[u8]) -> Result<Self> {
        let head = bytes.get(..size_of::<Self>()).ok_or_else(|| Error::lost("pool header", "the file is too short"))?;
        let purpose: Self = bytemuck::pod_read_unaligned(head);
        if purpose.magic != MAGIC || purpose.version != FORMAT_VERSION {
            return Err(Error::lost("pool header", "it is no pool of this version"));
        }
        if purpose.sum() != purpose.checksum {
            return Err(Error::lost("pool header", "checksum mismatch"));
        }
        Ok(purpose)
    }

    /// The facts behind the namespace, as JSON, cut to what fits.
    pub fn facts(&self, bytes: &[u8]) -> String {
        let len = (self.facts_bytes as usize).min(limits::FACTS_BYTES_MAX);
        bytes
            .get(FACTS_OFFSET..FACTS_OFFSET + len)
            .map_or(String::new(), |facts| String::from_utf8_lossy(facts).into_owned())
    }
}

#[repr(C)]
struct Owner {
    epoch: AtomicU64,
    cache_generation: AtomicU64,
    pid: AtomicU32,
    bell: AtomicU32,
    /// Not 0: the contents are worth something to the present owner's process only.
    private: AtomicU32,
    reserved: AtomicU32,
}

/// A view of a mapped pool's header.
#[derive(Clone, Copy)]
pub struct Header<'a> {
    map: &'a Mapping,
}

impl<'a> Header<'a> {
    pub(super) fn of(map: &'a Mapping) -> Self {
        Self { map }
    }

    fn owner(self) -> &'a Owner {
        // SAFETY: the header pages are inside every mapping (`Mapping::of` checks the length), the
        // offset is aligned, the struct is made of atomics only, and the mapping outlives 'a.
        unsafe { self.map.at(OWNER_OFFSET, size_of::<Owner>()).cast::<Owner>().as_ref() }
    }

    /// Writes the purpose and the facts. Only the creator calls this, before anyone else maps the
    /// file.
    pub(super) fn write(self, mut purpose: Purpose, facts: &str) {
        let facts = &facts.as_bytes()[..facts.len().min(limits::FACTS_BYTES_MAX)];
        purpose.facts_bytes = facts.len() as u64;
        purpose.checksum = purpose.sum();
        let head = bytemuck::bytes_of(&purpose);
        // SAFETY: both ranges lie inside the header pages; the caller holds the owner lock and no
        // other process maps the file yet.
        unsafe {
            self.map.at(FACTS_OFFSET, facts.len()).as_ptr().copy_from_nonoverlapping(facts.as_ptr(), facts.len());
            self.map.at(0, head.len()).as_ptr().copy_from_nonoverlapping(head.as_ptr(), head.len());
        }
    }

    /// Writes a purpose that names another number of slots. Only the owner calls this, while nobody
    /// else maps the file.
    pub(super) fn rewrite(self, mut purpose: Purpose) {
        purpose.checksum = purpose.sum();
        let head = bytemuck::bytes_of(&purpose);
        // SAFETY: the range lies inside the header pages; the caller holds both locks exclusively,
        // so nobody reads it meanwhile.
        unsafe { self.map.at(0, head.len()).as_ptr().copy_from_nonoverlapping(head.as_ptr(), head.len()) };
    }

    /// Takes the pool over: a new epoch, so that nobody attaches with an older ticket.
    pub(super) fn take_over(self, epoch: u64) {
        self.owner().pid.store(std::process::id(), Ordering::Relaxed);
        self.owner().epoch.store(epoch, Ordering::Release);
    }

    /// The present owner's epoch.
    pub fn epoch(self) -> u64 {
        self.owner().epoch.load(Ordering::Acquire)
    }

    /// The word that any process changes to wake the owner's mover.
    pub fn bell(self) -> &'a AtomicU32 {
        &self.owner().bell
    }

    /// Wakes the owner's mover.
    pub fn ring(self) {
        self.owner().bell.fetch_add(1, Ordering::AcqRel);
        super::futex::wake(&self.owner().bell);
    }

    /// Process id of the last owner.
    pub fn owner_pid(self) -> u32 {
        self.owner().pid.load(Ordering::Relaxed)
    }

    /// The generation that `reset_cache` bumps: slots of an earlier one are never adopted.
    pub fn cache_generation(self) -> u64 {
        self.owner().cache_generation.load(Ordering::Acquire)
    }

    /// Says that what is stored from here on belongs to this process alone: no later start adopts
    /// this pool. Lasts as long as the file, also when the process is killed.
    pub fn make_private(self) {
        self.owner().private.store(1, Ordering::Release);
    }

    /// Whether no later start may adopt this pool.
    pub fn is_private(self) -> bool {
        self.owner().private.load(Ordering::Acquire) != 0
    }

    /// Makes everything stored so far worthless, and what is stored from here on private: weights
    /// that changed in a process exist nowhere else. The mark comes first, so that no kill in
    /// between leaves blocks of the new weights to be adopted.
    pub fn bump_cache_generation(self) -> u64 {
        self.make_private();
        self.owner().cache_generation.fetch_add(1, Ordering::AcqRel) + 1
    }
}

/// Whether no later start may adopt the pool with these first bytes.
pub fn is_private_in(bytes: &[u8]) -> bool {
    let at = OWNER_OFFSET + std::mem::offset_of!(Owner, private);
    bytes.get(at..at + 4).is_none_or(|mark| bytemuck::pod_read_unaligned::<u32>(mark) != 0)
}

/// Process id of the last owner, from the first bytes of a pool file that is not mapped.
pub fn owner_pid_in(bytes: &[u8]) -> Option<u32> {
    let at = OWNER_OFFSET + std::mem::offset_of!(Owner, pid);
    bytes.get(at..at + 4).map(bytemuck::pod_read_unaligned)
}

/// The header pages of a pool file.
pub(super) fn head(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limits::HEADER_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}
