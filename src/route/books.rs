//! What was promised to an engine and has not ended, and how fast it kept its promises. Known at
//! once, where the engine's own numbers are a scrape old.
//!
//! An engine computes prompts in the order they came. So the oldest one without a first token is
//! being computed since it became the oldest, at the engine's speed: what is left of it is known
//! between two answers, too. An answer that comes as a whole does not tell when its prompt was
//! computed; such a prompt is taken to be after its time.
//!
//! Pure: times are arguments, in seconds since any moment. A real engine's promises are given back
//! whatever happens ([`super::booking::Booking`]).

#![expect(clippy::cast_sign_loss, reason = "times since a moment and tokens are never below zero")]

use std::collections::VecDeque;

use hashbrown::HashMap;

use super::speed::Speed;
use super::view::Look;

/// A request as it is promised.
#[derive(Debug, Clone, Copy, Default)]
pub struct Promise {
    /// Tokens of its prompt.
    pub tokens: u32,
    /// Of those, how many the engine need not compute.
    pub held: u32,
    /// Its first token will be seen when it comes.
    pub streams: bool,
}

impl Promise {
    fn uncomputed(&self) -> u64 {
        self.tokens.saturating_sub(self.held).into()
    }
}

/// What an engine was given and has not done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backlog {
    /// Requests that have not ended.
    pub requests: usize,
    /// Of those, how many have no first token.
    pub unanswered: usize,
    /// Time that the rest of their prompts will take.
    pub seconds: f64,
}

#[derive(Debug)]
struct Open {
    promise: Promise,
    booked_s: f64,
    /// Tokens that the engine was to compute up to its first one.
    ahead: u64,
    first_s: Option<f64>,
}

/// One engine's open promises.
#[derive(Debug, Default)]
pub struct Books {
    open: HashMap<u64, Open>,
    count: u64,
    tokens: u64,
    /// Tokens of those without a first token that were not held.
    uncomputed: u64,
    /// Those without a first token, oldest first.
    unanswered: VecDeque<(u64, Promise)>,
    /// Since when the oldest of them is the oldest.
    oldest_since_s: f64,
    flow: Flow,
    /// What answers said of the engine's speed.
    pub speed: Speed,
}

/// Time over which an engine's flow is seen, in s: some busy periods, in which a request of those
/// there are is delayed by one that comes now. A longer one would still count sessions that have
/// left.
pub const FLOW_S: f64 = 5.0;

/// How much was asked of an engine lately: sums that fade.
#[derive(Debug, Default)]
struct Flow {
    requests: f64,
    uncomputed: f64,
    at_s: f64,
}

impl Flow {
    fn add(&mut self, now_s: f64, uncomputed: u64) {
        let kept = (-(now_s - self.at_s) / FLOW_S).exp();
        self.requests = self.requests * kept + 1.0;
        self.uncomputed = self.uncomputed * kept + uncomputed as f64;
        self.at_s = now_s;
    }

    fn rates(&self, now_s: f64) -> (f64, f64) {
        let kept = (-(now_s - self.at_s) / FLOW_S).exp() / FLOW_S;
        (self.requests * kept, self.uncomputed * kept)
    }
}

impl Books {
    /// Books a request. Returns its number.
    pub fn book(&mut self, now_s: f64, promise: Promise) -> u64 {
        self.count += 1;
        if self.unanswered.is_empty() {
            self.oldest_since_s = now_s;
        }
        let ahead = self.uncomputed(now_s) + promise.uncomputed();
        self.tokens += u64::from(promise.tokens);
        self.uncomputed += promise.uncomputed();
        self.flow.add(now_s, promise.uncomputed());
        self.unanswered.push_back((self.count, promise));
        self.open.insert(self.count, Open { promise, booked_s: now_s, ahead, first_s: None });
        self.count
    }

    /// A request's first token has come: its prompt is computed. Said once or often.
    pub fn answered(&mut self, now_s: f64, number: u64) {
        let Some(open) = self.open.get_mut(&number).filter(|open| open.first_s.is_none()) else { return };
        open.first_s = Some(now_s);
        let promise = open.promise;
        if promise.streams {
            self.speed.answered(now_s, open.ahead, now_s - open.booked_s);
        }
        self.settle(now_s, number, promise);
    }

    /// A request has ended, somehow.
    pub fn end(&mut self, now_s: f64, number: u64) {
        let Some(open) = self.open.remove(&number) else { return };
        self.tokens -= u64::from(open.promise.tokens);
        match open.first_s {
            Some(first_s) => self.speed.ended(now_s - first_s),
            None => self.settle(now_s, number, open.promise),
        }
    }

