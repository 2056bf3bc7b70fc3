//! Following one publisher's numbered batches through losses, repeats, reconnections and restarts,
//! without any I/O.
//!
//! The caller tells what arrived and does what it is told: apply a batch, forget the publisher's
//! blocks, ask for a replay. Promises: batches are applied in order and once; nothing is applied
//! across a hole or across a restart unless everything before was forgotten; what waits during a
//! replay is bounded.
//!
//! States: *live* (batches are applied as they come) and *replaying* (they wait until the replay
//! has ended). A replay begins one batch before the first that is missing: if that one is no longer
//! what it was, the publisher has restarted.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::limits;

/// Why a publisher's blocks are to be forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It has restarted.
    Restart,
    /// Batches are lost, and no replay has them.
    Gap,
    /// The line was down, and no replay tells whether the publisher has restarted meanwhile: its
    /// next number proves nothing.
    Doubt,
}

/// What the caller has to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FollowStep<P> {
    /// Apply this batch, which has this number.
    Apply(u64, P),
    /// Forget every block of this publisher.
    Forget(Why),
    /// Ask for all batches from this number on, instead of any replay that is under way.
    Replay(u64),
}

/// What has become of batches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct BatchCounts {
    /// Applied.
    pub applied: u64,
    /// Left out: they had been applied before.
    pub repeated: u64,
    /// Holes that a replay closed or tried to close.
    pub holes: u64,
    /// Replays asked for.
    pub replays: u64,
    /// Restarts seen.
    pub restarts: u64,
    /// Times that everything was forgotten because of a hole, or because nothing told whether there
    /// was one.
    pub gaps: u64,
}

/// A batch that was applied, so that its publisher can be asked for what came after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Its number.
    pub number: u64,
    /// The fingerprint of its payload.
    pub print: u64,
}

impl Position {
    /// Of this batch.
    pub fn of(number: u64, payload: &[u8]) -> Self {
        Self { number, print: xxh3_64(payload) }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Live,
    Replaying {
        /// The reply must begin with this batch: its number and fingerprint.
        proof: Option<(u64, u64)>,
        /// Something new has come by this replay.
        progress: bool,
    },
}

/// The state of one publisher's stream. `P` is a payload.
#[derive(Debug)]
pub struct Follower<P> {
    replays: bool,
    /// A connection was made before.
    met: bool,
    /// A connection was made, and no replay has shown yet that its publisher is still the same.
    unproven: bool,
    phase: Phase,
    /// Number of the next batch, once any is known.
    next: Option<u64>,
    /// Numbers and fingerprints of the last batches applied, the newest last.
    recent: VecDeque<(u64, u64)>,
    held: VecDeque<(u64, P)>,
    held_bytes: usize,
    fruitless: u32,
    counts: BatchCounts,
}

impl<P: AsRef<[u8]>> Follower<P> {
    /// Nothing is known yet. `replays`: the publisher has a replay endpoint.
    pub fn new(replays: bool) -> Self {
        Self {
            replays,
            met: false,
            unproven: false,
            phase: Phase::Live,
            next: None,
            recent: VecDeque::new(),
            held: VecDeque::new(),
            held_bytes: 0,
            fruitless: 0,
            counts: BatchCounts::default(),
        }
    }

    /// Goes on after a batch that somebody else has applied.
    pub fn resume(replays: bool, last: Position) -> Self {
        let recent = VecDeque::from([(last.number, last.print)]);
        // Somebody else's connection was the one before.
        Self { next: Some(last.number + 1), recent, met: true, ..Self::new(replays) }
    }

    /// Number of the next batch; `None` before the first.
    pub fn next(&self) -> Option<u64> {
        self.next
    }

    /// Nothing is missing and nothing waits.
    pub fn is_live(&self) -> bool {
        self.phase == Phase::Live
    }

    /// What has become of batches.
    pub fn counts(&self) -> BatchCounts {
        self.counts
    }

    /// A connection was made, the first one or another.
    pub fn connected(&mut self, steps: &mut Vec<FollowStep<P>>) {
        self.unproven = std::mem::replace(&mut self.met, true) && self.next.is_some();
        if self.replays {
            self.fruitless = 0;
            self.ask(steps);
        } else {
            self.doubt(steps);
        }
    }

