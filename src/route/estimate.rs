//! Prompts without a tokenizer: about four bytes a token, blocks of 64 of them, a chain of hashes.

use serde_json::{Map, Value as Json};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Bytes of a token, on average.
pub const TOKEN_BYTES: usize = 4;

/// Tokens of a block.
pub const BLOCK_TOKENS: usize = 64;

/// Blocks that are matched at most (131,072 tokens).
pub const BLOCKS_MAX: usize = 2048;

/// A prompt's bytes in the order in which the engine will see them. Chats: what is said before,
/// tools, then every message, each closed, so that a longer conversation begins with a shorter
/// one's bytes.
pub fn bytes_of(body: &Map<String, Json>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut add = |value: &Json| match value {
        Json::String(text) => bytes.extend_from_slice(text.as_bytes()),
        other => {
            // Writing JSON into memory does not fail.
            let _written = serde_json::to_writer(&mut bytes, other);
            bytes.push(b'\n');
        }
    };
    let list = |name: &str| body.get(name).and_then(Json::as_array);
    // A list of turns; a list of prompts has no objects in it.
    let turns = list("messages").or_else(|| list("input").filter(|items| items.first().is_some_and(Json::is_object)));
    if let Some(turns) = turns {
        let before = ["system", "instructions", "tools"].iter().filter_map(|name| body.get(*name));
        before.filter(|value| !value.is_null()).for_each(|value| match value {
            // vLLM leaves out a header that is another one with each request.
            Json::Array(blocks) => blocks.iter().filter(|block| !is_billing(block)).for_each(&mut add),
            value => add(value),
        });
        turns.iter().for_each(&mut add);
        return bytes;
    }
    body.get("instructions").filter(|text| !text.is_null()).into_iter().for_each(&mut add);
    let named = ["prompt", "input", "token_ids", "input_ids", "text"];
    match named.iter().find_map(|name| body.get(*name)) {
        // Of several prompts the first stands for all.
        Some(Json::Array(items)) if items.first().is_some_and(|it| !it.is_number()) => add(&items[0]),
        Some(Json::Array(ids)) => {
            let id = |it: &Json| (it.as_u64().unwrap_or(0) as u32).to_le_bytes();
            bytes.extend(ids.iter().flat_map(id));
        }
        Some(other) => add(other),
        None => {}
    }
    bytes
}

/// A block that Claude Code puts first into its system prompt.
fn is_billing(block: &Json) -> bool {
    let text = block.get("text").and_then(Json::as_str);
    text.is_some_and(|text| text.starts_with("x-anthropic-billing-header"))
}

/// Tokens, about.
pub fn tokens(bytes: usize) -> u32 {
    bytes.div_ceil(TOKEN_BYTES) as u32
}

/// Hashes of a prompt's full blocks. `root`: what prompts must share beside their text.
pub fn hashes(root: u64, bytes: &[u8]) -> Vec<u64> {
    let mut parent = root;
    let mut next = |block: &[u8]| {
        parent = xxh3_64_with_seed(block, parent);
        parent
    };
    bytes.chunks_exact(BLOCK_TOKENS * TOKEN_BYTES).take(BLOCKS_MAX).map(&mut next).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(body: &Json) -> Vec<u64> {
        hashes(1, &bytes_of(body.as_object().expect("an object")))
    }

    #[test]
    fn a_longer_conversation_begins_like_a_shorter_one() {
        let first = json!({"role": "user", "content": "long text ".repeat(100)});
        let short = of(&json!({"messages": [first]}));
        let long = of(&json!({"messages": [first, {"role": "assistant", "content": "x".repeat(900)}]}));
        assert!(short.len() >= 3 && long.len() > short.len());
        assert_eq!(long[..short.len()], short[..]);
        let tools = of(&json!({"messages": [first], "tools": [{"type": "function"}]}));
        assert_ne!(tools[0], short[0]);
    }

    #[test]
    fn forms_of_prompts() {
        let text = "y".repeat(1000);
        assert_eq!(of(&json!({"prompt": text})), of(&json!({"prompt": [text, "other"]})));
        assert_eq!(of(&json!({"prompt": (0..200).collect::<Vec<u32>>()})).len(), 3);
        assert!(of(&json!({"prompt": 3})).is_empty() && of(&json!({})).is_empty());
        assert_eq!(of(&json!({"text": text})), of(&json!({"prompt": text})));
        let turns = |items: &Json| of(&json!({"instructions": text, "input": items}));
        let turn = json!({"role": "user", "content": text});
        let (one, two) = (turns(&json!([turn])), turns(&json!([turn, turn])));
        assert!(two.len() > one.len() && two[..one.len()] == one[..], "each turn counts");
        let billed = |number: u32| {
            let block = |text: String| json!({"type": "text", "text": text});
            let system = json!([block(format!("x-anthropic-billing-header: {number}")), block("Be brief.".to_owned())]);
            of(&json!({"system": system, "messages": [turn]}))
        };
        assert_eq!(billed(1), billed(2));
        assert_ne!(of(&json!({"system": "x", "messages": [turn]}))[0], of(&json!({"messages": [turn]}))[0]);
    }
}
