//! How every server of ours begins and ends: the runtime, the socket, the signals, and who gets a
//! connection.
//!
//! At the bound of connections the next client waits, and those after it in the system's queue. As
//! long as one waits, connections that have had an answer and are idle are ended, and busy ones
//! after their answer, so that those who only keep one open take nobody's place.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::clients::{ClientCounts, ClientLimits};
use super::connection::{ClientConnection, Ending};
use kvcellar_block::error::{Error, Result};

/// How long open answers may take to end when a server stops.
const LAST_ANSWERS: Duration = Duration::from_secs(5);
/// How often a server that is full asks connections to end.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How long after an error of the listening socket the next client is waited for.
const AFTER_AN_ERROR: Duration = Duration::from_millis(500);
/// What goes on for long is said once in this time.
const SAY_EVERY: Duration = Duration::from_mins(1);

/// Runs a command that waits for a network.
pub fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("starting", "threads", error, "Allow this process more threads"))?;
    runtime.block_on(work)
}

/// Listens at the address that the option `name` gives, and says where.
pub async fn listen(name: &'static str, address: std::net::SocketAddr, what: &str) -> Result<TcpListener> {
    let listener = TcpListener::bind(address)
        .await
        .map_err(|error| Error::config(name, format!("{address}: {error}"), "Name a free address, e.g. 127.0.0.1:0"))?;
    if let Ok(address) = listener.local_addr() {
        log::info!("{what}{address}");
    }
    Ok(listener)
}

/// A server before it serves.
#[derive(Debug)]
pub struct Server {
    /// Its socket.
    pub listener: TcpListener,
    /// What it answers.
    pub router: Router,
    /// What its clients may do.
    pub limits: ClientLimits,
    /// What there is of them.
    pub counts: Arc<ClientCounts>,
}

/// Something that goes on for long and is not said each time.
#[derive(Debug, Default)]
struct SaidAt(Option<Instant>);

impl SaidAt {
    fn is_due(&mut self) -> bool {
        let is_due = self.0.is_none_or(|at| at.elapsed() >= SAY_EVERY);
        if is_due {
            self.0 = Some(Instant::now());
        }
        is_due
    }
}

impl Server {
    /// Serves until `stop` is done, then ends open answers within a few seconds. Dropped before
    /// that, it ends them at once.
    pub async fn serve(self, stop: impl Future<Output = ()>) {
        let places = Arc::new(Semaphore::new(self.limits.connections));
        let ending = Arc::new(Ending::default());
        let mut open = JoinSet::new();
        let mut stop = pin!(stop);
        let (mut said_full, mut said_error) = (SaidAt::default(), SaidAt::default());
        loop {
            let next = async {
                let stream = self.client(&mut said_error).await;
                (stream, self.place(&places, &ending, &mut said_full).await)
            };
            let (stream, place) = tokio::select! {
                // First, so that a signal is waited for before there is a client.
                biased;
                () = &mut stop => break,
                next = next => next,
            };
            while open.try_join_next().is_some() {}
            let connection = ClientConnection {
                router: self.router.clone(),
                limits: self.limits.clone(),
                counts: Arc::clone(&self.counts),
                ending: Arc::clone(&ending),
                place,
            };
            open.spawn(connection.serve(stream));
        }
        drop(self.listener);
        ending.stop();
        let ended = async { while open.join_next().await.is_some() {} };
        // Those that take longer end with the set.
        let _late = tokio::time::timeout(LAST_ANSWERS, ended).await;
    }

    /// A place for one more connection.
    async fn place(&self, places: &Arc<Semaphore>, ending: &Ending, said: &mut SaidAt) -> Option<OwnedSemaphorePermit> {
        if let Ok(place) = Arc::clone(places).try_acquire_owned() {
            return Some(place);
        }
        if said.is_due() {
            log::warn!(
                "{}: all {} connections are in use: further clients wait, and idle and silent connections are ended. \
                 Look who holds them; --connections allows clients of engines more",
                self.listener.local_addr().map_or_else(|_| String::new(), |address| address.to_string()),
                self.limits.connections
            );
        }
        loop {
            ending.make_room();
            let place = Arc::clone(places).acquire_owned();
            if let Ok(place) = tokio::time::timeout(ASK_AGAIN, place).await {
                return place.ok();
            }
        }
    }

    /// The next client.
    async fn client(&self, said: &mut SaidAt) -> TcpStream {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => return stream,
                Err(error) => {
                    if said.is_due() {
                        log::warn!("a client could not be accepted: {error}. Are there too few file descriptors?");
                    }
                    tokio::time::sleep(AFTER_AN_ERROR).await;
                }
            }
        }
    }
}

/// Ends when the process is asked to stop: SIGINT or SIGTERM.
pub async fn told_to_stop() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
        (Ok(mut interrupt), Ok(mut terminate)) => {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
        // Without handlers the signals end the process by themselves.
        _ => std::future::pending().await,
    }
}
