//! Bounds of what a block is, and what happens at them.

/// Ranks (TP x PP) that may share one pool: `parts_done` holds one bit a rank. More ranks are
/// refused at start.
pub const RANKS_MAX: usize = 64;

/// KV cache groups of one model. More are refused at start.
pub const GROUPS_MAX: usize = 256;

/// Tokens of one block. Larger blocks are refused at start.
pub const BLOCK_TOKENS_MAX: u32 = 65_536;

/// Alignment of slots and of everything that may later be written with `O_DIRECT`, in bytes.
pub const SLOT_ALIGN: u64 = 4096;

/// Longest request id accepted in a plan, in bytes.
pub const REQUEST_ID_BYTES_MAX: usize = 4096;

/// Bytes reserved in a slot's descriptor for lora name and extra keys. A descriptor that needs more
/// is kept without them and its slot is never adopted.
pub const DESCRIPTOR_EXTRA_BYTES: u64 = 1024;

const _: () = assert!(RANKS_MAX <= u64::BITS as usize, "one bit a rank");
