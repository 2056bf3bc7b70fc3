//! Texts of so many tokens, as people write them: words of a small vocabulary in random order, a
//! sentence now and then.

use kvcellar_block::error::{Error, Result};
use kvcellar_route::tokens::TokenModel;

const SYLLABLES: [&str; 24] = [
    "ra", "to", "min", "ke", "sol", "ver", "an", "dis", "pre", "lo", "ter", "con", "ul", "fi", "gra", "pho", "ti",
    "on", "ment", "er", "ly", "st", "ou", "ee",
];

/// A made-up word, mostly short.
fn word(random: &mut fastrand::Rng) -> String {
    (0..random.usize(1..4)).map(|_| SYLLABLES[random.usize(..SYLLABLES.len())]).collect()
}

/// Words of about so many bytes.
fn words(random: &mut fastrand::Rng, bytes: usize) -> String {
    let mut text = String::with_capacity(bytes + 16);
    while text.len() < bytes {
        text.push_str(&word(random));
        text.push_str(if random.u8(..12) == 0 { ". " } else { " " });
    }
    text
}

/// Makes texts of a length in tokens.
#[derive(Debug)]
pub(super) struct TextWriter {
    random: fastrand::Rng,
    bytes_per_token: f64,
}

impl TextWriter {
    /// Learns how long the tokenizer's tokens are.
    ///
    /// # Errors
    /// [`Error::Config`] when the tokenizer refuses texts.
    pub(super) fn new(model: &TokenModel, seed: u64) -> Result<Self> {
        let mut random = fastrand::Rng::with_seed(seed);
        let sample = words(&mut random, 20_000);
        let ids = model
            .encode(&sample, false)
            .map_err(|problem| Error::config("tokenizer", problem.to_string(), "Name another model's directory"))?;
        Ok(Self { random, bytes_per_token: sample.len() as f64 / ids.len().max(1) as f64 })
    }

    /// A text of about so many tokens, unlike any other.
    #[expect(clippy::cast_sign_loss, reason = "a length is not negative")]
    pub(super) fn text(&mut self, tokens: usize) -> String {
        words(&mut self.random, (tokens as f64 * self.bytes_per_token) as usize)
    }

    /// So many ids, unlike any others.
    pub(super) fn ids(&mut self, tokens: usize) -> Vec<u32> {
        (0..tokens).map(|_| self.random.u32(100..30_000)).collect()
    }
}
