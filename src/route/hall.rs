//! Who may go on to an engine, who waits, and who has to go: the rules of flow control
//! ([`super::gate`]), for the router and for the simulation of it.
//!
//! Pure: times are arguments, in seconds since any moment.

use std::collections::HashMap;

use super::books::Backlog;
use super::queue::{QueueBounds, QueuePlace, RequestQueue, WaitingRequest};

/// How flow control is set up.
#[derive(Debug, Clone, Copy)]
pub struct HallSettings {
    /// What may wait.
    pub bounds: QueueBounds,
    /// An engine has room while the prompts it was given take less than this, in s.
    pub backlog_s: f64,
    /// Requests of an engine at most; 0: no bound.
    pub concurrency: usize,
    /// Time after which a request gets every eighth turn, whatever its priority, in s.
    pub starved_s: f64,
}

/// Of so many turns one is for those who have waited too long.
const STARVED_EVERY: u32 = 8;

/// How long something is left free for a priority of which nothing more comes, in s.
const RESERVED_S: f64 = 30.0;

/// Of so many places of an engine one is left to the highest priority.
const RESERVED_SHARE: usize = 8;

/// Lanes of which it is remembered, before old ones are forgotten, what was seen in them.
const LANES_SEEN: usize = 1024;

/// What becomes of one that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sentence {
    /// It may go on.
    Go,
    /// No engine had room for it in time.
    Late,
    /// Its place was wanted.
    Displaced,
}

/// What becomes of one that comes.
#[derive(Debug, PartialEq, Eq)]
pub enum Entered {
    /// It may go on at once.
    Through,
    /// It waits there; these had to go for it.
    Waits(QueuePlace, Vec<QueuePlace>),
    /// There is no room for one of its priority.
    Full,
}

/// What engines have room for, at this moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineRoom {
    /// Engines that serve the lane.
    pub engines: usize,
    /// Those that may take a request of the highest priority.
    any: usize,
    /// Those that may take one of a lower priority.
    lower: usize,
    /// Of these, how many have nothing left to compute.
    idle: usize,
}

impl EngineRoom {
    /// One engine more. `waiting`: requests that it says wait in it.
    pub fn add(&mut self, settings: &HallSettings, backlog: &Backlog, waiting: f64) {
        self.engines += 1;
        let most = settings.concurrency;
        let free = if most == 0 { usize::MAX } else { most.saturating_sub(backlog.requests) };
        let waits = waiting > backlog.unanswered as f64;
        let is_ahead = backlog.seconds < settings.backlog_s && !waits;
        let takes_lower = is_ahead && free > if most > 1 { most.div_ceil(RESERVED_SHARE) } else { 0 };
        self.any += usize::from(is_ahead && free > 0);
        self.lower += usize::from(takes_lower);
        self.idle += usize::from(takes_lower && backlog.seconds <= 0.0);
    }

    /// Without an engine whoever decides refuses by name: nobody is to wait for that.
    #[must_use]
    pub fn or_refusal(self) -> Self {
        if self.engines == 0 { Self { engines: 1, any: usize::MAX, lower: usize::MAX, idle: 0 } } else { self }
    }

    /// What there is room for at both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            engines: self.engines.min(other.engines),
            any: self.any.min(other.any),
            lower: self.lower.min(other.lower),
            idle: self.idle.min(other.idle),
        }
    }

    /// Whether there is room for one more beside those that are on their way. Of several engines
    /// lower priorities leave one that has nothing to compute, wherever they are sent.
    fn admits(self, is_highest: bool, passing: usize) -> bool {
        match (is_highest, self.engines) {
            (true, _) => self.any > passing,
            (false, 1) => self.lower > passing,
            (false, _) => self.idle > passing + 1,
        }
    }
}

/// Where requests wait.
#[derive(Debug)]
pub struct Hall {
    settings: HallSettings,
    /// Those that wait.
    pub queue: RequestQueue,
    /// Requests that were let through and are not booked at an engine yet, by lane.
    passing: HashMap<String, usize>,
    /// Requests let through since one that starved was, by lane.
    turns: HashMap<String, u32>,
    /// The highest priority of each lane, and when it was last seen.
    highest: HashMap<String, (i32, f64)>,
}