    /// No replay will tell any more whether this is still the publisher that it was.
    fn doubt(&mut self, steps: &mut Vec<FollowStep<P>>) {
        if std::mem::take(&mut self.unproven) {
            self.forget(Why::Doubt, steps);
        }
    }

    /// A batch was published.
    pub fn message(&mut self, number: u64, payload: P, steps: &mut Vec<FollowStep<P>>) {
        if self.phase != Phase::Live {
            self.hold(number, payload);
            return;
        }
        let print = xxh3_64(payload.as_ref());
        let is_hole = self.next.is_some_and(|next| number != next) && !self.is_repeat(number, print);
        self.counts.holes += u64::from(is_hole);
        if is_hole && self.replays {
            self.hold(number, payload);
            self.fruitless = 0;
            return self.ask(steps);
        }
        self.accept(number, print, payload, steps);
    }

    fn is_repeat(&self, number: u64, print: u64) -> bool {
        self.next.is_some_and(|next| number < next) && self.recent.contains(&(number, print))
    }

    /// Takes a batch as it comes, where no replay can help.
    fn accept(&mut self, number: u64, print: u64, payload: P, steps: &mut Vec<FollowStep<P>>) {
        if self.is_repeat(number, print) {
            self.counts.repeated += 1;
            return;
        }
        match self.next {
            Some(next) if number < next => self.forget(Why::Restart, steps),
            Some(next) if number > next => self.forget(Why::Gap, steps),
            _ => {}
        }
        self.apply(number, print, payload, steps);
    }

    /// A batch came by replay.
    pub fn replayed(&mut self, number: u64, payload: P, steps: &mut Vec<FollowStep<P>>) {
        let Phase::Replaying { proof, progress } = self.phase else { return };
        let print = xxh3_64(payload.as_ref());
        if let Some(proof) = proof {
            self.phase = Phase::Replaying { proof: None, progress };
            self.unproven = false;
            if (number, print) == proof {
                return;
            }
            if number <= proof.0 {
                // Another batch under a known number. What is held may be of either life: the
                // replay from the start has it all.
                self.forget(Why::Restart, steps);
                self.drop_held();
                return self.ask(steps);
            }
            // The buffer does not reach back far enough, whoever fills it.
            self.forget(Why::Gap, steps);
        }
        match self.next {
            Some(next) if number < next => self.counts.repeated += 1,
            Some(next) if number > next => {
                // A replay that is sent faster than it is received has holes of its own.
                if progress {
                    return self.ask(steps);
                }
                self.forget(Why::Gap, steps);
                self.apply_replayed(number, print, payload, steps);
            }
            _ => self.apply_replayed(number, print, payload, steps),
        }
    }

    /// The replay has ended.
    pub fn replay_ended(&mut self, steps: &mut Vec<FollowStep<P>>) {
        let Phase::Replaying { proof, .. } = self.phase else { return };
        if proof.is_some() {
            // It no longer has a batch that it had. What it has now is all to be asked for.
            self.forget(Why::Restart, steps);
            return self.ask(steps);
        }
        self.phase = Phase::Live;
        self.unproven = false;
        self.next.get_or_insert(0);
        self.release(steps);
    }

    /// No replay came, or it stopped in the middle.
    pub fn replay_failed(&mut self, steps: &mut Vec<FollowStep<P>>) {
        let Phase::Replaying { progress, .. } = self.phase else { return };
        self.fruitless = if progress { 0 } else { self.fruitless + 1 };
        if self.fruitless < limits::REPLAY_TRIES {
            return self.ask(steps);
        }
        self.phase = Phase::Live;
        self.doubt(steps);
        // Without an answer a hole stays a hole; without a hole there is nothing to complain about.
        while let Some((number, payload)) = self.take_held() {
            self.accept(number, xxh3_64(payload.as_ref()), payload, steps);
        }
    }

    /// What was held, after a replay.
    fn release(&mut self, steps: &mut Vec<FollowStep<P>>) {
        while let Some((number, payload)) = self.take_held() {
            match self.next {
                Some(next) if number < next => self.counts.repeated += 1,
                Some(next) if number > next => {
                    self.fruitless += 1;
                    if self.fruitless < limits::REPLAY_TRIES {
                        self.held_bytes += payload.as_ref().len();
                        self.held.push_front((number, payload));
                        return self.ask(steps);
                    }
                    self.forget(Why::Gap, steps);
                    self.apply(number, xxh3_64(payload.as_ref()), payload, steps);
                }
                _ => self.apply(number, xxh3_64(payload.as_ref()), payload, steps),
            }
        }
    }

