//! Every bound of the engine in one place, what happens when it is reached, and the relations
//! between bounds. Those of blocks themselves are among them.

pub use kvcellar_block::limits::*;

/// Bytes at the start of a pool file that hold its header and the namespace's facts.
pub const HEADER_BYTES: u64 = 65_536;

/// Bytes of JSON facts kept in the header for people (`kvcellar pool ls`). Longer facts are cut off
/// there; the fingerprint covers all.
pub const FACTS_BYTES_MAX: usize = 32_768;

/// Slots of one pool: slot numbers are 32 bits and the block table keeps twice as many entries. The
/// pool is capped at it.
pub const SLOTS_MAX: u64 = 1 << 30;

/// Blocks whose offload may be in flight at once. At the bound further stores of the step are
/// dropped and counted (`dropped_blocks{reason="queue_full"}`): a dropped store is only a later
/// miss.
pub const INFLIGHT_STORES_MAX: usize = 1 << 16;

/// Events that may wait for a step. At the bound new events are not appended; the loss is counted
/// and logged.
pub const EVENTS_PENDING_MAX: usize = 1 << 21;

/// Block events handed to vLLM in one step, so that re-announcing a large pool never makes one step
/// slow.
pub const EVENTS_PER_STEP_MAX: usize = 8192;

/// Latency samples kept between two collections of metrics. Further samples of the interval are
/// counted, not timed.
pub const LATENCY_SAMPLES_MAX: usize = 512;

/// Pools of one namespace on one machine. An engine that finds all of them taken serves without
/// tiers and says who holds them.
pub const POOL_INDEX_MAX: u32 = 64;

/// How long a start waits for others that are making their pools in the same directory, in ms:
/// populating a terabyte takes minutes.
pub const POOL_TURN_WAIT_MS: u64 = 600_000;

/// Lines of a capped pool's slot table for each slot it has, at most: so far it can grow later
/// without losing its blocks.
pub const TABLE_HEADROOM: u64 = 8;

/// How long a start waits for the processes of a dead engine to let go of its pool before it makes
/// a new file, in ms.
pub const ADOPTION_WAIT_MS: u64 = 10_000;

/// How long a request may be asked to wait for another request's load of the same prefix, in ms.
pub const SHARED_LOAD_WAIT_MS: u64 = 10;

/// How long `pending_work` keeps an idle engine stepping without any progress, in ms.
pub const PENDING_WORK_STALL_MS: u64 = 2_000;

/// Chunk of the pool that one thread populates at a time, in bytes.
pub const POPULATE_CHUNK_BYTES: usize = 64 << 20;

/// Share of available memory that a pool never takes, in percent, so that the machine stays usable.
pub const MEMORY_RESERVE_PERCENT: u64 = 5;

/// What a pool leaves of the machine's common shared memory (`/dev/shm`) to vLLM's processes and
/// others, in bytes. vLLM 0.32 starts no worker process where less is free than one of its
/// message queues may come to, 240 MiB; so that the next start is not refused for a pool that was
/// kept, this is more.
pub const SHARED_MEMORY_KEPT_BYTES: u64 = 320 << 20;
/// Share that a pool leaves where all of it is less than [`SHARED_MEMORY_KEPT_BYTES`], in percent:
/// vLLM can have no queues there, and serves with its worker in EngineCore's process.
pub const SHARED_MEMORY_KEPT_PERCENT: u64 = 25;
/// Share that a pool leaves at most, in percent: where there is memory there is a pool.
pub const SHARED_MEMORY_KEPT_PERCENT_MAX: u64 = 75;

/// Hashes that may wait for the idle hasher. At the bound the oldest waits are kept and new ones
/// are skipped: such a block is served as ever and merely not adopted by a later start.
pub const HASH_QUEUE_MAX: usize = 1 << 20;

/// Bytes being written to disk at once, or [`SPILLS_IN_FLIGHT_MIN`] blocks, whichever is more. At
/// the bound further dirty blocks wait for a write to end; evicted meanwhile they are dropped and
/// counted.
pub const SPILL_BYTES_IN_FLIGHT_MAX: u64 = 64 << 20;
/// Blocks that may be written at once whatever their size.
pub const SPILLS_IN_FLIGHT_MIN: u64 = 16;

/// Adjacent slots that lie adjacent on disk too are transferred in one operation of at most this
/// many bytes.
pub const TRANSFER_BYTES_MAX: u64 = 4 << 20;

/// Slots set aside for restores that find no slot of their own: a share of the pool, within bounds.
/// Restores beyond wait for a slot of the window.
pub const WINDOW_POOL_SHARE: u32 = 32;
/// Fewest slots of the window.
pub const WINDOW_SLOTS_MIN: u32 = 2;
/// Most slots of the window.
pub const WINDOW_SLOTS_MAX: u32 = 64;

