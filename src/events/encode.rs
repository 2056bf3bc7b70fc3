//! Batches to bytes, in vLLM's map form: byte for byte what msgspec makes of vLLM's own classes.

use rmp::encode;

use super::wire::{Batch, BatchArena, Event, Hashes, Parent, Removed, Stored};

/// Appends a batch to `out`.
pub fn encode(batch: &Batch<'_>, arena: &BatchArena, out: &mut Vec<u8>) {
    let mut writer = MsgpackWriter { out, arena };
    writer.array(3);
    writer.float(batch.at_s);
    writer.array(batch.events.len());
    for event in &batch.events {
        match event {
            Event::Stored(stored) => writer.stored(stored),
            Event::Removed(removed) => writer.removed(removed),
            Event::Cleared { .. } => {
                writer.map(1);
                writer.field("type", "AllBlocksCleared");
            }
            Event::TierCleared { medium, locality } => {
                writer.map(2 + usize::from(locality.is_some()));
                writer.field("type", "TierBlocksCleared");
                writer.text_or_nil("medium", *medium);
                writer.optional("locality", *locality);
            }
        }
    }
    match batch.rank {
        Some(rank) => writer.number(rank.into()),
        None => writer.nil(),
    }
}

/// Writing to memory cannot fail, which is why results are dropped here and nowhere else.
struct MsgpackWriter<'w> {
    out: &'w mut Vec<u8>,
    arena: &'w BatchArena,
}

impl MsgpackWriter<'_> {
    fn array(&mut self, len: usize) {
        drop(encode::write_array_len(self.out, len as u32));
    }

    fn map(&mut self, len: usize) {
        drop(encode::write_map_len(self.out, len as u32));
    }

    fn float(&mut self, value: f64) {
        drop(encode::write_f64(self.out, value));
    }

    fn number(&mut self, value: u64) {
        drop(encode::write_uint(self.out, value));
    }

    fn nil(&mut self) {
        drop(encode::write_nil(self.out));
    }

    fn text(&mut self, value: &str) {
        drop(encode::write_str(self.out, value));
    }

    fn bytes(&mut self, value: &[u8]) {
        drop(encode::write_bin(self.out, value));
    }

    fn field(&mut self, name: &str, value: &str) {
        self.text(name);
        self.text(value);
    }

    fn text_or_nil(&mut self, name: &str, value: Option<&str>) {
        self.text(name);
        match value {
            Some(value) => self.text(value),
            None => self.nil(),
        }
    }

    fn optional(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.field(name, value);
        }
    }

    fn optional_number(&mut self, name: &str, value: Option<u32>) {
        if let Some(value) = value {
            self.text(name);
            self.number(value.into());
        }
    }

    fn hashes(&mut self, hashes: &Hashes<'_>) {
        self.text("block_hashes");
        self.array(hashes.range.len());
        let arena = self.arena;
        match &hashes.digests {
            Some(digests) => digests.iter().for_each(|digest| self.bytes(digest)),
            None => arena.hashes[hashes.range.clone()].iter().for_each(|number| self.number(*number)),
        }
    }

    fn stored(&mut self, event: &Stored<'_>) {
        let optional = [
            event.extra_keys.is_some(),
            event.group.is_some(),
            event.kind.is_some(),
            event.window.is_some(),
            event.locality.is_some(),
            event.ownership.is_some(),
            event.session.is_some(),
        ];
        self.map(8 + optional.iter().filter(|there| **there).count());
        self.field("type", "BlockStored");
        self.hashes(&event.hashes);
        self.text("parent_block_hash");
        match event.parent {
            None => self.nil(),
            Some(Parent::Number(number)) => self.number(number),
            Some(Parent::Digest(digest)) => self.bytes(digest),
        }
        self.text("token_ids");
        self.array(event.tokens.len());
        let arena = self.arena;
        arena.tokens[event.tokens.clone()].iter().for_each(|token| self.number((*token).into()));
        self.text("block_size");
        self.number(event.block_size.into());
        self.text("lora_id");
        match event.lora_id {
            Some(id) => self.number(id),
            None => self.nil(),
        }
        self.text_or_nil("medium", event.medium);
        self.text_or_nil("lora_name", event.lora_name);
        if let Some(keys) = event.extra_keys {
            self.text("extra_keys");
            self.out.extend_from_slice(keys);
        }
        self.optional_number("group_idx", event.group);
        self.optional("kv_cache_spec_kind", event.kind);
        self.optional_number("kv_cache_spec_sliding_window", event.window);
        self.optional("locality", event.locality);
        self.optional("ownership", event.ownership);
        self.optional("session_id", event.session);
    }

    fn removed(&mut self, event: &Removed<'_>) {
        let optional = [event.group.is_some(), event.locality.is_some(), event.ownership.is_some()];
        self.map(3 + optional.iter().filter(|there| **there).count());
        self.field("type", "BlockRemoved");
        self.hashes(&event.hashes);
        self.text_or_nil("medium", event.medium);
        self.optional_number("group_idx", event.group);
        self.optional("locality", event.locality);
        self.optional("ownership", event.ownership);
    }
}
