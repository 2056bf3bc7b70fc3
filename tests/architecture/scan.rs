//! Reads Rust source as text: what a module names in its crate, and whether it uses `unsafe`.
//!
//! Comments, string and character literals and test modules are blanked out first, so that only
//! code speaks. This is no parser: it understands `crate::` and `super::` paths and brace groups
//! after them, which is what the rules are about.

use std::collections::BTreeSet;

/// One source file: its path below `src`, with `/` between folders, and its text.
pub(crate) struct Source {
    pub(crate) path: String,
    pub(crate) text: String,
}

impl Source {
    /// The folder of its crate.
    pub(crate) fn krate(&self) -> &str {
        self.path.split('/').next().unwrap_or_default()
    }

    /// Module path in its crate: `engine/gpu/worker.rs` is `[gpu, worker]`, `engine/gpu/mod.rs` is
    /// `[gpu]`, `engine/lib.rs` is the root, empty.
    pub(crate) fn module(&self) -> Vec<&str> {
        let mut parts: Vec<&str> = self.path.trim_end_matches(".rs").split('/').skip(1).collect();
        if matches!(parts.last(), Some(&("mod" | "lib" | "main"))) {
            parts.pop();
        }
        parts
    }

    /// Top-level modules of its crate that the file's own code (not its tests) names.
    pub(crate) fn names(&self) -> BTreeSet<String> {
        let code = blank_test_modules(&blank_literals(&self.text));
        let depth = self.module().len();
        let mut found = BTreeSet::new();
        for (at, word) in words(&code) {
            let after = &code[at + word.len()..];
            let heads = match word {
                "crate" => first_names(after),
                "super" if !is_path_tail(&code, at) => above_root(after, depth),
                _ => Vec::new(),
            };
            found.extend(heads);
        }
        found
    }

    /// Whether the file's code, tests left out, contains the keyword `unsafe`.
    pub(crate) fn is_unsafe(&self) -> bool {
        self.has_word(&["unsafe"])
    }

    /// Whether the file's code, tests left out, writes to standard error itself.
    pub(crate) fn writes_to_stderr(&self) -> bool {
        self.has_word(&["eprintln", "eprint"])
    }

    fn has_word(&self, wanted: &[&str]) -> bool {
        let code = blank_test_modules(&blank_literals(&self.text));
        words(&code).any(|(_, word)| wanted.contains(&word))
    }
}

/// Names that directly follow `::`, be it one or a brace group of them.
fn first_names(after: &str) -> Vec<String> {
    let Some(rest) = after.trim_start().strip_prefix("::") else { return Vec::new() };
    let rest = rest.trim_start();
    match rest.strip_prefix('{') {
        Some(group) => group_heads(group),
        None => leading_word(rest).map(str::to_owned).into_iter().collect(),
    }
}

/// For a path that begins with `super` in a module `depth` levels below the root: the names right
/// below the root, if the path climbs that far.
fn above_root(after: &str, depth: usize) -> Vec<String> {
    let mut rest = after;
    let mut climbed = 1;
    while let Some(tail) = next_segment(rest, "super") {
        rest = tail;
        climbed += 1;
    }
    if climbed == depth { first_names(rest) } else { Vec::new() }
}

fn next_segment<'a>(after: &'a str, name: &str) -> Option<&'a str> {
    let rest = after.trim_start().strip_prefix("::")?.trim_start();
    let tail = rest.strip_prefix(name)?;
    (!tail.starts_with(is_word_char)).then_some(tail)
}

fn is_path_tail(code: &str, at: usize) -> bool {
    code[..at].trim_end().ends_with("::")
}

/// First word of every item of a brace group, of which `group` is what follows the opening brace.
fn group_heads(group: &str) -> Vec<String> {
    let mut heads = Vec::new();
    let mut depth = 0usize;
    let mut item_start = true;
    for (at, character) in group.char_indices() {
        match character {
            '}' if depth == 0 => break,
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => item_start = true,
            _ if item_start && is_word_char(character) => {
                heads.extend(leading_word(&group[at..]).map(str::to_owned));
                item_start = false;
            }
            _ => {}
        }
    }
    heads
}

