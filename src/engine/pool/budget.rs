//! How large a pool may be: the least of what was asked for and what the machine can give.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::cgroup;
use super::file_system::{self, FileSystem, FileSystemKind};
use crate::limits::{
    MEMORY_RESERVE_PERCENT, SHARED_MEMORY_KEPT_BYTES, SHARED_MEMORY_KEPT_PERCENT, SHARED_MEMORY_KEPT_PERCENT_MAX,
};
use kvcellar_block::error::{Error, Result};
use kvcellar_block::size::show;

/// Where vLLM's processes, and others, have their shared memory.
const SHARED_MEMORY: &str = "/dev/shm";

/// What bounded the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// The configured size.
    Configured,
    /// What other engines of this user have of the configured size.
    Engines,
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
            Self::Engines => "what other engines have of dram_size",
            Self::SharedMemory => "free shared memory",
            Self::Cgroup => "the control group's memory limit",
            Self::Available => "available memory",
        })
    }
}

/// What the machine has, in bytes. `None`: not limited, or not known.
#[derive(Debug, Clone, Copy, Default)]
pub struct Machine {
    /// The file system of the pools.
    pub file_system: Option<FileSystem>,
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
    /// Looks at the machine. `dir`: where pools lie.
    pub fn look(dir: &Path) -> Self {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |name: &str| {
            let line = meminfo.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
        };
        let file_system = FileSystem::of(dir).map(|found| if is_shared(dir) { leave_some(found) } else { found });
        // Huge pages were taken out of ordinary memory when they were reserved.
        let ordinary = file_system.is_none_or(|found| found.kind != FileSystemKind::Hugetlbfs);
        Self {
            file_system,
            cgroup: cgroup::room(Path::new("/")).filter(|_| ordinary),
            available: field("MemAvailable:").filter(|_| ordinary),
            total: field("MemTotal:"),
        }
    }

    /// Refuses a written size that is more than the machine's whole memory: that is a mistake, not
    /// a wish.
    ///
    /// # Errors
    /// [`Error::Config`] naming `dram_size`.
    pub fn refuse_impossible(&self, wanted: u64) -> Result<()> {
        match self.total.filter(|total| wanted > *total) {
            None => Ok(()),
            Some(total) => Err(Error::config(
                "dram_size",
                format!("{} is more than the machine's whole memory of {}", show(wanted), show(total)),
                "Write less, or leave it out for a default that fits",
            )),
        }
    }

    /// The size of a pool that may have as much as `most`, where `own` bytes of it are there
    /// already.
    pub fn budget(&self, most: Budget, own: u64) -> Budget {
        let beside = |bytes: Option<u64>| bytes.map(|bytes| bytes.saturating_add(own));
        let bounds = [
            (beside(self.file_system.and_then(|found| found.free_bytes)), Bound::SharedMemory),
            (beside(self.cgroup.map(less_reserve)), Bound::Cgroup),
            (beside(self.available.map(less_reserve)), Bound::Available),
        ];
        let bounds = bounds.into_iter().filter_map(|(bytes, bound)| bytes.map(|bytes| Budget { bytes, bound }));
        bounds.fold(most, |least, next| if next.bytes < least.bytes { next } else { least })
    }

    /// What a user can do about a bound.
    pub fn remedy(&self, bound: Bound) -> String {
        let (kind, page) = self.file_system.map_or((FileSystemKind::Tmpfs, 0), |found| (found.kind, found.page_bytes));
        match bound {
            Bound::Configured => "write a larger dram_size".to_owned(),
            Bound::Engines => {
                "dram_size is for all engines of this user below one pool_dir: write a larger one, stop an engine, or give \
                 this one another pool_dir"
                    .to_owned()
            }
            Bound::SharedMemory => file_system::more_room(kind, page),
            Bound::Cgroup => {
                "raise the memory limit (docker run --memory, Kubernetes resources.limits.memory, MemoryMax of a systemd \
                 unit), or write a smaller dram_size"
                    .to_owned()
            }
            Bound::Available => "free memory, or write a smaller dram_size".to_owned(),
        }
    }
}

/// Whether pools lie where everybody's shared memory does.
fn is_shared(dir: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|found| found.dev()).ok();
    device(dir).is_some_and(|own| device(Path::new(SHARED_MEMORY)) == Some(own))
}

