//! A request as a front end got it, as far as deciding needs it; and why one is refused.

use std::borrow::Cow;
use std::collections::HashMap;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value as Json};

use super::dialect;
use super::tokens::Inexact;
use super::two_steps::with_model;
use super::urgency::Urgency;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `/v1/completions`.
    Completion,
    /// `/v1/chat/completions`.
    Chat,
    /// `OpenAI`'s `/v1/responses`.
    Responses,
    /// Anthropic's `/v1/messages`.
    Messages,
    /// Prompts in an engine's own form: `SGLang`'s `/generate`, vLLM's `/inference/v1/generate`.
    Generate,
    /// Anything else, with or without a model: passed on by load alone.
    Other,
}

impl Kind {
    /// Of a path, without its query.
    pub fn of(path: &str) -> Self {
        match path.split('?').next().unwrap_or_default() {
            "/v1/completions" => Self::Completion,
            "/v1/chat/completions" => Self::Chat,
            "/v1/responses" => Self::Responses,
            "/v1/messages" => Self::Messages,
            "/generate" | "/inference/v1/generate" => Self::Generate,
            _ => Self::Other,
        }
    }
}

/// Says of an answer that was refused for want of room why.
pub const DROPPED: &str = "x-kvcellar-dropped-reason";

/// Why a request is not passed on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It cannot be understood.
    #[error("{0}")]
    BadRequest(String),
    /// No engine serves its model.
    #[error("the model `{0}` is served by no engine here; GET /v1/models lists those that are")]
    ModelNotFound(String),
    /// It is too large.
    #[error("the request's body is larger than {0} bytes")]
    TooLarge(usize),
    /// Its body came too slowly.
    #[error("the request's body came too slowly")]
    SlowBody,
    /// More is in flight than may be.
    #[error("{0} requests are in flight already; try again later")]
    Shed(usize),
    /// Nobody can take it.
    #[error("no engine is available: {0}")]
    NoEngine(&'static str),
    /// The engine broke off before its first byte, and so did all others that were tried.
    #[error("the engine did not answer: {0}")]
    Upstream(String),
    /// The engine took too long.
    #[error("the engine sent nothing for {0} s")]
    Timeout(u64),
    /// There is no room in the queue for one of its priority.
    #[error("all engines are busy, and no more requests of this priority may wait; try again later")]
    QueueFull,
    /// Its place in the queue was wanted for one of a higher priority.
    #[error("all engines are busy, and requests of a higher priority took the places in the queue; try again later")]
    Displaced,
    /// No engine had room for it in time.
    #[error("no engine had room for the request within its {0} ms")]
    Late(u128),
}

impl Refusal {
    /// Its HTTP status.
    pub fn status(&self) -> u16 {
        match self {
            Self::BadRequest(_) => 400,
            Self::ModelNotFound(_) => 404,
            Self::SlowBody => 408,
            Self::TooLarge(_) => 413,
            Self::Shed(_) | Self::QueueFull | Self::Displaced => 429,
            Self::NoEngine(_) | Self::Late(_) => 503,
            Self::Upstream(_) => 502,
            Self::Timeout(_) => 504,
        }
    }

    /// A short name for metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::BadRequest(_) => "bad_request",
            Self::ModelNotFound(_) => "model_not_found",
            Self::SlowBody => "slow_body",
            Self::TooLarge(_) => "too_large",
            Self::Shed(_) => "shed",
            Self::NoEngine(_) => "no_engine",
            Self::Upstream(_) => "upstream",
            Self::Timeout(_) => "timeout",
            Self::QueueFull => "queue_full",
            Self::Displaced => "displaced",
            Self::Late(_) => "deadline",
        }
    }

    /// It was dropped for want of room, not for anything in it.
    pub fn is_for_room(&self) -> bool {
        matches!(self, Self::Shed(_) | Self::QueueFull | Self::Displaced | Self::Late(_))
    }

    /// The headers that say to a client what it is, beside the status.
    pub fn headers(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let dropped = self.is_for_room().then(|| (DROPPED, self.name()));
        let comes_again = self.is_for_room() || matches!(self, Self::NoEngine(_));
        let again = comes_again.then_some(("retry-after", "1"));
        std::iter::once(("content-type", "application/json")).chain(dropped).chain(again)
    }

    /// Its body, as `OpenAI` clients read it.
    pub fn body(&self) -> String {
        serde_json::json!({"error": {"message": self.to_string(), "type": self.name(), "param": null, "code": self.status()}}).to_string()
    }
}

/// A request.
#[derive(Debug)]
pub struct Request {
    /// What it asks for.
    pub kind: Kind,
    /// Its body, where deciding reads it.
    pub body: Map<String, Json>,
    /// The same as it came, for those who are asked about it: numbers may have lost digits above.
    pub raw: Bytes,
    /// The model it names.
    pub model: Option<String>,
    /// What enters the blocks' hashes beside the tokens.
    pub cache_salt: Option<String>,
    /// Who else's requests it follows.
    pub session: Option<String>,
    /// Whoever sends it on can have its prompt computed by another engine.
    pub may_split: bool,
    /// How urgent it is.
    pub urgency: Urgency,
    /// Addresses that alone may take it.
    pub subset: Option<Vec<String>>,
    /// Headers of the caller's trace, if any.
    pub trace: HashMap<String, String>,
}

