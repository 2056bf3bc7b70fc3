//! Requests to a front end: so many at a time, each timed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use kvcellar_block::error::{Error, Result};

/// Sends requests.
#[derive(Debug, Clone)]
pub(super) struct RequestLoad {
    client: Client<HttpConnector, Full<Bytes>>,
}

impl RequestLoad {
    pub(super) fn new() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Self { client: Client::builder(TokioExecutor::new()).build(connector) }
    }

    /// Posts every body once, `at_once` of them at a time. Returns how long each took, in s,
    /// sorted.
    ///
    /// # Errors
    /// [`Error::DeviceDead`] for any answer but 200.
    pub(super) async fn send(&self, url: &str, bodies: Vec<Bytes>, at_once: usize) -> Result<Vec<f64>> {
        let bodies = Arc::new(bodies);
        let next = Arc::new(AtomicUsize::new(0));
        let target = format!("{url}/v1/completions");
        let worker = || {
            let (this, bodies, next, target) = (self.clone(), Arc::clone(&bodies), Arc::clone(&next), target.clone());
            tokio::spawn(async move {
                let mut took = Vec::new();
                while let Some(body) = bodies.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let started = Instant::now();
                    this.one(&target, body.clone()).await?;
                    took.push(started.elapsed().as_secs_f64());
                }
                Ok::<_, Error>(took)
            })
        };
        let workers: Vec<_> = (0..at_once).map(|_| worker()).collect();
        let mut took = Vec::new();
        for worker in workers {
            took.extend(worker.await.map_err(|error| wrong(url, error.to_string()))??);
        }
        took.sort_by(f64::total_cmp);
        Ok(took)
    }

    async fn one(&self, target: &str, body: Bytes) -> Result<()> {
        let request = hyper::Request::post(target).header("content-type", "application/json").body(Full::new(body));
        let request = request.map_err(|error| wrong(target, error.to_string()))?;
        let answer = self.client.request(request).await.map_err(|error| wrong(target, format!("{error:?}")))?;
        let status = answer.status();
        let text = answer.into_body().collect().await.map_err(|error| wrong(target, error.to_string()))?.to_bytes();
        if status.is_success() {
            return Ok(());
        }
        Err(wrong(target, format!("{status}: {}", String::from_utf8_lossy(&text[..text.len().min(200)]))))
    }
}

fn wrong(device: &str, problem: String) -> Error {
    Error::DeviceDead { device: device.to_owned(), problem, remedy: "Run the benchmark again".to_owned() }
}
