//! Draws a screen, in whatever room there is: panes that do not fit are left out, and no size is
//! too small.

use std::time::{SystemTime, UNIX_EPOCH};

use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph, TableState};
use ratatui::{Frame, Terminal};

use super::amounts::short;
use super::fleet::FleetState;
use super::palette::Palette;
use super::screen::{Pane, Screen};
use super::small_panes::{clients, hits, queue, tiers};
use super::tables::{DECISION_COLUMNS, ENGINE_COLUMNS, table};

/// Columns that a small pane needs.
const SMALL_PANE_COLUMNS: u16 = 24;
/// Rows of a small pane, with its frame.
const SMALL_PANE_ROWS: u16 = 7;
/// Rows of a table beside its rows: its frame and the names of its columns.
const TABLE_ROWS: u16 = 3;

const KEYS: [&str; 6] = [
    "up, down, k, j  another engine or decision",
    "tab             the other pane",
    "p               pause, or go on",
    "?               these keys",
    "q               leave",
    "",
];

fn frame_of(title: String, is_chosen: bool) -> Block<'static> {
    let style = if is_chosen { Style::new().add_modifier(Modifier::BOLD) } else { Style::new() };
    Block::bordered().title(Span::styled(title, style))
}

/// Draws the whole screen.
pub(super) fn draw(frame: &mut Frame<'_>, screen: &Screen, palette: Palette) {
    let problem_rows = u16::from(screen.problem.is_some());
    let engines = screen.fleet.as_ref().map_or(0, |fleet| fleet.engines.len());
    // Engines get half of the room at most, unless it is too small for more than them.
    let wanted = (engines as u16).saturating_add(TABLE_ROWS);
    let room = frame.area().height.saturating_sub(1 + problem_rows);
    let is_tall = room >= SMALL_PANE_ROWS + 2 * (TABLE_ROWS + 1);
    let of_engines = if is_tall { wanted.min(room.saturating_sub(SMALL_PANE_ROWS + TABLE_ROWS + 1)) } else { room };
    let small = if is_tall { SMALL_PANE_ROWS } else { 0 };
    let [head, problem, top, middle, rest] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(problem_rows),
        Constraint::Length(of_engines),
        Constraint::Length(small),
        Constraint::Fill(1),
    ])
    .areas(frame.area());
    draw_head(frame, head, screen, palette);
    if let Some(text) = &screen.problem {
        let line = format!("{text}: trying again");
        frame.render_widget(Line::styled(line, palette.of_word("away")), problem);
    }
    if let Some(fleet) = &screen.fleet {
        draw_engines(frame, top, screen, fleet, palette);
        draw_small_panes(frame, middle, screen, fleet);
        draw_decisions(frame, rest, screen, fleet, palette);
    }
    if screen.help {
        draw_help(frame);
    }
}

fn draw_head(frame: &mut Frame<'_>, area: Rect, screen: &Screen, palette: Palette) {
    let mut parts = vec![Span::styled("fleet of ", Style::new().add_modifier(Modifier::BOLD))];
    parts.push(Span::raw(screen.router.clone()));
    if let Some(fleet) = &screen.fleet {
        let usable = fleet.engines.iter().filter(|engine| engine.health == "healthy").count();
        let ready =
            if fleet.ready { Span::raw("  ready") } else { Span::styled("  not ready", palette.of_word("away")) };
        parts.push(ready);
        parts.push(Span::raw(format!(", {usable} of {} engines healthy", fleet.engines.len())));
    } else if screen.problem.is_none() {
        parts.push(Span::raw("  reading"));
    }
    if screen.paused {
        parts.push(Span::styled("  paused", Style::new().add_modifier(Modifier::REVERSED)));
    }
    frame.render_widget(Line::from(parts), area);
}

fn draw_engines(frame: &mut Frame<'_>, area: Rect, screen: &Screen, fleet: &FleetState, palette: Palette) {
    let mut block = frame_of(" engines ".to_owned(), screen.pane == Pane::Engines);
    if let Some(engine) = screen.selected().and_then(|at| fleet.engines.get(at)) {
        let rate = short(engine.prefill_tokens_per_second);
        let told = format!(" {}  {}  {rate} prompt tokens/s  {} ", engine.url, engine.role, engine.models.join(", "));
        block = block.title_bottom(told);
    }
    let table = table(&ENGINE_COLUMNS, fleet.engines.iter(), palette, area.width.saturating_sub(2)).block(block);
    let mut state = TableState::new().with_selected(screen.selected());
    frame.render_stateful_widget(table, area, &mut state);
}

