//! `kvcellar warm`: prompts from a file are computed before anybody asks for them.
//!
//! Each line becomes a request of the engine's own API that asks for one token. All lines are read
//! before the first is sent: a mistake in the last one costs nothing.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use kvcellar_block::error::{Error, Result};
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::task::JoinSet;

use super::engine_api::{self, EngineApi};
use super::{input, store};

/// Failures that are shown one by one; JSON has them all.
const SHOWN_MAX: usize = 20;

/// Keys of a request that ask for more than one token, or for another shape of the answer.
const ANSWER_KEYS: &[&str] = &[
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "n",
    "best_of",
    "stream",
    "stream_options",
    "use_beam_search",
];

/// What a line has to be, for messages.
const LINE: &str =
    "a JSON string, {\"prompt\": ...} or {\"messages\": [...]}, with further keys of a request if need be";

/// Prompts, and who computes them.
#[derive(Debug, Clone, Args)]
pub struct WarmOptions {
    /// One prompt a line: a JSON string, `{"prompt": ...}`, `{"messages": [...]}` or a whole
    /// request; `-` is standard input. Empty lines are left out.
    pub file: PathBuf,
    /// The address of an engine or a router, e.g. `http://127.0.0.1:8000`.
    #[arg(long)]
    pub url: String,
    /// The model of lines that name none; the first that is served without it.
    #[arg(long)]
    pub model: Option<String>,
    /// The `cache_salt` of lines that have none.
    #[arg(long)]
    pub cache_salt: Option<String>,
    /// A file with the server's API key.
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Requests that are under way at once.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub concurrency: u16,
    /// How long one answer may take, in s.
    #[arg(long, default_value_t = 600)]
    pub timeout_s: u64,
    /// JSON on standard output.
    #[arg(long)]
    pub json: bool,
}

/// A request that a line became.
#[derive(Debug, Clone, PartialEq)]
struct WarmPrompt {
    line: usize,
    path: &'static str,
    body: Map<String, Value>,
}

/// A line that was not computed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct FailedLine {
    line: usize,
    problem: String,
}

/// What came of all of them.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Warmed {
    prompts: usize,
    tokens: u64,
    /// Tokens that were there already; none where the server does not tell.
    cached_tokens: Option<u64>,
    seconds: f64,
    failed: Vec<FailedLine>,
}

/// Computes the prompts. The exit code.
pub fn run(options: &WarmOptions) -> i32 {
    let warmed = input::text(&options.file, "Name a file with one prompt a line").and_then(|text| {
        let prompts = match read(&text) {
            Ok(prompts) => prompts,
            Err(wrong) => return Ok(Err(wrong)),
        };
        let patience = Duration::from_secs(options.timeout_s.max(1));
        let api = EngineApi::new(&options.url, options.api_key_file.as_deref(), patience)?;
        engine_api::run(warm(options, Arc::new(api), prompts)).and_then(|warmed| warmed).map(Ok)
    });
    match warmed {
        Ok(Ok(warmed)) => print(&warmed, options.json),
        Ok(Err(wrong)) => refuse(options, &wrong),
        Err(error) => super::refused(&error),
    }
}

/// Every line's request, or every line that is none.
fn read(text: &str) -> std::result::Result<Vec<WarmPrompt>, Vec<FailedLine>> {
    let lines = (1..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty());
    let (prompts, wrong): (Vec<_>, Vec<_>) =
        lines.map(|(line, text)| parse(line, text)).partition(std::result::Result::is_ok);
    let wrong: Vec<FailedLine> = wrong.into_iter().filter_map(std::result::Result::err).collect();
    if wrong.is_empty() { Ok(prompts.into_iter().filter_map(std::result::Result::ok).collect()) } else { Err(wrong) }
}

