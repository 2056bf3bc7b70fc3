//! A request of the simulated world, from its coming to its end.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::load::{BLOCK, Session};
use super::outcome::Served;
use super::sim_router::{Promised, Routed, SimPrompt};
use kvcellar_index::keys::{self, Extras};

/// A request that came.
#[derive(Debug)]
pub(super) struct SimRequest {
    pub(super) router: usize,
    pub(super) session: Option<Session>,
    pub(super) priority: i32,
    pub(super) began_s: f64,
    pub(super) first_s: Option<f64>,
    pub(super) done_s: Option<f64>,
    pub(super) is_lost: bool,
    pub(super) answer: u32,
    pub(super) tokens: u32,
    pub(super) cached: u32,
    /// What was expected to be cached, in blocks.
    pub(super) expected: usize,
    /// Where it is booked.
    pub(super) promised: Option<Promised>,
    /// Engines with what each has, and at which of them it is.
    pub(super) routed: Option<Routed>,
    pub(super) place: usize,
    pub(super) tries: usize,
    /// It was sent a second time after an engine broke off.
    pub(super) is_repeated: bool,
    pub(super) asked: Option<SimPrompt>,
}

impl SimRequest {
    /// It has come to a router.
    pub(super) fn new(router: usize, session: Session, priority: i32, began_s: f64) -> Self {
        Self {
            router,
            priority,
            began_s,
            first_s: None,
            done_s: None,
            is_lost: false,
            answer: session.answer,
            tokens: session.prompt.len() as u32 * BLOCK,
            cached: 0,
            expected: 0,
            promised: None,
            routed: None,
            place: 0,
            tries: 0,
            is_repeated: false,
            asked: None,
            session: Some(session),
        }
    }

    /// The engine that it is at.
    pub(super) fn engine(&self) -> Option<usize> {
        self.routed.as_ref().map(|routed| routed.order[self.place].0)
    }

    /// It has ended, or will not: what only its way needed goes.
    pub(super) fn settle(&mut self) {
        (self.routed, self.asked) = (None, None);
    }

    /// What became of it; one that was not answered waits at least until now.
    pub(super) fn served(&self, now_s: f64) -> Served {
        let between = |(first_s, done_s)| (done_s - first_s) / f64::from(self.answer.saturating_sub(1).max(1));
        Served {
            ttft_s: self.first_s.unwrap_or(now_s) - self.began_s,
            tokens: self.first_s.map(|_| (self.tokens, self.cached)),
            between_s: self.first_s.zip(self.done_s).map(between),
        }
    }
}

/// Hashes of a prompt's blocks.
pub(super) fn hashes_of<'c>(contents: impl Iterator<Item = &'c u32>) -> Vec<u64> {
    let mut parent = 1;
    let next = |content: &u32| {
        parent = xxh3_64_with_seed(&content.to_le_bytes(), parent);
        parent
    };
    contents.map(next).collect()
}

/// The index's names of them.
pub(super) fn keys_of(prompt: &[u32]) -> Vec<u64> {
    let mut found = Vec::new();
    keys::of_prompt(keys::root("", None), prompt, 1, &Extras::default(), &mut found);
    found
}
