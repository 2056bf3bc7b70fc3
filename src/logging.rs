//! Where log lines go. The crate logs through the `log` facade; this module owns its two sinks:
//! standard error for the command, and a bounded queue for a host process that has a logger of its
//! own (vLLM). Without a sink, lines are dropped.
//!
//! Only lines of this crate are taken: those of its dependencies are nobody's business here.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender, bounded};
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::limits;

/// How the command writes its log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// For people: `kvcellar: ...`.
    #[default]
    Plain,
    /// One object a line: `time` (seconds since 1970), `level`, `target`, `message`.
    Json,
}

/// A line for the host's logger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// How important it is.
    pub level: Level,
    /// What happened.
    pub text: String,
}

struct ToStderr(Format);

struct ToQueue {
    lines: Sender<Line>,
    dropped: AtomicU64,
}

static STDERR: OnceLock<ToStderr> = OnceLock::new();
static QUEUE: OnceLock<(ToQueue, Receiver<Line>)> = OnceLock::new();

/// Lines go to standard error from now on. The first sink of a process stays.
pub fn to_stderr(format: Format) {
    install(STDERR.get_or_init(|| ToStderr(format)));
}

/// The next line for the host's logger; `None` when none came within `patience`. From the first
/// call on lines are kept for it, a bounded number: what comes while nobody asks is dropped and
/// counted.
pub fn next_line(patience: Duration) -> Option<Line> {
    let (queue, lines) = QUEUE.get_or_init(|| {
        let (sender, receiver) = bounded(limits::LOG_LINES_MAX);
        (ToQueue { lines: sender, dropped: AtomicU64::new(0) }, receiver)
    });
    install(queue);
    if let Ok(line) = lines.recv_timeout(patience) {
        return Some(line);
    }
    let dropped = queue.dropped.swap(0, Ordering::Relaxed);
    (dropped > 0).then(|| Line { level: Level::Warn, text: format!("{dropped} log lines were dropped") })
}

fn install(sink: &'static dyn Log) {
    // Fails where a sink is there already, which then stays.
    if log::set_logger(sink).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

fn is_ours(metadata: &Metadata<'_>) -> bool {
    metadata.level() <= Level::Info && metadata.target().split("::").next() == Some(env!("CARGO_CRATE_NAME"))
}

impl Log for ToStderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        is_ours(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            eprintln!("{}", self.0.line(record));
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

impl Log for ToQueue {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        is_ours(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = Line { level: record.level(), text: record.args().to_string() };
        if self.lines.try_send(line).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record<'a>(target: &'a str, level: Level, text: std::fmt::Arguments<'a>) -> Record<'a> {
        Record::builder().target(target).level(level).args(text).build()
    }

    #[test]
    fn lines_of_dependencies_and_details_are_nobodys_business() {
        let (sender, lines) = bounded(4);
        let queue = ToQueue { lines: sender, dropped: AtomicU64::new(0) };
        queue.log(&record("hyper::client", Level::Error, format_args!("theirs")));
        queue.log(&record("kvcellar_like::it", Level::Error, format_args!("theirs, too")));
        queue.log(&record("kvcellar::tier", Level::Debug, format_args!("a detail")));
        queue.log(&record("kvcellar::tier::spill", Level::Warn, format_args!("ours")));
        assert_eq!(lines.try_iter().collect::<Vec<_>>(), [Line { level: Level::Warn, text: "ours".to_owned() }]);
    }

    #[test]
    fn what_nobody_takes_is_dropped_and_counted() {
        let (sender, lines) = bounded(2);
        let queue = ToQueue { lines: sender, dropped: AtomicU64::new(0) };
        for number in 0..5 {
            queue.log(&record("kvcellar", Level::Info, format_args!("{number}")));
        }
        assert_eq!(lines.len(), 2);
        assert_eq!(queue.dropped.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn a_line_in_either_format() {
        let line = |format: Format| format.line(&record("kvcellar::route", Level::Warn, format_args!("say \"no\"")));
        assert_eq!(line(Format::Plain), "kvcellar: say \"no\"");
        let value: serde_json::Value = serde_json::from_str(&line(Format::Json)).expect("JSON");
        assert_eq!(value["level"], "WARN");
        assert_eq!(value["target"], "kvcellar::route");
        assert_eq!(value["message"], "say \"no\"");
        assert!(value["time"].as_f64().is_some_and(|time| time > 1e9));
    }
}