/// Free space beside the reserve below which a start says that its nvme tier holds nothing, in
/// bytes: a few blocks of a large model.
pub const NVME_ROOM_MIN: u64 = 64 << 20;

/// How long a transfer may take, in ms. After that its restore fails (its buffer stays with the
/// device until it answers), and the device is counted as failing.
pub const DISK_DEADLINE_MS: u64 = 10_000;

/// Device errors in a row after which the nvme tier goes out of service.
pub const DISK_ERRORS_MAX: u32 = 3;

/// First and longest time out of service before the disk is tried again, in ms.
pub const DISK_BACKOFF_MS: (u64, u64) = (1_000, 60_000);

/// How long a stopping engine writes dirty blocks to disk, in ms. vLLM kills it 5 s after asking it
/// to stop, and ends its workers first, which takes up to 3 s of that.
pub const FLUSH_MS: u64 = 1_500;

/// Blocks of a reopened store whose descriptors are read for their announcement at once.
pub const ANNOUNCE_BATCH: usize = 64;

/// Bytes of slots that are overwritten at once, after their salt was forgotten: about a
/// millisecond.
pub const ERASE_BYTES_PER_ROUND: u64 = 8 << 20;

/// How long further slots wait after that, in ms: the engine's lock is for requests meanwhile.
pub const ERASE_PAUSE_MS: u64 = 4;

/// Bytes on disk that the mover overwrites at once, durably, after their salt was forgotten.
/// Between two such jobs it looks after reads and writes.
pub const ERASE_BYTES_PER_JOB: u64 = 256 << 20;

/// Extents looked at for their age in one round of the mover.
pub const RETENTION_BATCH: u32 = 4096;

/// How often the mover looks after itself when nothing wakes it, in ms: while work is under way,
/// and idle.
pub const MOVER_TICK_MS: (u64, u64) = (5, 500);

const _: () = assert!(FLUSH_MS + 3_000 < 5_000, "vLLM's parent kills EngineCore 5 s after it asked it to stop");
const _: () = assert!(ANNOUNCE_BATCH < EVENTS_PER_STEP_MAX, "announcing never floods a step");

// The NVMe tier's disk.

/// Segment files of one disk, which is the size of the ring's file table. Adding more is refused.
pub const DISK_SEGMENTS_MAX: usize = 4096;

/// Submission entries of the ring.
pub const RING_ENTRIES: u32 = 256;

/// Transfers of one ring that the kernel works on at once. Further ones wait in the queue, reads
/// first.
pub const RING_STARTED_MAX: usize = 254;

/// Bytes that a disk transfers at once, unless it is told otherwise. Further operations wait in the
/// queue. Larger operations go one by one.
pub const DISK_BYTES_IN_FLIGHT: u64 = 64 << 20;

/// Writes get one part in so many of the depth, so that a read never waits behind a pile of writes.
pub const DISK_WRITES_SHARE: usize = 4;

/// Memory in huge pages that transfers pass through where that is faster, in bytes: what is in
/// flight. Further transfers wait for a place in it.
pub const STAGING_BYTES: u64 = DISK_BYTES_IN_FLIGHT;

/// Share of the pool that staging may come to, at most: with smaller pools transfers go directly.
pub const STAGING_POOL_SHARE: u64 = 4;

/// Bytes that are written and read to find out whether a disk is faster with huge pages.
pub const PAGE_TRIAL_BYTES: u64 = 16 << 20;

/// How often they are read, each way.
pub const PAGE_TRIAL_ROUNDS: usize = 5;

/// Reads into huge pages must be so many times as fast for a further copy to pay.
pub const PAGE_TRIAL_GAIN: f64 = 1.1;

/// A disk that takes longer to write them, in ms, is not slow by its pages.
pub const PAGE_TRIAL_PATIENCE_MS: u64 = 250;

/// Threads of a disk without `io_uring`, and so its transfers at once. More are not started.
pub const DISK_THREADS_MAX: usize = 64;

/// Threads of a disk without `io_uring`, unless it is told otherwise.
pub const DISK_THREADS: usize = 8;

/// Longest piece of memory that is registered with the kernel at once, in bytes: the kernel takes
/// no longer ones. A buffer across a border of pieces is transferred like unregistered memory.
pub const REGISTERED_PIECE_BYTES: usize = 1 << 30;

/// Pieces of registered memory the kernel takes. Regions that need more stay unregistered.
pub const REGISTERED_PIECES_MAX: usize = 1 << 14;

/// How often a transfer that was interrupted or told to try again is repeated. Then the error is
/// the submitter's.
pub const TRANSFER_RETRIES_MAX: u32 = 100;

/// Pause of a ring that the kernel momentarily takes nothing from, in ms.
pub const RING_PAUSE_MS: u64 = 1;

