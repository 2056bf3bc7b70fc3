//! Whether the disk is in service: out of it after errors in a row, and tried again with growing
//! patience.

use std::time::{Duration, Instant};

use crate::limits::{DISK_BACKOFF_MS, DISK_ERRORS_MAX};

/// Legal states: in service -> out of service -> trying -> in service, or -> out of service for
/// longer; lost is final.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    In,
    Out { until: Instant },
    Trying,
    Lost,
}

/// The disk's health.
#[derive(Debug)]
pub struct Health {
    state: State,
    errors: u32,
    backoff: Duration,
}

impl Default for Health {
    fn default() -> Self {
        Self { state: State::In, errors: 0, backoff: Duration::from_millis(DISK_BACKOFF_MS.0) }
    }
}

impl Health {
    /// In service.
    pub fn is_in(&self) -> bool {
        self.state == State::In
    }

    /// A transfer went well. Returns whether the disk is back in service by that.
    pub fn well(&mut self) -> bool {
        self.errors = 0;
        if self.state != State::Trying {
            return false;
        }
        *self = Self::default();
        true
    }

    /// A transfer failed. Returns whether the disk goes out of service by that.
    pub fn failed(&mut self, now: Instant) -> bool {
        match self.state {
            State::In => {
                self.errors += 1;
                if self.errors < DISK_ERRORS_MAX {
                    return false;
                }
                self.state = State::Out { until: now + self.backoff };
                true
            }
            State::Trying => {
                self.backoff = (self.backoff * 2).min(Duration::from_millis(DISK_BACKOFF_MS.1));
                self.state = State::Out { until: now + self.backoff };
                false
            }
            State::Out { .. } | State::Lost => false,
        }
    }

    /// The store is gone: not to be tried again. Returns whether it was in service.
    pub fn lost(&mut self) -> bool {
        let was = self.is_in();
        self.state = State::Lost;
        was
    }

    /// Whether it is time to try the disk again; the caller does.
    pub fn wants_trial(&mut self, now: Instant) -> bool {
        match self.state {
            State::Out { until } if now >= until => {
                self.state = State::Trying;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_after_errors_in_a_row_and_back_after_a_trial() {
        let start = Instant::now();
        let later = |ms: u64| start + Duration::from_millis(ms);
        let mut health = Health::default();
        assert!(!health.failed(start) && !health.failed(start));
        assert!(!health.well(), "a success in between starts the count again");
        assert!(!health.failed(start) && !health.failed(start) && health.failed(start));
        assert!(!health.is_in() && !health.wants_trial(later(999)));
        assert!(health.wants_trial(later(1_000)) && !health.wants_trial(later(1_000)), "one trial at a time");
        assert!(!health.failed(later(1_000)));
        assert!(!health.wants_trial(later(2_999)) && health.wants_trial(later(3_000)), "twice as patient");
        assert!(health.well() && health.is_in());
        assert!(health.lost() && !health.lost() && !health.wants_trial(later(1 << 40)));
    }
}
