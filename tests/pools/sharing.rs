//! All engines of this user together stay within the configured size, and leftovers give way.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvcellar_block::error::Error;
use kvcellar_engine::pool::Pool;
use kvcellar_engine::pool::budget::Bound;
use kvcellar_engine::pool::registry::{Entry, list};

use crate::mounts::{Tmpfs, touch_all};
use crate::place::{Place, Purpose, alone, bytes_for, until};
use crate::stock::Stock;

const DIR: &str = "KVCELLAR_POOLS_SHARER_DIR";

fn entries(dir: &Path) -> Vec<Entry> {
    list(dir).expect("listed")
}

fn bytes_in(dir: &Path) -> u64 {
    entries(dir).iter().map(|entry| entry.file_bytes).sum()
}

/// A pool of which two and a half are allowed together.
fn half_of_five() -> Purpose {
    let purpose = Purpose::of(200, 2, 1000);
    Purpose { total: purpose.bytes / 2 * 5, ..purpose }
}

#[test]
fn engines_that_start_at_the_same_moment_stay_within_the_total() {
    let place = Place::new();
    let purpose = half_of_five();
    for round in 0..10_u8 {
        let (barrier, over) = (Barrier::new(4), AtomicBool::new(false));
        let started: Vec<_> = std::thread::scope(|scope| {
            let sampler = scope.spawn(|| {
                let mut most = 0;
                while !over.load(Ordering::Acquire) {
                    most = most.max(bytes_in(place.path()));
                }
                most
            });
            let starts: Vec<_> = (0..4_u8)
                .map(|number| {
                    let (purpose, place, barrier) = (purpose.of_model(number % 2 + round), &place, &barrier);
                    scope.spawn(move || {
                        barrier.wait();
                        purpose.open(place.path())
                    })
                })
                .collect();
            let started = starts.into_iter().map(|start| start.join().expect("no panic")).collect();
            over.store(true, Ordering::Release);
            let most = sampler.join().expect("no panic");
            assert!(most <= purpose.total, "round {round}: {most} of {}", purpose.total);
            started
        });
        let mut sizes: Vec<u64> = started.iter().flatten().map(|opened| opened.pool.bytes()).collect();
        sizes.sort_unstable();
        assert_eq!(sizes.len(), 3, "round {round}: two whole ones and one of what is left");
        assert!(sizes[0] < purpose.bytes / 2 + 1 && sizes[0] > purpose.bytes / 3, "round {round}: {sizes:?}");
        let refused = started.into_iter().find_map(Result::err).expect("one finds nothing").to_string();
        assert!(refused.starts_with("dram_size"), "{refused}");
    }
}

#[test]
fn who_finds_nothing_left_learns_who_has_it_and_what_to_do() {
    let place = Place::new();
    let purpose = Purpose::of(50, 2, 1000);
    let purpose = Purpose { total: purpose.bytes, ..purpose };
    let first = place.open(&purpose);
    let error = purpose.of_model(2).open(place.path()).expect_err("nothing is left");
    assert!(matches!(&error, Error::Config { field, .. } if field == "dram_size"), "{error:?}");
    let text = error.to_string();
    let pid = format!("process {}", std::process::id());
    for part in [&pid, "Write a larger dram_size", "another pool_dir", "of this user"] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(entries(place.path()).len(), 1, "a refused start left something");
    // A part of it is better than nothing, and is said.
    let more = Purpose { total: purpose.total + purpose.bytes / 2, ..purpose.of_model(2) };
    let second = place.open(&more);
    assert_eq!(second.budget.expect("a fresh pool").bound, Bound::Engines);
    assert_eq!(second.warnings.len(), 1, "{:?}", second.warnings);
    for part in ["other engines", &pid] {
        assert!(second.warnings[0].contains(part), "{:?}", second.warnings);
    }
    // Nobody was told that a default is shared.
    let third = place.open(&Purpose { explicit: false, ..purpose.of_model(3) });
    assert_eq!(third.pool.slot_count(), 50);
    drop((first, second, third));
    assert_eq!(place.open(&purpose).pool.slot_count(), 50);
}

