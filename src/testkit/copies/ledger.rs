//! Keeps every answer of a copier, in order, and can stop the copier at an answer.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use kvcellar_engine::gpu::{Answers, CopyError, Order};

/// Long enough for any machine; passing it fails the test instead of hanging it.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub type Outcome = Result<(), CopyError>;

#[derive(Default)]
struct State {
    answers: Vec<(Order, Outcome)>,
    closed: bool,
}

/// Where a copier answers to.
#[derive(Default)]
pub struct Ledger {
    state: Mutex<State>,
    changed: Condvar,
}

impl Ledger {
    /// From now on the copier is stopped inside its next answer.
    pub fn close(&self) {
        self.state.lock().expect("not poisoned").closed = true;
    }

    pub fn open(&self) {
        self.state.lock().expect("not poisoned").closed = false;
        self.changed.notify_all();
    }

    /// Waits until there are `count` answers and returns all there are.
    pub fn wait_for(&self, count: usize) -> Vec<(Order, Outcome)> {
        let state = self.state.lock().expect("not poisoned");
        let (state, _) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| state.answers.len() < count)
            .expect("not poisoned");
        assert!(state.answers.len() >= count, "only {} of {count} orders were answered", state.answers.len());
        state.answers.clone()
    }

    pub fn answers(&self) -> Vec<(Order, Outcome)> {
        self.wait_for(0)
    }

    /// Tickets in the order of their answers.
    pub fn tickets(&self) -> Vec<u64> {
        self.answers().iter().map(|(order, _)| order.ticket).collect()
    }
}

impl Answers for Ledger {
    fn answer(&self, order: &Order, outcome: Outcome) {
        let mut state = self.state.lock().expect("not poisoned");
        state.answers.push((*order, outcome));
        self.changed.notify_all();
        drop(self.changed.wait_while(state, |state| state.closed).expect("not poisoned"));
    }
}

/// Waits until something holds, and fails the test by name when it never does.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let naps = PATIENCE.as_millis() / 5;
    for _ in 0..naps {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("never happened: {what}");
}
