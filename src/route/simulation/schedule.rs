//! What will happen when, in simulated time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Things to happen, soonest first; of those at the same time, in the order in which they were
/// planned.
#[derive(Debug)]
pub(super) struct Schedule<T> {
    now_s: f64,
    count: u64,
    queue: BinaryHeap<Reverse<Planned<T>>>,
}

#[derive(Debug)]
struct Planned<T>(f64, u64, T);

impl<T> PartialEq for Planned<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl<T> Eq for Planned<T> {}
impl<T> PartialOrd for Planned<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl<T> Ord for Planned<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0).then(self.1.cmp(&other.1))
    }
}

impl<T> Schedule<T> {
    pub(super) fn new() -> Self {
        Self { now_s: 0.0, count: 0, queue: BinaryHeap::new() }
    }

    /// The time of what happened last.
    pub(super) fn now_s(&self) -> f64 {
        self.now_s
    }

    /// Plans something.
    pub(super) fn after(&mut self, seconds: f64, what: T) {
        self.count += 1;
        self.queue.push(Reverse(Planned(self.now_s + seconds, self.count, what)));
    }

    /// Goes on to what happens next.
    pub(super) fn next(&mut self) -> Option<T> {
        let Reverse(Planned(at_s, _, what)) = self.queue.pop()?;
        self.now_s = at_s;
        Some(what)
    }
}
