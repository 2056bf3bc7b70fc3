//! Requests of a recorded or made-up workload, one after another, as often as they are asked for.
//!
//! A trace file is in Mooncake's format: one JSON object a line. Files of any size are read line by
//! line and never held.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use super::request::TracedRequest;
use super::synthetic::Synthetic;
use kvcellar_block::error::{Error, Result};

/// So many lines later a request may stand than one that came after it.
const LATE_LINES_MAX: usize = 4096;

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

/// Requests whose lines wait for earlier ones: a record has a request when it ends, and the trace
/// when it came.
#[derive(Default)]
struct ArrivalOrder {
    waiting: BinaryHeap<Reverse<(u64, u64, Later)>>,
    last_ms: u64,
}

/// A request beside what orders it.
struct Later(TracedRequest);

impl PartialEq for Later {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Later {}

impl PartialOrd for Later {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Later {
    fn cmp(&self, _: &Self) -> Ordering {
        Ordering::Equal
    }
}

impl ArrivalOrder {
    /// Takes a line's request. Returns the earliest one with its line, once enough are waiting.
    fn push(&mut self, request: TracedRequest, line: u64) -> Option<(TracedRequest, u64)> {
        self.waiting.push(Reverse((request.at_ms, line, Later(request))));
        if self.waiting.len() > LATE_LINES_MAX { self.pop() } else { None }
    }

    fn pop(&mut self) -> Option<(TracedRequest, u64)> {
        self.waiting.pop().map(|Reverse((_, line, Later(request)))| (request, line))
    }

    /// Fails where a later one has passed already.
    fn pass(&mut self, request: &TracedRequest, path: &Path, line: u64) -> Result<()> {
        if request.at_ms < self.last_ms {
            let problem = format!(
                "timestamp {} comes more than {LATE_LINES_MAX} lines after {}, expected the order of time",
                request.at_ms, self.last_ms
            );
            return Err(malformed(path, line, problem));
        }
        self.last_ms = request.at_ms;
        Ok(())
    }
}

fn malformed(path: &Path, line: u64, problem: String) -> Error {
    Error::config(&format!("{} line {line}", path.display()), problem, "Mend or remove the line")
}

fn each_line(path: &Path, block_tokens: u32, visit: &mut dyn FnMut(&TracedRequest) -> Result<()>) -> Result<()> {
    let io = |error| Error::io("reading", path, error, "Name a trace file in Mooncake's format, one request a line");
    let file = File::open(path).map_err(io)?;
    if !file.metadata().map_err(io)?.is_file() {
        let problem = format!("{} is no regular file, and a trace is read several times", path.display());
        return Err(Error::config("TRACE", problem, "Write it to a file first"));
    }
    let mut order = ArrivalOrder::default();
    for (line, number) in BufReader::new(file).lines().zip(1_u64..) {
        let line = line.map_err(io)?;
        if line.trim().is_empty() {
            continue;
        }
        let wrong = |problem: String| malformed(path, number, problem);
        let request: TracedRequest =
            serde_json::from_str(&line).map_err(|error| wrong(format!("{error}; {EXPECTED}")))?;
        if let Some(tokens) = request.block_tokens.filter(|tokens| *tokens != block_tokens) {
            return Err(wrong(format!(
                "has blocks of {tokens} tokens, expected {block_tokens}: use --block-tokens {tokens}"
            )));
        }
        let wanted = request.prompt_tokens.div_ceil(block_tokens) as usize;
        if request.blocks.len() != wanted {
            return Err(wrong(format!(
                "has {} hash_ids for input_length {}, expected {wanted} of {block_tokens} tokens (--block-tokens)",
                request.blocks.len(),
                request.prompt_tokens
            )));
        }
        if let Some((request, number)) = order.push(request, number) {
            order.pass(&request, path, number)?;
            visit(&request)?;
        }
    }
    while let Some((request, number)) = order.pop() {
        order.pass(&request, path, number)?;
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
        assert_eq!(
            found[0],
            TracedRequest {
                at_ms: 5,
                prompt_tokens: 600,
                answer_tokens: 2,
                blocks: vec![7, 8],
                ..TracedRequest::default()
            }
        );
        assert_eq!((found[0].tokens_of(1, 512), found[0].tokens_of(2, 512)), (512, 600));
    }

    #[test]
    fn requests_come_in_the_order_in_which_they_arrived() {
        let text = [9, 3, 7, 3].map(|at| GOOD.replace(": 5", &format!(": {at}"))).concat();
        let found: Vec<u64> = read(&text).expect("whole").iter().map(|request| request.at_ms).collect();
        assert_eq!(found, [3, 3, 7, 9]);
    }

    #[test]
    fn a_malformed_line_is_named_with_what_was_expected() {
        let cases = [
            (format!("{GOOD}{{\"timestamp\": 1}}\n"), "line 2", "input_length"),
            (format!("{GOOD}{GOOD}not json\n"), "line 3", "expected a JSON object"),
            (GOOD.replace("[7, 8]", "[7, -8]"), "line 1", "hash_ids"),
            (GOOD.replace("[7, 8]", "[7]"), "line 1", "expected 2 of 512 tokens"),
            (GOOD.replace('}', ", \"block_tokens\": 16}"), "line 1", "use --block-tokens 16"),
            (
                format!("{}{}", GOOD.repeat(LATE_LINES_MAX + 1), GOOD.replace(": 5", ": 4")),
                "line 4098",
                "expected the order of time",
            ),
        ];
        for (text, line, problem) in cases {
            let message = read(&text).expect_err("malformed").to_string();
            assert!(message.contains(line) && message.contains(problem), "{message}");
        }
    }
}
