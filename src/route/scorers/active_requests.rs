//! Few requests of ours in flight, beside the engine that has most of them; 1 for engines that have
//! none.

use crate::view::View;

pub(super) fn score(view: &View<'_>) -> Vec<f64> {
    let most = view.engines.iter().map(|engine| engine.our_requests).max().unwrap_or(0);
    let score = |count: u32| if count == 0 { 1.0 } else { f64::from(most - count) / f64::from(most) };
    view.engines.iter().map(|engine| score(engine.our_requests)).collect()
}
