//! One model's tokenizer and chat template.
//!
//! A text is cut where the tokenizer certainly cuts it, too: at its added tokens, and within long
//! texts at a space between two ASCII letters. Pieces are remembered, so that of a conversation
//! only the new turn costs; and of a piece that is new, words are ([`super::words`]). That holds
//! for byte-level BPE, whose pretokenizers all begin a word at such a space; other tokenizers get
//! the whole text every time.

use std::path::Path;
use std::sync::Arc;

use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::{Map, Value as Json};
use tokenizers::Tokenizer;

use super::Inexact;
use super::memo::Memo;
use super::messages;
use super::template::Template;
use super::words::Words;
use kvcellar_block::error::{Error, Result};

/// Bytes of a piece within a long text.
const PIECE_BYTES: usize = 1 << 10;

/// A model's way from requests to ids.
#[derive(Debug)]
pub struct TokenModel {
    tokenizer: Tokenizer,
    /// Finds added tokens; `None`: texts are not cut.
    added: Option<(AhoCorasick, Vec<u32>)>,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    template: std::result::Result<Template, Inexact>,
    tool_template: Option<Template>,
    memo: Memo,
    words: Words,
}

impl TokenModel {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` in a model's
    /// directory.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`].
    pub fn open(dir: &Path, memo_bytes: usize) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read_to_string(&path)
                .map_err(|error| Error::io("reading", &path, error, "Name the directory of a Hugging Face model"))
        };
        let wrong = |name: &str, problem: String| {
            Error::config("tokenizer", format!("{name}: {problem}"), "Name the directory of a Hugging Face model")
        };
        let source = read("tokenizer.json")?;
        let json: Json = serde_json::from_str(&source).map_err(|error| wrong("tokenizer.json", error.to_string()))?;
        let mut tokenizer: Tokenizer =
            source.parse().map_err(|error: tokenizers::Error| wrong("tokenizer.json", error.to_string()))?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| wrong("tokenizer.json", error.to_string()))?;
        let config: Json = match read("tokenizer_config.json") {
            Ok(text) => {
                serde_json::from_str(&text).map_err(|error| wrong("tokenizer_config.json", error.to_string()))?
            }
            Err(_) => Json::Null,
        };
        let special = special_tokens(&config);
        let source = |name: &str| template_source(dir, &config, name);
        let template = source("default").map_or(Err(Inexact::NoTemplate), |text| Template::new(&text, &special));
        let tool_template = source("tool_use").and_then(|text| Template::new(&text, &special).ok());
        let added = can_cut(&json).then(|| added_tokens(&json)).flatten();
        let mut model = Self {
            tokenizer,
            added,
            prefix: Vec::new(),
            suffix: Vec::new(),
            template,
            tool_template,
            memo: Memo::new(memo_bytes),
            words: Words::default(),
        };
        model.learn_specials().map_err(|problem| wrong("tokenizer.json", problem.to_string()))?;
        Ok(model)
    }

    /// What the tokenizer puts around every text.
    fn learn_specials(&mut self) -> std::result::Result<(), Inexact> {
        let (bare, whole) = (self.whole("a", false)?, self.whole("a", true)?);
        let at = whole.windows(bare.len().max(1)).position(|window| window == bare).ok_or(Inexact::Encode)?;
        self.prefix = whole[..at].to_vec();
        self.suffix = whole[at + bare.len()..].to_vec();
        Ok(())
    }

    fn whole(&self, text: &str, special: bool) -> std::result::Result<Vec<u32>, Inexact> {
        let encoding = self.tokenizer.encode_fast(text, special).map_err(|_| Inexact::Encode)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of a text. `special`: with what the tokenizer puts around it.
    ///
    /// # Errors
    /// [`Inexact::Encode`].
    pub fn encode(&self, text: &str, special: bool) -> std::result::Result<Vec<u32>, Inexact> {
        let Some((finder, ids)) = &self.added else { return self.whole(text, special) };
        let mut out = Vec::with_capacity(text.len() / 3);
        if special {
            out.extend_from_slice(&self.prefix);
        }
        let mut from = 0;
        for found in finder.find_iter(text) {
            self.pieces(&text[from..found.start()], &mut out)?;
            out.push(ids[found.pattern().as_usize()]);
            from = found.end();
        }
        self.pieces(&text[from..], &mut out)?;
        if special {
            out.extend_from_slice(&self.suffix);
        }
        Ok(out)
    }

    fn pieces(&self, mut text: &str, out: &mut Vec<u32>) -> std::result::Result<(), Inexact> {
        while !text.is_empty() {
            let (piece, rest) = text.split_at(cut(text));
            let name = Memo::name(piece);
            if let Some(ids) = self.memo.get(name) {
                out.extend_from_slice(&ids);
            } else {
                let from = out.len();
                self.words.encode(piece, out, |word| self.whole(word, false))?;
                self.memo.put(name, Arc::from(&out[from..]));
            }
            text = rest;
        }
        Ok(())
    }

    /// The text that a chat request becomes.
    ///
    /// # Errors
    /// [`Inexact`].
    pub fn chat_text(&self, body: &Map<String, Json>) -> std::result::Result<String, Inexact> {
        let has_tools = body.get("tools").is_some_and(|tools| !tools.is_null());
        let template = match (&self.tool_template, has_tools) {
            (Some(template), true) => template,
            _ => self.template.as_ref().map_err(|problem| *problem)?,
        };
        let conversation = messages::conversation(body, template.takes_parts)?;
        template.render(&conversation.messages, conversation.tools.as_ref(), &conversation.fields)
    }

    /// The ids of a chat request.
    ///
    /// # Errors
    /// [`Inexact`].
    pub fn chat(&self, body: &Map<String, Json>) -> std::result::Result<Vec<u32>, Inexact> {
        let text = self.chat_text(body)?;
        let special = body.get("add_special_tokens").and_then(Json::as_bool).unwrap_or(false);
        self.encode(&text, special)
    }

    /// Bytes of remembered texts.
    pub fn memo_bytes(&self) -> usize {
        self.memo.bytes()
    }
}

