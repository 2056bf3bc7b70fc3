//! Where lines begin and end: `tcp://host:port` and `ipc://path`, to connect to and to listen at.

use std::io;
use std::path::PathBuf;

use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream, lookup_host};

use super::zmtp::Transport;
use crate::limits;

fn wrong(endpoint: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("`{endpoint}` is no tcp://host:port and no ipc://path"))
}

/// Connects to a publisher.
///
/// # Errors
/// [`io::Error`] of the address or the system.
pub(super) async fn connect(endpoint: &str) -> io::Result<Box<dyn Transport>> {
    if let Some(path) = endpoint.strip_prefix("ipc://") {
        return Ok(Box::new(UnixStream::connect(path).await?));
    }
    let address = endpoint.strip_prefix("tcp://").ok_or_else(|| wrong(endpoint))?;
    let mut last = wrong(endpoint);
    for address in lookup_host(address).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // A publisher drops what its subscribers take too slowly.
        socket.set_recv_buffer_size(limits::RECEIVE_BUFFER_BYTES)?;
        match socket.connect(address).await {
            Ok(stream) => return Ok(Box::new(with_no_delay(stream)?)),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn with_no_delay(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// An address of ours that publishers connect to. Its file goes with it.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Listens.
    ///
    /// # Errors
    /// [`io::Error`] of the address or the system.
    pub(super) async fn bind(endpoint: &str) -> io::Result<Self> {
        if let Some(path) = endpoint.strip_prefix("ipc://") {
            let path = PathBuf::from(path);
            // One that nobody listens at any more was left by a process that ended badly.
            if UnixStream::connect(&path).await.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
                std::fs::remove_file(&path)?;
            }
            return Ok(Self::Unix(UnixListener::bind(&path)?, path));
        }
        let address = endpoint.strip_prefix("tcp://").ok_or_else(|| wrong(endpoint))?;
        let any = address.strip_prefix("*:").map(|port| format!("0.0.0.0:{port}"));
        Ok(Self::Tcp(TcpListener::bind(any.as_deref().unwrap_or(address)).await?))
    }

    /// The next publisher.
    ///
    /// # Errors
    /// [`io::Error`] of the system.
    pub(super) async fn accept(&self) -> io::Result<Box<dyn Transport>> {
        match self {
            Self::Tcp(listener) => Ok(Box::new(with_no_delay(listener.accept().await?.0)?)),
            Self::Unix(listener, _) => Ok(Box::new(listener.accept().await?.0)),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // Somebody may have removed it already.
            let _ = std::fs::remove_file(path);
        }
    }
}
