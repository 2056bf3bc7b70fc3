//! Histories of engines that write known blocks, with damage between them. Whatever a store says
//! afterwards, a block that passes the check is the block that was stored under its key, in this
//! store and generation. A store always opens again.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use kvcellar_block::{BlockKey, ExtentIndex};
use kvcellar_engine::nvme::store::Recovery;

use crate::damage::{Past, damage, remember};
use kvcellar_testkit::random::{Random, Seed, seeds};
use kvcellar_testkit::stores::blocks::{geometry, is_block, key};
use kvcellar_testkit::stores::place::{Engine, wish};

const NUMBERS: u64 = 24;

/// What was ever stored: numbers by store id and generation.
type Stored = HashMap<(u64, u64), HashSet<u64>>;

struct History<'a> {
    dir: &'a Path,
    choices: Random,
    stored: Stored,
    past: Vec<Past>,
    /// What an undamaged store has to know now.
    known: Option<Vec<(u32, BlockKey)>>,
    /// Nothing happened to this store so far that makes its knowledge differ from what lies in it.
    plain: bool,
    /// This life's engine reset its caches: the next one begins anew.
    reset: bool,
    /// Blocks that were read whole.
    whole: u64,
    /// Extents whose bytes were refused.
    refused: u64,
}

/// In memory where there is such a directory: nothing here depends on the device.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory")
}

impl History<'_> {
    fn life(&mut self) {
        let geometry = geometry();
        let mut engine = Engine::open(&wish(self.dir, &geometry)).expect("a store always opens");
        engine.recover();
        self.plain |= engine.recovery == Recovery::Fresh;
        if let Some(known) = self.known.take() {
            assert_eq!(engine.known(), known, "an undamaged store forgot or invented something");
        }
        self.read_all(&engine);
        self.reset = false;
        for _ in 0..self.choices.of(0..12) {
            self.act(&mut engine);
        }
        self.past.push(remember(engine.store.path()));
        self.read_all(&engine);
        let path = engine.store.path().to_owned();
        let known = if self.reset { Vec::new() } else { engine.known() };
        if self.choices.chance(50) {
            engine.close();
        } else {
            drop(engine);
        }
        if self.choices.chance(30) {
            self.known = self.plain.then_some(known);
        } else {
            self.plain = false;
            for _ in 0..self.choices.of(1..4) {
                damage(&path, &self.past, &mut self.choices);
            }
        }
    }

    fn act(&mut self, engine: &mut Engine) {
        match self.choices.of(0..20) {
            0 => {
                engine.store.bump_cache_generation().expect("bumped");
                engine.entries.clear();
                self.reset = true;
            }
            1 if engine.store.extents_ready() > 0 => {
                let extent = ExtentIndex(self.choices.of(0..engine.store.extents_ready().into()) as u32);
                engine.store.erase(extent).expect("erased");
                engine.entries.retain(|entry| entry.extent != extent);
            }
            _ => {
                let (extent, number) = (self.choices.of(0..16) as u32, self.choices.of(0..NUMBERS));
                // Of two extents with one key the older one comes back when the other goes: no
                // plain knowledge any more.
                self.plain &= engine.entries.iter().all(|entry| entry.key != key(number));
                engine.put(extent, number);
                let place = (engine.store.id(), engine.store.cache_generation());
                self.stored.entry(place).or_default().insert(number);
            }
        }
    }

    /// Reads every extent, as what the engine believes and as whatever it is.
    fn read_all(&mut self, engine: &Engine) {
        let place = (engine.store.id(), engine.store.cache_generation());
        let stored = self.stored.get(&place);
        let believed: HashMap<u32, BlockKey> = engine.known().into_iter().collect();
        for extent in 0..engine.store.extents_ready() {
            for wanted in [None, believed.get(&extent).copied()] {
                let Ok(found) = engine.check(extent, wanted) else {
                    self.refused += 1;
                    continue;
                };
                assert!(wanted.is_none_or(|wanted| wanted == found), "extent {extent} is another block");
                let number = (0..NUMBERS).find(|number| key(*number) == found).expect("a key that was stored");
                let bytes = engine.bytes(extent);
                assert!(
                    is_block(&bytes, engine.store.geometry(), number),
                    "extent {extent}: bytes that are not {found}'s"
                );
                assert!(stored.is_some_and(|stored| stored.contains(&number)), "{found} was not stored here");
                self.whole += 1;
            }
        }
    }
}

#[test]
fn whatever_is_damaged_only_true_bytes_are_read() {
    let (mut whole, mut refused) = (0, 0);
    let all = seeds(60);
    let several = all.end - all.start > 20;
    for seed in all {
        let _told = Seed(seed);
        let dir = scratch();
        let mut history = History {
            dir: dir.path(),
            choices: Random::new(seed),
            stored: Stored::new(),
            past: Vec::new(),
            known: None,
            plain: false,
            reset: false,
            whole: 0,
            refused: 0,
        };
        for _ in 0..6 {
            history.life();
        }
        whole += history.whole;
        refused += history.refused;
    }
    println!("{whole} blocks were read whole, {refused} extents were refused");
    assert!(!several || (whole > 100 && refused > 100), "the histories say nothing: {whole} whole, {refused} refused");
}
