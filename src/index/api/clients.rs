//! What clients may cost a server, and what became of those that cost more.
//!
//! A client that sends slowly or does not read holds a connection, a buffer and, behind a router,
//! an engine's request. So every connection has its time for a head, every body a pace, every
//! answer a reader that takes it, and a server a number of connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Bytes a second that a request's body has to bring, after a first pause of
/// [`ClientLimits::stall`].
pub const BODY_BYTES_PER_S_MIN: u64 = 4 << 10;

/// Bytes of an answer that wait in a connection for its client. Beyond it nothing more is asked of
/// whoever makes the answer.
pub const UNREAD_BYTES_MAX: usize = 128 << 10;

/// What a client may do.
#[derive(Debug, Clone)]
pub struct ClientLimits {
    /// Connections that may be open at a time.
    pub connections: usize,
    /// How long a connection may bring no whole head of a request.
    pub head: Duration,
    /// How long a client may take nothing of an answer, and how far a body may be behind its pace.
    pub stall: Duration,
}

impl Default for ClientLimits {
    fn default() -> Self {
        Self { connections: 8192, head: Duration::from_mins(1), stall: Duration::from_mins(1) }
    }
}

/// Why a client's connection was ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// It began the head of a request and did not end it.
    SlowHead,
    /// The body of its request came too slowly.
    SlowBody,
    /// It took nothing of its answer.
    StalledAnswer,
    /// It said nothing, and its place was wanted for another one.
    Silent,
}

impl Cut {
    /// All reasons, in their order.
    pub const ALL: [Self; 4] = [Self::SlowHead, Self::SlowBody, Self::StalledAnswer, Self::Silent];

    /// In metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SlowHead => "slow_head",
            Self::SlowBody => "slow_body",
            Self::StalledAnswer => "stalled_answer",
            Self::Silent => "silent",
        }
    }
}

/// What there is of a server's clients.
#[derive(Debug, Default)]
pub struct ClientCounts {
    cut: [AtomicU64; Cut::ALL.len()],
    open: AtomicU64,
}

impl ClientCounts {
    /// A client was cut.
    pub(super) fn cut(&self, why: Cut) {
        self.cut[why as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Clients that were cut, by reason.
    pub fn cuts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Cut::ALL.iter().zip(&self.cut).map(|(why, count)| (why.as_str(), count.load(Ordering::Relaxed)))
    }

    /// Connections that are open.
    pub fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    /// Counts a connection for as long as the answer lives.
    pub(super) fn connected(self: &Arc<Self>) -> Connected {
        self.open.fetch_add(1, Ordering::Relaxed);
        Connected(Arc::clone(self))
    }
}

/// One open connection.
#[derive(Debug)]
pub(super) struct Connected(Arc<ClientCounts>);

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}
