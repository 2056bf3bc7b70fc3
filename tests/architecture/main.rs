//! Holds the workspace to its architecture: which crate uses which, the direction of dependencies
//! between the engine's modules, the places where `unsafe` may stand, and the shape of module files. The rules are tried on sources written
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
fn the_workspace_follows_its_architecture() -> io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut sources = Vec::new();
    sources_below(&root, &root, &mut sources)?;
    assert!(sources.len() > 10, "only {} files found below {}", sources.len(), root.display());
    let mut complaints = rules::complaints(&sources);
    for entry in fs::read_dir(&root)? {
        let path = entry?.path();
        let krate = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        complaints.extend(rules::dependencies(&krate, &fs::read_to_string(path.join("Cargo.toml"))?));
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
    Ok(())
}

/// Most packages that the extension may be made of, ours and those of its build included.
const EXTENSION_PACKAGES_MAX: usize = 90;

#[test]
fn what_vllm_loads_is_made_of_few_packages() -> io::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = ["tree", "--locked", "--package", "kvcellar-python", "--edges", "normal,build", "--prefix", "none"];
    let output = std::process::Command::new(cargo).args(arguments).args(["--format", "{p}"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let packages: std::collections::BTreeSet<&str> =
        text.lines().filter_map(|line| line.split_whitespace().next()).filter(|name| !name.is_empty()).collect();
    assert!(packages.contains("pyo3") && packages.contains("kvcellar-engine"), "{output:?}");
    assert!(packages.len() <= EXTENSION_PACKAGES_MAX, "{} packages", packages.len());
    for network in ["tokio", "hyper", "tonic", "axum", "reqwest", "zeromq", "tokenizers", "kube"] {
        assert!(!packages.contains(network), "{network} is in the extension");
    }
    Ok(())
}

#[test]
fn rows_form_no_cycle() {
    assert_eq!(rules::disorder(), Vec::<String>::new());
}

#[test]
fn wrong_arrows_are_found() {
    let cases = [
        ("engine/gpu/worker.rs", "use crate::tier::Engine;"),
        ("engine/gpu/worker.rs", "use crate::{limits::MAX, policy::lru::Lru};"),
        ("engine/gpu/worker.rs", "use crate::{\n    pool::{Pool, Slot},\n    event_log::Log,\n};"),
        ("engine/gpu/worker.rs", "use super::super::event_log::Log;"),
        ("engine/gpu/mod.rs", "use super::policy;"),
        ("engine/policy/lru.rs", "fn f() { crate::pool::open(); }"),
        ("engine/event_log.rs", "fn f() -> crate :: gpu :: Copier { todo() }"),
        ("engine/limits.rs", "use crate::pool::SLOTS;"),
        ("engine/policy/lru.rs", "macro_rules! m { () => { $crate::tier::run() } }"),
        ("engine/policy/lru.rs", "#[cfg(test)]\nmod tests {}\nuse crate::pool::Slot;"),
        ("engine/policy/lru.rs", "#[cfg(test)]\nuse crate::limits::MAX;\nuse crate::pool::Slot;"),
        ("engine/policy/lru.rs", "const Q: char = '\"'; use crate::pool::Slot; const R: char = '\"';"),
        ("engine/policy/lru.rs", "fn f<'a>(x: &'a str) {} use crate::pool::Slot; fn g<'a>() {}"),
    ];
    for (path, body) in cases {
        let found = complaints_about(path, body);
        assert!(found.iter().any(|text| text.contains("must not name")), "{path}: {body}: {found:?}");
    }
}

#[test]
fn a_crate_that_must_not_be_used_is_found() {
    let manifest = |names: &[&str]| {
        let lines = names.iter().map(|name| format!("kvcellar-{name}.workspace = true\n")).collect::<Vec<_>>().concat();
        format!(
            "[package]\nname = \"it\"\n\n[dependencies]\n{lines}\n[dev-dependencies]\nkvcellar-testkit.workspace = true\n"
        )
    };
    assert_eq!(rules::dependencies("index", &manifest(&["block", "events"])), Vec::<String>::new());
    for (krate, name) in [("block", "events"), ("engine", "events"), ("python", "command"), ("index", "route")] {
        let found = rules::dependencies(krate, &manifest(&[name]));
        assert!(found.iter().any(|text| text.contains("must not use")), "{krate}: {name}: {found:?}");
    }
    assert!(rules::dependencies("utils", &manifest(&[]))[0].contains("has no row"));
}

#[test]
fn allowed_arrows_are_quiet() {
    let cases = [
        ("engine/gpu/worker.rs", "use crate::pool::Slot;\nuse crate::{limits};\nuse kvcellar_block::key;"),
        ("engine/gpu/worker.rs", "use crate::gpu::views::View;\nuse super::views;"),
        ("engine/tier/engine.rs", "use crate::{gpu, policy, pool, event_log, config, metrics};"),
        ("python/engine.rs", "use kvcellar_engine::tier::Engine; unsafe { f() }"),
        ("engine/gpu/worker.rs", "// use crate::tier::Engine;\n/* crate::tier /* crate::policy */ crate::event_log */"),
        ("engine/gpu/worker.rs", "const S: &str = \"crate::tier\"; const R: &str = r#\"\"crate::tier\"#;"),
        (
            "engine/policy/lru.rs",
            "#[cfg(test)]\nmod tests {\n    use crate::pool::Slot;\n    fn f() { { unsafe {} } }\n}",
        ),
    ];
    for (path, body) in cases {
        assert_eq!(complaints_about(path, body), Vec::<String>::new(), "{path}: {body}");
    }
}

#[test]
fn misplaced_unsafe_is_found() {
    for path in ["engine/tier/engine.rs", "engine/nvme/extents.rs", "route/lib.rs"] {
        let found = complaints_about(path, "fn f() { unsafe { g() } }");
        assert!(found.iter().any(|text| text.contains("`unsafe` is allowed only in")), "{path}: {found:?}");
    }
    assert_eq!(complaints_about("engine/nvme/ring.rs", "fn f() { unsafe { g() } }"), Vec::<String>::new());
    assert_eq!(complaints_about("engine/tier/engine.rs", "#![deny(unsafe_op_in_unsafe_fn)]"), Vec::<String>::new());
}

#[test]
fn misshapen_files_are_found() {
    let bare = Source { path: "engine/pool/slots.rs".to_owned(), text: "pub struct Slot;\n".to_owned() };
    let long = Source { path: "engine/pool/slots.rs".to_owned(), text: format!("//! Slots.\n{}", "\n".repeat(600)) };
    let homeless = Source { path: "engine/utils.rs".to_owned(), text: "//! Things.\n".to_owned() };
    let wide =
        Source { path: "engine/pool/slots.rs".to_owned(), text: format!("//! Slots.\n    // {}\n", "a".repeat(94)) };
    let loud =
        Source { path: "engine/tier/spill.rs".to_owned(), text: "//! It.\nfn f() { eprintln!(); }\n".to_owned() };
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
