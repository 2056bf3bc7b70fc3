//! Following the publishers behind one address: connection, replays, and whom a batch belongs to.
//!
//! One task an address. Several data-parallel ranks, or several topics, behind it are several
//! streams, each with a [`Follower`] of its own. A line that breaks is made anew with growing
//! pauses; what was missed comes by replay. The address may also be one that engines connect to. A
//! publisher that breaks the protocol loses its line, too, and the pauses grow until it keeps it.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::decode;
use super::endpoint;
use super::follow::{BatchCounts, FollowStep, Follower, Position, Why};
use super::incoming::Incoming;
use super::publisher::END;
use super::zmtp::{LineFault, PublisherLine, SocketRole};
use crate::limits;

/// Where a publisher is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Its PUB socket.
    pub endpoint: String,
    /// Its ROUTER socket for replays.
    pub replay: Option<String>,
    /// Publishers connect to `endpoint`, which is ours.
    pub bind: bool,
}

/// One numbered row of batches.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PublisherStream {
    /// The topic.
    pub topic: String,
    /// The data-parallel rank.
    pub rank: Option<u32>,
}

impl PublisherStream {
    /// The name of its engine, among those behind an address with this name.
    pub fn engine(&self, base: &str) -> String {
        match self.rank {
            None | Some(0) => base.to_owned(),
            Some(rank) => format!("{base}/dp{rank}"),
        }
    }
}

/// What happens to a stream, told to whoever wants it.
pub trait Sink: Send {
    /// The line is up or down.
    fn connected(&mut self, up: bool);
    /// A batch, in order and once.
    fn apply(&mut self, stream: &PublisherStream, number: u64, payload: &[u8]);
    /// All blocks of the stream are to be forgotten.
    fn forget(&mut self, stream: &PublisherStream, why: Why);
    /// The state after a message: counts, and whether nothing is missing.
    fn state(&mut self, stream: &PublisherStream, counts: BatchCounts, next: Option<u64>, live: bool);
    /// A message that is none of this protocol.
    fn garbage(&mut self);
    /// A publisher has broken the protocol of lines, and has lost its own.
    fn breach(&mut self, fault: &LineFault);
}

enum Reply {
    Batch(PublisherStream, u64, Bytes),
    Ended,
    Failed,
}

/// Replies of one replay: those of earlier ones are of no interest any more.
struct Replay {
    stream: PublisherStream,
    number: u64,
    task: tokio::task::JoinHandle<()>,
}

struct Follow<S> {
    address: Address,
    sink: S,
    streams: HashMap<PublisherStream, Follower<Bytes>>,
    replays: HashMap<PublisherStream, Replay>,
    replay_number: u64,
    replies: mpsc::Sender<(PublisherStream, u64, Reply)>,
    /// The line was made.
    is_up: bool,
}

/// Follows an address for ever: dropping the future ends it. `known`: streams whose beginning
/// somebody else has applied.
pub async fn follow<S: Sink>(address: Address, known: Vec<(PublisherStream, Position)>, sink: S) {
    let (replies, mut incoming) = mpsc::channel(limits::REPLAY_QUEUE);
    let replays = address.replay.is_some();
    let streams = known.into_iter().map(|(stream, last)| (stream, Follower::resume(replays, last))).collect();
    let mut follow =
        Follow { address, sink, streams, replays: HashMap::new(), replay_number: 0, replies, is_up: false };
    let mut pauses = Pauses::default();
    loop {
        let fault = follow.connection(&mut incoming).await;
        if fault.is_breach() {
            follow.sink.breach(&fault);
        }
        follow.sink.connected(false);
        let was_up = std::mem::take(&mut follow.is_up);
        sleep(pauses.after(was_up && !fault.is_breach())).await;
    }
}

/// Pauses between lines.
#[derive(Debug)]
struct Pauses {
    next_ms: u64,
}

impl Default for Pauses {
    fn default() -> Self {
        Self { next_ms: limits::CONNECT_BACKOFF_MS.0 }
    }
}

