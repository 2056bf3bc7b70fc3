//! Ids of words: of a text that nobody has sent before, most words were in others.
//!
//! Two generations of a bounded map: what is used lives on in the young one, and when that is full
//! the old one is dropped. Locked once a text, not once a word.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{PoisonError, RwLock};

use xxhash_rust::xxh3::xxh3_128;

/// Words of a generation. A language's common words are tens of thousands.
const WORDS_MAX: usize = 1 << 17;

/// Longer pieces are no words and not remembered.
const WORD_BYTES_MAX: usize = 48;

/// Keys are hashes already.
#[derive(Debug, Default)]
struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {}

    fn write_u128(&mut self, key: u128) {
        self.0 = key as u64;
    }
}

#[derive(Debug, Default)]
struct WordGeneration {
    places: HashMap<u128, (u32, u32), BuildHasherDefault<Same>>,
    ids: Vec<u32>,
}

impl WordGeneration {
    fn get(&self, name: u128) -> Option<&[u32]> {
        let (from, to) = self.places.get(&name)?;
        Some(&self.ids[*from as usize..*to as usize])
    }

    fn put(&mut self, name: u128, ids: &[u32]) {
        let from = self.ids.len() as u32;
        self.ids.extend_from_slice(ids);
        self.places.insert(name, (from, self.ids.len() as u32));
    }
}

#[derive(Debug, Default)]
struct Generations {
    young: WordGeneration,
    old: WordGeneration,
}

/// Words and their ids.
#[derive(Debug, Default)]
pub struct Words {
    kept: RwLock<Generations>,
}

impl Words {
    /// Appends the ids of a text. `encode` is asked for pieces that are not known.
    ///
    /// # Errors
    /// Those of `encode`.
    pub fn encode<E>(
        &self,
        text: &str,
        out: &mut Vec<u32>,
        encode: impl Fn(&str) -> Result<Vec<u32>, E>,
    ) -> Result<(), E> {
        let mut learned: Vec<(u128, Vec<u32>)> = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            // Known words go out under one lock, until one is not known.
            let unknown = self.known(&mut rest, out, &mut learned);
            let Some((piece, name)) = unknown else { break };
            let ids = encode(piece)?;
            out.extend_from_slice(&ids);
            if let Some(name) = name {
                learned.push((name, ids));
            }
        }
        if !learned.is_empty() {
            self.learn(&learned);
        }
        Ok(())
    }

    /// Appends ids of words up to the first one that is not known, which is returned with its name,
    /// if it may be remembered.
    fn known<'t>(
        &self,
        rest: &mut &'t str,
        out: &mut Vec<u32>,
        learned: &mut Vec<(u128, Vec<u32>)>,
    ) -> Option<(&'t str, Option<u128>)> {
        let kept = self.kept.read().unwrap_or_else(PoisonError::into_inner);
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(word_end(rest));
            *rest = after;
            if piece.len() > WORD_BYTES_MAX {
                return Some((piece, None));
            }
            let name = xxh3_128(piece.as_bytes());
            if let Some(ids) = kept.young.get(name) {
                out.extend_from_slice(ids);
            } else if let Some(ids) = kept.old.get(name) {
                out.extend_from_slice(ids);
                // It was used, so it lives on.
                learned.push((name, ids.to_vec()));
            } else {
                return Some((piece, Some(name)));
            }
        }
        None
    }

    fn learn(&self, learned: &[(u128, Vec<u32>)]) {
        let mut kept = self.kept.write().unwrap_or_else(PoisonError::into_inner);
        for (name, ids) in learned {
            if kept.young.places.len() >= WORDS_MAX {
                kept.old = std::mem::take(&mut kept.young);
            }
            if !kept.young.places.contains_key(name) {
                kept.young.put(*name, ids);
            }
        }
    }

    /// Words remembered.
    #[cfg(test)]
    fn count(&self) -> usize {
        let kept = self.kept.read().unwrap_or_else(PoisonError::into_inner);
        kept.young.places.len() + kept.old.places.len()
    }
}

/// Where the first word of a text ends: at a space after an ASCII letter or a mark that ends a
/// clause, and before an ASCII letter.
fn word_end(text: &str) -> usize {
    let bytes = text.as_bytes();
    for at in 1..bytes.len().saturating_sub(1) {
        if bytes[at] == b' '
            && bytes[at + 1].is_ascii_alphabetic()
            && (bytes[at - 1].is_ascii_alphabetic() || matches!(bytes[at - 1], b',' | b'.' | b';' | b':' | b'!' | b'?'))
        {
            return at;
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    fn encode(words: &Words, text: &str) -> Vec<u32> {
        let mut out = Vec::new();
        words.encode(text, &mut out, |word| Ok::<_, ()>(bytes_of(word))).expect("encoded");
        out
    }

    fn ends(mut text: &str) -> Vec<&str> {
        let mut found = Vec::new();
        while !text.is_empty() {
            let (word, rest) = text.split_at(word_end(text));
            found.push(word);
            text = rest;
        }
        found
    }

    #[test]
    fn words_end_where_every_pretokenizer_begins_one() {
        assert_eq!(
            ends("The quick, brown fox. it's 3 o'clock"),
            ["The", " quick,", " brown", " fox.", " it's 3 o'clock"]
        );
        assert_eq!(ends("a  b é c\nd e"), ["a  b é c\nd", " e"]);
        assert_eq!(ends(" a"), [" a"]);
        assert_eq!(ends("x"), ["x"]);
    }

    #[test]
    fn ids_are_those_of_the_whole_text() {
        let words = Words::default();
        let text = "one two, three four five one two three ".repeat(20) + &"é".repeat(60);
        for _ in 0..2 {
            assert_eq!(encode(&words, &text), bytes_of(&text));
        }
        assert!(words.count() > 3 && words.count() < 12, "{}", words.count());
    }

    #[test]
    fn what_is_used_outlives_what_is_not() {
        let words = Words::default();
        encode(&words, "kept word");
        let letter = |at: usize| char::from(b'a' + (at % 26) as u8);
        for number in 0..WORDS_MAX + WORDS_MAX / 2 {
            // Another word every time.
            encode(&words, &(0..5).map(|place| letter(number / 26_usize.pow(place))).collect::<String>());
            if number % 1000 == 0 {
                words.encode("kept word", &mut Vec::new(), |_| Err(())).expect("still known");
            }
        }
        assert!(words.count() <= 2 * WORDS_MAX);
        let seen = words.kept.read().expect("not poisoned").old.places.len();
        assert_eq!(seen, WORDS_MAX, "a generation has passed");
    }
}
