//! How every server of ours begins and ends: the runtime, the socket, the signals.

use std::time::Duration;

use axum::Router;

use kvcellar_block::error::{Error, Result};

/// Runs a command that waits for a network.
pub fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("starting", "threads", error, "Allow this process more threads"))?;
    runtime.block_on(work)
}

/// Listens at the address that the option `name` gives, and says where.
pub async fn listen(name: &'static str, address: std::net::SocketAddr, what: &str) -> Result<tokio::net::TcpListener> {
    let listener = tokio::net::TcpListener::bind(address)
        .await
        .map_err(|error| Error::config(name, format!("{address}: {error}"), "Name a free address, e.g. 127.0.0.1:0"))?;
    if let Ok(address) = listener.local_addr() {
        log::info!("{what}{address}");
    }
    Ok(listener)
}

/// Serves until `stop` is done, then ends open answers within a few seconds.
///
/// # Errors
/// [`std::io::Error`] of the listening socket.
pub async fn serve(
    listener: tokio::net::TcpListener,
    router: Router,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let (ask, asked) = tokio::sync::oneshot::channel::<()>();
    let stopping = async move {
        stop.await;
        // Whoever waits for the signal may be gone already.
        let _ = ask.send(());
    };
    let server = axum::serve(listener, router).with_graceful_shutdown(stopping);
    tokio::select! {
        ended = server => ended,
        () = async {
            let _ = asked.await;
            tokio::time::sleep(Duration::from_secs(5)).await;
        } => Ok(()),
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
