//! Bytes to batches: vLLM's map form, the array form of `SGLang` and of vLLM before 0.25.
//!
//! Tolerant where publishers differ: fields and elements that are not known are passed over, an
//! event that is not understood is left out and counted, and the others of its batch stay. What is
//! not msgpack, or no batch at all, is refused as a whole.

use super::msgpack::{Cursor, Malformed};
use super::wire::{Batch, BatchArena, Event, Hashes, Parent, Removed, Stored};
use crate::limits;
use kvcellar_block::error::{Error, Result};

/// Reads one payload. `arena` is cleared first; the batch refers to it.
///
/// # Errors
/// [`Error::DataLost`] when it is no batch.
pub fn decode<'a>(payload: &'a [u8], arena: &mut BatchArena) -> Result<Batch<'a>> {
    let refuse = |why: &str| Error::lost("event batch", why);
    arena.clear();
    if payload.len() > limits::EVENT_PAYLOAD_BYTES_MAX {
        return Err(refuse(&format!("{} bytes, at most {}", payload.len(), limits::EVENT_PAYLOAD_BYTES_MAX)));
    }
    batch(payload, arena).map_err(|error| refuse(&error.to_string()))
}

/// The data-parallel rank of a batch, without reading its events where that is possible.
///
/// # Errors
/// [`Error::DataLost`] when it is no batch.
pub fn rank(payload: &[u8]) -> Result<Option<u32>> {
    // As every publisher writes it: three fields, of which the last is nil or a small number, in
    // one byte.
    match payload {
        [0x93, .., 0xc0] => return Ok(None),
        [0x93, .., rank @ 0..=0x7f] => return Ok(Some((*rank).into())),
        _ => {}
    }
    let read = || {
        let mut cursor = Cursor::new(payload);
        let fields = cursor.array()?;
        cursor.skip()?;
        cursor.skip()?;
        if fields > 2 && !cursor.nil() { cursor.small().map(Some) } else { Ok(None) }
    };
    read().map_err(|error: Malformed| Error::lost("event batch", error.to_string()))
}

fn batch<'a>(payload: &'a [u8], arena: &mut BatchArena) -> std::result::Result<Batch<'a>, Malformed> {
    let mut cursor = Cursor::new(payload);
    let fields = cursor.array()?;
    if fields < 2 {
        return Err(Malformed::Type);
    }
    let mut batch = Batch { at_s: cursor.float()?, ..Batch::default() };
    let count = cursor.array()?;
    // Most batches hold a few events; a hostile one that claims millions pays with its own bytes.
    batch.events.reserve(count.min(64));
    for _ in 0..count {
        let (start, hashes, tokens) = (cursor, arena.hashes.len(), arena.tokens.len());
        if let Ok(event) = event(&mut cursor, arena) {
            batch.events.push(event);
        } else {
            arena.hashes.truncate(hashes);
            arena.tokens.truncate(tokens);
            cursor = start;
            cursor.skip()?;
            batch.skipped += 1;
        }
    }
    if fields > 2 && !cursor.nil() {
        batch.rank = Some(cursor.small()?);
    }
    for _ in 3..fields {
        cursor.skip()?;
    }
    if cursor.is_empty() { Ok(batch) } else { Err(Malformed::Surplus) }
}

