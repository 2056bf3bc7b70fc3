//! Everything that may happen to a store's files while nobody looks.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kvcellar_testkit::random::Random;

/// Earlier contents of a store's files, for writes that were lost.
pub(crate) struct Past(Vec<(PathBuf, Vec<u8>)>);

fn files(dir: &Path) -> Vec<PathBuf> {
    let found = fs::read_dir(dir).expect("listed").map(|file| file.expect("listed").path());
    let mut files: Vec<_> = found.filter(|path| path.file_name().is_some_and(|name| name != "lock")).collect();
    files.sort();
    files
}

fn segments(dir: &Path) -> Vec<PathBuf> {
    let is_segment =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("segment"));
    files(dir).into_iter().filter(is_segment).collect()
}

pub(crate) fn remember(dir: &Path) -> Past {
    Past(files(dir).into_iter().map(|path| (path.clone(), fs::read(path).expect("read"))).collect())
}

fn write_whole(path: &Path, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path).expect("opened");
    file.write_all_at(bytes, 0).expect("written");
}

fn edit(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).expect("opened")
}

fn pages_of(path: &Path) -> u64 {
    fs::metadata(path).expect("there").len() / 4096
}

fn page(file: &File, number: u64, pages: u64) -> Vec<u8> {
    let mut bytes = vec![0; (pages * 4096) as usize];
    file.read_exact_at(&mut bytes, number * 4096).expect("read");
    bytes
}

/// Swaps runs of `pages` pages, or copies one over the other, anywhere in the segments. An extent
/// is two pages.
fn exchange(dir: &Path, choices: &mut Random, pages: u64, both: bool) {
    let found: Vec<_> = segments(dir).into_iter().filter(|path| pages_of(path) >= 2).collect();
    if found.is_empty() {
        return;
    }
    // Single pages go from descriptor to descriptor, or from payload to payload: that is what a
    // torn write looks like.
    let half = choices.of(0..2);
    let mut place = || {
        let path = choices.pick(&found).clone();
        let extent = choices.of(0..pages_of(&path) / 2);
        (edit(&path), extent * 2 + if pages == 1 { half } else { 0 })
    };
    let (one, other) = (place(), place());
    let (first, second) = (page(&one.0, one.1, pages), page(&other.0, other.1, pages));
    one.0.write_all_at(&second, one.1 * 4096).expect("written");
    if both {
        other.0.write_all_at(&first, other.1 * 4096).expect("written");
    }
}

fn flip(path: &Path, choices: &mut Random) {
    let file = edit(path);
    let len = file.metadata().expect("there").len();
    for _ in 0..choices.of(1..9) * u64::from(len > 0) {
        let at = choices.of(0..len);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("read");
        byte[0] ^= 1 << choices.of(0..8);
        file.write_all_at(&byte, at).expect("written");
    }
}

/// Puts pages back as they were: the writes since then were lost.
fn lose_writes(path: &Path, old: &[u8], choices: &mut Random) {
    if !path.exists() {
        return write_whole(path, old);
    }
    let file = edit(path);
    let len = file.metadata().expect("there").len().min(old.len() as u64);
    for at in (0..len / 4096).map(|page| (page * 4096) as usize) {
        if choices.chance(40) {
            file.write_all_at(&old[at..at + 4096], at as u64).expect("written");
        }
    }
}

/// Does one thing to the store in `dir`. `past` is what its files were at some time.
pub(crate) fn damage(dir: &Path, past: &[Past], choices: &mut Random) {
    let (all, segments) = (files(dir), segments(dir));
    if all.is_empty() {
        return;
    }
    let any = choices.pick(&all).clone();
    let segment = if segments.is_empty() { any.clone() } else { choices.pick(&segments).clone() };
    match choices.of(0..12) {
        0 => {
            let len = fs::metadata(&any).expect("there").len();
            edit(&any).set_len(choices.of(0..len + 1)).expect("cut");
        }
        1 => flip(&any, choices),
        2 | 3 => flip(&segment, choices),
        4 => exchange(dir, choices, 2, true),
        5 => exchange(dir, choices, 2, false),
        6 => exchange(dir, choices, 1, true),
        7 => exchange(dir, choices, 1, false),
        8 => fs::remove_file(&any).expect("removed"),
        9 => {
            let garbage: Vec<u8> = (0..choices.of(0..3000)).map(|_| choices.of(0..256) as u8).collect();
            write_whole(
                &dir.join(choices.pick(&["superblock", "snapshot", "superblock.new", "snapshot.new"])),
                &garbage,
            );
        }
        _ if past.is_empty() => edit(&any).set_len(choices.of(0..100_000)).expect("sized"),
        10 => {
            let past = choices.pick(past);
            let (path, bytes) = choices.pick(&past.0);
            write_whole(path, bytes);
        }
        _ => {
            for (path, bytes) in &choices.pick(past).0 {
                if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("segment")) {
                    lose_writes(path, bytes, choices);
                }
            }
        }
    }
}
