//! Requests that nobody has anything of go to the engine whose last such request is longest ago, so
//! that prefixes spread.

use crate::view::View;

pub(super) fn score(view: &View<'_>) -> Vec<f64> {
    if view.engines.iter().any(|engine| engine.held.tokens > 0 || engine.held.share > 0.0) || view.engines.len() < 2 {
        return vec![0.5; view.engines.len()];
    }
    let older = |turn: u64| view.engines.iter().filter(|other| other.cold_turn > turn).count();
    view.engines.iter().map(|engine| older(engine.cold_turn) as f64 / (view.engines.len() - 1) as f64).collect()
}