/// Where a long text may be cut: at a space between two ASCII letters after [`PIECE_BYTES`].
fn cut(text: &str) -> usize {
    let bytes = text.as_bytes();
    let Some(late) = bytes.get(PIECE_BYTES..) else { return text.len() };
    let between = |it: &[u8]| it[1] == b' ' && it[0].is_ascii_alphabetic() && it[2].is_ascii_alphabetic();
    late.windows(3).position(between).map_or(text.len(), |at| PIECE_BYTES + at + 1)
}

/// Byte-level BPE whose pretokenizer is one of those that begin a word at a space.
fn can_cut(json: &Json) -> bool {
    let plain = |step: &Json| match step["type"].as_str() {
        Some("ByteLevel") => step["add_prefix_space"] == false,
        Some("Digits") => true,
        Some("Split") => step["pattern"]["Regex"].as_str().is_some_and(|it| it.contains("\\p{L}")),
        _ => false,
    };
    let pre = &json["pre_tokenizer"];
    let pretokenizes = match pre["type"].as_str() {
        Some("Sequence") => pre["pretokenizers"].as_array().is_some_and(|steps| steps.iter().all(plain)),
        _ => plain(pre),
    };
    let normalizer = &json["normalizer"];
    json["model"]["type"] == "BPE" && pretokenizes && (normalizer.is_null() || normalizer["type"] == "NFC")
}

/// Finds added tokens in raw text; `None` where some of them do more than stand for themselves.
fn added_tokens(json: &Json) -> Option<(AhoCorasick, Vec<u32>)> {
    let added = json["added_tokens"].as_array()?;
    let simple =
        |token: &Json| ["lstrip", "rstrip", "single_word", "normalized"].iter().all(|flag| token[flag] == false);
    if !added.iter().all(simple) {
        return None;
    }
    let texts: Vec<&str> = added.iter().map(|token| token["content"].as_str()).collect::<Option<_>>()?;
    let ids = added.iter().map(|token| Some(token["id"].as_u64()? as u32)).collect::<Option<_>>()?;
    let finder = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(texts).ok()?;
    Some((finder, ids))
}

fn special_tokens(config: &Json) -> Vec<(String, String)> {
    let Some(fields) = config.as_object() else { return Vec::new() };
    let text = |value: &Json| value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned);
    let names = fields.iter().filter(|(name, _)| name.ends_with("_token"));
    names.filter_map(|(name, value)| Some((name.clone(), text(value)?))).collect()
}

/// A named template, where the model has several, or its only one as `default`.
fn template_source(dir: &Path, config: &Json, name: &str) -> Option<String> {
    let file = if name == "default" {
        dir.join("chat_template.jinja")
    } else {
        dir.join("additional_chat_templates").join(format!("{name}.jinja"))
    };
    if let Ok(text) = std::fs::read_to_string(file) {
        return Some(text);
    }
    match &config["chat_template"] {
        Json::String(text) if name == "default" => Some(text.clone()),
        Json::Array(named) => {
            let found = named.iter().find(|it| it["name"] == name)?;
            found["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_words_only() {
        let text = format!("{} word after 12 34", "x".repeat(PIECE_BYTES + 1));
        let at = cut(&text);
        assert_eq!(&text[at..], " word after 12 34");
        assert_eq!(cut("short text"), "short text".len());
        let digits = "1 ".repeat(PIECE_BYTES);
        assert_eq!(cut(&digits), digits.len(), "no letters, no cut");
    }
}
