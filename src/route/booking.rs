//! One request as it stands in its engine's books.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::books::Promise;
use super::engine::Engine;
use super::peers::news::News;

/// What a request's end says of its engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Unsaid,
    /// It answers as it should.
    Well,
    /// Something is wrong with it.
    Ill,
}

/// One promise of a real engine. Given back when it is dropped.
#[derive(Debug)]
pub struct Booking {
    engine: Arc<Engine>,
    number: u64,
    has_prompt: bool,
    is_trial: bool,
    /// The worst so far.
    verdict: AtomicU8,
}

impl Booking {
    /// Books a request.
    pub fn new(engine: Arc<Engine>, promise: Promise) -> Self {
        let has_prompt = promise.tokens > 0;
        let number = engine.books().book(engine.now_s(), promise);
        engine.tell(|name| News::booked(name, number, promise));
        let is_trial = engine.breaker().begin(engine.now_s());
        Self { engine, number, has_prompt, is_trial, verdict: AtomicU8::new(Verdict::Unsaid as u8) }
    }

    /// Where it is booked.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// What it says of the engine. Of one request each verdict counts once, and a bad one is the
    /// last.
    pub fn judged(&self, verdict: Verdict) {
        if self.verdict.fetch_max(verdict as u8, Ordering::Relaxed) < verdict as u8 {
            self.engine.judged(verdict == Verdict::Well, self.is_trial);
        }
    }

    /// It is over for the engine, though the booking is still kept.
    pub fn is_over(&self) {
        let has_ended = self.engine.books().end(self.engine.now_s(), self.number);
        if has_ended {
            let number = self.number;
            self.engine.tell(|name| News::Ended { engine: Arc::clone(name), number });
        }
    }

    /// The first token has come. Said once or often.
    pub fn answered(&self) {
        let is_first = self.engine.books().answered(self.engine.now_s(), self.number);
        if is_first {
            let number = self.number;
            self.engine.tell(|name| News::Answered { engine: Arc::clone(name), number });
        }
        if self.has_prompt {
            self.engine.answered_a_prompt();
        }
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        self.is_over();
        let now_s = self.engine.now_s();
        if self.is_trial && self.verdict.load(Ordering::Relaxed) == Verdict::Unsaid as u8 {
            self.engine.breaker().abandoned(now_s);
        }
    }
}
