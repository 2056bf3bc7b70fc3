//! Recordings of event streams: one JSON object a line, with hashes and counts, never tokens,
//! adapter names or extra keys.
//!
//! When a recording is played, token ids are made from each block's hash: equal blocks have equal
//! tokens again and prefixes stay prefixes, so that an index does the same work and finds the same
//! sharing; nothing leads back to a text.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::encode::encode;
use super::wire::{Batch, BatchArena, Event, Hashes, Parent, Removed, Stored};

/// Tokens of one block at most, when a recording is played: more say nothing more.
const BLOCK_TOKENS_MAX: u32 = 65_536;

/// One batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedBatch {
    /// When it came, in ms since the recording began.
    pub at_ms: u64,
    /// Which engine it is of.
    pub engine: String,
    /// Its data-parallel rank.
    pub rank: Option<u32>,
    /// What happened.
    pub events: Vec<RecordingEntry>,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RecordingEntry {
    /// Blocks were stored.
    Stored {
        /// Their hashes.
        hashes: Vec<u64>,
        /// The block before.
        parent: Option<u64>,
        /// Tokens of a block; `None`: the event had no tokens.
        block_size: Option<u32>,
        /// Where.
        medium: Option<String>,
        /// `LOCAL` or `REMOTE`.
        locality: Option<String>,
        /// The group.
        group: Option<u32>,
        /// Its kind of attention.
        kind: Option<String>,
        /// Its window.
        window: Option<u32>,
        /// A hash of the adapter's name.
        lora: Option<u64>,
    },
    /// Blocks were removed.
    Removed {
        /// Their hashes.
        hashes: Vec<u64>,
        /// Where from.
        medium: Option<String>,
        /// `LOCAL` or `REMOTE`.
        locality: Option<String>,
        /// The group.
        group: Option<u32>,
    },
    /// Everything went.
    Cleared,
    /// Everything in one tier went.
    TierCleared {
        /// Where from.
        medium: Option<String>,
        /// `LOCAL` or `REMOTE`.
        locality: Option<String>,
    },
    /// What was forgotten by the recorder: batches were lost, or the engine has restarted.
    Forgotten,
}

impl RecordedBatch {
    /// A batch as it is recorded.
    pub fn of(at_ms: u64, engine: &str, batch: &Batch<'_>, arena: &BatchArena) -> Self {
        let text = |value: Option<&str>| value.map(str::to_owned);
        let entry = |event: &Event<'_>| match event {
            Event::Stored(it) => RecordingEntry::Stored {
                hashes: arena.hashes[it.hashes.range.clone()].to_vec(),
                parent: it.parent.map(|parent| parent.name()),
                block_size: (!it.tokens.is_empty()).then_some(it.block_size),
                medium: text(it.medium),
                locality: text(it.locality),
                group: it.group,
                kind: text(it.kind),
                window: it.window,
                lora: it.lora_name.map(|name| xxh3_64(name.as_bytes())),
            },
            Event::Removed(it) => RecordingEntry::Removed {
                hashes: arena.hashes[it.hashes.range.clone()].to_vec(),
                medium: text(it.medium),
                locality: text(it.locality),
                group: it.group,
            },
            Event::Cleared { .. } => RecordingEntry::Cleared,
            Event::TierCleared { medium, locality } => {
                RecordingEntry::TierCleared { medium: text(*medium), locality: text(*locality) }
            }
        };
        Self { at_ms, engine: engine.to_owned(), rank: batch.rank, events: batch.events.iter().map(entry).collect() }
    }

    /// Bytes to publish.
    pub fn payload(&self, at_s: f64) -> Vec<u8> {
        let mut arena = BatchArena::default();
        let adapters: Vec<Option<String>> = self
            .events
            .iter()
            .map(|entry| match entry {
                RecordingEntry::Stored { lora, .. } => lora.map(|lora| format!("{lora:016x}")),
                _ => None,
            })
            .collect();
        let events = self.events.iter().zip(&adapters).filter_map(|(entry, adapter)| {
            let start = arena.hashes.len();
            Some(match entry {
                RecordingEntry::Stored {
                    hashes, parent, block_size, medium, locality, group, kind, window, ..
                } => {
                    let tokens = arena.tokens.len();
                    let size = block_size.unwrap_or(0).min(BLOCK_TOKENS_MAX);
                    arena.hashes.extend_from_slice(hashes);
                    for hash in hashes {
                        arena.tokens.extend((0..size).map(|at| made_up(*hash, at)));
                    }
                    Event::Stored(Box::new(Stored {
                        hashes: Hashes { range: start..arena.hashes.len(), digests: None },
                        parent: parent.map(Parent::Number),
                        tokens: tokens..arena.tokens.len(),
                        block_size: size,
                        medium: medium.as_deref(),
                        locality: locality.as_deref(),
                        group: *group,
                        kind: kind.as_deref(),
                        window: *window,
                        lora_name: adapter.as_deref(),
                        ..Stored::default()
                    }))
                }
                RecordingEntry::Removed { hashes, medium, locality, group } => {
                    arena.hashes.extend_from_slice(hashes);
                    Event::Removed(Removed {
                        hashes: Hashes { range: start..arena.hashes.len(), digests: None },
                        medium: medium.as_deref(),
                        group: *group,
                        locality: locality.as_deref(),
                        ownership: None,
                    })
                }
                RecordingEntry::Cleared => Event::Cleared { map_form: true },
                RecordingEntry::TierCleared { medium, locality } => {
                    Event::TierCleared { medium: medium.as_deref(), locality: locality.as_deref() }
                }
                RecordingEntry::Forgotten => return None,
            })
        });
        let events = events.collect();
        let mut out = Vec::new();
        encode(&Batch { at_s, rank: self.rank, events, skipped: 0 }, &arena, &mut out);
        out
    }
}

/// A token of a block whose real ones are not known.
fn made_up(hash: u64, at: u32) -> u32 {
    xxh3_64_with_seed(&hash.to_le_bytes(), at.into()) as u32 & 0x1_ffff
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::decode;

    #[test]
    fn a_recording_holds_no_token_and_plays_as_the_same_blocks() {
        let arena = BatchArena { hashes: vec![11, 12, 13], tokens: vec![987_654, 987_655, 987_656, 987_657] };
        let stored = Stored {
            hashes: Hashes { range: 0..2, digests: None },
            tokens: 0..4,
            block_size: 2,
            medium: Some("CPU"),
            lora_name: Some("secret-adapter"),
            ..Stored::default()
        };
        let removed = Removed { hashes: Hashes { range: 2..3, digests: None }, ..Removed::default() };
        let events = vec![Event::Stored(Box::new(stored)), Event::Removed(removed)];
        let batch = Batch { at_s: 1.0, rank: Some(1), events, skipped: 0 };
        let text = serde_json::to_string(&RecordedBatch::of(5, "a", &batch, &arena)).expect("JSON");
        assert!(!text.contains("98765") && !text.contains("secret"), "{text}");
        let line: RecordedBatch = serde_json::from_str(&text).expect("a line");
        let payload = line.payload(2.0);
        let mut played = BatchArena::default();
        let again = decode(&payload, &mut played).expect("a batch");
        assert_eq!((again.events.len(), again.rank, &played.hashes), (2, Some(1), &arena.hashes));
        assert_eq!(played.tokens.len(), 4);
    }
}
