//! Every bound of the engine in one place, what happens when it is reached, and the relations between bounds.

/// Ranks (TP x PP) that may share one pool: `parts_done` holds one bit a rank. More ranks are refused at start.
pub const RANKS_MAX: usize = 64;

/// KV cache groups of one model. More are refused at start.
pub const GROUPS_MAX: usize = 256;

/// Tokens of one block. Larger blocks are refused at start.
pub const BLOCK_TOKENS_MAX: u32 = 65_536;

/// Alignment of slots and of everything that may later be written with `O_DIRECT`, in bytes.
pub const SLOT_ALIGN: u64 = 4096;

/// Bytes at the start of a pool file that hold its header and the namespace's facts.
pub const HEADER_BYTES: u64 = 65_536;

/// Bytes of JSON facts kept in the header for people (`kvcellar pool ls`). Longer facts are cut off there; the fingerprint covers all.
pub const FACTS_BYTES_MAX: usize = 32_768;

/// Slots of one pool: slot numbers are 32 bits and the block table keeps twice as many entries. The pool is capped at it.
pub const SLOTS_MAX: u64 = 1 << 30;

/// Blocks whose offload may be in flight at once. At the bound further stores of the step are dropped and counted
/// (`dropped_blocks{reason="queue_full"}`): a dropped store is only a later miss.
pub const INFLIGHT_STORES_MAX: usize = 1 << 16;

/// Events that may wait for a step. At the bound new events are not appended; the loss is counted and logged.
pub const EVENTS_PENDING_MAX: usize = 1 << 21;

/// Block events handed to vLLM in one step, so that re-announcing a large pool never makes one step slow.
pub const EVENTS_PER_STEP_MAX: usize = 8192;

/// Latency samples kept between two collections of metrics. Further samples of the interval are counted, not timed.
pub const LATENCY_SAMPLES_MAX: usize = 512;

/// Pools of one namespace on one machine. A start that finds all of them taken fails and says who holds them.
pub const POOL_INDEX_MAX: u32 = 64;

/// How long a start waits for the processes of a dead engine to let go of its pool before it makes a new file, in ms.
pub const ADOPTION_WAIT_MS: u64 = 10_000;

/// How long a request may be asked to wait for another request's load of the same prefix, in ms.
pub const SHARED_LOAD_WAIT_MS: u64 = 10;

/// How long `pending_work` keeps an idle engine stepping without any progress, in ms.
pub const PENDING_WORK_STALL_MS: u64 = 2_000;

/// Longest request id accepted in a plan, in bytes.
pub const REQUEST_ID_BYTES_MAX: usize = 4096;

/// Bytes reserved in a slot's descriptor for lora name and extra keys. A descriptor that needs more is kept without them and
/// its slot is never adopted.
pub const DESCRIPTOR_EXTRA_BYTES: u64 = 1024;

/// Chunk of the pool that one thread populates at a time, in bytes.
pub const POPULATE_CHUNK_BYTES: usize = 64 << 20;

/// Share of available memory that a pool never takes, in percent, so that the machine stays usable.
pub const MEMORY_RESERVE_PERCENT: u64 = 5;

/// Hashes that may wait for the idle hasher. At the bound the oldest waits are kept and new ones are skipped: such a
/// block is served as ever and merely not adopted by a later start.
pub const HASH_QUEUE_MAX: usize = 1 << 20;

// The NVMe tier's disk.

/// Segment files of one disk, which is the size of the ring's file table. Adding more is refused.
pub const DISK_SEGMENTS_MAX: usize = 4096;

/// Submission entries of the ring.
pub const RING_ENTRIES: u32 = 256;

/// Transfers of one ring that the kernel works on at once. Further ones wait in the queue, reads first.
pub const RING_STARTED_MAX: usize = 254;

/// Bytes that a disk transfers at once, unless it is told otherwise. Further operations wait in the queue. Larger operations go one by one.
pub const DISK_BYTES_IN_FLIGHT: u64 = 64 << 20;

/// Writes get one part in so many of the depth, so that a read never waits behind a pile of writes.
pub const DISK_WRITES_SHARE: usize = 4;

/// Threads of a disk without `io_uring`, and so its transfers at once. More are not started.
pub const DISK_THREADS_MAX: usize = 64;

/// Threads of a disk without `io_uring`, unless it is told otherwise.
pub const DISK_THREADS: usize = 8;

/// Longest piece of memory that is registered with the kernel at once, in bytes: the kernel takes no longer ones. A buffer across a border of pieces
/// is transferred like unregistered memory.
pub const REGISTERED_PIECE_BYTES: usize = 1 << 30;

/// Pieces of registered memory the kernel takes. Regions that need more stay unregistered.
pub const REGISTERED_PIECES_MAX: usize = 1 << 14;

/// How often a transfer that was interrupted or told to try again is repeated. Then the error is the submitter's.
pub const TRANSFER_RETRIES_MAX: u32 = 100;

/// Pause of a ring that the kernel momentarily takes nothing from, in ms.
pub const RING_PAUSE_MS: u64 = 1;

/// How long a closing disk whose ring failed waits for transfers that the kernel still holds, in ms. Then their memory is given up, never reused.
pub const RING_FAILED_WAIT_MS: u64 = 5_000;

const _: () = assert!(RANKS_MAX <= u64::BITS as usize, "one bit a rank");
const _: () = assert!(FACTS_BYTES_MAX < HEADER_BYTES as usize / 2 + 1, "facts fit into the header");
const _: () = assert!(HEADER_BYTES.is_multiple_of(SLOT_ALIGN), "the slot table starts aligned");
const _: () = assert!(SLOTS_MAX < (u32::MAX / 2) as u64, "the block table stores slot + 1 in 32 bits");
const _: () = assert!(INFLIGHT_STORES_MAX < EVENTS_PENDING_MAX, "all in-flight stores can announce themselves");
const _: () = assert!(EVENTS_PER_STEP_MAX < EVENTS_PENDING_MAX, "a step drains less than the queue holds");
const _: () = assert!(RING_STARTED_MAX + 1 < RING_ENTRIES as usize, "every transfer and the wake fit into the ring");
const _: () = assert!(REGISTERED_PIECE_BYTES.is_multiple_of(SLOT_ALIGN as usize), "pieces end on page borders");
