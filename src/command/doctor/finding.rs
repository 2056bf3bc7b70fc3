//! One line of the doctor's.

use serde::Serialize;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// KV Cellar works, but slower or with less.
    Warning,
    /// KV Cellar, or its nvme tier, does not work.
    Problem,
}

impl Status {
    /// As it is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }
}

/// What was looked at, what was found, and what to do about it.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub status: Status,
    /// What was looked at.
    pub name: &'static str,
    /// What was found.
    pub found: String,
    /// What to do about it; nothing when it is well.
    pub remedy: Option<String>,
}

impl Finding {
    /// All is well.
    pub fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { status: Status::Ok, name, found: found.into(), remedy: None }
    }

    /// Something is not well.
    pub fn new(status: Status, name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { status, name, found: found.into(), remedy: Some(remedy.into()) }
    }
}
