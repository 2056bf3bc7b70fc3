//! Memory that the kernel reads from or writes to, and who keeps it alive.
//!
//! A buffer is a piece of a *region*: the shared host pool, or an arena of its own. It travels with
//! its operation and comes back with the completion, so that nobody can free or reuse it while the
//! kernel may still touch it.

use std::alloc::{self, Layout};
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::{Advice, MmapMut};

use crate::limits::SLOT_ALIGN;
use crate::pool::Pool;
use kvcellar_block::SlotIndex;

/// A stretch of memory that buffers are pieces of, and that a ring may register.
///
/// # Safety
/// `len` bytes from `start` must be mapped and writable, and must not move, for as long as the
/// value lives.
pub unsafe trait Region: Send + Sync {
    /// First byte, aligned to [`SLOT_ALIGN`].
    fn start(&self) -> NonNull<u8>;
    /// Length in bytes.
    fn len(&self) -> usize;
    /// Never true.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

// SAFETY: the mapping lives as long as the pool and is never moved.
unsafe impl Region for Pool {
    fn start(&self) -> NonNull<u8> {
        Pool::start(self)
    }

    fn len(&self) -> usize {
        self.bytes() as usize
    }
}

/// Some slots of a pool, one after the other.
#[derive(Debug)]
pub struct PoolPart {
    pool: Arc<Pool>,
    offset: usize,
    len: usize,
}

impl PoolPart {
    /// `count` slots from `first` on. `None`: the pool has not so many.
    ///
    /// The tier engine keeps them empty until it is dropped: by the slot table's rules nobody else
    /// touches their bytes.
    pub fn new(pool: &Arc<Pool>, first: SlotIndex, count: u32) -> Option<Arc<Self>> {
        if first.0.checked_add(count)? > pool.slot_count() {
            return None;
        }
        let len = count as usize * pool.geometry().slot_bytes as usize;
        Some(Arc::new(Self { pool: Arc::clone(pool), offset: pool.image_offset(first), len }))
    }
}

// SAFETY: the mapping lives as long as the pool and is never moved; the slots end before it does.
unsafe impl Region for PoolPart {
    fn start(&self) -> NonNull<u8> {
        // SAFETY: the slots are a part of the mapping.
        unsafe { self.pool.start().add(self.offset) }
    }

    fn len(&self) -> usize {
        self.len
    }
}

/// Zeroed, page-aligned memory of its own.
#[derive(Debug)]
pub struct Arena {
    start: NonNull<u8>,
    len: usize,
    memory: ArenaMemory,
}

#[derive(Debug)]
enum ArenaMemory {
    Allocated(Layout),
    /// Held for its end.
    Mapped {
        _map: MmapMut,
    },
}

// SAFETY: the arena owns its memory; access to it is governed by the buffers made of it.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

const HUGE_PAGE: usize = 2 << 20;

impl Arena {
    /// `bytes`, rounded up to whole pages.
    ///
    /// # Panics
    /// When the system has no memory: as every allocation of this process.
    #[expect(clippy::expect_used, reason = "a layout of whole pages is valid for every size that memory can have")]
    pub fn new(bytes: usize) -> Arc<Self> {
        let len = whole_pages(bytes);
        let layout = Layout::from_size_align(len, SLOT_ALIGN as usize).expect("whole pages");
        // SAFETY: the layout is not empty.
        let Some(start) = NonNull::new(unsafe { alloc::alloc_zeroed(layout) }) else {
            alloc::handle_alloc_error(layout)
        };
        Arc::new(Self { start, len, memory: ArenaMemory::Allocated(layout) })
    }

    /// As [`Self::new`], but the system is asked for huge pages before any is touched. It gives
    /// them or not. `None`: it has no memory.
    pub fn in_huge_pages(bytes: usize) -> Option<Arc<Self>> {
        Self::mapped(bytes, HUGE_PAGE, Advice::HugePage)
    }

    /// As [`Self::new`], but never in huge pages. `None`: the system has no memory.
    pub fn in_small_pages(bytes: usize) -> Option<Arc<Self>> {
        Self::mapped(bytes, SLOT_ALIGN as usize, Advice::NoHugePage)
    }

