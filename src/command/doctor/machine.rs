//! Kernel, `io_uring`, locked memory, shared memory.

use std::path::Path;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::utsname::uname;

use super::finding::{Finding, Status};
use kvcellar_block::size::show;
use kvcellar_engine::nvme::probe;
use kvcellar_engine::pool::budget::Machine;
use kvcellar_engine::pool::file_system::{FileSystem, FileSystemKind};
use kvcellar_engine::pool::huge_pages::TmpfsMount;
use kvcellar_engine::pool::pages;

/// `CAP_IPC_LOCK` in the kernel's masks of capabilities.
const CAP_IPC_LOCK: u32 = 14;
/// The oldest kernel on which `io_uring` does all that the ring needs.
const RING_KERNEL: (u32, u32) = (5, 11);
/// The least shared memory with which a pool is worth its while.
const SHARED_MEMORY_MIN: u64 = 1 << 30;

/// All lines about the machine.
pub fn examine(pool_dir: &Path) -> Vec<Finding> {
    vec![kernel(), ring(), memlock(), shared_memory(pool_dir), huge_pages(pool_dir), populate()]
}

/// Whether the kernel makes a pool's pages exist by itself.
fn populate() -> Finding {
    match pages::refusal() {
        None => Finding::ok("populate", "allowed"),
        Some(why) => Finding::new(
            Status::Warning,
            "populate",
            format!("not to be had: {why}"),
            "Pages of a pool are allocated and touched one by one, which makes a start slower: Linux 5.14 or later, and a \
             seccomp profile that allows MADV_POPULATE_WRITE, are faster",
        ),
    }
}

fn kernel() -> Finding {
    let name = "kernel";
    match uname() {
        Ok(found) => judge_kernel(&found.release().to_string_lossy()),
        Err(errno) => Finding::new(Status::Warning, name, format!("unknown: {errno}"), "Run it on Linux"),
    }
}

fn judge_kernel(release: &str) -> Finding {
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= RING_KERNEL => Finding::ok("kernel", release),
        _ => Finding::new(
            Status::Warning,
            "kernel",
            release,
            format!("Linux {}.{} or later has all of io_uring that the nvme tier uses", RING_KERNEL.0, RING_KERNEL.1),
        ),
    }
}

fn ring() -> Finding {
    match probe::refusal() {
        None => Finding::ok("io_uring", "allowed"),
        Some(why) => Finding::new(
            Status::Warning,
            "io_uring",
            format!("not to be had: {why}"),
            "Allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile and set sysctl \
             kernel.io_uring_disabled=0; until then the nvme tier uses threads",
        ),
    }
}

fn memlock() -> Finding {
    let name = "memlock";
    let may_lock = std::fs::read_to_string("/proc/self/status").ok().and_then(|status| has_capability(&status));
    let soft = match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((soft, _)) => soft,
        Err(errno) => {
            return Finding::new(Status::Warning, name, format!("unknown: {errno}"), "Raise it: ulimit -l unlimited");
        }
    };
    judge_memlock(soft, may_lock)
}

/// Whether the effective capabilities in `/proc/self/status` hold `CAP_IPC_LOCK`. `None`: the text
/// does not say.
fn has_capability(status: &str) -> Option<bool> {
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    Some(u64::from_str_radix(mask.trim(), 16).ok()? >> CAP_IPC_LOCK & 1 == 1)
}

fn judge_memlock(soft: u64, may_lock: Option<bool>) -> Finding {
    let limit = if soft == RLIM_INFINITY { "unlimited".to_owned() } else { show(soft) };
    if may_lock == Some(true) {
        return Finding::ok("memlock", format!("{limit}, and CAP_IPC_LOCK is not bound by it"));
    }
    if soft == RLIM_INFINITY {
        return Finding::ok("memlock", limit);
    }
    Finding::new(
        Status::Warning,
        "memlock",
        limit,
        "A pool that is larger is not registered with the ring, and every transfer costs more CPU: ulimit -l unlimited, docker run --ulimit \
         memlock=-1, LimitMEMLOCK=infinity of a systemd unit, or CAP_IPC_LOCK",
    )
}

fn shared_memory(pool_dir: &Path) -> Finding {
    let name = "shared memory";
    let machine = Machine::look(pool_dir);
    let Some(place) = machine.file_system else {
        return Finding::new(
            Status::Problem,
            name,
            format!("{} cannot be looked at", pool_dir.display()),
            "Set pool_dir to a directory in shared memory that this user may write to",
        );
    };
    if !place.is_memory() {
        return Finding::new(
            Status::Problem,
            name,
            format!("{} does not lie in memory", pool_dir.display()),
            "Set pool_dir to a tmpfs such as /dev/shm",
        );
    }
    let least = [place.free_bytes, machine.cgroup, machine.available].into_iter().flatten().min().unwrap_or(u64::MAX);
    let free = place.free_bytes.map_or("no bound".to_owned(), |free| format!("{} free", show(free)));
    let found = format!("{} ({}) at {}, {} to be had in all", free, place.kind, pool_dir.display(), show(least));
    if least < SHARED_MEMORY_MIN {
        return Finding::new(
            Status::Warning,
            name,
            found,
            "A small pool holds little: docker run --shm-size, or a medium: Memory volume at /dev/shm, and a higher memory limit",
        );
    }
    Finding::ok(name, found)
}

/// Whether a pool there would lie in huge pages, and the one command that makes it so.
fn huge_pages(pool_dir: &Path) -> Finding {
    let name = "huge pages";
    if let Some(place) = FileSystem::of(pool_dir).filter(|place| place.kind == FileSystemKind::Hugetlbfs) {
        return Finding::ok(name, format!("{} has pages of {}", pool_dir.display(), show(place.page_bytes)));
    }
    match TmpfsMount::of(pool_dir) {
        None => Finding::ok(name, "not known"),
        Some(mount) if mount.gives() => {
            Finding::ok(name, format!("{} gives them (huge={})", mount.point.display(), mount.huge))
        }
        Some(mount) => Finding::new(
            Status::Warning,
            name,
            format!("{} gives none", mount.point.display()),
            format!(
                "As root: mount -o remount,huge=advise {}; then pools take them where memory allows. They cost the disk and the \
                 processor's address translation less",
                mount.point.display()
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_as_numbers() {
        for (release, status) in
            [("6.18.0-1", Status::Ok), ("5.11.0", Status::Ok), ("5.9.16", Status::Warning), ("odd", Status::Warning)]
        {
            assert_eq!(judge_kernel(release).status, status, "{release}");
        }
    }

    #[test]
    fn the_limit_binds_only_those_without_the_capability() {
        assert_eq!(judge_memlock(8 << 20, Some(false)).status, Status::Warning);
        assert_eq!(judge_memlock(8 << 20, None).status, Status::Warning);
        assert_eq!(judge_memlock(8 << 20, Some(true)).status, Status::Ok);
        assert_eq!(judge_memlock(RLIM_INFINITY, Some(false)).status, Status::Ok);
        assert_eq!(has_capability("Name:\tx\nCapEff:\t0000000000004000\n"), Some(true));
        assert_eq!(has_capability("CapEff:\t0000000000003fff\n"), Some(false));
        assert_eq!(has_capability("CapEff: none"), None);
    }
}
