//! From a view to an engine: weighted scorers or the cost model, then a pick. Pure but for the
//! seeded randomness it is given.

use super::cost;
use super::scorers::Scorer;
use super::view::View;

/// What is made of the scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pick {
    /// The largest; among equals any.
    #[default]
    Best,
    /// In proportion to the scores.
    Weighted,
    /// Any.
    Random,
}

/// How engines are weighed.
#[derive(Debug, Clone, PartialEq)]
pub enum Policy {
    /// Sum of weighted scorers.
    Scorers(Vec<(Scorer, f64)>, Pick),
    /// The least predicted cost.
    Cost,
    /// One after the other.
    RoundRobin,
}

impl Policy {
    /// The field's default profile: prefix 3, queue 2, KV usage 2; and what breaks ties as users
    /// expect.
    pub fn field() -> Self {
        let weights = vec![(Scorer::Prefix, 3.0), (Scorer::Queue, 2.0), (Scorer::KvUsage, 2.0), (Scorer::Cold, 0.1)];
        Self::Scorers(weights, Pick::Best)
    }

    /// Any engine.
    pub fn random() -> Self {
        Self::Scorers(Vec::new(), Pick::Random)
    }

    /// Load alone.
    pub fn load() -> Self {
        Self::Scorers(vec![(Scorer::Queue, 2.0), (Scorer::KvUsage, 2.0), (Scorer::TokensInFlight, 1.0)], Pick::Best)
    }
}

/// What was chosen, and why.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The chosen engine's place in the view.
    pub chosen: usize,
    /// All engines, best first: where to go if the chosen one fails.
    pub order: Vec<usize>,
    /// Every engine's total; larger is better (for the cost model: minus seconds).
    pub totals: Vec<f64>,
    /// Every scorer's part, unweighted, in the order of engines.
    pub parts: Vec<(&'static str, Vec<f64>)>,
    /// The prefix's credit after the decision.
    pub credit_s: f64,
}

/// Chooses. `None` without engines. `turn`: counts decisions, for those who go round.
pub fn choose(policy: &Policy, view: &View<'_>, turn: u64, random: &mut fastrand::Rng) -> Option<Choice> {
    let count = view.engines.len();
    if count == 0 {
        return None;
    }
    let mut costs = Vec::new();
    let (totals, parts, pick) = match policy {
        Policy::Scorers(weights, pick) => {
            let mut totals = vec![0.0; count];
            let mut parts = Vec::with_capacity(weights.len());
            for (scorer, weight) in weights {
                let scores = scorer.score(view);
                totals.iter_mut().zip(&scores).for_each(|(total, score)| *total += weight * score);
                parts.push((scorer.name(), scores));
            }
            (totals, parts, *pick)
        }
        Policy::Cost => {
            costs = cost::of(view);
            let parts = vec![("cost", costs.iter().map(|it| it.cost_s).collect())];
            (costs.iter().map(|it| -it.with(view.credit_s)).collect(), parts, Pick::Best)
        }
        Policy::RoundRobin => {
            let first = (turn % count as u64) as usize;
            let totals = (0..count).map(|at| -(((at + count - first) % count) as f64)).collect();
            (totals, Vec::new(), Pick::Best)
        }
    };
    // Equals are shuffled before they are sorted, so none of them is always first.
    let mut order: Vec<usize> = (0..count).collect();
    random.shuffle(&mut order);
    if pick != Pick::Random {
        order.sort_by(|a, b| totals[*b].total_cmp(&totals[*a]));
    }
    if pick == Pick::Weighted {
        let first = weighted(&totals, random);
        order.retain(|at| *at != first);
        order.insert(0, first);
    }
    let chosen = order[0];
    let credit_s = if costs.is_empty() { 0.0 } else { cost::credit_after(&costs, chosen, view.credit_s) };
    Some(Choice { chosen, order, totals, parts, credit_s })
}

fn weighted(totals: &[f64], random: &mut fastrand::Rng) -> usize {
    let sum: f64 = totals.iter().map(|total| total.max(0.0)).sum();
    if sum <= 0.0 {
        return random.usize(..totals.len());
    }
    let mut left = random.f64() * sum;
    for (at, total) in totals.iter().enumerate() {
        left -= total.max(0.0);
        if left <= 0.0 {
            return at;
        }
    }
    totals.len() - 1
}

#[cfg(test)]
mod tests {
    use super::super::view::{Held, Look};
    use super::*;

    fn looks(shares: &[u32]) -> Vec<Look> {
        shares
            .iter()
            .map(|share| Look {
                held: Held { share: f64::from(*share) / 100.0, tokens: *share, ..Held::default() },
                ..Look::default()
            })
            .collect()
    }

    fn chosen(policy: &Policy, engines: &[Look], turn: u64, seed: u64) -> usize {
        let view = View { prompt_tokens: 100, credit_s: 0.0, engines };
        choose(policy, &view, turn, &mut fastrand::Rng::with_seed(seed)).expect("engines").chosen
    }

    #[test]
    fn the_longest_prefix_wins_among_equally_loaded() {
        let engines = looks(&[10, 90, 50]);
        assert_eq!(chosen(&Policy::field(), &engines, 0, 1), 1);
        assert_eq!(chosen(&Policy::Cost, &engines, 0, 1), 1);
    }

    #[test]
    fn ties_are_shuffled_and_seeded() {
        let engines = looks(&[50; 4]);
        let of = |seed| chosen(&Policy::field(), &engines, 0, seed);
        assert_eq!(of(7), of(7));
        assert!((0..64).map(of).collect::<std::collections::HashSet<_>>().len() == 4);
    }

    #[test]
    fn round_robin_goes_round() {
        let engines = looks(&[90, 0, 0]);
        let turns: Vec<usize> = (0..5).map(|turn| chosen(&Policy::RoundRobin, &engines, turn, 1)).collect();
        assert_eq!(turns, [0, 1, 2, 0, 1]);
    }

    #[test]
    fn weighted_picks_follow_the_scores() {
        let engines = looks(&[90, 10]);
        let policy = Policy::Scorers(vec![(Scorer::Prefix, 1.0)], Pick::Weighted);
        let first = (0..1000).filter(|seed| chosen(&policy, &engines, 0, *seed) == 0).count();
        assert!((850..950).contains(&first), "{first}");
    }

    #[test]
    fn nobody_to_choose() {
        let view = View { prompt_tokens: 1, credit_s: 0.0, engines: &[] };
        assert_eq!(choose(&Policy::field(), &view, 0, &mut fastrand::Rng::with_seed(1)), None);
    }
}
