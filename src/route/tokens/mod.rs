//! Prompts to the token ids that vLLM will see, in this process.
//!
//! Promises: ids are vLLM's own or the request is said to be [`Inexact`], with the reason, and
//! takes another way (an engine's render endpoint, or an estimate). Nothing here waits for a
//! network.

pub mod memo;
pub mod messages;
pub mod model;
pub mod python;
pub mod template;
pub mod words;

pub use model::TokenModel;

/// Why this process cannot say which ids vLLM will see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Inexact {
    /// No tokenizer was given for the model.
    #[error("there is no tokenizer for the model")]
    NoTokenizer,
    /// The model has no chat template.
    #[error("the model has no chat template")]
    NoTemplate,
    /// The chat template could not be rendered.
    #[error("the chat template cannot be rendered here")]
    Template,
    /// The template asks for the time of day, or something else that only the engine knows.
    #[error("the chat template asks for what only the engine knows")]
    Clock,
    /// The request carries images, sound or video.
    #[error("the request is multimodal")]
    Multimodal,
    /// The request asks for a rare way of making a prompt.
    #[error("the request uses {0}")]
    Option(&'static str),
    /// The self-check at start found other ids than vLLM's.
    #[error("the self-check found other ids than vLLM's")]
    SelfCheck,
    /// The text could not be encoded.
    #[error("the text cannot be encoded")]
    Encode,
}

impl Inexact {
    /// A short name for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoTokenizer => "no_tokenizer",
            Self::NoTemplate => "no_template",
            Self::Template => "template",
            Self::Clock => "clock",
            Self::Multimodal => "multimodal",
            Self::Option(_) => "option",
            Self::SelfCheck => "self_check",
            Self::Encode => "encode",
        }
    }
}
