//! What was promised to an engine and has not ended: requests and tokens. Known at once, where the engine's own numbers are a scrape old.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use super::engine::Engine;

/// One engine's open promises.
#[derive(Debug, Default)]
pub struct Books {
    /// Requests that have not ended.
    pub requests: AtomicU32,
    /// Of those, how many have no first token.
    pub unanswered: AtomicU32,
    /// Their prompts' tokens.
    pub tokens: AtomicU64,
    /// Tokens of unanswered ones that are not held.
    pub uncomputed: AtomicU64,
}

/// One promise. Given back when it is dropped, whatever has happened meanwhile.
#[derive(Debug)]
pub struct Booking {
    engine: Arc<Engine>,
    tokens: u64,
    uncomputed: u64,
    answered: AtomicBool,
}

impl Booking {
    /// Books a prompt of so many tokens, of which `held` need not be computed.
    pub fn new(engine: Arc<Engine>, tokens: u32, held: u32) -> Self {
        let uncomputed = u64::from(tokens.saturating_sub(held));
        let books = &engine.books;
        books.requests.fetch_add(1, Ordering::Relaxed);
        books.unanswered.fetch_add(1, Ordering::Relaxed);
        books.tokens.fetch_add(tokens.into(), Ordering::Relaxed);
        books.uncomputed.fetch_add(uncomputed, Ordering::Relaxed);
        Self { engine, tokens: tokens.into(), uncomputed, answered: AtomicBool::new(false) }
    }

    /// The first token has come: the prompt is computed. Said once or often.
    pub fn answered(&self) {
        if !self.answered.swap(true, Ordering::Relaxed) {
            self.engine.books.unanswered.fetch_sub(1, Ordering::Relaxed);
            self.engine.books.uncomputed.fetch_sub(self.uncomputed, Ordering::Relaxed);
        }
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        self.answered();
        self.engine.books.requests.fetch_sub(1, Ordering::Relaxed);
        self.engine.books.tokens.fetch_sub(self.tokens, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::engine::Spec;
    use super::*;

    #[test]
    fn everything_is_given_back() {
        let engine = Arc::new(Engine::new(Spec::parse("http://127.0.0.1:1").expect("an engine")));
        let read = |engine: &Engine| {
            let books = &engine.books;
            (
                books.requests.load(Ordering::Relaxed),
                books.unanswered.load(Ordering::Relaxed),
                books.tokens.load(Ordering::Relaxed),
                books.uncomputed.load(Ordering::Relaxed),
            )
        };
        let first = Booking::new(Arc::clone(&engine), 100, 60);
        let second = Booking::new(Arc::clone(&engine), 10, 20);
        assert_eq!(read(&engine), (2, 2, 110, 40));
        first.answered();
        first.answered();
        assert_eq!(read(&engine), (2, 1, 110, 0));
        drop((first, second));
        assert_eq!(read(&engine), (0, 0, 0, 0));
    }
}