fn leading_word(text: &str) -> Option<&str> {
    let end = text.find(|character| !is_word_char(character)).unwrap_or(text.len());
    (end > 0).then(|| &text[..end])
}

fn is_word_char(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// Words with their byte offsets.
fn words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    code.split(|character| !is_word_char(character))
        .filter(|word| !word.is_empty())
        .map(|word| (word.as_ptr() as usize - code.as_ptr() as usize, word))
}

/// Blanks the bodies of `#[cfg(test)] mod name { ... }`, keeping line breaks.
fn blank_test_modules(code: &str) -> String {
    let mut kept = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(at) = rest.find("#[cfg(test)]") {
        let after = &rest[at..];
        let Some(open) = after.find(['{', ';']).filter(|&open| after[open..].starts_with('{')) else {
            kept.push_str(&rest[..=at]);
            rest = &rest[at + 1..];
            continue;
        };
        let is_module = words(&after[..open]).any(|(_, word)| word == "mod");
        let end = if is_module { closing_brace(&after[open..]) + open } else { 1 };
        kept.push_str(&rest[..at]);
        if is_module {
            kept.extend(after[..end].chars().filter(|&character| character == '\n'));
        } else {
            kept.push_str(&after[..end]);
        }
        rest = &after[end..];
    }
    kept.push_str(rest);
    kept
}

/// Offset just after the brace that closes the one `text` begins with, or the end of the text.
fn closing_brace(text: &str) -> usize {
    let mut depth = 0usize;
    for (at, character) in text.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth == 1 => return at + 1,
            '}' => depth -= 1,
            _ => {}
        }
    }
    text.len()
}

/// Blanks comments, strings and character literals, keeping line breaks.
pub(crate) fn blank_literals(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let after_word = kept.ends_with(is_word_char);
        let length = literal_length(rest, after_word);
        if length == 0 {
            kept.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            kept.push(' ');
            kept.extend(rest[..length].chars().filter(|&character| character == '\n'));
            rest = &rest[length..];
        }
    }
    kept
}

/// Bytes of the comment or literal that `text` begins with, 0 if there is none. `after_word` tells
/// that the character before continues a word, so that the `r` of `for"` is no raw string.
fn literal_length(text: &str, after_word: bool) -> usize {
    if text.starts_with("//") {
        return text.find('\n').unwrap_or(text.len());
    }
    if text.starts_with("/*") {
        return block_comment_length(text);
    }
    if text.starts_with('"') {
        return quoted_length(text, '"');
    }
    if text.starts_with('\'') {
        return character_length(text);
    }
    if after_word { 0 } else { prefixed_length(text) }
}

fn block_comment_length(text: &str) -> usize {
    let mut depth = 0usize;
    let mut at = 0;
    while at < text.len() {
        let rest = &text.as_bytes()[at..];
        if rest.starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest.starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    text.len()
}

/// A literal between two `quote`s, with backslash escapes.
fn quoted_length(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, character) in text.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if character == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// A character literal; a lifetime such as `'a` is none.
fn character_length(text: &str) -> usize {
    let mut characters = text.char_indices().skip(1);
    match (characters.next(), characters.next()) {
        (Some((_, '\\')), _) => quoted_length(text, '\''),
        (Some(_), Some((at, '\''))) => at + 1,
        _ => 0,
    }
}

/// Byte, C and raw strings: `b"..."`, `r#"..."#`, `br"..."`.
fn prefixed_length(text: &str) -> usize {
    let prefix = text.len() - text.trim_start_matches(['b', 'c', 'r']).len();
    if prefix == 0 || prefix > 2 {
        return 0;
    }
    let is_raw = text[..prefix].contains('r');
    let rest = &text[prefix..];
    let hashes = rest.len() - rest.trim_start_matches('#').len();
    if !rest[hashes..].starts_with('"') {
        return 0;
    }
    if !is_raw {
        return if hashes == 0 { prefix + quoted_length(rest, '"') } else { 0 };
    }
    let end = format!("\"{}", "#".repeat(hashes));
    let body = prefix + hashes + 1;
    text[body..].find(&end).map_or(text.len(), |at| body + at + end.len())
}
