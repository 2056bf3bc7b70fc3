//! `kvcellar store ls`, `stat`, `verify` and `drop`.

use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use kvcellar_block::error::Error;
use kvcellar_block::size::show;
use kvcellar_engine::nvme::inspection::{self, Inspected};
use kvcellar_engine::nvme::registry::{self, Entry};
use kvcellar_engine::owned::listing::Ownership;
use kvcellar_engine::pool::directory::present;

/// Damaged extents that are printed one by one; JSON has them all.
const SHOWN_MAX: usize = 20;

/// A store and what lies in it.
#[derive(Serialize)]
struct StoreReport<'a> {
    #[serde(flatten)]
    store: &'a Entry,
    contents: Option<Inspected>,
    error: Option<String>,
    /// Why it was not looked at, where that is no failure.
    skipped: Option<String>,
}

/// Prints the stores below `dir`.
pub fn list(dir: &Path, json: bool) -> i32 {
    let entries = match present("DIR", dir).and_then(|()| registry::list(dir)) {
        Ok(entries) => entries,
        Err(error) => return super::refused(&error),
    };
    if json {
        return print_json(&entries);
    }
    if entries.is_empty() {
        println!("no stores below {}", dir.display());
        return 0;
    }
    println!(
        "{:<36} {:>10} {:<8} {:>9} {:>9} {:>8} {:>8} {:>5} model",
        "name", "size", "state", "process", "extents", "age", "used", "goes"
    );
    for entry in &entries {
        let model = entry.facts.as_ref().and_then(|facts| facts["model"].as_str()).unwrap_or("?");
        let number = |value: Option<u64>| value.map_or("?".to_owned(), |value| value.to_string());
        println!(
            "{:<36} {:>10} {:<8} {:>9} {:>9} {:>8} {:>8} {:>5} {model}",
            entry.name,
            show(entry.bytes),
            entry.state,
            number(entry.owner_pid.map(u64::from)),
            number(entry.extents),
            age(entry.created_s),
            age(entry.used_s),
            entry.goes.map_or("-".to_owned(), |turn| turn.to_string()),
        );
    }
    println!("goes: the order in which a start that needs room removes what nobody uses, its own namespace's last");
    0
}

/// Prints what lies in stores.
pub fn stat(dir: &Path, names: &[String], json: bool) -> i32 {
    examine(dir, names, json, false, |entry| inspection::stat(&entry.path, &mut bar(&entry.name)))
}

/// Reads and checks everything in stores. 1 when something is damaged.
pub fn verify(dir: &Path, names: &[String], repair: bool, json: bool) -> i32 {
    examine(dir, names, json, true, |entry| inspection::verify(&entry.path, repair, &mut bar(&entry.name)))
}

fn examine(
    dir: &Path,
    names: &[String],
    json: bool,
    must_be_whole: bool,
    look: impl Fn(&Entry) -> kvcellar_block::error::Result<Inspected>,
) -> i32 {
    let (entries, mut code) = match chosen(dir, names) {
        Ok(chosen) => chosen,
        Err(error) => return super::refused(&error),
    };
    let mut reports = Vec::new();
    for store in &entries {
        let mut report = StoreReport { store, contents: None, error: None, skipped: None };
        match look(store) {
            Ok(contents) => report.contents = Some(contents),
            // A store that was not asked for by name and serves an engine is as it should be.
            Err(busy @ Error::TryLater { .. }) if names.is_empty() => report.skipped = Some(busy.to_string()),
            Err(error) => report.error = Some(error.to_string()),
        }
        let damaged = report.contents.as_ref().is_some_and(|contents| !contents.damaged.is_empty());
        if report.error.is_some() || must_be_whole && damaged {
            code = 1;
        }
        reports.push(report);
    }
    if json { print_json(&reports).max(code) } else { print_table(&reports, code) }
}

