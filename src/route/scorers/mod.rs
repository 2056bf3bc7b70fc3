//! Scorers: each gives every engine a number between 0 and 1, larger is better. Pure functions of a
//! [`View`].

mod active_requests;
mod adapter;
mod cold;
mod kv_usage;
mod load_aware;
mod prefix;
mod queue;
mod running;
mod session;
mod token_load;
mod tokens_in_flight;

use super::view::View;

/// A scorer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scorer {
    /// Share of the prompt that is held.
    Prefix,
    /// Few waiting requests.
    Queue,
    /// Few running requests.
    Running,
    /// Much free KV cache.
    KvUsage,
    /// Few tokens of ours in flight.
    TokensInFlight,
    /// The engine of the session's last request.
    Session,
    /// The adapter is loaded.
    Adapter,
    /// Requests that nobody has anything of go round.
    Cold,
    /// Few requests of ours, beside the busiest engine.
    ActiveRequests,
    /// Few waiting requests, on a fixed scale.
    LoadAware {
        /// Waiting requests that score 0.
        waiting_max: u32,
    },
    /// Few tokens of ours in flight, on a fixed scale.
    TokenLoad {
        /// Tokens that score 0.
        tokens_max: u64,
    },
}

/// All scorers, those on a scale with the field's usual one.
pub const ALL: [Scorer; 11] = [
    Scorer::Prefix,
    Scorer::Queue,
    Scorer::Running,
    Scorer::KvUsage,
    Scorer::TokensInFlight,
    Scorer::Session,
    Scorer::Adapter,
    Scorer::Cold,
    Scorer::ActiveRequests,
    Scorer::LoadAware { waiting_max: 128 },
    Scorer::TokenLoad { tokens_max: 4 << 20 },
];

impl Scorer {
    /// Its name in options and breakdowns.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefix => "prefix",
            Self::Queue => "queue",
            Self::Running => "running",
            Self::KvUsage => "kv-usage",
            Self::TokensInFlight => "tokens-in-flight",
            Self::Session => "session",
            Self::Adapter => "lora",
            Self::Cold => "cold",
            Self::ActiveRequests => "active-requests",
            Self::LoadAware { .. } => "load-aware",
            Self::TokenLoad { .. } => "token-load",
        }
    }

    /// The scorer of this name.
    pub fn named(name: &str) -> Option<Self> {
        ALL.into_iter().find(|scorer| scorer.name() == name)
    }

    /// Scores of all engines, in their order.
    pub fn score(self, view: &View<'_>) -> Vec<f64> {
        match self {
            Self::Prefix => prefix::score(view),
            Self::Queue => queue::score(view),
            Self::Running => running::score(view),
            Self::KvUsage => kv_usage::score(view),
            Self::TokensInFlight => tokens_in_flight::score(view),
            Self::Session => session::score(view),
            Self::Adapter => adapter::score(view),
            Self::Cold => cold::score(view),
            Self::ActiveRequests => active_requests::score(view),
            Self::LoadAware { waiting_max } => load_aware::score(view, waiting_max),
            Self::TokenLoad { tokens_max } => token_load::score(view, tokens_max),
        }
    }
}

/// 1 for the smallest, 0 for the largest, 1 for all when they are equal.
fn fewest(numbers: impl Iterator<Item = f64> + Clone) -> Vec<f64> {
    let least = numbers.clone().fold(f64::INFINITY, f64::min);
    let most = numbers.clone().fold(f64::NEG_INFINITY, f64::max);
    let span = most - least;
    numbers.map(|number| if span > 0.0 { (most - number) / span } else { 1.0 }).collect()
}

#[cfg(test)]
mod tests {
    use super::super::view::{Adapter, Held, Look};
    use super::*;

    fn score(scorer: Scorer, engines: &[Look]) -> Vec<f64> {
        scorer.score(&View { prompt_tokens: 100, credit_s: 0.0, engines })
    }

    fn close(found: &[f64], wanted: &[f64]) {
        assert!(
            found.len() == wanted.len() && found.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-9),
            "{found:?} is not {wanted:?}"
        );
    }

    #[test]
    fn least_load_is_best() {
        let looks = [0_u32, 5, 10].map(|load| Look {
            waiting: load.into(),
            running: load.into(),
            our_tokens: load.into(),
            ..Look::default()
        });
        for scorer in [Scorer::Queue, Scorer::Running, Scorer::TokensInFlight] {
            close(&score(scorer, &looks), &[1.0, 0.5, 0.0]);
            close(&score(scorer, &looks[1..2]), &[1.0]);
        }
        let looks = [0.25, 2.0].map(|kv_usage| Look { kv_usage, ..Look::default() });
        close(&score(Scorer::KvUsage, &looks), &[0.75, 0.0]);
    }

    #[test]
    fn our_own_requests_count_before_the_engine_tells() {
        let looks = [Look { our_requests: 3, our_unanswered: 3, ..Look::default() }, Look::default()];
        close(&score(Scorer::Queue, &looks), &[0.0, 1.0]);
        close(&score(Scorer::Running, &looks), &[0.0, 1.0]);
    }

    #[test]
    fn prefixes_sessions_and_adapters() {
        let looks = [0.5, 0.0].map(|share| Look {
            held: Held { share, ..Held::default() },
            session: share > 0.0,
            ..Look::default()
        });
        close(&score(Scorer::Prefix, &looks), &[0.5, 0.0]);
        close(&score(Scorer::Session, &looks), &[1.0, 0.0]);
        close(&score(Scorer::Cold, &looks), &[0.5, 0.5]);
        let states = [Adapter::Loaded, Adapter::Room, Adapter::Waiting, Adapter::Full];
        let looks = states.map(|adapter| Look { adapter, ..Look::default() });
        close(&score(Scorer::Adapter, &looks), &[1.0, 0.8, 0.6, 0.0]);
    }

    #[test]
    fn the_cold_go_round() {
        let looks = [7, 3, 9].map(|cold_turn| Look { cold_turn, ..Look::default() });
        close(&score(Scorer::Cold, &looks), &[0.5, 1.0, 0.0]);
    }

    #[test]
    fn fixed_scales_do_not_depend_on_the_others() {
        let looks = [0_u32, 32, 200].map(|load| Look {
            waiting: load.into(),
            our_requests: load / 2,
            our_tokens: u64::from(load) * 10,
            ..Look::default()
        });
        close(&score(Scorer::LoadAware { waiting_max: 64 }, &looks), &[0.5, 0.25, 0.0]);
        close(&score(Scorer::TokenLoad { tokens_max: 640 }, &looks), &[1.0, 0.5, 0.0]);
        close(&score(Scorer::ActiveRequests, &looks), &[1.0, 0.84, 0.0]);
        close(&score(Scorer::ActiveRequests, &looks[..1]), &[1.0]);
    }

    #[test]
    fn names_are_found() {
        assert!(ALL.into_iter().all(|scorer| Scorer::named(scorer.name()) == Some(scorer)));
    }
}
