//! What an answer says of its request: the usage that vLLM reports in its last chunk, or at the end
//! of its body.

use serde_json::{Map, Value as Json};

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

impl Usage {
    /// From any API's form of it.
    fn read(usage: &Map<String, Json>) -> Option<Self> {
        let number = |value: Option<&Json>| value.and_then(Json::as_u64).map(|number| number as u32);
        let detail = |name: &str| number(usage.get(name).and_then(|it| it.get("cached_tokens")));
        if let Some(prompt) = number(usage.get("prompt_tokens")) {
            return Some(Self { prompt, cached: detail("prompt_tokens_details") });
        }
        let input = number(usage.get("input_tokens"))?;
        if usage.contains_key("input_tokens_details") {
            return Some(Self { prompt: input, cached: detail("input_tokens_details") });
        }
        // Anthropic's: cached tokens are not among the others.
        let (read, made) = (number(usage.get("cache_read_input_tokens")), usage.get("cache_creation_input_tokens"));
        Some(Self { prompt: input + read.unwrap_or(0) + number(made).unwrap_or(0), cached: read })
    }
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
                return Usage::read(&usage);
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

    #[test]
    fn every_api_has_its_form() {
        let read = |usage: &str| {
            let mut tail = Tail::default();
            tail.push(format!("{{\"usage\":{usage}}}").as_bytes());
            tail.usage()
        };
        let responses = r#"{"input_tokens": 9, "input_tokens_details": {"cached_tokens": 8}, "output_tokens": 1}"#;
        assert_eq!(read(responses), Some(Usage { prompt: 9, cached: Some(8) }));
        let messages = r#"{"input_tokens": 1, "cache_read_input_tokens": 8, "output_tokens": 1}"#;
        assert_eq!(read(messages), Some(Usage { prompt: 9, cached: Some(8) }));
        assert_eq!(read(r#"{"input_tokens": 9}"#), Some(Usage { prompt: 9, cached: None }));
        assert_eq!(read(r#"{"output_tokens": 9}"#), None);
    }
}