fn draw_decisions(frame: &mut Frame<'_>, area: Rect, screen: &Screen, fleet: &FleetState, palette: Palette) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let rows: Vec<_> = fleet.decisions.iter().skip(screen.scrolled).map(|decision| (decision.clone(), now)).collect();
    let block = frame_of(" last decisions ".to_owned(), screen.pane == Pane::Decisions);
    let table = table(&DECISION_COLUMNS, rows.iter(), palette, area.width.saturating_sub(2)).block(block);
    frame.render_widget(table, area);
}

fn draw_small_panes(frame: &mut Frame<'_>, area: Rect, screen: &Screen, fleet: &FleetState) {
    let panes = [hits(screen, fleet), tiers(fleet), queue(fleet), clients(fleet)];
    let count = usize::from(area.width / SMALL_PANE_COLUMNS).clamp(1, panes.len());
    let areas = Layout::horizontal(vec![Constraint::Fill(1); count]).split(area);
    for ((title, lines), area) in panes.into_iter().zip(areas.iter()) {
        let lines: Vec<Line<'static>> = lines.into_iter().map(Line::from).collect();
        frame.render_widget(Paragraph::new(lines).block(frame_of(title, false)), *area);
    }
}

fn draw_help(frame: &mut Frame<'_>) {
    let area = frame.area();
    let width = (KEYS.iter().map(|line| line.len()).max().unwrap_or(0) as u16 + 2).min(area.width);
    let height = (KEYS.len() as u16 + 1).min(area.height);
    let place = Rect { x: (area.width - width) / 2, y: (area.height - height) / 2, width, height };
    let lines: Vec<Line<'static>> = KEYS.into_iter().map(Line::from).collect();
    frame.render_widget(Clear, place);
    frame.render_widget(Paragraph::new(lines).block(frame_of(" keys ".to_owned(), true)), place);
}

/// The screen as text, as high as what is on it.
pub(super) fn text(screen: &Screen, width: u16) -> String {
    let rows = |count: usize| (count as u16).saturating_add(TABLE_ROWS);
    let tables = screen.fleet.as_ref().map_or(0, |fleet| {
        let engines = rows(fleet.engines.len().max(1));
        engines.saturating_add(SMALL_PANE_ROWS).saturating_add(rows(fleet.decisions.len().max(1)))
    });
    let height = tables.saturating_add(1 + u16::from(screen.problem.is_some())).min(u16::MAX / width.max(1));
    // Nothing can go wrong with a terminal in memory.
    let Ok(mut terminal) = Terminal::new(TestBackend::new(width, height));
    let Ok(_) = terminal.draw(|frame| draw(frame, screen, Palette { colours: false }));
    lines(terminal.backend().buffer()).join("\n")
}

