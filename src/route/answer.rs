//! What an answer says of its request: the usage that vLLM reports in its last chunk, or at the end
//! of its body.

use serde_json::Value as Json;

use crate::limits::ANSWER_TAIL_BYTES;

/// Tokens as the engine counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt: u32,
    /// Of those, how many it need not compute; `None` where the engine does not say
    /// (`--enable-prompt-tokens-details`).
    pub cached: Option<u32>,
}

/// The last bytes of an answer that passes by.
#[derive(Debug, Default)]
pub struct Tail {
    bytes: Vec<u8>,
}

impl Tail {
    /// Some more bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        let kept = &bytes[bytes.len().saturating_sub(ANSWER_TAIL_BYTES)..];
        self.bytes.extend_from_slice(kept);
        // Trimmed now and then, not at every chunk.
        if self.bytes.len() > 2 * ANSWER_TAIL_BYTES {
            self.bytes.drain(..self.bytes.len() - ANSWER_TAIL_BYTES);
        }
    }

    /// The usage in it: the last one, as a stream may report it with every chunk.
    pub fn usage(&self) -> Option<Usage> {
        const NAME: &[u8] = b"\"usage\":";
        let mut end = self.bytes.len();
        while let Some(at) = self.bytes[..end].windows(NAME.len()).rposition(|window| window == NAME) {
            let rest = &self.bytes[at + NAME.len()..];
            let found = serde_json::Deserializer::from_slice(rest).into_iter::<Json>().next();
            if let Some(Ok(Json::Object(usage))) = found {
                let number = |value: Option<&Json>| value.and_then(Json::as_u64).map(|number| number as u32);
                let cached = number(usage.get("prompt_tokens_details").and_then(|it| it.get("cached_tokens")));
                return Some(Usage { prompt: number(usage.get("prompt_tokens"))?, cached });
            }
            end = at;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_found_in_streams_and_bodies() {
        let mut tail = Tail::default();
        assert_eq!(tail.usage(), None);
        for _ in 0..100 {
            tail.push(&[b'x'; 4096]);
        }
        tail.push(b"data: {\"choices\":[],\"usage\":null}\n\ndata: {\"usage\":{\"prompt_tokens\":7,\"prompt_tokens_details\":{\"cached_tokens\":4}}}\n\n");
        tail.push(b"data: {\"usage\":null}\n\ndata: [DONE]\n\n");
        assert_eq!(tail.usage(), Some(Usage { prompt: 7, cached: Some(4) }));
        let mut tail = Tail::default();
        tail.push(b"{\"usage\": {\"prompt_tokens\": 3, \"prompt_tokens_details\": null}}");
        assert_eq!(tail.usage(), Some(Usage { prompt: 3, cached: None }));
    }
}
