//! Holds the crate to its architecture: the direction of dependencies between modules, the places
//! where `unsafe` may stand, and the shape of module files. The rules are tried on sources written
//! to break them, so that they can fail.

mod rules;
mod scan;

use std::path::Path;
use std::{fs, io};

use scan::{Source, blank_literals};

fn sources_below(root: &Path, folder: &Path, found: &mut Vec<Source>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sources_below(root, &path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let relative = path.strip_prefix(root).map_err(io::Error::other)?;
            found.push(Source { path: relative.to_string_lossy().into_owned(), text: fs::read_to_string(&path)? });
        }
    }
    Ok(())
}

/// Complaints about one file with a proper heading and the given body.
fn complaints_about(path: &str, body: &str) -> Vec<String> {
    rules::complaints(&[Source { path: path.to_owned(), text: format!("//! What it owns.\n{body}\n") }])
}

#[test]
fn crate_follows_its_architecture() -> io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut sources = Vec::new();
    sources_below(&root, &root, &mut sources)?;
    assert!(sources.len() > 10, "only {} files found below {}", sources.len(), root.display());
    let complaints = rules::complaints(&sources);
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
    Ok(())
}

#[test]
fn rows_form_no_cycle() {
    assert_eq!(rules::disorder(), Vec::<String>::new());
}

#[test]
fn wrong_arrows_are_found() {
    let cases = [
        ("gpu/worker.rs", "use crate::tier::Engine;"),
        ("gpu/worker.rs", "use crate::{block::Key, policy::lru::Lru};"),
        ("gpu/worker.rs", "use crate::{\n    block::{Key, Group},\n    events::Log,\n};"),
        ("gpu/worker.rs", "use super::super::events::Log;"),
        ("gpu/mod.rs", "use super::policy;"),
        ("policy/lru.rs", "fn f() { crate::pool::open(); }"),
        ("events/log.rs", "fn f() -> crate :: gpu :: Copier { todo() }"),
        ("block/key.rs", "pub use crate::pool::Slot;"),
        ("tier/engine.rs", "use crate::cli::Args;"),
        ("error.rs", "use crate::limits::SLOTS_MAX;"),
        ("bin/kvcellar.rs", "fn main() { kvcellar::tier::run(); }"),
        ("policy/lru.rs", "macro_rules! m { () => { $crate::tier::run() } }"),
        ("policy/lru.rs", "#[cfg(test)]\nmod tests {}\nuse crate::pool::Slot;"),
        ("policy/lru.rs", "#[cfg(test)]\nuse crate::block::Key;\nuse crate::pool::Slot;"),
        ("policy/lru.rs", "const Q: char = '\"'; use crate::pool::Slot; const R: char = '\"';"),
        ("policy/lru.rs", "fn f<'a>(x: &'a str) {} use crate::pool::Slot; fn g<'a>() {}"),
    ];
    for (path, body) in cases {
        let found = complaints_about(path, body);
        assert!(found.iter().any(|text| text.contains("must not name")), "{path}: {body}: {found:?}");
    }
}

#[test]
fn allowed_arrows_are_quiet() {
    let cases = [
        ("gpu/worker.rs", "use crate::pool::Slot;\nuse crate::{block, error::Result, limits};"),
        ("gpu/worker.rs", "use crate::gpu::views::View;\nuse super::views;"),
        ("tier/engine.rs", "use crate::{gpu, policy, pool, events, config, metrics};"),
        ("python/engine.rs", "use crate::tier::Engine; unsafe { f() }"),
        ("bin/kvcellar.rs", "fn main() { kvcellar::cli::main() }"),
        ("gpu/worker.rs", "// use crate::tier::Engine;\n/* crate::tier /* crate::policy */ crate::events */"),
        ("gpu/worker.rs", "const S: &str = \"crate::tier\"; const R: &str = r#\"\"crate::tier\"#;"),
        ("policy/lru.rs", "#[cfg(test)]\nmod tests {\n    use crate::pool::Slot;\n    fn f() { { unsafe {} } }\n}"),
    ];
    for (path, body) in cases {
        assert_eq!(complaints_about(path, body), Vec::<String>::new(), "{path}: {body}");
    }
}

#[test]
fn misplaced_unsafe_is_found() {
    for path in ["tier/engine.rs", "nvme/extents.rs", "lib.rs"] {
        let found = complaints_about(path, "fn f() { unsafe { g() } }");
        assert!(found.iter().any(|text| text.contains("`unsafe` is allowed only in")), "{path}: {found:?}");
    }
    assert_eq!(complaints_about("nvme/ring.rs", "fn f() { unsafe { g() } }"), Vec::<String>::new());
    assert_eq!(complaints_about("tier/engine.rs", "#![deny(unsafe_op_in_unsafe_fn)]"), Vec::<String>::new());
}

#[test]
fn misshapen_files_are_found() {
    let bare = Source { path: "pool/slots.rs".to_owned(), text: "pub struct Slot;\n".to_owned() };
    let long = Source { path: "pool/slots.rs".to_owned(), text: format!("//! Slots.\n{}", "\n".repeat(600)) };
    let homeless = Source { path: "utils.rs".to_owned(), text: "//! Things.\n".to_owned() };
    let wide = Source { path: "pool/slots.rs".to_owned(), text: format!("//! Slots.\n    // {}\n", "a".repeat(94)) };
    let loud = Source { path: "tier/spill.rs".to_owned(), text: "//! It.\nfn f() { eprintln!(); }\n".to_owned() };
    for (source, expected) in [
        (bare, "begins without `//!`"),
        (long, "601 lines"),
        (homeless, "has no row"),
        (wide, "slots.rs:2: a comment wider"),
        (loud, "use `log`"),
    ] {
        let found = rules::complaints(&[source]);
        assert!(found.iter().any(|text| text.contains(expected)), "{expected}: {found:?}");
    }
}

#[test]
fn literals_are_blanked_and_lines_kept() {
    let text = "a /* x\n */ b // y\nc \"z\\\" \n\" 'q' '\\'' 'life r\"raw\" br#\"r\"r\"# end";
    let kept = blank_literals(text);
    assert_eq!(kept.lines().count(), text.lines().count());
    assert_eq!(kept.split_whitespace().collect::<Vec<_>>(), ["a", "b", "c", "'life", "end"]);
}
