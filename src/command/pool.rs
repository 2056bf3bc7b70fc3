//! `kvcellar pool ls` and `rm`.

use std::path::Path;

use kvcellar_block::size::show;
use kvcellar_engine::owned::listing::Ownership;
use kvcellar_engine::pool::directory::present;
use kvcellar_engine::pool::registry::{self, Entry};

/// Prints the pools below `pool_dir`.
pub fn list(pool_dir: &Path, json: bool) -> i32 {
    let entries = match present("--pool-dir", pool_dir).and_then(|()| registry::list(pool_dir)) {
        Ok(entries) => entries,
        Err(error) => return super::refused(&error),
    };
    if json {
        match serde_json::to_string_pretty(&entries) {
            Ok(text) => println!("{text}"),
            Err(error) => return super::refused(&error),
        }
        return 0;
    }
    if entries.is_empty() {
        println!("no pools below {}", pool_dir.display());
        return 0;
    }
    println!("{:<36} {:>10} {:>9} {:>9} {:<8} {:>8} model", "name", "size", "slots", "process", "state", "would go");
    for entry in &entries {
        let model = entry.facts.as_ref().and_then(|facts| facts["model"].as_str()).unwrap_or("?");
        let number = |value: Option<u64>| value.map_or("?".to_owned(), |value| value.to_string());
        let pid = number(entry.owner_pid.map(u64::from));
        println!(
            "{:<36} {:>10} {:>9} {pid:>9} {:<8} {:>8} {model}",
            entry.name,
            // A pool without a name is told by a claim, which takes no memory itself.
            show(if entry.is_in_use() { entry.file_bytes } else { entry.bytes }),
            number(entry.slots),
            entry.state,
            entry.would_go.map_or("-".to_owned(), |place| place.to_string())
        );
    }
    0
}

/// Removes pools by name, or all that no engine uses.
pub fn remove(pool_dir: &Path, names: &[String], all: bool) -> i32 {
    if names.is_empty() && !all {
        eprintln!("kvcellar: name pools to remove (see `kvcellar pool ls`), or write --all");
        return 2;
    }
    let entries = match present("--pool-dir", pool_dir).and_then(|()| registry::list(pool_dir)) {
        Ok(entries) => entries,
        Err(error) => return super::refused(&error),
    };
    let mut code = 0;
    for name in names.iter().filter(|name| !entries.iter().any(|entry| entry.name == **name)) {
        eprintln!("kvcellar: there is no pool {name} below {}", pool_dir.display());
        code = 1;
    }
    let wanted = |entry: &&Entry| if all { entry.state != Ownership::InUse } else { names.contains(&entry.name) };
    for entry in entries.iter().filter(wanted) {
        match registry::remove(entry) {
            Ok(()) => println!("removed {} ({})", entry.name, show(entry.bytes)),
            Err(error) => code = super::refused(&error),
        }
    }
    code
}