/// What stays for others. vLLM's processes talk through files there: it refuses to start where they
/// would not fit, their pages come when they are first written, and where there is none left a
/// signal ends the process.
fn leave_some(found: FileSystem) -> FileSystem {
    let whole = found.total_bytes.unwrap_or(u64::MAX);
    let kept = if whole < SHARED_MEMORY_KEPT_BYTES {
        whole / 100 * SHARED_MEMORY_KEPT_PERCENT
    } else {
        SHARED_MEMORY_KEPT_BYTES.min(whole / 100 * SHARED_MEMORY_KEPT_PERCENT_MAX)
    };
    FileSystem { free_bytes: found.free_bytes.map(|free| free.saturating_sub(kept)), ..found }
}

fn less_reserve(bytes: u64) -> u64 {
    bytes - bytes / 100 * MEMORY_RESERVE_PERCENT
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn wished(bytes: u64) -> Budget {
        Budget { bytes, bound: Bound::Configured }
    }

    fn machine(shared: u64) -> Machine {
        let file_system = FileSystem {
            kind: FileSystemKind::Tmpfs,
            page_bytes: 4096,
            total_bytes: Some(shared),
            free_bytes: Some(shared),
        };
        Machine { file_system: Some(file_system), cgroup: None, available: Some(100 * GIB), total: Some(128 * GIB) }
    }

    #[test]
    fn the_least_bound_wins_and_is_named() {
        let machine = machine(8 * GIB);
        assert_eq!(machine.budget(wished(4 * GIB), 0), wished(4 * GIB));
        assert_eq!(machine.budget(wished(64 * GIB), 0), Budget { bytes: 8 * GIB, bound: Bound::SharedMemory });
        let tight = Machine { cgroup: Some(GIB), ..machine };
        assert_eq!(tight.budget(wished(4 * GIB), 0).bound, Bound::Cgroup);
        let most = Budget { bytes: GIB / 2, bound: Bound::Engines };
        assert_eq!(tight.budget(most, 0), most);
    }

    #[test]
    fn what_a_pool_has_already_needs_no_room() {
        let machine = Machine { cgroup: Some(0), ..machine(GIB) };
        assert_eq!(machine.budget(wished(64 * GIB), 0).bytes, 0);
        assert_eq!(machine.budget(wished(64 * GIB), 3 * GIB).bytes, 3 * GIB);
    }

    #[test]
    fn more_than_the_whole_memory_is_a_mistake() {
        let error = Machine { total: Some(2 * GIB), ..Machine::default() }.refuse_impossible(4 * GIB);
        let error = error.expect_err("too large").to_string();
        assert!(error.starts_with("dram_size") && error.contains("2.0 GiB"), "{error}");
        assert!(Machine::default().refuse_impossible(u64::MAX).is_ok(), "not known");
    }

    #[test]
    fn every_bound_has_a_remedy_of_its_own() {
        let machine = machine(GIB);
        let bounds = [Bound::Configured, Bound::Engines, Bound::SharedMemory, Bound::Cgroup, Bound::Available];
        let mut remedies = bounds.map(|bound| machine.remedy(bound)).to_vec();
        assert!(
            remedies[2].contains("--shm-size") && remedies[2].contains("emptyDir") && remedies[2].contains("pool_dir")
        );
        remedies.sort();
        remedies.dedup();
        assert_eq!(remedies.len(), bounds.len());
    }

    #[test]
    fn shared_memory_is_never_taken_whole() {
        let of = |total, free| {
            leave_some(
                machine(0)
                    .file_system
                    .map(|found| FileSystem { total_bytes: total, free_bytes: free, ..found })
                    .expect("it has one"),
            )
            .free_bytes
        };
        let mib = |count: u64| Some(count << 20);
        assert!(of(mib(64), mib(64)) < mib(49) && of(mib(64), mib(64)) > mib(47));
        assert_eq!(of(mib(1 << 20), mib(1000)), mib(680), "a large one loses little");
        assert_eq!(of(mib(512), mib(512)), mib(192), "vLLM can be started again beside a pool");
        assert!(of(mib(320), mib(320)) > mib(79), "where there is memory there is a pool");
        assert_eq!(of(mib(64), mib(10)), Some(0), "what others have taken is theirs");
        assert_eq!(of(None, None), None);
        assert!(is_shared(Path::new("/dev/shm")) && !is_shared(Path::new("/proc")));
    }

    #[test]
    fn this_machine_has_memory() {
        let machine = Machine::look(Path::new("/dev/shm"));
        assert!(machine.total.is_some_and(|bytes| bytes > 0) && machine.file_system.is_some());
    }
}
