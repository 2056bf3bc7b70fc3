//! Few tokens of ours in flight, on a fixed scale: 1 for none, 0 for as many as may be.

use crate::view::View;

pub(super) fn score(view: &View<'_>, tokens_max: u64) -> Vec<f64> {
    let most = tokens_max.max(1) as f64;
    view.engines.iter().map(|engine| 1.0 - (engine.our_tokens as f64 / most).min(1.0)).collect()
}
