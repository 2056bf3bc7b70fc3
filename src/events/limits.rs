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

/// Bytes of one message: the largest batch, and the short frames before it. A publisher that
/// announces more loses its connection, before anything of it is kept.
pub const MESSAGE_BYTES_MAX: u64 = EVENT_PAYLOAD_BYTES_MAX as u64 + 4096;

/// Frames of one message. One with more ends the connection.
pub const FRAMES_MAX: usize = 8;

/// How long a connection and its handshake may take, in ms. Then it is given up.
pub const HANDSHAKE_MS: u64 = 5_000;

/// Bytes for which there is room before a read.
pub const READ_BYTES: usize = 64 << 10;

/// Bytes that the system keeps for a subscriber that is busy.
pub const RECEIVE_BUFFER_BYTES: u32 = 4 << 20;

/// Publishers that may be connected at a time to an address of ours. Further ones wait in the
/// system's queue.
pub const PUBLISHERS_MAX: usize = 256;

/// Messages of publishers connected to an address of ours that wait to be followed. Beyond it
/// publishers wait.
pub const PUBLISHED_QUEUE: usize = 64;

const _: () = assert!(READ_BYTES as u64 <= MESSAGE_BYTES_MAX, "a read brings less than a message may be");
