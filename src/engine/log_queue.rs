//! Log lines on their way to the logger of the host process, vLLM's: a bounded queue. All crates
//! log through the `log` facade. Until somebody asks for lines they are dropped.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::limits;
use kvcellar_block::log_lines;

/// A line for the host's logger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// How important it is.
    pub level: Level,
    /// What happened.
    pub text: String,
}

struct ToQueue {
    lines: Sender<Line>,
    dropped: AtomicU64,
}

static QUEUE: OnceLock<(ToQueue, Receiver<Line>)> = OnceLock::new();

/// The next line for the host's logger; `None` when none came within `patience`. From the first
/// call on lines are kept for it, a bounded number: what comes while nobody asks is dropped and
/// counted.
pub fn next_line(patience: Duration) -> Option<Line> {
    let (queue, lines) = QUEUE.get_or_init(|| {
        let (sender, receiver) = bounded(limits::LOG_LINES_MAX);
        (ToQueue { lines: sender, dropped: AtomicU64::new(0) }, receiver)
    });
    // Fails where a sink is there already, which then stays.
    if log::set_logger(queue).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
    if let Ok(line) = lines.recv_timeout(patience) {
        return Some(line);
    }
    let dropped = queue.dropped.swap(0, Ordering::Relaxed);
    (dropped > 0).then(|| Line { level: Level::Warn, text: format!("{dropped} log lines were dropped") })
}

impl Log for ToQueue {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Info && log_lines::are_ours(metadata.target())
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
        queue.log(&record("kvcellar_engine::tier", Level::Debug, format_args!("a detail")));
        queue.log(&record("kvcellar_engine::tier::spill", Level::Warn, format_args!("ours")));
        assert_eq!(lines.try_iter().collect::<Vec<_>>(), [Line { level: Level::Warn, text: "ours".to_owned() }]);
    }

    #[test]
    fn what_nobody_takes_is_dropped_and_counted() {
        let (sender, lines) = bounded(2);
        let queue = ToQueue { lines: sender, dropped: AtomicU64::new(0) };
        for number in 0..5 {
            queue.log(&record("kvcellar_engine", Level::Info, format_args!("{number}")));
        }
        assert_eq!(lines.len(), 2);
        assert_eq!(queue.dropped.load(Ordering::Relaxed), 3);
    }
}
