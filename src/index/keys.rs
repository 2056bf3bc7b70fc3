//! Request keys: what an index block is called, from the tokens of a prompt alone.
//!
//! A chain: the root names the model (or the LoRA adapter in its place), and every block's key is
//! the xxh3 hash of its tokens, seeded by the key before it. What else vLLM puts into a block's
//! hash (cache salt, multimodal inputs, prompt embeddings) goes in as one digest a block. Events
//! and queries meet here: both ways to a digest live in this file.

use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

use kvcellar_events::msgpack::{Cursor, Malformed};

/// The smallest key: lower numbers mark empty cells of the table.
pub const KEY_MIN: u64 = 2;

/// No extra keys.
pub const PLAIN: u64 = 0;

/// The key before the first block of a prompt.
pub fn root(model: &str, lora: Option<&str>) -> u64 {
    match lora {
        // Marked, so that an adapter is never taken for a model of the same name.
        Some(name) => xxh3_64_with_seed(name.as_bytes(), 1).max(KEY_MIN),
        None => xxh3_64(model.as_bytes()).max(KEY_MIN),
    }
}

/// The key of a block with these tokens after `parent`. `extra`: digest of its extra keys, or
/// [`PLAIN`].
#[inline]
pub fn next(parent: u64, tokens: &[u32], extra: u64) -> u64 {
    let seed = if extra == PLAIN { parent } else { xxh3_64_with_seed(&extra.to_le_bytes(), parent) };
    // In memory order, which is little-endian on every machine this is built for.
    xxh3_64_with_seed(bytemuck::cast_slice(tokens), seed).max(KEY_MIN)
}

/// A multimodal input in a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Multimodal {
    /// vLLM's identifier (the hash of the content).
    pub hash: String,
    /// Position of its first placeholder token.
    pub offset: u64,
    /// Placeholder tokens.
    pub length: u64,
}

/// What enters a prompt's keys beside its tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extras {
    /// The cache salt.
    pub cache_salt: Option<String>,
    /// Multimodal inputs, by offset.
    pub multimodal: Vec<Multimodal>,
}

impl Extras {
    /// Nothing but tokens.
    pub fn is_plain(&self) -> bool {
        self.cache_salt.is_none() && self.multimodal.is_empty()
    }

    /// The digest of the block of tokens `start..end`.
    pub fn digest(&self, start: u64, end: u64) -> u64 {
        let mut digest = Digest::default();
        for input in self.multimodal.iter().filter(|input| input.offset < end && start < input.offset + input.length) {
            digest.multimodal(input.hash.as_bytes(), input.offset.cast_signed() - start.cast_signed());
        }
        if let Some(salt) = self.cache_salt.as_ref().filter(|salt| start == 0 && !salt.is_empty()) {
            digest.text(salt.as_bytes());
        }
        digest.finish()
    }
}

/// Keys of all full blocks of a prompt, appended to `keys`.
pub fn of_prompt(root: u64, tokens: &[u32], block: usize, extras: &Extras, keys: &mut Vec<u64>) {
    let mut parent = root;
    let plain = extras.is_plain();
    keys.reserve(tokens.len() / block);
    for (number, tokens) in tokens.chunks_exact(block).enumerate() {
        let start = (number * block) as u64;
        let extra = if plain { PLAIN } else { extras.digest(start, start + block as u64) };
        parent = next(parent, tokens, extra);
        keys.push(parent);
    }
}

/// Digests of a `BlockStored` event's extra keys, one a block, appended to `digests`.
///
/// Entries are vLLM's: the adapter's name first where there is one (it is in the root already),
/// `(identifier, offset)` for multimodal inputs, the cache salt as a string, prompt embeddings as
/// bytes; each may also come tagged, as in vLLM's own hash: `("mm", identifier, offset)`.
///
/// # Errors
/// [`Malformed`].
pub fn of_event(extra_keys: &[u8], lora: Option<&str>, digests: &mut Vec<u64>) -> Result<(), Malformed> {
    let mut cursor = Cursor::new(extra_keys);
    for _ in 0..cursor.array()? {
        if cursor.nil() {
            digests.push(PLAIN);
            continue;
        }
        let mut digest = Digest::default();
        let mut adapter = lora;
        for _ in 0..cursor.array()? {
            digest.item(cursor.skip()?, &mut adapter)?;
        }
        digests.push(digest.finish());
    }
    Ok(())
}

/// Hashes the extra keys of one block, in their order.
#[derive(Default)]
struct Digest {
    hash: Option<Box<Xxh3>>,
}

impl Digest {
    fn part(&mut self, kind: u8, bytes: &[u8], offset: i64) {
        let hash = self.hash.get_or_insert_default();
        hash.update(&[kind]);
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
        hash.update(&offset.to_le_bytes());
    }

    fn multimodal(&mut self, hash: &[u8], offset: i64) {
        self.part(b'm', hash, offset);
    }

