//! Engines that come and go while a command runs: a file that changes, or names that are asked
//! again.

use std::path::Path;
use std::time::{Duration, SystemTime};

use kvcellar_block::error::{Error, Result};

/// Time between two looks.
const EVERY: Duration = Duration::from_secs(2);

/// Nobody was named, and nobody can come.
pub fn nobody() -> Error {
    Error::config("engine", "no engine is named", "Give --engine, --engines-file or --dns")
}

fn stamp(file: Option<&Path>) -> Option<SystemTime> {
    file.and_then(|path| path.metadata().ok()?.modified().ok())
}

/// Looks again for ever: every time where engines are asked for, else when the file has changed.
/// What cannot be read leaves them as they are and is said once.
pub async fn keep<T>(
    file: Option<&Path>,
    is_asked_for: bool,
    look: impl AsyncFn() -> Result<T>,
    mut set: impl FnMut(T),
) {
    let (mut seen, mut said) = (stamp(file), String::new());
    loop {
        tokio::time::sleep(EVERY).await;
        let now = stamp(file);
        if !is_asked_for && now == seen {
            continue;
        }
        seen = now;
        match look().await {
            Ok(found) => {
                said.clear();
                set(found);
            }
            Err(error) if error.to_string() != said => {
                said = error.to_string();
                log::warn!("{said}; the engines stay as they were");
            }
            Err(_) => {}
        }
    }
}
