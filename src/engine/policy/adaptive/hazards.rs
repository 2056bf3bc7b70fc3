//! How likely blocks of each class are to be used again, by how long ago their last use was:
//! measured on the workload at hand.
//!
//! For every class and range of ages two things are counted: blocks that were used again at that
//! age, and how many blocks were there to be used, for how long. Their ratio is the hazard rate,
//! the actuary's estimate, which is right although most blocks have not come back yet (some never
//! will) and others are lost sight of. Both counts are halved now and then, so that old workloads
//! are forgotten.

use super::ages::{AGE_RANGES, AGES, EPOCHS, age_end, age_range};
use super::history::CLASSES;

/// What is assumed of all blocks before anything was seen: so many uses again for each range of
/// ages...
const ASSUMED_USES: f64 = 2.0;

/// ... at a rate of so many in an epoch, divided by the age in epochs: as if the longest unused
/// were the least likely to be used.
const ASSUMED_RATE: f64 = 0.02;

fn at(class: u8, range: usize) -> usize {
    usize::from(class) * AGE_RANGES + range
}

/// Counts of all classes, in fixed memory.
#[derive(Debug)]
pub(super) struct Hazards {
    /// Now.
    epoch: u32,
    /// Watched blocks of each class, by the epoch of their last use, round and round.
    cohorts: Box<[u32]>,
    /// Watched blocks of each class in each range of ages.
    watched: Box<[u32]>,
    /// Block epochs that were watched.
    exposure: Box<[f64]>,
    /// Uses again.
    reuses: Box<[f64]>,
    /// What is left of both after an epoch.
    memory: f64,
}

impl Hazards {
    /// Nothing was seen yet. Counts are halved after `half_life` epochs.
    pub(super) fn new(half_life: f64) -> Self {
        let cells = CLASSES * AGE_RANGES;
        Self {
            epoch: 0,
            cohorts: vec![0; CLASSES * EPOCHS as usize].into_boxed_slice(),
            watched: vec![0; cells].into_boxed_slice(),
            exposure: vec![0.0; cells].into_boxed_slice(),
            reuses: vec![0.0; cells].into_boxed_slice(),
            memory: (-1.0 / half_life).exp2(),
        }
    }

    /// The number of this epoch.
    pub(super) fn epoch(&self) -> u32 {
        self.epoch
    }

    fn cohort(class: u8, epoch: u32) -> usize {
        usize::from(class) * EPOCHS as usize + (epoch % EPOCHS) as usize
    }

    /// A block of this class is watched from now on.
    pub(super) fn watch(&mut self, class: u8) {
        self.cohorts[Self::cohort(class, self.epoch)] += 1;
        self.watched[at(class, 0)] += 1;
    }

    /// A block that was watched since an epoch is used again.
    pub(super) fn on_reuse(&mut self, class: u8, since: u32) {
        if let Some(cell) = self.unwatch(class, since) {
            self.reuses[cell] += 1.0;
            // Half of this epoch it was still there to be used.
            self.exposure[cell] += 0.5;
        }
    }

    /// A block that was watched since an epoch is lost sight of.
    pub(super) fn on_loss(&mut self, class: u8, since: u32) {
        self.unwatch(class, since);
    }

    fn unwatch(&mut self, class: u8, since: u32) -> Option<usize> {
        let age = self.epoch.wrapping_sub(since);
        if age >= EPOCHS {
            return None;
        }
        let cell = at(class, age_range(age));
        self.cohorts[Self::cohort(class, since)] -= 1;
        self.watched[cell] -= 1;
        Some(cell)
    }

    /// The next epoch begins.
    pub(super) fn advance(&mut self) {
        for (cell, watched) in self.watched.iter().enumerate() {
            // Blocks of this epoch came in its course.
            let share = if cell % AGE_RANGES == 0 { 0.5 } else { 1.0 };
            self.exposure[cell] = self.exposure[cell] * self.memory + share * f64::from(*watched);
            self.reuses[cell] *= self.memory;
        }
        self.epoch = self.epoch.wrapping_add(1);
        for class in 0..CLASSES as u8 {
            for (range, begin) in AGES.iter().enumerate().skip(1) {
                let came = self.cohorts[Self::cohort(class, self.epoch.wrapping_sub(*begin))];
                self.watched[at(class, range)] += came;
                self.watched[at(class, range - 1)] -= came;
            }
            let gone = std::mem::take(&mut self.cohorts[Self::cohort(class, self.epoch)]);
            self.watched[at(class, AGE_RANGES - 1)] -= gone;
        }
    }

    /// The rates of uses again, for each block and epoch, of all classes together.
    fn rates_of_all(&self) -> [f64; AGE_RANGES] {
        std::array::from_fn(|range| {
            let sum = |counts: &[f64]| (0..CLASSES as u8).map(|class| counts[at(class, range)]).sum::<f64>();
            let middle = f64::from(AGES[range] + age_end(range)) / 2.0;
            (sum(&self.reuses) + ASSUMED_USES) / (sum(&self.exposure) + ASSUMED_USES * middle / ASSUMED_RATE)
        })
    }

