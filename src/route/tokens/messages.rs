//! A chat request's messages and tools as vLLM hands them to the template.
//!
//! Facts of vLLM 0.32: contents are joined to text unless the template loops over parts; arguments
//! of tool calls become objects; tools are dumped with the fields its models declare. Whatever is
//! rare is [`Inexact`] rather than guessed.

use serde_json::{Map, Value as Json};

use super::Inexact;

/// What a template is given.
#[derive(Debug)]
pub struct Conversation {
    /// The messages.
    pub messages: Json,
    /// The tools, if any.
    pub tools: Option<Json>,
    /// What else.
    pub fields: Map<String, Json>,
}

/// Reads a chat request.
///
/// # Errors
/// [`Inexact`].
pub fn conversation(body: &Map<String, Json>, takes_parts: bool) -> Result<Conversation, Inexact> {
    for name in ["chat_template", "documents", "truncate_prompt_tokens", "mm_processor_kwargs", "media_io_kwargs"] {
        if body.get(name).is_some_and(|value| !value.is_null()) {
            return Err(Inexact::Option("a prompt option that only the engine applies"));
        }
    }
    if body.get("continue_final_message").is_some_and(|value| value == true) {
        return Err(Inexact::Option("continue_final_message"));
    }
    if body.get("tool_choice").is_some_and(|choice| choice == "none") && body.contains_key("tools") {
        return Err(Inexact::Option("tools with tool_choice none"));
    }
    let given = body.get("messages").and_then(Json::as_array).ok_or(Inexact::Option("no messages"))?;
    let messages = given.iter().map(|it| message(it, takes_parts)).collect::<Result<Vec<_>, _>>()?;
    let tools = match body.get("tools") {
        None | Some(Json::Null) => None,
        Some(Json::Array(tools)) => Some(Json::Array(tools.iter().map(tool).collect::<Result<_, _>>()?)),
        Some(_) => return Err(Inexact::Option("tools that are no list")),
    };
    let mut fields = match body.get("chat_template_kwargs") {
        None | Some(Json::Null) => Map::new(),
        Some(Json::Object(fields)) => fields.clone(),
        Some(_) => return Err(Inexact::Option("chat_template_kwargs")),
    };
    if let Some(effort) = body.get("reasoning_effort").filter(|value| !value.is_null()) {
        if !fields.contains_key("enable_thinking") {
            fields.insert("enable_thinking".to_owned(), Json::Bool(effort != "none"));
        }
        fields.insert("reasoning_effort".to_owned(), effort.clone());
    }
    if let Some(add) = body.get("add_generation_prompt").filter(|value| value.is_boolean()) {
        fields.insert("add_generation_prompt".to_owned(), add.clone());
    }
    exact_numbers(&Json::Array(messages.clone()))?;
    if let Some(tools) = &tools {
        exact_numbers(tools)?;
    }
    Ok(Conversation { messages: Json::Array(messages), tools, fields })
}

/// Numbers beyond 64 bits were rounded when they were read.
fn exact_numbers(value: &Json) -> Result<(), Inexact> {
    match value {
        Json::Number(number) if number.is_f64() && number.as_f64().is_none_or(|it| it.abs() >= 9e15) => {
            Err(Inexact::Option("a number beyond 64 bits"))
        }
        Json::Array(items) => items.iter().try_for_each(exact_numbers),
        Json::Object(fields) => fields.values().try_for_each(exact_numbers),
        _ => Ok(()),
    }
}

fn message(given: &Json, takes_parts: bool) -> Result<Json, Inexact> {
    const WRONG: Inexact = Inexact::Option("a message of unknown form");
    let given = given.as_object().ok_or(WRONG)?;
    let role = given.get("role").and_then(Json::as_str).ok_or(WRONG)?;
    if role == "developer" {
        return Err(Inexact::Option("the role developer"));
    }
    let mut made = Map::new();
    made.insert("role".to_owned(), Json::String(role.to_owned()));
    let parts = parts(given.get("content").unwrap_or(&Json::Null))?;
    if role == "system" && parts.iter().any(|(text, _)| text.contains("x-anthropic-billing-header")) {
        return Err(Inexact::Option("a billing header"));
    }
    if takes_parts && parts.iter().any(|(_, plain)| !plain) {
        return Err(Inexact::Option("content parts with more than text"));
    }
    let joined = || parts.iter().map(|(text, _)| *text).collect::<Vec<_>>().join("\n");
    let content = if takes_parts && role != "tool" {
        let part = |(text, _): &(&str, bool)| serde_json::json!({"type": "text", "text": text});
        Json::Array(parts.iter().map(part).collect())
    } else {
        Json::String(joined())
    };
    made.insert("content".to_owned(), content);
    if role == "assistant" {
        if let Some(calls) = given.get("tool_calls").and_then(Json::as_array).filter(|calls| !calls.is_empty()) {
            made.insert("tool_calls".to_owned(), Json::Array(calls.iter().map(call).collect::<Result<_, _>>()?));
        }
        if let Some(reasoning) = given.get("reasoning").filter(|value| !value.is_null()) {
            made.insert("reasoning".to_owned(), reasoning.clone());
            made.insert("reasoning_content".to_owned(), reasoning.clone());
        }
    } else if role == "tool"
        && let Some(id) = given.get("tool_call_id")
    {
        made.insert("tool_call_id".to_owned(), id.clone());
    }
    for name in ["name", "task"] {
        if let Some(text) = given.get(name).filter(|value| value.is_string()) {
            made.insert(name.to_owned(), text.clone());
        }
    }
    Ok(Json::Object(made))
}

