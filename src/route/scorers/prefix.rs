//! How much of the prompt an engine has, tiers weighted: 1 when all of it lies in GPU memory.

use crate::view::View;

pub(super) fn score(view: &View<'_>) -> Vec<f64> {
    view.engines.iter().map(|engine| engine.held.share.clamp(0.0, 1.0)).collect()
}
