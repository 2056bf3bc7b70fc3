//! `kvcellar bench all`: the benchmarks that need neither a GPU nor a model, one after another, and
//! how far each goal is reached, as a table and a picture.
//!
//! All goals are ratios within one run, or times of one run; a report of another kind of machine
//! is not compared. Not in it: the copies of a GPU (`bench dma`), routing (`bench route`, which
//! needs a tokenizer), simulated fleets (`bench fleet`, which measure no machine).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, Value};

use super::index::{self, IndexBench};
use super::kinds::{self, KindsBench};
use super::lookup::{self, LookupBench};
use super::nvme::{self, NvmeBench};
use super::report::{Goal, print_goals, report};
use kvcellar_block::error::{Error, Result};

/// Where to measure, and what to do with it.
#[derive(Debug, Clone, Args)]
pub struct AllBench {
    /// Directory on the disk that the nvme tier is measured on.
    #[arg(long)]
    pub dir: PathBuf,
    /// Shared-memory directory for the pools.
    #[arg(long, default_value = "/dev/shm")]
    pub pool_dir: PathBuf,
    /// Writes the report to this file, and a picture of it beside, with the suffix `.svg`.
    #[arg(long)]
    pub report: Option<PathBuf>,
    /// Compares with an earlier report, and fails where a goal's value became worse by more than a
    /// tenth.
    #[arg(long)]
    pub against: Option<PathBuf>,
    /// As short as it can be, to see that all of it works. The numbers say nothing.
    #[arg(long, hide = true)]
    pub tiny: bool,
}

/// So much worse than in an earlier report is worth a word.
const REGRESSION: f64 = 1.1;

/// One benchmark and what it found.
struct BenchPart {
    name: &'static str,
    report: Value,
    goals: Vec<Goal>,
}

fn measure(options: &AllBench) -> Result<Vec<BenchPart>> {
    let part = |name, report: Value, goals| BenchPart { name, report, goals };
    let mut parts = Vec::new();
    let (blocks, request, repetitions) = if options.tiny { (512, 64, 2) } else { (1 << 20, 32_768, 15) };
    let (results, goals) = lookup::measure(&LookupBench { blocks, request, repetitions, json: true });
    parts.push(part("lookup", report(&results, &goals), goals));
    let (tokens, step, repetitions) = if options.tiny { (4096, 512, 2) } else { (32_768, 2048, 30) };
    let (results, goals) = kinds::measure(&KindsBench { tokens, step, repetitions, json: true })?;
    parts.push(part("kinds", report(&results, &goals), goals));
    let (events, questions, repetitions) = if options.tiny { (4096, 2, 1) } else { (1 << 20, 400, 5) };
    let (results, goals) = index::measure(&IndexBench { events, questions, repetitions, json: true, beside: None });
    parts.push(part("index", report(&results, &goals), goals));
    let sizes = if options.tiny { vec![16 << 10] } else { vec![64 << 10, 1 << 20, 4 << 20] };
    let (bytes, repetitions) = if options.tiny { (2 << 20, 2) } else { (256 << 20, 10) };
    let outcome = nvme::measure(
        &NvmeBench {
            dir: options.dir.clone(),
            sizes,
            bytes,
            repetitions,
            reopen: None,
            pool_dir: options.pool_dir.clone(),
            json: true,
            rival_stdio: false,
        },
        None,
    )?;
    parts.push(part("nvme", outcome.report(), outcome.goals));
    Ok(parts)
}

/// Every part's report, below its name.
fn whole(parts: &[BenchPart]) -> Value {
    let mut whole = report(&[], &[]);
    if let Some(object) = whole.as_object_mut() {
        object.retain(|key, _| key == "commit" || key == "machine");
        let below = parts.iter().map(|part| (part.name.to_owned(), part.report.clone()));
        object.insert("parts".to_owned(), Value::Object(below.collect::<Map<_, _>>()));
    }
    whole
}

/// A goal's value in an earlier report.
fn earlier(before: &Value, part: &str, goal: &str) -> Option<f64> {
    let goals = before["parts"][part]["goals"].as_array()?;
    goals.iter().find(|it| it["name"] == goal)?["value"].as_f64()
}

/// The goals that are reached less well than in an earlier report of the same kind of machine.
fn regressions(parts: &[BenchPart], before: &Value) -> Vec<String> {
    let found = parts.iter().flat_map(|part| part.goals.iter().map(move |goal| (part.name, goal)));
    let worse = found.filter_map(|(part, goal)| {
        let before = earlier(before, part, &goal.name)?;
        let times = goal.bound.worse(goal.value, before);
        (times > REGRESSION)
            .then(|| format!("{part}: {}: {:.3}, and was {before:.3} ({times:.2} times worse)", goal.name, goal.value))
    });
    worse.collect()
}

/// Whether two reports are of one kind of machine.
fn same_machine(one: &Value, other: &Value) -> bool {
    ["cpu", "cores"].iter().all(|key| one["machine"][key] == other["machine"][key])
}