    fn ask(&mut self, steps: &mut Vec<FollowStep<P>>) {
        let proof = self.recent.back().copied().filter(|(number, _)| Some(number + 1) == self.next);
        let from = match (proof, self.next) {
            (Some((number, _)), _) => number,
            (None, Some(next)) => next,
            (None, None) => 0,
        };
        self.phase = Phase::Replaying { proof, progress: false };
        self.counts.replays += 1;
        steps.push(FollowStep::Replay(from));
    }

    fn apply(&mut self, number: u64, print: u64, payload: P, steps: &mut Vec<FollowStep<P>>) {
        self.next = Some(number + 1);
        if self.recent.len() == limits::RECENT_BATCHES {
            self.recent.pop_front();
        }
        self.recent.push_back((number, print));
        self.counts.applied += 1;
        steps.push(FollowStep::Apply(number, payload));
    }

    fn apply_replayed(&mut self, number: u64, print: u64, payload: P, steps: &mut Vec<FollowStep<P>>) {
        self.phase = Phase::Replaying { proof: None, progress: true };
        self.fruitless = 0;
        self.apply(number, print, payload, steps);
    }

    fn forget(&mut self, why: Why, steps: &mut Vec<FollowStep<P>>) {
        match why {
            Why::Restart => self.counts.restarts += 1,
            Why::Gap | Why::Doubt => self.counts.gaps += 1,
        }
        self.unproven = false;
        self.next = None;
        self.recent.clear();
        steps.push(FollowStep::Forget(why));
    }

    fn hold(&mut self, number: u64, payload: P) {
        self.held_bytes += payload.as_ref().len();
        self.held.push_back((number, payload));
        // The oldest go first: a replay has them, or else it is a hole that will be seen.
        while self.held_bytes > limits::HELD_BYTES_MAX || self.held.len() > limits::HELD_BATCHES_MAX {
            drop(self.take_held());
        }
    }

    fn take_held(&mut self) -> Option<(u64, P)> {
        let taken = self.held.pop_front()?;
        self.held_bytes -= taken.1.as_ref().len();
        Some(taken)
    }

