//! The tables: their columns, the first ones of which are shown where there is little room.

use ratatui::layout::Constraint;
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Row, Table};

use super::amounts::{age, blocks, percent, seconds, short};
use super::fleet::{EngineState, EventState, SeenDecision};
use super::palette::Palette;

/// A column of a table: its name, its width, and what stands in it.
pub(super) type TableColumn<T> = (&'static str, u16, fn(&T, Palette) -> Span<'static>);

/// Of engines.
pub(super) const ENGINE_COLUMNS: [TableColumn<EngineState>; 11] = [
    ("engine", 16, |engine, _| Span::raw(engine.name.clone())),
    ("state", 9, |engine, palette| styled(&engine.health, palette)),
    ("run", 5, |engine, _| Span::raw(short(engine.running))),
    ("wait", 5, |engine, _| Span::raw(short(engine.waiting))),
    ("kv", 4, |engine, _| Span::raw(percent(engine.kv_usage))),
    ("events", 8, |engine, palette| events(engine.events.as_ref(), palette)),
    ("ours", 5, |engine, _| Span::raw(short(engine.in_flight as f64))),
    ("tokens", 7, |engine, _| Span::raw(short(engine.in_flight_tokens as f64))),
    ("backlog", 8, |engine, _| Span::raw(seconds(engine.backlog_s))),
    ("dram", 6, |engine, _| Span::raw(blocks(engine.dram_blocks))),
    ("nvme", 6, |engine, _| Span::raw(blocks(engine.nvme_blocks))),
];

/// Of decisions, each with the time now.
pub(super) const DECISION_COLUMNS: [TableColumn<(SeenDecision, u64)>; 9] = [
    ("ago", 6, |(decision, now_ms), _| Span::raw(age(now_ms.saturating_sub(decision.at_ms) as f64 / 1000.0))),
    ("engine", 16, |(decision, _), _| Span::raw(decision.engine.clone())),
    ("why", 8, |(decision, _), _| Span::raw(decision.why.clone())),
    ("prompt", 6, |(decision, _), _| Span::raw(short(f64::from(decision.prompt_tokens)))),
    ("cached", 7, |(decision, _), _| Span::raw(short(f64::from(decision.predicted_cached)))),
    ("reported", 8, |(decision, _), _| Span::raw(blocks(decision.reported_cached.map(u64::from)))),
    ("wait", 7, |(decision, _), _| Span::raw(seconds(decision.predicted_wait_s))),
    ("outcome", 12, |(decision, _), palette| styled(&decision.outcome, palette)),
    ("model", 20, |(decision, _), _| Span::raw(decision.model.clone().unwrap_or_default())),
];

fn styled(word: &str, palette: Palette) -> Span<'static> {
    Span::styled(word.to_owned(), palette.of_word(word))
}

fn events(events: Option<&EventState>, palette: Palette) -> Span<'static> {
    let Some(events) = events else { return Span::raw("-") };
    match (&events.fault, events.age_s) {
        (Some(fault), _) => styled(fault, palette),
        (None, _) if !events.connected => styled("away", palette),
        (None, Some(age_s)) => Span::raw(age(age_s)),
        (None, None) => Span::raw("none yet"),
    }
}

/// Columns that fit into so much room, the first ones first.
fn fitting<T>(columns: &'static [TableColumn<T>], room: u16) -> &'static [TableColumn<T>] {
    let mut used = 0;
    let fits = columns.iter().take_while(|(_, width, _)| {
        used += width + 1;
        used <= room + 1
    });
    &columns[..fits.count().max(1)]
}

/// A table of the columns that fit.
pub(super) fn table<'r, T>(
    columns: &'static [TableColumn<T>],
    rows: impl Iterator<Item = &'r T>,
    palette: Palette,
    room: u16,
) -> Table<'static>
where
    T: 'static,
{
    let columns = fitting(columns, room);
    let names = columns.iter().map(|(name, _, _)| *name);
    let rows = rows.map(|row| Row::new(columns.iter().map(|(_, _, cell)| Line::from(cell(row, palette)))));
    // The last column has what is left.
    let width = |(at, (_, width, _)): (usize, &TableColumn<T>)| {
        if at + 1 == columns.len() { Constraint::Min(*width) } else { Constraint::Length(*width) }
    };
    Table::new(rows, columns.iter().enumerate().map(width).collect::<Vec<_>>())
        .header(Row::new(names).style(Style::new().add_modifier(Modifier::DIM)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
}
