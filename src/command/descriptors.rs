//! File descriptors of a server: as many as the system lets it have.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// A connection of a client and the one to an engine behind it.
const OF_A_CLIENT: u64 = 2;

/// Raises the process's own limit to the hard one, and warns where so many clients do not fit.
pub fn raise(connections: u64) {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let raised = soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
    let limit = if raised { hard } else { soft };
    if limit < connections.saturating_mul(OF_A_CLIENT) {
        log::warn!(
            "this process may open {limit} files, which is less than {connections} clients and their engines need: raise \
             the limit (ulimit -n, LimitNOFILE=), or lower --connections"
        );
    }
}
