//! Who may ask, and how much: bearer token, requests a second, size of a body.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;

/// Bounds of the service.
#[derive(Debug, Clone)]
pub struct ServiceLimits {
    /// Bytes of a body.
    pub body_bytes_max: usize,
    /// Requests a second, with bursts of as many; 0: no bound.
    pub requests_per_second: u32,
    /// The token that requests must bear.
    pub token: Option<String>,
}

/// The bounds with what is left of them.
#[derive(Debug)]
pub(super) struct Guard {
    limits: ServiceLimits,
    bucket: Mutex<(f64, Instant)>,
}

impl Guard {
    pub(super) fn new(limits: ServiceLimits) -> Self {
        let full = f64::from(limits.requests_per_second);
        Self { limits, bucket: Mutex::new((full, Instant::now())) }
    }

    fn admits(&self, now: Instant) -> bool {
        let rate = f64::from(self.limits.requests_per_second);
        if rate == 0.0 {
            return true;
        }
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let refill = now.saturating_duration_since(bucket.1).as_secs_f64() * rate;
        *bucket = ((bucket.0 + refill).min(rate), now);
        let admits = bucket.0 >= 1.0;
        bucket.0 -= if admits { 1.0 } else { 0.0 };
        admits
    }

    fn knows(&self, request: &Request) -> bool {
        let Some(token) = &self.limits.token else { return true };
        let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        given
            .and_then(|value| value.strip_prefix("Bearer "))
            .is_some_and(|given| same(given.as_bytes(), token.as_bytes()))
    }
}

/// Compares in a time that does not tell where two texts differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

pub(super) async fn check(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    if !guard.knows(&request) {
        return super::refuse(StatusCode::UNAUTHORIZED, "send the header `Authorization: Bearer TOKEN`");
    }
    if !guard.admits(Instant::now()) {
        let most = guard.limits.requests_per_second;
        return super::refuse(StatusCode::TOO_MANY_REQUESTS, format!("more than {most} requests a second"));
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_burst_is_bounded_and_refills() {
        let guard = Guard::new(ServiceLimits { body_bytes_max: 1, requests_per_second: 2, token: None });
        let now = Instant::now();
        assert_eq!([guard.admits(now), guard.admits(now), guard.admits(now)], [true, true, false]);
        assert!(guard.admits(now + Duration::from_millis(500)));
        assert!(!guard.admits(now + Duration::from_millis(510)));
    }

    #[test]
    fn tokens_are_compared_whole() {
        assert!(same(b"abc", b"abc") && !same(b"abc", b"abd") && !same(b"abc", b"abcd") && !same(b"", b"a"));
    }
}