/// The work of a process that a test started: opens a pool, says how, and holds it until it is
/// killed.
#[test]
fn sharer() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let dir = Path::new(&dir);
    let opened = half_of_five().of_model(7).open(dir);
    let word = opened.as_ref().map_or_else(ToString::to_string, |opened| opened.pool.bytes().to_string());
    std::fs::write(dir.join(format!("said-{}", std::process::id())), word).expect("written");
    std::thread::sleep(Duration::from_secs(120));
    drop(opened);
}

fn start(dir: &Path) -> Child {
    Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", "sharing::sharer", "--nocapture"])
        .env(DIR, dir)
        .stdout(Stdio::null())
        .spawn()
        .expect("a process")
}

#[test]
fn processes_that_start_at_the_same_moment_stay_within_the_total() {
    let _alone = alone();
    let place = Place::unguarded();
    let mut sharers: Vec<Child> = (0..4).map(|_| start(place.path())).collect();
    let total = half_of_five().total;
    until("all have said how it went", || {
        let used: u64 = entries(place.path()).iter().filter(|it| it.is_in_use()).map(|it| it.file_bytes).sum();
        assert!(used <= total, "{used} of {total}");
        sharers.iter().all(|sharer| place.path().join(format!("said-{}", sharer.id())).exists())
    });
    let said =
        |sharer: &Child| std::fs::read_to_string(place.path().join(format!("said-{}", sharer.id()))).expect("read");
    let words: Vec<String> = sharers.iter().map(said).collect();
    let got: Vec<u64> = words.iter().filter_map(|word| word.parse().ok()).collect();
    assert_eq!(got.len(), 3, "{words:?}");
    assert!(got.iter().sum::<u64>() <= total, "{words:?}");
    for sharer in &mut sharers {
        sharer.kill().expect("killed");
        sharer.wait().expect("ended");
    }
    // What the dead had is room again.
    assert_eq!(place.open(&half_of_five()).pool.slot_count(), 200);
}

#[test]
fn ten_models_in_a_row_each_get_their_size_and_stay_within_it() {
    let place = Place::new();
    let purpose = Purpose::of(100, 2, 1000);
    let purpose = Purpose { total: purpose.bytes, ..purpose };
    for model in 0..10 {
        let opened = place.open(&purpose.of_model(model));
        assert_eq!((opened.pool.slot_count(), opened.removed.len()), (100, usize::from(model > 0)), "model {model}");
        assert!(bytes_in(place.path()) <= purpose.total, "model {model}");
        assert!(opened.warnings.is_empty(), "{:?}", opened.warnings);
    }
}

#[test]
fn ten_models_in_a_row_fit_into_a_small_file_system() {
    let Some(tmpfs) = Tmpfs::mount(4 << 20) else { return };
    let purpose = Purpose::of(250, 2, 4096);
    assert!(purpose.bytes > 3 << 20 && purpose.bytes < 4 << 20);
    for model in 0..10 {
        let opened = purpose.of_model(model).open(&tmpfs.path).expect("a pool");
        assert_eq!(opened.pool.slot_count(), 250, "model {model}");
        touch_all(&opened.pool);
    }
    assert_eq!(entries(&tmpfs.path).len(), 1);
}

