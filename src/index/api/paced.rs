//! A request's body that has to come at some pace.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::BoxError;
use axum::body::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};

use super::clients::{BODY_BYTES_PER_S_MIN, ClientCounts, Cut};

/// Why a body ended before its end.
#[derive(Debug, thiserror::Error)]
#[error("it came too slowly")]
pub struct TooSlow;

/// A body that ends with [`TooSlow`] when it falls behind, or stops coming.
pub(super) struct Paced {
    inner: Incoming,
    since: Instant,
    stall: Duration,
    received: u64,
    /// Runs while something is waited for.
    alarm: Option<Pin<Box<Sleep>>>,
    counts: Arc<ClientCounts>,
}

impl Paced {
    /// A body whose head has just come. `stall`: how far it may be behind.
    pub(super) fn new(inner: Incoming, stall: Duration, counts: Arc<ClientCounts>) -> Self {
        Self { inner, since: Instant::now(), stall, received: 0, alarm: None, counts }
    }

    /// Until when the next byte has to be there.
    fn deadline(&self) -> Instant {
        self.since + self.stall + Duration::from_millis(self.received.saturating_mul(1000) / BODY_BYTES_PER_S_MIN)
    }
}

impl Body for Paced {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.inner).poll_frame(context) {
            let bytes = frame.iter().flatten().filter_map(Frame::data_ref).map(Bytes::len).sum::<usize>();
            this.received = this.received.saturating_add(bytes as u64);
            this.alarm = None;
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        // What came early is no credit for saying nothing.
        let deadline = this.deadline().min(Instant::now() + this.stall);
        let alarm = this.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if alarm.as_mut().poll(context).is_pending() {
            return Poll::Pending;
        }
        this.alarm = None;
        this.counts.cut(Cut::SlowBody);
        Poll::Ready(Some(Err(TooSlow.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
