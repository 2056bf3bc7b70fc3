//! The engine that had the session's last request.

use crate::view::View;

pub(super) fn score(view: &View<'_>) -> Vec<f64> {
    view.engines.iter().map(|engine| f64::from(u8::from(engine.session))).collect()
}