    fn drop_held(&mut self) {
        self.held.clear();
        self.held_bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Payload = Vec<u8>;

    fn batch(life: u8, number: u64) -> Payload {
        vec![life, number as u8]
    }

    /// A follower whose replays are answered by a publisher that kept the last `kept` of
    /// `published` batches of its present life.
    struct Scene {
        follower: Follower<Payload>,
        life: u8,
        published: u64,
        kept: u64,
        /// Batches applied since everything was forgotten the last time.
        known: Vec<Payload>,
        whys: Vec<Why>,
    }

    impl Scene {
        fn new(kept: u64) -> Self {
            let mut scene = Self {
                follower: Follower::new(kept > 0),
                life: 1,
                published: 0,
                kept,
                known: Vec::new(),
                whys: Vec::new(),
            };
            scene.tell(super::Follower::connected);
            scene
        }

        fn tell(&mut self, what: impl FnOnce(&mut Follower<Payload>, &mut Vec<FollowStep<Payload>>)) {
            let mut steps = Vec::new();
            what(&mut self.follower, &mut steps);
            let mut steps = VecDeque::from(steps);
            while let Some(step) = steps.pop_front() {
                match step {
                    FollowStep::Apply(_, payload) => self.known.push(payload),
                    FollowStep::Forget(why) => {
                        self.known.clear();
                        self.whys.push(why);
                    }
                    FollowStep::Replay(from) => {
                        assert!(steps.is_empty(), "a replay is the last step");
                        let mut more = Vec::new();
                        let asks = |more: &[FollowStep<Payload>]| matches!(more.last(), Some(FollowStep::Replay(_)));
                        for number in from.max(self.published.saturating_sub(self.kept))..self.published {
                            if !asks(&more) {
                                self.follower.replayed(number, batch(self.life, number), &mut more);
                            }
                        }
                        if !asks(&more) {
                            self.follower.replay_ended(&mut more);
                        }
                        steps.extend(more);
                    }
                }
            }
        }

        fn publish(&mut self, arrives: bool) {
            let (life, number) = (self.life, self.published);
            self.published += 1;
            if arrives {
                self.tell(|follower, steps| follower.message(number, batch(life, number), steps));
            }
        }

        fn restart(&mut self) {
            self.life += 1;
            self.published = 0;
        }
    }

    #[test]
    fn a_late_subscriber_hears_everything_and_a_hole_is_closed() {
        let mut scene = Scene::new(100);
        (0..5).for_each(|_| scene.publish(false));
        scene.publish(true);
        assert_eq!(scene.known.len(), 6);
        (0..3).for_each(|_| scene.publish(false));
        scene.publish(true);
        assert_eq!(scene.known, (0..10).map(|number| batch(1, number)).collect::<Vec<_>>());
        assert_eq!((scene.whys.len(), scene.follower.is_live()), (0, true));
    }

    #[test]
    fn a_hole_that_no_replay_has_clears_the_engine() {
        let mut scene = Scene::new(2);
        scene.publish(true);
        (0..5).for_each(|_| scene.publish(false));
        scene.publish(true);
        assert_eq!((scene.whys.as_slice(), scene.known.len()), (&[Why::Gap][..], 2));
        let mut blind = Scene::new(0);
        blind.publish(true);
        blind.publish(false);
        blind.publish(true);
        assert_eq!((blind.whys.as_slice(), blind.known.as_slice()), (&[Why::Gap][..], &[batch(1, 2)][..]));
    }

    #[test]
    fn a_restart_is_seen_whatever_its_numbers() {
        for unheard in [0, 1, 4, 5, 6, 9] {
            let mut scene = Scene::new(100);
            (0..5).for_each(|_| scene.publish(true));
            scene.restart();
            (0..unheard).for_each(|_| scene.publish(false));
            scene.tell(super::Follower::connected);
            assert_eq!(scene.known.len() as u64, unheard, "what was published before the line was up again");
            scene.publish(true);
            assert_eq!(scene.whys, [Why::Restart], "{unheard} unheard");
            assert_eq!(scene.known, (0..=unheard).map(|number| batch(2, number)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn repeats_change_nothing() {
        for kept in [0, 100] {
            let mut scene = Scene::new(kept);
            (0..5).for_each(|_| scene.publish(true));
            for number in [4, 2, 0] {
                scene.tell(|follower, steps| follower.message(number, batch(1, number), steps));
            }
            if kept > 0 {
                scene.tell(super::Follower::connected);
            }
            scene.publish(true);
            assert_eq!((scene.known.len(), scene.whys.len()), (6, 0));
        }
    }

    #[test]
    fn without_a_replay_another_connection_may_be_to_another_publisher() {
        // It has published as many batches unheard as the one before: its numbers go on.
        let mut blind = Scene::new(0);
        (0..5).for_each(|_| blind.publish(true));
        blind.restart();
        (0..5).for_each(|_| blind.publish(false));
        blind.tell(super::Follower::connected);
        blind.publish(true);
        assert_eq!((blind.whys.as_slice(), blind.known.as_slice()), (&[Why::Doubt][..], &[batch(2, 5)][..]));
        // A replay that is there, but does not answer, proves as little.
        let mut follower = Follower::resume(true, Position::of(4, &batch(1, 4)));
        let mut steps = Vec::new();
        for _ in 0..2 {
            steps.clear();
            follower.connected(&mut steps);
            for _ in 0..limits::REPLAY_TRIES {
                follower.replay_failed(&mut steps);
            }
            follower.message(follower.next().unwrap_or(6), batch(2, 6), &mut steps);
        }
        assert_eq!(steps.iter().filter(|step| **step == FollowStep::Forget(Why::Doubt)).count(), 1);
    }

    #[test]
    fn what_waits_is_bounded_and_nobody_answers_forever() {
        let mut follower = Follower::new(true);
        let mut steps = Vec::new();
        follower.connected(&mut steps);
        for number in 0..limits::HELD_BATCHES_MAX as u64 + 10 {
            follower.message(number, batch(1, number), &mut steps);
        }
        assert_eq!(follower.held.len(), limits::HELD_BATCHES_MAX);
        steps.clear();
        for _ in 0..limits::REPLAY_TRIES {
            assert!(!follower.is_live());
            follower.replay_failed(&mut steps);
        }
        assert!(follower.is_live() && follower.held.is_empty() && follower.held_bytes == 0);
        assert_eq!(steps.iter().filter(|step| matches!(step, FollowStep::Apply(..))).count(), limits::HELD_BATCHES_MAX);
    }
}