impl Request {
    /// Its answer is to come in parts, the first token as soon as it is there.
    pub fn streams(&self) -> bool {
        self.body.get("stream").and_then(Json::as_bool).unwrap_or(false)
    }

    /// Reads a request's body. Of other kinds than prompts only the model is read, if it is there.
    ///
    /// # Errors
    /// [`Refusal::BadRequest`].
    pub fn read(kind: Kind, raw: Bytes) -> Result<Self, Refusal> {
        let fields = match kind {
            Kind::Other => only_model(&raw),
            _ => match serde_json::from_slice(&raw) {
                Ok(Json::Object(fields)) => fields,
                Ok(_) => return Err(Refusal::BadRequest("the body is not a JSON object".to_owned())),
                Err(error) => return Err(Refusal::BadRequest(format!("the body is not JSON: {error}"))),
            },
        };
        let needed = match kind {
            Kind::Completion if !fields.contains_key("prompt") && !fields.contains_key("prompt_embeds") => {
                Some("prompt")
            }
            Kind::Chat | Kind::Messages if !fields.get("messages").is_some_and(Json::is_array) => Some("messages"),
            Kind::Responses if !fields.contains_key("input") => Some("input"),
            _ => None,
        };
        if let Some(name) = needed {
            return Err(Refusal::BadRequest(format!("`{name}` is missing or of the wrong type")));
        }
        let text =
            |name: &str| fields.get(name).and_then(Json::as_str).filter(|text| !text.is_empty()).map(str::to_owned);
        let (model, cache_salt) = (text("model"), text("cache_salt"));
        let trace = HashMap::new();
        Ok(Self {
            kind,
            model,
            cache_salt,
            session: None,
            may_split: false,
            urgency: Urgency::default(),
            subset: None,
            trace,
            raw,
            body: fields,
        })
    }

    /// Goes on under another model's name, to the engine as well.
    pub fn rename(&mut self, model: &str) {
        let Some(raw) = with_model(&self.raw, model) else { return };
        self.raw = raw.into();
        self.body.insert("model".to_owned(), Json::String(model.to_owned()));
        self.model = Some(model.to_owned());
    }

    /// Bytes that it takes, about: what was read of a body takes far more than the body.
    pub fn memory(&self) -> usize {
        const VALUE_BYTES: usize = 80;
        let is_value = |byte: &&u8| matches!(byte, b',' | b':' | b'[' | b'{');
        let values = if self.body.is_empty() { 0 } else { self.raw.iter().filter(is_value).count() };
        self.raw.len() + values * VALUE_BYTES
    }

    /// The chat request that the engine makes of it.
    ///
    /// # Errors
    /// [`Inexact`]: nobody but the engine knows.
    pub fn as_chat(&self) -> Result<Cow<'_, Map<String, Json>>, Inexact> {
        match self.kind {
            Kind::Chat => Ok(Cow::Borrowed(&self.body)),
            Kind::Messages => dialect::of_messages(&self.body).map(Cow::Owned),
            Kind::Responses => dialect::of_responses(&self.body).map(Cow::Owned),
            Kind::Completion | Kind::Generate | Kind::Other => Err(Inexact::Option("no messages")),
        }
    }
}

/// The model in a body, which may be anything.
fn only_model(raw: &[u8]) -> Map<String, Json> {
    #[derive(Deserialize)]
    struct Named {
        model: String,
    }
    let starts = raw.iter().find(|byte| !byte.is_ascii_whitespace());
    let named = starts.filter(|byte| **byte == b'{').and_then(|_| serde_json::from_slice::<Named>(raw).ok());
    named.into_iter().map(|named| ("model".to_owned(), Json::String(named.model))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_requests_name_what_is_wrong() {
        let problem = |kind, body: &str| {
            Request::read(kind, Bytes::copy_from_slice(body.as_bytes()))
                .err()
                .map(|refusal| refusal.to_string())
                .unwrap_or_default()
        };
        assert!(problem(Kind::Chat, "{").contains("not JSON"));
        assert!(problem(Kind::Chat, "[]").contains("not a JSON object"));
        assert!(problem(Kind::Chat, r#"{"messages": 1}"#).contains("`messages`"));
        assert!(problem(Kind::Completion, "{}").contains("`prompt`"));
        assert_eq!(problem(Kind::Other, "anything"), "");
        assert_eq!(Kind::of("/v1/completions?x=1"), Kind::Completion);
        assert!(problem(Kind::Messages, "{}").contains("`messages`"));
        assert!(problem(Kind::Responses, "{}").contains("`input`"));
    }

    #[test]
    fn a_model_is_read_from_whatever_may_name_one() {
        let model =
            |body: &'static str| Request::read(Kind::Other, Bytes::from_static(body.as_bytes())).expect("any").model;
        assert_eq!(model(r#" {"input": ["a"], "model": "m"}"#).as_deref(), Some("m"));
        for body in ["", "model=m", r#"{"model": 3}"#, r#"{"model": "m""#, r#"["m"]"#, "\u{0}{"] {
            assert_eq!(model(body), None, "{body}");
        }
    }

    #[test]
    fn refusals_are_json_with_a_status() {
        let body: Json = serde_json::from_str(&Refusal::ModelNotFound("m\"".to_owned()).body()).expect("JSON");
        assert_eq!(body["error"]["code"], 404);
    }
}
