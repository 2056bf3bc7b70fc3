//! Which other routers there are, and where they may ask this one.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use kvcellar_block::error::{Error, Result};

use crate::limits;

/// Options of several routers before one fleet.
#[derive(Debug, Clone, Default, Args)]
pub struct PeerOptions {
    /// Another router before the same engines: where its --peer-listen is. May be repeated.
    #[arg(long = "peer", value_name = "URL", requires = "peer_listen")]
    pub urls: Vec<String>,
    /// A name with an address for each router, with their port: this router's own is left out.
    #[arg(long = "peers-dns", value_name = "NAME:PORT", requires = "peer_listen")]
    pub name: Option<String>,
    /// Address at which other routers ask this one what it has in flight.
    #[arg(long, value_name = "ADDRESS")]
    pub peer_listen: Option<SocketAddr>,
    /// File with a key that all these routers share. Without it whoever reaches --peer-listen is
    /// answered.
    #[arg(long, value_name = "FILE", requires = "peer_listen")]
    pub peer_key: Option<PathBuf>,
}

impl PeerOptions {
    /// The peers that are named, as URLs without a slash at the end.
    ///
    /// # Errors
    /// [`Error::Config`]: one is no URL, there are too many, or there is nobody to share with.
    pub fn urls(&self) -> Result<Vec<String>> {
        if self.peer_listen.is_some() && self.urls.is_empty() && self.name.is_none() {
            let problem = "no other router is named";
            return Err(Error::config("peer-listen", problem, "Add --peer URL or --peers-dns NAME:PORT"));
        }
        if self.urls.len() > limits::PEERS_MAX {
            let problem = format!("{} routers are named, and at most {} can be", self.urls.len(), limits::PEERS_MAX);
            return Err(Error::config("peer", problem, "Name fewer"));
        }
        let is_port = self.name.as_ref().is_none_or(|name| {
            name.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
        });
        if !is_port {
            let problem = "it names no port";
            return Err(Error::config("peers-dns", problem, "Write NAME:PORT, with the port of --peer-listen"));
        }
        self.urls.iter().map(|url| checked(url)).collect()
    }
}

fn checked(url: &str) -> Result<String> {
    let wrong = || {
        let problem = format!("`{url}` is no http://host:port or https://host");
        Error::config("peer", problem, "Write e.g. http://10.0.0.2:8093, where that router's --peer-listen is")
    };
    let url = url.trim_end_matches('/');
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://")).ok_or_else(wrong)?;
    let is_authority = rest.parse::<axum::http::uri::Authority>().is_ok();
    if is_authority { Ok(url.to_owned()) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(options: &PeerOptions) -> String {
        options.urls().err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn peers_are_urls() {
        let of = |urls: &[&str]| PeerOptions {
            urls: urls.iter().map(|it| (*it).to_owned()).collect(),
            ..PeerOptions::default()
        };
        assert_eq!(of(&["http://h:1/", "https://h"]).urls().expect("two"), ["http://h:1", "https://h"]);
        for wrong in ["h:1", "tcp://h:1", "http://", "http://h:1/path", "http://a b"] {
            assert!(problem(&of(&[wrong])).contains("peer"), "{wrong}");
        }
        assert!(problem(&of(&["http://h:1"; limits::PEERS_MAX + 1])).contains("at most"));
        let named = |name: &str| PeerOptions { name: Some(name.to_owned()), ..PeerOptions::default() };
        assert_eq!(problem(&named("routers.svc:8093")), "");
        assert!(problem(&named("routers.svc")).contains("no port"));
        let alone = PeerOptions { peer_listen: Some(([127, 0, 0, 1], 0).into()), ..PeerOptions::default() };
        assert!(problem(&alone).contains("no other router"));
    }
}