    fn text(&mut self, text: &[u8]) {
        self.part(b't', text, 0);
    }

    /// One entry, as msgpack. `adapter`: the LoRA name that may still come, untagged.
    fn item(&mut self, raw: &[u8], adapter: &mut Option<&str>) -> Result<(), Malformed> {
        if let Ok(text) = Cursor::new(raw).text() {
            if adapter.take_if(|name| *name == text).is_none() {
                self.text(text.as_bytes());
            }
            return Ok(());
        }
        let mut cursor = Cursor::new(raw);
        let Ok(len) = cursor.array() else {
            self.part(b'd', raw, 0);
            return Ok(());
        };
        let tag = (len > 0).then(|| cursor.text()).transpose()?;
        match (tag, len) {
            (Some("lora"), 3) => *adapter = None,
            (Some("cache_salt"), 2) => self.text(cursor.text()?.as_bytes()),
            (Some("mm"), 3) => {
                let hash = cursor.text()?;
                self.multimodal(hash.as_bytes(), cursor.integer()?.cast_signed());
            }
            (Some("prompt_embeds"), 2) => self.part(b'd', cursor.skip()?, 0),
            (Some(hash), 2) => self.multimodal(hash.as_bytes(), cursor.integer()?.cast_signed()),
            _ => self.part(b'd', raw, 0),
        }
        Ok(())
    }

    fn finish(self) -> u64 {
        self.hash.map_or(PLAIN, |hash| hash.digest().max(PLAIN + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rmp::encode::{write_array_len, write_nil, write_sint, write_str};

    #[test]
    fn keys_depend_on_everything_before_them() {
        let extras = Extras::default();
        let keys = |model: &str, tokens: &[u32]| {
            let mut keys = Vec::new();
            of_prompt(root(model, None), tokens, 4, &extras, &mut keys);
            keys
        };
        let tokens: Vec<u32> = (0..11).collect();
        let all = keys("m", &tokens);
        assert_eq!((all.len(), &keys("m", &tokens[..8])[..]), (2, &all[..]));
        assert_ne!(keys("n", &tokens)[1], all[1]);
        assert_ne!(root("m", Some("m")), root("m", None));
        let mut other = tokens.clone();
        other[0] = 99;
        assert_ne!(keys("m", &other)[1], all[1]);
    }

    /// Extra keys of two blocks: the first as `items`, the second none.
    fn event(items: &[&[(&str, Option<i64>)]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_array_len(&mut bytes, 2).expect("memory");
        write_array_len(&mut bytes, items.len() as u32).expect("memory");
        for item in items {
            let bare = item.len() == 1 && item[0].1.is_none();
            if !bare {
                let len = item.iter().map(|(_, number)| 1 + u32::from(number.is_some())).sum();
                write_array_len(&mut bytes, len).expect("memory");
            }
            for (text, number) in *item {
                write_str(&mut bytes, text).expect("memory");
                if let Some(number) = number {
                    write_sint(&mut bytes, *number).expect("memory");
                }
            }
        }
        write_nil(&mut bytes).expect("memory");
        bytes
    }

    fn digests(items: &[&[(&str, Option<i64>)]], lora: Option<&str>) -> Vec<u64> {
        let mut found = Vec::new();
        of_event(&event(items), lora, &mut found).expect("well formed");
        found
    }

    #[test]
    fn events_and_prompts_meet_tagged_or_not() {
        let image = Multimodal { hash: "cafe".to_owned(), offset: 12, length: 8 };
        let extras = Extras { cache_salt: Some("salt".to_owned()), multimodal: vec![image] };
        let wanted = extras.digest(0, 16);
        let plain = digests(&[&[("cafe", Some(12))], &[("salt", None)]], None);
        assert_eq!(plain, [wanted, PLAIN]);
        let tagged = digests(&[&[("mm", None), ("cafe", Some(12))], &[("cache_salt", None), ("salt", None)]], None);
        assert_eq!(tagged, plain);
        let adapted = digests(&[&[("ada", None)], &[("cafe", Some(12))], &[("salt", None)]], Some("ada"));
        assert_eq!(adapted, plain, "the adapter is in the root, not here");
        assert_ne!(digests(&[&[("ada", None)], &[("cafe", Some(12))], &[("salt", None)]], None), plain);
        // The next block holds the rest of the image, which began four tokens before it, and no
        // salt.
        assert_eq!(digests(&[&[("cafe", Some(-4))]], None)[0], extras.digest(16, 32));
        assert_eq!(extras.digest(32, 48), PLAIN);
    }

    #[test]
    fn a_salt_that_is_the_adapters_name_is_still_a_salt() {
        let salted = Extras { cache_salt: Some("ada".to_owned()), ..Extras::default() }.digest(0, 16);
        assert_eq!(digests(&[&[("ada", None)], &[("ada", None)]], Some("ada"))[0], salted);
    }
}
