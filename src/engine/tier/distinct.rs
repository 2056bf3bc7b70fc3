//! How many different blocks came by, in fixed memory.
//!
//! A register keeps the longest run of zeros among the fingerprints that fall to it
//! (`HyperLogLog`). The count grows whenever a register does, by one over the chance that a new
//! block would have changed any (historic inverse probability): no correction for few or many is
//! needed, it never falls, and its growth can be split by who caused it.
//!
//! Standard error of the whole count: 0.83 / sqrt(registers), 0.33% of it with 2^16 registers, and
//! less while there are fewer blocks than registers.

/// Counts different fingerprints, which are evenly spread over all numbers.
#[derive(Debug)]
pub(super) struct Distinct {
    registers: Box<[u8]>,
    /// Bits of a fingerprint that do not name its register.
    rank_bits: u32,
    /// Sum of 2^-register: how many registers a new block would change on average.
    open: f64,
    count: f64,
}

impl Distinct {
    /// Nothing came by. `bits`: of the number of registers, one byte each.
    pub(super) fn new(bits: u32) -> Self {
        let registers = 1_usize << bits;
        Self {
            registers: vec![0; registers].into_boxed_slice(),
            rank_bits: u64::BITS - bits,
            open: registers as f64,
            count: 0.0,
        }
    }

    /// Takes in a block. Returns by how much the count grows: 1 for each new block on average, 0
    /// for one that was there before.
    #[inline]
    pub(super) fn add(&mut self, fingerprint: u64) -> f64 {
        let rank = 1 + fingerprint.trailing_zeros().min(self.rank_bits) as u8;
        let register = &mut self.registers[(fingerprint >> self.rank_bits) as usize];
        if *register >= rank {
            return 0.0;
        }
        let before = std::mem::replace(register, rank);
        let growth = self.registers.len() as f64 / self.open;
        self.open += (-f64::from(rank)).exp2() - (-f64::from(before)).exp2();
        self.count += growth;
        growth
    }

    /// Different blocks so far.
    pub(super) fn count(&self) -> f64 {
        self.count
    }

    /// Bytes of memory taken.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.registers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that are evenly spread.
    fn spread(number: u64) -> u64 {
        let mixed = (number + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ mixed >> 31
    }

    #[test]
    fn different_blocks_are_counted_once() {
        for (blocks, bits, tolerance) in
            [(100, 16, 0.01), (20_000, 16, 0.02), (300_000, 12, 0.05), (300_000, 16, 0.015)]
        {
            let mut distinct = Distinct::new(bits);
            let all = || (0..blocks).map(spread);
            let grown: f64 = all().map(|block| distinct.add(block)).sum();
            let error = (grown / blocks as f64 - 1.0).abs();
            assert!(error < tolerance, "{blocks} blocks, 2^{bits} registers: {error}");
            assert!((grown - distinct.count()).abs() < 1e-6 * grown);
            assert!(all().all(|block| distinct.add(block) == 0.0), "none of them is new");
        }
    }
}