/// The texts of a content, each with whether it is nothing but text.
fn parts(content: &Json) -> Result<Vec<(&str, bool)>, Inexact> {
    match content {
        Json::Null => Ok(Vec::new()),
        Json::String(text) => Ok(vec![(text, true)]),
        Json::Array(parts) => parts.iter().map(part).collect(),
        _ => Err(Inexact::Option("content of unknown form")),
    }
}

fn part(part: &Json) -> Result<(&str, bool), Inexact> {
    if let Some(text) = part.as_str() {
        return Ok((text, true));
    }
    let kind = part.get("type").and_then(Json::as_str);
    match (kind, part.get("text").and_then(Json::as_str)) {
        (Some("text" | "input_text" | "output_text"), Some(text)) => {
            Ok((text, part.as_object().is_some_and(|fields| fields.len() == 2)))
        }
        (Some("text" | "input_text" | "output_text" | "refusal" | "thinking"), _) => {
            Err(Inexact::Option("a rare content part"))
        }
        _ => Err(Inexact::Multimodal),
    }
}

/// A tool call, its arguments as an object.
fn call(given: &Json) -> Result<Json, Inexact> {
    const WRONG: Inexact = Inexact::Option("a tool call of unknown form");
    let mut call = given.as_object().ok_or(WRONG)?.clone();
    let function = call.get_mut("function").and_then(Json::as_object_mut).ok_or(WRONG)?;
    let arguments = match function.get("arguments") {
        Some(Json::String(text)) => serde_json::from_str(text).unwrap_or(Json::Null),
        Some(other) => other.clone(),
        None => Json::Null,
    };
    let arguments = if arguments.is_object() { arguments } else { Json::Object(Map::new()) };
    function.insert("arguments".to_owned(), arguments);
    Ok(Json::Object(call))
}

/// A tool with the fields that vLLM's models declare, in their order.
fn tool(given: &Json) -> Result<Json, Inexact> {
    const WRONG: Inexact = Inexact::Option("a tool of unknown form");
    let function = given.get("function").and_then(Json::as_object).ok_or(WRONG)?;
    if given.get("defer_loading").is_some_and(|value| !value.is_null()) {
        return Err(WRONG);
    }
    let mut made = Map::new();
    for name in ["name", "description", "parameters"] {
        made.insert(name.to_owned(), function.get(name).cloned().unwrap_or(Json::Null));
    }
    for name in ["strict", "defer_loading"] {
        if let Some(value) = function.get(name).filter(|value| !value.is_null()) {
            made.insert(name.to_owned(), value.clone());
        }
    }
    let kind = given.get("type").cloned().unwrap_or_else(|| Json::String("function".to_owned()));
    Ok(serde_json::json!({"type": kind, "function": made}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: &Json, takes_parts: bool) -> Result<Conversation, Inexact> {
        conversation(body.as_object().expect("an object"), takes_parts)
    }

    #[test]
    fn contents_are_joined_or_split() {
        let body = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]});
        assert_eq!(read(&body, false).expect("plain").messages[0]["content"], "a\nb");
        assert_eq!(read(&body, true).expect("plain").messages[0]["content"][1], json!({"type": "text", "text": "b"}));
    }

    #[test]
    fn arguments_become_objects() {
        let call = |arguments: Json| json!({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]}]});
        let arguments = |given: Json| {
            let made = read(&call(given), false).expect("plain");
            made.messages[0]["tool_calls"][0]["function"]["arguments"].clone()
        };
        assert_eq!(arguments(json!("{\"b\": 1, \"a\": 2}")).to_string(), r#"{"b":1,"a":2}"#);
        assert_eq!(arguments(json!("broken {")), json!({}));
        assert_eq!(arguments(json!("[1]")), json!({}));
    }

    #[test]
    fn what_is_rare_is_said() {
        let image =
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]});
        assert_eq!(read(&image, true).err(), Some(Inexact::Multimodal));
        let large = json!({"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {"name": "f", "parameters": {"maximum": 1e300}}}]});
        assert!(matches!(read(&large, true).err(), Some(Inexact::Option(_))));
    }
}
