//! The rules: who may call whom, where `unsafe` may stand, and the shape of a module file.

use crate::scan::Source;

/// Longest source file, in lines.
const LINES_MAX: usize = 600;

/// Widest comment line, in columns.
const COMMENT_COLUMNS_MAX: usize = 100;

/// Files that may write to standard error: everything else logs.
const STDERR_PREFIXES: &[&str] = &["cli/", "logging.rs"];

/// What a module may name in this crate.
enum Reach {
    Anything,
    Only(&'static [&'static str]),
}
use Reach::{Anything, Only};

/// Every top-level module, lower ones first: a row may only name rows above it, so there are no
/// cycles.
const ROWS: &[(&str, Reach)] = &[
    ("error", Only(&[])),
    ("limits", Only(&[])),
    ("logging", Only(&["limits"])),
    ("metrics", Only(&["error", "limits"])),
    ("config", Only(&["error", "limits"])),
    ("block", Only(&["error", "limits"])),
    // `config` for sizes as people read them, in messages about memory.
    ("pool", Only(&["block", "config", "error", "limits"])),
    ("gpu", Only(&["block", "pool", "error", "limits"])),
    ("nvme", Only(&["block", "pool", "config", "error", "limits"])),
    // `config` for the names of the rules that users choose.
    ("policy", Only(&["block", "config", "error", "limits"])),
    ("events", Only(&["block", "error", "limits"])),
    ("tier", Only(&["gpu", "pool", "nvme", "policy", "events", "block", "config", "metrics", "error", "limits"])),
    // `config` for sizes as people read them, in messages about memory.
    ("index", Only(&["events", "block", "config", "error", "limits"])),
    ("route", Only(&["index", "events", "block", "config", "error", "limits"])),
    ("cli", Anything),
    ("python", Anything),
    ("bin", Only(&["cli"])),
];

/// Files that may contain `unsafe`: they own memory that others see, or talk to a device or an
/// interpreter. The one other place is the prefetch hint, which touches nobody's memory.
const UNSAFE_PREFIXES: &[&str] =
    &["pool/", "gpu/", "nvme/ring", "nvme/buffer.rs", "nvme/threads.rs", "python/", "block/prefetch.rs"];

/// Everything that is wrong with the sources, as sentences that name the file.
pub(crate) fn complaints(sources: &[Source]) -> Vec<String> {
    sources
        .iter()
        .flat_map(|source| [arrows(source), safety(source), shape(source), comments(source), output(source)].concat())
        .collect()
}

fn arrows(source: &Source) -> Vec<String> {
    let module = source.module();
    let Some(&home) = module.first() else { return Vec::new() };
    let Some((_, reach)) = ROWS.iter().find(|(name, _)| *name == home) else {
        return vec![format!("src/{}: module `{home}` has no row in tests/architecture/rules.rs", source.path)];
    };
    let Only(allowed) = reach else { return Vec::new() };
    let known = |name: &str| ROWS.iter().any(|(row, _)| *row == name);
    source
        .names()
        .iter()
        .filter(|name| known(name) && *name != home && !allowed.contains(&name.as_str()))
        .map(|name| format!("src/{}: `{home}` must not name `{name}`", source.path))
        .collect()
}

fn safety(source: &Source) -> Vec<String> {
    let may = UNSAFE_PREFIXES.iter().any(|prefix| source.path.starts_with(prefix));
    if may || !source.is_unsafe() {
        return Vec::new();
    }
    vec![format!("src/{}: `unsafe` is allowed only in {}", source.path, UNSAFE_PREFIXES.join(", "))]
}

fn shape(source: &Source) -> Vec<String> {
    let mut found = Vec::new();
    if !source.text.starts_with("//!") {
        found.push(format!("src/{}: begins without `//!`, which says what the module owns and promises", source.path));
    }
    let lines = source.text.lines().count();
    if lines > LINES_MAX {
        found.push(format!("src/{}: {lines} lines, at most {LINES_MAX} are allowed", source.path));
    }
    found
}

fn comments(source: &Source) -> Vec<String> {
    let is_wide = |line: &str| line.trim_start().starts_with("//") && line.chars().count() > COMMENT_COLUMNS_MAX;
    let wide = source.text.lines().enumerate().filter(|(_, line)| is_wide(line));
    wide.map(|(index, _)| {
        format!("src/{}:{}: a comment wider than {COMMENT_COLUMNS_MAX} columns", source.path, index + 1)
    })
    .collect()
}

fn output(source: &Source) -> Vec<String> {
    let may = STDERR_PREFIXES.iter().any(|prefix| source.path.starts_with(prefix));
    if may || !source.writes_to_stderr() {
        return Vec::new();
    }
    vec![format!("src/{}: `eprintln!`: use `log`, so that the line has a level and a place", source.path)]
}

/// Rows that name a row below them, or one that does not exist: none, or the table itself is wrong.
pub(crate) fn disorder() -> Vec<String> {
    let mut found = Vec::new();
    for (at, (name, reach)) in ROWS.iter().enumerate() {
        let Only(allowed) = reach else { continue };
        for target in *allowed {
            if !ROWS[..at].iter().any(|(row, _)| row == target) {
                found.push(format!("row `{name}` names `{target}`, which is not above it"));
            }
        }
    }
    found
}
