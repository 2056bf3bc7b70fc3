//! Requests of a recorded or made-up workload, one after another, as often as they are asked for.
//!
//! A trace file is in Mooncake's format: one JSON object a line. Files of any size are read line by
//! line and never held.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use super::request::TracedRequest;
use super::synthetic::Synthetic;
use kvcellar_block::error::{Error, Result};

/// What a line has to be, for messages.
const EXPECTED: &str = "expected a JSON object such as {\"timestamp\": 0, \"input_length\": 600, \
                        \"output_length\": 52, \"hash_ids\": [0, 1]}";

/// Where requests come from.
#[derive(Debug, Clone)]
pub enum WorkloadSource {
    /// A trace file, whose blocks have so many tokens.
    File {
        /// Where it lies.
        path: PathBuf,
        /// Tokens of a block.
        block_tokens: u32,
    },
    /// A made-up workload.
    Made(Synthetic),
}

impl WorkloadSource {
    /// Its name in reports.
    pub fn name(&self) -> String {
        match self {
            Self::File { path, .. } => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            Self::Made(made) => made.name(),
        }
    }

    /// Shows every request in the order of time.
    ///
    /// # Errors
    /// [`Error::Io`] for the file, [`Error::Config`] naming the line that is no request, and those
    /// of `visit`.
    pub fn each(&self, visit: &mut dyn FnMut(&TracedRequest) -> Result<()>) -> Result<()> {
        match self {
            Self::File { path, block_tokens } => each_line(path, *block_tokens, visit),
            Self::Made(made) => made.requests().iter().try_for_each(visit),
        }
    }
}

fn each_line(path: &Path, block_tokens: u32, visit: &mut dyn FnMut(&TracedRequest) -> Result<()>) -> Result<()> {
    let io = |error| Error::io("reading", path, error, "Name a trace file in Mooncake's format, one request a line");
    let file = File::open(path).map_err(io)?;
    let mut last_ms = 0;
    for (line, number) in BufReader::new(file).lines().zip(1_u64..) {
        let line = line.map_err(io)?;
        if line.trim().is_empty() {
            continue;
        }
        let wrong = |problem: String| {
            let field = format!("{} line {number}", path.display());
            Error::config(&field, problem, "Mend or remove the line")
        };
        let request: TracedRequest =
            serde_json::from_str(&line).map_err(|error| wrong(format!("{error}; {EXPECTED}")))?;
        let wanted = request.prompt_tokens.div_ceil(block_tokens) as usize;
        if request.blocks.len() != wanted {
            return Err(wrong(format!(
                "has {} hash_ids for input_length {}, expected {wanted} of {block_tokens} tokens (--block-tokens)",
                request.blocks.len(),
                request.prompt_tokens
            )));
        }
        if request.at_ms < last_ms {
            return Err(wrong(format!(
                "timestamp {} comes after {last_ms}, expected the order of time",
                request.at_ms
            )));
        }
        last_ms = request.at_ms;
        visit(&request)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<TracedRequest>> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), text).expect("written");
        let mut found = Vec::new();
        WorkloadSource::File { path: file.path().to_owned(), block_tokens: 512 }.each(&mut |request| {
            found.push(request.clone());
            Ok(())
        })?;
        Ok(found)
    }

    const GOOD: &str = "{\"timestamp\": 5, \"input_length\": 600, \"output_length\": 2, \"hash_ids\": [7, 8]}\n";

    #[test]
    fn lines_become_requests() {
        let found = read(&format!("{GOOD}\n{GOOD}")).expect("whole");
        assert_eq!(found.len(), 2);
        assert_eq!(found[0], TracedRequest { at_ms: 5, prompt_tokens: 600, answer_tokens: 2, blocks: vec![7, 8] });
        assert_eq!((found[0].tokens_of(1, 512), found[0].tokens_of(2, 512)), (512, 600));
    }

    #[test]
    fn a_malformed_line_is_named_with_what_was_expected() {
        let cases = [
            (format!("{GOOD}{{\"timestamp\": 1}}\n"), "line 2", "input_length"),
            (format!("{GOOD}{GOOD}not json\n"), "line 3", "expected a JSON object"),
            (GOOD.replace("[7, 8]", "[7, -8]"), "line 1", "hash_ids"),
            (GOOD.replace("[7, 8]", "[7]"), "line 1", "expected 2 of 512 tokens"),
            (format!("{GOOD}{}", GOOD.replace(": 5", ": 4")), "line 2", "expected the order of time"),
        ];
        for (text, line, problem) in cases {
            let message = read(&text).expect_err("malformed").to_string();
            assert!(message.contains(line) && message.contains(problem), "{message}");
        }
    }
}