    fn settle(&mut self, now_s: f64, number: u64, promise: Promise) {
        self.uncomputed -= promise.uncomputed();
        if self.unanswered.front().is_some_and(|(it, _)| *it == number) {
            self.oldest_since_s = now_s;
        }
        self.unanswered.retain(|(it, _)| *it != number);
    }

    /// Prompt tokens that the engine has yet to compute.
    pub fn uncomputed(&self, now_s: f64) -> u64 {
        let mut time = (now_s - self.oldest_since_s).max(0.0) * self.speed.rates(now_s).prefill;
        let mut done = 0;
        for (_, promise) in &self.unanswered {
            let wanted = promise.uncomputed();
            done += wanted.min(time as u64);
            time -= wanted as f64;
            // What streams is not computed before it says so, nor is anything behind it.
            if promise.streams || time <= 0.0 {
                break;
            }
        }
        self.uncomputed - done
    }

    /// What was given to the engine and is not done.
    pub fn backlog(&self, now_s: f64) -> Backlog {
        let seconds = self.uncomputed(now_s) as f64 / self.speed.rates(now_s).prefill;
        Backlog { requests: self.open.len(), unanswered: self.unanswered.len(), seconds }
    }

    /// Requests that have not ended.
    pub fn requests(&self) -> usize {
        self.open.len()
    }

    /// Tokens of their prompts.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// What an engine said of itself, with what is known here.
    pub fn look(&self, now_s: f64, told: Look) -> Look {
        let (our_rate, our_work) = self.flow.rates(now_s);
        Look {
            our_requests: self.open.len() as u32,
            our_unanswered: self.unanswered.len() as u32,
            our_tokens: self.tokens,
            our_uncomputed: self.uncomputed(now_s),
            our_rate,
            our_work,
            rates: self.speed.rates(now_s),
            ..told
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::booking::Booking;
    use crate::engine::Engine;
    use std::sync::Arc;

    const PREFILL: f64 = 8000.0;

    fn promise(tokens: u32, held: u32) -> Promise {
        Promise { tokens, held, streams: true }
    }

    fn sums(books: &Books, now_s: f64) -> (u32, u32, u64, u64) {
        let look = books.look(now_s, Look::default());
        (look.our_requests, look.our_unanswered, look.our_tokens, look.our_uncomputed)
    }

    #[test]
    fn everything_is_given_back() {
        let engine = Arc::new(Engine::new(kvcellar_discovery::parse("http://127.0.0.1:1").expect("an engine")));
        let read = || {
            let books = engine.books();
            (books.requests(), books.unanswered.len(), books.tokens())
        };
        let first = Booking::new(Arc::clone(&engine), promise(100, 60));
        let second = Booking::new(Arc::clone(&engine), promise(10, 20));
        assert_eq!(read(), (2, 2, 110));
        first.answered();
        first.answered();
        assert_eq!(read(), (2, 1, 110));
        drop((first, second));
        assert_eq!((read(), engine.books().uncomputed), ((0, 0, 0), 0));
    }

    #[test]
    fn what_is_being_computed_shrinks() {
        let mut books = Books::default();
        let first = books.book(0.0, promise(9000, 1000));
        books.book(0.0, promise(4000, 0));
        assert_eq!(sums(&books, 0.0), (2, 2, 13_000, 12_000));
        assert_eq!(sums(&books, 0.5).3, 12_000 - (0.5 * PREFILL) as u64);
        assert_eq!(sums(&books, 9.0).3, 4000, "the next one is not begun before the first is answered");
        books.answered(9.0, first);
        assert_eq!(sums(&books, 9.0), (2, 1, 13_000, 4000));
        let rate = books.speed.rates(9.0).prefill;
        assert_eq!(sums(&books, 9.25).3, 4000 - (0.25 * rate) as u64);
    }

    #[test]
    fn an_answer_as_a_whole_hides_nothing_behind_it() {
        let mut books = Books::default();
        let whole = books.book(0.0, Promise { streams: false, ..promise(8000, 0) });
        books.book(0.0, promise(8000, 0));
        assert_eq!(sums(&books, 1.5).3, 4000, "it is taken to be computed after a second");
        books.answered(20.0, whole);
        assert!((books.speed.rates(20.0).prefill - PREFILL).abs() < 1e-9, "its time says nothing of the speed");
    }

    #[test]
    fn flow_is_of_late() {
        let mut books = Books::default();
        (0..1000).for_each(|number| {
            books.book(f64::from(number) * 0.1, promise(1000, 500));
        });
        let look = books.look(100.0, Look::default());
        assert!((look.our_rate - 10.0).abs() < 0.5 && (look.our_work - 5000.0).abs() < 250.0, "{look:?}");
        let look = books.look(100.0 + FLOW_S, Look::default());
        assert!(look.our_rate < 4.0, "{look:?}");
    }
}
