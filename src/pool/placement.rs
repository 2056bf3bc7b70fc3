//! Where a pool's pages lie: spread over the machine's memory nodes, in huge pages where the system gives them to shared memory.
//!
//! Said before the pages are touched, so that it does not depend on which thread touches which page. Neither is needed: a system that refuses costs
//! speed only.

use std::ffi::{c_int, c_ulong};
use std::ptr::NonNull;

/// Pages in turn from all nodes.
const INTERLEAVE: c_int = 3;

/// Memory nodes that are told apart: one bit each.
const NODES_MAX: u32 = c_ulong::BITS;

/// Asks the kernel to place the pages of this mapping. `start` is page-aligned and mapped for `len` bytes.
pub(super) fn prepare(start: NonNull<u8>, len: usize) {
    // SAFETY: the range is a mapping of the caller's; the call changes how its pages are backed, not what they hold.
    unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
    let nodes = std::fs::read_to_string("/sys/devices/system/node/has_memory").map_or(0, |text| mask(text.trim()));
    if nodes.count_ones() > 1 {
        // SAFETY: as above; the mask is a local of as many bits as are named, which the kernel reads only.
        unsafe {
            libc::syscall(
                libc::SYS_mbind,
                start.as_ptr(),
                len,
                INTERLEAVE,
                &raw const nodes,
                c_ulong::from(NODES_MAX),
                0,
            )
        };
    }
}

/// One bit for each node of a list such as `0-1,4`. What cannot be read names no node.
fn mask(list: &str) -> c_ulong {
    let bit = |node: u32| if node < NODES_MAX { 1 << node } else { 0 };
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
}
