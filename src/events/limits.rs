//! Bounds of batches and of their sockets, and what happens at them.

pub use kvcellar_block::limits::BLOCK_TOKENS_MAX;

/// Bytes of one published batch. Larger ones are refused.
pub const EVENT_PAYLOAD_BYTES_MAX: usize = 64 << 20;

/// Nesting of a msgpack value that is passed over. Deeper ones are refused.
pub const MSGPACK_DEPTH_MAX: usize = 16;

/// Batches, and their bytes, that may wait for the end of a replay. At the bound the oldest go: a
/// replay has them, or they become a hole, which is seen.
pub const HELD_BATCHES_MAX: usize = 16_384;
/// Bytes of them.
pub const HELD_BYTES_MAX: usize = 256 << 20;

/// Batches whose fingerprints are kept, to tell a repeat from a restart.
pub const RECENT_BATCHES: usize = 64;

/// Replays in a row that may bring nothing. Then the publisher counts as one without replays until
/// the next connection.
pub const REPLAY_TRIES: u32 = 3;

const _: () = assert!(EVENT_PAYLOAD_BYTES_MAX <= HELD_BYTES_MAX, "the largest batch can wait");

/// Batches of a publisher that wait for the replay socket's reader. Beyond it the replay waits.
pub const REPLAY_QUEUE: usize = 1024;

/// How long a publisher may take to answer a replay request, or to send its next batch, in ms. Then
/// the replay has failed.
pub const REPLAY_ANSWER_MS: u64 = 5_000;

/// First and longest pause between tries to connect, in ms.
pub const CONNECT_BACKOFF_MS: (u64, u64) = (100, 2_000);

/// Streams (topics and data-parallel ranks) behind one address. Batches of further ones are dropped
/// and counted.
pub const STREAMS_MAX: usize = 256;
