//! Curves of hits over capacity, as SVG: one panel a workload.

use std::fmt::Write as _;

use super::replay::Keeper;
use super::sweep::Curves;
use kvcellar_engine::policy::PolicyName;

const PANEL: (f64, f64) = (400.0, 260.0);
const COLUMNS: usize = 2;
const MARGIN: f64 = 56.0;
const TOP: f64 = 92.0;
const INK: &str = "#1c1f24";
const QUIET: &str = "#5c636e";

fn colour(keeper: Keeper) -> &'static str {
    match keeper {
        Keeper::Policy(PolicyName::Lru) => "#5c636e",
        Keeper::Policy(PolicyName::S3Fifo) => "#b58900",
        Keeper::Policy(PolicyName::Arc) => "#2f6fb0",
        Keeper::Policy(PolicyName::Lrfu) => "#8250a0",
        Keeper::Policy(PolicyName::Adaptive) => "#b5482a",
        Keeper::Belady => "#2a7f62",
        Keeper::Infinite => "#a8adb5",
    }
}

fn text(svg: &mut String, (x, y): (f64, f64), attributes: &str, content: &str) {
    let content = content.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" {attributes}>{content}</text>");
}

fn line(svg: &mut String, points: &[(f64, f64)], stroke: &str, more: &str) {
    let path = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect::<Vec<_>>().join(" ");
    let _ = writeln!(svg, "<polyline points=\"{path}\" fill=\"none\" stroke=\"{stroke}\" {more}/>");
}

/// The whole picture.
pub fn picture(all: &[Curves]) -> String {
    let rows = all.len().div_ceil(COLUMNS);
    let width = MARGIN + COLUMNS as f64 * (PANEL.0 + MARGIN);
    let height = TOP + rows as f64 * (PANEL.1 + 76.0) + 8.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"system-ui, DejaVu Sans, Arial, sans-serif\" font-size=\"11\" \
         fill=\"{INK}\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
    );
    text(&mut svg, (24.0, 30.0), "font-size=\"18\" font-weight=\"600\"", "Blocks found, by policy and capacity");
    let below = "One tier; capacity in percent of the workload's different blocks, logarithmic. Dotted: the knee.";
    text(&mut svg, (24.0, 50.0), &format!("font-size=\"13\" fill=\"{QUIET}\""), below);
    let mut x = 24.0;
    for keeper in Keeper::all() {
        line(&mut svg, &[(x, 68.0), (x + 20.0, 68.0)], colour(keeper), stroke(keeper));
        text(&mut svg, (x + 26.0, 72.0), "font-size=\"12\"", keeper.name());
        x += 104.0;
    }
    for (number, curves) in all.iter().enumerate() {
        let left = MARGIN + (number % COLUMNS) as f64 * (PANEL.0 + MARGIN);
        let top = TOP + 24.0 + (number / COLUMNS) as f64 * (PANEL.1 + 76.0);
        panel(&mut svg, (left, top), curves);
    }
    svg.push_str("</svg>\n");
    svg
}

fn stroke(keeper: Keeper) -> &'static str {
    match keeper {
        Keeper::Policy(PolicyName::Adaptive) => "stroke-width=\"2.5\"",
        Keeper::Policy(_) => "stroke-width=\"1.3\"",
        Keeper::Belady | Keeper::Infinite => "stroke-width=\"1.3\" stroke-dasharray=\"5 3\"",
    }
}

fn panel(svg: &mut String, (left, top): (f64, f64), curves: &Curves) {
    let percents: Vec<u32> = curves.curve(Keeper::Infinite).iter().map(|(percent, _)| *percent).collect();
    let (Some(first), Some(last)) = (percents.first(), percents.last()) else { return };
    let most = curves.curve(Keeper::Infinite).iter().map(|(_, hits)| *hits).fold(0.01, f64::max) * 1.05;
    let at = |(percent, hits): (u32, f64)| {
        let along = (f64::from(percent) / f64::from(*first)).ln() / (f64::from(*last) / f64::from(*first)).ln();
        (left + along * PANEL.0, top + PANEL.1 * (1.0 - hits / most))
    };
    let name = format!("{}, {} blocks", curves.workload, curves.different_blocks);
    text(svg, (left, top - 8.0), "font-size=\"13\" font-weight=\"600\"", &name);
    for percent in &percents {
        let (x, bottom) = at((*percent, 0.0));
        line(svg, &[(x, top), (x, bottom)], "#e3e6ea", "stroke-width=\"1\"");
        text(svg, (x, bottom + 14.0), &format!("text-anchor=\"middle\" fill=\"{QUIET}\""), &format!("{percent}%"));
    }
    for step in 0..=4 {
        let hits = most * f64::from(step) / 4.0;
        let (x, y) = at((*first, hits));
        line(svg, &[(x, y), (x + PANEL.0, y)], "#e3e6ea", "stroke-width=\"1\"");
        text(
            svg,
            (x - 6.0, y + 4.0),
            &format!("text-anchor=\"end\" fill=\"{QUIET}\""),
            &format!("{:.0}%", hits * 100.0),
        );
    }
    for keeper in Keeper::all().into_iter().rev() {
        let points: Vec<(f64, f64)> = curves.curve(keeper).into_iter().map(at).collect();
        line(svg, &points, colour(keeper), stroke(keeper));
    }
    if let Some(knee) = curves.knee_percent {
        let (x, bottom) = at((knee, 0.0));
        line(svg, &[(x, top), (x, bottom)], INK, "stroke-width=\"1\" stroke-dasharray=\"1 3\"");
    }
}
