//! What stands out, and how.

use ratatui::style::{Color, Modifier, Style};

/// With colours, or with bold and inverted text alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Palette {
    /// Colours may be used.
    pub(super) colours: bool,
}

impl Palette {
    /// As the variable `NO_COLOR` wants it: set to anything, it means none.
    pub(super) fn of(no_color: Option<&std::ffi::OsStr>) -> Self {
        Self { colours: no_color.is_none_or(std::ffi::OsStr::is_empty) }
    }

    /// How a word is written: states that are well, that want a look, that are bad.
    pub(super) fn of_word(self, word: &str) -> Style {
        let colour = match word {
            "healthy" | "done" => Color::Green,
            "draining" | "asleep" | "unseen" | "aborted" | "silent" => Color::Yellow,
            "broken" | "failing" | "failed" | "timeout" | "engine_error" | "down" | "away" => Color::Red,
            _ => return Style::new(),
        };
        match (self.colours, colour) {
            (true, colour) => Style::new().fg(colour),
            (false, Color::Red) => Style::new().add_modifier(Modifier::BOLD),
            (false, _) => Style::new(),
        }
    }
}
