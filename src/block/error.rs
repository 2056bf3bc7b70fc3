//! Error classes, by what the caller can do about them.

use std::io;
use std::path::PathBuf;

/// Everything that can go wrong, shaped by the remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller's mistake: a setting that cannot work. The message names the field and the
    /// remedy.
    #[error("{field}: {problem}. {remedy}")]
    Config {
        /// The configuration key or command-line argument at fault.
        field: String,
        /// What is wrong with it.
        problem: String,
        /// What to write instead.
        remedy: String,
    },
    /// The model or the deployment cannot be served by this version.
    #[error("{what} is not supported: {why}. {remedy}")]
    Unsupported {
        /// The thing that is not supported, by name.
        what: String,
        /// Why.
        why: String,
        /// What the user can do.
        remedy: String,
    },
    /// The operating system refused something at a path.
    #[error("{action} {path}: {source}. {remedy}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
        /// What the user can do.
        remedy: &'static str,
    },
    /// Not now: a resource is taken or full. The same call may work later.
    #[error("{what} is busy: {holder}")]
    TryLater {
        /// The resource.
        what: String,
        /// Who holds it.
        holder: String,
    },
    /// Bytes that cannot be trusted. The block they belong to is a miss.
    #[error("{what} is damaged: {problem}")]
    DataLost {
        /// What was read.
        what: &'static str,
        /// Why it is not trusted.
        problem: String,
    },
    /// A device or its driver is gone; its tier is out of service.
    #[error("{device} does not work: {problem}. {remedy}")]
    DeviceDead {
        /// The device.
        device: String,
        /// What happened.
        problem: String,
        /// What the user can do.
        remedy: String,
    },
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A configuration mistake.
    pub fn config(field: &str, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Config { field: field.to_owned(), problem: problem.into(), remedy: remedy.into() }
    }

    /// Damaged bytes.
    pub fn lost(what: &'static str, problem: impl Into<String>) -> Self {
        Self::DataLost { what, problem: problem.into() }
    }

    /// A failed system call at `path`.
    pub fn io(action: &'static str, path: impl Into<PathBuf>, source: io::Error, remedy: &'static str) -> Self {
        Self::Io { action, path: path.into(), source, remedy }
    }
}
