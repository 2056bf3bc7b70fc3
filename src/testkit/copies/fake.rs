//! A copier that misbehaves as told: it fails chosen slots, holds chosen orders back, refuses to be
//! given any, and answers out of order.
//!
//! Within what the trait allows it is right: loads go before offloads, each order is answered once,
//! nothing is left behind. One order is carried out at a time, by the host copier.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, mpsc};
use std::thread::JoinHandle;

use kvcellar_block::error::{Error, Result};
use kvcellar_engine::gpu::host::HostCopier;
use kvcellar_engine::gpu::{After, Answers, Copier, CopyError, Direction, Order};

use crate::copies::ledger::Outcome;
use crate::copies::scene::{Side, forget_checksum};
use crate::random::Random;

struct State {
    loads: Vec<Order>,
    offloads: Vec<Order>,
    closed: bool,
    hold_all: bool,
    held: HashSet<u32>,
    failing: HashMap<u32, CopyError>,
    refusing: bool,
    random: Random,
    /// Orders in the order in which they were started.
    started: Vec<Order>,
}

/// What a test tells the fake, and sees of it.
pub struct Control {
    state: Mutex<State>,
    wake: Condvar,
}

impl Control {
    pub fn new(seed: u64) -> Self {
        let state = State {
            loads: Vec::new(),
            offloads: Vec::new(),
            closed: false,
            hold_all: false,
            held: HashSet::new(),
            failing: HashMap::new(),
            refusing: false,
            random: Random::new(seed),
            started: Vec::new(),
        };
        Self { state: Mutex::new(state), wake: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("not poisoned")
    }

    /// Starts nothing until [`Self::let_go`].
    pub fn hold_all(&self) {
        self.lock().hold_all = true;
    }

    /// Starts no order of this slot until [`Self::let_go`].
    pub fn hold(&self, slot: u32) {
        self.lock().held.insert(slot);
    }

    pub fn let_go(&self) {
        let mut state = self.lock();
        state.hold_all = false;
        state.held.clear();
        self.wake.notify_all();
    }

    /// Answers orders of this slot with an error, without copying.
    pub fn fail(&self, slot: u32, error: CopyError) {
        self.lock().failing.insert(slot, error);
    }

    /// Whether `submit` is an error.
    pub fn refuse(&self, refusing: bool) {
        self.lock().refusing = refusing;
    }

    pub fn started(&self) -> Vec<Order> {
        self.lock().started.clone()
    }

    fn next(&self) -> Option<(Order, Option<CopyError>)> {
        let mut state = self.lock();
        loop {
            if let Some(order) = state.pick() {
                state.started.push(order);
                return Some((order, state.failing.get(&order.copy.slot).copied()));
            }
            if state.closed && state.loads.is_empty() && state.offloads.is_empty() {
                return None;
            }
            state = self.wake.wait(state).expect("not poisoned");
        }
    }
}

impl State {
    /// Any order that is not held, but a load if there is one.
    fn pick(&mut self) -> Option<Order> {
        if self.hold_all {
            return None;
        }
        let Self { loads, offloads, held, random, .. } = self;
        for queue in [loads, offloads] {
            let mut free: Vec<usize> = (0..queue.len()).filter(|at| !held.contains(&queue[*at].copy.slot)).collect();
            random.shuffle(&mut free);
            if let Some(at) = free.first() {
                return Some(queue.swap_remove(*at));
            }
        }
        None
    }
}

/// Hands the inner copier's one answer over.
struct Relay(Mutex<mpsc::Sender<Outcome>>);

impl Answers for Relay {
    fn answer(&self, _order: &Order, outcome: Outcome) {
        // The other end is gone only when the fake panicked, which fails the test anyway.
        let _nobody_waits = self.0.lock().expect("not poisoned").send(outcome);
    }
}

pub struct FakeCopier {
    control: Arc<Control>,
    in_flight: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl FakeCopier {
    pub fn start(side: Side, answers: Arc<dyn Answers>, control: Arc<Control>) -> Self {
        let (sender, outcomes) = mpsc::channel();
        let relay: Arc<dyn Answers> = Arc::new(Relay(Mutex::new(sender)));
        let (pool, rank, verify_loads) = (Arc::clone(&side.pool), side.rank, side.verify_loads);
        let inner = HostCopier::start(side.host(), &relay, 1).expect("a thread");
        let in_flight = Arc::new(AtomicUsize::new(0));
        let (of_thread, counted) = (Arc::clone(&control), Arc::clone(&in_flight));
        let thread = std::thread::spawn(move || {
            while let Some((order, failure)) = of_thread.next() {
                let outcome = match failure {
                    Some(error) => Err(error),
                    None => {
                        inner.submit(&[order], &After::default()).expect("the host copier lives");
                        let outcome = outcomes.recv().expect("an answer");
                        if order.direction == Direction::Offload && outcome.is_ok() && !verify_loads {
                            // As a device's copier, which does not see the bytes.
                            forget_checksum(&pool, order.copy.slot, rank);
                        }
                        outcome
                    }
                };
                answers.answer(&order, outcome);
                counted.fetch_sub(1, Ordering::AcqRel);
            }
        });
        Self { control, in_flight, thread: Some(thread) }
    }
}

impl Copier for FakeCopier {
    fn submit(&self, orders: &[Order], _after: &After) -> Result<()> {
        let mut state = self.control.lock();
        if state.refusing {
            return Err(Error::DeviceDead {
                device: "the fake".to_owned(),
                problem: "told so".to_owned(),
                remedy: String::new(),
            });
        }
        self.in_flight.fetch_add(orders.len(), Ordering::AcqRel);
        for order in orders {
            match order.direction {
                Direction::Load => state.loads.push(*order),
                Direction::Offload => state.offloads.push(*order),
            }
        }
        self.control.wake.notify_all();
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }
}

impl Drop for FakeCopier {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // A test that failed while it held orders back must end.
            self.control.let_go();
        }
        self.control.lock().closed = true;
        self.control.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the fake copied to its end");
        }
    }
}
