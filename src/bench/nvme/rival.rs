//! Another contender of `kvcellar bench nvme`, in the process that has started this one: a line of
//! JSON asks for a turn, a line of JSON answers.
//!
//! `{"size": bytes, "blocks": n, "write": bool, "chain": n}` and `{"seconds": s, "cpu_s": s}`.

use std::io::{BufRead, Write};

use serde::Deserialize;
use serde_json::json;

use super::RivalTurn;
use super::meter::{DiskWay, Reading};
use kvcellar_block::error::{Error, Result};

#[derive(Deserialize)]
struct RivalAnswer {
    seconds: f64,
    cpu_s: f64,
}

/// One turn.
///
/// # Errors
/// [`Error::DataLost`] when nobody answers, or not with what was asked for.
pub(super) fn over_stdio(turn: RivalTurn) -> Result<Reading> {
    let asked =
        json!({"size": turn.size, "blocks": turn.blocks, "write": turn.way == DiskWay::Write, "chain": turn.chain});
    let lost = |error: std::io::Error| Error::lost("benchmark", format!("the rival is gone: {error}"));
    writeln!(std::io::stdout(), "{asked}").and_then(|()| std::io::stdout().flush()).map_err(lost)?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).map_err(lost)?;
    answer(&line)
}

fn answer(line: &str) -> Result<Reading> {
    let RivalAnswer { seconds, cpu_s } = serde_json::from_str(line)
        .map_err(|error| Error::lost("benchmark", format!("the rival's answer {line:?}: {error}")))?;
    Ok(Reading { seconds, cpu_s })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_two_numbers() {
        let read = answer(r#"{"seconds": 1.5, "cpu_s": 0.25}"#).expect("an answer");
        assert!((read.seconds - 1.5).abs() < 1e-9 && (read.cpu_s - 0.25).abs() < 1e-9);
        for wrong in ["", "{}", r#"{"seconds": "x", "cpu_s": 1}"#] {
            assert!(answer(wrong).is_err(), "{wrong}");
        }
    }
}
