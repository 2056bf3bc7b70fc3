//! `kvcellar index serve`: an index of a fleet, asked over HTTP.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::answer::{self, UnreadBody};
use super::clients::ClientOptions;
use super::descriptors;
use kvcellar_block::error::{Error, Result};
use kvcellar_discovery::Places;
use kvcellar_engine::config::size;
use kvcellar_index::Index;
use kvcellar_index::api::serving::{self, Server};
use kvcellar_index::api::{self, Service, ServiceLimits};
use kvcellar_index::fleet::{Fleet, Source};
use kvcellar_index::tiers::Weights;

/// Where engines are found.
#[derive(Debug, Clone, Args)]
pub struct Sources {
    /// The places.
    #[command(flatten)]
    pub places: Places<Source>,
    /// The model of engines that do not name theirs.
    #[arg(long)]
    pub model: Option<String>,
}

impl Sources {
    /// All engines there are now.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Io`], [`Error::TryLater`].
    pub async fn look(&self) -> Result<Vec<Source>> {
        Ok(self.with_models(self.places.open().await?.look().await?))
    }

    fn with_models(&self, mut found: Vec<Source>) -> Vec<Source> {
        for source in &mut found {
            source.model = source.model.take().or_else(|| self.model.clone());
        }
        found
    }
}

/// Options of the service.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Where engines are found.
    #[command(flatten)]
    pub sources: Sources,
    /// Address of the HTTP service. Anything but loopback should have a token.
    #[arg(long, default_value = "127.0.0.1:8090")]
    pub listen: SocketAddr,
    /// Bound of the index's memory.
    #[arg(long, default_value = "1GiB")]
    pub memory: String,
    /// Tokens of a block of the index; unless given, those of the first engine's blocks.
    #[arg(long, default_value_t = 0)]
    pub block_tokens: u32,
    /// A file with the token that requests must bear.
    #[arg(long)]
    pub token_file: Option<PathBuf>,
    /// Another index, e.g. `http://10.0.0.9:8090`, whose blocks this one takes over before it
    /// answers. The token is sent to it, too.
    #[arg(long)]
    pub catch_up: Option<String>,
    /// Requests a second; 0: no bound.
    #[arg(long, default_value_t = 0)]
    pub requests_per_second: u32,
    /// Largest body of a request.
    #[arg(long, default_value = "16MiB")]
    pub body: String,
    /// What clients may do.
    #[command(flatten)]
    pub clients: ClientOptions,
}

/// Runs the service until it is told to stop.
pub fn serve(options: &Options) -> i32 {
    let outcome = serving::block_on(run(options));
    match outcome {
        Ok(()) => 0,
        Err(error) => super::refused(&error),
    }
}

async fn run(options: &Options) -> Result<()> {
    descriptors::raise(options.clients.connections.into());
    let memory = size::parse("memory", &options.memory.as_str().into())?;
    let body = size::parse("body", &options.body.as_str().into())?;
    let token = options.token_file.as_ref().map(|path| {
        let read = std::fs::read_to_string(path);
        let text = read.map_err(|error| Error::io("reading", path, error, "Name a file with a token"))?;
        match text.trim() {
            "" => Err(Error::config("token-file", "it is empty", "Write a token into it")),
            token => Ok(token.to_owned()),
        }
    });
    let token = token.transpose()?;
    let index = Arc::new(Index::new(options.block_tokens, memory as usize)?);
    let sources = &options.sources;
    let finder = sources.places.open().await?;
    let found = sources.with_models(finder.look().await?);
    if found.is_empty() && !sources.places.may_change() {
        return Err(kvcellar_discovery::nobody());
    }
    if token.is_none() && !options.listen.ip().is_loopback() {
        log::warn!("{} can be reached from elsewhere and asks for no token: see --token-file", options.listen);
    }
    let mut fleet = Fleet::new(Arc::clone(&index));
    if let Some(other) = &options.catch_up {
        // Without it engines are followed from their replays, as by the first index of all.
        match catch_up(other, token.as_deref(), memory as usize).await.and_then(|snapshot| fleet.resume(&snapshot)) {
            Ok(engines) => log::info!("{engines} engines taken over from {other}"),
            Err(error) => log::warn!("nothing is taken over from {other}: {error}"),
        }
    }
    fleet.set(found);
    let service = Arc::new(Service::new(index, fleet.states(), Weights::default()));
    let limits =
        ServiceLimits { body_bytes_max: body as usize, requests_per_second: options.requests_per_second, token };
    let listener = serving::listen("listen", options.listen, "index at http://").await?;
    let server = Server {
        listener,
        router: api::routes(Arc::clone(&service), limits),
        limits: options.clients.limits(),
        counts: Arc::clone(&service.clients),
    };
    let expiry = async {
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            service.expire();
        }
    };
    tokio::select! {
        () = finder.keep(|found| fleet.set(sources.with_models(found))) => Ok(()),
        () = server.serve(serving::told_to_stop()) => Ok(()),
        () = expiry => Ok(()),
    }
}

/// Another index's snapshot, of at most so many bytes.
async fn catch_up(other: &str, token: Option<&str>, bytes_max: usize) -> Result<Vec<u8>> {
    let later = |problem: String| Error::TryLater { what: other.to_owned(), holder: problem };
    let client = reqwest::Client::builder().connect_timeout(Duration::from_secs(5)).build();
    let mut request = client.map_err(|error| later(error.to_string()))?.get(format!("{other}/v1/snapshot"));
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    let answer = request.send().await.and_then(reqwest::Response::error_for_status);
    let answer = answer.map_err(|error| later(error.to_string()))?;
    answer::body(answer, bytes_max).await.map_err(|unread| match unread {
        UnreadBody::TooLong => later(format!("its snapshot is larger than {bytes_max} bytes")),
        UnreadBody::Broken(error) => later(error.to_string()),
    })
}
