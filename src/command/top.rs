//! `kvcellar top`: a fleet in a terminal, as its router sees it.

mod amounts;
mod drawing;
mod fleet;
mod palette;
mod reading;
mod screen;
mod small_panes;
mod tables;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use tokio::sync::mpsc;

use fleet::FleetState;
use kvcellar_block::error::{Error, Result};
use kvcellar_index::api::serving;
use palette::Palette;
use reading::Sources;
use screen::{KeyWish, Screen};

/// Keys that wait to be worked on. Further ones wait in the terminal.
const KEYS_QUEUE: usize = 16;

/// Options of the view.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// The router's admin address.
    #[arg(long, default_value = "http://127.0.0.1:8092")]
    pub router: String,
    /// The address of an index, e.g. `http://127.0.0.1:8090`, which counts blocks in each tier.
    /// Without it engines' own counts are shown.
    #[arg(long)]
    pub index: Option<String>,
    /// A file with the index's token.
    #[arg(long, requires = "index", value_name = "FILE")]
    pub index_token_file: Option<PathBuf>,
    /// Time between two readings, in ms.
    #[arg(long, default_value_t = 1000)]
    pub every_ms: u64,
    /// Decisions that are shown at most.
    #[arg(long, default_value_t = 20)]
    pub decisions: usize,
    /// Prints one frame as text, and ends. Exit code 1 where the router cannot be read.
    #[arg(long)]
    pub once: bool,
    /// Columns of that frame.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=500))]
    pub width: u16,
    /// Prints one reading as a JSON object, and ends.
    #[arg(long, conflicts_with = "once")]
    pub json: bool,
}

/// Shows a fleet until the person leaves.
pub fn run(options: &Options) -> i32 {
    match serving::block_on(show(options)) {
        Ok(()) => 0,
        Err(error) => super::refused(&error),
    }
}

async fn show(options: &Options) -> Result<()> {
    let token = options.index_token_file.as_deref().map(read_token).transpose()?;
    let index = options.index.clone().map(|address| (address, token));
    let sources = Sources::new(&options.router, index, options.decisions)?;
    if options.json {
        let state = serde_json::to_string(&sources.read().await?);
        return print(&state.map_err(|error| written(error.into()))?);
    }
    if options.once {
        let mut screen = Screen::new(sources.router());
        screen.on_reading(Ok(sources.read().await?), Instant::now());
        return print(&drawing::text(&screen, options.width));
    }
    if !std::io::stdout().is_terminal() {
        return Err(Error::config("once", "standard output is no terminal", "Add --once or --json"));
    }
    let terminal = ratatui::try_init().map_err(written)?;
    let ended = follow(terminal, sources, Duration::from_millis(options.every_ms.max(50))).await;
    ratatui::restore();
    ended
}

fn read_token(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::io("reading", path, error, "Name a file with the index's token"))?;
    Ok(text.trim().to_owned())
}

fn written(error: std::io::Error) -> Error {
    Error::io("writing", "standard output", error, "Look at the terminal")
}

fn print(text: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{text}").map_err(written)
}

/// Readings and keys onto the screen, until the person leaves.
async fn follow(mut terminal: DefaultTerminal, sources: Sources, every: Duration) -> Result<()> {
    let palette = Palette::of(std::env::var_os("NO_COLOR").as_deref());
    let mut screen = Screen::new(sources.router());
    let (keys, mut pressed) = mpsc::channel(KEYS_QUEUE);
    // A thread of its own, which ends with the process: a terminal cannot be asked without waiting.
    std::thread::spawn(move || while event::read().is_ok_and(|event| keys.blocking_send(event).is_ok()) {});
    let (readings, mut read) = mpsc::channel(1);
    let reading = tokio::spawn(keep_reading(sources, every, readings));
    let mut stop = std::pin::pin!(serving::told_to_stop());
    loop {
        terminal.draw(|frame| drawing::draw(frame, &screen, palette)).map_err(written)?;
        tokio::select! {
            Some(reading) = read.recv() => screen.on_reading(reading, Instant::now()),
            event = pressed.recv() => {
                // Without a terminal there is nobody to show anything to.
                let Some(event) = event else { break };
                if wish(&event).is_some_and(|wish| !screen.on_wish(wish)) {
                    break;
                }
            }
            () = &mut stop => break,
        }
    }
    reading.abort();
    Ok(())
}

async fn keep_reading(sources: Sources, every: Duration, readings: mpsc::Sender<Result<FleetState>>) {
    while readings.send(sources.read().await).await.is_ok() {
        tokio::time::sleep(every).await;
    }
}

/// What a person wants by a key.
fn wish(event: &Event) -> Option<KeyWish> {
    let Event::Key(key) = event else { return None };
    if key.kind == KeyEventKind::Release {
        return None;
    }
    match key.code {
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Some(KeyWish::Quit),
        KeyCode::Char('q') | KeyCode::Esc => Some(KeyWish::Quit),
        KeyCode::Up | KeyCode::Char('k') => Some(KeyWish::Up),
        KeyCode::Down | KeyCode::Char('j') => Some(KeyWish::Down),
        KeyCode::Tab | KeyCode::BackTab => Some(KeyWish::NextPane),
        KeyCode::Char('p') => Some(KeyWish::Pause),
        KeyCode::Char('?') => Some(KeyWish::Help),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use ratatui::crossterm::event::KeyEvent;

    use super::*;

    #[test]
    fn keys_are_wishes() {
        let of = |code, modifiers| wish(&Event::Key(KeyEvent::new(code, modifiers)));
        let plain = |code| of(code, KeyModifiers::NONE);
        assert_eq!(plain(KeyCode::Char('q')), Some(KeyWish::Quit));
        assert_eq!(of(KeyCode::Char('c'), KeyModifiers::CONTROL), Some(KeyWish::Quit));
        assert_eq!(plain(KeyCode::Char('c')), None);
        assert_eq!([plain(KeyCode::Up), plain(KeyCode::Char('k'))], [Some(KeyWish::Up); 2]);
        assert_eq!([plain(KeyCode::Down), plain(KeyCode::Char('j'))], [Some(KeyWish::Down); 2]);
        assert_eq!([plain(KeyCode::Tab), plain(KeyCode::BackTab)], [Some(KeyWish::NextPane); 2]);
        assert_eq!([plain(KeyCode::Char('p')), plain(KeyCode::Char('?'))], [Some(KeyWish::Pause), Some(KeyWish::Help)]);
        assert_eq!(wish(&Event::Resize(1, 1)), None);
    }
}
