//! Any bytes as a batch of KVEvents: no panic, no memory beyond what the bytes pay for, and what
//! was read and written reads the same again.
#![no_main]

use kvcellar_events::decode;
use kvcellar_events::encode::encode;
use kvcellar_events::wire::BatchArena;
use kvcellar_index::Index;
use kvcellar_index::limits::INDEX_BYTES_MIN;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|payload: &[u8]| {
    let mut arena = BatchArena::default();
    let rank = decode::rank(payload);
    let Ok(batch) = decode::decode(payload, &mut arena) else { return };
    assert!(arena.hashes.len() + arena.tokens.len() <= payload.len());
    assert!(rank.is_ok());
    let mut out = Vec::new();
    encode(&batch, &arena, &mut out);
    let mut second = BatchArena::default();
    let again = decode::decode(&out, &mut second).expect("our own encoding");
    assert_eq!((again.events.len(), again.skipped), (batch.events.len(), 0));
    let mut third = Vec::new();
    encode(&again, &second, &mut third);
    assert_eq!(third, out);
    let index = Index::new(4, INDEX_BYTES_MIN).expect("an index");
    let mut writer = index.write();
    let id = writer.engine("a", "m").expect("room");
    writer.apply(id, &batch, &arena);
    assert!(writer.bytes() <= writer.bytes_max());
    writer.forget(id);
    assert_eq!(writer.sizes(), (0, 0));
});
