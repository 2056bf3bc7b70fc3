//! At start: does this process find the same ids as vLLM? Where not, it is said, and the engine's
//! own are used.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value as Json, json};

use super::engine::Engine;
use super::prompt::{Checked, Prompt};
use super::remote::ids_of;
use super::request::{Kind, Request};
use super::router::Router;

/// Requests that cover scripts, spaces, numbers, code, special tokens in text, turns and tools.
fn samples() -> Vec<(Kind, Json)> {
    let texts = [
        "The quick brown fox jumps over 13 lazy dogs.",
        "  leading and trailing  \n\n\ttabs\r\nand lines ",
        "Zażółć gęślą jaźń — 東京タワー 🗼 مرحبا e\u{301}",
        "def f(x):\n    return x**2 + 1e-5  # it's 100%\n",
        "<|im_start|>user\nnot a turn<|im_end|> </s> <s>",
        "",
    ];
    let long = "A sentence of words that goes on and on, again and again. ".repeat(120);
    let tool = json!({"type": "function", "function": {"name": "weather", "description": "Says it", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}}});
    let mut found: Vec<(Kind, Json)> = texts.iter().map(|text| (Kind::Completion, json!({"prompt": text}))).collect();
    found.push((Kind::Completion, json!({"prompt": long})));
    found.extend(texts.iter().map(|text| (Kind::Chat, json!({"messages": [{"role": "user", "content": text}]}))));
    let turns = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": [{"type": "text", "text": "What?"}]}]);
    found.push((Kind::Chat, json!({"messages": turns})));
    found.push((Kind::Chat, json!({"messages": turns, "tools": [tool]})));
    found
}

/// Checks every tokenizer as soon as an engine that serves its model answers.
pub async fn run(router: Arc<Router>) {
    for (name, checked) in router.setup.models.named.clone() {
        let engine = loop {
            let all = router.engines.all();
            let found = all.iter().find(|engine| {
                engine.is_usable() && !engine.models.load().is_empty() && (name.is_empty() || engine.serves(&name))
            });
            if let Some(engine) = found {
                break Arc::clone(engine);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        check(&router, &name, &checked, &engine).await;
    }
}

async fn check(router: &Router, name: &str, checked: &Checked, engine: &Engine) {
    let model = if name.is_empty() {
        engine.models.load().first().map(|model| model.id.clone()).unwrap_or_default()
    } else {
        name.to_owned()
    };
    let (mut same, mut differ, mut unsaid) = (0, Vec::new(), 0);
    for (kind, mut body) in samples() {
        body["model"] = json!(model);
        let Ok(request) = Request::read(kind, body.to_string().into()) else { continue };
        let Ok((ours, _)) = Prompt::ids(&request, &router.setup.models) else {
            unsaid += 1;
            continue;
        };
        let Some(answer) = router.remote.post(engine, "/tokenize", request.raw.clone()).await else {
            unsaid += 1;
            continue;
        };
        match answer.get("tokens").and_then(ids_of) {
            Some(theirs) if theirs == ours => same += 1,
            Some(_) => differ.push(body.to_string()),
            None => unsaid += 1,
        }
    }
    let shown = if name.is_empty() { "every model" } else { name };
    if let Some(first) = differ.first() {
        checked.differs.store(true, Ordering::Relaxed);
        log::warn!(
            "token ids for {shown}: {} of {} samples differ from {}'s (first: {first}); engines are asked instead",
            differ.len(),
            same + differ.len(),
            engine.spec.name
        );
    } else {
        log::info!(
            "token ids for {shown}: made here, {same} samples equal {}'s, {unsaid} cannot be compared",
            engine.spec.name
        );
    }
}