/// Bars, one a goal: how far it is reached, up to twice. The line is where it is met.
fn picture(parts: &[BenchPart]) -> String {
    const ROW: usize = 20;
    const LEFT: usize = 470;
    const SCALE: f64 = 170.0;
    const MOST: f64 = 2.0;
    const WIDTH: usize = 880;
    let rows: usize = parts.iter().map(|part| part.goals.len() + 1).sum();
    let height = rows * ROW + 40;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut y = 10;
    for BenchPart { name, goals, .. } in parts {
        let _ = writeln!(svg, "<text x=\"10\" y=\"{}\" font-weight=\"bold\">bench {name}</text>", y + 14);
        y += ROW;
        for goal in goals {
            let share = goal.bound.share(goal.value);
            let bar = SCALE * share.clamp(0.0, MOST);
            let colour = if goal.met { "#2a7f62" } else { "#b5482a" };
            let _ = writeln!(
                svg,
                "<text x=\"20\" y=\"{}\">{} ({})</text>\n\
                 <rect x=\"{LEFT}\" y=\"{}\" width=\"{bar:.0}\" height=\"12\" fill=\"{colour}\"/>\n\
                 <text x=\"{:.0}\" y=\"{}\">{:.3}</text>",
                y + 14,
                escaped(&goal.name),
                escaped(&goal.goal),
                y + 4,
                LEFT as f64 + bar + 6.0,
                y + 14,
                goal.value,
            );
            y += ROW;
        }
    }
    let line = LEFT as f64 + SCALE;
    let _ = writeln!(
        svg,
        "<line x1=\"{line}\" x2=\"{line}\" y1=\"10\" y2=\"{y}\" stroke=\"black\"/>\n\
         <text x=\"{line}\" y=\"{}\" text-anchor=\"middle\">met</text>\n</svg>",
        y + 16
    );
    svg
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text)
        .map_err(|error| Error::io("writing", path, error, "Name a file in a directory that you may write to"))
}

fn read(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::io("reading", path, error, "Name a report that `bench all --report` wrote"))?;
    serde_json::from_str(&text)
        .map_err(|error| Error::config("--against", error.to_string(), "Name a report that `bench all --report` wrote"))
}

/// Runs all of it, prints the table, and writes what was asked for.
///
/// # Errors
/// Those of the benchmarks and of the files; [`Error::Config`] where something became worse.
pub fn run(options: &AllBench) -> Result<()> {
    // Before ten minutes are spent.
    let before = options.against.as_deref().map(read).transpose()?;
    let parts = measure(options)?;
    for BenchPart { name, goals, .. } in &parts {
        println!("bench {name}");
        print_goals(goals, 3);
    }
    let whole = whole(&parts);
    if let Some(path) = &options.report {
        write(path, &format!("{whole:#}\n"))?;
        let drawn = path.with_extension("svg");
        write(&drawn, &picture(&parts))?;
        println!("{} and {} are written", path.display(), drawn.display());
    }
    let Some(before) = before else { return Ok(()) };
    if !same_machine(&whole, &before) {
        println!("the earlier report is of another kind of machine: nothing is compared");
        return Ok(());
    }
    let worse = regressions(&parts, &before);
    if worse.is_empty() {
        println!("nothing became worse by more than a tenth");
        return Ok(());
    }
    let remedy = "Run it again on a quiet machine; what stays is a regression";
    Err(Error::config("--against", format!("became worse:\n  {}", worse.join("\n  ")), remedy))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::report::GoalBound;

    fn goal(name: &str, bound: GoalBound, value: f64) -> Goal {
        Goal::of(name, bound, value)
    }

    fn part(goals: Vec<Goal>) -> BenchPart {
        BenchPart { name: "index", report: report(&[], &goals), goals }
    }

    #[test]
    fn what_became_worse_by_more_than_a_tenth_is_told() {
        let before =
            whole(&[part(vec![goal("rate", GoalBound::AtLeast(1.0), 2.0), goal("time", GoalBound::AtMost(1.0), 0.5)])]);
        let now = |rate, time| {
            regressions(
                &[part(vec![goal("rate", GoalBound::AtLeast(1.0), rate), goal("time", GoalBound::AtMost(1.0), time)])],
                &before,
            )
        };
        assert!(now(1.85, 0.54).is_empty() && now(4.0, 0.1).is_empty());
        let (slower, dearer) = (now(1.7, 0.5), now(2.0, 0.6));
        assert!(slower.len() == 1 && slower[0].contains("rate"), "{slower:?}");
        assert!(dearer.len() == 1 && dearer[0].contains("time"), "{dearer:?}");
        assert!(
            regressions(&[part(vec![goal("new", GoalBound::AtMost(1.0), 9.0)])], &before).is_empty(),
            "nothing to compare"
        );
        assert!(same_machine(&before, &before) && !same_machine(&before, &json!({"machine": {"cpu": "other"}})));
    }

    #[test]
    fn a_tiny_run_writes_a_report_and_a_picture() {
        let binary = std::env::current_exe().expect("a binary");
        let dir = tempfile::tempdir_in(binary.parent().expect("a directory")).expect("a directory");
        let file = dir.path().join("all.json");
        let options = AllBench {
            dir: dir.path().to_owned(),
            pool_dir: PathBuf::from("/dev/shm"),
            report: Some(file.clone()),
            against: None,
            tiny: true,
        };
        run(&options).expect("it runs");
        let written = read(&file).expect("a report");
        for name in ["lookup", "kinds", "index", "nvme"] {
            assert!(written["parts"][name]["goals"].as_array().is_some_and(|goals| !goals.is_empty()), "{name}");
        }
        let drawn = std::fs::read_to_string(dir.path().join("all.svg")).expect("a picture");
        assert!(drawn.starts_with("<svg") && drawn.ends_with("</svg>\n") && drawn.contains("bench nvme"));
        let lost = AllBench { against: Some(dir.path().join("no-such.json")), ..options };
        assert!(run(&lost).is_err_and(|error| error.to_string().contains("no-such.json")));
    }
}