impl Hall {
    /// Empty.
    pub fn new(settings: HallSettings) -> Self {
        Self {
            settings,
            queue: RequestQueue::new(settings.bounds),
            passing: HashMap::new(),
            turns: HashMap::new(),
            highest: HashMap::new(),
        }
    }

    /// How it is set up.
    pub fn settings(&self) -> &HallSettings {
        &self.settings
    }

    /// Nobody is on the way to an engine.
    #[cfg(test)]
    pub fn is_passed(&self) -> bool {
        self.passing.is_empty()
    }

    /// A request comes, now: at its `came_s`.
    pub fn enter(&mut self, new: WaitingRequest, room: impl FnOnce() -> EngineRoom) -> Entered {
        self.saw(new.came_s, &new.lane, new.priority);
        if !self.queue.lanes().contains(&new.lane) {
            let passing = self.passing.get(&new.lane).copied().unwrap_or(0);
            let is_highest = self.highest(new.came_s, &new.lane).is_none_or(|highest| new.priority >= highest);
            if room().admits(is_highest, passing) {
                self.lets_through(&new.lane);
                return Entered::Through;
            }
        }
        match self.queue.push(new) {
            Some((place, gone)) => Entered::Waits(place, gone),
            None => Entered::Full,
        }
    }

    /// One that was let through is booked at an engine, or has gone.
    pub fn passed(&mut self, lane: &str) {
        if let Some(count) = self.passing.get_mut(lane) {
            *count -= 1;
            if *count == 0 {
                self.passing.remove(lane);
            }
        }
    }

    /// Lets at most so many through for whom there is room, and tells those whose time is over.
    /// `tell` returns whether the request is still there.
    pub fn settle(
        &mut self,
        now_s: f64,
        most: usize,
        room: impl Fn(&str) -> EngineRoom,
        mut tell: impl FnMut(QueuePlace, Sentence) -> bool,
    ) {
        for place in self.queue.expire(now_s) {
            tell(place, Sentence::Late);
        }
        let mut left = most;
        for lane in self.queue.lanes() {
            while left > 0 {
                let room = room(&lane);
                let passing = self.passing.get(&lane).copied().unwrap_or(0);
                let highest = self.highest(now_s, &lane);
                let may = |priority: i32| room.admits(highest.is_none_or(|highest| priority >= highest), passing);
                // What is kept for the highest priority is not kept from those who starve.
                let turns = self.turns.get(&lane).copied().unwrap_or(0);
                let starved = (turns + 1 >= STARVED_EVERY && room.admits(true, passing))
                    .then(|| self.queue.starved(&lane, now_s - self.settings.starved_s))
                    .flatten();
                let next = starved.or_else(|| self.queue.next(&lane, may));
                let Some(place) = next else { break };
                self.queue.remove(place);
                if tell(place, Sentence::Go) {
                    left -= 1;
                    self.lets_through(&lane);
                    if starved.is_some() {
                        self.turns.remove(&lane);
                    }
                }
            }
        }
    }

    fn saw(&mut self, now_s: f64, lane: &str, priority: i32) {
        if self.highest.len() >= LANES_SEEN {
            // Where engines do not say what they serve, lanes are what clients make of them.
            self.highest.retain(|_, (_, at_s)| now_s - *at_s < RESERVED_S);
            let highest = &self.highest;
            self.turns.retain(|lane, _| highest.contains_key(lane));
        }
        if self.highest(now_s, lane).is_none_or(|highest| priority >= highest) {
            self.highest.insert(lane.to_owned(), (priority, now_s));
        }
    }

    fn lets_through(&mut self, lane: &str) {
        *self.passing.entry(lane.to_owned()).or_default() += 1;
        let turns = self.turns.entry(lane.to_owned()).or_default();
        *turns = turns.saturating_add(1);
    }

    /// The highest priority seen lately.
    fn highest(&self, now_s: f64, lane: &str) -> Option<i32> {
        self.highest.get(lane).filter(|(_, at_s)| now_s - at_s < RESERVED_S).map(|(priority, _)| *priority)
    }
}
