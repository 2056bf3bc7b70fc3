//! The shared host pool: one shared-memory file that holds the dram tier's slots.
//!
//! Owns: the file, its locks, its header, the slot table and the memory of the slots. Promises:
//! memory is populated before anyone uses it (an error, never a SIGBUS); a pool is never shared
//! with a process of an earlier engine that may still write. Does not decide which block lies
//! where: that is the tier engine's.
//!
//! File layout: header ([`limits::HEADER_BYTES`]), slot table (one cache line a slot,
//! page-aligned), slots.
//!
//! Sizes: [`ledger`] says what all engines of this user may have together, [`budget`] what the
//! machine can give.

mod adopt;
pub mod budget;
pub mod cgroup;
pub mod claim;
pub mod directory;
pub mod erasure;
pub mod file_system;
pub mod futex;
pub mod header;
pub mod huge_pages;
pub mod layout;
pub mod ledger;
pub mod mapping;
pub mod memory;
pub mod open;
pub mod pages;
mod placement;
pub mod registry;
pub mod slot_table;
mod sync;
pub mod watch;
mod wish;

use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::limits;
use crate::owned::lock::FileLocks;
use kvcellar_block::descriptor;
use kvcellar_block::error::{Error, Result};
use kvcellar_block::{GroupIndex, SlotGeometry, SlotIndex};

use claim::Claim;
use header::Header;
use layout::Layout;
use mapping::Mapping;
use slot_table::SlotLine;

/// What a worker needs to attach: travels with the first connector metadata after the pool is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// The pool file.
    pub path: PathBuf,
    /// The owner's epoch: a worker refuses a pool that has another one.
    pub epoch: u64,
    /// Slots in the pool.
    pub slot_count: u32,
    /// Lines of its slot table.
    pub table_slots: u32,
    /// Sizes of a slot.
    pub geometry: SlotGeometry,
}

/// A mapped pool. Dropping it unmaps the memory first and lets go of the locks last.
#[derive(Debug)]
pub struct Pool {
    map: Mapping,
    path: PathBuf,
    slot_count: u32,
    table_slots: u32,
    slots_offset: usize,
    geometry: SlotGeometry,
    huge: OnceLock<u64>,
    // Fields drop in this order: the memory is unmapped before others may take it over.
    claim: OnceLock<Claim>,
    locks: FileLocks,
}

/// The system's page, in bytes: 4 KiB, or more on some ARM64 systems.
pub fn system_page_bytes() -> u64 {
    // SAFETY: sysconf takes an integer and touches no memory of ours.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).ok().filter(|bytes| bytes.is_power_of_two()).unwrap_or(limits::SLOT_ALIGN)
}

impl Pool {
    fn assemble(
        map: Mapping,
        path: PathBuf,
        (slot_count, table_slots): (u32, u32),
        geometry: SlotGeometry,
        locks: FileLocks,
    ) -> Result<Self> {
        let (slots, lines) = (u64::from(slot_count), u64::from(table_slots));
        let layout = Layout { slots, table_slots: lines, slot_bytes: geometry.slot_bytes };
        let wanted = layout.file_bytes(map.page_bytes());
        if map.len() as u64 != wanted || slot_count > table_slots {
            return Err(Error::lost("pool file", format!("{} has {} bytes, not {wanted}", path.display(), map.len())));
        }
        let slots_offset = layout.slots_offset() as usize;
        Ok(Self {
            map,
            path,
            slot_count,
            table_slots,
            slots_offset,
            geometry,
            huge: OnceLock::new(),
            claim: OnceLock::new(),
            locks,
        })
    }

    /// Attaches to the pool that a ticket names. Called by workers.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be opened, [`Error::DataLost`] when it is not the pool
    /// the ticket means, [`Error::TryLater`] when somebody is replacing it.
    pub fn attach(ticket: &Ticket) -> Result<Self> {
        let file = directory::open_private(&ticket.path)?;
        let locks = FileLocks::attach(file.try_clone().map_err(|error| io(&ticket.path, error))?, &ticket.path)?;
        let map = Mapping::of(&file, &ticket.path)?;
        let counts = (ticket.slot_count, ticket.table_slots);
        let pool = Self::assemble(map, ticket.path.clone(), counts, ticket.geometry.clone(), locks)?;
        let epoch = pool.header().epoch();
        if epoch != ticket.epoch {
            return Err(Error::lost("pool file", format!("epoch {epoch:x} is not the ticket's {:x}", ticket.epoch)));
        }
        Ok(pool)
    }

