//! One router follows another one: what it asks for, and what it makes of the answers.
//!
//! Pure: the time is an argument, in seconds since any moment.

use super::journal::Journal;
use super::news::{Aged, PeerNews, VERSION};
use crate::limits;

/// What is asked of a peer: its news from a number on, if it is still the one that wrote them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Who wrote the last ones.
    pub instance: u64,
    /// The number of the first that is not known.
    pub next: u64,
}

/// Why a peer's share is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerFault {
    /// It speaks another version.
    #[error("it shares in version {0}, and this router in version {VERSION}: run the same release of both")]
    Version(u32),
    /// It stands before other engines.
    #[error("its engines serve {theirs}, and those of this router {ours}: name only routers of one fleet as peers")]
    Models {
        /// What it serves.
        theirs: String,
        /// What is served here.
        ours: String,
    },
    /// It asks for the right key.
    #[error("it refuses the key: give all routers the same --peer-key")]
    Key,
    /// Its answer is none.
    #[error("it is no router that shares: {0}")]
    Answer(String),
}

/// What an answer brings.
#[derive(Debug)]
pub struct Heard {
    /// What this one has in flight is to be forgotten first.
    pub forget: Option<u64>,
    /// Who tells.
    pub instance: u64,
    /// What happened there, or in a snapshot all there is.
    pub news: Vec<Aged>,
    /// Nothing was known of it just before.
    pub is_new: bool,
}

/// Text of a peer as logs may show it: in one line, and not long.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(limits::PEER_TEXT_MAX).flat_map(char::escape_debug).collect()
}

/// Follows one peer.
#[derive(Debug, Default)]
pub struct Follower {
    /// Whose share is counted, and what to ask for next.
    known: Option<Wanted>,
    heard_s: f64,
}

impl Follower {
    /// What to ask for; `None`: everything.
    pub fn wanted(&self) -> Option<Wanted> {
        self.known
    }

    /// Whose share is counted.
    pub fn instance(&self) -> Option<u64> {
        self.known.map(|known| known.instance)
    }

    /// It has answered. `ours`: models that are served here.
    ///
    /// # Errors
    /// [`PeerFault`]; what was counted of it is to be forgotten.
    pub fn hear(&mut self, now_s: f64, ours: &[String], told: PeerNews) -> Result<Heard, PeerFault> {
        if told.version != VERSION {
            return Err(PeerFault::Version(told.version));
        }
        if told.instance == 0 {
            return Err(PeerFault::Answer("it has no number".to_owned()));
        }
        let is_other = !ours.is_empty() && !told.models.is_empty() && !told.models.iter().any(|it| ours.contains(it));
        if is_other {
            return Err(PeerFault::Models { theirs: shown(&told.models.join(", ")), ours: ours.join(", ") });
        }
        let before = self.known.take();
        let goes_on = before.is_some_and(|known| known.instance == told.instance && !told.is_snapshot);
        if !goes_on && !told.is_snapshot {
            // Nobody asked for that.
            return Err(PeerFault::Answer("it told news of which the beginning is missing".to_owned()));
        }
        self.known = Some(Wanted { instance: told.instance, next: told.next });
        self.heard_s = now_s;
        let forget = before.filter(|_| !goes_on).map(|known| known.instance);
        Ok(Heard { forget, instance: told.instance, news: told.news, is_new: before.is_none() })
    }

    /// Nothing of it counts any more. Returns whose share is to be forgotten.
    pub fn give_up(&mut self) -> Option<u64> {
        self.known.take().map(|known| known.instance)
    }

    /// It has been silent for too long: as [`Self::give_up`].
    pub fn expire(&mut self, now_s: f64) -> Option<u64> {
        if now_s - self.heard_s < limits::PEER_SILENCE.as_secs_f64() { None } else { self.give_up() }
    }

    /// Everything is asked for the next time, though what is counted goes on to count.
    pub fn start_over(&mut self) {
        if let Some(known) = &mut self.known {
            // A number that nobody reaches: no journal has it.
            known.next = u64::MAX;
        }
    }
}

