//! Requests of other APIs as the chat that vLLM makes of them before it applies its template.
//!
//! Facts of vLLM 0.32 (`entrypoints/anthropic`, `entrypoints/openai/responses`). Whatever is rare
//! is [`Inexact`] rather than guessed: its prompt is estimated.

use serde_json::{Map, Value as Json, json};

use super::tokens::Inexact;

const RARE: Inexact = Inexact::Option("what is rare in its API");

/// An Anthropic request (`/v1/messages`) as a chat request.
///
/// # Errors
/// [`Inexact`].
pub fn of_messages(body: &Map<String, Json>) -> Result<Map<String, Json>, Inexact> {
    refuse(body, &["thinking", "output_config", "mcp_servers", "container"])?;
    let mut messages = Vec::new();
    if let Some(text) = system(body.get("system"))? {
        messages.push(json!({"role": "system", "content": text}));
    }
    for message in body.get("messages").and_then(Json::as_array).ok_or(RARE)? {
        let role = message.get("role").and_then(Json::as_str).filter(|role| *role != "system").ok_or(RARE)?;
        add_message(role, message.get("content").ok_or(RARE)?, &mut messages)?;
    }
    let mut made = Map::from_iter([("messages".to_owned(), Json::Array(messages))]);
    if let Some(tools) = body.get("tools").filter(|tools| !tools.is_null()) {
        let tools = tools.as_array().ok_or(RARE)?.iter().map(tool).collect::<Result<_, _>>()?;
        made.insert("tools".to_owned(), Json::Array(tools));
        if body.get("tool_choice").is_some_and(|choice| choice.get("type").is_some_and(|kind| kind == "none")) {
            made.insert("tool_choice".to_owned(), json!("none"));
        }
    }
    keep(body, &["chat_template_kwargs"], &mut made);
    Ok(made)
}

/// The text of a system prompt: a string, or text blocks without the header that Claude Code puts
/// there.
fn system(given: Option<&Json>) -> Result<Option<String>, Inexact> {
    let text = match given {
        None | Some(Json::Null) => return Ok(None),
        Some(Json::String(text)) => text.clone(),
        Some(Json::Array(blocks)) => {
            let text = |block: &Json| match block.get("type").and_then(Json::as_str) {
                Some("text") => block.get("text").and_then(Json::as_str).map(str::to_owned).ok_or(RARE),
                _ => Err(RARE),
            };
            let texts = blocks.iter().map(text).collect::<Result<Vec<_>, _>>()?;
            texts.into_iter().filter(|text| !text.starts_with("x-anthropic-billing-header")).collect()
        }
        Some(_) => return Err(RARE),
    };
    Ok((!text.is_empty()).then_some(text))
}

fn add_message(role: &str, content: &Json, messages: &mut Vec<Json>) -> Result<(), Inexact> {
    if let Some(text) = content.as_str() {
        messages.push(json!({"role": role, "content": text}));
        return Ok(());
    }
    let (mut parts, mut calls) = (Vec::new(), Vec::new());
    for block in content.as_array().ok_or(RARE)? {
        let text = |name: &str| block.get(name).and_then(Json::as_str).ok_or(RARE);
        match text("type")? {
            "text" if text("text")?.is_empty() => {}
            "text" => parts.push(json!({"type": "text", "text": text("text")?})),
            "image" | "document" => return Err(Inexact::Multimodal),
            "tool_use" => {
                let input = block.get("input").cloned().unwrap_or_else(|| json!({}));
                let function = json!({"name": text("name")?, "arguments": input});
                calls.push(json!({"id": text("id")?, "type": "function", "function": function}));
            }
            "tool_result" if role == "user" => {
                let id = text("tool_use_id")?;
                messages.push(json!({"role": "tool", "tool_call_id": id, "content": result(block.get("content"))?}));
            }
            _ => return Err(RARE),
        }
    }
    if parts.is_empty() && calls.is_empty() {
        // Nothing but results, which have become messages of their own.
        return if role == "user" { Ok(()) } else { Err(RARE) };
    }
    let mut made = json!({"role": role});
    if !calls.is_empty() {
        made["tool_calls"] = Json::Array(calls);
    }
    match parts.as_slice() {
        [] => {}
        [only] => made["content"] = only["text"].clone(),
        _ => made["content"] = Json::Array(parts),
    }
    messages.push(made);
    Ok(())
}

