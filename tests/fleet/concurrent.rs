//! Readers beside a writer: what never changes is always found, and nobody holds what nobody ever
//! had.

use std::sync::atomic::{AtomicBool, Ordering};

use kvcellar_events::wire::{Batch, BatchArena, Event, Hashes, Removed, Stored};
use kvcellar_index::Index;
use kvcellar_index::keys::{self, Extras};
use kvcellar_index::limits::INDEX_BYTES_MIN;
use kvcellar_index::query::PrefixScorer;
use kvcellar_index::roster::EngineId;
use kvcellar_index::tiers::Weights;

const BLOCKS: usize = 200;

fn store(index: &Index, id: EngineId, tokens: &[u32], arena: &mut BatchArena) {
    arena.clear();
    arena.hashes.extend((0..BLOCKS as u64).map(|number| number + 1));
    arena.tokens.extend_from_slice(tokens);
    let hashes = Hashes { range: 0..BLOCKS, digests: None };
    let stored = Stored { hashes, tokens: 0..tokens.len(), block_size: 2, ..Stored::default() };
    let batch = Batch { events: vec![Event::Stored(Box::new(stored))], ..Batch::default() };
    index.write().apply(id, &batch, arena);
}

fn remove(index: &Index, id: EngineId, arena: &mut BatchArena) {
    arena.clear();
    arena.hashes.extend((BLOCKS as u64 / 2..BLOCKS as u64).map(|number| number + 1));
    let hashes = Hashes { range: 0..BLOCKS / 2, digests: None };
    let batch = Batch { events: vec![Event::Removed(Removed { hashes, ..Removed::default() })], ..Batch::default() };
    index.write().apply(id, &batch, arena);
}

#[test]
fn answers_stay_true_while_the_fleet_changes() {
    let index = Index::new(2, INDEX_BYTES_MIN).expect("an index");
    let tokens: Vec<u32> = (0..2 * BLOCKS as u32).collect();
    let mut keys = Vec::new();
    keys::of_prompt(keys::root("m", None), &tokens, 2, &Extras::default(), &mut keys);
    let engines: Vec<EngineId> =
        (0..40).map(|number| index.write().engine(&format!("{number}"), "m").expect("room")).collect();
    let mut arena = BatchArena::default();
    for id in &engines {
        store(&index, *id, &tokens, &mut arena);
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut scorer, mut asked) = (PrefixScorer::default(), 0_u32);
            while !done.load(Ordering::Relaxed) || asked == 0 {
                let scores = index.score(&mut scorer, &keys, None, &Weights::default());
                assert_eq!(scores.len(), engines.len(), "everybody keeps the first half");
                for score in scores {
                    let steady = score.engine.0 < 20;
                    assert!(score.blocks as usize >= if steady { BLOCKS } else { BLOCKS / 2 }, "{score:?}");
                }
                asked += 1;
            }
            asked
        });
        for _ in 0..300 {
            for id in &engines[20..] {
                remove(&index, *id, &mut arena);
                store(&index, *id, &tokens, &mut arena);
            }
        }
        done.store(true, Ordering::Relaxed);
        assert!(reader.join().expect("no panic") > 0);
    });
}
