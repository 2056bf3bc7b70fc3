//! Decisions in a row: the choice itself is pure ([`super::choose`]); here is what one decision
//! leaves behind for the next. For the router and for the simulation of it, so that what is
//! simulated is what runs.

use super::choose::{Choice, Policy, choose};
use super::credit::Credits;
use super::view::{Look, View};

/// Decides for one router.
#[derive(Debug)]
pub struct Decider {
    policy: Policy,
    credits: Credits,
    /// Decisions so far.
    count: u64,
}

/// One decision.
#[derive(Debug, Clone, PartialEq)]
pub struct Decided {
    /// How many there were before it.
    pub number: u64,
    /// Where the request goes, and why.
    pub choice: Choice,
    /// No engine had anything of the prompt: the chosen one's cold turn from now on.
    pub cold_turn: Option<u64>,
    /// The prefix whose credit has changed, and by how much.
    pub credit: Option<(u64, f64)>,
}

impl Decider {
    /// One that has decided nothing yet.
    pub fn new(policy: Policy) -> Self {
        Self { policy, credits: Credits::default(), count: 0 }
    }

    /// Decides where a prompt of so many tokens goes. `prefix`: the key of the longest prefix that
    /// any engine has of it, under which its credit stands. `None` without engines.
    pub fn decide(
        &mut self,
        prompt_tokens: u32,
        prefix: Option<u64>,
        engines: &[Look],
        random: &mut fastrand::Rng,
    ) -> Option<Decided> {
        // The other policies do not look at credits, and would only forget them.
        let prefix = prefix.filter(|_| matches!(self.policy, Policy::Cost));
        let credit_s = prefix.map_or(0.0, |prefix| self.credits.of(prefix));
        let choice = choose(&self.policy, &View { prompt_tokens, credit_s, engines }, self.count, random)?;
        let credit = prefix.map(|prefix| (prefix, choice.credit_s - credit_s)).filter(|(_, change_s)| *change_s != 0.0);
        if let Some((prefix, _)) = credit {
            self.credits.settle(prefix, choice.credit_s);
        }
        let number = self.count;
        self.count += 1;
        let is_cold = prompt_tokens > 0 && engines.iter().all(|engine| engine.held.tokens == 0);
        Some(Decided { number, choice, cold_turn: is_cold.then_some(self.count), credit })
    }

    /// Another router's decision changed a prefix's credit.
    pub fn credit_changed(&mut self, prefix: u64, change_s: f64) {
        self.credits.settle(prefix, self.credits.of(prefix) + change_s);
    }

    /// Another router knows of so much credit in all.
    pub fn credit_is(&mut self, prefix: u64, credit_s: f64) {
        self.credits.settle(prefix, self.credits.of(prefix).max(credit_s));
    }

    /// The last `count` credits.
    pub fn credits(&self, count: usize) -> Vec<(u64, f64)> {
        self.credits.last(count)
    }
}

#[cfg(test)]
mod tests {
    use super::super::view::Held;
    use super::*;

    fn holding(tokens: u32) -> Look {
        Look { held: Held { tokens, ..Held::default() }, ..Look::default() }
    }

    #[test]
    fn decisions_are_counted_and_go_round() {
        let mut decider = Decider::new(Policy::RoundRobin);
        let mut random = fastrand::Rng::with_seed(1);
        assert_eq!(decider.decide(10, None, &[], &mut random), None);
        let engines = [holding(0), holding(0)];
        for number in 0..4 {
            let decided = decider.decide(10, None, &engines, &mut random).expect("engines");
            assert_eq!((decided.number, decided.choice.chosen), (number, number as usize % 2));
            assert_eq!(decided.cold_turn, Some(number + 1));
        }
    }

    #[test]
    fn a_prompt_that_somebody_has_is_not_cold_nor_is_an_unread_one() {
        let mut decider = Decider::new(Policy::field());
        let mut random = fastrand::Rng::with_seed(1);
        let mut cold =
            |tokens, engines: &[Look]| decider.decide(tokens, None, engines, &mut random).expect("engines").cold_turn;
        assert_eq!(cold(10, &[holding(0), holding(5)]), None);
        assert_eq!(cold(0, &[holding(0), holding(0)]), None);
        assert_eq!(cold(10, &[holding(0), holding(0)]), Some(3));
    }

    #[test]
    fn credit_grows_with_each_request_that_waits_for_a_prefix() {
        let mut decider = Decider::new(Policy::Cost);
        let mut random = fastrand::Rng::with_seed(1);
        // The holder is busy, yet waiting for it is cheaper than computing anew.
        let busy = Look { our_uncomputed: 4_000, our_unanswered: 1, our_requests: 1, ..holding(16_000) };
        let engines = [busy, holding(0)];
        let mut credit = || decider.decide(16_016, Some(7), &engines, &mut random).expect("engines").choice.credit_s;
        let (first, second) = (credit(), credit());
        assert!(first > 0.0 && second > first, "{first} {second}");
    }

    #[test]
    fn credits_of_two_routers_add_up() {
        let mut decider = Decider::new(Policy::Cost);
        decider.credit_changed(7, 0.5);
        decider.credit_changed(7, 0.25);
        assert_eq!(decider.credits(9), [(7, 0.75)]);
        decider.credit_is(7, 0.5);
        assert_eq!(decider.credits(9), [(7, 0.75)], "in a snapshot it is told once more");
        decider.credit_changed(7, -2.0);
        assert_eq!(decider.credits(9), [], "both have spent it");
    }
}
