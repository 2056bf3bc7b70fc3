//! What news do to the one who hears them.

use std::sync::Arc;

use super::news::News;
use crate::books::{BookingId, Books, Promise};
use crate::decider::Decider;

/// What a router knows, as far as news change it. Of engines that it does not know it hears
/// nothing.
pub trait Listener {
    /// An engine's books, and the time in them.
    fn books(&mut self, engine: &str, change: impl FnOnce(&mut Books, f64));
    /// An engine got a prompt.
    fn given(&mut self, engine: &str, hashes: &[u64]);
    /// A session's requests go to an engine.
    fn session(&mut self, session: u64, engine: &Arc<str>);
    /// What decides.
    fn decider(&mut self, change: impl FnOnce(&mut Decider));
}

/// A peer tells what happened so many seconds ago.
pub fn hear(listener: &mut impl Listener, peer: u64, ago_s: f64, news: &News) {
    match news {
        News::Booked { engine, number, tokens, held, streams } => {
            let promise = Promise { tokens: *tokens, held: *held, streams: *streams };
            let id = BookingId { peer, number: *number };
            listener.books(engine, |books, now_s| books.book_of_peer(now_s - ago_s, id, promise));
        }
        News::Answered { engine, number } => {
            let id = BookingId { peer, number: *number };
            listener.books(engine, |books, now_s| {
                books.answered_at(now_s - ago_s, id);
            });
        }
        News::Ended { engine, number } => {
            let id = BookingId { peer, number: *number };
            listener.books(engine, |books, now_s| {
                books.end_at(now_s - ago_s, id);
            });
        }
        News::Session { session, engine } => listener.session(*session, engine),
        News::Credit { prefix, change_s } => listener.decider(|decider| decider.credit_changed(*prefix, *change_s)),
        News::CreditIs { prefix, credit_s } => listener.decider(|decider| decider.credit_is(*prefix, *credit_s)),
        News::Given { engine, hashes } => listener.given(engine, hashes),
    }
}
