//! Huge pages: how much of a mapping lies in them, and whether a file system gives them.
//!
//! Reads what the kernel tells in `/proc`. Nothing depends on it but what people are told.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// What `/proc/PID/smaps` calls memory that one entry of the page table's second level maps, or
/// that was set aside in huge pages.
const HUGE: [&str; 5] = ["ShmemPmdMapped", "FilePmdMapped", "AnonHugePages", "Shared_Hugetlb", "Private_Hugetlb"];

/// Bytes of this process's mappings within `range` that lie in huge pages; 0 where the system does
/// not tell. It walks the page tables of the whole process: for a start, not for a step.
pub fn bytes_in(range: &Range<usize>) -> u64 {
    File::open("/proc/self/smaps").map_or(0, |smaps| sum(BufReader::new(smaps), range))
}

fn sum(smaps: impl BufRead, range: &Range<usize>) -> u64 {
    let (mut inside, mut kib) = (false, 0);
    for line in smaps.lines().map_while(Result::ok) {
        let Some((name, value)) = line.split_once(':').filter(|(name, _)| !name.contains('-')) else {
            inside = addresses(&line).is_some_and(|found| found.start >= range.start && found.end <= range.end);
            continue;
        };
        if inside && HUGE.contains(&name) {
            kib += value.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        }
    }
    kib << 10
}

/// The addresses at the start of a mapping's first line.
fn addresses(line: &str) -> Option<Range<usize>> {
    let (start, end) = line.split_ascii_whitespace().next()?.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

/// A mounted tmpfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TmpfsMount {
    /// Where it is mounted.
    pub point: PathBuf,
    /// Its option `huge=`; `never` where it has none.
    pub huge: String,
}

impl TmpfsMount {
    /// The one that `dir` lies on. `None`: it lies on none, or the system does not tell.
    pub fn of(dir: &Path) -> Option<Self> {
        let dir = std::fs::canonicalize(dir).ok()?;
        last_above(&std::fs::read_to_string("/proc/self/mountinfo").ok()?, &dir)
    }

    /// Pools on it get huge pages where the system has some.
    pub fn gives(&self) -> bool {
        self.huge != "never"
    }
}

/// The mount that a path lies on: of those whose point is above it the longest, and the last of
/// equals, which hides the others.
fn last_above(mounts: &str, path: &Path) -> Option<TmpfsMount> {
    let mut found: Option<(PathBuf, &str, &str)> = None;
    for line in mounts.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let Some(point) = left.split(' ').nth(4).map(|point| PathBuf::from(point.replace("\\040", " "))) else {
            continue;
        };
        let mut right = right.split(' ');
        let (Some(kind), Some(_), Some(options)) = (right.next(), right.next(), right.next()) else { continue };
        let longest = found.as_ref().map_or(0, |(point, ..)| point.as_os_str().len());
        if path.starts_with(&point) && point.as_os_str().len() >= longest {
            found = Some((point, kind, options));
        }
    }
    let (point, _, options) = found.filter(|(_, kind, _)| *kind == "tmpfs")?;
    let huge = options.split(',').find_map(|option| option.strip_prefix("huge=")).unwrap_or("never").to_owned();
    Some(TmpfsMount { point, huge })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0000400000 rw-s 00000000 00:1a 7  /dev/shm/kvcellar-0/a-0.pool
Size:               4096 kB
KernelPageSize:        4 kB
ShmemPmdMapped:     2048 kB
FilePmdMapped:         0 kB
VmFlags: rd wr sh
7f0000400000-7f0000800000 rw-s 00000000 00:1b 8  /huge/b-0.pool
Shared_Hugetlb:     4096 kB
Private_Hugetlb:       0 kB
";

    #[test]
    fn what_lies_in_huge_pages_is_summed() {
        let in_range = |range: Range<usize>| sum(SMAPS.as_bytes(), &range);
        assert_eq!(in_range(0x7f00_0000_0000..0x7f00_0040_0000), 2 << 20);
        assert_eq!(in_range(0x7f00_0040_0000..0x7f00_0080_0000), 4 << 20);
        assert_eq!(in_range(0..usize::MAX), 6 << 20);
        assert_eq!(in_range(0x7f00_0000_0000..0x7f00_0000_1000), 0, "a part of a mapping is not told");
        assert_eq!(sum("nonsense\n: \n".as_bytes(), &(0..usize::MAX)), 0);
    }

    #[test]
    fn ordinary_memory_has_none_and_the_system_is_asked() {
        let page = memmap2::MmapMut::map_anon(4096).expect("memory");
        let start = page.as_ptr().addr();
        assert_eq!(bytes_in(&(start..start + 4096)), 0);
    }

    #[test]
    fn the_mount_of_a_path_is_the_innermost_and_last() {
        let mounts = "\
21 1 8:1 / / rw - ext4 /dev/vda rw
25 24 0:23 / /dev/shm rw,relatime - tmpfs tmpfs rw,size=24683656k
30 25 0:27 / /dev/shm rw,relatime shared:5 - tmpfs tmpfs rw,size=24683656k,huge=advise
31 25 0:28 / /dev/shm/my\\040pools rw - tmpfs tmpfs rw
32 25 0:29 / /dev/shm/disk rw - ext4 /dev/vdb rw
";
        let of = |path: &str| last_above(mounts, Path::new(path)).map(|mount| (mount.point, mount.huge));
        assert_eq!(of("/dev/shm/kvcellar-0"), Some((PathBuf::from("/dev/shm"), "advise".to_owned())));
        assert_eq!(of("/dev/shm/my pools"), Some((PathBuf::from("/dev/shm/my pools"), "never".to_owned())));
        assert_eq!(of("/dev/shm/disk/x"), None, "no tmpfs");
        assert_eq!(of("/dev/shmem"), None, "a path is no text");
    }
}
