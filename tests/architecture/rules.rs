//! The rules: which crate may use which, who may call whom in the engine, where `unsafe` may stand,
//! and the shape of a module file.

use crate::scan::Source;

/// Longest source file, in lines.
const LINES_MAX: usize = 600;

/// Widest comment line, in columns.
const COMMENT_COLUMNS_MAX: usize = 100;

/// Files that may write to standard error: everything else logs.
const STDERR_PREFIXES: &[&str] = &["command/", "bench/", "simulate/", "testkit/"];

/// Every crate with those of ours that it may use, lower ones first: a row may only name rows above
/// it, so there are no cycles. Tests may use more.
const CRATES: &[(&str, &[&str])] = &[
    ("block", &[]),
    ("events", &["block"]),
    // What vLLM's processes load, through `python`: nothing here or below talks to a network.
    ("engine", &["block"]),
    ("discovery", &["block"]),
    ("index", &["block", "discovery", "events"]),
    ("route", &["block", "discovery", "events", "index"]),
    ("bench", &["block", "engine", "events", "index", "route"]),
    ("simulate", &["bench", "block", "engine"]),
    ("command", &["bench", "block", "discovery", "engine", "events", "index", "route", "simulate"]),
    ("python", &["block", "engine"]),
    ("testkit", &["block", "engine"]),
];

/// Every top-level module of the engine with those that it may name, lower ones first.
const MODULES: &[(&str, &[&str])] = &[
    ("limits", &[]),
    ("invariant", &[]),
    ("checksum", &[]),
    ("log_queue", &["limits"]),
    ("metrics", &["limits"]),
    ("config", &["limits"]),
    ("event_log", &["limits"]),
    ("owned", &["limits"]),
    ("pool", &["config", "invariant", "limits", "owned"]),
    ("gpu", &["checksum", "pool", "invariant", "limits"]),
    ("nvme", &["checksum", "pool", "config", "invariant", "limits", "owned"]),
    // `config` for the names of the rules that users choose.
    ("policy", &["config", "invariant", "limits"]),
    ("tier", &["config", "event_log", "gpu", "invariant", "limits", "metrics", "nvme", "policy", "pool"]),
];

/// Files that may contain `unsafe`: they own memory that others see, or talk to a device, a
/// processor or an interpreter. Of the others, the prefetch hint touches nobody's memory, and tests
/// play devices.
const UNSAFE_PREFIXES: &[&str] = &[
    "engine/checksum/",
    "engine/pool/",
    "engine/gpu/",
    "bench/nvme/bare.rs",
    "engine/nvme/page_trial.rs",
    "engine/nvme/ring",
    "engine/nvme/staging.rs",
    "engine/nvme/buffer.rs",
    "engine/nvme/threads.rs",
    "python/",
    "block/prefetch.rs",
    "testkit/",
];

/// Everything that is wrong with the sources, as sentences that name the file.
pub(crate) fn complaints(sources: &[Source]) -> Vec<String> {
    sources
        .iter()
        .flat_map(|source| [arrows(source), safety(source), shape(source), comments(source), output(source)].concat())
        .collect()
}

/// What a crate's manifest names among `[dependencies]` that it may not.
pub(crate) fn dependencies(krate: &str, manifest: &str) -> Vec<String> {
    let Some((_, allowed)) = CRATES.iter().find(|(name, _)| *name == krate) else {
        return vec![format!("src/{krate}: the crate has no row in tests/architecture/rules.rs")];
    };
    let section = manifest.split("\n[").find(|section| section.starts_with("dependencies]")).unwrap_or_default();
    section
        .lines()
        .filter_map(|line| line.strip_prefix("kvcellar-"))
        .filter_map(|line| line.split(['.', ' ']).next())
        .filter(|name| !allowed.contains(name))
        .map(|name| format!("src/{krate}/Cargo.toml: `{krate}` must not use `{name}`"))
        .collect()
}

fn arrows(source: &Source) -> Vec<String> {
    if source.krate() != "engine" {
        return Vec::new();
    }
    let module = source.module();
    let Some(&home) = module.first() else { return Vec::new() };
    let Some((_, allowed)) = MODULES.iter().find(|(name, _)| *name == home) else {
        return vec![format!("src/{}: module `{home}` has no row in tests/architecture/rules.rs", source.path)];
    };
    let known = |name: &str| MODULES.iter().any(|(row, _)| *row == name);
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

/// Rows that name a row below them, or one that does not exist: none, or a table itself is wrong.
pub(crate) fn disorder() -> Vec<String> {
    [CRATES, MODULES].into_iter().flat_map(disorder_of).collect()
}

fn disorder_of(rows: &[(&str, &[&str])]) -> Vec<String> {
    let mut found = Vec::new();
    for (at, (name, allowed)) in rows.iter().enumerate() {
        for target in *allowed {
            if !rows[..at].iter().any(|(row, _)| row == target) {
                found.push(format!("row `{name}` names `{target}`, which is not above it"));
            }
        }
    }
    found
}
