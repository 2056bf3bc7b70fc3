//! Options about the clients of a server.

use std::time::Duration;

use clap::Args;

use kvcellar_index::api::clients::ClientLimits;

/// Longest time that an option may name, in s: thirty years.
pub const SECONDS_MAX: u64 = 1_000_000_000;

/// What clients may do.
#[derive(Debug, Clone, Args)]
pub struct ClientOptions {
    /// Connections of clients that may be open at a time. Further clients wait until one ends.
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub connections: u32,
    /// How long a client may take for the head of a request, and keep a connection without one, in
    /// s.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=SECONDS_MAX))]
    pub client_head_s: u64,
    /// How long a client may read nothing of its answer, or be behind with the body of its request,
    /// in s. Then its connection is ended.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=SECONDS_MAX))]
    pub client_stall_s: u64,
}

impl ClientOptions {
    /// What they say.
    pub fn limits(&self) -> ClientLimits {
        ClientLimits {
            connections: self.connections as usize,
            head: Duration::from_secs(self.client_head_s),
            stall: Duration::from_secs(self.client_stall_s),
        }
    }
}
