//! States that cannot be, unless this crate has a bug.
//!
//! Such a state is never passed over in silence. A debug build panics where it was found. A
//! release build serves on: it counts the violation, logs it once for each place in the code, and
//! the caller drops the block or returns. What may happen (a request that is not known, no disk
//! configured, a device that fails) is no violation.

use std::fmt::Arguments;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Violations in this process so far.
static VIOLATIONS: AtomicU64 = AtomicU64::new(0);

/// How often something impossible happened in this process.
pub fn violations() -> u64 {
    VIOLATIONS.load(Ordering::Relaxed)
}

/// One place in the code that found something impossible, at most once in the log.
#[derive(Debug)]
pub struct LoggedPlace {
    file: &'static str,
    line: u32,
    is_logged: AtomicBool,
}

impl LoggedPlace {
    /// The place at this line of this file.
    pub const fn new(file: &'static str, line: u32) -> Self {
        Self { file, line, is_logged: AtomicBool::new(false) }
    }

    /// What [`violated`](crate::violated) does: counts and logs.
    ///
    /// # Panics
    /// In a debug build, which stops where a bug is found.
    #[cold]
    #[expect(clippy::panic, clippy::manual_assert, reason = "the condition is the build, not a value")]
    pub fn on_violation(&self, what: Arguments<'_>) {
        if cfg!(debug_assertions) {
            panic!("{what}");
        }
        self.count(what);
    }

    fn count(&self, what: Arguments<'_>) {
        VIOLATIONS.fetch_add(1, Ordering::Relaxed);
        if !self.is_logged.swap(true, Ordering::Relaxed) {
            log::error!(
                "a bug in KV Cellar, which serves on without the block: {what} ({}:{}). Please report this line",
                self.file,
                self.line
            );
        }
    }
}

/// Reports a state that cannot be, in the words of a format string. The caller then drops the block
/// or returns.
#[macro_export]
macro_rules! violated {
    ($($what:tt)+) => {{
        static PLACE: $crate::invariant::LoggedPlace = $crate::invariant::LoggedPlace::new(file!(), line!());
        PLACE.on_violation(format_args!($($what)+));
    }};
}

/// Whether a condition holds that cannot fail. A failure is reported as by
/// [`violated`](crate::violated), so that `if !invariant!(..) { return }` is never silent.
#[macro_export]
macro_rules! invariant {
    ($holds:expr, $($what:tt)+) => {{
        let holds: bool = $holds;
        if !holds {
            $crate::violated!($($what)+);
        }
        holds
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_build_counts_every_violation_and_logs_a_place_once() {
        let place = LoggedPlace::new("here.rs", 1);
        let before = violations();
        place.count(format_args!("slot {} is free twice", 7));
        assert!(place.is_logged.load(Ordering::Relaxed));
        place.count(format_args!("slot {} is free twice", 8));
        assert!(violations() >= before + 2);
    }

    #[test]
    fn what_holds_is_no_violation() {
        assert!(invariant!(1 < 2, "numbers are in disorder"));
    }

    #[test]
    #[cfg_attr(debug_assertions, should_panic(expected = "1 is no block"))]
    fn a_debug_build_panics_and_a_release_build_goes_on() {
        let before = violations();
        assert!(!invariant!(before == u64::MAX, "{} is no block", 1));
        assert!(violations() > before);
    }
}
