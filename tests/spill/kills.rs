//! Engines killed at a random moment under load: the next one serves true bytes or nothing.
//!
//! The test starts this very binary again as a child that computes and fetches without end, kills
//! it, damages the store's files some of the time, and opens the same store itself.
//! `KVCELLAR_SEEDS=n` kills n times; a failure prints the seed that repeats it.

use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use kvcellar_testkit::random::Random;

use crate::rig::{Places, Rig};

/// Directories and seed of the child, in its environment.
const CHILD: &str = "KVCELLAR_KILLS_CHILD";
const CHAINS: u32 = 40;
const SLOTS: u64 = 40;
const SIZE: &str = "3MiB";
const MORE: &str = r#", "write_through": true"#;

fn kills() -> u64 {
    std::env::var("KVCELLAR_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(8)
}

/// The child's life: not a test of its own, it does nothing unless it is told where.
#[test]
fn child_of_the_kills() {
    let Ok(told) = std::env::var(CHILD) else { return };
    let told: Vec<&str> = told.split('|').collect();
    let mut random = Random::new(told[2].parse().expect("a seed"));
    let mut rig = open(told[0].as_ref(), told[1].as_ref());
    loop {
        let (chain, blocks) = (random.below(CHAINS as usize) as u32, 1 + random.below(12) as u32);
        if random.below(3) == 0 {
            // A failed load is a miss; a wrong byte ends the child, which the parent notices.
            let _miss = rig.fetch(chain, blocks);
        } else {
            rig.compute(chain, blocks);
        }
    }
}

/// The killed engine's locks go with its last thread, which may take a moment.
fn open(pool: &std::path::Path, disk: &std::path::Path) -> Rig {
    Rig::try_open(pool, disk, SLOTS, SIZE, MORE).expect("a store opens whatever happened to it")
}

fn damage(places: &Places, random: &mut Random) {
    for path in places.segments() {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).expect("a segment");
        let bytes = file.metadata().expect("a file").len();
        match random.below(4) {
            0 => {
                let keep = random.of(0..bytes);
                file.set_len(keep).expect("truncated");
            }
            1 => {
                for _ in 0..20 {
                    file.write_all_at(&[random.next() as u8], random.of(0..bytes)).expect("written");
                }
            }
            2 => {
                // A write that hit the wrong place.
                let mut page = vec![0; 24_576];
                let pages = bytes / 24_576;
                if pages > 1 {
                    file.read_exact_at(&mut page, random.of(0..pages) * 24_576).expect("read");
                    file.write_all_at(&page, random.of(0..pages) * 24_576).expect("written");
                }
            }
            _ => {}
        }
    }
}

#[test]
fn a_killed_engine_leaves_true_bytes_or_none() {
    let seed: u64 = std::env::var("KVCELLAR_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(11);
    println!("KVCELLAR_SEED={seed}");
    let mut random = Random::new(seed);
    let mut places = Places::new();
    let (mut served, mut refused, mut reopened) = (0_u64, 0_u64, 0_u64);
    for kill in 0..kills() {
        let told = format!("{}|{}|{}", places.pool.path().display(), places.disk.path().display(), random.next() >> 1);
        let mut child = Command::new(std::env::current_exe().expect("this binary"))
            .args(["kills::child_of_the_kills", "--exact", "--nocapture"])
            .env(CHILD, told)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("a child");
        std::thread::sleep(Duration::from_millis(20 + random.of(0..400)));
        assert!(
            child.try_wait().expect("waited").is_none(),
            "kill {kill}: the child ended by itself: {}",
            complaint(child)
        );
        child.kill().expect("killed");
        child.wait().expect("waited");
        if random.below(2) == 0 {
            damage(&places, &mut random);
        }
        if random.below(2) == 0 {
            places.forget_pool();
        }
        let mut rig = open(places.pool.path(), places.disk.path());
        reopened += rig.report().blocks;
        for chain in 0..CHAINS {
            // The rig compares every byte that comes back.
            match rig.fetch(chain, 12) {
                Ok(blocks) => served += u64::from(blocks),
                Err(_) => refused += 1,
            }
            rig.settle();
        }
        if random.below(3) == 0 {
            rig.stop();
        }
    }
    println!("{} kills: {reopened} blocks reopened, {served} served, {refused} loads refused", kills());
    assert!(served > 0, "nothing was ever served: the test proves nothing");
}

fn complaint(mut child: std::process::Child) -> String {
    use std::io::Read;
    let mut text = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        // What can be read is shown.
        drop(stderr.read_to_string(&mut text));
    }
    text
}