fn event<'a>(cursor: &mut Cursor<'a>, arena: &mut BatchArena) -> std::result::Result<Event<'a>, Malformed> {
    let mut fields = Fields::default();
    let map_form = cursor.at_map();
    let kind = if map_form { fields.read_map(cursor, arena)? } else { fields.read_array(cursor, arena)? };
    let hashes = fields.hashes.unwrap_or_default();
    match kind {
        EventKind::Cleared => Ok(Event::Cleared { map_form }),
        EventKind::TierCleared => {
            Ok(Event::TierCleared { medium: fields.stored.medium, locality: fields.stored.locality })
        }
        EventKind::Removed => Ok(Event::Removed(Removed {
            hashes,
            medium: fields.stored.medium,
            group: fields.stored.group,
            locality: fields.stored.locality,
            ownership: fields.stored.ownership,
        })),
        EventKind::Stored => {
            let stored = Stored { hashes, ..fields.stored };
            // Tokens that do not cover the blocks would put them under a wrong key.
            let covered = stored.hashes.range.len().checked_mul(stored.block_size as usize);
            if stored.tokens.is_empty() || covered == Some(stored.tokens.len()) {
                Ok(Event::Stored(Box::new(stored)))
            } else {
                Err(Malformed::Type)
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum EventKind {
    Stored,
    Removed,
    Cleared,
    TierCleared,
}

impl EventKind {
    fn named(name: &str) -> std::result::Result<Self, Malformed> {
        match name {
            "BlockStored" => Ok(Self::Stored),
            "BlockRemoved" => Ok(Self::Removed),
            "AllBlocksCleared" => Ok(Self::Cleared),
            "TierBlocksCleared" => Ok(Self::TierCleared),
            _ => Err(Malformed::Type),
        }
    }
}

const STORED: [&str; 14] = [
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
    "locality",
    "ownership",
    "session_id",
];
const TIER_CLEARED: [&str; 1] = ["medium"];
const REMOVED: [&str; 5] = ["block_hashes", "medium", "group_idx", "locality", "ownership"];

/// Fields of any event, as far as they came.
#[derive(Default)]
struct Fields<'a> {
    hashes: Option<Hashes<'a>>,
    stored: Stored<'a>,
}

impl<'a> Fields<'a> {
    fn read_map(
        &mut self,
        cursor: &mut Cursor<'a>,
        arena: &mut BatchArena,
    ) -> std::result::Result<EventKind, Malformed> {
        let mut kind = None;
        for _ in 0..cursor.map()? {
            match cursor.text()? {
                "type" => kind = Some(EventKind::named(cursor.text()?)?),
                name => self.read_field(name, cursor, arena)?,
            }
        }
        kind.ok_or(Malformed::Type)
    }

    fn read_array(
        &mut self,
        cursor: &mut Cursor<'a>,
        arena: &mut BatchArena,
    ) -> std::result::Result<EventKind, Malformed> {
        let count = cursor.array()?.checked_sub(1).ok_or(Malformed::Type)?;
        let kind = EventKind::named(cursor.text()?)?;
        let names: &[&str] = match kind {
            EventKind::Stored => &STORED,
            EventKind::Removed => &REMOVED,
            EventKind::Cleared => &[],
            EventKind::TierCleared => &TIER_CLEARED,
        };
        for position in 0..count {
            match names.get(position) {
                Some(name) => self.read_field(name, cursor, arena)?,
                None => cursor.skip().map(drop)?,
            }
        }
        Ok(kind)
    }

    fn read_field(
        &mut self,
        name: &str,
        cursor: &mut Cursor<'a>,
        arena: &mut BatchArena,
    ) -> std::result::Result<(), Malformed> {
        if name != "block_hashes" && cursor.nil() {
            return Ok(());
        }
        let stored = &mut self.stored;
        match name {
            "block_hashes" => self.hashes = Some(hashes(cursor, arena)?),
            "parent_block_hash" => stored.parent = Some(parent(cursor)?),
            "token_ids" => {
                let start = arena.tokens.len();
                cursor.smalls(&mut arena.tokens)?;
                stored.tokens = start..arena.tokens.len();
            }
            "block_size" => stored.block_size = cursor.small()?,
            "lora_id" => stored.lora_id = Some(cursor.integer()?),
            "medium" => stored.medium = Some(cursor.text()?),
            "lora_name" => stored.lora_name = Some(cursor.text()?),
            "extra_keys" => stored.extra_keys = Some(cursor.skip()?),
            "group_idx" => stored.group = Some(cursor.small()?),
            "kv_cache_spec_kind" => stored.kind = Some(cursor.text()?),
            "kv_cache_spec_sliding_window" => stored.window = Some(cursor.small()?),
            "locality" => stored.locality = Some(cursor.text()?),
            "ownership" => stored.ownership = Some(cursor.text()?),
            "session_id" => stored.session = Some(cursor.text()?),
            _ => drop(cursor.skip()?),
        }
        Ok(())
    }
}

fn parent<'a>(cursor: &mut Cursor<'a>) -> std::result::Result<Parent<'a>, Malformed> {
    let start = *cursor;
    if let Ok(number) = cursor.integer() {
        return Ok(Parent::Number(number));
    }
    *cursor = start;
    cursor.bytes().map(Parent::Digest)
}

fn hashes<'a>(cursor: &mut Cursor<'a>, arena: &mut BatchArena) -> std::result::Result<Hashes<'a>, Malformed> {
    let start = arena.hashes.len();
    let count = cursor.array()?;
    arena.hashes.reserve(count);
    let mut digests: Option<Vec<&'a [u8]>> = None;
    for _ in 0..count {
        let parent = parent(cursor)?;
        arena.hashes.push(parent.name());
        if let Parent::Digest(digest) = parent {
            digests.get_or_insert_default().push(digest);
        }
    }
    // One event, one form: a mixture could not be told apart again.
    if digests.as_ref().is_some_and(|digests| digests.len() != count) {
        return Err(Malformed::Type);
    }
    Ok(Hashes { range: start..arena.hashes.len(), digests })
}
