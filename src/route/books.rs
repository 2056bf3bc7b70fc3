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
use crate::limits;

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

/// A request in the books.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BookingId {
    /// The router that gave it to the engine; 0: this one.
    pub peer: u64,
    /// Its number there.
    pub number: u64,
}

impl BookingId {
    /// One of this router's.
    fn ours(number: u64) -> Self {
        Self { peer: 0, number }
    }

    fn is_ours(self) -> bool {
        self.peer == 0
    }
}

/// A request of this router that has not ended, as its peers are told of it.
#[derive(Debug, Clone, Copy)]
pub struct OpenPromise {
    /// Its number.
    pub number: u64,
    /// How it was promised.
    pub promise: Promise,
    /// When.
    pub booked_s: f64,
    /// It has a first token.
    pub is_answered: bool,
}

#[derive(Debug)]
struct Open {
    promise: Promise,
    booked_s: f64,
    /// Tokens that the engine was to compute up to its first one.
    ahead: u64,
    first_s: Option<f64>,
}

/// One engine's open promises: this router's, and what its peers said of theirs.
#[derive(Debug, Default)]
pub struct Books {
    open: HashMap<BookingId, Open>,
    count: u64,
    tokens: u64,
    /// Of the peers' requests: how many have not ended, and their prompts' tokens.
    theirs: (usize, u64),
    /// Tokens of those without a first token that were not held.
    uncomputed: u64,
    /// Those without a first token, oldest first.
    unanswered: VecDeque<(BookingId, Promise, f64)>,
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
        self.put(now_s, BookingId::ours(self.count), promise);
        self.count
    }

    /// A peer has booked a request. Said once or often; those beyond the bound are not counted.
    pub fn book_of_peer(&mut self, at_s: f64, id: BookingId, promise: Promise) {
        if self.theirs.0 < limits::PEER_BOOKINGS_MAX && !self.open.contains_key(&id) {
            self.theirs = (self.theirs.0 + 1, self.theirs.1 + u64::from(promise.tokens));
            self.put(at_s, id, promise);
        }
    }

    fn put(&mut self, at_s: f64, id: BookingId, promise: Promise) {
        if self.unanswered.is_empty() {
            self.oldest_since_s = at_s;
        }
        let ahead = self.uncomputed(at_s) + promise.uncomputed();
        self.tokens += u64::from(promise.tokens);
        self.uncomputed += promise.uncomputed();
        self.flow.add(at_s, promise.uncomputed());
        // A peer's comes late, and may have been booked before the last ones.
        let place = self.unanswered.iter().rposition(|(_, _, booked_s)| *booked_s <= at_s).map_or(0, |at| at + 1);
        self.unanswered.insert(place, (id, promise, at_s));
        self.open.insert(id, Open { promise, booked_s: at_s, ahead, first_s: None });
    }

    /// A request's first token has come: its prompt is computed. Said once or often; returns
    /// whether this was the first time.
    pub fn answered(&mut self, now_s: f64, number: u64) -> bool {
        self.answered_at(now_s, BookingId::ours(number))
    }

    /// The same of any router's request.
    pub fn answered_at(&mut self, at_s: f64, id: BookingId) -> bool {
        let Some(open) = self.open.get_mut(&id).filter(|open| open.first_s.is_none()) else { return false };
        open.first_s = Some(at_s);
        let promise = open.promise;
        // What was ahead of a peer's request is not known here well enough.
        if promise.streams && id.is_ours() {
            self.speed.answered(at_s, open.ahead, at_s - open.booked_s);
        }
        self.settle(at_s, id, promise);
        true
    }

    /// A request has ended, somehow. Said once or often; returns whether this was the first time.
    pub fn end(&mut self, now_s: f64, number: u64) -> bool {
        self.end_at(now_s, BookingId::ours(number))
    }

    /// The same of any router's request.
    pub fn end_at(&mut self, at_s: f64, id: BookingId) -> bool {
        let Some(open) = self.open.remove(&id) else { return false };
        self.tokens -= u64::from(open.promise.tokens);
        if !id.is_ours() {
            self.theirs = (self.theirs.0 - 1, self.theirs.1 - u64::from(open.promise.tokens));
        }
        match open.first_s {
            Some(first_s) if id.is_ours() => self.speed.ended(at_s - first_s),
            Some(_) => {}
            None => self.settle(at_s, id, open.promise),
        }
        true
    }

    /// Nothing of this peer counts any more.
    pub fn forget(&mut self, now_s: f64, peer: u64) {
        if self.theirs.0 == 0 || peer == 0 {
            return;
        }
        // All at once: a peer may have many, and requests wait for the books.
        if self.unanswered.front().is_some_and(|(it, _, _)| it.peer == peer) {
            self.oldest_since_s = self.oldest_since_s.max(now_s);
        }
        self.unanswered.retain(|(it, _, _)| it.peer != peer);
        let Self { open, tokens, theirs, uncomputed, .. } = self;
        open.retain(|id, open| {
            if id.peer != peer {
                return true;
            }
            let its = u64::from(open.promise.tokens);
            *tokens -= its;
            *theirs = (theirs.0 - 1, theirs.1 - its);
            if open.first_s.is_none() {
                *uncomputed -= open.promise.uncomputed();
            }
            false
        });
    }

    /// Requests of this router that have not ended, oldest first.
    pub fn ours(&self) -> Vec<OpenPromise> {
        let open = self.open.iter().filter(|(id, _)| id.is_ours());
        let mut ours: Vec<OpenPromise> = open
            .map(|(id, open)| OpenPromise {
                number: id.number,
                promise: open.promise,
                booked_s: open.booked_s,
                is_answered: open.first_s.is_some(),
            })
            .collect();
        ours.sort_by_key(|open| open.number);
        ours
    }

    fn settle(&mut self, now_s: f64, id: BookingId, promise: Promise) {
        self.uncomputed -= promise.uncomputed();
        if self.unanswered.front().is_some_and(|(it, _, _)| *it == id) {
            // News of a peer are of a moment that has passed.
            self.oldest_since_s = self.oldest_since_s.max(now_s);
        }
        self.unanswered.retain(|(it, _, _)| *it != id);
    }

    /// Prompt tokens that the engine has yet to compute.
    pub fn uncomputed(&self, now_s: f64) -> u64 {
        let mut time = (now_s - self.oldest_since_s).max(0.0) * self.speed.rates(now_s).prefill;
        let mut done = 0;
        for (_, promise, _) in &self.unanswered {
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

    /// Requests of this router that have not ended.
    pub fn requests(&self) -> usize {
        self.open.len() - self.theirs.0
    }

    /// Tokens of their prompts.
    pub fn tokens(&self) -> u64 {
        self.tokens - self.theirs.1
    }

    /// Requests of its peers that have not ended.
    pub fn requests_of_peers(&self) -> usize {
        self.theirs.0
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

    #[test]
    fn a_peers_requests_count_until_they_end_or_it_is_forgotten() {
        let mut books = Books::default();
        let id = |number| BookingId { peer: 9, number };
        let ours = books.book(1.0, promise(4000, 0));
        books.book_of_peer(0.9, id(1), promise(8000, 0));
        books.book_of_peer(0.9, id(1), promise(8000, 0));
        assert_eq!(sums(&books, 1.0), (2, 2, 12_000, 12_000));
        assert_eq!((books.requests(), books.tokens(), books.requests_of_peers()), (1, 4000, 1));
        assert_eq!(sums(&books, 3.5).3, 4000, "the peer's was first: ours is not begun");
        assert!(books.answered_at(2.0, id(1)) && !books.answered_at(2.0, id(1)));
        assert_eq!(sums(&books, 2.25).3, 2000);
        assert_eq!(books.ours().iter().map(|open| open.number).collect::<Vec<_>>(), [ours]);
        books.book_of_peer(2.0, id(2), promise(100, 0));
        books.book_of_peer(2.0, BookingId { peer: 8, number: 2 }, promise(10, 0));
        books.forget(2.1, 9);
        assert_eq!((books.requests(), books.requests_of_peers()), (1, 1), "another peer's stays");
        books.forget(2.1, 8);
        assert!(books.end(3.0, ours) && !books.end(3.0, ours));
        assert_eq!(sums(&books, 3.0), (0, 0, 0, 0));
    }

    #[test]
    fn requests_of_peers_are_bounded() {
        let mut books = Books::default();
        let book = |number| books.book_of_peer(0.0, BookingId { peer: 1, number }, promise(1, 0));
        (0..=limits::PEER_BOOKINGS_MAX as u64).for_each(book);
        assert_eq!(books.requests_of_peers(), limits::PEER_BOOKINGS_MAX);
    }
}