    /// Memory that begins at a multiple of `align`, all of it touched.
    fn mapped(bytes: usize, align: usize, advice: Advice) -> Option<Arc<Self>> {
        let len = whole_pages(bytes);
        let mut map = MmapMut::map_anon(len + align - SLOT_ALIGN as usize).ok()?;
        // A kernel that knows no such advice gives what it has.
        let _refused = map.advise(advice);
        let from = map.as_ptr().align_offset(align);
        let start = NonNull::new(map[from..].as_mut_ptr())?;
        map[from..from + len].iter_mut().step_by(SLOT_ALIGN as usize).for_each(|first| *first = 0);
        Some(Arc::new(Self { start, len, memory: ArenaMemory::Mapped { _map: map } }))
    }
}

fn whole_pages(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(SLOT_ALIGN as usize)
}

impl Drop for Arena {
    fn drop(&mut self) {
        if let ArenaMemory::Allocated(layout) = self.memory {
            // SAFETY: allocated with this layout; no buffer is left, because each holds the arena.
            unsafe { alloc::dealloc(self.start.as_ptr(), layout) };
        }
    }
}

// SAFETY: owned until drop.
unsafe impl Region for Arena {
    fn start(&self) -> NonNull<u8> {
        self.start
    }

    fn len(&self) -> usize {
        self.len
    }
}

/// A piece of a region, exclusively its holder's by the rules of whoever hands out the region's
/// pieces (the slot table; an arena's owner).
pub struct Buffer {
    region: Arc<dyn Region>,
    offset: usize,
    len: usize,
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("offset", &self.offset).field("len", &self.len).finish_non_exhaustive()
    }
}

impl Buffer {
    /// Zeroed pages of its own.
    pub fn pages(bytes: usize) -> Self {
        let arena = Arena::new(bytes);
        let len = arena.len();
        Self { region: arena, offset: 0, len }
    }

    /// A piece of a region. Offset and length must be multiples of [`SLOT_ALIGN`].
    ///
    /// # Safety
    /// Until the buffer is dropped nobody else may write these bytes, nor read them while the
    /// buffer is being written.
    ///
    /// # Panics
    /// When the piece passes the region's end: that is a bug of the caller, and going on would
    /// corrupt memory.
    pub unsafe fn of_region(region: Arc<dyn Region>, offset: usize, len: usize) -> Self {
        assert!(offset.checked_add(len).is_some_and(|end| end <= region.len()), "a buffer inside its region");
        debug_assert!(offset.is_multiple_of(SLOT_ALIGN as usize) && len.is_multiple_of(SLOT_ALIGN as usize));
        Self { region, offset, len }
    }

    /// New memory, cut into `count` buffers of `bytes` each, and the region that a ring may
    /// register for them.
    pub fn pieces(count: usize, bytes: usize) -> (Arc<dyn Region>, Vec<Self>) {
        let len = bytes.next_multiple_of(SLOT_ALIGN as usize);
        let arena: Arc<dyn Region> = Arena::new(count * len);
        // SAFETY: the pieces do not overlap, and nobody else knows the arena.
        let piece = |index: usize| unsafe { Self::of_region(Arc::clone(&arena), index * len, len) };
        let pieces = (0..count).map(piece).collect();
        (arena, pieces)
    }

    /// The whole images (descriptor pages and payload) of `slots` adjacent slots.
    ///
    /// The tier engine holds these slots for the operation: filling ones for reads, filled and held
    /// ones for writes. Their ranks' hashers may still write the checksum pairs of a slot that is
    /// being written to disk; readers of the extent do not look at those.
    pub fn slots(pool: &Arc<Pool>, first: SlotIndex, slots: u32) -> Self {
        let len = pool.geometry().slot_bytes as usize * slots as usize;
        let region: Arc<dyn Region> = Arc::clone(pool) as Arc<dyn Region>;
        // SAFETY: see above; the slot table's rules make the pieces exclusive.
        unsafe { Self::of_region(region, pool.image_offset(first), len) }
    }

    /// Address of the first byte.
    pub fn start(&self) -> NonNull<u8> {
        // SAFETY: inside the region, as the constructors checked.
        unsafe { self.region.start().add(self.offset) }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// It has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it lies in its region.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Whether it is a piece of this region.
    pub fn is_of(&self, region: &Arc<dyn Region>) -> bool {
        self.region.start() == region.start()
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped while the region lives, which `self` holds; exclusive by the contract of
        // the constructors.
        unsafe { std::slice::from_raw_parts(self.start().as_ptr(), self.len) }
    }

    /// The bytes, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as `bytes`; exclusive through `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(self.start().as_ptr(), self.len) }
    }
}
