//! What is on the screen, and what keys and readings do to it. Draws nothing and reads nothing.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use kvcellar_block::error::Result;

use super::fleet::{FleetState, HitTokens};

/// How long back the present hit rates reach.
pub(super) const WINDOW: Duration = Duration::from_mins(1);
/// Readings that are kept for them at most.
const READINGS_MAX: usize = 600;

/// A part of the screen that keys move in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pane {
    /// The table of engines.
    Engines,
    /// The last decisions.
    Decisions,
}

/// What a person wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyWish {
    /// To leave.
    Quit,
    /// One row up.
    Up,
    /// One row down.
    Down,
    /// The other pane.
    NextPane,
    /// No more readings, or readings again.
    Pause,
    /// The keys.
    Help,
}

/// The screen.
#[derive(Debug)]
pub(super) struct Screen {
    /// The router that is read.
    pub(super) router: String,
    /// The last state that could be read.
    pub(super) fleet: Option<FleetState>,
    /// Why the last reading failed.
    pub(super) problem: Option<String>,
    /// Where keys move.
    pub(super) pane: Pane,
    /// Readings are passed over.
    pub(super) paused: bool,
    /// The keys are shown.
    pub(super) help: bool,
    /// Decisions above the first one that is shown.
    pub(super) scrolled: usize,
    selected: Option<String>,
    readings: VecDeque<(Instant, HitTokens)>,
}

impl Screen {
    /// Of a router that has not been read yet.
    pub(super) fn new(router: &str) -> Self {
        Self {
            router: router.to_owned(),
            fleet: None,
            problem: None,
            pane: Pane::Engines,
            paused: false,
            help: false,
            scrolled: 0,
            selected: None,
            readings: VecDeque::new(),
        }
    }

    /// A reading came. One that failed leaves the last state on the screen.
    pub(super) fn on_reading(&mut self, reading: Result<FleetState>, now: Instant) {
        if self.paused {
            return;
        }
        match reading {
            Ok(fleet) => {
                self.readings.push_back((now, fleet.hits));
                while self.readings.len() > READINGS_MAX
                    || self.readings.front().is_some_and(|(at, _)| now.duration_since(*at) > WINDOW)
                {
                    self.readings.pop_front();
                }
                self.fleet = Some(fleet);
                self.problem = None;
                self.scroll(0);
            }
            Err(error) => self.problem = Some(error.to_string()),
        }
    }

    /// A key was pressed. `false`: the person leaves.
    pub(super) fn on_wish(&mut self, wish: KeyWish) -> bool {
        match (wish, self.pane) {
            (KeyWish::Quit, _) => return false,
            (KeyWish::Help, _) => self.help = !self.help,
            (KeyWish::Pause, _) => self.paused = !self.paused,
            (KeyWish::NextPane, Pane::Engines) => self.pane = Pane::Decisions,
            (KeyWish::NextPane, Pane::Decisions) => self.pane = Pane::Engines,
            (KeyWish::Up, Pane::Engines) => self.select(-1),
            (KeyWish::Down, Pane::Engines) => self.select(1),
            (KeyWish::Up, Pane::Decisions) => self.scroll(-1),
            (KeyWish::Down, Pane::Decisions) => self.scroll(1),
        }
        true
    }

    /// The place of the selected engine. It stays the same engine while others come and go.
    pub(super) fn selected(&self) -> Option<usize> {
        let engines = &self.fleet.as_ref()?.engines;
        let name = self.selected.as_ref()?;
        engines.iter().position(|engine| engine.name == *name)
    }

    /// Hit tokens of the last [`WINDOW`].
    pub(super) fn lately(&self) -> Option<HitTokens> {
        let ((_, first), (_, last)) = (self.readings.front()?, self.readings.back()?);
        last.since(first)
    }

    fn select(&mut self, by: isize) {
        let Some(fleet) = &self.fleet else { return };
        let Some(last) = fleet.engines.len().checked_sub(1) else { return };
        let at = match self.selected() {
            Some(at) => at.saturating_add_signed(by).min(last),
            None if by > 0 => 0,
            None => last,
        };
        self.selected = Some(fleet.engines[at].name.clone());
    }

