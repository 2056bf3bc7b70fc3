//! What stays of sources that leave.

use super::*;
use kvcellar_events::encode::encode;
use kvcellar_events::wire::{Batch, Event, Hashes, Stored};

fn source(number: usize) -> Source {
    kvcellar_discovery::parse(&format!("endpoint=tcp://127.0.0.1:1,name=e{number},model=m")).expect("an engine")
}

fn batch(first: u64) -> Vec<u8> {
    let arena = BatchArena { hashes: (first..first + 8).collect(), tokens: (0..16).collect() };
    let hashes = Hashes { range: 0..8, digests: None };
    let stored = Stored { hashes, tokens: 0..16, block_size: 2, ..Stored::default() };
    let batch = Batch { events: vec![Event::Stored(Box::new(stored))], ..Batch::default() };
    let mut payload = Vec::new();
    encode(&batch, &arena, &mut payload);
    payload
}

/// Names of engines that the index knows.
fn names(index: &Index) -> Vec<String> {
    index.roster().engines.iter().flatten().map(|engine| engine.name.clone()).collect()
}

#[tokio::test]
async fn of_a_thousand_engines_that_left_nothing_stays() {
    let index = Arc::new(Index::new(0, 256 << 20).expect("an index"));
    let mut fleet = Fleet::new(Arc::clone(&index));
    let stream = PublisherStream { topic: String::new(), rank: None };
    let mut bytes = Vec::new();
    for _ in 0..3 {
        fleet.set((0..=1000).map(source).collect());
        let mut sinks: Vec<_> =
            (0..=1000).map(|at| fleet.sink(&source(at), &fleet.tasks[&format!("e{at}")].followed)).collect();
        for (at, sink) in sinks.iter_mut().enumerate() {
            sink.apply(&stream, 0, &batch(100 * at as u64 + 1));
        }
        assert_eq!((index.roster().engines.iter().flatten().count(), fleet.states().sources().len()), (1001, 1001));
        fleet.set(vec![source(0)]);
        assert_eq!(
            (names(&index), fleet.states().sources().into_keys().collect()),
            (vec!["e0".to_owned()], vec!["e0".to_owned()])
        );
        // What its task had begun when it was ended.
        for sink in &mut sinks[1..] {
            sink.apply(&stream, 1, &batch(7));
            sink.state(&stream, BatchCounts::default(), None, true);
            sink.forget(&stream, Why::Gap);
        }
        assert_eq!(names(&index), ["e0"]);
        let writer = index.write();
        assert_eq!(writer.sizes().0, 8, "the blocks of the one that stayed");
        bytes.push(writer.bytes());
    }
    assert_eq!(bytes[2], bytes[1], "memory does not grow with those who were there: {bytes:?}");
}

#[tokio::test]
async fn an_engine_of_a_snapshot_goes_with_its_source_before_it_was_heard() {
    let old = Arc::new(Index::new(0, 256 << 20).expect("an index"));
    let mut fleet = Fleet::new(Arc::clone(&old));
    fleet.set(vec![source(0)]);
    let stream = PublisherStream { topic: String::new(), rank: None };
    fleet.sink(&source(0), &fleet.tasks["e0"].followed).apply(&stream, 0, &batch(1));
    let mut snapshot = old.write().snapshot_head().expect("a head");
    let id = old.roster().find("e0").expect("it is known").id;
    snapshot.extend(old.write().snapshot_engine(id).expect("its part").expect("it has one"));
    let new = Arc::new(Index::new(0, 256 << 20).expect("an index"));
    let mut fleet = Fleet::new(Arc::clone(&new));
    assert_eq!(fleet.resume(&snapshot).expect("a snapshot"), 1);
    fleet.set(vec![source(0)]);
    assert_eq!((names(&new), new.write().sizes().0), (vec!["e0".to_owned()], 8));
    fleet.set(Vec::new());
    assert_eq!((names(&new), new.write().sizes().0), (Vec::new(), 0));
}
