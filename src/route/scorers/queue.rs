//! Few waiting requests: what the engine said last, or ours without a first token where those are
//! more.

use crate::view::View;

pub(super) fn score(view: &View<'_>) -> Vec<f64> {
    super::fewest(view.engines.iter().map(|engine| engine.waiting.max(f64::from(engine.our_unanswered))))
}
