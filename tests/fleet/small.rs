//! Behaviours one at a time.

use kvcellar_events::follow::Position;
use kvcellar_events::wire::{Batch, BatchArena, Event, Hashes, Parent, Removed, Stored};
use kvcellar_index::Index;
use kvcellar_index::indexed_engine::EventMark;
use kvcellar_index::keys::{self, Extras};
use kvcellar_index::limits::INDEX_BYTES_MIN;
use kvcellar_index::query::PrefixScorer;
use kvcellar_index::roster::EngineId;
use kvcellar_index::tiers::{FleetTier, Weights};

const MODEL: &str = "model";

/// An index and a way to tell it things.
struct Told {
    index: Index,
    arena: BatchArena,
}

impl Told {
    fn new(block: u32) -> Self {
        Self { index: Index::new(block, INDEX_BYTES_MIN).expect("an index"), arena: BatchArena::default() }
    }

    fn engine(&self, name: &str) -> EngineId {
        self.index.write().engine(name, MODEL).expect("room")
    }

    /// Blocks of two tokens, numbered from `first`, whose hashes are their numbers; block `n` holds
    /// tokens `2n` and `2n + 1`.
    fn store(&mut self, id: EngineId, first: u64, count: u64, medium: &str) {
        self.arena.clear();
        self.arena.hashes.extend(first..first + count);
        self.arena.tokens.extend((2 * first..2 * (first + count)).map(|token| token as u32));
        let stored = Stored {
            hashes: Hashes { range: 0..count as usize, digests: None },
            tokens: 0..2 * count as usize,
            block_size: 2,
            parent: (first > 1).then_some(Parent::Number(first - 1)),
            medium: Some(medium),
            ..Stored::default()
        };
        self.tell(id, Event::Stored(Box::new(stored)));
    }

    fn remove(&mut self, id: EngineId, hash: u64, medium: &str) {
        self.remove_all(id, &[hash], medium);
    }

    fn remove_all(&mut self, id: EngineId, hashes: &[u64], medium: &str) {
        self.arena.clear();
        self.arena.hashes.extend(hashes);
        let hashes = Hashes { range: 0..hashes.len(), digests: None };
        self.tell(id, Event::Removed(Removed { hashes, medium: Some(medium), ..Removed::default() }));
    }

    fn tell(&mut self, id: EngineId, event: Event<'_>) {
        let batch = Batch { events: vec![event], ..Batch::default() };
        self.index.write().apply(id, &batch, &self.arena);
    }

    /// Keys of blocks 1 to `count`.
    fn keys(count: u32) -> Vec<u64> {
        let tokens: Vec<u32> = (2..2 * (count + 1)).collect();
        let mut found = Vec::new();
        keys::of_prompt(keys::root(MODEL, None), &tokens, 2, &Extras::default(), &mut found);
        found
    }

    /// (engine, usable blocks, score) for blocks 1 to 8.
    fn scores(&self) -> Vec<(u32, u32, f64)> {
        let mut scorer = PrefixScorer::default();
        let scores = self.index.score(&mut scorer, &Self::keys(8), None, &Weights::default());
        scores.iter().map(|score| (score.engine.0, score.blocks, score.score)).collect()
    }
}

#[test]
fn the_longest_prefix_wins_and_tiers_weigh() {
    let mut told = Told::new(2);
    let (one, two, three) = (told.engine("one"), told.engine("two"), told.engine("three"));
    told.store(one, 1, 4, "GPU");
    told.store(two, 1, 8, "CPU");
    told.store(three, 1, 8, "HOLOGRAPHIC");
    told.store(three, 5, 2, "GPU");
    assert_eq!(told.scores(), [(1, 8, 0.8), (0, 4, 0.5), (2, 8, (2.0 + 6.0 * 0.2) / 8.0)]);
    told.remove(two, 1, "CPU");
    assert_eq!(
        told.scores().iter().map(|score| score.0).collect::<Vec<_>>(),
        [0, 2],
        "a prefix without its start is none"
    );
}

#[test]
fn candidates_bound_the_answer() {
    let mut told = Told::new(2);
    let (one, two) = (told.engine("one"), told.engine("two"));
    told.store(one, 1, 8, "GPU");
    told.store(two, 1, 3, "GPU");
    let mut scorer = PrefixScorer::default();
    let scores = told.index.score(&mut scorer, &Told::keys(8), Some(&[two]), &Weights::default());
    assert_eq!(scores.iter().map(|score| (score.engine, score.blocks)).collect::<Vec<_>>(), [(two, 3)]);
}

#[test]
fn a_child_that_comes_first_waits_for_its_parent() {
    let mut told = Told::new(2);
    let one = told.engine("one");
    told.store(one, 5, 4, "GPU");
    assert_eq!((told.scores(), told.index.write().orphans()), (vec![], 4));
    told.store(one, 3, 2, "GPU");
    assert_eq!(told.index.write().orphans(), 6);
    told.store(one, 1, 2, "GPU");
    assert_eq!((told.scores(), told.index.write().orphans()), (vec![(0, 8, 1.0)], 0));
    assert_eq!(told.index.write().counts().adopted, 6);
}

