//! What this process's control groups leave of memory, in either version.
//!
//! Page cache is not counted as used: the kernel takes it back when somebody needs memory, and most
//! of it is the model's weights just read. Shared memory and all that belongs to processes is.

use std::fs;
use std::path::{Path, PathBuf};

/// Version 1 writes "no limit" as the largest multiple of a page.
const UNLIMITED: u64 = 1 << 62;

/// The names of one version's files.
struct Names {
    limit: &'static str,
    usage: &'static str,
    file_pages: [&'static str; 2],
}

const UNIFIED: Names =
    Names { limit: "memory.max", usage: "memory.current", file_pages: ["inactive_file", "active_file"] };
// With children's pages, as the usage is.
const LEGACY: Names = Names {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    file_pages: ["total_inactive_file", "total_active_file"],
};

/// Bytes below the tightest limit of the process's groups and their parents. `None`: no limit.
///
/// `root`: the directory that stands for `/`.
pub fn room(root: &Path) -> Option<u64> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let fields: Vec<[&str; 3]> = groups.lines().filter_map(fields).collect();
    let unified = fields.iter().find(|[_, controllers, _]| controllers.is_empty()).map_or("/", |[_, _, path]| path);
    let legacy = fields.iter().find(|[_, controllers, _]| controllers.split(',').any(|name| name == "memory"));
    let mount = root.join("sys/fs/cgroup");
    let mut rooms = rooms(&mount, unified, &UNIFIED);
    rooms.extend(self::rooms(&mount.join("memory"), legacy.map_or("/", |[_, _, path]| path), &LEGACY));
    rooms.into_iter().min()
}

/// Number, controllers and path of a line such as `4:memory:/system.slice`.
fn fields(line: &str) -> Option<[&str; 3]> {
    let mut parts = line.splitn(3, ':');
    Some([parts.next()?, parts.next()?, parts.next()?])
}

/// The room of a group and of each of its parents, where there is a limit. In a container the path
/// may be the host's: what is not there is passed over, up to the mount itself.
fn rooms(mount: &Path, path: &str, names: &Names) -> Vec<u64> {
    let own: PathBuf = mount.join(path.trim_start_matches('/'));
    own.ancestors().take_while(|dir| dir.starts_with(mount)).filter_map(|dir| group(dir, names)).collect()
}

fn group(dir: &Path, names: &Names) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
    let limit = read(names.limit).filter(|limit| *limit < UNLIMITED)?;
    let usage = read(names.usage)?;
    let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let cache = names.file_pages.iter().filter_map(|name| counter(&stat, name)).sum::<u64>();
    Some(limit.saturating_sub(usage.saturating_sub(cache)))
}

fn counter(stat: &str, name: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A made-up system: the lines of `/proc/self/cgroup`, and files below `/sys/fs/cgroup`.
    fn system(groups: &str, files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        let write = |path: PathBuf, text: &str| {
            fs::create_dir_all(path.parent().expect("it has one")).expect("made");
            fs::write(path, text).expect("written");
        };
        write(root.path().join("proc/self/cgroup"), groups);
        for (name, text) in files {
            write(root.path().join("sys/fs/cgroup").join(name), text);
        }
        root
    }

    fn found(groups: &str, files: &[(&str, &str)]) -> Option<u64> {
        room(system(groups, files).path())
    }

    #[test]
    fn page_cache_is_not_counted_as_used_and_shared_memory_is() {
        let gib = |count: u64| (count * GIB).to_string();
        let stat = format!(
            "anon {}\nfile {}\nshmem {}\ninactive_file {}\nactive_file {}\n",
            GIB,
            60 * GIB,
            10 * GIB,
            30 * GIB,
            20 * GIB
        );
        let files = [("pod/memory.max", &*gib(100)), ("pod/memory.current", &*gib(61)), ("pod/memory.stat", &*stat)];
        assert_eq!(found("0::/pod\n", &files), Some(89 * GIB), "100 - (61 - 50)");
        let stat = format!("inactive_file 1\ntotal_inactive_file {}\ntotal_active_file {}\n", 30 * GIB, 20 * GIB);
        let files = [
            ("memory/pod/memory.limit_in_bytes", &*gib(100)),
            ("memory/pod/memory.usage_in_bytes", &*gib(61)),
            ("memory/pod/memory.stat", &*stat),
        ];
        assert_eq!(found("4:cpu:/x\n3:hugetlb,memory:/pod\n", &files), Some(89 * GIB));
    }

    #[test]
    fn the_tightest_limit_of_all_parents_counts() {
        let files = [
            ("a/memory.max", "1000"),
            ("a/memory.current", "700"),
            ("a/b/memory.max", "max"),
            ("a/b/memory.current", "10"),
            ("a/b/c/memory.max", "900"),
            ("a/b/c/memory.current", "10"),
        ];
        assert_eq!(found("0::/a/b/c\n", &files), Some(300));
        assert_eq!(found("0::/elsewhere\n", &files), None);
    }

    #[test]
    fn a_container_that_sees_only_its_own_group_is_bounded_by_it() {
        let files = [("memory.max", "500"), ("memory.current", "100")];
        assert_eq!(found("0::/kubepods/pod1/hash\n", &files), Some(400));
        let files = [("memory/memory.limit_in_bytes", "500"), ("memory/memory.usage_in_bytes", "600")];
        assert_eq!(found("9:memory:/docker/hash\n", &files), Some(0), "over its limit");
    }

    #[test]
    fn no_limit_is_none() {
        let files = [("memory/memory.limit_in_bytes", "9223372036854771712"), ("memory/memory.usage_in_bytes", "5")];
        assert_eq!(found("9:memory:/\n", &files), None);
        assert_eq!(found("0::/\n", &[("memory.max", "max"), ("memory.current", "5")]), None);
        assert_eq!(found("", &[]), None);
    }
}
