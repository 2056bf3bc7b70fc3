//! What publishers send to one address, whoever connects to whom.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::endpoint::{self, Listener};
use super::zmtp::{LineFault, PublisherLine, SocketRole, Transport};
use crate::limits;

type Received = Result<Vec<Bytes>, LineFault>;

/// An open address.
pub(super) enum Incoming {
    /// A line to one publisher.
    Line(Box<PublisherLine>),
    /// Lines of all publishers that connect to us, with the task that accepts them.
    Lines { receiver: mpsc::Receiver<Received>, _accepting: JoinSet<()> },
}

impl Incoming {
    /// Connects, or listens.
    ///
    /// # Errors
    /// [`LineFault`], after [`limits::HANDSHAKE_MS`] for each of connection and handshake at the
    /// latest.
    pub(super) async fn open(endpoint: &str, bind: bool) -> Result<Self, LineFault> {
        if bind {
            let listener = Listener::bind(endpoint).await?;
            let (sender, receiver) = mpsc::channel(limits::PUBLISHED_QUEUE);
            let mut tasks = JoinSet::new();
            tasks.spawn(accept(listener, sender));
            return Ok(Self::Lines { receiver, _accepting: tasks });
        }
        let longest = Duration::from_millis(limits::HANDSHAKE_MS);
        let line = timeout(longest, endpoint::connect(endpoint)).await.map_err(|_| LineFault::Late)??;
        Ok(Self::Line(Box::new(PublisherLine::open(line, SocketRole::Subscriber).await?)))
    }

    /// The next message. Nothing is lost where the future is dropped before its end.
    ///
    /// # Errors
    /// [`LineFault`]: of the line, or of one of the lines, which has ended.
    pub(super) async fn next(&mut self) -> Received {
        match self {
            Self::Line(connection) => connection.message().await,
            Self::Lines { receiver, .. } => match receiver.recv().await {
                Some(received) => received,
                // The task that accepts never ends before its receiver does.
                None => std::future::pending().await,
            },
        }
    }
}

/// Accepts publishers for ever, each with a task of its own.
async fn accept(listener: Listener, sender: mpsc::Sender<Received>) {
    let places = Arc::new(Semaphore::new(limits::PUBLISHERS_MAX));
    let mut lines = JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok(line) => {
                let sender = sender.clone();
                lines.spawn(async move {
                    let fault = receive(line, &sender).await;
                    // Nobody listens any more when the address is no longer followed.
                    drop(sender.send(Err(fault)).await);
                    drop(place);
                });
            }
            // Too few file descriptors, as a rule: some may be free soon.
            Err(_) => tokio::time::sleep(Duration::from_millis(limits::CONNECT_BACKOFF_MS.1)).await,
        }
        while lines.try_join_next().is_some() {}
    }
}

/// Passes a publisher's messages on until its line ends.
async fn receive(line: Box<dyn Transport>, sender: &mpsc::Sender<Received>) -> LineFault {
    let mut connection = match PublisherLine::open(line, SocketRole::Subscriber).await {
        Ok(connection) => connection,
        Err(fault) => return fault,
    };
    loop {
        match connection.message().await {
            Ok(message) => {
                if sender.send(Ok(message)).await.is_err() {
                    return LineFault::Io(std::io::ErrorKind::BrokenPipe.into());
                }
            }
            Err(fault) => return fault,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use zeromq::{PubSocket, Socket, SocketSend, ZmqMessage};

    use super::*;

    fn message(number: u8) -> ZmqMessage {
        ZmqMessage::try_from(vec![Bytes::from_static(b"topic"), Bytes::from(vec![number; 70_000])]).expect("frames")
    }

    /// Publishes until somebody has received: a publisher drops what comes before a subscription.
    async fn received(publisher: &mut PubSocket, incoming: &mut Incoming) -> Vec<Bytes> {
        for number in 0..=255 {
            publisher.send(message(number)).await.expect("sent");
            if let Ok(received) = timeout(Duration::from_millis(200), incoming.next()).await {
                return received.expect("a message");
            }
        }
        panic!("nothing ever came");
    }

    #[tokio::test]
    async fn messages_of_an_ordinary_publisher_come_whoever_connects_over_either_transport() {
        let folder = tempfile::tempdir().expect("a directory");
        for (number, endpoint) in
            ["tcp://127.0.0.1:0".to_owned(), format!("ipc://{}/a", folder.path().display())].iter().enumerate()
        {
            let mut publisher = PubSocket::new();
            let bound = publisher.bind(endpoint).await.expect("bound").to_string();
            let mut incoming = Incoming::open(&bound, false).await.expect("a line");
            let parts = received(&mut publisher, &mut incoming).await;
            assert_eq!(parts.iter().map(Bytes::len).collect::<Vec<_>>(), [5, 70_000], "{bound}");
            drop((publisher, incoming));
            let ours = match number {
                0 => format!("tcp://127.0.0.1:{}", free_port().await),
                _ => format!("ipc://{}/b", folder.path().display()),
            };
            // Once more at the same address: it was given back.
            for _ in 0..2 {
                let mut incoming = Incoming::open(&ours, true).await.expect("an address of ours");
                let mut publisher = PubSocket::new();
                publisher.connect(&ours).await.expect("connected");
                assert_eq!(received(&mut publisher, &mut incoming).await.len(), 2, "{ours}");
                drop(publisher);
                let fault = timeout(Duration::from_mins(1), async {
                    loop {
                        if let Err(fault) = incoming.next().await {
                            return fault;
                        }
                    }
                });
                assert!(!fault.await.expect("its end is said").is_breach());
                drop(incoming);
                tokio::task::yield_now().await;
            }
        }
    }

    async fn free_port() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        listener.local_addr().expect("an address").port()
    }

    #[tokio::test]
    async fn what_is_no_publisher_is_said_and_not_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let endpoint = format!("tcp://{}", listener.local_addr().expect("an address"));
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                stream.write_all(&b"HTTP/1.1 400 Bad Request\r\n".repeat(4)).await.expect("sent");
                // Until the other side goes.
                let _ = stream.read_to_end(&mut Vec::new()).await;
            }
        });
        let Err(fault) = Incoming::open(&endpoint, false).await else { panic!("it is no publisher") };
        assert!(fault.is_breach() && fault.to_string().contains("greeting"), "{fault}");
        let Err(LineFault::Io(error)) = Incoming::open("tcp://127.0.0.1:1", false).await else {
            panic!("nobody is there")
        };
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
