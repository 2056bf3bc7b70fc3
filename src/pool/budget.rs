//! How large a pool may be: the least of what was asked for and what the machine can give.

use std::fmt;
use std::fs;
use std::path::Path;

use nix::sys::statvfs::statvfs;

use crate::config::size::show;
use crate::error::{Error, Result};
use crate::limits::MEMORY_RESERVE_PERCENT;

/// What bounded the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// The configured size.
    Configured,
    /// Free space of the shared-memory file system.
    SharedMemory,
    /// The control group's memory limit.
    Cgroup,
    /// Memory that the machine has available.
    Available,
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Configured => "dram_size",
            Self::SharedMemory => "free shared memory",
            Self::Cgroup => "the control group's memory limit",
            Self::Available => "available memory",
        })
    }
}

/// What the machine has, in bytes. `None`: not limited, or not known.
#[derive(Debug, Clone, Copy, Default)]
pub struct Machine {
    /// Free bytes of the shared-memory file system.
    pub shared_memory: Option<u64>,
    /// Bytes left below the control group's limit.
    pub cgroup: Option<u64>,
    /// Memory available without swapping.
    pub available: Option<u64>,
    /// All memory.
    pub total: Option<u64>,
}

/// A pool's size and the reason for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Bytes the pool may take.
    pub bytes: u64,
    /// Why not more.
    pub bound: Bound,
}

impl Machine {
    /// Looks at the machine. `dir`: the shared-memory file system.
    pub fn look(dir: &Path) -> Self {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |name: &str| {
            let line = meminfo.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
        };
        Self {
            shared_memory: statvfs(dir).ok().map(|fs| fs.blocks_available() * fs.fragment_size()),
            cgroup: cgroup_room(),
            available: field("MemAvailable:"),
            total: field("MemTotal:"),
        }
    }

    /// The size of a pool for which `wanted` bytes were asked. A pool that is being
    /// replaced must be gone before: its memory is looked at as it is then.
    ///
    /// # Errors
    /// [`Error::Config`] when an `explicit` wish is more than the machine's whole memory: that is a mistake, not a wish.
    pub fn budget(&self, wanted: u64, explicit: bool) -> Result<Budget> {
        if let Some(total) = self.total.filter(|total| explicit && wanted > *total) {
            return Err(Error::config(
                "dram_size",
                format!("{} is more than the machine's whole memory of {}", show(wanted), show(total)),
                "Write less, or leave it out for a default that fits",
            ));
        }
        let less_reserve = |bytes: u64| bytes - bytes / 100 * MEMORY_RESERVE_PERCENT;
        let bounds = [
            (Some(wanted), Bound::Configured),
            (self.shared_memory, Bound::SharedMemory),
            (self.cgroup.map(less_reserve), Bound::Cgroup),
            (self.available.map(less_reserve), Bound::Available),
        ];
        let least = bounds.iter().filter_map(|(bytes, bound)| bytes.map(|bytes| Budget { bytes, bound: *bound }));
        Ok(least.min_by_key(|budget| budget.bytes).unwrap_or(Budget { bytes: wanted, bound: Bound::Configured }))
    }
}

/// Room below the tightest memory limit of this process's control group and its parents.
fn cgroup_room() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let unified = groups.lines().find_map(|line| line.strip_prefix("0::"));
    let read = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let mut least: Option<u64> = None;
    if let Some(path) = unified {
        let root = Path::new("/sys/fs/cgroup");
        let own = root.join(path.trim_start_matches('/'));
        for dir in own.ancestors().take_while(|dir| dir.starts_with(root)) {
            if let (Some(max), Some(current)) = (read(&dir.join("memory.max")), read(&dir.join("memory.current"))) {
                let room = max.saturating_sub(current);
                least = Some(least.map_or(room, |least| least.min(room)));
            }
        }
    }
    let legacy = Path::new("/sys/fs/cgroup/memory");
    let (limit, usage) = (read(&legacy.join("memory.limit_in_bytes")), read(&legacy.join("memory.usage_in_bytes")));
    match (limit, usage) {
        (Some(limit), Some(usage)) => {
            Some(least.map_or(limit.saturating_sub(usage), |least| least.min(limit.saturating_sub(usage))))
        }
        _ => least,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_least_bound_wins_and_is_named() {
        let machine =
            Machine { shared_memory: Some(8 * GIB), cgroup: None, available: Some(100 * GIB), total: Some(128 * GIB) };
        assert_eq!(machine.budget(4 * GIB, true).expect("fits"), Budget { bytes: 4 * GIB, bound: Bound::Configured });
        assert_eq!(machine.budget(64 * GIB, true).expect("capped").bound, Bound::SharedMemory);
        let tight = Machine { cgroup: Some(GIB), ..machine };
        assert_eq!(tight.budget(4 * GIB, true).expect("capped").bound, Bound::Cgroup);
    }

    #[test]
    fn more_than_the_whole_memory_is_a_mistake_only_when_written() {
        let machine = Machine { total: Some(2 * GIB), available: Some(GIB), ..Machine::default() };
        let error = machine.budget(4 * GIB, true).expect_err("too large").to_string();
        assert!(error.starts_with("dram_size") && error.contains("2.0 GiB"), "{error}");
        assert_eq!(machine.budget(4 * GIB, false).expect("capped").bound, Bound::Available);
    }

    #[test]
    fn this_machine_has_memory() {
        let machine = Machine::look(Path::new("/dev/shm"));
        assert!(machine.total.is_some_and(|bytes| bytes > 0) && machine.shared_memory.is_some());
    }
}
