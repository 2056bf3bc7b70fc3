//! The last news of one router, numbered, until every peer has probably had them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::news::{Aged, News};
use crate::limits;

/// A router's journal. Times are in seconds since it was opened.
#[derive(Debug)]
pub struct Journal {
    instance: u64,
    opened: Instant,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// The number of the first of them.
    first: u64,
    news: VecDeque<(f64, Arc<News>)>,
    bytes: usize,
}

impl Journal {
    /// Empty. `instance`: who writes it, another number after each start.
    pub fn new(instance: u64) -> Self {
        Self { instance, opened: Instant::now(), kept: Mutex::default() }
    }

    /// Who writes it.
    pub fn instance(&self) -> u64 {
        self.instance
    }

    /// The time now.
    pub fn now_s(&self) -> f64 {
        self.opened.elapsed().as_secs_f64()
    }

    /// Something has happened now.
    pub fn push(&self, news: News) {
        self.push_at(self.now_s(), news);
    }

    /// Something has happened. Where there is no room the oldest go.
    pub fn push_at(&self, now_s: f64, news: News) {
        let kept = &mut *self.kept();
        kept.bytes += news.bytes();
        kept.news.push_back((now_s, Arc::new(news)));
        while kept.news.len() > limits::JOURNAL_ENTRIES_MAX || kept.bytes > limits::JOURNAL_BYTES_MAX {
            let Some((_, oldest)) = kept.news.pop_front() else { return };
            kept.bytes -= oldest.bytes();
            kept.first += 1;
        }
    }

    /// The number of what will happen next.
    pub fn next(&self) -> u64 {
        let kept = self.kept();
        kept.first + kept.news.len() as u64
    }

    /// What happened from this number on. `None`: that is no longer known, or not yet.
    pub fn since(&self, number: u64, now_s: f64) -> Option<Vec<Aged>> {
        let kept = self.kept();
        let skipped = usize::try_from(number.checked_sub(kept.first)?).ok()?;
        if skipped > kept.news.len() {
            return None;
        }
        Some(kept.news.iter().skip(skipped).map(|(at_s, news)| Aged::of(now_s - at_s, Arc::clone(news))).collect())
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn news(number: u64) -> News {
        News::Ended { engine: "a".into(), number }
    }

    #[test]
    fn news_are_numbered_and_aged() {
        let journal = Journal::new(7);
        (0..3).for_each(|number| journal.push_at(number as f64, news(number)));
        assert_eq!(journal.next(), 3);
        let told = journal.since(1, 2.5).expect("known");
        assert_eq!(told, [Aged::new(1.5, news(1)), Aged::new(0.5, news(2))]);
        assert_eq!(journal.since(3, 3.0), Some(Vec::new()));
        assert_eq!(journal.since(4, 3.0), None, "another one's number");
    }

    #[test]
    fn a_journal_is_bounded_and_says_what_it_lacks() {
        let journal = Journal::new(7);
        (0..=limits::JOURNAL_ENTRIES_MAX as u64).for_each(|number| journal.push_at(0.0, news(number)));
        assert_eq!(journal.since(0, 0.0), None);
        assert_eq!(journal.since(1, 0.0).map(|told| told.len()), Some(limits::JOURNAL_ENTRIES_MAX));
        let hashes = vec![0; (limits::JOURNAL_BYTES_MAX - size_of::<News>()) / 8];
        journal.push_at(0.0, News::Given { engine: "a".into(), hashes });
        let next = journal.next();
        assert!(journal.since(next - 2, 0.0).is_none() && journal.since(next - 1, 0.0).is_some(), "one large one");
    }
}
