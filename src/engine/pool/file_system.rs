//! The file system that a pool lies on: whether it is memory, how large its pages are, what it has
//! left.

use std::fmt;
use std::fs::File;
use std::path::Path;

use nix::sys::statfs::{Statfs, fstatfs, statfs};

use crate::limits::SLOT_ALIGN;
use kvcellar_block::size::show;

// The kernel's numbers (linux/magic.h).
const TMPFS: i64 = 0x0102_1994;
const HUGETLBFS: i64 = 0x9584_58f6;
const RAMFS: i64 = 0x8584_58f6;

/// What kind of file system it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystemKind {
    /// Ordinary shared memory.
    Tmpfs,
    /// Huge pages that were set aside.
    Hugetlbfs,
    /// Memory without a bound of its own.
    Ramfs,
    /// No memory: a disk, a network, a layer.
    Other,
}

/// What a directory's or file's file system is.
#[derive(Debug, Clone, Copy)]
pub struct FileSystem {
    /// Its kind.
    pub kind: FileSystemKind,
    /// Files must be multiples of this, in bytes.
    pub page_bytes: u64,
    /// Bytes in all; `None`: not bounded by itself.
    pub total_bytes: Option<u64>,
    /// Bytes that this user may still have; `None`: not bounded by itself.
    pub free_bytes: Option<u64>,
}

impl fmt::Display for FileSystemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tmpfs => "tmpfs",
            Self::Hugetlbfs => "hugetlbfs",
            Self::Ramfs => "ramfs",
            Self::Other => "no memory",
        })
    }
}

impl FileSystem {
    /// That of a directory. `None`: the system does not say.
    pub fn of(dir: &Path) -> Option<Self> {
        statfs(dir).ok().map(|found| Self::from(&found))
    }

    /// That of an open file.
    pub fn of_file(file: &File) -> Option<Self> {
        fstatfs(file).ok().map(|found| Self::from(&found))
    }

    /// Whether what lies here lies in memory.
    pub fn is_memory(&self) -> bool {
        self.kind != FileSystemKind::Other
    }
}

impl From<&Statfs> for FileSystem {
    fn from(found: &Statfs) -> Self {
        let (number, block) = (found.filesystem_type().0, u64::try_from(found.block_size()).unwrap_or(1));
        let kind = match number {
            TMPFS => FileSystemKind::Tmpfs,
            HUGETLBFS => FileSystemKind::Hugetlbfs,
            RAMFS => FileSystemKind::Ramfs,
            _ => FileSystemKind::Other,
        };
        // Memory that tells no size has none of its own: ramfs, a tmpfs or hugetlbfs without
        // `size=`, gVisor's.
        let bounded = kind == FileSystemKind::Other || found.blocks() > 0;
        let (mut total, mut free) = (None, None);
        if bounded {
            total = Some(found.blocks().saturating_mul(block));
            free = Some(found.blocks_available().saturating_mul(block));
        }
        if kind == FileSystemKind::Hugetlbfs {
            let (all, unused) = huge_pages(block);
            total = least(total, all);
            free = least(free, unused);
        }
        let page_bytes = if kind == FileSystemKind::Hugetlbfs { block } else { SLOT_ALIGN };
        Self { kind, page_bytes, total_bytes: total, free_bytes: free }
    }
}

fn least(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    [one, other].into_iter().flatten().min()
}

/// Bytes in huge pages of this size, in all and not promised to anybody.
fn huge_pages(page_bytes: u64) -> (Option<u64>, Option<u64>) {
    let dir = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page_bytes >> 10);
    let read = |name: &str| std::fs::read_to_string(format!("{dir}/{name}")).ok()?.trim().parse::<u64>().ok();
    let free = read("free_hugepages").zip(read("resv_hugepages"));
    (
        read("nr_hugepages").map(|pages| pages * page_bytes),
        free.map(|(free, promised)| free.saturating_sub(promised) * page_bytes),
    )
}

/// How to give the pool's file system more room, for people.
pub fn more_room(kind: FileSystemKind, page_bytes: u64) -> String {
    match kind {
        FileSystemKind::Hugetlbfs => format!("reserve more huge pages of {} (vm.nr_hugepages)", show(page_bytes)),
        _ => "give it more room (docker run --shm-size, a Kubernetes emptyDir of medium Memory, mount -o remount,size=), or set \
              pool_dir to a larger tmpfs"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_is_memory_and_proc_is_not() {
        let shm = FileSystem::of(Path::new("/dev/shm")).expect("it is there");
        assert!(shm.is_memory() && shm.page_bytes == SLOT_ALIGN);
        assert!(shm.total_bytes >= shm.free_bytes);
        assert!(!FileSystem::of(Path::new("/proc")).expect("it is there").is_memory());
        assert!(FileSystem::of(Path::new("/nonexistent/kvcellar")).is_none());
    }
}
