//! Few waiting requests, on a fixed scale: a half when nobody waits, 0 when as many wait as may.

use crate::view::View;

pub(super) fn score(view: &View<'_>, waiting_max: u32) -> Vec<f64> {
    let most = f64::from(waiting_max.max(1));
    let score = |waiting: f64| 0.5 * (1.0 - waiting.clamp(0.0, most) / most);
    view.engines.iter().map(|engine| score(engine.waiting.max(f64::from(engine.our_unanswered)))).collect()
}
