//! Where a pool's pages lie: on the memory nodes near the devices that copy them, else spread over
//! all nodes; in huge pages where the system gives them to shared memory.
//!
//! Said before the pages are touched, by the pool's owner, for the file: so it does not depend on
//! which thread or process touches which page. Neither is needed: a system that refuses costs speed
//! only.

use std::ffi::{c_int, c_ulong};
use std::path::Path;
use std::ptr::NonNull;

/// Pages from one node, and from others when it has none left.
const PREFERRED: c_int = 1;
/// Pages in turn from all nodes.
const INTERLEAVE: c_int = 3;

/// Memory nodes that are told apart: one bit each.
const NODES_MAX: u32 = c_ulong::BITS;

/// Asks for huge pages where this mapping touches pages first. `start` is page-aligned and mapped
/// for `len` bytes.
pub(super) fn prefer_huge_pages(start: NonNull<u8>, len: usize) {
    // SAFETY: the range is a mapping of the caller's; the call changes how its pages are backed,
    // not what they hold.
    unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
}

/// Asks the kernel to place the file's pages that are not there yet. `near`: the nodes next to the
/// devices; none: not known. `start` is page-aligned and mapped for `len` bytes.
pub(super) fn place(start: NonNull<u8>, len: usize, near: &[u32]) {
    let Some((policy, nodes)) = policy(present(Path::new("/sys/devices/system/node")), near) else { return };
    // SAFETY: as above; the mask is a local of as many bits as are named, which the kernel reads
    // only.
    unsafe {
        libc::syscall(libc::SYS_mbind, start.as_ptr(), len, policy, &raw const nodes, c_ulong::from(NODES_MAX), 0)
    };
}

/// Nodes with memory that processors use. Others are a device's own memory, as beside a GPU that
/// shares its address space.
fn present(nodes: &Path) -> c_ulong {
    let read = |name: &str| std::fs::read_to_string(nodes.join(name)).ok().map(|text| mask(text.trim()));
    let memory = read("has_memory").unwrap_or(0);
    // Where the kernel does not tell of processors, memory is all there is to go by.
    memory & read("has_cpu").filter(|cpus| *cpus != 0).unwrap_or(memory)
}

/// What to ask for; `None` where there is nothing to choose. Nodes without memory are not asked.
fn policy(present: c_ulong, near: &[u32]) -> Option<(c_int, c_ulong)> {
    let near = near.iter().map(|node| bit(*node)).fold(0, |all, one| all | one) & present;
    match (near.count_ones(), present.count_ones()) {
        (_, 0 | 1) => None,
        (0, _) => Some((INTERLEAVE, present)),
        (1, _) => Some((PREFERRED, near)),
        _ => Some((INTERLEAVE, near)),
    }
}

fn bit(node: u32) -> c_ulong {
    if node < NODES_MAX { 1 << node } else { 0 }
}

/// One bit for each node of a list such as `0-1,4`. What cannot be read names no node.
fn mask(list: &str) -> c_ulong {
    let piece = |piece: &str| {
        let (first, last) = piece.split_once('-').unwrap_or((piece, piece));
        match (first.parse::<u32>(), last.parse::<u32>()) {
            (Ok(first), Ok(last)) => (first..=last.min(NODES_MAX)).map(bit).fold(0, |all, one| all | one),
            _ => 0,
        }
    };
    list.split(',').map(piece).fold(0, |all, one| all | one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_nodes_are_read() {
        assert_eq!(mask("0"), 0b1);
        assert_eq!(mask("0-1,4"), 0b1_0011);
        assert_eq!(mask("63"), 1 << 63);
        for nothing in ["", "x", "1-", "64", "3-2"] {
            assert_eq!(mask(nothing), 0, "{nothing}");
        }
        assert_eq!(mask("0-4000000000"), c_ulong::MAX);
    }

    #[test]
    fn memory_without_processors_is_a_devices_own() {
        let nodes = tempfile::tempdir().expect("a directory");
        let write = |name: &str, list: &str| std::fs::write(nodes.path().join(name), list).expect("written");
        assert_eq!(present(nodes.path()), 0);
        write("has_memory", "0-2,9\n");
        assert_eq!(present(nodes.path()), 0b10_0000_0111, "nothing is known of processors");
        write("has_cpu", "0-1\n");
        assert_eq!(present(nodes.path()), 0b11);
        assert_eq!(policy(present(nodes.path()), &[2]), Some((INTERLEAVE, 0b11)), "near a device's own memory");
    }

    #[test]
    fn pages_lie_near_the_devices_or_everywhere() {
        assert_eq!(policy(0b1111, &[2]), Some((PREFERRED, 0b100)));
        assert_eq!(policy(0b1111, &[2, 2, 0]), Some((INTERLEAVE, 0b101)), "devices on two nodes");
        assert_eq!(policy(0b11, &[]), Some((INTERLEAVE, 0b11)), "not known");
        assert_eq!(policy(0b11, &[5, 700]), Some((INTERLEAVE, 0b11)), "nodes without memory");
        assert_eq!(policy(0b1, &[0]), None, "nothing to choose");
        assert_eq!(policy(0, &[0]), None, "a system that tells no nodes");
    }

    #[test]
    fn the_kernel_knows_these_policies() {
        // One node is enough to see that the numbers mean what they are called here.
        let memory = memmap2::MmapMut::map_anon(1 << 20).unwrap();
        let node: c_ulong = 1;
        for wanted in [PREFERRED, INTERLEAVE] {
            let (mut found, start): (c_int, _) = (-1, memory.as_ptr());
            // SAFETY: the mapping is this test's own; the pointers are to locals.
            let (set, got) = unsafe {
                (
                    libc::syscall(
                        libc::SYS_mbind,
                        start,
                        memory.len(),
                        wanted,
                        &raw const node,
                        c_ulong::from(NODES_MAX),
                        0,
                    ),
                    libc::syscall(libc::SYS_get_mempolicy, &raw mut found, 0, 0, start, 2),
                )
            };
            if set != 0 || got != 0 {
                eprintln!("skipped: this kernel or container has no memory policies");
                return;
            }
            assert_eq!(found, wanted);
        }
    }
}
