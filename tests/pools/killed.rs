//! An owner that is killed in the middle of its work: what the next engine takes over is whole.
//!
//! The owner is this test binary again, which stores, hashes and evicts blocks in random order
//! until SIGKILL comes.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvcellar_block::SlotIndex;
use kvcellar_block::plan::BlockCopy;
use kvcellar_engine::pool::slot_table::SlotState;

use crate::place::{Place, Purpose, alone, until};
use crate::stock::{Stock, is_whole, left_behind, put_checksum, state, verifies, write};
use kvcellar_testkit::random::{Random, mix};

const DIR: &str = "KVCELLAR_POOLS_OWNER_DIR";
const SEED: &str = "KVCELLAR_POOLS_OWNER_SEED";
const KILLS: u64 = 30;
const SLOTS: u64 = 12;

fn purpose() -> Purpose {
    Purpose::of(SLOTS, 2, 30_000)
}

/// The owner's work: nothing unless a test started this process for it.
#[test]
fn owner() {
    let (Ok(dir), Ok(seed)) = (std::env::var(DIR), std::env::var(SEED)) else { return };
    let mut random = Random::new(seed.parse().expect("a number"));
    let dir = PathBuf::from(dir);
    let mut stock = Stock::of(purpose().open(&dir).expect("a pool"));
    let pool = stock.pool();
    // (order, block, rank): parts to be written, and parts to be hashed.
    let (mut parts, mut hashes): (Vec<(BlockCopy, u64, usize)>, Vec<(BlockCopy, usize)>) = (Vec::new(), Vec::new());
    let end = Instant::now() + Duration::from_secs(60);
    let mut work = 0_u64;
    while Instant::now() < end {
        work += 1;
        if work == 50 {
            std::fs::write(ready(&dir), b"").expect("written");
        }
        match random.below(6) {
            0 if parts.len() < 8 => {
                for (copy, number) in stock.offer(&[random.below(40) as u64]) {
                    parts.extend([0, 1].map(|rank| (copy, number, rank)));
                }
            }
            1..=3 if !parts.is_empty() => {
                let (copy, number, rank) = parts.swap_remove(random.below(parts.len()));
                assert!(pool.line(SlotIndex(copy.slot)).may_write(copy.generation));
                write(&pool, &copy, number, rank);
                let ok = random.below(20) > 0;
                pool.line(SlotIndex(copy.slot)).answer(rank, ok);
                if ok {
                    hashes.push((copy, rank));
                }
            }
            4 if !hashes.is_empty() => {
                let (copy, rank) = hashes.swap_remove(random.below(hashes.len()));
                put_checksum(&pool, &copy, rank);
            }
            _ => stock.engine.poll(),
        }
    }
}

const RESET: &str = "KVCELLAR_POOLS_RESET_DIR";

/// An owner that resets its caches, stores once more and waits to be killed: nothing unless a test
/// started this process for it.
#[test]
fn resetting_owner() {
    let Ok(dir) = std::env::var(RESET) else { return };
    let dir = PathBuf::from(dir);
    let mut stock = Stock::of(purpose().open(&dir).expect("a pool"));
    stock.store(&[1], |_| true);
    stock.engine.reset();
    stock.store(&[2], |_| true);
    std::fs::write(ready(&dir), b"").expect("written");
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_kill_right_after_a_reset_brings_nothing_back() {
    let _alone = alone();
    let place = Place::unguarded();
    let owner = Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", "killed::resetting_owner", "--nocapture"])
        .env(RESET, place.path())
        .stdout(Stdio::null())
        .spawn()
        .expect("a process");
    kill_when_ready(owner, place.path(), Duration::ZERO);
    let opened = place.open(&purpose());
    assert!(!opened.adopted && opened.taken.is_empty(), "{:?}", opened.taken);
    assert_eq!(left_behind(&std::sync::Arc::new(opened.pool)), []);
}

fn ready(dir: &Path) -> PathBuf {
    dir.join("ready")
}

/// Starts an owner, lets it work for a random while, and kills it.
fn kill_an_owner(dir: &Path, seed: u64) {
    drop(std::fs::remove_file(ready(dir)));
    let owner = Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", "killed::owner", "--nocapture"])
        .env(DIR, dir)
        .env(SEED, seed.to_string())
        .stdout(Stdio::null())
        .spawn()
        .expect("a process");
    kill_when_ready(owner, dir, Duration::from_micros(mix(seed) % 20_000));
}

fn kill_when_ready(mut owner: Child, dir: &Path, after: Duration) {
    until("the owner works", || {
        assert!(owner.try_wait().expect("looked at").is_none(), "the owner ended by itself");
        ready(dir).exists()
    });
    std::thread::sleep(after);
    owner.kill().expect("killed");
    let status = owner.wait().expect("ended");
    assert!(!status.success(), "the owner ended by itself: {status}");
}

#[test]
fn after_sudden_death_only_whole_hashed_blocks_come_back() {
    let _alone = alone();
    let first = std::env::var("KVCELLAR_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1000_u64);
    let place = Place::unguarded();
    let (mut adopted, mut cleared) = (0, 0);
    for seed in first..first + KILLS {
        kill_an_owner(place.path(), seed);
        let opened = place.open(&purpose());
        assert!(opened.adopted && opened.taken.is_empty(), "KVCELLAR_SEED={seed}: the pool was not adopted");
        let pool = std::sync::Arc::new(opened.pool);
        let found = left_behind(&pool);
        for block in &found {
            assert!(verifies(&pool, *block) && is_whole(&pool, *block), "KVCELLAR_SEED={seed}: {block:?} is not whole");
        }
        let used = (0..SLOTS as u32).filter(|slot| state(&pool, *slot) != Some(SlotState::Empty)).count();
        adopted += found.len();
        cleared += used - found.len();
        drop(pool);
        // The same through the engine; every third pool goes on with what the dead left, as the
        // next owner does by itself.
        if seed % 3 == 0 {
            let mut stock = Stock::of(place.open(&purpose()));
            for block in &found {
                assert_eq!(stock.hit(&[block.number]), 16, "KVCELLAR_SEED={seed}: {block:?}");
            }
            let mut numbers: Vec<u64> = found.iter().map(|block| block.number).collect();
            numbers.sort_unstable();
            numbers.dedup();
            assert_eq!(stock.adopted, numbers.len() as u64);
        }
    }
    println!("KVCELLAR_SEED={first}: {KILLS} kills, {adopted} blocks adopted, {cleared} slots not");
    assert!(adopted > 0 && cleared > 0, "the kills never met anything interesting");
}