/// The named stores, or all, and 1 when a name is nobody's.
fn chosen(dir: &Path, names: &[String]) -> kvcellar_block::error::Result<(Vec<Entry>, i32)> {
    present("DIR", dir)?;
    let mut entries = registry::list(dir)?;
    let mut code = 0;
    for name in names.iter().filter(|name| !entries.iter().any(|entry| entry.name == **name)) {
        eprintln!("kvcellar: there is no store {name} below {}", dir.display());
        code = 1;
    }
    entries.retain(|entry| names.is_empty() || names.contains(&entry.name));
    Ok((entries, code))
}

fn print_table(reports: &[StoreReport<'_>], code: i32) -> i32 {
    println!(
        "{:<36} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8}",
        "name", "held", "extents", "used", "empty", "stale", "damaged", "dropped", "oldest", "newest"
    );
    for report in reports {
        if let Some(error) = &report.error {
            eprintln!("kvcellar: {}: {error}", report.store.name);
        }
        if let Some(why) = &report.skipped {
            eprintln!("kvcellar: {} is skipped: {why}", report.store.name);
        }
        let Some(found) = &report.contents else { continue };
        println!(
            "{:<36} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8}",
            report.store.name,
            show(found.used_bytes),
            found.extents,
            found.used,
            found.empty,
            found.stale,
            found.damaged.len(),
            found.dropped,
            age(found.oldest_s),
            age(found.newest_s),
        );
        for damage in found.damaged.iter().take(SHOWN_MAX) {
            println!("  segment {} at byte {}: {}", damage.segment, damage.offset, damage.problem);
        }
        if found.damaged.len() > SHOWN_MAX {
            println!("  and {} more", found.damaged.len() - SHOWN_MAX);
        }
    }
    code
}

/// Removes stores that no engine uses.
pub fn remove(dir: &Path, names: &[String], yes: bool) -> i32 {
    let (entries, mut code) = match chosen(dir, names) {
        Ok(chosen) => chosen,
        Err(error) => return super::refused(&error),
    };
    // Named stores that are in use are refused one by one; without names they are simply left.
    let wanted =
        entries.iter().filter(|entry| !names.is_empty() || entry.state != Ownership::InUse).collect::<Vec<_>>();
    if wanted.is_empty() {
        println!("nothing to remove below {}", dir.display());
        return code;
    }
    if !yes && !agreed(&wanted) {
        return 2;
    }
    for entry in wanted {
        match registry::remove(entry) {
            Ok(()) => println!("removed {} ({})", entry.name, show(entry.bytes)),
            Err(error) => code = super::refused(&error),
        }
    }
    code
}

fn agreed(wanted: &[&Entry]) -> bool {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        eprintln!("kvcellar: this removes {} stores; write --yes", wanted.len());
        return false;
    }
    for entry in wanted {
        println!("{} ({}, {})", entry.name, show(entry.bytes), entry.state);
    }
    print!("Remove them? [y/N] ");
    let mut answer = String::new();
    let asked = std::io::stdout().flush().and_then(|()| stdin.lock().read_line(&mut answer));
    asked.is_ok() && answer.trim().eq_ignore_ascii_case("y")
}

/// A bar on standard error; nothing where that is no terminal.
pub(crate) fn bar(name: &str) -> impl FnMut(u64, u64) + use<> {
    let bar = ProgressBar::new(0).with_message(name.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}") {
        bar.set_style(style);
    }
    move |done, all| {
        bar.set_length(all);
        bar.set_position(done);
        if done == all {
            bar.finish_and_clear();
        }
    }
}

/// How long ago, for people.
fn age(then_s: Option<u64>) -> String {
    let Some(then_s) = then_s else { return "-".to_owned() };
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let seconds = now_s.saturating_sub(then_s);
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

pub(crate) fn print_json(value: &impl Serialize) -> i32 {
    match serde_json::to_string_pretty(value) {
        Ok(text) => println!("{text}"),
        Err(error) => return super::refused(&error),
    }
    0
}