#[test]
fn a_parent_that_is_gone_is_still_a_parent() {
    let mut told = Told::new(2);
    let one = told.engine("one");
    told.store(one, 1, 2, "GPU");
    told.remove(one, 2, "GPU");
    told.store(one, 3, 6, "GPU");
    assert_eq!(told.scores(), [(0, 1, 0.125)]);
    told.store(one, 2, 1, "CPU");
    assert_eq!(told.scores()[0].1, 8);
}

#[test]
fn a_tier_that_is_cleared_leaves_the_others() {
    let mut told = Told::new(2);
    let one = told.engine("one");
    told.store(one, 1, 8, "GPU");
    told.store(one, 1, 3, "CPU_PINNED");
    let cleared = |medium| Event::TierCleared { medium, locality: None };
    told.tell(one, cleared(Some("gpu")));
    assert_eq!(told.scores(), [(0, 3, 3.0 * 0.8 / 8.0)]);
    told.tell(one, cleared(Some("STORAGE")));
    assert_eq!(told.scores()[0].1, 3);
    told.tell(one, cleared(None));
    assert_eq!(told.scores(), [], "a tier that is not said may be any");
}

#[test]
fn a_removal_from_a_group_of_which_nothing_is_known_changes_nothing() {
    let mut told = Told::new(2);
    let one = told.engine("one");
    told.store(one, 1, 8, "GPU");
    told.arena.clear();
    told.arena.hashes.push(34);
    let hashes = Hashes { range: 0..1, digests: None };
    told.tell(one, Event::Removed(Removed { hashes, group: Some(1), ..Removed::default() }));
    assert_eq!(told.scores(), [(0, 8, 1.0)]);
    let counts = told.index.write().counts();
    assert_eq!((counts.removed, counts.unmatched), (1, 1));
}

#[test]
fn a_block_that_was_never_there_stops_no_removal() {
    let mut told = Told::new(2);
    let one = told.engine("one");
    told.store(one, 1, 8, "GPU");
    told.remove_all(one, &[99, 8, 98, 7], "GPU");
    assert_eq!(told.scores(), [(0, 6, 0.75)]);
    assert_eq!(told.index.write().counts().unmatched, 2);
}

#[test]
fn a_block_that_is_its_own_parent_is_nobodys() {
    let mut told = Told::new(2);
    let one = told.engine("one");
    told.store(one, 1, 2, "GPU");
    told.arena.clear();
    told.arena.hashes.extend([5, 5]);
    told.arena.tokens.extend([10, 11, 10, 11]);
    let stored = Stored {
        hashes: Hashes { range: 0..2, digests: None },
        tokens: 0..4,
        block_size: 2,
        parent: Some(Parent::Number(5)),
        medium: Some("GPU"),
        ..Stored::default()
    };
    told.tell(one, Event::Stored(Box::new(stored)));
    assert_eq!(told.scores(), [(0, 2, 0.25)], "what was known stays");
    told.store(one, 3, 6, "GPU");
    assert_eq!((told.scores(), told.index.write().orphans()), (vec![(0, 8, 1.0)], 0));
}

#[test]
fn a_part_of_a_block_leaves_the_whole_ones() {
    let mut told = Told::new(2);
    let one = told.engine("one");
    // A vLLM block of 64 tokens may be cached up to 48 of them: no divisor either.
    let part = |after: Option<u64>| {
        let stored = Stored {
            hashes: Hashes { range: 0..1, digests: None },
            tokens: 0..1,
            block_size: 1,
            parent: after.map(Parent::Number),
            ..Stored::default()
        };
        Event::Stored(Box::new(stored))
    };
    told.store(one, 1, 4, "GPU");
    for after in [Some(4), None] {
        (told.arena.hashes, told.arena.tokens) = (vec![99], vec![10]);
        told.tell(one, part(after));
    }
    told.store(one, 5, 4, "GPU");
    assert_eq!(told.scores(), [(0, 8, 1.0)]);
    told.remove(one, 99, "GPU");
    assert_eq!(told.scores(), [(0, 8, 1.0)]);
    // An engine with smaller blocks, whose first prompt follows nothing that is known.
    (told.arena.hashes, told.arena.tokens) = (vec![70], vec![10]);
    told.tell(one, part(Some(69)));
    assert_eq!(told.scores(), []);
}

#[test]
fn copies_are_counted_and_clears_are_of_the_gpu_in_map_form() {
    let mut told = Told::new(2);
    let one = told.engine("one");
    told.store(one, 1, 8, "GPU");
    told.store(one, 1, 8, "GPU");
    told.store(one, 1, 3, "CPU");
    told.remove(one, 4, "GPU");
    assert_eq!(told.scores()[0].1, 8, "a second copy is left");
    told.remove(one, 4, "GPU");
    assert_eq!(told.scores()[0].1, 3);
    told.tell(one, Event::Cleared { map_form: true });
    assert_eq!(told.scores(), [(0, 3, 3.0 * 0.8 / 8.0)]);
    told.tell(one, Event::Cleared { map_form: false });
    assert_eq!((told.scores(), told.index.write().sizes()), (vec![], (0, 0)));
}