fn parse(line: usize, text: &str) -> std::result::Result<WarmPrompt, FailedLine> {
    let wrong = |problem: String| FailedLine { line, problem };
    let value: Value = serde_json::from_str(text).map_err(|error| wrong(format!("no JSON ({error}); write {LINE}")))?;
    let mut body = match value {
        Value::String(prompt) => Map::from_iter([("prompt".to_owned(), Value::String(prompt))]),
        Value::Object(body) => body,
        _ => return Err(wrong(format!("neither a string nor an object; write {LINE}"))),
    };
    let is_filled = |value: &Value| match value {
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    let path = match (body.get("prompt"), body.get("messages")) {
        (Some(prompt), None) if is_filled(prompt) => "/v1/completions",
        (None, Some(messages)) if messages.is_array() && is_filled(messages) => "/v1/chat/completions",
        (Some(_), None) => return Err(wrong("`prompt` is no text and no list, or empty".to_owned())),
        (None, Some(_)) => return Err(wrong("`messages` is no list, or empty".to_owned())),
        (Some(_), Some(_)) => return Err(wrong("it has both `prompt` and `messages`; keep one".to_owned())),
        (None, None) => return Err(wrong(format!("it has neither `prompt` nor `messages`; write {LINE}"))),
    };
    for key in ["model", "cache_salt"] {
        if body.get(key).is_some_and(|value| !value.is_null() && value.as_str().is_none_or(str::is_empty)) {
            return Err(wrong(format!("`{key}` is no text, or empty")));
        }
    }
    body.retain(|key, _| !ANSWER_KEYS.contains(&key.as_str()));
    body.insert("max_tokens".to_owned(), json!(1));
    Ok(WarmPrompt { line, path, body })
}

/// Says what is wrong with the first of some lines, and how many more there are.
fn say(file: &str, wrong: &[FailedLine]) {
    for FailedLine { line, problem } in wrong.iter().take(SHOWN_MAX) {
        eprintln!("kvcellar: {file}line {line}: {problem}");
    }
    if wrong.len() > SHOWN_MAX {
        eprintln!("kvcellar: and {} lines more", wrong.len() - SHOWN_MAX);
    }
}

/// Says which lines are none, before anything is sent.
fn refuse(options: &WarmOptions, wrong: &[FailedLine]) -> i32 {
    say(&format!("{}, ", options.file.display()), wrong);
    eprintln!("kvcellar: nothing was sent");
    1
}

async fn warm(options: &WarmOptions, api: Arc<EngineApi>, mut prompts: Vec<WarmPrompt>) -> Result<Warmed> {
    let mut warmed = Warmed { prompts: prompts.len(), ..Warmed::default() };
    if prompts.is_empty() {
        return Ok(warmed);
    }
    complete(options, &api, &mut prompts).await?;
    let began = std::time::Instant::now();
    let mut bar = store::bar("prompts");
    let mut answered = 0;
    let (mut rest, mut under_way) = (prompts.into_iter(), JoinSet::new());
    loop {
        while under_way.len() < usize::from(options.concurrency)
            && let Some(prompt) = rest.next()
        {
            let api = Arc::clone(&api);
            under_way.spawn(async move {
                let answer = api.post(prompt.path, &Value::Object(prompt.body), &[]).await;
                (prompt.line, answer.map_err(|failure| failure.to_string()))
            });
        }
        match under_way.join_next().await {
            Some(Ok((line, answer))) => warmed.add(line, answer),
            // A task of ours that panics has lost its line's number with it.
            Some(Err(error)) => warmed.failed.push(FailedLine { line: 0, problem: error.to_string() }),
            None => break,
        }
        answered += 1;
        bar(answered, warmed.prompts as u64);
    }
    warmed.failed.sort_by_key(|failed| failed.line);
    warmed.seconds = began.elapsed().as_secs_f64();
    Ok(warmed)
}

/// Gives lines the model and the salt that they do not name.
async fn complete(options: &WarmOptions, api: &EngineApi, prompts: &mut [WarmPrompt]) -> Result<()> {
    let lacks = |body: &Map<String, Value>, key: &str| body.get(key).is_none_or(Value::is_null);
    let model = match &options.model {
        Some(model) => Some(model.clone()),
        None if prompts.iter().any(|prompt| lacks(&prompt.body, "model")) => {
            let first = api.first_model().await;
            Some(first.map_err(|failure| Error::TryLater { what: api.url().to_owned(), holder: failure.to_string() })?)
        }
        None => None,
    };
    for prompt in prompts {
        for (key, value) in [("model", &model), ("cache_salt", &options.cache_salt)] {
            if let Some(value) = value
                && lacks(&prompt.body, key)
            {
                prompt.body.insert(key.to_owned(), json!(value));
            }
        }
    }
    Ok(())
}

impl Warmed {
    fn add(&mut self, line: usize, answer: std::result::Result<Value, String>) {
        match answer {
            Ok(answer) => {
                let usage = &answer["usage"];
                self.tokens += usage["prompt_tokens"].as_u64().unwrap_or(0);
                if let Some(cached) = usage["prompt_tokens_details"]["cached_tokens"].as_u64() {
                    *self.cached_tokens.get_or_insert(0) += cached;
                }
            }
            Err(problem) => self.failed.push(FailedLine { line, problem }),
        }
    }
}

fn print(warmed: &Warmed, json: bool) -> i32 {
    let code = i32::from(!warmed.failed.is_empty());
    if json {
        return store::print_json(warmed).max(code);
    }
    say("", &warmed.failed);
    println!("{:>8} {:>12} {:>14} {:>8} {:>9}", "prompts", "tokens", "cached already", "failed", "seconds");
    println!(
        "{:>8} {:>12} {:>14} {:>8} {:>9.1}",
        warmed.prompts,
        warmed.tokens,
        warmed.cached_tokens.map_or("?".to_owned(), |tokens| tokens.to_string()),
        warmed.failed.len(),
        warmed.seconds
    );
    if warmed.cached_tokens.is_none() && warmed.prompts > warmed.failed.len() {
        println!("cached already: vLLM tells it with --enable-prompt-tokens-details");
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_of_a_line_becomes_a_request_for_one_token() {
        let text = concat!(
            "\"a text\"\n\n",
            "{\"prompt\": [1, 2], \"cache_salt\": \"s\", \"max_tokens\": 900, \"stream\": true, \"n\": 3}\n",
            "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"model\": \"m\", \"max_completion_tokens\": 7}\n",
        );
        let prompts = read(text).expect("all are well");
        let made: Vec<_> = prompts.into_iter().map(|it| (it.line, it.path, Value::Object(it.body))).collect();
        let messages = json!([{"role": "user", "content": "hi"}]);
        assert_eq!(
            made,
            [
                (1, "/v1/completions", json!({"prompt": "a text", "max_tokens": 1})),
                (3, "/v1/completions", json!({"prompt": [1, 2], "cache_salt": "s", "max_tokens": 1})),
                (4, "/v1/chat/completions", json!({"messages": messages, "model": "m", "max_tokens": 1})),
            ]
        );
    }

    #[test]
    fn every_line_that_is_none_is_named_with_what_is_wrong() {
        let lines = [
            ("{\"prompt\": \"cut", "no JSON"),
            ("17", "neither a string nor an object"),
            ("{}", "neither `prompt` nor `messages`"),
            ("{\"prompt\": \"\"}", "`prompt` is no text"),
            ("\"\"", "`prompt` is no text"),
            ("{\"prompt\": 5}", "`prompt` is no text"),
            ("{\"messages\": \"hi\"}", "`messages` is no list"),
            ("{\"messages\": []}", "`messages` is no list"),
            ("{\"prompt\": \"a\", \"messages\": [1]}", "both"),
            ("{\"prompt\": \"a\", \"cache_salt\": 5}", "`cache_salt` is no text"),
            ("{\"prompt\": \"a\", \"model\": \"\"}", "`model` is no text"),
        ];
        let text: Vec<&str> = std::iter::once("\"well\"").chain(lines.iter().map(|(line, _)| *line)).collect();
        let wrong = read(&text.join("\n")).expect_err("all but the first");
        assert_eq!(wrong.len(), lines.len());
        for ((number, (_, problem)), found) in (2..).zip(lines).zip(wrong) {
            assert!(found.line == number && found.problem.contains(problem), "{found:?}");
        }
    }
}
