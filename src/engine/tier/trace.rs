//! The operation log: what the engine was asked and what it did, in order, for replay by an
//! independent model.
//!
//! JSON lines with hashes and counts, never tokens or text. One line an operation; written through
//! at once, because the process may be killed.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use kvcellar_block::BlockKey;
use kvcellar_block::error::{Error, Result};

/// An open log file.
#[derive(Debug)]
struct TraceFile {
    file: File,
    path: PathBuf,
    failed: Option<std::io::Error>,
}

impl TraceFile {
    /// Opens (and empties) the log at `path`.
    fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)
            .map_err(|error| {
                Error::io("opening trace_file", path, error, "Write the path of a file this user may write")
            })?;
        Ok(Self { file, path: path.to_owned(), failed: None })
    }

    /// Writes one operation; none after one that could not be written.
    fn write(&mut self, op: &Value) {
        if self.failed.is_some() {
            return;
        }
        let mut line = op.to_string();
        line.push('\n');
        self.failed = self.file.write_all(line.as_bytes()).err();
    }

    /// Why the log ends early, if it does.
    fn take_failure(&mut self) -> Option<Error> {
        let error = self.failed.take()?;
        Some(Error::io("writing trace_file", &self.path, error, "The log ends here; the engine goes on"))
    }
}

/// The operation log of an engine, if the user wants one.
#[derive(Debug)]
pub struct OperationLog {
    trace: Option<TraceFile>,
}

impl OperationLog {
    /// Opens the log at `path`; without one nothing is logged.
    ///
    /// # Errors
    /// [`Error::Io`] naming the path.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        Ok(Self { trace: path.map(TraceFile::open).transpose()? })
    }

    /// Logs one operation. `line` is called only when there is a log.
    pub fn record(&mut self, line: impl FnOnce() -> Value) {
        if let Some(trace) = &mut self.trace {
            trace.write(&line());
        }
    }

    /// Ends the log, with a warning, once it could not be written.
    pub fn end_if_failed(&mut self) {
        if let Some(error) = self.trace.as_mut().and_then(TraceFile::take_failure) {
            self.trace = None;
            log::warn!("{error}");
        }
    }
}

/// Keys as the log shows them.
pub fn names(keys: impl IntoIterator<Item = BlockKey>) -> Value {
    Value::from(keys.into_iter().map(|key| key.to_string()).collect::<Vec<_>>())
}

/// A log line.
pub fn line(op: &str, fields: &[(&str, Value)]) -> Value {
    let mut line = json!({ "op": op });
    for (name, value) in fields {
        line[*name] = value.clone();
    }
    line
}
