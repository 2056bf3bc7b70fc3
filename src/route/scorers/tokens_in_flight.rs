//! Few tokens of ours in flight: knows of every decision at once, where the engine's own numbers
//! are a scrape old.

use crate::view::View;

pub(super) fn score(view: &View<'_>) -> Vec<f64> {
    super::fewest(view.engines.iter().map(|engine| engine.our_tokens as f64))
}
