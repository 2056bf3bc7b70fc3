//! Bytes as vLLM's own encoder makes them.

use kvcellar_events::decode::decode;
use kvcellar_events::encode::encode;
use kvcellar_events::wire::{BatchArena, Event};

fn samples() -> Vec<(String, Vec<u8>)> {
    let file: serde_json::Value = serde_json::from_str(include_str!("golden/kv_events.json")).expect("JSON");
    let bytes = |hex: &str| -> Vec<u8> {
        hex.as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).expect("ASCII"), 16).expect("hex"))
            .collect()
    };
    let samples = file["samples"].as_array().expect("samples");
    samples.iter().map(|it| (it["name"].to_string(), bytes(it["payload_hex"].as_str().expect("a string")))).collect()
}

#[test]
fn samples_come_back_byte_for_byte() {
    let mut arena = BatchArena::default();
    for (name, payload) in samples() {
        let batch = decode(&payload, &mut arena).expect("a batch");
        assert_eq!(batch.skipped, 0, "{name}");
        let mut out = Vec::new();
        encode(&batch, &arena, &mut out);
        assert_eq!(out, payload, "{name}");
    }
}

#[test]
fn samples_say_what_they_say() {
    let mut arena = BatchArena::default();
    let samples = samples();
    let batch = decode(&samples[0].1, &mut arena).expect("a batch");
    assert!((batch.at_s - 1.5).abs() < 1e-9 && batch.rank == Some(0) && batch.events.len() == 3);
    let Event::Stored(stored) = &batch.events[0] else { panic!("{:?}", batch.events[0]) };
    assert_eq!(arena.hashes[stored.hashes.range.clone()], [0x1122_3344_5566_7788]);
    assert_eq!(arena.tokens[stored.tokens.clone()], [1, 2, 3, 4]);
    assert_eq!((stored.medium, stored.locality, stored.group), (Some("CPU"), Some("LOCAL"), Some(0)));
    assert!(matches!(batch.events[2], Event::Cleared { map_form: true }));
    let batch = decode(&samples[1].1, &mut arena).expect("a batch");
    let Event::Removed(removed) = &batch.events[0] else { panic!("{:?}", batch.events[0]) };
    assert_eq!((removed.medium, batch.rank), (Some("STORAGE"), None));
    assert_eq!(arena.hashes, [0xaaaa_aaaa]);
}

/// msgpack of nested arrays, strings and numbers, as `["a",1,[2],null]`.
fn pack(value: &serde_json::Value, out: &mut Vec<u8>) {
    use serde_json::Value::{Array, Bool, Null, Number, Object, String};
    match value {
        Null => rmp::encode::write_nil(out).expect("memory"),
        Bool(it) => rmp::encode::write_bool(out, *it).expect("memory"),
        Number(it) if it.is_u64() => drop(rmp::encode::write_uint(out, it.as_u64().expect("a number"))),
        Number(it) => rmp::encode::write_f64(out, it.as_f64().expect("a number")).expect("memory"),
        String(it) => rmp::encode::write_str(out, it).expect("memory"),
        Array(items) => {
            rmp::encode::write_array_len(out, items.len() as u32).expect("memory");
            for item in items {
                pack(item, out);
            }
        }
        Object(pairs) => {
            rmp::encode::write_map_len(out, pairs.len() as u32).expect("memory");
            for (name, value) in pairs {
                rmp::encode::write_str(out, name).expect("memory");
                pack(value, out);
            }
        }
    }
}

fn packed(value: &serde_json::Value) -> Vec<u8> {
    let mut out = Vec::new();
    pack(value, &mut out);
    out
}

#[test]
fn the_array_form_of_sglang_and_of_older_vllm_is_read() {
    let payload = packed(&serde_json::json!([
        1.0,
        [
            [
                "BlockStored",
                [7, 8],
                null,
                [1, 2, 3, 4],
                2,
                null,
                "GPU",
                null,
                null,
                null,
                null,
                null,
                "x",
                "y",
                "z",
                "surplus"
            ],
            ["BlockRemoved", [7], "GPU"],
            ["AllBlocksCleared"],
            ["TierBlocksCleared", "CPU"]
        ],
        3,
        "surplus"
    ]));
    let mut arena = BatchArena::default();
    let batch = decode(&payload, &mut arena).expect("a batch");
    assert_eq!((batch.rank, batch.events.len(), batch.skipped), (Some(3), 4, 0));
    assert!(matches!(&batch.events[0], Event::Stored(it) if it.block_size == 2 && it.tokens.len() == 4));
    assert!(matches!(batch.events[2], Event::Cleared { map_form: false }));
    assert!(matches!(batch.events[3], Event::TierCleared { medium: Some("CPU"), locality: None }));
}

#[test]
fn a_tier_that_is_cleared_comes_back_as_it_went() {
    let event = serde_json::json!({"type": "TierBlocksCleared", "medium": "STORAGE", "locality": "REMOTE"});
    let mut arena = BatchArena::default();
    let payload = packed(&serde_json::json!([1.5, [event], null]));
    let batch = decode(&payload, &mut arena).expect("a batch");
    let cleared = Event::TierCleared { medium: Some("STORAGE"), locality: Some("REMOTE") };
    assert_eq!((batch.events.as_slice(), batch.skipped), (&[cleared][..], 0));
    let mut out = Vec::new();
    encode(&batch, &arena, &mut out);
    let again = decode(&out, &mut arena).expect("a batch");
    assert_eq!(again.events.len(), 1);
    assert!(matches!(again.events[0], Event::TierCleared { medium: Some("STORAGE"), locality: Some("REMOTE") }));
}

#[test]
fn what_is_not_understood_is_left_out_and_the_rest_stays() {
    let payload = packed(&serde_json::json!([
        1,
        [
            {"type": "BlockMoved", "block_hashes": [1]},
            {"type": "BlockStored", "block_hashes": ["text"], "block_size": 1, "token_ids": []},
            {"type": "BlockStored", "block_hashes": [5, 6], "block_size": 2, "token_ids": [1, 2, 3], "parent_block_hash": null},
            {"block_hashes": [9]},
            17,
            {"new_field": {"a": [1, {"b": null}]}, "type": "BlockRemoved", "block_hashes": [4], "medium": "CPU"}
        ]
    ]));
    let mut arena = BatchArena::default();
    let batch = decode(&payload, &mut arena).expect("a batch");
    assert_eq!((batch.events.len(), batch.skipped, batch.rank), (1, 5, None));
    assert_eq!((arena.hashes.as_slice(), arena.tokens.len()), (&[4][..], 0));
    for end in 0..payload.len() {
        assert!(decode(&payload[..end], &mut arena).is_err(), "cut at {end}");
    }
}