impl Pauses {
    /// The pause after a line. `was_good`: it was made, and ended in order. After others pauses
    /// grow.
    fn after(&mut self, was_good: bool) -> Duration {
        let (first_ms, longest_ms) = limits::CONNECT_BACKOFF_MS;
        let pause_ms = if was_good { first_ms } else { self.next_ms };
        self.next_ms = (2 * pause_ms).min(longest_ms);
        Duration::from_millis(pause_ms)
    }
}

impl<S: Sink> Follow<S> {
    /// One connection, from its first try to its end, which it returns.
    async fn connection(&mut self, replies: &mut mpsc::Receiver<(PublisherStream, u64, Reply)>) -> LineFault {
        let mut incoming = match Incoming::open(&self.address.endpoint, self.address.bind).await {
            Ok(incoming) => incoming,
            Err(fault) => return fault,
        };
        self.is_up = true;
        self.sink.connected(true);
        if !self.address.bind {
            self.meet().await;
        }
        loop {
            tokio::select! {
                // Replies first: messages wait in the follower until a replay has ended.
                biased;
                Some((stream, number, reply)) = replies.recv() => self.reply(&stream, number, reply),
                message = incoming.next() => match message {
                    Ok(message) => self.message(&message),
                    // A publisher that connects to us and goes is missed by nobody but its own
                    // stream, where a gap will tell.
                    Err(fault) if self.address.bind => {
                        if fault.is_breach() {
                            self.sink.breach(&fault);
                        }
                    }
                    Err(fault) => return fault,
                },
            }
        }
    }

    /// After a connection: known streams are checked against the publisher; of an unknown publisher
    /// the first batch is asked for.
    async fn meet(&mut self) {
        if self.streams.is_empty()
            && let Some(replay) = self.address.replay.clone()
            && let Ok(Some(stream)) =
                timeout(Duration::from_millis(limits::REPLAY_ANSWER_MS), first_stream(&replay)).await
        {
            self.stream(&stream);
            return;
        }
        let streams: Vec<PublisherStream> = self.streams.keys().cloned().collect();
        for stream in streams {
            self.tell(&stream, super::follow::Follower::connected);
        }
    }

    /// Makes sure that a stream is followed. `false`: there are too many.
    fn stream(&mut self, stream: &PublisherStream) -> bool {
        if self.streams.contains_key(stream) {
            return true;
        }
        if self.streams.len() >= limits::STREAMS_MAX {
            self.sink.garbage();
            return false;
        }
        self.streams.insert(stream.clone(), Follower::new(self.address.replay.is_some()));
        self.tell(stream, super::follow::Follower::connected);
        true
    }

    fn message(&mut self, parts: &[Bytes]) {
        match parse(parts) {
            Some((stream, number, payload)) if self.stream(&stream) => {
                self.tell(&stream, |follower, steps| follower.message(number, payload, steps));
            }
            Some(_) => {}
            None => self.sink.garbage(),
        }
    }

    fn reply(&mut self, asked: &PublisherStream, number: u64, reply: Reply) {
        if self.replays.get(asked).is_none_or(|replay| replay.number != number) {
            return;
        }
        match reply {
            Reply::Batch(stream, number, payload) if stream == *asked => {
                self.tell(asked, |follower, steps| follower.replayed(number, payload, steps));
            }
            Reply::Batch(..) => {}
            Reply::Ended => self.tell(asked, Follower::replay_ended),
            Reply::Failed => self.tell(asked, Follower::replay_failed),
        }
    }

    fn tell(&mut self, stream: &PublisherStream, what: impl FnOnce(&mut Follower<Bytes>, &mut Vec<FollowStep<Bytes>>)) {
        let Some(follower) = self.streams.get_mut(stream) else { return };
        let mut steps = Vec::new();
        what(follower, &mut steps);
        let (counts, next, live) = (follower.counts(), follower.next(), follower.is_live());
        for step in steps {
            match step {
                FollowStep::Apply(number, payload) => self.sink.apply(stream, number, &payload),
                FollowStep::Forget(why) => self.sink.forget(stream, why),
                FollowStep::Replay(from) => self.ask(stream, from),
            }
        }
        self.sink.state(stream, counts, next, live);
    }

