//! Which engine each session's last request went to. The least recently asked are forgotten.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;
use xxhash_rust::xxh3::xxh3_64;

use crate::limits;

/// Engines by the hash of a session's name.
#[derive(Debug)]
pub struct Sessions(Mutex<LruCache<u64, Arc<str>>>);

impl Default for Sessions {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(NonZeroUsize::new(limits::SESSIONS_MAX).unwrap_or(NonZeroUsize::MIN))))
    }
}

/// A session as it is known here: names can be long, and are nobody's business.
pub fn key(name: &str) -> u64 {
    xxh3_64(name.as_bytes())
}

impl Sessions {
    /// The engine of its last request.
    pub fn of(&self, session: u64) -> Option<Arc<str>> {
        self.lock().get(&session).cloned()
    }

    /// A request of it goes there.
    pub fn put(&self, session: u64, engine: Arc<str>) {
        self.lock().put(session, engine);
    }

    /// Forgets sessions of engines that `is_there` denies.
    pub fn keep(&self, is_there: impl Fn(&str) -> bool) {
        let mut sessions = self.lock();
        let left: Vec<u64> = sessions.iter().filter(|(_, engine)| !is_there(engine)).map(|(key, _)| *key).collect();
        for session in left {
            sessions.pop(&session);
        }
    }

    /// The last `count`, oldest first.
    pub fn last(&self, count: usize) -> Vec<(u64, Arc<str>)> {
        let sessions = self.lock();
        let mut last: Vec<_> = sessions.iter().take(count).map(|(key, engine)| (*key, Arc::clone(engine))).collect();
        last.reverse();
        last
    }

    fn lock(&self) -> MutexGuard<'_, LruCache<u64, Arc<str>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ones_are_kept() {
        let sessions = Sessions::default();
        (0..=limits::SESSIONS_MAX as u64).for_each(|session| sessions.put(session, "a".into()));
        assert_eq!((sessions.of(0), sessions.of(1).as_deref()), (None, Some("a")));
        let last: Vec<u64> = sessions.last(2).into_iter().map(|(session, _)| session).collect();
        assert_eq!(last, [limits::SESSIONS_MAX as u64, 1], "what was asked last is last");
        assert_ne!(key("a"), key("b"));
    }
}