/// How long a closing disk whose ring failed waits for transfers that the kernel still holds, in
/// ms. Then their memory is given up, never reused.
pub const RING_FAILED_WAIT_MS: u64 = 5_000;

const _: () = assert!(PAGE_TRIAL_BYTES.is_multiple_of(TRANSFER_BYTES_MAX), "whole transfers");
const _: () = assert!(FACTS_BYTES_MAX < HEADER_BYTES as usize / 2 + 1, "facts fit into the header");
const _: () = assert!(HEADER_BYTES.is_multiple_of(SLOT_ALIGN), "the slot table starts aligned");
const _: () = assert!(SLOTS_MAX < (u32::MAX / 2) as u64, "the block table stores slot + 1 in 32 bits");
const _: () = assert!(INFLIGHT_STORES_MAX < EVENTS_PENDING_MAX, "all in-flight stores can announce themselves");
const _: () = assert!(EVENTS_PER_STEP_MAX < EVENTS_PENDING_MAX, "a step drains less than the queue holds");

// The on-disk store of the NVMe tier.

/// Stores of one namespace below one directory. An engine that finds all of them taken serves
/// without an nvme tier and says who holds them.
pub const STORE_INDEX_MAX: u32 = 64;

/// Segments that a store's capacity is divided into, as long as their size stays between the two
/// bounds below.
pub const SEGMENT_SHARES: u64 = 64;

/// Smallest segment, in bytes. A store that does not hold one has a single segment of what its
/// capacity leaves.
pub const SEGMENT_BYTES_MIN: u64 = 64 << 20;

/// Largest segment, in bytes: larger stores have more of them.
pub const SEGMENT_BYTES_MAX: u64 = 4 << 30;

/// Segments of one store. Capacity beyond them is not used; a store that was made much smaller is
/// made anew.
pub const SEGMENTS_MAX: u32 = 4096;

/// Extents of one store: extent numbers are 32 bits. Capacity beyond them is not used.
pub const EXTENTS_MAX: u32 = 1 << 30;

/// Bytes of the slot geometry, as JSON, in a superblock. A geometry that needs more gets no store.
pub const GEOMETRY_BYTES_MAX: usize = 1 << 20;

/// Descriptors that are read at once when a store is scanned: enough to keep a device busy. Memory:
/// one descriptor each.
pub const SCAN_DEPTH: usize = 256;

/// How long a start waits for another one that looks after the stores of the same directory, in ms.
/// Then it serves without an nvme tier and says so.
pub const LEDGER_WAIT_MS: u64 = 60_000;

/// Bytes that this user's directory and its ledger take beside the stores.
pub const LEDGER_BYTES: u64 = 2 * SLOT_ALIGN;

/// How often a start tries to lock a store that is being replaced or removed at the same moment.
/// Then it counts as taken.
pub const STORE_CLAIM_TRIES: u32 = 3;

const _: () = assert!(SEGMENT_BYTES_MIN <= SEGMENT_BYTES_MAX, "a range");
const _: () = assert!(SEGMENTS_MAX as u64 >= SEGMENT_SHARES, "every share gets its segment");
const _: () = assert!(SEGMENTS_MAX <= 100_000, "segment files are numbered with five digits");
const _: () = assert!(EXTENTS_MAX < u32::MAX, "the number of extents fits beside their indices");
const _: () = assert!(RING_STARTED_MAX + 1 < RING_ENTRIES as usize, "every transfer and the wake fit into the ring");
const _: () = assert!(REGISTERED_PIECE_BYTES.is_multiple_of(SLOT_ALIGN as usize), "pieces end on page borders");

/// Log lines that wait for the host's logger. Further ones are dropped and counted.
pub const LOG_LINES_MAX: usize = 256;

// Copies between GPU memory and the pool.

/// Oldest driver that is used, as the driver tells its version (1000 times CUDA's major number).
/// With an older one vLLM serves without tiers.
pub const DRIVER_VERSION_MIN: i32 = 12_000;

/// Bytes of one job on a stream: few enough that its answers come soon, enough to keep the bus
/// busy. A larger block is a job of its own.
pub const JOB_BYTES: u64 = 16 << 20;

/// Fragments of one job, and of one call that hands over a batch: drivers were seen to fail on
/// larger ones. A block with more is a job of its own.
pub const JOB_FRAGMENTS_MAX: usize = 1024;

/// Fragments that the kernel moves in one job: its last block may pass [`JOB_FRAGMENTS_MAX`].
pub const TABLE_ROWS_MAX: usize = 2 * JOB_FRAGMENTS_MAX;

/// Commands that a lane has on its stream at a time, unless a single job is more: a stream takes
/// about 1,000, and whoever gives it another one then waits.
pub const COMMANDS_IN_FLIGHT_MAX: usize = 512;

