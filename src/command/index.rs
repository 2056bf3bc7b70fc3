//! `kvcellar index serve`: an index of a fleet, asked over HTTP.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use kvcellar_block::error::{Error, Result};
use kvcellar_engine::config::size;
#[cfg(feature = "kubernetes")]
use kvcellar_events::subscriber::Address;
use kvcellar_index::Index;
use kvcellar_index::api::serving;
use kvcellar_index::api::{self, Service, ServiceLimits};
use kvcellar_index::fleet::Fleet;
use kvcellar_index::fleet::sources::{self, Source};
use kvcellar_index::tiers::Weights;

/// Where engines are found.
#[derive(Debug, Clone, Args)]
pub struct Sources {
    /// An engine: an address like `tcp://10.0.0.1:5557`, or
    /// endpoint=...,replay=...,name=...,model=...[,bind=true]. May be repeated.
    #[arg(long = "engine", value_name = "ENGINE")]
    pub engines: Vec<String>,
    /// A JSON file with a list of engines, read again when it changes.
    #[arg(long)]
    pub engines_file: Option<PathBuf>,
    /// A name that resolves to every engine (a headless service): host:port or
    /// host:port:replay-port. Resolved again every few seconds.
    #[arg(long)]
    pub dns: Option<String>,
    /// Engines as pods.
    #[cfg(feature = "kubernetes")]
    #[command(flatten)]
    pub pods: Option<kvcellar_index::fleet::kubernetes::Pods>,
    /// Ports of their sockets: `port` or `port:replay-port`.
    #[cfg(feature = "kubernetes")]
    #[arg(long, default_value = "5557:5558")]
    pub kubernetes_ports: String,
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
        let mut found = self.engines.iter().map(|text| sources::parse(text)).collect::<Result<Vec<_>>>()?;
        if let Some(path) = &self.engines_file {
            found.extend(sources::read(path)?);
        }
        if let Some(name) = &self.dns {
            found.extend(sources::resolve(name, self.model.as_deref()).await?);
        }
        #[cfg(feature = "kubernetes")]
        found.extend(self.pods().await?);
        for source in &mut found {
            source.model = source.model.take().or_else(|| self.model.clone());
        }
        Ok(found)
    }

    #[cfg(feature = "kubernetes")]
    async fn pods(&self) -> Result<Vec<Source>> {
        let Some(pods) = &self.pods else { return Ok(Vec::new()) };
        let number = |text: &str| {
            text.parse::<u16>().map_err(|_| {
                let problem = format!("`{}` is no port", self.kubernetes_ports);
                Error::config("kubernetes-ports", problem, "Write e.g. 5557:5558 (port:replay port)")
            })
        };
        let (port, replay) = match self.kubernetes_ports.split_once(':') {
            Some((port, replay)) => (number(port)?, Some(number(replay)?)),
            None => (number(&self.kubernetes_ports)?, None),
        };
        let at = |address, port| format!("tcp://{}", SocketAddr::new(address, port));
        let source = |(name, address)| Source {
            name,
            model: None,
            address: Address { endpoint: at(address, port), replay: replay.map(|port| at(address, port)), bind: false },
        };
        Ok(pods.look().await?.into_iter().map(source).collect())
    }

    /// Some engines are found anew every time.
    fn is_asked_for(&self) -> bool {
        #[cfg(feature = "kubernetes")]
        let pods = self.pods.is_some();
        #[cfg(not(feature = "kubernetes"))]
        let pods = false;
        self.dns.is_some() || pods
    }

    fn may_change(&self) -> bool {
        self.engines_file.is_some() || self.is_asked_for()
    }

    /// Keeps a fleet as it is found, for ever.
    pub async fn keep(&self, fleet: &mut Fleet) {
        let look = async || self.look().await;
        super::discovery::keep(self.engines_file.as_deref(), self.is_asked_for(), look, |found| fleet.set(found)).await;
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
    let found = options.sources.look().await?;
    if found.is_empty() && !options.sources.may_change() {
        return Err(super::discovery::nobody());
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
    let router = api::routes(Arc::clone(&service), limits);
    let expiry = async {
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            service.expire();
        }
    };
    tokio::select! {
        ended = serving::serve(listener, router, serving::told_to_stop()) => {
            ended.map_err(|error| Error::io("serving", "http", error, "Look at the log"))
        }
        () = options.sources.keep(&mut fleet) => Ok(()),
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
    let mut answer = answer.map_err(|error| later(error.to_string()))?;
    let mut snapshot = Vec::new();
    while let Some(part) = answer.chunk().await.map_err(|error| later(error.to_string()))? {
        if snapshot.len() + part.len() > bytes_max {
            return Err(later(format!("its snapshot is larger than {bytes_max} bytes")));
        }
        snapshot.extend_from_slice(&part);
    }
    Ok(snapshot)
}
