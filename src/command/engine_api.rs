//! A client of the API that an engine serves, or a router before it.
//!
//! Nothing that comes is trusted: answers are bounded, and what cannot be read is said.

use std::fmt::{self, Display, Formatter};
use std::path::Path;
use std::time::Duration;

use kvcellar_block::error::{Error, Result};
use serde_json::Value;

use super::answer::{self, UnreadBody, causes};

/// Bytes of an answer.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// How long a connection may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// Characters of a server's own words that are shown.
const WORDS_MAX: usize = 300;

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum ApiFailure {
    /// Nobody answers there, or not to the end.
    Away(String),
    /// It answers that it will not.
    Refused(u16, String),
    /// What it answers cannot be read.
    Unreadable(String),
}

impl Display for ApiFailure {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Away(problem) => write!(out, "it does not answer: {problem}"),
            Self::Refused(status, words) => write!(out, "it answers {status}: {words}"),
            Self::Unreadable(problem) => write!(out, "its answer cannot be read: {problem}"),
        }
    }
}

/// One server.
#[derive(Debug, Clone)]
pub(crate) struct EngineApi {
    client: reqwest::Client,
    url: String,
    key: Option<String>,
}

impl EngineApi {
    /// A server's address, a file with its API key, and how long an answer may take.
    ///
    /// # Errors
    /// [`Error::Config`] where the address is none of HTTP, [`Error::Io`] for the file.
    pub(crate) fn new(url: &str, key_file: Option<&Path>, patience: Duration) -> Result<Self> {
        if !url.starts_with("http://") {
            let problem = format!("`{url}` is no address of HTTP");
            return Err(Error::config("url", problem, "Write e.g. http://127.0.0.1:8000"));
        }
        let key = key_file.map(|path| {
            let read = std::fs::read_to_string(path).map(|text| text.trim().to_owned());
            read.map_err(|error| Error::io("reading", path, error, "Name a file with the engine's API key"))
        });
        let client = reqwest::Client::builder().connect_timeout(CONNECT_WITHIN).timeout(patience).build();
        let client = client.map_err(|error| Error::TryLater { what: url.to_owned(), holder: causes(&error) })?;
        Ok(Self { client, url: url.trim_end_matches('/').to_owned(), key: key.transpose()? })
    }

    /// The server's address.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Sends a JSON body and reads a JSON answer.
    pub(crate) async fn post(
        &self,
        path: &str,
        body: &Value,
        headers: &[(&str, String)],
    ) -> std::result::Result<Value, ApiFailure> {
        let request = self.client.post(format!("{}{path}", self.url)).header("content-type", "application/json");
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, value));
        let answer = self.send(request.body(body.to_string())).await?;
        serde_json::from_slice(&answer).map_err(|error| ApiFailure::Unreadable(format!("{path}: {error}")))
    }

    /// Reads a text.
    pub(crate) async fn get(&self, path: &str) -> std::result::Result<String, ApiFailure> {
        let answer = self.send(self.client.get(format!("{}{path}", self.url))).await?;
        String::from_utf8(answer).map_err(|error| ApiFailure::Unreadable(format!("{path}: {error}")))
    }

    /// The name of the first model that is served.
    pub(crate) async fn first_model(&self) -> std::result::Result<String, ApiFailure> {
        let text = self.get("/v1/models").await?;
        let listed: Value = serde_json::from_str(&text).map_err(|error| ApiFailure::Unreadable(error.to_string()))?;
        let name = listed["data"][0]["id"].as_str();
        name.map(str::to_owned).ok_or_else(|| ApiFailure::Unreadable("/v1/models names no model".to_owned()))
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> std::result::Result<Vec<u8>, ApiFailure> {
        let away = |error: reqwest::Error| ApiFailure::Away(causes(&error));
        let request = self.key.iter().fold(request, reqwest::RequestBuilder::bearer_auth);
        let answer = request.send().await.map_err(away)?;
        let status = answer.status();
        let body = answer::body(answer, ANSWER_BYTES_MAX).await.map_err(|unread| match unread {
            UnreadBody::TooLong => ApiFailure::Unreadable(format!("it has more than {ANSWER_BYTES_MAX} bytes")),
            UnreadBody::Broken(error) => away(error),
        })?;
        if status.is_success() { Ok(body) } else { Err(ApiFailure::Refused(status.as_u16(), words(&body))) }
    }
}

/// What a server says of its refusal: the message of an error as `OpenAI`'s API has it, else what
/// it wrote.
fn words(body: &[u8]) -> String {
    let told: Option<Value> = serde_json::from_slice(body).ok();
    let message = told.as_ref().and_then(|told| told["error"]["message"].as_str().or(told["message"].as_str()));
    let text = message.map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned);
    text.chars().filter(|character| !character.is_control()).take(WORDS_MAX).collect()
}

/// Runs a client's work to its end.
///
/// # Errors
/// [`Error::Io`] where the system gives no threads.
pub(crate) fn run<T>(work: impl Future<Output = T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Error::io("starting", "a runtime", error, "Raise the limit on processes"))?;
    Ok(runtime.block_on(work))
}