    /// What workers need to attach to this pool.
    pub fn ticket(&self) -> Ticket {
        Ticket {
            path: self.path.clone(),
            epoch: self.header().epoch(),
            slot_count: self.slot_count,
            table_slots: self.table_slots,
            geometry: self.geometry.clone(),
        }
    }

    /// The pool file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of slots.
    pub fn slot_count(&self) -> u32 {
        self.slot_count
    }

    /// Sizes of a slot.
    pub fn geometry(&self) -> &SlotGeometry {
        &self.geometry
    }

    /// Bytes of the whole file.
    pub fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// Bytes of it that lie in huge pages, as the system told when this was first asked.
    pub fn huge_bytes(&self) -> u64 {
        let start = self.start().addr().get();
        *self.huge.get_or_init(|| huge_pages::bytes_in(&(start..start + self.map.len())))
    }

    /// First byte of the mapping.
    pub fn start(&self) -> NonNull<u8> {
        self.map.at(0, 0)
    }

    /// Where a slot's image (descriptor pages, then payload) begins in the mapping, a multiple of
    /// [`limits::SLOT_ALIGN`].
    pub fn image_offset(&self, slot: SlotIndex) -> usize {
        self.slot_offset(slot)
    }

    /// The header's changing part.
    pub fn header(&self) -> Header<'_> {
        Header::of(&self.map)
    }

    /// Maps pages that exist into this process, so that the first accesses do not fault on each.
    /// For workers, beside others that write: where the system refuses, accesses fault as they
    /// come.
    pub fn touch(&self) {
        pages::touch(&self.map);
    }

    /// A slot's line in the slot table.
    #[inline]
    pub fn line(&self, slot: SlotIndex) -> &SlotLine {
        debug_assert!(slot.0 < self.slot_count);
        Self::line_in(&self.map, slot)
    }

    #[inline]
    fn line_in(map: &Mapping, slot: SlotIndex) -> &SlotLine {
        let offset = limits::HEADER_BYTES as usize + slot.0 as usize * size_of::<SlotLine>();
        // SAFETY: `at` checks that the line lies inside the mapping, it is aligned to a cache line,
        // SlotLine is made of atomics only, so sharing it with other threads and processes is
        // sound, and the mapping lives as long as the reference.
        unsafe { map.at(offset, size_of::<SlotLine>()).cast::<SlotLine>().as_ref() }
    }

    /// Start of a slot's payload. The bytes belong to whoever holds the slot by the rules of the
    /// slot table.
    #[inline]
    pub fn payload(&self, slot: SlotIndex) -> NonNull<u8> {
        let geometry = &self.geometry;
        let len = (geometry.slot_bytes - geometry.descriptor_bytes) as usize;
        self.map.at(self.slot_offset(slot) + geometry.descriptor_bytes as usize, len)
    }

    /// Asks the processor to fetch the start of a slot's descriptor, for a write soon.
    #[inline]
    pub fn prefetch_descriptor(&self, slot: SlotIndex) {
        let start = self.map.at(self.slot_offset(slot), 256).as_ptr();
        #[cfg(target_arch = "x86_64")]
        // SAFETY: prefetching reads nothing and faults never; the address is inside the mapping
        // anyway.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            for line in 0..4 {
                _mm_prefetch(start.add(64 * line).cast::<i8>(), _MM_HINT_T0);
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = start;
    }

    /// Runs `write` on a slot's descriptor pages. Only the tier engine calls this, and only for a
    /// slot it is about to hand out.
    pub fn with_descriptor_mut<T>(&self, slot: SlotIndex, write: impl FnOnce(&mut [u8]) -> T) -> T {
        let len = self.geometry.descriptor_bytes as usize;
        let start = self.map.at(self.slot_offset(slot), len);
        // SAFETY: the range lies inside the mapping, which lives as long as `self`. Only the single
        // owner of the pool (the tier engine, behind its lock) reads or writes descriptors; ranks
        // touch the checksum pairs alone, as atomics, and only of slots that are filled, which this
        // slot is not.
        write(unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len) })
    }

    /// A copy of a slot's descriptor pages, for adoption.
    pub fn descriptor(&self, slot: SlotIndex) -> Vec<u8> {
        self.with_descriptor_mut(slot, |bytes| bytes.to_vec())
    }

    /// The `(generation, checksum)` pair of one rank's part of a slot.
    pub fn checksum_pair(&self, slot: SlotIndex, rank: usize) -> &[AtomicU64; 2] {
        debug_assert!(rank < self.geometry.parts.len());
        let offset = self.slot_offset(slot) + descriptor::checksum_offset(rank);
        // SAFETY: inside the descriptor pages of a slot inside the mapping; 16-byte steps from a
        // 4096-aligned start keep 8-byte alignment; two atomics may be shared with other processes;
        // the mapping lives as long as `self`.
        unsafe { self.map.at(offset, 16).cast::<[AtomicU64; 2]>().as_ref() }
    }

    /// The checksum a rank stored for a generation of a slot, if it did.
    pub fn checksum(&self, slot: SlotIndex, rank: usize, generation: u32) -> Option<u64> {
        let [owner, sum] = self.checksum_pair(slot, rank);
        // Generation 0 never names a filled slot, so that a fresh page holds no checksum.
        (owner.load(Ordering::Acquire) == u64::from(generation) && generation != 0).then(|| sum.load(Ordering::Relaxed))
    }

    /// Records a rank's checksum for a generation of a slot. Only that rank's hasher calls this.
    pub fn set_checksum(&self, slot: SlotIndex, rank: usize, generation: u32, checksum: u64) {
        let [owner, sum] = self.checksum_pair(slot, rank);
        owner.store(0, Ordering::Relaxed);
        sum.store(checksum, Ordering::Release);
        owner.store(u64::from(generation), Ordering::Release);
    }

    /// Overwrites a slot with zeros, descriptor and payload. Only the tier engine calls this, for a
    /// slot that is empty and that nobody copies to or from.
    pub fn erase(&self, slot: SlotIndex) {
        let (ranks, bytes) = (self.geometry.parts.len(), self.geometry.slot_bytes as usize);
        // A hasher that began when the slot was filled may still store its pair: these are atomics.
        for rank in 0..ranks {
            self.checksum_pair(slot, rank).iter().for_each(|word| word.store(0, Ordering::Relaxed));
        }
        let (first, second) = (descriptor::checksum_offset(0), descriptor::checksum_offset(ranks));
        for range in [0..first, second..bytes] {
            self.zero(slot, range);
        }
    }

    /// Overwrites with zeros what no block of a group fills: another group's are larger, and one
    /// may have lain there. Only the tier engine calls this, for a slot that is to be filled and
    /// that nobody copies to or from.
    pub fn erase_tail(&self, slot: SlotIndex, group: GroupIndex) {
        let payloads = &self.geometry.payload_bytes;
        let most = payloads.iter().copied().max().unwrap_or(0);
        let own = payloads.get(usize::from(group.0)).copied().unwrap_or(0);
        let [from, to] = [own, most].map(|end| (self.geometry.descriptor_bytes + end) as usize);
        self.zero(slot, from..to);
    }

    /// Overwrites bytes of a slot, whose checksum pairs are not among them.
    fn zero(&self, slot: SlotIndex, range: std::ops::Range<usize>) {
        if range.is_empty() {
            return;
        }
        let start = self.map.at(self.slot_offset(slot) + range.start, range.len());
        // SAFETY: the range lies inside the mapping, which lives as long as `self`; by the slot
        // table's rules nobody writes a slot that is empty or that no copy was ordered into, and
        // who still reads one (a late hasher) uses nothing of it.
        unsafe { start.as_ptr().write_bytes(0, range.len()) };
    }

    /// Removes the file's name. The memory goes when the last process unmaps it.
    ///
    /// # Errors
    /// [`Error::Io`] when the name is not ours to remove.
    pub fn unlink(&self) -> Result<()> {
        self.locks.unlink(&self.path)
    }

    /// Removes the file's name, and leaves a claim in its place, so that the memory still counts
    /// among what all engines have. The claim goes with this pool.
    ///
    /// # Errors
    /// [`Error::Io`] when no claim can be made (the pool keeps its name then), or the name is not
    /// ours to remove.
    pub fn hide(&self) -> Result<()> {
        if self.claim.get().is_none() {
            let claim = Claim::stake(&self.path, self.header().epoch(), self.bytes())?;
            // Whoever was quicker has staked the same claim.
            drop(self.claim.set(claim));
        }
        self.unlink()
    }

    fn slot_offset(&self, slot: SlotIndex) -> usize {
        debug_assert!(slot.0 < self.slot_count);
        self.slots_offset + (u64::from(slot.0) * self.geometry.slot_bytes) as usize
    }
}

fn io(path: &Path, source: std::io::Error) -> Error {
    Error::io("opening the pool", path, source, "Check the rights of the directory, or set pool_dir to another tmpfs")
}