    fn ask(&mut self, stream: &PublisherStream, from: u64) {
        let Some(endpoint) = self.address.replay.clone() else { return };
        self.replay_number += 1;
        let number = self.replay_number;
        let (asked, replies) = (stream.clone(), self.replies.clone());
        let task = tokio::spawn(async move {
            let last = replay(&endpoint, from, &asked, number, &replies).await;
            // Nobody listens any more when the address is no longer followed.
            drop(replies.send((asked, number, last)).await);
        });
        if let Some(earlier) = self.replays.insert(stream.clone(), Replay { stream: stream.clone(), number, task }) {
            debug_assert_eq!(earlier.stream, *stream);
            earlier.task.abort();
        }
    }
}

impl<S> Drop for Follow<S> {
    fn drop(&mut self) {
        self.replays.values().for_each(|replay| replay.task.abort());
    }
}

/// Topic, number and payload; publishers before vLLM 0.26 send no topic in replays.
fn parse(parts: &[Bytes]) -> Option<(PublisherStream, u64, Bytes)> {
    let (topic, number, payload) = match parts {
        [topic, number, payload] => (topic.clone(), number, payload),
        [number, payload] => (Bytes::new(), number, payload),
        _ => return None,
    };
    let number = u64::from_be_bytes(<[u8; 8]>::try_from(number.as_ref()).ok()?);
    let rank = decode::rank(payload).ok()?;
    Some((PublisherStream { topic: String::from_utf8_lossy(&topic).into_owned(), rank }, number, payload.clone()))
}

async fn request(endpoint: &str, from: u64) -> Result<PublisherLine, LineFault> {
    let mut connection = PublisherLine::open(endpoint::connect(endpoint).await?, SocketRole::Dealer).await?;
    connection.send(&[&[], &from.to_be_bytes()]).await?;
    Ok(connection)
}

/// The stream that a publisher's first replayed batch belongs to.
async fn first_stream(endpoint: &str) -> Option<PublisherStream> {
    let parts = request(endpoint, 0).await.ok()?.message().await.ok()?;
    let (_, parts) = parts.split_first()?;
    if is_end(parts) { None } else { parse(parts).map(|(stream, _, _)| stream) }
}

fn is_end(parts: &[Bytes]) -> bool {
    matches!(parts, [.., number, payload] if number.as_ref() == END && payload.is_empty())
}

async fn replay(
    endpoint: &str,
    from: u64,
    asked: &PublisherStream,
    number: u64,
    replies: &mpsc::Sender<(PublisherStream, u64, Reply)>,
) -> Reply {
    let longest = Duration::from_millis(limits::REPLAY_ANSWER_MS);
    let Ok(Ok(mut connection)) = timeout(longest, request(endpoint, from)).await else { return Reply::Failed };
    loop {
        let Ok(Ok(parts)) = timeout(longest, connection.message()).await else { return Reply::Failed };
        let Some((_, parts)) = parts.split_first() else { return Reply::Failed };
        if is_end(parts) {
            return Reply::Ended;
        }
        let Some((mut stream, at, payload)) = parse(parts) else { continue };
        if parts.len() == 2 {
            stream.topic.clone_from(&asked.topic);
        }
        if replies.send((asked.clone(), number, Reply::Batch(stream, at, payload))).await.is_err() {
            return Reply::Failed;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_until_a_line_ends_in_order() {
        let mut pauses = Pauses::default();
        let bad: Vec<u128> = (0..7).map(|_| pauses.after(false).as_millis()).collect();
        assert_eq!(bad, [100, 200, 400, 800, 1600, 2000, 2000]);
        assert_eq!((pauses.after(true).as_millis(), pauses.after(false).as_millis()), (100, 200));
    }
}
