//! Whether an engine's requests succeed well enough for it to get more of them.
//!
//! A breaker per engine, closed while all is well. After [`FAILURES_MAX`] failures in a row it is
//! open: the engine gets no requests for a while. Then one request at a time is let through until
//! one succeeds; each that fails doubles the wait, up to [`WAIT_MAX_S`].
//!
//! Pure: the time is an argument. What counts as a failure the caller decides: something that says
//! the engine is ill, and not the request.

/// Failures in a row that open it.
pub const FAILURES_MAX: u32 = 5;
/// The first wait, in seconds.
const WAIT_S: f64 = 1.0;
/// The longest wait, in seconds.
pub const WAIT_MAX_S: f64 = 60.0;
/// A trial that has not been answered after so many seconds no longer keeps others away.
const TRIAL_S: f64 = 30.0;

#[derive(Debug, Clone, Copy, PartialEq)]
enum BreakerState {
    Closed { failures: u32 },
    Open { until_s: f64, wait_s: f64 },
    Trying { since_s: f64, wait_s: f64 },
}

/// One engine's breaker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Breaker(BreakerState);

impl Default for Breaker {
    fn default() -> Self {
        Self(BreakerState::Closed { failures: 0 })
    }
}

impl Breaker {
    /// The engine may get a request now.
    pub fn admits(&self, now_s: f64) -> bool {
        match self.0 {
            BreakerState::Closed { .. } => true,
            BreakerState::Open { until_s, .. } => now_s >= until_s,
            BreakerState::Trying { since_s, .. } => now_s >= since_s + TRIAL_S,
        }
    }

    /// It is not closed.
    fn is_open(&self) -> bool {
        !matches!(self.0, BreakerState::Closed { .. })
    }

    /// The engine gets a request. Returns whether it is a trial.
    pub fn begin(&mut self, now_s: f64) -> bool {
        let is_trial = self.is_open() && self.admits(now_s);
        if let (true, BreakerState::Open { wait_s, .. } | BreakerState::Trying { wait_s, .. }) = (is_trial, self.0) {
            self.0 = BreakerState::Trying { since_s: now_s, wait_s };
        }
        is_trial
    }

    /// A request was answered. Returns whether the breaker was open.
    pub fn succeeded(&mut self) -> bool {
        let was_open = self.is_open();
        *self = Self::default();
        was_open
    }

    /// A request has failed. Returns the seconds to wait where that opens the breaker.
    pub fn failed(&mut self, now_s: f64, is_trial: bool) -> Option<f64> {
        let wait_s = match self.0 {
            BreakerState::Closed { failures } if failures + 1 < FAILURES_MAX => {
                self.0 = BreakerState::Closed { failures: failures + 1 };
                return None;
            }
            BreakerState::Closed { .. } => WAIT_S,
            BreakerState::Trying { wait_s, .. } if is_trial => (2.0 * wait_s).min(WAIT_MAX_S),
            // A request from before it opened.
            BreakerState::Trying { .. } | BreakerState::Open { .. } => return None,
        };
        self.0 = BreakerState::Open { until_s: now_s + wait_s, wait_s };
        Some(wait_s)
    }

    /// A trial ended without saying anything of the engine: the next request is one.
    pub fn abandoned(&mut self, now_s: f64) {
        if let BreakerState::Trying { wait_s, .. } = self.0 {
            self.0 = BreakerState::Open { until_s: now_s, wait_s };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened() -> Breaker {
        let mut breaker = Breaker::default();
        for _ in 1..FAILURES_MAX {
            assert_eq!(breaker.failed(10.0, false), None);
        }
        assert_eq!(breaker.failed(10.0, false), Some(WAIT_S));
        breaker
    }

    #[test]
    fn only_failures_in_a_row_open_it() {
        let mut breaker = Breaker::default();
        for _ in 0..3 * FAILURES_MAX {
            assert_eq!(breaker.failed(0.0, false), None);
            assert!(!breaker.succeeded() && breaker.admits(0.0));
        }
        let breaker = opened();
        assert!(breaker.is_open() && !breaker.admits(10.0 + WAIT_S / 2.0));
    }

    #[test]
    fn one_trial_at_a_time() {
        let mut breaker = opened();
        assert!(breaker.admits(11.0) && breaker.begin(11.0));
        assert!(!breaker.admits(11.0) && !breaker.begin(11.0), "a second one");
        assert_eq!(breaker.failed(11.2, false), None, "one from before does not end the trial");
        breaker.abandoned(11.5);
        assert!(breaker.admits(11.5), "its client left: the next one is the trial");
        assert!(breaker.begin(11.5) && breaker.admits(11.5 + TRIAL_S), "a trial without an end");
        assert!(breaker.begin(11.5 + TRIAL_S) && !breaker.admits(11.6 + TRIAL_S), "one more, and not all");
        assert!(breaker.succeeded() && !breaker.is_open());
    }

    #[test]
    fn waits_double_up_to_a_bound() {
        let mut breaker = opened();
        let mut now_s = 10.0;
        let mut waits = Vec::new();
        for _ in 0..8 {
            now_s += WAIT_MAX_S;
            assert!(breaker.begin(now_s));
            waits.extend(breaker.failed(now_s, true));
            assert_eq!(breaker.failed(now_s, false), None, "one from before");
        }
        assert_eq!(waits, [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]);
    }
}