/// Answers a peer: what is new, or where that is not known, everything. `all` says it.
pub fn tell(
    journal: &Journal,
    now_s: f64,
    wanted: Option<Wanted>,
    models: Vec<String>,
    all: impl FnOnce() -> Vec<Aged>,
) -> PeerNews {
    // Before anything is looked at: what happens meanwhile is told the next time once more.
    let next = journal.next();
    let ours = wanted.filter(|wanted| wanted.instance == journal.instance());
    let new = ours.and_then(|wanted| Some((wanted.next, journal.since(wanted.next, now_s)?)));
    let (is_snapshot, next, news) = match new {
        Some((from, news)) => (false, from + news.len() as u64, news),
        None => (true, next, all()),
    };
    PeerNews { version: VERSION, instance: journal.instance(), models, is_snapshot, next, news }
}

#[cfg(test)]
mod tests {
    use super::super::news::News;
    use super::*;

    fn ended(number: u64) -> News {
        News::Ended { engine: "a".into(), number }
    }

    fn ask(follower: &mut Follower, now_s: f64, journal: &Journal) -> Result<Heard, PeerFault> {
        let all = || vec![Aged::new(0.0, ended(99))];
        let told = tell(journal, now_s, follower.wanted(), vec!["m".to_owned()], all);
        follower.hear(now_s, &["m".to_owned()], told)
    }

    fn numbers(heard: &Heard) -> Vec<u64> {
        let number = |news: &News| if let News::Ended { number, .. } = news { *number } else { 0 };
        heard.news.iter().map(|aged| number(&aged.1)).collect()
    }

    #[test]
    fn a_snapshot_first_and_then_what_is_new() {
        let (journal, mut follower) = (Journal::new(1), Follower::default());
        journal.push_at(0.0, ended(1));
        let first = ask(&mut follower, 0.0, &journal).expect("an answer");
        assert!(first.is_new && first.forget.is_none() && numbers(&first) == [99]);
        assert!(numbers(&ask(&mut follower, 0.1, &journal).expect("an answer")).is_empty());
        journal.push_at(0.2, ended(2));
        let second = ask(&mut follower, 0.2, &journal).expect("an answer");
        assert!(!second.is_new && second.forget.is_none() && numbers(&second) == [2]);
    }

    #[test]
    fn who_missed_too_much_starts_over() {
        let (journal, mut follower) = (Journal::new(1), Follower::default());
        ask(&mut follower, 0.0, &journal).expect("an answer");
        (0..=limits::JOURNAL_ENTRIES_MAX as u64).for_each(|number| journal.push_at(0.1, ended(number)));
        let heard = ask(&mut follower, 0.1, &journal).expect("an answer");
        assert_eq!((heard.forget, numbers(&heard)), (Some(1), vec![99]));
        follower.start_over();
        assert_eq!(numbers(&ask(&mut follower, 0.2, &journal).expect("an answer")), [99]);
    }

    #[test]
    fn another_start_replaces_the_one_before() {
        let mut follower = Follower::default();
        ask(&mut follower, 0.0, &Journal::new(1)).expect("an answer");
        let heard = ask(&mut follower, 0.1, &Journal::new(2)).expect("an answer");
        assert_eq!((heard.forget, heard.instance, numbers(&heard)), (Some(1), 2, vec![99]));
    }

    #[test]
    fn the_silent_are_forgotten_once() {
        let (journal, mut follower) = (Journal::new(1), Follower::default());
        ask(&mut follower, 10.0, &journal).expect("an answer");
        let silence_s = limits::PEER_SILENCE.as_secs_f64();
        assert_eq!(follower.expire(10.0 + silence_s / 2.0), None);
        assert_eq!(follower.expire(10.0 + silence_s), Some(1));
        assert_eq!(follower.expire(11.0 + silence_s), None, "said once");
        let back = ask(&mut follower, 20.0, &journal).expect("an answer");
        assert_eq!((back.is_new, numbers(&back)), (true, vec![99]), "all of it, though the journal had the rest");
    }

    #[test]
    fn what_cannot_be_counted_is_refused_by_name() {
        let told = |version, model: &str| PeerNews {
            version,
            instance: 1,
            models: vec![model.to_owned()],
            is_snapshot: true,
            next: 0,
            news: Vec::new(),
        };
        let mut follower = Follower::default();
        let mut hear = |told| follower.hear(0.0, &["m".to_owned()], told).err().map(|fault| fault.to_string());
        assert!(hear(told(2, "m")).expect("refused").contains("version 2"));
        let other = hear(told(1, "n")).expect("refused");
        assert!(other.contains("serve n,") && other.contains("this router m"), "{other}");
        let torn = PeerNews { is_snapshot: false, ..told(1, "m") };
        assert!(hear(torn).expect("refused").contains("beginning"));
        assert_eq!(hear(told(1, "m")), None);
    }
}
