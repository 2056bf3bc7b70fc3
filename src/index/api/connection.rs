//! One client's connection, from its first byte to its end.
//!
//! Requests go to the router one after the other. A connection ends when its client does, when it
//! is asked to (after the answer under way), or when its client is cut: [`Cut`] says why. What is
//! behind an answer, such as a request to an engine, is dropped with it.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::{Instant, Sleep};

use super::clients::{ClientCounts, ClientLimits, Cut, UNREAD_BYTES_MAX};
use super::paced::Paced;

/// A client that says nothing keeps its place for so long, if another one wants it.
const SILENT_FOR: Duration = Duration::from_secs(1);

/// How connections are asked to end.
#[derive(Debug, Default)]
pub(super) struct Ending {
    asked: Notify,
    is_stop: AtomicBool,
}

impl Ending {
    /// Another client waits: those that have had an answer end when they are idle, and those that
    /// have said nothing for a moment.
    pub(super) fn make_room(&self) {
        self.asked.notify_waiters();
    }

    /// The server stops: all end when they are idle.
    pub(super) fn stop(&self) {
        self.is_stop.store(true, Ordering::Release);
        self.asked.notify_waiters();
    }
}

/// A connection before it is served.
#[derive(Debug)]
pub(super) struct ClientConnection {
    pub(super) router: Router,
    pub(super) limits: ClientLimits,
    pub(super) counts: Arc<ClientCounts>,
    /// Says when it is to end.
    pub(super) ending: Arc<Ending>,
    /// Given back at the end.
    pub(super) place: Option<OwnedSemaphorePermit>,
}

impl ClientConnection {
    /// Serves a client to its end.
    pub(super) async fn serve(self, stream: TcpStream) {
        let Self { router, limits, counts, ending, place } = self;
        let _open = counts.connected();
        // What is written is whole: waiting for more would only delay it.
        let _still_well = stream.set_nodelay(true);
        let head_begun = Arc::new(AtomicBool::new(false));
        let (had_answer, has_asked) = (AtomicBool::new(false), AtomicBool::new(false));
        let began = Instant::now();
        let watched = Watched {
            stream,
            stall: limits.stall,
            alarm: None,
            head_begun: Arc::clone(&head_begun),
            counts: Arc::clone(&counts),
        };
        let router = TowerToHyperService::new(router);
        let service = service_fn(|request: hyper::Request<Incoming>| {
            head_begun.store(false, Ordering::Relaxed);
            has_asked.store(true, Ordering::Relaxed);
            let paced = request.map(|body| Paced::new(body, limits.stall, Arc::clone(&counts)));
            let answer = router.call(paced);
            let (head_begun, had_answer) = (&head_begun, &had_answer);
            async move {
                let answer = answer.await;
                // What came meanwhile was its body.
                head_begun.store(false, Ordering::Relaxed);
                had_answer.store(true, Ordering::Relaxed);
                answer
            }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head)
            .max_buf_size(UNREAD_BYTES_MAX)
            .serve_connection(TokioIo::new(watched), service);
        let mut served = pin!(served);
        let ended = loop {
            tokio::select! {
                ended = served.as_mut() => break ended,
                () = ending.asked.notified() => {
                    // A client that has just come is about to ask.
                    let is_silent = !head_begun.load(Ordering::Relaxed) && !has_asked.load(Ordering::Relaxed);
                    if is_silent && began.elapsed() >= SILENT_FOR {
                        counts.cut(Cut::Silent);
                        break Ok(());
                    }
                    if ending.is_stop.load(Ordering::Acquire) || had_answer.load(Ordering::Relaxed) {
                        served.as_mut().graceful_shutdown();
                    }
                }
            }
        };
        // Whatever else ends a connection its client knows.
        if ended.is_err_and(|error| error.is_timeout()) && head_begun.load(Ordering::Relaxed) {
            counts.cut(Cut::SlowHead);
        }
        drop(place);
    }
}

/// A stream whose reader is not waited for longer than it may take.
struct Watched {
    stream: TcpStream,
    stall: Duration,
    /// Runs while something waits to be written.
    alarm: Option<Pin<Box<Sleep>>>,
    /// Something has come since the last request.
    head_begun: Arc<AtomicBool>,
    counts: Arc<ClientCounts>,
}

impl Watched {
    /// Passes on how a write went, or that its time is over.
    fn wrote(&mut self, context: &mut Context<'_>, poll: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if poll.is_ready() {
            self.alarm = None;
            return poll;
        }
        let stall = self.stall;
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep(stall)));
        if alarm.as_mut().poll(context).is_pending() {
            return Poll::Pending;
        }
        self.alarm = None;
        self.counts.cut(Cut::StalledAnswer);
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Watched {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = into.filled().len();
        let poll = Pin::new(&mut this.stream).poll_read(context, into);
        if into.filled().len() > before {
            this.head_begun.store(true, Ordering::Relaxed);
        }
        poll
    }
}

impl AsyncWrite for Watched {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let poll = Pin::new(&mut this.stream).poll_write(context, bytes);
        this.wrote(context, poll)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let poll = Pin::new(&mut this.stream).poll_write_vectored(context, parts);
        this.wrote(context, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}
