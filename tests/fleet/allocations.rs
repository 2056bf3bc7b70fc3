//! A question takes no memory for each of its blocks.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use kvcellar_events::wire::{Batch, BatchArena, Event, Hashes, Stored};
use kvcellar_index::Index;
use kvcellar_index::keys::{self, Extras};
use kvcellar_index::limits::INDEX_BYTES_MIN;
use kvcellar_index::query::PrefixScorer;
use kvcellar_index::tiers::Weights;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is handed on to the system's allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that ends has no counter any more and counts nothing.
        let _ = COUNT.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_long_prompt_allocates_no_more_than_a_short_one() {
    let index = Index::new(2, INDEX_BYTES_MIN).expect("an index");
    let tokens: Vec<u32> = (0..8000).collect();
    let mut arena = BatchArena::default();
    for number in 0..32_usize {
        let id = index.write().engine(&format!("{number}"), "m").expect("room");
        let blocks = 4000 - number * 100;
        arena.clear();
        arena.hashes.extend((0..blocks as u64).map(|hash| hash + 1));
        arena.tokens.extend_from_slice(&tokens[..2 * blocks]);
        let hashes = Hashes { range: 0..blocks, digests: None };
        let stored = Stored { hashes, tokens: 0..2 * blocks, block_size: 2, ..Stored::default() };
        let batch = Batch { events: vec![Event::Stored(Box::new(stored))], ..Batch::default() };
        index.write().apply(id, &batch, &arena);
    }
    let (mut scorer, mut keys) = (PrefixScorer::default(), Vec::new());
    let mut count = |blocks: usize| {
        keys.clear();
        let before = COUNT.get();
        keys::of_prompt(keys::root("m", None), &tokens[..2 * blocks], 2, &Extras::default(), &mut keys);
        let found = index.score(&mut scorer, &keys, None, &Weights::default()).len();
        assert_eq!(found, 32);
        COUNT.get() - before
    };
    count(4000);
    let (long, short) = (count(4000), count(500));
    assert!(long <= short && long < 10, "{long} allocations for 4000 blocks, {short} for 500");
}
