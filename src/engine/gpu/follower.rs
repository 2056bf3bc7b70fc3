//! The follower: hands load orders to the copier as soon as their slots have been restored from
//! disk, in the order of the plan.
//!
//! It sleeps on each slot's own word in shared memory, so no scheduler step lies between disk and
//! KV cache, and the copier's threads never wait. An order whose restore failed is answered as
//! failed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::{After, Answers, Copier, CopyError, Order};
use crate::pool::{Pool, futex};
use kvcellar_block::SlotIndex;

/// How long the follower sleeps before it looks whether it should end. A restore that ends wakes it
/// at once.
const LOOK_AROUND: Duration = Duration::from_millis(100);

/// Where the follower counts what it did.
pub trait FollowerLedger: Send + Sync {
    /// The first block of a followed load was handed to the copier; `overlapped`: before its last
    /// block had been read.
    fn followed(&self, overlapped: bool);
}

struct Post {
    pool: Arc<Pool>,
    copier: Arc<dyn Copier>,
    answers: Arc<dyn Answers>,
    ledger: Arc<dyn FollowerLedger>,
    closed: Arc<AtomicBool>,
}

/// The orders of one load, and what they come after.
type LoadOrders = (Vec<Order>, After);

/// One rank's follower thread. Its queue is bounded by the KV cache: every order has a block of it
/// as destination.
pub struct LoadFollower {
    loads: Option<Sender<LoadOrders>>,
    closed: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl LoadFollower {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`kvcellar_block::error::Error::DeviceDead`] when the system refuses a thread.
    pub fn start(
        pool: Arc<Pool>,
        copier: Arc<dyn Copier>,
        answers: Arc<dyn Answers>,
        ledger: Arc<dyn FollowerLedger>,
    ) -> kvcellar_block::error::Result<Self> {
        let (loads, queue) = unbounded();
        let closed = Arc::new(AtomicBool::new(false));
        let post = Post { pool, copier, answers, ledger, closed: Arc::clone(&closed) };
        let thread = thread::Builder::new()
            .name("kvcellar-follow".to_owned())
            .spawn(move || post.run(&queue))
            .map_err(|error| kvcellar_block::error::Error::DeviceDead {
                device: "the follower of restores".to_owned(),
                problem: format!("no thread could be started ({error})"),
                remedy: "Raise the limit on processes".to_owned(),
            })?;
        Ok(Self { loads: Some(loads), closed, thread: Some(thread) })
    }

    /// Follows the restores of one load, whose copies come after `after`. Its orders are answered
    /// whatever happens.
    ///
    /// # Errors
    /// The orders back, when the thread has ended.
    pub fn follow(&self, orders: Vec<Order>, after: After) -> std::result::Result<(), Vec<Order>> {
        match &self.loads {
            Some(loads) => loads.send((orders, after)).map_err(|refused| refused.0.0),
            None => Err(orders),
        }
    }
}

impl Drop for LoadFollower {
    /// What is not restored by now is answered as failed.
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Release);
        self.loads = None;
        if let Some(thread) = self.thread.take() {
            // A follower that panicked has nothing more to follow.
            drop(thread.join());
        }
    }
}

impl Post {
    fn run(&self, queue: &Receiver<LoadOrders>) {
        for (orders, after) in queue {
            self.follow(&orders, &after);
        }
    }

    fn follow(&self, orders: &[Order], after: &After) {
        let mut told = false;
        let mut next = 0;
        while next < orders.len() {
            let ok = self.wait(&orders[next]);
            // Everything that is there by now goes in one submission.
            let mut end = next + 1;
            while ok && end < orders.len() && self.ended(&orders[end]) == Some(true) {
                end += 1;
            }
            if ok && !told {
                told = true;
                self.ledger.followed(orders.last().is_some_and(|last| self.ended(last).is_none()));
            }
            if !ok {
                self.answers.answer(&orders[next], Err(CopyError::NotRestored));
            } else if self.copier.submit(&orders[next..end], after).is_err() {
                orders[next..end].iter().for_each(|order| self.answers.answer(order, Err(CopyError::Device)));
            }
            next = end;
        }
    }

    fn ended(&self, order: &Order) -> Option<bool> {
        if order.copy.slot >= self.pool.slot_count() {
            return Some(false);
        }
        self.pool.line(SlotIndex(order.copy.slot)).restore_ended(order.copy.generation).0
    }

    fn wait(&self, order: &Order) -> bool {
        loop {
            if let Some(ok) = self.ended(order) {
                return ok;
            }
            if self.closed.load(Ordering::Acquire) {
                return false;
            }
            let line = self.pool.line(SlotIndex(order.copy.slot));
            let (ended, seen) = line.restore_ended(order.copy.generation);
            if ended.is_none() {
                futex::wait(line.restored_word(), seen, LOOK_AROUND);
            }
        }
    }
}