    fn scroll(&mut self, by: isize) {
        let last = self.fleet.as_ref().map_or(0, |fleet| fleet.decisions.len().saturating_sub(1));
        self.scrolled = self.scrolled.saturating_add_signed(by).min(last);
    }
}

#[cfg(test)]
mod tests {
    use super::super::fleet::{EngineState, SeenDecision};
    use super::*;
    use kvcellar_block::error::Error;

    fn fleet(names: &[&str], prompt: u64) -> FleetState {
        let engine = |name: &&str| EngineState { name: (*name).to_owned(), ..EngineState::default() };
        FleetState {
            engines: names.iter().map(engine).collect(),
            hits: HitTokens { prompt, predicted: prompt / 2, reported: prompt / 4 },
            decisions: vec![SeenDecision::default(); 3],
            ..FleetState::default()
        }
    }

    #[test]
    fn the_selected_engine_stays_selected_while_others_come_and_go() {
        let mut screen = Screen::new("r");
        let now = Instant::now();
        assert!(screen.on_wish(KeyWish::Down) && screen.selected().is_none(), "there is nobody yet");
        screen.on_reading(Ok(fleet(&["a", "b", "c"], 0)), now);
        (0..2).for_each(|_| assert!(screen.on_wish(KeyWish::Down)));
        assert_eq!(screen.selected(), Some(1));
        screen.on_reading(Ok(fleet(&["b", "c"], 0)), now);
        assert_eq!(screen.selected(), Some(0));
        screen.on_reading(Ok(fleet(&["c"], 0)), now);
        assert_eq!(screen.selected(), None, "it has left");
        (0..3).for_each(|_| assert!(screen.on_wish(KeyWish::Up)));
        assert_eq!(screen.selected(), Some(0));
    }

    #[test]
    fn keys_move_in_one_pane_at_a_time() {
        let mut screen = Screen::new("r");
        screen.on_reading(Ok(fleet(&["a"], 0)), Instant::now());
        assert!(screen.on_wish(KeyWish::NextPane) && screen.pane == Pane::Decisions);
        (0..5).for_each(|_| assert!(screen.on_wish(KeyWish::Down)));
        assert_eq!((screen.scrolled, screen.selected()), (2, None), "the last of three decisions");
        assert!(screen.on_wish(KeyWish::NextPane) && screen.pane == Pane::Engines);
        assert!(!screen.on_wish(KeyWish::Quit));
    }

    #[test]
    fn a_router_that_is_away_leaves_the_last_state_and_says_so() {
        let mut screen = Screen::new("r");
        let now = Instant::now();
        screen.on_reading(Ok(fleet(&["a"], 0)), now);
        let error = || Error::TryLater { what: "r".to_owned(), holder: "refused".to_owned() };
        screen.on_reading(Err(error()), now);
        assert!(screen.problem.as_ref().is_some_and(|text| text.contains("refused")));
        assert_eq!(screen.fleet.as_ref().map(|fleet| fleet.engines.len()), Some(1));
        screen.on_reading(Ok(fleet(&["a", "b"], 0)), now);
        assert_eq!((screen.problem.as_ref(), screen.fleet.as_ref().map(|it| it.engines.len())), (None, Some(2)));
        assert!(screen.on_wish(KeyWish::Pause));
        screen.on_reading(Ok(fleet(&[], 0)), now);
        assert_eq!(screen.fleet.as_ref().map(|it| it.engines.len()), Some(2), "paused");
    }

    #[test]
    fn present_hit_rates_are_those_of_the_window() {
        let mut screen = Screen::new("r");
        let start = Instant::now();
        for (seconds, prompt) in [(0, 1_000), (30, 1_400), (70, 1_800)] {
            screen.on_reading(Ok(fleet(&["a"], prompt)), start + Duration::from_secs(seconds));
        }
        assert_eq!(screen.lately().map(|hits| hits.prompt), Some(400), "the first is too long ago");
        screen.on_reading(Ok(fleet(&["a"], 8)), start + Duration::from_secs(71));
        assert_eq!(screen.lately(), None, "the router has begun anew");
    }
}
