//! A prompt's two steps: one engine computes it, another one fetches its KV and goes on.
//!
//! vLLM's protocol between them is `kv_transfer_params`: the first step is the same request for one
//! token, marked to be continued elsewhere; its answer says where the KV lies, and the second step
//! hands that over. Bodies keep their numbers as they were written.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value as Json, json};

/// Who sends the first step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum PrefillBy {
    /// This router.
    #[default]
    Router,
    /// A sidecar of the engine that decodes, which finds the other engine's address in a header.
    Sidecar,
}

/// The header in which a sidecar finds the engine that computes the prompt.
pub const PREFILLER: &str = "x-prefiller-host-port";

/// How prompts are split.
#[derive(Debug, Clone, Copy)]
pub struct TwoSteps {
    /// Who sends the first step.
    pub by: PrefillBy,
    /// Tokens that an engine would have to compute for the split to pay.
    pub tokens_min: u32,
}

impl TwoSteps {
    /// Whether it pays to have another engine compute a prompt, of which the one that goes on with
    /// it holds so many tokens.
    pub fn pay(&self, prompt_tokens: u32, held_tokens: u32) -> bool {
        prompt_tokens.saturating_sub(held_tokens) >= self.tokens_min
    }
}

/// What only makes sense for a whole answer.
const NOT_FOR_ONE_TOKEN: [&str; 4] = ["stream", "stream_options", "min_tokens", "max_completion_tokens"];

const TRANSFER: &str = "kv_transfer_params";

/// A request can be split: it is one prompt, and says nothing of transfers itself.
pub fn can_be_split(body: &Map<String, Json>) -> bool {
    let is_given = |name: &str| body.get(name).is_some_and(|value| !value.is_null());
    let is_one = |name: &str| body.get(name).is_none_or(|count| count.is_null() || *count == 1);
    // Of several prompts each would have a transfer of its own.
    let prompts = body.get("prompt").and_then(Json::as_array);
    let is_single = prompts.is_none_or(|items| items.iter().all(Json::is_number));
    is_one("n")
        && is_one("best_of")
        && is_single
        && ![TRANSFER, "prompt_logprobs", "echo"].iter().any(|name| is_given(name))
}

/// A body's fields, each as it was written.
#[derive(Deserialize)]
#[serde(transparent)]
struct Fields<'b> {
    #[serde(borrow)]
    fields: BTreeMap<String, &'b RawValue>,
}

impl fmt::Debug for Fields<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_list().entries(self.fields.keys()).finish()
    }
}

/// A body with another model. `None`: it is no JSON object.
pub fn with_model(body: &[u8], model: &str) -> Option<Vec<u8>> {
    let Fields { mut fields } = serde_json::from_slice(body).ok()?;
    let model = to_raw_value(model).ok()?;
    fields.insert("model".to_owned(), &model);
    serde_json::to_vec(&fields).ok()
}

/// A body with something for the engine's connector. `None`: it is no JSON object.
pub fn with_transfer(body: &[u8], params: &Json) -> Option<Vec<u8>> {
    let Fields { mut fields } = serde_json::from_slice(body).ok()?;
    let params = to_raw_value(params).ok()?;
    fields.insert(TRANSFER.to_owned(), &params);
    serde_json::to_vec(&fields).ok()
}

/// The first step's body. `None`: it is no JSON object.
pub fn first(body: &[u8]) -> Option<Vec<u8>> {
    let Fields { mut fields } = serde_json::from_slice(body).ok()?;
    fields.retain(|name, _| !NOT_FOR_ONE_TOKEN.contains(&name.as_str()));
    let one = to_raw_value(&1).ok()?;
    let elsewhere = to_raw_value(&json!({
        "do_remote_decode": true,
        "do_remote_prefill": false,
        "remote_engine_id": null,
        "remote_block_ids": null,
        "remote_host": null,
        "remote_port": null,
    }));
    let elsewhere = elsewhere.ok()?;
    fields.insert("max_tokens".to_owned(), &one);
    fields.insert(TRANSFER.to_owned(), &elsewhere);
    serde_json::to_vec(&fields).ok()
}

/// The second step's body, from the request's and from the first step's answer. `None`: the answer
/// hands nothing over.
pub fn second(body: &[u8], answer: &[u8]) -> Option<Vec<u8>> {
    let Fields { mut fields } = serde_json::from_slice(body).ok()?;
    let answered: Fields<'_> = serde_json::from_slice(answer).ok()?;
    let params = *answered.fields.get(TRANSFER)?;
    if !params.get().starts_with('{') {
        return None;
    }
    fields.insert(TRANSFER.to_owned(), params);
    serde_json::to_vec(&fields).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &[u8] =
        br#"{"prompt": [1, 2], "max_tokens": 8, "stream": true, "stream_options": {"include_usage": true},
        "temperature": 0.10, "seed": 18446744073709551616, "min_tokens": 3}"#;

    #[test]
    fn the_first_step_asks_for_one_token() {
        let made = String::from_utf8(first(BODY).expect("a body")).expect("text");
        for part in [r#""max_tokens":1"#, r#""do_remote_decode":true"#, r#""temperature":0.10"#, "18446744073709551616"]
        {
            assert!(made.contains(part), "{part}: {made}");
        }
        assert!(!made.contains("stream") && !made.contains("min_tokens"), "{made}");
        assert_eq!(first(b"[1]"), None);
    }

    #[test]
    fn the_second_step_hands_over_what_came_back() {
        let answer = br#"{"id": "x", "kv_transfer_params": {"remote_port": 18446744073709551616}}"#;
        let made = String::from_utf8(second(BODY, answer).expect("a body")).expect("text");
        assert!(made.contains(r#""kv_transfer_params":{"remote_port": 18446744073709551616}"#), "{made}");
        assert!(made.contains(r#""max_tokens":8"#) && made.contains(r#""stream":true"#), "{made}");
        for nothing in [&b"{}"[..], br#"{"kv_transfer_params": null}"#, b"oops"] {
            assert_eq!(second(BODY, nothing), None);
        }
    }

    #[test]
    fn another_model_changes_nothing_else() {
        let made = with_model(br#"{"seed": 18446744073709551616, "model": "nick", "x": {"model": "nick"}}"#, "m");
        let made = String::from_utf8(made.expect("a body")).expect("text");
        assert_eq!(made, r#"{"model":"m","seed":18446744073709551616,"x":{"model": "nick"}}"#);
        assert_eq!(with_model(b"model=nick", "m"), None);
    }

    #[test]
    fn what_cannot_be_split() {
        let split = |body: Json| can_be_split(body.as_object().expect("an object"));
        assert!(split(json!({"prompt": [1, 2], "n": 1})) && split(json!({"messages": [], "n": null})));
        for body in [
            json!({"prompt": "x", "n": 2}),
            json!({"prompt": ["x", "y"]}),
            json!({"prompt": "x", "kv_transfer_params": {"kvcellar": {}}}),
            json!({"prompt": "x", "prompt_logprobs": 1}),
        ] {
            assert!(!split(body.clone()), "{body}");
        }
    }
}
