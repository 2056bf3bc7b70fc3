//! Where the command's log lines go: to standard error, one a line. All crates log through the
//! `log` facade.

use std::io::Write as _;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, Log, Metadata, Record};

use kvcellar_block::log_lines;

/// How the command writes its log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// For people: `kvcellar: ...`.
    #[default]
    Plain,
    /// One object a line: `time` (seconds since 1970), `level`, `target`, `message`.
    Json,
}

struct ToStderr(Format);

static STDERR: OnceLock<ToStderr> = OnceLock::new();

/// Lines go to standard error from now on. The first sink of a process stays.
pub fn to_stderr(format: Format) {
    // Fails where a sink is there already, which then stays.
    if log::set_logger(STDERR.get_or_init(|| ToStderr(format))).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

impl Log for ToStderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Info && log_lines::are_ours(metadata.target())
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // A log that cannot be written, because its disk is full or its reader gone, must not
            // end what wanted to write.
            let _lost = writeln!(std::io::stderr().lock(), "{}", self.0.line(record));
        }
    }

    fn flush(&self) {}
}

impl Format {
    fn line(self, record: &Record<'_>) -> String {
        match self {
            Self::Plain => format!("kvcellar: {}", record.args()),
            Self::Json => {
                let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
                serde_json::json!({
                    "time": time,
                    "level": record.level().as_str(),
                    "target": record.target(),
                    "message": record.args().to_string(),
                })
                .to_string()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_in_either_format() {
        let record =
            Record::builder().target("kvcellar_route").level(Level::Warn).args(format_args!("say \"no\"")).build();
        let line = |format: Format| format.line(&record);
        assert_eq!(line(Format::Plain), "kvcellar: say \"no\"");
        let value: serde_json::Value = serde_json::from_str(&line(Format::Json)).expect("JSON");
        assert_eq!(value["level"], "WARN");
        assert_eq!(value["target"], "kvcellar_route");
        assert_eq!(value["message"], "say \"no\"");
        assert!(value["time"].as_f64().is_some_and(|time| time > 1e9));
    }
}