/// The lines of a buffer, without spaces at their ends.
fn lines(buffer: &Buffer) -> Vec<String> {
    let row = |y: u16| {
        let mut line = String::new();
        let mut x = buffer.area.left();
        while x < buffer.area.right() {
            let symbol = buffer[(x, y)].symbol();
            line.push_str(symbol);
            // A wide character has the next cell as well.
            x += (Span::raw(symbol).width() as u16).max(1);
        }
        line.trim_end().to_owned()
    };
    (buffer.area.top()..buffer.area.bottom()).map(row).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;
    use ratatui::style::Color;

    use super::super::fleet::{ClientState, EngineState, EventState, HitTokens, QueueState, SeenDecision, TierBlocks};
    use super::super::screen::KeyWish;
    use super::*;
    use kvcellar_block::error::Error;

    fn engine(name: &str, health: &str) -> EngineState {
        EngineState {
            name: name.to_owned(),
            url: format!("http://{name}:8000"),
            health: health.to_owned(),
            role: "both".to_owned(),
            models: vec!["m".to_owned()],
            running: 12.0,
            waiting: 3.0,
            kv_usage: 0.87,
            in_flight: 9,
            in_flight_tokens: 123_456,
            backlog_s: 0.25,
            prefill_tokens_per_second: 8_100.0,
            events: Some(EventState { connected: true, age_s: Some(2.2), fault: None }),
            dram_blocks: Some(40_960),
            nvme_blocks: None,
        }
    }

    fn fleet(engines: Vec<EngineState>) -> FleetState {
        let decision = SeenDecision {
            model: Some("chat".to_owned()),
            prompt_tokens: 2_048,
            engine: "a".to_owned(),
            why: "prefix".to_owned(),
            predicted_cached: 2_000,
            predicted_wait_s: 0.012,
            outcome: "done".to_owned(),
            reported_cached: Some(1_984),
            ..SeenDecision::default()
        };
        FleetState {
            ready: true,
            engines,
            tiers: TierBlocks { from: "index", blocks: [("gpu".to_owned(), 1_500)].into() },
            hits: HitTokens { prompt: 1_000, predicted: 800, reported: 750 },
            queue: QueueState { waiting: [(10, 4)].into(), bytes: 2_048, dropped: [("deadline".to_owned(), 7)].into() },
            clients: ClientState { open: 31, cut: [("stalled_answer".to_owned(), 2)].into() },
            decisions: vec![decision],
            index_problem: None,
        }
    }

    fn screen(fleet: FleetState) -> Screen {
        let mut screen = Screen::new("http://r");
        screen.on_reading(Ok(fleet), Instant::now());
        screen
    }

    fn line<'t>(text: &'t str, with: &str) -> &'t str {
        text.lines().find(|line| line.contains(with)).unwrap_or_else(|| panic!("no {with} in\n{text}"))
    }

    #[test]
    fn a_frame_shows_engines_tiers_rates_queue_clients_and_decisions() {
        let mut broken = engine("b", "broken");
        broken.events = Some(EventState { connected: true, age_s: None, fault: Some("silent".to_owned()) });
        let text = text(&screen(fleet(vec![engine("a", "healthy"), broken])), 100);
        assert!(line(&text, "fleet of").contains("http://r  ready, 1 of 2 engines healthy"));
        let row: Vec<&str> = line(&text, "healthy  ").split_whitespace().collect();
        assert_eq!(row[1..], ["healthy", "12", "3", "87%", "2", "s", "9", "123k", "250", "ms", "41.0k", "-", "│"]);
        assert!(line(&text, "broken").contains("silent"));
        assert!(line(&text, "gpu").contains("1.5k"));
        assert!(line(&text, "always").contains("80%") && line(&text, "always").contains("75%"));
        assert!(line(&text, "priority 10").contains('4') && line(&text, "deadline").contains('7'));
        assert!(text.contains("31 connections") && line(&text, "stalled_answer").contains('2'));
        let decision = line(&text, "prefix");
        for part in ["2.0k", "12 ms", "done", "chat"] {
            assert!(decision.contains(part), "{part} in {decision}");
        }
    }

    #[test]
    fn names_from_requests_cannot_command_the_terminal() {
        let mut state = fleet(vec![engine("a\u{1b}[2J", "healthy")]);
        state.decisions[0].model = Some("\u{1b}]0;owned\u{7}\r\n".to_owned());
        let text = text(&screen(state), 100);
        assert!(text.chars().all(|it| it == '\n' || !it.is_control()), "{text:?}");
    }

    #[test]
    fn a_router_that_is_away_is_said() {
        let mut screen = Screen::new("http://r");
        let error = || Error::TryLater { what: "http://r".to_owned(), holder: "connection refused".to_owned() };
        screen.on_reading(Err(error()), Instant::now());
        assert!(text(&screen, 100).contains("connection refused: trying again"), "{}", text(&screen, 100));
    }

    #[test]
    fn colours_are_left_out_where_they_are_not_wanted() {
        let drawn = |palette| {
            let Ok(mut terminal) = Terminal::new(TestBackend::new(80, 24));
            let screen = screen(fleet(vec![engine("a", "failing")]));
            let Ok(_) = terminal.draw(|frame| draw(frame, &screen, palette));
            let cells = terminal.backend().buffer().content().to_vec();
            cells.iter().any(|cell| cell.fg != Color::Reset || cell.bg != Color::Reset)
        };
        let set = |text: &str| Palette::of(Some(std::ffi::OsStr::new(text)));
        assert!(drawn(Palette::of(None)) && drawn(set("")));
        assert!(!drawn(set("1")) && !drawn(set("0")), "whatever it says");
    }

    proptest! {
        #[test]
        fn no_size_is_too_small(
            width in 1_u16..200, height in 1_u16..70, engines in 0_usize..90, decisions in 0_usize..30,
            wishes in proptest::collection::vec(0_usize..5, 0..8), away: bool, number in any::<f64>(),
        ) {
            let mut one = engine("名前が広い", "healthy");
            (one.running, one.kv_usage, one.backlog_s) = (number, number, number);
            let mut state = fleet(vec![one; engines]);
            state.decisions = vec![state.decisions[0].clone(); decisions];
            let mut screen = screen(state);
            for wish in wishes {
                screen.on_wish([KeyWish::Up, KeyWish::Down, KeyWish::NextPane, KeyWish::Pause, KeyWish::Help][wish]);
            }
            if away {
                screen.problem = Some("away".to_owned());
            }
            let Ok(mut terminal) = Terminal::new(TestBackend::new(width, height));
            for palette in [Palette { colours: true }, Palette { colours: false }] {
                let Ok(_) = terminal.draw(|frame| draw(frame, &screen, palette));
            }
            prop_assert_eq!(lines(terminal.backend().buffer()).len(), usize::from(height));
            prop_assert!(text(&screen, width).lines().next().is_some());
        }
    }
}