/// The text of a tool's result.
fn result(content: Option<&Json>) -> Result<String, Inexact> {
    match content {
        None | Some(Json::Null) => Ok(String::new()),
        Some(Json::String(text)) => Ok(text.clone()),
        Some(Json::Array(items)) => {
            let text = |item: &Json| match item.get("type").and_then(Json::as_str) {
                Some("text") => item.get("text").and_then(Json::as_str).map(str::to_owned).ok_or(RARE),
                Some("image") => Err(Inexact::Multimodal),
                _ => Err(RARE),
            };
            Ok(items.iter().map(text).collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        Some(_) => Err(RARE),
    }
}

fn tool(given: &Json) -> Result<Json, Inexact> {
    let given = given.as_object().ok_or(RARE)?;
    // Tools that the engine is to run itself have a type of their own.
    if given.get("type").is_some_and(|kind| kind != "custom") {
        return Err(RARE);
    }
    refuse(given, &["defer_loading"])?;
    let mut function = Map::new();
    for (name, from) in [("name", "name"), ("description", "description"), ("parameters", "input_schema")] {
        function.insert(name.to_owned(), given.get(from).cloned().unwrap_or(Json::Null));
    }
    keep(given, &["strict"], &mut function);
    Ok(json!({"type": "function", "function": function}))
}

/// A request of `OpenAI`'s `/v1/responses` as a chat request: instructions, and texts in turns.
///
/// # Errors
/// [`Inexact`].
pub fn of_responses(body: &Map<String, Json>) -> Result<Map<String, Json>, Inexact> {
    // What came before is with the engine; tools are described to the model in another way.
    refuse(body, &["previous_response_id", "previous_input_messages", "tools", "reasoning", "prompt", "text"])?;
    let mut messages = Vec::new();
    if let Some(text) = body.get("instructions").and_then(Json::as_str).filter(|text| !text.is_empty()) {
        messages.push(json!({"role": "system", "content": text}));
    }
    match body.get("input") {
        Some(Json::String(text)) => messages.push(json!({"role": "user", "content": text})),
        Some(Json::Array(items)) => {
            for item in items {
                let role = item.get("role").and_then(Json::as_str);
                let is_turn = item.get("type").is_none_or(|kind| kind == "message");
                let (Some(role @ ("user" | "system")), true) = (role, is_turn) else { return Err(RARE) };
                messages.push(json!({"role": role, "content": item.get("content").ok_or(RARE)?}));
            }
        }
        _ => return Err(RARE),
    }
    let mut made = Map::from_iter([("messages".to_owned(), Json::Array(messages))]);
    keep(body, &["chat_template_kwargs"], &mut made);
    Ok(made)
}

fn refuse(fields: &Map<String, Json>, rare: &[&str]) -> Result<(), Inexact> {
    let is_given = |value: &Json| !value.is_null() && value.as_array().is_none_or(|items| !items.is_empty());
    if rare.iter().any(|name| fields.get(*name).is_some_and(is_given)) { Err(RARE) } else { Ok(()) }
}

fn keep(from: &Map<String, Json>, names: &[&str], into: &mut Map<String, Json>) {
    for name in names {
        if let Some(value) = from.get(*name).filter(|value| !value.is_null()) {
            into.insert((*name).to_owned(), value.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(body: &Json) -> Result<Map<String, Json>, Inexact> {
        of_messages(body.as_object().expect("an object"))
    }

    #[test]
    fn a_conversation_with_tools() {
        let body = json!({
            "system": [{"type": "text", "text": "x-anthropic-billing-header: 1"}, {"type": "text", "text": "Be brief."}],
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": [{"type": "text", "text": "Wait."}, {"type": "tool_use", "id": "t1", "name": "f", "input": {"b": 1}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
                {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
            ],
            "tools": [{"name": "f", "description": "does", "input_schema": {"type": "object"}}],
        });
        let made = messages(&body).expect("nothing rare");
        let call = json!([{"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"b": 1}}}]);
        assert_eq!(
            made["messages"],
            json!([
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "tool_calls": call, "content": "Wait."},
                {"role": "tool", "tool_call_id": "t1", "content": "a\nb"},
                {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
            ])
        );
        assert_eq!(
            made["tools"],
            json!([{"type": "function", "function": {"name": "f", "description": "does", "parameters": {"type": "object"}}}])
        );
    }

    #[test]
    fn what_is_rare_is_said() {
        for (field, value) in [
            ("thinking", json!({"type": "enabled"})),
            ("messages", json!([{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}])),
            ("messages", json!([{"role": "system", "content": "x"}])),
            ("tools", json!([{"type": "web_search_20250305", "name": "web_search"}])),
        ] {
            let mut body = json!({"messages": [{"role": "user", "content": "x"}]});
            body[field] = value;
            assert_eq!(messages(&body), Err(RARE), "{field}");
        }
        let image = json!({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]});
        assert_eq!(messages(&image), Err(Inexact::Multimodal));
    }

    #[test]
    fn responses_are_instructions_and_turns() {
        let of = |body: &Json| of_responses(body.as_object().expect("an object"));
        let turns = json!([{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]);
        let made = of(&json!({"instructions": "Be brief.", "input": turns, "tools": []})).expect("nothing rare");
        assert_eq!(made["messages"][0], json!({"role": "system", "content": "Be brief."}));
        assert_eq!(made["messages"][1], turns[0]);
        assert_eq!(of(&json!({"input": "Hi"})).expect("text")["messages"], json!([{"role": "user", "content": "Hi"}]));
        assert!(of(&json!({"input": "Hi", "previous_response_id": "r"})).is_err());
        assert!(of(&json!({"input": [{"type": "function_call_output", "output": "x"}]})).is_err());
    }
}
