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

/// An open log.
#[derive(Debug)]
pub struct Trace {
    file: File,
    path: PathBuf,
    failed: Option<std::io::Error>,
    /// Writing failed and the caller knows: nothing more is written.
    told: bool,
}

impl Trace {
    /// Opens (and empties) the log at `path`.
    ///
    /// # Errors
    /// [`Error::Io`] naming the path.
    pub fn open(path: &Path) -> Result<Self> {
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
        Ok(Self { file, path: path.to_owned(), failed: None, told: false })
    }

    /// Writes one operation.
    pub fn write(&mut self, op: &Value) {
        if self.told || self.failed.is_some() {
            return;
        }
        let mut line = op.to_string();
        line.push('\n');
        self.failed = self.file.write_all(line.as_bytes()).err();
    }

    /// Why the log ends early, if it does. Told once.
    pub fn take_failure(&mut self) -> Option<Error> {
        let error = self.failed.take()?;
        self.told = true;
        Some(Error::io("writing trace_file", &self.path, error, "The log ends here; the engine goes on"))
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