#[test]
fn an_engine_that_goes_takes_its_blocks_along() {
    let mut told = Told::new(2);
    let (one, two) = (told.engine("one"), told.engine("two"));
    told.store(one, 1, 8, "GPU");
    told.store(two, 1, 8, "GPU");
    told.index.write().remove_engine(one);
    assert_eq!(told.scores(), [(1, 8, 1.0)]);
    let again = told.engine("three");
    assert_eq!((again, told.scores().len()), (one, 1), "its number is used again, without its blocks");
}

#[test]
fn what_is_expected_counts_until_it_is_over() {
    let mut told = Told::new(2);
    let one = told.engine("one");
    told.index.write().expect(one, &Told::keys(4), 100);
    assert_eq!(told.scores(), [(0, 4, 0.5)]);
    told.store(one, 1, 2, "CPU");
    told.index.write().expire(99);
    assert_eq!(told.scores(), [(0, 4, (2.0 * 0.8 + 2.0) / 8.0)]);
    assert_eq!(told.index.holders(Told::keys(1)[0])[0].1, [FleetTier::Cpu, FleetTier::Speculative]);
    told.index.write().expire(100);
    assert_eq!(told.scores(), [(0, 2, 0.2)]);
    told.index.write().forget(one);
    assert_eq!(told.index.write().sizes(), (0, 0));
}

#[test]
fn memory_stays_under_its_bound_and_what_has_no_room_is_a_miss() {
    let mut told = Told::new(2);
    let engines: Vec<EngineId> = (0..64).map(|number| told.engine(&format!("{number}"))).collect();
    let mut first = 1;
    while told.index.write().counts().refused == 0 {
        for id in &engines {
            // Every engine its own prompts: each block has one holder, and no block is shared.
            told.arena.clear();
            told.arena.hashes.extend(first..first + 2000);
            told.arena.tokens.extend((first..first + 2000).flat_map(|token| [token as u32, id.0]));
            let stored = Stored {
                hashes: Hashes { range: 0..2000, digests: None },
                tokens: 0..4000,
                block_size: 2,
                ..Stored::default()
            };
            told.tell(*id, Event::Stored(Box::new(stored)));
            let writer = told.index.write();
            assert!(writer.bytes() <= writer.bytes_max(), "{} of {}", writer.bytes(), writer.bytes_max());
        }
        first += 2000;
    }
    let blocks = told.index.write().sizes().0;
    assert!(blocks > 500_000, "{blocks} blocks in {INDEX_BYTES_MIN} bytes");
    for id in &engines {
        told.index.write().forget(*id);
    }
    assert_eq!(told.index.write().sizes(), (0, 0));
}

#[test]
fn a_snapshot_makes_the_same_index_and_nonsense_makes_none() {
    let mut told = Told::new(2);
    let (one, two) = (told.engine("one"), told.engine("two"));
    told.store(one, 1, 8, "GPU");
    told.store(one, 1, 3, "CPU");
    told.remove(one, 8, "GPU");
    told.store(two, 1, 5, "CPU");
    let (first, second) = (mark(7), mark(9));
    told.index.write().set_mark(one, first.clone());
    told.index.write().set_mark(two, second.clone());
    let mut snapshot = told.index.write().snapshot_head().expect("a head");
    for id in [one, two] {
        snapshot.extend(told.index.write().snapshot_engine(id).expect("written").expect("an engine"));
    }
    let other = Told::new(0);
    let marks = other.index.write().restore(&snapshot).expect("taken over");
    assert_eq!(marks, [("one".to_owned(), first), ("two".to_owned(), second)]);
    assert_eq!((other.scores(), other.index.write().sizes()), (told.scores(), told.index.write().sizes()));
    assert_eq!(other.index.write().blocks_of(one), told.index.write().blocks_of(one), "the ghost, too");
    for end in 0..snapshot.len() {
        let cut = Told::new(2);
        let taken = cut.index.write().restore(&snapshot[..end]);
        assert!(taken.is_err() || taken.is_ok_and(|marks| marks.len() < 2), "cut at {end}");
    }
    for at in 0..snapshot.len() {
        let mut damaged = snapshot.clone();
        damaged[at] ^= 0x55;
        let other = Told::new(2);
        // Any answer but a panic: a flipped key is a block that nobody asks for.
        let _ = other.index.write().restore(&damaged);
        assert!(other.index.write().bytes() <= INDEX_BYTES_MIN);
    }
}

fn mark(number: u64) -> EventMark {
    EventMark { topic: "t".to_owned(), rank: Some(0), last: Position::of(number, b"payload") }
}
