//! Bounds of the router, and what happens at them.

use std::time::Duration;

/// How long an engine may take to answer a router's scrape, in ms, and how much it may say.
pub const SCRAPE_TIMEOUT_MS: u64 = 2_000;
/// Bytes of an answer to a scrape.
pub const SCRAPE_BYTES_MAX: usize = 8 << 20;

/// How long engines may take in all to tell token ids while a request waits to be routed. An
/// estimate of its prompt costs less than a longer wait.
pub const IDS_WITHIN: Duration = Duration::from_millis(500);
/// How long an engine is not asked again that did not.
pub const IDS_SILENCE: Duration = Duration::from_secs(5);

/// Sessions that a router remembers.
pub const SESSIONS_MAX: usize = 100_000;

/// Prefixes whose waiting a router remembers.
pub const CREDITS_MAX: usize = 65_536;

/// Decisions that a router shows.
pub const DECISIONS_SHOWN: usize = 256;

/// How long a router expects its decision's blocks on an engine before its events must tell of
/// them, in ms.
pub const EXPECT_MS: u64 = 2_000;

/// Expectations on their way to the index. Further ones are dropped: a decision does not wait for
/// the index's writer.
pub const EXPECT_QUEUE: usize = 4_096;

/// Bytes at the end of an answer that are kept to find its usage.
pub const ANSWER_TAIL_BYTES: usize = 64 << 10;

/// News of a router that are kept for its peers, and their bytes, about. A peer that has missed
/// more gets a snapshot.
pub const JOURNAL_ENTRIES_MAX: usize = 65_536;
/// Bytes of them.
pub const JOURNAL_BYTES_MAX: usize = 16 << 20;

/// What a snapshot for a peer holds at most: sessions and credits, the last ones; and blocks that
/// engines are guessed to hold, the last ones of each, over all engines.
pub const SNAPSHOT_ENTRIES_MAX: usize = 32_768;
/// Blocks of all engines.
pub const SNAPSHOT_BLOCKS_MAX: usize = 1 << 20;

/// Pause between two questions to a peer.
pub const PEER_POLL: Duration = Duration::from_millis(50);
/// How long a peer may take to answer, and how much it may say.
pub const PEER_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes of an answer of a peer.
pub const PEER_BYTES_MAX: usize = 64 << 20;
/// How long what a peer has in flight counts while it says nothing.
pub const PEER_SILENCE: Duration = Duration::from_secs(2);
/// Pause before a peer is asked again that shares nothing, or that is this router itself.
pub const PEER_PAUSE: Duration = Duration::from_secs(2);
/// Peers of a router.
pub const PEERS_MAX: usize = 64;
/// How often the name of `--peers-dns` is resolved.
pub const PEERS_RESOLVE: Duration = Duration::from_secs(5);
/// Requests of peers that are counted at one engine.
pub const PEER_BOOKINGS_MAX: usize = 65_536;
/// Models that a router names to a peer.
pub const PEER_MODELS_MAX: usize = 256;

/// Characters of a peer's text that are shown. The rest is left out.
pub const PEER_TEXT_MAX: usize = 300;
