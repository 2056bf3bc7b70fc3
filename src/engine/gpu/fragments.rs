//! Fragments: what one copy command moves. Pure arithmetic: addresses in, fewer and better sorted
//! addresses out.

/// A contiguous piece of a block on both sides. Laid out as the gather kernel reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(C)]
pub struct Fragment {
    /// Address in the device's memory.
    pub device: u64,
    /// Address in this process's memory.
    pub host: u64,
    /// Bytes.
    pub len: u64,
}

impl Fragment {
    /// Whether `next` continues this one on both sides.
    fn continues(&self, next: &Self) -> bool {
        self.device + self.len == next.device && self.host + self.len == next.host
    }

    /// Whether all of it can be moved in units of 16 bytes.
    pub fn is_wide(&self) -> bool {
        (self.device | self.host | self.len).is_multiple_of(16)
    }
}

/// Sorts by the device's addresses and joins what touches on both sides. Moves the same bytes to
/// the same places as before.
///
/// Slots begin with descriptor pages, so parts of two slots never touch, and no fragment crosses a
/// border between pieces of pinned memory, which lie between slots.
pub fn coalesce(fragments: &mut Vec<Fragment>) {
    fragments.sort_unstable();
    join(fragments);
}

/// Joins what touches on both sides and follows each other in the list. Keeps the order.
pub fn join(fragments: &mut Vec<Fragment>) {
    fragments.dedup_by(|next, last| {
        let joined = last.continues(next);
        if joined {
            last.len += next.len;
        }
        joined
    });
}

/// Bytes of all fragments.
pub fn bytes(fragments: &[Fragment]) -> u64 {
    fragments.iter().map(|fragment| fragment.len).sum()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn fragment(device: u64, host: u64, len: u64) -> Fragment {
        Fragment { device, host, len }
    }

    /// Every byte's way.
    fn ways(fragments: &[Fragment]) -> BTreeMap<u64, u64> {
        fragments.iter().flat_map(|one| (0..one.len).map(|at| (one.device + at, one.host + at))).collect()
    }

    #[test]
    fn neighbours_on_both_sides_become_one() {
        let mut fragments = vec![fragment(300, 30, 10), fragment(100, 10, 10), fragment(110, 20, 10)];
        coalesce(&mut fragments);
        assert_eq!(fragments, [fragment(100, 10, 20), fragment(300, 30, 10)]);
        assert_eq!(bytes(&fragments), 30);
    }

    #[test]
    fn joining_keeps_the_order() {
        let mut fragments = vec![fragment(300, 10, 10), fragment(310, 20, 10), fragment(100, 30, 10)];
        join(&mut fragments);
        assert_eq!(fragments, [fragment(300, 10, 20), fragment(100, 30, 10)]);
    }

    #[test]
    fn neighbours_on_one_side_stay_apart() {
        let apart = [fragment(100, 10, 10), fragment(110, 30, 10), fragment(130, 40, 10)];
        let mut fragments = apart.to_vec();
        coalesce(&mut fragments);
        assert_eq!(fragments, apart);
    }

    #[test]
    fn wide_means_all_three() {
        assert!(fragment(32, 16, 64).is_wide());
        for odd in [fragment(33, 16, 64), fragment(32, 24, 64), fragment(32, 16, 65)] {
            assert!(!odd.is_wide());
        }
    }

    proptest! {
        #[test]
        fn no_byte_is_lost_or_moved_elsewhere(pieces in proptest::collection::vec((0_u64..60, 0_u64..60, any::<bool>()), 0..40), seed in any::<u64>()) {
            // Device pieces of 8 bytes in distinct places; the host side follows the device side or
            // lies anywhere.
            let mut places: Vec<u64> = pieces.iter().map(|(device, _, _)| *device).collect();
            places.sort_unstable();
            places.dedup();
            let mut fragments: Vec<Fragment> = places
                .iter()
                .zip(&pieces)
                .map(|(place, (_, host, follows))| fragment(1000 + place * 8, 9000 + if *follows { *place } else { 100 + host } * 8, 8))
                .collect();
            let before = ways(&fragments);
            let turn = if fragments.is_empty() { 0 } else { seed as usize % fragments.len() };
            fragments.rotate_left(turn);
            let count = fragments.len();
            coalesce(&mut fragments);
            prop_assert_eq!(ways(&fragments), before);
            prop_assert!(fragments.len() <= count);
            prop_assert!(fragments.windows(2).all(|pair| pair[0].device < pair[1].device && !pair[0].continues(&pair[1])));
        }
    }
}