    /// For each class and range of ages, what it is worth to keep such a block: the most uses that
    /// an epoch of its place can bring, over all times to give it up (the Gittins index of its
    /// life).
    pub(super) fn indices(&self) -> Box<[f64]> {
        let all = self.rates_of_all();
        let mut indices = vec![0.0; CLASSES * AGE_RANGES].into_boxed_slice();
        for (class, indices) in indices.chunks_exact_mut(AGE_RANGES).enumerate() {
            // For each range: whether a block survives it unused, and the epochs that it takes.
            let mut life = [(1.0, 0.0); AGE_RANGES];
            for (range, life) in life.iter_mut().enumerate() {
                let cell = at(class as u8, range);
                let rate = (self.reuses[cell] + ASSUMED_USES) / (self.exposure[cell] + ASSUMED_USES / all[range]);
                let unused = (-rate * f64::from(age_end(range) - AGES[range])).exp();
                *life = (unused, (1.0 - unused) / rate);
            }
            for (range, index) in indices.iter_mut().enumerate() {
                let (mut unused, mut epochs) = (1.0, 0.0);
                for (survives, takes) in &life[range..] {
                    epochs += unused * takes;
                    unused *= survives;
                    *index = f64::max(*index, (1.0 - unused) / epochs);
                }
            }
        }
        indices
    }

    /// Bytes of memory taken.
    pub(super) fn bytes(&self) -> usize {
        let counts = size_of_val(&*self.exposure) + size_of_val(&*self.reuses);
        size_of_val(&*self.cohorts) + size_of_val(&*self.watched) + counts
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A block that is watched, or was.
    #[derive(Debug, Clone, Copy)]
    struct Watched {
        class: u8,
        since: u32,
    }

    /// What happens, to which class, and to which block.
    fn step() -> impl Strategy<Value = (u8, u8, usize)> {
        (0_u8..10, 0_u8..3, 0_usize..20)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn counts_are_those_of_a_list_of_blocks(steps in prop::collection::vec(step(), 0..200)) {
            let mut hazards = Hazards::new(100.0);
            let mut blocks: Vec<Watched> = Vec::new();
            let (mut exposure, mut reuses) = ([[0.0_f64; AGE_RANGES]; 3], [[0.0_f64; AGE_RANGES]; 3]);
            for (step, class, which) in steps {
                let now = hazards.epoch();
                match step {
                    0..=2 => {
                        hazards.watch(class);
                        blocks.push(Watched { class, since: now });
                    }
                    3..=4 if !blocks.is_empty() => {
                        let Watched { class, since } = blocks.swap_remove(which % blocks.len());
                        if now - since < EPOCHS {
                            reuses[usize::from(class)][age_range(now - since)] += 1.0;
                            exposure[usize::from(class)][age_range(now - since)] += 0.5;
                        }
                        if step == 3 { hazards.on_reuse(class, since) } else {
                            hazards.on_loss(class, since);
                            if now - since < EPOCHS {
                                reuses[usize::from(class)][age_range(now - since)] -= 1.0;
                                exposure[usize::from(class)][age_range(now - since)] -= 0.5;
                            }
                        }
                    }
                    _ => {
                        // Some epochs, and now and then many.
                        for _ in 0..if step == 9 { 4 * which } else { 1 } {
                            for cell in exposure.iter_mut().chain(&mut reuses).flatten() {
                                *cell *= hazards.memory;
                            }
                            for Watched { class, since } in &blocks {
                                let age = hazards.epoch() - since;
                                if age < EPOCHS {
                                    let share = if age == 0 { 0.5 } else { 1.0 };
                                    exposure[usize::from(*class)][age_range(age)] += share;
                                }
                            }
                            hazards.advance();
                        }
                    }
                }
            }
            for class in 0..3 {
                for range in 0..AGE_RANGES {
                    let cell = at(class as u8, range);
                    prop_assert!((hazards.exposure[cell] - exposure[class][range]).abs() < 1e-6);
                    prop_assert!((hazards.reuses[cell] - reuses[class][range]).abs() < 1e-6);
                }
            }
        }
    }

    #[test]
    fn before_anything_was_seen_the_younger_is_worth_more() {
        let indices = Hazards::new(100.0).indices();
        assert!(indices.chunks(AGE_RANGES).all(|of_class| of_class == &indices[..AGE_RANGES]));
        assert!(indices[..AGE_RANGES].is_sorted_by(|younger, older| younger > older), "{:?}", &indices[..AGE_RANGES]);
    }

    #[test]
    fn a_block_that_comes_back_late_is_worth_most_shortly_before() {
        let mut hazards = Hazards::new(1000.0);
        // One class always comes back after 20 epochs, the other never does.
        for epoch in 0..2000_u32 {
            hazards.watch(0);
            hazards.watch(1);
            if let Some(since) = epoch.checked_sub(20) {
                hazards.on_reuse(0, since);
            }
            hazards.advance();
        }
        let indices = hazards.indices();
        let (young, due) = (indices[at(0, 0)], indices[at(0, age_range(16))]);
        assert!(due > 2.0 * young, "{due} {young}");
        assert!(young > 20.0 * indices[at(1, 0)], "{young} {}", indices[at(1, 0)]);
        let late = indices[at(0, age_range(45))];
        assert!(young > late, "it should have come back by then: {young} {late}");
    }
}
