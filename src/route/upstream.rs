//! The way to engines: connections, TLS, and the key for what the router itself asks.
//!
//! Clients' requests go on with whatever key the client gave. The router's own questions (metrics,
//! models, token ids) carry the key that it was given for them, if any.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::http::header::{AUTHORIZATION, CONTENT_TYPE};
use axum::http::{HeaderValue, Method, StatusCode};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, Error as ClientError};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use kvcellar_block::error::{Error, Result};
use kvcellar_index::api::clients::UNREAD_BYTES_MAX;

/// How long an idle connection is kept: less than engines keep it, so that none is used that they
/// are closing.
const IDLE: Duration = Duration::from_secs(4);

/// How engines are reached.
#[derive(Debug, Clone, Default)]
pub struct UpstreamOptions {
    /// How long a connection may take.
    pub connect: Duration,
    /// Certificates of authorities beside the system's, PEM.
    pub ca: Option<std::path::PathBuf>,
    /// A file with the key for the router's own questions.
    pub key: Option<std::path::PathBuf>,
}

/// All connections to engines.
#[derive(Debug, Clone)]
pub struct Upstream {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    key: Option<HeaderValue>,
}

impl Upstream {
    /// Reads keys and certificates.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`]: a file cannot be read, or is none of its kind.
    pub fn open(options: &UpstreamOptions) -> Result<Self> {
        let key = options.key.as_deref().map(|path| read_key("engine-key", path)).transpose()?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::config("engine-ca", error.to_string(), "Look for a newer version"))?
            .with_root_certificates(roots(options.ca.as_deref())?)
            .with_no_client_auth();
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(options.connect));
        connector.set_nodelay(true);
        connector.enforce_http(false);
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        // Without a timer idle connections would stay until somebody wants one.
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE)
            .pool_timer(TokioTimer::new())
            // What its client does not read is not read from an engine, either.
            .http1_max_buf_size(UNREAD_BYTES_MAX)
            .build(connector);
        Ok(Self { client, key })
    }

    /// The same connections for questions to others, with their key instead: from the file that an
    /// option names.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn with_key(mut self, option: &'static str, key: Option<&Path>) -> Result<Self> {
        self.key = key.map(|path| read_key(option, path)).transpose()?;
        Ok(self)
    }

    /// Whether a header bears the key of these questions; without a key any does.
    pub fn knows(&self, given: Option<&HeaderValue>) -> bool {
        let Some(key) = &self.key else { return true };
        // In a time that does not tell where two texts differ.
        let same = |a: &[u8], b: &[u8]| a.len() == b.len() && a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b)) == 0;
        given.is_some_and(|given| same(given.as_bytes(), key.as_bytes()))
    }

    /// Sends a client's request.
    ///
    /// # Errors
    /// [`ClientError`] where no answer's head came.
    pub async fn pass(
        &self,
        request: hyper::Request<Full<Bytes>>,
    ) -> std::result::Result<hyper::Response<Incoming>, ClientError> {
        self.client.request(request).await
    }

    /// Asks an engine for itself: JSON if there is a body.
    ///
    /// # Errors
    /// Why no whole answer of at most so many bytes came within the time of `limits`.
    pub async fn ask(
        &self,
        method: Method,
        url: &str,
        body: Bytes,
        limits: (Duration, usize),
    ) -> std::result::Result<(StatusCode, Bytes), String> {
        let (within, bytes_max) = limits;
        let mut request = hyper::Request::builder().method(method).uri(url);
        if !body.is_empty() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, key);
        }
        let request = request.body(Full::new(body)).map_err(|error| error.to_string())?;
        let answered = async {
            let response = self.client.request(request).await.map_err(|error| causes(&error))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), bytes_max).collect().await;
            Ok((status, body.map_err(|error| error.to_string())?.to_bytes()))
        };
        let late = |_| Err(format!("nothing within {} ms", within.as_millis()));
        tokio::time::timeout(within, answered).await.unwrap_or_else(late)
    }
}

/// An error with what caused it: the outermost says little.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn read_key(option: &'static str, path: &Path) -> Result<HeaderValue> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::io("reading", path, error, "Name a file that holds the key alone"))?;
    let wrong = || Error::config(option, "the file holds no key", "Write the key alone into the file, as text");
    let key = Some(text.trim()).filter(|key| !key.is_empty()).ok_or_else(wrong)?;
    let mut header = HeaderValue::from_str(&format!("Bearer {key}")).map_err(|_| wrong())?;
    header.set_sensitive(true);
    Ok(header)
}

fn roots(ca: Option<&Path>) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    // A machine without certificates of its own can still reach engines over plain HTTP.
    let (_added, _ignored) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let Some(path) = ca else { return Ok(roots) };
    let wrong = |problem: String| {
        Error::config("engine-ca", format!("{}: {problem}", path.display()), "Name a PEM file with certificates")
    };
    let found = CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))?;
    let mut count = 0;
    for certificate in found {
        roots.add(certificate.map_err(|error| wrong(error.to_string()))?).map_err(|error| wrong(error.to_string()))?;
        count += 1;
    }
    if count == 0 { Err(wrong("it holds no certificate".to_owned())) } else { Ok(roots) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_none_are_refused_by_name() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let open = |ca: Option<&Path>, key: Option<&Path>| {
            let options =
                UpstreamOptions { ca: ca.map(Path::to_owned), key: key.map(Path::to_owned), ..Default::default() };
            Upstream::open(&options)
        };
        assert!(open(None, None).is_ok());
        assert!(open(Some(file.path()), None).expect_err("empty").to_string().contains("engine-ca"));
        assert!(open(None, Some(file.path())).expect_err("empty").to_string().contains("engine-key"));
        std::fs::write(file.path(), "two\nlines").expect("written");
        assert!(open(None, Some(file.path())).expect_err("no header").to_string().contains("engine-key"));
        assert!(open(None, Some(Path::new("/no/such/file"))).is_err());
        std::fs::write(file.path(), " secret\n").expect("written");
        let made = open(None, Some(file.path())).expect("a key");
        assert!(!format!("{made:?}").contains("secret"), "keys are not shown");
    }
}
