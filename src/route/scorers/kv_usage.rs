//! Much free KV cache: one minus the share in use.

use crate::view::View;

pub(super) fn score(view: &View<'_>) -> Vec<f64> {
    view.engines.iter().map(|engine| 1.0 - engine.kv_usage.clamp(0.0, 1.0)).collect()
}
