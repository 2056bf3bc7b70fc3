//! Ages of blocks: how long ago their last use was, in epochs, and the ranges that are told apart.

/// Ages that are told apart, in epochs: each range begins here and ends where the next begins,
/// about half as much again later.
pub(super) const AGES: [u32; AGE_RANGES] =
    [0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724];

/// Number of ranges of ages.
pub(super) const AGE_RANGES: usize = 20;

/// Epochs after which a block that was not used again is no longer watched.
pub(super) const EPOCHS: u32 = 1024;

/// The range that an age in epochs lies in.
pub(super) fn age_range(epochs: u32) -> usize {
    AGES.partition_point(|begin| *begin <= epochs) - 1
}

/// The age in epochs at which a range ends.
pub(super) fn age_end(range: usize) -> u32 {
    AGES.get(range + 1).copied().unwrap_or(EPOCHS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_have_ranges() {
        let ranges: Vec<usize> = [0, 1, 3, 4, 5, 6, 723, 724, 5000].into_iter().map(age_range).collect();
        assert_eq!(ranges, [0, 1, 3, 4, 4, 5, 18, 19, 19]);
        assert_eq!((age_end(0), age_end(18), age_end(19)), (1, 724, EPOCHS));
    }
}