/// Jobs in flight in each direction. Further orders wait in the queue, so that loads overtake
/// offloads that have not started.
pub const JOBS_IN_FLIGHT_MAX: usize = 8;

/// How often events of jobs in flight are looked at, in us.
pub const JOB_POLL_US: u64 = 40;

/// Bytes of the pool that are pinned in one call to the driver. The driver takes at most 64 GiB at
/// once; while it pins, other calls of the process wait: smaller pieces keep that short, show
/// progress and let copies start early.
pub const PIN_CHUNK_BYTES: u64 = 256 << 20;

/// Pieces that the driver refuses are tried in halves, down to this size.
pub const PIN_PIECE_BYTES: u64 = 32 << 20;

/// Most bytes the driver pins in one call.
pub const PIN_CALL_BYTES_MAX: u64 = 64 << 30;

/// How long a process's end waits for the piece that is being unpinned, in ms.
pub const UNPIN_EXIT_MS: u64 = 500;

/// Notes for people that wait to be taken. Further ones are dropped.
pub const COPIER_NOTES_MAX: usize = 64;

/// Streaming multiprocessors that the gather kernel may occupy: it has one block for each.
pub const GATHER_SMS: u32 = 8;

/// Bytes that calibration moves each way, for each size of fragment and each way of dispatch.
pub const CALIBRATION_BYTES: u64 = 4 << 20;

/// Bytes of one buffer in the device's memory in which small fragments are packed on their way to
/// the host: enough for the copy engine to be busy for longer than packing the next one takes.
pub const STAGING_BUFFER_BYTES: u64 = 4 << 20;

/// Such buffers: one is emptied, one waits, one is filled, and one to spare.
pub const STAGING_BUFFERS: usize = 4;

const _: () = assert!(PIN_CHUNK_BYTES <= PIN_CALL_BYTES_MAX, "the driver takes a chunk in one call");
const _: () = assert!(PIN_PIECE_BYTES <= PIN_CHUNK_BYTES, "a chunk is at least one piece");
const _: () = assert!(JOBS_IN_FLIGHT_MAX >= 2, "the next job is queued while one runs");

/// Evicted blocks that the adaptive policy remembers for each place of its tier. The oldest is
/// forgotten for a new one: what comes back later is taken for new.
pub const GHOSTS_PER_PLACE: u32 = 4;

/// The least that it remembers: a small tier is evicted from so soon that most blocks come back
/// long after.
pub const GHOSTS_MIN: u32 = 1 << 16;

/// Blocks that the adaptive policy puts behind the block that follows them in their prefix, for one
/// decision. At the bound it takes the end of the prefix at once.
pub const WAITS_PER_VICTIM: u32 = 4096;

/// Blocks at the cold end of the order of eviction that the cleaner looks at, at every hook, where
/// the policy is not LRU. What is evicted beyond them between two hooks may be dirty, and is
/// dropped then.
pub const COLD_END_MAX: usize = 1024;

/// The same where there are tenants: their orders have to be merged for it.
pub const COLD_END_OF_TENANTS_MAX: usize = 256;

/// Requests that wait to be recorded (`record_trace`). At the bound further ones are left out and
/// counted: no request waits for the disk.
pub const RECORD_QUEUE: usize = 4096;

/// Bytes of a record of requests, its older half included. At the bound the older half goes.
pub const RECORD_BYTES_MAX: u64 = 512 << 20;

/// Engines that record their requests to one `record_trace`, each in a file of its own. Further
/// ones are refused.
pub const RECORDS_MAX: u32 = 1024;

/// Pins whose time is over and that are let go at once.
pub const PINS_ENDED_MAX: usize = 4096;

/// Tenants of one engine. An order of eviction is kept for each.
pub const TENANTS_MAX: usize = 16;

// The live what-if.

/// Share of blocks that the what-if samples, where the two bounds below allow it.
pub const WHAT_IF_RATE: f64 = 0.01;

/// Places of the miniature of the present capacity, at least, where the tiers have as many: of
/// small tiers a larger share of the blocks is sampled. Twice as many would cost twice as much for
/// each block, and the error is below a point with these.
pub const WHAT_IF_PLACES_MIN: u32 = 2048;

/// Places of that miniature, at most: of larger tiers a smaller share is sampled, which costs no
/// accuracy. With the one of twice the capacity they take 200 bytes each at most, 10 MiB together.
pub const WHAT_IF_PLACES_MAX: u32 = 1 << 14;

/// Bits of the number of registers that count first uses, one byte each.
pub const WHAT_IF_REGISTER_BITS: u32 = 16;

const _: () = assert!(WHAT_IF_PLACES_MIN < WHAT_IF_PLACES_MAX, "a range");
