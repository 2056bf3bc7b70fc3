//! What stands in the small panes.

use std::collections::BTreeMap;

use super::amounts::{percent, short};
use super::fleet::FleetState;
use super::screen::{Screen, WINDOW};

/// A title and lines.
pub(super) type SmallPane = (String, Vec<String>);

/// Shares of prompts that were cached.
pub(super) fn hits(screen: &Screen, fleet: &FleetState) -> SmallPane {
    let row = |shares: Option<(f64, f64)>, when: &str| {
        let (predicted, reported) = shares.map_or(("-".to_owned(), "-".to_owned()), |(a, b)| (percent(a), percent(b)));
        format!("{when:<7} {predicted:>6} {reported:>7}")
    };
    let lately = screen.lately().and_then(|hits| hits.shares());
    let lines = vec![
        format!("{:<7} {:>6} {:>7}", "cached", "expect", "report"),
        row(lately, &format!("{} s", WINDOW.as_secs())),
        row(fleet.hits.shares(), "always"),
        format!("of {} tokens", short(fleet.hits.prompt as f64)),
    ];
    (" hit rates ".to_owned(), lines)
}

/// Blocks in each tier.
pub(super) fn tiers(fleet: &FleetState) -> SmallPane {
    let mut lines: Vec<String> =
        fleet.tiers.blocks.iter().map(|(tier, count)| format!("{tier:<15}{:>6}", short(*count as f64))).collect();
    if lines.is_empty() {
        lines.push("nothing is told".to_owned());
    }
    if let Some(problem) = &fleet.index_problem {
        lines.insert(0, problem.clone());
    }
    let title = if fleet.tiers.from == "index" { " blocks, by index " } else { " blocks, by engines " };
    (title.to_owned(), lines)
}

/// Requests that wait or were turned away.
pub(super) fn queue(fleet: &FleetState) -> SmallPane {
    let waiting: u64 = fleet.queue.waiting.values().sum();
    let mut lines = vec![format!("{waiting} wait, {} bytes", short(fleet.queue.bytes as f64))];
    // The most urgent first.
    let priorities = fleet.queue.waiting.iter().rev().take(2);
    lines.extend(priorities.map(|(priority, count)| format!("priority {priority:<6}{count:>6}")));
    lines.extend(largest(&fleet.queue.dropped));
    (" queue and refused ".to_owned(), lines)
}

/// Clients, and why some were cut.
pub(super) fn clients(fleet: &FleetState) -> SmallPane {
    let mut lines = vec![format!("{} connections", fleet.clients.open)];
    lines.extend(largest(&fleet.clients.cut));
    (" clients ended ".to_owned(), lines)
}

/// Counts by their reasons, the largest first.
fn largest(counts: &BTreeMap<String, u64>) -> Vec<String> {
    let mut rows: Vec<_> = counts.iter().collect();
    rows.sort_by(|(_, a), (_, b)| b.cmp(a));
    rows.into_iter().map(|(reason, count)| format!("{reason:<15}{:>6}", short(*count as f64))).collect()
}
