//! Publishing KVEvents as vLLM does: a PUB socket, and a ROUTER socket that sends again what a
//! subscriber has missed.
//!
//! For engines and tools without vLLM's own publisher. The last batches are kept for replays, up to
//! a number and a size.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

use crate::limits;
use kvcellar_block::error::{Error, Result};

/// The number that ends a replay.
pub const END: [u8; 8] = [0xff; 8];

#[derive(Debug, Default)]
struct Kept {
    batches: VecDeque<(u64, Bytes)>,
    bytes: usize,
}

/// A running publisher.
pub struct Publisher {
    socket: PubSocket,
    topic: Bytes,
    next: u64,
    kept: Arc<Mutex<Kept>>,
    kept_max: usize,
    endpoint: String,
    replay_endpoint: Option<String>,
    replays: Option<tokio::task::JoinHandle<()>>,
}

fn refused(endpoint: &str, error: impl std::fmt::Display) -> Error {
    Error::config(
        "endpoint",
        format!("{endpoint} cannot be used: {error}"),
        "Name a free address, e.g. tcp://127.0.0.1:5557",
    )
}

impl Publisher {
    /// Binds both sockets; port 0 takes a free one. `kept_max` batches can be replayed.
    ///
    /// # Errors
    /// [`Error::Config`] when an address cannot be bound.
    pub async fn bind(endpoint: &str, replay: Option<&str>, topic: &str, kept_max: usize) -> Result<Self> {
        let mut socket = PubSocket::new();
        let bound = socket.bind(endpoint).await.map_err(|error| refused(endpoint, error))?.to_string();
        let kept = Arc::new(Mutex::new(Kept::default()));
        let topic = Bytes::copy_from_slice(topic.as_bytes());
        let (mut replay_endpoint, mut replays) = (None, None);
        if let Some(wanted) = replay {
            let mut router = RouterSocket::new();
            let bound = router.bind(wanted).await.map_err(|error| refused(wanted, error))?;
            replay_endpoint = Some(bound.to_string());
            replays = Some(tokio::spawn(answer(router, Arc::clone(&kept), topic.clone())));
        }
        Ok(Self { socket, topic, next: 0, kept, kept_max, endpoint: bound, replay_endpoint, replays })
    }

    /// Where subscribers connect.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Where they ask for replays.
    pub fn replay_endpoint(&self) -> Option<&str> {
        self.replay_endpoint.as_deref()
    }

    /// Publishes a batch and returns its number.
    ///
    /// # Errors
    /// [`Error::DeviceDead`] when the socket is gone.
    pub async fn publish(&mut self, payload: impl Into<Bytes>) -> Result<u64> {
        let (number, payload) = (self.next, payload.into());
        self.next += 1;
        {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.bytes += payload.len();
            kept.batches.push_back((number, payload.clone()));
            while kept.batches.len() > self.kept_max.max(1) || kept.bytes > limits::HELD_BYTES_MAX {
                let Some((_, oldest)) = kept.batches.pop_front() else { break };
                kept.bytes -= oldest.len();
            }
        }
        let message = frames(&[self.topic.clone(), Bytes::copy_from_slice(&number.to_be_bytes()), payload]);
        self.socket.send(message).await.map_err(|error| Error::DeviceDead {
            device: format!("the socket {}", self.endpoint),
            problem: error.to_string(),
            remedy: "Start the publisher again".to_owned(),
        })?;
        Ok(number)
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        if let Some(replays) = &self.replays {
            replays.abort();
        }
    }
}

/// A message of these frames.
pub(super) fn frames<const N: usize>(frames: &[Bytes; N]) -> ZmqMessage {
    const { assert!(N > 0, "a message has a frame") };
    ZmqMessage::try_from(frames.to_vec()).unwrap_or_else(|_| ZmqMessage::from(Bytes::new()))
}

/// Answers replay requests, one after another, until the socket is gone.
async fn answer(mut router: RouterSocket, kept: Arc<Mutex<Kept>>, topic: Bytes) {
    while let Ok(request) = router.recv().await {
        let request = request.into_vec();
        // Anything else is no request of this protocol, and has no answer.
        let [client, _, start] = request.as_slice() else { continue };
        let Ok(start) = <[u8; 8]>::try_from(start.as_ref()).map(u64::from_be_bytes) else { continue };
        let batches: Vec<(u64, Bytes)> = {
            let kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.batches.iter().filter(|(number, _)| *number >= start).cloned().collect()
        };
        for (number, payload) in batches {
            let number = Bytes::copy_from_slice(&number.to_be_bytes());
            let reply = frames(&[client.clone(), Bytes::new(), topic.clone(), number, payload]);
            if router.send(reply).await.is_err() {
                break;
            }
        }
        let end = frames(&[client.clone(), Bytes::new(), Bytes::new(), Bytes::from_static(&END), Bytes::new()]);
        // Where that fails the client has gone: nobody waits for this end.
        let _ = router.send(end).await;
    }
}
