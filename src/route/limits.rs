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
