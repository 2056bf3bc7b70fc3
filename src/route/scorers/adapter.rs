//! `LoRA` adapters: loaded, room to load, waiting to be loaded, full.

use crate::view::{Adapter, View};

pub(super) fn score(view: &View<'_>) -> Vec<f64> {
    let worth = |adapter| match adapter {
        Adapter::Unasked | Adapter::Loaded => 1.0,
        Adapter::Room => 0.8,
        Adapter::Waiting => 0.6,
        Adapter::Full => 0.0,
    };
    view.engines.iter().map(|engine| worth(engine.adapter)).collect()
}
