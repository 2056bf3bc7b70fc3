//! What is known of an engine beside its address.

use serde::Deserialize;

/// Which steps of a request an engine takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineRole {
    /// All of them.
    #[default]
    Both,
    /// It computes prompts for others.
    Prefill,
    /// It goes on with prompts that others have computed; it computes those as well that are not
    /// worth two steps.
    Decode,
}

impl EngineRole {
    /// As it is written in options, and shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Both => "both",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// What a pod says of an engine in it, beside its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PodNotes {
    /// Which steps of a request it takes.
    pub role: EngineRole,
    /// It ends: it gets no new requests.
    pub draining: bool,
    /// Its data-parallel rank, where each rank has an address of its own.
    pub rank: Option<u32>,
}
