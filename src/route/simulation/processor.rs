//! A processor that all engines compute on: where more of them have something to do than it can
//! serve at full speed, each gets an equal part of it.

use std::collections::BTreeMap;

use super::engine::Step;

/// Seconds until it is to be looked at again, and the number that this look has.
pub(super) type NextLook = (f64, u64);

/// The processor. Times are in simulated seconds.
#[derive(Debug)]
pub(super) struct Processor {
    /// Engines that it serves at full speed.
    engines: f64,
    at_s: f64,
    /// Steps under way, with what is left of each at full speed.
    left: BTreeMap<usize, (f64, Step)>,
    /// Counts changes: what was planned before the last one is void.
    round: u64,
}

impl Processor {
    pub(super) fn new(engines: f64) -> Self {
        Self { engines, at_s: 0.0, left: BTreeMap::new(), round: 0 }
    }

    fn speed(&self) -> f64 {
        (self.engines / self.left.len().max(1) as f64).min(1.0)
    }

    fn advance(&mut self, now_s: f64) {
        let done_s = (now_s - self.at_s) * self.speed();
        self.left.values_mut().for_each(|(left_s, _)| *left_s -= done_s);
        self.at_s = now_s;
        self.round += 1;
    }

    /// An engine begins a step. Returns when to look.
    pub(super) fn begin(&mut self, now_s: f64, engine: usize, step: Step) -> NextLook {
        self.advance(now_s);
        self.left.insert(engine, (step.seconds, step));
        self.next()
    }

    /// Steps that have ended, and when to look again. Nothing, where its number is not the last.
    pub(super) fn look(&mut self, now_s: f64, round: u64) -> (Vec<(usize, Step)>, Option<NextLook>) {
        if round != self.round {
            return (Vec::new(), None);
        }
        self.advance(now_s);
        let over: Vec<usize> = self.left.iter().filter(|(_, (left_s, _))| *left_s < 1e-9).map(|(at, _)| *at).collect();
        let over = over.into_iter().filter_map(|at| Some((at, self.left.remove(&at)?.1))).collect();
        let next = (!self.left.is_empty()).then(|| self.next());
        (over, next)
    }

    fn next(&self) -> NextLook {
        let least_s = self.left.values().map(|(left_s, _)| *left_s).fold(f64::INFINITY, f64::min);
        (least_s.max(0.0) / self.speed(), self.round)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(seconds: f64) -> Step {
        Step { seconds, ..Step::default() }
    }

    fn ends(processor: &mut Processor, mut now_s: f64, mut next: Option<NextLook>) -> Vec<(usize, f64)> {
        let mut ends = Vec::new();
        while let Some((after_s, round)) = next {
            now_s += after_s;
            let (over, then) = processor.look(now_s, round);
            ends.extend(over.into_iter().map(|(at, _)| (at, now_s)));
            next = then;
        }
        ends
    }

    #[test]
    fn who_is_alone_has_it_all_and_two_share() {
        let mut processor = Processor::new(1.0);
        let (_, void) = processor.begin(0.0, 0, step(2.0));
        let next = processor.begin(1.0, 1, step(0.5));
        assert!(processor.look(2.0, void).0.is_empty(), "it takes longer now");
        let ends = ends(&mut processor, 1.0, Some(next));
        assert_eq!(ends.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [1, 0]);
        assert!((ends[0].1 - 2.0).abs() < 1e-9 && (ends[1].1 - 2.5).abs() < 1e-9, "{ends:?}");
    }

    #[test]
    fn where_there_is_enough_nobody_waits() {
        let mut processor = Processor::new(2.0);
        processor.begin(0.0, 0, step(1.0));
        let next = processor.begin(0.0, 1, step(2.0));
        assert_eq!(ends(&mut processor, 0.0, Some(next)), [(0, 1.0), (1, 2.0)]);
    }
}