#[test]
fn leftovers_go_oldest_first_and_only_as_far_as_needed() {
    let place = Place::new();
    let purpose = Purpose::of(50, 2, 1000);
    let purpose = Purpose { total: purpose.bytes * 4, ..purpose };
    for model in [3, 1, 2] {
        drop(place.open(&purpose.of_model(model)));
        std::thread::sleep(Duration::from_millis(20));
    }
    // It was used again: the oldest is now another.
    drop(place.open(&purpose.of_model(3)));
    let order = |entries: &[Entry]| {
        let mut order: Vec<_> = entries.iter().filter_map(|it| Some((it.would_go?, it.name.clone()))).collect();
        order.sort();
        order.into_iter().map(|(_, name)| name[..2].to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(order(&entries(place.path())), ["01", "02", "03"]);
    let fourth = place.open(&purpose.of_model(4));
    assert!(fourth.removed.is_empty(), "there was room: {:?}", fourth.removed);
    let fifth = place.open(&purpose.of_model(5));
    assert!(fifth.removed.len() == 1 && fifth.removed[0].contains("removed 1 leftover"), "{:?}", fifth.removed);
    assert!(fifth.removed[0].contains("tiny"), "{:?}", fifth.removed);
    assert_eq!(order(&entries(place.path())), ["02", "03"]);
    assert!(bytes_in(place.path()) <= purpose.total);
}

#[test]
fn leftovers_of_the_same_model_under_other_numbers_give_way_too() {
    let place = Place::new();
    let purpose = Purpose::of(50, 2, 1000);
    let both = Purpose { total: purpose.bytes * 2, ..purpose.clone() };
    drop((place.open(&both), place.open(&both)));
    assert_eq!(entries(place.path()).len(), 2);
    let alone = Purpose { bytes: bytes_for(100, &purpose.geometry), ..both };
    let opened = place.open(&alone);
    assert_eq!((opened.pool.slot_count(), entries(place.path()).len()), (100, 1));
}

#[test]
fn memory_that_processes_of_a_dead_engine_map_counts_and_stays() {
    let place = Place::new();
    let purpose = Purpose::of(50, 2, 1000);
    let purpose = Purpose { total: purpose.bytes / 2 * 3, ..purpose };
    let first = place.open(&purpose);
    let worker = Pool::attach(&first.pool.ticket()).expect("the owner lives");
    drop(first);
    std::thread::scope(|scope| {
        let next = scope.spawn(|| place.open(&purpose.of_model(2)));
        // Long enough to be seen as held; the start waits for it.
        std::thread::sleep(Duration::from_millis(200));
        assert!(worker.path().exists(), "a pool that is mapped was removed");
        drop(worker);
        assert_eq!(next.join().expect("no panic").pool.slot_count(), 50);
    });
}

#[test]
fn a_pool_without_a_name_still_counts() {
    let place = Place::new();
    let purpose = Purpose::of(50, 2, 1000);
    let purpose = Purpose { total: purpose.bytes, ..purpose };
    let first = place.open(&purpose);
    first.pool.hide().expect("hidden");
    assert!(!first.pool.path().exists());
    let claims = entries(place.path());
    assert_eq!((claims.len(), claims[0].state.as_str(), claims[0].file_bytes), (1, "used", first.pool.bytes()));
    assert!(claims[0].bytes < first.pool.bytes() / 2, "a claim takes memory: {}", claims[0].bytes);
    assert_eq!((claims[0].slots, claims[0].owner_pid), (Some(50), Some(std::process::id())));
    purpose.open(place.path()).expect_err("nothing is left");
    drop(first);
    assert!(entries(place.path()).is_empty(), "a claim outlived its pool");
    assert_eq!(place.open(&purpose).pool.slot_count(), 50);
}

#[test]
fn a_claim_of_a_dead_engine_is_litter() {
    let place = Place::new();
    let purpose = Purpose::of(50, 2, 1000);
    let purpose = Purpose { total: purpose.bytes, ..purpose };
    let first = place.open(&purpose);
    first.pool.hide().expect("hidden");
    let claim = entries(place.path()).remove(0).path;
    let bytes = std::fs::read(&claim).expect("read");
    drop(first);
    std::fs::write(&claim, bytes).expect("written");
    std::fs::set_permissions(&claim, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("set");
    let opened = place.open(&purpose.of_model(2));
    assert_eq!(opened.pool.slot_count(), 50);
    assert!(!claim.exists());
    assert_eq!(Stock::of(opened).adopted, 0);
}
