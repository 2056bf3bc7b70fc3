//! A request's prompt, as exactly as it can be had: ids and keys, or an estimate.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value as Json;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::estimate;
use super::remote::ids_of;
use super::request::{Kind, Request};
use super::tokens::{Inexact, TokenModel};
use kvcellar_index::keys::{self, Extras};

/// A tokenizer, unless the self-check has ruled it out.
#[derive(Debug)]
pub struct Checked {
    /// The tokenizer.
    pub model: TokenModel,
    /// The self-check found it to differ from the engine.
    pub differs: AtomicBool,
}

/// Tokenizers by model name; the one without a name is everybody else's.
#[derive(Debug, Default, Clone)]
pub struct Models {
    /// By name.
    pub named: BTreeMap<String, Arc<Checked>>,
}

impl Models {
    /// The tokenizer for a model.
    ///
    /// # Errors
    /// [`Inexact`].
    pub fn of(&self, model: Option<&str>) -> Result<&TokenModel, Inexact> {
        let found = model.and_then(|name| self.named.get(name)).or_else(|| self.named.get(""));
        let checked = found.ok_or(Inexact::NoTokenizer)?;
        if checked.differs.load(Ordering::Relaxed) {
            return Err(Inexact::SelfCheck);
        }
        Ok(&checked.model)
    }
}

/// A prompt.
#[derive(Debug, Default)]
pub struct Prompt {
    /// Its tokens.
    pub tokens: u32,
    /// That is their exact number.
    pub is_exact: bool,
    /// Where it is from.
    pub from: &'static str,
    /// Why this process could not say.
    pub inexact: Option<&'static str>,
    /// Keys of its blocks in the index.
    pub keys: Vec<u64>,
    /// Hashes of its blocks in the guesses.
    pub hashes: Vec<u64>,
}

impl Prompt {
    /// By its bytes.
    pub fn estimate(request: &Request) -> Self {
        let bytes = estimate::bytes_of(&request.body);
        let name =
            |text: &Option<String>, seed| xxh3_64_with_seed(text.as_deref().unwrap_or_default().as_bytes(), seed);
        let root = name(&request.cache_salt, name(&request.model, 1));
        let hashes = estimate::hashes(root, &bytes);
        Self { tokens: estimate::tokens(bytes.len()), from: "estimate", hashes, ..Self::default() }
    }

    /// By its ids.
    pub fn exact(request: &Request, ids: &[u32], from: &'static str, adapter: Option<&str>, block: u32) -> Self {
        let mut made = Vec::new();
        if block > 0 {
            let extras = Extras { cache_salt: request.cache_salt.clone(), multimodal: Vec::new() };
            keys::of_prompt(keys::root("", adapter), ids, block as usize, &extras, &mut made);
        }
        Self { tokens: ids.len() as u32, is_exact: true, from, keys: made, ..Self::default() }
    }

    /// The ids of a request, in this process, and where they are from.
    ///
    /// # Errors
    /// [`Inexact`].
    pub fn ids(request: &Request, models: &Models) -> Result<(Vec<u32>, &'static str), Inexact> {
        let body = &request.body;
        if body.get("truncate_prompt_tokens").is_some_and(|value| !value.is_null()) {
            return Err(Inexact::Option("truncate_prompt_tokens"));
        }
        let model = request.model.as_deref();
        match request.kind {
            Kind::Other => Err(Inexact::Option("no prompt")),
            Kind::Chat | Kind::Messages | Kind::Responses => {
                let chat = request.as_chat()?;
                Ok((models.of(model)?.chat(&chat)?, "local"))
            }
            Kind::Generate => match (body.get("token_ids").or_else(|| body.get("input_ids")), body.get("text")) {
                (Some(list), _) => Ok((ids_of(first_of(list)).ok_or(UNKNOWN_FORM)?, "given")),
                (None, Some(text)) => {
                    let text = first_of(text).as_str().ok_or(UNKNOWN_FORM)?;
                    Ok((models.of(model)?.encode(text, true)?, "local"))
                }
                _ => Err(UNKNOWN_FORM),
            },
            Kind::Completion => {
                let prompt =
                    body.get("prompt").filter(|prompt| !prompt.is_null()).ok_or(Inexact::Option("prompt_embeds"))?;
                match first_of(prompt) {
                    Json::String(text) => {
                        let special = body.get("add_special_tokens").and_then(Json::as_bool).unwrap_or(true);
                        Ok((models.of(model)?.encode(text, special)?, "local"))
                    }
                    list => Ok((ids_of(list).ok_or(UNKNOWN_FORM)?, "given")),
                }
            }
        }
    }
}

const UNKNOWN_FORM: Inexact = Inexact::Option("a prompt of unknown form");

/// Of several prompts the first stands for all.
fn first_of(prompt: &Json) -> &Json {
    match prompt {
        Json::Array(items) if items.first().is_some_and(|it| !it.is_number()) => &items[0],
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(body: &Json) -> Request {
        Request::read(Kind::Completion, body.to_string().into()).expect("a request")
    }

    #[test]
    fn ids_that_are_given_need_no_tokenizer() {
        let ids = |body| Prompt::ids(&request(&body), &Models::default());
        assert_eq!(ids(serde_json::json!({"prompt": [1, 2]})), Ok((vec![1, 2], "given")));
        assert_eq!(ids(serde_json::json!({"prompt": [[3], [4]]})), Ok((vec![3], "given")));
        assert_eq!(ids(serde_json::json!({"prompt": "x"})), Err(Inexact::NoTokenizer));
        assert!(ids(serde_json::json!({"prompt": [-1]})).is_err());
    }

    #[test]
    fn an_engines_own_form_of_prompts() {
        let ids = |body: &Json| {
            let request = Request::read(Kind::Generate, body.to_string().into()).expect("a request");
            Prompt::ids(&request, &Models::default())
        };
        assert_eq!(ids(&serde_json::json!({"token_ids": [1, 2]})), Ok((vec![1, 2], "given")));
        assert_eq!(ids(&serde_json::json!({"input_ids": [[3], [4]]})), Ok((vec![3], "given")));
        assert_eq!(ids(&serde_json::json!({"text": "x"})), Err(Inexact::NoTokenizer));
        assert_eq!(ids(&serde_json::json!({"image": 1})), Err(UNKNOWN_FORM));
    }

    #[test]
    fn estimates_tell_models_and_salts_apart() {
        let text = "z".repeat(600);
        let of = |model: &str, salt: Option<&str>| {
            Prompt::estimate(&request(&serde_json::json!({"prompt": text, "model": model, "cache_salt": salt}))).hashes
        };
        assert_eq!(of("m", None), of("m", None));
        assert_ne!(of("m", None), of("n", None));
        assert_ne!(of("m", None), of("m", Some("s")));
    }
}
