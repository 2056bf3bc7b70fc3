//! What a server answers, of bounded length, and why there is no answer.

use reqwest::Response;

/// Why a body was not read to its end.
#[derive(Debug)]
pub(crate) enum UnreadBody {
    /// It has more bytes than it may.
    TooLong,
    /// It broke off.
    Broken(reqwest::Error),
}

/// A body of at most so many bytes.
pub(crate) async fn body(mut answer: Response, bytes_max: usize) -> Result<Vec<u8>, UnreadBody> {
    let mut body = Vec::new();
    while let Some(part) = answer.chunk().await.map_err(UnreadBody::Broken)? {
        if body.len() + part.len() > bytes_max {
            return Err(UnreadBody::TooLong);
        }
        body.extend_from_slice(&part);
    }
    Ok(body)
}

/// The innermost reason says what is wrong.
pub(crate) fn causes(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), causes)
}
