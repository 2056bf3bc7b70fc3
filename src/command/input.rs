//! Text that a user hands over: a file, or `-` for standard input.

use std::io::Read;
use std::path::Path;

use kvcellar_block::error::{Error, Result};

/// All of it. `remedy`: what to name where it cannot be read.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn text(path: &Path, remedy: &'static str) -> Result<String> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(path)
    };
    read.map_err(|error| Error::io("reading", path, error, remedy))
}
